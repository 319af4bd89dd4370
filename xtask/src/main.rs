//! `cargo xtask ...`: the repository's tasks. A subcommand is a file of the same name.
//!
//! What `cargo build` cannot do is done here: the eBPF toolchain, the object that the binary
//! embeds, and whatever needs root.

mod bench;
mod ci;
mod deny;
mod dist;
mod ebpf;
mod exec;
mod fresh;
mod install;
mod requirements;
mod root;
mod run;
mod setup;
#[path = "../../forwarder/build/sources.rs"]
mod sources;
mod test;
#[cfg(test)]
mod tidy;
mod verifier;
mod vm;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "The repository's tasks",
    max_term_width = 100
)]
struct Cli {
    /// Install no packages: name what is missing, and end
    #[arg(long, global = true)]
    no_install: bool,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Installs the toolchain of the eBPF program into target/toolchain (the others do it too)
    Setup,
    /// Builds the eBPF object from its sources and renews prebuilt/, which every other build embeds
    Ebpf(ebpf::Options),
    /// Builds everything and runs the demonstration, or `forwarder run ARGS` after `--`
    Run(run::Options),
    /// Runs the tests: unprivileged ones, packets through the loaded programs, real sockets
    Test(test::Options),
    /// Builds optimised and installs: the program, manual pages, completions, the unit
    Install(install::Options),
    /// Makes packages in target/dist: deb, rpm, static tarballs, checksums
    Dist,
    /// Tries the README's two commands in a clean Debian with nothing but rustup, and says how long they took
    Fresh(fresh::Options),
    /// Measures forwarder beside iptables, nftables, docker-proxy and others; `--help` says more
    Bench(bench::Options),
    /// Runs tiers 1 and 2, or a command, under Debian's kernels 5.10, 6.1, 6.12 and the newest, in QEMU
    Vm(vm::Options),
    /// Prints what the verifier says of each program under each kernel, as docs/verifier.md has it
    Verifier(verifier::Options),
    /// Checks licenses and sources of all dependencies by cargo-deny, which it builds into target/deny
    Deny(deny::Options),
    /// What must pass before a change goes in: formatting, clippy, the eBPF object, all tests
    Ci(ci::Options),
}

impl Task {
    /// Programs that it starts, and whether it needs root's rights.
    fn needs(&self) -> (Vec<&'static str>, bool) {
        match self {
            Self::Setup | Self::Ebpf(_) | Self::Install(_) | Self::Dist | Self::Deny(_) => {
                (vec![], false)
            }
            Self::Run(options) => (options.programs(), false),
            Self::Test(options) => (options.programs(), options.tier != Some(0)),
            Self::Fresh(_) => (fresh::PROGRAMS.to_vec(), true),
            Self::Bench(_) => (bench::PROGRAMS.to_vec(), true),
            Self::Vm(_) | Self::Verifier(_) => (vm::PROGRAMS.to_vec(), false),
            Self::Ci(options) => (options.programs(), !options.lint),
        }
    }
}

fn main() {
    let cli = Cli::parse();
    if let Err(error) = prepare(&cli).and_then(|()| start(&cli.task)) {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}

/// What each task may start, for a test.
#[cfg(test)]
fn every_program() -> Vec<Vec<&'static str>> {
    let task = |words: &str| Cli::parse_from(words.split(' ')).task.needs().0;
    [
        "x run",
        "x test",
        "x test --tier 3",
        "x bench",
        "x vm",
        "x verifier",
        "x ci",
    ]
    .map(task)
    .into()
}

/// Before anything is built.
fn prepare(cli: &Cli) -> Result<()> {
    let (programs, root) = cli.task.needs();
    requirements::provide(&programs, !cli.no_install)?;
    ensure!(
        !root || exec::as_root("true").is_some(),
        "needs root, for BPF and network namespaces: run `sudo -v` first, or this as root"
    );
    Ok(())
}

fn start(task: &Task) -> Result<()> {
    match task {
        Task::Setup => setup::toolchain().map(drop),
        Task::Ebpf(options) => ebpf::ebpf(options),
        Task::Run(options) => run::run(options),
        Task::Test(options) => test::test(options),
        Task::Install(options) => install::install(options),
        Task::Dist => dist::packages().map(drop),
        Task::Fresh(options) => fresh::fresh(options),
        Task::Bench(options) => bench::bench(options),
        Task::Vm(options) => vm::vm(options),
        Task::Verifier(options) => verifier::verifier(options),
        Task::Deny(options) => deny::deny(options),
        Task::Ci(options) => ci::ci(options),
    }
}
