//! Devices whose other end is a process: tap with Ethernet headers, tun without.

#![expect(unsafe_code, reason = "an ioctl that no crate has")]

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use nix::poll::{PollFd, PollFlags, poll};

use crate::netns::Netns;

/// Flags of TUNSETIFF (include/uapi/linux/if_tun.h); no information in front of the packets.
#[derive(Debug, Clone, Copy)]
#[repr(i16)]
pub enum Kind {
    Tun = 0x1001,
    Tap = 0x1002,
}

/// A new device in a namespace; it goes when the file is closed.
///
/// # Errors
/// The kernel has no such devices, or the name is taken.
pub fn open(netns: &Netns, kind: Kind, name: &str) -> Result<File> {
    /// include/uapi/linux/if_tun.h
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    netns.enter(|| {
        let file = File::options().read(true).write(true).open("/dev/net/tun");
        let file = file.context("open /dev/net/tun")?;
        // SAFETY: this C structure is valid when all zero.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = kind as libc::c_short;
        // SAFETY: the request reads and writes one ifreq, which lives until it returns.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
        if done < 0 {
            return Err(io::Error::last_os_error()).with_context(|| format!("make {name}"));
        }
        Ok(file)
    })
}

/// A wire between two devices of the same kind: packets that leave by one come in by the other. Both go with it.
#[derive(Debug)]
pub struct Wire {
    end: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Wire {
    /// # Errors
    /// As [`open`].
    pub fn between(kind: Kind, ends: [(&Netns, &str); 2]) -> Result<Self> {
        let [a, b] = ends.map(|(netns, name)| open(netns, kind, name));
        let (a, b) = (a?, b?);
        let end = Arc::new(AtomicBool::new(false));
        let directions = [(a.try_clone()?, b.try_clone()?), (b, a)];
        let threads = directions.map(|(from, to)| {
            let end = Arc::clone(&end);
            std::thread::spawn(move || relay(&from, &to, &end))
        });
        Ok(Self {
            end,
            threads: threads.into(),
        })
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn relay(mut from: &File, mut to: &File, end: &AtomicBool) {
    const TICK: u8 = 20; // milliseconds
    let mut packet = vec![0; 1 << 16];
    while !end.load(Ordering::SeqCst) {
        let readable = poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], TICK);
        if readable.is_ok_and(|count| count > 0)
            && let Ok(length) = from.read(&mut packet)
        {
            // A device that is down takes nothing, as a wire that is cut.
            let _ = to.write_all(&packet[..length]);
        }
    }
}
