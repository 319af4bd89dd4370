//! `bench`: builds everything optimised and starts `forwarder-bench`, whose options these are.

use std::path::Path;

use anyhow::{Result, bail};

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

pub(crate) fn bench(options: &Options) -> Result<()> {
    ebpf::build()?;
    step("building forwarder and its benchmark, optimised");
    let built = exec::build_executables(&[
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
    ])?;
    let variable = |name: &str, path: &Path| format!("{name}={}", path.display());
    let Some(mut command) = exec::as_root(Path::new("env")) else {
        bail!(
            "the benchmark needs root, for BPF and network namespaces: run `sudo -v` first, or \
             `cargo xtask bench` as root"
        );
    };
    command
        .current_dir(exec::workspace())
        .arg(variable(
            "FORWARDER_BIN",
            &exec::executable(&built, "forwarder")?,
        ))
        .arg(variable("GENERATOR_OBJECT", &ebpf::generator()))
        .arg(exec::executable(&built, "forwarder-bench")?)
        .args(&options.args);
    step("the benchmark");
    exec::become_program(command)
}
