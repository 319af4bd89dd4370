//! Warnings that could come a thousand times a second come once a minute.

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Instant,
};

/// Seconds.
const PAUSE: u32 = 60;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// When a warning was last given: a second after the first one of all, counted from 1; 0 for never. Every publish has some.
#[derive(Debug, Default)]
pub(crate) struct Seldom(AtomicU32);

impl Seldom {
    /// Whether it may be given again; if so, it is taken to be given now.
    pub(crate) fn is_due(&self) -> bool {
        let now = START.elapsed().as_secs() + 1;
        self.is_due_at(u32::try_from(now).unwrap_or(u32::MAX))
    }

    fn is_due_at(&self, now: u32) -> bool {
        let last = self.0.load(Relaxed);
        let due = last == 0 || now.saturating_sub(last) >= PAUSE;
        due && self.0.compare_exchange(last, now, Relaxed, Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_comes_once_a_minute() {
        let seldom = Seldom::default();
        let due = [1, 1, 60, 61, 61, 120, 121].map(|now| seldom.is_due_at(now));
        assert_eq!(due, [true, false, false, true, false, false, true]);
        let seldom = Seldom::default();
        assert!(seldom.is_due() && !seldom.is_due());
    }
}
