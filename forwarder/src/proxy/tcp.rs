//! TCP: one backend connection for each client, copied both ways; big transfers by splice(2), so that
//! bytes stay in the kernel. Half-close, reset and the urgent octet go through to the other side.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
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
    sys::socket::{MsgFlags, recv},
};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncWriteExt as _, Interest},
    net::{TcpListener, TcpStream},
};
use tracing::{debug, warn};

use super::{
    End, ProxyProtocol,
    budget::Permit,
    chain::Link,
    pass_on::{self, Kind, Message, PassedOn},
    protocol_header::Transport,
    shared::{LiveFlow, Shared},
    sockets::{self, Port},
    urgent,
};
use crate::{accept, seldom::Seldom};

const BUFFER: usize = 16 << 10;
/// A direction that filled its buffer this often is worth a pipe.
const FULL_READS: u32 = 4;
const PIPE: usize = 1 << 20;
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Accepts clients until the task is ended.
pub(super) async fn serve(listener: std::net::TcpListener, port: Port, shared: Arc<Shared>) {
    let spec = &shared.spec;
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return warn!("serve {spec}: {error}"),
    };
    let warned = Seldom::default();
    loop {
        match listener.accept().await {
            Ok((client, address)) => {
                let Ok(frontend) = client.local_addr() else {
                    continue; // the client has gone already
                };
                let port = match port {
                    Port::One(port) => port,
                    Port::Steered { .. } => frontend.port(),
                };
                if !shared.allows(address.ip()) || !shared.may_begin(address.ip()) {
                    reset(&client);
                    continue;
                }
                let Some(passed) = shared.passed(address, frontend) else {
                    reset(&client);
                    continue;
                };
                let Some(permit) = shared.admit(client.as_raw_fd()).await else {
                    reset(&client);
                    continue;
                };
                let conversation = Conversation {
                    client,
                    address,
                    port,
                    passed,
                    backend: None,
                    ways: Default::default(),
                    _permit: permit,
                };
                tokio::spawn(conversation.begin(shared.clone()));
            }
            Err(error) => accept::failed(&error, &warned, spec).await,
        }
    }
}

/// A client that is served.
pub(super) struct Conversation {
    client: TcpStream,
    address: SocketAddr,
    /// The published port that it came to.
    port: u16,
    /// Publishes that it has passed.
    passed: u8,
    backend: Option<(TcpStream, Link)>,
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
    /// Counts at once, and carries once it is polled.
    fn begin(self, shared: Arc<Shared>) -> impl Future<Output = ()> {
        self.carry(shared.flow(), shared)
    }

    /// The same of one that was passed on to this process.
    pub(super) fn go_on(self, shared: Arc<Shared>) -> impl Future<Output = ()> {
        self.carry(shared.flow_of_before(), shared)
    }

    async fn carry(mut self, _live: LiveFlow, shared: Arc<Shared>) {
        let source = self.address.ip();
        // The client believes that it is connected. If the backend refuses, it learns so by a reset.
        let how = tokio::select! {
            carried = self.both_ways(&shared) => carried.map(|()| End::Close),
            how = shared.ended_for(source) => Ok(how),
        };
        match how {
            Ok(End::PassOn) => return self.pass_on(&shared),
            Ok(End::Close) if self.backend.is_some() => return,
            Ok(_) => {}
            Err(error) => debug!("{} of {}: {error}", self.address, shared.spec),
        }
        reset(&self.client);
        if let Some((backend, _)) = &self.backend {
            reset(backend);
        }
    }

