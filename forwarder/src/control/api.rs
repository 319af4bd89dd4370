//! What goes over the control socket: requests and documents, as plain types. docs/openapi.json describes them.

use std::{fmt, net::IpAddr, num::NonZeroU64};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, de};
use utoipa::ToSchema;

use crate::{
    holder::Taken,
    publish::{
        ContainerPort, Holder, Id, Limits, Owner, Policy, ProxyProtocol, Publish, Spec, allow,
        limits::{Bandwidth, Rate, interface},
        spec::{Ports, Protocol, Zone},
    },
};

/// What an instance is, and how it was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Running {
    pub version: String,
    /// `--respect-firewall`
    pub respects_firewall: bool,
}

/// A publish as `list` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Listed {
    pub id: Id,
    /// Who wants it, such as `cli`, `config` or `docker:ID`.
    #[schema(value_type = String)]
    pub owner: Owner,
    pub protocol: Protocol,
    pub frontend: Endpoint,
    pub backend: Endpoint,
    /// `ebpf`, `userland`, or `engine`: by the rules of the engine that holds the port.
    pub datapath: String,
    /// Who has the sockets that hold its ports, and what the fast path leaves.
    #[serde(default)]
    pub holder: Holder,
    /// The container that the backend is, by its name.
    #[serde(default)]
    pub container: Option<String>,
    /// How packets of other machines get to the backend: `peer`, `device`, `neighbour` or `stack`.
    pub delivery: Option<String>,
    /// How XDP takes part, for a backend on another machine: `native` or `generic`.
    #[serde(default)]
    pub xdp: Option<String>,
    /// Why the fast path does not serve it, in words.
    pub reason: Option<String>,
    /// The same as a name that does not change.
    pub reason_code: Option<String>,
    #[schema(value_type = Vec<String>)]
    pub allow: Vec<IpNet>,
    #[serde(flatten)]
    pub limits: Limits,
    /// It was taken back, and its flows may end in peace.
    #[serde(default)]
    pub draining: bool,
    /// When it was first wanted, in seconds since the epoch.
    #[serde(default)]
    pub since: u64,
    pub flows: u64,
    pub packets: u64,
    pub bytes: u64,
    /// Both directions together, over the last two seconds.
    #[serde(default)]
    pub packets_per_second: f64,
    #[serde(default)]
    pub bytes_per_second: f64,
}

/// An address and its ports. No address: every address of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Endpoint {
    #[schema(value_type = Option<String>)]
    pub address: Option<IpAddr>,
    /// The device of a link-local address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub zone: Option<Zone>,
    pub port: u16,
    pub end_port: u16,
}

/// A flow as `flows` shows it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListedFlow {
    pub publish: Id,
    pub protocol: String,
    pub client: String,
    pub frontend: String,
    /// What the backend sees as the client.
    pub source: String,
    pub backend: String,
    pub state: String,
    pub idle_seconds: u64,
    /// From the client, and to it.
    pub packets: [u64; 2],
    pub bytes: [u64; 2],
    /// `ebpf` or `userland`.
    pub datapath: String,
}

/// A packet counter as `stats` shows it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Counter {
    pub reason: String,
    pub packets: u64,
}

/// A packet that the traced program has seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Traced {
    Packet(Box<TracedPacket>),
    /// So many lines were lost, because they came faster than they were read.
    Lost(u64),
}

/// What came of one packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TracedPacket {
    /// `None` for a packet that no publish is meant by.
    pub publish: Option<Id>,
    pub reason: String,
    pub device: String,
    pub protocol: String,
    pub source: String,
    pub destination: String,
    pub rewritten: Option<Rewritten>,
}

/// What a packet has become, and by where it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Rewritten {
    pub source: String,
    pub destination: String,
    pub delivery: String,
    pub device: String,
}

/// What becomes of the flows of a publish that is taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// They are reset; both ends hear it.
    #[default]
    Cut,
    /// They go on until they end.
    Drain,
    /// As `cut`.
    Reset,
}

/// Something that has changed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Seconds since the epoch.
    pub time: f64,
    /// `published`, `changed`, `unpublished`, `drained` or `path`.
    pub event: String,
    pub publish: Listed,
}

/// A line of those that follow what changes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Followed {
    Event(Box<Event>),
    /// So many events were lost, because they came faster than they were read: a list of publishes has what came of them.
    Lost {
        lost: u64,
    },
}

impl From<Event> for Followed {
    fn from(event: Event) -> Self {
        Self::Event(event.into())
    }
}

