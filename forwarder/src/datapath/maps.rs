//! The BPF maps seen from user space: typed access, and nothing decided. Together with `datapath.rs`
//! the only user of `aya`.

mod bans;
mod batch;
pub mod earlier;
mod flows;
mod install;
mod left;
mod limits;
mod memory;
mod mirror;
mod shares;
mod usage;

use std::{collections::BTreeMap, os::fd::RawFd, path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{
        Array, HashMap, LpmTrie, MapData, MapError, PerCpuArray, PerCpuHashMap, ProgramArray,
        SockHash,
        lpm_trie::{Key, LpmTrie as Trie},
    },
    programs::ProgramFd,
};
use forwarder_common::{
    limits as sizes,
    policy::{Limits, Policy},
    publish::{
        FILTER_WORDS, Frontend, Interface, Location, Port, Publish, PublishSource, filter_bit,
    },
    reason::Reason,
    tuple::Address,
    usage::Refused,
};
use ipnet::IpNet;

use self::{
    bans::Bans,
    install::{Network, Wanted},
    mirror::{Mirror, Table},
};
pub use self::{
    bans::covers,
    flows::{FlowTables, Walk},
    install::Installed,
    left::Left,
    shares::{Count, Shares},
    usage::{FlowCount, Mapped, REFUSALS, RefusedCounters, Usage},
};

const SOCKETS: Table = Table {
    name: "SOCKETS",
    holds: "sockets of wide ranges",
    size: sizes::SOCKETS,
};
const INTERFACES: Table = Table {
    name: "INTERFACES",
    holds: "devices",
    size: sizes::INTERFACES,
};
const ROUTE_MTUS: Table = Table {
    name: "ROUTE_MTUS",
    holds: "routes with an MTU",
    size: sizes::ROUTE_MTUS,
};
const LOCATIONS: Table = Table {
    name: "LOCATIONS",
    holds: "addresses of this host and of containers",
    size: sizes::LOCATIONS,
};

/// All maps that user space touches.
pub struct Maps {
    ports: Mirror<Array<MapData, Port>, u32, Wanted>,
    frontends: Mirror<HashMap<MapData, Frontend, u32>, Frontend, u32>,
    publishes: Mirror<Array<MapData, Publish>, u32, Publish>,
    backends: Mirror<HashMap<MapData, Address, u32>, Address, u32>,
    allow: Mirror<Trie<MapData, PublishSource, u32>, Network, u32>,
    limits: Mirror<HashMap<MapData, u32, Policy>, u32, Policy>,
    /// As they were asked for.
    limited: BTreeMap<u32, Limits>,
    bans: Bans,
    installed: BTreeMap<u32, Installed>,
    /// Those whose ports could not be taken from them.
    leaving: BTreeMap<u32, Installed>,
    interfaces: HashMap<MapData, u32, Interface>,
    several_uplinks: Array<MapData, u32>,
    forbidding: Array<MapData, u32>,
    route_mtus: Mirror<Trie<MapData, PublishSource, u32>, Network, u32>,
    locations: Trie<MapData, Address, Location>,
    /// What was written there.
    located: BTreeMap<IpNet, Location>,
    local_filter: Array<MapData, u64>,
    filter: Vec<u64>,
    pub flows: FlowTables,
    pub left: Left,
    sockets: SockHash<MapData, u32>,
    pipeline: ProgramArray<MapData>,
    stats: Arc<Counters>,
    usage: Arc<Mapped>,
    refused: PerCpuHashMap<MapData, Refused, u64>,
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Maps")
    }
}

