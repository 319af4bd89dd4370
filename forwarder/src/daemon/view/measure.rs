//! What the metrics are made of. Live flows are summed by a walk, ended ones are in `USAGE`: a flow that ends between the two
//! reads is missed for once. What was seen of a counter is therefore remembered, and no counter ever falls.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError, atomic::Ordering::Acquire},
};

use anyhow::Result;
use forwarder_common::limits;

use super::{Kernel, Row, Sum, Sums, View};
use crate::{
    cli::tables,
    datapath::maps::REFUSALS,
    metrics::{Carried, Counts, Fill, Measured, OfPublish, Proxied},
    proxy::{Meter, Refusal},
    publish::Id,
};

/// What is remembered between measurements.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// What publishes that are there have been used for at places and by proxies that they have no more. Locked for moments
    /// only: the daemon adds to it.
    left: Mutex<HashMap<Id, Used>>,
    /// The most that was seen, of each publish and of the proxy. Locked for as long as a measurement takes.
    most: Mutex<(HashMap<Id, Used>, Carried)>,
}

/// What a publish was used for.
#[derive(Clone, Debug, Default)]
struct Used {
    carried: Carried,
    refused: Counts,
}

impl Used {
    fn add(&mut self, carried: Carried, refused: impl IntoIterator<Item = (&'static str, u64)>) {
        self.carried += carried;
        for (reason, count) in refused {
            *self.refused.entry(reason).or_default() += count;
        }
    }

    /// Takes the greater one of each counter into both.
    fn raise(&mut self, now: &mut OfPublish) {
        now.carried = now.carried.max(self.carried);
        for (reason, before) in &self.refused {
            let count = now.refused.entry(reason).or_default();
            *count = (*count).max(*before);
        }
        self.carried = now.carried;
        self.refused.clone_from(&now.refused);
    }
}

impl Kept {
    fn left(&self) -> MutexGuard<'_, HashMap<Id, Used>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place is about to be cleared. What flows carried there is in the row already.
    pub(super) fn free(&self, id: Id, kernel: &Kernel, index: u32) {
        let carried = Carried {
            begun: kernel.usage.begun(index),
            ..Carried::default()
        };
        let refused = kernel.refused.of(index).unwrap_or_default();
        self.left().entry(id).or_default().add(carried, refused);
    }

    /// A publish is served in another way.
    pub(super) fn change(&self, before: &Row, after: &Row) {
        let Some(meter) = &before.meter else {
            return;
        };
        if !after.meter.as_ref().is_some_and(|it| it.is(meter)) {
            let (carried, refused) = proxied(meter);
            let mut left = self.left();
            let left = left.entry(before.wanted.id).or_default();
            left.add(carried, refused);
        }
    }

