//! `ci`: what must pass before a change goes in.

use std::process::Command;

use anyhow::Result;

use crate::{
    ebpf,
    exec::{self, step},
    test,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only what runs no test: formatting, clippy, and whether prebuilt/ is what the sources give
    #[arg(long)]
    pub(crate) lint: bool,
}

impl Options {
    pub(crate) fn programs(&self) -> Vec<&'static str> {
        if self.lint {
            return Vec::new();
        }
        [test::Options::default(), test::Options::smoke()]
            .iter()
            .flat_map(test::Options::programs)
            .collect()
    }
}

pub(crate) fn ci(options: &Options) -> Result<()> {
    components()?;
    step("formatting");
    exec::run(exec::cargo().args(["fmt", "--all", "--check"]))?;
    step("clippy");
    exec::run(exec::cargo().args([
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    ebpf::check()?;
    if options.lint {
        return Ok(());
    }
    test::test(&test::Options::default())?;
    test::test(&test::Options::smoke())
}

/// Adds the parts of the toolchain that a minimal one lacks.
fn components() -> Result<()> {
    for (subcommand, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if !exec::succeeds(exec::cargo().args([subcommand, "--version"])) {
            step(&format!("installing {component}"));
            exec::run(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    Ok(())
}
