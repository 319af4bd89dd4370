//! The proxy as its clients and backends meet it: real sockets on loopback addresses, no privileges.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::LazyLock,
    thread,
    time::Duration,
};

use super::{Held, Idle, Options, Proxy, Stop};
use crate::publish::spec::Spec;

/// Ten seconds, or as many times that as `FORWARDER_TEST_SLACK` says: an emulated machine is slower.
static DEADLINE: LazyLock<Duration> = LazyLock::new(|| {
    let factor = std::env::var("FORWARDER_TEST_SLACK").ok();
    let factor = factor.and_then(|text| text.parse().ok()).unwrap_or(1);
    Duration::from_secs(10) * factor
});

/// A proxy in a runtime of its own.
struct Served {
    runtime: tokio::runtime::Runtime,
    proxy: Proxy,
    frontend: SocketAddr,
}

/// Publishes a free port of an address.
fn serve(address: &str, backend: SocketAddr, protocol: &str, options: Options) -> Served {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let _inside = runtime.enter();
    // Between finding a free port and holding it, another test may take it.
    for _ in 0..100 {
        let free = UdpSocket::bind("127.0.0.1:0")
            .and_then(|s| s.local_addr())
            .expect("a port");
        let text = format!("{address}:{}:{}/{protocol}", free.port(), backend);
        let spec: Spec = text.parse().expect("a spec");
        if let Ok(held) = Held::bind(&spec) {
            let idle = Idle::start().expect("epoll");
            let proxy = Proxy::start(held, spec.into(), options, &idle).expect("epoll");
            let host = address
                .trim_matches(['[', ']'])
                .parse()
                .expect("an address");
            let frontend = SocketAddr::new(host, free.port());
            drop(_inside);
            return Served {
                runtime,
                proxy,
                frontend,
            };
        }
    }
    panic!("no free port");
}

impl Served {
    fn stop(self, how: Stop) {
        self.runtime.block_on(self.proxy.stop(how));
        // Tasks that drain need the runtime.
        std::mem::forget(self.runtime);
    }
}

fn listen(address: &str) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(address).expect("a listener");
    let address = listener.local_addr().expect("bound");
    (listener, address)
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, *DEADLINE).expect("connected");
    stream.set_read_timeout(Some(*DEADLINE)).expect("a timeout");
    stream
        .set_write_timeout(Some(*DEADLINE))
        .expect("a timeout");
    stream
}

/// A connected pair through the proxy: the client's end and the backend's.
fn pair(served: &Served, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = connect(served.frontend);
    let (backend, _) = listener.accept().expect("the proxy connects");
    backend
        .set_read_timeout(Some(*DEADLINE))
        .expect("a timeout");
    (client, backend)
}

fn read_all(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).expect("the end of the stream");
    all
}

fn is_reset(stream: &mut TcpStream) -> bool {
    matches!(stream.read(&mut [0; 16]), Err(error) if error.kind() == ErrorKind::ConnectionReset)
}

/// The reset may be there before the client has noticed that it was connected.
fn is_reset_at_once(frontend: SocketAddr) -> bool {
    match TcpStream::connect_timeout(&frontend, *DEADLINE) {
        Ok(mut stream) => {
            stream.set_read_timeout(Some(*DEADLINE)).expect("a timeout");
            is_reset(&mut stream)
        }
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn half_close_goes_through_both_ways() {
    let (listener, backend) = listen("127.0.0.1:0");
    let served = serve("127.0.0.1", backend, "tcp", Options::default());
    let (mut client, mut backend) = pair(&served, &listener);
    client.write_all(b"question").expect("written");
    client.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!(read_all(&mut backend), b"question");
    backend
        .write_all(b"late answer")
        .expect("the other half is open");
    drop(backend);
    assert_eq!(read_all(&mut client), b"late answer");
}

#[test]
fn the_backend_may_half_close_first() {
    let (listener, backend) = listen("127.0.0.1:0");
    let served = serve("127.0.0.1", backend, "tcp", Options::default());
    let (mut client, mut backend) = pair(&served, &listener);
    backend.write_all(b"banner").expect("written");
    backend.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!(read_all(&mut client), b"banner");
    client
        .write_all(b"still here")
        .expect("the other half is open");
    drop(client);
    assert_eq!(read_all(&mut backend), b"still here");
}

#[test]
fn a_refused_backend_resets_the_client() {
    let (listener, backend) = listen("127.0.0.1:0");
    drop(listener);
    let served = serve("127.0.0.1", backend, "tcp", Options::default());
    assert!(is_reset_at_once(served.frontend));
}

#[test]
fn a_reset_goes_through_both_ways() {
    let (listener, backend) = listen("127.0.0.1:0");
    let served = serve("127.0.0.1", backend, "tcp", Options::default());
    for client_resets in [true, false] {
        let (client, backend) = pair(&served, &listener);
        let (from, mut to) = if client_resets {
            (client, backend)
        } else {
            (backend, client)
        };
        socket2::SockRef::from(&from)
            .set_linger(Some(Duration::ZERO))
            .expect("set");
        drop(from);
        assert!(is_reset(&mut to), "client_resets: {client_resets}");
    }
}

#[test]
fn bulk_arrives_whole_in_both_directions_at_once() {
    const SIZE: usize = 64 << 20;
    let data = |seed: u8| -> Vec<u8> {
        (0..SIZE)
            .map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 16) as u8) ^ seed)
            .collect()
    };
    let (listener, backend) = listen("127.0.0.1:0");
    let served = serve("127.0.0.1", backend, "tcp", Options::default());
    let (client, backend) = pair(&served, &listener);
    let ends: Vec<_> = [(client, 1), (backend, 2)]
        .into_iter()
        .map(|(mut stream, seed)| {
            let mut writer = stream.try_clone().expect("a second handle");
            thread::spawn(move || {
                let write = thread::spawn(move || {
                    writer.write_all(&data(seed)).expect("written");
                    writer.shutdown(Shutdown::Write).expect("half-closed");
                });
                let got = read_all(&mut stream);
                write.join().expect("the writer ends");
                assert!(
                    got == data(3 - seed),
                    "{} bytes differ from what was sent",
                    got.len()
                );
            })
        })
        .collect();
    ends.into_iter().for_each(|end| end.join().expect("whole"));
    assert!(served.proxy.counters().bytes >= 2 * SIZE as u64);
}

