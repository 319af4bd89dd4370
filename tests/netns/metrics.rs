//! Metrics and the port for people: what they say of real traffic, who gets them, and what they cannot do.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use forwarder_tests::{
    api,
    daemon::{Daemon, Datapath, run_to_failure},
    deadline::{wait_for, wait_until},
    document::Row,
    netns::Netns,
    topology::{Family, Topology},
};
use prometheus_parse::{Scrape, Value};

use crate::scene::{PORT, Scene};

const LOOPBACK: &str = "127.0.0.1:9100";

/// Sends a request from a namespace, and returns all that comes back.
fn request(netns: &Netns, address: &str, method: &str, path: &str) -> Result<String> {
    let address: SocketAddr = address.parse()?;
    let mut stream = netns.enter(|| TcpStream::connect(address))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let text = format!("{method} {path} HTTP/1.0\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(text.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A metric's name with its labels.
pub(crate) type Series = (String, BTreeMap<String, String>);

/// Everything that a parser of others finds in the metrics.
fn parse(text: &str) -> BTreeMap<Series, f64> {
    let lines = text.lines().map(|line| Ok(line.to_owned()));
    let scrape = Scrape::parse(lines).expect("metrics that can be parsed");
    let samples = scrape.samples.into_iter().filter_map(|sample| {
        let value = match sample.value {
            Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value) => value,
            _ => return None,
        };
        let labels = sample.labels.iter();
        let labels = labels.map(|(name, value)| (name.clone(), value.clone()));
        Some(((sample.metric, labels.collect()), value))
    });
    samples.collect()
}

pub(crate) fn scrape(host: &Netns) -> Result<(String, BTreeMap<Series, f64>)> {
    let answer = request(host, LOOPBACK, "GET", "/metrics")?;
    let (head, text) = answer.split_once("\r\n\r\n").context("a body")?;
    assert!(
        head.contains("200 OK") && head.contains("application/openmetrics-text"),
        "{head}"
    );
    assert!(text.ends_with("# EOF\n"), "the whole text: {text}");
    let series = parse(text);
    Ok((text.into(), series))
}

/// The only series of a metric whose labels have these values.
#[track_caller]
pub(crate) fn value(series: &BTreeMap<Series, f64>, name: &str, labels: &[(&str, &str)]) -> f64 {
    let is_meant = |(metric, has): &Series| {
        let mut labels = labels.iter();
        metric == name && labels.all(|(label, value)| has.get(*label).is_some_and(|it| it == value))
    };
    let mut found = series.iter().filter(|(series, _)| is_meant(series));
    let (Some((_, value)), None) = (found.next(), found.next()) else {
        panic!("not one {name} with {labels:?}: {series:#?}");
    };
    *value
}

fn traffic_is_counted_by_publish_and_owner(datapath: Datapath, refusal: &str) {
    let flags = ["--metrics", LOOPBACK];
    let scene = Scene::tcp().idle().by(datapath).flags(&flags).start();
    let (topology, daemon) = scene.parts();
    daemon
        .control(&["publish", scene.spec(), "--owner", "docker:web"])
        .unwrap();
    let closed = format!("8099:{}:80", topology.backend.address(Family::V4));
    daemon
        .control(&["publish", &closed, "--allow", "203.0.113.0/24"])
        .unwrap();
    let frontend = format!("*:{PORT}");
    let publish = [
        ("publish", frontend.as_str()),
        ("owner", "docker:web"),
        ("protocol", "tcp"),
        ("id", "1"),
    ];
    let (_, mut before) = scrape(&topology.host).unwrap();
    assert_eq!(
        value(&before, "forwarder_publish_packets_total", &publish),
        0.0
    );
    let mut long = scene.connect();
    for _ in 0..20 {
        scene.ask("hello").unwrap();
        long.ask("hello").unwrap();
        let (_, now) = scrape(&topology.host).unwrap();
        for ((name, labels), value) in &before {
            let after = now.get(&(name.clone(), labels.clone()));
            assert!(
                !name.ends_with("_total") || after.is_some_and(|after| after >= value),
                "{name} {labels:?} fell from {value} to {after:?}"
            );
        }
        before = now;
    }
    let ours = |name: &str| value(&before, name, &publish);
    assert!(ours("forwarder_publish_flows_begun_total") >= 21.0);
    assert!(ours("forwarder_publish_packets_total") > 40.0);
    assert!(ours("forwarder_publish_bytes_total") > 400.0);
    assert!(ours("forwarder_publish_flows") >= 1.0);
    assert_eq!(value(&before, "forwarder_publishes", &[]), 2.0);
    let begun = value(&before, "forwarder_proxy_flows_begun_total", &[]);
    assert_eq!(begun >= 21.0, datapath == Datapath::Userland, "{begun}");
    let refused = SocketAddr::new(topology.host_address(Family::V4), 8099);
    wait_until("a refusal in the metrics", || {
        let patience = Duration::from_millis(100);
        let _ = topology
            .client
            .enter(|| TcpStream::connect_timeout(&refused, patience));
        let (_, now) = scrape(&topology.host).unwrap();
        let is_counted = |name: &str, publish: Option<&str>| {
            now.iter().any(|((metric, labels), value)| {
                metric == name
                    && labels.get("reason").is_some_and(|it| it == refusal)
                    && labels.get("publish").map(String::as_str) == publish
                    && *value > 0.0
            })
        };
        is_counted("forwarder_publish_refused_total", Some("*:8099"))
            && is_counted("forwarder_refused_total", None)
    });
    // The control socket says the same, and neither says who came.
    let answer = api::ask(daemon, "GET", "/metrics", "").unwrap();
    let by_socket = answer.body.as_str().unwrap().to_owned();
    let (by_tcp, series) = scrape(&topology.host).unwrap();
    let names = |series: &BTreeMap<Series, f64>| series.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&parse(&by_socket)), names(&series));
    let client = topology.client_address(Family::V4).to_string();
    for text in [by_socket, by_tcp] {
        assert!(!text.contains(&client), "{client} in {text}");
    }
    scene.stop();
}

