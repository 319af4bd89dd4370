//! Conversations of the proxy that come back to it: its own connection to a backend may be another of its clients. A chain of
//! publishes is legal; one without an end is not, and would take descriptors until there are none.

use std::{
    collections::HashMap,
    net::SocketAddr,
    ops::RangeInclusive,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// As many publishes may lead to each other in a row.
pub(super) const LONGEST: u8 = 8;

type Ends = (SocketAddr, SocketAddr);

/// The proxy's own conversations with backends.
#[derive(Debug)]
pub(super) struct Chains {
    /// A bit for each port that a publish has or had. Conversations with backends at other ports do not come back.
    published: [AtomicU64; 1024],
    /// By their ends, with the number of publishes that they have passed.
    known: Mutex<HashMap<Ends, u8>>,
}

impl Default for Chains {
    fn default() -> Self {
        Self {
            published: [const { AtomicU64::new(0) }; 1024],
            known: Mutex::default(),
        }
    }
}

/// A conversation with a backend, known until this is dropped.
#[derive(Debug)]
pub(super) struct Link {
    chains: Arc<Chains>,
    /// None of one that does not come back.
    ends: Option<Ends>,
}

impl Chains {
    /// A conversation with these ports may come back from now on.
    pub(super) fn publish(&self, ports: RangeInclusive<u16>) {
        for port in ports {
            self.published[usize::from(port / 64)].fetch_or(1 << (port % 64), Relaxed);
        }
    }

    fn may_return(&self, backend: SocketAddr) -> bool {
        let port = backend.port();
        self.published[usize::from(port / 64)].load(Relaxed) & 1 << (port % 64) != 0
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Ends, u8>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many publishes a client's conversation has passed; 0 for one that is not the proxy's own.
    /// `None` if `frontend`, which is asked for only where it matters, cannot be told.
    pub(super) fn passed(
        &self,
        client: SocketAddr,
        frontend: impl FnOnce() -> Option<SocketAddr>,
    ) -> Option<u8> {
        let known = self.known();
        if known.is_empty() {
            return Some(0);
        }
        let ends = ends(client, frontend()?);
        Some(known.get(&ends).copied().unwrap_or(0))
    }

    /// Begins a conversation that has passed so many. `begin` connects without waiting, and `own` says which address and port
    /// it has; nobody asks for it before it is known.
    ///
    /// # Errors
    /// Those of both.
    pub(super) fn begin<T, E>(
        self: &Arc<Self>,
        passed: u8,
        backend: SocketAddr,
        begin: impl FnOnce() -> Result<T, E>,
        own: impl FnOnce(&T) -> Result<SocketAddr, E>,
    ) -> Result<(T, Link), E> {
        let chains = self.clone();
        if !self.may_return(backend) {
            return Ok((begin()?, Link { chains, ends: None }));
        }
        let mut known = self.known();
        let begun = begin()?;
        let ends = ends(own(&begun)?, backend);
        known.insert(ends, passed);
        let ends = Some(ends);
        Ok((begun, Link { chains, ends }))
    }
}

/// Without the scope and the flow label, which each side may tell in its own way.
fn ends(from: SocketAddr, to: SocketAddr) -> Ends {
    let plain = |it: SocketAddr| SocketAddr::new(it.ip(), it.port());
    (plain(from), plain(to))
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(ends) = &self.ends {
            self.chains.known().remove(ends);
        }
    }
}
