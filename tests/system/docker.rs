//! Docker's own daemon with `userland-proxy-path`: what containers publish is served by the instance, to every kind of
//! client, and nothing that ends or hangs on our side keeps Docker from its work.

mod engine;
mod held;
mod ipv6;
mod labels;
mod newer;
mod page;
mod podman;
mod programs;
mod sctp;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::wait_for,
    document::Row,
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use self::{
    engine::{Engine, GATEWAY},
    programs::Programs,
};

const PORT: u16 = 8080;
const BACKEND_PORT: u16 = 9000;
const BOTH: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

/// A machine with an instance and an engine that knows of it.
struct Scene {
    // In the order of their ends.
    engine: Engine,
    daemon: Daemon,
    topology: Topology,
}

impl Scene {
    /// An instance that follows the engine.
    fn followed(topology: Topology, engine: Engine, flags: &[&str]) -> Self {
        let socket = engine.socket();
        let flags = [&["--docker", socket.as_str()], flags].concat();
        let host = &topology.host;
        let daemon = Daemon::start_with_state(host, &[], Datapath::Auto, &flags).unwrap();
        Self {
            engine,
            daemon,
            topology,
        }
    }

    fn new(iptables: bool) -> Self {
        let topology = Topology::new().unwrap();
        let host = Programs::from(&topology.host);
        Self::served(topology, host, iptables)
    }

    /// An instance that the engine's proxies ask.
    fn served(topology: Topology, host: Programs, iptables: bool) -> Self {
        Self::served_with(topology, host, json!({"iptables": iptables}))
    }

    /// The same of an engine with this configuration.
    fn served_with(topology: Topology, host: impl Into<Programs>, config: Value) -> Self {
        let daemon = Daemon::start_with_state(&topology.host, &[], Datapath::Auto, &[]).unwrap();
        let engine = Engine::start(host, config, Some(daemon.instance())).unwrap();
        Self {
            engine,
            daemon,
            topology,
        }
    }

    fn host(&self) -> &Netns {
        &self.topology.host
    }

    fn lan(&self) -> SocketAddr {
        SocketAddr::new(self.topology.host_address(Family::V4), PORT)
    }

    /// Starts a container that publishes the port for both protocols, and backends in it.
    fn run(&self, name: &str) -> (Netns, [Backend; 2]) {
        let tcp = format!("{PORT}:{BACKEND_PORT}");
        let udp = format!("{tcp}/udp");
        self.engine.run(name, &["-p", &tcp, "-p", &udp]).unwrap();
        self.backends(name)
    }

    fn backends(&self, name: &str) -> (Netns, [Backend; 2]) {
        let container = self.engine.netns(name).unwrap();
        let start = |protocol| Backend::start(&container, protocol, BACKEND_PORT).unwrap();
        let backends = BOTH.map(start);
        (container, backends)
    }

    /// Another machine gets an answer, and the container sees its address.
    #[track_caller]
    fn serves_the_lan(&self, payload: &str) {
        for protocol in BOTH {
            let answer = ask(&self.topology.client, protocol, self.lan(), payload).unwrap();
            let client = self.topology.client_address(Family::V4);
            let client = SocketAddr::new(client, answer.local_port);
            assert_eq!(answer.seen, client, "{protocol:?}\n{}", self.shown());
        }
    }

    /// Waits for what the list is to say.
    #[track_caller]
    fn wait_for_list(&self, what: &str, is_so: impl Fn(&[Row]) -> bool) -> Vec<Row> {
        let found = wait_for(what, || self.daemon.list().ok().filter(|rows| is_so(rows)));
        found.unwrap_or_else(|error| panic!("{error:#}\n{}", self.shown()))
    }

    /// What the instance says of itself, for the message of a failure.
    fn shown(&self) -> String {
        let shown = [&["list"][..], &["flows"], &["stats"]].map(|words| self.daemon.control(words));
        format!("{shown:#?}\n{}", self.daemon.said())
    }

    fn stop(self) {
        self.engine.stop().unwrap();
        let empty = || self.daemon.list().ok()?.is_empty().then_some(());
        wait_for("the end of all publishes", empty).unwrap();
        self.daemon.stop().unwrap();
    }
}

fn every_client_of_a_container_is_served(scene: Scene) {
    let (container, _backends) = scene.run("web");
    scene.engine.run("neighbour", &[]).unwrap();
    let neighbour = scene.engine.netns("neighbour").unwrap();
    let list = scene.daemon.list().unwrap();
    assert_eq!(list.len(), 4, "two protocols, two families: {list:?}");
    for row in &list {
        let is_v4 = row.frontend.address == Some(Ipv4Addr::UNSPECIFIED.into());
        let expected = if is_v4 { "ebpf" } else { "userland" };
        let path = &row.datapath;
        assert_eq!(path, expected, "the container has no IPv6: {row:?}");
    }
    let forwarded = || scene.daemon.counted("forwarded_original").unwrap();
    let before = forwarded();
    scene.serves_the_lan("by the fast path");
    assert!(forwarded() >= before + 2, "Docker's rules come behind us");
    let at = |host: IpAddr| SocketAddr::new(host, PORT);
    for protocol in BOTH {
        for (who, host) in [
            (scene.host(), Ipv4Addr::LOCALHOST.into()),
            (scene.host(), Ipv6Addr::LOCALHOST.into()),
            (scene.host(), scene.lan().ip()),
            (scene.host(), GATEWAY.into()),
            (
                &scene.topology.client,
                scene.topology.host_address(Family::V6),
            ),
            (&container, GATEWAY.into()),
            (&container, scene.lan().ip()),
            (&neighbour, GATEWAY.into()),
            (&neighbour, scene.lan().ip()),
        ] {
            let answer = ask(who, protocol, at(host), "hello");
            answer.unwrap_or_else(|error| panic!("{} to {host}: {error:#}", who.label()));
        }
    }
    scene.stop();
}

