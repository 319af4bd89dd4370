//! Programs that a task starts: which package brings each, and having them installed.
//!
//! As root with a package manager that we know, what is missing is installed. Otherwise the error names the one command
//! that installs it. Both happen before anything is built.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::exec::{self, step};

/// A program, and the packages of apt, dnf and pacman that bring it (several with spaces between).
struct Package {
    program: &'static str,
    names: [&'static str; 3],
}

const fn package(program: &'static str, names: [&'static str; 3]) -> Package {
    Package { program, names }
}

const PACKAGES: &[Package] = &[
    package(
        "/usr/lib/cni/bridge",
        [
            "containernetworking-plugins",
            "containernetworking-plugins",
            "cni-plugins",
        ],
    ),
    package("apt-get", ["apt", "apt", "apt"]),
    package("bash", ["bash", "bash", "bash"]),
    package("busybox", ["busybox-static", "busybox", "busybox"]),
    package(
        "chromium",
        [
            "chromium fonts-dejavu-core",
            "chromium dejavu-sans-fonts",
            "chromium ttf-dejavu",
        ],
    ),
    package(
        "crowdsec-custom-bouncer",
        [
            "crowdsec-custom-bouncer",
            "crowdsec-custom-bouncer",
            "crowdsec-custom-bouncer",
        ],
    ),
    package("curl", ["curl", "curl", "curl"]),
    package("debootstrap", ["debootstrap", "debootstrap", "debootstrap"]),
    package("depmod", ["kmod", "kmod", "kmod"]),
    package("docker", ["docker.io", "docker-cli", "docker"]),
    package("dockerd", ["docker.io", "moby-engine", "docker"]),
    package("dpkg-deb", ["dpkg", "dpkg", "dpkg"]),
    package("ethtool", ["ethtool", "ethtool", "ethtool"]),
    package(
        "fail2ban-server",
        ["fail2ban", "fail2ban-server", "fail2ban"],
    ),
    package("git", ["git", "git", "git"]),
    package("haproxy", ["haproxy", "haproxy", "haproxy"]),
    package("ip", ["iproute2", "iproute", "iproute2"]),
    package("iperf3", ["iperf3", "iperf3", "iperf3"]),
    package(
        "iptables-legacy",
        ["iptables", "iptables-legacy", "iptables"],
    ),
    package("iptables-restore", ["iptables", "iptables-nft", "iptables"]),
    package("nft", ["nftables", "nftables", "nftables"]),
    package(
        "qemu-aarch64-static",
        ["qemu-user-static", "qemu-user-static", "qemu-user-static"],
    ),
    package(
        "qemu-system-x86_64",
        ["qemu-system-x86", "qemu-system-x86-core", "qemu-system-x86"],
    ),
    package("podman", ["podman", "podman", "podman"]),
    package("rpm", ["rpm", "rpm", "rpm-tools"]),
    package(
        "sctp_test",
        ["lksctp-tools", "lksctp-tools", "lksctp-tools"],
    ),
    package("setpriv", ["util-linux", "util-linux", "util-linux"]),
    package("sockperf", ["sockperf", "sockperf", "sockperf"]),
    package("tar", ["tar", "tar", "tar"]),
    package("tc", ["iproute2", "iproute-tc", "iproute2"]),
    package("unshare", ["util-linux", "util-linux-core", "util-linux"]),
    package("wrk", ["wrk", "wrk", "wrk"]),
    package("xz", ["xz-utils", "xz", "xz"]),
    package("zstd", ["zstd", "zstd", "zstd"]),
];

/// A package manager: its place in `Package::names`, and what is run before and for an installation.
struct Manager {
    column: usize,
    refresh: Option<&'static [&'static str]>,
    install: &'static [&'static str],
}

const MANAGERS: [Manager; 3] = [
    Manager {
        column: 0,
        refresh: Some(&["apt-get", "update", "-q"]),
        install: &["apt-get", "install", "-y", "--no-install-recommends"],
    },
    Manager {
        column: 1,
        refresh: None,
        install: &["dnf", "install", "-y"],
    },
    Manager {
        column: 2,
        refresh: None,
        install: &["pacman", "-Sy", "--needed", "--noconfirm"],
    },
];

/// Makes sure that these programs are there. `install`: as root, what is missing may be installed.
///
/// # Errors
/// Names what is missing and the command that installs it; or the installation failed.
pub(crate) fn provide(programs: &[&str], install: bool) -> Result<()> {
    let missing = missing(programs);
    if missing.is_empty() {
        return Ok(());
    }
    let manager = MANAGERS
        .iter()
        .find(|manager| exec::find(manager.install[0]).is_some());
    let Some(manager) = manager else {
        bail!(
            "{} missing, and none of apt, dnf and pacman to install them with",
            missing.join(", ")
        );
    };
    let command = command(manager, &missing)?;
    let whole = match manager.refresh {
        Some(refresh) => format!("{} && {}", refresh.join(" "), command.join(" ")),
        None => command.join(" "),
    };
    if !exec::is_root() {
        bail!("{} missing: sudo sh -c '{whole}'", missing.join(", "));
    }
    if !install {
        bail!("{} missing: {whole}", missing.join(", "));
    }
    step(&format!("{} missing: {whole}", missing.join(", ")));
    if let Some(refresh) = manager.refresh {
        manage(refresh)?;
    }
    manage(&command)?;
    let missing = self::missing(programs);
    ensure!(
        missing.is_empty(),
        "{} missing still after `{}`",
        missing.join(", "),
        command.join(" ")
    );
    Ok(())
}

fn missing<'a>(programs: &[&'a str]) -> Vec<&'a str> {
    let mut missing: Vec<_> = programs
        .iter()
        .copied()
        .filter(|name| exec::find(name).is_none())
        .collect();
    missing.sort_unstable();
    missing.dedup();
    missing
}

/// The words of the command that installs what brings `programs`.
fn command(manager: &Manager, programs: &[&str]) -> Result<Vec<&'static str>> {
    let mut packages = Vec::new();
    for program in programs {
        let package = PACKAGES.iter().find(|package| package.program == *program);
        let name = package
            .with_context(|| format!("no package of {program} is known"))?
            .names[manager.column];
        packages.extend(name.split(' '));
    }
    packages.sort_unstable();
    packages.dedup();
    Ok([manager.install, &packages].concat())
}

/// Runs a package manager, which asks nothing.
fn manage(words: &[&str]) -> Result<()> {
    let path = exec::find(words[0]).context("found before")?;
    exec::run(
        Command::new(path)
            .args(&words[1..])
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_not_missing() {
        assert_eq!(
            missing(&["sh", "no-such-program", "sh"]),
            ["no-such-program"]
        );
    }

    #[test]
    fn a_package_is_named_once_and_as_its_manager_names_it() {
        let [apt, dnf, pacman] = &MANAGERS;
        let words = |manager| command(manager, &["tc", "ip"]).unwrap().join(" ");
        assert!(words(apt).ends_with("--no-install-recommends iproute2"));
        assert!(words(dnf).ends_with("-y iproute iproute-tc"));
        assert!(words(pacman).ends_with("--noconfirm iproute2"));
    }

    #[test]
    fn every_program_that_a_task_names_has_a_package() {
        for programs in crate::every_program() {
            command(&MANAGERS[0], &programs).unwrap();
        }
    }
}
