//! What publishes have carried, and what they carry a second. Each sweep of the flow table measures the rates, so that nobody
//! walks it for them alone; nor does anybody else walk a large one.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::Result;
use forwarder_common::flow::{Flow, state};

use super::{Kernel, View};
use crate::publish::Id;

/// Where the last sweep has seen more entries than these, what it has counted is good enough: a walk would take longer than anybody
/// likes to wait for an answer.
const MANY: u64 = 1 << 16;

/// What the flows of a publish have carried, live and ended ones, also those to backends that it had before.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum {
    /// Live ones.
    pub flows: u64,
    pub begun: u64,
    pub packets: u64,
    pub bytes: u64,
}

impl Sum {
    /// Without what ended flows have carried and begun, which is counted elsewhere now.
    fn without(&mut self, begun: u64, packets: u64, bytes: u64) {
        self.begun = self.begun.saturating_sub(begun);
        self.packets = self.packets.saturating_sub(packets);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// Of publishes that have carried something. Ended flows are read first: one that ends while the live ones are added is missed
/// for once, and none is counted twice.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Sums {
    ids: HashMap<u32, Id>,
    sums: HashMap<Id, Sum>,
    /// Half-open ones and proven ones.
    pub(super) entries: [u64; 2],
}

impl Sums {
    /// A live flow.
    pub(in super::super) fn add(&mut self, flow: &Flow) {
        self.entries[usize::from(flow.state() & state::KEPT != 0)] += 1;
        if flow.state() & state::CUT != 0 {
            return; // it is over, and stays for its ends to hear that
        }
        let Some(id) = self.ids.get(&flow.publish()) else {
            return;
        };
        let sum = self.sums.entry(*id).or_default();
        sum.flows += 1;
        sum.packets += flow.packets().iter().sum::<u64>();
        sum.bytes += flow.bytes().iter().sum::<u64>();
    }

    pub(super) fn of(&self, id: Id) -> Sum {
        self.sums.get(&id).copied().unwrap_or_default()
    }
}

impl View {
    /// What ended flows have carried.
    pub(in super::super) fn begin_sums(&self) -> Sums {
        let ids = self.ids.read().unwrap_or_else(PoisonError::into_inner);
        let ids = ids.clone();
        let mut sums: HashMap<Id, Sum> = HashMap::new();
        if let Some(kernel) = &self.kernel {
            for (index, id) in &ids {
                let begun = kernel.usage.begun(*index);
                let (packets, bytes) = kernel.usage.carried(*index);
                if begun > 0 || packets > 0 {
                    let sum = sums.entry(*id).or_default();
                    sum.begun += begun;
                    sum.packets += packets;
                    sum.bytes += bytes;
                }
            }
        }
        Sums {
            ids,
            sums,
            ..Sums::default()
        }
    }

    /// What publishes have carried until now; where there are many flows, until the last sweep.
    pub(super) fn sums(&self) -> Result<Arc<Sums>> {
        if let Some(swept) = &*self.swept()
            && swept.entries.iter().sum::<u64>() > MANY
        {
            return Ok(swept.clone());
        }
        let mut sums = self.begin_sums();
        if let Some(kernel) = &self.kernel {
            let flows = kernel.flows.lock().unwrap_or_else(PoisonError::into_inner);
            for flow in flows.all() {
                let (_, flow) = flow?;
                sums.add(&flow);
            }
        }
        Ok(sums.into())
    }

    /// What the last sweep has counted.
    fn swept(&self) -> MutexGuard<'_, Option<Arc<Sums>>> {
        self.swept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place is about to be cleared, and what was carried there is counted elsewhere.
    pub(super) fn forget_swept(&self, id: Id, kernel: &Kernel, index: u32) {
        if let Some(swept) = &mut *self.swept()
            && let Some(sum) = Arc::make_mut(swept).sums.get_mut(&id)
        {
            let (packets, bytes) = kernel.usage.carried(index);
            sum.without(kernel.usage.begun(index), packets, bytes);
        }
    }

    /// A sweep has added all live flows.
    pub(in super::super) fn measure_rates(&self, sums: Sums) {
        let sums = Arc::new(sums);
        *self.swept() = Some(sums.clone());
        let rows = self.rows(None);
        let carried = rows.iter().map(|row| {
            let id = row.wanted.id;
            (id, row.carried(sums.of(id)))
        });
        self.rates.measure(Instant::now(), carried);
    }
}

/// Packets and bytes a second of publishes that have carried something.
#[derive(Debug, Default)]
pub(super) struct Rates(Mutex<Measured>);

#[derive(Debug, Default)]
struct Measured {
    at: Option<Instant>,
    of: HashMap<Id, Rate>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    /// The most packets and bytes that were seen.
    carried: [u64; 2],
    /// Of each, a second.
    rate: [f64; 2],
}

impl Rates {
    fn lock(&self) -> MutexGuard<'_, Measured> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn of(&self, id: Id) -> [f64; 2] {
        self.lock().of.get(&id).map_or([0.0; 2], |it| it.rate)
    }

    pub(super) fn forget(&self, id: Id) {
        self.lock().of.remove(&id);
    }

    /// What publishes have carried until now.
    fn measure(&self, at: Instant, carried: impl Iterator<Item = (Id, [u64; 2])>) {
        let mut measured = self.lock();
        let seconds = measured
            .at
            .map_or(0.0, |before| (at - before).as_secs_f64());
        measured.at = Some(at);
        for (id, carried) in carried.filter(|(_, carried)| carried[0] > 0) {
            let before = measured.of.entry(id).or_default();
            let since = |direction: usize| {
                let more = carried[direction].saturating_sub(before.carried[direction]);
                if seconds > 0.0 {
                    more as f64 / seconds
                } else {
                    0.0
                }
            };
            *before = Rate {
                rate: [since(0), since(1)],
                carried: std::array::from_fn(|it| carried[it].max(before.carried[it])),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_rate_is_of_the_time_since_the_last_sweep() {
        let rates = Rates::default();
        let begin = Instant::now();
        let measure = |seconds: f64, carried: [u64; 2]| {
            let at = begin + Duration::from_secs_f64(seconds);
            rates.measure(at, [(7, carried)].into_iter());
            rates.of(7)
        };
        // What an earlier instance counted is no rate.
        assert_eq!(measure(0.0, [1000, 50_000]), [0.0, 0.0]);
        assert_eq!(measure(2.0, [1010, 58_000]), [5.0, 4000.0]);
        // A flow that ended meanwhile was missed, and is there again.
        assert_eq!(measure(4.0, [1005, 57_000]), [0.0, 0.0]);
        assert_eq!(measure(6.0, [1030, 60_000]), [10.0, 1000.0]);
        assert_eq!(measure(8.0, [1030, 60_000]), [0.0, 0.0]);
        assert_eq!(rates.of(8), [0.0, 0.0]);
        rates.forget(7);
        assert_eq!(rates.of(7), [0.0, 0.0]);
    }
}
