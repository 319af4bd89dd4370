//! A clean Debian that has booted: systemd as process 1 in namespaces of its own, on an overlay, in a network namespace of
//! the tests. What happens in it is gone with it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{deadline::wait_for, netns::Netns};

/// Process 1 in the making. $1 is the clean root, $2 a folder for what changes, $3 a cgroup of its own.
const BOOT: &str = r#"
set -e
mkdir "$2/upper" "$2/work" "$2/root"
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" overlay "$2/root"
cd "$2/root"
mount -t proc proc proc
mount -t sysfs sys sys
mount -t cgroup2 cgroup sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
mount -t tmpfs -o mode=755 dev dev
for node in null zero full random urandom tty; do
    touch "dev/$node"
    mount --bind "/dev/$node" "dev/$node"
done
mkdir dev/pts dev/shm old
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs run run
pivot_root . old
exec chroot . sh -c 'umount -l /old && rmdir /old && exec env -i container=forwarder /lib/systemd/systemd'
"#;

/// Enters the cgroup, then makes the namespaces, of which the cgroup's root is this one. The machine ends with the test, also
/// if that is killed: unshare(1) ignores the SIGTERM that it would get.
const ENTER: &str = r#"
echo $$ >"$3/cgroup.procs"
exec setpriv --pdeathsig KILL unshare --mount --uts --ipc --pid --cgroup --fork --kill-child sh -c "$BOOT" sh "$@"
"#;

/// What the names of the machines' cgroups begin with.
const CGROUP: &str = "forwarder-test-";

/// A machine that runs; dropped, it is switched off.
#[derive(Debug)]
pub struct Machine {
    /// `unshare`, whose only child is process 1.
    child: Child,
    /// Process 1, as this machine numbers it.
    init: u32,
    cgroup: PathBuf,
    /// What it has changed of the clean root; removed with it.
    _changes: tempfile::TempDir,
}

impl Machine {
    /// Boots `root` in `netns`.
    ///
    /// # Errors
    /// No cgroup v2, or systemd says that something failed.
    pub fn boot(root: &Path, netns: &Netns) -> Result<Self> {
        let changes = tempfile::tempdir()?;
        let all = cgroups()?;
        // What tests have left that were killed: those with processes stay.
        for entry in fs::read_dir(&all)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(CGROUP) {
                remove_cgroups(&entry.path());
            }
        }
        let name = changes.path().file_name().context("a folder has a name")?;
        let cgroup = all.join(format!(
            "{CGROUP}{}",
            name.to_string_lossy().trim_start_matches('.')
        ));
        fs::create_dir(&cgroup).with_context(|| cgroup.display().to_string())?;
        let child = netns
            .command("sh")
            .args(["-c", ENTER, "sh"])
            .args([root, changes.path(), &cgroup])
            .env("BOOT", BOOT)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("start the machine")?;
        let mut machine = Self {
            child,
            init: 0,
            cgroup,
            _changes: changes,
        };
        let parent = machine.child.id();
        let children = format!("/proc/{parent}/task/{parent}/children");
        machine.init = wait_for("the machine's process 1", || {
            fs::read_to_string(&children).ok()?.trim().parse().ok()
        })?;
        wait_for("systemd", || {
            machine.run("test -S /run/systemd/private").ok()
        })?;
        let state = machine.run("systemctl is-system-running --wait")?;
        if state.trim() != "running" {
            bail!(
                "the machine is {}: {}",
                state.trim(),
                machine.run("systemctl --failed")?
            );
        }
        Ok(machine)
    }

    /// A command line for the machine's shell.
    fn shell(&self, line: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args([
                "--target",
                &self.init.to_string(),
                "--all",
                "env",
                "-i",
                "HOME=/root",
                "LC_ALL=C.UTF-8",
            ])
            .args([
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "sh",
                "-c",
                line,
            ])
            .current_dir("/")
            .stdin(Stdio::null());
        command
    }

    /// Runs a command line as root and returns its standard output.
    ///
    /// # Errors
    /// It fails; with all that it printed.
    pub fn run(&self, line: &str) -> Result<String> {
        let output = self.shell(line).output().context("nsenter")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!(
                "`{line}` ({}): {text}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(text)
    }

    /// Puts a file of this machine into it.
    ///
    /// # Errors
    /// No such file.
    pub fn put(&self, from: &Path, to: &str) -> Result<()> {
        let path = format!("/proc/{}/root{to}", self.init);
        fs::copy(from, path)
            .with_context(|| from.display().to_string())
            .map(drop)
    }

    /// All files and folders but those of a running system's own: logs, caches, package lists, processes and devices. Pins and
    /// sockets are among them.
    ///
    /// # Errors
    /// `find` fails.
    pub fn files(&self) -> Result<BTreeSet<String>> {
        let pruned = [
            "/proc",
            "/dev",
            "/tmp",
            "/var/log",
            "/var/cache",
            "/var/tmp",
            "/var/lib/apt",
            "/var/lib/systemd",
            "/var/lib/private",
            "/run/systemd",
            "/run/log",
            "/run/lock",
            "/sys",
        ]
        .map(|path| format!("-path {path} -prune"))
        .join(" -o ");
        let found = self.run(&format!(
            "find / \\( {pruned} \\) -o -print; find /sys/fs/bpf"
        ))?;
        Ok(found.lines().map(str::to_owned).collect())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Its namespace of processes ends with process 1.
        if self.init != 0 {
            let _ = kill(Pid::from_raw(self.init.cast_signed()), Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = wait_for("the machine's cgroups", || {
            remove_cgroups(&self.cgroup);
            (!self.cgroup.exists()).then_some(())
        });
    }
}

/// Removes a cgroup and those below it that have no processes.
fn remove_cgroups(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroups(&entry.path());
        }
    }
    let _ = fs::remove_dir(cgroup);
}

/// Where cgroup v2 is mounted.
fn cgroups() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let found = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    found.context("cgroup v2 is not mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup")
}
