//! A program's attachment as the kernel's link: made, given another program, pinned, and asked whether somebody has
//! taken it away. aya gives a link's descriptor to nobody, and cannot ask this (include/uapi/linux/bpf.h).

#![expect(unsafe_code, reason = "bpf(2) calls that aya does not have")]

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use tracing::warn;

/// Commands of bpf(2).
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// `enum bpf_attach_type`: what a program is attached as.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum As {
    CgroupBind4 = 8,
    CgroupBind6 = 9,
    SkLookup = 36,
    Xdp = 37,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// Behind the programs that are there (BPF_F_AFTER).
pub(super) const AFTER: u32 = 1 << 4;

/// The fields of `union bpf_attr` that each command reads.
#[repr(C)]
struct Object {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct Info {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
struct Create {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct Update {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// What all links have, and what those to devices, network namespaces and cgroups have first: the number of what they
/// are attached to, which is 0 once they are not.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    _padding: u32,
    target: u32,
    attach_type: u32,
}

/// What is attached stays so until it is detached, or neither a process nor a pin has it.
#[derive(Debug)]
pub struct Link(OwnedFd);

impl Link {
    /// Attaches a program to a device, by its index, or to what a descriptor stands for.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn create(
        program: BorrowedFd<'_>,
        target: u32,
        attach_type: As,
        flags: u32,
    ) -> io::Result<Self> {
        let create = Create {
            prog_fd: program.as_raw_fd().cast_unsigned(),
            target,
            attach_type: attach_type as u32,
            flags,
        };
        bpf(BPF_LINK_CREATE, &create).map(Self::own)
    }

    /// # Errors
    /// Nothing is pinned there.
    pub fn open(pin: &Path) -> io::Result<Self> {
        let path = CString::new(pin.as_os_str().as_bytes())?;
        bpf(BPF_OBJ_GET, &object(&path, 0)).map(Self::own)
    }

    fn own(fd: i32) -> Self {
        // SAFETY: the kernel has just given this descriptor to us alone.
        Self(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn fd(&self) -> u32 {
        self.0.as_raw_fd().cast_unsigned()
    }

    /// Pins it, and makes the folder for that.
    ///
    /// # Errors
    /// There is a file, or no bpffs.
    pub(super) fn pin(&self, pin: &Path) -> io::Result<()> {
        fs::create_dir_all(pin.parent().unwrap_or(pin))?;
        let path = CString::new(pin.as_os_str().as_bytes())?;
        bpf(BPF_OBJ_PIN, &object(&path, self.fd())).map(drop)
    }

    /// Pins it again if somebody has removed its pin, for the next process.
    pub(super) fn pin_again(&self, pin: &Path) {
        if !pin.exists()
            && let Err(error) = self.pin(pin)
        {
            warn!("pin {}: {error}", pin.display());
        }
    }

    /// Has it run another program from now on.
    ///
    /// # Errors
    /// It is detached, or the program is of another type.
    pub(super) fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let update = Update {
            link_fd: self.fd(),
            new_prog_fd: program.as_raw_fd().cast_unsigned(),
            flags: 0,
            old_prog_fd: 0,
        };
        bpf(BPF_LINK_UPDATE, &update).map(drop)
    }

    fn info(&self) -> Option<LinkInfo> {
        let mut info = LinkInfo::default();
        let ask = Info {
            bpf_fd: self.fd(),
            info_len: u32::try_from(size_of::<LinkInfo>()).unwrap_or(0),
            info: std::ptr::from_mut(&mut info) as u64,
        };
        bpf(BPF_OBJ_GET_INFO_BY_FD, &ask).ok()?;
        Some(info).filter(|info| info.target != 0)
    }

    /// The device that it is attached to; `None` once somebody has detached it.
    pub fn device(&self) -> Option<u32> {
        self.info().map(|info| info.target)
    }

    /// Whether it is attached, and runs the program of this number, if that is known.
    pub(super) fn runs(&self, program: Option<u32>) -> bool {
        let info = self.info();
        info.is_some_and(|info| program.is_none_or(|program| info.prog_id == program))
    }

    /// Detaches it; its pin stays.
    ///
    /// # Errors
    /// It is of a kind that cannot be detached.
    pub fn detach(&self) -> io::Result<()> {
        bpf(BPF_LINK_DETACH, &self.fd()).map(drop)
    }
}

fn object(path: &CString, bpf_fd: u32) -> Object {
    Object {
        pathname: path.as_ptr() as u64,
        bpf_fd,
        file_flags: 0,
    }
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the command reads as many bytes as are given; what they point to lives until it returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    i32::try_from(result)
        .ok()
        .filter(|result| *result >= 0)
        .ok_or_else(io::Error::last_os_error)
}

/// Detaches the link of a pin and removes the pin. Without the first, the kernel detaches some time after the
/// last reference has gone. Both may have happened already.
pub(super) fn remove(pin: &Path) {
    let _ = Link::open(pin).and_then(|link| link.detach());
    let _ = fs::remove_file(pin);
}
