//! Much at once: segments that the kernel has merged (GSO), and datagrams longer than the link's MTU.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    netns::Netns,
    topology::{Family, Topology},
    traffic::Protocol,
};

use crate::scene::{BACKEND_PORT, PORT, on_the_fast_path, spec};

const DEADLINE: Duration = Duration::from_secs(30);
const SIZE: usize = 32 << 20;

/// Sends `SIZE` bytes each way over one connection from a client to the published port, and compares them.
fn there_and_back(topology: &Topology, client: &Netns, host: IpAddr) {
    let pattern: Vec<u8> = (0..SIZE).map(|at| (at ^ (at >> 13)) as u8).collect();
    let listener = topology
        .backend
        .netns
        .enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, BACKEND_PORT)))
        .unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            assert!(got == pattern, "{} bytes came to the backend", got.len());
            stream.write_all(&got).unwrap();
        });
        let frontend = SocketAddr::new(host, PORT);
        let mut stream = client
            .enter(|| TcpStream::connect_timeout(&frontend, DEADLINE))
            .unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(&pattern).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert!(got == pattern, "{} bytes came back", got.len());
    });
}

#[test]
fn tcp_in_bulk_arrives_whole_from_everywhere() {
    let topology = Topology::new().unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    let lan = topology.host_address(Family::V4);
    for (client, host) in [
        (&topology.client, lan),
        (&topology.host, Ipv4Addr::LOCALHOST.into()),
        (&topology.host, lan),
        (&topology.peer.netns, lan),
        (&topology.backend.netns, lan),
    ] {
        on_the_fast_path(&daemon, || there_and_back(&topology, client, host));
    }
    daemon.stop().unwrap();
}

#[test]
fn a_datagram_longer_than_the_containers_mtu_arrives_from_localhost() {
    let topology = Topology::new().unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Udp);
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    let bind = || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, BACKEND_PORT));
    let server = topology.backend.netns.enter(bind).unwrap();
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    let client = topology
        .host
        .enter(|| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)))
        .unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    // Once `peer` is known: until then packets cross the bridge, whose MTU counts.
    crate::scene::wait_for_peer(&daemon);
    on_the_fast_path(&daemon, || {
        for length in [1_000, 8_000, 60_000] {
            let data: Vec<u8> = (0..length).map(|at| at as u8).collect();
            client.send_to(&data, (Ipv4Addr::LOCALHOST, PORT)).unwrap();
            let mut got = vec![0; 1 << 16];
            let (received, from) = server.recv_from(&mut got).unwrap();
            assert!(got[..received] == data, "{received} bytes of {length}");
            server.send_to(b"ok", from).unwrap();
            assert_eq!(client.recv(&mut got).unwrap(), 2);
        }
    });
    daemon.stop().unwrap();
}
