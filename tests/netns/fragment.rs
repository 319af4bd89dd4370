//! Datagrams in parts that a network has mixed up: they arrive all the same.

#![expect(unsafe_code, reason = "a socket option that no crate has")]

use std::{
    io::IoSlice,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

use forwarder_tests::{
    clients::Kind,
    deadline::patience,
    fragment::cut,
    frame::{Frame, Protocol},
    topology::{Family, Topology},
    wire::Wire,
};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};

use crate::scene::{BACKEND_PORT, PORT, Scene, veths_keep_buffers, wait_for_peer};

/// Sends a datagram's parts in that order, and returns whom the backend saw. The answer must be the frontend's.
fn seen(topology: &Topology, socket: &UdpSocket, id: u32, order: [usize; 3]) -> SocketAddr {
    let family = if socket.local_addr().unwrap().is_ipv4() {
        Family::V4
    } else {
        Family::V6
    };
    let frontend = SocketAddr::new(topology.host_address(family), PORT);
    let mut frame = Frame::first(Protocol::Udp, socket.local_addr().unwrap(), frontend);
    frame.source_mac = topology.client.mac("eth0").unwrap();
    frame.destination_mac = topology.host.mac("eth0").unwrap();
    frame.payload = format!("{id:0>1000}").into_bytes();
    let wire = Wire::open(&topology.client, "eth0").unwrap();
    let parts = cut::<3>(&frame, id);
    for number in order {
        wire.send(&parts[number]).unwrap();
    }
    let mut buffer = [0; 2000];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(from, frontend);
    let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
    let (seen, payload) = answer.split_once(' ').unwrap();
    assert_eq!(payload.as_bytes(), frame.payload);
    seen.parse().unwrap()
}

fn parts_in_any_order_arrive(family: Family) {
    let scene = Scene::of(family, Protocol::Udp).start();
    let topology = &scene.topology;
    let client = topology.client_address(family);
    let socket = topology.client.enter(|| UdpSocket::bind((client, 0)));
    let socket = socket.unwrap();
    socket.set_read_timeout(Some(patience())).unwrap();
    // The client's neighbour entry for the answers, and the host's for the client.
    let frontend = scene.frontend();
    socket.send_to(b"hello", frontend).unwrap();
    socket.recv(&mut [0; 100]).unwrap();

    let in_order = seen(topology, &socket, 1, [0, 1, 2]);
    assert_eq!(in_order, socket.local_addr().unwrap(), "the fast path");
    assert_eq!(seen(topology, &socket, 2, [0, 2, 1]), in_order);
    for (id, order) in [(3, [1, 0, 2]), (4, [2, 1, 0]), (5, [1, 2, 0])] {
        let by_the_proxy = seen(topology, &socket, id, order);
        assert_eq!(by_the_proxy.ip(), topology.backend.gateway(family));
    }
    assert_eq!(seen(topology, &socket, 6, [0, 1, 2]), in_order);
    scene.stop();
}

#[test]
fn the_parts_of_a_datagram_arrive_in_any_order_over_ipv4() {
    parts_in_any_order_arrive(Family::V4);
}

#[test]
fn the_parts_of_a_datagram_arrive_in_any_order_over_ipv6() {
    parts_in_any_order_arrive(Family::V6);
}

