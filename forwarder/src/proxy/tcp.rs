//! TCP: one backend connection for each client, copied both ways; big transfers by splice(2), so that
//! bytes stay in the kernel. Half-close, reset and the urgent octet go through to the other side.

#![expect(unsafe_code, reason = "accept4(2), with the client's address")]

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Poll, ready},
    time::Duration,
};

use forwarder_common::flow::{ORIGINAL, REPLY};
use nix::{
    errno::Errno,
    fcntl::{OFlag, SpliceFFlags, splice},
    sys::{
        epoll::EpollFlags,
        socket::{MsgFlags, recv, send},
    },
};
use socket2::{SockAddr, SockRef, TcpKeepalive};
use tracing::{debug, warn};

use super::{
    End, ProxyProtocol,
    budget::{Permit, Reserved},
    chain::Link,
    flows::Connected,
    pass_on::{self, Kind, Message, PassedOn},
    protocol_header::Transport,
    shared::{LiveFlow, Shared},
    sockets::{self, Port},
    urgent,
    worker::{Place, READ, Stream, WRITE, Watched},
};
use crate::{accept, seldom::Seldom};

const BUFFER: usize = 16 << 10;
/// A direction that filled its buffer this often is worth a pipe.
const FULL_READS: u32 = 4;
const PIPE: usize = 1 << 20;
/// Empty pipes that a worker keeps.
const PIPES_KEPT: usize = 4;
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Accepts clients in one worker until the task is ended.
pub(super) async fn serve(listener: Arc<TcpListener>, port: Port, shared: Arc<Shared>) {
    let spec = &shared.spec;
    let warned = Seldom::default();
    let mut watched = None;
    loop {
        let watching = match watched.take() {
            Some(watching) => Ok(watching),
            None => Watched::listener(listener.clone()),
        };
        let watching = match watching {
            Ok(watching) => watched.insert(watching),
            Err(error) => return warn!("serve {spec}: {error}"),
        };
        watching.ready(READ).await;
        // The worker hears again of clients that wait, after its conversations have had their turn.
        let _ = watching.clear(READ);
        let (client, address) = match accept(&listener) {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => {
                watched = None;
                accept::failed(&error, &warned, spec).await;
                continue;
            }
        };
        let port = match port {
            Port::One(port) => Ok(port),
            Port::Steered { .. } => client.local_addr().map(|frontend| frontend.port()),
        };
        let Ok(port) = port else {
            continue; // the client has gone already
        };
        if !shared.allows(address.ip()) || !shared.may_begin(address.ip()) {
            reset(&client);
            continue;
        }
        let Some(passed) = shared.passed(address, || client.local_addr().ok()) else {
            reset(&client);
            continue;
        };
        let permit = match shared.share.take(2, Some(client.as_raw_fd())) {
            Ok(permit) => Some(permit),
            Err(_) => {
                watched = None;
                shared.admit(client.as_raw_fd()).await
            }
        };
        let Some(permit) = permit else {
            reset(&client);
            continue;
        };
        let (live, own) = (shared.flow(), shared.clone());
        shared.common.workers.begin(move |place| async move {
            let stream = match Stream::connected(client) {
                Ok(stream) => stream,
                Err(error) => return debug!("{address} of {}: {error}", own.spec),
            };
            let conversation = Conversation {
                client: stream,
                address,
                port,
                passed,
                backend: None,
                ways: Default::default(),
                _permit: permit,
            };
            conversation.carry((live, place), own).await;
        });
    }
}

/// A client that has come, by a socket that does not block.
fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the address has as much room as its length says, and the kernel writes no more.
    let accepted = unsafe {
        SockAddr::try_init(|address, length| {
            match libc::accept4(listener.as_raw_fd(), address.cast(), length, flags) {
                -1 => Err(io::Error::last_os_error()),
                // SAFETY: the kernel has just opened it for this process.
                descriptor => Ok(OwnedFd::from_raw_fd(descriptor)),
            }
        })
    };
    let (client, address) = accepted?;
    let address = address.as_socket().ok_or(io::ErrorKind::Unsupported)?;
    Ok((client.into(), address))
}

