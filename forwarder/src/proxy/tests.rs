//! The proxy as its clients and backends meet it: real sockets on loopback addresses, no privileges.

mod bursts;
mod datagrams;
mod passed_on;

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{MsgFlags, send};

use socket2::{Domain, Type};

use super::{Held, Idle, Options, Proxy, ProxyProtocol, Refusal, Stop, Store};
use crate::{proxy::protocol_header::Transport, publish::spec::Spec};

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
        if let Ok(held) = Held::bind(&spec, &mut []) {
            let idle = Idle::start(Store::default()).expect("epoll");
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
    fn stop(&mut self, how: Stop) {
        self.runtime.block_on(self.proxy.stop(how));
    }

    fn refused(&self, why: Refusal) -> u64 {
        self.proxy.counters().refused[why as usize]
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
fn conversations_are_spread_over_all_threads() {
    let (listener, backend) = listen("127.0.0.1:0");
    let served = serve("127.0.0.1", backend, "tcp", Options::default());
    let pairs: Vec<_> = (0..8).map(|_| pair(&served, &listener)).collect();
    let all = served.proxy.idle.common().workers.conversations();
    assert_eq!(all.iter().sum::<usize>(), pairs.len());
    let (least, most) = (all.iter().min(), all.iter().max());
    assert!(most <= least.map(|least| 2 * least + 1).as_ref(), "{all:?}");
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

fn leaves_by_a_reset(client: TcpStream, served: &Served) {
    let linger = Some(Duration::ZERO);
    let set = socket2::SockRef::from(&client).set_linger(linger);
    set.expect("set");
    drop(client);
    let begun = Instant::now();
    let workers = &served.proxy.idle.common().workers;
    while workers.conversations().iter().sum::<usize>() > 0 {
        assert!(begun.elapsed() < *DEADLINE, "the conversation goes on");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Its queue is full, so the kernel answers nobody else: as an address that nobody has.
#[test]
fn a_client_that_is_gone_does_not_wait_for_a_backend_that_does_not_answer() {
    let listener = socket2::Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    listener.bind(&any.into()).expect("bound");
    listener.listen(0).expect("a listener");
    let backend = listener.local_addr().ok().and_then(|it| it.as_socket());
    let backend = backend.expect("an address");
    let _queued = connect(backend);
    let served = serve("127.0.0.1", backend, "tcp", Options::default());
    let mut client = connect(served.frontend);
    client.write_all(b"hello").expect("written");
    leaves_by_a_reset(client, &served);
}

#[test]
fn a_client_that_is_gone_does_not_wait_for_a_backend_that_reads_nothing() {
    let (listener, backend) = listen("127.0.0.1:0");
    let served = serve("127.0.0.1", backend, "tcp", Options::default());
    let (mut client, _backend) = pair(&served, &listener);
    client.set_nonblocking(true).expect("set");
    let (mut sent, mut idle) = (0, 0);
    while idle < 100 {
        match client.write(&[7; 65536]) {
            Ok(count) => (sent, idle) = (sent + count, 0),
            Err(_) => idle += 1,
        }
        thread::sleep(Duration::from_millis(1));
    }
    assert!(sent > 0);
    leaves_by_a_reset(client, &served);
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

/// Reads until the mark, then the urgent octet, as its receiver does by default.
fn read_to_mark(stream: &mut TcpStream, wanted: usize) -> (Vec<u8>, u8) {
    let mut before = vec![0; wanted];
    stream.read_exact(&mut before).expect("what comes before");
    let mut octet = [0];
    let start = std::time::Instant::now();
    while nix::sys::socket::recv(stream.as_raw_fd(), &mut octet, MsgFlags::MSG_OOB).is_err() {
        assert!(start.elapsed() < *DEADLINE, "the octet is not urgent");
        thread::yield_now();
    }
    (before, octet[0])
}

#[test]
fn the_urgent_octet_stays_urgent_and_in_its_place() {
    let (listener, backend) = listen("127.0.0.1:0");
    let served = serve("127.0.0.1", backend, "tcp", Options::default());
    for client_sends in [true, false] {
        let (client, backend) = pair(&served, &listener);
        let (mut from, mut to) = if client_sends {
            (client, backend)
        } else {
            (backend, client)
        };
        // The last is far more than a pipe's worth, so that it is spliced.
        for size in [0, 1, 5000, 3 << 20] {
            let before = vec![b'b'; size];
            let mut sender = from.try_clone().expect("a second handle");
            let sending = thread::spawn(move || {
                sender.write_all(&before).expect("written");
                let sent = send(sender.as_raw_fd(), b"!", MsgFlags::MSG_OOB);
                assert_eq!(sent, Ok(1));
                sender.write_all(b"after").expect("written");
            });
            let (before, octet) = read_to_mark(&mut to, size);
            assert!(before.iter().all(|octet| *octet == b'b'));
            assert_eq!(octet, b'!', "{size} octets before");
            let mut after = [0; 5];
            to.read_exact(&mut after).expect("what comes after");
            assert_eq!(&after, b"after", "{size} octets before");
            sending.join().expect("sent");
        }
        from.shutdown(Shutdown::Write).expect("half-closed");
        assert_eq!(read_all(&mut to), b"");
        to.write_all(b"still there").expect("written");
        drop(to);
        assert_eq!(read_all(&mut from), b"still there");
    }
}

#[test]
fn an_urgent_octet_may_be_the_last() {
    let (listener, backend) = listen("127.0.0.1:0");
    let served = serve("127.0.0.1", backend, "tcp", Options::default());
    for size in [3, 3 << 20] {
        let (mut client, mut backend) = pair(&served, &listener);
        let sending = thread::spawn(move || {
            client.write_all(&vec![b'b'; size]).expect("written");
            assert_eq!(send(client.as_raw_fd(), b"!", MsgFlags::MSG_OOB), Ok(1));
        });
        assert_eq!(read_to_mark(&mut backend, size).1, b'!');
        assert_eq!(read_all(&mut backend), b"");
        sending.join().expect("sent");
    }
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
    assert_eq!(served.refused(Refusal::NotAllowed), 1);
}

#[test]
fn the_proxy_protocol_names_the_client() {
    let (listener, backend) = listen("127.0.0.1:0");
    let options = Options {
        proxy_protocol: ProxyProtocol::V2,
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
        ProxyProtocol::V2.header(Transport::Stream, address, served.frontend)[..]
    );
    assert_eq!(&got[28..], b"data");
}

#[test]
fn stopping_frees_the_port_and_ends_connections_as_asked() {
    for how in [Stop::Cut, Stop::Reset, Stop::Drain] {
        let (listener, backend) = listen("127.0.0.1:0");
        // An address that no other test binds, so that nobody takes the port that is given back.
        let mut served = serve("127.0.77.1", backend, "tcp", Options::default());
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

#[test]
fn what_drains_can_be_reset_later() {
    let (listener, backend) = listen("127.0.0.1:0");
    let mut served = serve("127.0.77.2", backend, "tcp", Options::default());
    let (mut client, mut backend) = pair(&served, &listener);
    client.write_all(b"x").expect("written");
    backend.read_exact(&mut [0]).expect("read");
    served.stop(Stop::Drain);
    assert_eq!(served.proxy.counters().flows, 1);
    served.stop(Stop::Reset);
    assert!(is_reset(&mut client) && is_reset(&mut backend));
}

#[test]
fn version_1_of_the_proxy_protocol_is_a_line_first() {
    let (listener, backend) = listen("127.0.0.1:0");
    let options = Options {
        proxy_protocol: ProxyProtocol::V1,
        ..Options::default()
    };
    let served = serve("127.0.0.1", backend, "tcp", options);
    let (mut client, mut backend) = pair(&served, &listener);
    client.write_all(b"data").expect("written");
    let (own, frontend) = (client.local_addr().expect("bound"), served.frontend);
    drop(client);
    let line = format!(
        "PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\ndata",
        own.port(),
        frontend.port()
    );
    assert_eq!(read_all(&mut backend), line.as_bytes());
}