#[test]
fn traffic_of_the_fast_path_is_counted_by_publish_and_owner() {
    traffic_is_counted_by_publish_and_owner(Datapath::Ebpf, "not_allowed");
}

#[test]
fn traffic_of_the_proxy_is_counted_by_publish_and_owner() {
    traffic_is_counted_by_publish_and_owner(Datapath::Userland, "userland_not_allowed");
}

/// While a client talks, its rate is in the list, and later no more. A publish is as old as its number, also after a restart.
fn the_list_says_rates_and_age(datapath: Datapath) {
    let mut scene = Scene::udp().idle().by(datapath).with_state().start();
    scene.daemon.control(&["publish", scene.spec()]).unwrap();
    let since = scene.daemon.entry().unwrap().since;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    assert!(now.as_secs() - since < 60, "{since}");
    let rates = || {
        let entry = scene.daemon.entry().unwrap();
        [entry.packets_per_second, entry.bytes_per_second]
    };
    assert_eq!(rates(), [0.0, 0.0]);
    let [packets, bytes] = wait_for("a rate", || {
        scene.ask("hello").unwrap();
        let now = rates();
        (now[0] > 0.0).then_some(now)
    })
    .unwrap();
    assert!(bytes >= packets * "hello".len() as f64, "{bytes} {packets}");
    wait_until("silence", || rates() == [0.0, 0.0]);
    scene.daemon.kill().unwrap();
    scene.daemon.restart().unwrap();
    assert_eq!(scene.daemon.entry().unwrap().since, since);
    let table = scene.daemon.control(&["list"]).unwrap();
    let header = table.lines().next().unwrap();
    for column in ["AGE", "PACKETS/S", "BYTES/S"] {
        assert!(header.contains(column), "{table}");
    }
    scene.stop();
}

#[test]
fn the_list_says_rates_and_age_on_the_fast_path() {
    the_list_says_rates_and_age(Datapath::Ebpf);
}

#[test]
fn the_list_says_rates_and_age_of_the_proxy() {
    the_list_says_rates_and_age(Datapath::Userland);
}

#[test]
fn a_scrape_of_five_thousand_publishes_holds_nobody_up() {
    const PUBLISHES: usize = 5000;
    let flags = ["--metrics", LOOPBACK];
    let scene = Scene::tcp().silent().idle().auto().flags(&flags).start();
    let (topology, daemon) = scene.parts();
    let specs: Vec<String> = (0..PUBLISHES)
        .map(|number| format!("127.0.0.1:{}:172.31.0.2:80", 10_000 + number))
        .collect();
    let body = serde_json::to_string(&specs).unwrap();
    let answer = api::ask(daemon, "PUT", "/v1/owners/many", &body).unwrap();
    assert_eq!(answer.status, 200);
    let host = &topology.host;
    let counted = thread::scope(|scope| {
        let scrapes: Vec<_> = (0..2).map(|_| scope.spawn(|| scrape(host))).collect();
        // Changes go on meanwhile.
        for _ in 0..3 {
            daemon.control(&["publish", "9:172.31.0.2:80"]).unwrap();
            daemon.control(&["unpublish", "9:172.31.0.2:80"]).unwrap();
        }
        let scrapes = scrapes.into_iter().map(|it| it.join().unwrap().unwrap());
        let of_many = |(_, series): (String, BTreeMap<Series, f64>)| {
            let named = series.keys().filter(|(name, labels)| {
                name == "forwarder_publish_bytes_total" && labels["owner"] == "many"
            });
            named.count()
        };
        scrapes.map(of_many).collect::<Vec<_>>()
    });
    assert_eq!(counted, [PUBLISHES; 2]);
    scene.stop();
}

