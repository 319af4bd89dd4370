//! What publishes have carried, and what they carry a second. Each sweep of the flow table measures the rates, so that nobody
//! walks it for them alone; nor does anybody else walk a large one.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::Result;

use super::{
    View,
    places::{Sum, Sums},
};
use crate::publish::Id;

/// Where the last sweep has seen more entries than these, what it has counted is good enough: a walk would take longer than anybody
/// likes to wait for an answer.
const MANY: u64 = 1 << 16;

impl View {
    /// What ended flows have carried.
    pub(in super::super) fn begin_sums(&self) -> Sums {
        self.places.begin_sums(|place| {
            let usage = self.kernel.as_ref().map(|it| &it.usage);
            usage.map_or_else(Sum::default, |usage| {
                let (packets, bytes) = usage.carried(place);
                Sum {
                    flows: 0,
                    begun: usage.begun(place),
                    packets,
                    bytes,
                }
            })
        })
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

    /// A sweep has added all live flows.
    pub(in super::super) fn measure_rates(&self, sums: Sums) {
        let rows = self.rows(None);
        let carried = rows.iter().map(|row| {
            let carried = self.carried(row, &sums);
            (row.wanted.id, [carried.packets, carried.bytes])
        });
        self.rates.measure(Instant::now(), carried);
        // Last, so that no counts are shown with the rates before them.
        *self.swept() = Some(sums.into());
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
