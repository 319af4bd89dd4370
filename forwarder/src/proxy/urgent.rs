//! TCP's urgent octet (RFC 9293, section 3.8.5; RFC 6093): kept in the stream (SO_OOBINLINE), so that it is never lost, found by
//! the mark that reading stops at, and sent on as urgent.

#![expect(unsafe_code, reason = "a call that no crate has")]

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
};

use nix::sys::socket::{MsgFlags, recv, send};

use super::worker::{READ, Stream, WRITE};

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
pub(super) async fn carry(from: &Stream, to: &Stream) -> io::Result<bool> {
    let mut octet = [0];
    let (read_from, write_to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // It waits if the pointer came before the octet.
    let read = || Ok(recv(read_from, &mut octet, MsgFlags::MSG_DONTWAIT)?);
    if from.when(READ, read).await? == 0 {
        return Ok(false);
    }
    let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let write = || Ok(send(write_to, &octet, flags)?);
    to.when(WRITE, write).await?;
    Ok(true)
}
