//! The guest's root: an archive that the kernel unpacks into memory (cpio "newc", as the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst has it), and what goes into it: programs with
//! the libraries that they are linked with, and the script that runs as process 1.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::exec;

/// An archive in the making. Folders are made as they are needed; what is there already stays.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: BTreeSet<String>,
}

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;

impl Archive {
    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        if !self.entries.insert(path.to_owned()) {
            return;
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.folder(parent);
        }
        self.record(path, mode, content);
    }

    fn record(&mut self, path: &str, mode: u32, content: &[u8]) {
        let number = self.entries.len();
        let links = 1;
        self.bytes.extend_from_slice(b"070701");
        for field in [
            number,
            mode as usize,
            0, // owner
            0, // group
            links,
            0, // time
            content.len(),
            0, // device, and the one that a device file stands for
            0,
            0,
            0,
            path.len() + 1,
            0, // checksum, of another format
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    pub(crate) fn folder(&mut self, path: &str) {
        self.entry(path, FOLDER, b"");
    }

    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.entry(path, LINK, target.as_bytes());
    }

    pub(crate) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, FILE | permissions, content);
    }

    /// A folder of the host with all that is in it.
    pub(crate) fn tree(&mut self, from: &Path, path: &str) -> Result<()> {
        let entries = fs::read_dir(from).with_context(|| from.display().to_string())?;
        for entry in entries {
            let entry = entry?;
            let path = format!("{path}/{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                self.tree(&entry.path(), &path)?;
            } else {
                self.copy(&entry.path(), &path)?;
            }
        }
        Ok(())
    }

    fn copy(&mut self, from: &Path, path: &str) -> Result<()> {
        let read = || from.display().to_string();
        let permissions = fs::metadata(from).with_context(read)?.permissions().mode() & 0o777;
        self.file(path, permissions, &fs::read(from).with_context(read)?);
        Ok(())
    }

    /// A program, without its debug information, and the libraries that it is linked with.
    pub(crate) fn program(&mut self, from: &Path, path: &str) -> Result<()> {
        let stripped = super::kernel::folder().join(format!("stripped-{}", std::process::id()));
        let strip = Command::new("strip")
            .arg("--strip-debug")
            .arg("-o")
            .args([&stripped, from])
            .output();
        if strip.is_ok_and(|output| output.status.success()) {
            self.copy(&stripped, path)?;
            fs::remove_file(&stripped)?;
        } else {
            self.copy(from, path)?; // a script
        }
        for library in libraries(from)? {
            let path = library.display().to_string();
            // Folders of the root are links to those of /usr, as on the host.
            let path = path.trim_start_matches("/usr");
            self.copy(&library, &format!("usr{path}"))?;
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.record("TRAILER!!!", 0, b"");
        self.bytes
    }
}

/// What the dynamic linker would load; none for a static program.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot start `ldd`")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths
        .filter(|path| !path.ends_with(':'))
        .map(PathBuf::from)
        .collect())
}

/// Programs that the tests call.
const TOOLS: [&str; 10] = [
    "bash",
    "bridge",
    "busybox",
    "ethtool",
    "ip",
    "tc",
    "nft",
    "sctp_test",
    "setpriv",
    "unshare",
];
/// Programs that help somebody who looks around; taken where they are.
const USEFUL: [&str; 4] = ["bpftool", "iptables", "ping", "timeout"];

/// Everything but the kernel's modules: the tools, `programs` (where each is, and where it goes), and a
/// command that runs with root's rights.
pub(crate) fn root(programs: &[(PathBuf, String)], command: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["bin", "sbin", "lib", "lib64"] {
        archive.folder(&format!("usr/{folder}"));
        archive.link(folder, &format!("usr/{folder}"));
    }
    for folder in ["dev", "proc", "root", "run", "sys", "tmp", "var"] {
        archive.folder(folder);
    }
    archive.link("var/run", "../run");
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/bash\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.file("etc/command", 0o644, command.as_bytes());
    archive.file("init", 0o755, INIT.as_bytes());
    for name in TOOLS.iter().chain(&USEFUL) {
        if let Some(tool) = exec::find(name) {
            archive.program(&tool, &format!("usr/bin/{name}"))?;
        }
    }
    for (from, path) in programs {
        archive.program(from, path)?;
    }
    Ok(archive.finish())
}

/// Process 1. Output goes to the second serial port, the exit status to the third.
const INIT: &str = r#"#!/usr/bin/busybox sh
export PATH=/usr/sbin:/usr/bin HOME=/root TERM=dumb
busybox mount -t proc proc /proc
busybox --install -s /usr/bin 2>/dev/null
# The kernel calls it for the modules that it lacks.
ln -s /usr/bin/busybox /usr/sbin/modprobe
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /dev/net
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mknod /dev/net/tun c 10 200
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t tracefs trace /sys/kernel/tracing
mount -t securityfs security /sys/kernel/security
ip link set lo up
# Asked for by several tests at once, the second would not wait for the module.
modprobe -a veth bridge 8021q
for port in 1 2; do stty raw -echo < /dev/ttyS$port; done
bash /etc/command < /dev/null > /dev/ttyS1 2>&1
status=$?
# Setting the port waits until all output is out.
stty raw < /dev/ttyS1
echo $status > /dev/ttyS2
poweroff -f
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_folders_of_its_files_and_an_end() {
        let mut archive = Archive::default();
        archive.file("etc/passwd", 0o644, b"root");
        archive.folder("etc");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 3, "{text}");
        let at = |name: &str| text.find(name).unwrap();
        assert!(at("etc\0") < at("etc/passwd\0") && at("etc/passwd\0") < at("TRAILER!!!\0"));
    }
}
