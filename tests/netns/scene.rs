//! What the scenarios have in common: addresses of the usual publish, and its list entry.

use std::net::SocketAddr;

use forwarder_tests::{
    daemon::Daemon,
    deadline::wait_for,
    topology::{Container, Family, Topology},
    traffic::{Protocol, ask},
};

/// The published port.
pub(crate) const PORT: u16 = 8080;
/// Where the backends listen.
pub(crate) const BACKEND_PORT: u16 = 9000;

/// `/tcp` or `/udp`, as a SPEC ends.
pub(crate) fn suffix(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "/tcp",
        Protocol::Udp => "/udp",
    }
}

/// The SPEC that publishes `PORT` on every local address.
pub(crate) fn spec(container: &Container, family: Family, protocol: Protocol) -> String {
    let backend = SocketAddr::new(container.address(family), BACKEND_PORT);
    format!("{PORT}:{backend}{}", suffix(protocol))
}

/// Asks the published port from outside; the backend must see the client.
#[track_caller]
pub(crate) fn served_to_the_client(topology: &Topology, protocol: Protocol, payload: &str) {
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    let answer = ask(&topology.client, protocol, frontend, payload).unwrap();
    assert_eq!(answer.payload, payload);
    let client = SocketAddr::new(topology.client_address(Family::V4), answer.local_port);
    assert_eq!(answer.seen, client, "source that the backend saw");
}

/// Packets that the program has forwarded, to the backend and back.
#[track_caller]
pub(crate) fn packets(daemon: &Daemon) -> (u64, u64) {
    let counts = daemon.counts(["forwarded_original", "forwarded_reply"]);
    counts.unwrap().into()
}

/// Asserts that what `traffic` sends, and its answers, were carried by the fast path.
#[track_caller]
pub(crate) fn on_the_fast_path(daemon: &Daemon, traffic: impl FnOnce()) {
    let entry = daemon.entry().unwrap();
    assert_eq!(entry["datapath"], "ebpf", "{entry}\n{}", daemon.said());
    let before = packets(daemon);
    traffic();
    let after = packets(daemon);
    assert!(
        after.0 > before.0 && after.1 > before.1,
        "not both ways on the fast path: {before:?} then {after:?}\n{}",
        daemon.said()
    );
}

/// Waits until the only publish is delivered by the fast path, as after its backend came up.
#[track_caller]
pub(crate) fn wait_for_delivery(daemon: &Daemon) {
    wait_for("the fast path finds the backend", || {
        let entry = daemon.entry().ok()?;
        (entry["datapath"] == "ebpf" && entry["delivery"].is_string()).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{:?}\n{}", daemon.list(), daemon.said()));
}

/// Waits until the backend, whose neighbour entry its first packets made, is delivered to directly.
#[track_caller]
pub(crate) fn wait_for_peer(daemon: &Daemon) {
    let found = wait_for("delivery `peer`", || {
        (daemon.entry().ok()?["delivery"] == "peer").then_some(())
    });
    found.unwrap_or_else(|error| panic!("{error:#}\n{:?}\n{}", daemon.list(), daemon.said()));
}
