//! Networks of an allow-list, as both paths understand them.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Deserializer, de};

/// Reads a network; an IPv4 one may be written in IPv6 (RFC 4291, section 2.5.5.2).
///
/// # Errors
/// What is wrong with it, in words.
pub fn network(text: &str) -> Result<IpNet, String> {
    let network = text.parse::<IpNet>().map(canonical);
    network.map_err(|_| {
        let problem = format!("{text:?} is not a network such as 198.51.100.0/24");
        match text.parse::<IpAddr>() {
            Ok(address) => format!("{problem}; write {} for this address", IpNet::from(address)),
            Err(_) => problem,
        }
    })
}

/// A network that stands in a document.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Network(pub IpNet);

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        network(&text).map(Self)
    }
}

/// Reads a network, or one address.
///
/// # Errors
/// What is wrong with it, in words.
pub fn source(text: &str) -> Result<IpNet, String> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(address.to_canonical().into()),
        Err(_) => network(text),
    }
}

/// The same of a document's field that may be left out.
///
/// # Errors
/// As [`source`].
pub fn source_of<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IpNet>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    let network = text.as_deref().map(source).transpose();
    network.map_err(de::Error::custom)
}

/// The same of one that must be there.
///
/// # Errors
/// As [`source`].
pub fn a_source<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IpNet, D::Error> {
    let text = String::deserialize(deserializer)?;
    source(&text).map_err(de::Error::custom)
}

/// The IPv4 network that `::ffff:a.b.c.d/96` and longer ones name; others as they are.
pub fn canonical(network: IpNet) -> IpNet {
    let IpNet::V6(v6) = network else {
        return network;
    };
    match v6.addr().to_ipv4_mapped() {
        Some(address) if IpAddr::V6(v6.network()).to_canonical().is_ipv4() => {
            let prefix = v6.prefix_len().saturating_sub(96);
            Ipv4Net::new(address, prefix).map_or(network, IpNet::V4)
        }
        _ => network,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_network_may_be_written_in_ipv6() {
        for (written, meant) in [
            ("::ffff:198.51.100.0/120", "198.51.100.0/24"),
            ("::ffff:0.0.0.0/96", "0.0.0.0/0"),
            ("::ffff:192.0.2.7/128", "192.0.2.7/32"),
            ("::ffff:192.0.2.7/95", "::ffff:192.0.2.7/95"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("10.0.0.0/8", "10.0.0.0/8"),
        ] {
            assert_eq!(network(written), Ok(meant.parse().expect(meant)));
        }
        assert!(network("198.51.100.0/33").is_err_and(|error| error.contains("/33")));
        for (address, meant) in [
            ("192.0.2.7", "192.0.2.7/32"),
            ("2001:db8::7", "2001:db8::7/128"),
        ] {
            let error = network(address).expect_err(address);
            assert!(error.contains(&format!("write {meant} ")), "{error}");
        }
    }
}
