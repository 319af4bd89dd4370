//! The documents of an instance, as a client of others would write them down. Nothing here comes from the product, so that
//! a name that changes there is missed here.

use std::net::IpAddr;

use serde::Deserialize;

/// A publish, of `list --json` and the control socket.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Row {
    pub id: u64,
    pub owner: String,
    pub protocol: String,
    pub frontend: Endpoint,
    pub backend: Endpoint,
    /// `ebpf`, `userland` or `engine`.
    pub datapath: String,
    /// `forwarder` or `engine`.
    pub holder: String,
    pub container: Option<String>,
    pub delivery: Option<Delivery>,
    pub xdp: Option<String>,
    pub reason: Option<String>,
    pub reason_code: Option<String>,
    pub allow: Vec<String>,
    pub max_flows: Option<u64>,
    pub rate: Option<u64>,
    pub rate_per_source: Option<u64>,
    pub bandwidth: Option<u64>,
    pub on: Option<String>,
    pub draining: bool,
    pub since: u64,
    pub flows: u64,
    pub packets: u64,
    pub bytes: u64,
    pub packets_per_second: f64,
    pub bytes_per_second: f64,
}

impl Row {
    /// Why the fast path does not serve it; empty if it does.
    pub fn reason(&self) -> &str {
        self.reason.as_deref().unwrap_or_default()
    }

    /// Whether it waits for its port or its container.
    pub fn waits(&self) -> bool {
        self.reason_code.as_deref() == Some("waiting")
    }
}

/// No address: every address of the host.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Endpoint {
    pub address: Option<IpAddr>,
    pub zone: Option<String>,
    pub port: u16,
    pub end_port: u16,
}

/// How packets get to the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Delivery {
    Peer,
    Device,
    Neighbour,
    Stack,
}

/// A live flow, of `flows --json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Flow {
    pub publish: u64,
    pub protocol: String,
    pub client: String,
    pub idle_seconds: u64,
    pub frontend: String,
    pub source: String,
    pub backend: String,
    pub state: String,
    pub packets: [u64; 2],
    pub bytes: [u64; 2],
    pub datapath: String,
}

/// A counter, of `stats --json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Counter {
    pub reason: String,
    pub packets: u64,
}

/// A finding, of `doctor --json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Finding {
    pub check: String,
    pub ok: bool,
    pub found: String,
    pub remedy: Option<String>,
}

/// A ban, of `bans --json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Ban {
    pub network: String,
    pub until: Option<u64>,
}
