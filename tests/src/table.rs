//! Tables of an instance: that of flows, filled as no traffic could in a test's time, and others that take nothing more.

#![expect(unsafe_code, reason = "bpf(2) on many elements at once")]

use std::{
    ffi::CString,
    fs, io,
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{HashMap, LpmTrie, MapData, lpm_trie::Key};
use forwarder_common::{
    flow::Flow,
    publish::{Frontend, Location},
    tuple::{Address, Tuple},
};

/// Commands of bpf(2) (include/uapi/linux/bpf.h).
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_MAP_FREEZE: libc::c_long = 22;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;

/// `FLOWS` of a running instance.
#[derive(Debug)]
pub struct Table(OwnedFd);

impl Table {
    /// # Errors
    /// The instance has pinned no such table.
    pub fn open(instance: &str) -> Result<Self> {
        let path = pin(instance)?;
        let path = CString::new(path.into_os_string().into_encoded_bytes())?;
        let attributes = [path.as_ptr() as u64, 0];
        // SAFETY: the path is a C string that lives until the call returns.
        let fd = unsafe { bpf(BPF_OBJ_GET, attributes.as_ptr().cast(), 16) }?;
        // SAFETY: the kernel has just given this descriptor to us alone.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Puts an empty table in place of the one that an instance has left, which its next start takes.
    ///
    /// # Errors
    /// The instance has pinned no table, or the kernel refuses one.
    pub fn replace(instance: &str, flows: u32) -> Result<()> {
        let pin = pin(instance)?;
        let info = MapData::from_pin(&pin)?.info()?;
        let map = aya_obj::Map::new_from_params(
            info.map_type()? as u32,
            info.key_size(),
            info.value_size(),
            flows,
            info.map_flags(),
        );
        let map = MapData::create(map, "FLOWS", None)?;
        fs::remove_file(&pin)?;
        map.pin(&pin)?;
        Ok(())
    }

    /// Writes flows over what is there; returns how many there was room for.
    ///
    /// # Errors
    /// Another than that the table is full.
    pub fn write(&self, keys: &[Tuple], flows: &[Flow]) -> Result<usize> {
        assert_eq!(keys.len(), flows.len());
        let fd = self.0.as_raw_fd() as u64;
        let mut attributes = [
            0,
            0,
            keys.as_ptr() as u64,
            flows.as_ptr() as u64,
            keys.len() as u64 | fd << 32,
            0,
            0,
        ];
        // SAFETY: the kernel reads as many keys and values as there are, and writes how many it took.
        let result = unsafe { bpf(BPF_MAP_UPDATE_BATCH, attributes.as_mut_ptr().cast(), 56) };
        match result {
            Err(error) if error.raw_os_error() != Some(libc::E2BIG) => Err(error)?,
            _ => Ok(attributes[4] as u32 as usize),
        }
    }

    /// Whether there is a flow with this key.
    pub fn has(&self, key: &Tuple) -> bool {
        let mut flow = std::mem::MaybeUninit::<Flow>::uninit();
        let attributes = [
            self.0.as_raw_fd() as u64,
            &raw const *key as u64,
            flow.as_mut_ptr() as u64,
            0,
        ];
        // SAFETY: the kernel reads a key and writes a value of the table's types.
        unsafe { bpf(BPF_MAP_LOOKUP_ELEM, attributes.as_ptr().cast(), 32) }.is_ok()
    }
}

/// Ports of addresses that nobody has, in all the room of `FRONTENDS` that is left, until this is dropped.
#[derive(Debug)]
pub struct FullFrontends(HashMap<MapData, Frontend, u32>, Vec<Frontend>);

impl FullFrontends {
    /// # Errors
    /// The process has no such table, or it takes nothing at all.
    pub fn fill(pid: u32) -> Result<Self> {
        let map = held(pid, "FRONTENDS")?;
        let most = map.info()?.max_entries();
        let map = HashMap::try_from(aya::maps::Map::HashMap(map))?;
        let mut full = Self(map, Vec::new());
        for number in 0..=most {
            let frontend = Frontend {
                address: Address::from_v4(u32::to_be(number)), // 0.0.0.0/8 and the like
                port: 0,
                protocol: 0,
            };
            match full.0.insert(frontend, 1, 0) {
                Ok(()) => full.1.push(frontend),
                Err(_) if !full.1.is_empty() => return Ok(full),
                Err(error) => Err(error)?,
            }
        }
        bail!("FRONTENDS takes more than {most}")
    }
}

impl Drop for FullFrontends {
    fn drop(&mut self) {
        for frontend in &self.1 {
            let _ = self.0.remove(frontend);
        }
    }
}

/// Has the kernel refuse whatever a process would write to some of another one's tables, for good.
///
/// # Errors
/// The other has no such tables, or the kernel does not do that.
pub fn freeze(pid: u32, tables: &[&str]) -> Result<()> {
    for table in tables {
        let map = held(pid, table)?;
        let attributes = [map.fd().as_fd().as_raw_fd() as u64];
        // SAFETY: the kernel reads the descriptor.
        unsafe { bpf(BPF_MAP_FREEZE, attributes.as_ptr().cast(), 4) }
            .with_context(|| format!("freeze {table}"))?;
    }
    Ok(())
}

/// The device by which the best route leads to another machine, as a process has told the program, which cannot ask on its host.
///
/// # Errors
/// The process has no such table, or it says nothing of the address.
pub fn way_to(pid: u32, address: IpAddr) -> Result<u32> {
    let map = aya::maps::Map::LpmTrie(held(pid, "LOCATIONS")?);
    let map: LpmTrie<_, Address, Location> = LpmTrie::try_from(map)?;
    Ok(map.get(&Key::new(128, address.into()), 0)?.device)
}

/// A table that a process holds.
fn held(pid: u32, table: &str) -> Result<MapData> {
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor that was closed meanwhile is none.
        let information = fs::read_to_string(entry?.path()).unwrap_or_default();
        let mut lines = information.lines();
        let id = lines.find_map(|line| line.strip_prefix("map_id:"));
        if let Some(id) = id
            && let Ok(map) = MapData::from_id(id.trim().parse()?)
            && map.info()?.name_as_str() == Some(table)
        {
            return Ok(map);
        }
    }
    bail!("no {table}")
}

/// Where an instance has pinned its table of flows.
fn pin(instance: &str) -> Result<PathBuf> {
    let folder = Path::new("/sys/fs/bpf/forwarder").join(instance.replace('.', "%"));
    let layouts = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut pins = layouts.flatten().map(|it| it.path().join("FLOWS"));
    pins.find(|path| path.exists()).context("no pinned FLOWS")
}

/// # Safety
/// The attributes are of that size and what the command reads and writes.
unsafe fn bpf(
    command: libc::c_long,
    attributes: *const libc::c_void,
    size: usize,
) -> io::Result<i32> {
    // SAFETY: as the caller says.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}
