//! `install`: an optimised build in a prefix, with manual pages, completions and the unit. `dist` packs the same tree.

use std::{
    ffi::OsStr,
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
    /// The configuration file; absolute.
    pub(crate) configuration: PathBuf,
}

impl<'a> Layout<'a> {
    /// A distribution's own prefix has its configuration in /etc, others below themselves.
    pub(crate) fn new(prefix: &'a Path) -> Self {
        let etc = if prefix == Path::new("/usr") {
            PathBuf::from("/etc")
        } else {
            prefix.join("etc")
        };
        Self {
            prefix,
            defaults: etc.join("default/forwarder"),
            configuration: etc.join("forwarder/forwarder.toml"),
        }
    }

    /// What people write themselves, and as what it is shipped.
    fn written(&self) -> [(&Path, &'static str); 2] {
        [
            (&self.defaults, "forwarder.default"),
            (&self.configuration, "forwarder.toml"),
        ]
    }

    /// As what a file that people write themselves is shipped.
    fn shipped_as(&self, path: &Path) -> Option<&'static str> {
        let mut written = self.written().into_iter();
        written.find_map(|(file, name)| (file == path).then_some(name))
    }

    /// The file from which systemd-sysusers makes the user of the unit.
    fn user(&self) -> PathBuf {
        self.prefix.join("lib/sysusers.d/forwarder.conf")
    }

    /// The list of what was installed, with which it is removed.
    fn list(&self) -> PathBuf {
        self.prefix.join("share/forwarder/installed")
    }
}

/// What people and engines start.
pub(crate) const PROGRAMS: [&str; 2] = ["forwarder", "forwarder-docker-proxy"];

/// Shells, and where each looks for completions below a prefix.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "share/bash-completion/completions/forwarder"),
    ("fish", "share/fish/vendor_completions.d/forwarder.fish"),
    ("zsh", "share/zsh/site-functions/_forwarder"),
];

pub(crate) fn install(options: &Options) -> Result<()> {
    let prefix = std::path::absolute(&options.prefix)?;
    let text = prefix.to_str().unwrap_or_default();
    let plain = |c: char| c.is_alphanumeric() || "/._-+@:".contains(c);
    ensure!(
        !text.is_empty() && text.chars().all(plain) && !text.split('/').any(|part| part == ".."),
        "--prefix {}: a unit file cannot name it: write it without `..`, spaces and signs",
        options.prefix.display()
    );
    let layout = Layout::new(&prefix);
    if options.remove {
        return remove(&layout);
    }
    // Before a build that would be in vain.
    drop(changing(&prefix, "true")?);
    let object = ebpf::object()?;
    step("building forwarder, optimised");
    let build = ["build", "--release", "--package", "forwarder", "--bins"];
    let binary = exec::executable(&exec::build_executables(&build, &object)?, "forwarder")?;

    let tree = exec::workspace().join("target/install");
    stage(&tree, &layout, &binary, &binary)?;
    let files = files(&tree)?;
    let listed: String = files
        .iter()
        .map(|path| format!("/{}\n", path.display()))
        .collect();
    let list = layout.list().strip_prefix("/")?.to_owned();
    write(&tree.join(&list), 0o644, listed.as_bytes())?;
    for path in files.iter().chain([&list]) {
        let to = Path::new("/").join(path);
        if layout.shipped_as(&to).is_some() && to.exists() {
            step(&format!("{} stays as it is", to.display()));
            continue;
        }
        // install(1) removes what is there first: a program that runs cannot be written to.
        let mode = fs::metadata(tree.join(path))?.permissions().mode() & 0o777;
        let mut copy = changing(&to, "install")?;
        copy.arg("-D").arg(format!("--mode={mode:o}"));
        exec::run(copy.arg(tree.join(path)).arg(to))?;
    }
    step(&format!(
        "installed: {}; as a service, after `systemd-sysusers {} && systemctl daemon-reload`, it is configured by {}",
        prefix.join("bin/forwarder").display(),
        layout.user().display(),
        layout.configuration.display()
    ));
    Ok(())
}

/// Removes what the list in the prefix names; flags that somebody has written stay.
fn remove(layout: &Layout) -> Result<()> {
    let list = layout.list();
    let listed = fs::read_to_string(&list)
        .with_context(|| format!("nothing is installed there: {}", list.display()))?;
    let is_enabled = exec::succeeds(Command::new("systemctl").args([
        "--quiet",
        "is-enabled",
        "forwarder.service",
    ]));
    let unit = layout.prefix.join("lib/systemd/system/forwarder.service");
    let shown = Command::new("systemctl")
        .args(["show", "--property=FragmentPath", "forwarder.service"])
        .output();
    let is_this = shown.is_ok_and(|shown| {
        String::from_utf8_lossy(&shown.stdout)
            .trim()
            .ends_with(&unit.display().to_string())
    });
    ensure!(
        !(is_enabled && is_this),
        "forwarder.service is enabled: `systemctl disable --now forwarder` first"
    );
    let packaging = exec::workspace().join("forwarder/packaging");
    for path in listed.lines().map(Path::new).chain([list.as_path()]) {
        let shipped = layout
            .shipped_as(path)
            .map(|name| fs::read(packaging.join(name)));
        let shipped = shipped.transpose()?;
        if shipped.is_some_and(|shipped| fs::read(path).is_ok_and(|content| content != shipped)) {
            step(&format!(
                "{} was written by somebody and stays",
                path.display()
            ));
            continue;
        }
        exec::run(changing(path, "rm")?.arg("--force").arg(path))?;
    }
    let own = [
        "share/forwarder",
        "share/doc/forwarder/docs",
        "share/doc/forwarder/forwarder/packaging/fail2ban",
        "share/doc/forwarder/forwarder/packaging",
        "share/doc/forwarder/forwarder",
        "share/doc/forwarder",
    ];
    let own = own.map(|own| layout.prefix.join(own));
    let configuration = layout.configuration.parent().map(Path::to_owned);
    for folder in own.into_iter().chain(configuration) {
        if folder.exists() {
            let mut rmdir = changing(&folder, "rmdir")?;
            exec::run(rmdir.arg("--ignore-fail-on-non-empty").arg(&folder))?;
        }
    }
    step(&format!("removed from {}", layout.prefix.display()));
    Ok(())
}

