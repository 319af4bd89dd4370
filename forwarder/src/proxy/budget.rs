//! Descriptors, which all publishes of a process share. A publish may hold as many as are left free for all others: one
//! that is flooded gets half of them, two get a third each, and there is always something left for the next (dynamic
//! thresholds, Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998).

use std::{
    fs,
    os::fd::RawFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use nix::sys::resource::{Resource, getrlimit};

/// For the control socket, netlink and the datapath.
const RESERVE: u64 = 64;

/// What there is, and what of it the proxy has.
#[derive(Debug)]
pub(super) struct Budget {
    /// RLIMIT_NOFILE.
    limit: u64,
    /// Of the limit, what no conversation gets.
    reserve: u64,
    /// What was open before, and what is kept open.
    others: AtomicU64,
    taken: AtomicU64,
}

/// Why a conversation gets no descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exhausted {
    /// Its publish has all that it may have.
    Share,
    /// Only the reserve is left.
    Reserve,
}

impl Budget {
    /// By the limit and what is open now.
    pub(super) fn of_this_process() -> Self {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(limit, _)| limit);
        let open = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        Self::new(limit, open as u64)
    }

    fn new(limit: u64, open: u64) -> Self {
        Self {
            limit,
            reserve: RESERVE.min(limit / 4),
            others: AtomicU64::new(open),
            taken: AtomicU64::new(0),
        }
    }

    /// The limit of open files.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// So many are open for no conversation, until what is returned is dropped: sockets that hold ports, above all.
    pub(super) fn keep(self: &Arc<Self>, descriptors: u64) -> Reserved {
        self.others.fetch_add(descriptors, Relaxed);
        let budget = self.clone();
        Reserved {
            budget,
            descriptors,
        }
    }

    /// What conversations may still take.
    fn free(&self) -> u64 {
        let gone = self.reserve + self.others.load(Relaxed) + self.taken.load(Relaxed);
        self.limit.saturating_sub(gone)
    }
}

/// Descriptors of no conversation.
#[derive(Debug)]
pub struct Reserved {
    budget: Arc<Budget>,
    descriptors: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.budget.others.fetch_sub(self.descriptors, Relaxed);
    }
}

/// What one publish has of a budget.
#[derive(Debug)]
pub(super) struct Share {
    budget: Arc<Budget>,
    taken: AtomicU64,
}

impl Share {
    pub(super) fn of(budget: Arc<Budget>) -> Self {
        let taken = AtomicU64::new(0);
        Self { budget, taken }
    }

    /// What the publish holds.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    /// Takes so many descriptors, of which `newest` may be open already.
    ///
    /// # Errors
    /// There are not so many for this publish.
    // RACE: two that ask at once may both get the last ones; the reserve has room for that.
    pub(super) fn take(
        self: &Arc<Self>,
        descriptors: u64,
        newest: Option<RawFd>,
    ) -> Result<Permit, Exhausted> {
        let budget = &self.budget;
        // The kernel gives the lowest number that is free, so at least as many are open, whoever has opened them.
        let open = newest.map_or(0, |newest| u64::try_from(newest).unwrap_or(0) + 1);
        if open + descriptors + budget.reserve > budget.limit {
            return Err(Exhausted::Reserve);
        }
        let free = budget.free();
        if free < descriptors {
            return Err(Exhausted::Reserve);
        }
        if self.taken() + descriptors > free - descriptors {
            return Err(Exhausted::Share);
        }
        self.taken.fetch_add(descriptors, Relaxed);
        budget.taken.fetch_add(descriptors, Relaxed);
        let share = self.clone();
        Ok(Permit { share, descriptors })
    }
}

/// Descriptors that a conversation may have open; dropped after they are closed.
#[derive(Debug)]
pub(super) struct Permit {
    share: Arc<Share>,
    descriptors: u64,
}

impl Permit {
    /// They stay open when the conversation has ended.
    pub(super) fn keep(self) -> Reserved {
        self.share.budget.keep(self.descriptors)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.share.taken.fetch_sub(self.descriptors, Relaxed);
        let budget = &self.share.budget;
        budget.taken.fetch_sub(self.descriptors, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes two at a time until there are no more; returns what it has.
    fn greedy(share: &Arc<Share>) -> (Vec<Permit>, Exhausted) {
        let mut permits = Vec::new();
        loop {
            match share.take(2, None) {
                Ok(permit) => permits.push(permit),
                Err(why) => return (permits, why),
            }
        }
    }

    #[test]
    fn a_greedy_publish_leaves_as_much_as_it_has() {
        let budget = Arc::new(Budget::new(1064, 0));
        let [first, second, third] = [(); 3].map(|()| Arc::new(Share::of(budget.clone())));
        let (permits, why) = greedy(&first);
        assert_eq!((first.taken(), why), (500, Exhausted::Share));
        let others = [greedy(&second), greedy(&third)];
        assert_eq!((second.taken(), third.taken()), (250, 124));
        assert!(budget.free() > 100, "for the next");
        drop((permits, others));
        assert_eq!((first.taken(), budget.free()), (0, 1000));
    }

    #[test]
    fn the_reserve_is_not_for_conversations() {
        let budget = Arc::new(Budget::new(1064, 0));
        let share = Arc::new(Share::of(budget.clone()));
        assert!(share.take(2, Some(997)).is_ok());
        assert_eq!(share.take(2, Some(998)).err(), Some(Exhausted::Reserve));
        let ports = budget.keep(999);
        assert_eq!(share.take(2, None).err(), Some(Exhausted::Reserve));
        drop(ports);
        assert!(share.take(2, None).is_ok());
    }

    #[test]
    fn a_small_limit_still_serves() {
        let budget = Arc::new(Budget::new(100, 20));
        let (permits, _) = greedy(&Arc::new(Share::of(budget)));
        assert_eq!(permits.len(), 13);
    }
}