/// Goes on with a client that was passed on to this process.
pub(super) fn go_on(passed_on: PassedOn, shared: &Arc<Shared>) {
    let (live, shared) = (shared.flow_of_before(), shared.clone());
    let workers = shared.common.workers.clone();
    workers.begin(move |place| async move {
        let client = passed_on.message.client;
        match Conversation::from_message(passed_on, &shared) {
            Ok(conversation) => conversation.carry((live, place), shared).await,
            Err(error) => warn!("{client} of {} cannot go on: {error}", shared.spec),
        }
    });
}

/// A client that is served.
struct Conversation {
    client: Stream,
    address: SocketAddr,
    /// The published port that it came to.
    port: u16,
    /// Publishes that it has passed.
    passed: u8,
    backend: Option<(Stream, Link)>,
    /// To the backend, and to the client.
    ways: [Way; 2],
    _permit: Permit,
}

/// One direction. What it has read and not written yet is here at every point where it waits.
#[derive(Default)]
struct Way {
    unsent: Vec<u8>,
    pipe: Option<Pipe>,
    in_pipe: usize,
}

impl Conversation {
    async fn carry(mut self, _counted: (LiveFlow, Place), shared: Arc<Shared>) {
        let source = self.address.ip();
        // Dropped before the sockets.
        let connected = Connected::new(shared.clone(), self.address, &self.client);
        // The client believes that it is connected. If the backend refuses, it learns so by a reset.
        let both_ways = self.both_ways(&connected, &shared);
        match shared.unless_ended(source, &connected, both_ways).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => debug!("{} of {}: {error}", self.address, shared.spec),
            Err(End::PassOn) => return self.pass_on(&shared),
            Err(End::Close) if self.is_connected() => return,
            Err(_) => {}
        }
        reset(self.client.io());
        if let Some((backend, _)) = &self.backend {
            reset(backend.io());
        }
    }

    fn is_connected(&self) -> bool {
        let backend = self.backend.as_ref();
        backend.is_some_and(|(backend, _)| backend.io().peer_addr().is_ok())
    }

    /// Both directions until both have ended; an error in one ends the other. What closes the streams afterwards
    /// closes the direction that ended last.
    async fn both_ways(&mut self, connected: &Connected, shared: &Shared) -> io::Result<()> {
        let Self {
            client,
            address,
            port,
            passed,
            backend,
            ways,
            ..
        } = self;
        let backend = match backend {
            Some((backend, _)) => {
                if let Ok(address) = backend.io().peer_addr() {
                    connected.leads_to(backend, address);
                }
                backend
            }
            None => {
                let protocol = shared.now().proxy_protocol;
                if protocol != ProxyProtocol::Off {
                    let frontend = client.io().local_addr()?;
                    ways[0].unsent = protocol.header(Transport::Stream, *address, frontend);
                }
                let (begun, address) = connect(*port, *passed, shared)?;
                connected.leads_to(&begun.0, address);
                &mut backend.insert(begun).0
            }
        };
        let (client, backend) = (&*client, &*backend);
        // If it refuses, the first read or write says so.
        let is_connected = poll_fn(|context| {
            let _ = client.poll_ready(context, EpollFlags::EPOLLERR); // so that this task hears of it from now on
            backend.poll_ready(context, WRITE)
        });
        // A client that has reset the connection is gone, and what it has sent waits for a backend that takes no more.
        let is_gone = poll_fn(
            |_| match client.has(EpollFlags::EPOLLERR) && !backend.has(WRITE) {
                true => Poll::Ready(io::Error::from(io::ErrorKind::ConnectionReset)),
                false => Poll::Pending,
            },
        );
        // Of one that was over before, the end is read again.
        let over = AtomicBool::new(false);
        let [request, answer] = ways;
        let carried = async {
            is_connected.await;
            tokio::try_join!(
                one_way((client, backend, ORIGINAL), request, &over, shared),
                one_way((backend, client, REPLY), answer, &over, shared)
            )
        };
        tokio::select! {
            biased;
            carried = carried => carried.map(drop),
            error = is_gone => Err(error),
        }
    }

    fn pass_on(self, shared: &Shared) {
        let Self {
            client,
            address,
            port,
            passed,
            backend,
            ways,
            ..
        } = self;
        let mut descriptors = Vec::new();
        let mut add = |stream: Stream| {
            let descriptor = stream.for_another();
            descriptor.map(|descriptor| descriptors.push(descriptor))
        };
        let has_backend = backend.is_some();
        // The connection to the backend is known to the next process as its own.
        let added = add(client).and_then(|()| backend.map_or(Ok(()), |(backend, _)| add(backend)));
        if let Err(error) = added {
            return debug!("{address} of {} ends: {error}", shared.spec);
        }
        let ways = ways.map(|way| {
            let has_pipe = way.pipe.is_some();
            descriptors.extend(
                way.pipe
                    .into_iter()
                    .flat_map(|pipe| [pipe.read, pipe.write]),
            );
            pass_on::Way {
                unsent: way.unsent,
                in_pipe: way.in_pipe,
                has_pipe,
            }
        });
        shared.common.pass_on(PassedOn {
            message: Message {
                publish: shared.name.clone(),
                client: address,
                kind: Kind::Tcp {
                    port,
                    passed,
                    has_backend,
                    ways,
                },
            },
            descriptors,
        });
    }

    /// # Errors
    /// It is none of TCP, its sockets are not what it says, or there is no room for them.
    fn from_message(passed_on: PassedOn, shared: &Shared) -> io::Result<Self> {
        let PassedOn {
            message,
            descriptors,
        } = passed_on;
        let Kind::Tcp {
            port,
            passed,
            has_backend,
            ways,
        } = message.kind
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let permit = || {
            let permit = shared.share.take(2, None);
            permit.map_err(|_| io::Error::from_raw_os_error(libc::EMFILE))
        };
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or(io::ErrorKind::UnexpectedEof);
        let client = Stream::connected(next()?.into())?;
        let backend = match has_backend {
            true => {
                let backend = Stream::connected(next()?.into())?;
                // Unless it has ended, with something left to read, or is not connected yet.
                let peer = backend.io().peer_addr();
                let peer = peer.unwrap_or(SocketAddr::from(([0; 4], 0)));
                let own = |backend: &Stream| backend.io().local_addr();
                let chains = &shared.common.chains;
                Some(chains.begin(passed, peer, || Ok::<_, io::Error>(backend), own)?)
            }
            false => None,
        };
        let mut way = |way: pass_on::Way| -> io::Result<Way> {
            let pipe = match way.has_pipe {
                true => Some(Pipe {
                    read: next()?,
                    write: next()?,
                    _permit: permit()?,
                }),
                false => None,
            };
            Ok(Way {
                unsent: way.unsent,
                pipe,
                in_pipe: way.in_pipe,
            })
        };
        let [request, answer] = ways;
        Ok(Self {
            client,
            address: message.client,
            port,
            passed,
            backend,
            ways: [way(request)?, way(answer)?],
            _permit: permit()?,
        })
    }
}