    /// A publish is no more.
    pub(super) fn forget(&self, id: Id) {
        self.left().remove(&id);
    }
}

fn proxied(meter: &Meter) -> (Carried, Counts) {
    let counters = meter.counters();
    let carried = Carried {
        begun: counters.begun,
        packets: counters.packets,
        bytes: counters.bytes,
    };
    let refused = Refusal::ALL.iter().zip(counters.refused);
    let refused = refused.filter(|(_, count)| *count > 0);
    (
        carried,
        refused.map(|(why, count)| (why.name(), count)).collect(),
    )
}

impl View {
    /// Everything, on this thread; one measurement at a time.
    pub(super) fn measured(&self) -> Result<Measured> {
        let mut most = self
            .kept
            .most
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Read first: what moves from a sum that is read later to one that was read before is missed for once, and is
        // never counted twice.
        let [begun, packets, bytes] = self.idle.gone();
        let mut proxy = Proxied {
            carried: Carried {
                begun,
                packets,
                bytes,
            },
            refused: self.idle.refused().map(|(why, it)| (why.name(), it)).into(),
            ..Proxied::default()
        };
        let left = self.kept.left().clone();
        let mut publishes = self.rows(None);
        let mut publishes: Vec<OfPublish> = publishes
            .drain(..)
            .map(|row| {
                let mut used = left.get(&row.wanted.id).cloned().unwrap_or_default();
                let [packets, bytes] = row.ended.each_ref().map(|it| it.load(Acquire));
                let ended = Carried {
                    begun: 0,
                    packets,
                    bytes,
                };
                used.add(ended, []);
                let mut flows = 0;
                if let Some(meter) = &row.meter {
                    let (carried, refused) = proxied(meter);
                    flows = meter.counters().flows;
                    proxy.flows += flows;
                    proxy.carried += carried;
                    used.add(carried, refused);
                }
                of_publish(&row, flows, used)
            })
            .collect();
        let sums = self.sums()?;
        self.add_kernel(&mut publishes, &sums)?;
        let mut seen = HashMap::with_capacity(publishes.len());
        for publish in &mut publishes {
            let mut used = most.0.remove(&publish.id).unwrap_or_default();
            used.raise(publish);
            seen.insert(publish.id, used);
        }
        proxy.carried = proxy.carried.max(most.1);
        *most = (seen, proxy.carried);
        let packets: Counts = match &self.kernel {
            Some(kernel) => {
                let all = kernel.counters.all()?.into_iter();
                all.map(|(reason, count)| (reason.name(), count)).collect()
            }
            None => Counts::new(),
        };
        let mut refused = proxy.refused.clone();
        for name in REFUSALS.iter().map(|reason| reason.name()) {
            refused.extend(packets.get(name).map(|count| (name, *count)));
        }
        let maps = self.kernel.as_ref().map_or(Vec::new(), |_| {
            let places = self.places.len();
            let fill = |map, entries, most| Fill {
                map,
                entries,
                most: u64::from(most),
            };
            vec![
                fill("FLOWS", sums.entries[1], limits::FLOWS),
                fill("HALF_OPEN", sums.entries[0], limits::HALF_OPEN),
                fill("PUBLISHES", places as u64, limits::PUBLISHES - 1),
            ]
        });
        Ok(Measured {
            datapath: if self.kernel.is_some() {
                "ebpf"
            } else {
                "userland"
            },
            publishes,
            packets,
            refused,
            proxy,
            maps,
            durations: self.durations.clone(),
        })
    }

    fn add_kernel(&self, publishes: &mut [OfPublish], sums: &Sums) -> Result<()> {
        let Some(kernel) = &self.kernel else {
            return Ok(());
        };
        let mut refused: HashMap<Id, Counts> = HashMap::new();
        for ((index, reason), count) in kernel.refused.all()? {
            if let Some(id) = self.id(index) {
                *refused.entry(id).or_default().entry(reason).or_default() += count;
            }
        }
        for publish in publishes {
            let sum = self.places.sum(sums, publish.id);
            publish.flows += sum.flows;
            publish.carried += Carried {
                begun: sum.begun,
                packets: sum.packets,
                bytes: sum.bytes,
            };
            for (reason, count) in refused.remove(&publish.id).unwrap_or_default() {
                *publish.refused.entry(reason).or_default() += count;
            }
        }
        Ok(())
    }
}

fn of_publish(row: &Row, flows: u64, used: Used) -> OfPublish {
    let listed = row.listed(Sum::default(), [0.0; 2]);
    OfPublish {
        id: listed.id,
        frontend: tables::endpoint(&listed.frontend),
        owner: listed.owner.to_string(),
        container: listed.container.unwrap_or_default(),
        protocol: listed.protocol.to_string(),
        flows,
        carried: used.carried,
        refused: used.refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_never_falls() {
        let mut used = Used::default();
        let mut seen = |packets, refused: &[(&'static str, u64)]| {
            let mut now = OfPublish {
                carried: Carried {
                    packets,
                    ..Carried::default()
                },
                refused: refused.iter().copied().collect(),
                ..OfPublish::default()
            };
            used.raise(&mut now);
            (now.carried.packets, now.refused)
        };
        seen(10, &[("not_allowed", 4)]);
        // A flow ended between two reads, and a counter was cleared.
        assert_eq!(seen(7, &[]), (10, Counts::from([("not_allowed", 4)])));
        assert_eq!(seen(12, &[("not_allowed", 5)]).0, 12);
    }
}
