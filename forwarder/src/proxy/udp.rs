//! UDP: for each client address and port, and each address of ours that it uses, a socket connected to the
//! backend. Datagrams go as they are, empty ones too; replies leave from the address the client used.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    net::{IpAddr, SocketAddr, SocketAddrV6},
    os::fd::{AsFd as _, AsRawFd as _},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use forwarder_common::flow::{ORIGINAL, REPLY};
use forwarder_common::flow::{Phase, Timeouts};
use nix::{
    errno::Errno,
    sys::socket::{self, ControlMessage, MsgFlags, SockaddrStorage},
};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use tokio::{io::Interest, net::UdpSocket, sync::mpsc, time::Instant};
use tracing::{debug, warn};

use super::{
    Refusal, batch,
    budget::Permit,
    chain::Link,
    control::{self, About, Local},
    flows::Listed,
    pass_on::{Kind, Message, PassedOn},
    protocol_header::Transport,
    shared::{Live, LiveFlow, Shared},
    sockets::{self, GivenUp, Port},
};

/// Of one socket.
pub(super) const MAX_FLOWS: usize = 65_536;

type Key = (SocketAddr, Option<Local>);
/// What a flow's own socket on a port that is given up keeps.
type Kept = (Permit, GivenUp);

struct Flow {
    backend: UdpSocket,
    /// Whether that is for IPv4.
    is_v4: bool,
    /// The socket that answers leave by: the one that holds the publish, or the flow's own while it drains. None once the port
    /// was taken from the flow.
    frontend: Mutex<Option<Arc<UdpSocket>>>,
    /// Of the PROXY protocol, in front of each datagram.
    header: Vec<u8>,
    /// Of datagrams to the backend, and to the client.
    segments: [batch::Segments; 2],
    /// Nothing is read from the backend any more: the next datagram needs another flow.
    over: AtomicBool,
    known: Listed,
    _link: Link,
    _permit: Permit,
    _live: LiveFlow,
}

