//! What an instance is to do: validated, from the flags of `run` and from a configuration file.

pub mod file;

use std::{net::SocketAddr, path::PathBuf};

use forwarder_common::flow::{Phase, Timeouts};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer};

use self::file::{FileConfig, FileError};
use crate::publish::{ProxyProtocol, Publish, word};

/// Everything that an instance is told at its start, or by a reload.
#[derive(Clone, Debug)]
pub struct Config {
    /// Of the flags.
    pub publishes: Vec<Publish>,
    /// Of the file.
    pub configured: Vec<Publish>,
    /// What a reload reads again.
    pub file: Option<PathBuf>,
    pub datapath: DatapathChoice,
    pub xdp: XdpChoice,
    pub respect_firewall: bool,
    /// For publishes that have no allow-list of their own; empty for all.
    pub allow: Vec<IpNet>,
    pub timeouts: Timeouts,
    /// Of TCP publishes that say nothing themselves.
    pub proxy_protocol: ProxyProtocol,
    /// The programs go on when this process ends.
    pub keep: bool,
    /// Nothing is written to disk.
    pub ephemeral: bool,
    /// Where metrics and the page are served.
    pub metrics: Option<SocketAddr>,
    /// To whom; empty for all that reach it.
    pub metrics_allow: Vec<IpNet>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DatapathChoice {
    Auto,
    Ebpf,
    Userland,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum XdpChoice {
    Auto,
    Native,
    Generic,
    Off,
}

impl<'de> Deserialize<'de> for DatapathChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        word::read(deserializer)
    }
}

impl<'de> Deserialize<'de> for XdpChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        word::read(deserializer)
    }
}

/// What the flags say; what they leave out, the file or a default decides.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    pub publishes: Vec<Publish>,
    pub file: Option<PathBuf>,
    pub datapath: Option<DatapathChoice>,
    pub xdp: Option<XdpChoice>,
    pub respect_firewall: bool,
    pub allow: Vec<IpNet>,
    pub timeouts: Vec<Timeout>,
    pub proxy_protocol: Option<ProxyProtocol>,
    pub keep: bool,
    pub ephemeral: bool,
    /// The socket of the engine whose containers' labels publish.
    pub docker: Option<PathBuf>,
    pub docker_labels: bool,
    pub metrics: Option<SocketAddr>,
    pub metrics_allow: Vec<IpNet>,
}

impl Config {
    /// Reads the file that the flags name, if any, and puts both together: flags come first.
    ///
    /// # Errors
    /// What is wrong in the file.
    pub fn read(flags: Flags) -> Result<Self, FileError> {
        let file = match &flags.file {
            Some(path) => file::read(path)?,
            None => FileConfig::default(),
        };
        let mut timeouts = Timeouts::default();
        for timeout in file.timeouts.iter().chain(&flags.timeouts) {
            timeouts.set(timeout.phase, timeout.seconds);
        }
        let on = |flag: bool, value: Option<bool>| flag || value.unwrap_or(false);
        Ok(Self {
            publishes: flags.publishes,
            configured: file.publishes,
            file: flags.file,
            datapath: flags
                .datapath
                .or(file.datapath)
                .unwrap_or(DatapathChoice::Auto),
            xdp: flags.xdp.or(file.xdp).unwrap_or(XdpChoice::Auto),
            respect_firewall: on(flags.respect_firewall, file.respect_firewall),
            allow: if flags.allow.is_empty() {
                file.allow.unwrap_or_default()
            } else {
                flags.allow
            },
            timeouts,
            proxy_protocol: flags
                .proxy_protocol
                .or(file.proxy_protocol)
                .unwrap_or_default(),
            keep: on(flags.keep, file.keep),
            ephemeral: on(flags.ephemeral, file.ephemeral),
            metrics: flags.metrics.or(file.metrics),
            metrics_allow: if flags.metrics_allow.is_empty() {
                file.metrics_allow.unwrap_or_default()
            } else {
                flags.metrics_allow
            },
        })
    }

