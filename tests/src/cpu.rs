//! Which processors a thread may run on.

use anyhow::{Context, Result};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// Has the calling thread, and what it starts, run on these processors alone.
///
/// # Errors
/// There is no such processor.
pub fn pin_this_thread(cores: &[usize]) -> Result<()> {
    let this = Pid::from_raw(0);
    sched_setaffinity(this, &set(cores)?).context("pin to a core")
}

/// The set that the kernel takes.
///
/// # Errors
/// A number is greater than any processor's.
pub fn set(cores: &[usize]) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core)?;
    }
    Ok(set)
}
