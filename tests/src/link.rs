//! Links of a process, as somebody else meets them who has its right to: found by their numbers, detached, and given other
//! programs, as `bpftool link detach` and libbpf do.

#![expect(unsafe_code, reason = "bpf(2) calls that aya does not have")]

use std::{
    fs, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};

/// Commands of bpf(2) (include/uapi/linux/bpf.h).
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
const BPF_LINK_DETACH: libc::c_long = 34;

/// include/uapi/linux/bpf.h
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;

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
    /// Whether it runs a program on what comes in by a device.
    pub fn is_ingress(&self) -> bool {
        self.kind == "tcx" && self.attach_type == Some(BPF_TCX_INGRESS)
    }

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

/// Takes every place for a program on what comes in by a device, of which the kernel has 64. They do nothing, until they are closed.
///
/// # Errors
/// The kernel has no such links.
pub fn fill_ingress(ifindex: u32) -> Result<Vec<OwnedFd>> {
    /// The start of `union bpf_attr` for the command.
    #[repr(C)]
    struct Load {
        kind: u32,
        instructions: u32,
        first: u64,
        license: u64,
    }
    // r0 = TCX_NEXT; exit
    let program: [u64; 2] = [0xffff_ffff_0000_00b7, 0x95];
    let mut links = Vec::new();
    loop {
        let load = Load {
            kind: BPF_PROG_TYPE_SCHED_CLS,
            instructions: 2,
            first: program.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
        };
        // One of its own for each: the kernel takes none twice.
        let loaded = opened(bpf(BPF_PROG_LOAD, load)?);
        let program = loaded.as_raw_fd().cast_unsigned();
        match bpf(BPF_LINK_CREATE, [program, ifindex, BPF_TCX_INGRESS, 0]) {
            Ok(link) => links.push(opened(link)),
            Err(error) if error.raw_os_error() == Some(libc::ERANGE) => return Ok(links),
            Err(error) => return Err(error).context("attach a program that does nothing"),
        }
    }
}

fn by_number(command: libc::c_long, id: u32) -> Result<OwnedFd> {
    let fd = bpf(command, [id, 0, 0, 0]).with_context(|| format!("number {id}"))?;
    Ok(opened(fd))
}

fn opened(descriptor: i32) -> OwnedFd {
    // SAFETY: the kernel has just given this descriptor to us alone.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

fn bpf<T>(command: libc::c_long, attributes: T) -> io::Result<i32> {
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