/// Begins a connection to the backend.
fn connect(port: u16, passed: u8, shared: &Shared) -> io::Result<((Stream, Link), SocketAddr)> {
    let backend = shared.backend(port)?;
    let make = || {
        let socket = sockets::socket(backend.ip(), socket2::Type::STREAM, None)?;
        SockRef::from(&socket).set_out_of_band_inline(true)?;
        Ok(socket)
    };
    let (socket, link) = shared.begin(passed, backend, make)?;
    let stream = Stream::connecting(socket.into(), |socket| {
        if let Err(error) = prepare_to_last(SockRef::from(&socket)) {
            debug!("a connection to a backend goes on without keepalive: {error}");
        }
    })?;
    Ok(((stream, link), backend))
}

/// What both ends of a conversation have. Accepted streams have it of their listener.
pub(super) fn prepare(socket: SockRef<'_>) -> io::Result<()> {
    socket.set_out_of_band_inline(true)?;
    prepare_to_last(socket)
}

/// What takes effect only in a conversation that sends a second time, or waits for long.
fn prepare_to_last(socket: SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE);
    socket.set_tcp_keepalive(&keepalive)
}

/// Makes the close, which follows, a reset.
fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// From one stream to the other, and which direction that is.
type Ends<'a> = (&'a Stream, &'a Stream, usize);

