//! SCTP (RFC 9260), by sockets of the one-to-one style (RFC 6458): one association with the backend for each client's,
//! carried message by message, with stream, order and payload protocol identifier as they came. An end of either goes through
//! to the other side: SHUTDOWN for SHUTDOWN, ABORT for ABORT.

#![expect(unsafe_code, reason = "SCTP's own calls")]

use std::{io, mem, net::SocketAddr, os::fd::AsRawFd as _, sync::Arc, time::Duration};

use forwarder_common::flow::{ORIGINAL, REPLY};
use socket2::{Protocol, SockRef, Socket, Type};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::{debug, warn};

use super::{
    End,
    budget::Permit,
    chain::Link,
    flows::{Known, Listed},
    shared::Shared,
    sockets::{Port, socket},
};
use crate::{accept, seldom::Seldom};

/// For socket(2), which fails on a kernel that has none.
pub(super) fn protocol() -> Protocol {
    Protocol::from(libc::IPPROTO_SCTP)
}

/// Read in one go.
const BUFFER: usize = 64 << 10;
/// What reading waits for: an ABORT makes a socket neither readable nor closed, but only have an error.
const ARRIVES: Interest = Interest::READABLE.add(Interest::ERROR);
/// No message is longer; the kernel takes none that exceeds a socket's send buffer.
const LONGEST: usize = 4 << 20;

fn watched(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    // SAFETY: the socket owns its descriptor and gives the same one until dropped.
    unsafe { AsyncFd::register(socket) }.map_err(Into::into)
}

/// Accepts clients until the task is ended.
pub(super) async fn serve(listener: Socket, port: Port, shared: Arc<Shared>) {
    let spec = &shared.spec;
    let Port::One(port) = port else {
        return warn!("serve {spec}: no range of SCTP ports is steered");
    };
    let listener = match watched(listener) {
        Ok(listener) => listener,
        Err(error) => return warn!("serve {spec}: {error}"),
    };
    let warned = Seldom::default();
    loop {
        let accepted = listener.async_io(Interest::READABLE, Socket::accept).await;
        let client = accepted.and_then(|(client, address)| {
            client.set_nonblocking(true)?;
            let address = address.as_socket().ok_or(io::ErrorKind::Unsupported)?;
            Ok((watched(client)?, address))
        });
        match client {
            Ok((client, address)) => {
                if !shared.allows(address.ip()) || !shared.may_begin(address.ip()) {
                    abort(&client);
                    continue;
                }
                let frontend = || client.get_ref().local_addr().ok()?.as_socket();
                let Some(passed) = shared.passed(address, frontend) else {
                    abort(&client);
                    continue;
                };
                let Some(permit) = shared.admit(client.as_raw_fd()).await else {
                    abort(&client);
                    continue;
                };
                let task = association(client, address, (port, passed), permit, shared.clone());
                tokio::spawn(task);
            }
            Err(error) => accept::failed(&error, &warned, spec).await,
        }
    }
}

async fn association(
    client: AsyncFd<Socket>,
    address: SocketAddr,
    (port, passed): (u16, u8),
    _permit: Permit,
    shared: Arc<Shared>,
) {
    let _live = shared.flow();
    let backend = tokio::select! {
        backend = connect(&client, port, passed, &shared) => backend,
        _ = shared.ended_for(address.ip()) => return abort(&client),
    };
    let (backend, _link, to) = match backend {
        Ok(backend) => backend,
        Err(error) => {
            debug!("{}: {error}", shared.spec);
            return abort(&client);
        }
    };
    let own = |socket: &Socket| socket.local_addr().ok()?.as_socket();
    let (Some(frontend), Some(source)) = (own(client.get_ref()), own(backend.get_ref())) else {
        return abort(&client);
    };
    let known = Listed::new(shared.clone(), (address, frontend), (source, to));
    // The first that ends, ends both; closing the other says SHUTDOWN once all that it was given has been sent.
    let result = tokio::select! {
        result = one_way((&client, &backend, ORIGINAL), &known, &shared) => result,
        result = one_way((&backend, &client, REPLY), &known, &shared) => result,
        () = known.cut.notified() => Err(io::ErrorKind::ConnectionReset.into()),
        how = shared.ended_for(address.ip()) => match how {
            End::Reset => Err(io::ErrorKind::ConnectionReset.into()),
            End::Close | End::PassOn => Ok(()),
        },
    };
    if let Err(error) = result {
        debug!("{address}: {error}");
        abort(&client);
        abort(&backend);
    }
}

/// Makes the close, which follows, an ABORT.
fn abort(socket: &AsyncFd<Socket>) {
    let _ = SockRef::from(socket.get_ref()).set_linger(Some(Duration::ZERO));
}

/// Associates with the backend, with as many streams each way as the client has.
async fn connect(
    client: &AsyncFd<Socket>,
    port: u16,
    passed: u8,
    shared: &Shared,
) -> io::Result<(AsyncFd<Socket>, Link, SocketAddr)> {
    let backend = shared.backend(port)?;
    let (inbound, outbound) = streams(client.get_ref())?;
    let streams = libc::sctp_initmsg {
        sinit_num_ostreams: inbound,
        sinit_max_instreams: outbound,
        sinit_max_attempts: 0,
        sinit_max_init_timeo: 0,
    };
    let tune = |socket: &Socket| {
        set_option(socket, libc::SCTP_RECVRCVINFO, &1_i32)?;
        set_option(socket, libc::SCTP_NODELAY, &1_i32)?;
        let _ = socket.set_send_buffer_size(LONGEST);
        io::Result::Ok(())
    };
    tune(client.get_ref())?;
    let make = || {
        let socket = socket(backend.ip(), Type::STREAM, Some(protocol()))?;
        set_option(&socket, libc::SCTP_INITMSG, &streams)?;
        tune(&socket)?;
        Ok(socket)
    };
    let (socket, link) = shared.begin(passed, backend, make)?;
    let socket = watched(socket)?;
    drop(socket.writable().await?);
    match socket.get_ref().take_error()? {
        Some(error) => Err(error),
        None => Ok((socket, link, backend)),
    }
}

