//! The command line: what can be typed, and nothing about what it does. `completions` and `man` are
//! generated from it.

pub mod tables;
pub mod top;
pub mod usage;

use std::{net::SocketAddr, num::NonZeroU64, path::PathBuf, time::Duration};

use clap::{Parser, Subcommand};
use ipnet::IpNet;

use crate::{
    config::{DatapathChoice, Flags, Timeout, XdpChoice, seconds},
    control::api::NamedPublish,
    engines::docker,
    publish::{
        ContainerPort, Id, Limits, Owner, Policy, ProxyProtocol, Publish, Spec,
        allow::{network, source},
        limits::{Bandwidth, Rate, interface},
    },
};

/// Publishes ports of this host and forwards them to backends: in the kernel by eBPF, in user space
/// where that cannot be.
#[derive(Debug, Parser)]
#[command(name = "forwarder", version, max_term_width = 100)]
pub struct Cli {
    /// Which running instance is meant; instances don't touch each other.
    #[arg(long, global = true, default_value = "default", value_parser = instance)]
    pub instance: String,
    /// The instance's control socket, if it is not where its name says.
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start an instance in the foreground.
    Run(Run),
    /// Publish ports on a running instance.
    Publish {
        #[arg(required = true, value_name = "SPEC", value_parser = asked)]
        specs: Vec<AskedPort>,
        /// Publish ports of this Docker or podman container, as `[HOST_ADDR:]HOST_PORT[-END]:PORT[-END][/tcp|/udp|/sctp]`,
        /// and follow it to new addresses; of an instance with `run --docker`.
        #[arg(long, value_name = "NAME")]
        container: Option<String>,
        /// Serve only clients of this network; may be given several times.
        #[arg(long, value_name = "CIDR", value_parser = network)]
        allow: Vec<IpNet>,
        /// Tell backends of their clients by the PROXY protocol, version 2 unless another is named: by the userland path.
        #[arg(long, value_enum, value_name = "VERSION", num_args = 0..=1, require_equals = true, default_missing_value = "v2")]
        proxy_protocol: Option<ProxyProtocol>,
        #[command(flatten)]
        limits: LimitFlags,
        /// In whose name: an owner changes its own publishes alone.
        #[arg(long, value_name = "NAME", default_value = "cli")]
        owner: Owner,
    },
    /// Take back publishes of a running instance, by SPEC or ID.
    Unpublish {
        #[arg(required_unless_present = "container", value_name = "SPEC|ID", value_parser = named_port)]
        publishes: Vec<NamedPort>,
        /// Take back ports of this container, as `publish --container` has them, or all if none is named; also while it does
        /// not run.
        #[arg(long, value_name = "NAME")]
        container: Option<String>,
        /// Let live conversations go on until they end.
        #[arg(long, conflicts_with = "reset")]
        drain: bool,
        /// Reset live conversations.
        #[arg(long)]
        reset: bool,
        /// In whose name: an owner changes its own publishes alone.
        #[arg(long, value_name = "NAME", default_value = "cli")]
        owner: Owner,
    },
    /// Let nothing of these sources get into any published port; their flows end now.
    Ban {
        #[arg(required_unless_present = "file", value_name = "CIDR", value_parser = source)]
        sources: Vec<IpNet>,
        /// How long, such as `90s`, `30m`, `4h` or `7d`; without, for ever.
        #[arg(long = "for", value_name = "TIME", value_parser = time)]
        lasts: Option<Duration>,
        /// Take further sources from this file, one a line; `-` is standard input.
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
        /// Keep them from this publish alone.
        #[arg(long, value_name = "SPEC|ID", value_parser = named)]
        publish: Option<NamedPublish>,
        /// In whose name: a source is let in when the last of those who have banned it takes that back.
        #[arg(long, value_name = "NAME", default_value = "cli")]
        owner: Owner,
    },
    /// Take bans back.
    Unban {
        #[arg(required = true, value_name = "CIDR", value_parser = source)]
        sources: Vec<IpNet>,
        /// Those from this publish alone.
        #[arg(long, value_name = "SPEC|ID", value_parser = named)]
        publish: Option<NamedPublish>,
        /// This owner's alone; without, whoever's they are.
        #[arg(long, value_name = "NAME")]
        owner: Option<Owner>,
    },
    /// Show what is banned, and until when.
    Bans(Format),
    /// Show what is published, and how.
    List(Format),
    /// Show live flows.
    Flows {
        /// Only those of this publish.
        #[arg(long, value_name = "ID", value_parser = id)]
        publish: Option<Id>,
        /// Only those of clients in this network.
        #[arg(long, value_name = "CIDR", value_parser = source)]
        client: Option<IpNet>,
        #[command(flatten)]
        format: Format,
    },
    /// Show packet counters, by reason.
    Stats(Format),
    /// Show publishes and their rates, live; b, p, f and i sort, q ends.
    Top {
        /// One JSON document of one second, and no more.
        #[arg(long)]
        json: bool,
    },
    /// Show what this machine can do, and what would change it.
    Doctor(Format),
    /// Show what happens to each packet, live.
    Trace {
        /// Only packets of this publish.
        #[arg(value_parser = id)]
        id: Option<Id>,
        /// Only packets from or to this network.
        #[arg(long, value_name = "CIDR", value_parser = source)]
        client: Option<IpNet>,
        /// A JSON document on each line, as the API has them, instead of words.
        #[arg(long)]
        json: bool,
    },
    /// Validate a configuration file, and those in `conf.d` beside it.
    Check { file: PathBuf },
    /// Have a running instance read its configuration file again.
    Reload,
    /// Be Docker's `userland-proxy-path`, also under the name docker-proxy: serves a port by the instance that
    /// FORWARDER_INSTANCE names (default), or by itself while there is none.
    #[command(disable_help_flag = true)]
    DockerProxy {
        /// As dockerd has them, such as `-proto tcp -host-ip 0.0.0.0 -host-port 8080 -container-ip 172.17.0.2
        /// -container-port 80`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Be a CNI plugin with the capability `portMappings`, also under the names portmap and forwarder-portmap: publishes on
    /// the instance that its configuration's key `instance` or FORWARDER_INSTANCE names (default).
    Cni,
    /// Be the program of crowdsec-custom-bouncer, with its `feed_via_stdin`: does what CrowdSec decides about addresses.
    Crowdsec,
    /// Remove what an instance left: programs, links, pins, state file.
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
    #[arg(short, long, value_name = "SPEC", value_parser = spec)]
    pub publish: Vec<Spec>,
    /// A configuration file (TOML), to which those in `conf.d` beside it belong; flags come before it. SIGHUP and
    /// `forwarder reload` read it again.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Who carries the packets; `auto`, the default, decides for each publish.
    #[arg(long, value_enum)]
    pub datapath: Option<DatapathChoice>,
    /// Whether XDP drops what is refused and carries what has a backend on another machine: in the driver (`native`),
    /// in the stack's receive path (`generic`), or not at all. `auto`, the default: native on devices that can, but for
    /// veths.
    #[arg(long, value_enum)]
    pub xdp: Option<XdpChoice>,
    /// Let this host's FORWARD rules (DOCKER-USER, ufw, firewalld) decide on the traffic of other machines: it goes
    /// through the stack, slower.
    #[arg(long)]
    pub respect_firewall: bool,
    /// Serve only clients of this network; may be given several times.
    #[arg(long, value_name = "CIDR", value_parser = network)]
    pub allow: Vec<IpNet>,
    /// How long a flow may stay silent, such as `tcp-established=1h` or `udp=45s`; may be given several times. Names and
    /// defaults are those of nf_conntrack's sysctls.
    #[arg(long, value_name = "NAME=TIME")]
    pub timeout: Vec<Timeout>,
    /// Tell TCP backends of their clients by the PROXY protocol, version 2 unless another is named: by the userland path.
    #[arg(long, value_enum, value_name = "VERSION", num_args = 0..=1, require_equals = true, default_missing_value = "v2")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Leave the pinned datapath forwarding when this process ends.
    #[arg(long)]
    pub keep: bool,
    /// Follow the engine behind this socket, Docker or podman: the ports that it holds for running containers get the fast
    /// path. Who may write to the socket is as good as root.
    #[arg(long, value_name = "SOCKET", num_args = 0..=1, default_missing_value = docker::SOCKET)]
    pub docker: Option<PathBuf>,
    /// Also publish what running containers ask for by the label `forwarder.publish=[HOST_ADDR:]HOST_PORT:PORT[/udp],...`,
    /// and heed labels such as `forwarder.allow`; those that an image brings are ignored.
    #[arg(long, requires = "docker")]
    pub docker_labels: bool,
    /// Keep no state file: what is published at run time ends with this process.
    #[arg(long)]
    pub ephemeral: bool,
    /// Serve metrics for Prometheus at `/metrics`, and a page for people at `/`, on this address, such as 127.0.0.1:9100;
    /// not at all if it is left out.
    #[arg(long, value_name = "ADDR:PORT", value_parser = socket_address)]
    pub metrics: Option<SocketAddr>,
    /// Serve metrics only to clients of this network; needed for an address that is not loopback, and may be given several
    /// times.
    #[arg(long, value_name = "CIDR", value_parser = network)]
    pub metrics_allow: Vec<IpNet>,
    /// What to log on standard error: a level, or a filter such as `forwarder=debug`.
    #[arg(long, value_name = "LEVEL|FILTER", default_value = "warn", value_parser = filter)]
    pub log: String,
}

/// What a publish may be used for at most.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct LimitFlags {
    /// Serve so many flows at once.
    #[arg(long, value_name = "N", value_parser = flows)]
    pub max_flows: Option<NonZeroU64>,
    /// Let so many flows begin, such as `1000/s`.
    #[arg(long, value_name = "N/s")]
    pub rate: Option<Rate>,
    /// Let so many flows of one source begin: of an IPv4 address, or an IPv6 network of 64 bits.
    #[arg(long, value_name = "N/s")]
    pub rate_per_source: Option<Rate>,
    /// Carry so much in each direction, such as `100Mbit`.
    #[arg(long, value_name = "RATE")]
    pub bandwidth: Option<Bandwidth>,
    /// Serve only clients that come by this interface.
    #[arg(long, value_name = "IFACE", value_parser = interface)]
    pub on: Option<String>,
}

