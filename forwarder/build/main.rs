//! Puts the eBPF object where the crate embeds it, `OUT_DIR/forwarder.o`: `prebuilt/forwarder.o`, or what
//! `FORWARDER_EBPF_OBJECT` names: another object's path, or `source`, which builds it first.

mod sources;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

type Failure = Box<dyn std::error::Error>;

const VARIABLE: &str = "FORWARDER_EBPF_OBJECT";

fn main() -> Result<(), Failure> {
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let path = |name| env::var_os(name).map(PathBuf::from).unwrap_or_default();
    let workspace = path("CARGO_MANIFEST_DIR").join("..");

    let object = match env::var_os(VARIABLE) {
        Some(value) if value == "source" => from_source(&workspace)?,
        Some(value) if !value.is_empty() => workspace.join(value),
        _ => prebuilt(&workspace)?,
    };
    println!("cargo::rerun-if-changed={}", object.display());
    let content = fs::read(&object).map_err(|error| {
        format!(
            "the eBPF object {}: {error}; build it with `cargo xtask ebpf`, or unset {VARIABLE}",
            object.display()
        )
    })?;
    if !content.starts_with(b"\x7fELF") {
        return Err(format!("the eBPF object {} is no ELF file", object.display()).into());
    }
    let big_endian = env::var("CARGO_CFG_TARGET_ENDIAN").is_ok_and(|endian| endian == "big");
    // EI_DATA (elf(5)).
    if content.get(5) != Some(if big_endian { &2 } else { &1 }) {
        return Err(format!(
            "the eBPF object {} has another byte order than the target: build on such a machine with {VARIABLE}=source",
            object.display()
        )
        .into());
    }
    let embedded = path("OUT_DIR").join("forwarder.o");
    // Only what changed is written: the file's time decides whether the crate is compiled again.
    if fs::read(&embedded).is_ok_and(|present| present == content) {
        return Ok(());
    }
    Ok(fs::write(&embedded, content)?)
}

/// The object that comes with the sources. Says so if the sources have changed since.
fn prebuilt(workspace: &Path) -> Result<PathBuf, Failure> {
    watch(workspace);
    let stamp = workspace.join("prebuilt/forwarder.o.sources");
    println!("cargo::rerun-if-changed={}", stamp.display());
    let stamped = fs::read_to_string(&stamp)
        .map_err(|error| format!("{}: {error}; `cargo xtask ebpf` renews it", stamp.display()))?;
    if stamped.trim() != sources::digest(workspace)? {
        println!(
            "cargo::warning=the eBPF program's sources have changed since prebuilt/forwarder.o was built: \
             `cargo xtask ebpf` renews it"
        );
    }
    Ok(workspace.join("prebuilt/forwarder.o"))
}

/// Has cargo run this again when the eBPF program's sources change.
fn watch(workspace: &Path) {
    for path in sources::FOLDERS.iter().chain(&sources::FILES) {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }
}

/// Has `cargo xtask` build it, which installs the toolchain that it takes. In a target folder of its own, since cargo holds
/// the lock of this one.
fn from_source(workspace: &Path) -> Result<PathBuf, Failure> {
    watch(workspace);
    let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build
        .current_dir(workspace)
        .args([
            "run",
            "--package",
            "xtask",
            "--target-dir",
            "target/from-source",
            "--",
        ])
        .args(["ebpf", "--keep-prebuilt"]);
    for name in ["CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "RUSTFLAGS"] {
        build.env_remove(name);
    }
    let output = build.output()?;
    if !output.status.success() {
        return Err(format!(
            "cargo xtask ebpf: {}",
            String::from_utf8_lossy(&output.stderr)
        )
        .into());
    }
    Ok(workspace.join("target/ebpf/forwarder.o"))
}
