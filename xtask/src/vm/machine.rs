//! One boot of a kernel under QEMU: the command's output line by line, its exit status, and an end to it.
//!
//! Always by QEMU's own emulator, which every machine has. One thread for all of the guest's processors: with
//! several, QEMU 7.2 breaks the kernel's patching of its own code ("Oops: int3").

#![expect(unsafe_code, reason = "a child that ends with its parent")]

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::kernel::{Kernel, folder};

/// With its Debian package.
pub(super) const EMULATOR: &str = "qemu-system-x86_64";
const MEMORY: &str = "4096M";
/// The emulated timer may be late when the kernel looks whether it ticks.
const PARAMETERS: &str = "console=ttyS0 quiet panic=-1 oops=panic mitigations=off no_timer_check";

/// Ends the emulator however we leave.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The folder of one boot, which goes with it.
struct Work(PathBuf);

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Boots `kernel` with `root` (an initramfs without the modules), hands each line of output to `line`, and
/// returns the command's exit status.
pub(crate) fn boot(
    kernel: &Kernel,
    root: &[u8],
    parameters: &str,
    limit: Duration,
    mut line: impl FnMut(&str),
) -> Result<i32> {
    let own = format!("{}-{}", std::process::id(), kernel.name);
    let work = Work(folder().join("run").join(own));
    fs::create_dir_all(&work.0)?;
    let [initrd, console, status] = ["initrd", "console", "status"].map(|name| work.0.join(name));
    let mut whole = fs::read(&kernel.modules)?;
    whole.extend_from_slice(root);
    fs::write(&initrd, whole)?;
    File::create(&status)?;

    let mut command = Command::new(EMULATOR);
    command
        .args(["-machine", "pc", "-accel", "tcg,thread=single"])
        .args(["-cpu", "Nehalem,+rdrand", "-smp", "2", "-m", MEMORY])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(&initrd)
        .args(["-append", &format!("{PARAMETERS} {parameters}")])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-serial", "stdio", "-serial"])
        .arg(format!("file:{}", status.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    // A machine without anybody who waits for it would run on.
    let end_with_us = || {
        // SAFETY: sets an attribute of the calling process and reads no memory.
        let done = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    // SAFETY: one system call between fork and exec; nothing allocates.
    unsafe { command.pre_exec(end_with_us) };
    let mut machine = Running(command.spawn().context("cannot start qemu-system-x86_64")?);
    let lines = lines(machine.0.stdout.take().context("piped above")?);
    let deadline = Instant::now() + limit;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(text) => line(&text),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                bail!(
                    "kernel {}: no end after {} s; --timeout sets the limit{}",
                    kernel.name,
                    limit.as_secs(),
                    last_words(&console)
                );
            }
        }
    }
    drop(machine);
    let said = fs::read_to_string(&status)?;
    let Ok(said) = said.trim().parse() else {
        bail!(
            "kernel {} ended without a status{}",
            kernel.name,
            last_words(&console)
        );
    };
    Ok(said)
}

fn lines(from: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut bytes = Vec::new();
        while from
            .read_until(b'\n', &mut bytes)
            .is_ok_and(|read| read > 0)
        {
            let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            bytes.clear();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// The end of the kernel's log.
fn last_words(console: &Path) -> String {
    let bytes = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(20)..];
    if last.is_empty() {
        return String::new();
    }
    format!("; its log ends with\n{}", last.join("\n"))
}
