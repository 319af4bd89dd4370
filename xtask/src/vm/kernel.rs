//! Kernels to boot: Debian's cloud kernels, fetched once into `target/vm`, or one that somebody unpacked.
//! What is kept of each is its image and an archive of the modules that networking needs. Nothing is
//! installed: apt works with a state of its own, and takes the mirror's address from the system's sources.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::initramfs::Archive;
use crate::exec::{self, step};

/// Name, Debian suite, and how the version begins.
const DEBIAN: [(&str, &str, &str); 4] = [
    ("5.10", "bullseye", "5.10."),
    ("6.1", "bookworm", "6.1."),
    ("6.12", "trixie", "6.12."),
    ("sid", "sid", ""),
];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A kernel that can be booted.
pub(crate) struct Kernel {
    /// As it was asked for.
    pub(crate) name: String,
    /// As `uname -r` says it.
    pub(crate) release: String,
    pub(crate) image: PathBuf,
    /// A cpio archive.
    pub(crate) modules: PathBuf,
}

pub(crate) fn names() -> Vec<String> {
    DEBIAN.map(|(name, ..)| name.to_owned()).to_vec()
}

/// Where kernels, archives and logs are kept.
pub(crate) fn folder() -> PathBuf {
    exec::workspace().join("target/vm")
}

/// The kernel of that name, or in that folder; fetched where it is not there, or with `refresh`.
pub(crate) fn kernel(name: &str, refresh: bool) -> Result<Kernel> {
    if let Some((_, suite, version)) = DEBIAN.iter().find(|(known, ..)| *known == name) {
        let home = folder().join(name);
        if refresh || !home.join("release").is_file() {
            fetch(&home, suite, version)
                .with_context(|| format!("the kernel {name} of Debian {suite}"))?;
        }
        return kept(name, &home);
    }
    let tree = Path::new(name);
    if !tree.is_dir() {
        bail!(
            "no kernel {name}: {}, or a folder that a kernel package was unpacked into",
            names().join(", ")
        );
    }
    let label = tree.file_name().unwrap_or(tree.as_os_str());
    let home = folder().join("unpacked").join(label);
    fs::create_dir_all(&home)?;
    keep(tree, &home).with_context(|| format!("the kernel in {name}"))?;
    kept(&label.to_string_lossy(), &home)
}

fn kept(name: &str, home: &Path) -> Result<Kernel> {
    let release = fs::read_to_string(home.join("release"))?;
    Ok(Kernel {
        name: name.to_owned(),
        release: release.trim().to_owned(),
        image: home.join("vmlinuz"),
        modules: home.join("modules.cpio"),
    })
}

/// Downloads the newest package of that version, and what it is split into.
fn fetch(home: &Path, suite: &str, version: &str) -> Result<()> {
    step(&format!("fetching Debian's cloud kernel of {suite}"));
    let work = home.join("partial");
    let _ = fs::remove_dir_all(&work);
    let apt = Apt::new(&work, suite)?;
    exec::run(apt.command("apt-get").args(["update", "-qq"]))?;
    let package = apt.newest_image(version)?;
    let split = exec::output(apt.command("apt-cache").args([
        "depends",
        "--recurse",
        "--important",
        &package,
    ]))?;
    let parts = ["linux-image-", "linux-binary-", "linux-modules-"];
    let packages = split
        .lines()
        .filter(|line| parts.iter().any(|part| line.starts_with(part)));
    exec::run(
        apt.command("apt-get")
            .args(["download", "-qq"])
            .args(packages)
            .current_dir(&work),
    )?;
    let tree = work.join("tree");
    for package in files(&work)? {
        if package.extension().is_some_and(|end| end == "deb") {
            exec::run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&tree))?;
        }
    }
    keep(&tree, home)?;
    fs::remove_dir_all(&work)?;
    step(&format!("fetched {package}"));
    Ok(())
}

/// apt with sources and a state of its own; the system's stay as they are, and nobody needs to be root.
struct Apt {
    configuration: PathBuf,
}

impl Apt {
    fn new(work: &Path, suite: &str) -> Result<Self> {
        let state = work.join("apt");
        fs::create_dir_all(state.join("lists/partial"))?;
        fs::create_dir_all(state.join("cache/archives/partial"))?;
        fs::write(state.join("status"), "")?;
        fs::write(state.join("sources.list"), sources(suite)?)?;
        let path = state.display();
        let configuration = state.join("apt.conf");
        let text = format!(
            "Dir::State \"{path}\";\n\
             Dir::State::status \"{path}/status\";\n\
             Dir::State::lists \"{path}/lists\";\n\
             Dir::Cache \"{path}/cache\";\n\
             Dir::Etc::sourcelist \"{path}/sources.list\";\n\
             Dir::Etc::sourceparts \"-\";\n\
             APT::Architecture \"amd64\";\n\
             APT::Sandbox::User \"root\";\n\
             Acquire::Languages \"none\";\n\
             Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n"
        );
        fs::write(&configuration, text)?;
        Ok(Self { configuration })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.configuration);
        command
    }

    /// The versioned image packages; the one that merely names the newest is missing from old suites.
    fn newest_image(&self, version: &str) -> Result<String> {
        let pattern = r"^linux-image-[0-9][^ ]*-cloud-amd64$";
        let found =
            exec::output(
                self.command("apt-cache")
                    .args(["search", "--names-only", pattern]),
            )?;
        let prefix = format!("linux-image-{version}");
        found
            .lines()
            .filter_map(|line| line.split(' ').next())
            .filter(|package| package.starts_with(&prefix) && numbers(package).len() >= 3)
            .max_by_key(|package| numbers(package))
            .map(str::to_owned)
            .with_context(|| format!("the mirror has no {prefix}*-cloud-amd64"))
    }
}