/// A program that changes `path`: with root's rights only where it takes them.
fn changing(path: &Path, program: &str) -> Result<Command> {
    let folder = path.parent().unwrap_or(path);
    let there = folder
        .ancestors()
        .find(|folder| folder.exists())
        .unwrap_or(Path::new("/"));
    if exec::succeeds(Command::new("test").arg("-w").arg(there)) {
        return Ok(Command::new(program));
    }
    exec::as_root(program).with_context(|| {
        format!(
            "{} is not yours to write: become root, or choose --prefix",
            there.display()
        )
    })
}

/// Makes below `tree` all that an installation consists of. `binary` is installed with the programs beside it; `runs` is one that
/// runs on this machine and knows the same commands.
pub(crate) fn stage(tree: &Path, layout: &Layout, binary: &Path, runs: &Path) -> Result<()> {
    if tree.exists() {
        fs::remove_dir_all(tree).with_context(|| tree.display().to_string())?;
    }
    let below = |path: &Path| tree.join(path.strip_prefix("/").unwrap_or(path));
    let prefix = below(layout.prefix);
    for name in PROGRAMS {
        let built = binary.with_file_name(name);
        let content = fs::read(&built).with_context(|| built.display().to_string())?;
        write(&prefix.join("bin").join(name), 0o755, &content)?;
    }

    let manual = prefix.join("share/man/man1");
    fs::create_dir_all(&manual)?;
    exec::run(Command::new(runs).arg("man").arg("--to").arg(&manual))?;
    for (shell, path) in COMPLETIONS {
        let text = exec::output(Command::new(runs).args(["completions", shell]))?;
        write(&prefix.join(path), 0o644, text.as_bytes())?;
    }
    stage_documents(&prefix.join("share/doc/forwarder"))?;

    let packaging = exec::workspace().join("forwarder/packaging");
    let mut unit = fs::read_to_string(packaging.join("forwarder.service"))?;
    for (place, path) in [
        ("@BINARY@", layout.prefix.join("bin/forwarder")),
        ("@DEFAULTS@", layout.defaults.clone()),
        ("@CONFIGURATION@", layout.configuration.clone()),
    ] {
        ensure!(unit.contains(place), "forwarder.service has no {place}");
        unit = unit.replace(place, &path.display().to_string());
    }
    write(
        &prefix.join("lib/systemd/system/forwarder.service"),
        0o644,
        unit.as_bytes(),
    )?;
    write(
        &below(&layout.user()),
        0o644,
        &fs::read(packaging.join("sysusers.conf"))?,
    )?;
    for (path, name) in layout.written() {
        write(&below(path), 0o644, &fs::read(packaging.join(name))?)?;
    }
    // Whatever the umask is.
    exec::run(Command::new("chmod").args(["-R", "u=rwX,go=rX"]).arg(tree))
}

/// The documents have the same places as in the repository, so that links from one to another hold.
fn stage_documents(folder: &Path) -> Result<()> {
    for place in ["", "docs", "forwarder/packaging/fail2ban"] {
        let from = exec::workspace().join(place);
        for entry in fs::read_dir(&from).with_context(|| from.display().to_string())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default();
            let end = path.extension().and_then(OsStr::to_str).unwrap_or_default();
            let is_license = name.as_encoded_bytes().starts_with(b"LICENSE");
            if is_license || ["md", "json", "svg", "conf"].contains(&end) {
                write(&folder.join(place).join(name), 0o644, &fs::read(&path)?)?;
            }
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_between_installed_documents_hold() {
        let folder =
            std::env::temp_dir().join(format!("forwarder-documents-{}", std::process::id()));
        stage_documents(&folder).expect("staged");
        let mut links = 0;
        for path in files(&folder).expect("files") {
            let path = folder.join(path);
            if path.extension().is_none_or(|end| end != "md") {
                continue;
            }
            let text = fs::read_to_string(&path).expect("text");
            for link in text.split("](").skip(1) {
                let target = link.split([')', '#']).next().unwrap_or_default();
                // Reports are large, and of the repository alone.
                if target.is_empty() || target.contains("://") || target.contains("benchmarks/") {
                    continue;
                }
                let to = path.with_file_name(target);
                assert!(to.exists(), "{}: {target}", path.display());
                links += 1;
            }
        }
        assert!(links > 50, "{links}");
        fs::remove_dir_all(folder).expect("removed");
    }
}
