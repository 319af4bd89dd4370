//! UDP: for each client address and port, and each address of ours that it uses, a socket connected to the
//! backend. Datagrams go as they are, empty ones too; replies leave from the address the client used.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use forwarder_common::flow::{Phase, Timeouts};
use nix::{
    errno::Errno,
    sys::socket::{self, MsgFlags},
};
use tokio::{io::Interest, net::UdpSocket, sync::mpsc, time::Instant};
use tracing::{debug, warn};

use super::{
    LiveFlow, Shared,
    batch::{self, Local},
    sockets::{self, Port},
};

const MAX_FLOWS: usize = 65_536;

type Key = (SocketAddr, Option<Local>);

struct Flow {
    backend: UdpSocket,
    /// Milliseconds since `began` of the newest datagram in either direction.
    seen: AtomicU64,
    began: Instant,
    replied: AtomicBool,
    /// Nothing is read from the backend any more: the next datagram needs another flow.
    over: AtomicBool,
    _live: LiveFlow,
}

impl Flow {
    fn touch(&self) {
        let elapsed = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.seen.store(elapsed, Relaxed);
    }

    /// Not tokio's `try_send`, which waits for an event that a new socket has not had. What does not
    /// fit into the socket's buffer is lost, as on a network.
    fn send(&self, data: &[u8]) -> nix::Result<usize> {
        socket::send(self.backend.as_raw_fd(), data, MsgFlags::MSG_DONTWAIT)
    }

    fn expires(&self, timeouts: &Timeouts) -> Instant {
        let timeout = timeouts.of(if self.replied.load(Relaxed) {
            Phase::UdpStream
        } else {
            Phase::Udp
        });
        let seen = Duration::from_millis(self.seen.load(Relaxed));
        self.began + seen + Duration::from_secs(timeout)
    }
}

/// Serves a held port until the task is ended; its flows end with it.
pub(super) async fn serve(socket: std::net::UdpSocket, port: Port, shared: Arc<Shared>) {
    let spec = &shared.spec;
    let mut answering = match UdpSocket::from_std(socket) {
        Ok(socket) => Answering {
            port,
            frontend: Arc::new(socket),
            others: HashMap::new(),
        },
        Err(error) => return warn!("serve {spec}: {error}"),
    };
    let frontend = answering.frontend.clone();
    let mut flows: HashMap<Key, Arc<Flow>> = HashMap::new();
    let (gone, mut over) = mpsc::unbounded_channel();
    let mut warned = false;
    let mut receive = |data: &[u8], flows: &mut HashMap<Key, Arc<Flow>>, key: Key| {
        if !shared.allows(key.0.ip()) {
            return;
        }
        if flows.get(&key).is_none_or(|flow| flow.over.load(Relaxed)) {
            let begun = answering
                .for_datagram(key.1)
                .and_then(|(port, answering)| Ok((begin(port, &shared, flows.len())?, answering)));
            match begun {
                Ok((flow, answering)) => {
                    let task = replies(answering, flow.clone(), key, shared.clone(), gone.clone());
                    tokio::spawn(until_stopped(task, shared.clone()));
                    flows.insert(key, flow);
                }
                Err(error) => {
                    if !warned {
                        warn!("{spec} takes no more clients for now: {error}");
                        warned = true;
                    }
                    return;
                }
            }
        }
        let flow = &flows[&key];
        flow.touch();
        // A refusal that an earlier datagram met is reported by the next send, which then was not made.
        let sent = match flow.send(data) {
            Err(Errno::ECONNREFUSED) => flow.send(data),
            sent => sent,
        };
        if sent.is_ok() {
            shared.carried(data.len());
        }
    };
    loop {
        tokio::select! {
            ready = frontend.readable() => {
                let received = ready.and_then(|()| {
                    frontend.try_io(Interest::READABLE, || {
                        let count = batch::receive(frontend.as_fd(), |data, source, local| {
                            if let Some(source) = source {
                                receive(data, &mut flows, (source, local));
                            }
                        })?;
                        unless_emptied(count)
                    })
                });
                match received {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                        debug!("receive for {spec}: {error}");
                    }
                    _ => {}
                }
            }
            Some(key) = over.recv() => {
                if flows.get(&key).is_some_and(|flow| flow.over.load(Relaxed)) {
                    flows.remove(&key);
                }
            }
        }
    }
}

