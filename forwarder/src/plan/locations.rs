//! Decides, from a snapshot and without IO, what addresses are behind: this host, a container network, a container. It does not
//! decide how packets get there.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use forwarder_common::{flow::delivery, limits, publish::Location};
use ipnet::{IpNet, Ipv4Net};

use super::behind::bridges_behind;
use crate::network::{Kind, Link, Local, Peer, Route, Snapshot};

/// The container network that each device leads to, as [`forwarder_common::publish::Interface::network`] has it; those of uplinks are missing. LAN
/// machines are behind other ports of a bridge that an uplink is a port of, so its ports have none.
pub fn container_networks(snapshot: &Snapshot) -> BTreeMap<u32, u32> {
    let is_bridge = |link: &Link| link.kind == Kind::Bridge;
    let bridges = snapshot.links.iter().filter(|(_, link)| is_bridge(link));
    let bridges: BTreeMap<u32, bool> = bridges
        .map(|(&bridge, _)| (bridge, is_local_bridge(snapshot, bridge)))
        .collect();
    let behind = bridges_behind(snapshot);
    let ahead = |bridge: u32| behind.get(&bridge).copied().unwrap_or(bridge);
    let network = |(&ifindex, link): (&u32, &Link)| {
        let bridge = [Some(ifindex), link.controller.map(ahead)]
            .into_iter()
            .flatten();
        let bridge = bridge.into_iter().find(|it| bridges.contains_key(it));
        let device = match bridge {
            Some(bridge) if bridges[&bridge] => bridge,
            None if way_to(link).is_some() && is_routed(snapshot, ifindex) => ifindex,
            _ => return None,
        };
        // Of a device whose routes are in another table, a VRF's, nothing can be said.
        let mut routes = snapshot.routes.by(device, false);
        routes.any(tells_networks).then_some((ifindex, device))
    };
    snapshot.links.iter().filter_map(network).collect()
}

/// Whether a route says what is behind its device. Link-local addresses are everywhere.
pub(crate) fn tells_networks(route: &Route) -> bool {
    !route.local && route.prefix > 0 && !is_link_local(route.destination)
}

/// Whether a device has a route of its own for one address, as that of a container without a bridge has. So has an uplink whose
/// gateway is on no network of this host's, as a pod's is.
pub(crate) fn is_routed(snapshot: &Snapshot, ifindex: u32) -> bool {
    let routes = snapshot.routes.by(ifindex, false);
    let mut hosts = routes.take_while(|route| is_host_route(route));
    hosts.any(|route| route.gateway.is_none()) && !leads_out(snapshot, ifindex)
}

/// Whether all the world is behind a device, by a gateway.
fn leads_out(snapshot: &Snapshot, ifindex: u32) -> bool {
    let mut defaults = snapshot.routes.defaults();
    defaults.any(|route| route.ifindex == ifindex && route.gateway.is_some())
}

/// What is behind each container network: the destinations of this host's routes there, also by way of a container. Routes
/// that lead elsewhere from within are exceptions, with 0.
pub fn networks(snapshot: &Snapshot) -> BTreeMap<IpNet, Behind> {
    let devices = container_networks(snapshot);
    let behind = |route: &Route| Behind {
        network: devices.get(&route.ifindex).copied().unwrap_or(0),
        gateway: route.gateway,
    };
    let prefix = |route: &Route| IpNet::new(route.destination, route.prefix).ok();
    let inside = devices.keys().flat_map(|it| snapshot.routes.by(*it, false));
    let inside = inside.filter(|route| tells_networks(route));
    let inside: BTreeSet<IpNet> = inside.filter_map(prefix).collect();
    let mut networks = BTreeMap::new();
    for outer in inside {
        let routes = snapshot.routes.within(outer);
        let mut routes = routes.filter(|route| tells_networks(route)).peekable();
        // Another route to it may be the better one.
        let is_behind = |route: &&&Route| behind(route).network != 0;
        if routes.peek().filter(is_behind).is_some() {
            networks.extend(routes.filter_map(|it| Some((prefix(it)?, behind(it)))));
        }
    }
    networks
}

