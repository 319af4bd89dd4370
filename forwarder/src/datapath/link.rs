//! Pinned links, by their pins: whether they are still attached, and detaching them. aya tells neither
//! (`struct bpf_link_info`, include/uapi/linux/bpf.h).

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

/// Commands of bpf(2).
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_DETACH: libc::c_long = 34;

/// The fields of `union bpf_attr` that each command reads.
#[repr(C)]
struct ObjGet {
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

/// What all links have, and what those to a device have first.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    _padding: u32,
    ifindex: u32,
    attach_type: u32,
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

fn open(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let get = ObjGet {
        pathname: path.as_ptr() as u64,
        bpf_fd: 0,
        file_flags: 0,
    };
    let fd = bpf(BPF_OBJ_GET, &get)?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The device that a link is attached to; `None` once somebody has detached it, or taken its pin away.
pub fn device(pin: &Path) -> Option<u32> {
    let link = open(pin).ok()?;
    let mut info = LinkInfo::default();
    let ask = Info {
        bpf_fd: link.as_raw_fd().cast_unsigned(),
        info_len: u32::try_from(size_of::<LinkInfo>()).unwrap_or(0),
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &ask).ok()?;
    Some(info.ifindex).filter(|ifindex| *ifindex != 0)
}

/// Detaches a link, whose pin stays.
///
/// # Errors
/// There is none, or it is of a kind that cannot be detached.
pub fn detach(pin: &Path) -> io::Result<()> {
    let link = open(pin)?;
    bpf(BPF_LINK_DETACH, &link.as_raw_fd().cast_unsigned()).map(drop)
}

/// Detaches a link and removes its pin. Without the first, the kernel detaches some time after the
/// last reference has gone. Both may have happened already.
pub(super) fn remove(pin: &Path) {
    let _ = detach(pin);
    let _ = fs::remove_file(pin);
}
