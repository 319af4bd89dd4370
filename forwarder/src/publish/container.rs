//! Containers as backends: which one, and what its ports are published as wherever its addresses are.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

use super::spec::{Ports, Protocol, Spec, Zone};

/// The container that a publish leads to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Container {
    pub name: String,
    /// Without, its last address may be another container's by now.
    pub runs: bool,
}

/// `[HOST_ADDR:]HOST_PORT[-END]:PORT[-END][/PROTOCOL]`, of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPort {
    pub address: Option<IpAddr>,
    pub zone: Option<Zone>,
    pub ports: Ports,
    pub container_ports: Ports,
    pub protocol: Protocol,
}

const GRAMMAR: &str = "[HOST_ADDR:]HOST_PORT[-END]:PORT[-END][/tcp|/udp|/sctp]";

impl FromStr for ContainerPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: expected {GRAMMAR}");
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        // A SPEC of which the backend's address is not known yet.
        let spec = format!("{host}:127.0.0.1:{port}").parse::<Spec>();
        let spec = spec.map_err(|error| format!("{text:?}: {}", error.problem()))?;
        Ok(Self {
            address: spec.address,
            zone: spec.zone,
            ports: spec.ports,
            container_ports: spec.backend_ports,
            protocol: spec.protocol,
        })
    }
}

impl fmt::Display for ContainerPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.address, &self.zone) {
            (Some(IpAddr::V6(v6)), Some(zone)) => write!(f, "[{v6}%{}]:", zone.as_str())?,
            (Some(IpAddr::V6(v6)), None) => write!(f, "[{v6}]:")?,
            (Some(v4), _) => write!(f, "{v4}:")?,
            (None, _) => {}
        }
        let Self {
            ports,
            container_ports,
            protocol,
            ..
        } = self;
        write!(f, "{ports}:{container_ports}/{protocol}")
    }
}

impl ContainerPort {
    /// What is published of a container with these addresses: on every address of the host, in each family that the
    /// container has, unless one is named.
    ///
    /// # Errors
    /// The container has no address, or it cannot be published so, in words.
    pub fn towards(&self, addresses: &[IpAddr]) -> Result<Vec<Spec>, String> {
        let to = |address: Option<IpAddr>, backend: IpAddr| {
            let frontend = (address, self.zone.clone());
            let backend = (backend, None);
            Spec::new(
                frontend,
                self.ports,
                backend,
                self.container_ports,
                self.protocol,
            )
        };
        match (self.address, addresses) {
            (_, []) => Err("the container has no address of its own".into()),
            (None, [only]) => Ok(vec![to(None, *only)?]),
            (None, all) => {
                let each = all
                    .iter()
                    .map(|backend| to(Some(every(*backend)), *backend));
                each.collect()
            }
            (Some(address), all) => Ok(vec![to(Some(address), closest(all, address))?]),
        }
    }

    /// Whether this is one of what [`ContainerPort::towards`] made of it, wherever the container was.
    pub fn is_published_as(&self, spec: &Spec) -> bool {
        let is_address = match (self.address, spec.address) {
            (None, Some(address)) => address.is_unspecified(),
            (wanted, address) => wanted == address,
        };
        is_address
            && self.zone == spec.zone
            && self.ports == spec.ports
            && self.container_ports == spec.backend_ports
            && self.protocol == spec.protocol
    }
}

/// Every address of the host, in a family.
const fn every(of: IpAddr) -> IpAddr {
    match of {
        IpAddr::V4(_) => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    }
}

/// The one of the same family, or else the first.
fn closest(addresses: &[IpAddr], like: IpAddr) -> IpAddr {
    let mut same = addresses.iter().filter(|it| it.is_ipv4() == like.is_ipv4());
    *same.next().or(addresses.first()).unwrap_or(&like)
}

