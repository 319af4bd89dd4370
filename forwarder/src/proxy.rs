//! The userland proxy: holds every published port, and carries what the fast path does not.

mod admit;
mod batch;
mod budget;
mod chain;
mod control;
mod flows;
mod idle;
mod pass_on;
mod protocol_header;
mod refusal;
mod sctp;
mod shared;
mod sockets;
mod sources;
mod store;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod urgent;
mod worker;

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{BorrowedFd, OwnedFd, RawFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{
            AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

use forwarder_common::{flow::Timeouts, policy::Limits};
use ipnet::IpNet;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
};
use tracing::warn;

pub use self::{
    budget::Reserved,
    flows::{Flow, Meant},
    idle::Idle,
    protocol_header::ProxyProtocol,
    refusal::Refusal,
    sockets::{BindError, Held, await_free, bound, is_wide, raise_descriptor_limit},
    store::{Left, Sockets, Store},
};
use self::{
    budget::{Budget, Share},
    chain::Chains,
    idle::Socket,
    pass_on::{Kind, PassedOn},
    refusal::Refusals,
    shared::{Now, Shared},
    sockets::Port,
    worker::Workers,
};
use crate::publish::{Bans, Id, spec::Spec};

/// How a publish is served in user space.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub publish: Id,
    /// By which the next process finds its sockets and conversations.
    pub name: String,
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

/// What becomes of one conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Close,
    Reset,
    /// It goes on in the next process.
    PassOn,
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
    workers: Workers,
    budget: Arc<Budget>,
    chains: Arc<Chains>,
    refused: Refusals,
    /// How often workers' conversations were to look whether they end.
    changes: AtomicU64,
    bans: RwLock<Arc<Bans>>,
    /// Bans have changed.
    banned: Notify,
    store: Store,
    /// Where conversations go that are passed on, once they are.
    passing_on: watch::Sender<Option<mpsc::UnboundedSender<PassedOn>>>,
    /// Those of an earlier process, by their publish's name, until that is served.
    arrived: Mutex<HashMap<String, Vec<PassedOn>>>,
    /// Live conversations of all publishes.
    live: AtomicU64,
    /// Flows, packets and bytes of publishes that are no more.
    gone: [AtomicU64; 3],
}

impl Common {
    fn new(store: Store, workers: Workers) -> Self {
        Self {
            workers,
            budget: Arc::new(Budget::of_this_process()),
            chains: Arc::default(),
            refused: Refusals::default(),
            changes: AtomicU64::new(0),
            bans: RwLock::default(),
            banned: Notify::new(),
            store,
            passing_on: watch::Sender::default(),
            arrived: Mutex::default(),
            live: AtomicU64::new(0),
            gone: Default::default(),
        }
    }

    /// Has workers' conversations look whether they end: something is banned, passed on, or stopped now.
    fn changed(&self) {
        self.changes.fetch_add(1, SeqCst);
        self.workers.wake_all();
    }

    /// Resolves when conversations are to be passed on.
    async fn passed_on(&self) {
        let mut passing_on = self.passing_on.subscribe();
        let _ = passing_on.wait_for(Option::is_some).await; // whose other end is `self`'s
    }

    fn pass_on(&self, conversation: PassedOn) {
        if let Some(to) = &*self.passing_on.borrow() {
            let _ = to.send(conversation);
        }
    }

