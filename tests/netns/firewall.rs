//! Firewall rules, and a host that does not forward: a published port does not notice.

use forwarder_tests::{
    netns::Netns,
    topology::{Family, Topology},
    traffic::Protocol,
};

use crate::scene::{Scene, packets};

const DROP_FORWARD: &str = "\
table ip one { chain forward {
    type filter hook forward priority 0; policy drop;
}
}
table ip6 two { chain forward {
    type filter hook forward priority 0; policy drop;
}
}
table inet three { chain forward {
    type filter hook forward priority 0; policy drop;
}
}
";

/// What Docker 28 and later install against packets that go to a container by themselves.
const DOCKER_RAW: &str = "\
table ip raw { chain PREROUTING {
    type filter hook prerouting priority raw; policy accept;
    ip daddr 172.31.0.2 iifname != br0 drop
}
}
";

fn rules(netns: &Netns, ruleset: &str) {
    netns.feed("nft -f -", ruleset).unwrap();
}

fn served_under(ruleset: &str, protocol: Protocol) {
    let topology = Topology::new().unwrap();
    rules(&topology.host, ruleset);
    let scene = Scene::of(Family::V4, protocol).start_in(topology);
    scene.served_on_the_fast_path();
    scene.stop();
}

#[test]
fn tcp_passes_where_forward_drops() {
    served_under(DROP_FORWARD, Protocol::Tcp);
}

#[test]
fn udp_passes_where_forward_drops() {
    served_under(DROP_FORWARD, Protocol::Udp);
}

#[test]
fn tcp_passes_where_docker_drops_direct_access() {
    served_under(DOCKER_RAW, Protocol::Tcp);
}

#[test]
fn udp_passes_where_docker_drops_direct_access() {
    served_under(DOCKER_RAW, Protocol::Udp);
}

#[test]
fn a_host_that_does_not_forward_serves() {
    let topology = Topology::new().unwrap();
    topology.host.forwards(false).unwrap();
    let scene = Scene::tcp().container(|it| &it.ptp).start_in(topology);
    scene.served_on_the_fast_path();
    let forwarding = "cat /proc/sys/net/ipv4/ip_forward";
    let forwarding = scene.topology.host.run(forwarding).unwrap();
    assert_eq!(forwarding.trim(), "0");
    scene.stop();
}

#[test]
fn a_flushed_ruleset_goes_unnoticed_by_traffic() {
    let topology = Topology::new().unwrap();
    rules(&topology.host, DROP_FORWARD);
    let scene = Scene::tcp().start_in(topology);
    let (topology, daemon) = scene.parts();
    let mut connection = scene.connect();

    for round in 0..20 {
        if round == 10 {
            topology.host.run("nft flush ruleset").unwrap();
        }
        let before = packets(daemon);
        let payload = format!("round {round}");
        assert_eq!(connection.ask(&payload).unwrap().payload, payload);
        assert!(
            packets(daemon) > before,
            "round {round} did not take the fast path"
        );
    }
    scene.served("a new connection");
    scene.stop();
}
