//! systemd's file descriptor store (systemd.service(5), FileDescriptorStoreMax=): sockets that hold ports outlive this
//! process there, however it ends, and the next start of the service is handed them.

#![expect(
    unsafe_code,
    reason = "descriptors that the service manager hands over by their numbers"
)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
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
/// The name of the control socket.
const CONTROL: &str = "control";

/// What this process keeps there.
#[derive(Debug, Default)]
pub struct Store {
    is_there: bool,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// How many, by name.
    counts: BTreeMap<String, usize>,
    /// Octets that the names take in the next process's environment.
    length: usize,
    /// Something is not kept any more, of which systemd may not know yet.
    is_unsettled: bool,
    /// It is the next process's, whatever this one gives up.
    is_left: bool,
}

impl Kept {
    fn add(&mut self, name: &str, count: usize) {
        *self.counts.entry(name.to_owned()).or_default() += count;
        self.length += (name.len() + 1) * count;
    }

    fn remove(&mut self, name: &str) -> bool {
        let count = self.counts.remove(name).unwrap_or(0);
        self.length -= (name.len() + 1) * count;
        count > 0
    }
}

/// What an earlier process has kept there.
#[derive(Debug, Default)]
pub struct Left {
    pub sockets: Sockets,
    /// Where its conversations come from.
    pub conversations: Option<OwnedFd>,
    pub control: Option<OwnedFd>,
}

impl Store {
    /// The store that the environment names, and what is in it.
    ///
    /// # Errors
    /// The environment is not as systemd makes it.
    pub fn open() -> io::Result<(Self, Left)> {
        let mut left = Left::default();
        let mut kept = Kept::default();
        for (descriptor, name) in sd_notify::listen_fds_with_names()? {
            // SAFETY: whoever started this process has opened it, and nothing else uses it.
            let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
            kept.add(&name, 1);
            match name.as_str() {
                CONVERSATIONS => left.conversations = Some(descriptor),
                CONTROL => left.control = Some(descriptor),
                _ => left.sockets.add(name, descriptor),
            }
        }
        let is_unset = std::env::var_os("NOTIFY_SOCKET").is_none();
        // Where it says how many, systemd is new enough to.
        let has_none = std::env::var_os("FDSTORE").is_some_and(|most| most == "0");
        let store = Self {
            is_there: !is_unset && !has_none,
            kept: Mutex::new(kept),
        };
        Ok((store, left))
    }

    /// Whether anything can be kept.
    pub fn is_there(&self) -> bool {
        self.is_there
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps descriptors under a name, unless it has some already.
    pub(super) fn keep(&self, name: &str, descriptors: &[BorrowedFd<'_>]) {
        if !self.is_there || descriptors.is_empty() {
            return;
        }
        let mut kept = self.kept();
        let length = kept.length + (name.len() + 1) * descriptors.len();
        if kept.counts.contains_key(name) || length > NAMES {
            return;
        }
        kept.add(name, descriptors.len());
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

    /// Leaves all that is kept to the next process, with the control socket and the stream that it reads conversations from. One
    /// that this process has not read itself stays instead.
    pub(super) fn leave(&self, conversations: BorrowedFd<'_>, control: BorrowedFd<'_>) {
        self.keep(CONVERSATIONS, &[conversations]);
        self.keep(CONTROL, &[control]);
        self.kept().is_left = true;
    }

    /// The conversations of an earlier process have been read.
    pub(super) fn forget_conversations(&self) {
        self.forget(CONVERSATIONS);
    }

    /// Keeps what has a name no more; [`Store::settle`] waits until it is closed there.
    pub(super) fn forget(&self, name: &str) {
        let mut kept = self.kept();
        if !self.is_there || kept.is_left || !kept.remove(name) {
            return;
        }
        kept.is_unsettled = true;
        let state = [NotifyState::FdStoreRemove, NotifyState::FdName(name)];
        if let Err(error) = sd_notify::notify(&state) {
            warn!("systemd still keeps the sockets of {name}: {error}");
        }
    }

    /// Forgets all names but those that are `known`.
    pub fn retain(&self, known: impl Fn(&str) -> bool) {
        let unknown: Vec<String> = {
            let kept = self.kept();
            let names = kept.counts.keys();
            let names = names.filter(|name| *name != CONVERSATIONS && !known(name));
            names.cloned().collect()
        };
        unknown.iter().for_each(|name| self.forget(name));
    }

    /// Waits until systemd has done all that it was sent (sd_notify_barrier(3)).
    pub fn settle(&self) {
        if !std::mem::take(&mut self.kept().is_unsettled) {
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

/// What a socket is bound to, and of which type it is.
pub(super) type Bound = (SocketAddr, i32);

/// Sockets that somebody else has bound, each with the name by which systemd keeps it, if it does.
#[derive(Debug, Default)]
pub struct Sockets(HashMap<Bound, Vec<(String, OwnedFd)>>);

impl Sockets {
    /// One that is no bound socket is closed.
    fn add(&mut self, name: String, descriptor: OwnedFd) {
        let socket = SockRef::from(&descriptor);
        let local = socket.local_addr().ok().and_then(|local| local.as_socket());
        if let (Some(local), Ok(kind)) = (local, socket.r#type()) {
            self.0
                .entry((local, kind.into()))
                .or_default()
                .push((name, descriptor));
        }
    }

    /// Takes one that is bound to an address.
    pub(super) fn take(&mut self, bound: SocketAddr, kind: Type) -> Option<OwnedFd> {
        let (_, socket) = self.0.get_mut(&(bound, kind.into()))?.pop()?;
        Some(socket)
    }

    /// What they are bound to.
    pub fn bound(&self) -> impl Iterator<Item = &Bound> {
        self.0.keys()
    }

    /// Closes all but those that are needed; returns the names of what is closed.
    pub fn retain(&mut self, is_needed: impl Fn(&Bound) -> bool) -> BTreeSet<String> {
        let closed = self.0.extract_if(|bound, _| !is_needed(bound));
        let names = closed.flat_map(|(_, sockets)| sockets);
        names.map(|(name, _)| name).collect()
    }
}

impl Extend<OwnedFd> for Sockets {
    fn extend<T: IntoIterator<Item = OwnedFd>>(&mut self, descriptors: T) {
        let unnamed = |it| self.add(String::new(), it);
        descriptors.into_iter().for_each(unnamed);
    }
}

impl From<Vec<OwnedFd>> for Sockets {
    fn from(descriptors: Vec<OwnedFd>) -> Self {
        let mut sockets = Self::default();
        sockets.extend(descriptors);
        sockets
    }
}
