//! What a container runtime says to the plugin: the environment and the network's configuration, and the publishes that
//! follow from them. Asks neither the machine nor the instance.

use std::{collections::BTreeSet, env, net::IpAddr};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::failure::{Code, Failure};
use crate::publish::{
    Owner, Spec,
    spec::{Ports, Protocol},
};

/// Protocol versions that are spoken. Before 0.3.0 there were no chains.
pub(super) const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// What a configuration without a version has, by the specification.
const NO_VERSION: &str = "0.1.0";

/// Keys of the reference's `portmap` that change how its rules are made, and mean nothing where there are none.
const WITHOUT_MEANING: [&str; 5] = [
    "snat",
    "masqAll",
    "markMasqBit",
    "externalSetMarkChain",
    "backend",
];
/// Those that say which packets may use a port. To ignore them would open it.
const CONDITIONS: [&str; 2] = ["conditionsV4", "conditionsV6"];
const KNOWN: [&str; 11] = [
    "cniVersion",
    "name",
    "type",
    "capabilities",
    "args",
    "ipam",
    "dns",
    "runtimeConfig",
    "prevResult",
    "instance",
    "disableGC",
];

fn config(message: &str, details: &str) -> Failure {
    Failure::new(Code::Config, message, &details)
}

/// A network's configuration.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) version: String,
    all: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    host_port: i64,
    container_port: i64,
    #[serde(default)]
    protocol: String,
    #[serde(default, rename = "hostIP")]
    host_ip: String,
}

#[derive(Debug, Deserialize)]
struct Valid {
    #[serde(rename = "containerID")]
    container: String,
    ifname: String,
}

/// What of a result is needed.
#[derive(Debug, Default, Deserialize)]
struct Outcome {
    #[serde(default)]
    ips: Vec<Given>,
    #[serde(default)]
    interfaces: Vec<Interface>,
}

#[derive(Debug, Deserialize)]
struct Given {
    address: IpNet,
    interface: Option<i64>,
}

#[derive(Debug, Deserialize)]
struct Interface {
    #[serde(default)]
    name: String,
    #[serde(default)]
    sandbox: String,
}

/// One container's interface in one network.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Attachment {
    pub(super) owner: Owner,
    interface: String,
}

impl Attachment {
    /// # Errors
    /// A variable is missing, or is not what the specification allows.
    pub(super) fn from_environment(config: &Config, with_netns: bool) -> Result<Self, Failure> {
        let variable = |name: &str| match env::var(name) {
            Ok(value) if !value.is_empty() => Ok(value),
            _ => Err(Failure::new(
                Code::Environment,
                &format!("{name} is missing"),
                &"",
            )),
        };
        if with_netns {
            variable("CNI_NETNS")?;
        }
        let (container, interface) = (variable("CNI_CONTAINERID")?, variable("CNI_IFNAME")?);
        Self::new(config.name()?, &container, &interface)
    }

    fn new(network: &str, container: &str, interface: &str) -> Result<Self, Failure> {
        let wrong = |name: &str, value: &str, what: &str| {
            Err(Failure::new(
                Code::Environment,
                &format!("{name}: {value:?} is {what}"),
                &"",
            ))
        };
        if !is_identifier(container) {
            return wrong("CNI_CONTAINERID", container, "no container's identifier");
        }
        // As the kernel has it (`dev_valid_name`).
        if interface.contains('/') || matches!(interface, "." | "..") || interface.len() > 15 {
            return wrong("CNI_IFNAME", interface, "no name of a device");
        }
        match format!("cni:{network}/{container}/{interface}").parse() {
            Ok(owner) => Ok(Self {
                owner,
                interface: interface.into(),
            }),
            Err(_) => wrong("CNI_IFNAME", interface, "no name of a device, or too long"),
        }
    }
}

