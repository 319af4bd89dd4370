//! The one door into the kernel for a publish: everything that the tables have of it, written in an order in which no packet meets
//! half of it, and undone in reverse.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Result, bail};
use aya::maps::{
    Array, HashMap, MapData, MapError,
    lpm_trie::{Key, LpmTrie},
};
use forwarder_common::{
    limits,
    publish::{Frontend, Port, Publish, PublishSource, allow, flag, port_index},
    tuple::Address,
};
use ipnet::{IpNet, Ipv4Net};

use super::{
    Maps,
    bans::{has_mapped, plain},
    ignore_missing, key_length,
    mirror::{Store, Table, TableError},
};

/// Everything that the kernel has of a publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    pub entry: Publish,
    /// Its addresses, each all of its family if it is unspecified.
    pub frontends: Vec<IpAddr>,
    /// IANA protocol number.
    pub protocol: u8,
    /// First and last port.
    pub ports: (u16, u16),
    pub backend: IpAddr,
    /// First and last port there.
    pub backend_ports: (u16, u16),
    /// The allow-list. It counts if the entry's flags say so.
    pub allow: Vec<IpNet>,
}

impl Installed {
    /// Elements of `PORTS`, with the addresses published there.
    fn elements(&self) -> impl Iterator<Item = (u32, u16)> {
        let protocol = self.protocol;
        (self.ports.0..=self.ports.1)
            .filter_map(move |port| Some((port_index(protocol, port)?, port)))
    }

    fn backend_elements(&self) -> impl Iterator<Item = u32> {
        let protocol = self.protocol;
        (self.backend_ports.0..=self.backend_ports.1)
            .filter_map(move |port| port_index(protocol, port))
    }

    fn has(&self, address: IpAddr, protocol: u8, port: u16) -> bool {
        self.protocol == protocol
            && (self.ports.0..=self.ports.1).contains(&port)
            && self.frontends.contains(&address)
    }
}

pub(super) const PORTS: Table = Table {
    name: "PORTS",
    holds: "ports",
    size: forwarder_common::publish::PORTS_PER_PROTOCOL * forwarder_common::publish::PROTOCOLS,
};
pub(super) const FRONTENDS: Table = Table {
    name: "FRONTENDS",
    holds: "ports published on one address",
    size: limits::FRONTENDS,
};
pub(super) const PUBLISHES: Table = Table {
    name: "PUBLISHES",
    holds: "publishes",
    size: limits::PUBLISHES,
};
pub(super) const BACKENDS: Table = Table {
    name: "BACKENDS",
    holds: "backends' addresses",
    size: limits::BACKENDS,
};
pub(super) const ALLOW: Table = Table {
    name: "ALLOW",
    holds: "networks of all allow-lists",
    size: limits::ALLOW,
};

/// What is wanted of an element of `PORTS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    every_v4: u16,
    every_v6: u16,
    exact: u32,
    backends: u32,
}

impl From<Wanted> for Port {
    fn from(wanted: Wanted) -> Self {
        let count = |count: u32| u16::try_from(count).unwrap_or(u16::MAX); // 0 or not is what counts
        Self {
            every_v4: wanted.every_v4,
            every_v6: wanted.every_v6,
            exact: count(wanted.exact),
            backends: count(wanted.backends),
        }
    }
}

impl Store<u32, Wanted> for Array<MapData, Port> {
    fn write(&mut self, key: &u32, value: &Wanted) -> Result<(), MapError> {
        self.set(*key, Port::from(*value), 0)
    }
}

impl Store<u32, Publish> for Array<MapData, Publish> {
    fn write(&mut self, key: &u32, value: &Publish) -> Result<(), MapError> {
        self.set(*key, value, 0)
    }
}

impl<K: aya::Pod, V: aya::Pod + Default + PartialEq> Store<K, V> for HashMap<MapData, K, V> {
    fn write(&mut self, key: &K, value: &V) -> Result<(), MapError> {
        if *value == V::default() {
            ignore_missing(self.remove(key))
        } else {
            self.insert(key, value, 0)
        }
    }
}

/// A publish, and a network that its clients may or may not be from.
pub(super) type Network = (u32, IpNet);

