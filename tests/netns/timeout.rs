//! Silence ends a flow, after the time that was asked for.

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::wait_for,
    traffic::{Protocol, ask},
};

use crate::scene::Scene;

/// Live flows of each publish.
fn flows(daemon: &Daemon) -> Vec<u64> {
    let listed = daemon.list().unwrap();
    listed.iter().map(|row| row.flows).collect()
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
