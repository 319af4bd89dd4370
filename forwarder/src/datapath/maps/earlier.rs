//! What an instance of another version left, whose tables are laid out in another way: `FORMAT`, pinned beside them, says in
//! which, and what both versions know by name is carried over.

#![expect(unsafe_code, reason = "bpf(2) on many elements at once")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Array, HashMap, Map, MapData};
use bytemuck::Pod;
use forwarder_common::{
    flow::{Flow, ORIGINAL, REPLY, state},
    layout::{self, Layout},
    share::{self, Share},
    tuple::Tuple,
    usage::Usage,
};
use serde::{Deserialize, Serialize};

use super::{FlowTables, batch, flows::BPF_NOEXIST, mirror::errno};
use crate::clock;

/// The name of the pin. That map holds a text of JSON with zeros behind it.
const FORMAT: &str = "FORMAT";
/// Octets of it. It stays as it is, since each version reads what others left.
const LENGTH: usize = 4096;
/// Entries read by one system call.
const SLICE: usize = 4096;

/// What an entry of a table consists of.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    key: Vec<Field>,
    value: Vec<Field>,
}

/// Written as a list, which takes less room, and read as a list or as an object.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(into = "(String, usize, usize)")]
struct Field {
    name: String,
    offset: usize,
    size: usize,
}

impl From<Field> for (String, usize, usize) {
    fn from(Field { name, offset, size }: Field) -> Self {
        (name, offset, size)
    }
}

impl Entry {
    fn of<K: Layout, V: Layout>() -> Self {
        let fields = |fields: &[layout::Field]| {
            let fields = fields.iter().map(|field| Field {
                name: field.name.to_owned(),
                offset: field.offset,
                size: field.size,
            });
            fields.collect()
        };
        Self {
            key: fields(K::FIELDS),
            value: fields(V::FIELDS),
        }
    }
}

/// The tables that outlive a process, each as it is laid out.
fn tables() -> BTreeMap<&'static str, Entry> {
    let flow = Entry::of::<Tuple, Flow>;
    [
        ("FLOWS", flow()),
        ("HALF_OPEN", flow()),
        ("USAGE", Entry::of::<u32, Usage>()),
        ("SHARES", Entry::of::<u32, Share>()),
        ("LEFT", Entry::of::<Tuple, u64>()),
        ("LAST_LEFT", Entry::of::<u32, u64>()),
        ("DIRECT", Entry::of::<Tuple, u32>()),
        ("KEYS", Entry::of::<u32, [u64; 5]>()),
    ]
    .into()
}

/// Their names.
pub fn names() -> impl Iterator<Item = &'static str> {
    tables().into_keys()
}

/// How this version's tables are laid out.
fn format() -> String {
    serde_json::to_string(&tables()).expect("names and numbers")
}

/// The name of this layout, which another one does not have: FNV-1a (draft-eastlake-fnv).
pub fn name() -> String {
    let hash = format().bytes().fold(0xcbf2_9ce4_8422_2325, |hash, octet| {
        (hash ^ u64::from(octet)).wrapping_mul(0x100_0000_01b3_u64)
    });
    format!("{hash:016x}")
}

/// Whether the tables of this version's pins have been in use.
pub fn is_described(pins: &Path) -> bool {
    pins.join(FORMAT).exists()
}

/// Says beside this version's pins, which are in use, how they are laid out.
///
/// # Errors
/// The kernel refuses the map or the pin.
pub fn describe(pins: &Path) -> Result<()> {
    if is_described(pins) {
        return Ok(());
    }
    let pin = pins.join(FORMAT);
    let mut octets = [0; LENGTH];
    let text = format();
    octets[..text.len()].copy_from_slice(text.as_bytes());
    let mut map: Array<MapData, [u8; LENGTH]> =
        Array::create(1, 0).with_context(|| format!("make {FORMAT}"))?;
    map.set(0, octets, 0)?;
    map.pin(&pin)
        .with_context(|| format!("pin {}", pin.display()))
}

/// Another version's pins.
#[derive(Debug)]
pub struct Earlier {
    pins: PathBuf,
    tables: BTreeMap<String, Entry>,
}

impl Earlier {
    /// # Errors
    /// They do not say how they are laid out.
    pub fn open(pins: PathBuf) -> Result<Self> {
        let map = Map::Array(MapData::from_pin(pins.join(FORMAT))?);
        let map: Array<_, [u8; LENGTH]> = Array::try_from(map)?;
        let octets = map.get(&0, 0)?;
        let end = octets.iter().position(|octet| *octet == 0);
        let tables = serde_json::from_slice(&octets[..end.unwrap_or(LENGTH)])?;
        Ok(Self { pins, tables })
    }

