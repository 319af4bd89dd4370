//! The command line: what can be typed, and nothing about what it does. `completions` and `man` are
//! generated from it.

pub mod tables;

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use forwarder_common::flow::Phase;
use ipnet::IpNet;

use crate::publish::spec::Spec;

/// Publishes ports of this host and forwards them to backends: in the kernel by eBPF, in user space
/// where that cannot be.
#[derive(Debug, Parser)]
#[command(name = "forwarder", version, max_term_width = 100)]
pub struct Cli {
    /// Which running instance is meant; instances don't touch each other.
    #[arg(long, global = true, default_value = "default", value_parser = instance)]
    pub instance: String,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start an instance in the foreground.
    Run(Run),
    /// Publish ports on a running instance.
    Publish {
        #[arg(required = true, value_name = "SPEC")]
        specs: Vec<Spec>,
        /// Serve only clients of this network; may be given several times.
        #[arg(long, value_name = "CIDR")]
        allow: Vec<IpNet>,
    },
    /// Take back publishes of a running instance, by SPEC or ID.
    Unpublish {
        #[arg(required = true, value_name = "SPEC|ID")]
        publishes: Vec<Named>,
        /// Let live conversations go on until they end.
        #[arg(long, conflicts_with = "reset")]
        drain: bool,
        /// Reset live conversations.
        #[arg(long)]
        reset: bool,
    },
    /// Show what is published, and how.
    List(Format),
    /// Show live flows of the fast path.
    Flows(Format),
    /// Show packet counters, by reason.
    Stats(Format),
    /// Show what this machine can do, and what would change it.
    Doctor(Format),
    /// Show what happens to each packet, live.
    Trace {
        /// Only packets of this publish.
        id: Option<u32>,
        /// Only packets from or to this network.
        #[arg(long, value_name = "CIDR")]
        client: Option<IpNet>,
    },
    /// Remove what an instance left: programs, links, pins.
    Down,
    /// Print a completion script for a shell.
    Completions { shell: clap_complete::Shell },
    /// Print the manual page.
    Man {
        /// Write the pages of all commands to this folder instead.
        #[arg(long, value_name = "FOLDER")]
        to: Option<PathBuf>,
    },
}

#[derive(Debug, clap::Args)]
pub struct Run {
    /// What to publish: `[HOST_ADDR:]HOST_PORT[-END]:BACKEND_ADDR:BACKEND_PORT[-END][/tcp|/udp|/sctp]`.
    #[arg(short, long, value_name = "SPEC")]
    pub publish: Vec<Spec>,
    /// Who carries the packets; `auto` decides for each publish.
    #[arg(long, value_enum, default_value_t = DatapathChoice::Auto)]
    pub datapath: DatapathChoice,
    /// Whether XDP drops what is refused and carries what has a backend on another machine: in the driver (`native`),
    /// in the stack's receive path (`generic`), or not at all. `auto`: native on devices that can, but for veths.
    #[arg(long, value_enum, default_value_t = XdpChoice::Auto)]
    pub xdp: XdpChoice,
    /// Let this host's FORWARD rules (DOCKER-USER, ufw, firewalld) decide on the traffic of other machines: it goes
    /// through the stack, slower.
    #[arg(long)]
    pub respect_firewall: bool,
    /// Serve only clients of this network; may be given several times.
    #[arg(long, value_name = "CIDR")]
    pub allow: Vec<IpNet>,
    /// How long a flow may stay silent, such as `tcp-established=1h` or `udp=45s`; may be given several times. Names and
    /// defaults are those of nf_conntrack's sysctls.
    #[arg(long, value_name = "NAME=TIME")]
    pub timeout: Vec<Timeout>,
    /// Send the PROXY protocol's header (version 2) to TCP backends; userland path only.
    #[arg(long)]
    pub proxy_protocol: bool,
    /// Leave the pinned datapath forwarding when this process ends.
    #[arg(long)]
    pub keep: bool,
    /// What to log on standard error: a level, or a filter such as `forwarder=debug`.
    #[arg(long, value_name = "LEVEL|FILTER", default_value = "warn")]
    pub log: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DatapathChoice {
    Auto,
    Ebpf,
    Userland,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum XdpChoice {
    Auto,
    Native,
    Generic,
    Off,
}

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Format {
    /// One JSON document instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// A timeout that was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeout {
    pub phase: Phase,
    pub seconds: u64,
}

impl std::str::FromStr for Timeout {
    type Err = String;

    /// The name may also be the sysctl's own, `nf_conntrack_tcp_timeout_established`, and without a unit the time is in
    /// seconds, as there.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, time) = text
            .split_once('=')
            .ok_or("NAME=TIME is expected, such as tcp-established=1h")?;
        let plain = name
            .trim_start_matches("net.netfilter.")
            .trim_start_matches("nf_conntrack_")
            .replace("timeout_", "")
            .trim_end_matches("_timeout")
            .replace('_', "-");
        let phase = Phase::ALL.iter().find(|phase| phase.name() == plain);
        let &phase = phase.ok_or_else(|| {
            let names: Vec<&str> = Phase::ALL.iter().map(|phase| phase.name()).collect();
            format!("no timeout {name}; there are {}", names.join(", "))
        })?;
        let (number, unit) = match time.char_indices().last() {
            Some((at, 's')) => (&time[..at], 1),
            Some((at, 'm')) => (&time[..at], 60),
            Some((at, 'h')) => (&time[..at], 3600),
            Some((at, 'd')) => (&time[..at], 86_400),
            _ => (time, 1),
        };
        match number.parse::<u32>() {
            Ok(number) if number > 0 => Ok(Self {
                phase,
                seconds: u64::from(number) * unit,
            }),
            _ => Err(format!("{time} is no time; 90, 90s, 5m, 1h and 5d are")),
        }
    }
}

/// A publish named on the command line.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Named {
    Id(u32),
    Spec(String),
}

