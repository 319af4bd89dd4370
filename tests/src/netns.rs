//! Network namespaces: making them, running code and programs inside.
//!
//! A namespace has no name here. It is held by a file descriptor, so it is gone when its owner is,
//! however that ends, also by SIGKILL. `ip` reaches it by that descriptor's path in `/proc`.

#![expect(
    unsafe_code,
    reason = "children that begin in another namespace, and an ioctl"
)]

use std::{
    fs::{self, File},
    io::Write,
    net::{Ipv4Addr, UdpSocket},
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
    thread,
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::signal::{SigSet, Signal},
};

/// A network namespace; clones stand for the same one.
#[derive(Debug, Clone)]
pub struct Netns {
    label: String,
    file: Arc<File>,
}

impl Netns {
    /// A new, empty namespace whose `lo` is down.
    ///
    /// # Errors
    /// Needs `CAP_SYS_ADMIN`, and says so.
    pub fn new(label: &str) -> Result<Self> {
        let file = thread::scope(|scope| {
            let made = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                File::open("/proc/thread-self/ns/net").context("open the new namespace")
            });
            made.join().expect("no panic above")
        });
        let file = file.context("cannot make a network namespace (run as root)")?;
        Ok(Self {
            label: label.to_owned(),
            file: Arc::new(file),
        })
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn current() -> Result<Self> {
        let file = File::open("/proc/thread-self/ns/net").context("open the own namespace")?;
        Ok(Self {
            label: "here".to_owned(),
            file: Arc::new(file),
        })
    }

    /// The namespace of a process, such as a container's first.
    ///
    /// # Errors
    /// It has ended, or is not ours to look at.
    pub fn of(label: &str, process: u32) -> Result<Self> {
        let path = format!("/proc/{process}/ns/net");
        let file = File::open(&path).with_context(|| path.clone())?;
        Ok(Self {
            label: label.to_owned(),
            file: Arc::new(file),
        })
    }

    /// The namespaces that another process holds, such as the demonstration's.
    ///
    /// # Errors
    /// It has ended, or is not ours to look at.
    pub fn held_by(process: u32) -> Result<Vec<Self>> {
        let folder = format!("/proc/{process}/fd");
        let mut held = Vec::new();
        for entry in fs::read_dir(&folder).with_context(|| folder.clone())? {
            let path = entry?.path();
            // A descriptor that was closed meanwhile is none.
            let is_one =
                fs::read_link(&path).is_ok_and(|it| it.to_string_lossy().starts_with("net:"));
            if let (true, Ok(file)) = (is_one, File::open(&path)) {
                held.push(Self {
                    label: path.display().to_string(),
                    file: Arc::new(file),
                });
            }
        }
        Ok(held)
    }

    pub fn label(&self) -> &str {
        &self.label
    }

    /// A path by which other programs can open the namespace while this process lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Runs `inside` in a thread of its own in the namespace; its panic is passed on.
    pub fn enter<R: Send>(&self, inside: impl FnOnce() -> R + Send) -> R {
        let result = thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET).expect("enter a namespace of ours");
                inside()
            });
            thread.join()
        });
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// The MAC of a device.
    ///
    /// # Errors
    /// There is no such device, or it has none.
    pub fn mac(&self, device: &str) -> Result<[u8; 6]> {
        let shown = self.run(&format!("ip -j link show {device}"))?;
        let links: serde_json::Value = serde_json::from_str(&shown)?;
        let text = links[0]["address"].as_str().context("it has no MAC")?;
        let octets: Vec<u8> = text
            .split(':')
            .map(|octet| u8::from_str_radix(octet, 16))
            .collect::<Result<_, _>>()?;
        let octets = octets.try_into();
        octets.ok().with_context(|| format!("{text} is no MAC"))
    }

    /// Has it route packets of others, or not.
    pub fn forwards(&self, on: bool) -> Result<()> {
        self.enter(|| {
            for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                let path = format!("/proc/sys/net/{setting}");
                // Without IPv6 there is no such setting.
                if Path::new(&path).exists() {
                    fs::write(&path, u8::from(on).to_string()).context(path)?;
                }
            }
            Ok(())
        })
    }

    /// Sets one of its sysctls, by its path below `/proc/sys/net`.
    ///
    /// # Errors
    /// There is no such setting.
    pub fn set(&self, setting: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{setting}");
        self.enter(|| fs::write(&path, value).with_context(|| path.clone()))
    }

    /// Starts a thread in the namespace.
    pub fn spawn<R: Send + 'static>(
        &self,
        inside: impl FnOnce() -> R + Send + 'static,
    ) -> thread::JoinHandle<R> {
        let file = Arc::clone(&self.file);
        thread::spawn(move || {
            setns(&file, CloneFlags::CLONE_NEWNET).expect("enter a namespace of ours");
            inside()
        })
    }

    /// A command that will run in the namespace. Only the network changes: `/sys/fs/bpf` stays
    /// visible, which `ip netns exec` would hide. Ends with the thread that started it.
    pub fn command(&self, program: &str) -> Command {
        let file = Arc::clone(&self.file);
        let mut command = Command::new(program_path(program));
        let enter = move || {
            // SAFETY: the descriptor is open for as long as `file` lives, in the child too until
            // it executes the program.
            let namespace = unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) };
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
            // A program must not inherit that we wait for our signals instead of dying of them.
            SigSet::empty().thread_set_mask()?;
            Ok(())
        };
        // SAFETY: between fork and exec only system calls are made; nothing allocates.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Runs a program with arguments separated by spaces and returns its standard output.
    ///
    /// # Errors
    /// It cannot be started or fails; its standard error is part of the error.
    pub fn run(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let output = self
            .command(words.next().unwrap_or_default())
            .args(words)
            .output();
        finished(line, output.with_context(|| format!("start `{line}`"))?)
    }

    /// Runs a program with `input` as its standard input.
    ///
    /// # Errors
    /// As [`Netns::run`].
    pub fn feed(&self, line: &str, input: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let mut command = self.command(words.next().unwrap_or_default());
        command
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start `{line}`"))?;
        // A program that does not read all of it fails, and its own message is the better one.
        let _ = child
            .stdin
            .take()
            .context("piped above")?
            .write_all(input.as_bytes());
        finished(&format!("{line}\n{input}"), child.wait_with_output()?)
    }

    /// Has a device's packets leave with complete checksums, as from a network card that computes none, so that who
    /// receives them verifies them.
    ///
    /// # Errors
    /// No such device, or it cannot do without.
    pub fn complete_checksums(&self, device: &str) -> Result<()> {
        /// include/uapi/linux/sockios.h, include/uapi/linux/ethtool.h
        const SIOCETHTOOL: libc::c_ulong = 0x8946;
        const ETHTOOL_STXCSUM: u32 = 0x17;
        self.enter(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            let mut value = [ETHTOOL_STXCSUM, 0];
            // SAFETY: this C structure is valid when all zero.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
                *to = from.cast_signed();
            }
            request.ifr_ifru.ifru_data = (&raw mut value).cast();
            // SAFETY: the request reads and writes two words, which live until it returns.
            let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
            if done < 0 {
                return Err(std::io::Error::last_os_error())
                    .with_context(|| format!("turn off checksum offload of {device}"));
            }
            Ok(())
        })
    }

    /// Runs `ip` commands, one a line, by one process. A kernel without IPv6 is spared such addresses and routes.
    ///
    /// # Errors
    /// The first that fails ends the batch.
    pub fn ip(&self, commands: &str) -> Result<()> {
        let possible: String = commands
            .lines()
            .filter(|line| has_ipv6() || !names_ipv6(line))
            .flat_map(|line| [line, "\n"])
            .collect();
        self.feed("ip -batch -", &possible)
            .with_context(|| format!("in {}", self.label))
            .map(drop)
    }
}

/// Whether a command of `ip` is about an IPv6 address or route.
fn names_ipv6(command: &str) -> bool {
    let mut words = command.split_whitespace();
    let about = words.next();
    matches!(about, Some("addr" | "route")) && words.nth(1).is_some_and(|word| word.contains(':'))
}

fn finished(what: &str, output: Output) -> Result<String> {
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("`{what}` failed ({}): {}", output.status, errors.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether the kernel was started with IPv6.
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Where a program is; a user's PATH often lacks the folders where `ip` and `nft` live.
fn program_path(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(usual)
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| PathBuf::from(program))
}
