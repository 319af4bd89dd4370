//! `dist`: packages of an optimised build, in `target/dist`: .deb and .rpm, static tarballs, and their checksums. Each
//! program has the list of its dependencies in it (cargo-auditable), which scanners read.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use crate::{
    ebpf::{self, Object},
    exec::{self, step},
    install::{self, Layout},
};

/// Cargo's subcommands that make packages, with the versions that are known to work.
const TOOLS: [(&str, &str); 3] = [
    ("cargo-auditable", "0.7.7"),
    ("cargo-deb", "3.8.0"),
    ("cargo-generate-rpm", "0.21.1"),
];

/// Targets of static programs. Their C library comes with the Rust target, and rustc's own linker links them.
const STATIC: [&str; 2] = ["x86_64-unknown-linux-musl", "aarch64-unknown-linux-musl"];

/// Makes all packages and returns their folder.
pub(crate) fn packages() -> Result<PathBuf> {
    let tools = tools()?;
    let object = ebpf::object()?;
    let dist = exec::workspace().join("target/dist");
    if dist.exists() {
        fs::remove_dir_all(&dist)?;
    }
    fs::create_dir_all(&dist)?;

    let binary = build(&tools, &object, None)?;
    let tree = exec::workspace().join("target/package");
    install::stage(&tree, &Layout::new(Path::new("/usr")), &binary, &binary)?;
    step("packing deb and rpm");
    for words in [
        &["deb", "--no-build", "--no-strip", "--quiet"][..],
        &["generate-rpm"],
    ] {
        let mut cargo = exec::cargo();
        with(&tools, &mut cargo)
            .args(words)
            .args(["--package", "forwarder"]);
        exec::run(cargo.arg("--output").arg(&dist))?;
    }

    for target in STATIC {
        let built = build(&tools, &object, Some(target))?;
        tarball(&dist, target, &built, &binary)?;
    }
    checksums(&dist)?;
    step(&format!("packages are in {}", dist.display()));
    Ok(dist)
}

/// Installs what is missing of [`TOOLS`] into `target/tools`; returns the folder of the programs.
fn tools() -> Result<PathBuf> {
    let root = exec::workspace().join("target/tools");
    let listed = root.join(".crates.toml");
    for (name, version) in TOOLS {
        let is_there = fs::read_to_string(&listed)
            .is_ok_and(|text| text.contains(&format!("\"{name} {version} ")));
        if is_there {
            continue;
        }
        step(&format!("installing {name} {version}"));
        exec::run(
            exec::cargo()
                .args([
                    "install",
                    name,
                    "--version",
                    version,
                    "--locked",
                    "--quiet",
                    "--root",
                ])
                .arg(&root),
        )?;
    }
    Ok(root.join("bin"))
}

/// Has cargo find the subcommands in `tools`.
fn with<'a>(tools: &Path, cargo: &'a mut Command) -> &'a mut Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(tools.to_owned()).chain(std::env::split_paths(&path));
    // No folder of PATH has a colon in it, and neither has a checkout that cargo can build in.
    cargo.env("PATH", std::env::join_paths(folders).unwrap_or(path))
}

/// Builds the programs, for this machine or static ones for another target; returns `forwarder`, which the others are beside.
fn build(tools: &Path, object: &Object, target: Option<&str>) -> Result<PathBuf> {
    step(&format!(
        "building forwarder, optimised, for {}",
        target.unwrap_or("this machine")
    ));
    let mut cargo = exec::cargo();
    object.embed(&mut cargo);
    with(tools, &mut cargo).args(["auditable", "build", "--release", "--quiet"]);
    cargo.args(["--package", "forwarder", "--bins"]);
    if let Some(target) = target {
        exec::run(Command::new("rustup").args(["--quiet", "target", "add", target]))?;
        let variable = target.to_uppercase().replace('-', "_");
        cargo
            .args(["--target", target])
            .env(format!("CARGO_TARGET_{variable}_LINKER"), "rust-lld");
    }
    exec::executable(&exec::executables(&mut cargo)?, "forwarder")
}

/// Packs static programs with what belongs to them.
fn tarball(dist: &Path, target: &str, binary: &Path, runs: &Path) -> Result<()> {
    let name = format!("forwarder-{}-{target}", env!("CARGO_PKG_VERSION"));
    let tree = exec::workspace().join("target/tarball");
    let layout = Layout::new(Path::new("/usr/local"));
    install::stage(&tree, &layout, binary, runs)?;
    exec::run(
        Command::new("tar")
            .arg("--create")
            .arg("--gzip")
            .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
            .arg(format!("--transform=s,^[.],{name},"))
            .arg("--file")
            .arg(dist.join(format!("{name}.tar.gz")))
            .arg("--directory")
            .arg(&tree)
            .arg("."),
    )
}

/// Writes SHA256SUMS as sha256sum(1) checks it.
fn checksums(dist: &Path) -> Result<()> {
    let mut files: Vec<_> = fs::read_dir(dist)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.sort();
    let mut text = String::new();
    for file in files {
        let content = fs::read(&file).with_context(|| file.display().to_string())?;
        for byte in Sha256::digest(&content) {
            let _ = write!(text, "{byte:02x}");
        }
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let _ = writeln!(text, "  {name}");
    }
    fs::write(dist.join("SHA256SUMS"), text).context("SHA256SUMS")
}
