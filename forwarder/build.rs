//! Puts the eBPF object where the crate embeds it, `OUT_DIR/forwarder.o`.
//!
//! `cargo xtask` builds the object, which takes a nightly toolchain. Without one the embedded file
//! is empty: everything still builds, and the binary says that it has no fast path.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=FORWARDER_EBPF_OBJECT");

    let variable = |name| env::var_os(name).map(PathBuf::from);
    let manifest = variable("CARGO_MANIFEST_DIR").unwrap_or_default();
    let object = variable("FORWARDER_EBPF_OBJECT")
        .unwrap_or_else(|| manifest.join("../target/ebpf/forwarder.o"));
    // While a file named here is missing, cargo builds the crate anew every time. The folder, which
    // may be empty, is enough to notice the object as soon as there is one.
    let folder = object.parent().unwrap_or(Path::new("."));
    let watched = if fs::create_dir_all(folder).is_ok() {
        folder
    } else {
        &object
    };
    println!("cargo::rerun-if-changed={}", watched.display());

    let embedded = variable("OUT_DIR").unwrap_or_default().join("forwarder.o");
    let content = if object.exists() {
        fs::read(&object)?
    } else {
        Vec::new()
    };
    replace(&embedded, &content)
}

/// Writes only what changed: the file's time decides whether the crate is compiled again.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    if fs::read(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    fs::write(path, content)
}
