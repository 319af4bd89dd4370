//! `ebpf`: the eBPF object. `prebuilt/forwarder.o` comes with the sources and serves every build on stable Rust. If the
//! sources have changed since, it is built from them into `target/ebpf/forwarder.o`.
//!
//! The build is reproducible: pinned toolchain, no path of this machine in it. So `--check` can compare every byte.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

use crate::{
    exec::{self, step},
    setup, sources,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Build, and fail if prebuilt/forwarder.o differs in a byte
    #[arg(long)]
    check: bool,
    /// Build into target/ebpf only, and leave prebuilt/ as it is
    #[arg(long, conflicts_with = "check")]
    keep_prebuilt: bool,
}

/// The variable that tells the build script of `forwarder` which object to embed.
const VARIABLE: &str = "FORWARDER_EBPF_OBJECT";
/// One object serves every little-endian processor.
const TARGET: &str = if cfg!(target_endian = "big") {
    "bpfeb-unknown-none"
} else {
    "bpfel-unknown-none"
};

/// The object of the sources as they are now.
pub(crate) struct Object {
    pub(crate) path: PathBuf,
    /// It was built here; the build script would embed the one in `prebuilt/`.
    built: bool,
}

impl Object {
    /// Has a build of `forwarder` embed it.
    pub(crate) fn embed(&self, cargo: &mut Command) {
        if self.built {
            cargo.env(VARIABLE, &self.path);
        }
    }
}

fn folder() -> PathBuf {
    exec::workspace().join("target/ebpf-build")
}

fn prebuilt() -> PathBuf {
    exec::workspace().join("prebuilt/forwarder.o")
}

/// Beside the object: the digest of the sources that it was built from.
fn stamp() -> PathBuf {
    exec::workspace().join("prebuilt/forwarder.o.sources")
}

fn digest() -> Result<String> {
    sources::digest(exec::workspace()).context("the sources of the eBPF program")
}

pub(crate) fn ebpf(options: &Options) -> Result<()> {
    if options.keep_prebuilt {
        return build().map(drop);
    }
    if options.check {
        return check();
    }
    let content = reproducible()?;
    replace(&prebuilt(), &content)?;
    replace(&stamp(), format!("{}\n", digest()?).as_bytes())?;
    step(&format!("prebuilt/forwarder.o: {} bytes", content.len()));
    Ok(())
}

/// The object in `prebuilt/` if it is of these sources, else one that is built from them.
/// Or what `FORWARDER_EBPF_OBJECT` names.
pub(crate) fn object() -> Result<Object> {
    let is_current = || {
        prebuilt().exists()
            && fs::read_to_string(stamp())
                .is_ok_and(|text| digest().is_ok_and(|now| text.trim() == now))
    };
    let chosen = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
    let (path, built) = match chosen {
        Some(path) if path != "source" => (exec::workspace().join(path), true),
        None if cfg!(target_endian = "little") && is_current() => (prebuilt(), false),
        _ => (build()?, true),
    };
    Ok(Object { path, built })
}

/// The benchmark's packet generator, which is always built.
pub(crate) fn generator() -> Result<PathBuf> {
    step("building the packet generator");
    compile("forwarder-generator").context("the packet generator")
}

/// Fails if the object in `prebuilt/` is not, byte for byte, what the sources give.
pub(crate) fn check() -> Result<()> {
    let built = reproducible()?;
    let shipped = fs::read(prebuilt()).context("prebuilt/forwarder.o")?;
    let at = built
        .iter()
        .zip(&shipped)
        .position(|(one, other)| one != other);
    ensure!(
        built == shipped,
        "prebuilt/forwarder.o is not what the sources give ({} and {} bytes, first difference at {}): \
         `cargo xtask ebpf` renews it",
        shipped.len(),
        built.len(),
        at.unwrap_or(built.len().min(shipped.len()))
    );
    let stamped = fs::read_to_string(stamp()).context("prebuilt/forwarder.o.sources")?;
    ensure!(
        stamped.trim() == digest()?,
        "prebuilt/forwarder.o.sources is of other sources: `cargo xtask ebpf` renews it"
    );
    step("prebuilt/forwarder.o is what the sources give");
    Ok(())
}

/// Builds it with the pinned toolchain, and no other.
fn reproducible() -> Result<Vec<u8>> {
    let toolchain = setup::toolchain()?;
    if !toolchain.is_pinned() {
        bail!(
            "{} builds other bytes than {}: `rustup toolchain install {} --profile minimal --component rust-src`, \
             then `cargo xtask setup`",
            toolchain.nightly,
            setup::pinned_nightly(),
            setup::pinned_nightly()
        );
    }
    let built = build()?;
    fs::read(&built).with_context(|| built.display().to_string())
}

/// Builds the object into `target/ebpf` and returns its path.
fn build() -> Result<PathBuf> {
    step("building the eBPF program");
    let built = compile("forwarder-ebpf").context("the eBPF program")?;
    let object = exec::workspace().join("target/ebpf/forwarder.o");
    let content = fs::read(&built).with_context(|| built.display().to_string())?;
    let content = without_debug_sections(&content).context("strip the eBPF program")?;
    replace(&object, &content)?;
    Ok(object)
}

/// Compiles a package for the kernel and returns the path of its object, which has the package's name.
fn compile(package: &str) -> Result<PathBuf> {
    let toolchain = setup::toolchain()?;
    let folder = folder();
    let flags = [
        format!("-Clinker={}", toolchain.linker.display()),
        // The kernel takes function and map types from BTF, which is made of debug information.
        "-Clink-arg=--btf".to_owned(),
        // Names the layout of `pt_regs` in aya-ebpf, which no program here uses: one object is for all processors.
        "--cfg=bpf_target_arch=\"x86_64\"".to_owned(),
    ];
    exec::run(
        exec::rustup_run(&toolchain.nightly, "cargo")
            .args([
                "build",
                "--quiet",
                "--package",
                package,
                "--bins",
                "--profile",
                "ebpf",
            ])
            .args([
                "--target",
                TARGET,
                "-Zbuild-std=core",
                "-Ztrim-paths",
                "--target-dir",
            ])
            .arg(&folder)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env("CARGO_PROFILE_EBPF_TRIM_PATHS", "all"),
    )?;
    Ok(folder.join(TARGET).join("ebpf").join(package))
}

/// Writes a file if that changes it: an unchanged eBPF program does not rebuild user space. By rename: a build that runs at
/// the same time never reads half of it.
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).ok().as_deref() == Some(content) {
        return Ok(());
    }
    let partial = path.with_extension("partial");
    let folder = path.parent().context("a file has a folder")?;
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&partial, content))
        .and_then(|()| fs::rename(&partial, path))
        .with_context(|| path.display().to_string())
}

/// Leaves out what only debuggers read, which is three quarters of the object and would stay in the daemon's memory. BTF,
/// which was made of it, stays.
fn without_debug_sections(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object)?;
    for section in &mut builder.sections {
        let name = &section.name;
        section.delete = [&b".debug_"[..], b".rel.debug_"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
    }
    builder.delete_orphans();
    // LLVM has one table for the names of symbols and sections, the writer two.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped)?;
    Ok(stripped)
}
