//! `setup`: what building the eBPF program takes and stable Rust does not have, namely a nightly
//! with the sources of `core`, and bpf-linker.
//!
//! bpf-linker is built against the libLLVM that this nightly itself uses, so that the bitcode's
//! and the linker's LLVM are always the same and the system needs none. Everything but the nightly
//! lands in `target/toolchain`; a second call finds it done and needs no network.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::exec::{self, step};

/// Versions of both, a line each. They are part of the eBPF program's sources.
const PINNED: &str = include_str!("../../forwarder-ebpf/toolchain");

/// The nightly that is pinned, as rustup names it.
pub(crate) fn pinned_nightly() -> &'static str {
    PINNED.lines().next().unwrap_or_default()
}

fn pinned_linker() -> &'static str {
    let line = PINNED.lines().nth(1).unwrap_or_default();
    line.trim_start_matches("bpf-linker ")
}

/// A toolchain that is complete and works.
pub(crate) struct Toolchain {
    /// As rustup names it.
    pub(crate) nightly: String,
    pub(crate) linker: PathBuf,
}

impl Toolchain {
    /// Whether it gives the same object everywhere.
    pub(crate) fn is_pinned(&self) -> bool {
        self.nightly == pinned_nightly()
    }
}

/// Returns the toolchain, installing what is missing.
///
/// # Errors
/// Names the piece that is missing and what to install.
pub(crate) fn toolchain() -> Result<Toolchain> {
    let folder = exec::workspace().join("target/toolchain");
    let stamp = folder.join("stamp");
    let linker = folder.join("bin/bpf-linker");

    if let Some(nightly) = fs::read_to_string(&stamp)
        .ok()
        .and_then(|text| stamped(&text))
        && sources_of_core(&nightly)
        && exec::succeeds(Command::new(&linker).arg("--version"))
    {
        return Ok(Toolchain { nightly, linker });
    }

    if !exec::in_path("rustup") {
        bail!(
            "rustup is not in PATH; the eBPF program needs a nightly toolchain: \
             install rustup from https://rustup.rs"
        );
    }
    if !exec::in_path("cc") {
        bail!("no C linker `cc`, which building bpf-linker needs: apt-get install gcc libc6-dev");
    }
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let nightly = nightly()?;
    install_linker(&nightly, &folder)?;
    fs::write(&stamp, stamp_of(&nightly)).with_context(|| stamp.display().to_string())?;
    step(&format!(
        "toolchain ready: {nightly}, bpf-linker {}",
        pinned_linker()
    ));
    Ok(Toolchain { nightly, linker })
}

fn stamp_of(nightly: &str) -> String {
    format!("{nightly} bpf-linker {}\n", pinned_linker())
}

/// The nightly that a stamp names, when it is one that this version of the task writes.
fn stamped(text: &str) -> Option<String> {
    let nightly = text.split(' ').next()?.to_owned();
    let wanted = nightly == pinned_nightly() || nightly == "nightly";
    (wanted && text == stamp_of(&nightly)).then_some(nightly)
}

/// The pinned nightly, or where it cannot be had, an installed `nightly`.
fn nightly() -> Result<String> {
    let wanted = pinned_nightly();
    if sources_of_core(wanted) {
        return Ok(wanted.to_owned());
    }
    step(&format!("installing {wanted} with rust-src"));
    let install = [
        "toolchain",
        "install",
        wanted,
        "--profile",
        "minimal",
        "--no-self-update",
    ];
    let fetched = exec::run(
        Command::new("rustup")
            .args(install)
            .args(["--component", "rust-src"]),
    );
    match fetched {
        Ok(()) if sources_of_core(wanted) => return Ok(wanted.to_owned()),
        Ok(()) => step(&format!("{wanted} came without rust-src")),
        Err(error) => step(&format!("{wanted} cannot be installed: {error:#}")),
    }

    let added = sources_of_core("nightly")
        || (sysroot("nightly").is_some()
            && exec::run(Command::new("rustup").args([
                "component",
                "add",
                "rust-src",
                "--toolchain",
                "nightly",
            ]))
            .is_ok()
            && sources_of_core("nightly"));
    if !added {
        bail!(
            "no nightly toolchain with rust-src: check the network, then \
             `rustup toolchain install {wanted} --profile minimal --component rust-src`"
        );
    }
    step(&format!(
        "using the installed `nightly` instead of {wanted}"
    ));
    Ok("nightly".to_owned())
}

fn sysroot(toolchain: &str) -> Option<PathBuf> {
    let output = exec::rustup_run(toolchain, "rustc")
        .args(["--print", "sysroot"])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(text.trim()))
}

fn sources_of_core(toolchain: &str) -> bool {
    sysroot(toolchain).is_some_and(|root| {
        root.join("lib/rustlib/src/rust/library/core/Cargo.toml")
            .is_file()
    })
}

fn install_linker(nightly: &str, folder: &Path) -> Result<()> {
    let lib = sysroot(nightly)
        .context("the nightly has gone")?
        .join("lib");
    let (llvm, major) = llvm_of(&lib)?;

    // bpf-linker looks for $LLVM_PREFIX/lib/libLLVM.so.
    let prefix = folder.join("llvm");
    fs::create_dir_all(prefix.join("lib"))?;
    let link = prefix.join("lib/libLLVM.so");
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(&llvm, &link).context("link the nightly's libLLVM")?;

    step(&format!(
        "building bpf-linker {} against {nightly}'s LLVM {major}",
        pinned_linker()
    ));
    exec::run(
        exec::rustup_run(nightly, "cargo")
            .args([
                "install",
                "bpf-linker",
                "--version",
                pinned_linker(),
                "--locked",
                "--force",
            ])
            .args([
                "--no-default-features",
                "--features",
                &format!("llvm-{major}"),
            ])
            .arg("--root")
            .arg(folder)
            .env("LLVM_PREFIX", &prefix)
            .env(
                "RUSTFLAGS",
                format!("-C link-arg=-Wl,-rpath,{}", lib.display()),
            ),
    )
    .context("bpf-linker")?;
    // It says so once it is in the folder, since that is not meant to be in PATH.
    let linker = folder.join("bin/bpf-linker");
    exec::run(Command::new(&linker).arg("--version")).context("the bpf-linker just built")
}

/// The toolchain's `libLLVM.so.22.1-rust-...` and its major version.
fn llvm_of(lib: &Path) -> Result<(PathBuf, String)> {
    for entry in fs::read_dir(lib).with_context(|| lib.display().to_string())? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if let Some(version) = name.strip_prefix("libLLVM.so.") {
            let major = version.split('.').next().unwrap_or_default().to_owned();
            return Ok((path, major));
        }
    }
    bail!(
        "no libLLVM.so.* in {}: this toolchain does not bring its LLVM along",
        lib.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_of_another_version_does_not_count() {
        assert_eq!(
            stamped(&stamp_of(pinned_nightly())).as_deref(),
            Some(pinned_nightly())
        );
        assert_eq!(
            stamped(&format!("{} bpf-linker 0.0.1\n", pinned_nightly())),
            None
        );
        assert_eq!(stamped("nightly-2020-01-01 bpf-linker 0.13.0\n"), None);
        assert_eq!(stamped(""), None);
    }
}