impl From<LimitFlags> for Limits {
    fn from(flags: LimitFlags) -> Self {
        Self {
            max_flows: flags.max_flows,
            rate: flags.rate,
            rate_per_source: flags.rate_per_source,
            bandwidth: flags.bandwidth,
            on: flags.on,
        }
    }
}

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Format {
    /// One JSON document instead of a table.
    #[arg(long)]
    pub json: bool,
}

impl Run {
    /// What these flags say.
    pub fn flags(&self) -> Flags {
        let publishes = self.publish.iter().cloned();
        let publishes = publishes.map(|spec| Publish::new(spec, Policy::default()));
        Flags {
            publishes: publishes.collect(),
            file: self.config.clone(),
            datapath: self.datapath,
            xdp: self.xdp,
            respect_firewall: self.respect_firewall,
            allow: self.allow.clone(),
            timeouts: self.timeout.clone(),
            proxy_protocol: self.proxy_protocol,
            keep: self.keep,
            ephemeral: self.ephemeral,
            docker: self.docker.clone(),
            docker_labels: self.docker_labels,
            metrics: self.metrics,
            metrics_allow: self.metrics_allow.clone(),
        }
    }
}

/// A time with its unit; seconds without.
fn time(text: &str) -> Result<Duration, String> {
    seconds(text).map(Duration::from_secs)
}

