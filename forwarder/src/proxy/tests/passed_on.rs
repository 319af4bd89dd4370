//! A conversation between two proxies, of which the second takes over from the first.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream, UdpSocket},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::Arc,
    time::Instant,
};

use tokio::runtime::{Builder, Runtime};

use super::{DEADLINE, connect, listen};
use crate::{
    proxy::{Held, Idle, Options, Proxy, Sockets, Store, pass_on},
    publish::spec::Spec,
};

struct Process {
    runtime: Runtime,
    proxy: Proxy,
    idle: Idle,
}

impl Process {
    /// Serves a socket, which it has in common with others.
    fn new(socket: impl AsFd, spec: &Arc<Spec>, before: Option<UnixStream>) -> Self {
        Self::of(Builder::new_multi_thread(), socket, spec, before)
    }

    fn of(
        mut runtime: Builder,
        socket: impl AsFd,
        spec: &Arc<Spec>,
        before: Option<UnixStream>,
    ) -> Self {
        let runtime = runtime.enable_all().build().expect("a runtime");
        let inside = runtime.enter();
        let idle = Idle::start(Store::default()).expect("epoll");
        if let Some(before) = before {
            assert_eq!(idle.expect(before.into()).expect("conversations"), 1);
        }
        let copy = socket.as_fd().try_clone_to_owned().expect("a descriptor");
        let held = Held::bind(spec, &mut [&mut Sockets::from(vec![copy])]);
        let options = Options {
            name: "p1".into(),
            ..Options::default()
        };
        let proxy = Proxy::start(held.expect("held"), spec.clone(), options, &idle);
        let proxy = proxy.expect("epoll");
        drop(inside);
        Self {
            runtime,
            proxy,
            idle,
        }
    }

    /// Ends, and leaves a stream with what it had.
    fn pass_on(self) -> UnixStream {
        let (ours, theirs) = pass_on::stream().expect("a stream");
        assert_eq!(self.runtime.block_on(self.idle.pass_on_by(&ours)), 1);
        theirs
    }
}

/// A client's with a server, by the first process.
struct Conversation {
    first: Process,
    client: TcpStream,
    server: TcpStream,
    /// What both processes serve.
    listener: TcpListener,
    spec: Arc<Spec>,
}

impl Conversation {
    fn begin() -> Self {
        let (server, backend) = listen("127.0.0.1:0");
        let (listener, frontend) = listen("127.0.0.1:0");
        let spec = format!("127.0.0.1:{}:{backend}", frontend.port());
        let spec: Arc<Spec> = Arc::new(spec.parse().expect("a spec"));
        let first = Process::new(&listener, &spec, None);
        let client = connect(frontend);
        let (server, _) = server.accept().expect("the proxy connects");
        Self {
            first,
            client,
            server,
            listener,
            spec,
        }
    }
}

/// Short pieces, each of which the proxy has read before the next comes, until the backend takes no more.
#[test]
fn what_could_not_be_written_yet_is_passed_on() {
    let Conversation {
        first,
        mut client,
        mut server,
        listener,
        spec,
    } = Conversation::begin();
    let mut sent = Vec::new();
    let read = |sent: &[u8]| first.proxy.counters().bytes == sent.len() as u64;
    loop {
        let piece = [(sent.len() / 1000) as u8; 1000];
        client.write_all(&piece).expect("room");
        sent.extend_from_slice(&piece);
        let begun = Instant::now();
        while !read(&sent) && begun.elapsed() < *DEADLINE / 20 {
            std::thread::yield_now();
        }
        if !read(&sent) {
            break; // it waits for the backend
        }
    }
    let second = Process::new(&listener, &spec, Some(first.pass_on()));
    client.shutdown(Shutdown::Write).expect("half-closed");
    let mut got = Vec::new();
    server.read_to_end(&mut got).expect("the end");
    assert!(got == sent, "{} octets of {}", got.len(), sent.len());
    server.write_all(b"answer").expect("room");
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).expect("the end");
    assert_eq!(answer, b"answer");
    assert_eq!(second.proxy.counters().begun, 0, "it has begun before");
}

