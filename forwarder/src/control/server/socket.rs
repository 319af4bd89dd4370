//! The socket that clients connect to. A restart leaves it to the next process, so that whoever asks meanwhile waits.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::PermissionsExt as _, net::UnixListener},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{Backlog, listen};
use socket2::{Domain, SockAddr, Socket as Socket2, Type};
use tokio::{
    sync::{Semaphore, mpsc},
    task::AbortHandle,
};

use super::{
    Call, Locate, Observe, client,
    place::{PLACES, Place},
    router,
};
use crate::{accept, instance, memory, seldom::Seldom};

/// The bound socket. Its file is removed when this is dropped, unless another process has the socket then.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    listener: UnixListener,
    accepting: Option<AbortHandle>,
    is_left: bool,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.is_left {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Socket {
    /// Binds it, or takes it from an earlier process; root and the group `forwarder` alone may connect. Whoever calls holds the
    /// instance's lock.
    ///
    /// # Errors
    /// The directory cannot be written to, or something else is there.
    pub fn bind(path: PathBuf, handed: Option<OwnedFd>) -> Result<Self> {
        let handed = handed.and_then(|socket| taken(socket, &path));
        let is_left = handed.is_some(); // until this process serves
        let listener = match handed {
            Some(listener) => listener,
            None => {
                instance::clear_socket(&path)?;
                bind_private(&path).with_context(|| format!("bind {}", path.display()))?
            }
        };
        Ok(Self {
            path,
            listener,
            accepting: None,
            is_left,
        })
    }

    /// Serves clients: hands changes to `calls`, reads from `observed`, and asks an engine for containers if there is one.
    ///
    /// # Errors
    /// The runtime refuses the socket.
    pub fn serve(
        &mut self,
        calls: mpsc::Sender<Call>,
        observed: Arc<dyn Observe>,
        engine: Option<Arc<dyn Locate>>,
    ) -> Result<()> {
        let listener = tokio::net::UnixListener::from_std(self.listener.try_clone()?)?;
        let router = router(calls, observed, engine);
        let clients = Arc::new(Semaphore::new(PLACES));
        let accepting = tokio::spawn(async move {
            let warned = Seldom::default();
            loop {
                let Ok(place) = clients.clone().acquire_owned().await else {
                    return;
                };
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let router = router.clone();
                        tokio::spawn(async move {
                            let _ = client(stream, router, Place::new(place)).await; // it has gone
                            memory::trim();
                        });
                    }
                    Err(error) => accept::failed(&error, &warned, "control socket").await,
                }
            }
        });
        self.accepting = Some(accepting.abort_handle());
        Ok(())
    }

    /// It is this process's alone, which serves.
    pub fn keep(&mut self) {
        self.is_left = false;
    }

    /// Accepts nobody any more: who connects from now on waits for the process that has the socket next.
    pub fn leave(&mut self) {
        if let Some(accepting) = self.accepting.take() {
            accepting.abort();
        }
        self.is_left = true;
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// The socket that an earlier process has left, if it is still the one at this path.
fn taken(socket: OwnedFd, path: &Path) -> Option<UnixListener> {
    let listener = UnixListener::from(socket);
    let local = listener.local_addr().ok()?;
    if local.as_pathname() != Some(path) || !is_listened_at(path) {
        return None;
    }
    // Clients are told by the kernel who has called listen(2) last (SO_PEERCRED, net/unix/af_unix.c).
    listen(&listener, Backlog::MAXCONN).ok()?;
    listener.set_nonblocking(true).ok()?;
    Some(listener)
}

/// Whether clients reach a socket by this path, which may be another's by now; also if so many wait there that nobody else gets in.
fn is_listened_at(path: &Path) -> bool {
    let tried = SockAddr::unix(path).and_then(|address| {
        let client = Socket2::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        client.connect(&address)
    });
    tried.map_or_else(|error| error.kind() == io::ErrorKind::WouldBlock, |()| true)
}

/// Binds with the permissions that the socket is to have, also for the moment before they could be changed.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    use nix::sys::stat::{Mode, umask};
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    let listener = listener?;
    listener.set_nonblocking(true)?;
    if let Ok(Some(group)) = nix::unistd::Group::from_name(instance::USER) {
        let _ = nix::unistd::chown(path, None, Some(group.gid));
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_nobody_reaches_by_its_path_any_more_is_not_taken() {
        let path = std::env::temp_dir().join(format!("forwarder-taken-{}", std::process::id()));
        let left = UnixListener::bind(&path).expect("bound");
        let handed = || left.try_clone().expect("a copy").into();
        assert!(taken(handed(), &path).is_some());
        fs::remove_file(&path).expect("removed");
        assert!(taken(handed(), &path).is_none(), "there is none");
        drop(UnixListener::bind(&path).expect("bound"));
        assert!(taken(handed(), &path).is_none(), "it is another's");
        fs::remove_file(&path).expect("removed");
    }
}
