//! `deny`: licenses, sources and known faults of all dependencies, by cargo-deny, whose rules are in `deny.toml`. No part of
//! `ci`: building cargo-deny takes longer than all that does, and Cargo.lock changes seldom.

use std::process::Command;

use anyhow::{Context, Result};

use crate::exec::{self, step};

/// Its version, with which `deny.toml` is known to work.
const VERSION: &str = "0.20.2";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// What is checked: bans, licenses, sources; advisories, which are fetched from github.com
    #[arg(default_values = ["bans", "licenses", "sources"])]
    checks: Vec<String>,
}

pub(crate) fn deny(options: &Options) -> Result<()> {
    let folder = exec::workspace().join("target/deny");
    let program = folder.join("bin/cargo-deny");
    if !exec::succeeds(Command::new(&program).arg("--version")) {
        step(&format!("building cargo-deny {VERSION}"));
        let install = ["install", "cargo-deny", "--version", VERSION, "--locked"];
        exec::run(exec::cargo().args(install).arg("--root").arg(&folder)).context("cargo-deny")?;
    }
    step(&format!("checking {}", options.checks.join(", ")));
    exec::run(
        Command::new(&program)
            .current_dir(exec::workspace())
            .arg("check")
            .args(&options.checks),
    )
}
