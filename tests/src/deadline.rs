//! Waiting for something to become true, with an end to it.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// How long anything in these tests may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Asks `probe` again and again until it returns something, at most for [`PATIENCE`].
///
/// # Errors
/// `what` did not come in time.
pub fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(anyhow::anyhow!("waited {} s", PATIENCE.as_secs()))
                .context(what.to_owned());
        }
        thread::sleep(Duration::from_millis(10));
    }
}
