//! Frames with a tag that names no VLAN (VLAN 0, IEEE 802.1Q section 9.6): some switches give each a priority that way.

use std::net::{SocketAddr, UdpSocket};

use forwarder_tests::{
    deadline::patience,
    frame::Frame,
    topology::{Family, Topology},
    traffic::Protocol,
    wire::Wire,
};

use crate::scene::{BACKEND_PORT, Scene, wait_for_peer};

/// TPID, and priority 3 with number 0.
const TAG: [u8; 4] = [0x81, 0x00, 0x60, 0x00];

#[test]
fn a_frame_with_a_priority_alone_is_served_as_untagged() {
    for family in [Family::V4, Family::V6] {
        let scene = Scene::of(family, Protocol::Udp).silent().start();
        let (topology, frontend) = (&scene.topology, scene.frontend());
        let Topology { host, client, .. } = topology;
        wait_for_peer(&scene.daemon);
        let address = SocketAddr::new(topology.backend.address(family), BACKEND_PORT);
        let bound = topology.backend.netns.enter(|| UdpSocket::bind(address));
        let server = bound.unwrap();
        server.set_read_timeout(Some(patience())).unwrap();

        let from = SocketAddr::new(topology.client_address(family), 4000);
        let listening = client.enter(|| UdpSocket::bind(from)).unwrap();
        listening.set_read_timeout(Some(patience())).unwrap();
        let mut frame = Frame::first(Protocol::Udp, from, frontend);
        frame.source_mac = client.mac("eth0").unwrap();
        frame.destination_mac = host.mac("eth0").unwrap();
        let mut bytes = frame.bytes();
        bytes.splice(12..12, TAG);
        let wire = Wire::open(client, "eth0").unwrap();
        wire.send(&bytes).unwrap();

        let mut buffer = [0; 100];
        let (length, seen) = server.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], seen), (&frame.payload[..], from));
        server.send_to(b"answer", seen).unwrap();
        let (length, heard) = listening.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], heard), (&b"answer"[..], frontend));
        scene.stop();
    }
}
