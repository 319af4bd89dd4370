//! SPEC: what to publish, as typed on the command line: parsing, printing, and what follows from it
//! without asking the machine.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// IANA protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => forwarder_common::tuple::TCP,
            Self::Udp => forwarder_common::tuple::UDP,
            Self::Sctp => forwarder_common::tuple::SCTP,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// Inclusive, in host order; never empty and never containing 0 once parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ports {
    pub first: u16,
    pub last: u16,
}

impl Ports {
    /// How many ports.
    pub const fn count(self) -> u32 {
        self.last as u32 - self.first as u32 + 1
    }

    const fn intersects(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// `[HOST_ADDR:]HOST_PORT[-END]:BACKEND_ADDR:BACKEND_PORT[-END][/PROTOCOL]`
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Spec {
    /// `None`: every local address. Unspecified: every local address of that family.
    pub address: Option<IpAddr>,
    pub ports: Ports,
    pub backend: IpAddr,
    /// As many as `ports`, or one for all of them.
    pub backend_ports: Ports,
    pub protocol: Protocol,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{spec:?}: {problem}")]
pub struct SpecError {
    spec: String,
    problem: String,
}

const GRAMMAR: &str = "[HOST_ADDR:]HOST_PORT[-END]:BACKEND_ADDR:BACKEND_PORT[-END][/tcp|/udp|/sctp], \
                       IPv6 addresses in brackets";

impl FromStr for Spec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        parse(text).map_err(|problem| SpecError {
            spec: text.into(),
            problem,
        })
    }
}

fn parse(text: &str) -> Result<Spec, String> {
    let (rest, protocol) = match text.rsplit_once('/') {
        None => (text, Protocol::Tcp),
        Some((rest, "tcp")) => (rest, Protocol::Tcp),
        Some((rest, "udp")) => (rest, Protocol::Udp),
        Some((rest, "sctp")) => (rest, Protocol::Sctp),
        Some((_, other)) => return Err(format!("protocol {other:?} is not tcp, udp or sctp")),
    };
    let fields = split(rest)?;
    let (address, ports, backend, backend_ports) = match fields.as_slice() {
        [ports, backend, backend_ports] => (None, ports, backend, backend_ports),
        [address, ports, backend, backend_ports] => {
            (Some(parse_address(address)?), ports, backend, backend_ports)
        }
        _ => return Err(format!("expected {GRAMMAR}")),
    };
    let spec = Spec {
        address,
        ports: parse_ports(ports)?,
        backend: parse_address(backend)?,
        backend_ports: parse_ports(backend_ports)?,
        protocol,
    };
    validate(&spec)?;
    Ok(spec)
}

/// Splits at colons outside brackets, and takes the brackets off.
fn split(text: &str) -> Result<Vec<&str>, String> {
    let mut fields = Vec::new();
    let mut rest = text;
    loop {
        let (field, after) = match rest.strip_prefix('[') {
            Some(inside) => inside.split_once(']').ok_or("a '[' without its ']'")?,
            None => rest.split_at(rest.find(':').unwrap_or(rest.len())),
        };
        fields.push(field);
        match after.strip_prefix(':') {
            Some(next) => rest = next,
            None if after.is_empty() => return Ok(fields),
            None => return Err(format!("unexpected {after:?} after ']'")),
        }
    }
}

fn parse_address(text: &str) -> Result<IpAddr, String> {
    text.parse::<IpAddr>()
        .map(|address| address.to_canonical())
        .map_err(|_| format!("{text:?} is not an IP address; expected {GRAMMAR}"))
}

fn parse_ports(text: &str) -> Result<Ports, String> {
    let port = |text: &str| match text.parse::<u16>() {
        Ok(0) => Err("port 0 cannot be published; name one from 1 to 65535".to_owned()),
        Ok(port) if text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(port),
        _ => Err(format!("{text:?} is not a port from 1 to 65535")),
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let ports = Ports {
        first: port(first)?,
        last: port(last)?,
    };
    if ports.first > ports.last {
        return Err(format!(
            "range {text} is backwards; write {}-{}",
            ports.last, ports.first
        ));
    }
    Ok(ports)
}

fn validate(spec: &Spec) -> Result<(), String> {
    let Spec {
        address,
        ports,
        backend,
        backend_ports,
        ..
    } = spec;
    if backend_ports.count() != 1 && backend_ports.count() != ports.count() {
        return Err(format!(
            "{} host ports but {} backend ports; ranges map one to one, or to a single port",
            ports.count(),
            backend_ports.count()
        ));
    }
    if backend.is_unspecified() || backend.is_multicast() {
        return Err(format!("backend {backend} is not the address of one host"));
    }
    if address.is_some_and(|address| address.is_multicast()) {
        return Err("a multicast address cannot be published".into());
    }
    if address.is_some_and(|address| address.is_ipv4()) && backend.is_ipv6() {
        return Err(format!(
            "IPv4 clients cannot be sent to the IPv6 backend {backend}; leave the host address out \
             or give an IPv6 one"
        ));
    }
    Ok(())
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.address {
            write!(f, "{}:", Bracketed(address))?;
        }
        let Self {
            ports,
            backend,
            backend_ports,
            protocol,
            ..
        } = self;
        write!(
            f,
            "{ports}:{}:{backend_ports}/{protocol}",
            Bracketed(*backend)
        )
    }
}

struct Bracketed(IpAddr);

impl fmt::Display for Bracketed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(v4) => write!(f, "{v4}"),
            IpAddr::V6(v6) => write!(f, "[{v6}]"),
        }
    }
}