/// A source of which nothing gets into a published port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object with `network`")]
pub struct Ban {
    #[schema(value_type = String)]
    #[serde(deserialize_with = "allow::a_source")]
    pub network: IpNet,
    /// Seconds since the epoch; without, for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
    /// The only publish that it is banned from; without, from all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publish: Option<NamedPublish>,
    /// Who has banned it; without, `cli`.
    #[schema(value_type = Option<String>)]
    #[serde(default = "Owner::cli", skip_serializing_if = "Owner::is_cli")]
    pub owner: Owner,
}

/// What a reload has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reloaded {
    pub added: usize,
    pub changed: usize,
    pub removed: usize,
}

impl fmt::Display for Reloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            added,
            changed,
            removed,
        } = self;
        write!(f, "{added} added, {changed} changed, {removed} removed")
    }
}

/// Why a request was refused (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{}", self.line())]
pub struct Problem {
    pub status: u16,
    /// The kind of problem.
    pub title: String,
    /// What is wrong with this request.
    pub detail: String,
    /// What would change that.
    pub remedy: Option<String>,
    /// The port that somebody else has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken: Option<Box<Taken>>,
}

impl Problem {
    /// Of a message whose last part, after a semicolon, is the remedy.
    pub fn new(status: u16, title: &str, message: &str) -> Self {
        let (detail, remedy) = match message.rsplit_once("; ") {
            Some((detail, remedy)) => (detail, Some(remedy.to_owned())),
            None => (message, None),
        };
        Self {
            status,
            title: title.into(),
            detail: detail.into(),
            remedy,
            taken: None,
        }
    }

    fn line(&self) -> String {
        match &self.remedy {
            Some(remedy) => format!("{}; {remedy}", self.detail),
            None => self.detail.clone(),
        }
    }
}

/// A publish that is asked for: a SPEC as text, or an object with a `spec` or with frontend and backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Asked {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spec: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frontend: Option<AskedEndpoint>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<AskedEndpoint>,
    /// The container that is the backend, by its name or id: its address is left out, and followed. The SPEC is
    /// `[HOST_ADDR:]HOST_PORT[-END]:PORT[-END][/tcp|/udp|/sctp]` then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// Its fields stand beside the others.
    #[serde(flatten)]
    #[schema(inline)]
    pub policy: Policy,
}

/// As [`Endpoint`]; one port if there is no last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object with `address` and `port`")]
pub struct AskedEndpoint {
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub address: Option<IpAddr>,
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub zone: Option<Zone>,
    pub port: u16,
    #[serde(default)]
    pub end_port: Option<u16>,
}

