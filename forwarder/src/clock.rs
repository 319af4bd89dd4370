//! The time of day, and that of the program.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Seconds since the epoch.
pub(crate) fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

/// CLOCK_MONOTONIC in nanoseconds, as `bpf_ktime_get_ns` gives it.
pub(crate) fn monotonic() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(|time| {
            Duration::from(time)
                .as_nanos()
                .try_into()
                .unwrap_or(u64::MAX)
        })
        .unwrap_or_default()
}