    /// Carries over what flows are found by and counted with, into the tables that are pinned in `own`.
    ///
    /// # Errors
    /// The kernel refuses a read or an update.
    pub fn carry_keys(&self, own: &Path) -> Result<()> {
        let mut keys: Array<_, [u64; 5]> = Array::try_from(Map::Array(open(own, "KEYS")?))?;
        self.each("KEYS", |at, value: [u64; 5]| Ok(keys.set(at, value, 0)?))?;
        let mut usage: Array<_, Usage> = Array::try_from(Map::Array(open(own, "USAGE")?))?;
        self.each("USAGE", |at, value: Usage| {
            if value == Usage::default() {
                return Ok(());
            }
            Ok(usage.set(at, value, 0)?)
        })?;
        // Those that an earlier version has not counted, the first sweep counts.
        let mut shares: Array<_, Share> = Array::try_from(Map::Array(open(own, "SHARES")?))?;
        self.each("SHARES", |at, value: Share| {
            if value == Share::default() || at >= share::COUNT {
                return Ok(());
            }
            Ok(shares.set(at, value, 0)?)
        })
    }

    /// Carries over everything as it is now, while the earlier programs go on with it.
    ///
    /// # Errors
    /// The kernel refuses a read or an update.
    pub fn carry(&self, own: &Path) -> Result<()> {
        self.carry_keys(own)?;
        self.carry_table::<Tuple, Flow>("FLOWS", own)?;
        self.carry_table::<Tuple, Flow>("HALF_OPEN", own)?;
        self.carry_table::<Tuple, u64>("LEFT", own)?;
        let mut last: Array<_, u64> = Array::try_from(Map::Array(open(own, "LAST_LEFT")?))?;
        for protocol in 0..last.len() {
            last.set(protocol, clock::monotonic(), 0)?;
        }
        self.carry_table::<Tuple, u32>("DIRECT", own)
    }

    fn carry_table<K, V>(&self, name: &str, own: &Path) -> Result<()>
    where
        K: Layout + Pod + aya::Pod,
        V: Layout + Pod + aya::Pod,
    {
        let mut table: HashMap<_, K, V> = HashMap::try_from(Map::HashMap(open(own, name)?))?;
        self.each(name, |key, value| {
            put(&mut table, &key, &value, 0).map(drop)
        })
    }

    /// Makes up for what has become of flows since they were carried over, when the earlier programs have ended.
    ///
    /// # Errors
    /// The kernel refuses a read or an update.
    pub fn catch_up(&self, tables: &mut FlowTables) -> Result<()> {
        self.each("HALF_OPEN", |key: Tuple, flow: Flow| {
            if flow.state() & state::KEPT != 0 {
                return Ok(());
            }
            match tables.get(&key)? {
                Some(now) => proceed(tables, &key, &now, &flow),
                None => {
                    if put(&mut tables.half_open, &key, &flow, BPF_NOEXIST)? {
                        tables.usage.began(&flow);
                    }
                    Ok(())
                }
            }
        })?;
        self.each("FLOWS", |key: Tuple, flow: Flow| {
            if put(&mut tables.flows, &key, &flow, BPF_NOEXIST)? {
                tables.usage.kept(&flow);
                tables.shares.entered(flow.source(&key));
                if tables.half_open.get(&key, 0).is_err() {
                    tables.usage.began(&flow);
                }
                return Ok(());
            }
            match tables.get(&key)? {
                Some(now) => proceed(tables, &key, &now, &flow),
                None => Ok(()),
            }
        })
    }

    /// The pins.
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// Hands each entry of a table to `take`, as this version has it; nothing if there is none.
    ///
    /// # Errors
    /// Its keys lack a part, the kernel refuses the read, or `take` fails.
    fn each<K: Layout + Pod, V: Layout + Pod>(
        &self,
        name: &str,
        mut take: impl FnMut(K, V) -> Result<()>,
    ) -> Result<()> {
        let Some(table) = self.tables.get(name) else {
            return Ok(());
        };
        let keys = Copies::new(&table.key, K::FIELDS);
        let values = Copies::new(&table.value, V::FIELDS);
        if keys.0.len() < K::FIELDS.len() {
            bail!("keys of the earlier version's {name} have other parts");
        }
        let map = open(&self.pins, name)?;
        let info = map.info()?;
        let (key_size, value_size) = (info.key_size() as usize, info.value_size() as usize);
        if !within(&table.key, key_size) || !within(&table.value, value_size) {
            bail!("{name} of the earlier version is not as {FORMAT} says");
        }
        let mut token = None;
        loop {
            let slice = read(&map, key_size, value_size, &mut token)?;
            let entries = slice.0.chunks(key_size).zip(slice.1.chunks(value_size));
            for (key, value) in entries {
                take(keys.copy(key), values.copy(value))?;
            }
            if token.is_none() {
                return Ok(());
            }
        }
    }
}

fn open(pins: &Path, name: &str) -> Result<MapData> {
    let pin = pins.join(name);
    MapData::from_pin(&pin).with_context(|| format!("open {}", pin.display()))
}

