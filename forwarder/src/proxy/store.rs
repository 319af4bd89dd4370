//! systemd's file descriptor store (systemd.service(5), FileDescriptorStoreMax=): sockets that hold ports outlive this
//! process there, however it ends, and the next start of the service is handed them.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sd_notify::NotifyState;
use socket2::{SockRef, Type};
use tracing::warn;

/// Descriptors that one message may have (SCM_MAX_FD, include/net/scm.h).
const AT_ONCE: usize = 253;
/// The next process is told all names in one variable of its environment, which may have 128 KiB (MAX_ARG_STRLEN,
/// execve(2)); with more, it could not be started.
const NAMES: usize = 100 << 10;
/// How long systemd may take for what was sent to it, in milliseconds.
const PATIENCE: u16 = 5000;
/// The name of the stream that conversations come by.
const CONVERSATIONS: &str = "conversations";

/// What this process keeps there.
#[derive(Debug, Default)]
pub struct Store {
    is_there: bool,
    /// By name, how many.
    kept: Mutex<BTreeMap<String, usize>>,
}

/// What an earlier process has kept there.
#[derive(Debug, Default)]
pub struct Left {
    pub sockets: Sockets,
    /// Where its conversations come from.
    pub conversations: Option<OwnedFd>,
}

impl Store {
    /// The store that the environment names, and what is in it.
    ///
    /// # Errors
    /// The environment is not as systemd makes it.
    pub fn open() -> io::Result<(Self, Left)> {
        let mut left = Left::default();
        let mut kept = BTreeMap::<String, usize>::new();
        for (descriptor, name) in sd_notify::listen_fds_with_names()? {
            // SAFETY: whoever started this process has opened it, and nothing else uses it.
            let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
            if name == CONVERSATIONS {
                left.conversations = Some(descriptor);
            } else {
                left.sockets.add(descriptor);
            }
            *kept.entry(name).or_default() += 1;
        }
        let is_unset = std::env::var_os("NOTIFY_SOCKET").is_none();
        // Where it says how many, systemd is new enough to.
        let has_none = std::env::var_os("FDSTORE").is_some_and(|most| most == "0");
        let store = Self {
            is_there: !is_unset && !has_none,
            kept: Mutex::new(kept),
        };
        store.forget(CONVERSATIONS);
        Ok((store, left))
    }

    /// Whether anything can be kept.
    pub fn is_there(&self) -> bool {
        self.is_there
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps descriptors under a name, unless it has some already.
    pub(super) fn keep(&self, name: &str, descriptors: &[BorrowedFd<'_>]) {
        if !self.is_there || descriptors.is_empty() {
            return;
        }
        let mut kept = self.kept();
        let names: usize = kept
            .iter()
            .map(|(name, count)| (name.len() + 1) * count)
            .sum();
        if kept.contains_key(name) || names + (name.len() + 1) * descriptors.len() > NAMES {
            return;
        }
        kept.insert(name.to_owned(), descriptors.len());
        for descriptors in descriptors.chunks(AT_ONCE) {
            let state = [
                NotifyState::FdStore,
                NotifyState::FdName(name),
                NotifyState::Custom("FDPOLL=0"),
            ];
            if let Err(error) = sd_notify::notify_with_fds(&state, descriptors) {
                return warn!("systemd does not keep the sockets of {name}: {error}");
            }
        }
    }

    /// Keeps the stream that conversations are read from.
    pub(super) fn keep_conversations(&self, stream: BorrowedFd<'_>) {
        self.keep(CONVERSATIONS, &[stream]);
    }

    /// Keeps what has a name no more; [`Store::settle`] waits until it is closed there.
    pub(super) fn forget(&self, name: &str) {
        if self.kept().remove(name).is_none() || !self.is_there {
            return;
        }
        let state = [NotifyState::FdStoreRemove, NotifyState::FdName(name)];
        if let Err(error) = sd_notify::notify(&state) {
            warn!("systemd still keeps the sockets of {name}: {error}");
        }
    }

    /// Forgets all names but those that are `known`.
    pub fn retain(&self, known: impl Fn(&str) -> bool) {
        let unknown: Vec<String> = {
            let kept = self.kept();
            let names = kept.keys().filter(|name| !known(name));
            names.cloned().collect()
        };
        unknown.iter().for_each(|name| self.forget(name));
    }

    /// Waits until systemd has done all that it was sent (sd_notify_barrier(3)).
    pub fn settle(&self) {
        if !self.is_there {
            return;
        }
        let settled = || -> io::Result<bool> {
            let (ours, theirs) = io::pipe()?;
            let state = [NotifyState::Custom("BARRIER=1")];
            sd_notify::notify_with_fds(&state, &[theirs.as_fd()])?;
            drop(theirs);
            let mut waiting = [PollFd::new(ours.as_fd(), PollFlags::POLLHUP)];
            Ok(poll(&mut waiting, PollTimeout::from(PATIENCE))? > 0)
        };
        match settled() {
            Ok(true) => {}
            Ok(false) => {
                warn!("systemd does not answer: ports that were given up may be taken still")
            }
            Err(error) => warn!("NOTIFY_SOCKET: {error}"),
        }
    }
}

/// Sockets that somebody else has bound, by what they are bound to.
#[derive(Debug, Default)]
pub struct Sockets(HashMap<(SocketAddr, i32), Vec<OwnedFd>>);

impl Sockets {
    /// One that is no bound socket is closed.
    fn add(&mut self, descriptor: OwnedFd) {
        let socket = SockRef::from(&descriptor);
        let local = socket.local_addr().ok().and_then(|local| local.as_socket());
        if let (Some(local), Ok(kind)) = (local, socket.r#type()) {
            self.0
                .entry((local, kind.into()))
                .or_default()
                .push(descriptor);
        }
    }

    /// Takes one that is bound to an address.
    pub(super) fn take(&mut self, bound: SocketAddr, kind: Type) -> Option<OwnedFd> {
        self.0.get_mut(&(bound, kind.into()))?.pop()
    }
}

impl Extend<OwnedFd> for Sockets {
    fn extend<T: IntoIterator<Item = OwnedFd>>(&mut self, descriptors: T) {
        descriptors.into_iter().for_each(|it| self.add(it));
    }
}

impl From<Vec<OwnedFd>> for Sockets {
    fn from(descriptors: Vec<OwnedFd>) -> Self {
        let mut sockets = Self::default();
        sockets.extend(descriptors);
        sockets
    }
}