/// Copies until the end of the stream, then half-closes the other side, unless the other direction is over: a
/// close, which follows, does as much.
async fn one_way(
    ends: Ends<'_>,
    way: &mut Way,
    other_is_over: &AtomicBool,
    shared: &Shared,
) -> io::Result<()> {
    let (_, to, direction) = ends;
    loop {
        if way.pipe.is_some() {
            by_splice(ends, way, shared).await?;
            way.pipe.take().into_iter().for_each(Pipe::empty);
            break;
        }
        if copy(ends, &mut way.unsent, shared).await? == Copied::All {
            break;
        }
        way.pipe = pipe(shared).ok();
    }
    if other_is_over.swap(true, Relaxed) {
        return Ok(());
    }
    if direction == ORIGINAL {
        // Who ends first is in TIME_WAIT afterwards: the port may be had again all the same.
        let _ = SockRef::from(to.io()).set_reuse_address(true);
    }
    match to.io().shutdown(Shutdown::Write) {
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
        _ => Ok(()),
    }
}

#[derive(PartialEq, Eq)]
enum Copied {
    All,
    /// So much at a time that splicing pays.
    Bulk,
}

async fn copy(
    (from, to, direction): Ends<'_>,
    unsent: &mut Vec<u8>,
    shared: &Shared,
) -> io::Result<Copied> {
    let mut full = 0;
    while full < FULL_READS {
        write(to, unsent).await?;
        let (read, is_last) = match pass(from, to, unsent).await? {
            Passed::Data(read) => (read, false),
            Passed::Last(read) => (read, true),
            Passed::Mark => {
                if urgent::carry(from, to).await? {
                    shared.carried(1);
                }
                continue;
            }
        };
        if read > 0 {
            shared.carried(read);
            shared.pace(direction, read).await;
        }
        if is_last {
            write(to, unsent).await?;
            return Ok(Copied::All);
        }
        full = if read == BUFFER { full + 1 } else { 0 };
    }
    write(to, unsent).await?;
    Ok(Copied::Bulk)
}

/// Writes what is left.
async fn write(to: &Stream, unsent: &mut Vec<u8>) -> io::Result<()> {
    while !unsent.is_empty() {
        match to.when(WRITE, || try_write(to, unsent)).await? {
            written if written == unsent.len() => *unsent = Vec::new(),
            written => drop(unsent.drain(..written)),
        }
    }
    Ok(())
}

fn try_write(to: &Stream, data: &[u8]) -> io::Result<usize> {
    to.use_once();
    Ok(send(to.as_fd().as_raw_fd(), data, MsgFlags::MSG_NOSIGNAL)?)
}

thread_local! {
    /// What is read and written in one go needs no buffer of its own.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
}

enum Passed {
    /// How much was read.
    Data(usize),
    /// The same, and then the stream ends.
    Last(usize),
    /// Nothing: the urgent octet is next.
    Mark,
}

