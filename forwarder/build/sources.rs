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

/// SHA-256 of all paths and contents below [`FOLDERS`], in hexadecimal digits.
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
    let mut text = String::new();
    for byte in digest.finalize() {
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

/// Files below `folder`, relative to `workspace`. Hidden ones are an editor's.
fn collect(workspace: &Path, folder: &Path, paths: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(workspace.join(folder))? {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            collect(workspace, &path, paths)?;
        } else {
            paths.push(path);
        }
    }
    Ok(())
}
