//! Frames that a device has summed up (CHECKSUM_COMPLETE) through a tc program: the kernel says whether the sum is still that
//! of the frame afterwards.

#![expect(unsafe_code, reason = "bpf(2) calls that aya does not have")]

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

/// BPF_PROG_TEST_RUN with BPF_F_TEST_SKB_CHECKSUM_COMPLETE (kernel 6.17 and later), for a frame that comes in by a device;
/// the program's action and the frame afterwards.
///
/// # Errors
/// The sum is not right any more (EBADMSG), or the kernel cannot be asked (EINVAL).
pub fn run(program: BorrowedFd<'_>, frame: &[u8], ifindex: u32) -> io::Result<(u32, Vec<u8>)> {
    /// A command of bpf(2), its flag, and the fields of `union bpf_attr` that it has (include/uapi/linux/bpf.h).
    const BPF_PROG_TEST_RUN: libc::c_long = 10;
    const BPF_F_TEST_SKB_CHECKSUM_COMPLETE: u32 = 1 << 2;
    #[repr(C)]
    #[derive(Default)]
    struct TestRun {
        program: i32,
        returned: u32,
        size_in: u32,
        size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        context_size_in: u32,
        context_size_out: u32,
        context_in: u64,
        context_out: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        reserved: u32,
    }
    /// The offset of `ifindex` in `struct __sk_buff`.
    const IFINDEX: usize = 40;
    let mut context = [0_u8; 192];
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    let mut after = vec![0; frame.len() + 256];
    let mut run = TestRun {
        program: program.as_raw_fd(),
        size_in: frame.len() as u32,
        size_out: after.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: after.as_mut_ptr() as u64,
        repeat: 1,
        context_size_in: context.len() as u32,
        context_in: context.as_ptr() as u64,
        flags: BPF_F_TEST_SKB_CHECKSUM_COMPLETE,
        ..TestRun::default()
    };
    // SAFETY: the kernel reads and writes as much of the buffers as it is told, and they live until it returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_TEST_RUN,
            &raw mut run,
            size_of::<TestRun>(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    after.truncate(run.size_out as usize);
    Ok((run.returned, after))
}
