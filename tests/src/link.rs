//! Links of a process, as somebody else meets them who has its right to: found by their numbers, detached, and given other
//! programs, as `bpftool link detach` and libbpf do.

use std::{
    fs, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};

/// Commands of bpf(2) (include/uapi/linux/bpf.h).
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
const BPF_LINK_DETACH: libc::c_long = 34;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    id: u32,
    /// `tcx`, `xdp`, `netns` or `cgroup`.
    pub kind: String,
    /// The number of the program that it runs.
    pub program: u32,
    /// Of those to devices; 0 once it is detached.
    pub ifindex: Option<u32>,
    pub attach_type: Option<u32>,
}

/// Those that a process holds.
///
/// # Errors
/// It has ended.
pub fn held(pid: u32) -> Result<Vec<Link>> {
    let mut links: Vec<Link> = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor that was closed meanwhile is none.
        let information = fs::read_to_string(entry?.path()).unwrap_or_default();
        let value = |name: &str| {
            let mut lines = information.lines().filter_map(|line| line.split_once(':'));
            lines.find_map(|(key, value)| (key == name).then(|| value.trim()))
        };
        let number = |name| value(name).and_then(|value| value.split(' ').next()?.parse().ok());
        let (Some(id), Some(kind)) = (number("link_id"), value("link_type")) else {
            continue;
        };
        links.push(Link {
            id,
            kind: kind.into(),
            program: number("prog_id").context("a link without a program")?,
            ifindex: number("ifindex"),
            attach_type: number("attach_type"),
        });
    }
    Ok(links)
}

impl Link {
    /// # Errors
    /// It has gone.
    pub fn detach(&self) -> Result<()> {
        let link = by_number(BPF_LINK_GET_FD_BY_ID, self.id)?;
        bpf(BPF_LINK_DETACH, [link.as_raw_fd().cast_unsigned(), 0, 0, 0])?;
        Ok(())
    }

    /// Has it run another program.
    ///
    /// # Errors
    /// There is no such program, or of another type.
    pub fn update(&self, program: u32) -> Result<()> {
        let link = by_number(BPF_LINK_GET_FD_BY_ID, self.id)?;
        let program = by_number(BPF_PROG_GET_FD_BY_ID, program)?;
        let [link, program] = [&link, &program].map(|fd| fd.as_raw_fd().cast_unsigned());
        bpf(BPF_LINK_UPDATE, [link, program, 0, 0])?;
        Ok(())
    }
}

fn by_number(command: libc::c_long, id: u32) -> Result<OwnedFd> {
    let fd = bpf(command, [id, 0, 0, 0]).with_context(|| format!("number {id}"))?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf(command: libc::c_long, attributes: [u32; 4]) -> io::Result<i32> {
    // SAFETY: the command reads as many bytes as are given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(&attributes),
            size_of_val(&attributes),
        )
    };
    let result = i32::try_from(result).ok().filter(|result| *result >= 0);
    result.ok_or_else(io::Error::last_os_error)
}
