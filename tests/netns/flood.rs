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
    traffic::{Backend, Connection, Protocol},
};

use crate::scene::{BACKEND_PORT, PORT, served_to_the_client, spec};

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