impl Maps {
    /// Takes the maps out of a loaded object.
    ///
    /// # Errors
    /// The object is not ours: a map is missing or of another type.
    pub fn take(ebpf: &mut Ebpf) -> Result<Self> {
        let mut map = |name: &str| {
            ebpf.take_map(name)
                .with_context(|| format!("the eBPF object has no map {name}"))
        };
        let usage = Arc::new(Mapped::new(Array::try_from(map("USAGE")?)?)?);
        let (shares, keys) = (
            Array::try_from(map("SHARES")?)?,
            Array::try_from(map("KEYS")?)?,
        );
        let shares = Shares::new(shares, keys)?;
        Ok(Self {
            ports: Mirror::new(install::PORTS, Array::try_from(map("PORTS")?)?),
            frontends: Mirror::new(install::FRONTENDS, HashMap::try_from(map("FRONTENDS")?)?),
            publishes: Mirror::new(install::PUBLISHES, Array::try_from(map("PUBLISHES")?)?),
            backends: Mirror::new(install::BACKENDS, HashMap::try_from(map("BACKENDS")?)?),
            allow: Mirror::new(install::ALLOW, LpmTrie::try_from(map("ALLOW")?)?),
            limits: Mirror::new(limits::LIMITS, HashMap::try_from(map("LIMITS")?)?),
            bans: Bans {
                kinds: Array::try_from(map("BANS")?)?,
                addresses: HashMap::try_from(map("BANNED")?)?,
                networks: Mirror::new(
                    bans::BANNED_NETWORKS,
                    LpmTrie::try_from(map("BANNED_NETWORKS")?)?,
                ),
                wanted: BTreeMap::new(),
                of: BTreeMap::new(),
            },
            limited: BTreeMap::new(),
            installed: BTreeMap::new(),
            leaving: BTreeMap::new(),
            interfaces: HashMap::try_from(map("INTERFACES")?)?,
            several_uplinks: Array::try_from(map("SEVERAL_UPLINKS")?)?,
            forbidding: Array::try_from(map("FORBIDDING")?)?,
            route_mtus: Mirror::new(ROUTE_MTUS, LpmTrie::try_from(map("ROUTE_MTUS")?)?),
            locations: LpmTrie::try_from(map("LOCATIONS")?)?,
            located: BTreeMap::new(),
            local_filter: Array::try_from(map("LOCAL_FILTER")?)?,
            filter: vec![0; FILTER_WORDS as usize],
            flows: FlowTables {
                flows: HashMap::try_from(map("FLOWS")?)?,
                half_open: HashMap::try_from(map("HALF_OPEN")?)?,
                claims: HashMap::try_from(map("CLAIMS")?)?,
                usage: usage.clone(),
                shares: Arc::new(shares),
            },
            left: Left::new(
                HashMap::try_from(map("LEFT")?)?,
                Array::try_from(map("LAST_LEFT")?)?,
            ),
            sockets: SockHash::try_from(map("SOCKETS")?)?,
            pipeline: ProgramArray::try_from(map("PIPELINE")?)?,
            stats: Arc::new(Counters(PerCpuArray::try_from(map("STATS")?)?)),
            usage,
            refused: PerCpuHashMap::try_from(map("REFUSED")?)?,
        })
    }

    /// Chooses the program that `ingress_l3` hands packets to.
    ///
    /// # Errors
    /// The kernel refuses the update.
    pub fn set_pipeline(&mut self, program: &ProgramFd) -> Result<()> {
        self.pipeline.set(0, program, 0).context("write PIPELINE")
    }

    /// Puts a socket into the map, which forgets it when it is closed.
    ///
    /// # Errors
    /// The map is full, or the kernel refuses the socket.
    pub fn set_socket(&mut self, index: u32, socket: RawFd) -> Result<()> {
        Ok(SOCKETS.wrote(self.sockets.insert(index, socket, 0))?)
    }

    /// How packets leave by a device; `None` makes it an uplink that takes packets of any length.
    ///
    /// # Errors
    /// The map is full, or the kernel refuses the update.
    pub fn set_interface(&mut self, ifindex: u32, interface: Option<Interface>) -> Result<()> {
        let written = match interface {
            Some(interface) => self.interfaces.insert(ifindex, interface, 0),
            None => ignore_missing(self.interfaces.remove(&ifindex)),
        };
        Ok(INTERFACES.wrote(written)?)
    }

    /// Says whether this host has several uplinks, by bits of [`forwarder_common::publish::uplinks`].
    ///
    /// # Errors
    /// The kernel refuses the update.
    pub fn set_uplinks(&mut self, bits: u32) -> Result<()> {
        let set = self.several_uplinks.set(0, bits, 0);
        set.context("write SEVERAL_UPLINKS")
    }

