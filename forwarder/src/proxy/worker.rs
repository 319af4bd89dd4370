//! The threads that carry TCP, one for each processor: each waits in an epoll(7) instance of its own and has its conversations
//! from accept(2) to close(2). What they carry is not decided here.
//!
//! They are no runtimes of tokio's: that a listener wakes one thread and not all (EPOLLEXCLUSIVE) takes a thread that waits
//! in the very instance that has the listener, and tokio takes each socket out of its instance before it is closed.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::poll_fn,
    io,
    net::{TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
    panic::AssertUnwindSafe,
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    task::{Context, Poll, Wake, Waker, ready},
    thread,
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt as _,
    future::LocalBoxFuture,
    stream::{FuturesUnordered, StreamExt as _},
};
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    eventfd::{EfdFlags, EventFd},
};
use tokio::runtime::Handle;
use tracing::error;

use crate::privilege;

/// Descriptors that are looked at in one go.
const EVENTS: usize = 256;
/// So often in a row a descriptor is ready before its task lets others go first.
const TURNS: u8 = 16;
/// Whoever waits for the end of all conversations looks again after this.
const PAUSE: Duration = Duration::from_millis(1);
/// A conversation that lasts so long is no short one; one that begins shortly before a worker looks may be taken for one.
const LASTING: Duration = Duration::from_secs(5);

/// After these, reading does not wait.
pub(super) const READ: EpollFlags = EpollFlags::EPOLLIN
    .union(EpollFlags::EPOLLRDHUP)
    .union(BROKEN);
/// After these, writing does not wait.
pub(super) const WRITE: EpollFlags = EpollFlags::EPOLLOUT.union(BROKEN);
const BROKEN: EpollFlags = EpollFlags::EPOLLHUP.union(EpollFlags::EPOLLERR);

type Task = LocalBoxFuture<'static, ()>;
type Begin = Box<dyn FnOnce() -> Task + Send>;

/// All of them. Clones stand for the same.
#[derive(Clone, Debug)]
pub(super) struct Workers(Arc<[Arc<Worker>]>);

/// What others know of one.
struct Worker {
    epoll: Epoll,
    /// Ends its waiting.
    bell: EventFd,
    /// It has something to do.
    is_rung: AtomicBool,
    is_over: AtomicBool,
    /// All its tasks are to go on.
    wakes_all: AtomicBool,
    /// What others want it to begin.
    sent: Mutex<Vec<Begin>>,
    /// Conversations that it has.
    conversations: AtomicUsize,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

thread_local! {
    static HERE: RefCell<Option<Rc<Here>>> = const { RefCell::new(None) };
}

/// What a worker's thread alone has.
struct Here {
    worker: Arc<Worker>,
    watched: RefCell<HashMap<RawFd, Rc<Readiness>>>,
    begun: RefCell<Vec<Task>>,
    /// When it looks for those that last, if any may be new.
    look: Cell<Option<Instant>>,
}

impl Here {
    /// How long it may wait for events.
    fn patience(&self) -> EpollTimeout {
        let Some(look) = self.look.get() else {
            return EpollTimeout::NONE;
        };
        let left = look.saturating_duration_since(Instant::now());
        // Whole milliseconds, of which the last has begun.
        let left = left.as_millis().saturating_add(1);
        u16::try_from(left).map_or(EpollTimeout::MAX, EpollTimeout::from)
    }

