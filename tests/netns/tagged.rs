//! Frames with a tag that names no VLAN (VLAN 0, IEEE 802.1Q section 9.6): some switches give each a priority that way.

use std::net::{SocketAddr, UdpSocket};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::patience,
    frame::Frame,
    topology::{Family, Topology},
    traffic::Protocol,
    wire::Wire,
};

use crate::scene::{BACKEND_PORT, PORT, spec, wait_for_peer};

/// TPID, and priority 3 with number 0.
const TAG: [u8; 4] = [0x81, 0x00, 0x60, 0x00];

#[test]
fn a_frame_with_a_priority_alone_is_served_as_untagged() {
    for family in [Family::V4, Family::V6] {
        let topology = Topology::new().unwrap();
        let Topology { host, client, .. } = &topology;
        let spec = spec(&topology.backend, family, Protocol::Udp);
        let daemon = Daemon::start(host, &[&spec], Datapath::Ebpf).unwrap();
        wait_for_peer(&daemon);
        let address = SocketAddr::new(topology.backend.address(family), BACKEND_PORT);
        let bound = topology.backend.netns.enter(|| UdpSocket::bind(address));
        let server = bound.unwrap();
        server.set_read_timeout(Some(patience())).unwrap();

        let frontend = SocketAddr::new(topology.host_address(family), PORT);
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
        daemon.stop().unwrap();
    }
}
