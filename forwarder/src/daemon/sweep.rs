//! The part of the daemon that looks after flows: those that an earlier instance left, those that have been
//! silent for too long, those of a publish that ends.

use std::collections::{BTreeSet, HashMap, HashSet};

use anyhow::Result;
use forwarder_common::{
    flow::{Flow, Phase, delivery, state},
    publish::flag,
    share::ALL,
    tuple::{Address, Tuple},
};
use tracing::{debug, info, warn};

use super::{
    Daemon, ban::end_banned, drain::Draining, install::datagrams, reconcile::Loose, slots::Freed,
    view::Sums,
};
use crate::{
    clock,
    datapath::{
        maps::{Count, FlowCount, FlowTables, Maps, Walk},
        resets::{self, Resets},
    },
    publish::{Spec, Wanted},
};

/// A walk over all flows, a slice at a time.
pub(super) struct Sweep {
    walk: Walk,
    /// The places of what drained when it began: flows of others may have come where it had been already.
    drained: BTreeSet<u32>,
    /// What publishes have carried.
    sums: Sums,
    /// Publishes that still have flows, by their places.
    alive: HashSet<u32>,
    /// How many entries each source has, if there is a table.
    count: Option<Count>,
    /// How many flows each publish has.
    flows: Option<FlowCount>,
    /// It is the second walk, which ends what sources have too much.
    trims: bool,
    /// Where sources are counted that have more than a sixteenth of a table that is above three quarters full.
    above: HashMap<u32, Above>,
}

/// A source with more than its share, of which the flows that have been silent for longest end.
#[derive(Default)]
struct Above {
    /// How many are to end.
    surplus: usize,
    /// When those were last seen that the next packet would make again.
    last_seen: Vec<u64>,
    /// Those that were last seen before this end,
    until: u64,
    /// and as many of those that were last seen at it: the clock is the timer tick's, in which there may be many.
    at_until: usize,
}

impl Above {
    /// Chooses which end.
    fn choose(&mut self) {
        let mut last_seen = std::mem::take(&mut self.last_seen);
        let ended = self.surplus.min(last_seen.len());
        let Some(last) = ended.checked_sub(1) else {
            return;
        };
        let (before, until, _) = last_seen.select_nth_unstable(last);
        let earlier = before.iter().filter(|seen| *seen < until).count();
        (self.until, self.at_until) = (*until, ended - earlier);
    }

    /// Whether a flow that was last seen then is among those that end.
    const fn ends(&self, last_seen: u64) -> bool {
        last_seen < self.until || last_seen == self.until && self.at_until > 0
    }
}

impl Daemon {
    /// A walk that begins now.
    pub(super) fn begin_sweep(&self) -> Sweep {
        let flows = self.datapath.as_ref().map(|it| &it.maps.flows);
        let usage = self.datapath.as_ref().map(|it| it.maps.mapped_usage());
        let serving = self.serving.values().map(|it| it.row.index);
        let places = serving.chain(self.draining.keys().copied());
        Sweep {
            walk: Walk::default(),
            drained: self.draining.keys().copied().collect(),
            sums: self.view.begin_sums(),
            alive: HashSet::new(),
            count: flows.map(|flows| flows.shares.begin_count()),
            flows: usage.map(|usage| usage.begin_count(places)),
            trims: false,
            above: flows.map(above_share).unwrap_or_default(),
        }
    }

