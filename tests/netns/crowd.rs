//! A crowd: as many connections of this host to one backend, open at once, as there are source ports for them.

#![expect(unsafe_code, reason = "a call that no crate has")]

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use forwarder_tests::{
    deadline::{patience, slack},
    topology::Topology,
};
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
    resource::{Resource, getrlimit, setrlimit},
};
use socket2::{Domain, Socket, Type};

use crate::scene::{BACKEND_PORT, PORT, Scene, on_the_fast_path, wait_for_delivery};

const CONNECTIONS: usize = 60_000;
/// What the kernel may give to sockets by itself; 64,435 ports are left. Of each conversation's 128 that are tried, one is
/// free then, but for one conversation in 10,000 at the end. It has to take another port of its own.
const LOCAL_PORTS: &str = "1024 1100";
const REFUSED: usize = 10;

/// Threads of each side. The limit of open files is that of a table of descriptors, and each thread has its own.
const THREADS: usize = 4;
const SHARE: usize = CONNECTIONS / THREADS;
/// The kernel spreads connections over the servers by a hash, so one gets some more.
const DESCRIPTORS: u64 = SHARE as u64 + 1_000;

/// How far all threads are.
#[derive(Default)]
struct Crowd {
    listening: AtomicUsize,
    /// Clients that have all their connections.
    complete: AtomicUsize,
    /// Clients that have had all their answers.
    answered: AtomicUsize,
}

/// What epoll says of the listener, where others have their index.
const LISTENER: u64 = u64::MAX;

fn reached(count: &AtomicUsize, all: usize) {
    let deadline = Instant::now() + slack() * 60;
    while count.load(SeqCst) < all {
        let now = count.load(SeqCst);
        assert!(Instant::now() < deadline, "only {now} of {all}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Raises the limit of open files, the hard one too, as root may.
fn raise_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let limit = hard.max(DESCRIPTORS);
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit).unwrap_or_else(|error| {
        panic!("this test opens {DESCRIPTORS} files, the hard limit is {hard}: {error}")
    });
}

/// Gives this thread a table of descriptors of its own, without what the other tests have open.
fn own_descriptors() {
    // SAFETY: it closes copies that nobody in this thread uses.
    let done = unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_UNSHARE as i32) };
    assert_eq!(done, 0, "close_range: {}", io::Error::last_os_error());
}

/// Opens a share of the connections and then, when all are open, says its number in each, twice. Returns the ports that the
/// server saw.
fn client(crowd: &Crowd, number: usize) -> Vec<u16> {
    own_descriptors();
    reached(&crowd.listening, THREADS);
    let address = [127, 0, 0, 1 + number as u8];
    let frontend = SocketAddr::from(([127, 0, 0, 1], PORT));
    let mut connections: Vec<TcpStream> = Vec::new();
    for port in 20_000.. {
        if connections.len() == SHARE {
            break;
        }
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket
            .bind(&SocketAddr::from((address, port)).into())
            .unwrap();
        match socket.connect_timeout(&frontend.into(), slack() * 3) {
            Ok(()) => connections.push(socket.into()),
            Err(error) => assert!(
                usize::from(port) - 20_000 - connections.len() < REFUSED,
                "{error} after {} connections",
                connections.len()
            ),
        }
    }
    crowd.complete.fetch_add(1, SeqCst);
    reached(&crowd.complete, THREADS);
    let mut seen = Vec::new();
    for round in 0..2 {
        let text =
            |index: usize| ((round * CONNECTIONS + number * SHARE + index) as u32).to_be_bytes();
        seen.clear();
        // Not all at once: each message that nobody has read takes a page of TCP's memory.
        for (index, connection) in connections.iter_mut().enumerate() {
            connection.write_all(&text(index)).unwrap();
            let mut answer = [0; 6];
            connection.set_read_timeout(Some(6 * patience())).unwrap();
            connection.read_exact(&mut answer).unwrap();
            assert_eq!(answer[..4], text(index), "another one's answer");
            seen.push(u16::from_be_bytes([answer[4], answer[5]]));
        }
    }
    crowd.answered.fetch_add(1, SeqCst);
    seen
}

/// Accepts connections and answers in each with what was said and the port that it came from, until all clients are done.
fn server(crowd: &Crowd) {
    own_descriptors();
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.set_reuse_port(true).unwrap();
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, BACKEND_PORT));
    listener.bind(&any.into()).unwrap();
    listener.listen(4096).unwrap();
    let tick = Duration::from_millis(20);
    listener.set_read_timeout(Some(tick)).unwrap(); // bounds `accept`
    crowd.listening.fetch_add(1, SeqCst);

    let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
    let arrived = EpollEvent::new(EpollFlags::EPOLLIN, LISTENER);
    epoll.add(&listener, arrived).unwrap();
    let mut connections: Vec<(TcpStream, u16)> = Vec::new();
    let mut events = [EpollEvent::empty(); 64];
    let deadline = Instant::now() + slack() * 120;
    while crowd.answered.load(SeqCst) < THREADS {
        assert!(Instant::now() < deadline, "not all were answered in time");
        let count = epoll.wait(&mut events, 20_u16).unwrap();
        for event in &events[..count] {
            if event.data() == LISTENER {
                let Ok((socket, peer)) = listener.accept() else {
                    continue;
                };
                let event = EpollEvent::new(EpollFlags::EPOLLIN, connections.len() as u64);
                epoll.add(&socket, event).unwrap();
                let port = peer.as_socket().unwrap().port();
                connections.push((socket.into(), port));
                continue;
            }
            let (connection, port) = &mut connections[event.data() as usize];
            let mut text = [0; 4];
            if connection.read(&mut text).unwrap_or(0) == 0 {
                epoll.delete(connection).unwrap(); // its client has had both answers
                continue;
            }
            let [a, b, c, d] = text;
            let [e, f] = port.to_be_bytes();
            connection.write_all(&[a, b, c, d, e, f]).unwrap();
        }
    }
}

#[test]
fn sixty_thousand_connections_of_this_host_each_keep_their_conversation() {
    let topology = Topology::new().unwrap();
    topology.host.enter(|| {
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", LOCAL_PORTS).unwrap();
    });
    raise_limit();
    let scene = Scene::tcp().silent().start_in(topology);
    let (topology, daemon) = scene.parts();
    wait_for_delivery(daemon);
    let crowd = Crowd::default();
    on_the_fast_path(daemon, || {
        thread::scope(|scope| {
            let (backend, host) = (&topology.backend.netns, &topology.host);
            let crowd = &crowd;
            for _ in 0..THREADS {
                scope.spawn(|| backend.enter(|| server(crowd)));
            }
            let clients: Vec<_> = (0..THREADS)
                .map(|number| scope.spawn(move || host.enter(|| client(crowd, number))))
                .collect();
            let seen = clients.into_iter().map(|client| client.join().unwrap());
            let ports: BTreeSet<u16> = seen.flatten().collect();
            assert_eq!(ports.len(), CONNECTIONS, "two share a port");
        });
    });
    scene.stop();
}
