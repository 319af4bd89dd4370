//! The proxy with datagrams, over loopback.

use std::{
    io::{ErrorKind, IoSlice, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    thread,
};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};

use super::{DEADLINE, Served, serve};
use crate::{
    proxy::{
        Held, Idle, Options, Proxy, ProxyProtocol, Refusal, Stop, Store, protocol_header::Transport,
    },
    publish::spec::Spec,
};

fn datagrams(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).expect("bound");
    socket.set_read_timeout(Some(*DEADLINE)).expect("a timeout");
    socket
}

/// Sends to the frontend, has the backend echo it, and returns what came back and from where.
fn echo(
    client: &UdpSocket,
    backend: &UdpSocket,
    frontend: SocketAddr,
    data: &[u8],
) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 1 << 16];
    client.send_to(data, frontend).expect("sent");
    let (length, proxy) = backend
        .recv_from(&mut buffer)
        .expect("arrived at the backend");
    assert_eq!(&buffer[..length], data);
    backend
        .send_to(&buffer[..length], proxy)
        .expect("sent back");
    let (length, from) = client
        .recv_from(&mut buffer)
        .expect("arrived at the client");
    (buffer[..length].to_vec(), from)
}

#[test]
fn datagrams_of_every_size_come_back() {
    for (address, any) in [("127.0.0.1", "127.0.0.1:0"), ("[::1]", "[::1]:0")] {
        let backend = datagrams("127.0.0.1:0");
        let served = serve(
            address,
            backend.local_addr().expect("bound"),
            "udp",
            Options::default(),
        );
        let client = datagrams(any);
        for length in [0, 1, 1500, 60_000, 65_507 - 48] {
            let data = vec![7; length];
            assert_eq!(
                echo(&client, &backend, served.frontend, &data),
                (data, served.frontend)
            );
        }
    }
}

#[test]
fn a_reply_leaves_from_the_address_that_the_client_used() {
    let backend = datagrams("127.0.0.1:0");
    let served = serve(
        "0.0.0.0",
        backend.local_addr().expect("bound"),
        "udp",
        Options::default(),
    );
    let client = datagrams("127.0.0.1:0");
    for host in ["127.0.0.1", "127.0.0.5", "127.7.7.7"] {
        let frontend = SocketAddr::new(host.parse().expect("a literal"), served.frontend.port());
        assert_eq!(
            echo(&client, &backend, frontend, b"x"),
            (b"x".to_vec(), frontend)
        );
    }
    assert_eq!(served.proxy.counters().flows, 3);
}

#[test]
fn two_clients_are_kept_apart() {
    let backend = datagrams("127.0.0.1:0");
    let served = serve(
        "127.0.0.1",
        backend.local_addr().expect("bound"),
        "udp",
        Options::default(),
    );
    let clients = [datagrams("127.0.0.1:0"), datagrams("127.0.0.1:0")];
    for round in 0..3_u8 {
        for (at, client) in clients.iter().enumerate() {
            let data = [round, at as u8];
            assert_eq!(echo(client, &backend, served.frontend, &data).0, data);
        }
    }
    assert_eq!(served.proxy.counters().flows, 2);
}

#[test]
fn a_backend_that_comes_back_gets_the_next_datagram() {
    let backend = datagrams("127.0.0.1:0");
    let address = backend.local_addr().expect("bound");
    let served = serve("127.0.0.1", address, "udp", Options::default());
    let client = datagrams("127.0.0.1:0");
    echo(&client, &backend, served.frontend, b"one");
    drop(backend);
    client.send_to(b"lost", served.frontend).expect("sent");
    // The refusal is in the flow's socket as soon as the datagram was counted, on loopback.
    let counted = |packets| {
        let start = std::time::Instant::now();
        while served.proxy.counters().packets < packets {
            assert!(
                start.elapsed() < *DEADLINE,
                "the proxy carries the datagram"
            );
            thread::yield_now();
        }
    };
    counted(3);
    let backend = datagrams(&address.to_string());
    assert_eq!(echo(&client, &backend, served.frontend, b"two").0, b"two");
}

#[test]
fn a_datagram_of_a_stranger_is_dropped() {
    let backend = datagrams("127.0.0.1:0");
    let options = Options {
        allow: vec!["127.0.0.2/32".parse().expect("a network")],
        ..Options::default()
    };
    let served = serve(
        "0.0.0.0",
        backend.local_addr().expect("bound"),
        "udp",
        options,
    );
    let frontend = SocketAddr::new(
        "127.0.0.1".parse().expect("a literal"),
        served.frontend.port(),
    );
    let stranger = datagrams("127.0.0.1:0");
    stranger.send_to(b"no", frontend).expect("sent");
    let friend = datagrams("127.0.0.2:0");
    assert_eq!(echo(&friend, &backend, frontend, b"yes").0, b"yes");
    assert_eq!(served.refused(Refusal::NotAllowed), 1);
}