/// As a key of the tries.
pub(super) fn trie_key((publish, network): Network) -> Key<PublishSource> {
    let data = PublishSource {
        publish: publish.to_be(),
        source: network.network().into(),
    };
    Key::new(32 + key_length(network), data)
}

impl Store<Network, u32> for LpmTrie<MapData, PublishSource, u32> {
    fn write(&mut self, network: &Network, value: &u32) -> Result<(), MapError> {
        let key = trie_key(*network);
        if *value == 0 {
            ignore_missing(self.remove(&key))
        } else {
            self.insert(&key, value, 0)
        }
    }
}

impl Maps {
    /// Writes everything of a publish, or puts it in place of what there was under its number: its ports are never closed
    /// for that. A failure changes nothing.
    ///
    /// # Errors
    /// The first one, which names the table; or an earlier publish of that number could not be removed.
    pub fn install(&mut self, index: u32, new: &Installed) -> Result<()> {
        if let Some(gone) = self.leaving.get(&index).cloned() {
            if (self.take_back(index, &gone, None, Publish::default())).is_err() {
                bail!("the publish that had number {index} could not be removed yet");
            }
            self.leaving.remove(&index);
        }
        let old = self.installed.get(&index).cloned();
        if old.as_ref() == Some(new) {
            return Ok(());
        }
        let before = self.publishes.get(&index);
        if let Err(error) = self.put(index, new) {
            let undone = self.take_back(index, new, old.as_ref(), before);
            if undone.is_err() && old.is_none() {
                self.leaving.insert(index, new.clone());
            }
            return Err(error.into());
        }
        self.installed.insert(index, new.clone());
        if let Some(old) = old {
            // What of this fails is written by a later change; no packet meets it but with the new entry.
            let entry = self.publishes.get(&index);
            let _ = self.take_back(index, &old, Some(new), entry);
        }
        Ok(())
    }

    /// Removes everything of a publish, and goes on past errors. While a port cannot be taken from it, its entry stays, and
    /// its number is not free: the next call tries again.
    ///
    /// # Errors
    /// The first one.
    pub fn uninstall(&mut self, index: u32) -> Result<()> {
        let installed = self.installed.remove(&index);
        let Some(gone) = installed.or_else(|| self.leaving.remove(&index)) else {
            return self.free(index);
        };
        match self.take_back(index, &gone, None, Publish::default()) {
            Ok(result) => self.free(index).and(Ok(result?)),
            Err(error) => {
                self.leaving.insert(index, gone);
                Err(error.into())
            }
        }
    }

    /// Takes back what may be there of a publish before it is installed, and after.
    fn free(&mut self, index: u32) -> Result<()> {
        let unlimited = self.unlimit(index);
        self.unban_all_of(index).and(Ok(unlimited?))
    }

    /// The bits of a publish that is installed.
    pub fn flags(&self, index: u32) -> Option<u16> {
        let is_there = self.installed.contains_key(&index);
        is_there.then(|| self.publishes.get(&index).flags)
    }

    /// What the kernel has of a publish.
    pub fn installed(&self, index: u32) -> Option<&Installed> {
        self.installed.get(&index)
    }

    /// Has the ports that two publishes share lead to the second of them, until the first is written again.
    ///
    /// # Errors
    /// The kernel refuses the update.
    pub fn hand_back(&mut self, from: u32, to: u32) -> Result<()> {
        let [Some(from), Some(old)] = [from, to].map(|index| self.installed.get(&index).cloned())
        else {
            return Ok(());
        };
        for (element, port) in old.elements() {
            for &address in &old.frontends {
                if from.has(address, old.protocol, port) {
                    self.point(to, address, old.protocol, (element, port), true);
                }
            }
        }
        Ok(self.frontends.flush().and(self.ports.flush())?)
    }

    /// Writes a publish's entry alone.
    ///
    /// # Errors
    /// The kernel refuses the update.
    pub fn set_publish(&mut self, index: u32, entry: &Publish) -> Result<()> {
        let entry = self.marked(index, entry);
        self.publishes.change(index, |there| *there = entry);
        Ok(self.publishes.flush()?)
    }

