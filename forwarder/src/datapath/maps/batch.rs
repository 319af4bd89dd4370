//! The commands of bpf(2) on many entries of a map (5.6 and later), which aya does not have.

#![expect(unsafe_code, reason = "bpf(2) on many elements at once")]

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

/// Reads up to `count` entries of an array or a hash table by one system call, and returns how many there were. `token` is
/// moved on, and is `None` at the end of the table.
///
/// # Safety
/// There is room for `count` keys and values of the map's sizes.
///
/// # Errors
/// Those of the kernel.
pub(super) unsafe fn lookup(
    map: &MapData,
    keys: *mut u8,
    values: *mut u8,
    count: usize,
    token: &mut Option<u32>,
) -> io::Result<usize> {
    let start = *token;
    let mut next = 0_u32;
    let mut batch = Batch {
        in_batch: start.as_ref().map_or(0, |start| &raw const *start as u64),
        out_batch: &raw mut next as u64,
        keys: keys as u64,
        values: values as u64,
        count: count as u32,
        ..Batch::default()
    };
    // SAFETY: by the caller's promise; and the kernel reads `start` and writes `next`, which are words as tokens of both kinds
    // are, and live until it returns.
    let result = unsafe { batch.run(Command::Lookup, map) };
    *token = Some(next);
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => *token = None,
        result => result?,
    }
    Ok(batch.count as usize)
}