impl Spec {
    /// A spec of its parts.
    ///
    /// # Errors
    /// Why there can be none such, in words.
    pub fn new(
        address: Option<IpAddr>,
        ports: Ports,
        backend: IpAddr,
        backend_ports: Ports,
        protocol: Protocol,
    ) -> Result<Self, String> {
        for ports in [ports, backend_ports] {
            if ports.first == 0 {
                return Err("port 0 cannot be published; name one from 1 to 65535".into());
            }
            if ports.first > ports.last {
                let Ports { first, last } = ports;
                return Err(format!(
                    "range {first}-{last} is backwards; write {last}-{first}"
                ));
            }
        }
        let spec = Self {
            address: address.map(|address| address.to_canonical()),
            ports,
            backend: backend.to_canonical(),
            backend_ports,
            protocol,
        };
        validate(&spec)?;
        Ok(spec)
    }

    /// The same frontend with another backend: a port, or ports up to `end`.
    ///
    /// # Errors
    /// As [`Spec::new`].
    pub fn to_backend(&self, backend: IpAddr, port: u16, end: Option<u16>) -> Result<Self, String> {
        let ports = Ports {
            first: port,
            last: end.unwrap_or(port),
        };
        Self::new(self.address, self.ports, backend, ports, self.protocol)
    }

    /// Whether clients of both come to the same addresses and ports.
    pub fn has_same_frontend(&self, other: &Self) -> bool {
        (self.protocol, self.ports, self.address) == (other.protocol, other.ports, other.address)
            && self.frontends() == other.frontends()
    }

