//! Policy routing: the way to a backend is in another table than main, where a rule leads to it, as Tailscale and
//! other VPNs have it. The kernel's answer counts, at the start and when rules and routes change.

use std::{net::UdpSocket, time::Duration};

use forwarder_tests::{
    deadline::wait_for,
    topology::{
        Family::{self, V4, V6},
        Topology,
    },
    traffic::Protocol::{Tcp, Udp},
};

use crate::scene::{Scene, wait_for_peer};

/// Table main leads to the client for every address that it has no route to, as an uplink's default route does.
fn with_a_default_route() -> Topology {
    let topology = Topology::new().unwrap();
    let [v4, v6] = [V4, V6].map(|family| topology.client_address(family));
    topology
        .host
        .ip(&format!(
            "route add default via {v4}\nroute add default via {v6}"
        ))
        .unwrap();
    topology
}

fn network(family: Family) -> &'static str {
    match family {
        V4 => "172.31.0.0/24",
        V6 => "fd00:31::/64",
    }
}

/// What `ip` takes for a family.
fn number(family: Family) -> u32 {
    match family {
        V4 => 4,
        V6 => 6,
    }
}

/// `add` or `del`, and a rule that chooses a table by something.
fn rule(topology: &Topology, family: Family, what: &str, by: &str, table: u32) {
    let number = number(family);
    let rule = format!("ip -{number} rule {what} {by} lookup {table} priority 5270");
    topology.host.run(&rule).unwrap();
}

/// What a rule for the backend's network chooses by.
fn to_network(family: Family) -> String {
    format!("to {}", network(family))
}

/// Table main knows nothing of the backend's network any more, and a rule leads to a table that does.
fn move_to_another_table(topology: &Topology, family: Family, by: &str) {
    let network = network(family);
    topology
        .host
        .ip(&format!(
            "route del {network} dev br0\nroute add {network} dev br0 table 52"
        ))
        .unwrap();
    rule(topology, family, "add", by, 52);
}

#[track_caller]
fn served(scene: &Scene) {
    wait_for_peer(&scene.daemon);
    scene.served_on_the_fast_path();
}

#[test]
fn a_container_whose_route_is_in_another_table_is_served() {
    for family in [V4, V6] {
        let topology = with_a_default_route();
        move_to_another_table(&topology, family, &to_network(family));
        let scene = Scene::of(family, Tcp).auto().start_in(topology);
        served(&scene);
        scene.stop();
    }
}

#[test]
fn a_rule_that_comes_and_goes_is_followed() {
    for family in [V4, V6] {
        let topology = with_a_default_route();
        let network = network(family);
        topology
            .host
            .ip(&format!("route add unreachable {network} table 53"))
            .unwrap();
        let scene = Scene::of(family, Tcp).auto().start_in(topology);
        let (topology, daemon) = scene.parts();
        served(&scene);
        rule(topology, family, "add", &to_network(family), 53);
        let reason = wait_for("the reason", || daemon.entry().ok()?.reason).unwrap();
        let no_route = format!("no route to {}", topology.backend.address(family));
        assert_eq!(reason, no_route);
        rule(topology, family, "del", &to_network(family), 53);
        served(&scene);
        move_to_another_table(topology, family, &to_network(family));
        served(&scene);
        scene.stop();
    }
}

/// What the fast path asks for a route has no ports.
#[test]
fn a_rule_that_chooses_by_protocol_or_port_decides_the_way() {
    for family in [V4, V6] {
        for by in ["ipproto 6", "ipproto 6 dport 9000", "dport 1-9000"] {
            let topology = with_a_default_route();
            move_to_another_table(&topology, family, by);
            let scene = Scene::of(family, Tcp).auto().start_in(topology);
            scene.ask("hello").unwrap();
            let row = scene.daemon.entry().unwrap();
            assert_eq!(row.reason_code.as_deref(), Some("rule"), "{by}: {row:?}");
            scene.stop();
        }
        // Those of others are none of its business.
        let topology = with_a_default_route();
        for by in ["ipproto 17", "dport 53", "to 203.0.113.9 dport 9000"] {
            if family == V4 || !by.starts_with("to") {
                rule(&topology, family, "add", by, 52);
            }
        }
        let scene = Scene::of(family, Tcp).auto().start_in(topology);
        served(&scene);
        scene.stop();
    }
}

/// Such a host lists routes without what their nexthop objects say.
#[test]
fn a_route_whose_device_is_a_nexthop_objects_is_followed() {
    for family in [V4, V6] {
        let topology = with_a_default_route();
        let network = network(family);
        let (host, number) = (&topology.host, number(family));
        host.set("ipv4/nexthop_compat_mode", "0").unwrap();
        let add = format!("ip -{number} nexthop add id 7 dev br0");
        host.run(&add).unwrap();
        let unseen = format!("route del {network} dev br0\nroute add {network} nhid 7");
        host.ip(&unseen).unwrap();
        let scene = Scene::of(family, Tcp).auto().start_in(topology);
        served(&scene);
        scene.stop();
    }
}

/// As fail2ban bans by routes.
#[test]
fn a_client_that_a_route_forbids_gets_no_answer() {
    for (family, kind) in [
        (V4, "blackhole"),
        (V4, "unreachable"),
        (V4, "prohibit"),
        (V6, "blackhole"),
    ] {
        let scene = Scene::of(family, Udp).start();
        scene.served("hello");
        let (topology, _) = scene.parts();
        let route = format!("{kind} {}", topology.client_address(family));
        topology.host.ip(&format!("route add {route}")).unwrap();
        let unspecified = family.unspecified();
        let socket = topology.client.enter(|| UdpSocket::bind((unspecified, 0)));
        let socket = socket.unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let answered = || {
            socket.send_to(b"hello", scene.frontend()).unwrap();
            socket.recv(&mut [0; 100]).is_ok()
        };
        wait_for("the route is heeded", || (!answered()).then_some(())).unwrap();
        // For longer than a second, as one packet in each goes another way.
        assert!((0..8).all(|_| !answered()), "{kind}");
        topology.host.ip(&format!("route del {route}")).unwrap();
        scene.served("hello again");
        scene.stop();
    }
}