impl std::str::FromStr for Named {
    type Err = crate::publish::spec::SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(id) = text.parse() {
            return Ok(Self::Id(id));
        }
        Ok(Self::Spec(text.parse::<Spec>()?.to_string()))
    }
}

/// A name that is safe in a path.
fn instance(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text.is_empty() || text.len() > 64 || text.starts_with('.') || !text.chars().all(plain) {
        return Err("an instance's name is 1 to 64 letters, digits, '-', '_' or '.'".into());
    }
    Ok(text.into())
}

/// Where an instance listens: under /run for root, else under the user's runtime directory.
pub fn socket_path(instance: &str, root: bool) -> PathBuf {
    let directory = if root {
        PathBuf::from("/run/forwarder")
    } else {
        std::env::var_os("XDG_RUNTIME_DIR")
            .map_or_else(std::env::temp_dir, PathBuf::from)
            .join(format!("forwarder-{}", nix::unistd::getuid()))
    };
    directory.join(format!("{instance}.sock"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_publish_is_named_by_id_or_spec() {
        assert_eq!("7".parse(), Ok(Named::Id(7)));
        let spec: Result<Named, _> = "8080:172.17.0.2:80".parse();
        assert_eq!(spec, Ok(Named::Spec("8080:172.17.0.2:80/tcp".into())));
    }

    #[test]
    fn a_timeout_has_nf_conntracks_name_and_a_unit() {
        let seconds = |text: &str| {
            let timeout: Timeout = text.parse().expect("a timeout");
            (timeout.phase, timeout.seconds)
        };
        let established = Phase::TcpEstablished;
        assert_eq!(seconds("tcp-established=432000"), (established, 432_000));
        assert_eq!(seconds("tcp_established=5d"), (established, 432_000));
        let sysctl = "nf_conntrack_tcp_timeout_established=90m";
        assert_eq!(seconds(sysctl), (established, 5400));
        let sysctl = "net.netfilter.nf_conntrack_udp_timeout_stream=180s";
        assert_eq!(seconds(sysctl), (Phase::UdpStream, 180));
        assert_eq!(seconds("nf_conntrack_udp_timeout=1h"), (Phase::Udp, 3600));
        for phase in Phase::ALL {
            assert_eq!(seconds(&format!("{}=1", phase.name())).0, *phase);
        }
    }

    #[test]
    fn what_is_no_timeout_is_said() {
        let error = |text: &str| text.parse::<Timeout>().expect_err(text);
        assert!(error("tcp=5").contains("there are tcp-syn-sent,"));
        for text in [
            "udp=", "udp=0", "udp=-1", "udp=5x", "udp=s", "udp=5µ", "udp",
        ] {
            let said = error(text);
            assert!(said.contains("is no time") || said.contains("NAME=TIME"));
        }
    }

    #[test]
    fn an_instance_cannot_leave_its_directory() {
        for name in ["../x", "a/b", "", ".hidden"] {
            assert!(instance(name).is_err(), "{name:?}");
        }
        assert!(instance("blue-1").is_ok());
    }
}