/// A SPEC. What is wrong with it stands after its text, which the library says.
fn spec(text: &str) -> Result<Spec, String> {
    let spec = text.parse::<Spec>();
    spec.map_err(|error| error.problem().to_owned())
}

fn flows(text: &str) -> Result<NonZeroU64, String> {
    let flows = text.parse();
    flows.map_err(|_| format!("{text:?} is no number of flows; 1000 is one, and none is no limit"))
}

/// The number of a publish.
fn id(text: &str) -> Result<Id, String> {
    let id = text.parse();
    id.map_err(|_| format!("{text:?} is no publish's number; `forwarder list` shows them"))
}

fn socket_address(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse();
    address.map_err(|_| format!("{text:?} is no address with a port, such as 127.0.0.1:9100"))
}

/// What to log. A word that is no level would be the name of a module, of which there is none.
fn filter(text: &str) -> Result<String, String> {
    let is_known = |part: &str| {
        part.contains(['=', '[']) || part.parse::<tracing::level_filters::LevelFilter>().is_ok()
    };
    let is_read = tracing_subscriber::EnvFilter::try_new(text).is_ok();
    if is_read && text.split(',').all(is_known) {
        return Ok(text.into());
    }
    Err(format!(
        "{text:?} is no level or filter; error, warn, info, debug, trace and forwarder=debug are"
    ))
}

