//! How many entries of `FLOWS` each source has: added to where user space puts one there or takes one out, and put right by what a
//! walk over the table has seen.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::{Context as _, Result};
use aya::maps::{Array, IterableMap as _, MapData};
use forwarder_common::{
    share::{self, ALIASES, ALL, COUNT, Share},
    tuple::Address,
};

use super::memory::Memory;

/// [`Share`], as the processor adds to it.
#[repr(C)]
struct Counters {
    entered: AtomicU64,
    left: AtomicU64,
}

const _: () = assert!(size_of::<Counters>() == size_of::<Share>());

impl Counters {
    fn read(&self) -> Share {
        let left = self.left.load(Relaxed); // first: what leaves meanwhile was there
        let entered = self.entered.load(Relaxed);
        Share { entered, left }
    }
}

/// `SHARES`, mapped.
pub struct Shares {
    memory: Memory<Counters>,
    keys: [u64; 5],
    /// Programs that are not loaded yet are to use them.
    _maps: (Array<MapData, Share>, Array<MapData, [u64; 5]>),
}

impl std::fmt::Debug for Shares {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SHARES")
    }
}

impl Shares {
    /// `keys` has the program's.
    pub(super) fn new(
        map: Array<MapData, Share>,
        mut keys: Array<MapData, [u64; 5]>,
    ) -> Result<Self> {
        let chosen = choose_keys(&mut keys)?;
        let memory = Memory::map(map.map(), 0, COUNT as usize);
        let shares = Self {
            memory: memory.context("map SHARES into memory")?,
            keys: chosen,
            _maps: (map, keys),
        };
        // Until a walk has found none, an earlier program may have left some.
        if let Some(aliases) = shares.memory.get(ALIASES as usize) {
            aliases.entered.fetch_add(1, Relaxed);
        }
        Ok(shares)
    }

    /// Where a source is counted.
    pub fn index(&self, source: &Address) -> u32 {
        share::index(source, |at| self.keys[at])
    }

    fn counters(&self, index: u32) -> impl Iterator<Item = &Counters> {
        let both = [index, ALL].into_iter();
        both.filter_map(|index| self.memory.get(index as usize))
    }

    /// A source has one more entry.
    pub(super) fn entered(&self, source: &Address) {
        for counters in self.counters(self.index(source)) {
            counters.entered.fetch_add(1, Relaxed);
        }
    }

    /// A source has one less.
    pub(super) fn left(&self, source: &Address) {
        for counters in self.counters(self.index(source)) {
            counters.left.fetch_add(1, Relaxed);
        }
    }

    /// Entries of an element of `SHARES`.
    pub fn held(&self, index: u32) -> u64 {
        let counters = self.memory.get(index as usize);
        counters.map_or(0, |counters| counters.read().held())
    }

    fn all(&self) -> impl Iterator<Item = &Counters> {
        (0..COUNT as usize).filter_map(|index| self.memory.get(index))
    }

    /// Begins to count what a walk over the table sees.
    pub fn begin_count(&self) -> Count {
        Count {
            before: self.all().map(Counters::read).collect(),
            seen: vec![0; COUNT as usize],
        }
    }

    /// Puts right what does not agree with a walk from the table's beginning to its end: there is no less than it has seen
    /// without what has left since it began, and no more than that with what has entered.
    pub fn correct(&self, count: &Count) {
        let counted = count.before.iter().zip(&count.seen);
        for (counters, (before, &seen)) in self.all().zip(counted) {
            let missing = missing(*before, counters.read(), seen.into());
            add_missing(missing, &counters.entered, &counters.left);
        }
    }
}

/// How many entries a count lacks after a walk that has seen so many; less than 0 if it has too many.
pub(super) fn missing(before: Share, now: Share, seen: u64) -> i64 {
    let least = seen.saturating_sub(now.left.wrapping_sub(before.left));
    let most = seen + now.entered.wrapping_sub(before.entered);
    // May be less than nothing.
    let held = now.entered.wrapping_sub(now.left).cast_signed();
    held.clamp(least.cast_signed(), most.cast_signed()) - held
}

/// Adds them: both counters only grow.
pub(super) fn add_missing(missing: i64, entered: &AtomicU64, left: &AtomicU64) {
    let counter = if missing > 0 { entered } else { left };
    counter.fetch_add(missing.unsigned_abs(), Relaxed);
}

/// What a walk over `FLOWS` has seen, and of aliases over both tables.
pub struct Count {
    before: Vec<Share>,
    seen: Vec<u32>,
}

impl std::fmt::Debug for Count {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Count")
    }
}

impl Count {
    /// An entry of a source that is counted there.
    pub fn saw(&mut self, index: u32) {
        for index in [index, ALL] {
            self.count(index);
        }
    }

    /// An alias.
    pub fn saw_alias(&mut self) {
        self.count(ALIASES);
    }

    fn count(&mut self, index: u32) {
        if let Some(seen) = self.seen.get_mut(index as usize) {
            *seen += 1;
        }
    }
}

/// Chooses the keys of source ports and shares at random, unless an earlier instance has: its flows are found and counted by them.
///
/// # Errors
/// The kernel has no randomness, or refuses the update.
fn choose_keys(map: &mut Array<MapData, [u64; 5]>) -> Result<[u64; 5]> {
    let keys = map.get(&0, 0).context("read KEYS")?;
    if keys != [0; 5] {
        return Ok(keys);
    }
    let mut octets = [0; size_of::<[u64; 5]>()];
    getrandom::fill(&mut octets).context("choose random keys")?;
    let keys: [u64; 5] = bytemuck::cast(octets);
    map.set(0, keys, 0).context("write KEYS")?;
    Ok(keys)
}
