//! Firewall rules, and a host that does not forward: a published port does not notice.

use std::net::{SocketAddr, UdpSocket};

use forwarder_tests::{
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Answer, Connection, Protocol, ask, ask_by},
};

use crate::scene::{PORT, Scene, on_the_fast_path, packets};

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

/// What leaves by lo is translated too.
const MASQUERADE_BY_ALL: &str = "\
table ip nat { chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    masquerade
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

#[test]
fn a_rule_that_masquerades_by_every_device_keeps_nobody_on_the_host_out() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let topology = Topology::new().unwrap();
        rules(&topology.host, MASQUERADE_BY_ALL);
        let scene = Scene::of(Family::V4, protocol).start_in(topology);
        let host = &scene.topology.host;
        let gateway = scene.topology.backend.gateway(Family::V4);
        for address in [
            Family::V4.localhost(),
            scene.topology.host_address(Family::V4),
            gateway,
        ] {
            ask(host, protocol, SocketAddr::new(address, PORT), "hello").unwrap();
        }
        assert!(scene.daemon.counted("source_translated").unwrap() > 0);
        scene.served_on_the_fast_path();
        scene.stop();
    }
}

/// An address of the host that is not the one that it asks.
#[test]
fn a_client_on_the_host_is_seen_with_the_address_that_it_chooses() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let scene = Scene::of(Family::V4, protocol).start();
        let host = &scene.topology.host;
        let own = SocketAddr::new(scene.topology.host_address(Family::V4), 0);
        let gateway = scene.topology.backend.gateway(Family::V4);
        let frontend = SocketAddr::new(gateway, PORT);
        let ask = || match protocol {
            Protocol::Tcp => Connection::open_at(host, own, frontend)?.ask("hello"),
            Protocol::Udp => host.enter(|| {
                let socket = UdpSocket::bind(own)?;
                socket.connect(frontend)?;
                ask_by(&socket, frontend, "hello")
            }),
        };
        on_the_fast_path(&scene.daemon, || {
            let Answer { seen, .. } = ask().unwrap();
            assert_eq!(seen.ip(), own.ip());
        });
        scene.stop();
    }
}
