//! `run --docker`: ports that the engine holds for its containers, and publishes that follow a container.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    process::Output,
    time::Duration,
};

use forwarder_tests::{
    api,
    daemon::{Daemon, Datapath, forwarder},
    deadline::{wait_for, wait_until},
    document::Row,
    engine::Engine,
    topology::{Container, Family, Topology},
    traffic::{Backend, Protocol, ask, ask_by, send_datagram},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    docker_proxy, metrics,
    scene::{BACKEND_PORT, PORT, backend, backends, frontend, served_to_the_client},
};

/// An instance that follows an engine, and the backends of two containers.
struct Scene {
    daemon: Daemon,
    engine: Engine,
    topology: Topology,
}

impl Scene {
    fn new(flags: &[&str]) -> Self {
        let topology = Topology::new().unwrap();
        let engine = Engine::start().unwrap();
        let socket = engine.socket().display().to_string();
        let flags = [&["--docker", &socket][..], flags].concat();
        let daemon = Daemon::start_with_state(&topology.host, &[], Datapath::Auto, &flags).unwrap();
        let scene = Self {
            daemon,
            engine,
            topology,
        };
        scene.is_heard();
        scene
    }

    /// Waits until the instance follows the engine.
    fn is_heard(&self) {
        wait_until("the watcher", || self.engine.listeners() > 0);
    }

    /// Starts a container that publishes the port.
    fn run(&self, id: &str, container: &Container, labels: &Value) {
        let addresses = [container.address(Family::V4)];
        self.engine.run(id, "web", &addresses, &published(), labels);
    }

    fn frontend(&self) -> SocketAddr {
        frontend(&self.topology, Family::V4)
    }

    /// A socket that holds the port as an engine's does, without a backlog that anybody reads.
    fn held(&self) -> (UdpSocket, TcpListener) {
        self.topology.host.enter(|| {
            let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
            udp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
            (udp, tcp)
        })
    }

    #[track_caller]
    fn wait(&self, what: &str, is_so: impl Fn(&[Row]) -> bool) -> Vec<Row> {
        let rows = wait_for(what, || self.daemon.list().ok().filter(|rows| is_so(rows)));
        rows.unwrap_or_else(|error| {
            panic!(
                "{error:#}: {:#?}\n{}",
                self.daemon.list(),
                self.daemon.said()
            )
        })
    }

    /// Waits until all publishes are this owner's, and so many.
    #[track_caller]
    fn owned(&self, owner: &str, count: usize) -> Vec<Row> {
        self.wait(owner, |rows| {
            rows.len() == count && rows.iter().all(|row| row.owner == owner)
        })
    }

    fn control(&self, words: &[&str]) -> Output {
        let mut command = forwarder(&self.topology.host);
        command.args(words);
        command.args(["--instance", self.daemon.instance()]);
        command.output().unwrap()
    }

    /// What a command fails with, and its status.
    fn refused(&self, words: &[&str]) -> (String, Option<i32>) {
        let output = self.control(words);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (said, output.status.code())
    }
}

fn published() -> Value {
    let port = json!([{"HostIp": "0.0.0.0", "HostPort": PORT.to_string()}]);
    json!({"9000/tcp": port, "9000/udp": port, "9000/sctp": port, "9001/tcp": null})
}

#[test]
fn a_port_that_the_engine_holds_gets_the_fast_path() {
    let scene = Scene::new(&[]);
    let (held, _listener) = scene.held();
    let [tcp, udp] = backends(&scene.topology.backend.netns);
    scene.run("a1", &scene.topology.backend, &Value::Null);
    for row in scene.owned("docker:a1", 3) {
        let is_sctp = row.protocol == "sctp";
        let expected = if is_sctp { "engine" } else { "ebpf" };
        assert_eq!(row.datapath, expected, "{row:?}");
        assert_eq!(row.holder, "engine", "{row:?}");
        assert_eq!(row.container.as_deref(), Some("web"), "{row:?}");
    }
    let listed = scene.daemon.control(&["list"]).unwrap();
    assert!(
        listed.contains("docker:a1 (web)") && listed.contains("), engine"),
        "{listed}"
    );
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        served_to_the_client(&scene.topology, protocol, "by the fast path");
    }
    let client = scene.topology.client.enter(|| {
        let any = (Ipv4Addr::UNSPECIFIED, 0);
        UdpSocket::bind(any).unwrap()
    });
    ask_by(&client, scene.frontend(), "while it is there").unwrap();
    let before = (tcp.requests(), udp.requests());
    scene.engine.end("a1", "web");
    scene.wait("the end of its publishes", <[Row]>::is_empty);
    // What the fast path does not take is the holder's, also of a flow that was there.
    client.send_to(b"after its end", scene.frontend()).unwrap();
    let mut datagram = [0; 64];
    let (length, _) = held.recv_from(&mut datagram).unwrap();
    assert_eq!(&datagram[..length], b"after its end");
    assert_eq!((tcp.requests(), udp.requests()), before);
    scene.daemon.stop().unwrap();
}