impl<'de> Deserialize<'de> for Asked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields, default)]
        #[derive(Default)]
        struct Object {
            spec: Option<String>,
            protocol: Option<Protocol>,
            frontend: Option<AskedEndpoint>,
            backend: Option<AskedEndpoint>,
            container: Option<String>,
            // Those of the policy, by name: what is flattened could not be refused.
            #[serde(alias = "proxy-protocol")]
            proxy_protocol: Option<ProxyProtocol>,
            allow: Option<Vec<allow::Network>>,
            #[serde(alias = "max-flows")]
            max_flows: Option<NonZeroU64>,
            rate: Option<Rate>,
            #[serde(alias = "rate-per-source")]
            rate_per_source: Option<Rate>,
            bandwidth: Option<Bandwidth>,
            on: Option<Interface>,
        }
        #[derive(Deserialize)]
        #[serde(try_from = "String")]
        struct Interface(String);
        impl TryFrom<String> for Interface {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                interface(&text).map(Self)
            }
        }
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Asked;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a SPEC, or an object with `spec` or with `frontend` and `backend`")
            }

            fn visit_str<E: de::Error>(self, spec: &str) -> Result<Asked, E> {
                Ok(Asked {
                    spec: Some(spec.into()),
                    ..Asked::default()
                })
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Asked, A::Error> {
                let object = Object::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(Asked {
                    spec: object.spec,
                    protocol: object.protocol,
                    frontend: object.frontend,
                    backend: object.backend,
                    container: object.container,
                    policy: Policy {
                        allow: object.allow.map(networks),
                        proxy_protocol: object.proxy_protocol,
                        limits: Limits {
                            max_flows: object.max_flows,
                            rate: object.rate,
                            rate_per_source: object.rate_per_source,
                            bandwidth: object.bandwidth,
                            on: object.on.map(|it| it.0),
                        },
                    },
                })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl From<&Publish> for Asked {
    fn from(publish: &Publish) -> Self {
        Self {
            spec: Some(publish.spec.to_string()),
            policy: publish.policy.clone(),
            ..Self::default()
        }
    }
}

impl Asked {
    /// What is asked for of a container.
    ///
    /// # Errors
    /// It is none of a container's ports, in words.
    pub fn container_port(&self) -> Result<ContainerPort, String> {
        match (&self.spec, &self.frontend, &self.backend) {
            (Some(spec), None, None) if self.protocol.is_none() => spec.parse(),
            (None, Some(frontend), Some(backend)) if backend.address.is_none() => {
                Ok(ContainerPort {
                    address: frontend.address,
                    zone: frontend.zone.clone(),
                    ports: frontend.ports(),
                    container_ports: backend.ports(),
                    protocol: self.protocol.unwrap_or(Protocol::Tcp),
                })
            }
            _ => Err(
                "beside `container`, give either `spec`, or `frontend` and a `backend` without address"
                    .into(),
            ),
        }
    }
}

impl AskedEndpoint {
    fn ports(&self) -> Ports {
        Ports {
            first: self.port,
            last: self.end_port.unwrap_or(self.port),
        }
    }
}

impl TryFrom<Asked> for Publish {
    type Error = String;

    fn try_from(asked: Asked) -> Result<Self, String> {
        if let Some(container) = asked.container {
            return Err(format!(
                "container {container}: only `publish --container` and the API follow one"
            ));
        }
        let spec = match (asked.spec, asked.frontend, asked.backend) {
            (Some(spec), None, None) if asked.protocol.is_none() => {
                spec.parse::<Spec>().map_err(|error| error.to_string())?
            }
            (None, Some(frontend), Some(backend)) => {
                let address = backend.address.ok_or("a backend needs an address")?;
                let (to, from) = (backend.ports(), frontend.ports());
                Spec::new(
                    (frontend.address, frontend.zone),
                    from,
                    (address, backend.zone),
                    to,
                    asked.protocol.unwrap_or(Protocol::Tcp),
                )?
            }
            _ => return Err("give either `spec`, or `frontend` and `backend`".into()),
        };
        let suits = asked.policy.suits(spec.protocol);
        suits.map_err(|problem| format!("{spec}: {problem}"))?;
        Ok(Self::new(spec, asked.policy))
    }
}

fn networks(allow: Vec<allow::Network>) -> Vec<IpNet> {
    allow.into_iter().map(|network| network.0).collect()
}

/// What `POST /v1/unpublish` takes back, all or none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Unpublish {
    /// Numbers or SPECs; beside `container`, ports as it has them there, or none for all.
    pub publishes: Vec<NamedPublish>,
    /// The container that they lead to, by its name. It need not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    #[serde(default)]
    pub ending: Ending,
}

/// A publish by its number or its SPEC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a publish's number or SPEC")]
pub enum NamedPublish {
    Id(Id),
    Spec(String),
}

impl fmt::Display for NamedPublish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Spec(spec) => spec.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(json: &str) -> Result<Publish, String> {
        serde_json::from_str::<Asked>(json)
            .map_err(|error| error.to_string())
            .and_then(Publish::try_from)
    }

    #[test]
    fn a_publish_is_asked_for_in_three_ways() {
        let spec = "127.0.0.1:8080-8081:172.17.0.2:80-81/udp";
        let whole = r#"{"protocol": "udp", "frontend": {"address": "127.0.0.1", "port": 8080, "end_port": 8081},
                        "backend": {"address": "172.17.0.2", "port": 80, "end_port": 81}}"#;
        let object = format!(r#"{{"spec": "{spec}"}}"#);
        for json in [&format!("\"{spec}\""), &object, whole] {
            assert_eq!(asked(json).expect(json).spec.to_string(), spec);
        }
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (json, part) in [
            (
                r#"{"spec": "80:10.0.0.2:80", "alow": []}"#,
                "unknown field `alow`",
            ),
            (
                r#"{"spec": "80:10.0.0.2:80", "protocol": "udp"}"#,
                "either `spec`",
            ),
            (r#"{"frontend": {"port": 80}}"#, "either `spec`"),
            (
                r#"{"frontend": {"port": 80}, "backend": {"port": 80}}"#,
                "an address",
            ),
            (
                r#"{"frontend": {"port": 0}, "backend": {"address": "10.0.0.2", "port": 80}}"#,
                "port 0",
            ),
            ("7", "a SPEC, or an object"),
        ] {
            let error = asked(json).expect_err(json);
            assert!(error.contains(part), "{json}: {error}");
        }
    }

    #[test]
    fn the_last_part_of_a_message_is_its_remedy() {
        let problem = Problem::new(409, "Conflict", "publish 80: taken; choose another");
        assert_eq!(problem.detail, "publish 80: taken");
        assert_eq!(problem.remedy.as_deref(), Some("choose another"));
        assert_eq!(problem.to_string(), "publish 80: taken; choose another");
    }
}