/// What a word asks `publish` or `unpublish` for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AskedPort {
    Spec(Spec),
    /// With `--container`.
    Container(ContainerPort),
}

impl AskedPort {
    /// The word again, if it goes with `--container` being given or not.
    ///
    /// # Errors
    /// It does not, in words.
    pub fn with_container(&self, is_given: bool) -> Result<String, String> {
        match self {
            Self::Spec(spec) if !is_given => Ok(spec.to_string()),
            Self::Container(port) if is_given => Ok(port.to_string()),
            Self::Spec(spec) => Err(format!(
                "{spec}: with --container, leave the backend's address out: [HOST_ADDR:]HOST_PORT:PORT[/udp]"
            )),
            Self::Container(port) => Err(format!(
                "{port}: a SPEC names the backend's address: [HOST_ADDR:]HOST_PORT:BACKEND_ADDR:BACKEND_PORT[/udp]; \
                 a container's is found with --container"
            )),
        }
    }
}

/// A SPEC, or a container's port: no text is both.
fn asked(text: &str) -> Result<AskedPort, String> {
    let asked = spec(text).map(AskedPort::Spec);
    asked.or_else(|error| {
        let port = text.parse().map(AskedPort::Container);
        port.map_err(|_| error)
    })
}

/// What a word has `unpublish` take back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamedPort {
    Id(Id),
    Port(AskedPort),
}

impl NamedPort {
    /// The publish that is meant, if the word goes with `--container` being given or not.
    ///
    /// # Errors
    /// It does not, in words.
    pub fn with_container(&self, is_given: bool) -> Result<NamedPublish, String> {
        match self {
            Self::Id(id) if is_given => Err(format!(
                "{id}: with --container, name ports: [HOST_ADDR:]HOST_PORT:PORT[/udp]; a number needs no --container"
            )),
            Self::Id(id) => Ok(NamedPublish::Id(*id)),
            Self::Port(port) => port.with_container(is_given).map(NamedPublish::Spec),
        }
    }
}

fn named_port(text: &str) -> Result<NamedPort, String> {
    let id = text.parse().map(NamedPort::Id);
    id.or_else(|_| asked(text).map(NamedPort::Port))
}

/// A publish, by its number or its SPEC.
fn named(text: &str) -> Result<NamedPublish, String> {
    if let Ok(id) = text.parse() {
        return Ok(NamedPublish::Id(id));
    }
    Ok(NamedPublish::Spec(spec(text)?.to_string()))
}

/// A name that is safe in a path.
fn instance(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text.is_empty() || text.len() > 64 || text.starts_with('.') || !text.chars().all(plain) {
        return Err("an instance's name is 1 to 64 letters, digits, '-', '_' or '.'".into());
    }
    Ok(text.into())
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
    fn a_containers_port_goes_with_the_container_alone() {
        for (text, of_container) in [
            ("8080:80", true),
            ("[::1]:8080-8081:80-81/udp", true),
            ("8080:172.17.0.2:80", false),
            ("[::1]:8080:[fd00::2]:80", false),
        ] {
            let word = asked(text).expect(text);
            assert!(word.with_container(of_container).is_ok(), "{text}");
            let error = word.with_container(!of_container).expect_err(text);
            assert!(error.contains("--container"), "{error}");
        }
        assert!(asked("80:80:80:80:80").is_err());
    }

    #[test]
    fn a_number_goes_without_a_container() {
        let word = named_port("7").expect("a number");
        assert_eq!(word.with_container(false), Ok(NamedPublish::Id(7)));
        let error = word.with_container(true).expect_err("a number");
        assert!(error.contains("a number needs no --container"), "{error}");
        let word = named_port("8443:443").expect("a port");
        let port = NamedPublish::Spec("8443:443/tcp".into());
        assert_eq!(word.with_container(true), Ok(port));
    }

    #[test]
    fn a_publish_is_named_by_id_or_spec() {
        assert_eq!(named("7"), Ok(NamedPublish::Id(7)));
        let spec = named("8080:172.17.0.2:80");
        assert_eq!(
            spec,
            Ok(NamedPublish::Spec("8080:172.17.0.2:80/tcp".into()))
        );
    }

    #[test]
    fn an_instance_cannot_leave_its_directory() {
        for name in ["../x", "a/b", "", ".hidden"] {
            assert!(instance(name).is_err(), "{name:?}");
        }
        assert!(instance("blue-1").is_ok());
    }
}
