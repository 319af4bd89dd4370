//! The part of the daemon that looks after flows: those that an earlier instance left, those that have been
//! silent for too long, those of a publish that ends.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use forwarder_common::{
    flow::{Flow, Phase, delivery, state},
    publish::Publish as Entry,
    tuple::{Address, Tuple},
};
use tracing::{info, warn};

use super::Daemon;
use crate::{
    datapath::maps::{Maps, Walk},
    publish::spec::Spec,
};

/// A walk over all flows, a slice at a time.
#[derive(Default)]
pub(super) struct Sweep {
    walk: Walk,
    /// Publishes that still have flows.
    alive: HashSet<u32>,
}

impl Daemon {
    pub(super) fn remove_flows(&mut self, of: &BTreeSet<u32>) -> Result<()> {
        self.change_flows(|key, flow, maps| {
            if of.contains(&flow.publish) {
                maps.remove_flow(key, flow)?;
            }
            Ok(())
        })
    }

    /// Flows of an earlier instance go on if they are of a publish that is there again, under its number. Not if an IPsec
    /// policy covers that one.
    pub(super) fn adopt(&mut self) {
        let owners: Vec<(u32, Arc<Spec>)> = self
            .publishes
            .iter()
            .filter(|(_, published)| !published.covered)
            .map(|(id, published)| (*id, published.spec.clone()))
            .collect();
        let respects_firewall = self.options.respect_firewall;
        let adopted = self.change_flows(|key, flow, maps| {
            let is_alias = flow.state & state::ALIAS != 0;
            let (told, of) = if is_alias {
                flow.counterpart(key)
            } else {
                (*key, *flow)
            };
            // Nothing would rewrite the answers of one that goes through the stack.
            let lost = flow.back.delivery == delivery::STACK && !respects_firewall;
            let owner = owners
                .iter()
                .find(|(_, spec)| !lost && owns(spec, &told, &of));
            match owner {
                Some((id, _)) if flow.publish == *id => Ok(()),
                Some((id, _)) => maps.set_flow(
                    key,
                    &Flow {
                        publish: *id,
                        ..*flow
                    },
                ),
                None => maps.remove_flow(key, flow),
            }
        });
        if let Err(error) = adopted {
            warn!("{error:#}");
        }
    }

    fn change_flows(
        &mut self,
        mut change: impl FnMut(&Tuple, &Flow, &mut Maps) -> Result<()>,
    ) -> Result<()> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        let mut walk = Walk::default();
        while let Some(slice) = datapath.maps.slice(&mut walk)? {
            for (key, flow) in slice {
                change(&key, &flow, &mut datapath.maps)?;
            }
        }
        Ok(())
    }

    /// Ends flows that have been silent for too long, in one slice of the table; and after the last, publishes that
    /// have drained. Returns whether there is more to do.
    pub(super) fn sweep(&mut self, sweep: &mut Sweep) -> bool {
        match self.sweep_slice(sweep) {
            Ok(true) => return true,
            Ok(false) => self.end_all_drained(&sweep.alive),
            Err(error) => warn!("{error:#}"),
        }
        false
    }

    fn sweep_slice(&mut self, sweep: &mut Sweep) -> Result<bool> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(false);
        };
        let Some(slice) = datapath.maps.slice(&mut sweep.walk)? else {
            return Ok(false);
        };
        let now = monotonic();
        let expired = |key: &Tuple, flow: &Flow| {
            now.saturating_sub(flow.last_seen) / 1_000_000_000
                >= self.timeouts.of(Phase::of(key.protocol, flow.state))
        };
        for (key, flow) in slice {
            if flow.state & state::ALIAS != 0 {
                let (of, _) = flow.counterpart(&key);
                if datapath.maps.flow(&of)?.is_none() {
                    datapath.maps.end_flow(&key, |there| *there == flow)?;
                }
                continue;
            }
            if !expired(&key, &flow) {
                sweep.alive.insert(flow.publish);
                continue;
            }
            // RACE: a packet since the slice was read is heeded; one between this and the removal begins a new flow.
            let ended = datapath.maps.end_flow(&key, |flow| expired(&key, flow))?;
            let Some(flow) = ended else {
                sweep.alive.insert(flow.publish);
                continue;
            };
            if let Some(published) = self.publishes.get_mut(&flow.publish) {
                published.ended.0 += flow.packets[0] + flow.packets[1];
                published.ended.1 += flow.bytes[0] + flow.bytes[1];
            }
        }
        Ok(true)
    }

    fn end_all_drained(&mut self, alive: &HashSet<u32>) {
        let drained: Vec<u32> = self
            .publishes
            .iter()
            .filter(|(id, published)| published.draining() && !alive.contains(id))
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