/// The route to each prefix that counts among equal ones, of those that are `wanted`.
fn best_routes(snapshot: &Snapshot, wanted: impl Fn(IpAddr) -> bool) -> BTreeMap<IpNet, &Route> {
    let mut best = BTreeMap::new();
    let routes = snapshot.routes.iter();
    for route in routes.filter(|route| !route.local && wanted(route.destination)) {
        if let Ok(prefix) = IpNet::new(route.destination, route.prefix) {
            best.entry(prefix.trunc()).or_insert(route); // the first of them
        }
    }
    best
}

/// By which uplink the rest of the world is reached, where the program cannot ask the kernel: that answers on hosts that forward
/// alone. Rules of others may choose in other ways than routes say.
fn ways_out(snapshot: &Snapshot) -> BTreeMap<IpNet, Location> {
    let (forwards, rules) = (snapshot.forwards, snapshot.rules);
    let is_said = |address: IpAddr| match address {
        IpAddr::V4(_) => !forwards.0 && !rules.0,
        IpAddr::V6(_) => !forwards.1 && !rules.1 && !is_link_local(address),
    };
    if !super::has_several_uplinks(snapshot) {
        return BTreeMap::new();
    }
    let devices = container_networks(snapshot);
    let routes = best_routes(snapshot, is_said).into_iter();
    let mut world: BTreeMap<IpNet, Location> = routes
        .filter(|(_, route)| !devices.contains_key(&route.ifindex))
        .map(|(prefix, route)| {
            let has_several_legs = route.gateway.is_some_and(|it| it.is_unspecified());
            let device = if has_several_legs { 0 } else { route.ifindex };
            (prefix, Location { network: 0, device })
        })
        .collect();
    // What else is in the map must find its place there.
    if world.len() > limits::LOCATIONS as usize / 4 {
        return BTreeMap::new();
    }
    if !world.is_empty() {
        world.entry(Ipv4Net::default().into()).or_default(); // or it would be part of ::/0
    }
    world
}

/// Where this host's route to a prefix leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Behind {
    /// The container network, as in [`Location::network`].
    pub network: u32,
    /// As in [`Route::gateway`].
    pub gateway: Option<IpAddr>,
}

/// The containers that are asked what they have: those of container networks. By the host's end of their veth.
pub fn asked(snapshot: &Snapshot) -> BTreeMap<u32, Peer> {
    let devices = container_networks(snapshot).into_keys();
    let peers = devices.filter_map(|veth| match snapshot.links[&veth].kind {
        Kind::Veth { peer } => Some((veth, peer?)),
        _ => None,
    });
    peers.collect()
}

/// Decides which container has each address. A container can give itself any, so its word counts only where this host's route to
/// the address leads to its network without a gateway. Of two that say so, the one that said it first has the address.
pub fn settle(snapshot: &mut Snapshot) {
    let devices = container_networks(snapshot);
    let networks = networks(snapshot);
    let lengths: BTreeSet<u8> = networks.keys().map(IpNet::prefix_len).collect();
    let behind = |address: IpAddr| {
        let prefixes = lengths
            .iter()
            .rev()
            .map(|length| IpNet::new(address, *length));
        prefixes
            .flatten()
            .find_map(|prefix| networks.get(&prefix.trunc()))
    };
    let is_possible = |veth: u32, address: IpAddr| {
        let network = devices.get(&veth).copied().unwrap_or(0);
        let route = behind(address).filter(|_| !address.is_loopback() && !is_link_local(address));
        route.is_some_and(|it| it.network == network && network != 0 && it.gateway.is_none())
    };
    let mut claims: Vec<(u64, u32, IpAddr)> = Vec::new();
    for (&veth, end) in &snapshot.far_ends {
        let possible = end.addresses.iter();
        let possible = possible.filter(|claim| is_possible(veth, claim.address));
        claims.extend(possible.map(|claim| (claim.since, veth, claim.address)));
    }
    claims.sort_unstable();
    claims.truncate(limits::LOCATIONS as usize / 2); // what else is in the map must find its place there
    (snapshot.owners, snapshot.disputed) = Default::default();
    for (_, veth, address) in claims {
        let owner = *snapshot.owners.entry(address).or_insert(veth);
        if owner != veth {
            snapshot.disputed.entry(veth).or_insert(address);
        }
    }
}