#[test]
fn an_address_that_others_reach_needs_a_list_of_clients() {
    let host = Netns::new("host").unwrap();
    host.ip("link set lo up").unwrap();
    for (flags, part) in [
        (["--metrics", "0.0.0.0:9100"], "--metrics-allow CIDR"),
        (["--metrics-allow", "10.0.0.0/8"], "without --metrics"),
    ] {
        let (status, errors) = run_to_failure(&host, &flags).unwrap();
        assert_eq!(status.code(), Some(2), "{errors}");
        assert!(errors.contains(part), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
}

#[test]
fn who_has_the_port_for_metrics_is_named() {
    let host = Netns::new("host").unwrap();
    host.ip("link set lo up").unwrap();
    let _held = host.enter(|| TcpListener::bind(LOOPBACK)).unwrap();
    let (status, errors) = run_to_failure(&host, &["--metrics", LOOPBACK]).unwrap();
    assert_eq!(status.code(), Some(1), "{errors}");
    let holder = format!("(held by pid {}, ", std::process::id());
    assert!(errors.contains(&holder), "{errors}");
}

#[test]
fn who_is_not_on_the_list_gets_nothing() {
    let topology = Topology::new().unwrap();
    let client = format!("{}/32", topology.client_address(Family::V4));
    let flags = ["--metrics", "[::]:9100", "--metrics-allow", &client];
    let scene = Scene::tcp().silent().idle().by(Datapath::Userland);
    let scene = scene.flags(&flags).start_in(topology);
    let topology = &scene.topology;
    let address = SocketAddr::new(topology.host_address(Family::V4), 9100).to_string();
    let answer = request(&topology.client, &address, "GET", "/metrics").unwrap();
    assert!(answer.contains("forwarder_build_info"), "{answer}");
    for (netns, address) in [
        (&topology.host, LOOPBACK.to_owned()),
        (
            &topology.backend.netns,
            SocketAddr::new(topology.backend.gateway(Family::V4), 9100).to_string(),
        ),
    ] {
        // Closed or reset, depending on who is faster.
        let answer = request(netns, &address, "GET", "/metrics").unwrap_or_default();
        assert_eq!(answer, "", "from {}", netns.label());
    }
    scene.stop();
}

#[test]
fn nothing_is_changed_by_the_port_for_reading() {
    let scene = Scene::tcp().silent().auto();
    let scene = scene.flags(&["--metrics", LOOPBACK]).start();
    let (topology, daemon) = scene.parts();
    let before = daemon.list().unwrap();
    for (method, path, status) in [
        ("POST", "/v1/publishes", 405),
        ("DELETE", "/v1/publishes/1", 404),
        ("PUT", "/v1/publishes/1/backends", 404),
        ("POST", "/v1/unpublish", 404),
        ("PUT", "/v1/owners/cli", 404),
        ("DELETE", "/v1/owners/cli", 404),
        ("POST", "/v1/leases", 404),
        ("POST", "/v1/reload", 404),
        ("GET", "/v1/flows", 404),
        ("DELETE", "/v1/flows?publish=1", 404),
        ("GET", "/v1/trace", 404),
        ("GET", "/v1/events", 404),
        ("PUT", "/v1/bans/192.0.2.0%2F24", 404),
        ("POST", "/metrics", 405),
    ] {
        let answer = request(&topology.host, LOOPBACK, method, path).unwrap();
        let line = answer.lines().next().unwrap_or_default();
        assert!(
            line.contains(&status.to_string()),
            "{method} {path}: {answer}"
        );
    }
    assert_eq!(daemon.list().unwrap(), before);
    let answer = request(&topology.host, LOOPBACK, "GET", "/v1/publishes").unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    let rows: Vec<Row> = serde_json::from_str(body).unwrap();
    assert_eq!(rows, before, "what is read is the same");
    scene.stop();
}

#[test]
fn every_change_is_a_line_of_the_audit_log() {
    let host = Netns::new("host").unwrap();
    host.ip("link set lo up").unwrap();
    let flags = ["--log", "warn,audit=info"];
    let daemon = Daemon::start_with(&host, &[], Datapath::Userland, &flags).unwrap();
    let spec = "8080:172.31.0.2:80/tcp";
    daemon.control(&["publish", spec]).unwrap();
    daemon.control(&["publish", spec]).unwrap_err();
    daemon
        .control(&["unpublish", "1", "--owner", "docker:web"])
        .unwrap_err();
    daemon.control(&["reload"]).unwrap_err();
    daemon.control(&["unpublish", "1", "--drain"]).unwrap();
    let expected = [
        r#"owner=cli change="publish 8080:172.31.0.2:80/tcp" result="done""#,
        r#"owner=cli change="publish 8080:172.31.0.2:80/tcp" result="publish 8080"#,
        r#"owner=docker:web change="unpublish 1 (cut)" result="publish 1"#,
        r#"owner=config change="reload" result="there is no configuration file"#,
        r#"owner=cli change="unpublish 1 (drain)" result="done""#,
    ];
    wait_for("the lines of all changes", || {
        let said = daemon.said();
        let lines: Vec<&str> = said
            .lines()
            .filter(|line| line.contains("uid=0 pid="))
            .collect();
        let agree = |(line, part): (&&str, &str)| line.contains(part);
        (lines.len() == expected.len() && lines.iter().zip(expected).all(agree)).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}: {}", daemon.said()));
    daemon.stop().unwrap();
}
