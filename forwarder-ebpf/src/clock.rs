//! The time, read from the hardware once a tick and not for every packet.

use aya_ebpf::helpers::{bpf_jiffies64, bpf_ktime_get_ns};

use crate::maps::CLOCK;

/// A value of `CLOCK`, each CPU's own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Reading {
    /// Jiffies when the clock was read.
    tick: u64,
    /// Nanoseconds of `CLOCK_MONOTONIC` then.
    now: u64,
}

/// Nanoseconds of `CLOCK_MONOTONIC`, at most a tick old.
#[inline(always)]
pub fn now() -> u64 {
    let Some(reading) = CLOCK.get_ptr_mut(0) else {
        return 0; // there is an element 0
    };
    // SAFETY: the element belongs to this CPU, and tc programs are not preempted by one another on a CPU. The
    // helpers have no arguments; the first is no call, but a load that the verifier writes in its place.
    unsafe {
        let tick = bpf_jiffies64();
        if (*reading).tick != tick {
            let now = bpf_ktime_get_ns();
            *reading = Reading { tick, now };
        }
        (*reading).now
    }
}
