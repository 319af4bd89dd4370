//! `run --docker`: dockerd holds the ports of `docker run -p` itself, starts no process for them, and the fast path serves them
//! beside its rules.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Instant,
};

use forwarder_tests::{
    document::{Endpoint, Row},
    topology::Topology,
    traffic::{Backend, Connection, Protocol, ask},
};
use serde_json::{Value, json};

use super::{BOTH, Engine, GATEWAY, PORT, Programs, Scene, engine, run_a_hundred};

fn scene(config: Value) -> Scene {
    let topology = Topology::new().unwrap();
    let host = Programs::from(&topology.host);
    scene_of(topology, host, config)
}

fn scene_of(topology: Topology, host: Programs, config: Value) -> Scene {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start_with(host, folder, config, None).unwrap();
    Scene::followed(topology, engine, &[])
}

impl Scene {
    /// Where Docker's own rules send the port.
    fn backend_of_rules(&self) -> IpAddr {
        let rules = "iptables -t nat -S DOCKER";
        let rules = self.engine.output_of(rules).unwrap();
        let port = format!("--dport {PORT} ");
        let rule = rules.lines().find(|rule| rule.contains(&port));
        let rule = rule.unwrap_or_else(|| panic!("no rule: {rules}"));
        let (_, backend) = rule.split_once("--to-destination ").unwrap();
        backend.split(':').next().unwrap().parse().unwrap()
    }

    /// Waits until the fast path sends the port where Docker's rules do.
    #[track_caller]
    fn agrees_with_the_rules(&self) {
        let backend = self.backend_of_rules();
        self.wait_for_list("the same backend", |rows| {
            let is_so = |row: &Row| row.backend.address == Some(backend);
            rows.len() == 2 && rows.iter().all(is_so)
        });
    }
}

#[test]
fn the_fast_path_serves_ports_that_dockerd_holds() {
    serves_ports_that_dockerd_holds(scene(json!({"userland-proxy": false})));
}

/// The same of an engine of other programs.
pub(super) fn serves_ports_of(topology: Topology, host: Programs) {
    let scene = scene_of(topology, host, json!({"userland-proxy": false}));
    serves_ports_that_dockerd_holds(scene);
}

fn serves_ports_that_dockerd_holds(scene: Scene) {
    let (container, backends) = scene.run("web");
    let rows = scene.wait_for_list("both protocols", |rows| rows.len() == 2);
    for row in &rows {
        let served = (&*row.datapath, &*row.holder, row.container.as_deref());
        assert_eq!(served, ("ebpf", "engine", Some("web")), "{row:?}");
    }
    assert_eq!(scene.engine.proxies().unwrap().processes, 0);
    let forwarded = || scene.daemon.counted("forwarded_original").unwrap();
    let before = forwarded();
    scene.serves_the_lan("by the fast path");
    assert!(forwarded() >= before + 2);
    for (who, host) in [
        (scene.host(), IpAddr::from(Ipv4Addr::LOCALHOST)),
        (scene.host(), scene.lan().ip()),
        (&container, GATEWAY.into()),
        (&container, scene.lan().ip()),
    ] {
        for protocol in BOTH {
            let answer = ask(who, protocol, SocketAddr::new(host, PORT), "hello");
            answer.unwrap_or_else(|error| panic!("{} to {host}: {error:#}", who.label()));
        }
    }
    // What does not move a container changes nothing, and its name is followed.
    scene.engine.docker(&["pause", "web"]).unwrap();
    scene.engine.docker(&["unpause", "web"]).unwrap();
    scene.engine.docker(&["rename", "web", "www"]).unwrap();
    let after = scene.wait_for_list("the new name", |rows| {
        rows.len() == 2
            && rows
                .iter()
                .all(|row| row.container.as_deref() == Some("www"))
    });
    assert_eq!(rows[0].id, after[0].id);
    scene.serves_the_lan("under another name");
    drop((container, backends));
    // A restart may give it another address.
    let address = scene.engine.address("www").unwrap();
    scene.engine.docker(&["stop", "-t", "0", "www"]).unwrap();
    scene.wait_for_list("its end", <[Row]>::is_empty);
    scene.engine.run("squatter", &[]).unwrap();
    scene.engine.docker(&["start", "www"]).unwrap();
    assert_ne!(scene.engine.address("www").unwrap(), address);
    scene.agrees_with_the_rules();
    let _backends = scene.backends("www");
    scene.serves_the_lan("elsewhere");
    // By force, and the port is the next one's.
    scene.engine.docker(&["rm", "-f", "www"]).unwrap();
    let (_container, _backends) = scene.run("next");
    scene.agrees_with_the_rules();
    scene.serves_the_lan("the next");
    scene.stop();
}

