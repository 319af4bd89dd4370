//! The part of the daemon that looks after flows: those that an earlier instance left, those that have been
//! silent for too long, those of a publish that ends.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Duration,
};

use anyhow::Result;
use forwarder_common::{
    flow::{Flow, Phase, delivery, state},
    tuple::{Address, Tuple},
};
use tracing::{debug, info, warn};

use super::{Daemon, drain::Draining, reconcile::Loose, slots::Freed};
use crate::{
    datapath::{
        maps::{FlowTables, Walk},
        resets::{self, Resets},
    },
    publish::{Spec, Wanted},
};

/// A walk over all flows, a slice at a time.
pub(super) struct Sweep {
    walk: Walk,
    /// The places of what drained when it began: flows of others may have come where it had been already.
    drained: BTreeSet<u32>,
    /// Publishes that still have flows, by their places.
    alive: HashSet<u32>,
}

impl Daemon {
    /// A walk that begins now.
    pub(super) fn begin_sweep(&self) -> Sweep {
        Sweep {
            walk: Walk::default(),
            drained: self.draining.keys().copied().collect(),
            alive: HashSet::new(),
        }
    }

    /// Ends flows, beside the daemon's other work, and then gives places back. Who is cut off has heard of it on return, if
    /// the other end listens.
    pub(super) fn end_flows_of(&self, loose: Loose) -> impl Future<Output = ()> + Send + use<> {
        let freeing = self.slots.freeing();
        let Loose { gone, cut, stays } = loose;
        let is_empty = gone.is_empty() && cut.is_empty() && stays.is_empty();
        let tables = match &self.datapath {
            Some(datapath) if !is_empty => Some(datapath.maps.flows.try_clone()),
            _ => None,
        };
        async move {
            let ended: BTreeSet<u32> = gone.union(&stays).copied().collect();
            let told = cut.clone();
            let walked = match tables {
                Some(Ok(mut tables)) => {
                    let walk = move || {
                        let cut = cut_all(&mut tables, &told);
                        end_all(&mut tables, &ended).and(cut)
                    };
                    tokio::task::spawn_blocking(walk).await.map_err(Into::into)
                }
                Some(Err(error)) => Ok(Err(error)),
                None => Ok(Ok(())),
            };
            if let Err(error) = walked.and_then(|walked| walked) {
                warn!("flows of what was unpublished are left until they expire: {error:#}");
            }
            // The daemon may have ended.
            let _ = freeing.send(Freed::Places(gone.into_iter().collect()));
            if !cut.is_empty() {
                tokio::spawn(async move {
                    tokio::time::sleep(resets::PATIENCE).await;
                    let _ = freeing.send(Freed::Cut(cut.into_iter().collect()));
                });
            }
        }
    }

    /// Ends those that were cut off, or gives places back.
    pub(super) fn freed(&mut self, freed: Freed) {
        let places = match freed {
            Freed::Places(places) => return self.give_back(&places),
            Freed::Cut(places) => places,
        };
        let gone = places
            .into_iter()
            .filter_map(|place| self.end_draining(place));
        let loose = Loose {
            gone: gone.collect(),
            ..Loose::default()
        };
        drop(tokio::spawn(self.end_flows_of(loose)));
    }

    /// Flows of an earlier instance go on if they are of a publish that is there again, under its place. Not if an IPsec
    /// policy covers that one.
    pub(super) fn adopt(&mut self) {
        let mut owners: HashMap<(u32, u16, Address), Vec<(u32, Wanted)>> = HashMap::new();
        for serving in self.serving.values().filter(|serving| !serving.covered) {
            let spec = &serving.row.wanted.publish.spec;
            let protocol = u32::from(spec.protocol.number());
            let owner = (serving.row.index, serving.row.wanted.clone());
            for port in spec.backend_ports.first..=spec.backend_ports.last {
                let key = (protocol, port.to_be(), spec.backend.into());
                owners.entry(key).or_default().push(owner.clone());
            }
        }
        let respects_firewall = self.config.respect_firewall;
        let Some(datapath) = &mut self.datapath else {
            return;
        };
        let adopted = datapath.maps.flows.change_all(|key, flow, tables| {
            let is_alias = flow.state & state::ALIAS != 0;
            let (told, of) = if is_alias {
                flow.counterpart(key)
            } else {
                (*key, *flow)
            };
            // Nothing would rewrite the answers of one that goes through the stack; one that was cut off is over.
            let lost = flow.back.delivery == delivery::STACK && !respects_firewall
                || flow.state & state::CUT != 0;
            let possible = owners.get(&(told.protocol, told.destination_port, told.destination));
            let mut possible = possible.into_iter().flatten();
            let owner =
                possible.find(|(_, wanted)| !lost && owns(&wanted.publish.spec, &told, &of));
            match owner {
                Some((index, _)) if flow.publish == *index => Ok(()),
                Some((index, _)) => tables.set(
                    key,
                    &Flow {
                        publish: *index,
                        ..*flow
                    },
                ),
                None => tables.remove(key, flow),
            }
        });
        if let Err(error) = adopted {
            warn!("{error:#}");
        }
    }