    /// Has those be prepared to last that are new no more.
    fn look(&self) {
        if self.look.get().is_some_and(|look| Instant::now() >= look) {
            self.look.set(None);
            for readiness in self.watched.borrow().values() {
                if matches!(readiness.age.get(), Age::New | Age::Used) {
                    readiness.age.set(Age::Lasting);
                    readiness.wake();
                }
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Age {
    New,
    /// It has been used once.
    Used,
    /// It is to be prepared to last.
    Lasting,
    /// It is prepared, or need not be.
    Prepared,
}

/// What is known of a descriptor.
struct Readiness {
    flags: Cell<EpollFlags>,
    turns: Cell<u8>,
    /// Of the task that has it.
    waker: RefCell<Option<Waker>>,
    age: Cell<Age>,
}

impl Readiness {
    fn wake(&self) {
        self.waker.borrow().iter().for_each(Waker::wake_by_ref);
    }
}

/// One conversation of a worker, until this is dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Worker>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.conversations.fetch_sub(1, Relaxed);
    }
}

fn task(future: impl Future<Output = ()> + 'static) -> Task {
    // Whose panic has been reported; the others go on.
    let task = AssertUnwindSafe(future).catch_unwind();
    task.map(drop).boxed_local()
}

impl Workers {
    /// As many as there are processors for this process. Their timers are those of the current runtime.
    ///
    /// # Errors
    /// There are no descriptors or threads.
    pub(super) fn start() -> io::Result<Self> {
        let count = thread::available_parallelism().map_or(1, usize::from);
        let workers = (0..count).map(|_| Worker::start(Handle::current()));
        Ok(Self(workers.collect::<io::Result<_>>()?))
    }

    /// Begins one task in each.
    pub(super) fn begin_in_each<F: Future<Output = ()> + 'static>(
        &self,
        begin: impl Fn() -> F + Clone + Send + 'static,
    ) {
        for worker in &*self.0 {
            let begin = begin.clone();
            worker.send(Box::new(move || task(begin())));
        }
    }

    /// Begins a conversation in the worker that has the fewest, or in this one if it has no more than twice as many: to wake
    /// another for each costs more than it brings.
    pub(super) fn begin<F: Future<Output = ()> + 'static>(
        &self,
        begin: impl FnOnce(Place) -> F + Send + 'static,
    ) {
        let load = |worker: &Arc<Worker>| worker.conversations.load(Relaxed);
        let Some(mut chosen) = self.0.iter().min_by_key(|worker| load(worker)) else {
            return;
        };
        let here = HERE.with_borrow(Clone::clone);
        if let Some(here) = &here
            && load(&here.worker) <= 2 * load(chosen)
        {
            chosen = &here.worker;
        }
        chosen.conversations.fetch_add(1, Relaxed);
        let place = Place(chosen.clone());
        match here {
            Some(here) if Arc::ptr_eq(&here.worker, chosen) => {
                here.begun.borrow_mut().push(task(begin(place)));
            }
            _ => chosen.send(Box::new(move || task(begin(place)))),
        }
    }

    /// Waits until no conversation is left, but no longer than this.
    pub(super) async fn finish(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let is_busy = |worker: &Arc<Worker>| worker.conversations.load(Relaxed) > 0;
        while self.0.iter().any(is_busy) && Instant::now() < deadline {
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// How many conversations each has.
    #[cfg(test)]
    pub(super) fn conversations(&self) -> Vec<usize> {
        let all = self.0.iter();
        all.map(|worker| worker.conversations.load(Relaxed))
            .collect()
    }

    /// Has all tasks go on that wait for a descriptor, or have done so.
    pub(super) fn wake_all(&self) {
        for worker in &*self.0 {
            worker.wakes_all.store(true, SeqCst);
            worker.wake_by_ref();
        }
    }

    /// Ends their threads and all tasks.
    pub(super) fn end(&self) {
        for worker in &*self.0 {
            worker.is_over.store(true, SeqCst);
            worker.wake_by_ref();
        }
    }
}

impl Worker {
    fn start(runtime: Handle) -> io::Result<Arc<Self>> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        // Each write says so once, and nothing has to be read.
        let rings = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        epoll.add(&bell, EpollEvent::new(rings, bell.as_raw_fd() as u64))?;
        let worker = Arc::new(Self {
            epoll,
            bell,
            is_rung: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            wakes_all: AtomicBool::new(false),
            sent: Mutex::default(),
            conversations: AtomicUsize::new(0),
        });
        let own = worker.clone();
        let (begun, begins) = std::sync::mpsc::sync_channel(0);
        thread::Builder::new()
            .name("worker".into())
            .spawn(move || {
                privilege::reduce();
                let _ = begun.send(());
                own.clone().run(&runtime);
                // Nobody waits for what it was sent and does not begin any more.
                own.is_over.store(true, SeqCst);
                drop(own.sent());
            })?;
        let _ = begins.recv();
        Ok(worker)
    }

    fn send(self: &Arc<Self>, begin: Begin) {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_over.load(SeqCst) {
            return;
        }
        sent.push(begin);
        drop(sent);
        self.wake_by_ref();
    }

    fn sent(&self) -> Vec<Begin> {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *sent)
    }

