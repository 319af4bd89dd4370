//! The part of the daemon that looks after flows: those that an earlier instance left, those that have been
//! silent for too long, those of a publish that ends.

use std::{collections::HashMap, time::Duration};

use anyhow::Result;
use forwarder_common::{
    flow::Flow,
    publish::Publish as Entry,
    tuple::{Address, Tuple},
};
use tracing::{info, warn};

use super::Daemon;
use crate::spec::Spec;

impl Daemon {
    pub(super) fn remove_flows(&mut self, id: u32) -> Result<()> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        for (key, flow) in datapath.maps.flows()? {
            if flow.publish == id {
                datapath.maps.remove_flow(&key, &flow)?;
            }
        }
        Ok(())
    }

    /// Flows of an earlier instance go on if they are of a publish that is there again, under its number.
    pub(super) fn adopt(&mut self) {
        let Some(datapath) = &mut self.datapath else {
            return;
        };
        let Ok(flows) = datapath.maps.flows() else {
            return;
        };
        for (key, mut flow) in flows {
            let owner = self
                .publishes
                .iter()
                .find(|(_, published)| owns(&published.spec, &key, &flow));
            let result = match owner {
                Some((id, _)) if flow.publish == *id => Ok(()),
                Some((id, _)) => {
                    flow.publish = *id;
                    datapath.maps.set_flow(&key, &flow)
                }
                None => datapath.maps.remove_flow(&key, &flow),
            };
            if let Err(error) = result {
                warn!("{error:#}");
            }
        }
    }

    /// Ends flows that have been silent for too long, and publishes that have drained.
    pub(super) fn sweep(&mut self) {
        let Some(datapath) = &mut self.datapath else {
            return;
        };
        let flows = match datapath.maps.flows() {
            Ok(flows) => flows,
            Err(error) => return warn!("{error:#}"),
        };
        let now = monotonic();
        let mut alive: HashMap<u32, u64> = HashMap::new();
        for (key, flow) in flows {
            let idle = now.saturating_sub(flow.last_seen) / 1_000_000_000;
            if idle < self.timeouts.of(key.protocol, flow.state) {
                *alive.entry(flow.publish).or_default() += 1;
                continue;
            }
            if let Err(error) = datapath.maps.remove_flow(&key, &flow) {
                warn!("{error:#}");
            }
            if let Some(published) = self.publishes.get_mut(&flow.publish) {
                published.ended.0 += flow.packets[0] + flow.packets[1];
                published.ended.1 += flow.bytes[0] + flow.bytes[1];
            }
        }
        let drained: Vec<u32> = self
            .publishes
            .iter()
            .filter(|(id, published)| published.draining() && !alive.contains_key(id))
            .map(|(id, _)| *id)
            .collect();
        for id in drained {
            if let Err(error) = self.end_drained(id) {
                warn!("{error:#}");
            }
        }
    }

    pub(super) fn end_drained(&mut self, id: u32) -> Result<()> {
        self.set_frontends(id, false)?;
        if let Some(datapath) = &mut self.datapath {
            datapath.maps.set_publish(id, &Entry::default())?;
        }
        self.publishes.remove(&id);
        info!("publish {id} has drained");
        Ok(())
    }
}

/// Whether a flow is one that this publish would make.
fn owns(spec: &Spec, key: &Tuple, flow: &Flow) -> bool {
    let port = u16::from_be(flow.frontend_port);
    u32::from(spec.protocol.number()) == key.protocol
        && (spec.ports.first..=spec.ports.last).contains(&port)
        && Address::from(spec.backend) == key.destination
        && spec.backend_port(port).to_be() == key.destination_port
        && spec.address.is_none_or(|address| {
            address.is_unspecified() || Address::from(address) == flow.frontend
        })
}

/// CLOCK_MONOTONIC in nanoseconds, as `bpf_ktime_get_ns` gives it.
pub(super) fn monotonic() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(|time| {
            Duration::from(time)
                .as_nanos()
                .try_into()
                .unwrap_or(u64::MAX)
        })
        .unwrap_or(0)
}
