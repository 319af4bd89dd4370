//! The userland proxy: holds every published port, and carries what the fast path does not.

mod admit;
mod batch;
mod budget;
mod chain;
mod control;
mod idle;
mod protocol_header;
mod refusal;
mod sctp;
mod sockets;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod urgent;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::RawFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use forwarder_common::{flow::Timeouts, policy::Limits};
use ipnet::IpNet;
use tokio::{sync::Notify, task::JoinHandle};
use tracing::warn;

use self::{
    admit::Account,
    budget::{Budget, Exhausted, Permit, Ports, Share},
    chain::{Chains, Link},
    idle::Socket,
    refusal::Refusals,
};
pub use self::{
    idle::Idle,
    protocol_header::ProxyProtocol,
    refusal::Refusal,
    sockets::{BindError, Held, is_wide, raise_descriptor_limit},
};
use crate::{
    accept,
    publish::{Bans, spec::Spec},
    seldom::Seldom,
};

/// How a publish is served in user space.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Whether the backend gets the PROXY protocol's header: first in a TCP connection, or in front of each datagram.
    pub proxy_protocol: ProxyProtocol,
    /// Sources that are served; empty for all.
    pub allow: Vec<IpNet>,
    /// Of UDP's flows.
    pub timeouts: Arc<Timeouts>,
    /// The device is the sockets' business.
    pub limits: Limits,
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
    /// Live ones, and those that have ended.
    pub begun: u64,
    pub packets: u64,
    pub bytes: u64,
    /// Connections and datagrams that were not served, by [`Refusal::ALL`].
    pub refused: [u64; Refusal::ALL.len()],
}

/// What all publishes of a runtime share.
#[derive(Debug)]
struct Common {
    budget: Arc<Budget>,
    chains: Arc<Chains>,
    refused: Refusals,
    bans: RwLock<Arc<Bans>>,
    /// Bans have changed.
    banned: Notify,
    /// Flows, packets and bytes of publishes that are no more.
    gone: [AtomicU64; 3],
}

impl Common {
    fn new() -> Self {
        Self {
            budget: Arc::new(Budget::of_this_process()),
            chains: Arc::default(),
            refused: Refusals::default(),
            bans: RwLock::default(),
            banned: Notify::new(),
            gone: Default::default(),
        }
    }

    fn is_banned(&self, source: IpAddr) -> bool {
        let bans = self.bans.read().unwrap_or_else(PoisonError::into_inner);
        !bans.is_empty() && bans.has(source)
    }
}

#[derive(Debug)]
struct Now {
    spec: Arc<Spec>,
    allow: Vec<IpNet>,
    proxy_protocol: ProxyProtocol,
    limits: Limits,
}

/// What the tasks of one publish share.
#[derive(Debug)]
struct Shared {
    spec: Arc<Spec>,
    options: Options,
    /// Where new clients are sent and which are served, both of which may change.
    now: RwLock<Now>,
    account: Account,
    flows: AtomicU64,
    begun: AtomicU64,
    packets: AtomicU64,
    bytes: AtomicU64,
    common: Arc<Common>,
    share: Arc<Share>,
    refused: Refusals,
    /// By refusal.
    warned: [Seldom; Refusal::ALL.len()],
    stop: Mutex<Option<Stop>>,
    stopped: Notify,
    /// The tasks of sockets that somebody has come to.
    serving: Mutex<Vec<JoinHandle<()>>>,
}

impl Shared {
    /// Resolves when live connections are to end, with how.
    async fn ended(&self) -> Stop {
        self.told(|how| how != Stop::Drain).await
    }

    /// The same of one client's, which may be banned.
    async fn ended_for(&self, source: IpAddr) -> Stop {
        let banned = async {
            loop {
                // Asked for before the look, so that none is missed in between.
                let changed = self.common.banned.notified();
                if self.common.is_banned(source) {
                    return Stop::Reset;
                }
                changed.await;
            }
        };
        tokio::select! {
            how = self.ended() => how,
            how = banned => how,
        }
    }

