//! What publishes are used for: read from the program's counters, and added to where user space ends a flow.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::AsFd as _,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use anyhow::{Context as _, Result};
use aya::maps::{Array, IterableMap as _, MapData, MapError, PerCpuHashMap};
use forwarder_common::{
    flow::{Flow, state},
    limits,
    reason::Reason,
    share::Share,
    usage::{Refused, Usage as Element},
};

use super::{
    Maps, ignore_missing,
    memory::Memory,
    mirror::Table,
    shares::{add_missing, missing},
};

/// What a publish has been used for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Flows that are there now and are proven, or have a source port of this host, and are not over. Those that are not proven are not counted:
    /// whoever invents senders makes as many as they like, and the kernel forgets the oldest without a word.
    pub flows: u64,
    /// Flows that have begun, proven or not.
    pub begun: u64,
    /// Packets of flows that have ended, original and reply direction. What those that are there have carried is in them.
    pub packets: [u64; 2],
    /// Their bytes.
    pub bytes: [u64; 2],
    /// Packets that were refused, by reason.
    pub refused: BTreeMap<&'static str, u64>,
}

/// [`Element`], as the processor adds to it.
#[repr(C)]
struct Counters {
    begun: AtomicU64,
    kept: AtomicU64,
    ended: AtomicU64,
    packets: [AtomicU64; 2],
    bytes: [AtomicU64; 2],
    reserved: AtomicU64,
}

const _: () = assert!(size_of::<Counters>() == size_of::<Element>());

impl Counters {
    /// Flows that are there, as entries of the table are counted.
    fn share(&self) -> Share {
        let left = self.ended.load(Relaxed); // first: what ends meanwhile was there
        let entered = self.kept.load(Relaxed);
        Share { entered, left }
    }
}

/// What was counted of publishes before a walk over `FLOWS`, and how many flows that has seen.
#[derive(Debug)]
pub struct FlowCount(HashMap<u32, (Share, u64)>);

impl FlowCount {
    /// A flow of `FLOWS`.
    pub fn saw(&mut self, flow: &Flow) {
        if flow.state() & (state::ALIAS | state::OVER) == 0
            && let Some((_, seen)) = self.0.get_mut(&flow.publish())
        {
            *seen += 1;
        }
    }
}

/// `USAGE`, mapped: the program and user space add to the same memory. It is mapped piece by piece, as places are asked for:
/// what is mapped counts as the process's memory.
pub struct Mapped {
    pieces: [OnceLock<Option<Memory<Counters>>>; limits::PUBLISHES as usize / PIECE],
    map: Array<MapData, Element>,
}

/// Elements of a piece, which are whole pages.
const PIECE: usize = 4096;

impl Mapped {
    pub(super) fn new(map: Array<MapData, Element>) -> Result<Self> {
        let mapped = Self {
            pieces: Default::default(),
            map,
        };
        mapped.get(0).context("map USAGE into memory")?;
        Ok(mapped)
    }

    fn piece(&self, number: usize) -> Option<Memory<Counters>> {
        let piece = Memory::map(self.map.map(), number * PIECE, PIECE);
        piece
            .inspect_err(|error| tracing::warn!("map USAGE into memory: {error}"))
            .ok()
    }

    /// Flows that are there, are proven and are not over.
    pub fn flows(&self, index: u32) -> u64 {
        self.get(index)
            .map_or(0, |counters| counters.share().held())
    }

    /// Begins to count what a walk over the table sees of these publishes.
    pub fn begin_count(&self, places: impl Iterator<Item = u32>) -> FlowCount {
        let counted = places.filter_map(|index| Some((index, (self.get(index)?.share(), 0))));
        FlowCount(counted.collect())
    }

    /// Puts right what does not agree with a walk from the table's beginning to its end: of two CPUs that follow the end of one
    /// connection at once, each may have counted it.
    pub fn correct(&self, count: &FlowCount) {
        for (index, (before, seen)) in &count.0 {
            let Some(counters) = self.get(*index) else {
                continue;
            };
            let now = counters.share();
            // Its place may be another's now.
            if now.entered >= before.entered && now.left >= before.left {
                let missing = missing(*before, now, *seen);
                add_missing(missing, &counters.kept, &counters.ended);
            }
        }
    }

    /// Packets and bytes of flows that have ended, in both directions together.
    pub fn carried(&self, index: u32) -> (u64, u64) {
        let sum = |counters: &[AtomicU64; 2]| counters.iter().map(|it| it.load(Relaxed)).sum();
        self.get(index)
            .map_or((0, 0), |it| (sum(&it.packets), sum(&it.bytes)))
    }

    /// Flows that have begun.
    pub fn begun(&self, index: u32) -> u64 {
        self.get(index).map_or(0, |it| it.begun.load(Relaxed))
    }

    fn get(&self, index: u32) -> Option<&Counters> {
        let (number, within) = (index as usize / PIECE, index as usize % PIECE);
        let piece = self.pieces.get(number)?;
        let piece = piece.get_or_init(|| self.piece(number)).as_ref()?;
        piece.get(within)
    }

    /// A flow is there no more. It was in `FLOWS` or not.
    pub(super) fn ended(&self, flow: &Flow, was_kept: bool) {
        if flow.state() & state::ALIAS != 0 {
            return;
        }
        let Some(counters) = self.get(flow.publish()) else {
            return;
        };
        if was_kept && flow.state() & state::OVER == 0 {
            counters.ended.fetch_add(1, Relaxed);
        }
        for direction in 0..2 {
            let side = flow.side(direction);
            counters.packets[direction].fetch_add(side.packets, Relaxed);
            counters.bytes[direction].fetch_add(side.bytes, Relaxed);
        }
    }