/// As the specification has it for networks and containers.
fn is_identifier(text: &str) -> bool {
    let is_possible = |octet: u8| octet.is_ascii_alphanumeric() || b"_.-".contains(&octet);
    text.starts_with(|first: char| first.is_ascii_alphanumeric()) && text.bytes().all(is_possible)
}

/// The version of a configuration that is otherwise not understood.
pub(super) fn version_of(text: &[u8]) -> String {
    let all: Value = serde_json::from_slice(text).unwrap_or_default();
    let version = all["cniVersion"].as_str();
    version.unwrap_or(VERSIONS[VERSIONS.len() - 1]).into()
}

impl Config {
    /// # Errors
    /// It is no object of JSON.
    pub(super) fn parse(text: &[u8]) -> Result<Self, Failure> {
        let all: Map<String, Value> = serde_json::from_slice(text).map_err(|error| {
            Failure::new(Code::Decode, "the configuration is no JSON object", &error)
        })?;
        let version = match all.get("cniVersion") {
            None => NO_VERSION.into(),
            Some(Value::String(version)) => version.clone(),
            Some(other) => {
                return Err(Failure::new(Code::Decode, "cniVersion is no string", other));
            }
        };
        Ok(Self { version, all })
    }

    /// # Errors
    /// The version is none of [`VERSIONS`].
    pub(super) fn is_supported(&self) -> Result<(), Failure> {
        let version = &self.version;
        if VERSIONS.contains(&version.as_str()) {
            return Ok(());
        }
        let message = format!("cniVersion {version} is not supported");
        let details = format!("write one of {}", VERSIONS.join(", "));
        Err(Failure::new(Code::Version, &message, &details))
    }

    /// The network's name.
    ///
    /// # Errors
    /// There is none, or it is not what the specification allows.
    pub(super) fn name(&self) -> Result<&str, Failure> {
        let name = self.all.get("name").and_then(Value::as_str);
        match name {
            Some(name) if is_identifier(name) => Ok(name),
            Some(name) => Err(config(&format!("name: {name:?} is no network's name"), "")),
            None => Err(config("name is missing", "")),
        }
    }

    /// The instance that publishes: the key `instance`, or FORWARDER_INSTANCE.
    ///
    /// # Errors
    /// The key is no name.
    pub(super) fn instance(&self) -> Result<String, Failure> {
        let name = match self.all.get("instance") {
            Some(Value::String(name)) => name.clone(),
            Some(other) => return Err(config(&format!("instance: {other} is no string"), "")),
            None => env::var("FORWARDER_INSTANCE").unwrap_or_else(|_| "default".into()),
        };
        if is_identifier(&name) {
            return Ok(name);
        }
        Err(config(
            &format!("instance: {name:?} is no instance's name"),
            "",
        ))
    }

    /// A line for each key that has no effect.
    pub(super) fn notes(&self) -> impl Iterator<Item = String> {
        self.all.keys().filter_map(|key| {
            let why = if WITHOUT_MEANING.contains(&key.as_str()) {
                "is about rules, and there are none"
            } else if KNOWN.contains(&key.as_str())
                || CONDITIONS.contains(&key.as_str())
                || key.starts_with("cni.dev/")
            {
                return None;
            } else {
                "is not known"
            };
            Some(format!("{key} {why}; it has no effect"))
        })
    }