/// Publishes the port of another publish, which has been stopped.
fn serve_again(served: &Served, backend: &UdpSocket) -> Proxy {
    let _inside = served.runtime.enter();
    let backend = backend.local_addr().expect("bound");
    let spec: Spec = format!("{}:{backend}/udp", served.frontend)
        .parse()
        .expect("a spec");
    let held = Held::bind(&spec, &mut []).expect("the port is free");
    let idle = Idle::start(Store::default()).expect("epoll");
    Proxy::start(held, spec.into(), Options::default(), &idle).expect("epoll")
}

#[test]
fn a_udp_publish_that_drains_goes_on_beside_a_new_one() {
    for (address, any) in [("127.0.78.1", "127.0.0.1:0"), ("[::1]", "[::1]:0")] {
        let old = datagrams("127.0.0.1:0");
        let to_old = old.local_addr().expect("bound");
        let mut served = serve(address, to_old, "udp", Options::default());
        let frontend = served.frontend;
        let clients: Vec<UdpSocket> = (0..20).map(|_| datagrams(any)).collect();
        for client in &clients {
            echo(client, &old, frontend, b"before");
        }
        // Some that nobody has read when the publish is taken back.
        for client in &clients {
            client.send_to(b"meanwhile", frontend).expect("sent");
        }
        served.stop(Stop::Drain);
        for _ in &clients {
            let mut buffer = [0; 16];
            let (length, _) = old.recv_from(&mut buffer).expect("carried");
            assert_eq!(&buffer[..length], b"meanwhile");
        }
        let stranger = datagrams(any);
        stranger.connect(frontend).expect("connected");
        stranger.send(b"new").expect("sent");
        let refused = stranger.recv(&mut [0]).expect_err("nobody is there");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);

        let new = datagrams("127.0.0.1:0");
        let again = serve_again(&served, &new);
        assert_eq!(echo(&datagrams(any), &new, frontend, b"x").0, b"x");
        for client in &clients {
            let after = (b"after".to_vec(), frontend);
            assert_eq!(echo(client, &old, frontend, b"after"), after);
        }
        assert_eq!(served.proxy.counters().flows, 20);
        let taken = UdpSocket::bind(frontend).expect_err("the port is held");
        assert_eq!(taken.kind(), ErrorKind::AddrInUse);
        drop(again);

        served.stop(Stop::Cut);
        let start = std::time::Instant::now();
        while UdpSocket::bind(frontend).is_err() {
            assert!(start.elapsed() < *DEADLINE, "the port stays held");
            thread::yield_now();
        }
    }
}

#[test]
fn each_datagram_names_its_client_where_asked() {
    let backend = datagrams("127.0.0.1:0");
    let options = Options {
        proxy_protocol: ProxyProtocol::V2,
        ..Options::default()
    };
    let to = backend.local_addr().expect("bound");
    let served = serve("0.0.0.0", to, "udp", options);
    let frontend = SocketAddr::from(([127, 0, 0, 5], served.frontend.port()));
    let client = datagrams("127.0.0.1:0");
    let own = client.local_addr().expect("bound");
    let header = ProxyProtocol::V2.header(Transport::Datagram, own, frontend);
    for data in [&b"first"[..], b"", b"second"] {
        client.send_to(data, frontend).expect("sent");
        let mut buffer = [0; 100];
        let (length, proxy) = backend.recv_from(&mut buffer).expect("carried");
        assert_eq!(buffer[..length], [&header, data].concat());
        backend.send_to(data, proxy).expect("sent back");
        let (length, from) = client.recv_from(&mut buffer).expect("answered");
        assert_eq!((&buffer[..length], from), (data, frontend));
    }
}

/// Sends datagrams of `size` octets in one buffer.
fn send_together(socket: &UdpSocket, to: SocketAddr, data: &[u8], size: u16) {
    let (parts, to) = ([IoSlice::new(data)], SockaddrStorage::from(to));
    let control = [ControlMessage::UdpGsoSegments(&size)];
    let sent = sendmsg(
        socket.as_raw_fd(),
        &parts,
        &control,
        MsgFlags::empty(),
        Some(&to),
    );
    assert_eq!(sent, Ok(data.len()));
}

/// Receives as many octets, and returns the datagrams that they came in and their sender.
fn received(socket: &UdpSocket, octets: usize) -> (Vec<Vec<u8>>, SocketAddr) {
    let (mut all, mut buffer, mut count) = (Vec::new(), vec![0; 1 << 16], 0);
    loop {
        let (length, from) = socket.recv_from(&mut buffer).expect("a datagram");
        all.push(buffer[..length].to_vec());
        count += length;
        if count >= octets {
            return (all, from);
        }
    }
}

