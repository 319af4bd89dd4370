//! A list that the kernel is asked for by netlink, of families that no crate speaks.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer};
use netlink_sys::{Socket, SocketAddr};

const HEADER_LENGTH: usize = 16;

/// Asks a netlink family for all there is of a kind, and reads each message's payload. What follows the request's header is the
/// kind's own.
///
/// # Errors
/// There is no such family, or the kernel refuses.
pub fn dump<T>(
    family: isize,
    kind: u16,
    asked: &[u8],
    read: impl Fn(&[u8]) -> T,
) -> io::Result<Vec<T::Item>>
where
    T: IntoIterator,
{
    let mut socket = Socket::new(family)?;
    socket.bind_auto()?;
    let length = HEADER_LENGTH + asked.len();
    let mut request = vec![0; length];
    request[HEADER_LENGTH..].copy_from_slice(asked);
    let mut header = NetlinkBuffer::new(&mut request[..]);
    header.set_length(u32::try_from(length).map_err(io::Error::other)?);
    header.set_message_type(kind);
    header.set_flags(NLM_F_REQUEST | NLM_F_DUMP);
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let mut all = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while let Ok(message) = NetlinkBuffer::new_checked(rest) {
            match message.message_type() {
                NLMSG_DONE => return Ok(all),
                NLMSG_ERROR => {
                    let code = message.payload().first_chunk();
                    let code = code.map_or(0, |code| i32::from_ne_bytes(*code));
                    return Err(io::Error::from_raw_os_error(-code));
                }
                _ => all.extend(read(message.payload())),
            }
            let length = (message.length() as usize).next_multiple_of(4);
            rest = &rest[length.min(rest.len())..];
        }
    }
}
