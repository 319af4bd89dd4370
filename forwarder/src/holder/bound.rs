//! TCP sockets that are bound, and neither listen nor are connected: /proc/net/tcp has none of them, and sock_diag(7) has them
//! from Linux 6.8 on. Of this network namespace.

use std::{io, net::IpAddr};

use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::HeldPort;
use crate::network::dump::dump;

// include/uapi/linux/sock_diag.h, inet_diag.h and include/net/tcp_states.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const TCP_BOUND_INACTIVE: u32 = 13;
/// `struct inet_diag_req_v2`: family, protocol, two octets, the states, and which socket, of which nothing is said.
const REQUEST_LENGTH: usize = 56;

/// All of a family; none where the kernel does not know the state.
///
/// # Errors
/// There is no sock_diag.
pub(super) fn sockets(family: libc::c_int) -> io::Result<Vec<HeldPort>> {
    let mut wanted = [0; REQUEST_LENGTH];
    wanted[0] = family as u8;
    wanted[1] = libc::IPPROTO_TCP as u8;
    wanted[4..8].copy_from_slice(&(1_u32 << TCP_BOUND_INACTIVE).to_ne_bytes());
    dump(NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, &wanted, read)
}

/// `struct inet_diag_msg`
fn read(message: &[u8]) -> Option<HeldPort> {
    let word = |at: usize| message.get(at..at + 4)?.first_chunk::<4>().copied();
    let address: IpAddr = match libc::c_int::from(*message.first()?) {
        libc::AF_INET => word(8)?.into(),
        _ => message.get(8..24)?.first_chunk::<16>().copied()?.into(),
    };
    Some(HeldPort {
        address,
        port: u16::from_be_bytes(*message.get(4..6)?.first_chunk()?),
        uid: u32::from_ne_bytes(word(64)?),
        inode: u32::from_ne_bytes(word(68)?).into(),
        waits: false,
    })
}
