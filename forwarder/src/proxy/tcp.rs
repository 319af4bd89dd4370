//! TCP: one backend connection for each client, copied both ways; big transfers by splice(2), so that
//! bytes stay in the kernel. Half-close and reset go through to the other side.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Poll, ready},
    time::Duration,
};

use nix::fcntl::{OFlag, SpliceFFlags, splice};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead as _, AsyncWriteExt as _, Interest, ReadBuf},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};
use tracing::{debug, warn};

use super::{Shared, Stop, protocol_header, sockets::Port};
use crate::accept;

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
    let mut warned = false;
    loop {
        match listener.accept().await {
            Ok((client, address)) => {
                warned = false;
                let port = match port {
                    Port::One(port) => port,
                    Port::Steered { .. } => match client.local_addr() {
                        Ok(local) => local.port(),
                        Err(_) => continue, // the client has gone already
                    },
                };
                let task = connection(client, address, port, shared.clone());
                tokio::spawn(task);
            }
            Err(error) => accept::failed(&error, &mut warned, spec).await,
        }
    }
}

async fn connection(mut client: TcpStream, address: SocketAddr, port: u16, shared: Arc<Shared>) {
    if !shared.allows(address.ip()) {
        return reset(&client);
    }
    let _live = shared.flow();
    // The client believes that it is connected. If the backend refuses, it learns so by a reset.
    let backend = tokio::select! {
        backend = connect(&client, address, port, &shared) => backend,
        _ = shared.ended() => return reset(&client),
    };
    let mut backend = match backend {
        Ok(backend) => backend,
        Err(error) => {
            debug!("connect to {}: {error}", shared.backend(port));
            return reset(&client);
        }
    };
    let result = tokio::select! {
        result = both_ways(&mut client, &mut backend, &shared) => result,
        how = shared.ended() => match how {
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
    port: u16,
    shared: &Shared,
) -> io::Result<TcpStream> {
    let mut backend = TcpStream::connect(shared.backend(port)).await?;
    tune(SockRef::from(&backend))?;
    if shared.options.proxy_protocol {
        let header = protocol_header::tcp(address, client.local_addr()?);
        backend.write_all(&header).await?;
    }
    Ok(backend)
}

/// What both ends of a conversation get. Accepted streams have it of their listener.
pub(super) fn tune(socket: SockRef<'_>) -> io::Result<()> {
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

/// Both directions until both have ended; an error in one ends the other. What closes the streams afterwards
/// closes the direction that ended last.
async fn both_ways(
    client: &mut TcpStream,
    backend: &mut TcpStream,
    shared: &Shared,
) -> io::Result<()> {
    let (from_client, to_client) = client.split();
    let (from_backend, to_backend) = backend.split();
    let over = AtomicBool::new(false);
    tokio::try_join!(
        one_way(from_client, to_backend, &over, shared),
        one_way(from_backend, to_client, &over, shared)
    )?;
    Ok(())
}

/// Copies until the end of the stream, then half-closes the other side, unless the other direction is over: a
/// close, which follows, does as much.
async fn one_way(
    mut from: ReadHalf<'_>,
    to: WriteHalf<'_>,
    other_is_over: &AtomicBool,
    shared: &Shared,
) -> io::Result<()> {
    if copy(&mut from, &to, shared).await? == Copied::Bulk {
        match pipe() {
            Ok(pipe) => by_splice(from.as_ref(), to.as_ref(), &pipe, shared).await?,
            Err(_) => while copy(&mut from, &to, shared).await? == Copied::Bulk {},
        }
    }
    if other_is_over.swap(true, Relaxed) {
        return Ok(());
    }
    match SockRef::from(to.as_ref()).shutdown(std::net::Shutdown::Write) {
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

async fn copy(from: &mut ReadHalf<'_>, to: &WriteHalf<'_>, shared: &Shared) -> io::Result<Copied> {
    let mut full = 0;
    while full < FULL_READS {
        let (read, rest) = pass(from, to).await?;
        if read == 0 {
            return Ok(Copied::All);
        }
        shared.carried(read);
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

/// Reads once, and writes what the other side takes at once. Returns how much was read, 0 at the end of the
/// stream, and what is still to be written.
async fn pass(from: &mut ReadHalf<'_>, to: &WriteHalf<'_>) -> io::Result<(usize, Vec<u8>)> {
    poll_fn(|context| {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            // Not `try_read`: this knows that a read which did not fill the buffer has emptied the socket, and
            // saves the next one, which would only say so.
            ready!(Pin::new(&mut *from).poll_read(context, &mut buffer))?;
            let data = buffer.filled();
            let mut written = 0;
            if !data.is_empty() {
                match to.try_write(data) {
                    Ok(count) => written = count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Poll::Ready(Err(error)),
                }
            }
            Poll::Ready(Ok((data.len(), data[written..].to_vec())))
        })
    })
    .await
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

fn pipe() -> io::Result<Pipe> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
    // More at a time where the limit allows it (fs.pipe-max-size, fs.pipe-user-pages-soft).
    let size =
        nix::fcntl::FcntlArg::F_SETPIPE_SZ(PIPE.cast_signed().try_into().unwrap_or(i32::MAX));
    let _ = nix::fcntl::fcntl(&write, size);
    Ok(Pipe { read, write })
}

async fn by_splice(
    from: &TcpStream,
    to: &TcpStream,
    pipe: &Pipe,
    shared: &Shared,
) -> io::Result<()> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    loop {
        let moved = from
            .async_io(Interest::READABLE, || {
                Ok(splice(
                    from.as_fd(),
                    None,
                    pipe.write.as_fd(),
                    None,
                    PIPE,
                    flags,
                )?)
            })
            .await?;
        if moved == 0 {
            return Ok(());
        }
        shared.carried(moved);
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