    /// The addresses that sockets are bound to. Every local address means both families, as far as
    /// the backend can be reached from them.
    pub fn frontends(&self) -> Vec<IpAddr> {
        let v4 = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
        let v6 = IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED);
        match self.address {
            Some(address) => vec![address],
            None if self.backend.is_ipv6() => vec![v6],
            None => vec![v4, v6],
        }
    }

    /// Whether both claim some address and port.
    pub fn overlaps(&self, other: &Self) -> bool {
        let conflict = |a: &IpAddr, b: &IpAddr| {
            a.is_ipv4() == b.is_ipv4() && (a == b || a.is_unspecified() || b.is_unspecified())
        };
        let others = other.frontends();
        self.protocol == other.protocol
            && self.ports.intersects(other.ports)
            && self
                .frontends()
                .iter()
                .any(|a| others.iter().any(|b| conflict(a, b)))
    }

    /// Whether every host port leads to the same backend port.
    pub const fn backend_is_single(&self) -> bool {
        self.backend_ports.count() == 1
    }

    /// The backend port of a published port.
    pub const fn backend_port(&self, port: u16) -> u16 {
        if self.backend_is_single() {
            self.backend_ports.first
        } else {
            self.backend_ports.first + (port - self.ports.first)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(text: &str) -> Spec {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    fn problem(text: &str) -> String {
        text.parse::<Spec>().expect_err(text).to_string()
    }

    #[test]
    fn the_contracts_examples_are_understood() {
        assert_eq!(
            spec("8080:172.17.0.2:80").to_string(),
            "8080:172.17.0.2:80/tcp"
        );
        for text in [
            "127.0.0.1:5353:172.17.0.2:53/udp",
            "[2001:db8::1]:443:[fd00::2]:8443/tcp",
            "10000-59999:172.17.0.2:10000-59999/udp",
            "20000-50000:172.17.0.2:443/udp",
        ] {
            assert_eq!(spec(text).to_string(), text);
        }
    }

    #[test]
    fn an_error_names_the_thing_and_the_remedy() {
        for (text, part) in [
            ("8080", "expected [HOST_ADDR:]"),
            (
                "8080:172.17.0.2:80/icmp",
                "\"icmp\" is not tcp, udp or sctp",
            ),
            ("0:172.17.0.2:80", "port 0"),
            ("65536:172.17.0.2:80", "\"65536\" is not a port"),
            ("+80:172.17.0.2:80", "\"+80\" is not a port"),
            ("90-80:172.17.0.2:80", "write 80-90"),
            (
                "80-90:172.17.0.2:80-85",
                "11 host ports but 6 backend ports",
            ),
            ("80:container:80", "\"container\" is not an IP address"),
            ("[::1:80:172.17.0.2:80", "'['"),
            ("80:0.0.0.0:80", "not the address of one host"),
            ("0.0.0.0:80:[fd00::2]:80", "IPv4 clients"),
        ] {
            assert!(problem(text).contains(part), "{text}: {}", problem(text));
        }
    }

    #[test]
    fn a_range_maps_one_to_one_or_to_one() {
        assert_eq!(
            spec("8000-8010:10.0.0.2:9000-9010").backend_port(8003),
            9003
        );
        assert_eq!(spec("8000-8010:10.0.0.2:443").backend_port(8003), 443);
        assert_eq!(spec("1-65535:10.0.0.2:1-65535").ports.count(), 65_535);
    }

    #[test]
    fn overlap_is_by_protocol_port_and_address() {
        let overlap = |a: &str, b: &str| spec(a).overlaps(&spec(b)) && spec(b).overlaps(&spec(a));
        assert!(overlap("80:10.0.0.2:80", "127.0.0.1:80:10.0.0.3:80"));
        assert!(overlap("80-90:10.0.0.2:80-90", "85:10.0.0.3:80"));
        assert!(!overlap("80:10.0.0.2:80", "80:10.0.0.2:80/udp"));
        assert!(!overlap(
            "127.0.1.2:80:10.0.0.2:80",
            "127.0.1.3:80:10.0.0.3:80"
        ));
        assert!(!overlap("0.0.0.0:80:10.0.0.2:80", "[::]:80:[fd00::2]:80"));
        assert!(!overlap("0.0.0.0:80:10.0.0.2:80", "80:[fd00::2]:80"));
    }

    proptest! {
        #[test]
        fn printing_and_parsing_are_inverse(
            address in proptest::option::of(any::<IpAddr>()), first in 1_u16.., length in 0_u16..100,
            backend in any::<IpAddr>(), to in 1_u16..60_000, single: bool, udp: bool,
        ) {
            let last = first.saturating_add(length);
            let backend_last = if single { to } else { to + (last - first) };
            let built = Spec {
                address: address.map(|a| a.to_canonical()),
                ports: Ports { first, last },
                backend: backend.to_canonical(),
                backend_ports: Ports { first: to, last: backend_last },
                protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
            };
            prop_assume!(validate(&built).is_ok());
            prop_assert_eq!(built.to_string().parse::<Spec>(), Ok(built));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "[0-9a-f:.\\[\\]/tcpudp-]{0,40}") {
            let _ = text.parse::<Spec>();
        }
    }
}
