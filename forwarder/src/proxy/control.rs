//! What stands beside a datagram in control messages: the local address (IP_PKTINFO, ip(7); IPV6_PKTINFO, RFC 3542) and port,
//! ECN (IP_TOS, IPV6_TCLASS), and the size of the datagrams that the kernel has put into one buffer (UDP_GRO) or is to make of
//! one (UDP_SEGMENT, udp(7)).

#![expect(unsafe_code, reason = "control messages that no crate has")]

use std::{
    io, mem,
    net::IpAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr,
};

/// Room for all control messages of either family, with their headers.
const ROOM: usize = 192;
/// Explicit congestion notification, of a TOS or a traffic class (RFC 3168, section 5).
const ECN: u8 = 3;

/// The address of this host that a datagram came to, the device for link-local ones, and the port if the socket
/// asks for it by [`tell_destination`], else 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub(super) struct Local {
    pub(super) address: IpAddr,
    pub(super) ifindex: u32,
    pub(super) port: u16,
}

/// What is known of a datagram, or of several in one buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct About {
    pub(super) local: Option<Local>,
    pub(super) ecn: u8,
    /// The size of each datagram but the last, which may be shorter; 0 for a single one.
    pub(super) segment: u16,
}

impl About {
    /// How many datagrams so many bytes are.
    pub(super) fn datagrams(&self, bytes: usize) -> usize {
        match usize::from(self.segment) {
            0 => 1,
            size => bytes.div_ceil(size),
        }
    }
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
    set(socket, level, option, 1)
}

/// Has a socket say the ECN of each datagram, and take several datagrams of one size in one buffer, where the kernel can.
pub(super) fn tell_more(socket: BorrowedFd<'_>, is_v4: bool) {
    let (level, option) = if is_v4 {
        (libc::IPPROTO_IP, libc::IP_RECVTOS)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS)
    };
    let _ = set(socket, level, option, 1);
    let _ = set(socket, libc::SOL_UDP, libc::UDP_GRO, 1);
}

/// Sets an option that is an int.
///
/// # Errors
/// As setsockopt(2).
pub(super) fn set(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the option is an int, which lives until the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A buffer for control messages.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(super) struct Control([u8; ROOM]);

impl Control {
    pub(super) const fn new() -> Self {
        Self([0; ROOM])
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut libc::c_void {
        self.0.as_mut_ptr().cast()
    }

    pub(super) const fn room(&self) -> usize {
        ROOM
    }

    /// Writes what the kernel is to heed when it sends; returns the length.
    pub(super) fn write(&mut self, about: About, is_v4: bool) -> usize {
        let mut used = 0;
        match about.local.map(|local| (local.address, local.ifindex)) {
            Some((IpAddr::V4(address), _)) => {
                // SAFETY: plain integers, of which zero is valid.
                let mut info: libc::in_pktinfo = unsafe { mem::zeroed() };
                info.ipi_spec_dst.s_addr = u32::from(address).to_be();
                self.push(&mut used, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
            }
            Some((IpAddr::V6(address), ifindex)) => {
                // SAFETY: plain integers, of which zero is valid.
                let mut info: libc::in6_pktinfo = unsafe { mem::zeroed() };
                if !address.is_multicast() {
                    info.ipi6_addr.s6_addr = address.octets();
                }
                if address.is_unicast_link_local() || address.is_multicast() {
                    info.ipi6_ifindex = ifindex;
                }
                self.push(&mut used, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
            }
            None => {}
        }
        let ecn = libc::c_int::from(about.ecn);
        match (ecn, is_v4) {
            (0, _) => {}
            (_, true) => self.push(&mut used, libc::IPPROTO_IP, libc::IP_TOS, ecn),
            (_, false) => self.push(&mut used, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, ecn),
        }
        if about.segment > 0 {
            let (level, kind) = (libc::SOL_UDP, libc::UDP_SEGMENT);
            self.push(&mut used, level, kind, about.segment);
        }
        used
    }

    /// Appends a message.
    fn push<T>(&mut self, used: &mut usize, level: libc::c_int, kind: libc::c_int, value: T) {
        let length = size_of::<T>() as u32;
        // SAFETY: CMSG_SPACE and CMSG_LEN only compute.
        let (space, filled) =
            unsafe { (libc::CMSG_SPACE(length) as usize, libc::CMSG_LEN(length)) };
        assert!(*used + space <= ROOM, "room for all of them");
        // SAFETY: the message lies within the buffer, as was asserted, at a multiple of its alignment, since each space is
        // one; its data follows the header, and is written unaligned.
        unsafe {
            let message: *mut libc::cmsghdr = self.0.as_mut_ptr().add(*used).cast();
            (*message).cmsg_level = level;
            (*message).cmsg_type = kind;
            (*message).cmsg_len = filled as _;
            ptr::write_unaligned(libc::CMSG_DATA(message).cast(), value);
        }
        *used += space;
    }
}

/// What the kernel says in a received message's control data.
///
/// # Safety
/// The header and its control buffer are what recvmmsg(2) filled, and still live.
pub(super) unsafe fn read(header: &libc::msghdr) -> About {
    let mut about = About::default();
    let mut port = 0;
    // SAFETY: as the caller promises; the CMSG macros stay within msg_controllen, and the data of a message is read
    // unaligned, as its type says.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while !message.is_null() {
            let data = libc::CMSG_DATA(message);
            match ((*message).cmsg_level, (*message).cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info: libc::in_pktinfo = ptr::read_unaligned(data.cast());
                    // Not ipi_addr: for a broadcast, that is no address to answer from.
                    let address = u32::from_be(info.ipi_spec_dst.s_addr);
                    about.local = Some(Local {
                        address: IpAddr::V4(address.into()),
                        ifindex: 0,
                        port: 0,
                    });
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info: libc::in6_pktinfo = ptr::read_unaligned(data.cast());
                    about.local = Some(Local {
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
                (libc::IPPROTO_IP, libc::IP_TOS) => about.ecn = *data & ECN,
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    let class: libc::c_int = ptr::read_unaligned(data.cast());
                    about.ecn = (class & libc::c_int::from(ECN)) as u8;
                }
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    let size: libc::c_int = ptr::read_unaligned(data.cast());
                    about.segment = u16::try_from(size).unwrap_or(0);
                }
                _ => {}
            }
            message = libc::CMSG_NXTHDR(header, message);
        }
    }
    about.local = about.local.map(|local| Local { port, ..local });
    about
}
