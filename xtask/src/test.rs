//! `test`: tier 0 as the user who asks, then tiers 1 and 2 with root's rights.
//!
//! Tier 0 is pure code. Tier 1 sends packets through the loaded programs (`tests/packet`), tier 2
//! uses real sockets in network namespaces (`tests/netns`). Building never happens as root for a
//! user who is not.

use anyhow::{Result, bail};

use crate::{
    ebpf,
    exec::{self, step},
};

#[derive(Default, clap::Args)]
pub(crate) struct Options {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Only this tier: 0 pure code, 1 packets, 2 network namespaces
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=2))]
    tier: Option<u8>,
    /// Optimised build of what tiers 1 and 2 test
    #[arg(long)]
    release: bool,
}

pub(crate) fn test(options: &Options) -> Result<()> {
    if options.tier.is_none_or(|tier| tier == 0) {
        step("tier 0: pure code");
        exec::run(
            exec::cargo()
                .args(["test", "--quiet", "--no-fail-fast"])
                .args(&options.filter),
        )?;
        exec::run(exec::cargo().args(["check", "--quiet", "--package", "forwarder-ebpf"]))?;
    }
    if options.tier == Some(0) {
        return Ok(());
    }

    let object = ebpf::build()?;
    step("building forwarder and its tests");
    let mut profile = Vec::new();
    profile.extend(options.release.then_some("--release"));
    let binary = [
        &["build", "--package", "forwarder", "--bin", "forwarder"],
        &profile[..],
    ];
    let binary = exec::executable(&exec::build_executables(&binary.concat())?, "forwarder")?;
    let tests = [
        &[
            "test",
            "--no-run",
            "--package",
            "forwarder-tests",
            "--tests",
        ],
        &profile[..],
    ];
    let tests = exec::build_executables(&tests.concat())?;

    let mut failed = Vec::new();
    for (tier, name, what) in [(1, "packet", "packets"), (2, "netns", "network namespaces")] {
        if options.tier.is_some_and(|only| only != tier) {
            continue;
        }
        let program = exec::executable(&tests, name)?;
        let Some(mut command) = exec::as_root(std::path::Path::new("env")) else {
            bail!(
                "tier {tier} needs root, for BPF and network namespaces: \
                 run `sudo -v` first, or `cargo xtask test` as root"
            );
        };
        step(&format!("tier {tier}: {what}"));
        let variable = |name: &str, path: &std::path::Path| format!("{name}={}", path.display());
        command
            .current_dir(exec::workspace().join("tests"))
            .arg(variable("FORWARDER_BIN", &binary))
            .arg(variable("FORWARDER_EBPF_OBJECT", &object))
            .arg(&program)
            .args(&options.filter);
        // The other tier's result is worth having too.
        if let Err(error) = exec::run(&mut command) {
            failed.push(format!("tier {tier}: {error}"));
        }
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("; "));
    }
    Ok(())
}
