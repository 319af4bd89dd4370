//! The daemon under test: starting it, asking it, ending it.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::de::DeserializeOwned;

use crate::{
    deadline::wait_for,
    document::{Counter, Finding, Row},
    netns::Netns,
    service::{AS_SERVICE, Manager},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Datapath {
    Auto,
    Ebpf,
    Userland,
}

impl Datapath {
    /// As on the command line and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Ebpf => "ebpf",
            Self::Userland => "userland",
        }
    }
}

/// Runs what follows as root without a single capability.
pub const WITHOUT_CAPABILITIES: [&str; 4] =
    ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"];
/// Runs what follows where the kernel's description of its types is not to be found.
pub const WITHOUT_BTF: [&str; 6] = [
    "unshare",
    "--mount",
    "sh",
    "-c",
    "mount -t tmpfs none /sys/kernel/btf && exec \"$@\"",
    "sh",
];
/// Runs what follows where nothing can be pinned.
pub const WITHOUT_BPFFS: [&str; 6] = [
    "unshare",
    "--mount",
    "sh",
    "-c",
    "mount -t tmpfs none /sys/fs/bpf && exec \"$@\"",
    "sh",
];

/// A running `forwarder run`; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    netns: Netns,
    instance: String,
    /// The command line.
    words: Vec<String>,
    output: Output,
    /// Of which it is a service.
    manager: Option<Manager>,
    /// It was asked to end by itself.
    stopped: bool,
}

/// What it has written so far.
#[derive(Debug, Clone, Default)]
struct Output {
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
}

impl Daemon {
    /// Starts it in `netns` and waits until it says `ready`.
    ///
    /// # Errors
    /// It ends instead, or says nothing in time; with all that it wrote.
    pub fn start(netns: &Netns, specs: &[&str], datapath: Datapath) -> Result<Self> {
        Self::start_with(netns, specs, datapath, &[])
    }

