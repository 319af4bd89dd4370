//! Silence ends a flow, after the time that was asked for.

use std::{
    net::{SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::wait_for,
    document::Flow,
    topology::Family,
    traffic::{Protocol, ask, ask_by},
};

use crate::scene::{PORT, Scene};

/// Live flows of each publish.
fn flows(daemon: &Daemon) -> Vec<u64> {
    let listed = daemon.list().unwrap();
    listed.iter().map(|row| row.flows).collect()
}

/// Whether the keepalive timer of a connection of this network namespace runs, by its port here (Documentation/networking/proc_net_tcp.rst).
fn is_kept_alive(port: u16) -> bool {
    const ESTABLISHED: &str = "01";
    const KEEPALIVE: &str = "02";
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
    table.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [_, local, _, state, _, timer, ..] = fields[..] else {
            return false;
        };
        local.ends_with(&format!(":{port:04X}"))
            && state == ESTABLISHED
            && timer.starts_with(KEEPALIVE)
    })
}

/// A machine that vanishes is found out, on either side.
#[test]
fn both_ends_of_a_connection_that_the_proxy_carries_are_kept_alive() {
    let scene = Scene::tcp().by(Datapath::Userland).start();
    let mut connection = scene.connect();
    let seen = connection.ask("and then nothing").unwrap().seen;
    let is_kept_alive = |port| scene.topology.host.enter(|| is_kept_alive(port));
    assert!(is_kept_alive(PORT), "the client's side");
    wait_for("that of the backend", || {
        is_kept_alive(seen.port()).then_some(())
    })
    .unwrap();
    scene.stop();
}

fn a_silent_flow_ends(datapath: Datapath) {
    let timeouts = ["--timeout", "udp-stream=1s", "--timeout", "udp=1s"];
    let scene = Scene::tcp().and_udp().by(datapath);
    let scene = scene.flags(&timeouts).start();
    let (topology, daemon) = scene.parts();
    let mut connection = scene.connect();
    connection.ask("before").unwrap();
    let client = &topology.client;
    ask(client, Protocol::Udp, scene.frontend(), "hello").unwrap();
    wait_for("the end of the UDP flow alone", || {
        (flows(daemon) == [1, 0]).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", flows(daemon)));
    connection.ask("after").unwrap();
    scene.stop();
}

#[test]
fn a_silent_flow_ends_when_its_own_timeout_says_so() {
    a_silent_flow_ends(Datapath::Ebpf);
}

#[test]
fn a_silent_flow_of_the_proxy_ends_when_its_own_timeout_says_so() {
    a_silent_flow_ends(Datapath::Userland);
}

/// One socket that asks two ports of the host, which lead to one backend: the second conversation gets another source port, and
/// has it for as long as it lasts. The instance has looked at all flows meanwhile, and the first conversation has gone.
#[test]
fn a_conversation_with_another_source_port_keeps_it() {
    let specs = [8080, 8081].map(|port| format!("{port}:172.31.0.2:9000/udp"));
    let scene = Scene::udp().publishing(&specs).start();
    let (topology, daemon) = scene.parts();
    let own = SocketAddr::new(topology.client_address(Family::V4), 4000);
    let socket = topology.client.enter(|| UdpSocket::bind(own)).unwrap();
    let asks = |port, text: &str| {
        let frontend = SocketAddr::new(scene.frontend().ip(), port);
        ask_by(&socket, frontend, text).unwrap().seen
    };
    assert_eq!(asks(8080, "by its own port"), own);
    let seen = asks(8081, "by another");
    assert_eq!(seen.ip(), own.ip());
    assert_ne!(seen, own);
    daemon.control(&["unpublish", "1"]).unwrap();
    for _ in 0..6 {
        thread::sleep(Duration::from_secs(1)); // flows are looked at every two seconds
        assert_eq!(asks(8081, "later"), seen);
    }
    scene.stop();
}

/// Programs read the kernel's own clocks, whichever the namespace shows the daemon.
fn flows_and_bans_last_as_long_in_a_time_namespace(ahead: [&str; 2]) {
    let [monotonic, boot] = ahead;
    let wrapper = [
        "unshare",
        "--time",
        "--monotonic",
        monotonic,
        "--boottime",
        boot,
    ];
    let timeouts = ["--timeout", "tcp-established=1h"];
    let scene = Scene::tcp().wrapped(&wrapper).flags(&timeouts).start();
    let mut connection = scene.connect();
    connection.ask("before").unwrap();
    wait_for(
        "a flow that is silent for longer than a sweep takes",
        || {
            let flows: Vec<Flow> = scene.daemon.document(&["flows"]).ok()?;
            flows
                .iter()
                .any(|flow| flow.idle_seconds >= 3)
                .then_some(())
        },
    )
    .unwrap();
    connection.ask("after").unwrap();

    let client = scene.topology.client_address(Family::V4).to_string();
    let daemon = &scene.daemon;
    daemon.control(&["ban", &client, "--for", "1h"]).unwrap();
    assert!(scene.ask("hello").is_err(), "it is banned");
    daemon.control(&["ban", &client, "--for", "2s"]).unwrap();
    wait_for("the end of the ban", || scene.ask("hello").ok()).unwrap();
    scene.stop();
}

#[test]
fn flows_and_bans_last_as_long_in_a_time_namespace_that_is_ahead() {
    flows_and_bans_last_as_long_in_a_time_namespace(["1000000", "2000000"]);
}

#[test]
fn flows_and_bans_last_as_long_in_a_time_namespace_that_is_behind() {
    // No clock may be before this machine's start.
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
    let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
    let [monotonic, boot] = [(600.0, 0.5), (900.0, 0.75)]
        .map(|(most, part)| format!("-{:.0}", (uptime * part).min(most)));
    flows_and_bans_last_as_long_in_a_time_namespace([&monotonic, &boot]);
}
