//! What is counted of a publish: its flows, and whom it has refused. Packets are counted by their flows, which costs nothing more,
//! and added here when a flow ends.

use aya_ebpf::bindings::BPF_NOEXIST;
use forwarder_common::{
    flow::{Flow, is_over, state},
    reason::Reason,
    tuple::TCP,
    usage::Refused,
};

use crate::maps::{REFUSED, USAGE};

/// A new flow, and whether it was put into `FLOWS` at once.
#[inline(always)]
pub fn begun(publish: u32, is_kept: bool) {
    if let Some(usage) = USAGE.get_ptr_mut(publish) {
        // SAFETY: a pointer that the map gave out is valid until the program ends.
        unsafe {
            add(&raw mut (*usage).begun, 1);
            if is_kept {
                add(&raw mut (*usage).kept, 1);
            }
        }
    }
}

/// A flow was put into `FLOWS`.
#[inline(always)]
pub fn kept(publish: u32) {
    if let Some(usage) = USAGE.get_ptr_mut(publish) {
        // SAFETY: as above.
        unsafe { add(&raw mut (*usage).kept, 1) };
    }
}

/// Whether a flow counts among those of its publish that are there.
#[inline(always)]
pub fn counts(flow: &Flow) -> bool {
    flow.state() & (state::KEPT | state::OVER) == state::KEPT
}

/// A TCP connection that is over counts no more, long before its flow goes; and it does again if its tuple is used again.
// VERIFIER: a function of its own, as it is rarely needed.
// RACE: what two CPUs count at once, the daemon's next walk over the flows puts right.
#[inline(never)]
pub fn follow(flow: &mut Flow) {
    let state = flow.state();
    let was_over = state & state::OVER != 0;
    if state & state::KEPT == 0 || is_over(TCP.into(), state) == was_over {
        return;
    }
    flow.set_state(state ^ state::OVER);
    if was_over {
        kept(flow.publish());
    } else if let Some(usage) = USAGE.get_ptr_mut(flow.publish()) {
        // SAFETY: as above.
        unsafe { add(&raw mut (*usage).ended, 1) };
    }
}

/// A flow gives way to another.
#[inline(always)]
pub fn ended(flow: &Flow) {
    if let Some(usage) = USAGE.get_ptr_mut(flow.publish()) {
        // SAFETY: as above.
        unsafe {
            if counts(flow) {
                add(&raw mut (*usage).ended, 1);
            }
            for direction in 0..2 {
                let side = flow.side(direction);
                add(&raw mut (*usage).packets[direction], side.packets);
                add(&raw mut (*usage).bytes[direction], side.bytes);
            }
        }
    }
}

/// The flows of a publish that are there.
#[inline(always)]
pub fn flows(publish: u32) -> u64 {
    let Some(usage) = USAGE.get_ptr(publish) else {
        return 0;
    };
    // SAFETY: as above. Volatile, as other CPUs add to both.
    let (ended, kept) = unsafe {
        let ended = core::ptr::read_volatile(&raw const (*usage).ended);
        (ended, core::ptr::read_volatile(&raw const (*usage).kept))
    };
    kept.saturating_sub(ended)
}

/// A packet that a publish's policy refuses; gives the reason.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
pub fn refused(publish: u32, reason: Reason) -> Reason {
    let key = Refused {
        publish,
        reason: reason as u32,
    };
    let mut counter = REFUSED.get_ptr_mut(&key);
    if counter.is_none() {
        let _ = REFUSED.insert(&key, &0, BPF_NOEXIST as u64);
        counter = REFUSED.get_ptr_mut(&key);
    }
    if let Some(counter) = counter {
        // SAFETY: an element's memory stays writable until the program ends, and belongs to this CPU.
        unsafe { *counter += 1 };
    }
    reason
}

/// The sum is right whichever CPUs add to it. Nobody asks for the result: kernels before 5.12 know no addition that gives it.
///
/// # Safety
/// `to` is a field of an element that the map gave out.
#[inline(always)]
pub unsafe fn add(to: *mut u64, value: u64) {
    // The type has no `fetch_add` where there is no compare-and-swap, which old kernels have not.
    #[cfg(target_arch = "bpf")]
    // SAFETY: as the caller says; values are aligned to eight bytes.
    unsafe {
        use core::intrinsics::{AtomicOrdering, atomic_xadd};
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(to, value);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above.
    unsafe {
        *to += value;
    }
}
