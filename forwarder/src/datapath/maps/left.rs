//! Datagrams' conversations that began in user space: the program leaves them there when it could carry them. To it their
//! datagrams answer what has left this host by others.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap as Map, MapData};
use forwarder_common::tuple::Tuple;

use super::ignore_missing;
use crate::clock;

/// For so long they are left alone after they were renewed last: the longest that they outlive a process that was killed.
const LEASE: Duration = Duration::from_secs(60);
/// The element of `LAST_LEFT` that is UDP's.
const UDP: u32 = 1;

/// `LEFT` and `LAST_LEFT`.
pub struct Left {
    entries: Map<MapData, Tuple, u64>,
    last: Array<MapData, u64>,
    /// As clients send them, and until when.
    kept: HashMap<Tuple, u64>,
}

impl std::fmt::Debug for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Left")
    }
}

impl Left {
    /// Goes on with those that an earlier process has left to itself: it may have passed them on.
    pub(super) fn new(entries: Map<MapData, Tuple, u64>, last: Array<MapData, u64>) -> Self {
        let all: Vec<(Tuple, u64)> = entries.iter().flatten().collect();
        // Afterwards: what programs have noted meanwhile is of others.
        let now = clock::monotonic();
        let kept = all.into_iter().filter(|(_, until)| *until > now);
        let kept = kept.collect();
        Self {
            entries,
            last,
            kept,
        }
    }

    /// Leaves these to user space, which renews that while they last.
    ///
    /// # Errors
    /// The kernel refuses the update.
    pub fn leave(&mut self, tuples: impl IntoIterator<Item = Tuple>) -> Result<()> {
        let mut tuples = tuples.into_iter().peekable();
        if tuples.peek().is_some() {
            self.write_last()?;
        }
        tuples.try_for_each(|tuple| self.write(tuple))
    }

    /// Whether any are left to user space.
    pub fn has_any(&self) -> bool {
        !self.kept.is_empty()
    }

    /// Leaves those to user space for longer that go on there; the others' time ends.
    ///
    /// # Errors
    /// The kernel refuses an update.
    pub fn renew(&mut self, goes_on: &HashSet<Tuple>) -> Result<()> {
        let now = clock::monotonic();
        let over = |(tuple, until): (&Tuple, &u64)| *until <= now && !goes_on.contains(tuple);
        let over = self.kept.iter().filter(|kept| over(*kept));
        let over: Vec<Tuple> = over.map(|(tuple, _)| *tuple).collect();
        for tuple in over {
            ignore_missing(self.entries.remove(&tuple)).context("write LEFT")?;
            self.kept.remove(&tuple);
        }
        let kept = self.kept.keys().filter(|tuple| goes_on.contains(tuple));
        self.leave(kept.copied().collect::<Vec<_>>())
    }

    fn write(&mut self, tuple: Tuple) -> Result<()> {
        let until = lease();
        let written = self.entries.insert(tuple, until, 0);
        written.context("write LEFT")?;
        self.kept.insert(tuple, until);
        Ok(())
    }

    fn write_last(&mut self) -> Result<()> {
        self.last.set(UDP, lease(), 0).context("write LAST_LEFT")
    }
}

/// When they were last seen, to the program.
fn lease() -> u64 {
    let lease = u64::try_from(LEASE.as_nanos()).unwrap_or(u64::MAX);
    clock::monotonic().saturating_add(lease)
}