/// The numbers in a version, which compare as versions do; not those of `amd64`.
fn numbers(package: &str) -> Vec<u64> {
    package
        .trim_end_matches("amd64")
        .split(|character: char| !character.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// The addresses of the mirrors that the system's own apt uses, each once.
///
/// # Errors
/// There is no apt.
pub(crate) fn mirrors() -> Result<Vec<String>> {
    let text = exec::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    let mut mirrors: Vec<_> = text.lines().map(str::to_owned).collect();
    mirrors.sort();
    mirrors.dedup();
    Ok(mirrors)
}

/// Lines of sources.list for a suite, from the mirrors that the system itself uses.
fn sources(suite: &str) -> Result<String> {
    let mut options = "arch=amd64".to_owned();
    if Path::new(KEYRING).exists() {
        options += &format!(" signed-by={KEYRING}");
    }
    let lines: Vec<String> = mirrors()?
        .iter()
        .filter_map(|mirror| {
            if mirror.contains("debian-security") {
                (suite != "sid").then(|| format!("deb [{options}] {mirror} {suite}-security main"))
            } else {
                mirror
                    .ends_with("/debian/")
                    .then(|| format!("deb [{options}] {mirror} {suite} main"))
            }
        })
        .collect();
    if lines.is_empty() {
        bail!(
            "apt's sources name no Debian mirror: add one, or name a folder with an unpacked kernel"
        );
    }
    Ok(lines.join("\n") + "\n")
}

/// Keeps what booting takes of an unpacked kernel package.
fn keep(tree: &Path, home: &Path) -> Result<()> {
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .flat_map(|folder| files(&tree.join(folder)).unwrap_or_default())
        .find(|folder| folder.join("kernel").is_dir())
        .with_context(|| format!("no lib/modules/*/kernel in {}", tree.display()))?;
    let release = modules
        .file_name()
        .context("a folder named after the release")?
        .to_string_lossy()
        .into_owned();
    let images = [
        tree.join("boot").join(format!("vmlinuz-{release}")),
        modules.join("vmlinuz"),
    ];
    let image = images
        .iter()
        .find(|image| image.is_file())
        .with_context(|| format!("no {}", images[0].display()))?;

    let stage = home.join("stage");
    let _ = fs::remove_dir_all(&stage);
    let staged = stage.join("lib/modules").join(&release);
    copy_modules(&modules, Path::new(""), &staged)?;
    decompress(&staged)?;
    exec::run(Command::new("depmod").arg("-b").arg(&stage).arg(&release))?;
    let mut archive = Archive::default();
    archive.tree(&staged, &format!("usr/lib/modules/{release}"))?;
    fs::write(home.join("modules.cpio"), archive.finish())?;
    fs::remove_dir_all(&stage)?;
    fs::copy(image, home.join("vmlinuz"))?;
    // Last: its presence says that the rest is whole.
    fs::write(home.join("release"), &release)?;
    Ok(())
}

/// Whether a path below `lib/modules/RELEASE`, file or folder, is of use to networking.
fn wanted(path: &Path) -> bool {
    let text = path.to_string_lossy();
    let unused = ["ethernet", "wireless", "mac80211", "bluetooth", "can"];
    if unused
        .iter()
        .any(|name| path.iter().any(|part| part == *name))
    {
        return false;
    }
    let used = ["net", "lib", "crypto", "arch", "drivers/net"].map(|part| format!("kernel/{part}"));
    let is_list = text.starts_with("modules.builtin") || text == "modules.order";
    is_list
        || used
            .iter()
            .any(|part| text.starts_with(part.as_str()) || part.starts_with(text.as_ref()))
}

fn copy_modules(modules: &Path, below: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.join(below))?;
    for path in files(&modules.join(below))? {
        let relative = path.strip_prefix(modules)?;
        if path.is_symlink() || !wanted(relative) {
            continue;
        }
        if path.is_dir() {
            copy_modules(modules, relative, to)?;
        } else {
            fs::copy(&path, to.join(relative))?;
        }
    }
    Ok(())
}

/// In place: the guest's modprobe takes them as they are.
fn decompress(folder: &Path) -> Result<()> {
    let (mut xz, mut zstd) = (Vec::new(), Vec::new());
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in files(&folder)? {
            match path.extension().and_then(|end| end.to_str()) {
                _ if path.is_dir() => folders.push(path),
                Some("xz") => xz.push(path),
                Some("zst") => zstd.push(path),
                _ => {}
            }
        }
    }
    if !xz.is_empty() {
        exec::run(Command::new("xz").arg("--decompress").args(xz))?;
    }
    if !zstd.is_empty() {
        exec::run(Command::new("zstd").args(["-q", "-d", "--rm"]).args(zstd))?;
    }
    Ok(())
}

/// What a folder holds, in order.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        let newer = "linux-image-5.10.0-46-cloud-amd64";
        assert!(numbers(newer) > numbers("linux-image-5.10.0-9-cloud-amd64"));
        assert!(numbers("linux-image-6.1-cloud-amd64").len() < 3);
    }

    #[test]
    fn modules_of_networking_are_kept() {
        for kept in [
            "kernel",
            "kernel/drivers",
            "kernel/drivers/net/veth.ko",
            "kernel/net/sched/cls_bpf.ko.xz",
            "modules.order",
        ] {
            assert!(wanted(Path::new(kept)), "{kept}");
        }
        for left in [
            "kernel/drivers/gpu",
            "kernel/drivers/net/ethernet",
            "build",
            "vmlinuz",
        ] {
            assert!(!wanted(Path::new(left)), "{left}");
        }
    }
}
