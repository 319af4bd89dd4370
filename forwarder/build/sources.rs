//! What the eBPF object is made of, as one digest: it tells whether `prebuilt/forwarder.o` is of these sources. The build
//! script and `cargo xtask` share this file.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

/// Folders of the workspace whose files the object is made of, the toolchain's versions among them.
pub(crate) const FOLDERS: [&str; 2] = ["forwarder-common", "forwarder-ebpf"];

/// Files of the workspace of which a part counts: how the object is built, and the versions of what it is built from.
pub(crate) const FILES: [&str; 2] = ["Cargo.toml", "Cargo.lock"];

/// SHA-256 of all paths and contents below [`FOLDERS`] and of the parts of [`FILES`], in hexadecimal digits.
///
/// # Errors
/// A file or folder cannot be read.
pub(crate) fn digest(workspace: &Path) -> io::Result<String> {
    let mut paths = Vec::new();
    for folder in FOLDERS {
        collect(workspace, Path::new(folder), &mut paths)?;
    }
    paths.sort();
    let mut digest = Sha256::new();
    for path in paths {
        let content = fs::read(workspace.join(&path))?;
        digest.update(path.as_os_str().as_encoded_bytes());
        // A length in front of each content: no other division into files gives the same bytes.
        digest.update([0]);
        digest.update((content.len() as u64).to_le_bytes());
        digest.update(content);
    }
    let manifest = fs::read_to_string(workspace.join(FILES[0]))?;
    let profile = manifest
        .split("\n[")
        .find(|table| table.starts_with("profile.ebpf]"));
    digest.update(profile.unwrap_or_default());
    let lock = fs::read_to_string(workspace.join(FILES[1]))?;
    for package in lock
        .split("[[package]]\n")
        .filter(|package| is_part(package))
    {
        digest.update(package);
    }
    let mut text = String::new();
    for byte in digest.finalize() {
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

/// Whether the object is made of a package, given its entry in Cargo.lock.
fn is_part(package: &str) -> bool {
    ["aya-ebpf", "aya-log", "bytemuck"]
        .iter()
        .any(|name| package.starts_with(&format!("name = \"{name}")))
}

/// Files below `folder` that cargo reads, and the toolchain's versions, relative to `workspace`.
fn collect(workspace: &Path, folder: &Path, paths: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(workspace.join(folder))? {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        let is_source = path
            .extension()
            .is_some_and(|end| end == "rs" || end == "toml");
        if entry.file_type()?.is_dir() {
            collect(workspace, &path, paths)?;
        } else if is_source || path.ends_with("toolchain") {
            paths.push(path);
        }
    }
    Ok(())
}