/// Writes an entry. Returns whether it is there now as it was given: not if there was one that was not to be
/// overwritten, or no room.
fn put<K: aya::Pod, V: aya::Pod>(
    table: &mut HashMap<MapData, K, V>,
    key: &K,
    value: &V,
    flags: u64,
) -> Result<bool> {
    match table.insert(key, value, flags) {
        Err(error) if matches!(errno(&error), Some(libc::EEXIST | libc::E2BIG)) => Ok(false),
        written => written.map(|()| true).context("carry an entry over"),
    }
}

/// A flow that both versions have, as far as either has come with it.
fn proceed(tables: &mut FlowTables, key: &Tuple, now: &Flow, earlier: &Flow) -> Result<()> {
    let state = now.state() | earlier.state() & state::PROGRESS;
    let mut flow = *now;
    for direction in [ORIGINAL, REPLY] {
        let (now, earlier) = (flow.side_mut(direction), earlier.side(direction));
        if earlier.packets > now.packets {
            (now.acknowledged, now.sent) = (earlier.acknowledged, earlier.sent);
            (now.packets, now.bytes) = (earlier.packets, earlier.bytes);
        }
    }
    flow.set_state(state);
    if flow != *now {
        // RACE: what it carries at this moment it forgets to have carried.
        tables.set(key, &flow)?;
    }
    Ok(())
}

/// Where each part of an entry comes from, where it goes to, and how long it is.
struct Copies(Vec<(usize, usize, usize)>);

impl Copies {
    fn new(from: &[Field], to: &[layout::Field]) -> Self {
        let copies = to.iter().filter_map(|to| {
            let whole = |name: &str| {
                let same = |from: &&Field| from.name == name && from.size == to.size;
                from.iter().find(same).map(|from| from.offset)
            };
            let offset = whole(to.name).or_else(|| {
                // Of what each side has now, a flow had one, or an array of two.
                let (side, name) = to.name.split_once('.')?;
                let pair = |from: &&Field| from.name == name && from.size == 2 * to.size;
                let half = if side == "reply" { to.size } else { 0 };
                let of_pair = || Some(from.iter().find(pair)?.offset + half);
                whole(name).or_else(of_pair)
            })?;
            Some((offset, to.offset, to.size))
        });
        Self(copies.collect())
    }

    fn copy<T: Pod>(&self, from: &[u8]) -> T {
        let mut to = T::zeroed();
        let octets = bytemuck::bytes_of_mut(&mut to);
        for &(offset, at, size) in &self.0 {
            octets[at..at + size].copy_from_slice(&from[offset..offset + size]);
        }
        to
    }
}

fn within(fields: &[Field], size: usize) -> bool {
    let mut ends = fields
        .iter()
        .map(|field| field.offset.checked_add(field.size));
    ends.all(|end| end.is_some_and(|end| end <= size))
}

/// Reads a slice of keys and values, one behind the other. `token` is moved on, and is `None` at the end of the table.
fn read(
    map: &MapData,
    key_size: usize,
    value_size: usize,
    token: &mut Option<u32>,
) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut keys = vec![0; SLICE * key_size];
    let mut values = vec![0; SLICE * value_size.next_multiple_of(8)];
    // SAFETY: there is room for so many keys and values of the map's sizes.
    let count = unsafe { batch::lookup(map, keys.as_mut_ptr(), values.as_mut_ptr(), SLICE, token) };
    let count = count.context("read a table")?;
    keys.truncate(count * key_size);
    values.truncate(count * value_size);
    Ok((keys, values))
}

#[cfg(test)]
mod tests {
    use forwarder_common::flow::Side;

    use super::*;

    #[test]
    fn the_description_has_room() {
        let length = format().len();
        assert!(length <= LENGTH, "{length} octets");
    }

    #[test]
    fn a_part_is_read_as_a_list_and_as_an_object() {
        for text in [r#"["sent",8,4]"#, r#"{"name":"sent","offset":8,"size":4}"#] {
            let field: Field = serde_json::from_str(text).unwrap();
            assert_eq!(
                (field.name.as_str(), field.offset, field.size),
                ("sent", 8, 4)
            );
        }
    }

    #[test]
    fn what_a_flow_had_once_or_in_pairs_each_side_has() {
        let field = |name: &str, offset, size| Field {
            name: name.into(),
            offset,
            size,
        };
        let from = [
            field("last_seen", 0, 8),
            field("sent", 8, 8),
            field("packets", 16, 16),
            field("state", 32, 4),
        ];
        let mut octets = [0; 36];
        for (at, number) in [(0, 11), (8, 12), (12, 13), (16, 14), (24, 15), (32, 16)] {
            octets[at] = number;
        }
        let flow: Flow = Copies::new(&from, Flow::FIELDS).copy(&octets);
        let numbers = |side: &Side| (side.last_seen, side.sent, side.packets, side.state);
        assert_eq!(numbers(&flow.original), (11, 12, 14, 16));
        assert_eq!(numbers(&flow.reply), (11, 13, 15, 16));
    }
}
