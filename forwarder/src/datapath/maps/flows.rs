//! The two tables of flows, walked slice by slice, since they may have a million entries.

#![expect(unsafe_code, reason = "bpf(2) on many elements at once")]

use std::{io, os::fd::AsFd as _, sync::Arc};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, IterableMap as _, MapData, MapError};
use forwarder_common::{
    flow::{Flow, state},
    tuple::{Address, Tuple},
};

use super::{batch, ignore_missing, shares::Shares, usage::Mapped};

/// Entries read by one system call: about a millisecond. No bucket has as many, which
/// the kernel would refuse.
const SLICE: usize = 4096;

/// Of bpf(2): an entry that is there stays as it is, and that is an error.
pub(super) const BPF_NOEXIST: u64 = 1;

/// Where a walk over all flows is. Half-open ones come first: one that is kept meanwhile is then met twice rather than
/// never.
#[derive(Clone, Copy, Debug, Default)]
pub struct Walk {
    /// In `FLOWS`.
    kept: bool,
    /// Where the kernel goes on in that table; `None` for its beginning.
    token: Option<u32>,
    over: bool,
}

/// Flows, as user space reads and ends them. Clones, by [`FlowTables::try_clone`], are of the same tables: a walk on another
/// thread does not hold up whoever writes publishes.
pub struct FlowTables {
    pub(super) flows: HashMap<MapData, Tuple, Flow>,
    pub(super) half_open: HashMap<MapData, Tuple, Flow>,
    pub(super) claims: HashMap<MapData, Tuple, u32>,
    pub(super) usage: Arc<Mapped>,
    pub shares: Arc<Shares>,
}

impl std::fmt::Debug for FlowTables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FlowTables")
    }
}

impl Walk {
    /// Whether the next slice is of `FLOWS`.
    pub const fn is_kept(&self) -> bool {
        self.kept
    }
}

