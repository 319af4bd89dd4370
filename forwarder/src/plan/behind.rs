//! Bridges without addresses of this host that are connected with one that has some. What is on them is the plan's.

use std::collections::BTreeMap;

use super::{
    locations::{is_link_local, tells_networks},
    port_of,
};
use crate::network::{Link, Snapshot};

/// The bridges that have none of this host's addresses, but a veth pair to the bridge or the device that has, as where each machine
/// has a bridge for its firewall's sake; and that device. Their ports count as its own.
pub(crate) fn bridges_behind(snapshot: &Snapshot) -> BTreeMap<u32, u32> {
    let is_on = |device: u32| {
        let mut addresses = snapshot.addresses.iter();
        addresses.any(|it| it.ifindex == device && !is_link_local(it.address))
            || snapshot.routes.by(device, false).any(tells_networks)
    };
    let ways = snapshot.links.values().filter_map(|port| {
        let other = port.other_end?; // few devices have one
        let bridge = port_of(snapshot, port)?;
        let beyond = port_of(snapshot, snapshot.links.get(&other)?);
        Some((bridge, beyond.unwrap_or(other)))
    });
    let between = |(behind, ahead): &(u32, u32)| !is_on(*behind) && is_on(*ahead);
    ways.filter(between).collect()
}

/// Whether a device is an end of such a pair, by which nothing comes that has not been seen at a port.
pub(crate) fn is_way_between(
    snapshot: &Snapshot,
    behind: &BTreeMap<u32, u32>,
    (ifindex, link): (u32, &Link),
) -> bool {
    let here = port_of(snapshot, link);
    let other = link
        .other_end
        .and_then(|it| Some((it, snapshot.links.get(&it)?)));
    let there = other.and_then(|(_, link)| port_of(snapshot, link));
    let leads = |from: Option<u32>, to: u32| from.is_some_and(|it| behind.get(&it) == Some(&to));
    other.is_some_and(|(other, _)| {
        leads(here, there.unwrap_or(other)) || leads(there, here.unwrap_or(ifindex))
    })
}
