//! What the daemon says of itself (`list`, `flows`, `stats`), read while somebody looks at the page.
//!
//! One reader asks for all visitors, at most once in [`PAUSE`]; nothing is asked when nobody looks. Visitors wait for a
//! state that is new enough for them, with an end to it, and share it.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use forwarder::control::api::{Counter, Listed, ListedFlow};
use forwarder_tests::daemon::Daemon;

/// The least time between two readings.
const PAUSE: Duration = Duration::from_millis(200);
/// How long a visitor waits for the reader.
const PATIENCE: Duration = Duration::from_secs(2);

/// The daemon's documents, as they were read one after the other.
#[derive(Debug, Default)]
pub(crate) struct Documents {
    pub list: Vec<Listed>,
    pub flows: Vec<ListedFlow>,
    pub stats: Vec<Counter>,
}

/// One reading.
#[derive(Debug)]
pub(crate) struct State {
    /// When the reader began to ask.
    pub asked: Instant,
    /// The documents, or why there are none.
    pub found: Result<Documents>,
}

/// Where visitors and the reader meet.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    /// Somebody wants a state from then or later.
    wanted: Option<Instant>,
    state: Option<Arc<State>>,
    ended: bool,
}

impl Inner {
    /// Whether there is no state from `since` or later.
    fn lacks(&self, since: Instant) -> bool {
        let last = self.state.as_ref().map(|state| state.asked);
        last.is_none_or(|last| last < since)
    }

    fn someone_waits(&self) -> bool {
        self.wanted.is_some_and(|wanted| self.lacks(wanted))
    }
}

impl Watch {
    /// The daemon's state at `since` or later; an older one, or none, if the reader does not come to it in time.
    pub(crate) fn state(&self, since: Instant) -> Option<Arc<State>> {
        let mut inner = self.lock();
        inner.wanted = inner.wanted.max(Some(since));
        self.changed.notify_all();
        let waiting = |inner: &mut Inner| !inner.ended && inner.lacks(since);
        let waited = self.changed.wait_timeout_while(inner, PATIENCE, waiting);
        let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        inner.state.clone()
    }

    /// Reads whenever a visitor waits, until [`Watch::end`].
    pub(crate) fn read(&self, mut ask: impl FnMut() -> Result<Documents>) {
        loop {
            let inner = self.lock();
            let idle = |inner: &mut Inner| !inner.ended && !inner.someone_waits();
            let inner = self.changed.wait_while(inner, idle);
            let inner = inner.unwrap_or_else(PoisonError::into_inner);
            let next = inner.state.as_ref().map(|state| state.asked + PAUSE);
            let pause = next.map_or(Duration::ZERO, |next| {
                next.saturating_duration_since(Instant::now())
            });
            let going_on = |inner: &mut Inner| !inner.ended;
            let waited = self.changed.wait_timeout_while(inner, pause, going_on);
            let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if inner.ended {
                return;
            }
            drop(inner);

            let asked = Instant::now();
            let found = ask();
            self.lock().state = Some(Arc::new(State { asked, found }));
            self.changed.notify_all();
        }
    }

    /// Ends the reader, and what visitors wait for, when dropped: also when its holder panics.
    pub(crate) fn ending(&self) -> Ending<'_> {
        Ending(self)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Watch::ending`].
#[derive(Debug)]
pub(crate) struct Ending<'a>(&'a Watch);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

/// Asks the daemon for all three.
pub(crate) fn documents(daemon: &Daemon) -> Result<Documents> {
    Ok(Documents {
        list: daemon.document(&["list"])?,
        flows: daemon.document(&["flows"])?,
        stats: daemon.document(&["stats"])?,
    })
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering::Relaxed},
        thread,
    };

    use super::*;

    /// Runs `visit` beside a reader and returns how often that asked.
    fn readings(visit: impl FnOnce(&Watch)) -> usize {
        let (watch, count) = (Watch::default(), AtomicUsize::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                watch.read(|| {
                    count.fetch_add(1, Relaxed);
                    Ok(Documents::default())
                });
            });
            let _ending = watch.ending();
            visit(&watch);
        });
        count.into_inner()
    }

    #[test]
    fn nothing_is_read_when_nobody_looks() {
        assert_eq!(readings(|_| ()), 0);
    }

    #[test]
    fn visitors_share_one_reading() {
        let since = Instant::now();
        let read = readings(|watch| {
            thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| assert!(watch.state(since).unwrap().asked >= since));
                }
            });
        });
        assert_eq!(read, 1);
    }

    #[test]
    fn a_state_is_never_older_than_wanted() {
        let read = readings(|watch| {
            for _ in 0..3 {
                let since = Instant::now();
                assert!(watch.state(since).unwrap().asked >= since);
            }
        });
        assert_eq!(read, 3);
    }

    #[test]
    fn the_end_is_waited_for_by_nobody() {
        let watch = Watch::default();
        drop(watch.ending());
        assert!(watch.state(Instant::now()).is_none());
    }
}