    /// A flow has begun that the program did not count.
    pub(super) fn began(&self, flow: &Flow) {
        self.add(flow, |counters| &counters.begun);
    }

    /// Such a flow was put into `FLOWS`.
    pub(super) fn kept(&self, flow: &Flow) {
        if flow.state() & state::OVER == 0 {
            self.add(flow, |counters| &counters.kept);
        }
    }

    fn add(&self, flow: &Flow, counter: impl Fn(&Counters) -> &AtomicU64) {
        if flow.state() & state::ALIAS == 0
            && let Some(counters) = self.get(flow.publish())
        {
            counter(counters).fetch_add(1, Relaxed);
        }
    }

    /// A flow of `FLOWS` is of another publish now.
    pub(super) fn moved(&self, from: u32, to: u32) {
        for (index, count) in [
            (from, |counters: &Counters| &counters.ended),
            (to, |counters: &Counters| &counters.kept),
        ] as [(u32, fn(&Counters) -> &AtomicU64); 2]
        {
            if let Some(counters) = self.get(index) {
                count(counters).fetch_add(1, Relaxed);
            }
        }
    }
}

impl std::fmt::Debug for Mapped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("USAGE")
    }
}

/// What is counted apart for each publish.
pub const REFUSALS: &[Reason] = &[
    Reason::Banned,
    Reason::NotAllowed,
    Reason::OtherInterface,
    Reason::TooManyFlows,
    Reason::RateLimited,
    Reason::SourceRateLimited,
    Reason::BandwidthExceeded,
];

const REFUSED: Table = Table {
    name: "REFUSED",
    holds: "counters of refusals",
    size: limits::REFUSED,
};

/// What publishes have refused, on a descriptor of its own.
pub struct RefusedCounters(PerCpuHashMap<MapData, Refused, u64>);

impl std::fmt::Debug for RefusedCounters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("REFUSED")
    }
}

impl RefusedCounters {
    /// Every counter that there is, by the publish's place and the reason.
    ///
    /// # Errors
    /// The kernel refuses the read.
    pub fn all(&self) -> Result<BTreeMap<(u32, &'static str), u64>> {
        let mut all = BTreeMap::new();
        // RACE: where a counter is removed meanwhile, the kernel begins again from the first.
        for entry in self.0.iter().take(2 * limits::REFUSED as usize) {
            let (Refused { publish, reason }, counts) = entry.context("read REFUSED")?;
            if let Some(reason) = REFUSALS.iter().find(|it| **it as u32 == reason) {
                all.insert((publish, reason.name()), counts.iter().sum());
            }
        }
        Ok(all)
    }

    /// Those of one publish.
    ///
    /// # Errors
    /// The kernel refuses the read.
    pub fn of(&self, index: u32) -> Result<BTreeMap<&'static str, u64>> {
        refused_of(&self.0, index)
    }
}

fn refused_of(
    table: &PerCpuHashMap<MapData, Refused, u64>,
    index: u32,
) -> Result<BTreeMap<&'static str, u64>> {
    let mut refused = BTreeMap::new();
    for &reason in REFUSALS {
        match table.get(&refusal(index, reason), 0) {
            Ok(counts) => {
                refused.insert(reason.name(), counts.iter().sum());
            }
            Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(error).context("read REFUSED"),
        }
    }
    Ok(refused)
}

impl Maps {
    /// What publishes have refused, for whoever reads it at any time.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn refused(&self) -> Result<RefusedCounters> {
        let descriptor = self.refused.map().fd().as_fd().try_clone_to_owned()?;
        let map = aya::maps::Map::PerCpuHashMap(MapData::from_fd(descriptor)?);
        Ok(RefusedCounters(PerCpuHashMap::try_from(map)?))
    }

    /// The counters of all publishes, for whoever reads them at any time.
    pub fn mapped_usage(&self) -> Arc<Mapped> {
        self.usage.clone()
    }

    /// What a publish has been used for, over all CPUs.
    ///
    /// # Errors
    /// The kernel refuses the read.
    pub fn usage(&self, index: u32) -> Result<Usage> {
        let Some(counters) = self.usage.get(index) else {
            return Ok(Usage::default());
        };
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        Ok(Usage {
            flows: counters.share().held(),
            begun: read(&counters.begun),
            packets: counters.packets.each_ref().map(read),
            bytes: counters.bytes.each_ref().map(read),
            refused: refused_of(&self.refused, index)?,
        })
    }

    /// Forgets what a publish has been used for, of which no flow is there any more.
    ///
    /// # Errors
    /// The kernel refuses the update.
    pub fn clear_usage(&mut self, index: u32) -> Result<()> {
        if let Some(counters) = self.usage.get(index) {
            for counter in [&counters.kept, &counters.ended, &counters.begun]
                .into_iter()
                .chain(&counters.packets)
                .chain(&counters.bytes)
            {
                counter.store(0, Relaxed);
            }
        }
        for &reason in REFUSALS {
            let removed = self.refused.remove(&refusal(index, reason));
            REFUSED.wrote(ignore_missing(removed))?;
        }
        Ok(())
    }
}

fn refusal(publish: u32, reason: Reason) -> Refused {
    Refused {
        publish,
        reason: reason as u32,
    }
}