#[test]
fn metrics_name_the_container() {
    let scene = Scene::new(&["--metrics", "127.0.0.1:9100"]);
    scene.run("a1", &scene.topology.backend, &Value::Null);
    scene.owned("docker:a1", 3);
    let aside = ["publish", "8081:172.31.0.2:9000"];
    scene.daemon.control(&aside).unwrap();
    // Each publish is one series, or `value` fails.
    let named = |id: &str| {
        let (_, series) = metrics::scrape(&scene.topology.host).unwrap();
        let bytes = "forwarder_publish_bytes_total";
        metrics::value(&series, bytes, &[("id", id)]);
        let of = |(metric, has): &&metrics::Series| metric == bytes && has["id"] == id;
        let (_, labels) = series.keys().find(of).unwrap();
        labels["container"].clone()
    };
    assert_eq!(named("1"), "web");
    assert_eq!(named("4"), "");
    // Under another name, and not under both.
    let addresses = [scene.topology.backend.address(Family::V4)];
    let engine = &scene.engine;
    engine.put("a1", "www", &addresses, &published(), &Value::Null);
    engine.tell("rename", "a1", "www");
    scene.wait("the new name", |rows| {
        rows[0].container.as_deref() == Some("www")
    });
    assert_eq!(named("1"), "www");
    scene.daemon.stop().unwrap();
}

#[test]
fn a_late_end_of_a_container_takes_nothing_of_its_successor() {
    let scene = Scene::new(&[]);
    let (_held, _listener) = scene.held();
    let _backends = backends(&scene.topology.backend.netns);
    scene.run("a1", &scene.topology.backend, &Value::Null);
    scene.owned("docker:a1", 3);
    // The next has its port and its address before anything is heard of the end.
    scene.engine.remove("a1");
    scene.run("b2", &scene.topology.backend, &Value::Null);
    scene.engine.tell("die", "a1", "web");
    scene.owned("docker:b2", 3);
    scene.engine.tell("destroy", "a1", "web");
    // Events are taken one after another.
    let addresses = [scene.topology.peer.address(Family::V4)];
    let other = json!({"1/tcp": [{"HostIp": "", "HostPort": "1"}]});
    scene
        .engine
        .run("c3", "other", &addresses, &other, &Value::Null);
    scene.wait("the one behind it", |rows| rows.len() == 4);
    served_to_the_client(&scene.topology, Protocol::Udp, "the successor");
    scene.daemon.stop().unwrap();
}

#[test]
fn what_has_changed_while_the_engine_was_away_is_seen_at_its_return() {
    let mut scene = Scene::new(&[]);
    let (_held, _listener) = scene.held();
    let _backends = backends(&scene.topology.backend.netns);
    scene.run("a1", &scene.topology.backend, &Value::Null);
    scene.owned("docker:a1", 3);
    scene.engine.hang_up();
    scene.engine.remove("a1");
    let addresses = [scene.topology.backend.address(Family::V4)];
    scene
        .engine
        .put("b2", "web", &addresses, &published(), &Value::Null);
    scene.owned("docker:b2", 3);
    // The instance too comes back with what it had.
    scene.daemon.kill().unwrap();
    scene.engine.hang_up();
    scene.daemon.restart().unwrap();
    assert_eq!(scene.owned("docker:b2", 3)[0].holder, "engine");
    served_to_the_client(&scene.topology, Protocol::Tcp, "again");
    scene.daemon.stop().unwrap();
}

