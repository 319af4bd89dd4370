//! What the daemon says of itself: the documents behind `list`, `flows` and `stats`, and the line for each
//! publish.

use std::{collections::HashMap, net::IpAddr};

use anyhow::Result;
use forwarder_common::{
    flow::{Flow, Phase, delivery},
    publish::{Publish as Entry, flag},
    reason::Reason,
    tuple::{Address, TCP, Tuple},
};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Daemon, sweep::monotonic};
use crate::{datapath::Datapath, proxy::Proxy, publish::spec::Protocol};

/// A publish as `list` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    pub id: u32,
    pub protocol: Protocol,
    pub frontend: Endpoint,
    pub backend: Endpoint,
    /// `ebpf` or `userland`.
    pub datapath: String,
    pub delivery: Option<String>,
    pub reason: Option<String>,
    pub allow: Vec<IpNet>,
    pub flows: u64,
    pub packets: u64,
    pub bytes: u64,
}

/// An address and its ports. No address: every address of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: Option<IpAddr>,
    pub port: u16,
    pub end_port: u16,
}

/// A flow as `flows` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ListedFlow {
    pub publish: u32,
    pub protocol: String,
    pub client: String,
    pub frontend: String,
    pub source: String,
    pub backend: String,
    pub state: String,
    pub idle_seconds: u64,
    pub packets: [u64; 2],
    pub bytes: [u64; 2],
}

/// A packet counter as `stats` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Counter {
    pub reason: String,
    pub packets: u64,
}

impl Daemon {
    /// The line that says how a publish is served.
    pub(super) fn describe(&self, id: u32) -> String {
        let published = &self.publishes[&id];
        let spec = &published.spec;
        let how = match (&published.reason, &published.entry) {
            (None, Some(entry)) => format!(
                "ebpf, {}{}",
                delivery_name(delivery_of(entry)).unwrap_or("unresolved"),
                self.xdp_towards(entry)
            ),
            (Some(reason), _) => format!("userland: {reason}"),
            (None, None) => "userland".into(),
        };
        let all_to_one = if spec.ports.first != spec.ports.last && spec.backend_is_single() {
            format!(
                ", all {} ports to port {}",
                spec.ports.count(),
                spec.backend_ports.first
            )
        } else {
            String::new()
        };
        format!("{id}: {spec} ({how}{all_to_one})")
    }

    /// For a backend on another machine, whether XDP takes part.
    fn xdp_towards(&self, entry: &Entry) -> String {
        let remote = entry.flags & flag::REMOTE != 0;
        let mut devices = self.datapath.iter().flat_map(Datapath::xdp);
        let mode = devices.find(|(ifindex, _)| remote && *ifindex == entry.hop.ifindex);
        mode.map(|(_, mode)| format!(", {} XDP", mode.name()))
            .unwrap_or_default()
    }

    pub(super) fn list(&self) -> Result<Vec<Listed>> {
        let mut sums: HashMap<u32, (u64, u64, u64)> = HashMap::new();
        if let Some(datapath) = &self.datapath {
            for flow in datapath.maps.flows() {
                let (_, flow) = flow?;
                let sum = sums.entry(flow.publish).or_default();
                sum.0 += 1;
                sum.1 += flow.packets[0] + flow.packets[1];
                sum.2 += flow.bytes[0] + flow.bytes[1];
            }
        }
        let listed = self.publishes.iter().map(|(&id, published)| {
            let spec = &published.spec;
            let (flows, packets, bytes) = sums.get(&id).copied().unwrap_or_default();
            let proxy = published
                .proxy
                .as_ref()
                .map(Proxy::counters)
                .unwrap_or_default();
            let hop = published
                .entry
                .filter(|_| published.reason.is_none())
                .map(|entry| delivery_of(&entry));
            Listed {
                id,
                protocol: spec.protocol,
                frontend: Endpoint {
                    address: spec.address,
                    port: spec.ports.first,
                    end_port: spec.ports.last,
                },
                backend: Endpoint {
                    address: Some(spec.backend),
                    port: spec.backend_ports.first,
                    end_port: spec.backend_ports.last,
                },
                datapath: if hop.is_some() { "ebpf" } else { "userland" }.into(),
                delivery: hop.and_then(delivery_name).map(Into::into),
                reason: published.reason.clone(),
                allow: published.allow.clone(),
                flows: flows + proxy.flows,
                packets: packets + published.ended.0 + proxy.packets,
                bytes: bytes + published.ended.1 + proxy.bytes,
            }
        });
        Ok(listed.collect())
    }

    pub(super) fn flows(&self) -> Result<Vec<ListedFlow>> {
        let Some(datapath) = &self.datapath else {
            return Ok(Vec::new());
        };
        let now = monotonic();
        let mut listed = datapath
            .maps
            .flows()
            .map(|flow| flow.map(|(key, flow)| list_flow(&key, &flow, now)))
            .collect::<Result<Vec<ListedFlow>>>()?;
        listed.sort_by(|a, b| (a.publish, &a.client).cmp(&(b.publish, &b.client)));
        Ok(listed)
    }

    pub(super) fn stats(&self) -> Result<Vec<Counter>> {
        let counters = match &self.datapath {
            Some(datapath) => datapath.maps.stats()?,
            None => Vec::new(),
        };
        let counter = |(reason, packets): (Reason, u64)| Counter {
            reason: reason.name().into(),
            packets,
        };
        Ok(counters.into_iter().map(counter).collect())
    }
}

fn list_flow(key: &Tuple, flow: &Flow, now: u64) -> ListedFlow {
    let show = |address: Address, port: u16| {
        std::net::SocketAddr::new(address.into(), u16::from_be(port)).to_string()
    };
    let tcp = key.protocol == u32::from(TCP);
    let state = match Phase::of(key.protocol, flow.state) {
        Phase::Udp => "unreplied".into(),
        Phase::UdpStream => "replied".into(),
        phase => phase.name().trim_start_matches("tcp-").replace('-', "_"),
    };
    ListedFlow {
        publish: flow.publish,
        protocol: if tcp { "tcp" } else { "udp" }.into(),
        client: show(flow.client, flow.client_port),
        frontend: show(flow.frontend, flow.frontend_port),
        source: show(key.source, key.source_port),
        backend: show(key.destination, key.destination_port),
        state,
        idle_seconds: now.saturating_sub(flow.last_seen) / 1_000_000_000,
        packets: flow.packets,
        bytes: flow.bytes,
    }
}

/// How packets of other machines get to the backend, one of [`delivery`].
pub(super) const fn delivery_of(entry: &Entry) -> u32 {
    if entry.flags & flag::STACK != 0 {
        delivery::STACK
    } else {
        entry.hop.delivery
    }
}

/// The name of a delivery in `list` and in traces; `None` for none.
pub fn delivery_name(number: u32) -> Option<&'static str> {
    match number {
        delivery::PEER => Some("peer"),
        delivery::DEVICE => Some("device"),
        delivery::NEIGHBOUR => Some("neighbour"),
        delivery::STACK => Some("stack"),
        _ => None,
    }
}
