//! `run`: the demonstration, or with arguments `forwarder run ARGS`.
//!
//! Everything is built as the user who asks. Only the finished binary gets root, through sudo where
//! it must; where that cannot be, it runs as it is and says what root would add.

use std::process::Command;

use anyhow::Result;

use crate::{
    ebpf,
    exec::{self, step},
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// End after the demonstration's checks instead of staying up
    #[arg(long, conflicts_with = "args")]
    once: bool,
    /// Port of the demonstration on 127.0.0.1
    #[arg(long, default_value_t = 8080, conflicts_with = "args")]
    port: u16,
    /// Optimised build
    #[arg(long)]
    release: bool,
    /// Arguments for `forwarder run`
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<String>,
}

impl Options {
    /// Programs that the demonstration starts.
    pub(crate) fn programs(&self) -> Vec<&'static str> {
        if self.args.is_empty() {
            vec!["ip"]
        } else {
            vec![]
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let object = ebpf::object()?;
    step("building forwarder");
    let mut build = vec!["build", "--package", "forwarder", "--bin", "forwarder"];
    let demonstration = options.args.is_empty();
    if demonstration {
        build.extend(["--package", "forwarder-tests", "--bin", "forwarder-demo"]);
    }
    if options.release {
        build.push("--release");
    }
    let built = exec::build_executables(&build, &object)?;

    let mut args = Vec::new();
    let program = if demonstration {
        args.extend(["--port".to_owned(), options.port.to_string()]);
        args.extend(options.once.then(|| "--once".to_owned()));
        exec::executable(&built, "forwarder-demo")?
    } else {
        args.push("run".to_owned());
        args.extend(options.args.iter().cloned());
        exec::executable(&built, "forwarder")?
    };
    let mut command = exec::as_root(&program).unwrap_or_else(|| Command::new(&program));
    command.args(args);
    step(if demonstration {
        "the demonstration"
    } else {
        "forwarder run"
    });
    exec::become_program(command)
}
