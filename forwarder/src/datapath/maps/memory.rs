//! The memory of an array that is made to be mapped: the program and user space add to the same counters.

#![expect(unsafe_code, reason = "memory that the program writes too")]

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    ptr::NonNull,
};

use aya::maps::MapData;

/// Elements of an array, in a row. `T` is made of atomics, as others write to it.
pub(super) struct Memory<T> {
    at: NonNull<T>,
    count: usize,
}

impl<T> Memory<T> {
    /// Maps elements from the first on, which begins a page.
    ///
    /// # Errors
    /// Those of the kernel.
    pub(super) fn map(map: &MapData, first: usize, count: usize) -> io::Result<Self> {
        // SAFETY: a new mapping of a part of a map that has been made to be mapped.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                (first * size_of::<T>()) as libc::off_t,
            )
        };
        match NonNull::new(at.cast()) {
            Some(memory) if at != libc::MAP_FAILED => Ok(Self { at: memory, count }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(super) fn get(&self, index: usize) -> Option<&T> {
        // SAFETY: there are so many elements, for as long as this lives.
        (index < self.count).then(|| unsafe { self.at.add(index).as_ref() })
    }
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` has made, which nobody has a reference into any more.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.count * size_of::<T>()) };
    }
}

// SAFETY: shared memory of atomic counters, which belongs to no thread.
unsafe impl<T: Sync> Send for Memory<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Memory<T> {}
