//! Conversations of the proxy that come back to it: its own connection to a backend may be another of its clients. A chain of
//! publishes is legal; one without an end is not, and would take descriptors until there are none.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// As many publishes may lead to each other in a row.
pub(super) const LONGEST: u8 = 8;

type Ends = (SocketAddr, SocketAddr);

/// The proxy's own conversations with backends, by their ends, with the number of publishes that they have passed.
#[derive(Debug, Default)]
pub(super) struct Chains(Mutex<HashMap<Ends, u8>>);

/// A conversation with a backend, known until this is dropped.
#[derive(Debug)]
pub(super) struct Link {
    chains: Arc<Chains>,
    ends: Ends,
}

impl Chains {
    fn known(&self) -> MutexGuard<'_, HashMap<Ends, u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many publishes a client's conversation has passed; 0 for one that is not the proxy's own.
    pub(super) fn passed(&self, client: SocketAddr, frontend: SocketAddr) -> u8 {
        let known = self.known();
        known.get(&ends(client, frontend)).copied().unwrap_or(0)
    }

    /// Begins a conversation that has passed so many. `begin` connects without waiting, and says which address and port it
    /// has; nobody asks for it before it is known.
    ///
    /// # Errors
    /// Those of `begin`.
    pub(super) fn begin<T, E>(
        self: &Arc<Self>,
        passed: u8,
        backend: SocketAddr,
        begin: impl FnOnce() -> Result<(T, SocketAddr), E>,
    ) -> Result<(T, Link), E> {
        let mut known = self.known();
        let (begun, own) = begin()?;
        let ends = ends(own, backend);
        known.insert(ends, passed);
        drop(known);
        let chains = self.clone();
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
        self.chains.known().remove(&self.ends);
    }
}