#[test]
fn hundreds_of_connections_at_once() {
    let (listener, backend) = listen("127.0.0.1:0");
    let served = serve("127.0.0.1", backend, "tcp", Options::default());
    let mut pairs: Vec<_> = (0..300).map(|_| pair(&served, &listener)).collect();
    for (at, (client, _)) in pairs.iter_mut().enumerate() {
        client.write_all(&at.to_be_bytes()).expect("written");
    }
    for (at, (_, backend)) in pairs.iter_mut().enumerate() {
        let mut got = [0; size_of::<usize>()];
        backend.read_exact(&mut got).expect("read");
        assert_eq!(usize::from_be_bytes(got), at);
    }
    assert_eq!(served.proxy.counters().flows, 300);
}

#[test]
fn an_ipv6_client_reaches_an_ipv4_backend() {
    let (listener, backend) = listen("127.0.0.1:0");
    let served = serve("[::1]", backend, "tcp", Options::default());
    let (mut client, mut backend) = pair(&served, &listener);
    client.write_all(b"six").expect("written");
    drop(client);
    assert_eq!(read_all(&mut backend), b"six");
}

#[test]
fn only_the_allow_list_is_served() {
    let (listener, backend) = listen("127.0.0.1:0");
    listener.set_nonblocking(true).expect("set");
    let options = Options {
        allow: vec!["192.0.2.0/24".parse().expect("a network")],
        ..Options::default()
    };
    let served = serve("127.0.0.1", backend, "tcp", options);
    assert!(is_reset_at_once(served.frontend));
    assert_eq!(
        listener.accept().expect_err("nobody came").kind(),
        ErrorKind::WouldBlock
    );
    assert_eq!(served.proxy.counters().refused, 1);
}

#[test]
fn the_proxy_protocol_names_the_client() {
    let (listener, backend) = listen("127.0.0.1:0");
    let options = Options {
        proxy_protocol: true,
        ..Options::default()
    };
    let served = serve("127.0.0.1", backend, "tcp", options);
    let (mut client, mut backend) = pair(&served, &listener);
    client.write_all(b"data").expect("written");
    let address = client.local_addr().expect("bound");
    drop(client);
    let got = read_all(&mut backend);
    assert_eq!(
        got[..28],
        super::protocol_header::tcp(address, served.frontend)[..]
    );
    assert_eq!(&got[28..], b"data");
}

#[test]
fn stopping_frees_the_port_and_ends_connections_as_asked() {
    for how in [Stop::Cut, Stop::Reset, Stop::Drain] {
        let (listener, backend) = listen("127.0.0.1:0");
        // An address that no other test binds, so that nobody takes the port that is given back.
        let served = serve("127.0.77.1", backend, "tcp", Options::default());
        let frontend = served.frontend;
        let (mut client, mut backend) = pair(&served, &listener);
        // Both ends are joined once something has come through.
        client.write_all(b"x").expect("written");
        backend.read_exact(&mut [0]).expect("read");
        served.stop(how);
        let refused =
            TcpStream::connect_timeout(&frontend, *DEADLINE).expect_err("the port is free");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{how:?}");
        match how {
            Stop::Cut => assert_eq!(client.read(&mut [0; 16]).expect("the end"), 0),
            Stop::Reset => assert!(is_reset(&mut client) && is_reset(&mut backend)),
            Stop::Drain => {
                client.write_all(b"still served").expect("written");
                drop(client);
                assert_eq!(read_all(&mut backend), b"still served");
            }
        }
    }
}

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
    assert_eq!(served.proxy.counters().refused, 1);
}
