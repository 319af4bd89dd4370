//! `bench`: builds everything optimised and starts `forwarder-bench`, whose options these are.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::{
    ebpf,
    exec::{self, step},
};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    /// Options of the benchmark, such as `--quick`
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGS"
    )]
    args: Vec<String>,
}

/// Programs that the benchmark starts; docker-proxy and pasta it looks for itself.
pub(crate) const PROGRAMS: [&str; 9] = [
    "ethtool",
    "haproxy",
    "ip",
    "iperf3",
    "iptables-restore",
    "nft",
    "sockperf",
    "tc",
    "wrk",
];

pub(crate) fn bench(options: &Options) -> Result<()> {
    let object = ebpf::object()?;
    let generator = ebpf::generator()?;
    step("building forwarder and its benchmark, optimised");
    let built = exec::build_executables(
        &[
            "build",
            "--release",
            "--package",
            "forwarder",
            "--bin",
            "forwarder",
            "--package",
            "forwarder-tests",
            "--bin",
            "forwarder-bench",
        ],
        &object,
    )?;
    let variable = |name: &str, path: &Path| format!("{name}={}", path.display());
    let mut command = exec::as_root("env").context("needs root")?;
    command
        .current_dir(exec::workspace())
        .arg(variable(
            "FORWARDER_BIN",
            &exec::executable(&built, "forwarder")?,
        ))
        .arg(variable("GENERATOR_OBJECT", &generator))
        .arg(exec::executable(&built, "forwarder-bench")?)
        .args(&options.args);
    step("the benchmark");
    exec::become_program(command)
}