    /// The previous plugin's result, which is ours too.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn result(&self) -> Result<Value, Failure> {
        let Some(Value::Object(result)) = self.all.get("prevResult") else {
            return Err(config(
                "prevResult is missing",
                "list this plugin behind the one that makes the interface",
            ));
        };
        let mut result = result.clone();
        result.insert("cniVersion".into(), self.version.clone().into());
        Ok(result.into())
    }

    /// What is to be published.
    ///
    /// # Errors
    /// A mapping is wrong, there is no address, or a condition could not be kept.
    pub(super) fn wanted(&self, attachment: &Attachment) -> Result<Vec<Spec>, Failure> {
        let mappings = self
            .all
            .get("runtimeConfig")
            .and_then(|it| it.get("portMappings"));
        let mappings: Vec<Mapping> = match mappings {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(mappings) => Vec::deserialize(mappings).map_err(|error| {
                Failure::new(Code::Config, "runtimeConfig.portMappings", &error)
            })?,
        };
        if mappings.is_empty() {
            return Ok(Vec::new());
        }
        for key in CONDITIONS {
            let is_empty = match self.all.get(key) {
                None | Some(Value::Null) => true,
                Some(Value::Array(all)) => all.is_empty(),
                Some(_) => false,
            };
            if !is_empty {
                return Err(config(
                    &format!(
                        "{key}: conditions of iptables cannot be kept, and without them the ports would be open"
                    ),
                    "take the key out; `allow` of the instance says which networks are served",
                ));
            }
        }
        let addresses = self.addresses(attachment)?;
        let mut wanted = Vec::new();
        for mapping in mappings {
            for spec in publishes(&mapping, &addresses)? {
                // One that is there twice is one, as it is to the reference's `portmap`.
                if !wanted.contains(&spec) {
                    wanted.push(spec);
                }
            }
        }
        Ok(wanted)
    }

    /// The container's addresses: the first of each family on its interface.
    fn addresses(&self, attachment: &Attachment) -> Result<Vec<IpAddr>, Failure> {
        let outcome = self.all.get("prevResult").map(Outcome::deserialize);
        let Outcome { ips, interfaces } = outcome
            .transpose()
            .map_err(|error| Failure::new(Code::Config, "prevResult", &error))?
            .unwrap_or_default();
        let is_on_another = |given: &Given| {
            let number = given
                .interface
                .and_then(|number| usize::try_from(number).ok());
            let interface = number.and_then(|number| interfaces.get(number));
            interface.is_some_and(|it| it.sandbox.is_empty() || it.name != attachment.interface)
        };
        // A link-local address needs its device, which only the container knows.
        let is_everywhere = |given: &&Given| match given.address.addr() {
            IpAddr::V4(_) => true,
            IpAddr::V6(v6) => !v6.is_unicast_link_local(),
        };
        let ips = ips.iter().filter(|given| !is_on_another(given));
        let ips = ips.filter(is_everywhere);
        let ips: Vec<IpAddr> = ips.map(|given| given.address.addr()).collect();
        let first = |is_v4: bool| ips.iter().find(|it| it.is_ipv4() == is_v4).copied();
        let addresses: Vec<IpAddr> = [first(true), first(false)].into_iter().flatten().collect();
        if addresses.is_empty() {
            return Err(config(
                &format!("prevResult has no address of {}", attachment.interface),
                "list this plugin behind one that gives it an address",
            ));
        }
        Ok(addresses)
    }

    /// Whose publishes are to stay, of this network.
    ///
    /// # Errors
    /// There is no list: without it everything would go.
    pub(super) fn valid_attachments(&self) -> Result<BTreeSet<Owner>, Failure> {
        let key = "cni.dev/valid-attachments";
        let Some(valid) = self.all.get(key) else {
            return Err(config(&format!("{key} is missing"), ""));
        };
        let valid: Vec<Valid> = Option::deserialize(valid)
            .map_err(|error| Failure::new(Code::Config, key, &error))?
            .unwrap_or_default();
        let network = self.name()?;
        let owners = valid.iter().map(|it| {
            Attachment::new(network, &it.container, &it.ifname)
                .map(|attachment| attachment.owner)
                .map_err(|failure| failure.with(Code::Config))
        });
        owners.collect()
    }
}