#[test]
fn every_client_of_a_container_is_served_beside_dockers_rules() {
    every_client_of_a_container_is_served(Scene::new(true));
}

#[test]
fn every_client_of_a_container_is_served_without_dockers_rules() {
    every_client_of_a_container_is_served(Scene::new(false));
}

#[test]
fn a_container_comes_back_with_another_address() {
    let scene = Scene::new(true);
    let (container, backends) = scene.run("web");
    scene.serves_the_lan("before");
    let before = scene.engine.address("web").unwrap();
    scene.engine.docker(&["stop", "-t", "0", "web"]).unwrap();
    assert!(scene.daemon.list().unwrap().is_empty());
    drop((container, backends));
    scene.engine.run("squatter", &[]).unwrap();
    assert_eq!(scene.engine.address("squatter").unwrap(), before);
    scene.engine.docker(&["start", "web"]).unwrap();
    assert_ne!(scene.engine.address("web").unwrap(), before);
    let _backends = scene.backends("web");
    scene.serves_the_lan("after");
    // Removed by force, the port is another container's at once.
    scene.engine.docker(&["rm", "-f", "web"]).unwrap();
    assert!(scene.daemon.list().unwrap().is_empty());
    let _backends = scene.run("next");
    scene.serves_the_lan("the next");
    scene.stop();
}

#[test]
fn the_instance_may_die_and_come_back() {
    let mut scene = Scene::new(true);
    let _backends = scene.run("web");
    let mut connection = Connection::open(&scene.topology.client, scene.lan()).unwrap();
    connection.ask("before").unwrap();
    scene.daemon.kill().unwrap();
    connection.ask("while it is dead").unwrap();
    let local = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT);
    ask(scene.host(), Protocol::Tcp, local, "a new one meanwhile").unwrap();
    scene.daemon.restart().unwrap();
    let leased = || (scene.daemon.list().ok()?.len() == 4).then_some(());
    wait_for("the leases", leased).unwrap();
    let after = connection.ask("after");
    after.unwrap_or_else(|error| panic!("{error:#}\n{}", scene.shown()));
    scene.serves_the_lan("after");
    // A container that starts while there is none is served, and then by the instance.
    scene.daemon.terminate().unwrap();
    scene.engine.docker(&["rm", "-f", "web"]).unwrap();
    let _backends = scene.run("web2");
    ask(
        &scene.topology.client,
        Protocol::Tcp,
        scene.lan(),
        "by itself",
    )
    .unwrap();
    scene.daemon.restart().unwrap();
    let leased = || (scene.daemon.list().ok()?.len() == 4).then_some(());
    wait_for("the leases of what began alone", leased).unwrap();
    scene.serves_the_lan("by the instance");
    scene.stop();
}

#[test]
fn docker_stop_never_waits_for_an_instance_that_does_not_answer() {
    let mut scene = Scene::new(true);
    for signal in [Signal::SIGTERM, Signal::SIGSTOP] {
        let _backends = scene.run("web");
        match signal {
            Signal::SIGTERM => drop(scene.daemon.terminate().unwrap()),
            signal => scene.daemon.signal(signal).unwrap(),
        }
        let within = Duration::from_secs(10);
        scene
            .engine
            .docker_within(within, &["rm", "-f", "web"])
            .unwrap();
        match signal {
            Signal::SIGTERM => scene.daemon.restart().unwrap(),
            _ => scene.daemon.signal(Signal::SIGCONT).unwrap(),
        }
        let empty = || scene.daemon.list().ok()?.is_empty().then_some(());
        wait_for("the end of the leases", empty).unwrap();
    }
    scene.stop();
}

/// Starts a container with a hundred ports, and says how long that took.
fn run_a_hundred(engine: &Engine) -> Duration {
    let began = Instant::now();
    let range = ["-p", "20000-20099:20000-20099"];
    engine.run("web", &range).unwrap();
    began.elapsed()
}

#[test]
fn processes_of_a_hundred_ports_take_a_third_of_the_memory_of_dockers_own() {
    let (own, own_time) = {
        let topology = Topology::new().unwrap();
        let engine = Engine::start(&topology.host, json!({}), None).unwrap();
        let time = run_a_hundred(&engine);
        let own = engine.proxies().unwrap();
        engine.stop().unwrap();
        (own, time)
    };
    let scene = Scene::new(true);
    let resident = || engine::memory(scene.daemon.pid()).unwrap();
    let before = resident();
    let time = run_a_hundred(&scene.engine);
    let ours = scene.engine.proxies().unwrap();
    let grown = resident().private.saturating_sub(before.private);
    let list = scene.daemon.list().unwrap();
    assert_eq!(list.len(), 200, "two families");
    eprintln!(
        "Docker's: {own:?} in {own_time:?}; ours: {ours:?} in {time:?}, and the instance {grown} KB more"
    );
    assert_eq!(ours.processes, own.processes, "Docker starts them");
    assert!(ours.private * 3 < own.private);
    assert!((ours.private + grown) * 2 < own.private);
    scene.engine.docker(&["rm", "-f", "web"]).unwrap();
    assert!(scene.daemon.list().unwrap().is_empty());
    scene.stop();
}