    /// Both directions until both have ended; an error in one ends the other. What closes the streams afterwards
    /// closes the direction that ended last.
    async fn both_ways(&mut self, shared: &Shared) -> io::Result<()> {
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
            Some((backend, _)) => backend,
            None => {
                let connected = connect(client, *address, (*port, *passed), shared).await?;
                &mut backend.insert(connected).0
            }
        };
        let (client, backend) = (&*client, &*backend);
        // Of one that was over before, the end is read again.
        let over = AtomicBool::new(false);
        let [request, answer] = ways;
        tokio::try_join!(
            one_way((client, backend, ORIGINAL), request, &over, shared),
            one_way((backend, client, REPLY), answer, &over, shared)
        )?;
        Ok(())
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
        let mut add = |stream: TcpStream| {
            let stream = stream.into_std().map(OwnedFd::from);
            stream.map(|stream| descriptors.push(stream))
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
                publish: shared.options.name.clone(),
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
    pub(super) fn from_message(passed_on: PassedOn, shared: &Shared) -> io::Result<Self> {
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
        let client = TcpStream::from_std(next()?.into())?;
        let backend = match has_backend {
            true => {
                let backend = TcpStream::from_std(next()?.into())?;
                let (own, peer) = (backend.local_addr()?, backend.peer_addr()?);
                let chains = &shared.common.chains;
                Some(chains.begin(passed, peer, || Ok::<_, io::Error>((backend, own)))?)
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

async fn connect(
    client: &TcpStream,
    address: SocketAddr,
    (port, passed): (u16, u8),
    shared: &Shared,
) -> io::Result<(TcpStream, Link)> {
    let backend = shared.backend(port)?;
    let socket = sockets::socket(backend.ip(), socket2::Type::STREAM, None)?;
    tune(SockRef::from(&socket))?;
    let (socket, link) = shared.begin(passed, backend, socket)?;
    let mut stream = TcpStream::from_std(socket.into())?;
    stream.writable().await?;
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    let protocol = shared.now().proxy_protocol;
    if protocol != ProxyProtocol::Off {
        let header = protocol.header(Transport::Stream, address, client.local_addr()?);
        stream.write_all(&header).await?;
    }
    Ok((stream, link))
}

/// What both ends of a conversation get. Accepted streams have it of their listener.
pub(super) fn tune(socket: SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)?;
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
type Ends<'a> = (&'a TcpStream, &'a TcpStream, usize);

/// Copies until the end of the stream, then half-closes the other side, unless the other direction is over: a
/// close, which follows, does as much.
async fn one_way(
    ends: Ends<'_>,
    way: &mut Way,
    other_is_over: &AtomicBool,
    shared: &Shared,
) -> io::Result<()> {
    let (_, to, _) = ends;
    loop {
        if way.pipe.is_some() {
            by_splice(ends, way, shared).await?;
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
    match SockRef::from(to).shutdown(std::net::Shutdown::Write) {
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
        let read = match pass(from, to, unsent).await? {
            Passed::Data(read) => read,
            Passed::Mark => {
                if urgent::carry(from, to).await? {
                    shared.carried(1);
                }
                continue;
            }
        };
        if read == 0 {
            return Ok(Copied::All);
        }
        shared.carried(read);
        shared.pace(direction, read).await;
        full = if read == BUFFER { full + 1 } else { 0 };
    }
    write(to, unsent).await?;
    Ok(Copied::Bulk)
}

/// Writes what is left.
async fn write(to: &TcpStream, unsent: &mut Vec<u8>) -> io::Result<()> {
    while !unsent.is_empty() {
        to.writable().await?;
        match to.try_write(unsent) {
            Ok(written) if written == unsent.len() => *unsent = Vec::new(),
            Ok(written) => drop(unsent.drain(..written)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

thread_local! {
    /// What is read and written in one go needs no buffer of its own.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
}

enum Passed {
    /// How much was read, 0 at the end of the stream.
    Data(usize),
    /// Nothing: the urgent octet is next.
    Mark,
}

/// Reads once, and writes what the other side takes at once; the rest is `unsent`.
async fn pass(from: &TcpStream, to: &TcpStream, unsent: &mut Vec<u8>) -> io::Result<Passed> {
    poll_fn(|context| {
        loop {
            ready!(from.poll_read_ready(context))?;
            if urgent::is_next(from.as_fd()) {
                return Poll::Ready(Ok(Passed::Mark));
            }
            let passed = SCRATCH.with_borrow_mut(|scratch| {
                let read = match read(from, scratch) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    read => read?,
                };
                let data = &scratch[..read];
                let mut written = 0;
                if !data.is_empty() {
                    match to.try_write(data) {
                        Ok(count) => written = count,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                }
                unsent.extend_from_slice(&data[written..]);
                Ok(Some(Passed::Data(read)))
            });
            if let Some(passed) = passed.transpose() {
                return Poll::Ready(passed);
            }
        }
    })
    .await
}

/// Reads what is there. A read that does not fill the buffer has emptied the socket, but for an urgent octet, and saves the
/// next one, which would only say so.
fn read(from: &TcpStream, into: &mut [u8]) -> io::Result<usize> {
    let mut read = Err(io::ErrorKind::WouldBlock.into());
    let _ = from.try_io(Interest::READABLE, || {
        let count = recv(from.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from);
        let emptied = match &count {
            Ok(count) => *count > 0 && *count < into.len() && !urgent::is_next(from.as_fd()),
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        read = count;
        if emptied {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    });
    read
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    _permit: Permit,
}

/// # Errors
/// There are no descriptors for one, or no memory.
fn pipe(shared: &Shared) -> io::Result<Pipe> {
    let permit = shared.share.take(2, None);
    let permit = permit.map_err(|_| io::Error::from_raw_os_error(libc::EMFILE))?;
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
    loop {
        while way.in_pipe > 0 {
            let (pipe, rest) = (pipe.read.as_fd(), way.in_pipe);
            let moved = to.async_io(Interest::WRITABLE, || {
                Ok(splice(pipe, None, to.as_fd(), None, rest, flags)?)
            });
            way.in_pipe -= moved.await?;
        }
        let moved = from
            .async_io(Interest::READABLE, || {
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
