//! Netlink without a runtime: a request, and its answers one after the other. The kernel answers before it returns, so
//! there is nothing to wait for.

use std::{io, ops::ControlFlow};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::{
    socket::{setsockopt, sockopt},
    time::{TimeVal, TimeValLike as _},
};

/// A socket for requests.
pub struct Socket(netlink_sys::Socket);

impl Socket {
    /// # Errors
    /// The kernel refuses the socket.
    pub fn open() -> io::Result<Self> {
        let mut socket = netlink_sys::Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // An answer that does not come is an error, and nothing to wait for.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(10))?;
        Ok(Self(socket))
    }

    /// The kernel refuses what it does not know in a request, instead of passing over it.
    ///
    /// # Errors
    /// As [`Socket::open`].
    pub fn open_strict() -> io::Result<Self> {
        let socket = Self::open()?;
        socket.0.set_netlink_get_strict_chk(true)?;
        Ok(socket)
    }

    /// Sends a request with NLM_F_ACK or NLM_F_DUMP, and hands each answer to `take`; what cannot be read is `None`. After a
    /// break, answers are left in the socket: it takes no other request.
    ///
    /// # Errors
    /// The kernel's own, or it does not answer.
    pub fn ask(
        &self,
        request: RouteNetlinkMessage,
        flags: u16,
        mut take: impl FnMut(Option<RouteNetlinkMessage>) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | flags;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        loop {
            let (datagram, _) = self.0.recv_from_full()?;
            for message in messages(&datagram) {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message);
                let flow = match answer.map(|answer| answer.payload) {
                    Ok(NetlinkPayload::Done(done)) if done.code == 0 => return Ok(()),
                    Ok(NetlinkPayload::Done(done)) => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    Ok(NetlinkPayload::Error(error)) if error.code.is_none() => return Ok(()),
                    Ok(NetlinkPayload::Error(error)) => return Err(error.to_io()),
                    Ok(NetlinkPayload::InnerMessage(answer)) => take(Some(answer)),
                    Ok(_) => ControlFlow::Continue(()),
                    Err(_) => take(None),
                };
                if flow.is_break() {
                    return Ok(());
                }
            }
        }
    }
}

/// The messages of a datagram, each with its header (`struct nlmsghdr`, include/uapi/linux/netlink.h).
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
        let message = datagram.get(..length).filter(|_| length >= 16)?;
        datagram = &datagram[length.next_multiple_of(4).min(datagram.len())..];
        Some(message)
    })
}