    fn run(self: Arc<Self>, runtime: &Handle) {
        let _timers = runtime.enter();
        let here = Rc::new(Here {
            worker: self.clone(),
            watched: RefCell::default(),
            begun: RefCell::default(),
            look: Cell::default(),
        });
        HERE.set(Some(here.clone()));
        let waker = Waker::from(self.clone());
        let mut context = Context::from_waker(&waker);
        let mut tasks = FuturesUnordered::<Task>::new();
        let mut events = [EpollEvent::empty(); EVENTS];
        while !self.is_over.load(SeqCst) {
            // RACE: whoever rings from now on finds it unset, and writes to the bell.
            self.is_rung.store(false, SeqCst);
            if self.wakes_all.swap(false, SeqCst) {
                let watched = here.watched.borrow();
                watched.values().for_each(|readiness| readiness.wake());
            }
            tasks.extend(self.sent().into_iter().map(|begin| begin()));
            loop {
                let next = tasks.poll_next_unpin(&mut context);
                let begun = here.begun.take();
                if !matches!(next, Poll::Ready(Some(()))) && begun.is_empty() {
                    break;
                }
                tasks.extend(begun);
            }
            let timeout = match self.is_rung.load(SeqCst) {
                true => EpollTimeout::ZERO,
                false => here.patience(),
            };
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(error) => return error!("a worker of the proxy ends: {error}"),
            };
            let watched = here.watched.borrow();
            for event in &events[..count] {
                if let Some(readiness) = watched.get(&(event.data() as RawFd)) {
                    let flags = readiness.flags.get() | event.events();
                    readiness.flags.set(flags);
                    readiness.wake();
                }
            }
            drop(watched);
            here.look();
        }
    }
}

impl Wake for Worker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let is_here = || {
            HERE.try_with(|here| {
                let here = here.try_borrow();
                here.is_ok_and(|here| {
                    here.as_ref()
                        .is_some_and(|here| Arc::ptr_eq(&here.worker, self))
                })
            })
        };
        if !self.is_rung.swap(true, SeqCst) && !is_here().unwrap_or(false) {
            let _ = self.bell.write(1); // which fails only if it has been rung and not heard
        }
    }
}

/// A descriptor that this thread's worker watches.
pub(super) struct Watched<T: AsFd> {
    io: T,
    here: Rc<Here>,
    readiness: Rc<Readiness>,
    /// Others have it open, too.
    is_shared: bool,
    /// Whether its worker hears when it can be written to.
    hears_of_room: Cell<bool>,
    /// Prepares it to last.
    prepare: Option<fn(BorrowedFd<'_>)>,
}

impl<T: AsFd> Watched<T> {
    fn new(io: T, events: EpollFlags, is_shared: bool) -> io::Result<Self> {
        let here = HERE.with_borrow(Clone::clone);
        let here = here.ok_or_else(|| io::Error::other("no thread of the proxy's"))?;
        let descriptor = io.as_fd().as_raw_fd();
        let epoll = &here.worker.epoll;
        epoll.add(&io, EpollEvent::new(events, descriptor as u64))?;
        let readiness = Rc::new(Readiness {
            flags: Cell::new(EpollFlags::empty()),
            turns: Cell::new(0),
            waker: RefCell::default(),
            age: Cell::new(Age::Prepared),
        });
        let mut watched = here.watched.borrow_mut();
        watched.insert(descriptor, readiness.clone());
        drop(watched);
        Ok(Self {
            io,
            here,
            readiness,
            is_shared,
            hears_of_room: Cell::new(events.contains(EpollFlags::EPOLLOUT)),
            prepare: None,
        })
    }

    /// Has it prepared when it turns out to last: what takes system calls that a short conversation need not pay.
    fn prepared_later_by(mut self, prepare: fn(BorrowedFd<'_>)) -> Self {
        self.prepare = Some(prepare);
        self.readiness.age.set(Age::New);
        let look = self.here.look.get();
        let look = look.unwrap_or_else(|| Instant::now() + LASTING);
        self.here.look.set(Some(look));
        self
    }

    /// It is used now; what is used again is to last.
    pub(super) fn use_once(&self) {
        match self.readiness.age.get() {
            Age::New => self.readiness.age.set(Age::Used),
            _ => self.prepare(),
        }
    }

    /// Prepares it to last, if that is still to be done.
    pub(super) fn prepare(&self) {
        let before = self.readiness.age.replace(Age::Prepared);
        if before != Age::Prepared
            && let Some(prepare) = self.prepare
        {
            prepare(self.io.as_fd());
        }
    }

    pub(super) fn has(&self, flags: EpollFlags) -> bool {
        self.readiness.flags.get().intersects(flags)
    }

    /// Takes it that there is something, of which the worker has not heard.
    pub(super) fn expect(&self, flags: EpollFlags) {
        let present = self.readiness.flags.get();
        self.readiness.flags.set(present | flags);
    }

    /// There is no more of it, until the worker hears that there is.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(super) fn clear(&self, flags: EpollFlags) -> io::Result<()> {
        let present = self.readiness.flags.get();
        self.readiness.flags.set(present - flags);
        if flags.contains(EpollFlags::EPOLLOUT) && !self.hears_of_room.replace(true) {
            let descriptor = self.io.as_fd().as_raw_fd();
            let mut event = EpollEvent::new(STREAM | EpollFlags::EPOLLOUT, descriptor as u64);
            self.here.worker.epoll.modify(&self.io, &mut event)?;
        }
        Ok(())
    }