    fn arrived(&self) -> MutexGuard<'_, HashMap<String, Vec<PassedOn>>> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_banned(&self, source: IpAddr, publish: Id) -> bool {
        let bans = self.bans.read().unwrap_or_else(PoisonError::into_inner);
        bans.has(source, publish)
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
        let used = self.0.used.get();
        Counters {
            flows: self.0.flows.load(Relaxed),
            begun: self.0.begun.load(Relaxed),
            packets: self.0.packets.load(Relaxed),
            bytes: self.0.bytes.load(Relaxed),
            refused: Refusal::ALL.map(|why| used.map_or(0, |used| used.refused(why))),
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
    /// The only device that is served; 0 for all.
    device: u32,
    /// The sockets once more, if there is one: it may come back as another.
    on: Vec<OwnedFd>,
    ports: Option<Reserved>,
}

impl Proxy {
    /// Serves the held ports, in tasks of the runtime of `idle`.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn start(held: Held, spec: Arc<Spec>, options: Options, idle: &Idle) -> io::Result<Self> {
        let sockets: Vec<BorrowedFd<'_>> = held.sockets().collect();
        idle.common().store.keep(&options.name, &sockets);
        let device = match (options.limits.ifindex, &spec.zone) {
            (0, Some(zone)) => sockets::scope(zone).unwrap_or_default(),
            (device, _) => device,
        };
        let on = match device {
            0 => Vec::new(),
            _ => sockets
                .iter()
                .map(|socket| socket.try_clone_to_owned())
                .collect::<io::Result<_>>()?,
        };
        let now = Now {
            spec: spec.clone(),
            allow: options.allow,
            proxy_protocol: options.proxy_protocol,
            limits: options.limits,
        };
        let shared = Arc::new(Shared {
            publish: options.publish,
            name: options.name,
            spec,
            timeouts: options.timeouts,
            now: RwLock::new(now),
            flows: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            packets: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            common: idle.common().clone(),
            share: Arc::new(Share::of(idle.common().budget.clone())),
            stop: Mutex::default(),
            stopped: Notify::new(),
            used: OnceLock::new(),
        });
        let arrived = idle.common().arrived().remove(&shared.name);
        let arrived = arrived.unwrap_or_default();
        let mut at = Vec::new();
        if !arrived.is_empty() {
            for (port, socket) in &held.udp {
                at.push((*port, socket.local_addr()?));
            }
        }
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
                    .keep((tcp.len() + udp.len() + sctp.len() + on.len()) as u64),
            ),
            device,
            on,
        };
        let ports = shared.spec.ports;
        idle.common().chains.publish(ports.first..=ports.last);
        // Before anything is read that comes anew: a datagram would begin another flow.
        for conversation in arrived {
            let client = conversation.message.client;
            if let Err(error) = Self::go_on(&shared, conversation, &at) {
                warn!("{client} of {} cannot go on: {error}", shared.spec);
            }
        }
        for (port, socket) in tcp.chain(udp).chain(sctp) {
            proxy.waiting.push(idle.add(socket, port, shared.clone())?);
        }
        if shared.has_left() {
            // Their backends may speak first.
            for descriptor in &proxy.waiting {
                idle.serve(*descriptor, &shared);
            }
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

    /// Serves only what comes by a device, if it is another than before.
    ///
    /// # Errors
    /// There is no such device, or CAP_NET_RAW is missing.
    pub fn only_on(&mut self, name: &str, device: u32) -> io::Result<()> {
        if std::mem::replace(&mut self.device, device) == device {
            return Ok(());
        }
        let mut on = self.on.iter();
        on.try_for_each(|socket| sockets::bind_to(socket, name))
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

    /// Goes on with a conversation of an earlier process.
    fn go_on(
        shared: &Arc<Shared>,
        conversation: PassedOn,
        held: &[(Port, SocketAddr)],
    ) -> io::Result<()> {
        match conversation.message.kind {
            Kind::Tcp { .. } => tcp::go_on(conversation, shared),
            Kind::Udp { .. } => {
                let left = udp::Left::from_message(conversation, held, shared)?;
                shared.used().left().push(left);
            }
        }
        Ok(())
    }

    /// Gives the ports back; on return they are free, but for [`Idle::settle`]. What drains can be stopped again.
    pub async fn stop(&mut self, how: Stop) {
        self.shared.stop(how);
        self.on.clear();
        self.remove_waiting();
        let used = self.shared.used.get();
        let serving = used.map(|used| std::mem::take(&mut *used.serving()));
        for task in serving.into_iter().flatten() {
            let _ = task.await;
        }
        self.ports = None;
        self.forget_stored();
    }

    fn forget_stored(&self) {
        let store = &self.idle.common().store;
        store.forget(&self.shared.name);
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
        if let Some(used) = self.shared.used.get() {
            used.serving().iter().for_each(JoinHandle::abort);
        }
        self.forget_stored();
    }
}
