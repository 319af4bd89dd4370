//! TCP's urgent octet (RFC 9293, section 3.8.5; RFC 6093): kept in the stream (SO_OOBINLINE), so that it is never lost, found by
//! the mark that reading stops at, and sent on as urgent.

#![expect(unsafe_code, reason = "a call that no crate has")]

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use nix::sys::socket::{MsgFlags, recv, send};
use tokio::{io::Interest, net::TcpStream};

/// Whether the next octet to read is the urgent one. No read goes past it that began before it; splice(2) does not even
/// begin with it.
pub(super) fn is_next(stream: BorrowedFd<'_>) -> bool {
    let mut mark: libc::c_int = 0;
    // SAFETY: the kernel writes one int (tcp(7)), which lives until the call returns.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), SIOCATMARK, &raw mut mark) };
    result == 0 && mark != 0
}

/// include/uapi/asm-generic/sockios.h
const SIOCATMARK: libc::Ioctl = 0x8905;

/// Carries the octet, which [`is_next`]; false if the stream ends before it.
///
/// # Errors
/// Those of either stream.
pub(super) async fn carry(from: &TcpStream, to: &TcpStream) -> io::Result<bool> {
    let mut octet = [0];
    let mut read =
        || -> io::Result<usize> { Ok(recv(from.as_raw_fd(), &mut octet, MsgFlags::MSG_DONTWAIT)?) };
    let count = match read() {
        // The pointer came before the octet.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            from.async_io(Interest::READABLE, read).await?
        }
        result => result?,
    };
    if count == 0 {
        return Ok(false);
    }
    let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let write = || Ok(send(to.as_raw_fd(), &octet, flags)?);
    to.async_io(Interest::WRITABLE, write).await?;
    Ok(true)
}