#[test]
fn the_fast_path_comes_before_dockers_own_proxy() {
    let scene = scene(json!({}));
    let _backends = scene.run("web");
    assert!(scene.engine.proxies().unwrap().processes > 0);
    scene.wait_for_list("both protocols", |rows| {
        rows.len() == 2 && rows.iter().all(|row| row.datapath == "ebpf")
    });
    scene.serves_the_lan("by the fast path");
    for protocol in BOTH {
        let local = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), PORT);
        ask(scene.host(), protocol, local, "by the proxy").unwrap();
    }
    scene.stop();
}

#[test]
fn a_hundred_ports_take_no_process_and_little_memory() {
    let scene = scene(json!({"userland-proxy": false}));
    let resident = || engine::memory(scene.daemon.pid()).unwrap();
    let before = resident();
    let time = run_a_hundred(&scene.engine);
    let began = Instant::now();
    scene.wait_for_list("the range", |rows| {
        rows.len() == 1 && rows[0].datapath == "ebpf"
    });
    let behind = began.elapsed();
    let grown = resident().private.saturating_sub(before.private);
    eprintln!("Docker takes {time:?}, and the watcher {behind:?} and {grown} KB more");
    assert_eq!(scene.engine.proxies().unwrap().processes, 0);
    assert!(grown < 10_000, "{grown} KB");
    let container = scene.engine.netns("web").unwrap();
    for port in [20_000, 20_099] {
        let _backend = Backend::start(&container, Protocol::Tcp, port).unwrap();
        let frontend = SocketAddr::new(scene.lan().ip(), port);
        ask(&scene.topology.client, Protocol::Tcp, frontend, "of many").unwrap();
    }
    scene.stop();
}

#[test]
fn a_port_leads_to_the_network_that_dockers_rules_lead_to() {
    let scene = scene(json!({"userland-proxy": false}));
    // By their names, one comes before the usual `bridge`, one behind; from one nothing leads out.
    for (name, flags) in [("a", &[][..]), ("z", &[]), ("aa", &["--internal"])] {
        let words = [&["network", "create"], flags, &[name]].concat();
        scene.engine.docker(&words).unwrap();
    }
    scene.run("web");
    scene.agrees_with_the_rules();
    for network in ["z", "aa", "a"] {
        scene
            .engine
            .docker(&["network", "connect", network, "web"])
            .unwrap();
        scene.agrees_with_the_rules();
    }
    for network in ["bridge", "a", "aa"] {
        scene
            .engine
            .docker(&["network", "disconnect", network, "web"])
            .unwrap();
        scene.agrees_with_the_rules();
    }
    let _backends = scene.backends("web");
    scene.serves_the_lan("by the last one");
    let range = [
        "-p",
        "127.0.0.1:20000-20099:20000-20099",
        "-p",
        "[::1]:53:53/udp",
    ];
    scene.engine.run("range", &range).unwrap();
    let rows = scene.wait_for_list("a range as one", |rows| rows.len() == 3);
    let frontend = Endpoint {
        address: Some(Ipv4Addr::LOCALHOST.into()),
        zone: None,
        port: 20_000,
        end_port: 20_099,
    };
    let is_there = rows.iter().any(|row| row.frontend == frontend);
    assert!(is_there, "{rows:?}");
    scene.stop();
}

#[test]
fn containers_outlive_dockerd_and_are_served_meanwhile() {
    let mut scene = scene(json!({"userland-proxy": false, "live-restore": true}));
    let (_container, backends) = scene.run("web");
    let rows = scene.wait_for_list("its publishes", |rows| rows.len() == 2);
    let mut connection = Connection::open(&scene.topology.client, scene.lan()).unwrap();
    connection.ask("before").unwrap();
    scene.engine.kill().unwrap();
    connection.ask("while it is dead").unwrap();
    scene.serves_the_lan("while it is dead");
    scene.engine.restart().unwrap();
    connection.ask("after").unwrap();
    let same = scene.wait_for_list("the same", |rows| rows.len() == 2);
    assert_eq!(same[0].id, rows[0].id);
    scene.serves_the_lan("after");
    // One that ends while nobody looks is seen to have ended.
    scene.engine.kill().unwrap();
    drop(backends);
    scene.engine.restart().unwrap();
    scene.engine.docker(&["rm", "-f", "web"]).unwrap();
    scene.wait_for_list("its end", <[Row]>::is_empty);
    let answer = ask(&scene.topology.client, Protocol::Tcp, scene.lan(), "nobody");
    assert!(answer.is_err());
    scene.stop();
}