/// A backend's answer to each client, cut in three, in every order.
fn answers_in_any_order_arrive(family: Family) {
    let scene = Scene::of(family, Protocol::Udp).silent().start();
    let (topology, daemon) = scene.parts();
    let backend = &topology.backend;
    let address = SocketAddr::new(backend.address(family), BACKEND_PORT);
    let server = backend.netns.enter(|| UdpSocket::bind(address)).unwrap();
    server.set_read_timeout(Some(patience())).unwrap();
    let wire = Wire::open(&backend.netns, "eth0").unwrap();
    let kinds = [
        Kind::External,
        Kind::HostLocal,
        Kind::Localhost,
        Kind::HairpinSameBridge,
    ];
    let mut id = 0;
    for client in kinds.map(|kind| kind.client(topology, family)) {
        let frontend = SocketAddr::new(client.connects_to, PORT);
        let client = client.netns.enter(|| {
            let socket = UdpSocket::bind((family.unspecified(), 0)).unwrap();
            socket.connect(frontend).unwrap();
            socket
        });
        client.set_read_timeout(Some(patience())).unwrap();
        client.send(b"question").unwrap();
        let (_, seen) = server.recv_from(&mut [0; 100]).unwrap();
        let mut frame = Frame::first(Protocol::Udp, address, seen);
        frame.source_mac = backend.netns.mac("eth0").unwrap();
        frame.destination_mac = topology.host.mac("br0").unwrap();
        for order in [
            [0, 1, 2],
            [0, 2, 1],
            [1, 0, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
        ] {
            id += 1;
            frame.payload = format!("{id:0>1000}").into_bytes();
            let parts = cut::<3>(&frame, id);
            for number in order {
                wire.send(&parts[number]).unwrap();
            }
            let mut buffer = [0; 4000];
            let length = client.recv(&mut buffer).unwrap_or_else(|error| {
                panic!("{seen} of {frontend} got no answer in order {order:?}: {error}")
            });
            assert_eq!(buffer[..length], frame.payload);
        }
    }
    // Whose first was not the first, of each client.
    assert_eq!(daemon.counted("out_of_order").unwrap(), 4 * 4);
    scene.stop();
}

#[test]
fn the_parts_of_an_answer_arrive_in_any_order_over_ipv4() {
    answers_in_any_order_arrive(Family::V4);
}

#[test]
fn the_parts_of_an_answer_arrive_in_any_order_over_ipv6() {
    answers_in_any_order_arrive(Family::V6);
}

/// A server that leaves it to routers to cut up what it sends (IP_PMTUDISC_OMIT), as DNS servers do.
fn server(topology: &Topology) -> UdpSocket {
    let backend = &topology.backend;
    let address = SocketAddr::new(backend.address(Family::V4), BACKEND_PORT);
    let server = backend.netns.enter(|| UdpSocket::bind(address)).unwrap();
    server.set_read_timeout(Some(patience())).unwrap();
    let omit = libc::IP_PMTUDISC_OMIT;
    // SAFETY: the kernel reads one integer, which lives until it returns.
    let set = unsafe {
        let (level, name) = (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER);
        libc::setsockopt(server.as_raw_fd(), level, name, (&raw const omit).cast(), 4)
    };
    assert_eq!(set, 0);
    server
}

/// Has that server answer so many octets, once in datagrams of `each`, and asserts that the client gets them in such.
fn answers_arrive(scene: &Scene, server: &UdpSocket, lengths: &[usize], each: Option<u16>) {
    let (topology, daemon) = scene.parts();
    let client = topology
        .client
        .enter(|| UdpSocket::bind("0.0.0.0:0"))
        .unwrap();
    client.set_read_timeout(Some(patience())).unwrap();
    let frontend = scene.frontend();
    wait_for_peer(daemon);
    for &length in lengths {
        client.send_to(b"question", frontend).unwrap();
        let (_, seen) = server.recv_from(&mut [0; 100]).unwrap();
        let answer: Vec<u8> = (0..length).map(|at| (at ^ at >> 8) as u8).collect();
        let segments = each.as_ref().map(ControlMessage::UdpGsoSegments);
        sendmsg(
            server.as_raw_fd(),
            &[IoSlice::new(&answer)],
            segments.as_slice(),
            MsgFlags::empty(),
            Some(&SockaddrStorage::from(seen)),
        )
        .unwrap();
        let mut buffer = vec![0; 1 << 16];
        let mut missing: Vec<_> = answer.chunks(each.map_or(length, usize::from)).collect();
        // Where veths cut buffers up, a short one at the end overtakes those that have to be cut up again.
        while !missing.is_empty() {
            let (received, from) = client
                .recv_from(&mut buffer)
                .unwrap_or_else(|error| panic!("{length} octets: {error}"));
            assert_eq!(from, frontend);
            let received = &buffer[..received];
            let which = missing.iter().position(|datagram| *datagram == received);
            let which = which.unwrap_or_else(|| panic!("{} octets, of {length}", received.len()));
            assert!(which == 0 || !veths_keep_buffers(), "out of order");
            missing.remove(which);
        }
    }
    let too_long = lengths.iter().filter(|it| **it > 1472).count();
    assert!(daemon.counted("cut_up").unwrap() >= too_long as u64);
}

#[test]
fn an_answer_that_the_uplink_is_too_narrow_for_arrives_in_parts() {
    let topology = Topology::new().unwrap();
    topology.host.ip("link set eth0 mtu 1460").unwrap();
    let scene = Scene::udp().silent().start_in(topology);
    let server = server(&scene.topology);
    answers_arrive(&scene, &server, &[100, 1452, 1472, 4000], None);
    scene.stop();
}

#[test]
fn an_answer_that_no_jumbo_frame_takes_arrives_in_parts() {
    let topology = Topology::new().unwrap();
    let Topology { host, backend, .. } = &topology;
    let wide = "mtu 65535";
    host.ip(&format!("link set {} {wide}", backend.veth))
        .unwrap();
    backend.netns.ip(&format!("link set eth0 {wide}")).unwrap();
    let scene = Scene::udp().silent().start_in(topology);
    let server = server(&scene.topology);
    let lengths = [100, 9_000, 9_400, 40_000, 65_507];
    answers_arrive(&scene, &server, &lengths, None);
    scene.stop();
}

/// The kernel carries datagrams that a server sends together as one (GSO).
#[test]
fn answers_in_one_buffer_that_the_uplink_is_too_narrow_for_stay_datagrams_of_their_own() {
    let topology = Topology::new().unwrap();
    topology.host.ip("link set eth0 mtu 1400").unwrap();
    let scene = Scene::udp().silent().start_in(topology);
    let server = server(&scene.topology);
    let lengths = [2_900, 4_200, 20_000, 60_000];
    answers_arrive(&scene, &server, &lengths, Some(1_450));
    scene.stop();
}
