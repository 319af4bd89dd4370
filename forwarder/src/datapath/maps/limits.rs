//! A publish's limits. Whether it has any stands in its entry too, so that others pay nothing; both are written here.

use anyhow::Result;
use forwarder_common::{
    limits as sizes,
    policy::{Limits, Policy},
    publish::{Publish, flag},
};

use super::{
    Maps,
    mirror::{Table, TableError},
};

pub(super) const LIMITS: Table = Table {
    name: "LIMITS",
    holds: "publishes' limits",
    size: sizes::PUBLISHES,
};

impl Maps {
    /// Limits a publish, also one that is not installed yet, from the next packet on. Without any limit it has none. What was used
    /// up of other limits is forgotten.
    ///
    /// # Errors
    /// The table is full, or the kernel refuses the update.
    pub fn set_limits(&mut self, index: u32, limits: &Limits) -> Result<()> {
        let policy = Policy::from(limits);
        if *limits == Limits::default() {
            self.flag(index, false);
            self.publishes.flush()?;
            self.unlimit(index)?;
        } else {
            self.limits.change(index, |there| *there = policy);
            self.limits.flush()?;
            self.limited.insert(index, *limits);
            self.flag(index, true);
            self.publishes.flush()?;
        }
        Ok(())
    }

    /// The limits of a publish.
    pub fn limits(&self, index: u32) -> Limits {
        self.limited.get(&index).copied().unwrap_or_default()
    }

    /// Removes the limits themselves.
    pub(super) fn unlimit(&mut self, index: u32) -> Result<(), TableError> {
        self.limited.remove(&index);
        self.limits
            .change(index, |there| *there = Policy::default());
        self.limits.flush()
    }

    fn flag(&mut self, index: u32, is_limited: bool) {
        self.publishes.change(index, |entry| {
            if *entry != Publish::default() {
                mark(entry, is_limited);
            }
        });
    }

    /// An entry, marked by whether there are limits.
    pub(super) fn marked(&self, index: u32, entry: &Publish) -> Publish {
        let mut marked = *entry;
        mark(&mut marked, self.limits.get(&index) != Policy::default());
        marked
    }
}

const fn mark(entry: &mut Publish, is_limited: bool) {
    if is_limited {
        entry.flags |= flag::LIMITED;
    } else {
        entry.flags &= !flag::LIMITED;
    }
}
