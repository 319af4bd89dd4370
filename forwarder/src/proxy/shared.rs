//! What the tasks of one publish share: where clients go now, what was carried and refused, and when they are to end.

use std::{
    future::poll_fn,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::RawFd,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard,
        atomic::{
            AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    task::Poll,
};

use forwarder_common::{flow::Timeouts, policy::Limits};
use ipnet::IpNet;
use socket2::Socket;
use tokio::{sync::Notify, task::JoinHandle};
use tracing::warn;

use super::{
    Common, End, ProxyProtocol, Refusal, Stop,
    admit::Account,
    budget::{Exhausted, Permit, Share},
    chain::{self, Link},
    flows::{self, Connected},
    refusal::Refusals,
    sockets,
    sources::{self, Sources},
    udp,
};
use crate::{
    accept,
    publish::{Id, spec::Spec},
    seldom::Seldom,
};

#[derive(Debug)]
pub(super) struct Now {
    pub(super) spec: Arc<Spec>,
    pub(super) allow: Vec<IpNet>,
    pub(super) proxy_protocol: ProxyProtocol,
    pub(super) limits: Limits,
}

/// What the tasks of one publish share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) publish: Id,
    /// As in [`Options`](super::Options).
    pub(super) name: String,
    pub(super) spec: Arc<Spec>,
    pub(super) timeouts: Arc<Timeouts>,
    /// Where new clients are sent and which are served, both of which may change.
    pub(super) now: RwLock<Now>,
    pub(super) flows: AtomicU64,
    pub(super) begun: AtomicU64,
    pub(super) packets: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) common: Arc<Common>,
    pub(super) share: Arc<Share>,
    pub(super) stop: Mutex<Option<Stop>>,
    pub(super) stopped: Notify,
    pub(super) used: OnceLock<Box<Used>>,
}

/// What is shared by the tasks of a publish that somebody has come to by the slow path. Of ten thousand publishes that the fast
/// path serves nearly none has it.
#[derive(Debug, Default)]
pub(super) struct Used {
    pub(super) account: Account,
    sources: Sources,
    refused: Refusals,
    /// By refusal.
    warned: [Seldom; Refusal::ALL.len()],
    /// The tasks of its sockets.
    serving: Mutex<Vec<JoinHandle<()>>>,
    /// Live conversations of datagrams and of SCTP.
    known: Mutex<flows::All>,
    /// UDP flows of an earlier process, until the task of their socket takes them.
    left: Mutex<Vec<udp::Left>>,
}

impl Used {
    pub(super) fn refused(&self, why: Refusal) -> u64 {
        self.refused.get(why)
    }

    pub(super) fn serving(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        lock(&self.serving)
    }

