//! Conversations as `flows` shows them, and their end from outside. What a connection of TCP has carried, the kernel knows; its
//! worker alone asks, as another thread could meet a descriptor that is another's by then.

#![expect(unsafe_code, reason = "TCP_INFO, of which the libc crate has a part")]

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, hash_map::Entry},
    io, iter,
    mem::offset_of,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, BorrowedFd, RawFd},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    sync::{Notify, mpsc},
    task::yield_now,
    time::Instant,
};

use super::{Idle, Meter, shared::Shared, worker::Stream};
use crate::publish::{Id, spec::Protocol};

/// A live conversation.
#[derive(Clone, Debug)]
pub struct Flow {
    pub publish: Id,
    pub protocol: Protocol,
    pub client: SocketAddr,
    pub frontend: SocketAddr,
    /// What the backend sees as the client.
    pub source: SocketAddr,
    pub backend: SocketAddr,
    pub state: &'static str,
    pub idle: Duration,
    /// From the client, and to it. Those of TCP are segments, and octets without headers.
    pub packets: [u64; 2],
    pub bytes: [u64; 2],
}

/// Whether a client's conversations with a publish are meant.
pub type Meant = Arc<dyn Fn(Id, IpAddr) -> bool + Send + Sync>;

/// Rows that wait for whoever reads them.
const WAITING: usize = 64;
/// Connections that a worker looks at before others have their turn.
const TURN: usize = 64;

impl Idle {
    /// Live connections of TCP that are meant. The caller waits for the workers.
    pub fn connections(&self, meant: &Meant) -> impl Iterator<Item = Flow> + Send + use<> {
        let (sender, mut receiver) = mpsc::channel(WAITING);
        let meant = meant.clone();
        let workers = &self.common().workers;
        workers.begin_in_each(move || list(meant.clone(), sender.clone()));
        iter::from_fn(move || receiver.blocking_recv())
    }

    /// Resets them; how many there were. The caller waits for the workers.
    pub fn end_connections(&self, meant: &Meant) -> u64 {
        let (sender, mut receiver) = mpsc::channel(WAITING);
        let (meant, common) = (meant.clone(), self.common().clone());
        self.common().workers.begin_in_each(move || {
            let (meant, sender, common) = (meant.clone(), sender.clone(), common.clone());
            async move {
                let ended = cut(&meant);
                common.changed();
                let _ = sender.send(ended).await;
            }
        });
        iter::from_fn(|| receiver.blocking_recv()).sum()
    }
}

thread_local! {
    /// A worker's connections, by the client's descriptor.
    static CONNECTIONS: RefCell<HashMap<RawFd, Rc<Connection>>> = RefCell::default();
}

async fn list(meant: Meant, sender: mpsc::Sender<Flow>) {
    let all: Vec<RawFd> = CONNECTIONS.with_borrow(|all| all.keys().copied().collect());
    for (at, descriptor) in all.into_iter().enumerate() {
        // It may have ended while others had their turn.
        let flow = CONNECTIONS.with_borrow(|all| {
            let connection = all.get(&descriptor)?;
            connection.is(&meant).then(|| connection.flow())?.ok()
        });
        if let Some(flow) = flow
            && sender.send(flow).await.is_err()
        {
            return; // nobody reads them
        }
        if at % TURN == TURN - 1 {
            yield_now().await;
        }
    }
}

/// Has them be reset at the next [`Common::changed`](super::Common::changed).
fn cut(meant: &Meant) -> u64 {
    CONNECTIONS.with_borrow(|all| {
        let meant = all.values().filter(|it| it.is(meant));
        meant.filter(|it| !it.is_cut.replace(true)).count() as u64
    })
}

/// A connection of TCP.
struct Connection {
    shared: Arc<Shared>,
    client: SocketAddr,
    descriptor: RawFd,
    /// The descriptor towards the backend, and the backend.
    backend: Cell<Option<(RawFd, SocketAddr)>>,
    is_cut: Cell<bool>,
}

impl Connection {
    fn is(&self, meant: &Meant) -> bool {
        self.shared.means(meant, self.client.ip())
    }

