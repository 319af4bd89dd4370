//! The process's memory.

#![cfg_attr(
    target_env = "gnu",
    expect(unsafe_code, reason = "the allocator's own settings")
)]

/// Has all threads allocate from one place. Of several, each keeps for itself what a list of ten thousand publishes took while one
/// of its threads read it. On two processors the proxy is as fast.
pub fn share() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator's own function; it takes no pointer.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives back to the system what loading, or a list of ten thousand publishes, took for a moment.
pub(crate) fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator's own function; it takes no pointer.
    unsafe {
        libc::malloc_trim(0);
    }
}
