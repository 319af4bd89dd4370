//! The userland proxy: holds every published port, and carries what the fast path does not.

mod batch;
mod idle;
mod protocol_header;
mod sctp;
mod sockets;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::RawFd,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use forwarder_common::flow::Timeouts;
use ipnet::IpNet;
use tokio::{sync::Notify, task::JoinHandle};

use self::idle::Socket;
pub use self::{
    idle::Idle,
    sockets::{BindError, Held, is_wide, raise_descriptor_limit},
};
use crate::publish::spec::Spec;

/// How a publish is served in user space.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// TCP backends get the PROXY protocol's header first.
    pub proxy_protocol: bool,
    /// Sources that are served; empty for all.
    pub allow: Vec<IpNet>,
    /// Of UDP's flows.
    pub timeouts: Arc<Timeouts>,
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

#[derive(Debug)]
struct Now {
    spec: Arc<Spec>,
    allow: Vec<IpNet>,
}

/// What the tasks of one publish share.
#[derive(Debug)]
struct Shared {
    spec: Arc<Spec>,
    options: Options,
    /// Where new clients are sent and which are served, both of which may change.
    now: RwLock<Now>,
    flows: AtomicU64,
    packets: AtomicU64,
    bytes: AtomicU64,
    refused: AtomicU64,
    stop: OnceLock<Stop>,
    stopped: Notify,
    /// The tasks of sockets that somebody has come to.
    serving: Mutex<Vec<JoinHandle<()>>>,
}

impl Shared {
    /// Resolves when live connections are to end, with how.
    async fn ended(&self) -> Stop {
        loop {
            // Asked for before the look, so that none is missed in between.
            let stopped = self.stopped.notified();
            match self.stop.get() {
                Some(how @ (Stop::Cut | Stop::Reset)) => return *how,
                Some(Stop::Drain) => std::future::pending().await,
                None => stopped.await,
            }
        }
    }

    fn serving(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allows(&self, source: IpAddr) -> bool {
        let now = self.now.read().unwrap_or_else(PoisonError::into_inner);
        let allow = &now.allow;
        let source = source.to_canonical();
        let allowed = allow.is_empty() || allow.iter().any(|network| network.contains(&source));
        if !allowed {
            self.refused.fetch_add(1, Relaxed);
        }
        allowed
    }

    fn backend(&self, port: u16) -> SocketAddr {
        let now = self.now.read().unwrap_or_else(PoisonError::into_inner);
        SocketAddr::new(now.spec.backend, now.spec.backend_port(port))
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

/// Reads what a proxy has carried.
#[derive(Clone, Debug)]
pub struct Meter(Arc<Shared>);

impl Meter {
    /// What was carried until now.
    pub fn counters(&self) -> Counters {
        Counters {
            flows: self.0.flows.load(Relaxed),
            packets: self.0.packets.load(Relaxed),
            bytes: self.0.bytes.load(Relaxed),
            refused: self.0.refused.load(Relaxed),
        }
    }
}

/// What serves one publish.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    idle: Idle,
    /// Descriptors of the sockets, while they wait.
    waiting: Vec<RawFd>,
}

impl Proxy {
    /// Serves the held ports, in tasks of the runtime of `idle`.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn start(held: Held, spec: Arc<Spec>, options: Options, idle: &Idle) -> io::Result<Self> {
        let now = Now {
            spec: spec.clone(),
            allow: options.allow.clone(),
        };
        let shared = Arc::new(Shared {
            spec,
            options,
            now: RwLock::new(now),
            flows: AtomicU64::new(0),
            packets: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            stop: OnceLock::new(),
            stopped: Notify::new(),
            serving: Mutex::default(),
        });
        let tcp = held
            .tcp
            .into_iter()
            .map(|(port, listener)| (port, Socket::Tcp(listener)));
        let udp = held
            .udp
            .into_iter()
            .map(|(port, socket)| (port, Socket::Udp(socket)));
        let sctp = held
            .sctp
            .into_iter()
            .map(|(port, listener)| (port, Socket::Sctp(listener)));
        let mut proxy = Self {
            shared: shared.clone(),
            idle: idle.clone(),
            waiting: Vec::with_capacity(tcp.len() + udp.len() + sctp.len()),
        };
        for (port, socket) in tcp.chain(udp).chain(sctp) {
            proxy.waiting.push(idle.add(socket, port, shared.clone())?);
        }
        Ok(proxy)
    }

    /// Sends new clients to another backend, and serves those of other networks; live ones stay where they are.
    pub fn change(&self, spec: Arc<Spec>, allow: Vec<IpNet>) {
        let now = self.shared.now.write();
        *now.unwrap_or_else(PoisonError::into_inner) = Now { spec, allow };
    }

    /// What was carried until now.
    pub fn counters(&self) -> Counters {
        self.meter().counters()
    }

    /// What reads its counters, also after it has ended.
    pub fn meter(&self) -> Meter {
        Meter(self.shared.clone())
    }

    /// Gives the ports back; on return they are free.
    pub async fn stop(self, how: Stop) {
        let _ = self.shared.stop.set(how);
        self.shared.stopped.notify_waiters();
        self.close();
        let serving = std::mem::take(&mut *self.shared.serving());
        for task in serving {
            let _ = task.await; // that it was ended
        }
    }

    fn close(&self) {
        for descriptor in &self.waiting {
            self.idle.remove(*descriptor, &self.shared);
        }
        for task in self.shared.serving().iter() {
            task.abort();
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.close();
    }
}
