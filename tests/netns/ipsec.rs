//! IPsec policies of the host: what one of them can match never goes past it, as it would on the fast path.

use std::net::SocketAddr;

use forwarder_tests::{
    daemon::{Daemon, Datapath, doctor},
    deadline::wait_for,
    topology::{
        Family::{self, V4, V6},
        Topology,
    },
    traffic::{
        Backend, Connection,
        Protocol::{Tcp, Udp},
        ask,
    },
};

use crate::scene::{BACKEND_PORT, PORT, on_the_fast_path, packets, served_to_the_client, spec};

/// `add` or `delete`: policies that nothing of the client and nothing to it passes.
fn block(topology: &Topology, what: &str, family: Family) {
    let client = topology.client_address(family);
    let all = if family == V4 { "0.0.0.0/0" } else { "::/0" };
    let action = if what == "add" { "action block" } else { "" };
    let policies: String = [("in", true), ("fwd", true), ("out", false)]
        .iter()
        .map(|&(direction, is_source)| {
            let client = client.to_string();
            let (source, destination) = match is_source {
                true => (client.as_str(), all),
                false => (all, client.as_str()),
            };
            format!("xfrm policy {what} src {source} dst {destination} dir {direction} {action}\n")
        })
        .collect();
    topology.host.feed("ip -batch -", &policies).unwrap();
}

#[track_caller]
fn wait_until_served_by(daemon: &Daemon, datapath: &str) {
    wait_for(datapath, || {
        (daemon.entry().ok()?["datapath"] == datapath).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{:?}\n{}", daemon.list(), daemon.said()));
}

#[test]
fn a_client_that_a_policy_blocks_is_not_served() {
    let topology = Topology::new().unwrap();
    for family in [V4, V6] {
        let _backend = Backend::start(&topology.backend.netns, Tcp, BACKEND_PORT).unwrap();
        block(&topology, "add", family);
        let spec = spec(&topology.backend, family, Tcp);
        let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Auto).unwrap();
        let entry = daemon.entry().unwrap();
        assert_eq!(entry["datapath"], "userland", "{entry}");
        let reason = entry["reason"].as_str().unwrap();
        assert!(
            reason.starts_with("an IPsec policy covers it: "),
            "{reason}"
        );
        let findings = doctor(&topology.host, &[]).unwrap();
        assert_eq!(findings["IPsec"]["ok"], false, "{findings:?}");
        let frontend = SocketAddr::new(topology.host_address(family), PORT);
        assert!(ask(&topology.client, Tcp, frontend, "blocked").is_err());
        // No policy is about this one.
        let peer = &topology.peer.netns;
        let answer = ask(peer, Tcp, frontend, "hello").unwrap();
        assert_eq!(answer.seen.ip(), topology.backend.gateway(family));
        daemon.stop().unwrap();
        block(&topology, "delete", family);
    }
}

#[test]
fn a_policy_ends_what_the_fast_path_carries_and_gives_it_back() {
    let topology = Topology::new().unwrap();
    for protocol in [Tcp, Udp] {
        let _backend = Backend::start(&topology.backend.netns, protocol, BACKEND_PORT).unwrap();
        let spec = spec(&topology.backend, V4, protocol);
        let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Auto).unwrap();
        on_the_fast_path(&daemon, || {
            served_to_the_client(&topology, protocol, "before")
        });
        let frontend = SocketAddr::new(topology.host_address(V4), PORT);
        let mut conversation = (protocol == Tcp).then(|| {
            let mut connection = Connection::open(&topology.client, frontend).unwrap();
            connection.ask("before").unwrap();
            connection
        });
        block(&topology, "add", V4);
        wait_until_served_by(&daemon, "userland");
        let before = packets(&daemon);
        if let Some(conversation) = &mut conversation {
            assert!(conversation.ask("blocked").is_err());
        }
        assert!(ask(&topology.client, protocol, frontend, "blocked").is_err());
        assert_eq!(packets(&daemon), before, "carried past a policy");
        block(&topology, "delete", V4);
        wait_until_served_by(&daemon, "ebpf");
        on_the_fast_path(&daemon, || {
            served_to_the_client(&topology, protocol, "after")
        });
        daemon.stop().unwrap();
    }
}

#[test]
fn what_no_policy_can_match_stays_on_the_fast_path() {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Tcp, BACKEND_PORT).unwrap();
    topology
        .host
        .feed(
            "ip -batch -",
            "xfrm policy add src 10.9.0.0/16 dst 10.8.0.0/16 dir out action block\n\
             xfrm policy add src 0.0.0.0/0 dst 0.0.0.0/0 dir fwd action allow\n",
        )
        .unwrap();
    let spec = spec(&topology.backend, V4, Tcp);
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    on_the_fast_path(&daemon, || served_to_the_client(&topology, Tcp, "hello"));
    daemon.stop().unwrap();
}
