//! Whose the places in `PUBLISHES` are, and what their flows have carried.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{PoisonError, RwLock},
};

use forwarder_common::flow::{Flow, state};

use crate::publish::Id;

/// That a place is a publish's, until it is freed. The publish may get the same place again: that is another tenancy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Tenancy {
    id: Id,
    number: u64,
}

#[derive(Debug, Default)]
struct Tenancies {
    of: HashMap<u32, Tenancy>,
    /// How many have begun.
    begun: u64,
}

#[derive(Debug, Default)]
pub(super) struct Places(RwLock<Tenancies>);

impl Places {
    pub(super) fn belongs(&self, place: u32, id: Id) {
        let mut tenancies = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if tenancies.of.get(&place).is_none_or(|it| it.id != id) {
            tenancies.begun += 1;
            let number = tenancies.begun;
            tenancies.of.insert(place, Tenancy { id, number });
        }
    }

    /// Returns whose it was. From now on no [`Sums`] counts what was carried there.
    pub(super) fn free(&self, place: u32) -> Option<Id> {
        let mut tenancies = self.0.write().unwrap_or_else(PoisonError::into_inner);
        Some(tenancies.of.remove(&place)?.id)
    }

    pub(super) fn id(&self, place: u32) -> Option<Id> {
        let tenancies = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Some(tenancies.of.get(&place)?.id)
    }

    pub(super) fn len(&self) -> usize {
        let tenancies = self.0.read().unwrap_or_else(PoisonError::into_inner);
        tenancies.of.len()
    }

    /// Begins with what `ended` says of each place: its flows that are no more.
    pub(super) fn begin_sums(&self, ended: impl Fn(u32) -> Sum) -> Sums {
        let tenancies = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let tenancies = tenancies.of.clone();
        let sums = tenancies.iter().map(|(place, tenancy)| {
            let sum = ended(*place);
            (*tenancy, (*place, sum))
        });
        let sums = sums.filter(|(_, (_, sum))| sum.begun > 0 || sum.packets > 0);
        Sums {
            sums: sums.collect(),
            tenancies,
            ..Sums::default()
        }
    }

    /// What the flows at a publish's places have carried, of those places that it still has.
    pub(super) fn sum(&self, sums: &Sums, id: Id) -> Sum {
        let [first, last] = [0, u64::MAX].map(|number| Tenancy { id, number });
        let mut whole = Sum::default();
        for (tenancy, (place, sum)) in sums.sums.range(first..=last) {
            let tenancies = self.0.read().unwrap_or_else(PoisonError::into_inner);
            if tenancies.of.get(place) == Some(tenancy) {
                whole.flows += sum.flows;
                whole.begun += sum.begun;
                whole.packets += sum.packets;
                whole.bytes += sum.bytes;
            }
        }
        whole
    }
}

/// What flows have carried, live and ended ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sum {
    /// Live ones.
    pub flows: u64,
    pub begun: u64,
    pub packets: u64,
    pub bytes: u64,
}

/// Of places where something was carried. Ended flows are read first: one that ends while the live ones are added is missed
/// for once, and none is counted twice.
#[derive(Debug, Default)]
pub(in super::super) struct Sums {
    tenancies: HashMap<u32, Tenancy>,
    sums: BTreeMap<Tenancy, (u32, Sum)>,
    /// Half-open ones and proven ones.
    pub(super) entries: [u64; 2],
}

impl Sums {
    /// A live flow.
    pub(in super::super) fn add(&mut self, flow: &Flow) {
        self.entries[usize::from(flow.state() & state::KEPT != 0)] += 1;
        if flow.state() & (state::ALIAS | state::CUT) != 0 {
            return; // one that was cut off is over, and stays for its ends to hear that
        }
        let place = flow.publish();
        let Some(tenancy) = self.tenancies.get(&place) else {
            return;
        };
        let (_, sum) = self.sums.entry(*tenancy).or_insert((place, Sum::default()));
        sum.flows += 1;
        sum.packets += flow.packets().iter().sum::<u64>();
        sum.bytes += flow.bytes().iter().sum::<u64>();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packets(packets: u64) -> Sum {
        Sum {
            packets,
            ..Sum::default()
        }
    }

    #[test]
    fn an_alias_is_an_entry_and_no_flow() {
        let places = Places::default();
        places.belongs(1, 7);
        let mut sums = places.begin_sums(|_| Sum::default());
        let mut flow = Flow::default();
        flow.set_publish(1);
        flow.original.packets = 1;
        sums.add(&flow);
        flow.set_state(state::ALIAS);
        sums.add(&flow);
        let sum = places.sum(&sums, 7);
        assert_eq!((sum.flows, sum.packets, sums.entries), (1, 1, [2, 0]));
    }

    #[test]
    fn what_was_carried_at_a_place_that_was_freed_since_is_not_counted() {
        let places = Places::default();
        places.belongs(1, 7);
        places.belongs(2, 7);
        places.belongs(3, 8);
        let sums = places.begin_sums(|place| packets(u64::from(place) * 10));
        places.belongs(2, 7);
        assert_eq!(places.sum(&sums, 7), packets(10 + 20));
        assert_eq!(places.free(1), Some(7));
        assert_eq!(places.sum(&sums, 7), packets(20));
        // Neither for who has it then.
        places.belongs(1, 7);
        places.free(3);
        places.belongs(3, 7);
        assert_eq!(places.sum(&sums, 7), packets(20));
        assert_eq!(places.sum(&sums, 8), packets(0));
        let sums = places.begin_sums(|_| packets(1));
        assert_eq!(places.sum(&sums, 7), packets(3));
    }
}