    /// As [`Daemon::start`], with further flags of `run`.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn start_with(
        netns: &Netns,
        specs: &[&str],
        datapath: Datapath,
        flags: &[&str],
    ) -> Result<Self> {
        Self::start_wrapped(netns, &[], specs, datapath, flags)
    }

    /// As [`Daemon::start_with`], by a program that takes something away, such as [`WITHOUT_CAPABILITIES`].
    ///
    /// # Errors
    /// As [`Daemon::start`], or there is no such program.
    pub fn start_wrapped(
        netns: &Netns,
        wrapper: &[&str],
        specs: &[&str],
        datapath: Datapath,
        flags: &[&str],
    ) -> Result<Self> {
        let flags = [&["--ephemeral"], flags].concat();
        Self::start_anew(netns, (wrapper, None), specs, datapath, &flags)
    }

    /// As [`Daemon::start_with`], but what is published at run time survives a restart; until it is dropped.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn start_with_state(
        netns: &Netns,
        specs: &[&str],
        datapath: Datapath,
        flags: &[&str],
    ) -> Result<Self> {
        Self::start_anew(netns, (&[], None), specs, datapath, flags)
    }

    /// As [`Daemon::start_with_state`], as a service of systemd, which keeps its descriptors.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn start_as_service(
        netns: &Netns,
        specs: &[&str],
        datapath: Datapath,
        flags: &[&str],
    ) -> Result<Self> {
        let manager = Some(Manager::new()?);
        Self::start_anew(netns, (&AS_SERVICE, manager), specs, datapath, flags)
    }

    /// What systemd keeps of it, by name.
    pub fn stored(&self) -> Vec<String> {
        self.manager
            .as_ref()
            .map(Manager::names)
            .unwrap_or_default()
    }

    /// The service manager, of a service.
    ///
    /// # Errors
    /// It is none.
    pub fn manager(&self) -> Result<&Manager> {
        self.manager.as_ref().context("no service")
    }

    /// What `systemctl restart` does: the next process takes over from this one.
    ///
    /// # Errors
    /// It does not end in time, or the next one does not start.
    pub fn hand_over(&mut self) -> Result<()> {
        self.quit()?;
        self.restart()
    }

    /// Has it leave everything to the next process.
    ///
    /// # Errors
    /// It does not end in time, or not well.
    pub fn quit(&mut self) -> Result<()> {
        self.signal(Signal::SIGQUIT)?;
        let child = &mut self.child;
        let status = wait_for("the end of forwarder", || child.try_wait().ok().flatten())
            .with_context(|| text(&self.output.stderr))?;
        ensure!(status.success(), "{status}: {}", text(&self.output.stderr));
        Ok(())
    }

    fn start_anew(
        netns: &Netns,
        (wrapper, manager): (&[&str], Option<Manager>),
        specs: &[&str],
        datapath: Datapath,
        flags: &[&str],
    ) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // A name may have dots, though bpffs takes none.
        let instance = format!("test-{}.{number}", std::process::id());
        let binary = binary().to_string_lossy().into_owned();
        let mut words: Vec<&str> = wrapper.to_vec();
        words.extend([binary.as_str(), "run", "--instance", &instance]);
        words.extend(["--datapath", datapath.name()]);
        words.extend(flags);
        words.extend(specs.iter().flat_map(|spec| ["-p", *spec]));
        let words: Vec<String> = words.into_iter().map(Into::into).collect();
        let (child, output) = spawn(netns, &words, manager.as_ref())?;
        let mut daemon = Self {
            child,
            netns: netns.clone(),
            instance,
            words,
            output,
            manager,
            stopped: false,
        };
        daemon.wait_until_ready()?;
        Ok(daemon)
    }

    /// Kills it, so that it cannot clean up.
    ///
    /// # Errors
    /// It has ended already.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// Ends it as systemd does, for a [`Daemon::restart`].
    ///
    /// # Errors
    /// It does not end in time.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        let child = &mut self.child;
        wait_for("the end of forwarder", || child.try_wait().ok().flatten())
            .with_context(|| self.said())
    }

    /// Where its programs and maps are pinned.
    pub fn pins(&self) -> PathBuf {
        PathBuf::from("/sys/fs/bpf/forwarder").join(self.instance.replace('.', "%"))
    }

    /// The pins of its links, where attachments are links.
    pub fn links(&self) -> Vec<PathBuf> {
        let layouts = fs::read_dir(self.pins()).into_iter().flatten().flatten();
        let links = layouts.flat_map(|layout| fs::read_dir(layout.path().join("links")));
        let mut links: Vec<_> = links.flatten().flatten().map(|link| link.path()).collect();
        links.sort();
        links
    }

    /// Starts it again as it was, after [`Daemon::kill`].
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn restart(&mut self) -> Result<()> {
        (self.child, self.output) = spawn(&self.netns, &self.words, self.manager.as_ref())?;
        self.wait_until_ready()
    }

    /// The same with other words of its command line.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn restart_with(&mut self, change: impl FnOnce(&mut Vec<String>)) -> Result<()> {
        change(&mut self.words);
        self.restart()
    }

    /// Runs `forwarder trace` until it has printed a line that `wanted` takes, with `traffic` meanwhile.
    ///
    /// # Errors
    /// No such line in time; with what there was.
    pub fn trace(
        &self,
        arguments: &[&str],
        wanted: impl Fn(&str) -> bool,
        mut traffic: impl FnMut(),
    ) -> Result<String> {
        let mut words = vec![binary().to_string_lossy().into_owned(), "trace".into()];
        words.extend(arguments.iter().map(|&argument| argument.into()));
        words.extend(["--instance".into(), self.instance.clone()]);
        let (mut child, output) = spawn(&self.netns, &words, None)?;
        let found = wait_for("the packet in the trace", || {
            traffic();
            let text = text(&output.stdout);
            text.lines().find(|line| wanted(line)).map(Into::into)
        });
        child.kill()?;
        child.wait()?;
        found.with_context(|| format!("{}{}", text(&output.stdout), text(&output.stderr)))
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let outcome = wait_for("`ready` from forwarder", || {
            if text(&self.output.stdout)
                .lines()
                .any(|line| line == "ready")
            {
                return Some(Ok(()));
            }
            match self.child.try_wait() {
                Ok(None) => None,
                // What it wrote last may not have been read yet.
                Ok(Some(_)) if Arc::strong_count(&self.output.stderr) > 1 => None,
                Ok(Some(status)) => Some(Err(anyhow::anyhow!("forwarder ended, {status}"))),
                Err(error) => Some(Err(error.into())),
            }
        });
        outcome.and_then(|inner| inner).with_context(|| self.said())
    }

    /// Everything that it wrote, for the message of a failure.
    pub fn said(&self) -> String {
        format!(
            "forwarder's output:\n{}forwarder's errors:\n{}",
            text(&self.output.stdout),
            text(&self.output.stderr)
        )
    }

    pub fn instance(&self) -> &str {
        &self.instance
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs another command of `forwarder` against this instance, such as `publish SPEC`, and
    /// returns its standard output.
    ///
    /// # Errors
    /// It fails.
    pub fn control(&self, arguments: &[&str]) -> Result<String> {
        let mut command = forwarder(&self.netns);
        let output = command
            .args(arguments)
            .args(["--instance", &self.instance])
            .output()?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            bail!(
                "`forwarder {}`: {}: {}",
                arguments.join(" "),
                output.status,
                errors.trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Its control socket.
    pub fn socket(&self) -> PathBuf {
        PathBuf::from(format!("/run/forwarder/{}.sock", self.instance))
    }

    /// The document that a command prints, such as `list`.
    ///
    /// # Errors
    /// It fails, or prints another kind of document.
    pub fn document<T: DeserializeOwned>(&self, words: &[&str]) -> Result<T> {
        let text = self.control(&[words, &["--json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("{}: {text}", words.join(" ")))
    }

    /// What is published.
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn list(&self) -> Result<Vec<Row>> {
        self.document(&["list"])
    }

    /// A counter of the eBPF program, by the name of its reason; the proxy has no part in it.
    ///
    /// # Errors
    /// The daemon does not answer, or has no such counter.
    pub fn counted(&self, reason: &str) -> Result<u64> {
        self.counts([reason]).map(|[count]| count)
    }

    /// Several counters, as they were at one moment.
    ///
    /// # Errors
    /// As [`Daemon::counted`].
    pub fn counts<const N: usize>(&self, reasons: [&str; N]) -> Result<[u64; N]> {
        let counters: Vec<Counter> = self.document(&["stats"])?;
        let mut counts = [0; N];
        for (count, reason) in counts.iter_mut().zip(reasons) {
            let counter = counters.iter().find(|counter| counter.reason == reason);
            let counter = counter.with_context(|| format!("no counter {reason}: {counters:?}"))?;
            *count = counter.packets;
        }
        Ok(counts)
    }

    /// The only publish.
    ///
    /// # Errors
    /// There are others, or none.
    pub fn entry(&self) -> Result<Row> {
        let mut rows = self.list()?;
        let count = rows.len();
        ensure!(count == 1, "not one publish but {count}: {rows:?}");
        Ok(rows.remove(0))
    }

    /// Numbers of the BPF programs that the daemon holds.
    ///
    /// # Errors
    /// It has ended.
    pub fn programs(&self) -> Result<Vec<u32>> {
        let mut programs = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fdinfo", self.child.id()))? {
            // A descriptor that was closed meanwhile is none.
            let Ok(information) = std::fs::read_to_string(entry?.path()) else {
                continue;
            };
            let numbers = information
                .lines()
                .filter_map(|line| line.strip_prefix("prog_id:"));
            programs.extend(numbers.filter_map(|number| number.trim().parse::<u32>().ok()));
        }
        programs.sort_unstable();
        programs.dedup();
        Ok(programs)
    }

    /// How many of something it has: open files (`fd`) or threads (`task`).
    ///
    /// # Errors
    /// It has ended.
    pub fn held(&self, what: &str) -> Result<usize> {
        let folder = format!("/proc/{}/{what}", self.pid());
        Ok(fs::read_dir(folder)?.count())
    }

    /// Its resident memory, in MiB.
    ///
    /// # Errors
    /// It has ended.
    pub fn resident(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().next());
        let kilobytes: u64 = kilobytes.context("no VmRSS")?.parse()?;
        Ok(kilobytes >> 10)
    }

    /// Ends it as Ctrl-C does.
    ///
    /// # Errors
    /// It does not end in time, or not with exit status 0; with all that it wrote.
    pub fn stop(mut self) -> Result<()> {
        self.stopped = true;
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT).context("interrupt")?;
        let child = &mut self.child;
        let status = wait_for("the end of forwarder", || child.try_wait().ok().flatten())
            .with_context(|| self.said())?;
        ensure!(
            status.success(),
            "forwarder ended with {status}\n{}",
            self.said()
        );
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // What was published at run time outlives it, unless it is ephemeral.
        let is_ephemeral = self.words.iter().any(|word| word == "--ephemeral");
        let has_ended = self.stopped && matches!(self.child.try_wait(), Ok(Some(_)));
        if has_ended && is_ephemeral {
            return;
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Killed, it leaves its pins on purpose.
        let _ = self.control(&["down"]);
        if thread::panicking() {
            eprintln!("{}", self.said());
        }
    }
}

/// Runs `forwarder run` with flags that must make it fail, and returns status and standard error.
///
/// # Errors
/// It does not end in time.
pub fn run_to_failure(netns: &Netns, flags: &[&str]) -> Result<(ExitStatus, String)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let instance = format!("failing-{}-{number}", std::process::id());
    let mut command = forwarder(netns);
    command
        .args(["run", "--ephemeral", "--instance", &instance])
        .args(flags);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().context("start forwarder")?;
    let ended = wait_for("forwarder ends by itself", || {
        child.try_wait().ok().flatten()
    });
    if ended.is_err() {
        let _ = child.kill();
    }
    let mut errors = String::new();
    child
        .stderr
        .take()
        .context("piped above")?
        .read_to_string(&mut errors)?;
    child.wait()?;
    Ok((ended?, errors))
}

/// Starts an instance, interrupts it as soon as it has pinned something, and returns how it ended and where its
/// pins were.
///
/// # Errors
/// It pins nothing, or does not end in time.
pub fn interrupt_at_start(netns: &Netns, specs: &[&str]) -> Result<(ExitStatus, PathBuf)> {
    let instance = format!("interrupted-{}", std::process::id());
    let binary = binary().to_string_lossy().into_owned();
    let mut words = vec![binary.as_str(), "run", "--ephemeral"];
    words.extend(["--instance", &instance]);
    words.extend(specs.iter().flat_map(|spec| ["-p", *spec]));
    let words: Vec<String> = words.into_iter().map(Into::into).collect();
    let (mut child, _) = spawn(netns, &words, None)?;
    let pins = PathBuf::from("/sys/fs/bpf/forwarder").join(&instance);
    let ended = wait_for("the first pin", || pins.exists().then_some(())).and_then(|()| {
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT)?;
        wait_for("the end of forwarder", || child.try_wait().ok().flatten())
    });
    let _ = child.kill();
    child.wait()?;
    Ok((ended?, pins))
}

/// The findings of `forwarder doctor --json`, by their checks.
///
/// # Errors
/// It fails.
pub fn doctor(netns: &Netns, wrapper: &[&str]) -> Result<BTreeMap<String, Finding>> {
    let binary = binary().to_string_lossy().into_owned();
    let words = [wrapper, &[binary.as_str(), "doctor", "--json"]].concat();
    let output = netns.command(words[0]).args(&words[1..]).output()?;
    ensure!(output.status.success(), "`forwarder doctor`: {output:?}");
    let findings: Vec<Finding> = serde_json::from_slice(&output.stdout)?;
    let findings = findings.into_iter();
    Ok(findings.map(|it| (it.check.clone(), it)).collect())
}

/// Removes what an instance that has ended left.
///
/// # Errors
/// It fails.
pub fn down(netns: &Netns, instance: &str) -> Result<()> {
    let output = forwarder(netns)
        .args(["down", "--instance", instance])
        .output()?;
    ensure!(output.status.success(), "`forwarder down`: {output:?}");
    Ok(())
}

/// Starts a command line in a namespace, its output collected.
fn spawn(netns: &Netns, words: &[String], manager: Option<&Manager>) -> Result<(Child, Output)> {
    let (program, arguments) = words.split_first().context("an empty command line")?;
    let mut command = netns.command(program);
    // A Ctrl-C at the terminal is for whoever started us, who then ends the daemon.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    manager.map_or(Ok(()), |manager| manager.hand_to(&mut command))?;
    let mut child = command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let output = Output::default();
    let stdout = child.stdout.take().context("piped above")?;
    let stderr = child.stderr.take().context("piped above")?;
    collect(stdout, Arc::clone(&output.stdout));
    collect(stderr, Arc::clone(&output.stderr));
    Ok((child, output))
}

/// `forwarder` in a namespace.
pub fn forwarder(netns: &Netns) -> Command {
    netns.command(&binary().to_string_lossy())
}

/// `FORWARDER_BIN`, else the one in the target folder that we were built into.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("FORWARDER_BIN") {
        return path.into();
    }
    let own = std::env::current_exe().unwrap_or_default();
    let folders = own.ancestors().skip(1).take(2);
    let mut candidates = folders.map(|folder| folder.join("forwarder"));
    candidates
        .find(|path| path.is_file())
        .unwrap_or_else(|| "forwarder".into())
}

/// Another program that is built with it.
pub fn program(name: &str) -> PathBuf {
    binary().with_file_name(name)
}

/// Makes an executable file, in a process of its own: nobody can run a file that anybody has open for writing, as a child of
/// another test would have this process's until it is another program.
///
/// # Errors
/// It cannot be written.
pub fn make_program(path: &Path, content: &[u8]) -> Result<()> {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "cat > \"$0\" && chmod 755 \"$0\""])
        .arg(path);
    let mut shell = shell.stdin(Stdio::piped()).spawn()?;
    shell.stdin.take().context("no pipe")?.write_all(content)?;
    ensure!(shell.wait()?.success(), "write {}", path.display());
    Ok(())
}

fn collect(from: impl Read + Send + 'static, into: Arc<Mutex<String>>) {
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let mut text = into.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            text.push_str(&line);
            text.push('\n');
        }
    });
}

fn text(of: &Mutex<String>) -> String {
    of.lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
        .clone()
}