impl Flow {
    fn frontend(&self) -> MutexGuard<'_, Option<Arc<UdpSocket>>> {
        self.frontend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a client's datagrams to the backend. What does not fit into the socket's buffer is lost, as on a network.
    fn carry(&self, data: &[IoSlice<'_>], about: About, shared: &Shared) {
        self.known.touch();
        let count = |packets, bytes| {
            self.known.carried(ORIGINAL, packets, bytes);
            shared.carried_many(packets, bytes);
        };
        let size = about.segment;
        let segments = &self.segments[0];
        if size == 0 || self.header.is_empty() && segments.may_be(size) {
            match self.send(data, about) {
                Ok(_) => {
                    let bytes = length(data);
                    return count(about.datagrams(bytes), bytes);
                }
                Err(error) if size > 0 && segments.refused(size, &error.into()) => {}
                Err(_) => return,
            }
        }
        let alone = About {
            segment: 0,
            ..about
        };
        for datagram in data.iter().flat_map(|buffer| buffer.chunks(size.into())) {
            if self.send(&[IoSlice::new(datagram)], alone).is_ok() {
                count(1, datagram.len());
            }
        }
    }

    fn send(&self, data: &[IoSlice<'_>], about: About) -> nix::Result<usize> {
        // A refusal that an earlier datagram met is reported by the next send, which then was not made.
        match self.try_send(data, about) {
            Err(Errno::ECONNREFUSED) => self.try_send(data, about),
            sent => sent,
        }
    }

    /// Not tokio's `try_send`, which waits for an event that a new socket has not had.
    fn try_send(&self, data: &[IoSlice<'_>], about: About) -> nix::Result<usize> {
        let (socket, flags) = (self.backend.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        if let [data] = data
            && self.header.is_empty()
            && about.ecn == 0
            && about.segment == 0
        {
            return socket::send(socket, data, flags);
        }
        let (tos, class) = (about.ecn, about.ecn.into());
        let ecn = if self.is_v4 {
            ControlMessage::Ipv4Tos(&tos)
        } else {
            ControlMessage::Ipv6TClass(&class)
        };
        let all = [ControlMessage::UdpGsoSegments(&about.segment), ecn];
        let control = match (about.segment, about.ecn) {
            (0, 0) => &[],
            (0, _) => &all[1..],
            (_, 0) => &all[..1],
            _ => &all[..],
        };
        let parts = match data {
            [data] => &[IoSlice::new(&self.header), IoSlice::new(data)],
            _ => data, // several have no header
        };
        socket::sendmsg::<SockaddrStorage>(socket, parts, control, flags, None)
    }

    fn expires(&self, timeouts: &Timeouts) -> Instant {
        let timeout = timeouts.of(if self.known.replied.load(Relaxed) {
            Phase::UdpStream
        } else {
            Phase::Udp
        });
        self.known.last_seen() + Duration::from_secs(timeout)
    }
}

/// A flow of an earlier process.
pub(super) struct Left {
    /// What the socket is bound to that it came by.
    bound: SocketAddr,
    key: Key,
    backend: Socket,
    link: Link,
    /// From the start: the fast path is not to take it meanwhile.
    known: Listed,
    _live: Live,
}

impl std::fmt::Debug for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Left").finish_non_exhaustive()
    }
}

impl Left {
    /// One that goes on by one of these sockets: the process before may have held a range in another way.
    ///
    /// # Errors
    /// It is none of UDP, has no socket that is connected, or none of these has its port.
    pub(super) fn from_message(
        passed_on: PassedOn,
        held: &[(Port, SocketAddr)],
        shared: &Arc<Shared>,
    ) -> io::Result<Self> {
        let PassedOn {
            message,
            descriptors,
        } = passed_on;
        let Kind::Udp {
            bound,
            local,
            has_replied,
        } = message.kind
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let port = match local {
            Some(local) if local.port != 0 => local.port,
            _ => bound.port(),
        };
        let mut held = held.iter().filter(|(_, at)| at.ip() == bound.ip());
        let ports = shared.spec.ports;
        let found = held.find(|(kind, at)| match kind {
            Port::One(_) => at.port() == port,
            Port::Steered { .. } => (ports.first..=ports.last).contains(&port),
        });
        let &(kind, bound) = found.ok_or(io::ErrorKind::AddrNotAvailable)?;
        let is_steered = matches!(kind, Port::Steered { .. });
        let local = local.map(|local| Local {
            port: if is_steered { port } else { 0 },
            ..local
        });
        let mut descriptors = descriptors.into_iter();
        let socket = Socket::from(descriptors.next().ok_or(io::ErrorKind::UnexpectedEof)?);
        let (client, used) = (message.client, address(bound, local, is_steered));
        let (own, peer) = (end(socket.local_addr())?, end(socket.peer_addr())?);
        let chains = &shared.common.chains;
        let passed = chains.passed(client, || Some(used)).unwrap_or(0) + 1;
        let begun = chains.begin(passed, peer, || Ok::<_, io::Error>(socket), |_| Ok(own))?;
        let (backend, link) = begun;
        let known = Listed::new(shared.clone(), (client, used), (own, peer));
        known.replied.store(has_replied, Relaxed);
        Ok(Self {
            bound,
            key: (client, local),
            backend,
            link,
            known,
            _live: Live::new(&shared.common),
        })
    }
}

/// The address and port that a datagram was sent to, by a socket of one port or of many.
fn address(bound: SocketAddr, local: Option<Local>, is_steered: bool) -> SocketAddr {
    let Some(local) = local else {
        return bound;
    };
    let port = if is_steered && local.port != 0 {
        local.port
    } else {
        bound.port()
    };
    match local.address {
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            SocketAddrV6::new(v6, port, 0, local.ifindex).into()
        }
        address => SocketAddr::new(address, port),
    }
}

/// Serves a held port until the publish is stopped. Its flows end with it, or, if it drains, go on by sockets of their own.
pub(super) async fn serve(socket: std::net::UdpSocket, port: Port, shared: Arc<Shared>) {
    let answering = UdpSocket::from_std(socket).and_then(|socket| {
        Ok(Answering {
            port,
            bound: socket.local_addr()?,
            frontend: Arc::new(socket),
            others: HashMap::new(),
        })
    });
    let answering = match answering {
        Ok(answering) => answering,
        Err(error) => return warn!("serve {}: {error}", shared.spec),
    };
    let frontend = answering.frontend.clone();
    let (gone, mut over) = mpsc::unbounded_channel();
    let mut serving = Serving {
        shared: shared.clone(),
        answering,
        flows: HashMap::new(),
        gone,
    };
    serving.go_on();
    // Not made anew for each datagram.
    let mut closed = pin!(shared.closed());
    loop {
        tokio::select! {
            ready = frontend.readable() => {
                let received = ready.and_then(|()| {
                    frontend.try_io(Interest::READABLE, || {
                        let count = batch::receive(frontend.as_fd(), |data, source, about| {
                            if let Some(source) = source {
                                serving.receive(data, source, about);
                            }
                        })?;
                        unless_emptied(count)
                    })
                });
                match received {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                        debug!("receive for {}: {error}", shared.spec);
                    }
                    _ => {}
                }
            }
            Some(key) = over.recv() => {
                if serving.flows.get(&key).is_some_and(|flow| flow.over.load(Relaxed)) {
                    serving.flows.remove(&key);
                }
            }
            () = &mut closed => break,
        }
    }
    if shared.drains() {
        serving.hand_over();
    } else if shared.how_stopped().is_none() {
        serving.pass_on();
    } else {
        // The flows' tasks may end later than the port is free.
        serving
            .flows
            .values()
            .for_each(|flow| *flow.frontend() = None);
    }
}

