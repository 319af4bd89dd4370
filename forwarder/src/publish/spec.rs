//! SPEC: what to publish, as typed on the command line: parsing, printing, and what follows from it
//! without asking the machine.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

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
    /// A single port.
    pub const fn one(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

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

/// The device that a link-local address is on (RFC 4007): its name, or its index in digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Zone(String);

impl TryFrom<String> for Zone {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        parse_zone(&text)
    }
}

impl Zone {
    /// As it was typed.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// `[HOST_ADDR:]HOST_PORT[-END]:BACKEND_ADDR:BACKEND_PORT[-END][/PROTOCOL]`
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Spec {
    /// `None`: every local address. Unspecified: every local address of that family.
    pub address: Option<IpAddr>,
    /// Of a link-local `address`.
    pub zone: Option<Zone>,
    pub ports: Ports,
    pub backend: IpAddr,
    /// Of a link-local `backend`.
    pub backend_zone: Option<Zone>,
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

impl SpecError {
    /// What is wrong, without the SPEC.
    pub fn problem(&self) -> &str {
        &self.problem
    }
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
    // A device's name may have a comma.
    if fields
        .iter()
        .any(|it| it.contains(',') && !it.contains('%'))
    {
        return Err("a publish has one backend, and no list of them".into());
    }
    let ((address, zone), ports, backend, backend_ports) = match fields.as_slice() {
        [ports, backend, backend_ports] => ((None, None), ports, backend, backend_ports),
        [address, ports, backend, backend_ports] => {
            let (address, zone) = parse_address(address)?;
            ((Some(address), zone), ports, backend, backend_ports)
        }
        _ => return Err(format!("expected {GRAMMAR}")),
    };
    let (backend, backend_zone) = parse_address(backend)?;
    let spec = Spec {
        address,
        zone,
        ports: parse_ports(ports)?,
        backend,
        backend_zone,
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

/// An address, with its zone if it has one.
fn parse_address(text: &str) -> Result<(IpAddr, Option<Zone>), String> {
    let (address, zone) = match text.split_once('%') {
        Some((address, zone)) => (address, Some(parse_zone(zone)?)),
        None => (text, None),
    };
    let address = address
        .parse::<IpAddr>()
        .map(|address| address.to_canonical())
        .map_err(|_| format!("{address:?} is not an IP address; expected {GRAMMAR}"))?;
    Ok((address, zone))
}

/// A device's name as the kernel takes it (`dev_valid_name`), or its index; what would not be read again when printed is
/// no name here.
fn parse_zone(text: &str) -> Result<Zone, String> {
    let possible = |c: char| c.is_ascii_graphic() && !"/%[]:".contains(c);
    if text.is_empty() || text.len() > 15 || !text.chars().all(possible) {
        return Err(format!("{text:?} is not the name of a device"));
    }
    Ok(Zone(text.into()))
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
    if let Some(what) = no_host(*backend) {
        return Err(format!(
            "backend {backend} is {what}, not the address of one host"
        ));
    }
    if address.is_some_and(|address| address.is_multicast()) {
        return Err("a multicast address cannot be published".into());
    }
    for (address, zone) in [(*address, &spec.zone), (Some(*backend), &spec.backend_zone)] {
        let link_local = address.is_some_and(is_link_local);
        match (address, zone) {
            (Some(address), None) if link_local => {
                return Err(format!(
                    "{address} is on every link; name the device, as in [{address}%eth0]"
                ));
            }
            (None, Some(zone)) => return Err(format!("zone {} without an address", zone.0)),
            (Some(address), Some(zone)) if !link_local => {
                return Err(format!(
                    "{address}%{}: only addresses of fe80::/10 take a device",
                    zone.0
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// What an address is that no single host has.
fn no_host(address: IpAddr) -> Option<&'static str> {
    match address {
        _ if address.is_unspecified() => Some("every address"),
        _ if address.is_multicast() => Some("a group"),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("every host of a network"),
        // RFC 1122, section 3.2.1.3, and RFC 1112, section 4.
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Some("of 0.0.0.0/8"),
        IpAddr::V4(v4) if v4.octets()[0] >= 240 => Some("of the reserved 240.0.0.0/4"),
        _ => None,
    }
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.address {
            write!(f, "{}:", Bracketed(address, self.zone.as_ref()))?;
        }
        let Self {
            ports,
            backend_ports,
            protocol,
            ..
        } = self;
        let backend = Bracketed(self.backend, self.backend_zone.as_ref());
        write!(f, "{ports}:{backend}:{backend_ports}/{protocol}")
    }
}

struct Bracketed<'a>(IpAddr, Option<&'a Zone>);

impl fmt::Display for Bracketed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0, self.1) {
            (IpAddr::V4(v4), _) => write!(f, "{v4}"),
            (IpAddr::V6(v6), None) => write!(f, "[{v6}]"),
            (IpAddr::V6(v6), Some(zone)) => write!(f, "[{v6}%{}]", zone.0),
        }
    }
}

/// An address with its device, and a port.
#[derive(Debug)]
pub struct At<'a>(pub IpAddr, pub Option<&'a Zone>, pub u16);

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", Bracketed(self.0, self.1), self.2)
    }
}

impl Spec {
    /// A spec of its parts.
    ///
    /// # Errors
    /// Why there can be none such, in words.
    pub fn new(
        (address, zone): (Option<IpAddr>, Option<Zone>),
        ports: Ports,
        (backend, backend_zone): (IpAddr, Option<Zone>),
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
            zone,
            ports,
            backend: backend.to_canonical(),
            backend_zone,
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
    pub fn to_backend(
        &self,
        backend: (IpAddr, Option<Zone>),
        port: u16,
        end: Option<u16>,
    ) -> Result<Self, String> {
        let frontend = (self.address, self.zone.clone());
        let ports = Ports {
            first: port,
            last: end.unwrap_or(port),
        };
        Self::new(frontend, self.ports, backend, ports, self.protocol)
    }

    /// Whether clients of both come to the same addresses and ports.
    pub fn has_same_frontend(&self, other: &Self) -> bool {
        self.frontend() == other.frontend()
    }

    /// What its clients come to.
    pub fn frontend(&self) -> (Protocol, Ports, Option<IpAddr>, Option<&Zone>) {
        (self.protocol, self.ports, self.address, self.zone.as_ref())
    }

    /// The addresses that sockets are bound to. Every local address means both families: the proxy serves clients of the
    /// one that the backend does not have.
    pub fn frontends(&self) -> Vec<IpAddr> {
        match self.address {
            Some(address) => vec![address],
            None => vec![
                IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            ],
        }
    }

    /// Whether clients of this address and port are this publish's.
    pub fn claims(&self, address: IpAddr, port: u16) -> bool {
        let covers = |frontend: &IpAddr| {
            let whole_family = frontend.is_unspecified() && frontend.is_ipv4() == address.is_ipv4();
            *frontend == address || whole_family
        };
        (self.ports.first..=self.ports.last).contains(&port) && self.frontends().iter().any(covers)
    }

    /// Whether both claim some address and port.
    pub fn overlaps(&self, other: &Self) -> bool {
        // The same link-local address may be on several devices.
        let elsewhere = matches!((&self.zone, &other.zone), (Some(a), Some(b)) if a != b);
        let conflict = |a: &IpAddr, b: &IpAddr| {
            let same = a == b && !elsewhere;
            a.is_ipv4() == b.is_ipv4() && (same || a.is_unspecified() || b.is_unspecified())
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
            "[fe80::1%eth0]:53:[fe80::2%4]:53/udp",
            "0.0.0.0:80:[fd00::2]:80/tcp",
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
            ("80:10.0.0.2:80,10.0.0.3:80", "one backend"),
            ("80:container:80", "\"container\" is not an IP address"),
            ("[::1:80:172.17.0.2:80", "'['"),
            (
                "80:0.0.0.0:80",
                "every address, not the address of one host",
            ),
            ("80:[::]:80", "every address"),
            ("80:0.1.2.3:80", "0.0.0.0/8"),
            ("80:255.255.255.255:80", "every host"),
            ("80:250.0.0.1:80", "240.0.0.0/4"),
            ("80:[::ffff:250.0.0.1]:80", "240.0.0.0/4"),
            ("80:224.0.0.251:80/udp", "a group"),
            ("80:[ff02::fb]:80/udp", "a group"),
            ("80:[fe80::2]:80", "[fe80::2%eth0]"),
            ("[fe80::1]:80:172.17.0.2:80", "[fe80::1%eth0]"),
            ("80:[fd00::2%eth0]:80", "only addresses of fe80::/10"),
            (
                "127.0.0.1%lo:80:172.17.0.2:80",
                "only addresses of fe80::/10",
            ),
            ("80:[fe80::2%]:80", "name of a device"),
            ("80:[fe80::2%a-name-of-16-oct]:80", "name of a device"),
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
        assert!(overlap("0.0.0.0:80:10.0.0.2:80", "80:[fd00::2]:80"));
        let on = |device| format!("[fe80::1%{device}]:80:10.0.0.2:80");
        assert!(!overlap(&on("eth0"), &on("eth1")));
        assert!(overlap(&on("eth0"), &on("eth0")));
        assert!(overlap(&on("eth0"), "80:10.0.0.2:80"));
    }

    proptest! {
        #[test]
        fn printing_and_parsing_are_inverse(
            address in proptest::option::of(any::<IpAddr>()), first in 1_u16.., length in 0_u16..100,
            backend in any::<IpAddr>(), to in 1_u16..60_000, single: bool, udp: bool, link_local: bool,
            device in "[!-$&-.0-9;-Z^-~\\\\]{1,15}",
        ) {
            // Hardly any address is link-local by chance.
            let link = |address: IpAddr| match address {
                IpAddr::V6(v6) if link_local => {
                    IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 10 | 0xfe80 << 112))
                }
                other => other.to_canonical(),
            };
            let zone = |address: IpAddr| is_link_local(address).then(|| Zone(device.clone()));
            let (address, backend) = (address.map(link), link(backend));
            let last = first.saturating_add(length);
            let backend_last = if single { to } else { to + (last - first) };
            let built = Spec {
                address,
                zone: address.and_then(zone),
                ports: Ports { first, last },
                backend,
                backend_zone: zone(backend),
                backend_ports: Ports { first: to, last: backend_last },
                protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
            };
            prop_assume!(validate(&built).is_ok());
            prop_assert_eq!(built.to_string().parse::<Spec>(), Ok(built));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "[0-9a-f:.%\\[\\]/tcpudp-]{0,40}") {
            let _ = text.parse::<Spec>();
        }
    }
}