/// An engine can hang or fail at one container, and serve the others.
#[test]
fn a_container_that_the_engine_cannot_speak_of_keeps_no_other_from_being_followed() {
    let scene = Scene::new(&[]);
    let (_held, _listener) = scene.held();
    let _backends = backends(&scene.topology.backend.netns);
    scene.run("a1", &scene.topology.backend, &Value::Null);
    scene.owned("docker:a1", 3);
    scene.engine.break_one("a1");
    scene.engine.tell("start", "a1", "web");
    let addresses = [scene.topology.peer.address(Family::V4)];
    let at = |port: &str| json!({"1/tcp": [{"HostIp": "", "HostPort": port}]});
    let engine = &scene.engine;
    engine.run("b2", "second", &addresses, &at("1"), &Value::Null);
    scene.wait("what an event told of", |rows| rows.len() == 4);
    engine.hang_up();
    engine.put("c3", "third", &addresses, &at("2"), &Value::Null);
    scene.wait("what a list told of", |rows| rows.len() == 5);
    served_to_the_client(&scene.topology, Protocol::Tcp, "as before");
    scene.daemon.stop().unwrap();
}

#[test]
fn a_container_that_waits_for_a_port_still_does_after_the_engine_could_not_speak_of_it() {
    let scene = Scene::new(&[]);
    let addresses = [scene.topology.peer.address(Family::V4)];
    let at = |port: &str| json!({"1/tcp": [{"HostIp": "", "HostPort": port}]});
    let engine = &scene.engine;
    let run = |id: &str, port: &str| engine.run(id, id, &addresses, &at(port), &Value::Null);
    let end = |id: &str| {
        engine.remove(id);
        engine.tell("die", id, id);
    };
    let published = |id: &str| {
        let owner = format!("docker:{id}");
        scene.wait(&owner, |rows| rows.iter().any(|row| row.owner == owner));
    };
    run("a1", "1");
    run("b2", "1");
    run("c3", "3");
    published("c3");
    engine.break_one("b2");
    end("a1");
    run("d4", "4");
    published("d4");
    engine.break_one("nobody");
    end("c3");
    published("b2");
    scene.daemon.stop().unwrap();
}

#[test]
fn a_container_whose_image_the_engine_cannot_speak_of_stays_as_it_is() {
    let scene = Scene::new(&["--docker-labels"]);
    let (_held, _listener) = scene.held();
    let _backends = backends(&scene.topology.backend.netns);
    let labels = json!({"forwarder.max-flows": "100"});
    scene.run("a1", &scene.topology.backend, &labels);
    scene.owned("docker:a1", 3);
    scene.engine.break_one("image");
    scene.engine.tell("start", "a1", "web");
    let addresses = [scene.topology.peer.address(Family::V4)];
    let other = json!({"1/tcp": [{"HostIp": "", "HostPort": "1"}]});
    let engine = &scene.engine;
    engine.run("b2", "second", &addresses, &other, &Value::Null);
    scene.wait("the one behind it", |rows| rows.len() == 4);
    scene.daemon.stop().unwrap();
}

#[test]
fn a_port_of_dockers_proxy_is_the_leases() {
    let scene = Scene::new(&[]);
    let port = json!([{"HostIp": "0.0.0.0", "HostPort": PORT.to_string()}]);
    let _backend = backend(&scene.topology.backend, Protocol::Tcp);
    let addresses = [scene.topology.backend.address(Family::V4)];
    let ports = json!({"9000/tcp": port});
    // The watcher was first, as after a restart of the instance.
    scene
        .engine
        .run("a1", "web", &addresses, &ports, &Value::Null);
    scene.owned("docker:a1", 1);
    let instance = scene.daemon.instance();
    let mut proxy = docker_proxy::start(&scene.topology, instance, "tcp", "0.0.0.0");
    assert_eq!(proxy.said(), "0\n");
    let row = &scene.owned("lease:1", 1)[0];
    assert_eq!(row.holder, "forwarder", "{row:?}");
    // And now it comes second.
    scene.engine.tell("start", "a1", "web");
    let other = json!({"1/udp": [{"HostIp": "0.0.0.0", "HostPort": "1"}]});
    scene
        .engine
        .run("b2", "other", &addresses, &other, &Value::Null);
    let rows = scene.wait("the one behind it", |rows| rows.len() == 2);
    assert_eq!(rows[0].owner, "lease:1", "{rows:?}");
    served_to_the_client(&scene.topology, Protocol::Tcp, "by the lease");
    assert_eq!(proxy.end(Signal::SIGINT), Some(0));
    scene.daemon.stop().unwrap();
}

