//! Much at once: segments that the kernel has merged (GSO), and datagrams longer than the link's MTU.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
};

use forwarder::datapath::kernel::kernel;
use forwarder_tests::{
    clients::{Client, Kind},
    daemon::Datapath,
    deadline::patience,
    netns::Netns,
    topology::{Family, Topology},
    traffic::Protocol,
};

use nix::sys::{
    socket::{setsockopt, sockopt},
    time::{TimeVal, TimeValLike},
};

use crate::scene::{BACKEND_PORT, PORT, Scene, on_the_fast_path, packets, wait_for_peer};

const SIZE: usize = 32 << 20;

/// Sends `SIZE` bytes each way over one connection from a client to the published port of `host`, and compares them.
pub(crate) fn there_and_back(backend: &Netns, client: &Netns, host: IpAddr) {
    let pattern: Vec<u8> = (0..SIZE).map(|at| (at ^ (at >> 13)) as u8).collect();
    let listener = backend
        .enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, BACKEND_PORT)))
        .unwrap();
    // For a listener this bounds `accept`, so that a client that fails is reported.
    setsockopt(&listener, sockopt::ReceiveTimeout, &TimeVal::seconds(30)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(3 * patience())).unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            assert!(got == pattern, "{} bytes came to the backend", got.len());
            stream.write_all(&got).unwrap();
        });
        let frontend = SocketAddr::new(host, PORT);
        let mut stream = client
            .enter(|| TcpStream::connect_timeout(&frontend, 3 * patience()))
            .unwrap();
        stream.set_read_timeout(Some(3 * patience())).unwrap();
        stream.set_write_timeout(Some(3 * patience())).unwrap();
        stream.write_all(&pattern).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert!(got == pattern, "{} bytes came back", got.len());
    });
}

#[test]
fn tcp_in_bulk_arrives_whole_from_everywhere() {
    let scene = Scene::tcp().silent().start();
    let (topology, daemon) = scene.parts();
    for kind in [
        Kind::External,
        Kind::Localhost,
        Kind::HostLocal,
        Kind::HairpinSameBridge,
        Kind::SelfHairpin,
    ] {
        let client = kind.client(topology, Family::V4);
        on_the_fast_path(daemon, || {
            there_and_back(&client.backend.netns, client.netns, client.connects_to);
        });
    }
    scene.stop();
}

/// Together they are too long for IPv6's header (BIG TCP), and kernels before Linux 7 put hop-by-hop options behind that.
#[test]
fn merged_segments_of_more_than_64_kib_arrive_whole_over_ipv6() {
    let scene = Scene::of(Family::V6, Protocol::Tcp).silent().start();
    let (topology, daemon) = scene.parts();
    let Topology {
        host,
        client,
        backend,
        ..
    } = topology;
    let veth = backend.veth.as_str();
    for (netns, devices) in [
        (host, ["lo", "eth0", "br0", veth].as_slice()),
        (client, &["eth0"]),
        (&backend.netns, &["eth0"]),
    ] {
        for (device, limit) in devices.iter().flat_map(|it| [(it, "gso"), (it, "gro")]) {
            // Kernels before 5.19 refuse it.
            let _ = netns.ip(&format!("link set {device} {limit}_max_size 180000"));
        }
    }
    for kind in [Kind::External, Kind::Localhost] {
        let client = kind.client(topology, Family::V6);
        on_the_fast_path(daemon, || {
            there_and_back(&client.backend.netns, client.netns, client.connects_to);
        });
    }
    scene.stop();
}

/// By splice(2), which a running instance has to be allowed.
#[test]
fn tcp_in_bulk_arrives_whole_in_user_space() {
    let scene = Scene::tcp().silent().by(Datapath::Userland).start();
    let topology = &scene.topology;
    let lan = scene.frontend().ip();
    there_and_back(&topology.backend.netns, &topology.client, lan);
    scene.stop();
}

/// Datagrams of several lengths, each echoed by the backend.
fn datagrams(family: Family) {
    let scene = Scene::of(family, Protocol::Udp).silent().start();
    let (topology, daemon) = scene.parts();
    let bind = |netns: &Netns, port| {
        let at = (family.unspecified(), port);
        let socket = netns.enter(|| UdpSocket::bind(at)).unwrap();
        socket.set_read_timeout(Some(patience())).unwrap();
        socket
    };
    let server = bind(&topology.backend.netns, BACKEND_PORT);
    // Until `peer` is known, packets from the host cross the bridge, whose MTU counts.
    wait_for_peer(daemon);
    for kind in [
        Kind::External,
        Kind::Localhost,
        Kind::HostLocal,
        Kind::HairpinSameBridge,
        Kind::HairpinOtherBridge,
    ] {
        let Client {
            netns,
            connects_to: host,
            ..
        } = kind.client(topology, family);
        let client = bind(netns, 0);
        let frontend = SocketAddr::new(host, PORT);
        for length in [1_000, 1_473, 4_000, 8_000, 60_000] {
            let before = packets(daemon);
            let data: Vec<u8> = (0..length).map(|at| (at ^ (at >> 8)) as u8).collect();
            let mut got = vec![0; 1 << 16];
            client.send_to(&data, frontend).unwrap();
            let (received, from) = server.recv_from(&mut got).unwrap_or_else(|error| {
                panic!("{length} bytes from {} to {host}: {error}", netns.label())
            });
            assert!(
                got[..received] == data,
                "{received} bytes of {length} there"
            );
            server.send_to(&data, from).unwrap();
            let (received, from) = client.recv_from(&mut got).unwrap_or_else(|error| {
                panic!("{length} bytes back to {}: {error}", netns.label())
            });
            assert!(got[..received] == data, "{received} bytes of {length} back");
            assert_eq!(from, frontend);
            let after = packets(daemon);
            // Before 6.1 nothing but the proxy gets these to the container.
            let too_long = length > 1_458 && netns.path() == topology.host.path();
            let carried = kernel().peer_from_lo || !too_long;
            assert_eq!(
                (after.0 > before.0, after.1 > before.1),
                (carried, carried),
                "{length} bytes from {} on the fast path",
                netns.label()
            );
        }
    }
    scene.stop();
}

#[test]
fn datagrams_longer_than_the_mtu_arrive_whole_over_ipv4() {
    datagrams(Family::V4);
}

#[test]
fn datagrams_longer_than_the_mtu_arrive_whole_over_ipv6() {
    datagrams(Family::V6);
}
