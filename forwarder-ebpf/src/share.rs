//! How much of `FLOWS` each source has, so that none fills it: counted where an entry comes and goes, here and in user space
//! (`forwarder/src/datapath/maps/shares.rs`), which puts right what a race has miscounted.

use core::ptr;

use forwarder_common::{
    limits,
    share::{self, ALIASES, ALL, Share},
    tuple::Address,
};

use crate::{
    maps::{KEYS, SHARES},
    setting,
    usage::add,
};

/// Set by the loader: entries that `FLOWS` has room for.
#[unsafe(no_mangle)]
static MOST_FLOWS: u32 = limits::FLOWS;

/// Which element counts a source.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
pub fn of(source: &Address) -> u32 {
    KEYS.get(0)
        .map_or(0, |keys| share::index(source, |at| keys[at]))
}

/// Whether two addresses of one family are one source, by themselves and not by a hash of them.
#[inline(always)]
pub fn is_same(one: &Address, other: &Address) -> bool {
    let ([a, b, c, d], [e, f, g, h]) = (one.0, other.0);
    a == e && b == f && (!one.is_v4() || c == g && d == h)
}

#[inline(always)]
fn held(index: u32) -> u64 {
    let Some(share) = SHARES.get_ptr(index) else {
        return 0;
    };
    // SAFETY: a pointer that the map gave out is valid until the program ends. Volatile, as other CPUs add to both.
    let (left, entered) = unsafe {
        let left = ptr::read_volatile(&raw const (*share).left);
        (left, ptr::read_volatile(&raw const (*share).entered))
    };
    Share { entered, left }.held()
}

/// Whether a source may have one more entry.
// RACE: each CPU may let one pass at once.
#[inline(always)]
pub fn has_room(index: u32) -> bool {
    share::has_room(held(index), held(ALL), setting(&MOST_FLOWS) as u64)
}

/// A source has one more entry.
#[inline(always)]
pub fn entered(index: u32) {
    for index in [index, ALL] {
        enter(index);
    }
}

#[inline(always)]
fn enter(index: u32) {
    if let Some(share) = SHARES.get_ptr_mut(index) {
        // SAFETY: as above.
        unsafe { add(&raw mut (*share).entered, 1) };
    }
}

/// A source has one less.
#[inline(always)]
pub fn left(index: u32) {
    for index in [index, ALL] {
        if let Some(share) = SHARES.get_ptr_mut(index) {
            // SAFETY: as above.
            unsafe { add(&raw mut (*share).left, 1) };
        }
    }
}

/// There is about to be one more alias.
#[inline(always)]
pub fn alias() {
    enter(ALIASES);
}

/// Whether there may be any alias.
#[inline(always)]
pub fn has_aliases() -> bool {
    held(ALIASES) != 0
}
