//! Many datagrams with one system call: recvmmsg(2) and sendmmsg(2). Several of one size and one client come in one buffer where
//! the kernel has put them together, and go on so; what stands beside them is `control.rs`'s.

#![expect(unsafe_code, reason = "recvmmsg and sendmmsg in place")]

use std::{
    cell::RefCell,
    io, mem,
    net::SocketAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use socket2::{SockAddr, SockAddrStorage};

use super::control::{self, About, Control, Local};

/// Datagrams at a time.
const BATCH: usize = 32;
/// The longest datagram of either family, and to spare.
const DATAGRAM: usize = 1 << 16;

/// Buffers and headers for one batch; one for each worker thread. Pages that were never needed cost nothing.
struct Batch {
    data: Vec<u8>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    vectors: Vec<libc::iovec>,
    messages: Vec<libc::mmsghdr>,
}

impl Batch {
    fn new() -> Self {
        // SAFETY: both C structures are valid when all zero.
        let (header, name): (libc::mmsghdr, _) = unsafe { (mem::zeroed(), mem::zeroed()) };
        let mut batch = Self {
            data: vec![0; BATCH * DATAGRAM],
            names: vec![name; BATCH],
            controls: vec![Control::new(); BATCH],
            vectors: Vec::with_capacity(BATCH),
            messages: vec![header; BATCH],
        };
        for (at, message) in batch.messages.iter_mut().enumerate() {
            batch.vectors.push(libc::iovec {
                iov_base: batch.data[at * DATAGRAM..].as_mut_ptr().cast(),
                iov_len: DATAGRAM,
            });
            // None of the vectors is ever resized, so what the pointers lead to stays where it is.
            message.msg_hdr.msg_iov = ptr::from_mut(&mut batch.vectors[at]);
            message.msg_hdr.msg_iovlen = 1;
        }
        batch
    }

    /// Receives what is there. Afterwards each message has its length, name and control data.
    fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        for (at, message) in self.messages.iter_mut().enumerate() {
            let header = &mut message.msg_hdr;
            header.msg_name = ptr::from_mut(&mut self.names[at]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_control = self.controls[at].as_mut_ptr();
            header.msg_controllen = self.controls[at].room() as _;
            self.vectors[at].iov_len = DATAGRAM;
        }
        // SAFETY: every pointer in `messages` leads to a live buffer of the length that stands beside it.
        unsafe { call(libc::SYS_recvmmsg, socket, &mut self.messages) }
    }

    /// What was received beside the bytes.
    fn about(&self, at: usize) -> About {
        // SAFETY: `receive` has filled it, and both live as long as `self`.
        unsafe { control::read(&self.messages[at].msg_hdr) }
    }

    fn datagram(&self, at: usize) -> &[u8] {
        let length = (self.messages[at].msg_len as usize).min(DATAGRAM);
        &self.data[at * DATAGRAM..][..length]
    }
}

/// Does recvmmsg(2) or sendmmsg(2) without waiting. It calls the kernel itself, since musl's function sends one datagram a call.
/// What musl leaves between the fields, where the kernel has the upper half of a length, is zero from the start.
///
/// # Safety
/// Every pointer in `messages` leads to a live buffer of the length that stands beside it.
unsafe fn call(
    number: libc::c_long,
    socket: BorrowedFd<'_>,
    messages: &mut [libc::mmsghdr],
) -> io::Result<usize> {
    // SAFETY: as the caller promises; the last argument is recvmmsg's, no time limit.
    let count = unsafe {
        libc::syscall(
            number,
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            messages.len(),
            libc::MSG_DONTWAIT,
            ptr::null_mut::<libc::timespec>(),
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

thread_local! {
    static SCRATCH: RefCell<Batch> = RefCell::new(Batch::new());
}

/// Whether so many buffers have emptied the socket, as far as it was full when they were read.
pub(super) const fn was_all(count: usize) -> bool {
    count < BATCH
}

/// Receives what is there, at most one batch, and hands each buffer to `each` with its source and what is known of it. Returns
/// how many there were.
///
/// # Errors
/// As recvmmsg(2); `WouldBlock` if there are none.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    mut each: impl FnMut(&[u8], Option<SocketAddr>, About),
) -> io::Result<usize> {
    SCRATCH.with_borrow_mut(|batch| {
        let count = batch.receive(socket)?;
        for at in 0..count {
            let header = &batch.messages[at].msg_hdr;
            let mut name = SockAddrStorage::zeroed();
            // SAFETY: both are storage for any address; the kernel wrote it and its length, or left the length 0.
            let source = unsafe {
                *name.view_as() = batch.names[at];
                SockAddr::new(name, header.msg_namelen)
            };
            each(batch.datagram(at), source.as_socket(), batch.about(at));
        }
        Ok(count)
    })
}

/// What was carried in one go.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Carried {
    pub(super) buffers: usize,
    pub(super) datagrams: usize,
    pub(super) bytes: usize,
}

/// Receives a batch from the connected socket `from` and sends it by `to` to `client`, from the address
/// `local`. `segments` is whether the kernel makes several datagrams of one buffer; it is cleared if it does not.
///
/// # Errors
/// As recvmmsg(2). What the client's side does not take is dropped, as a network would.
pub(super) fn answer(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    client: SocketAddr,
    local: Option<Local>,
    segments: &AtomicBool,
) -> io::Result<Carried> {
    let name = SockAddr::from(client);
    SCRATCH.with_borrow_mut(|batch| {
        let count = batch.receive(from)?;
        let mut carried = Carried {
            buffers: count,
            ..Carried::default()
        };
        let mut abouts = [About::default(); BATCH];
        for (at, about) in abouts[..count].iter_mut().enumerate() {
            let length = batch.datagram(at).len();
            *about = About {
                local,
                ..batch.about(at)
            };
            carried.datagrams += about.datagrams(length);
            carried.bytes += length;
            batch.prepare(at, length, *about, &name);
        }
        let mut sent = 0;
        while sent < count {
            let several = abouts[sent].segment > 0;
            if several && !segments.load(Relaxed) {
                batch.cut_up(to, sent, abouts[sent], &name);
                sent += 1;
                continue;
            }
            // SAFETY: every pointer in `messages` leads to a live buffer of the length that stands beside it; those
            // that outlive this call are written anew before the next.
            let more = unsafe { call(libc::SYS_sendmmsg, to, &mut batch.messages[sent..count]) };
            match more {
                Ok(more) => sent += more.max(1),
                // An error is about the first that was not sent.
                Err(error) if several && is_about_segments(&error) => {
                    segments.store(false, Relaxed);
                }
                Err(_) => sent += 1,
            }
        }
        Ok(carried)
    })
}

/// Whether the kernel could not make several datagrams of one buffer: EIO without a checksum that it can compute, EINVAL or
/// EMSGSIZE for datagrams that are longer than the way's MTU (`udp_send_skb`, net/ipv4/udp.c).
pub(super) fn is_about_segments(error: &io::Error) -> bool {
    let refused = [libc::EIO, libc::EINVAL, libc::EMSGSIZE];
    error
        .raw_os_error()
        .is_some_and(|code| refused.contains(&code))
}

impl Batch {
    /// Makes a received message one to send: so many of its bytes, to `name`.
    fn prepare(&mut self, at: usize, length: usize, about: About, name: &SockAddr) {
        self.vectors[at].iov_len = length;
        let header = &mut self.messages[at].msg_hdr;
        header.msg_name = name.as_ptr().cast_mut().cast();
        header.msg_namelen = name.len();
        header.msg_control = self.controls[at].as_mut_ptr();
        header.msg_controllen = self.controls[at].write(about, name.is_ipv4()) as _;
    }

    /// Sends the datagrams of a buffer one by one.
    fn cut_up(&mut self, to: BorrowedFd<'_>, at: usize, about: About, name: &SockAddr) {
        let whole = self.vectors[at];
        let size = usize::from(about.segment);
        let alone = About {
            segment: 0,
            ..about
        };
        for start in (0..whole.iov_len).step_by(size) {
            self.prepare(at, size.min(whole.iov_len - start), alone, name);
            self.vectors[at].iov_base = self.data[at * DATAGRAM + start..].as_mut_ptr().cast();
            // SAFETY: as for a whole batch; the vector leads to a part of this message's own bytes.
            let _ = unsafe { call(libc::SYS_sendmmsg, to, &mut self.messages[at..=at]) };
        }
        self.vectors[at].iov_base = whole.iov_base;
    }
}
