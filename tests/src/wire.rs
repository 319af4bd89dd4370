//! The end of a link as whole frames (packet(7)): what is sent is on the wire as it is, and what came is read as it came.

#![expect(unsafe_code, reason = "packet sockets, and a filter of theirs")]

use std::{
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    net::if_::if_nametoindex,
    sys::{
        socket::{setsockopt, sockopt},
        time::{TimeVal, TimeValLike},
    },
};

use crate::netns::Netns;

/// How long a frame may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// A packet socket on one device.
#[derive(Debug)]
pub struct Wire(OwnedFd);

impl Wire {
    /// Opens the end that is `device` in `netns`.
    ///
    /// # Errors
    /// No such device, or no privilege.
    pub fn open(netns: &Netns, device: &str) -> Result<Self> {
        netns
            .enter(|| Self::open_here(device))
            .context("open a packet socket")
    }

    fn open_here(device: &str) -> Result<Self> {
        let every = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: no memory is passed.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                every.into(),
            )
        };
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: the kernel has just given this descriptor to us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: this C structure is valid when all zero.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = every;
        address.sll_ifindex = if_nametoindex(device)?.cast_signed();
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the kernel reads one address, which lives until it returns.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
        let yes = 1_i32;
        // SAFETY: the kernel reads one integer, which lives until it returns.
        let set = unsafe {
            let (level, name) = (libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING);
            libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const yes).cast(), 4)
        };
        if bound < 0 || set < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        let patience = TimeVal::milliseconds(PATIENCE.as_millis() as i64);
        setsockopt(&fd, sockopt::ReceiveTimeout, &patience)?;
        Ok(Self(fd))
    }

    /// Puts a frame on the wire.
    ///
    /// # Errors
    /// It is longer than the device's MTU, or the device is down.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        nix::unistd::write(&self.0, frame).context("send a frame")?;
        Ok(())
    }

    /// The next frame.
    ///
    /// # Errors
    /// None came in time.
    pub fn receive(&self) -> Result<Vec<u8>> {
        let mut buffer = vec![0; 1 << 16];
        match nix::unistd::read(&self.0, &mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                Ok(buffer)
            }
            Err(error) => bail!("no frame came: {error}"),
        }
    }
}

/// Whether a frame is none of those that a kernel sends on its own: ARP, neighbour discovery, multicast membership.
pub fn is_traffic(frame: &[u8]) -> bool {
    match (&frame[12..14], frame[23], frame[20]) {
        ([0x08, 0x00], protocol, _) => [1, 6, 17].contains(&protocol),
        ([0x86, 0xdd], _, 58) => frame[54] < 128,
        ([0x86, 0xdd], _, next) => [6, 17, 44].contains(&next),
        _ => false,
    }
}
