//! The forwarder: published ports, by an eBPF fast path and a userland proxy behind it.

mod accept;
pub mod backends;
pub mod cli;
pub mod clsact;
pub mod containers;
pub mod control;
pub mod daemon;
pub mod datapath;
pub mod doctor;
pub mod interfaces;
pub mod kernel;
pub mod locations;
pub mod maps;
mod memory;
pub mod netlink;
pub mod output;
pub mod proxy;
pub mod spec;
pub mod xfrm;