#[test]
fn datagrams_in_one_buffer_keep_their_boundaries() {
    for (address, any) in [("127.0.0.1", "127.0.0.1:0"), ("[::1]", "[::1]:0")] {
        let backend = datagrams(any);
        let to = backend.local_addr().expect("bound");
        let served = serve(address, to, "udp", Options::default());
        let client = datagrams(any);
        let data: Vec<u8> = (0..20 * 1000 + 300_usize).map(|at| at as u8).collect();
        let apart: Vec<Vec<u8>> = data.chunks(1000).map(Into::into).collect();
        for _ in 0..3 {
            send_together(&client, served.frontend, &data, 1000);
            let (got, proxy) = received(&backend, data.len());
            assert_eq!(got, apart);
            send_together(&backend, proxy, &data, 1000);
            assert_eq!(
                received(&client, data.len()),
                (apart.clone(), served.frontend)
            );
        }
        assert_eq!(echo(&client, &backend, served.frontend, b"").0, b"");
        let expected = (6 * 21 + 2, 6 * data.len() as u64);
        // What was sent is counted a moment later.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            let counters = served.proxy.counters();
            let counted = (counters.packets, counters.bytes);
            if counted == expected {
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{counted:?}");
            std::thread::yield_now();
        }
    }
}

#[test]
fn each_datagram_of_a_buffer_names_its_client() {
    let backend = datagrams("127.0.0.1:0");
    let options = Options {
        proxy_protocol: ProxyProtocol::V2,
        ..Options::default()
    };
    let to = backend.local_addr().expect("bound");
    let served = serve("127.0.0.1", to, "udp", options);
    let client = datagrams("127.0.0.1:0");
    let own = client.local_addr().expect("bound");
    let header = ProxyProtocol::V2.header(Transport::Datagram, own, served.frontend);
    send_together(&client, served.frontend, &[7; 2500], 1000);
    let (got, _) = received(&backend, 2500 + 3 * header.len());
    let named = |size| [header.clone(), vec![7; size]].concat();
    assert_eq!(got, [named(1000), named(1000), named(500)]);
}

/// Receives one datagram and returns its ECN and its sender.
fn congestion(socket: &UdpSocket) -> (u8, SocketAddr) {
    let mut buffer = [0; 100];
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let mut control = nix::cmsg_space!(i32);
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::empty(),
    );
    let message = message.expect("a datagram");
    let from = message.address.expect("a sender");
    let from = from.as_sockaddr_in().map_or_else(
        || {
            let v6 = from.as_sockaddr_in6().expect("of either family");
            SocketAddr::from((v6.ip(), v6.port()))
        },
        |v4| SocketAddr::from((v4.ip(), v4.port())),
    );
    let mut all = message.cmsgs().expect("whole");
    let ecn = all.find_map(|message| match message {
        ControlMessageOwned::Ipv4Tos(tos) => Some(tos & 3),
        ControlMessageOwned::Ipv6TClass(class) => Some((class & 3) as u8),
        _ => None,
    });
    (ecn.unwrap_or(0), from)
}

#[test]
fn congestion_is_told_both_ways() {
    for (address, any) in [("127.0.0.1", "127.0.0.1:0"), ("[::1]", "[::1]:0")] {
        let backend = datagrams(any);
        let to = backend.local_addr().expect("bound");
        let served = serve(address, to, "udp", Options::default());
        let client = datagrams(any);
        for socket in [&client, &backend] {
            let told = if to.is_ipv4() {
                setsockopt(socket, sockopt::IpRecvTos, &true)
            } else {
                setsockopt(socket, sockopt::Ipv6RecvTClass, &true)
            };
            assert_eq!(told, Ok(()));
        }
        let mark = |socket: &UdpSocket, ecn: i32| {
            let set = if to.is_ipv4() {
                setsockopt(socket, sockopt::Ipv4Tos, &ecn)
            } else {
                setsockopt(socket, sockopt::Ipv6TClass, &ecn)
            };
            assert_eq!(set, Ok(()));
        };
        for ecn in [0, 1, 2, 3] {
            mark(&client, ecn);
            client.send_to(b"x", served.frontend).expect("sent");
            let (seen, proxy) = congestion(&backend);
            assert_eq!(i32::from(seen), ecn, "to the backend");
            mark(&backend, 3 - ecn);
            backend.send_to(b"y", proxy).expect("sent");
            let (seen, from) = congestion(&client);
            assert_eq!((i32::from(seen), from), (3 - ecn, served.frontend));
        }
    }
}
