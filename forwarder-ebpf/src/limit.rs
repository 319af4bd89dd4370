//! The limits of a publish: flows at once, new flows and bytes a second, the device of its clients. What has none never comes here.
//!
//! A pace is kept by one word, when the next would be due (GCRA, ITU-T I.371): each that passes puts it off. Kernels before 5.12
//! have no compare-and-swap, but an addition is enough. What two CPUs let pass at once is added by both, and the next one waits for
//! longer. A word that has fallen behind is set to now, which may lose an addition of that moment; while anything is refused it is
//! ahead, and none is lost.

use core::ptr;

use aya_ebpf::{bindings::BPF_ANY, helpers::bpf_ktime_get_ns};
use forwarder_common::{
    policy::{Pace, Policy, UNITS_PER_NANOSECOND, time_of},
    publish::{PublishSource, flag},
    reason::Reason,
    tuple::Address,
};

use crate::{
    maps::{LIMITS, PUBLISHES, SOURCES},
    parse::Packet,
    publish,
    usage::{self, add},
};

#[inline(always)]
fn of(index: u32) -> Option<*mut Policy> {
    LIMITS.get_ptr_mut(&index)
}

/// Now, in the units of a [`Policy`].
#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() }.wrapping_mul(UNITS_PER_NANOSECOND)
}

/// Whether one that is due then may pass now.
#[inline(always)]
fn conforms(due: *const u64, now: u64, burst: u64) -> bool {
    // SAFETY: a word of an element, valid until the program ends.
    unsafe { ptr::read_volatile(due) <= now.wrapping_add(burst) }
}

/// Puts the next one off.
#[inline(always)]
fn put_off(due: *mut u64, now: u64, interval: u64) {
    // SAFETY: as above.
    unsafe {
        if ptr::read_volatile(due) < now {
            ptr::write_volatile(due, now);
        }
        add(due, interval);
    }
}

/// Whether clients of the publish may come by a device.
#[inline(always)]
pub fn comes_by(ifindex: u32, index: u32) -> bool {
    let Some(policy) = of(index) else {
        return true;
    };
    // SAFETY: a pointer that the map gave out is valid until the program ends.
    let wanted = unsafe { (*policy).ifindex };
    wanted == 0 || wanted == ifindex || wanted == publish::layer3(ifindex)
}

/// Whether one more flow may begin, which counts if so.
///
/// # Errors
/// `TooManyFlows`, `SourceRateLimited` or `RateLimited`.
#[inline(always)]
pub fn begin(source: &Address, index: u32) -> Result<(), Reason> {
    let Some(policy) = of(index) else {
        return Ok(());
    };
    // SAFETY: as above.
    let flows = unsafe { (*policy).flows };
    if flows != 0 && usage::flows(index) >= flows {
        return Err(Reason::TooManyFlows);
    }
    begin_at_pace(source, index, policy)
}

/// Whether one that is there may begin anew, which counts if so: its client asks for another connection, and it is the backend that
/// knows whether the last one is over.
///
/// # Errors
/// `SourceRateLimited` or `RateLimited`.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
pub fn begin_anew(source: &Address, index: u32) -> Result<(), Reason> {
    let Some(policy) = of(index) else {
        return Ok(());
    };
    begin_at_pace(source, index, policy).map_err(|reason| usage::refused(index, reason))
}

#[inline(always)]
fn begin_at_pace(source: &Address, index: u32, policy: *mut Policy) -> Result<(), Reason> {
    // SAFETY: as above.
    let (all, each, due) = unsafe {
        let due = &raw mut (*policy).next_flow;
        let policy = &*policy;
        (policy.new_flows, policy.new_flows_by_source, due)
    };
    let now = now();
    if all.interval != 0 && !conforms(due, now, all.burst) {
        return Err(Reason::RateLimited);
    }
    if each.interval != 0 && !begin_of(source, index, now, &each) {
        return Err(Reason::SourceRateLimited);
    }
    if all.interval != 0 {
        put_off(due, now, all.interval);
    }
    Ok(())
}

/// The same of one source.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
fn begin_of(source: &Address, index: u32, now: u64, pace: &Pace) -> bool {
    let mut key = PublishSource {
        publish: index,
        source: *source,
    };
    if !source.is_v4() {
        (key.source.0[2], key.source.0[3]) = (0, 0);
    }
    let Some(due) = SOURCES.get_ptr_mut(&key) else {
        let _ = SOURCES.insert(&key, &now.wrapping_add(pace.interval), BPF_ANY as u64);
        return true;
    };
    let conforms = conforms(due, now, pace.burst);
    if conforms {
        put_off(due, now, pace.interval);
    }
    conforms
}

/// Whether a publish has room for one more flow.
#[inline(always)]
pub fn has_room(index: u32) -> bool {
    let is_limited = PUBLISHES
        .get(index)
        .is_some_and(|publish| publish.flags & flag::LIMITED != 0);
    if !is_limited {
        return true;
    }
    let Some(policy) = of(index) else {
        return true;
    };
    // SAFETY: as above.
    let flows = unsafe { (*policy).flows };
    flows == 0 || usage::flows(index) < flows
}

/// Whether a packet of a flow of this publish may pass, by how much the publish has carried in its direction.
///
/// # Errors
/// `BandwidthExceeded`.
#[inline(always)]
pub fn carry(packet: &Packet, flags: u16, index: u32, direction: usize) -> Result<(), Reason> {
    if flags & flag::LIMITED == 0 || packet.is_error() {
        return Ok(());
    }
    carry_so_much(packet.length, index, direction)
}

// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
fn carry_so_much(length: u32, index: u32, direction: usize) -> Result<(), Reason> {
    let Some(policy) = of(index) else {
        return Ok(());
    };
    let direction = direction & 1;
    // SAFETY: as above.
    let (bits, burst, due) = unsafe {
        let due = &raw mut (*policy).next_packet[direction];
        let policy = &*policy;
        (policy.bits[direction], policy.bits_burst[direction], due)
    };
    if bits == 0 {
        return Ok(());
    }
    let now = now();
    if !conforms(due, now, burst) {
        return Err(usage::refused(index, Reason::BandwidthExceeded));
    }
    put_off(due, now, time_of(length as u64, bits));
    Ok(())
}