/// What serves one held socket.
struct Serving {
    shared: Arc<Shared>,
    answering: Answering,
    flows: HashMap<Key, Arc<Flow>>,
    /// Tells of flows that are over.
    gone: mpsc::UnboundedSender<Key>,
}

impl Serving {
    /// Carries a client's datagrams.
    fn receive(&mut self, data: &[IoSlice<'_>], client: SocketAddr, about: About) {
        let (shared, key) = (&self.shared, (client, about.local));
        if !shared.allows(key.0.ip()) {
            return;
        }
        if self
            .flows
            .get(&key)
            .is_none_or(|flow| flow.over.load(Relaxed))
        {
            match self.begin(key) {
                Ok(Some(flow)) => self.serve(key, flow),
                Ok(None) => return,
                Err(error) => return debug!("{}: {error}", self.shared.spec),
            }
        }
        if self.shared.is_due(ORIGINAL, length(data)) {
            self.flows[&key].carry(data, about, &self.shared);
        }
    }

    /// A new client's flow, unless it is not served.
    fn begin(&mut self, (client, local): Key) -> io::Result<Option<Arc<Flow>>> {
        let shared = &self.shared;
        let refuse = |why| {
            shared.refuse(why);
            Ok(None)
        };
        if self.flows.len() >= MAX_FLOWS {
            return refuse(Refusal::TooManyFlows);
        }
        if !shared.may_begin(client.ip()) {
            return Ok(None);
        }
        let used = self.answering.address(local);
        let Some(passed) = shared.passed(client, || Some(used)) else {
            return Ok(None);
        };
        let Ok(permit) = shared.share.take(self.descriptors(used), None) else {
            return refuse(Refusal::NoDescriptors);
        };
        let (port, frontend) = self.answering.for_datagram(local)?;
        let backend = shared.backend(port)?;
        let begun = shared.begin(passed, backend, || {
            let socket = sockets::socket(backend.ip(), Type::DGRAM, None)?;
            control::tell_more(socket.as_fd(), backend.is_ipv4());
            Ok(socket)
        })?;
        let towards = (end(begun.0.local_addr())?, backend);
        let known = Listed::new(shared.clone(), (client, used), towards);
        let live = (shared.flow(), known);
        self.flow((client, used), frontend, begun, permit, live)
            .map(Some)
    }

    /// One towards the backend, and one that answers from another port of a range.
    fn descriptors(&self, used: SocketAddr) -> u64 {
        if used.port() == self.answering.bound.port() {
            1
        } else {
            2
        }
    }

    /// Of a client that uses an address of ours.
    fn flow(
        &self,
        (client, used): (SocketAddr, SocketAddr),
        frontend: Arc<UdpSocket>,
        (socket, link): (Socket, Link),
        permit: Permit,
        (live, known): (LiveFlow, Listed),
    ) -> io::Result<Arc<Flow>> {
        let protocol = self.shared.now().proxy_protocol;
        let is_v4 = socket.domain()? == Domain::IPV4;
        Ok(Arc::new(Flow {
            backend: UdpSocket::from_std(socket.into())?,
            is_v4,
            frontend: Mutex::new(Some(frontend)),
            header: protocol.header(Transport::Datagram, client, used),
            segments: Default::default(),
            over: AtomicBool::new(false),
            known,
            _link: link,
            _permit: permit,
            _live: live,
        }))
    }

    fn serve(&mut self, key: Key, flow: Arc<Flow>) {
        let task = replies(flow.clone(), key, self.shared.clone(), self.gone.clone());
        tokio::spawn(until_stopped(task, self.shared.clone()));
        self.flows.insert(key, flow);
    }

    /// Takes the flows of an earlier process that came by this socket.
    fn go_on(&mut self) {
        let bound = self.answering.bound;
        let mut all = self.shared.used().left();
        let left: Vec<Left> = all.extract_if(.., |it| it.bound == bound).collect();
        drop(all);
        for it in left {
            let key = it.key;
            if let Err(error) = self.go_on_with(it) {
                debug!("{} of {} ends: {error}", key.0, self.shared.spec);
            }
        }
    }

    fn go_on_with(&mut self, left: Left) -> io::Result<()> {
        let Left {
            key,
            backend,
            link,
            known,
            ..
        } = left;
        let used = self.answering.address(key.1);
        let permit = self.shared.share.take(self.descriptors(used), None);
        let permit = permit.map_err(|_| io::Error::from_raw_os_error(libc::EMFILE))?;
        let (_, frontend) = self.answering.for_datagram(key.1)?;
        let live = self.shared.flow_of_before();
        let flow = self.flow(
            (key.0, used),
            frontend,
            (backend, link),
            permit,
            (live, known),
        )?;
        self.serve(key, flow);
        Ok(())
    }

    /// Has all flows go on in the next process.
    fn pass_on(self) {
        for ((client, local), flow) in &self.flows {
            let Ok(backend) = flow.backend.as_fd().try_clone_to_owned() else {
                continue;
            };
            self.shared.common.pass_on(PassedOn {
                message: Message {
                    publish: self.shared.name.clone(),
                    client: *client,
                    kind: Kind::Udp {
                        bound: self.answering.bound,
                        local: *local,
                        has_replied: flow.known.replied.load(Relaxed),
                    },
                },
                descriptors: vec![backend],
            });
        }
    }

    /// Gives each flow a socket of its own on the port, connected to its client: the kernel prefers it to any that is not
    /// connected. Then nobody holds the port, and a new publish may have it.
    fn hand_over(mut self) {
        let flows: Vec<(Key, Arc<Flow>)> = self.flows.drain().collect();
        let mut going_on: HashMap<Key, Arc<Flow>> = HashMap::new();
        for (key, flow) in flows {
            match self.own_socket(key, &flow) {
                Ok((socket, kept)) => {
                    *flow.frontend() = Some(socket.clone());
                    let task = requests(socket, kept, key.0, flow.clone(), self.shared.clone());
                    tokio::spawn(until_stopped(task, self.shared.clone()));
                    going_on.insert(key, flow);
                }
                Err(error) => {
                    debug!("{} of {} ends: {error}", key.0, self.shared.spec);
                    *flow.frontend() = None;
                    flow.known.cut.notify_one();
                }
            }
        }
        // What came before the flows had their own.
        let frontend = self.answering.frontend.as_fd();
        let (mut count, shared) = (1, &self.shared);
        while count > 0 {
            let received = batch::receive(frontend, |data, source, about| {
                let flow = source.and_then(|source| going_on.get(&(source, about.local)));
                if let Some(flow) = flow {
                    flow.carry(data, about, shared);
                }
            });
            count = received.unwrap_or(0);
        }
    }

    fn own_socket(&self, key: Key, flow: &Flow) -> io::Result<(Arc<UdpSocket>, Kept)> {
        if flow.over.load(Relaxed) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let permit = self.shared.share.take(1, None);
        let permit = permit.map_err(|_| io::Error::from_raw_os_error(libc::EMFILE))?;
        // Both sockets have to agree that they share the port.
        if let Some(present) = &*flow.frontend() {
            SockRef::from(&**present).set_reuse_address(true)?;
        }
        let mark = match self.answering.port {
            Port::One(_) => None,
            Port::Steered { mark } => Some(mark),
        };
        let address = self.answering.address(key.1);
        let (socket, given_up) = sockets::draining(address, key.0, mark)?;
        Ok((Arc::new(UdpSocket::from_std(socket)?), (permit, given_up)))
    }
}

fn end(address: io::Result<SockAddr>) -> io::Result<SocketAddr> {
    let address = address?.as_socket();
    address.ok_or(io::ErrorKind::Unsupported.into())
}

fn length(data: &[IoSlice<'_>]) -> usize {
    data.iter().map(|buffer| buffer.len()).sum()
}

/// For `try_io`: `WouldBlock` after a read that has emptied the socket saves another that would only say so. The
/// kernel reports what has come since anew (EPOLLET, epoll(7)).
fn unless_emptied(buffers: usize) -> io::Result<()> {
    if batch::was_all(buffers) {
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
    /// The address of `frontend`.
    bound: SocketAddr,
    /// The one that holds the publish.
    frontend: Arc<UdpSocket>,
    /// Those of other ports of a range, while they have flows.
    others: HashMap<u16, Weak<UdpSocket>>,
}

impl Answering {
    fn address(&self, local: Option<Local>) -> SocketAddr {
        let is_steered = matches!(self.port, Port::Steered { .. });
        address(self.bound, local, is_steered)
    }

    /// The port that a datagram was sent to, and the socket that its answers leave by.
    fn for_datagram(&mut self, local: Option<Local>) -> io::Result<(u16, Arc<UdpSocket>)> {
        let mark = match self.port {
            Port::One(port) => return Ok((port, self.frontend.clone())),
            Port::Steered { mark } => mark,
        };
        let (bound, port) = (self.bound, self.address(local).port());
        if port == bound.port() {
            return Ok((port, self.frontend.clone()));
        }
        if let Some(socket) = self.others.get(&port).and_then(Weak::upgrade) {
            return Ok((port, socket));
        }
        self.others.retain(|_, socket| socket.strong_count() > 0);
        let socket = sockets::answering(at(bound, port), mark)?;
        let socket = Arc::new(UdpSocket::from_std(socket)?);
        self.others.insert(port, Arc::downgrade(&socket));
        Ok((port, socket))
    }
}

fn at(address: SocketAddr, port: u16) -> SocketAddr {
    let mut address = address;
    address.set_port(port);
    address
}

/// Brings the backend's datagrams to the client, until both have been silent for the timeout.
async fn replies(flow: Arc<Flow>, key: Key, shared: Arc<Shared>, gone: mpsc::UnboundedSender<Key>) {
    let (client, local) = key;
    let timeouts = &shared.timeouts;
    let mut expires = pin!(tokio::time::sleep_until(flow.expires(timeouts)));
    let mut cut = pin!(async {
        tokio::select! {
            () = flow.known.cut.notified() => {}
            () = shared.banned(client.ip()) => {}
        }
    });
    loop {
        tokio::select! {
            ready = flow.backend.readable() => {
                let (mut paced, mut is_first) = (0, false);
                let answered = ready.and_then(|()| {
                    flow.backend.try_io(Interest::READABLE, || {
                        let frontend = flow.frontend();
                        let Some(frontend) = frontend.as_ref() else {
                            return Err(io::ErrorKind::WouldBlock.into());
                        };
                        let (backend, frontend) = (flow.backend.as_fd(), frontend.as_fd());
                        let segments = &flow.segments[1];
                        let carried = batch::answer(backend, frontend, client, local, segments)?;
                        flow.known.touch();
                        is_first = !flow.known.replied.swap(true, Relaxed);
                        let (datagrams, bytes) = (carried.datagrams, carried.bytes);
                        flow.known.carried(REPLY, datagrams, bytes);
                        shared.carried_many(datagrams, bytes);
                        paced = carried.bytes;
                        unless_emptied(carried.buffers)
                    })
                });
                match answered {
                    // The backend refused (ICMP): it may be back for the next datagram.
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                        debug!("{client}: {error}");
                    }
                    _ => {}
                }
                if is_first {
                    expires.as_mut().reset(flow.expires(timeouts));
                }
                // What comes meanwhile waits in the socket, as far as there is room.
                shared.pace(REPLY, paced).await;
            }
            () = &mut expires => {
                let later = flow.expires(timeouts);
                if later <= Instant::now() {
                    break;
                }
                expires.as_mut().reset(later);
            }
            () = &mut cut => break,
        }
    }
    flow.over.store(true, Relaxed);
    let _ = gone.send(key);
}

/// Brings the client's datagrams to the backend by a socket of the flow's own, for as long as the flow lasts.
async fn requests(
    socket: Arc<UdpSocket>,
    _kept: Kept,
    client: SocketAddr,
    flow: Arc<Flow>,
    shared: Arc<Shared>,
) {
    let timeouts = &shared.timeouts;
    let mut expires = pin!(tokio::time::sleep_until(flow.expires(timeouts)));
    while !flow.over.load(Relaxed) {
        tokio::select! {
            ready = socket.readable() => {
                let received = ready.and_then(|()| {
                    socket.try_io(Interest::READABLE, || {
                        let count = batch::receive(socket.as_fd(), |data, source, about| {
                            // Another client's may have come before the socket was connected.
                            if source == Some(client) && shared.allows(client.ip()) {
                                flow.carry(data, about, &shared);
                            }
                        })?;
                        unless_emptied(count)
                    })
                });
                match received {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                        debug!("{client}: {error}");
                    }
                    _ => {}
                }
            }
            () = &mut expires => {
                let later = flow.expires(timeouts);
                if later <= Instant::now() {
                    break;
                }
                expires.as_mut().reset(later);
            }
        }
    }
}