    pub(super) fn poll_ready(&self, context: &mut Context<'_>, wanted: EpollFlags) -> Poll<()> {
        let Readiness {
            turns, waker, age, ..
        } = &*self.readiness;
        if age.get() == Age::Lasting {
            self.prepare();
        }
        let mut known = waker.borrow_mut();
        if known
            .as_ref()
            .is_none_or(|it| !it.will_wake(context.waker()))
        {
            *known = Some(context.waker().clone());
        }
        let is_ready = self.has(wanted);
        if is_ready && turns.get() < TURNS {
            turns.set(turns.get() + 1);
            return Poll::Ready(());
        }
        turns.set(0);
        if is_ready {
            context.waker().wake_by_ref();
        }
        Poll::Pending
    }

    pub(super) async fn ready(&self, wanted: EpollFlags) {
        poll_fn(|context| self.poll_ready(context, wanted)).await;
    }

    /// Does what may fail because it would have to wait, when it has not to.
    pub(super) async fn when<R>(
        &self,
        wanted: EpollFlags,
        mut attempt: impl FnMut() -> io::Result<R>,
    ) -> io::Result<R> {
        poll_fn(|context| {
            loop {
                ready!(self.poll_ready(context, wanted));
                match attempt() {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.clear(wanted)?;
                    }
                    result => return Poll::Ready(result),
                }
            }
        })
        .await
    }

    /// Its descriptor for another process, which takes it to be prepared; here it is watched no more.
    ///
    /// # Errors
    /// There are no descriptors.
    pub(super) fn for_another(&self) -> io::Result<OwnedFd> {
        self.prepare();
        self.here.worker.epoll.delete(&self.io)?;
        self.io.as_fd().try_clone_to_owned()
    }
}

/// What is heard of a stream. What is closed is watched no more: nobody else has it open.
const STREAM: EpollFlags = EpollFlags::EPOLLIN
    .union(EpollFlags::EPOLLRDHUP)
    .union(EpollFlags::EPOLLPRI)
    .union(EpollFlags::EPOLLET);

pub(super) type Stream = Watched<TcpStream>;

impl Stream {
    /// One that does not block and is connected. Its worker hears of room to write only after there was none.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(super) fn connected(stream: TcpStream) -> io::Result<Self> {
        let watched = Self::new(stream, STREAM, false)?;
        watched.expect(EpollFlags::EPOLLOUT);
        Ok(watched)
    }

    /// One that does not block and is being connected, and what prepares it to last.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(super) fn connecting(stream: TcpStream, prepare: fn(BorrowedFd<'_>)) -> io::Result<Self> {
        let watched = Self::new(stream, STREAM | EpollFlags::EPOLLOUT, false)?;
        Ok(watched.prepared_later_by(prepare))
    }

    pub(super) fn io(&self) -> &TcpStream {
        &self.io
    }
}

impl Watched<Arc<TcpListener>> {
    /// One that every worker watches: who comes wakes one that sleeps.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(super) fn listener(listener: Arc<TcpListener>) -> io::Result<Self> {
        let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        Self::new(listener, events, true)
    }
}

impl<T: AsFd> AsFd for Watched<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }
}

impl<T: AsFd> Drop for Watched<T> {
    fn drop(&mut self) {
        let descriptor = self.io.as_fd().as_raw_fd();
        self.here.watched.borrow_mut().remove(&descriptor);
        if self.is_shared {
            let _ = self.here.worker.epoll.delete(&self.io);
        }
    }
}
