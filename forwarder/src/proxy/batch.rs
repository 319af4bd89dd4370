//! Many datagrams with one system call: recvmmsg(2) and sendmmsg(2). Several of one size and one client come in one buffer where
//! the kernel has put them together, or one after the other; either way they go on together (UDP_SEGMENT). What stands beside them
//! is `control.rs`'s.

#![expect(unsafe_code, reason = "recvmmsg and sendmmsg in place")]

use std::{
    cell::RefCell,
    io::{self, IoSlice},
    mem,
    net::SocketAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr,
    sync::atomic::{AtomicU16, Ordering::Relaxed},
};

use socket2::{SockAddr, SockAddrStorage};

use super::control::{self, About, Control, Local};

/// Datagrams at a time.
const BATCH: usize = 32;
/// The longest datagram of either family, and to spare.
const DATAGRAM: usize = 1 << 16;
/// The most that goes on together: what an IPv4 packet has room for, behind its header and UDP's.
const TOGETHER: usize = 65_507;

/// Buffers and headers for one batch; one for each worker thread. Pages that were never needed cost nothing.
struct Batch {
    data: Vec<u8>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    vectors: Vec<libc::iovec>,
    messages: Vec<libc::mmsghdr>,
    /// So many of the messages are to be made ready for the next call.
    used: usize,
    /// Those to send: fewer, where several of what was received go on together.
    outgoing: Vec<libc::mmsghdr>,
}