    /// Says whether a route or a rule of this host may forbid the way to a client.
    ///
    /// # Errors
    /// The kernel refuses the update.
    pub fn set_forbidding(&mut self, forbidding: bool) -> Result<()> {
        let set = self.forbidding.set(0, u32::from(forbidding), 0);
        set.context("write FORBIDDING")
    }

    /// Says how long packets may be that leave by a device to a network.
    ///
    /// # Errors
    /// The kernel refuses the update.
    pub fn set_route_mtus(&mut self, new: BTreeMap<(u32, IpNet), u32>) -> Result<()> {
        self.route_mtus.change_all(new);
        Ok(self.route_mtus.flush()?)
    }

    /// Says what addresses are behind: changes only what differs from what the maps have. After a failure the rest is made up
    /// for by the next call.
    ///
    /// # Errors
    /// The map is full, or the kernel refuses the update.
    pub fn set_locations(&mut self, new: &BTreeMap<IpNet, Location>) -> Result<()> {
        let key = |prefix: &IpNet| Key::new(key_length(*prefix), prefix.network().into());
        for (&prefix, &location) in new {
            if self.located.get(&prefix) != Some(&location) {
                LOCATIONS.wrote(self.locations.insert(&key(&prefix), location, 0))?;
                self.located.insert(prefix, location);
            }
        }
        let gone = self
            .located
            .keys()
            .filter(|prefix| !new.contains_key(prefix));
        for prefix in gone.copied().collect::<Vec<_>>() {
            LOCATIONS.wrote(ignore_missing(self.locations.remove(&key(&prefix))))?;
            self.located.remove(&prefix);
        }
        for (index, word) in (0..).zip(filter(new)) {
            if self.filter[index as usize] != word {
                let set = self.local_filter.set(index, word, 0);
                set.context("write LOCAL_FILTER")?;
                self.filter[index as usize] = word;
            }
        }
        Ok(())
    }

    /// The counters, for whoever reads them at any time.
    pub fn counters(&self) -> Arc<Counters> {
        self.stats.clone()
    }

    /// Packets by reason, summed over CPUs.
    ///
    /// # Errors
    /// The kernel refuses the read.
    pub fn stats(&self) -> Result<Vec<(Reason, u64)>> {
        self.stats.all()
    }
}

/// Packets by reason.
pub struct Counters(PerCpuArray<MapData, u64>);

impl std::fmt::Debug for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counters")
    }
}

impl Counters {
    /// Summed over CPUs.
    ///
    /// # Errors
    /// The kernel refuses the read.
    pub fn all(&self) -> Result<Vec<(Reason, u64)>> {
        let counter = |&reason: &Reason| {
            let counters = self.0.get(&(reason as u32), 0).context("read STATS")?;
            Ok((reason, counters.iter().sum()))
        };
        Reason::ALL.iter().map(counter).collect()
    }
}

/// How many entries a pinned table has room for; `None` if there is none.
pub fn room(pin: &Path) -> Option<u32> {
    Some(MapData::from_pin(pin).ok()?.info().ok()?.max_entries())
}

/// The words of `LOCAL_FILTER`: a bit for each of this host's addresses, and all of them where it has whole prefixes.
fn filter(locations: &BTreeMap<IpNet, Location>) -> Vec<u64> {
    let mut words = vec![0; FILTER_WORDS as usize];
    let here = locations.iter().filter(|(_, l)| **l == Location::HERE);
    for (prefix, _) in here {
        if prefix.prefix_len() < prefix.max_prefix_len() {
            words.fill(u64::MAX);
            break;
        }
        let (index, bit) = filter_bit(&prefix.addr().into());
        words[index as usize] |= bit;
    }
    words
}

/// The length of a prefix of [`Address`]es, among which IPv4 ones are mapped (RFC 4291 section 2.5.5.2).
fn key_length(network: IpNet) -> u32 {
    match network {
        IpNet::V4(v4) => 96 + u32::from(v4.prefix_len()),
        IpNet::V6(v6) => u32::from(v6.prefix_len()),
    }
}

fn ignore_missing(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(error) if mirror::errno(&error) == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}