/// The same publish towards a container that has these addresses now; `None` if it has none.
pub fn moved(spec: &Spec, addresses: &[IpAddr]) -> Option<Spec> {
    let backend = closest(addresses, spec.address.unwrap_or(spec.backend));
    (!addresses.is_empty()).then(|| Spec {
        backend,
        backend_zone: None,
        ..spec.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: &str = "172.17.0.2";
    const V6: &str = "fd00::2";

    fn addresses(texts: &[&str]) -> Vec<IpAddr> {
        let parse = |text: &&str| text.parse().expect("an address");
        texts.iter().map(parse).collect()
    }

    fn specs(port: &str, to: &[&str]) -> Result<Vec<String>, String> {
        let specs = port.parse::<ContainerPort>()?.towards(&addresses(to))?;
        Ok(specs.iter().map(Spec::to_string).collect())
    }

    #[test]
    fn a_port_is_published_to_the_containers_addresses() {
        let range = "127.0.0.1:1-9:11-19";
        for (port, to, expected) in [
            ("8080:80", &[V4][..], &["8080:172.17.0.2:80/tcp"][..]),
            (
                "53:53/udp",
                &[V4, V6],
                &["0.0.0.0:53:172.17.0.2:53/udp", "[::]:53:[fd00::2]:53/udp"],
            ),
            (range, &[V4], &["127.0.0.1:1-9:172.17.0.2:11-19/tcp"]),
            ("[::1]:80:80", &[V4, V6], &["[::1]:80:[fd00::2]:80/tcp"]),
            ("[::1]:80:80", &[V4], &["[::1]:80:172.17.0.2:80/tcp"]),
        ] {
            assert_eq!(specs(port, to).expect(port), expected, "{port}");
        }
        for (port, to, part) in [
            ("80", &[V4][..], "HOST_PORT"),
            ("80:80/icmp", &[V4], "icmp"),
            ("80-81:80-89", &[V4], "ranges map"),
            ("80:80", &[], "no address"),
        ] {
            let error = specs(port, to).expect_err(port);
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_port_knows_its_publishes() {
        for (port, spec, expected) in [
            ("80:8080", "80:172.17.0.2:8080", true),
            ("80:8080", "[::]:80:[fd00::2]:8080", true),
            ("80:8080", "127.0.0.1:80:172.17.0.2:8080", false),
            ("0.0.0.0:80:8080", "80:172.17.0.2:8080", false),
            ("127.0.0.1:80:8080", "127.0.0.1:80:172.17.0.2:8080", true),
            ("80:8080", "80:172.17.0.2:80", false),
            ("80:8080", "81:172.17.0.2:8080", false),
            ("80:8080", "80:172.17.0.2:8080/udp", false),
            ("[fe80::1%a]:80:80", "[fe80::1%b]:80:172.17.0.2:80", false),
        ] {
            let spec: Spec = spec.parse().expect(spec);
            let of: ContainerPort = port.parse().expect(port);
            assert_eq!(of.is_published_as(&spec), expected, "{port} as {spec}");
        }
    }

    #[test]
    fn a_port_is_read_as_it_is_written() {
        for port in ["8080:80/tcp", "127.0.0.1:1-9:11-19/udp", "[::1]:80:80/sctp"] {
            assert_eq!(port.parse::<ContainerPort>().expect(port).to_string(), port);
        }
    }

    #[test]
    fn a_publish_follows_in_the_family_of_its_clients() {
        let moved = |spec: &str, to: &[&str]| {
            let spec: Spec = spec.parse().expect(spec);
            moved(&spec, &addresses(to)).map(|spec| spec.to_string())
        };
        let both = [V4, V6];
        for (spec, to, expected) in [
            ("80:172.17.0.9:80", &both[..], "80:172.17.0.2:80/tcp"),
            ("80:[fd00::9]:80", &both, "80:[fd00::2]:80/tcp"),
            ("[::]:80:[fd00::9]:80", &[V4], "[::]:80:172.17.0.2:80/tcp"),
        ] {
            assert_eq!(moved(spec, to).as_deref(), Some(expected));
        }
        assert_eq!(moved("80:172.17.0.9:80", &[]), None);
    }
}
