//! What an instance has pinned, laid out as another version might have it: other places, a part that this one has not, a
//! table that it does not know.

#![expect(unsafe_code, reason = "bpf(2) calls that aya does not have")]

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::maps::{Array, MapData};
use serde_json::{Value, json};

/// Commands of bpf(2) (include/uapi/linux/bpf.h).
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const FORMAT: &str = "FORMAT";
const LENGTH: usize = 4096;

/// Lays out anew what is in an instance's folder, while nothing else uses it. Returns where it is then.
///
/// # Errors
/// The instance has pinned no tables, or the kernel refuses one.
pub fn lay_out_otherwise(pins: &Path) -> Result<PathBuf> {
    let left = fs::read_dir(pins)?.next().context("nothing is pinned")??;
    let other = pins.join("other");
    fs::rename(left.path(), &other)?;
    let format = aya::maps::Map::Array(MapData::from_pin(other.join(FORMAT))?);
    let format: Array<_, [u8; LENGTH]> = Array::try_from(format)?;
    let text = format.get(&0, 0)?;
    let text = text.split(|octet| *octet == 0).next().unwrap_or_default();
    let mut tables: Value = serde_json::from_slice(text)?;
    let all = tables.as_object_mut().context("no tables")?;
    for (name, table) in all.iter_mut() {
        let pin = other.join(name);
        let from = MapData::from_pin(&pin)?;
        let key = Parts::backwards(&mut table["key"], false)?;
        let value = Parts::backwards(&mut table["value"], true)?;
        let to = made_like(&from, name, key.size, value.size)?;
        copy(&from, &to, &key, &value)?;
        fs::remove_file(&pin)?;
        to.pin(&pin)?;
    }
    all.insert("UNHEARD".into(), json!({"key": [], "value": []}));
    let mut octets = [0; LENGTH];
    let text = tables.to_string();
    octets[..text.len()].copy_from_slice(text.as_bytes());
    let mut format: Array<_, [u8; LENGTH]> = Array::create(1, 0)?;
    format.set(0, octets, 0)?;
    fs::remove_file(other.join(FORMAT))?;
    format.pin(other.join(FORMAT))?;
    Ok(other)
}

/// Where the parts of a key or value were, where they go, and how long they are.
struct Parts {
    moves: Vec<(usize, usize, usize)>,
    before: usize,
    size: usize,
}

impl Parts {
    /// The last comes first, and perhaps one that nobody knows before it.
    fn backwards(parts: &mut Value, with_unknown: bool) -> Result<Self> {
        let parts = parts.as_array_mut().context("no parts")?;
        parts.reverse();
        let (mut moves, mut before) = (Vec::new(), 0);
        let mut at = if with_unknown { 8 } else { 0 };
        for part in &mut *parts {
            let number = |at: usize| part[at].as_u64().map(|it| it as usize);
            let (offset, size) = number(1).zip(number(2)).context("no place")?;
            moves.push((offset, at, size));
            part[1] = at.into();
            before = before.max(offset + size);
            at += size;
        }
        if with_unknown {
            parts.push(json!(["unheard", 0, 8]));
        }
        Ok(Self {
            moves,
            before,
            size: at,
        })
    }

    fn moved(&self, from: &[u8]) -> Vec<u8> {
        let mut to = vec![0xa5; self.size];
        for &(offset, at, size) in &self.moves {
            to[at..at + size].copy_from_slice(&from[offset..offset + size]);
        }
        to
    }
}

fn made_like(from: &MapData, name: &str, key: usize, value: usize) -> Result<MapData> {
    const BPF_F_MMAPABLE: u32 = 1 << 10;
    let info = from.info()?;
    let map = aya_obj::Map::new_from_params(
        info.map_type()? as u32,
        key as u32,
        value as u32,
        info.max_entries(),
        info.map_flags() & !BPF_F_MMAPABLE,
    );
    Ok(MapData::create(map, name, None)?)
}

fn copy(from: &MapData, to: &MapData, key: &Parts, value: &Parts) -> Result<()> {
    let mut at: Option<Vec<u8>> = None;
    loop {
        let mut next = vec![0; key.before];
        // SAFETY: keys and values of the maps' sizes, here and below.
        let found = unsafe { entry(BPF_MAP_GET_NEXT_KEY, from, at.as_deref(), &mut next) };
        match found {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            result => result?,
        }
        let mut found = vec![0; value.before];
        // SAFETY: as above.
        unsafe { entry(BPF_MAP_LOOKUP_ELEM, from, Some(&next), &mut found) }?;
        let (new_key, mut new_value) = (key.moved(&next), value.moved(&found));
        // SAFETY: as above.
        unsafe { entry(BPF_MAP_UPDATE_ELEM, to, Some(&new_key), &mut new_value) }?;
        at = Some(next);
    }
}

/// A command on one entry: `other` is its value or the next key.
///
/// # Safety
/// Both are as long as the map's keys and values.
unsafe fn entry(
    command: libc::c_long,
    map: &MapData,
    key: Option<&[u8]>,
    other: &mut [u8],
) -> io::Result<()> {
    let fd = map.fd().as_fd().as_raw_fd() as u64;
    let key = key.map_or(0, |key| key.as_ptr() as u64);
    let attributes = [fd, key, other.as_mut_ptr() as u64, 0];
    // SAFETY: as the caller says.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), 32) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
