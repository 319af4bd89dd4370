//! Bans: addresses in a hash table, networks in a trie. Which bans are wanted, and until when, is decided elsewhere.

#![expect(unsafe_code, reason = "bpf(2) on many elements at once")]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, IterableMap as _, MapData, MapError, lpm_trie::LpmTrie};
use forwarder_common::{
    limits,
    publish::{PublishSource, ban},
};
use ipnet::{IpNet, Ipv4Net};

use super::{
    Maps,
    batch::{Batch, Command},
    ignore_missing,
    install::{Network, trie_key},
    mirror::{Mirror, Store, Table},
};

const BANNED: Table = Table {
    name: "BANNED",
    holds: "banned addresses",
    size: limits::BANNED,
};
pub(super) const BANNED_NETWORKS: Table = Table {
    name: "BANNED_NETWORKS",
    holds: "banned networks",
    size: limits::BANNED_NETWORKS,
};

/// Entries written by one system call: about a millisecond.
const SLICE: usize = 4096;

/// A value that is in the past: no ban.
const OVER: u64 = 1;

/// The tables, and what networks are wanted there. What is banned from one publish has its index, from all
/// [`ban::EVERYWHERE`].
pub(super) struct Bans {
    pub(super) kinds: Array<MapData, u32>,
    pub(super) addresses: HashMap<MapData, PublishSource, u64>,
    pub(super) networks: Mirror<LpmTrie<MapData, PublishSource, u64>, Network, u64>,
    pub(super) wanted: BTreeMap<Network, u64>,
    /// What is in the tables of single publishes.
    pub(super) of: BTreeMap<u32, BTreeSet<IpNet>>,
}

impl Store<Network, u64> for LpmTrie<MapData, PublishSource, u64> {
    fn write(&mut self, network: &Network, value: &u64) -> Result<(), MapError> {
        let key = trie_key(*network);
        if *value == 0 {
            ignore_missing(self.remove(&key))
        } else {
            self.insert(&key, value, 0)
        }
    }
}

/// Every IPv4 address.
fn all_v4() -> IpNet {
    Ipv4Net::default().into()
}

/// Whether the tables' keys of this network, among which IPv4 addresses are mapped, have all of IPv4 among them: `::/0` is
/// IPv6 alone.
pub(super) fn has_mapped(network: IpNet) -> bool {
    let mapped = std::net::Ipv4Addr::UNSPECIFIED.to_ipv6_mapped();
    matches!(network, IpNet::V6(v6) if v6.prefix_len() < 96 && v6.contains(&mapped))
}

/// The network that is meant, without bits behind the prefix, and IPv4 where it is written as mapped.
pub(super) fn plain(network: IpNet) -> IpNet {
    if let IpNet::V6(v6) = network
        && let Some(length) = v6.prefix_len().checked_sub(96)
        && let Some(v4) = v6.network().to_ipv4_mapped()
        && let Ok(v4) = Ipv4Net::new(v4, length)
    {
        return v4.into();
    }
    network.trunc()
}

fn is_address(network: IpNet) -> bool {
    network.prefix_len() == network.max_prefix_len()
}

impl Bans {
    /// What the trie must say of a network that is in it: the latest end of all that it is part of.
    fn until(&self, (publish, network): Network) -> u64 {
        let parents = (0..=network.prefix_len()).filter_map(|length| {
            let parent = IpNet::new(network.addr(), length).ok()?.trunc();
            self.wanted.get(&(publish, parent)).copied()
        });
        parents.max().unwrap_or_default()
    }

    /// Brings the trie up to date where a ban of a network has changed.
    fn follow(&mut self, (publish, network): Network) {
        let range = (publish, IpNet::new_assert(network.network(), 0))
            ..=(
                publish,
                IpNet::new_assert(network.broadcast(), network.max_prefix_len()),
            );
        let inside: Vec<Network> = self
            .wanted
            .range(range)
            .map(|(inside, _)| *inside)
            .filter(|(_, inside)| network.contains(inside))
            .chain([(publish, network)])
            .collect();
        for network in inside {
            let until = if self.wanted.contains_key(&network) {
                self.until(network)
            } else {
                0
            };
            self.networks.change(network, |value| *value = until);
        }
        if has_mapped(network) || network == all_v4() {
            let mut until = self.until((publish, all_v4()));
            let mut wanted = self.wanted.keys();
            if until == 0 && wanted.any(|&(of, network)| of == publish && has_mapped(network)) {
                until = OVER;
            }
            self.networks
                .change((publish, all_v4()), |value| *value = until);
        }
    }

    fn write_kinds(&mut self) -> Result<()> {
        let has_addresses = self.addresses.keys().next().is_some();
        let mut kinds = 0;
        if has_addresses {
            kinds |= ban::ADDRESSES;
        }
        if !self.wanted.is_empty() {
            kinds |= ban::NETWORKS;
        }
        if !self.of.is_empty() {
            kinds |= ban::OF_A_PUBLISH;
        }
        self.kinds.set(0, kinds, 0).context("write BANS")
    }
}

