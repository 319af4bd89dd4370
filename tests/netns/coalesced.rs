//! Datagrams that come in one buffer, as QUIC sends them, through the proxy: where a link has a small MTU they go one by one, and each
//! arrives whole.

use std::{
    io::IoSlice,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

use forwarder_tests::{
    daemon::Datapath,
    deadline::patience,
    netns::Netns,
    topology::{Family, Topology},
    traffic::Protocol,
};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};

use crate::scene::{BACKEND_PORT, Scene, veths_keep_buffers};

const SIZE: u16 = 1400;
/// It fits everywhere.
const SHORT: u16 = 1000;
const COUNT: usize = 10;

fn socket(netns: &Netns, address: SocketAddr) -> UdpSocket {
    let socket = netns.enter(|| UdpSocket::bind(address)).unwrap();
    socket.set_read_timeout(Some(patience())).unwrap();
    socket
}

fn send_together(socket: &UdpSocket, to: SocketAddr, size: u16) {
    let data = vec![7; usize::from(size) * COUNT];
    let control = [ControlMessage::UdpGsoSegments(&size)];
    let to = SockaddrStorage::from(to);
    let none = MsgFlags::empty();
    let parts = [IoSlice::new(&data)];
    let sent = sendmsg(socket.as_raw_fd(), &parts, &control, none, Some(&to));
    assert_eq!(sent, Ok(data.len()));
}

/// Receives all of them, and returns the sender.
fn receive(socket: &UdpSocket) -> SocketAddr {
    let mut buffer = [0; 4096];
    let mut from = None;
    for _ in 0..COUNT {
        let (length, sender) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(length, usize::from(SIZE));
        from = Some(sender);
    }
    from.unwrap()
}

/// Sends short ones together, and returns in what lengths they are received by who takes several at once.
fn lengths(from: &UdpSocket, to: &UdpSocket, at: SocketAddr) -> Vec<usize> {
    setsockopt(to, sockopt::UdpGroSegment, &true).unwrap();
    send_together(from, at, SHORT);
    let (mut buffer, mut lengths) = ([0; 1 << 16], Vec::new());
    while lengths.iter().sum::<usize>() < usize::from(SHORT) * COUNT {
        lengths.push(to.recv_from(&mut buffer).unwrap().0);
    }
    lengths
}

/// One way, by a device whose MTU may be too small for them.
fn conversation(family: Family, mtu: u32, to_the_client: bool) {
    let topology = Topology::new().unwrap();
    let device = if to_the_client { "eth0" } else { "br0" };
    let command = format!("link set {device} mtu {mtu}");
    topology.host.ip(&command).unwrap();
    let scene = Scene::of(family, Protocol::Udp).silent();
    let scene = scene.by(Datapath::Userland).start_in(topology);
    let Topology {
        client, backend, ..
    } = &scene.topology;
    let at = SocketAddr::new(backend.address(family), BACKEND_PORT);
    let server = socket(&backend.netns, at);
    let frontend = scene.frontend();
    let own = scene.topology.client_address(family);
    let client = socket(client, SocketAddr::new(own, 0));
    // What waits for the first answer of ARP is lost.
    client.send_to(b"first", frontend).unwrap();
    let (_, proxy) = server.recv_from(&mut [0; 16]).unwrap();
    server.send_to(b"first", proxy).unwrap();
    client.recv_from(&mut [0; 16]).unwrap();
    for _ in 0..3 {
        if to_the_client {
            send_together(&server, proxy, SIZE);
            assert_eq!(receive(&client), frontend);
        } else {
            send_together(&client, frontend, SIZE);
            assert_eq!(receive(&server), proxy);
        }
    }
    // Shorter ones are not held to be too long because those were.
    let (from, to, at) = match to_the_client {
        true => (&server, &client, proxy),
        false => (&client, &server, frontend),
    };
    // They come by the proxy as they come without it: whole, unless a veth cuts them up.
    let host = socket(&scene.topology.host, SocketAddr::new(frontend.ip(), 0));
    let without = lengths(&client, &host, host.local_addr().unwrap());
    assert!(without.len() == 1 || !veths_keep_buffers());
    assert_eq!(lengths(from, to, at), without);
    scene.stop();
}

#[test]
fn datagrams_in_one_buffer_reach_the_backend() {
    conversation(Family::V4, 1500, false);
    conversation(Family::V6, 1500, false);
}

#[test]
fn datagrams_in_one_buffer_reach_the_client() {
    conversation(Family::V4, 1500, true);
    conversation(Family::V6, 1500, true);
}

#[test]
fn datagrams_in_one_buffer_reach_a_backend_behind_a_small_mtu() {
    conversation(Family::V4, 1280, false);
    conversation(Family::V6, 1280, false);
}

#[test]
fn datagrams_in_one_buffer_reach_a_client_behind_a_small_mtu() {
    conversation(Family::V4, 1280, true);
    conversation(Family::V6, 1280, true);
}
