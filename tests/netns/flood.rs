//! Floods from a machine with many addresses, and what they must not disturb.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    thread,
};

use forwarder_common::limits;
use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::wait_for,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask},
    wire::Wire,
};

use crate::scene::{BACKEND_PORT, PORT, packets, served_to_the_client, spec};

/// Ports of a source address that the flood uses.
const PORTS: u32 = 1000;

/// Sends one datagram from each of many sources, and again, until it is told to end.
fn flood(frontend: SocketAddr, ended: &AtomicBool, sent: &AtomicU32) {
    while !ended.load(Relaxed) {
        for number in 0..2 * limits::HALF_OPEN {
            if ended.load(Relaxed) {
                break;
            }
            let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 1, 0, 0)) + number / PORTS);
            let port = 20_000 + (number % PORTS) as u16;
            // Without waiting: the socket is closed before an answer comes.
            if let Ok(socket) = UdpSocket::bind((address, port))
                && socket.send_to(b"flood", frontend).is_ok()
            {
                sent.fetch_add(1, Relaxed);
            }
        }
    }
}

/// A bridge learns all of them, and tells.
#[test]
fn a_container_that_sends_from_many_macs_takes_no_memory_and_holds_nobody_up() {
    const MACS: u32 = 200_000;
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    served_to_the_client(&topology, Protocol::Tcp, "before");
    let before = daemon.resident().unwrap();
    let wire = Wire::open(&topology.peer.netns, "eth0").unwrap();
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]); // of nobody (IEEE 802)
    for number in 0..MACS {
        frame[6..8].copy_from_slice(&[0x02, 0x77]);
        frame[8..12].copy_from_slice(&number.to_be_bytes());
        wire.send(&frame).unwrap();
    }
    // What changes meanwhile is followed: an address that comes now is served by the fast path.
    let host = &topology.host;
    host.ip("addr add 198.51.100.77/24 dev eth0").unwrap();
    let frontend = SocketAddr::from(([198, 51, 100, 77], PORT));
    let followed = wait_for("the new address is served", || {
        let before = packets(&daemon);
        ask(&topology.client, Protocol::Tcp, frontend, "after").ok()?;
        (packets(&daemon).0 > before.0).then_some(())
    });
    followed.unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.said()));
    let after = daemon.resident().unwrap();
    assert!(after < before + 16, "{before} MiB, then {after}");
    daemon.stop().unwrap();
}

#[test]
fn a_flood_from_many_sources_disturbs_neither_conversations_nor_new_clients() {
    let topology = Topology::new().unwrap();
    let _tcp = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let _udp = Backend::start(&topology.backend.netns, Protocol::Udp, BACKEND_PORT).unwrap();
    let specs = [Protocol::Tcp, Protocol::Udp].map(|p| spec(&topology.backend, Family::V4, p));
    let specs = [&specs[0][..], &specs[1]];
    let daemon = Daemon::start(&topology.host, &specs, Datapath::Ebpf).unwrap();
    served_to_the_client(&topology, Protocol::Tcp, "first");
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    let localhost = SocketAddr::from(([127, 0, 0, 1], PORT));
    let mut external = Connection::open(&topology.client, frontend).unwrap();
    let mut local = Connection::open(&topology.host, localhost).unwrap();
    external.ask("before").unwrap();
    local.ask("before").unwrap();

    let (ended, sent) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        let host = &topology.host;
        let (ended, sent) = (&ended, &sent);
        scope.spawn(move || host.enter(|| flood(localhost, ended, sent)));
        let mut flooded = || {
            wait_for("more datagrams than half-open flows", || {
                external.ask("meanwhile").unwrap();
                local.ask("meanwhile").unwrap();
                served_to_the_client(&topology, Protocol::Tcp, "new");
                served_to_the_client(&topology, Protocol::Udp, "new");
                (sent.load(Relaxed) > limits::HALF_OPEN + limits::HALF_OPEN / 2).then_some(())
            })
        };
        // An emulated machine sends a thousand in a second.
        let flooded = flooded().or_else(|_| flooded()).or_else(|_| flooded());
        ended.store(true, Relaxed);
        flooded.unwrap();
    });
    external.ask("after").unwrap();
    local.ask("after").unwrap();
    assert_eq!(daemon.counted("no_entry").unwrap(), 0);
    daemon.stop().unwrap();
}