impl Maps {
    /// Bans an address or a network until that time of [`crate::clock::boot`], or for ever: a packet of it to a published port
    /// begins no flow and gets to no socket. Flows that it has go on until somebody ends them.
    ///
    /// # Errors
    /// The table is full, or the kernel refuses the update.
    pub fn ban(&mut self, network: IpNet, until: Option<u64>) -> Result<()> {
        self.ban_all(&[((ban::EVERYWHERE, network), until)])
    }

    /// The same of many, each from a publish or from [`ban::EVERYWHERE`], in as few system calls as there are ways to. What
    /// was there already gets its new end.
    ///
    /// # Errors
    /// As [`Self::ban`]. What was written before that stays until it is unbanned.
    pub fn ban_all(&mut self, bans: &[(Network, Option<u64>)]) -> Result<()> {
        let mut addresses = Vec::new();
        let mut ends = Vec::new();
        for &((publish, network), until) in bans {
            let (network, until) = (plain(network), until.unwrap_or(ban::FOR_EVER).max(OVER));
            if publish != ban::EVERYWHERE {
                self.bans.of.entry(publish).or_default().insert(network);
            }
            if is_address(network) {
                addresses.push(trie_key((publish, network)).data());
                ends.push(until);
            } else {
                self.bans.wanted.insert((publish, network), until);
                self.bans.follow((publish, network));
            }
        }
        let mut written = Ok(());
        for (addresses, ends) in addresses.chunks(SLICE).zip(ends.chunks(SLICE)) {
            written = BANNED.wrote(update_batch(&self.bans.addresses, addresses, ends));
            if written.is_err() {
                break;
            }
        }
        let networks = self.bans.networks.flush();
        // Last, and for what was written, too.
        self.bans.write_kinds()?;
        Ok(written.and(networks)?)
    }

    /// Takes a ban back.
    ///
    /// # Errors
    /// The kernel refuses the update.
    pub fn unban(&mut self, network: IpNet) -> Result<()> {
        self.unban_all(&[(ban::EVERYWHERE, network)])
    }

    /// The same of many.
    ///
    /// # Errors
    /// The first one; the others are taken back all the same.
    pub fn unban_all(&mut self, bans: &[Network]) -> Result<()> {
        let mut first = Ok(());
        for &(publish, network) in bans {
            let network = plain(network);
            if let Some(of) = self.bans.of.get_mut(&publish) {
                of.remove(&network);
                if of.is_empty() {
                    self.bans.of.remove(&publish);
                }
            }
            if is_address(network) {
                let removed = self
                    .bans
                    .addresses
                    .remove(&trie_key((publish, network)).data());
                first = first.and(BANNED.wrote(ignore_missing(removed)));
            } else if self.bans.wanted.remove(&(publish, network)).is_some() {
                self.bans.follow((publish, network));
            }
        }
        let flushed = self.bans.networks.flush();
        self.bans.write_kinds()?;
        Ok(first.and(flushed)?)
    }

    /// Whether anything is banned from this publish alone.
    pub fn has_bans_of(&self, publish: u32) -> bool {
        self.bans.of.contains_key(&publish)
    }

    /// Takes back what is banned from this publish alone.
    ///
    /// # Errors
    /// As [`Self::unban_all`].
    pub(super) fn unban_all_of(&mut self, publish: u32) -> Result<()> {
        let Some(of) = self.bans.of.get(&publish) else {
            return Ok(());
        };
        let bans: Vec<Network> = of.iter().map(|network| (publish, *network)).collect();
        self.unban_all(&bans)
    }
}

/// Whether a network of bans has an address; for those who decide on flows that exist.
pub fn covers(network: IpNet, address: IpAddr) -> bool {
    plain(network).contains(&address.to_canonical())
}

/// Writes a slice by one system call.
fn update_batch(
    table: &HashMap<MapData, PublishSource, u64>,
    keys: &[PublishSource],
    values: &[u64],
) -> Result<(), MapError> {
    let mut batch = Batch {
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: keys.len().min(values.len()) as u32,
        ..Batch::default()
    };
    // SAFETY: the kernel reads `count` keys and values of the table's types, which live until it returns.
    let written = unsafe { batch.run(Command::Update, table.map()) };
    written.map_err(|io_error| {
        let call = "bpf_map_update_batch";
        aya::sys::SyscallError { call, io_error }.into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_networks_are_the_ipv4_ones_that_they_name() {
        for (written, meant) in [
            ("::ffff:198.51.100.7/120", "198.51.100.0/24"),
            ("::ffff:198.51.100.7/128", "198.51.100.7/32"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("198.51.100.7/24", "198.51.100.0/24"),
            ("2001:db8::7/64", "2001:db8::/64"),
            ("::/0", "::/0"),
        ] {
            let network = |text: &str| text.parse::<IpNet>().unwrap();
            assert_eq!(plain(network(written)), network(meant), "{written}");
        }
    }
}