    /// Resolves when nobody new is served any more.
    async fn closed(&self) {
        self.told(|_| true).await;
    }

    /// Whether live conversations go on though nobody new is served.
    fn drains(&self) -> bool {
        *self.how_stopped() == Some(Stop::Drain)
    }

    fn stop(&self, how: Stop) {
        *self.how_stopped() = Some(how);
        self.stopped.notify_waiters();
    }

    fn how_stopped(&self) -> MutexGuard<'_, Option<Stop>> {
        self.stop.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn told(&self, is_meant: impl Fn(Stop) -> bool) -> Stop {
        loop {
            // Asked for before the look, so that none is missed in between.
            let stopped = self.stopped.notified();
            match *self.how_stopped() {
                Some(how) if is_meant(how) => return how,
                _ => {}
            }
            stopped.await;
        }
    }

    fn serving(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> RwLockReadGuard<'_, Now> {
        self.now.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts that somebody is not served, and warns of what an administrator would want to change.
    fn refuse(&self, why: Refusal) {
        self.refused.count(why);
        self.common.refused.count(why);
        let is_wanted = matches!(
            why,
            Refusal::NotAllowed
                | Refusal::Banned
                | Refusal::FlowLimit
                | Refusal::RateLimited
                | Refusal::SourceRateLimited
                | Refusal::BandwidthExceeded
        );
        if is_wanted || !self.warned[why as usize].is_due() {
            return;
        }
        let spec = &self.spec;
        match why {
            Refusal::NotAllowed
            | Refusal::Banned
            | Refusal::FlowLimit
            | Refusal::RateLimited
            | Refusal::SourceRateLimited
            | Refusal::BandwidthExceeded => {}
            Refusal::NoDescriptors => warn!(
                "{spec} takes no more clients for now: its conversations have {} open files, and the limit of this process \
                 is {}; LimitNOFILE= in the unit, or `ulimit -n`, raises it",
                self.share.taken(),
                self.common.budget.limit()
            ),
            Refusal::TooManyFlows => warn!(
                "{spec} takes no more clients for now: one of its ports has {} UDP flows, which is the most",
                udp::MAX_FLOWS
            ),
            Refusal::Loop => warn!(
                "{spec} leads back to a published port: {} in a row is the most; what reaches {} must not come back",
                chain::LONGEST,
                spec.backend
            ),
            Refusal::NoSourcePort => warn!(
                "{spec}: no source port is left towards {}; a wider net.ipv4.ip_local_port_range has more",
                spec.backend
            ),
        }
    }

    /// How many publishes a client's conversation has passed, counting this one, unless it passes in circles.
    fn passed(&self, client: SocketAddr, frontend: SocketAddr) -> Option<u8> {
        let passed = self.common.chains.passed(client, frontend) + 1;
        if passed > chain::LONGEST {
            self.refuse(Refusal::Loop);
            return None;
        }
        Some(passed)
    }

    /// Waits until two descriptors may be taken for a client that was accepted. `None`: it has to go at once.
    async fn admit(&self, client: RawFd) -> Option<Permit> {
        let mut waits = false;
        loop {
            let exhausted = match self.share.take(2, Some(client)) {
                Ok(permit) => return Some(permit),
                Err(exhausted) => exhausted,
            };
            if !std::mem::replace(&mut waits, true) {
                self.refuse(Refusal::NoDescriptors);
            }
            if exhausted == Exhausted::Reserve {
                return None;
            }
            tokio::time::sleep(accept::BACK_OFF).await;
        }
    }

    /// Begins to connect a new socket to the backend, without waiting; it may still be refused.
    fn begin(
        &self,
        passed: u8,
        backend: SocketAddr,
        socket: socket2::Socket,
    ) -> io::Result<(socket2::Socket, Link)> {
        let begun = self.common.chains.begin(passed, backend, || {
            match socket.connect(&backend.into()) {
                Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
                _ => {}
            }
            let own = socket.local_addr()?.as_socket();
            Ok((socket, own.ok_or(io::ErrorKind::Unsupported)?))
        });
        if let Err(error) = &begun
            && matches!(
                error.raw_os_error(),
                Some(libc::EADDRNOTAVAIL | libc::EAGAIN)
            )
        {
            self.refuse(Refusal::NoSourcePort);
        }
        begun
    }

    /// # Errors
    /// The backend's device does not exist.
    fn backend(&self, port: u16) -> io::Result<SocketAddr> {
        let now = self.now();
        let spec = &now.spec;
        let port = spec.backend_port(port);
        sockets::scoped(spec.backend, spec.backend_zone.as_ref(), port)
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
        self.begun.fetch_add(1, Relaxed);
        LiveFlow(self.clone())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let counters = [&self.begun, &self.packets, &self.bytes];
        for (gone, counter) in self.common.gone.iter().zip(counters) {
            gone.fetch_add(counter.load(Relaxed), Relaxed);
        }
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
    /// Whether both read the same.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// What was carried until now.
    pub fn counters(&self) -> Counters {
        Counters {
            flows: self.0.flows.load(Relaxed),
            begun: self.0.begun.load(Relaxed),
            packets: self.0.packets.load(Relaxed),
            bytes: self.0.bytes.load(Relaxed),
            refused: Refusal::ALL.map(|why| self.0.refused.get(why)),
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
    ports: Option<Ports>,
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
            proxy_protocol: options.proxy_protocol,
            limits: options.limits,
        };
        let shared = Arc::new(Shared {
            spec,
            options,
            now: RwLock::new(now),
            account: Account::default(),
            flows: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            packets: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            common: idle.common().clone(),
            share: Arc::new(Share::of(idle.common().budget.clone())),
            refused: Refusals::default(),
            warned: Default::default(),
            stop: Mutex::default(),
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
            ports: Some(
                idle.common()
                    .budget
                    .hold(tcp.len() + udp.len() + sctp.len()),
            ),
        };
        for (port, socket) in tcp.chain(udp).chain(sctp) {
            proxy.waiting.push(idle.add(socket, port, shared.clone())?);
        }
        Ok(proxy)
    }

    /// Sends new clients to another backend, serves those of other networks, or tells of them in another way; live ones stay
    /// as they are.
    pub fn change(&self, spec: Arc<Spec>, options: Options) {
        let now = self.shared.now.write();
        *now.unwrap_or_else(PoisonError::into_inner) = Now {
            spec,
            allow: options.allow,
            proxy_protocol: options.proxy_protocol,
            limits: options.limits,
        };
    }

    /// Ends the conversations of what drains.
    pub fn cut(&self) {
        self.shared.stop(Stop::Reset);
    }

    /// What was carried until now.
    pub fn counters(&self) -> Counters {
        self.meter().counters()
    }

    /// What reads its counters, also after it has ended.
    pub fn meter(&self) -> Meter {
        Meter(self.shared.clone())
    }

    /// Gives the ports back; on return they are free. What drains can be stopped again.
    pub async fn stop(&mut self, how: Stop) {
        self.shared.stop(how);
        self.remove_waiting();
        let serving = std::mem::take(&mut *self.shared.serving());
        for task in serving {
            let _ = task.await;
        }
        self.ports = None;
    }

    fn remove_waiting(&mut self) {
        for descriptor in self.waiting.drain(..) {
            self.idle.remove(descriptor, &self.shared);
        }
    }
}

/// Without [`Proxy::stop`], everything is cut.
impl Drop for Proxy {
    fn drop(&mut self) {
        if self.shared.how_stopped().is_none() {
            self.shared.stop(Stop::Cut);
        }
        self.remove_waiting();
        for task in self.shared.serving().iter() {
            task.abort();
        }
    }
}
