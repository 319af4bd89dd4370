//! Traffic that leaves this host by others, from port numbers that are published.

use std::net::{SocketAddr, UdpSocket};

use forwarder_tests::{
    topology::{Family, Topology},
    traffic::{Backend, Protocol, ask_by},
};

use crate::scene::{BACKEND_PORT, Scene, spec};

const QUERIES: u16 = 200;

/// Docker masquerades a container's traffic and keeps its source port. A range of such ports is published, of another
/// container.
#[test]
fn a_masqueraded_containers_queries_are_all_answered() {
    for family in [Family::V4, Family::V6] {
        let topology = Topology::new().unwrap();
        topology.host.forwards(true).unwrap();
        let rules = "table inet nat { chain postrouting { type nat hook postrouting priority 100;
            oifname eth0 masquerade
        }
        }\n";
        topology.host.feed("nft -f -", rules).unwrap();
        let _resolver = Backend::start(&topology.client, Protocol::Udp, 53).unwrap();
        let backend = SocketAddr::new(topology.backend.address(family), BACKEND_PORT);
        let range = format!("50000-60000:{backend}/udp");
        let specs = [range, spec(&topology.backend, Family::V4, Protocol::Udp)];
        let scene = Scene::udp().publishing(&specs).start_in(topology);
        let (topology, daemon) = scene.parts();

        let resolver = SocketAddr::new(topology.client_address(family), 53);
        for port in 50_000..50_000 + QUERIES {
            let from = SocketAddr::new(topology.peer.address(family), port);
            let bound = topology.peer.netns.enter(|| UdpSocket::bind(from));
            let answer = ask_by(&bound.unwrap(), resolver, "who?")
                .unwrap_or_else(|error| panic!("from {from}: {error:#}"));
            assert_eq!(answer.seen.port(), port, "the port was kept");
        }
        let passed = daemon.counted("others_answer").unwrap();
        assert!(passed >= QUERIES.into(), "{passed} answers were seen");
        scene.served("and clients are served");
        scene.stop();
    }
}
