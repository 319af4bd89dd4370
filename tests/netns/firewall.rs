//! Firewall rules, and a host that does not forward: a published port does not notice.

use std::net::SocketAddr;

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol},
};

use crate::scene::{BACKEND_PORT, PORT, on_the_fast_path, packets, served_to_the_client, spec};

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
    let _backend = Backend::start(&topology.backend.netns, protocol, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, Family::V4, protocol);
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    on_the_fast_path(&daemon, || {
        served_to_the_client(&topology, protocol, "hello")
    });
    daemon.stop().unwrap();
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
    let _backend = Backend::start(&topology.ptp.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.ptp, Family::V4, Protocol::Tcp);
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    on_the_fast_path(&daemon, || {
        served_to_the_client(&topology, Protocol::Tcp, "hello")
    });
    let forwarding = topology
        .host
        .run("cat /proc/sys/net/ipv4/ip_forward")
        .unwrap();
    assert_eq!(forwarding.trim(), "0");
    daemon.stop().unwrap();
}

#[test]
fn a_flushed_ruleset_goes_unnoticed_by_traffic() {
    let topology = Topology::new().unwrap();
    rules(&topology.host, DROP_FORWARD);
    let _tcp = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    let mut connection = Connection::open(&topology.client, frontend).unwrap();

    for round in 0..20 {
        if round == 10 {
            topology.host.run("nft flush ruleset").unwrap();
        }
        let before = packets(&daemon);
        let payload = format!("round {round}");
        assert_eq!(connection.ask(&payload).unwrap().payload, payload);
        assert!(
            packets(&daemon) > before,
            "round {round} did not take the fast path"
        );
    }
    served_to_the_client(&topology, Protocol::Tcp, "a new connection");
    daemon.stop().unwrap();
}
