//! The scene itself, before anything is published: who reaches whom.

use std::net::SocketAddr;

use forwarder_tests::{
    topology::{
        Family::{self, V4, V6},
        Topology,
    },
    traffic::{Backend, Protocol, ask, send_datagram},
};

use crate::scene::BACKEND_PORT;

#[test]
fn the_host_and_its_containers_reach_each_other() {
    let topology = Topology::new().unwrap();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for container in [
            &topology.backend,
            &topology.peer,
            &topology.other,
            &topology.ptp,
        ] {
            let _backend = Backend::start(&container.netns, protocol, BACKEND_PORT).unwrap();
            for family in [V4, V6] {
                let address = SocketAddr::new(container.address(family), BACKEND_PORT);
                let answer = ask(&topology.host, protocol, address, "hello").unwrap();
                assert_eq!(answer.payload, "hello");
                assert_eq!(answer.seen.ip(), container.gateway(family));
            }
        }
    }
}

#[test]
fn containers_of_one_bridge_reach_each_other() {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    for family in [V4, V6] {
        let address = SocketAddr::new(topology.backend.address(family), BACKEND_PORT);
        let answer = ask(&topology.peer.netns, Protocol::Tcp, address, "hello").unwrap();
        assert_eq!(answer.seen.ip(), topology.peer.address(family));
    }
}

#[test]
fn the_client_reaches_the_host_and_knows_no_route_to_a_container() {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.host, Protocol::Udp, BACKEND_PORT).unwrap();
    for family in [V4, V6] {
        let host = SocketAddr::new(topology.host_address(family), BACKEND_PORT);
        let answer = ask(&topology.client, Protocol::Udp, host, "hello").unwrap();
        assert_eq!(answer.seen.ip(), topology.client_address(family));
        assert_unreachable(&topology, family);
    }
}

fn assert_unreachable(topology: &Topology, family: Family) {
    let container = SocketAddr::new(topology.backend.address(family), BACKEND_PORT);
    assert!(send_datagram(&topology.client, container, "hello").is_err());
}
