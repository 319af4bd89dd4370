//! IPsec policies of the host: what one of them can match never goes past it, as it would on the fast path.

use forwarder_tests::{
    daemon::{Daemon, doctor},
    topology::{
        Family::{self, V4, V6},
        Topology,
    },
    traffic::{
        Protocol::{Tcp, Udp},
        ask,
    },
};

use crate::scene::{Scene, on_the_fast_path, packets, wait_for_row};

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
    wait_for_row(daemon, datapath, |row| row.datapath == datapath);
}

#[test]
fn a_client_that_a_policy_blocks_is_not_served() {
    for family in [V4, V6] {
        let topology = Topology::new().unwrap();
        block(&topology, "add", family);
        let scene = Scene::of(family, Tcp).auto().start_in(topology);
        let (topology, daemon) = scene.parts();
        let entry = daemon.entry().unwrap();
        assert_eq!(entry.datapath, "userland", "{entry:?}");
        let reason = entry.reason();
        assert!(
            reason.starts_with("an IPsec policy covers it: "),
            "{reason}"
        );
        let findings = doctor(&topology.host, &[]).unwrap();
        assert!(!findings["IPsec"].ok, "{findings:?}");
        assert!(scene.ask("blocked").is_err());
        // No policy is about this one.
        let peer = &topology.peer.netns;
        let answer = ask(peer, Tcp, scene.frontend(), "hello").unwrap();
        assert_eq!(answer.seen.ip(), topology.backend.gateway(family));
        scene.stop();
    }
}

#[test]
fn a_policy_ends_what_the_fast_path_carries_and_gives_it_back() {
    for protocol in [Tcp, Udp] {
        let scene = Scene::of(V4, protocol).auto().start();
        let (topology, daemon) = scene.parts();
        on_the_fast_path(daemon, || scene.served("before"));
        let mut conversation = (protocol == Tcp).then(|| {
            let mut connection = scene.connect();
            connection.ask("before").unwrap();
            connection
        });
        block(topology, "add", V4);
        wait_until_served_by(daemon, "userland");
        let before = packets(daemon);
        if let Some(conversation) = &mut conversation {
            assert!(conversation.ask("blocked").is_err());
        }
        assert!(scene.ask("blocked").is_err());
        assert_eq!(packets(daemon), before, "carried past a policy");
        block(topology, "delete", V4);
        wait_until_served_by(daemon, "ebpf");
        on_the_fast_path(daemon, || scene.served("after"));
        scene.stop();
    }
}

#[test]
fn what_no_policy_can_match_stays_on_the_fast_path() {
    let topology = Topology::new().unwrap();
    topology
        .host
        .feed(
            "ip -batch -",
            "xfrm policy add src 10.9.0.0/16 dst 10.8.0.0/16 dir out action block\n\
             xfrm policy add src 0.0.0.0/0 dst 0.0.0.0/0 dir fwd action allow\n",
        )
        .unwrap();
    let scene = Scene::tcp().start_in(topology);
    scene.served_on_the_fast_path();
    scene.stop();
}
