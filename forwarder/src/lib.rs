//! The forwarder: published ports, by an eBPF fast path and a userland proxy behind it.

#![deny(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "they panic where nobody reads, or the disk is full"
)]

mod accept;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod daemon;
pub mod datapath;
pub mod doctor;
pub mod engines;
pub mod holder;
mod http;
pub mod instance;
pub mod memory;
pub mod metrics;
pub mod network;
pub mod plan;
pub mod privilege;
pub mod proxy;
pub mod publish;
pub mod rights;
mod seldom;
pub mod stderr;
