//! Waiting for something to become true, with an end to it.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// How long anything in these tests may take.
pub fn patience() -> Duration {
    slack() * 10
}

/// A second, or as many as `FORWARDER_TEST_SLACK` says: an emulated machine is slower.
pub fn slack() -> Duration {
    let factor = std::env::var("FORWARDER_TEST_SLACK").ok();
    let factor = factor.and_then(|text| text.parse().ok()).unwrap_or(1);
    Duration::from_secs(factor)
}

/// Asks `probe` again and again until it returns something, at most for [`patience`].
///
/// # Errors
/// `what` did not come in time.
pub fn wait_for<T>(what: &str, probe: impl FnMut() -> Option<T>) -> Result<T> {
    wait_at_most(patience(), what, probe)
}

/// Waits until something is so, at most for [`patience`].
///
/// # Panics
/// It was not in time.
#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let found = wait_for(what, || is_so().then_some(()));
    found.unwrap_or_else(|error| panic!("{error:#}"));
}

/// As [`wait_for`], for what takes longer, such as the start of a whole program.
///
/// # Errors
/// As [`wait_for`].
pub fn wait_at_most<T>(
    patience: Duration,
    what: &str,
    mut probe: impl FnMut() -> Option<T>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = probe() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(anyhow::anyhow!("waited {} s", patience.as_secs()))
                .context(what.to_owned());
        }
        thread::sleep(Duration::from_millis(10));
    }
}
