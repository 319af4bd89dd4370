//! Silence ends a flow, after the time that was asked for.

use std::net::SocketAddr;

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::wait_for,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask},
};

use crate::scene::{BACKEND_PORT, PORT, spec};

/// Live flows of each publish.
fn flows(daemon: &Daemon) -> Vec<u64> {
    let listed = daemon.list().unwrap();
    let flows = listed.iter().map(|entry| entry["flows"].as_u64());
    flows.map(Option::unwrap).collect()
}

fn a_silent_flow_ends(datapath: Datapath) {
    let topology = Topology::new().unwrap();
    let backends = [Protocol::Tcp, Protocol::Udp].map(|protocol| {
        let backend = Backend::start(&topology.backend.netns, protocol, BACKEND_PORT);
        (spec(&topology.backend, Family::V4, protocol), backend)
    });
    let specs = backends.each_ref().map(|(spec, _)| spec.as_str());
    let timeouts = ["--timeout", "udp-stream=1s", "--timeout", "udp=1s"];
    let daemon = Daemon::start_with(&topology.host, &specs, datapath, &timeouts).unwrap();
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    let mut connection = Connection::open(&topology.client, frontend).unwrap();
    connection.ask("before").unwrap();
    ask(&topology.client, Protocol::Udp, frontend, "hello").unwrap();
    wait_for("the end of the UDP flow alone", || {
        (flows(&daemon) == [1, 0]).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", flows(&daemon)));
    connection.ask("after").unwrap();
    daemon.stop().unwrap();
}

#[test]
fn a_silent_flow_ends_when_its_own_timeout_says_so() {
    a_silent_flow_ends(Datapath::Ebpf);
}

#[test]
fn a_silent_flow_of_the_proxy_ends_when_its_own_timeout_says_so() {
    a_silent_flow_ends(Datapath::Userland);
}
