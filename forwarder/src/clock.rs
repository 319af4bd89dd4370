//! The time of day, and the kernel's own clocks, which programs read. A time namespace shifts the latter for processes, and not
//! for programs.

use std::{
    fs,
    sync::LazyLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::time::{ClockId, clock_gettime};

/// What this process's time namespace adds, in nanoseconds.
#[derive(Debug, Default, PartialEq, Eq)]
struct Shift {
    monotonic: i128,
    boot: i128,
}

static SHIFT: LazyLock<Shift> = LazyLock::new(|| shift().unwrap_or_default());

/// Seconds since the epoch.
pub(crate) fn now() -> u64 {
    of_day().as_secs()
}

fn of_day() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
}

/// CLOCK_MONOTONIC in nanoseconds, as `bpf_ktime_get_ns` gives it.
pub(crate) fn monotonic() -> u64 {
    unshifted(ClockId::CLOCK_MONOTONIC, SHIFT.monotonic)
}

/// CLOCK_BOOTTIME in nanoseconds, as `bpf_ktime_get_boot_ns` gives it: it also goes on while the machine sleeps.
pub fn boot() -> u64 {
    unshifted(ClockId::CLOCK_BOOTTIME, SHIFT.boot)
}

/// The time of day at which [`boot`] was zero, in nanoseconds since the epoch. It changes when somebody sets the clock.
pub(crate) fn booted() -> i128 {
    nanoseconds(of_day()) - i128::from(boot())
}

fn unshifted(clock: ClockId, shift: i128) -> u64 {
    let now = clock_gettime(clock).map(Duration::from);
    let now = nanoseconds(now.unwrap_or_default()) - shift;
    u64::try_from(now).unwrap_or_default()
}

fn nanoseconds(time: Duration) -> i128 {
    i128::try_from(time.as_nanos()).unwrap_or(i128::MAX)
}

/// Nothing where there are no time namespaces. The offsets are those of the children's namespace; before Linux 6.1, a process is
/// in another one from `unshare` on, until it forks.
fn shift() -> Option<Shift> {
    let own = fs::read_link("/proc/self/ns/time").ok()?;
    let of_children = fs::read_link("/proc/self/ns/time_for_children").ok()?;
    let offsets = fs::read_to_string("/proc/self/timens_offsets").ok()?;
    (own == of_children).then(|| read(&offsets))
}

/// Lines of a clock's name, seconds and nanoseconds.
fn read(offsets: &str) -> Shift {
    let of = |clock: &str| {
        let mut lines = offsets.lines().map(str::split_ascii_whitespace);
        let found = lines.find_map(|mut words| {
            let is_meant = words.next()? == clock;
            let seconds: i128 = words.next()?.parse().ok()?;
            let nanoseconds: i128 = words.next()?.parse().ok()?;
            is_meant.then_some(seconds * 1_000_000_000 + nanoseconds)
        });
        found.unwrap_or_default()
    };
    Shift {
        monotonic: of("monotonic"),
        boot: of("boottime"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_of_a_time_namespace_are_read() {
        let text = "monotonic        1000         5\nboottime          -30 500000000\n";
        let monotonic = 1_000_000_000_005;
        let boot = -29_500_000_000;
        assert_eq!(read(text), Shift { monotonic, boot });
        assert_eq!(read(""), Shift::default());
    }
}