/// For `try_io`: `WouldBlock` after a read that has emptied the socket saves another that would only say so. The
/// kernel reports what has come since anew (EPOLLET, epoll(7)).
fn unless_emptied(datagrams: usize) -> io::Result<()> {
    if batch::was_all(datagrams) {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    Ok(())
}

async fn until_stopped(task: impl Future<Output = ()>, shared: Arc<Shared>) {
    tokio::select! {
        () = task => {}
        _ = shared.ended() => {}
    }
}

/// The sockets that replies leave by.
struct Answering {
    port: Port,
    /// The one that holds the publish.
    frontend: Arc<UdpSocket>,
    /// Those of other ports of a range, while they have flows.
    others: HashMap<u16, Weak<UdpSocket>>,
}

impl Answering {
    /// The port that a datagram was sent to, and the socket that its answers leave by.
    fn for_datagram(&mut self, local: Option<Local>) -> io::Result<(u16, Arc<UdpSocket>)> {
        let mark = match self.port {
            Port::One(port) => return Ok((port, self.frontend.clone())),
            Port::Steered { mark } => mark,
        };
        let bound = self.frontend.local_addr()?;
        let port = local.map_or(bound.port(), |local| local.port);
        if port == bound.port() {
            return Ok((port, self.frontend.clone()));
        }
        if let Some(socket) = self.others.get(&port).and_then(Weak::upgrade) {
            return Ok((port, socket));
        }
        self.others.retain(|_, socket| socket.strong_count() > 0);
        let socket = sockets::answering(SocketAddr::new(bound.ip(), port), mark)?;
        let socket = Arc::new(UdpSocket::from_std(socket)?);
        self.others.insert(port, Arc::downgrade(&socket));
        Ok((port, socket))
    }
}

fn begin(port: u16, shared: &Arc<Shared>, flows: usize) -> io::Result<Arc<Flow>> {
    if flows >= MAX_FLOWS {
        return Err(io::Error::other(format!("{MAX_FLOWS} flows")));
    }
    let backend = shared.backend(port);
    let any: IpAddr = match backend {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    socket.connect(backend)?;
    Ok(Arc::new(Flow {
        backend: UdpSocket::from_std(socket)?,
        seen: AtomicU64::new(0),
        began: Instant::now(),
        replied: AtomicBool::new(false),
        over: AtomicBool::new(false),
        _live: shared.flow(),
    }))
}

/// Brings the backend's datagrams to the client, until both have been silent for the timeout.
async fn replies(
    frontend: Arc<UdpSocket>,
    flow: Arc<Flow>,
    key: Key,
    shared: Arc<Shared>,
    gone: mpsc::UnboundedSender<Key>,
) {
    let (client, local) = key;
    let timeouts = &shared.options.timeouts;
    loop {
        tokio::select! {
            ready = flow.backend.readable() => {
                let answered = ready.and_then(|()| {
                    flow.backend.try_io(Interest::READABLE, || {
                        let (backend, frontend) = (flow.backend.as_fd(), frontend.as_fd());
                        let (datagrams, bytes) = batch::answer(backend, frontend, client, local)?;
                        flow.touch();
                        flow.replied.store(true, Relaxed);
                        shared.carried_many(datagrams, bytes);
                        unless_emptied(datagrams)
                    })
                });
                match answered {
                    // The backend refused (ICMP): it may be back for the next datagram.
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                        debug!("{client}: {error}");
                    }
                    _ => {}
                }
            }
            () = tokio::time::sleep_until(flow.expires(timeouts)) => {
                if flow.expires(timeouts) <= Instant::now() {
                    break;
                }
            }
        }
    }
    flow.over.store(true, Relaxed);
    let _ = gone.send(key);
}
