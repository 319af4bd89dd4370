//! `cargo xtask ...`: the repository's tasks. A subcommand is a file of the same name.
//!
//! What `cargo build` cannot do is done here: the eBPF toolchain, the object that the binary
//! embeds, and whatever needs root.

mod bench;
mod ci;
mod ebpf;
mod exec;
mod run;
mod setup;
mod test;
#[cfg(test)]
mod tidy;
mod verifier;
mod vm;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "The repository's tasks",
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Installs the toolchain of the eBPF program into target/toolchain (the others do it too)
    Setup,
    /// Builds the eBPF object, target/ebpf/forwarder.o, which `cargo build` then embeds
    Ebpf,
    /// Builds everything and runs the demonstration, or `forwarder run ARGS` after `--`
    Run(run::Options),
    /// Runs the tests: unprivileged ones, packets through the loaded programs, real sockets
    Test(test::Options),
    /// Measures forwarder beside iptables, nftables, docker-proxy and others; `--help` says more
    Bench(bench::Options),
    /// Runs tiers 1 and 2, or a command, under Debian's kernels 5.10, 6.1, 6.12 and the newest, in QEMU
    Vm(vm::Options),
    /// Prints what the verifier says of each program under each kernel, as docs/verifier.md has it
    Verifier(verifier::Options),
    /// What must pass before a change goes in: formatting, clippy, all tests
    Ci,
}

fn main() {
    let done = match Cli::parse().task {
        Task::Setup => setup::toolchain().map(drop),
        Task::Ebpf => ebpf::build().map(drop),
        Task::Run(options) => run::run(&options),
        Task::Test(options) => test::test(&options),
        Task::Bench(options) => bench::bench(&options),
        Task::Vm(options) => vm::vm(&options),
        Task::Verifier(options) => verifier::verifier(&options),
        Task::Ci => ci::ci(),
    };
    if let Err(error) = done {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}
