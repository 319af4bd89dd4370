//! `ebpf`: builds the eBPF object and puts it at `target/ebpf/forwarder.o`, where the build script
//! of `forwarder` picks it up.
//!
//! The object is replaced only when its content changed, so that an unchanged eBPF program does
//! not rebuild user space.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

use crate::{
    exec::{self, step},
    setup,
};

const TARGET: &str = if cfg!(target_endian = "big") {
    "bpfeb-unknown-none"
} else {
    "bpfel-unknown-none"
};

fn folder() -> PathBuf {
    exec::workspace().join("target/ebpf-build")
}

/// Where [`build`] leaves the benchmark's packet generator.
pub(crate) fn generator() -> PathBuf {
    folder().join(TARGET).join("release/generator")
}

/// Builds the object and returns its path.
pub(crate) fn build() -> Result<PathBuf> {
    let toolchain = setup::toolchain()?;
    step("building the eBPF program");
    let folder = folder();
    let flags = [
        format!("-Clinker={}", toolchain.linker.display()),
        // The kernel takes function and map types from BTF, which is made of debug information.
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
    ];
    exec::run(
        exec::rustup_run(&toolchain.nightly, "cargo")
            .args([
                "build",
                "--quiet",
                "--package",
                "forwarder-ebpf",
                "--bins",
                "--release",
            ])
            .args(["--target", TARGET, "-Zbuild-std=core", "--target-dir"])
            .arg(&folder)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            // bpf-linker links bitcode and optimises the whole; rustc's own LTO is in its way.
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1"),
    )
    .context("the eBPF program")?;

    let built = folder.join(TARGET).join("release/forwarder-ebpf");
    let object = exec::workspace().join("target/ebpf/forwarder.o");
    let content = fs::read(&built).with_context(|| built.display().to_string())?;
    let content = without_debug_sections(&content).context("strip the eBPF program")?;
    if fs::read(&object).ok().as_deref() != Some(&content[..]) {
        fs::create_dir_all(object.parent().context("target/ebpf")?)?;
        // By rename: a build that runs at the same time never reads half an object.
        let partial = object.with_extension("o.partial");
        fs::write(&partial, &content)?;
        fs::rename(&partial, &object).with_context(|| object.display().to_string())?;
    }
    Ok(object)
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