#[test]
fn labels_restrict_what_the_engine_publishes() {
    let scene = Scene::new(&["--docker-labels"]);
    let (held, _listener) = scene.held();
    let _backends = backends(&scene.topology.backend.netns);
    // What is published by both ways is the engine's.
    let labels = json!({
        "forwarder.allow": "203.0.113.0/24",
        "forwarder.max-flows": "7",
        "forwarder.publish": "8080:9000,8081:9000",
    });
    scene.run("a1", &scene.topology.backend, &labels);
    let rows = scene.owned("docker:a1", 4);
    let of_forwarder = rows.iter().filter(|row| row.holder == "forwarder");
    let ports: Vec<_> = of_forwarder.map(|row| row.frontend.port).collect();
    assert_eq!(ports, [8081]);
    let row = &rows[0];
    assert_eq!(row.allow, ["203.0.113.0/24"]);
    assert_eq!(row.max_flows, Some(7));
    let refused = || scene.daemon.counted("not_allowed").unwrap();
    let before = refused();
    send_datagram(&scene.topology.client, scene.frontend(), "from elsewhere").unwrap();
    wait_until("the refusal", || refused() > before);
    held.set_nonblocking(true).unwrap();
    assert!(held.recv_from(&mut [0; 64]).is_err(), "the holder got it");
    scene.engine.end("a1", "web");
    scene.wait("its end", <[Row]>::is_empty);
    // The image's own say nothing, and what has no meaning opens nothing.
    scene.engine.label_image(labels.clone());
    scene.run("b2", &scene.topology.backend, &labels);
    let row = &scene.owned("docker:b2", 3)[0];
    assert_eq!((row.allow.len(), row.max_flows), (0, None));
    scene.engine.end("b2", "web");
    scene.run(
        "c3",
        &scene.topology.backend,
        &json!({"forwarder.alow": "203.0.113.0/24"}),
    );
    let told = || {
        scene
            .daemon
            .said()
            .contains("forwarder.alow: there is no such label")
            .then_some(())
    };
    wait_for("the mistake", told).unwrap();
    scene.wait("nothing of it", <[Row]>::is_empty);
    scene.daemon.stop().unwrap();
}

#[test]
fn a_publish_follows_its_container() {
    let mut scene = Scene::new(&[]);
    let there = backends(&scene.topology.backend.netns);
    let _elsewhere = backends(&scene.topology.peer.netns);
    let requests = || there.iter().map(Backend::requests).sum::<u64>();
    let run = |scene: &Scene, id: &str, container: &Container| {
        let addresses = [container.address(Family::V4)];
        scene
            .engine
            .run(id, "web", &addresses, &json!({}), &Value::Null);
    };
    run(&scene, "a1", &scene.topology.backend);
    let publish = [
        "publish",
        "--container",
        "web",
        "--max-flows",
        "9",
        "8080:9000",
        "8080:9000/udp",
    ];
    let said = scene.daemon.control(&publish).unwrap();
    assert!(
        said.starts_with("1: 8080:172.31.0.2:9000/tcp (ebpf"),
        "{said}"
    );
    let rows = scene.owned("cli", 2);
    assert_eq!(rows[0].container.as_deref(), Some("web"));
    assert_eq!(rows[0].max_flows, Some(9));
    served_to_the_client(&scene.topology, Protocol::Tcp, "where it is");
    let client = scene.topology.client.enter(|| {
        let any = (Ipv4Addr::UNSPECIFIED, 0);
        UdpSocket::bind(any).unwrap()
    });
    ask_by(&client, scene.frontend(), "begins a flow").unwrap();
    scene.engine.end("a1", "web");
    let stopped = |rows: &[Row]| rows.len() == 2 && rows.iter().all(Row::waits);
    let rows = scene.wait("its end", stopped);
    let reason = rows[0].reason();
    assert_eq!(reason, "not served: container web is not running");
    // Its port is free, and nothing reaches its address, which may be another's.
    let before = requests();
    let (held, listener) = scene.held();
    client.send_to(b"too late", scene.frontend()).unwrap();
    held.recv_from(&mut [0; 64]).unwrap();
    assert_eq!(requests(), before);
    // A restart knows it all.
    scene.daemon.kill().unwrap();
    scene.engine.hang_up();
    scene.daemon.restart().unwrap();
    scene.wait("the same after a restart", stopped);
    scene.is_heard();
    run(&scene, "b2", &scene.topology.peer);
    let is_taken = |row: &Row| row.reason().contains("already in use");
    scene.wait("somebody else's port", |rows| rows.iter().all(is_taken));
    drop((held, listener));
    let address = scene.topology.peer.address(Family::V4);
    scene.wait("its successor", |rows| {
        let served = |row: &Row| row.datapath == "ebpf" && row.backend.address == Some(address);
        rows.iter().all(served)
    });
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        served_to_the_client(&scene.topology, protocol, "elsewhere");
    }
    // One that is given an address stays there.
    let stays = json!([{"address": address, "port": 9000}]).to_string();
    let replaced = api::ask(&scene.daemon, "PUT", "/v1/publishes/1/backends", &stays).unwrap();
    assert_eq!(replaced.body[0]["container"], Value::Null, "{replaced:?}");
    scene.engine.end("b2", "web");
    scene.wait("the end of the other", |rows| {
        rows[0].datapath == "ebpf" && rows[1].waits()
    });
    scene.daemon.control(&["unpublish", "1", "2"]).unwrap();
    scene.wait("nothing", <[Row]>::is_empty);
    scene.daemon.stop().unwrap();
}

