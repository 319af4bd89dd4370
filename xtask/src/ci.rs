//! `ci`: what must pass before a change goes in.

use anyhow::Result;

use crate::{
    exec::{self, step},
    setup, test,
};

pub(crate) fn ci() -> Result<()> {
    setup::toolchain()?;
    format_and_lint()?;
    test::test(&test::Options::default())
}

fn format_and_lint() -> Result<()> {
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
    ]))
}