/// A direction that has ended stays so, and the other goes on.
#[test]
fn what_is_half_closed_stays_so() {
    let Conversation {
        first,
        mut client,
        mut server,
        listener,
        spec,
    } = Conversation::begin();
    client.write_all(b"question").expect("room");
    client.shutdown(Shutdown::Write).expect("half-closed");
    let mut question = Vec::new();
    server.read_to_end(&mut question).expect("the end");
    assert_eq!(question, b"question");
    let second = Process::new(&listener, &spec, Some(first.pass_on()));
    server.write_all(b"answer").expect("room");
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).expect("the end");
    assert_eq!(answer, b"answer");
    let deadline = Instant::now() + *DEADLINE;
    while second.proxy.counters().flows > 0 {
        assert!(Instant::now() < deadline, "it does not end");
    }
}

/// Whether the keepalive timer runs of an established connection from one port to another of this host
/// (Documentation/networking/proc_net_tcp.rst).
fn is_kept_alive(from: u16, to: u16) -> bool {
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp").expect("a table");
    let is_it = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, local, remote, "01", _, timer, ..] = fields[..] else {
            return false;
        };
        let has = |end: &str, port: u16| end.ends_with(&format!(":{port:04X}"));
        has(local, from) && has(remote, to) && timer.starts_with("02")
    };
    table.lines().any(is_it)
}

/// What a young one is spared, the next process does not make up for.
#[test]
fn what_is_passed_on_young_is_kept_alive_all_the_same() {
    let Conversation {
        first,
        client: _client,
        server,
        listener,
        spec,
    } = Conversation::begin();
    let port = |end: std::io::Result<std::net::SocketAddr>| end.expect("connected").port();
    let (proxy, backend) = (port(server.peer_addr()), port(server.local_addr()));
    let _second = Process::new(&listener, &spec, Some(first.pass_on()));
    assert!(is_kept_alive(proxy, backend));
}

/// A start that fails gives back what it was handed, also what none of its tasks has got to.
#[test]
fn what_has_just_arrived_is_passed_on_again() {
    let Conversation {
        first,
        mut client,
        mut server,
        listener,
        spec,
    } = Conversation::begin();
    let one_thread = Builder::new_current_thread();
    let second = Process::of(one_thread, &listener, &spec, Some(first.pass_on()));
    let _third = Process::new(&listener, &spec, Some(second.pass_on()));
    client.write_all(b"question").expect("room");
    let mut question = [0; 8];
    server.read_exact(&mut question).expect("the question");
    assert_eq!(&question, b"question");
}

#[test]
fn datagrams_whose_flow_has_just_arrived_are_of_it_after_it_was_passed_on_again() {
    let bound = || {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        socket.set_read_timeout(Some(*DEADLINE)).expect("set");
        socket
    };
    let [server, frontend, client] = [bound(), bound(), bound()];
    let address = |socket: &UdpSocket| socket.local_addr().expect("bound");
    let spec = format!("{}:{}/udp", address(&frontend), address(&server));
    let spec: Arc<Spec> = Arc::new(spec.parse().expect("a spec"));
    let ask = || {
        client
            .send_to(b"question", address(&frontend))
            .expect("sent");
        let mut question = [0; 64];
        let (length, from) = server.recv_from(&mut question).expect("the question");
        assert_eq!(&question[..length], b"question");
        from
    };
    let first = Process::new(&frontend, &spec, None);
    let before = ask();
    let one_thread = Builder::new_current_thread();
    let second = Process::of(one_thread, &frontend, &spec, Some(first.pass_on()));
    let _third = Process::new(&frontend, &spec, Some(second.pass_on()));
    assert_eq!(ask(), before);
}
