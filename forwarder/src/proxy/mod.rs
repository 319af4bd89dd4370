//! The userland proxy: holds every published port, and carries what the fast path does not.

mod batch;
mod protocol_header;
mod sockets;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use ipnet::IpNet;
use tokio::{sync::watch, task::JoinSet};

pub use self::sockets::{BindError, Held, is_wide, raise_descriptor_limit};
use crate::spec::Spec;

/// How a publish is served in user space.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// TCP backends get the PROXY protocol's header first.
    pub proxy_protocol: bool,
    /// Sources that are served; empty for all.
    pub allow: Vec<IpNet>,
}

/// What becomes of live connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// They end.
    Cut,
    /// They go on until they end by themselves.
    Drain,
    /// They are reset.
    Reset,
}

/// What was carried. For TCP, packets are reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Live ones.
    pub flows: u64,
    pub packets: u64,
    pub bytes: u64,
    /// Connections and datagrams of sources that are not on the allow-list.
    pub refused: u64,
}

/// What the tasks of one publish share.
#[derive(Debug)]
struct Shared {
    spec: Spec,
    options: Options,
    flows: AtomicU64,
    packets: AtomicU64,
    bytes: AtomicU64,
    refused: AtomicU64,
}

impl Shared {
    fn allows(&self, source: IpAddr) -> bool {
        let allow = &self.options.allow;
        let source = source.to_canonical();
        let allowed = allow.is_empty() || allow.iter().any(|network| network.contains(&source));
        if !allowed {
            self.refused.fetch_add(1, Relaxed);
        }
        allowed
    }

    fn backend(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.spec.backend, self.spec.backend_port(port))
    }

    fn carried(&self, bytes: usize) {
        self.carried_many(1, bytes);
    }

    fn carried_many(&self, packets: usize, bytes: usize) {
        self.packets.fetch_add(packets as u64, Relaxed);
        self.bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// Counts a live flow until it is dropped.
    fn flow(self: &Arc<Self>) -> LiveFlow {
        self.flows.fetch_add(1, Relaxed);
        LiveFlow(self.clone())
    }
}

#[derive(Debug)]
struct LiveFlow(Arc<Shared>);

impl Drop for LiveFlow {
    fn drop(&mut self) {
        self.0.flows.fetch_sub(1, Relaxed);
    }
}

/// The tasks that serve one publish.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    listeners: JoinSet<()>,
    stop: watch::Sender<Option<Stop>>,
}

impl Proxy {
    /// Serves the held ports, in tasks of the current runtime.
    pub fn start(held: Held, spec: Spec, options: Options) -> Self {
        let shared = Arc::new(Shared {
            spec,
            options,
            flows: AtomicU64::new(0),
            packets: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let (stop, stopped) = watch::channel(None);
        let mut listeners = JoinSet::new();
        for (port, listener) in held.tcp {
            listeners.spawn(tcp::serve(listener, port, shared.clone(), stopped.clone()));
        }
        for (port, socket) in held.udp {
            listeners.spawn(udp::serve(socket, port, shared.clone(), stopped.clone()));
        }
        Self {
            shared,
            listeners,
            stop,
        }
    }

    /// What was carried until now.
    pub fn counters(&self) -> Counters {
        Counters {
            flows: self.shared.flows.load(Relaxed),
            packets: self.shared.packets.load(Relaxed),
            bytes: self.shared.bytes.load(Relaxed),
            refused: self.shared.refused.load(Relaxed),
        }
    }

    /// Gives the ports back; on return they are free.
    pub async fn stop(mut self, how: Stop) {
        let _ = self.stop.send(Some(how));
        self.listeners.shutdown().await;
    }
}

/// Resolves when live connections are to end, with how.
async fn ended(stopped: &mut watch::Receiver<Option<Stop>>) -> Stop {
    loop {
        let now = *stopped.borrow_and_update();
        match now {
            Some(how @ (Stop::Cut | Stop::Reset)) => return how,
            Some(Stop::Drain) => std::future::pending().await,
            None => {
                if stopped.changed().await.is_err() {
                    return Stop::Cut;
                }
            }
        }
    }
}
