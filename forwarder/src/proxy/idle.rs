//! Held sockets that nobody has come to yet: they wait in one epoll(7) instance, and only when something is there
//! does a socket get a task of its own. With eBPF most never do, and ten thousand ports cost hardly any memory.

#![expect(
    unsafe_code,
    reason = "the runtime watches a descriptor that another crate owns"
)]

use std::{
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc,
};
use tracing::warn;

use crate::publish::Bans;

use super::{
    Common, Refusal, Reserved, Store, sctp, shared::Shared, sockets::Port, tcp, udp,
    worker::Workers,
};

/// So long the end of all conversations is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Sockets that are looked at in one go.
const EVENTS: usize = 64;

/// A held socket.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(std::net::TcpListener),
    Udp(std::net::UdpSocket),
    Sctp(socket2::Socket),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Udp(socket) => socket.as_fd(),
            Self::Sctp(socket) => socket.as_fd(),
        }
    }
}

#[derive(Debug)]
struct Waiting {
    socket: Socket,
    port: Port,
    shared: Arc<Shared>,
}

impl Waiting {
    fn serve(self) {
        let Self {
            socket,
            port,
            shared,
        } = self;
        let own = shared.clone();
        let task = tokio::spawn(async move {
            match socket {
                Socket::Tcp(listener) => {
                    let (serving, mut served) = mpsc::channel::<()>(1);
                    let listener = Arc::new(listener);
                    let workers = own.common.workers.clone();
                    workers.begin_in_each(move || {
                        let (own, serving) = (own.clone(), serving.clone());
                        let task = tcp::serve(listener.clone(), port, own.clone());
                        async move {
                            until(own.closed(), task).await;
                            drop(serving);
                        }
                    });
                    // None: all have ended, and closed the listener.
                    let _ = served.recv().await;
                }
                Socket::Udp(socket) => udp::serve(socket, port, own).await,
                Socket::Sctp(listener) => {
                    until(own.closed(), sctp::serve(listener, port, own.clone())).await;
                }
            }
        });
        shared.used().serving().push(task);
    }
}

async fn until(end: impl Future<Output = ()>, task: impl Future<Output = ()>) {
    tokio::select! {
        () = task => {}
        () = end => {}
    }
}

/// The sockets of all publishes of one runtime, and what they share. Clones stand for the same.
#[derive(Clone, Debug)]
pub struct Idle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    epoll: Epoll,
    common: Arc<Common>,
    /// By descriptor.
    waiting: Mutex<HashMap<RawFd, Waiting>>,
}

impl Inner {
    fn waiting(&self) -> MutexGuard<'_, HashMap<RawFd, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.common.workers.end();
    }
}

struct Descriptor(Arc<Inner>);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.epoll.0.as_raw_fd()
    }
}

impl Idle {
    /// Watches from a task of the current runtime; `store` has what outlives it.
    ///
    /// # Errors
    /// As epoll_create1(2), or no thread could be begun.
    pub fn start(store: Store) -> std::io::Result<Self> {
        let inner = Arc::new(Inner {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            common: Arc::new(Common::new(store, Workers::start()?)),
            waiting: Mutex::default(),
        });
        // SAFETY: the descriptor is the epoll instance, which lives for as long as `Descriptor` does.
        let ready = unsafe {
            AsyncFd::register_with_interest(Descriptor(inner.clone()), Interest::READABLE)?
        };
        tokio::spawn(async move {
            if let Err(error) = watch(ready).await {
                warn!("ports are served no more in user space: {error}");
            }
        });
        Ok(Self(inner))
    }

    pub(super) fn common(&self) -> &Arc<Common> {
        &self.0.common
    }

    /// How often somebody was not served, since the start, also by publishes that have gone.
    pub fn refused(&self) -> [(Refusal, u64); Refusal::ALL.len()] {
        Refusal::ALL.map(|why| (why, self.0.common.refused.get(why)))
    }

    /// Keeps so many descriptors from conversations, until what is returned is dropped.
    pub fn keep(&self, descriptors: u64) -> Reserved {
        self.common().budget.keep(descriptors)
    }

    /// The sources that are banned.
    pub fn bans(&self) -> Arc<Bans> {
        let bans = self.common().bans.read();
        bans.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what is banned: nothing of these sources is served, and what they have ends.
    pub fn ban(&self, change: impl FnOnce(&mut Bans)) {
        let common = self.common();
        let mut bans = common.bans.write().unwrap_or_else(PoisonError::into_inner);
        change(Arc::make_mut(&mut bans));
        drop(bans);
        common.changed();
        common.banned.notify_waiters();
    }

    /// Waits until both ends of every connection that is to end have been told, which the end of the process would keep from
    /// them.
    pub async fn finish(&self) {
        self.common().workers.finish(PATIENCE).await;
    }

    /// Flows, packets and bytes of publishes that the proxy no longer serves.
    pub fn gone(&self) -> [u64; 3] {
        let gone = &self.common().gone;
        gone.each_ref()
            .map(|counter| counter.load(std::sync::atomic::Ordering::Relaxed))
    }

    /// Keeps a socket until it is asked for, or [`Idle::remove`]d by its descriptor, which is returned.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(super) fn add(
        &self,
        socket: Socket,
        port: Port,
        shared: Arc<Shared>,
    ) -> std::io::Result<RawFd> {
        let descriptor = socket.as_fd().as_raw_fd();
        let event = EpollEvent::new(EpollFlags::EPOLLIN, descriptor as u64);
        let mut waiting = self.0.waiting();
        self.0.epoll.add(&socket, event)?;
        let entry = Waiting {
            socket,
            port,
            shared,
        };
        waiting.insert(descriptor, entry);
        Ok(descriptor)
    }

    /// Gives a publish's socket a task of its own, if it still waits.
    pub(super) fn serve(&self, descriptor: RawFd, shared: &Arc<Shared>) {
        let mut waiting = self.0.waiting();
        if waiting
            .get(&descriptor)
            .is_some_and(|entry| Arc::ptr_eq(&entry.shared, shared))
            && let Some(entry) = waiting.remove(&descriptor)
        {
            let _ = self.0.epoll.delete(&entry.socket);
            entry.serve();
        }
    }

    /// Closes a publish's socket if it still waits.
    pub(super) fn remove(&self, descriptor: RawFd, shared: &Arc<Shared>) {
        let mut waiting = self.0.waiting();
        // The number may be another's by now.
        if waiting
            .get(&descriptor)
            .is_some_and(|entry| Arc::ptr_eq(&entry.shared, shared))
        {
            waiting.remove(&descriptor);
        }
    }
}

/// Gives each socket that something has come to a task of its own.
async fn watch(ready: AsyncFd<Descriptor>) -> std::io::Result<()> {
    let mut events = [EpollEvent::empty(); EVENTS];
    loop {
        let mut guard = ready.readable().await?;
        let inner = &guard.get_inner().0;
        let count = inner.epoll.wait(&mut events, EpollTimeout::ZERO)?;
        for event in &events[..count] {
            let mut waiting = inner.waiting();
            if let Some(entry) = waiting.remove(&(event.data() as RawFd)) {
                let _ = inner.epoll.delete(&entry.socket);
                entry.serve();
            }
        }
        if count < EVENTS {
            guard.clear_ready();
        }
    }
}