    pub(super) fn known(&self) -> MutexGuard<'_, flows::All> {
        lock(&self.known)
    }

    pub(super) fn left(&self) -> MutexGuard<'_, Vec<udp::Left>> {
        lock(&self.left)
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn used(&self) -> &Used {
        self.used.get_or_init(Box::default)
    }

    /// Resolves when live connections are to end here, with how.
    pub(super) async fn ended(&self) -> End {
        tokio::select! {
            how = self.told(|how| how != Stop::Drain) => match how {
                Stop::Reset => End::Reset,
                Stop::Cut | Stop::Drain => End::Close,
            },
            () = self.common.passed_on() => End::PassOn,
        }
    }

    /// The same of one client's, which may be banned.
    pub(super) async fn ended_for(&self, source: IpAddr) -> End {
        tokio::select! {
            how = self.ended() => how,
            () = self.banned(source) => End::Reset,
        }
    }

    /// Resolves when a source is banned here.
    pub(super) async fn banned(&self, source: IpAddr) {
        loop {
            // Asked for before the look, so that none is missed in between.
            let changed = self.common.banned.notified();
            if self.common.is_banned(source, self.publish) {
                return;
            }
            changed.await;
        }
    }

    /// Whether a client's conversation is to end, and how.
    fn end_for(&self, source: IpAddr) -> Option<End> {
        match *self.how_stopped() {
            Some(Stop::Reset) => return Some(End::Reset),
            Some(Stop::Cut) => return Some(End::Close),
            Some(Stop::Drain) | None => {}
        }
        if self.common.passing_on.borrow().is_some() {
            return Some(End::PassOn);
        }
        let is_banned = self.common.is_banned(source, self.publish);
        is_banned.then_some(End::Reset)
    }

    /// Does a worker's task for a client, unless that has to end before, which is looked at after [`Common::changed`] alone.
    pub(super) async fn unless_ended<T>(
        &self,
        source: IpAddr,
        connected: &Connected,
        task: impl Future<Output = T>,
    ) -> Result<T, End> {
        let (mut task, mut seen) = (pin!(task), None);
        poll_fn(|context| {
            let changes = Some(self.common.changes.load(SeqCst));
            if let Poll::Ready(done) = task.as_mut().poll(context) {
                return Poll::Ready(Ok(done));
            }
            let has_changed = std::mem::replace(&mut seen, changes) != changes;
            let is_cut = || connected.is_cut().then_some(End::Reset);
            let ends = || self.end_for(source).or_else(is_cut);
            match has_changed.then(ends).flatten() {
                Some(how) => Poll::Ready(Err(how)),
                None => Poll::Pending,
            }
        })
        .await
    }

    /// Resolves when nobody new is served any more.
    pub(super) async fn closed(&self) {
        tokio::select! {
            _ = self.told(|_| true) => {}
            () = self.common.passed_on() => {}
        }
    }

    /// Whether live conversations go on though nobody new is served.
    pub(super) fn drains(&self) -> bool {
        *self.how_stopped() == Some(Stop::Drain)
    }

    pub(super) fn stop(&self, how: Stop) {
        *self.how_stopped() = Some(how);
        self.common.changed();
        self.stopped.notify_waiters();
    }

    pub(super) fn how_stopped(&self) -> MutexGuard<'_, Option<Stop>> {
        lock(&self.stop)
    }

    pub(super) async fn told(&self, is_meant: impl Fn(Stop) -> bool) -> Stop {
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

    pub(super) fn has_left(&self) -> bool {
        self.used.get().is_some_and(|used| !used.left().is_empty())
    }

    pub(super) fn now(&self) -> RwLockReadGuard<'_, Now> {
        self.now.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts that somebody is not served, and warns of what an administrator would want to change.
    pub(super) fn refuse(&self, why: Refusal) {
        let used = self.used();
        used.refused.count(why);
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
        if is_wanted || !used.warned[why as usize].is_due() {
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
                "{spec}: no source port is left towards {}; a wider net.ipv4.ip_local_port_range has more, and so have further \
                 addresses of this host on the way there",
                spec.backend
            ),
        }
    }

    /// How many publishes a client's conversation has passed, counting this one, unless it passes in circles.
    pub(super) fn passed(
        &self,
        client: SocketAddr,
        frontend: impl FnOnce() -> Option<SocketAddr>,
    ) -> Option<u8> {
        let passed = self.common.chains.passed(client, frontend)? + 1;
        if passed > chain::LONGEST {
            self.refuse(Refusal::Loop);
            return None;
        }
        Some(passed)
    }

    /// Waits until two descriptors may be taken for a client that was accepted. `None`: it has to go at once.
    pub(super) async fn admit(&self, client: RawFd) -> Option<Permit> {
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

    /// Begins to connect a socket that `make` has made to the backend, without waiting; it may still be refused.
    pub(super) fn begin(
        &self,
        passed: u8,
        backend: SocketAddr,
        make: impl Fn() -> io::Result<Socket>,
    ) -> io::Result<(Socket, Link)> {
        let connect = || self.used().sources.connect(backend, make);
        let own = |socket: &Socket| {
            let own = socket.local_addr()?.as_socket();
            own.ok_or(io::Error::from(io::ErrorKind::Unsupported))
        };
        let begun = self.common.chains.begin(passed, backend, connect, own);
        if begun.as_ref().is_err_and(sources::is_used_up) {
            self.refuse(Refusal::NoSourcePort);
        }
        begun
    }

    /// # Errors
    /// The backend's device does not exist.
    pub(super) fn backend(&self, port: u16) -> io::Result<SocketAddr> {
        let now = self.now();
        let spec = &now.spec;
        let port = spec.backend_port(port);
        sockets::scoped(spec.backend, spec.backend_zone.as_ref(), port)
    }

    pub(super) fn carried(&self, bytes: usize) {
        self.carried_many(1, bytes);
    }

    pub(super) fn carried_many(&self, packets: usize, bytes: usize) {
        self.packets.fetch_add(packets as u64, Relaxed);
        self.bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// Counts a live flow until it is dropped.
    pub(super) fn flow(self: &Arc<Self>) -> LiveFlow {
        self.begun.fetch_add(1, Relaxed);
        self.flow_of_before()
    }

    /// The same of one that has begun in an earlier process.
    pub(super) fn flow_of_before(self: &Arc<Self>) -> LiveFlow {
        self.flows.fetch_add(1, Relaxed);
        LiveFlow {
            shared: self.clone(),
            _live: Live::new(&self.common),
        }
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
pub(super) struct LiveFlow {
    shared: Arc<Shared>,
    _live: Live,
}

impl Drop for LiveFlow {
    fn drop(&mut self) {
        self.shared.flows.fetch_sub(1, Relaxed);
    }
}

/// What passing on waits for, from when it was taken over or accepted: its task may not run before that.
#[derive(Debug)]
pub(super) struct Live(Arc<Common>);

impl Live {
    pub(super) fn new(common: &Arc<Common>) -> Self {
        common.live.fetch_add(1, Relaxed);
        Self(common.clone())
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.live.fetch_sub(1, Relaxed);
    }
}
