//! SCTP sockets of the one-to-one style: messages with their stream and payload protocol identifier.

#![expect(unsafe_code, reason = "SCTP's own calls")]

use std::{io, mem, net::SocketAddr, os::fd::AsRawFd as _, time::Duration};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::deadline::patience;

/// A message. The identifier is in wire order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub stream: u16,
    pub payload_protocol: u32,
    pub bytes: Vec<u8>,
}

impl Message {
    pub fn new(stream: u16, bytes: &[u8]) -> Self {
        Self {
            stream,
            payload_protocol: 46_u32.to_be(),
            bytes: bytes.to_vec(),
        }
    }
}

/// Whether this kernel has SCTP.
pub fn exists() -> bool {
    socket(Domain::IPV4).is_ok()
}

fn socket(domain: Domain) -> io::Result<Socket> {
    Socket::new(
        domain,
        Type::STREAM,
        Some(Protocol::from(libc::IPPROTO_SCTP)),
    )
}

/// One side of an association, which ends with it.
#[derive(Debug)]
pub struct Association(Socket);

impl Association {
    /// Associates from the current namespace.
    ///
    /// # Errors
    /// It is refused, or nothing comes back in time.
    pub fn connect(to: SocketAddr) -> io::Result<Self> {
        let socket = socket(Domain::for_address(to))?;
        socket.connect_timeout(&SockAddr::from(to), patience())?;
        Self::prepared(socket)
    }

    fn prepared(socket: Socket) -> io::Result<Self> {
        socket.set_read_timeout(Some(patience()))?;
        socket.set_write_timeout(Some(patience()))?;
        let on = 1_i32;
        // SAFETY: the kernel reads the four bytes that it is told of.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_SCTP,
                libc::SCTP_RECVRCVINFO,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(socket))
    }

    /// Who is on the other side.
    ///
    /// # Errors
    /// It has ended.
    pub fn peer(&self) -> io::Result<SocketAddr> {
        let address = self.0.peer_addr()?;
        Ok(address.as_socket().expect("of an IP family"))
    }

    /// Makes the end, which follows, an ABORT.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn abort(self) -> io::Result<()> {
        self.0.set_linger(Some(Duration::ZERO))
    }

    /// # Errors
    /// The association has ended, or the message is too long.
    pub fn send(&self, message: &Message) -> io::Result<()> {
        #[repr(C, align(8))]
        struct Control([u8; 64]);
        let mut control = Control([0; 64]);
        let mut part = libc::iovec {
            iov_base: message.bytes.as_ptr().cast_mut().cast(),
            iov_len: message.bytes.len(),
        };
        let length = size_of::<libc::sctp_sndinfo>() as u32;
        // SAFETY: zero is valid for all fields; the control message fits in its room; everything lives until the
        // call returns.
        let sent = unsafe {
            let mut header: libc::msghdr = mem::zeroed();
            header.msg_iov = &raw mut part;
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut control).cast();
            header.msg_controllen = libc::CMSG_SPACE(length) as usize;
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::IPPROTO_SCTP;
            (*first).cmsg_type = libc::SCTP_SNDINFO;
            (*first).cmsg_len = libc::CMSG_LEN(length) as usize;
            let mut info: libc::sctp_sndinfo = mem::zeroed();
            info.snd_sid = message.stream;
            info.snd_ppid = message.payload_protocol;
            libc::CMSG_DATA(first)
                .cast::<libc::sctp_sndinfo>()
                .write_unaligned(info);
            libc::sendmsg(self.0.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL)
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The next message, or `None` when the other side has ended the association in peace.
    ///
    /// # Errors
    /// It was aborted, or nothing comes in time.
    pub fn receive(&self) -> io::Result<Option<Message>> {
        let mut message = Message::new(0, &[]);
        loop {
            let mut buffer = vec![0; 64 << 10];
            let mut control = [0_u64; 16];
            let mut part = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            // SAFETY: as above.
            let (read, flags, info) = unsafe {
                let mut header: libc::msghdr = mem::zeroed();
                header.msg_iov = &raw mut part;
                header.msg_iovlen = 1;
                header.msg_control = control.as_mut_ptr().cast();
                header.msg_controllen = size_of_val(&control);
                let read = libc::recvmsg(self.0.as_raw_fd(), &raw mut header, 0);
                let first = libc::CMSG_FIRSTHDR(&raw const header);
                let info = (!first.is_null()).then(|| {
                    libc::CMSG_DATA(first)
                        .cast::<libc::sctp_rcvinfo>()
                        .read_unaligned()
                });
                (read, header.msg_flags, info)
            };
            let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
            if read == 0 {
                return Ok(None);
            }
            message.bytes.extend_from_slice(&buffer[..read]);
            if let Some(info) = info {
                message.stream = info.rcv_sid;
                message.payload_protocol = info.rcv_ppid;
            }
            if flags & libc::MSG_EOR != 0 {
                return Ok(Some(message));
            }
        }
    }
}

/// Listens on an address.
#[derive(Debug)]
pub struct Listener(Socket);

impl Listener {
    /// Listens in the current namespace.
    ///
    /// # Errors
    /// The port is taken, or there is no SCTP.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = socket(Domain::for_address(address))?;
        socket.bind(&SockAddr::from(address))?;
        socket.listen(16)?;
        socket.set_read_timeout(Some(patience()))?; // bounds `accept`
        Ok(Self(socket))
    }

    /// The next association.
    ///
    /// # Errors
    /// None comes in time.
    pub fn accept(&self) -> io::Result<Association> {
        let (socket, _) = self.0.accept()?;
        Association::prepared(socket)
    }
}
