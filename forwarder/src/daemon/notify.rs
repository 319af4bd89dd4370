//! Tells systemd, where it asked for that (sd_notify(3)).

use std::{
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
};

/// Says that the instance serves.
///
/// # Errors
/// `NOTIFY_SOCKET` is no socket that can be written to.
pub(super) fn ready() -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let address = match path.as_encoded_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address?)?;
    Ok(())
}