impl FlowTables {
    /// How many entries `FLOWS` has room for.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn most(&self) -> Result<u32> {
        Ok(self.flows.map().info()?.max_entries())
    }

    /// # Errors
    /// There are no descriptors left.
    pub fn try_clone(&self) -> Result<Self> {
        fn clone<K: aya::Pod, V: aya::Pod>(
            table: &HashMap<MapData, K, V>,
        ) -> Result<HashMap<MapData, K, V>> {
            let descriptor = table.map().fd().as_fd().try_clone_to_owned()?;
            let map = aya::maps::Map::HashMap(MapData::from_fd(descriptor)?);
            Ok(HashMap::try_from(map)?)
        }
        Ok(Self {
            flows: clone(&self.flows)?,
            half_open: clone(&self.half_open)?,
            claims: clone(&self.claims)?,
            usage: self.usage.clone(),
            shares: self.shares.clone(),
        })
    }

    /// The next slice of a walk, which may be empty, aliases and all; `None` at its end.
    ///
    /// # Errors
    /// The kernel refuses the walk.
    pub fn slice(
        &self,
        walk: &mut Walk,
    ) -> Result<Option<impl Iterator<Item = (Tuple, Flow)> + use<>>> {
        if walk.over {
            return Ok(None);
        }
        let table = if walk.kept {
            &self.flows
        } else {
            &self.half_open
        };
        let entries = lookup_batch(table, &mut walk.token).context("read the flows")?;
        let kept = walk.kept;
        let entries = entries.filter(move |(_, flow)| kept || flow.state() & state::KEPT == 0);
        if walk.token.is_none() {
            walk.over = walk.kept;
            walk.kept = true;
        }
        Ok(Some(entries))
    }

    /// Every flow.
    pub fn all(&self) -> impl Iterator<Item = Result<(Tuple, Flow)>> {
        let mut walk = Walk::default();
        std::iter::from_fn(move || self.slice(&mut walk).transpose()).flat_map(|slice| {
            let (entries, error) = match slice {
                Ok(entries) => (Some(entries), None),
                Err(error) => (None, Some(Err(error))),
            };
            let flows = entries.into_iter().flatten();
            let flows = flows.filter(|(_, flow)| flow.state() & state::ALIAS == 0);
            flows.map(Ok).chain(error)
        })
    }

    /// Shows every flow and alias to `change`, with the tables for what it does about it.
    ///
    /// # Errors
    /// The kernel refuses the walk, or `change` fails; the walk ends there.
    pub fn change_all(
        &mut self,
        mut change: impl FnMut(&Tuple, &Flow, &mut Self) -> Result<()>,
    ) -> Result<()> {
        let mut walk = Walk::default();
        while let Some(slice) = self.slice(&mut walk)? {
            for (key, flow) in slice {
                change(&key, &flow, self)?;
            }
        }
        Ok(())
    }

    /// The flow as it is now.
    ///
    /// # Errors
    /// The kernel refuses the lookup.
    pub fn get(&self, key: &Tuple) -> Result<Option<Flow>> {
        for table in [&self.flows, &self.half_open] {
            match table.get(key, 0) {
                Ok(flow) => return Ok(Some(flow)),
                Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(error).context("read the flows"),
            }
        }
        Ok(None)
    }

    /// Overwrites a flow where it is.
    ///
    /// # Errors
    /// The kernel refuses the update.
    pub fn set(&mut self, key: &Tuple, flow: &Flow) -> Result<()> {
        const BPF_EXIST: u64 = 2;
        ignore_missing(self.half_open.insert(key, flow, BPF_EXIST)).context("write the flows")?;
        let before = self.flows.get(key, 0);
        ignore_missing(self.flows.insert(key, flow, BPF_EXIST)).context("write the flows")?;
        if let Ok(before) = before
            && before.publish() != flow.publish()
            && flow.state() & (state::ALIAS | state::OVER) == 0
        {
            self.usage.moved(before.publish(), flow.publish());
        }
        Ok(())
    }

    /// Cuts a flow off, of which that is true: from now on nothing of it is carried, and the program answers TCP's segments by resets,
    /// until it is deleted. Returns the flow as it was.
    ///
    /// # Errors
    /// The kernel refuses the update.
    pub fn cut(&mut self, key: &Tuple, if_so: impl Fn(&Flow) -> bool) -> Result<Option<Flow>> {
        let flow = self.get(key)?.filter(if_so);
        if let Some(flow) = &flow {
            // RACE: what it carries at this moment it forgets to have carried; the numbers lag.
            self.set(key, &flow.with_state(flow.state() | state::CUT))?;
        }
        Ok(flow)
    }

    /// Deletes a flow, and its alias if it has one; or an alias.
    ///
    /// # Errors
    /// The kernel refuses the update.
    pub fn remove(&mut self, key: &Tuple, flow: &Flow) -> Result<()> {
        let (other, _) = flow.counterpart(key);
        let has_alias = flow.state() & state::ALIAS == 0 && other.source_port != key.source_port;
        if has_alias
            && self
                .get(&other)?
                .is_some_and(|there| there.counterpart(&other).0 == *key)
        {
            self.remove_one(&other, &other.source)?;
        }
        let [was_half_open, was_kept] = self.remove_one(key, flow.source(key))?;
        if was_half_open || was_kept {
            self.usage.ended(flow, was_kept);
        }
        Ok(())
    }

    /// Deletes a source's entry from `HALF_OPEN` and from `FLOWS`; returns which of them had it.
    fn remove_one(&mut self, key: &Tuple, source: &Address) -> Result<[bool; 2]> {
        // In this order: what is left of a kept flow in HALF_OPEN must not come to life again.
        let mut removed = [false; 2];
        for (table, removed) in [&mut self.half_open, &mut self.flows]
            .into_iter()
            .zip(&mut removed)
        {
            let result = table.remove(key);
            *removed = result.is_ok();
            ignore_missing(result).context("write the flows")?;
        }
        if removed[1] {
            self.shares.left(source);
        }
        Ok(removed)
    }

    /// Deletes a flow of which that is still true, and returns it. The program puts no other in its place meanwhile.
    ///
    /// # Errors
    /// The kernel refuses an update.
    pub fn end(&mut self, key: &Tuple, ends: impl Fn(&Flow) -> bool) -> Result<Option<Flow>> {
        if self.claims.insert(key, 0, BPF_NOEXIST).is_err() {
            return Ok(None); // the program has claimed it
        }
        let ended = self.get(key).and_then(|flow| {
            let flow = flow.filter(ends);
            if let Some(flow) = &flow {
                self.remove(key, flow)?;
            }
            Ok(flow)
        });
        ignore_missing(self.claims.remove(key)).context("write CLAIMS")?;
        ended
    }
}

/// Reads a slice by one system call. `token` is moved on, and
/// is `None` at the end of the table.
fn lookup_batch(
    table: &HashMap<MapData, Tuple, Flow>,
    token: &mut Option<u32>,
) -> io::Result<impl Iterator<Item = (Tuple, Flow)> + use<>> {
    let mut keys: Vec<Tuple> = Vec::with_capacity(SLICE);
    let mut flows: Vec<Flow> = Vec::with_capacity(SLICE);
    let (into_keys, into_flows) = (keys.as_mut_ptr().cast(), flows.as_mut_ptr().cast());
    // SAFETY: there is room for so many keys and values of the table's types, and the kernel has written as many as it says.
    unsafe {
        let count = batch::lookup(table.map(), into_keys, into_flows, SLICE, token)?;
        keys.set_len(count);
        flows.set_len(count);
    }
    Ok(keys.into_iter().zip(flows))
}
