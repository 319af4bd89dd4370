//! Programs that run beside a measurement, and on which cores they do.

use std::{
    fs,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use forwarder_tests::{cpu, deadline::wait_for, netns::Netns};
use nix::{sched::sched_setaffinity, unistd::Pid};

/// A program that is killed when dropped.
#[derive(Debug)]
pub(crate) struct Process(Child);

impl Process {
    /// Starts a command line in a namespace; what it says goes nowhere.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn start(netns: &Netns, line: &str) -> Result<Self> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command line")?;
        let mut command = netns.command(program);
        command.args(words);
        Self::start_command(command).with_context(|| format!("start `{line}`"))
    }

    /// Starts a command; what it says goes nowhere.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn start_command(mut command: Command) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Who may run where. The kernel's part of forwarding runs where the packet was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Placement {
    /// Client, server and proxy share one core: what a conversation costs altogether.
    Same,
    /// The client has a core, the server and the proxy share another.
    Split,
    /// Nobody is pinned: what a user gets.
    Free,
}

impl Placement {
    pub(crate) const ALL: [Self; 3] = [Self::Same, Self::Split, Self::Free];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Same => "one core",
            Self::Split => "two cores",
            Self::Free => "unpinned",
        }
    }

    /// Cores of the client.
    pub(crate) fn client(self) -> &'static [usize] {
        match self {
            Self::Same => &[1],
            Self::Split => &[0],
            Self::Free => &[0, 1],
        }
    }

    /// Cores of the server and of a userland proxy.
    pub(crate) fn others(self) -> &'static [usize] {
        match self {
            Self::Same | Self::Split => &[1],
            Self::Free => &[0, 1],
        }
    }
}

/// Lets every thread of a process run on these cores only.
///
/// # Errors
/// It has ended.
pub(crate) fn pin(pid: u32, cores: &[usize]) -> Result<()> {
    let set = cpu::set(cores)?;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let number: i32 = thread?.file_name().to_string_lossy().parse()?;
        // A thread that has ended meanwhile needs no core.
        let _ = sched_setaffinity(Pid::from_raw(number), &set);
    }
    Ok(())
}

/// Waits until somebody listens on a port of a namespace (or is bound to it, for UDP).
///
/// # Errors
/// Nobody did in time.
pub(crate) fn wait_for_port(netns: &Netns, protocol: &str, port: u16) -> Result<()> {
    let wanted = format!(":{port:04X}");
    let held = || {
        netns.enter(|| {
            [protocol.to_owned(), format!("{protocol}6")]
                .iter()
                .any(|table| {
                    // Of the thread, which is in the namespace, not of the process.
                    let text = fs::read_to_string(format!("/proc/thread-self/net/{table}"));
                    let text = text.unwrap_or_default();
                    text.lines().skip(1).any(|line| {
                        let mut words = line.split_whitespace();
                        let local = words.nth(1).unwrap_or_default();
                        let state = words.nth(1).unwrap_or_default();
                        local.ends_with(&wanted) && ["0A", "07"].contains(&state)
                    })
                })
        })
    };
    wait_for(&format!("a server on port {port}/{protocol}"), || {
        held().then_some(())
    })
}

/// CPU time that this machine has spent on anything, in seconds, summed over cores (proc_stat(5)).
///
/// # Errors
/// `/proc` is not what it should be.
pub(crate) fn busy_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .map_while(|word| word.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq
    let [user, nice, system, _, _, irq, softirq, ..] = ticks[..] else {
        bail!("/proc/stat: {line}");
    };
    Ok((user + nice + system + irq + softirq) as f64 / 100.0)
}