#[test]
fn unpublish_takes_back_what_leads_to_a_container() {
    let scene = Scene::new(&[]);
    let backend = &scene.topology.backend;
    let addresses = [Family::V4, Family::V6].map(|family| backend.address(family));
    let own = json!({"9000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "7000"}]});
    scene
        .engine
        .run("a1", "web", &addresses, &own, &Value::Null);
    scene.owned("docker:a1", 1);
    let publish = ["publish", "--container", "web"];
    let ports = ["8080:9000", "127.0.0.1:8081:9000", "8082:9000/udp"];
    scene
        .daemon
        .control(&[&publish[..], &ports].concat())
        .unwrap();
    let elsewhere = ["publish", "8084:172.31.0.2:9000"];
    scene.daemon.control(&elsewhere).unwrap();
    let of_others = ["--owner", "team", "8083:9000"];
    scene
        .daemon
        .control(&[&publish[..], &of_others].concat())
        .unwrap();
    let unpublish = |words: &[&str]| {
        let (said, status) = scene.refused(&[&["unpublish", "--container", "web"], words].concat());
        let rows = scene.daemon.list().unwrap();
        let mut ports: Vec<u16> = rows.iter().map(|row| row.frontend.port).collect();
        ports.sort_unstable();
        ports.dedup();
        (said, status, ports)
    };
    let all = [7000, 8080, 8081, 8082, 8083, 8084];
    // What is not there, or not theirs, leaves the rest as it is.
    for (words, problem, status) in [
        (
            &["8080:9000", "8081:9000"][..],
            "no publish 8081:9000/tcp leads to container web; `forwarder list` shows them",
            1,
        ),
        (&["8080:9000", "8083:9000"], "`--owner team` would", 1),
        (&["8080:9000", "7000:9000"], "belongs to docker:a1", 1),
        (&["1"], "a number needs no --container", 2),
        (&["8080:172.31.0.2:9000"], "leave the backend's address", 2),
    ] {
        let (said, failed, ports) = unpublish(words);
        assert!(
            said.contains(problem) && said.starts_with("error: "),
            "{said}"
        );
        assert_eq!((failed, &ports[..]), (Some(status), &all[..]), "{words:?}");
    }
    // In both families at once.
    let (said, status, ports) = unpublish(&["8080:9000", "127.0.0.1:8081:9000"]);
    assert_eq!((said.as_str(), status), ("", Some(0)));
    assert_eq!(ports, [7000, 8082, 8083, 8084]);
    // Of one that has gone, too, and nothing of others.
    scene.engine.end("a1", "web");
    scene.wait("its end", |rows| {
        let waits = rows.iter().filter(|row| row.waits());
        (rows.len(), waits.count()) == (5, 4)
    });
    assert_eq!(unpublish(&[]).2, [8083, 8084]);
    let (said, status, _) = unpublish(&[]);
    assert!(said.contains("`--owner team` would change it"), "{said}");
    assert_eq!(status, Some(1));
    assert_eq!(unpublish(&["--owner", "team"]).2, [8084]);
    let none = "no publish leads to container web; `forwarder list` shows them";
    assert!(unpublish(&[]).0.contains(none));
    scene.daemon.stop().unwrap();
}

#[test]
fn a_container_that_goes_while_it_is_being_published_is_noticed() {
    let scene = Scene::new(&[]);
    scene.run("a1", &scene.topology.backend, &Value::Null);
    scene.owned("docker:a1", 3);
    // From here on, only the command looks.
    scene.engine.remove_after_next_look("a1");
    let publish = ["publish", "--container", "web", "8081:9000"];
    scene.daemon.control(&publish).unwrap();
    scene.wait("its end", |rows| {
        let stopped = "not served: container web is not running";
        rows.iter().any(|row| row.reason() == stopped)
    });
    scene.daemon.stop().unwrap();
}

#[test]
fn a_container_of_both_families_is_published_in_both() {
    let scene = Scene::new(&[]);
    let backend = &scene.topology.backend;
    let _backend = Backend::start(&backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let addresses = [Family::V4, Family::V6].map(|family| backend.address(family));
    let both =
        json!([{"HostIp": "0.0.0.0", "HostPort": "8081"}, {"HostIp": "::", "HostPort": "8081"}]);
    let ports = json!({"9000/tcp": both});
    scene
        .engine
        .run("a1", "web", &addresses, &ports, &Value::Null);
    scene.owned("docker:a1", 2);
    scene
        .daemon
        .control(&["publish", "--container", "web", "8080:9000"])
        .unwrap();
    scene.wait("all", |rows| rows.len() == 4);
    let hosts = [
        (
            &scene.topology.client,
            scene.topology.host_address(Family::V4),
        ),
        (
            &scene.topology.client,
            scene.topology.host_address(Family::V6),
        ),
        (&scene.topology.host, Family::V4.localhost()),
        (
            &scene.topology.host,
            IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
        ),
    ];
    for port in [PORT, PORT + 1] {
        for (netns, host) in hosts {
            let answer = ask(netns, Protocol::Tcp, SocketAddr::new(host, port), "hello");
            let answer = answer.unwrap_or_else(|error| panic!("{host} port {port}: {error:#}"));
            assert_eq!(answer.seen.is_ipv4(), host.is_ipv4(), "the family stays");
        }
    }
    scene.daemon.stop().unwrap();
}

#[test]
fn a_container_that_cannot_be_followed_is_an_error_in_one_line() {
    let scene = Scene::new(&[]);
    scene.run("a1", &scene.topology.backend, &Value::Null);
    scene.owned("docker:a1", 3);
    let publish = |name: &str, port: &str| {
        let (said, status) = scene.refused(&["publish", "--container", name, port]);
        assert!(said.starts_with("error: "), "{said}");
        (said.lines().next().unwrap().to_owned(), status)
    };
    let none = "error: no container db; `docker ps` shows those that run";
    assert_eq!(publish("db", "80:80"), (none.into(), Some(1)));
    let (said, status) = publish("web", "8080:172.17.0.2:80");
    assert!(said.contains("leave the backend's address out"), "{said}");
    assert_eq!(status, Some(2));
    let (said, status) = publish("../images", "80:80");
    assert!(said.contains("no container's name"), "{said}");
    assert_eq!(status, Some(1));
    let (said, status) = publish("web", "8080:80");
    assert!(
        said.contains("overlaps with") && said.contains("of owner docker:a1"),
        "{said}"
    );
    assert_eq!(status, Some(1));
    let (said, status) = scene.refused(&["publish", "8080:80"]);
    assert!(said.contains("found with --container"), "{said}");
    assert_eq!(status, Some(2));
    let Scene {
        daemon, topology, ..
    } = scene;
    daemon.stop().unwrap();
    let alone = Daemon::start(&topology.host, &[], Datapath::Auto).unwrap();
    let error = alone.control(&["publish", "--container", "web", "80:80"]);
    let error = error.unwrap_err().to_string();
    let words = "the instance follows no engine; start it by `forwarder run --docker`";
    assert!(error.ends_with(words), "{error}");
    alone.stop().unwrap();
}