    /// Ends flows, beside the daemon's other work, and then gives places back. Who is cut off has heard of it on return, if
    /// the other end listens.
    pub(super) fn end_flows_of(&self, loose: Loose) -> impl Future<Output = ()> + Send + use<> {
        let (freeing, walks) = (self.slots.freeing(), self.walks.clone());
        let Loose {
            gone,
            cut,
            stays,
            banned,
        } = loose;
        let is_empty = gone.is_empty() && cut.is_empty() && stays.is_empty() && banned.is_empty();
        let view = self.view.clone();
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
                        let kept_out = end_banned(&mut tables, banned, &view);
                        end_all(&mut tables, &ended).and(cut).and(kept_out)
                    };
                    // One at a time: each would take a thread of its own.
                    let _turn = walks.lock().await;
                    tokio::task::spawn_blocking(walk).await.map_err(Into::into)
                }
                Some(Err(error)) => Ok(Err(error)),
                None => Ok(Ok(())),
            };
            if let Err(error) = walked.and_then(|walked| walked) {
                warn!("flows that were to end are left until they expire: {error:#}");
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
        let serving = self.serving.values().filter(|serving| !serving.covered);
        let draining = self.draining.values().map(|it| &it.row);
        for row in serving.map(|it| &it.row).chain(draining) {
            let spec = &row.wanted.publish.spec;
            let protocol = u32::from(spec.protocol.number());
            let owner = (row.index, row.wanted.clone());
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
            let is_alias = flow.state() & state::ALIAS != 0;
            let (told, of) = if is_alias {
                flow.counterpart(key)
            } else {
                (*key, *flow)
            };
            // Nothing would rewrite the answers of one that goes through the stack; one that was cut off is over.
            let lost = flow.back().delivery == delivery::STACK && !respects_firewall
                || flow.state() & state::CUT != 0;
            let possible = owners.get(&(told.protocol, told.destination_port, told.destination));
            let mut possible = possible.into_iter().flatten();
            let is_its = |(_, wanted): &&(u32, Wanted)| owns(&wanted.publish.spec, &told, &of);
            // First where it was: one that drains may have the same ports and backend.
            let same = possible.clone().find(|(index, _)| *index == flow.publish());
            let owner = same.filter(is_its).or_else(|| possible.find(is_its));
            let owner = owner.filter(|_| !lost);
            match owner {
                Some((index, _)) if flow.publish() == *index => Ok(()),
                Some((index, _)) => {
                    let mut flow = *flow;
                    flow.set_publish(*index);
                    tables.set(key, &flow)
                }
                None => tables.remove(key, flow),
            }
        });
        if let Err(error) = adopted {
            warn!("{error:#}");
        }
    }

    /// Ends flows that have been silent for too long, in one slice of the table; and after the last, publishes that
    /// have drained. Where sources have more than their share, a second walk ends what they have too much. Returns whether
    /// there is more to do.
    pub(super) fn sweep(&mut self, sweep: &mut Sweep) -> bool {
        let more = if sweep.trims {
            self.trim_slice(sweep)
        } else {
            self.sweep_slice(sweep)
        };
        match more {
            Ok(true) => return true,
            Ok(false) => {}
            Err(error) => {
                warn!("{error:#}");
                return false;
            }
        }
        if sweep.trims {
            return false;
        }
        if let (Some(datapath), Some(count)) = (&self.datapath, &sweep.count) {
            let flows = &datapath.maps.flows;
            flows.shares.correct(count);
            if let Some(count) = &sweep.flows {
                datapath.maps.mapped_usage().correct(count);
            }
            // Others may have ended meanwhile.
            let mut now = above_share(flows);
            sweep.above.retain(|share, above| {
                let still = now.remove(share);
                above.surplus = still.map_or(0, |it| it.surplus);
                above.surplus > 0
            });
        }
        self.renew_left();
        self.view.measure_rates(std::mem::take(&mut sweep.sums));
        self.end_all_drained(sweep);
        self.record_drains();
        sweep.above.values_mut().for_each(Above::choose);
        (sweep.walk, sweep.trims) = (Walk::default(), true);
        !sweep.above.is_empty()
    }

    /// Has conversations of datagrams stay in user space that began there.
    fn renew_left(&mut self) {
        let Some(datapath) = self.datapath.as_mut() else {
            return;
        };
        let left = &mut datapath.maps.left;
        if !left.has_any() {
            return;
        }
        let serving = self.serving.values().map(|it| &it.row);
        let draining = self.draining.values().map(|it| &it.row);
        let goes_on = serving.chain(draining).flat_map(|row| datagrams(row));
        if let Err(error) = left.renew(&goes_on.collect()) {
            warn!("{error:#}");
        }
    }

    /// Ends flows of sources that have too many, in one slice of the table.
    fn trim_slice(&mut self, sweep: &mut Sweep) -> Result<bool> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(false);
        };
        let maps = &mut datapath.maps;
        let Some(slice) = maps.flows.slice(&mut sweep.walk)? else {
            let ends = sweep.above.len();
            debug!("{ends} sources had more than their share of the flow table");
            return Ok(false);
        };
        for (key, flow) in slice {
            let share = maps.flows.shares.index(flow.source(&key));
            let Some(above) = sweep.above.get_mut(&share) else {
                continue;
            };
            let ends = |flow: &Flow| above.ends(flow.last_seen());
            if ends(&flow)
                && is_made_again(maps, &key, &flow)
                && let Some(flow) = maps.flows.end(&key, ends)?
                && flow.last_seen() == above.until
            {
                above.at_until -= 1;
            }
        }
        Ok(true)
    }

    fn sweep_slice(&mut self, sweep: &mut Sweep) -> Result<bool> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(false);
        };
        let is_kept = sweep.walk.is_kept();
        let Some(slice) = datapath.maps.flows.slice(&mut sweep.walk)? else {
            return Ok(false);
        };
        let now = clock::monotonic();
        let expired = |key: &Tuple, flow: &Flow| {
            now.saturating_sub(flow.last_seen()) / 1_000_000_000
                >= self.timeouts.of(Phase::of(key.protocol, flow.state()))
        };
        for (key, flow) in slice {
            sweep.sums.add(&flow);
            if is_kept && let Some(count) = &mut sweep.count {
                let share = datapath.maps.flows.shares.index(flow.source(&key));
                count.saw(share);
                if let Some(count) = &mut sweep.flows {
                    count.saw(&flow);
                }
                if let Some(above) = sweep.above.get_mut(&share)
                    && is_made_again(&datapath.maps, &key, &flow)
                    && !expired(&key, &flow)
                {
                    above.last_seen.push(flow.last_seen());
                }
            }
            if flow.state() & state::ALIAS != 0 {
                if let Some(count) = &mut sweep.count {
                    count.saw_alias();
                }
                let (of, _) = flow.counterpart(&key);
                if datapath.maps.flows.get(&of)?.is_none() {
                    datapath.maps.flows.end(&key, |there| *there == flow)?;
                }
                continue;
            }
            if !expired(&key, &flow) {
                // One that waits for stray segments alone holds up no drain.
                let phase = Phase::of(key.protocol, flow.state());
                if !matches!(phase, Phase::TcpTimeWait | Phase::TcpClose) {
                    sweep.alive.insert(flow.publish());
                }
                continue;
            }
            // RACE: a packet since the slice was read is heeded; one between this and the removal begins a new flow.
            let ended = datapath.maps.flows.end(&key, |flow| expired(&key, flow))?;
            if ended.is_none() {
                sweep.alive.insert(flow.publish());
            }
        }
        Ok(true)
    }

    /// What has drained: neither path has a flow of it.
    fn end_all_drained(&mut self, sweep: &Sweep) {
        let Sweep { drained, alive, .. } = sweep;
        let is_over = |(place, draining): &(&u32, &Draining)| {
            let meter = draining.row.meter.as_ref().filter(|_| draining.is_shown);
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

/// The sources that have more than a sixteenth of a table that is above three quarters full, by where they are counted.
fn above_share(flows: &FlowTables) -> HashMap<u32, Above> {
    let most = u64::from(flows.most().unwrap_or(u32::MAX));
    if flows.shares.held(ALL) <= most / 4 * 3 {
        return HashMap::new();
    }
    let surplus = (0..ALL).filter_map(|index| {
        let surplus = flows.shares.held(index).checked_sub(most / 16)? as usize;
        let above = Above {
            surplus,
            ..Above::default()
        };
        (surplus > 0).then_some((index, above))
    });
    surplus.collect()
}

/// Whether the client's next packet makes the flow again as it was, and without a word to either side: its backend sees the
/// client's own address and port, and the publish takes new flows.
fn is_made_again(maps: &Maps, key: &Tuple, flow: &Flow) -> bool {
    const BITS: u32 = state::KEPT | state::ALIAS | state::CUT;
    const IN_THE_WAY: u16 = flag::STACK | flag::STEERED | flag::DRAINING;
    let has_its_own = flow.client == key.source && flow.ports().0 == key.source_port;
    let takes_new = maps
        .flags(flow.publish())
        .is_some_and(|flags| flags & IN_THE_WAY == 0);
    has_its_own && flow.state() & BITS == state::KEPT && takes_new
}

/// Cuts off every flow of these places, and tells both of its ends.
fn cut_all(tables: &mut FlowTables, places: &BTreeSet<u32>) -> Result<()> {
    if places.is_empty() {
        return Ok(());
    }
    let resets = Resets::open()?;
    tables.change_all(|key, flow, tables| {
        // An alias goes with its flow.
        if flow.state() & state::ALIAS != 0 || !places.contains(&flow.publish()) {
            return Ok(());
        }
        if !resets::is_open(key, flow) {
            tables.remove(key, flow)?;
        } else if let Some(flow) = tables.cut(key, |there| places.contains(&there.publish()))?
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
    tables.change_all(|key, flow, tables| match places.contains(&flow.publish()) {
        true => tables.remove(key, flow),
        false => Ok(()),
    })
}

/// Whether a flow is one that this publish would make.
fn owns(spec: &Spec, key: &Tuple, flow: &Flow) -> bool {
    let port = u16::from_be(flow.ports().1);
    u32::from(spec.protocol.number()) == key.protocol
        && spec.claims(flow.frontend.into(), port)
        && Address::from(spec.backend) == key.destination
        && spec.backend_port(port).to_be() == key.destination_port
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_end_and_of_the_last_tick_no_more_than_are_too_many() {
        let mut above = Above {
            surplus: 5,
            last_seen: vec![8, 4, 8, 8, 4, 8, 4, 12, 8],
            ..Above::default()
        };
        above.choose();
        assert!(above.ends(4) && above.ends(8) && !above.ends(12));
        assert_eq!(above.at_until, 2);
        above.at_until = 0;
        assert!(above.ends(4) && !above.ends(8));
    }

    #[test]
    fn nothing_ends_where_no_flow_would_be_made_again() {
        let mut above = Above {
            surplus: 5,
            ..Above::default()
        };
        above.choose();
        assert!(!above.ends(0));
    }
}