/// The start of `struct sctp_status`, and room for the rest (include/uapi/linux/sctp.h).
#[repr(C)]
struct Status {
    id: i32,
    state: i32,
    window: u32,
    unacknowledged: u16,
    pending: u16,
    inbound: u16,
    outbound: u16,
    rest: [u32; 64],
}

/// Streams of an association: from its peer, and to it.
fn streams(socket: &Socket) -> io::Result<(u16, u16)> {
    // SAFETY: plain integers, of which any are valid.
    let mut status: Status = unsafe { mem::zeroed() };
    let mut length = size_of::<Status>() as libc::socklen_t;
    // SAFETY: the kernel writes no more than the length that it is told.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_SCTP,
            libc::SCTP_STATUS,
            (&raw mut status).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((status.inbound, status.outbound))
}

fn set_option<T>(socket: &Socket, option: i32, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as the value has.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_SCTP,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Carries messages until the association ends.
async fn one_way(
    (from, to, direction): (&AsyncFd<Socket>, &AsyncFd<Socket>, usize),
    known: &Known,
    shared: &Shared,
) -> io::Result<()> {
    let mut message = Vec::new();
    loop {
        message.clear();
        let mut about = Info::default();
        loop {
            let start = message.len();
            if start > LONGEST {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            message.resize(start + BUFFER, 0);
            let room = &mut message[start..];
            let (read, info, whole) = from
                .async_io(ARRIVES, |socket| receive(socket, room))
                .await?;
            message.truncate(start + read);
            if read == 0 {
                return Ok(());
            }
            about = info.unwrap_or(about);
            if whole {
                break;
            }
        }
        to.async_io(Interest::WRITABLE, |socket| send(socket, &message, about))
            .await?;
        known.touch();
        known.carried(direction, 1, message.len());
        shared.carried(message.len());
    }
}

/// What is said of a message beside its bytes. The identifier is in wire order, and opaque to SCTP.
#[derive(Clone, Copy, Debug, Default)]
struct Info {
    stream: u16,
    unordered: bool,
    payload_protocol: u32,
}

/// Room for one control message, aligned as such.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// SCTP_UNORDERED of either structure (include/uapi/linux/sctp.h).
const UNORDERED: u16 = 1;

/// Reads a message, or the next part of one, and whether it is the last. 0 bytes: the association has ended.
fn receive(socket: &Socket, into: &mut [u8]) -> io::Result<(usize, Option<Info>, bool)> {
    let mut control = Control([0; 64]);
    let mut part = libc::iovec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: into.len(),
    };
    // SAFETY: plain integers and pointers, of which zero is valid.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = size_of::<Control>() as _;
    // SAFETY: everything that the header points to lives until the call returns.
    let read = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, 0) };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    let mut info = None;
    // SAFETY: the kernel has filled the control messages in, and the macros stay within what it has.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(&raw const header);
        while !message.is_null() {
            let kind = ((*message).cmsg_level, (*message).cmsg_type);
            if kind == (libc::IPPROTO_SCTP, libc::SCTP_RCVINFO) {
                let data = libc::CMSG_DATA(message).cast::<libc::sctp_rcvinfo>();
                let data = data.read_unaligned();
                info = Some(Info {
                    stream: data.rcv_sid,
                    unordered: data.rcv_flags & UNORDERED != 0,
                    payload_protocol: data.rcv_ppid,
                });
            }
            message = libc::CMSG_NXTHDR(&raw const header, message);
        }
    }
    Ok((read, info, header.msg_flags & libc::MSG_EOR != 0))
}

/// Sends a whole message.
fn send(socket: &Socket, message: &[u8], about: Info) -> io::Result<()> {
    let mut control = Control([0; 64]);
    let mut part = libc::iovec {
        iov_base: message.as_ptr().cast_mut().cast(),
        iov_len: message.len(),
    };
    // SAFETY: plain integers and pointers, of which zero is valid.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    let length = size_of::<libc::sctp_sndinfo>() as u32;
    let data = libc::sctp_sndinfo {
        snd_sid: about.stream,
        snd_flags: if about.unordered { UNORDERED } else { 0 },
        snd_ppid: about.payload_protocol,
        snd_context: 0,
        snd_assoc_id: 0,
    };
    // SAFETY: the control message is shorter than its room; the kernel reads only what the header points to, all of
    // which lives until the call returns.
    let sent = unsafe {
        header.msg_controllen = libc::CMSG_SPACE(length) as _;
        let first = libc::CMSG_FIRSTHDR(&raw const header);
        (*first).cmsg_level = libc::IPPROTO_SCTP;
        (*first).cmsg_type = libc::SCTP_SNDINFO;
        (*first).cmsg_len = libc::CMSG_LEN(length) as _;
        libc::CMSG_DATA(first)
            .cast::<libc::sctp_sndinfo>()
            .write_unaligned(data);
        libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL)
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
