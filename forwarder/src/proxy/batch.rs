//! Many datagrams with one system call: recvmmsg(2) and sendmmsg(2), with the local address of each by
//! IP_PKTINFO (ip(7)) and IPV6_PKTINFO (RFC 3542). All of the UDP proxy's `unsafe` is here.

use std::{
    cell::RefCell,
    io, mem,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr,
};

use socket2::{SockAddr, SockAddrStorage};

/// Datagrams at a time.
const BATCH: usize = 32;
/// The longest datagram of either family, and to spare.
const DATAGRAM: usize = 1 << 16;
/// Room for two control messages of either family, with their headers.
const CONTROL: usize = 128;

/// The address of this host that a datagram came to, the device for link-local ones, and the port if the socket
/// asks for it by [`tell_destination`], else 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Local {
    pub(super) address: IpAddr,
    pub(super) ifindex: u32,
    pub(super) port: u16,
}

/// Has a socket say with each datagram which port it was sent to (IP_ORIGDSTADDR, IPV6_ORIGDSTADDR; include/uapi/linux/in.h
/// and in6.h).
///
/// # Errors
/// As setsockopt(2).
pub(super) fn tell_destination(socket: BorrowedFd<'_>, is_v4: bool) -> io::Result<()> {
    let (level, option) = if is_v4 {
        (libc::IPPROTO_IP, libc::IP_RECVORIGDSTADDR)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVORIGDSTADDR)
    };
    let on: libc::c_int = 1;
    // SAFETY: the option is an int, which lives until the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

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
            controls: vec![Control([0; CONTROL]); BATCH],
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
            header.msg_control = ptr::from_mut(&mut self.controls[at]).cast();
            header.msg_controllen = CONTROL as _;
            self.vectors[at].iov_len = DATAGRAM;
        }
        // SAFETY: every pointer in `messages` leads to a live buffer of the length that stands beside it.
        unsafe { call(libc::SYS_recvmmsg, socket, &mut self.messages) }
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

/// Whether so many datagrams have emptied the socket, as far as it was full when they were read.
pub(super) const fn was_all(count: usize) -> bool {
    count < BATCH
}

/// Receives what is there, at most one batch, and hands each datagram to `each` with its source and,
/// where the socket asks for it, its local address. Returns how many there were.
///
/// # Errors
/// As recvmmsg(2); `WouldBlock` if there are none.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    mut each: impl FnMut(&[u8], Option<SocketAddr>, Option<Local>),
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
            each(batch.datagram(at), source.as_socket(), local(header));
        }
        Ok(count)
    })
}

/// The local address and port in a received message's control data.
fn local(header: &libc::msghdr) -> Option<Local> {
    let mut found: Option<Local> = None;
    let mut port = 0;
    // SAFETY: the header and its control buffer are what recvmmsg filled, and still live; the CMSG macros
    // stay within msg_controllen, and the data of a message is read unaligned, as its type says.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while !message.is_null() {
            let data = libc::CMSG_DATA(message);
            match ((*message).cmsg_level, (*message).cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info: libc::in_pktinfo = ptr::read_unaligned(data.cast());
                    // Not ipi_addr: for a broadcast, that is no address to answer from.
                    let address = u32::from_be(info.ipi_spec_dst.s_addr);
                    found = Some(Local {
                        address: IpAddr::V4(address.into()),
                        ifindex: 0,
                        port: 0,
                    });
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info: libc::in6_pktinfo = ptr::read_unaligned(data.cast());
                    found = Some(Local {
                        address: IpAddr::V6(info.ipi6_addr.s6_addr.into()),
                        ifindex: info.ipi6_ifindex,
                        port: 0,
                    });
                }
                (libc::IPPROTO_IP, libc::IP_ORIGDSTADDR) => {
                    let name: libc::sockaddr_in = ptr::read_unaligned(data.cast());
                    port = u16::from_be(name.sin_port);
                }
                (libc::IPPROTO_IPV6, libc::IPV6_ORIGDSTADDR) => {
                    let name: libc::sockaddr_in6 = ptr::read_unaligned(data.cast());
                    port = u16::from_be(name.sin6_port);
                }
                _ => {}
            }
            message = libc::CMSG_NXTHDR(header, message);
        }
    }
    found.map(|local| Local { port, ..local })
}

/// Receives a batch from the connected socket `from` and sends it by `to` to `client`, from the address
/// `local`. Returns how many datagrams and bytes there were.
///
/// # Errors
/// As recvmmsg(2). What the client's side does not take is dropped, as a network would.
pub(super) fn answer(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    client: SocketAddr,
    local: Option<Local>,
) -> io::Result<(usize, usize)> {
    let name = SockAddr::from(client);
    let mut control = Control([0; CONTROL]);
    let control_length = local.map_or(0, |local| write_local(&mut control, local));
    SCRATCH.with_borrow_mut(|batch| {
        let count = batch.receive(from)?;
        let mut bytes = 0;
        for at in 0..count {
            let length = batch.datagram(at).len();
            bytes += length;
            batch.vectors[at].iov_len = length;
            let header = &mut batch.messages[at].msg_hdr;
            header.msg_name = name.as_ptr().cast_mut().cast();
            header.msg_namelen = name.len();
            header.msg_control = control.0.as_mut_ptr().cast();
            header.msg_controllen = control_length as _;
        }
        let mut sent = 0;
        while sent < count {
            // SAFETY: every pointer in `messages` leads to a live buffer of the length that stands beside it; those
            // that outlive this call are written anew before the next.
            let more = unsafe { call(libc::SYS_sendmmsg, to, &mut batch.messages[sent..count]) };
            // An error is about the first datagram that was not sent.
            sent += more.unwrap_or(1).max(1);
        }
        Ok((count, bytes))
    })
}

/// Writes the control message that sets a datagram's source; returns its length.
fn write_local(control: &mut Control, local: Local) -> usize {
    // SAFETY: `header` points at `control`, which is aligned and has room for a header and either
    // structure, which are written unaligned.
    unsafe {
        let mut header: libc::msghdr = mem::zeroed();
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = CONTROL as _;
        let message = libc::CMSG_FIRSTHDR(&raw const header);
        let data = libc::CMSG_DATA(message);
        let length = match local.address {
            IpAddr::V4(address) => {
                let mut info: libc::in_pktinfo = mem::zeroed();
                info.ipi_spec_dst.s_addr = u32::from(address).to_be();
                (*message).cmsg_level = libc::IPPROTO_IP;
                (*message).cmsg_type = libc::IP_PKTINFO;
                ptr::write_unaligned(data.cast(), info);
                size_of::<libc::in_pktinfo>() as u32
            }
            IpAddr::V6(address) => {
                let mut info: libc::in6_pktinfo = mem::zeroed();
                if !address.is_multicast() {
                    info.ipi6_addr.s6_addr = address.octets();
                }
                if address.is_unicast_link_local() || address.is_multicast() {
                    info.ipi6_ifindex = local.ifindex;
                }
                (*message).cmsg_level = libc::IPPROTO_IPV6;
                (*message).cmsg_type = libc::IPV6_PKTINFO;
                ptr::write_unaligned(data.cast(), info);
                size_of::<libc::in6_pktinfo>() as u32
            }
        };
        (*message).cmsg_len = libc::CMSG_LEN(length) as _;
        libc::CMSG_SPACE(length) as usize
    }
}
