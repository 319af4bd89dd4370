//! A virtual machine as a backend: a tap on the bridge, with a process behind it that speaks Ethernet. There
//! is no other end that a packet could be put into: delivery is `device`.

use std::{
    fs::File,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    thread,
};

use forwarder_tests::{
    document::Delivery,
    frame::{Frame, Mac},
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Protocol, ask},
    tun,
};

use crate::scene::{
    BACKEND_PORT, PORT, Scene, on_the_fast_path, wait_for_delivery_by, wait_for_peer,
};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 9);
const MAC: Mac = [2, 0, 0, 0, 0, 9];

/// Answers ARP for its address, and each datagram with who sent it and what, as the harness's backends do.
fn machine(mut tap: File) {
    let mut buffer = [0; 2048];
    while let Ok(length) = tap.read(&mut buffer) {
        let bytes = &buffer[..length];
        let answer = match Frame::parse(bytes) {
            Ok(frame) if frame.destination.ip() == IpAddr::V4(ADDRESS) => {
                assert_eq!(frame.destination_mac, MAC);
                let mut answer = frame.reply();
                answer.payload =
                    [format!("{} ", frame.source).into_bytes(), frame.payload].concat();
                answer.bytes()
            }
            _ if is_question(bytes) => arp_answer(bytes),
            _ => continue,
        };
        if tap.write_all(&answer).is_err() {
            return;
        }
    }
}

/// An ARP request for the machine's address (RFC 826).
fn is_question(frame: &[u8]) -> bool {
    frame.len() >= 42
        && frame[12..14] == [0x08, 0x06]
        && frame[20..22] == [0, 1]
        && frame[38..42] == ADDRESS.octets()
}

fn arp_answer(question: &[u8]) -> Vec<u8> {
    let mut answer = question[..42].to_vec();
    answer[0..6].copy_from_slice(&question[6..12]);
    answer[6..12].copy_from_slice(&MAC);
    answer[21] = 2;
    answer[22..28].copy_from_slice(&MAC);
    answer[28..32].copy_from_slice(&ADDRESS.octets());
    answer[32..42].copy_from_slice(&question[22..32]);
    answer
}

#[test]
fn a_virtual_machine_behind_a_tap_is_delivered_to_by_device() {
    let topology = Topology::new().unwrap();
    let device = tun::open(&topology.host, tun::Kind::Tap, "tap0").unwrap();
    topology.host.ip("link set tap0 master br0 up").unwrap();
    // Ends when the device goes with its namespace, at the latest with the test's process.
    thread::spawn(|| machine(device));
    let spec = format!("{PORT}:{ADDRESS}:9000/udp");
    let scene = Scene::udp().silent().publishing(&[spec]);
    let scene = scene.start_in(topology);
    let (topology, daemon) = scene.parts();
    wait_for_delivery_by(daemon, Delivery::Device);
    let lan = topology.host_address(Family::V4);
    let gateway = topology.backend.gateway(Family::V4);
    for (client, host, seen) in [
        (&topology.client, lan, topology.client_address(Family::V4)),
        (&topology.host, Family::V4.localhost(), gateway),
        (&topology.peer.netns, lan, topology.peer.address(Family::V4)),
    ] {
        on_the_fast_path(daemon, || {
            let answer = ask(client, Protocol::Udp, SocketAddr::new(host, PORT), "hello").unwrap();
            assert_eq!((answer.payload.as_str(), answer.seen.ip()), ("hello", seen));
        });
    }
    scene.stop();
}

/// Puts a bridge between the link of the container `peer` and a machine of its own, as some runtimes have for virtual machines: the
/// machine's MAC is none of the link's. It has the container's address.
pub(crate) fn bridged(topology: &Topology) -> Netns {
    let (container, machine) = (&topology.peer, Netns::new("machine").unwrap());
    let address = container.address(Family::V4);
    let inside = format!(
        "addr flush dev eth0\nlink add br9 type bridge\n\
         link add tap9 type veth peer name eth0 netns {}\n\
         link set eth0 master br9\nlink set tap9 master br9 up\nlink set br9 up",
        machine.path()
    );
    container.netns.ip(&inside).unwrap();
    let gateway = container.gateway(Family::V4);
    machine
        .ip(&format!(
            "addr add {address}/24 dev eth0\nlink set eth0 up\nroute add default via {gateway}"
        ))
        .unwrap();
    machine
}

#[test]
fn a_machine_bridged_to_a_containers_link_is_served() {
    let topology = Topology::new().unwrap();
    let machine = bridged(&topology);
    let _backend = Backend::start(&machine, Protocol::Udp, BACKEND_PORT).unwrap();
    let scene = Scene::udp().container(|it| &it.peer).silent();
    let scene = scene.start_in(topology);
    scene.served("first");
    wait_for_peer(&scene.daemon);
    scene.served_on_the_fast_path();
    scene.stop();
}