    /// # Errors
    /// It is not connected.
    fn flow(&self) -> io::Result<Flow> {
        let (to_backend, backend) = self.backend.get().ok_or(io::ErrorKind::NotConnected)?;
        // SAFETY: both are open until the conversation takes itself out of `CONNECTIONS`, on this very thread.
        let [client, source] = [self.descriptor, to_backend]
            .map(|descriptor| unsafe { BorrowedFd::borrow_raw(descriptor) });
        let own = |socket: BorrowedFd<'_>| {
            let own = SockRef::from(&socket).local_addr()?.as_socket();
            own.ok_or(io::Error::from(io::ErrorKind::Unsupported))
        };
        let info = Info::of(client)?;
        let is_begun = Info::of(source)?.state != TCP_SYN_SENT;
        Ok(Flow {
            publish: self.shared.publish,
            protocol: Protocol::Tcp,
            client: self.client,
            frontend: own(client)?,
            source: own(source)?,
            backend,
            state: if is_begun {
                info.state_name()
            } else {
                "syn_sent"
            },
            idle: Duration::from_millis(info.last_data_sent.min(info.last_data_received).into()),
            packets: [info.segments_in, info.segments_out].map(Into::into),
            bytes: [info.bytes_received, info.bytes_acknowledged],
        })
    }
}

/// A connection among those of its worker, until this is dropped: before its sockets are closed.
pub(super) struct Connected(Rc<Connection>);

impl Connected {
    pub(super) fn new(shared: Arc<Shared>, client: SocketAddr, stream: &Stream) -> Self {
        let descriptor = stream.io().as_raw_fd();
        let connection = Rc::new(Connection {
            shared,
            client,
            descriptor,
            backend: Cell::default(),
            is_cut: Cell::default(),
        });
        CONNECTIONS.with_borrow_mut(|all| all.insert(descriptor, connection.clone()));
        Self(connection)
    }

    pub(super) fn leads_to(&self, stream: &Stream, backend: SocketAddr) {
        self.0.backend.set(Some((stream.io().as_raw_fd(), backend)));
    }

    /// Whether it is to be reset.
    pub(super) fn is_cut(&self) -> bool {
        self.0.is_cut.get()
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        CONNECTIONS.with_borrow_mut(|all| all.remove(&self.0.descriptor));
    }
}

const TCP_SYN_SENT: u8 = 2;

/// `struct tcp_info` (include/uapi/linux/tcp.h), as far as it is needed.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Info {
    state: u8,
    flags: [u8; 7],
    timers: [u32; 9],
    /// In milliseconds from now, as the next but one.
    last_data_sent: u32,
    last_acknowledgement_sent: u32,
    last_data_received: u32,
    path: [u32; 12],
    rates: [u64; 2],
    bytes_acknowledged: u64,
    bytes_received: u64,
    segments_out: u32,
    segments_in: u32,
}

const _: () = assert!(offset_of!(Info, bytes_acknowledged) == 120);

impl Info {
    fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let mut info = Self::default();
        let mut length = size_of::<Self>() as libc::socklen_t;
        // SAFETY: the kernel writes no more than the length that it is told, of integers that may have any value.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut info).cast(),
                &raw mut length,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(info)
    }

    /// Of the client's connection, by the names of the timeouts (`TCP_ESTABLISHED` and so on, net/tcp_states.h).
    fn state_name(self) -> &'static str {
        match self.state {
            1 => "established",
            3 => "syn_recv",
            4 | 5 => "fin_wait",
            8 => "close_wait",
            9 | 11 => "last_ack",
            _ => "close",
        }
    }
}

/// A conversation of datagrams, or of SCTP.
#[derive(Debug)]
pub(super) struct Known {
    /// The client, and the address of ours that it uses.
    ends: Ends,
    source: SocketAddr,
    backend: SocketAddr,
    began: Instant,
    /// Milliseconds since `began` of the newest packet in either direction.
    seen: AtomicU64,
    pub(super) replied: AtomicBool,
    /// From the client, and to it: packets and bytes.
    carried: [[AtomicU64; 2]; 2],
    /// Ends it before its time.
    pub(super) cut: Notify,
}