/// A mapping without an address of the host is of every address, in each family that the container has. One with an address
/// leads to the container's address of that family, or else to the one that there is.
fn publishes(mapping: &Mapping, addresses: &[IpAddr]) -> Result<Vec<Spec>, Failure> {
    let port = |name: &str, number: i64| match u16::try_from(number) {
        Ok(port) if port > 0 => Ok(Ports {
            first: port,
            last: port,
        }),
        _ => Err(config(
            &format!("{name}: {number} is no port from 1 to 65535"),
            "",
        )),
    };
    let host = port("hostPort", mapping.host_port)?;
    let container = port("containerPort", mapping.container_port)?;
    let protocol = match mapping.protocol.to_ascii_lowercase().as_str() {
        "" | "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        other => {
            return Err(config(
                &format!("protocol: {other:?} is not tcp, udp or sctp"),
                "",
            ));
        }
    };
    let every = |address: &IpAddr| -> IpAddr {
        match address {
            IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        }
    };
    let pairs: Vec<(IpAddr, IpAddr)> = if mapping.host_ip.is_empty() {
        addresses.iter().map(|to| (every(to), *to)).collect()
    } else {
        let Ok(from) = mapping.host_ip.parse::<IpAddr>() else {
            return Err(config(
                &format!("hostIP: {:?} is no address", mapping.host_ip),
                "",
            ));
        };
        let from = from.to_canonical();
        let same = addresses.iter().find(|to| to.is_ipv4() == from.is_ipv4());
        same.or(addresses.first())
            .map(|to| (from, *to))
            .into_iter()
            .collect()
    };
    let specs = pairs.into_iter().map(|(from, to)| {
        Spec::new((Some(from), None), host, (to, None), container, protocol)
            .map_err(|problem| config(&problem, ""))
    });
    specs.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(mapping: &Value, ips: &Value) -> Config {
        let all = json!({
            "cniVersion": "1.0.0", "name": "net", "type": "forwarder-portmap",
            "runtimeConfig": {"portMappings": [mapping]},
            "prevResult": {
                "interfaces": [{"name": "br0"}, {"name": "eth0", "sandbox": "/run/netns/a"}],
                "ips": ips,
            },
        });
        Config::parse(all.to_string().as_bytes()).expect("JSON")
    }

    fn wanted(mapping: &Value, ips: &Value) -> Result<Vec<String>, Failure> {
        let attachment = Attachment::new("net", "0a", "eth0")?;
        let specs = config(mapping, ips).wanted(&attachment)?;
        Ok(specs.iter().map(Spec::to_string).collect())
    }

    fn both() -> Value {
        json!([
            {"address": "10.1.0.1/16", "interface": 0},
            {"address": "10.1.0.5/16", "interface": 1, "gateway": "10.1.0.1", "version": "4"},
            {"address": "fd00::5/64", "interface": 1},
            {"address": "fd00::6/64", "interface": 1},
        ])
    }

    #[test]
    fn a_mapping_is_published_to_the_containers_first_address_of_each_family() {
        let mapping = |host_ip: &str, protocol: &str| json!({"hostPort": 8080, "containerPort": 80, "protocol": protocol, "hostIP": host_ip});
        for (host_ip, protocol, specs) in [
            (
                "",
                "",
                &["0.0.0.0:8080:10.1.0.5:80/tcp", "[::]:8080:[fd00::5]:80/tcp"][..],
            ),
            ("0.0.0.0", "udp", &["0.0.0.0:8080:10.1.0.5:80/udp"]),
            ("127.0.0.1", "TCP", &["127.0.0.1:8080:10.1.0.5:80/tcp"]),
            ("::", "sctp", &["[::]:8080:[fd00::5]:80/sctp"]),
        ] {
            assert_eq!(
                wanted(&mapping(host_ip, protocol), &both()).expect(host_ip),
                specs
            );
        }
        let v4 = json!([{"address": "10.1.0.5/16"}]);
        let every = wanted(&mapping("", ""), &v4).expect("IPv4 alone");
        assert_eq!(every, ["0.0.0.0:8080:10.1.0.5:80/tcp"]);
        let other = wanted(&mapping("::1", ""), &v4).expect("the other family");
        assert_eq!(other, ["[::1]:8080:10.1.0.5:80/tcp"]);
        let local = json!({"address": "fe80::5/64"});
        let beside = wanted(
            &mapping("", ""),
            &json!([local, {"address": "10.1.0.5/16"}]),
        );
        assert_eq!(beside.expect("IPv4"), every);
        let failure = wanted(&mapping("", ""), &json!([local])).expect_err("no other");
        assert!(
            failure.message.contains("no address of eth0"),
            "{failure:?}"
        );
    }

    #[test]
    fn a_mapping_that_is_there_twice_is_published_once() {
        let same =
            |protocol: &str| json!({"hostPort": 8080, "containerPort": 80, "protocol": protocol});
        let mut config = config(&same("tcp"), &both());
        config.all["runtimeConfig"]["portMappings"] =
            json!([same("tcp"), same("udp"), same("TCP"), same("")]);
        let attachment = Attachment::new("net", "0a", "eth0").expect("names");
        let specs = config.wanted(&attachment).expect("mappings");
        let specs: Vec<String> = specs.iter().map(Spec::to_string).collect();
        assert_eq!(
            specs,
            [
                "0.0.0.0:8080:10.1.0.5:80/tcp",
                "[::]:8080:[fd00::5]:80/tcp",
                "0.0.0.0:8080:10.1.0.5:80/udp",
                "[::]:8080:[fd00::5]:80/udp"
            ]
        );
    }

    #[test]
    fn a_wrong_mapping_is_an_invalid_configuration_by_name() {
        for (mapping, part) in [
            (json!({"hostPort": 0, "containerPort": 80}), "hostPort: 0"),
            (
                json!({"hostPort": 80, "containerPort": 65536}),
                "containerPort: 65536",
            ),
            (
                json!({"hostPort": 80, "containerPort": 80, "protocol": "icmp"}),
                "\"icmp\"",
            ),
            (
                json!({"hostPort": 80, "containerPort": 80, "hostIP": "x"}),
                "hostIP: \"x\"",
            ),
            (
                json!({"hostPort": "80", "containerPort": 80}),
                "portMappings",
            ),
        ] {
            let failure = wanted(&mapping, &both()).expect_err(part);
            assert_eq!(failure.code, Code::Config, "{failure:?}");
            assert!(failure.message.contains(part), "{failure:?}");
        }
        let good = json!({"hostPort": 80, "containerPort": 80});
        let failure = wanted(&good, &json!([])).expect_err("no address");
        assert!(
            failure.message.contains("no address of eth0"),
            "{failure:?}"
        );
    }

    #[test]
    fn names_are_what_the_specification_allows() {
        assert!(Attachment::new("net", "0a-B_.", "eth0.5").is_ok());
        for (container, interface) in [
            ("", "eth0"),
            ("../x", "eth0"),
            ("a/b", "eth0"),
            ("a", "e/0"),
            ("a", "e 0"),
        ] {
            let failure = Attachment::new("net", container, interface).expect_err(container);
            assert_eq!(failure.code, Code::Environment);
        }
    }

    #[test]
    fn keys_without_effect_are_said_and_conditions_refused() {
        let mut config = config(&json!({"hostPort": 80, "containerPort": 80}), &both());
        for key in ["snat", "backend", "instnace", "cni.dev/x", "capabilities"] {
            config.all.insert(key.into(), true.into());
        }
        let notes: Vec<String> = config.notes().collect();
        let words = notes.iter().filter_map(|note| note.split(' ').next());
        assert_eq!(
            words.collect::<BTreeSet<_>>(),
            ["backend", "instnace", "snat"].into()
        );
        config
            .all
            .insert("conditionsV4".into(), json!(["-s", "10.0.0.0/8"]));
        let attachment = Attachment::new("net", "0a", "eth0").expect("names");
        let failure = config.wanted(&attachment).expect_err("a condition");
        assert!(failure.message.starts_with("conditionsV4"), "{failure:?}");
        config.all.insert("conditionsV4".into(), json!([]));
        assert!(config.wanted(&attachment).is_ok());
    }
}