    /// Ends flows that have been silent for too long, in one slice of the table; and after the last, publishes that
    /// have drained. Returns whether there is more to do.
    pub(super) fn sweep(&mut self, sweep: &mut Sweep) -> bool {
        match self.sweep_slice(sweep) {
            Ok(true) => return true,
            Ok(false) => self.end_all_drained(sweep),
            Err(error) => warn!("{error:#}"),
        }
        false
    }

    fn sweep_slice(&mut self, sweep: &mut Sweep) -> Result<bool> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(false);
        };
        let Some(slice) = datapath.maps.flows.slice(&mut sweep.walk)? else {
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
                if datapath.maps.flows.get(&of)?.is_none() {
                    datapath.maps.flows.end(&key, |there| *there == flow)?;
                }
                continue;
            }
            if !expired(&key, &flow) {
                // One that waits for stray segments alone holds up no drain.
                let phase = Phase::of(key.protocol, flow.state);
                if !matches!(phase, Phase::TcpTimeWait | Phase::TcpClose) {
                    sweep.alive.insert(flow.publish);
                }
                continue;
            }
            // RACE: a packet since the slice was read is heeded; one between this and the removal begins a new flow.
            let ended = datapath.maps.flows.end(&key, |flow| expired(&key, flow))?;
            if ended.is_none() {
                sweep.alive.insert(flow.publish);
            }
        }
        Ok(true)
    }

    /// What has drained: neither path has a flow of it.
    fn end_all_drained(&mut self, sweep: &Sweep) {
        let Sweep { drained, alive, .. } = sweep;
        let is_over = |(place, draining): &(&u32, &Draining)| {
            let meter = draining.row.meter.as_ref().filter(|_| draining.is_shown());
            let proxied = meter.map_or(0, |meter| meter.counters().flows);
            drained.contains(place) && !alive.contains(place) && proxied == 0 && !draining.is_cut
        };
        let over = self.draining.iter().filter(is_over);
        let over: Vec<u32> = over.map(|(place, _)| *place).collect();
        for place in over {
            if let Some(draining) = self.draining.get(&place) {
                info!("publish {} has drained", draining.row.wanted.id);
            }
            let loose = Loose {
                gone: self.end_draining(place).into_iter().collect(),
                ..Loose::default()
            };
            drop(tokio::spawn(self.end_flows_of(loose)));
        }
    }
}

/// Cuts off every flow of these places, and tells both of its ends.
fn cut_all(tables: &mut FlowTables, places: &BTreeSet<u32>) -> Result<()> {
    if places.is_empty() {
        return Ok(());
    }
    let resets = Resets::open()?;
    tables.change_all(|key, flow, tables| {
        // An alias goes with its flow.
        if flow.state & state::ALIAS != 0 || !places.contains(&flow.publish) {
            return Ok(());
        }
        if !resets::is_open(key, flow) {
            tables.remove(key, flow)?;
        } else if let Some(flow) = tables.cut(key, |there| places.contains(&there.publish))?
            && let Err(error) = resets.send(key, &flow)
        {
            debug!("{error:#}");
        }
        Ok(())
    })
}

/// Ends every flow of these places.
fn end_all(tables: &mut FlowTables, places: &BTreeSet<u32>) -> Result<()> {
    if places.is_empty() {
        return Ok(());
    }
    tables.change_all(|key, flow, tables| match places.contains(&flow.publish) {
        true => tables.remove(key, flow),
        false => Ok(()),
    })
}

/// Whether a flow is one that this publish would make.
fn owns(spec: &Spec, key: &Tuple, flow: &Flow) -> bool {
    let port = u16::from_be(flow.frontend_port);
    u32::from(spec.protocol.number()) == key.protocol
        && spec.claims(flow.frontend.into(), port)
        && Address::from(spec.backend) == key.destination
        && spec.backend_port(port).to_be() == key.destination_port
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