pub(super) type Ends = (SocketAddr, SocketAddr);
/// Those of a publish. There may be several of the same ends: one, and others that are about to go.
pub(super) type All = HashMap<Ends, Vec<Arc<Known>>>;

impl Known {
    pub(super) fn touch(&self) {
        let elapsed = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.seen.store(elapsed, Relaxed);
    }

    pub(super) fn last_seen(&self) -> Instant {
        self.began + Duration::from_millis(self.seen.load(Relaxed))
    }

    pub(super) fn carried(&self, direction: usize, packets: usize, bytes: usize) {
        let [all_packets, all_bytes] = &self.carried[direction];
        all_packets.fetch_add(packets as u64, Relaxed);
        all_bytes.fetch_add(bytes as u64, Relaxed);
    }

    fn flow(&self, shared: &Shared) -> Flow {
        let carried = |what: usize| [0, 1].map(|way: usize| self.carried[way][what].load(Relaxed));
        let protocol = shared.spec.protocol;
        Flow {
            publish: shared.publish,
            protocol,
            client: self.ends.0,
            frontend: self.ends.1,
            source: self.source,
            backend: self.backend,
            state: match (protocol, self.replied.load(Relaxed)) {
                (Protocol::Udp, false) => "unreplied",
                (Protocol::Udp, true) => "replied",
                _ => "established",
            },
            idle: self.last_seen().elapsed(),
            packets: carried(0),
            bytes: carried(1),
        }
    }
}

/// A conversation among those of its publish, until this is dropped.
pub(super) struct Listed {
    shared: Arc<Shared>,
    known: Arc<Known>,
}

impl Listed {
    pub(super) fn new(
        shared: Arc<Shared>,
        ends: Ends,
        (source, backend): (SocketAddr, SocketAddr),
    ) -> Self {
        let known = Arc::new(Known {
            ends,
            source,
            backend,
            began: Instant::now(),
            seen: AtomicU64::new(0),
            replied: AtomicBool::new(false),
            carried: Default::default(),
            cut: Notify::new(),
        });
        let mut all = shared.used().known();
        all.entry(ends).or_default().push(known.clone());
        drop(all);
        Self { shared, known }
    }
}

impl std::ops::Deref for Listed {
    type Target = Known;

    fn deref(&self) -> &Known {
        &self.known
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        if let Entry::Occupied(mut entry) = self.shared.used().known().entry(self.known.ends) {
            entry.get_mut().retain(|it| !Arc::ptr_eq(it, &self.known));
            if entry.get().is_empty() {
                entry.remove();
            }
        }
    }
}

impl Shared {
    /// What a banned source has is about to end.
    fn means(&self, meant: &Meant, client: IpAddr) -> bool {
        meant(self.publish, client) && !self.common.is_banned(client, self.publish)
    }
}

impl Meter {
    fn known(&self, meant: &Meant) -> Vec<Arc<Known>> {
        let Some(used) = self.0.used.get() else {
            return Vec::new();
        };
        let all = used.known();
        let all = all.values().flatten();
        all.filter(|it| self.0.means(meant, it.ends.0.ip()))
            .cloned()
            .collect()
    }

    /// Live conversations of datagrams and of SCTP that are meant.
    pub fn flows(&self, meant: &Meant) -> Vec<Flow> {
        let known = self.known(meant).into_iter();
        known.map(|it| it.flow(&self.0)).collect()
    }

    /// Ends them; how many there were.
    pub fn end_flows(&self, meant: &Meant) -> u64 {
        let known = self.known(meant);
        known.iter().for_each(|it| it.cut.notify_one());
        known.len() as u64
    }

    /// Live flows of datagrams: client, and the address of ours that it uses.
    pub fn datagrams(&self) -> Vec<(SocketAddr, SocketAddr)> {
        let used = self.0.used.get();
        let used = used.filter(|_| self.0.spec.protocol == Protocol::Udp);
        used.map_or_else(Vec::new, |used| used.known().keys().copied().collect())
    }
}
