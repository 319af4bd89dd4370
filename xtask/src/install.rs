//! `install`: an optimised build in a prefix, with manual pages, completions and the unit. `dist` packs the same tree.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    ebpf,
    exec::{self, step},
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where to: bin, share and lib below it
    #[arg(long, value_name = "FOLDER", default_value = "/usr/local")]
    prefix: PathBuf,
    /// Remove what was installed there
    #[arg(long)]
    remove: bool,
}

/// Where the files of an installation belong.
pub(crate) struct Layout<'a> {
    /// bin, share and lib are below it; absolute.
    pub(crate) prefix: &'a Path,
    /// The file with the unit's flags; absolute.
    pub(crate) defaults: PathBuf,
}

impl<'a> Layout<'a> {
    /// The system's own prefixes have their configuration in /etc, others below themselves.
    pub(crate) fn new(prefix: &'a Path) -> Self {
        let is_system = ["/usr", "/usr/local"]
            .iter()
            .any(|own| prefix == Path::new(own));
        let etc = if is_system {
            PathBuf::from("/etc")
        } else {
            prefix.join("etc")
        };
        Self {
            prefix,
            defaults: etc.join("default/forwarder"),
        }
    }
}

/// Shells, and where each looks for completions below a prefix.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "share/bash-completion/completions/forwarder"),
    ("fish", "share/fish/vendor_completions.d/forwarder.fish"),
    ("zsh", "share/zsh/site-functions/_forwarder"),
];

pub(crate) fn install(options: &Options) -> Result<()> {
    let prefix = std::path::absolute(&options.prefix)?;
    let layout = Layout::new(&prefix);
    let object = ebpf::object()?;
    step("building forwarder, optimised");
    let build = [
        "build",
        "--release",
        "--package",
        "forwarder",
        "--bin",
        "forwarder",
    ];
    let binary = exec::executable(&exec::build_executables(&build, &object)?, "forwarder")?;

    let tree = exec::workspace().join("target/install");
    stage(&tree, &layout, &binary, &binary)?;
    let files = files(&tree)?;
    if options.remove {
        let paths = files.iter().map(|path| Path::new("/").join(path));
        exec::run(changing(&prefix, "rm")?.arg("--force").args(paths))?;
        step(&format!("removed from {}", prefix.display()));
        return Ok(());
    }
    let defaults = layout.defaults.strip_prefix("/")?;
    for path in &files {
        let mut copy = changing(&prefix, "install")?;
        let kept = path == defaults && layout.defaults.exists();
        if kept {
            step(&format!("{} stays as it is", layout.defaults.display()));
            continue;
        }
        // It removes what is there first: a program that runs cannot be written to.
        let mode = fs::metadata(tree.join(path))?.permissions().mode() & 0o777;
        copy.arg("-D").arg(format!("--mode={mode:o}"));
        exec::run(copy.arg(tree.join(path)).arg(Path::new("/").join(path)))?;
    }
    step(&format!(
        "installed: {}; its flags as a service: {}",
        prefix.join("bin/forwarder").display(),
        layout.defaults.display()
    ));
    Ok(())
}

/// A program that changes files below `prefix`: with root's rights only where it takes them.
fn changing(prefix: &Path, program: &str) -> Result<Command> {
    let there = prefix
        .ancestors()
        .find(|folder| folder.exists())
        .unwrap_or(Path::new("/"));
    let writable = exec::succeeds(Command::new("test").arg("-w").arg(there));
    if writable {
        return Ok(Command::new(program));
    }
    exec::as_root(program).with_context(|| {
        format!(
            "{} is not yours to write: run `sudo -v` first, or choose --prefix",
            there.display()
        )
    })
}

/// Makes below `tree` all that an installation consists of. `binary` is installed; `runs` is one that runs on this machine and
/// knows the same commands.
pub(crate) fn stage(tree: &Path, layout: &Layout, binary: &Path, runs: &Path) -> Result<()> {
    if tree.exists() {
        fs::remove_dir_all(tree).with_context(|| tree.display().to_string())?;
    }
    let below = |path: &Path| tree.join(path.strip_prefix("/").unwrap_or(path));
    let prefix = below(layout.prefix);
    write(
        &prefix.join("bin/forwarder"),
        0o755,
        &fs::read(binary).with_context(|| binary.display().to_string())?,
    )?;

    let manual = prefix.join("share/man/man1");
    fs::create_dir_all(&manual)?;
    exec::run(Command::new(runs).arg("man").arg("--to").arg(&manual))?;
    for (shell, path) in COMPLETIONS {
        let text = exec::output(Command::new(runs).args(["completions", shell]))?;
        write(&prefix.join(path), 0o644, text.as_bytes())?;
    }
    let documents = prefix.join("share/doc/forwarder");
    for name in ["README.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT"] {
        write(
            &documents.join(name),
            0o644,
            &fs::read(exec::workspace().join(name))?,
        )?;
    }

    let packaging = exec::workspace().join("forwarder/packaging");
    let unit = fs::read_to_string(packaging.join("forwarder.service"))?
        .replace(
            "@BINARY@",
            &layout.prefix.join("bin/forwarder").display().to_string(),
        )
        .replace("@DEFAULTS@", &layout.defaults.display().to_string());
    ensure!(
        !unit.contains('@'),
        "forwarder.service has a place that nothing is put into"
    );
    write(
        &prefix.join("lib/systemd/system/forwarder.service"),
        0o644,
        unit.as_bytes(),
    )?;
    write(
        &below(&layout.defaults),
        0o644,
        &fs::read(packaging.join("forwarder.default"))?,
    )
}

fn write(path: &Path, mode: u32, content: &[u8]) -> Result<()> {
    let folder = path.parent().context("a file has a folder")?;
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(path, content))
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .with_context(|| path.display().to_string())
}

/// Files below `tree`, relative to it, in order.
fn files(tree: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![tree.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(path.strip_prefix(tree)?.to_owned());
            }
        }
    }
    files.sort();
    Ok(files)
}