/// Buffers, one after the other, that go on together.
#[derive(Clone, Copy)]
struct Run {
    first: usize,
    buffers: usize,
    bytes: usize,
    about: About,
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
            used: BATCH,
            outgoing: Vec::with_capacity(BATCH),
        };
        for (at, message) in batch.messages.iter_mut().enumerate() {
            batch.vectors.push(libc::iovec {
                iov_base: batch.data[at * DATAGRAM..].as_mut_ptr().cast(),
                iov_len: DATAGRAM,
            });
            // None of the vectors is ever resized, so what the pointers lead to stays where it is.
            message.msg_hdr.msg_iov = ptr::from_mut(&mut batch.vectors[at]);
        }
        batch
    }

    /// Receives what is there. Afterwards each message has its length, name and control data.
    fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        for (at, message) in self.messages[..self.used].iter_mut().enumerate() {
            let header = &mut message.msg_hdr;
            header.msg_name = ptr::from_mut(&mut self.names[at]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_control = self.controls[at].as_mut_ptr();
            header.msg_controllen = self.controls[at].room() as _;
            header.msg_iovlen = 1;
            self.vectors[at].iov_len = DATAGRAM;
        }
        // SAFETY: every pointer in `messages` leads to a live buffer of the length that stands beside it.
        let received = unsafe { call(libc::SYS_recvmmsg, socket, &mut self.messages) };
        // One more may have been written to before it failed.
        self.used = received
            .as_ref()
            .map_or(BATCH, |count| BATCH.min(count + 1));
        received
    }

    /// What was received beside the bytes.
    fn about(&self, at: usize) -> About {
        // SAFETY: `receive` has filled it, and both live as long as `self`.
        unsafe { control::read(&self.messages[at].msg_hdr) }
    }

    fn length(&self, at: usize) -> usize {
        (self.messages[at].msg_len as usize).min(DATAGRAM)
    }

    /// Who has sent it, if the kernel says so.
    fn source(&self, at: usize) -> Option<SocketAddr> {
        let mut name = SockAddrStorage::zeroed();
        // SAFETY: both are storage for any address; the kernel wrote it and its length, or left the length 0.
        let source = unsafe {
            *name.view_as() = self.names[at];
            SockAddr::new(name, self.messages[at].msg_hdr.msg_namelen)
        };
        source.as_socket()
    }

    /// What goes on together of `count` that were received, from the first of them on; the vectors have their lengths then. Each
    /// datagram but the last is as long as the first, or the kernel would divide them in other places.
    fn runs(&mut self, count: usize) -> impl Iterator<Item = (Run, Option<SocketAddr>)> + use<> {
        let mut runs = [None; BATCH];
        let (mut at, mut found) = (0, 0);
        while at < count {
            let (source, about, size) = (self.source(at), self.about(at), self.length(at));
            let mut run = Run {
                first: at,
                buffers: 0,
                bytes: 0,
                about,
            };
            let mut last = size;
            let goes_along = |batch: &Self, at: usize, bytes: usize| {
                let length = batch.length(at);
                let is_one = about.segment == 0 && length > 0 && length <= size;
                let fits = bytes + length <= TOGETHER;
                is_one && fits && batch.about(at) == about && batch.source(at) == source
            };
            while at < count
                && (run.buffers == 0 || last == size && goes_along(self, at, run.bytes))
            {
                last = self.length(at);
                self.vectors[at].iov_len = last;
                (run.buffers, run.bytes) = (run.buffers + 1, run.bytes + last);
                at += 1;
            }
            if run.buffers > 1 {
                run.about.segment = u16::try_from(size).unwrap_or(u16::MAX);
            }
            runs[found] = Some((run, source));
            found += 1;
        }
        runs.into_iter().flatten()
    }

    fn buffers(&self, run: Run) -> &[IoSlice<'_>] {
        let vectors = &self.vectors[run.first..][..run.buffers];
        // SAFETY: an IoSlice is an iovec (its documentation promises so); each leads to bytes of `self.data`.
        unsafe { std::slice::from_raw_parts(vectors.as_ptr().cast(), vectors.len()) }
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

/// Receives what is there, at most one batch, and hands to `each` what may go on together, with its source and what is known of
/// it. Returns how many buffers there were.
///
/// # Errors
/// As recvmmsg(2); `WouldBlock` if there are none.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    mut each: impl FnMut(&[IoSlice<'_>], Option<SocketAddr>, About),
) -> io::Result<usize> {
    SCRATCH.with_borrow_mut(|batch| {
        let count = batch.receive(socket)?;
        for (run, source) in batch.runs(count) {
            each(batch.buffers(run), source, run.about);
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

/// How long the datagrams are that the kernel has not refused to make of one buffer, in one direction of a flow.
#[derive(Debug)]
pub(super) struct Segments(AtomicU16);

impl Default for Segments {
    fn default() -> Self {
        Self(AtomicU16::new(u16::MAX))
    }
}

impl Segments {
    /// Whether datagrams of this length may go on together.
    pub(super) fn may_be(&self, size: u16) -> bool {
        size <= self.0.load(Relaxed)
    }

    /// Heeds an error that datagrams of this length met together. Returns whether they are to go one by one: EIO without a checksum
    /// that the kernel can compute, as all are then; EINVAL or EMSGSIZE if they are longer than the way's MTU, as shorter ones need
    /// not be (`udp_send_skb`, net/ipv4/udp.c).
    pub(super) fn refused(&self, size: u16, error: &io::Error) -> bool {
        let longest = match error.raw_os_error() {
            Some(libc::EIO) => 0,
            Some(libc::EINVAL | libc::EMSGSIZE) => size.saturating_sub(1),
            _ => return false,
        };
        self.0.fetch_min(longest, Relaxed);
        true
    }
}

/// Receives a batch from the connected socket `from` and sends it by `to` to `client`, from the address
/// `local`.
///
/// # Errors
/// As recvmmsg(2). What the client's side does not take is dropped, as a network would.
pub(super) fn answer(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    client: SocketAddr,
    local: Option<Local>,
    segments: &Segments,
) -> io::Result<Carried> {
    let name = SockAddr::from(client);
    SCRATCH.with_borrow_mut(|batch| {
        let count = batch.receive(from)?;
        let mut carried = Carried {
            buffers: count,
            ..Carried::default()
        };
        batch.outgoing.clear();
        let mut runs = [None; BATCH];
        for (place, (mut run, _)) in runs.iter_mut().zip(batch.runs(count)) {
            run.about.local = local;
            carried.datagrams += run.about.datagrams(run.bytes);
            carried.bytes += run.bytes;
            let message = batch.message(run, &name);
            batch.outgoing.push(message);
            *place = Some(run);
        }
        let mut runs = runs.into_iter().flatten();
        let mut next = runs.next();
        let mut sent = 0;
        while let Some(run) = next {
            let size = run.about.segment;
            if size > 0 && !segments.may_be(size) {
                batch.cut_up(to, run, &name);
                (sent, next) = (sent + 1, runs.next());
                continue;
            }
            // SAFETY: every pointer in `outgoing` leads to a live buffer of the length that stands beside it; those
            // that outlive this call are written anew before the next.
            let more = unsafe { call(libc::SYS_sendmmsg, to, &mut batch.outgoing[sent..]) };
            let done = match more {
                Ok(more) => more.max(1),
                // An error is about the first that was not sent.
                Err(error) if size > 0 && segments.refused(size, &error) => continue,
                Err(_) => 1,
            };
            (sent, next) = (sent + done, runs.nth(done - 1));
        }
        Ok(carried)
    })
}

impl Batch {
    /// One to send: a run, to `name`.
    fn message(&mut self, run: Run, name: &SockAddr) -> libc::mmsghdr {
        let Run { first, about, .. } = run;
        let mut message = self.messages[first];
        let header = &mut message.msg_hdr;
        header.msg_name = name.as_ptr().cast_mut().cast();
        header.msg_namelen = name.len();
        header.msg_control = self.controls[first].as_mut_ptr();
        header.msg_controllen = self.controls[first].write(about, name.is_ipv4()) as _;
        header.msg_iovlen = run.buffers as _;
        message
    }

    /// Sends the datagrams of a run one by one.
    fn cut_up(&mut self, to: BorrowedFd<'_>, run: Run, name: &SockAddr) {
        let size = usize::from(run.about.segment);
        let about = About {
            segment: 0,
            ..run.about
        };
        let (first, buffers) = (run.first, 1);
        let alone = Run {
            about,
            buffers,
            ..run
        };
        let mut message = self.message(alone, name);
        for at in first..first + run.buffers {
            let length = self.vectors[at].iov_len;
            for start in (0..length).step_by(size) {
                let mut vector = libc::iovec {
                    iov_base: self.data[at * DATAGRAM + start..].as_mut_ptr().cast(),
                    iov_len: size.min(length - start),
                };
                message.msg_hdr.msg_iov = &raw mut vector;
                // SAFETY: as for a whole batch; the vector leads to a part of this buffer's own bytes.
                let _ = unsafe { call(libc::SYS_sendmmsg, to, std::slice::from_mut(&mut message)) };
            }
        }
    }
}
