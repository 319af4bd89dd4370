//! The commands of bpf(2) on many entries of a map (5.6 and later), which aya does not have.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::maps::MapData;

/// The numbers that include/uapi/linux/bpf.h gives them.
#[derive(Clone, Copy, Debug)]
#[repr(i64)]
pub(super) enum Command {
    Lookup = 24,
    Update = 26,
}

/// The fields of `union bpf_attr` that they read: addresses as numbers, and how many entries there are at `keys` and
/// `values`.
#[derive(Default)]
#[repr(C)]
pub(super) struct Batch {
    pub in_batch: u64,
    pub out_batch: u64,
    pub keys: u64,
    pub values: u64,
    /// Afterwards: how many entries the command has handled.
    pub count: u32,
    /// [`Batch::run`] sets it.
    pub map_fd: u32,
    pub elem_flags: u64,
    pub flags: u64,
}

impl Batch {
    /// One system call for all of them.
    ///
    /// # Safety
    /// What the addresses name has room for `count` entries of the map's types, and lives until this returns.
    ///
    /// # Errors
    /// Those of the kernel.
    pub(super) unsafe fn run(&mut self, command: Command, map: &MapData) -> io::Result<()> {
        self.map_fd = map.fd().as_fd().as_raw_fd().cast_unsigned();
        // SAFETY: by the caller's promise; the kernel reads and writes no more than the struct of this size.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command as libc::c_long,
                &raw mut *self,
                size_of::<Self>(),
            )
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
