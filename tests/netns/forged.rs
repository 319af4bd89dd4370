//! Frames that say they come from somebody else: of a container, and of another machine.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    frame::{self, Frame},
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Protocol, ask_by},
    wire::Wire,
};

use crate::scene::{BACKEND_PORT, PORT, served_to_the_client, spec, wait_for_peer};

/// Sends a datagram from `forger`'s network card to the host's `device`, whatever its addresses say.
fn forge(topology: &Topology, forger: &Netns, device: &str, source: SocketAddr, to: SocketAddr) {
    let mut forged = Frame::first(frame::Protocol::Udp, source, to);
    forged.destination_mac = topology.host.mac(device).unwrap();
    forged.payload = b"forged".to_vec();
    Wire::open(forger, "eth0")
        .unwrap()
        .send(&forged.bytes())
        .unwrap();
}

struct Scene {
    topology: Topology,
    backend: Backend,
    daemon: Daemon,
}

impl Scene {
    /// A published UDP port, served by the fast path. `flags` are the daemon's.
    fn new(family: Family, flags: &[&str]) -> Self {
        let topology = Topology::new().unwrap();
        let backend = Backend::start(&topology.backend.netns, Protocol::Udp, BACKEND_PORT).unwrap();
        let spec = spec(&topology.backend, family, Protocol::Udp);
        let daemon = Daemon::start_with(&topology.host, &[&spec], Datapath::Ebpf, flags).unwrap();
        wait_for_peer(&daemon);
        Self {
            topology,
            backend,
            daemon,
        }
    }

    fn frontend(&self, family: Family) -> SocketAddr {
        SocketAddr::new(self.topology.host_address(family), PORT)
    }

    /// What `client` hears first after `forger` has answered in the backend's name is the backend's own answer.
    fn hears_the_backend_alone(self, family: Family, client: &Netns, forger: &Netns, device: &str) {
        let frontend = self.frontend(family);
        let any: IpAddr = if family == Family::V4 {
            [0, 0, 0, 0].into()
        } else {
            [0_u16; 8].into()
        };
        let socket = client.enter(|| UdpSocket::bind((any, 0))).unwrap();
        let seen = ask_by(&socket, frontend, "before").unwrap().seen;

        let backend = SocketAddr::new(self.topology.backend.address(family), BACKEND_PORT);
        forge(&self.topology, forger, device, backend, seen);
        socket.send_to(b"after", frontend).unwrap();
        let mut buffer = [0; 100];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(from, frontend);
        let heard = String::from_utf8_lossy(&buffer[..length]);
        assert!(heard.contains("after"), "{heard}");
        self.daemon.stop().unwrap();
    }

    /// A datagram with that source does not reach the backend; an honest one, sent after it, does.
    fn never_begins(self, forger: &Netns, device: &str, source: SocketAddr) {
        forge(
            &self.topology,
            forger,
            device,
            source,
            self.frontend(Family::V4),
        );
        served_to_the_client(&self.topology, Protocol::Udp, "honest");
        assert_eq!(self.backend.requests(), 1, "{source} reached the backend");
        assert_eq!(self.daemon.counted("martian_source").unwrap(), 1);
        self.daemon.stop().unwrap();
    }
}

#[test]
fn a_container_answers_for_no_other_over_ipv4() {
    let scene = Scene::new(Family::V4, &[]);
    let (client, forger) = (
        scene.topology.client.clone(),
        scene.topology.peer.netns.clone(),
    );
    scene.hears_the_backend_alone(Family::V4, &client, &forger, "br0");
}

#[test]
fn a_container_answers_for_no_other_over_ipv6() {
    let scene = Scene::new(Family::V6, &[]);
    let (client, forger) = (
        scene.topology.client.clone(),
        scene.topology.peer.netns.clone(),
    );
    scene.hears_the_backend_alone(Family::V6, &client, &forger, "br0");
}

#[test]
fn another_machine_answers_for_no_container() {
    let scene = Scene::new(Family::V4, &[]);
    let (client, forger) = (
        scene.topology.other.netns.clone(),
        scene.topology.client.clone(),
    );
    scene.hears_the_backend_alone(Family::V4, &client, &forger, "eth0");
}

#[test]
fn a_container_does_not_get_past_an_allow_list_with_anothers_address() {
    let scene = Scene::new(
        Family::V4,
        &["--allow", "203.0.113.0/24", "--allow", "198.51.100.0/24"],
    );
    let forger = scene.topology.peer.netns.clone();
    scene.never_begins(&forger, "br0", "203.0.113.7:4000".parse().unwrap());
}

#[test]
fn another_machine_does_not_begin_as_a_container() {
    let scene = Scene::new(Family::V4, &[]);
    let forger = scene.topology.client.clone();
    let source = SocketAddr::new(scene.topology.peer.address(Family::V4), 4000);
    scene.never_begins(&forger, "eth0", source);
}

/// What the host routes by way of a container belongs to that container, which may speak for it.
#[test]
fn a_container_speaks_for_what_is_routed_to_it() {
    let scene = Scene::new(Family::V4, &[]);
    let topology = &scene.topology;
    let peer = topology.peer.address(Family::V4);
    topology
        .host
        .ip(&format!("route add 10.8.0.0/24 via {peer}"))
        .unwrap();
    topology
        .peer
        .netns
        .ip("addr add 10.8.0.7/32 dev lo")
        .unwrap();
    let frontend = scene.frontend(Family::V4);
    let socket = topology
        .peer
        .netns
        .enter(|| UdpSocket::bind("10.8.0.7:4000"))
        .unwrap();
    let seen = forwarder_tests::deadline::wait_for("the route is known", || {
        let seen = ask_by(&socket, frontend, "hello").ok()?.seen;
        (seen == socket.local_addr().unwrap()).then_some(seen)
    });
    assert_eq!(seen.unwrap().ip(), IpAddr::from([10, 8, 0, 7]));
    // The bridge stays what it was for everybody else.
    served_to_the_client(topology, Protocol::Udp, "as before");
    scene.daemon.stop().unwrap();
}
