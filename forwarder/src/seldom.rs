//! Warnings that could come a thousand times a second come once a minute.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

const PAUSE: Duration = Duration::from_secs(60);

/// When a warning was last given.
#[derive(Debug, Default)]
pub(crate) struct Seldom(Mutex<Option<Instant>>);

impl Seldom {
    /// Whether it may be given again; if so, it is taken to be given now.
    pub(crate) fn is_due(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| last.elapsed() >= PAUSE);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_comes_once_a_minute() {
        let seldom = Seldom::default();
        assert!(seldom.is_due() && !seldom.is_due());
        *seldom.0.lock().expect("nobody has panicked") = Instant::now().checked_sub(PAUSE);
        assert!(seldom.is_due() && !seldom.is_due());
    }
}