/// What is said of a container that says it has an address of another.
pub fn dispute(snapshot: &Snapshot, veth: u32, address: IpAddr) -> String {
    let name = |index: Option<&u32>| {
        let link = index.and_then(|index| snapshot.links.get(index));
        link.map_or("?", |link| &link.name)
    };
    let (other, owner) = (name(Some(&veth)), name(snapshot.owners.get(&address)));
    format!("{address} is taken to be behind {owner}: {other} claims it too, and did so later")
}

/// What addresses are behind, as `LOCATIONS` has it: [`networks`] and their broadcast addresses, containers' own addresses, and
/// this host's own addresses and local prefixes but for loopback ones, which only `lo` serves. Prefixes that are local in another table than *local* (a
/// transparent proxy's) are not this host's.
pub fn locations(snapshot: &Snapshot) -> BTreeMap<IpNet, Location> {
    let devices = container_networks(snapshot);
    let of = |veth: u32| Location {
        network: devices.get(&veth).copied().unwrap_or(0),
        device: veth,
    };
    let networks = networks(snapshot).into_iter().map(|(prefix, behind)| {
        let gateway = behind.gateway.and_then(|it| snapshot.owners.get(&it));
        let gateway = gateway.map(|veth| of(*veth));
        let unknown = Location {
            network: behind.network,
            device: 0,
        };
        let there = gateway.filter(|there| there.network == behind.network);
        (prefix, there.unwrap_or(unknown))
    });
    let containers = snapshot.owners.iter();
    let containers = containers.map(|(address, veth)| (IpNet::from(*address), of(*veth)));
    let addresses = snapshot.addresses.iter();
    let addresses = addresses.map(|local| IpNet::from(local.address));
    let local = addresses
        .chain(snapshot.local_prefixes())
        .filter(|prefix| !prefix.addr().is_loopback())
        .map(|prefix| (prefix.trunc(), Location::HERE));
    let world = ways_out(snapshot);
    let everybody = snapshot.addresses.iter().filter_map(broadcast);
    let everybody = everybody.map(|address| (IpNet::from(address), Location::EVERYBODY));
    networks
        .chain(world)
        .chain(everybody)
        .chain(containers)
        .chain(local)
        .collect()
}

/// The broadcast address of a network that this host is on. A network of two machines has none (RFC 3021).
fn broadcast(local: &Local) -> Option<IpAddr> {
    match IpNet::new(local.address, local.prefix).ok()? {
        IpNet::V4(network) if network.prefix_len() < 31 => Some(network.broadcast().into()),
        _ => None,
    }
}

/// How frames get to what is behind a container's or a virtual machine's device. Straight to a veth's other end nothing waits
/// in the veth's own queue, so a limit there would not be met.
pub(crate) fn way_to(port: &Link) -> Option<u32> {
    match port.kind {
        Kind::Veth { peer: Some(_) } if port.queueing.shaper.is_none() => Some(delivery::PEER),
        Kind::Veth { .. } | Kind::Tap => Some(delivery::DEVICE),
        Kind::Other | Kind::Loopback | Kind::Bridge | Kind::Bond => None,
    }
}

pub(crate) fn is_host_route(route: &Route) -> bool {
    !route.local && route.prefix == if route.destination.is_ipv4() { 32 } else { 128 }
}

