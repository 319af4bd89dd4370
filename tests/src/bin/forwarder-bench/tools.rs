//! The programs that the benchmark starts, where they come from, and what the machine is.

use std::{path::PathBuf, process::Command};

use anyhow::{Result, bail};

use crate::arena::Programs;

/// Program, Debian package, and the words that make it say its version.
const NEEDED: [(&str, &str, &str); 9] = [
    ("ip", "iproute2", "-V"),
    ("tc", "iproute2", "-V"),
    ("ethtool", "ethtool", "--version"),
    ("iperf3", "iperf3", "--version"),
    ("sockperf", "sockperf", "--version"),
    ("wrk", "wrk", "--version"),
    ("haproxy", "haproxy", "-v"),
    ("iptables-restore", "iptables", "--version"),
    ("nft", "nftables", "--version"),
];

/// Where a program is, for root.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(usual)
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

/// # Errors
/// Programs are missing; with the command that installs them.
pub(crate) fn require() -> Result<()> {
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(program, ..)| find(program).is_none())
        .map(|(_, package, _)| *package)
        .collect();
    if !missing.is_empty() {
        bail!(
            "programs are missing: apt-get install {}",
            missing.join(" ")
        );
    }
    Ok(())
}

/// The machine and the versions of everything, a line each.
///
/// # Errors
/// None at present; what is unknown is said to be.
pub(crate) fn environment(programs: &Programs) -> Result<Vec<String>> {
    let first_line = |program: &str, arguments: &[&str]| {
        let output = Command::new(find(program)?).args(arguments).output().ok()?;
        // Some say it on standard error.
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        let line = text.lines().find(|line| !line.trim().is_empty())?;
        Some(line.trim().to_owned())
    };
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown", |(_, name)| name.trim());
    let mut lines = vec![
        format!("forwarder {}", env!("CARGO_PKG_VERSION")),
        format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
        format!("{} cores, {model}", std::thread::available_parallelism()?),
    ];
    for (program, _, flag) in NEEDED.iter().filter(|(program, ..)| *program != "tc") {
        lines.push(
            first_line(program, &[flag]).unwrap_or_else(|| format!("{program}, version unknown")),
        );
    }
    for program in ["pasta", "docker-proxy"] {
        let path = match program {
            "docker-proxy" => programs.docker_proxy.clone(),
            _ => find(program),
        };
        let package = match program {
            "docker-proxy" => "docker.io",
            _ => "passt",
        };
        lines.push(match path {
            None => format!("{program}: not found (apt-get install {package})"),
            Some(_) if program == "docker-proxy" => match package_version(package) {
                Some(version) => format!("docker-proxy, package {package} {version}"),
                None => "docker-proxy".to_owned(),
            },
            Some(_) => first_line(program, &["--version"]).unwrap_or_else(|| program.to_owned()),
        });
    }
    Ok(lines)
}

/// Names a run.
pub(crate) fn date_and_host() -> String {
    let output = Command::new("date").arg("+%F").output();
    let date = output.map_or_else(
        |_| "undated".into(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    );
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{date}-{}", host.trim())
}

/// The version of an installed package, else of the one that would be installed: docker-proxy 20.10 cannot
/// say its own.
fn package_version(package: &str) -> Option<String> {
    let output = Command::new("apt-cache")
        .args(["policy", package])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let field = |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name));
    let version = field("Installed:").filter(|version| version.trim() != "(none)");
    version
        .or_else(|| field("Candidate:"))
        .map(|version| version.trim().to_owned())
}
