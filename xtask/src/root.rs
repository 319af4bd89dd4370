//! A clean Debian to try things in: made once by debootstrap, then used beneath an overlay, so that what is done in it is
//! gone with the overlay.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{
    exec::{self, step},
    vm::kernel,
};

/// The oldest Debian that is supported.
const SUITE: &str = "bookworm";
/// Beside what every Debian has: systemd, and the certificates that downloads are checked with.
const INCLUDED: &str = "--include=ca-certificates,systemd-sysv";

/// The folder of the clean root. Nothing may be written to it.
pub(crate) fn debian() -> Result<PathBuf> {
    let root = exec::workspace()
        .join("target")
        .join(format!("root-{SUITE}"));
    let stamp = root.with_extension("made");
    if stamp.exists() {
        return Ok(root);
    }
    step(&format!("making a clean Debian {SUITE}"));
    if root.exists() {
        exec::run(
            exec::as_root("rm")
                .context("needs root")?
                .args(["-r", "-f"])
                .arg(&root),
        )?;
    }
    let mirror = kernel::mirrors()?
        .into_iter()
        .find(|mirror| mirror.ends_with("/debian/"));
    let mut make = exec::as_root("debootstrap").context("debootstrap needs root")?;
    make.args(["--variant=minbase", INCLUDED, SUITE]).arg(&root);
    exec::run(make.args(mirror).stdout(std::process::Stdio::null()))?;
    // apt reaches its mirrors in there as it does here.
    for what in [
        "/etc/apt/apt.conf.d",
        "/etc/apt/sources.list",
        "/etc/apt/sources.list.d",
        "/etc/ssl/certs/ca-certificates.crt",
    ] {
        let to = format!("{}{what}", root.display());
        exec::run(
            exec::as_root("rm")
                .context("needs root")?
                .args(["-r", "-f", &to]),
        )?;
        if fs::exists(what)? {
            exec::run(
                exec::as_root("cp")
                    .context("needs root")?
                    .args(["-r", what, &to]),
            )?;
        }
    }
    fs::write(&stamp, "").with_context(|| stamp.display().to_string())?;
    Ok(root)
}
