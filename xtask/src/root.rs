//! Debians to try things in: each made once by debootstrap, then used beneath an overlay, so that what is done in it is gone
//! with the overlay.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    exec::{self, step},
    vm::kernel,
};

/// A Debian, and what it has beside what every Debian has.
struct Root {
    suite: &'static str,
    included: &'static str,
    /// Whether apt is to reach its mirrors in there as it does here.
    has_mirrors: bool,
}

/// The oldest that is supported, with systemd, and the certificates that downloads are checked with.
const OLDEST: Root = Root {
    suite: "bookworm",
    included: "ca-certificates,systemd-sysv",
    has_mirrors: true,
};

/// The newest container engines.
const ENGINES: Root = Root {
    suite: "sid",
    included: "curl,docker-cli,docker.io,netavark,nftables,podman",
    has_mirrors: false,
};

/// The folder of the clean root. Nothing may be written to it.
pub(crate) fn debian() -> Result<PathBuf> {
    OLDEST.folder()
}

/// The same of a root with the newest container engines.
pub(crate) fn engines() -> Result<PathBuf> {
    ENGINES.folder()
}

impl Root {
    /// Where it is; makes it if it is not there.
    fn folder(&self) -> Result<PathBuf> {
        let Self { suite, .. } = self;
        let root = exec::workspace()
            .join("target")
            .join(format!("root-{suite}"));
        let stamp = root.with_extension("made");
        if stamp.exists() {
            return Ok(root);
        }
        step(&format!("making a clean Debian {suite}"));
        if root.exists() {
            remove(&root)?;
        }
        let mirror = kernel::mirrors()?
            .into_iter()
            .find(|mirror| mirror.ends_with("/debian/"));
        let mut make = exec::as_root("debootstrap").context("debootstrap needs root")?;
        make.arg("--variant=minbase")
            .arg(format!("--include={}", self.included))
            .arg(suite)
            .arg(&root);
        exec::run(make.args(mirror).stdout(std::process::Stdio::null()))?;
        if self.has_mirrors {
            copy_mirrors(&root)?;
        }
        fs::write(&stamp, "").with_context(|| stamp.display().to_string())?;
        Ok(root)
    }
}

fn copy_mirrors(root: &Path) -> Result<()> {
    for what in [
        "/etc/apt/apt.conf.d",
        "/etc/apt/sources.list",
        "/etc/apt/sources.list.d",
        "/etc/ssl/certs/ca-certificates.crt",
    ] {
        let to = format!("{}{what}", root.display());
        remove(to.as_ref())?;
        if fs::exists(what)? {
            exec::run(
                exec::as_root("cp")
                    .context("needs root")?
                    .args(["-r", what, &to]),
            )?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    let mut command = exec::as_root("rm").context("needs root")?;
    exec::run(command.args(["-r", "-f"]).arg(path))
}