    fn put(&mut self, index: u32, new: &Installed) -> Result<(), TableError> {
        self.count(new, |count| *count += 1);
        for (network, value) in allowed(&new.allow) {
            self.allow.change((index, network), |it| *it = value);
        }
        self.allow.flush()?;
        let entry = self.marked(index, &new.entry);
        self.publishes.change(index, |there| *there = entry);
        self.publishes.flush()?;
        self.backends.flush()?;
        self.ports.flush()?;
        // The ports of what drains lead to its successor.
        let takes_ports = new.entry.flags & flag::DRAINING == 0;
        for (element, port) in new.elements().filter(|_| takes_ports) {
            for &address in &new.frontends {
                self.point(index, address, new.protocol, (element, port), true);
            }
        }
        self.frontends.flush()?;
        self.ports.flush()
    }

    /// Takes back what `gone` has and `stays` has not, and leaves `entry`. Without `stays`, the outer error means that the
    /// ports still lead there and nothing else was touched.
    fn take_back(
        &mut self,
        index: u32,
        gone: &Installed,
        stays: Option<&Installed>,
        entry: Publish,
    ) -> Result<Result<(), TableError>, TableError> {
        for (element, port) in gone.elements() {
            for &address in &gone.frontends {
                let kept = stays.is_some_and(|stays| stays.has(address, gone.protocol, port));
                if !kept {
                    self.point(index, address, gone.protocol, (element, port), false);
                }
            }
        }
        let closed = self.ports.flush().and(self.frontends.flush());
        if stays.is_none() {
            closed?;
        }
        self.count(gone, |count| *count = count.saturating_sub(1));
        let ports = self.ports.flush();
        let backends = self.backends.flush();
        self.publishes.change(index, |there| *there = entry);
        let publishes = self.publishes.flush();
        let stay = stays.map_or_else(BTreeMap::new, |stays| allowed(&stays.allow));
        for network in allowed(&gone.allow).into_keys() {
            let value = stay.get(&network).copied().unwrap_or_default();
            self.allow.change((index, network), |it| *it = value);
        }
        let allow = self.allow.flush();
        Ok(ports.and(backends).and(publishes).and(allow))
    }

    /// Counts the backend's address and ports.
    fn count(&mut self, installed: &Installed, change: impl Fn(&mut u32)) {
        self.backends.change(installed.backend.into(), &change);
        for element in installed.backend_elements() {
            self.ports
                .change(element, |wanted| change(&mut wanted.backends));
        }
    }

    /// Points a port of an address at a publish, or takes it from that one.
    fn point(
        &mut self,
        index: u32,
        address: IpAddr,
        protocol: u8,
        (element, port): (u32, u16),
        on: bool,
    ) {
        let change = |there: &mut u32| {
            if on {
                *there = index;
            } else if *there == index {
                *there = 0;
            }
        };
        if address.is_unspecified() {
            self.ports.change(element, |wanted| {
                let every = if address.is_ipv4() {
                    &mut wanted.every_v4
                } else {
                    &mut wanted.every_v6
                };
                let mut there = u32::from(*every);
                change(&mut there);
                *every = u16::try_from(there).unwrap_or(0); // there are no more publishes
            });
            return;
        }
        let key = Frontend {
            address: Address::from(address),
            port: port.to_be(),
            protocol: protocol.into(),
        };
        let before = self.frontends.get(&key) != 0;
        self.frontends.change(key, change);
        let after = self.frontends.get(&key) != 0;
        self.ports.change(element, |wanted| match (before, after) {
            (false, true) => wanted.exact += 1,
            (true, false) => wanted.exact -= 1,
            _ => {}
        });
    }
}

/// What the trie has of an allow-list: its networks, and if one of them would have all of IPv4 in it, that this is not meant.
fn allowed(list: &[IpNet]) -> BTreeMap<IpNet, u32> {
    let all_v4 = IpNet::from(Ipv4Net::default());
    let exception = list.iter().any(|network| has_mapped(*network));
    let exception = exception.then_some((all_v4, allow::NO));
    let networks = list.iter().map(|network| (plain(*network), allow::YES));
    exception.into_iter().chain(networks).collect()
}
