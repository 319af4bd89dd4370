//! Copies without a call. Where the compiler cannot tell that two places differ it calls `memmove`, which goes byte
//! by byte in a BPF program, and costs more than a lookup; so does `memset`.

use core::ptr;

use forwarder_common::tuple::{Address, Tuple};

/// Copies `N` values of `T` one by one.
///
/// # Safety
/// Both must be valid for so many values, and aligned.
#[inline(always)]
unsafe fn copy<T: Copy, const N: usize>(from: *const T, to: *mut T) {
    for at in 0..N {
        // SAFETY: the caller's promise. Volatile, so that it stays a load and a store for each value: the compiler would keep
        // them for another copy, and has no registers for that.
        unsafe { ptr::write_volatile(to.add(at), ptr::read_volatile(from.add(at))) };
    }
}

/// A zero that the compiler does not know of, so that it stores words.
#[inline(always)]
pub fn zero() -> u64 {
    let zero = 0;
    // SAFETY: a valid reference.
    unsafe { ptr::read_volatile(&raw const zero) }
}

/// Reads an IPv6 address out of a packet.
///
/// # Safety
/// `from` must be valid for sixteen bytes, and aligned to two.
#[inline(always)]
pub unsafe fn read_address(from: *const [u32; 4], to: &mut Address) {
    // SAFETY: the caller's promise.
    unsafe { copy::<u16, 8>(from.cast(), ptr::from_mut(to).cast()) };
}

#[inline(always)]
pub fn copy_tuple(from: &Tuple, to: &mut Tuple) {
    // SAFETY: a tuple is ten words, aligned as such.
    unsafe { copy::<u32, 10>(ptr::from_ref(from).cast(), ptr::from_mut(to).cast()) };
}

/// Reads a MAC out of a packet.
///
/// # Safety
/// Both must be valid for six bytes, and aligned to two.
#[inline(always)]
pub unsafe fn read_mac(from: *const [u8; 6], to: *mut [u8; 6]) {
    // SAFETY: the caller's promise.
    unsafe { copy::<u16, 3>(from.cast(), to.cast()) };
}

/// The same conversation seen from its other end.
#[inline(always)]
pub fn reverse(from: &Tuple, to: &mut Tuple) {
    copy_address(&from.destination, &mut to.source);
    copy_address(&from.source, &mut to.destination);
    to.source_port = from.destination_port;
    to.destination_port = from.source_port;
    to.protocol = from.protocol;
}

#[inline(always)]
pub fn copy_address(from: &Address, to: &mut Address) {
    // SAFETY: an address is four words, aligned as such.
    unsafe { copy::<u32, 4>(ptr::from_ref(from).cast(), ptr::from_mut(to).cast()) };
}

/// Writes an IPv6 address into a packet.
///
/// # Safety
/// `to` must be valid for sixteen bytes, and aligned to two.
#[inline(always)]
pub unsafe fn write_address(from: &Address, to: *mut [u32; 4]) {
    // SAFETY: the caller's promise.
    unsafe { copy::<u16, 8>(ptr::from_ref(from).cast(), to.cast()) };
}
