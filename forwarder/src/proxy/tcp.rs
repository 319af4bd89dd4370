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
    ProxyProtocol, Shared, Stop,
    budget::Permit,
    chain::Link,
    protocol_header::Transport,
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
                let task = connection(client, address, (port, passed), permit, shared.clone());
                tokio::spawn(task);
            }
            Err(error) => accept::failed(&error, &warned, spec).await,
        }
    }
}

async fn connection(
    client: TcpStream,
    address: SocketAddr,
    (port, passed): (u16, u8),
    _permit: Permit,
    shared: Arc<Shared>,
) {
    let _live = shared.flow();
    // The client believes that it is connected. If the backend refuses, it learns so by a reset.
    let backend = tokio::select! {
        backend = connect(&client, address, (port, passed), &shared) => backend,
        _ = shared.ended_for(address.ip()) => return reset(&client),
    };
    let (backend, _link) = match backend {
        Ok(backend) => backend,
        Err(error) => {
            debug!("{}: {error}", shared.spec);
            return reset(&client);
        }
    };
    let result = tokio::select! {
        result = both_ways(&client, &backend, &shared) => result,
        how = shared.ended_for(address.ip()) => match how {
            Stop::Reset => Err(io::ErrorKind::ConnectionReset.into()),
            Stop::Cut | Stop::Drain => Ok(()),
        },
    };
    if let Err(error) = result {
        debug!("{address}: {error}");
        reset(&client);
        reset(&backend);
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
type Way<'a> = (&'a TcpStream, &'a TcpStream, usize);

/// Both directions until both have ended; an error in one ends the other. What closes the streams afterwards
/// closes the direction that ended last.
async fn both_ways(client: &TcpStream, backend: &TcpStream, shared: &Shared) -> io::Result<()> {
    let over = AtomicBool::new(false);
    tokio::try_join!(
        one_way((client, backend, ORIGINAL), &over, shared),
        one_way((backend, client, REPLY), &over, shared)
    )?;
    Ok(())
}

/// Copies until the end of the stream, then half-closes the other side, unless the other direction is over: a
/// close, which follows, does as much.
async fn one_way(way: Way<'_>, other_is_over: &AtomicBool, shared: &Shared) -> io::Result<()> {
    let (_, to, _) = way;
    if copy(way, shared).await? == Copied::Bulk {
        match pipe(shared) {
            Ok(pipe) => by_splice(way, &pipe, shared).await?,
            Err(_) => while copy(way, shared).await? == Copied::Bulk {},
        }
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

async fn copy((from, to, direction): Way<'_>, shared: &Shared) -> io::Result<Copied> {
    let mut full = 0;
    while full < FULL_READS {
        let (read, rest) = match pass(from, to).await? {
            Passed::Data(read, rest) => (read, rest),
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
        let mut rest = &rest[..];
        while !rest.is_empty() {
            to.writable().await?;
            match to.try_write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        full = if read == BUFFER { full + 1 } else { 0 };
    }
    Ok(Copied::Bulk)
}

thread_local! {
    /// What is read and written in one go needs no buffer of its own.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
}

enum Passed {
    /// How much was read, 0 at the end of the stream, and what is still to be written.
    Data(usize, Vec<u8>),
    /// Nothing: the urgent octet is next.
    Mark,
}

/// Reads once, and writes what the other side takes at once.
async fn pass(from: &TcpStream, to: &TcpStream) -> io::Result<Passed> {
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
                Ok(Some(Passed::Data(read, data[written..].to_vec())))
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

async fn by_splice((from, to, direction): Way<'_>, pipe: &Pipe, shared: &Shared) -> io::Result<()> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    loop {
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
        let moved = match moved {
            Some(0) => return Ok(()),
            Some(moved) => moved,
            None => {
                if urgent::carry(from, to).await? {
                    shared.carried(1);
                }
                continue;
            }
        };
        shared.carried(moved);
        shared.pace(direction, moved).await;
        let mut rest = moved;
        while rest > 0 {
            rest -= to
                .async_io(Interest::WRITABLE, || {
                    Ok(splice(
                        pipe.read.as_fd(),
                        None,
                        to.as_fd(),
                        None,
                        rest,
                        flags,
                    )?)
                })
                .await?;
        }
    }
}
