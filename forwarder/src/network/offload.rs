//! What network cards do before anybody here sees a frame, asked for by the ethtool ioctl: netlink links do not say it.

#![expect(unsafe_code, reason = "an ioctl that no crate has")]

use std::{
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsRawFd as _,
};

// include/uapi/linux/sockios.h, include/uapi/linux/ethtool.h
const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETH_FLAG_RXVLAN: u32 = 1 << 8;

/// Whether a device takes VLAN tags off what comes in, as far as can be told.
pub(super) fn takes_tags_off(device: &str) -> bool {
    flags(device).is_none_or(|flags| flags & ETH_FLAG_RXVLAN != 0)
}

fn flags(device: &str) -> Option<u32> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    let mut value = [ETHTOOL_GFLAGS, 0];
    // SAFETY: this C structure is valid when all zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let (name, _) = request.ifr_name.split_at_mut(libc::IFNAMSIZ - 1);
    for (to, from) in name.iter_mut().zip(device.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]); // signed or not, as the processor has it
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request reads and writes two words, which live until it returns.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    (done == 0).then_some(value[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lo_has_flags_and_what_is_not_there_is_taken_for_the_worst() {
        assert!(flags("lo").is_some());
        assert_eq!(flags("no-such-device-here"), None);
        assert!(takes_tags_off("no-such-device-here"));
    }
}