pub(crate) fn is_local_bridge(snapshot: &Snapshot, bridge: u32) -> bool {
    let behind = bridges_behind(snapshot);
    let ahead = |bridge: u32| behind.get(&bridge).copied().unwrap_or(bridge);
    // Where this host is a container itself, its uplink is a veth too. A container may be the gateway of some network.
    let mut ports = snapshot
        .links
        .values()
        .filter(|link| link.controller.map(ahead) == Some(bridge));
    !leads_out(snapshot, bridge) && ports.all(|port| way_to(port).is_some())
}

pub(crate) fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        network::{
            Bridging, Claim, FarEnd, Header, Local, Mac, Neighbour, Queueing, Routes, Standing,
        },
        plan::{interfaces, resolve},
    };

    pub(crate) const MAC_A: Mac = [2, 0, 0, 0, 0, 0xa];
    pub(crate) const NEIGHBOUR: Neighbour = Neighbour {
        mac: MAC_A,
        permanent: false,
    };
    pub(crate) const MAC_B: Mac = [2, 0, 0, 0, 0, 0xc];
    pub(crate) const MAC_BR: Mac = [2, 0, 0, 0, 0, 0xb];

    pub(crate) fn link(name: &str, kind: Kind, controller: Option<u32>) -> Link {
        Link {
            name: name.into(),
            kind,
            header: Header::Ethernet,
            mac: Some(MAC_BR),
            controller,
            up: true,
            mtu: 1500,
            queueing: Queueing::default(),
            bridging: Bridging::default(),
            vlan_of: None,
            other_end: None,
            hides_tags: false,
        }
    }

    pub(crate) fn route(destination: &str, prefix: u8, ifindex: u32, gateway: bool) -> Route {
        Route {
            destination: destination.parse().expect("a literal"),
            prefix,
            ifindex,
            gateway: gateway.then(|| ip("172.31.0.3")),
            preferred_source: None,
            priority: 0,
            local: false,
            mtu: 0,
        }
    }

    pub(crate) fn ip(text: &str) -> IpAddr {
        text.parse().expect("a literal")
    }

    /// lo, an uplink, a bridge with a container, a routed container.
    pub(crate) fn host() -> Snapshot {
        let mut snapshot = Snapshot::default();
        let veth = |namespace| Kind::Veth {
            peer: Some(Peer {
                namespace,
                ifindex: 2,
            }),
        };
        snapshot.links.insert(1, link("lo", Kind::Loopback, None));
        snapshot.links.insert(2, link("eth0", Kind::Other, None));
        snapshot.links.insert(3, link("br0", Kind::Bridge, None));
        snapshot.links.insert(4, link("veth0", veth(0), Some(3)));
        snapshot.links.insert(5, link("ptp0", veth(1), None));
        for (ifindex, address, prefix) in [
            (2, "198.51.100.2", 24),
            (3, "172.31.0.1", 24),
            (5, "10.44.0.1", 32),
        ] {
            snapshot.addresses.push(Local {
                ifindex,
                address: ip(address),
                prefix,
                standing: Standing::Preferred,
            });
        }
        let routes = [
            route("0.0.0.0", 0, 2, true),
            route("198.51.100.0", 24, 2, false),
            route("172.31.0.0", 24, 3, false),
            route("10.44.0.2", 32, 5, false),
        ];
        snapshot.routes = routes.into_iter().collect();
        snapshot
    }

    /// Changes the route to a network.
    pub(crate) fn change(snapshot: &mut Snapshot, to: &str, change: impl Fn(&mut Route)) {
        let mut routes: Vec<Route> = snapshot.routes.iter().copied().collect();
        let there = routes.iter_mut().filter(|it| it.destination == ip(to));
        there.for_each(change);
        snapshot.routes = routes.into_iter().collect();
    }

    /// [`host`] with another container on the bridge, at device 6. The two say that they have had these addresses since then.
    pub(crate) fn asked_host(first: &[(&str, u64)], second: &[(&str, u64)]) -> Snapshot {
        let mut snapshot = host();
        let peer = |namespace| Peer {
            namespace,
            ifindex: 2,
        };
        let kind = Kind::Veth {
            peer: Some(peer(2)),
        };
        snapshot.links.insert(6, link("veth1", kind, Some(3)));
        let ends = [(4, peer(0), MAC_A, first), (6, peer(2), MAC_B, second)];
        for (veth, peer, mac, addresses) in ends {
            let claims = addresses.iter().map(|&(address, since)| Claim {
                address: ip(address),
                since,
            });
            let addresses = claims.collect();
            let end = FarEnd {
                peer,
                mac,
                addresses,
            };
            snapshot.far_ends.insert(veth, end);
        }
        settle(&mut snapshot);
        snapshot
    }

    #[test]
    fn containers_of_container_networks_are_asked() {
        let mut snapshot = host();
        let veths = |snapshot: &Snapshot| asked(snapshot).into_keys().collect::<Vec<_>>();
        assert_eq!(veths(&snapshot), [4, 5]);
        // The bridge is an uplink now.
        snapshot.links.insert(6, link("eth1", Kind::Other, Some(3)));
        assert_eq!(veths(&snapshot), [5]);
    }

    #[test]
    fn an_address_is_behind_the_veth_of_the_container_that_has_it() {
        let snapshot = asked_host(&[("172.31.0.2", 1)], &[("172.31.0.3", 1)]);
        let locations = locations(&snapshot);
        let location = |prefix: &str| locations[&prefix.parse::<IpNet>().expect("a literal")];
        let container = |device| Location { network: 3, device };
        assert_eq!(location("172.31.0.2/32"), container(4));
        assert_eq!(location("172.31.0.3/32"), container(6));
        assert_eq!(location("172.31.0.0/24"), container(0));
        assert_eq!(location("172.31.0.1/32"), Location::HERE);
    }

    #[test]
    fn a_containers_word_counts_where_this_host_routes_to_its_network() {
        let foreign = [
            "198.51.100.9",
            "203.0.113.7",
            "10.44.0.2",
            "127.0.0.1",
            "fe80::1",
        ];
        let snapshot = asked_host(&[], &foreign.map(|address| (address, 1)));
        assert!(snapshot.owners.is_empty(), "{:?}", snapshot.owners);
    }

    #[test]
    fn what_is_routed_by_way_of_a_container_is_behind_its_veth_alone() {
        // The other one says that it has such an address itself.
        let mut snapshot = asked_host(&[("10.8.0.7", 1)], &[("172.31.0.3", 1)]);
        snapshot.routes.insert(route("10.8.0.0", 24, 3, true));
        settle(&mut snapshot);
        let locations = locations(&snapshot);
        let location = |prefix: &str| locations.get(&prefix.parse::<IpNet>().expect("a literal"));
        let container = Location {
            network: 3,
            device: 6,
        };
        assert_eq!(location("10.8.0.0/24"), Some(&container));
        assert_eq!(location("10.8.0.7/32"), None);
        // By several ways, the device is not known.
        change(&mut snapshot, "10.8.0.0", |it| {
            it.gateway = Some(ip("0.0.0.0"))
        });
        let location = super::locations(&snapshot)[&"10.8.0.0/24".parse().expect("a literal")];
        assert_eq!((location.network, location.device), (3, 0));
    }

    #[test]
    fn what_is_behind_a_container_network_follows_from_the_routes() {
        let mut snapshot = host();
        snapshot.routes = Routes::default();
        for (destination, prefix, ifindex, gateway) in [
            ("0.0.0.0", 0, 2, true),
            ("198.51.100.0", 24, 2, false),
            ("172.31.0.0", 24, 3, false),
            ("10.8.0.0", 24, 3, true),     // by way of a container
            ("172.31.0.128", 25, 2, true), // an exception from the bridge's network
            ("10.44.0.2", 32, 5, false),
            ("fe80::", 64, 3, false),
        ] {
            snapshot
                .routes
                .insert(route(destination, prefix, ifindex, gateway));
        }
        let shown: Vec<_> = networks(&snapshot)
            .iter()
            .map(|(prefix, behind)| format!("{prefix} {}", behind.network))
            .collect();
        assert_eq!(
            shown,
            [
                "10.8.0.0/24 3",
                "10.44.0.2/32 5",
                "172.31.0.0/24 3",
                "172.31.0.128/25 0"
            ]
        );
        let behind: Vec<u32> = interfaces(&snapshot)
            .map(|(_, device)| device.network)
            .collect();
        assert_eq!(behind, [0, 0, 3, 3, 5], "lo, eth0, br0, veth0, ptp0");
    }

    #[test]
    fn addresses_and_local_prefixes_are_this_hosts_own() {
        let mut snapshot = host();
        let local = |destination, prefix| Route {
            local: true,
            ..route(destination, prefix, 1, false)
        };
        let routes = [local("203.0.113.0", 28), local("127.0.0.0", 8)];
        for route in routes {
            snapshot.routes.insert(route);
        }
        let container = |network| Location { network, device: 0 };
        let expected = [
            ("10.44.0.1/32", Location::HERE),
            ("10.44.0.2/32", container(5)),
            ("172.31.0.0/24", container(3)),
            ("172.31.0.1/32", Location::HERE),
            ("172.31.0.255/32", Location::EVERYBODY),
            ("198.51.100.2/32", Location::HERE),
            ("198.51.100.255/32", Location::EVERYBODY),
            ("203.0.113.0/28", Location::HERE),
        ];
        let shown: Vec<_> = locations(&snapshot).into_iter().collect();
        assert_eq!(
            shown,
            expected.map(|(prefix, there)| (prefix.parse().expect("a literal"), there))
        );
    }

    #[test]
    fn of_two_routes_to_a_prefix_the_better_one_counts() {
        let mut snapshot = host();
        snapshot.routes = Routes::default();
        for (ifindex, priority) in [(3, 100), (2, 50)] {
            let route = route("172.31.0.0", 24, ifindex, false);
            snapshot.routes.insert(Route { priority, ..route });
        }
        assert!(networks(&snapshot).is_empty());
        change(&mut snapshot, "172.31.0.0", |it| {
            it.priority = 300 / it.ifindex
        });
        let networks = networks(&snapshot).into_values();
        assert_eq!(networks.map(|it| it.network).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn ways_out_are_those_of_the_routes_where_the_kernel_cannot_be_asked() {
        let mut snapshot = host();
        snapshot.links.insert(7, link("eth1", Kind::Other, None));
        snapshot.routes = Routes::default();
        for (destination, prefix, ifindex, gateway) in [
            ("0.0.0.0", 0, 2, true),
            ("198.51.100.0", 24, 2, false),
            ("192.0.2.0", 24, 7, false),
            ("172.31.0.0", 24, 3, false),
            ("2001:db8:2::", 64, 7, false),
        ] {
            snapshot
                .routes
                .insert(route(destination, prefix, ifindex, gateway));
        }
        let shown = |snapshot: &Snapshot| {
            let paths = ways_out(snapshot).into_iter();
            paths
                .map(|(prefix, there)| format!("{prefix} {}", there.device))
                .collect::<Vec<_>>()
        };
        let expected = [
            "0.0.0.0/0 2",
            "192.0.2.0/24 7",
            "198.51.100.0/24 2",
            "2001:db8:2::/64 7",
        ];
        assert_eq!(shown(&snapshot), expected);
        assert!(locations(&snapshot).values().any(|it| it.network == 3));
        // The better of two.
        let other = route("192.0.2.0", 24, 2, false);
        snapshot.routes.insert(Route {
            priority: 10,
            ..other
        });
        assert_eq!(shown(&snapshot), expected);
        // By both uplinks.
        change(&mut snapshot, "0.0.0.0", |it| {
            it.gateway = Some(ip("0.0.0.0"))
        });
        assert_eq!(shown(&snapshot)[0], "0.0.0.0/0 0");
        let both = (true, true);
        let (forwards, rules) = (both, both);
        for other in [
            Snapshot {
                forwards,
                ..snapshot.clone()
            },
            Snapshot {
                rules,
                ..snapshot.clone()
            },
        ] {
            assert!(ways_out(&other).is_empty(), "{other:?}");
        }
        snapshot.forwards.0 = true;
        assert_eq!(shown(&snapshot), ["0.0.0.0/0 0", "2001:db8:2::/64 7"]);
    }

    #[test]
    fn a_bridge_that_is_an_uplink_is_no_container_network() {
        let mut snapshot = host();
        snapshot.links.insert(6, link("eth1", Kind::Other, Some(3)));
        assert!(!networks(&snapshot).values().any(|it| it.network == 3));
        let behind: Vec<u32> = interfaces(&snapshot)
            .map(|(_, device)| device.network)
            .collect();
        assert!(!behind.contains(&3), "{behind:?}");
    }

    #[test]
    fn ports_of_a_bridge_behind_another_are_those_of_the_other() {
        let mut snapshot = host();
        let there = Kind::Veth { peer: None };
        let container = snapshot.links[&4].kind;
        for (ifindex, name, kind, controller, other_end) in [
            (6, "br1", Kind::Bridge, None, None),
            (7, "veth1", container, Some(6), None),
            (8, "way1", there, Some(6), Some(9)),
            (9, "way0", there, Some(3), Some(8)),
        ] {
            let link = link(name, kind, controller);
            snapshot.links.insert(ifindex, Link { other_end, ..link });
        }
        let seen = |snapshot: &Snapshot| {
            let attached = crate::plan::attached(snapshot);
            let attached = attached.map(|(ifindex, _)| ifindex).collect::<Vec<_>>();
            let (_, port) = interfaces(snapshot)
                .find(|(it, _)| *it == 7)
                .expect("a device");
            (attached, port.layer3, port.network)
        };
        assert_eq!(seen(&snapshot), (vec![1, 2, 4, 5, 7], 3, 3));
        // This host is on the other bridge, too.
        snapshot.routes.insert(route("172.31.1.0", 24, 6, false));
        assert_eq!(seen(&snapshot), (vec![1, 2, 4, 5, 7, 8, 9], 6, 6));
    }

    #[test]
    fn a_veth_that_leads_out_is_no_containers() {
        let mut snapshot = host();
        let out = route("0.0.0.0", 0, 5, true);
        snapshot.routes.insert(Route { priority: 1, ..out });
        assert!(networks(&snapshot).values().all(|it| it.network == 3));
        let there = interfaces(&snapshot).find(|(device, _)| *device == 5);
        let (_, interface) = there.expect("a device");
        assert_eq!(
            (interface.network, interface.delivery),
            (0, delivery::NEIGHBOUR)
        );
        assert!(resolve(&snapshot, ip("10.44.0.2")).expect("a route").remote);
    }

    #[test]
    fn a_bridge_whose_routes_are_in_another_table_is_not_judged() {
        let mut snapshot = host();
        snapshot.routes = [route("fe80::", 64, 3, false)].into_iter().collect();
        let behind: Vec<u32> = interfaces(&snapshot)
            .map(|(_, device)| device.network)
            .collect();
        assert_eq!(behind, [0; 5]);
    }

    #[test]
    fn of_two_containers_with_one_address_the_first_keeps_it() {
        for (first, owner, other) in [(5, 4, 6), (7, 6, 4)] {
            let snapshot = asked_host(&[("172.31.0.2", first)], &[("172.31.0.2", 6)]);
            assert_eq!(snapshot.owners, [(ip("172.31.0.2"), owner)].into());
            assert_eq!(snapshot.disputed, [(other, ip("172.31.0.2"))].into());
            let hop = resolve(&snapshot, ip("172.31.0.2")).expect("a route").hop;
            assert_eq!(hop.ifindex, owner);
        }
    }
}