    /// What differs that only a restart can change, by its name in the file.
    pub fn needs_restart(&self, new: &Self) -> Option<&'static str> {
        [
            ("datapath", self.datapath != new.datapath),
            ("xdp", self.xdp != new.xdp),
            (
                "respect-firewall",
                self.respect_firewall != new.respect_firewall,
            ),
            ("timeout", self.timeouts != new.timeouts),
            ("proxy-protocol", self.proxy_protocol != new.proxy_protocol),
            ("ephemeral", self.ephemeral != new.ephemeral),
            ("metrics", self.metrics != new.metrics),
            ("metrics-allow", self.metrics_allow != new.metrics_allow),
        ]
        .into_iter()
        .find_map(|(name, differs)| differs.then_some(name))
    }
}

/// Options that exclude each other, or one that another lacks: wrong whatever the machine is like.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Contradiction(String);

impl Config {
    /// What cannot be meant.
    ///
    /// # Errors
    /// The first of it.
    pub fn check(&self) -> Result<(), Contradiction> {
        let wrong = |text: String| Err(Contradiction(text));
        if self.proxy_protocol != ProxyProtocol::Off && self.datapath == DatapathChoice::Ebpf {
            return wrong(
                "--proxy-protocol --datapath ebpf: the PROXY protocol is spoken in user space; --datapath auto serves TCP \
                 there, and UDP by eBPF"
                    .into(),
            );
        }
        match self.metrics {
            None if !self.metrics_allow.is_empty() => {
                wrong("--metrics-allow without --metrics; name the address, such as --metrics 127.0.0.1:9100".into())
            }
            Some(address)
                if !address.ip().to_canonical().is_loopback() && self.metrics_allow.is_empty() =>
            {
                wrong(format!(
                    "--metrics {address}: others reach this address; name those who may by --metrics-allow CIDR, or take \
                     127.0.0.1:{}",
                    address.port()
                ))
            }
            _ => Ok(()),
        }
    }
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
        Ok(Self {
            phase,
            seconds: seconds(time)?,
        })
    }
}

/// A time with a unit, or in seconds.
///
/// # Errors
/// It is none, in words.
pub fn seconds(time: &str) -> Result<u64, String> {
    let (number, unit) = match time.char_indices().last() {
        Some((at, 's')) => (&time[..at], 1),
        Some((at, 'm')) => (&time[..at], 60),
        Some((at, 'h')) => (&time[..at], 3600),
        Some((at, 'd')) => (&time[..at], 86_400),
        _ => (time, 1),
    };
    match number.parse::<u32>() {
        Ok(number) if number > 0 => Ok(u64::from(number) * unit),
        _ => Err(format!("{time} is no time; 90, 90s, 5m, 1h and 5d are")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn what_cannot_be_meant_is_said() {
        let said = |flags: Flags| {
            let config = Config::read(flags).expect("no file");
            config.check().err().map(|error| error.to_string())
        };
        let at = |address: &str, allow: &[&str]| Flags {
            metrics: (!address.is_empty()).then(|| address.parse().expect(address)),
            metrics_allow: allow.iter().map(|it| it.parse().expect(it)).collect(),
            ..Flags::default()
        };
        for (flags, part) in [
            (at("0.0.0.0:9100", &[]), "name those who may"),
            (at("[::]:9100", &[]), "or take 127.0.0.1:9100"),
            (at("[::ffff:192.0.2.1]:9100", &[]), "name those who may"),
            (at("", &["10.0.0.0/8"]), "without --metrics"),
        ] {
            let said = said(flags).expect(part);
            assert!(said.contains(part), "{said}");
        }
        for flags in [
            at("0.0.0.0:9100", &["10.0.0.0/8"]),
            at("127.0.0.1:9100", &[]),
            at("[::1]:9100", &[]),
            at("[::ffff:127.0.0.1]:9100", &[]),
            at("", &[]),
        ] {
            assert_eq!(said(flags), None);
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
}
