//! Copies without a call. Where the compiler cannot tell that two places differ it calls `memmove`, which goes byte
//! by byte in a BPF program, and costs more than a lookup; so does `memset`.

use core::{mem::MaybeUninit, ptr};

use forwarder_common::tuple::{Address, Tuple};

/// Copies `N` values of `T` one by one.
///
/// # Safety
/// Both must be valid for so many values, and aligned.
#[inline(always)]
unsafe fn copy<T: Copy, const N: usize>(from: *const T, to: *mut T) {
    for at in 0..N {
        // SAFETY: the caller's promise. Volatile, so that it stays a store for each value.
        unsafe { ptr::write_volatile(to.add(at), from.add(at).read()) };
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

#[inline(always)]
pub fn tuple(from: &Tuple) -> Tuple {
    let mut tuple = MaybeUninit::<Tuple>::uninit();
    // SAFETY: as above; all ten words are written.
    unsafe {
        copy::<u32, 10>(ptr::from_ref(from).cast(), tuple.as_mut_ptr().cast());
        tuple.assume_init()
    }
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
