//! The process's memory.

/// Gives back to the system what loading, or a list of ten thousand publishes, took for a moment.
pub(crate) fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator's own function; it takes no pointer.
    unsafe {
        libc::malloc_trim(0);
    }
}
