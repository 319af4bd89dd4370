//! What systemd does for a service that has FileDescriptorStoreMax= and Type=notify: keeps descriptors that it is sent, answers
//! barriers, and hands all to the next start (sd_notify(3), sd_listen_fds(3)).

#![expect(
    unsafe_code,
    reason = "descriptors for a child, as systemd hands them over"
)]

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::{net::UnixDatagram, process::CommandExt as _},
    },
    path::PathBuf,
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use forwarder::{proxy::raise_descriptor_limit, rights};
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::socket::MsgFlags,
};

use crate::deadline::wait_until;

type Kept = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// The service manager of one service.
#[derive(Debug)]
pub struct Manager {
    socket: PathBuf,
    kept: Kept,
}

/// To be run by a shell that becomes the service, as only that knows its number.
pub const AS_SERVICE: [&str; 4] = ["sh", "-c", "export LISTEN_PID=$$; exec \"$@\"", "sh"];

/// The first descriptor that is handed over (SD_LISTEN_FDS_START).
const FIRST: RawFd = 3;
/// Above all that a command has open.
const ABOVE: RawFd = 4096;

impl Manager {
    /// # Errors
    /// No socket can be made.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        raise_descriptor_limit(); // for the copies
        let name = format!("forwarder-notify-{}-{number}", std::process::id());
        let socket = std::env::temp_dir().join(name);
        let listener = UnixDatagram::bind(&socket).context("bind the socket of a service")?;
        let kept = Kept::default();
        let manager = Self {
            socket,
            kept: kept.clone(),
        };
        thread::spawn(move || while heed(&listener, &kept).is_ok() {});
        Ok(manager)
    }

    fn kept(&self) -> MutexGuard<'_, Vec<(String, OwnedFd)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names of what is kept, in order.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.kept().iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    /// Has copies of all that is kept outlive it by so long, as in a process that is just being started.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn copy_for(&self, longer: Duration) -> Result<()> {
        let copies: Vec<OwnedFd> = {
            let kept = self.kept();
            let copies = kept.iter().map(|(_, descriptor)| descriptor.try_clone());
            copies.collect::<io::Result<_>>()?
        };
        let kept = self.kept.clone();
        thread::spawn(move || {
            wait_until("something is kept no more", || {
                kept.lock().unwrap_or_else(PoisonError::into_inner).len() < copies.len()
            });
            thread::sleep(longer);
            drop(copies);
        });
        Ok(())
    }

    /// Waits until all that was sent before is heeded: systemd reads messages before it sees that a process has ended.
    fn settle(&self) -> Result<()> {
        let (ours, theirs) = io::pipe()?;
        let sender = UnixDatagram::unbound()?;
        sender.connect(&self.socket)?;
        let barrier = [io::IoSlice::new(b"BARRIER=1")];
        rights::send(&sender, &barrier, &[theirs.as_fd()], MsgFlags::empty())?;
        drop(theirs);
        io::copy(&mut &ours, &mut io::sink())?; // until the other end is closed
        Ok(())
    }

    /// Closes what has a name, as if it had never been kept.
    pub fn lose(&self, name: &str) {
        self.kept().retain(|(it, _)| it != name);
    }

    /// Has a command, which runs [`AS_SERVICE`], find what is kept.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn hand_to(&self, command: &mut Command) -> Result<()> {
        self.settle()?;
        let kept = self.kept();
        let names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
        command.env("NOTIFY_SOCKET", &self.socket);
        if !kept.is_empty() {
            command
                .env("LISTEN_FDS", kept.len().to_string())
                .env("LISTEN_FDNAMES", names.join(":"));
        }
        let mut handed = Vec::new();
        for (_, descriptor) in kept.iter() {
            let copy = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(ABOVE))?;
            // SAFETY: the kernel has just made it.
            handed.push(unsafe { OwnedFd::from_raw_fd(copy) });
        }
        let put = move || {
            for (number, descriptor) in (FIRST..).zip(&handed) {
                // SAFETY: between fork and exec nothing else uses these numbers any more.
                if unsafe { libc::dup2(descriptor.as_raw_fd(), number) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: between fork and exec only system calls are made; nothing allocates.
        unsafe { command.pre_exec(put) };
        Ok(())
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
    }
}

/// Receives one message and does what it says.
fn heed(listener: &UnixDatagram, kept: &Kept) -> io::Result<()> {
    let mut text = [0; 4096];
    let (length, descriptors) = rights::receive::<253>(listener, &mut text, MsgFlags::empty())?;
    let text = String::from_utf8_lossy(&text[..length]).into_owned();
    let value = |key: &str| {
        let mut lines = text.lines();
        lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned))
    };
    let name = value("FDNAME").unwrap_or_else(|| "stored".into());
    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    if value("FDSTOREREMOVE").is_some() {
        kept.retain(|(it, _)| *it != name);
    } else if value("FDSTORE").is_some() {
        for descriptor in descriptors {
            // What is there already is not kept twice.
            if !kept.iter().any(|(_, it)| is_same(it, &descriptor)) {
                kept.push((name.clone(), descriptor));
            }
        }
    }
    Ok(()) // a barrier's descriptor is closed
}

/// Whether two descriptors are of one open file (kcmp(2)).
fn is_same(one: &OwnedFd, other: &OwnedFd) -> bool {
    const KCMP_FILE: libc::c_int = 0;
    let own = std::process::id();
    // SAFETY: the call compares two numbers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            own,
            own,
            KCMP_FILE,
            one.as_raw_fd(),
            other.as_raw_fd(),
        )
    };
    result == 0
}