/// Reads once, and writes what the other side takes at once; the rest is `unsent`.
async fn pass(from: &Stream, to: &Stream, unsent: &mut Vec<u8>) -> io::Result<Passed> {
    poll_fn(|context| {
        loop {
            ready!(from.poll_ready(context, READ));
            // Its end was known before the read: what the read finds is all.
            let is_over = from.has(EpollFlags::EPOLLRDHUP);
            let may_be_urgent = from.has(EpollFlags::EPOLLPRI);
            if may_be_urgent && urgent::is_next(from.as_fd()) {
                return Poll::Ready(Ok(Passed::Mark));
            }
            let passed = SCRATCH.with_borrow_mut(|scratch| {
                let read = recv(from.as_fd().as_raw_fd(), scratch, MsgFlags::empty())?;
                let data = &scratch[..read];
                let mut written = 0;
                if read > 0 && to.has(WRITE) {
                    match try_write(to, data) {
                        Ok(count) => written = count,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            to.clear(WRITE)?;
                        }
                        Err(error) => return Err(error),
                    }
                }
                unsent.extend_from_slice(&data[written..]);
                Ok(read)
            });
            let read = match passed {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    from.clear(READ | EpollFlags::EPOLLPRI)?;
                    continue;
                }
                passed => passed?,
            };
            if read == BUFFER {
                // The next read may begin at the mark, of which the worker has not heard.
                from.expect(EpollFlags::EPOLLPRI);
            } else if !may_be_urgent {
                // Everything was read, or all before a mark, of which the worker hears now.
                if is_over || read == 0 {
                    return Poll::Ready(Ok(Passed::Last(read)));
                }
                from.clear(EpollFlags::EPOLLIN)?;
            } else if read == 0 {
                return Poll::Ready(Ok(Passed::Last(0)));
            }
            return Poll::Ready(Ok(Passed::Data(read)));
        }
    })
    .await
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    _permit: Permit,
}

thread_local! {
    /// Empty ones, which wait for the next transfer of this worker.
    static PIPES: RefCell<Vec<(OwnedFd, OwnedFd, Reserved)>> = const { RefCell::new(Vec::new()) };
}

impl Pipe {
    /// One that is empty serves the next transfer.
    fn empty(self) {
        let Self {
            read,
            write,
            _permit: permit,
        } = self;
        PIPES.with_borrow_mut(|pipes| {
            if pipes.len() < PIPES_KEPT {
                pipes.push((read, write, permit.keep()));
            }
        });
    }
}

/// # Errors
/// There are no descriptors for one, or no memory.
fn pipe(shared: &Shared) -> io::Result<Pipe> {
    let permit = shared.share.take(2, None);
    let permit = permit.map_err(|_| io::Error::from_raw_os_error(libc::EMFILE))?;
    if let Some((read, write, _)) = PIPES.with_borrow_mut(Vec::pop) {
        return Ok(Pipe {
            read,
            write,
            _permit: permit,
        });
    }
    let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
    // More at a time where the limit allows it (fs.pipe-max-size, fs.pipe-user-pages-soft).
    let size =
        nix::fcntl::FcntlArg::F_SETPIPE_SZ(PIPE.cast_signed().try_into().unwrap_or(i32::MAX));
    let _ = nix::fcntl::fcntl(&write, size);
    Ok(Pipe {
        read,
        write,
        _permit: permit,
    })
}

async fn by_splice(
    (from, to, direction): Ends<'_>,
    way: &mut Way,
    shared: &Shared,
) -> io::Result<()> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    let Some(pipe) = &way.pipe else {
        return Ok(());
    };
    to.prepare();
    loop {
        while way.in_pipe > 0 {
            let (pipe, rest) = (pipe.read.as_fd(), way.in_pipe);
            let moved = to.when(WRITE, || {
                Ok(splice(pipe, None, to.as_fd(), None, rest, flags)?)
            });
            way.in_pipe -= moved.await?;
        }
        let moved = from
            .when(READ, || {
                let moved = splice(from.as_fd(), None, pipe.write.as_fd(), None, PIPE, flags);
                match moved {
                    // At the mark it moves nothing, as at the end.
                    Err(Errno::EAGAIN) | Ok(0) if urgent::is_next(from.as_fd()) => Ok(None),
                    moved => Ok(Some(moved?)),
                }
            })
            .await?;
        match moved {
            Some(0) => return Ok(()),
            Some(moved) => {
                way.in_pipe += moved;
                shared.carried(moved);
                shared.pace(direction, moved).await;
            }
            None => {
                if urgent::carry(from, to).await? {
                    shared.carried(1);
                }
            }
        }
    }
}
