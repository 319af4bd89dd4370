//! What a UDP socket learns of ICMP errors: the path's MTU, and who said what (ip(7), ipv6(7), `IP_RECVERR`).

#![expect(unsafe_code, reason = "control messages that no crate has")]

use std::{
    io::IoSliceMut,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrIn6, SockaddrStorage, recvmsg, setsockopt, sockopt,
};

use crate::{deadline::wait_for, netns::Netns};

/// A socket that takes part in path MTU discovery, sends nothing in fragments, and keeps what it hears.
#[derive(Debug)]
pub struct Listener {
    pub socket: UdpSocket,
    v4: bool,
}

/// An ICMP error as the socket got it.
#[derive(Debug, PartialEq, Eq)]
pub struct Heard {
    /// ICMP's type and code.
    pub kind: u8,
    pub code: u8,
    /// Who sent it.
    pub from: IpAddr,
}

impl Listener {
    /// A socket in `netns` that is connected to `to`.
    ///
    /// # Errors
    /// No route there.
    pub fn connect(netns: &Netns, to: SocketAddr) -> Result<Self> {
        let listener = Self::bind(netns, to.is_ipv4(), 0)?;
        listener.socket.connect(to)?;
        Ok(listener)
    }

    /// A socket at `port` of every address of one family.
    ///
    /// # Errors
    /// The port is taken.
    pub fn bind(netns: &Netns, v4: bool, port: u16) -> Result<Self> {
        let any: IpAddr = if v4 {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let socket = netns.enter(|| UdpSocket::bind((any, port)))?;
        let listener = Self { socket, v4 };
        let socket = &listener.socket;
        if v4 {
            setsockopt(socket, sockopt::Ipv4RecvErr, &true)?;
            listener.set(
                libc::IPPROTO_IP,
                libc::IP_MTU_DISCOVER,
                libc::IP_PMTUDISC_DO,
            )?;
        } else {
            setsockopt(socket, sockopt::Ipv6RecvErr, &true)?;
            let (name, value) = (libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO);
            listener.set(libc::IPPROTO_IPV6, name, value)?;
        }
        Ok(listener)
    }

    /// Sets the TTL or hop limit of what is sent.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_ttl(&self, ttl: i32) -> Result<()> {
        if self.v4 {
            self.set(libc::IPPROTO_IP, libc::IP_TTL, ttl)
        } else {
            self.set(libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, ttl)
        }
    }

    /// What the kernel now takes for the MTU of the path that the socket is connected to.
    ///
    /// # Errors
    /// It is not connected.
    pub fn path_mtu(&self) -> Result<u32> {
        let (level, name) = if self.v4 {
            (libc::IPPROTO_IP, libc::IP_MTU)
        } else {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU)
        };
        let mut mtu = 0;
        let mut length = size_of::<u32>() as libc::socklen_t;
        // SAFETY: the kernel writes one integer, which lives until the call returns.
        let result = unsafe {
            let (value, length) = ((&raw mut mtu).cast(), &raw mut length);
            libc::getsockopt(self.socket.as_raw_fd(), level, name, value, length)
        };
        if result < 0 {
            return Err(std::io::Error::last_os_error()).context("ask for the path's MTU");
        }
        Ok(mtu)
    }

    /// The next error.
    ///
    /// # Errors
    /// None came in time.
    pub fn hear(&self) -> Result<Heard> {
        wait_for("an ICMP error", || self.heard())
    }

    fn heard(&self) -> Option<Heard> {
        let mut buffer = [0; 2048];
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let mut space = nix::cmsg_space!([u8; 256]);
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let fd = self.socket.as_raw_fd();
        let message = recvmsg::<SockaddrStorage>(fd, &mut parts, Some(&mut space), flags).ok()?;
        message.cmsgs().ok()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(error, Some(from)) => Some(Heard {
                kind: error.ee_type,
                code: error.ee_code,
                from: Ipv4Addr::from(u32::from_be(from.sin_addr.s_addr)).into(),
            }),
            ControlMessageOwned::Ipv6RecvErr(error, Some(from)) => Some(Heard {
                kind: error.ee_type,
                code: error.ee_code,
                from: SockaddrIn6::from(from).ip().into(),
            }),
            _ => None,
        })
    }

    fn set(&self, level: i32, name: i32, value: i32) -> Result<()> {
        // SAFETY: the kernel reads one integer, which lives until the call returns.
        let result = unsafe {
            let length = size_of::<i32>() as libc::socklen_t;
            let value = (&raw const value).cast();
            libc::setsockopt(self.socket.as_raw_fd(), level, name, value, length)
        };
        if result < 0 {
            return Err(std::io::Error::last_os_error()).context("set an option of a socket");
        }
        Ok(())
    }
}
