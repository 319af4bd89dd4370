//! What is published: from where to where, under which policy, wanted by whom. Nothing here asks the machine.

pub mod allow;
pub mod bans;
pub mod container;
mod journal;
pub mod limits;
pub mod loops;
pub mod owner;
pub mod registry;
pub mod spec;
pub mod state;
pub mod word;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use self::spec::Protocol;
pub use self::{
    bans::Bans,
    container::{Container, ContainerPort},
    limits::Limits,
    owner::Owner,
    registry::{Conflict, Difference, Id, Registry, Wanted},
    spec::Spec,
};

/// A published port or range, as its owner wants it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Publish {
    pub spec: Spec,
    pub policy: Policy,
    pub holder: Holder,
    /// The container that the backend is.
    pub container: Option<Container>,
}

impl Publish {
    /// A publish whose ports this program holds, to an address that stays.
    pub const fn new(spec: Spec, policy: Policy) -> Self {
        Self {
            spec,
            policy,
            holder: Holder::Forwarder,
            container: None,
        }
    }

    /// Whether its backend is the container of this name, which need not run.
    pub fn leads_to(&self, name: &str) -> bool {
        let container = self.container.as_ref();
        container.is_some_and(|it| it.name == name)
    }

    /// Why it is not to be served now, in words.
    pub fn stopped(&self) -> Option<String> {
        let container = self.container.as_ref().filter(|it| !it.runs)?;
        Some(format!("container {} is not running", container.name))
    }
}

/// Who has the sockets that hold a publish's ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Holder {
    /// This program, which serves what the fast path leaves.
    #[default]
    Forwarder,
    /// A container engine, to whose own rules the fast path leaves the rest.
    Engine,
}

impl Holder {
    pub(crate) fn is_forwarder(&self) -> bool {
        *self == Self::Forwarder
    }
}

/// Who is served by a publish, and how. What is left out, the instance decides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(default, rename_all = "snake_case")]
pub struct Policy {
    /// Networks that clients may come from; empty for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub allow: Option<Vec<IpNet>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    #[serde(flatten)]
    pub limits: Limits,
}

impl Policy {
    /// Whether all of it can be had by a protocol.
    ///
    /// # Errors
    /// What cannot, in words.
    pub fn suits(&self, protocol: Protocol) -> Result<(), String> {
        match (self.proxy_protocol, protocol) {
            (Some(ProxyProtocol::V1), Protocol::Udp) => {
                Err("version 1 of the PROXY protocol is of TCP alone; take version 2".into())
            }
            (Some(ProxyProtocol::V1 | ProxyProtocol::V2), Protocol::Sctp) => {
                Err("the PROXY protocol is of TCP and UDP alone; leave it out".into())
            }
            _ => Ok(()),
        }
    }
}

/// Whether a backend is told of the client by the PROXY protocol, and how.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum ProxyProtocol {
    #[default]
    Off,
    /// Of TCP alone: text has no datagrams.
    V1,
    V2,
}

impl<'de> Deserialize<'de> for ProxyProtocol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        word::read(deserializer)
    }
}
