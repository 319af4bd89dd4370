//! `test`: tier 0 as the user who asks, then tiers 1 and 2 with root's rights; tier 3 if it is asked for.
//!
//! Tier 0 is pure code. Tier 1 sends packets through the loaded programs (`tests/packet`), tier 2 uses real sockets in
//! network namespaces (`tests/netns`), tier 3 whole programs of others (`tests/system`). Building never happens as root for
//! a user who is not.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::{
    dist, ebpf,
    exec::{self, step},
    root,
};

#[derive(Default, clap::Args)]
pub(crate) struct Options {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Only this tier: 0 pure code, 1 packets, 2 network namespaces, 3 browsers, packages, documents (not run unless asked for)
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=3))]
    pub(crate) tier: Option<u8>,
    /// Of tier 3, what takes no package to be built and no other Debian
    #[arg(long, requires = "tier")]
    pub(crate) smoke: bool,
    /// Optimised build of what tiers 1 and 2 test
    #[arg(long)]
    release: bool,
}

/// A tier that needs root: its number, the test binary, and what it is about.
const TIERS: [(u8, &str, &str); 3] = [
    (1, "packet", "packets"),
    (2, "netns", "network namespaces"),
    (3, "system", "browsers, packages, documents"),
];

/// What is pinned stays in a bpffs of the tests' own, which a machine without one has too. The same with cgroup v2.
const MOUNTS: &str = r#"
set -e
mount -t bpf bpf /sys/fs/bpf
grep -q ' cgroup2 ' /proc/mounts || mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env "$@"
"#;

impl Options {
    /// Tier 3, as CI runs it.
    pub(crate) fn smoke() -> Self {
        Self {
            tier: Some(3),
            smoke: true,
            ..Self::default()
        }
    }

    fn has(&self, tier: u8) -> bool {
        self.tier.map_or(tier < 3, |only| only == tier)
    }

    /// Programs that the chosen tests start.
    pub(crate) fn programs(&self) -> Vec<&'static str> {
        let mut programs = Vec::new();
        if self.has(1) || self.has(2) {
            programs.extend([
                "ethtool",
                "ip",
                "nft",
                "sctp_test",
                "setpriv",
                "tc",
                "unshare",
            ]);
        }
        if self.has(3) {
            programs.extend(["chromium", "curl", "ip", "setpriv", "unshare"]);
            programs.extend([
                "/usr/lib/cni/bridge",
                "busybox",
                "crowdsec-custom-bouncer",
                "docker",
                "dockerd",
                "fail2ban-server",
                "iptables-legacy",
                "podman",
                "tar",
            ]);
            programs.extend(if self.smoke {
                &[][..]
            } else {
                &["apt-get", "debootstrap", "qemu-aarch64-static", "rpm"]
            });
        }
        programs
    }
}

pub(crate) fn test(options: &Options) -> Result<()> {
    if options.has(0) {
        step("tier 0: pure code");
        exec::run(
            exec::cargo()
                .args(["test", "--quiet", "--no-fail-fast"])
                .args(&options.filter),
        )?;
        let programs = [
            "test",
            "--quiet",
            "--package",
            "forwarder-tests",
            "--lib",
            "--bins",
        ];
        exec::run(exec::cargo().args(programs).args(&options.filter))?;
        exec::run(exec::cargo().args(["check", "--quiet", "--package", "forwarder-ebpf"]))?;
    }
    if options.tier == Some(0) {
        return Ok(());
    }

    let (binary, tests) = build(if options.release { &["--release"] } else { &[] })?;
    let mut variables = vec![format!("FORWARDER_BIN={}", binary.display())];
    if options.has(3) && !options.smoke {
        variables.push(format!("FORWARDER_ROOT={}", root::debian()?.display()));
        variables.push(format!("FORWARDER_ENGINES={}", root::engines()?.display()));
        variables.push(format!(
            "FORWARDER_PACKAGES={}",
            dist::packages()?.display()
        ));
    }
    let mut failed = Vec::new();
    for (tier, name, what) in TIERS {
        if !options.has(tier) {
            continue;
        }
        step(&format!("tier {tier}: {what}"));
        let mut command = exec::as_root("unshare").context("needs root")?;
        command
            .current_dir(exec::workspace().join("tests"))
            .args(["--mount", "sh", "-c", MOUNTS, "sh"])
            .args(&variables)
            .arg(exec::executable(&tests, name)?)
            .args(&options.filter)
            .args(if options.smoke {
                &["--skip", "package::", "--skip", "newer::"][..]
            } else {
                &[]
            });
        // The other tiers' results are worth having too.
        if let Err(error) = exec::run(&mut command) {
            failed.push(format!("tier {tier}: {error}"));
        }
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("; "));
    }
    Ok(())
}

/// Builds the programs and all test binaries of tiers 1 to 3; returns `forwarder`, and those.
pub(crate) fn build(profile: &[&str]) -> Result<(PathBuf, Vec<(String, PathBuf)>)> {
    let object = ebpf::object()?;
    step("building forwarder and its tests");
    let binary = ["build", "--package", "forwarder", "--bins"];
    let binary = exec::build_executables(&[&binary, profile].concat(), &object)?;
    let tests = [
        "test",
        "--no-run",
        "--package",
        "forwarder-tests",
        "--tests",
    ];
    let tests = exec::build_executables(&[&tests, profile].concat(), &object)?;
    Ok((exec::executable(&binary, "forwarder")?, tests))
}
