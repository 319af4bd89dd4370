//! Decides, from a snapshot and without IO: how packets get to a backend, which devices the program is
//! attached to, and how replies leave by each.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use forwarder_common::{
    flow::{Hop, delivery},
    limits,
    publish::{Interface, Location},
    tuple::Address,
};
use ipnet::IpNet;

use crate::{
    cli::XdpChoice,
    datapath::xdp::Mode,
    interfaces::{Header, Kind, Link, Mac, Peer, Route, Snapshot},
};

/// How the fast path reaches a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved {
    pub hop: Hop,
    /// This host's address on the way there.
    pub source: Address,
    /// Replies don't come back by us unless the source is an address of ours.
    pub remote: bool,
}

/// The way to a backend.
///
/// # Errors
/// Why the fast path cannot serve it, in a few words for `list`.
pub fn resolve(snapshot: &Snapshot, backend: IpAddr) -> Result<Resolved, String> {
    if backend.is_loopback()
        || snapshot
            .addresses
            .iter()
            .any(|local| local.address == backend)
    {
        return Err("the backend is this host".into());
    }
    let route = best_route(snapshot, backend).ok_or_else(|| format!("no route to {backend}"))?;
    let device = snapshot
        .links
        .get(&route.ifindex)
        .ok_or_else(|| format!("no device for the route to {backend}"))?;
    let source = source(snapshot, &route, backend)
        .ok_or_else(|| format!("no address of this host to reach {backend} from"))?
        .into();
    let neighbour = Hop {
        ifindex: route.ifindex,
        delivery: delivery::NEIGHBOUR,
        ..Hop::default()
    };
    let device_mac = device.mac.unwrap_or_default();
    let remote = !leads_to_local(snapshot, &route, device);
    if remote && device.header == Header::Other {
        return Err(format!(
            "answers by {} begin with no known header",
            device.name
        ));
    }
    if remote {
        return Ok(Resolved {
            hop: neighbour,
            source,
            remote,
        });
    }
    let place = by_its_owner(snapshot, backend)
        .or_else(|| by_its_neighbour(snapshot, route.ifindex, device.kind, backend));
    let hop = place.and_then(|(port, mac)| {
        let delivery = way_to(snapshot.links.get(&port)?)?;
        Some(Hop {
            ifindex: port,
            mac,
            source_mac: device_mac,
            delivery,
        })
    });
    // Until the kernel has resolved the neighbour, it does so itself by `bpf_redirect_neigh`.
    Ok(Resolved {
        hop: hop.unwrap_or(neighbour),
        source,
        remote,
    })
}

/// The device and the MAC of the container that has an address by its own word. Nobody else's frames change them.
fn by_its_owner(snapshot: &Snapshot, address: IpAddr) -> Option<(u32, Mac)> {
    let veth = *snapshot.owners.get(&address)?;
    Some((veth, snapshot.far_ends.get(&veth)?.mac))
}

/// The same as the kernel has learnt it: a virtual machine's, and a container's that cannot be asked.
fn by_its_neighbour(
    snapshot: &Snapshot,
    ifindex: u32,
    kind: Kind,
    address: IpAddr,
) -> Option<(u32, Mac)> {
    let mac = snapshot.neighbours.get(&(ifindex, address))?.mac;
    let port = match kind {
        Kind::Bridge => *snapshot.forwarding.get(&(ifindex, mac))?,
        _ => ifindex,
    };
    Some((port, mac))
}

/// Whether the stack can carry packets of other machines to the backend, and its answers back.
///
/// # Errors
/// Why not, in a few words for `list`.
pub fn through_the_stack(
    snapshot: &Snapshot,
    backend: IpAddr,
    resolved: &Resolved,
) -> Result<(), String> {
    if resolved.remote {
        return Err("--respect-firewall: the backend is on another machine".into());
    }
    let (routes, setting) = match backend {
        IpAddr::V4(_) => (snapshot.forwards.0, "net.ipv4.ip_forward"),
        IpAddr::V6(_) => (snapshot.forwards.1, "net.ipv6.conf.all.forwarding"),
    };
    if routes {
        Ok(())
    } else {
        Err(format!(
            "--respect-firewall: the host does not forward; `sysctl {setting}=1` would change that"
        ))
    }
}

/// How frames get to what is behind a container's or a virtual machine's device.
fn way_to(port: &Link) -> Option<u32> {
    match port.kind {
        Kind::Veth { peer: Some(_) } => Some(delivery::PEER),
        Kind::Veth { peer: None } | Kind::Tap => Some(delivery::DEVICE),
        Kind::Other | Kind::Loopback | Kind::Bridge | Kind::Bond => None,
    }
}

/// Whether the route ends on this machine: at a bridge all of whose ports do and that leads to no gateway, or at a
/// veth that has a route of its own for one address, as CNI's ptp and Calico lay them.
fn leads_to_local(snapshot: &Snapshot, route: &Route, device: &Link) -> bool {
    if route.gateway.is_some() {
        return false;
    }
    match device.kind {
        Kind::Bridge => is_local_bridge(snapshot, route.ifindex),
        Kind::Veth { .. } | Kind::Tap => is_host_route(route),
        Kind::Loopback | Kind::Bond | Kind::Other => false,
    }
}

fn is_host_route(route: &Route) -> bool {
    !route.local && route.prefix == if route.destination.is_ipv4() { 32 } else { 128 }
}

fn is_local_bridge(snapshot: &Snapshot, bridge: u32) -> bool {
    let mut routes = snapshot.routes.iter();
    // Where this host is a container itself, its uplink is a veth too. A container may be the gateway of some network.
    let is_uplink =
        routes.any(|route| route.ifindex == bridge && route.gateway.is_some() && route.prefix == 0);
    let mut ports = snapshot
        .links
        .values()
        .filter(|link| link.controller == Some(bridge));
    !is_uplink && ports.all(|port| way_to(port).is_some())
}

/// The devices that get the program: every one where packets enter, once.
pub fn attached(snapshot: &Snapshot) -> impl Iterator<Item = (u32, &Link)> {
    snapshot.links.iter().filter_map(|(&index, link)| {
        let behind_bond = link
            .controller
            .and_then(|controller| snapshot.links.get(&controller))
            .is_some_and(|controller| controller.kind == Kind::Bond);
        // A bridge's frames are seen at its ports, a bond's at the bond.
        let enters = link.kind != Kind::Bridge && !behind_bond && link.header != Header::Other;
        (enters && link.up).then_some((index, link))
    })
}

/// The devices that get the XDP program, and how: uplinks. Not veths by default: with native XDP the other end loses
/// TSO; and not generically by default, which comes after GRO and copies.
pub fn with_xdp(snapshot: &Snapshot, choice: XdpChoice) -> impl Iterator<Item = (u32, Mode)> {
    let uplinks = interfaces(snapshot).filter(|(_, i)| i.delivery == delivery::NEIGHBOUR);
    let uplinks: BTreeSet<u32> = uplinks.map(|(index, _)| index).collect();
    attached(snapshot).filter_map(move |(index, link)| {
        let mode = match (choice, link.kind) {
            (XdpChoice::Off, _) | (_, Kind::Loopback | Kind::Tap) => return None,
            _ if link.header != Header::Ethernet => return None,
            (XdpChoice::Auto, Kind::Veth { .. }) => return None,
            (XdpChoice::Auto | XdpChoice::Native, _) => Mode::Native,
            (XdpChoice::Generic, _) => Mode::Generic,
        };
        uplinks.contains(&index).then_some((index, mode))
    })
}

/// The container network that each device leads to, as [`Interface::network`] has it; those of uplinks are missing. LAN
/// machines are behind other ports of a bridge that an uplink is a port of, so its ports have none.
fn container_networks(snapshot: &Snapshot) -> BTreeMap<u32, u32> {
    let is_bridge = |link: &Link| link.kind == Kind::Bridge;
    let bridges = snapshot.links.iter().filter(|(_, link)| is_bridge(link));
    let bridges: BTreeMap<u32, bool> = bridges
        .map(|(&bridge, _)| (bridge, is_local_bridge(snapshot, bridge)))
        .collect();
    // Of a device whose routes are in another table, a VRF's, nothing can be said.
    let routes = snapshot.routes.iter();
    let reached = routes.filter(|route| tells_networks(route));
    let reached: BTreeSet<u32> = reached.map(|route| route.ifindex).collect();
    let routed = routed(snapshot);
    let network = |(&ifindex, link): (&u32, &Link)| {
        let bridge = [Some(ifindex), link.controller].into_iter().flatten();
        let bridge = bridge.into_iter().find(|it| bridges.contains_key(it));
        let device = match bridge {
            Some(bridge) if bridges[&bridge] => bridge,
            None if way_to(link).is_some() && routed.contains(&ifindex) => ifindex,
            _ => return None,
        };
        reached.contains(&device).then_some((ifindex, device))
    };
    snapshot.links.iter().filter_map(network).collect()
}

/// Whether a route says what is behind its device. Link-local addresses are everywhere.
fn tells_networks(route: &Route) -> bool {
    !route.local && route.prefix > 0 && !is_link_local(route.destination)
}

/// The devices that have a route of their own for one address, as that of a container without a bridge has.
fn routed(snapshot: &Snapshot) -> BTreeSet<u32> {
    let routes = snapshot.routes.iter();
    routes
        .filter(|route| is_host_route(route) && route.gateway.is_none())
        .map(|route| route.ifindex)
        .collect()
}

/// What is behind each container network: the destinations of this host's routes there, also by way of a container. Routes
/// that lead elsewhere from within are exceptions, with 0.
pub fn networks(snapshot: &Snapshot) -> BTreeMap<IpNet, Behind> {
    let devices = container_networks(snapshot);
    let mut routes: Vec<(IpNet, u32, Behind)> = snapshot
        .routes
        .iter()
        .filter(|route| tells_networks(route))
        .filter_map(|route| {
            let prefix = IpNet::new(route.destination, route.prefix).ok()?;
            let behind = Behind {
                network: devices.get(&route.ifindex).copied().unwrap_or(0),
                gateway: route.gateway,
            };
            Some((prefix.trunc(), route.priority, behind))
        })
        .collect();
    // Of equal prefixes the one that counts comes last.
    routes.sort_by_key(|(prefix, priority, _)| (*prefix, std::cmp::Reverse(*priority)));
    let mut networks: BTreeMap<IpNet, Behind> = routes
        .iter()
        .map(|(prefix, _, behind)| (*prefix, *behind))
        .collect();
    let inside: Vec<IpNet> = networks
        .iter()
        .filter(|(_, behind)| behind.network != 0)
        .map(|(prefix, _)| *prefix)
        .collect();
    networks.retain(|prefix, behind| {
        behind.network != 0 || inside.iter().any(|outer| outer.contains(prefix))
    });
    networks
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

/// How packets leave by each device. Replies to a client that came in by it go back to the MAC where a container or
/// a virtual machine is behind it, and by a bridge's ports; the others are uplinks.
pub fn interfaces(snapshot: &Snapshot) -> impl Iterator<Item = (u32, Interface)> {
    let (networks, routed) = (container_networks(snapshot), routed(snapshot));
    snapshot.links.iter().map(move |(&index, link)| {
        let bridged = link.controller.is_some_and(|bridge| {
            snapshot
                .links
                .get(&bridge)
                .is_some_and(|b| b.kind == Kind::Bridge)
        });
        let routed = routed.contains(&index);
        // The kernel has no neighbours behind a bridge's port.
        let delivery = match way_to(link) {
            Some(delivery) if bridged || routed => delivery,
            None if bridged => delivery::DEVICE,
            _ => delivery::NEIGHBOUR,
        };
        let mtu = link.mtu;
        let mac = match link
            .controller
            .and_then(|bridge| snapshot.links.get(&bridge))
        {
            Some(bridge) if bridged => bridge.mac,
            _ => link.mac,
        };
        (
            index,
            Interface {
                delivery,
                mtu,
                ethernet: u32::from(link.header == Header::Ethernet),
                xdp: 0,
                network: networks.get(&index).copied().unwrap_or(0),
                mac: mac.unwrap_or_default(),
                reserved: 0,
            },
        )
    })
}

fn contains(network: IpAddr, prefix: u8, address: IpAddr) -> bool {
    IpNet::new(network, prefix).is_ok_and(|net| net.contains(&address))
}

fn best_route(snapshot: &Snapshot, address: IpAddr) -> Option<Route> {
    snapshot
        .routes
        .iter()
        .filter(|route| !route.local && contains(route.destination, route.prefix, address))
        .max_by_key(|route| (route.prefix, std::cmp::Reverse(route.priority)))
        .copied()
}

/// The source address that this host would use, as the kernel chooses it: the route's own, else one
/// on the device, in the backend's subnet if there is one, else any other of the family.
fn source(snapshot: &Snapshot, route: &Route, backend: IpAddr) -> Option<IpAddr> {
    let usable = |address: &IpAddr| {
        address.is_ipv4() == backend.is_ipv4() && !address.is_loopback() && !is_link_local(*address)
    };
    route.preferred_source.or_else(|| {
        let best = snapshot
            .addresses
            .iter()
            .filter(|local| usable(&local.address))
            .rev() // of equals the first, which is the primary address
            .max_by_key(|local| {
                let here = local.ifindex == route.ifindex;
                (here && contains(local.address, local.prefix, backend), here)
            })?;
        Some(best.address)
    })
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// What addresses are behind, as `LOCATIONS` has it: [`networks`], containers' own addresses, and this host's own addresses
/// and local prefixes but for loopback ones, which only `lo` serves. Prefixes that are local in another table than *local* (a
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
    let prefixes = snapshot.routes.iter().filter(|route| route.local);
    let prefixes = prefixes.filter_map(|route| IpNet::new(route.destination, route.prefix).ok());
    let local = addresses
        .chain(prefixes)
        .filter(|prefix| !prefix.addr().is_loopback())
        .map(|prefix| (prefix.trunc(), Location::HERE));
    networks.chain(containers).chain(local).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interfaces::{Claim, FarEnd, Local, Neighbour};

    const MAC_A: Mac = [2, 0, 0, 0, 0, 0xa];
    const NEIGHBOUR: Neighbour = Neighbour {
        mac: MAC_A,
        permanent: false,
    };
    const MAC_B: Mac = [2, 0, 0, 0, 0, 0xc];
    const MAC_BR: Mac = [2, 0, 0, 0, 0, 0xb];

    fn link(name: &str, kind: Kind, controller: Option<u32>) -> Link {
        Link {
            name: name.into(),
            kind,
            header: Header::Ethernet,
            mac: Some(MAC_BR),
            controller,
            up: true,
            mtu: 1500,
        }
    }

    fn route(destination: &str, prefix: u8, ifindex: u32, gateway: bool) -> Route {
        Route {
            destination: destination.parse().expect("a literal"),
            prefix,
            ifindex,
            gateway: gateway.then(|| ip("172.31.0.3")),
            preferred_source: None,
            priority: 0,
            local: false,
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("a literal")
    }

    /// lo, an uplink, a bridge with a container, a routed container.
    fn host() -> Snapshot {
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
            });
        }
        snapshot.routes = vec![
            route("0.0.0.0", 0, 2, true),
            route("198.51.100.0", 24, 2, false),
            route("172.31.0.0", 24, 3, false),
            route("10.44.0.2", 32, 5, false),
        ];
        snapshot
    }

    #[test]
    fn an_unresolved_container_is_left_to_the_kernels_neighbour_resolution() {
        let resolved = resolve(&host(), ip("172.31.0.2")).expect("a route");
        assert_eq!(
            (resolved.hop.delivery, resolved.hop.ifindex),
            (delivery::NEIGHBOUR, 3)
        );
        assert!(!resolved.remote);
        assert_eq!(IpAddr::from(resolved.source), ip("172.31.0.1"));
    }

    #[test]
    fn a_bridged_container_is_reached_through_its_veth() {
        let mut host = host();
        host.neighbours.insert((3, ip("172.31.0.2")), NEIGHBOUR);
        host.forwarding.insert((3, MAC_A), 4);
        let hop = resolve(&host, ip("172.31.0.2")).expect("a route").hop;
        assert_eq!(
            hop,
            Hop {
                ifindex: 4,
                mac: MAC_A,
                source_mac: MAC_BR,
                delivery: delivery::PEER
            }
        );
    }

    #[test]
    fn a_virtual_machine_on_the_bridge_is_reached_through_its_tap() {
        let mut host = host();
        host.links.insert(6, link("tap0", Kind::Tap, Some(3)));
        host.neighbours.insert((3, ip("172.31.0.9")), NEIGHBOUR);
        host.forwarding.insert((3, MAC_A), 6);
        let hop = resolve(&host, ip("172.31.0.9")).expect("a route").hop;
        assert_eq!((hop.delivery, hop.ifindex), (delivery::DEVICE, 6));
    }

    #[test]
    fn a_routed_container_is_reached_through_its_veth() {
        let mut host = host();
        host.neighbours.insert((5, ip("10.44.0.2")), NEIGHBOUR);
        let resolved = resolve(&host, ip("10.44.0.2")).expect("a route");
        assert_eq!(
            (resolved.hop.delivery, resolved.hop.ifindex),
            (delivery::PEER, 5)
        );
        assert!(!resolved.remote);
        assert_eq!(IpAddr::from(resolved.source), ip("10.44.0.1"));
    }

    #[test]
    fn another_machine_is_remote() {
        for backend in ["198.51.100.77", "203.0.113.5"] {
            let resolved = resolve(&host(), ip(backend)).expect("a route");
            assert!(resolved.remote);
            assert_eq!(
                (resolved.hop.delivery, resolved.hop.ifindex),
                (delivery::NEIGHBOUR, 2)
            );
            assert_eq!(IpAddr::from(resolved.source), ip("198.51.100.2"));
        }
    }

    #[test]
    fn of_many_addresses_the_first_is_the_source() {
        let mut host = host();
        for address in ["198.51.100.3", "198.51.100.4"] {
            host.addresses.push(Local {
                ifindex: 2,
                address: ip(address),
                prefix: 24,
            });
        }
        let resolved = resolve(&host, ip("203.0.113.5")).expect("a route");
        assert_eq!(IpAddr::from(resolved.source), ip("198.51.100.2"));
    }

    #[test]
    fn a_backend_behind_a_device_of_other_headers_says_so() {
        let mut host = host();
        let mut tunnel = link("gre1", Kind::Other, None);
        (tunnel.header, tunnel.mac) = (Header::Other, None);
        host.links.insert(6, tunnel);
        host.routes.push(route("203.0.113.0", 24, 6, false));
        let reason = resolve(&host, ip("203.0.113.5")).expect_err("no fast path");
        assert!(reason.contains("gre1"), "{reason}");
    }

    #[test]
    fn a_bridge_with_an_uplink_is_remote() {
        let mut host = host();
        host.links.insert(6, link("eth1", Kind::Other, Some(3)));
        assert!(resolve(&host, ip("172.31.0.2")).expect("a route").remote);
        host.links.remove(&6);
        assert!(!resolve(&host, ip("172.31.0.2")).expect("a route").remote);
        host.routes.push(route("0.0.0.0", 0, 3, true));
        assert!(resolve(&host, ip("172.31.0.2")).expect("a route").remote);
    }

    #[test]
    fn what_cannot_be_reached_says_why() {
        let reason = |backend: &str| resolve(&host(), ip(backend)).expect_err("no fast path");
        assert_eq!(reason("198.51.100.2"), "the backend is this host");
        assert_eq!(reason("127.0.0.1"), "the backend is this host");
        assert_eq!(reason("fd00::1"), "no route to fd00::1");
    }

    #[test]
    fn the_program_is_attached_where_packets_enter() {
        let mut host = host();
        host.links.insert(7, link("bond0", Kind::Bond, None));
        host.links.insert(8, link("eth2", Kind::Other, Some(7)));
        for (index, name, header) in [(9, "tun0", Header::Ip), (10, "ib0", Header::Other)] {
            let mut other = link(name, Kind::Other, None);
            (other.header, other.mac) = (header, None);
            host.links.insert(index, other);
        }
        let names: Vec<_> = attached(&host)
            .map(|(_, link)| link.name.as_str())
            .collect();
        assert_eq!(names, ["lo", "eth0", "veth0", "ptp0", "bond0", "tun0"]);
    }

    #[test]
    fn only_containers_devices_and_bridges_ports_answer_to_the_mac() {
        let mut host = host();
        host.links.insert(6, link("eth1", Kind::Other, Some(3)));
        let ways: Vec<_> = interfaces(&host)
            .filter(|(_, interface)| interface.delivery != delivery::NEIGHBOUR)
            .map(|(index, interface)| (index, interface.delivery))
            .collect();
        let device = (6, delivery::DEVICE);
        assert_eq!(ways, [(4, delivery::PEER), (5, delivery::PEER), device]);
    }

    #[test]
    fn every_device_has_its_mtu() {
        let mut host = host();
        host.links.entry(3).and_modify(|bridge| bridge.mtu = 1400);
        let mtu = |wanted| interfaces(&host).find(|(index, _)| *index == wanted);
        let mtu = |index| mtu(index).map(|(_, interface)| interface.mtu);
        assert_eq!((mtu(2), mtu(3), mtu(99)), (Some(1500), Some(1400), None));
    }

    #[test]
    fn what_is_behind_a_container_network_follows_from_the_routes() {
        let mut snapshot = host();
        snapshot.routes.clear();
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
                .push(route(destination, prefix, ifindex, gateway));
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

    /// [`host`] with another container on the bridge, at device 6. The two say that they have had these addresses since then.
    fn asked_host(first: &[(&str, u64)], second: &[(&str, u64)]) -> Snapshot {
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
    fn of_two_containers_with_one_address_the_first_keeps_it() {
        for (first, owner, other) in [(5, 4, 6), (7, 6, 4)] {
            let snapshot = asked_host(&[("172.31.0.2", first)], &[("172.31.0.2", 6)]);
            assert_eq!(snapshot.owners, [(ip("172.31.0.2"), owner)].into());
            assert_eq!(snapshot.disputed, [(other, ip("172.31.0.2"))].into());
            let hop = resolve(&snapshot, ip("172.31.0.2")).expect("a route").hop;
            assert_eq!(hop.ifindex, owner);
        }
    }

    #[test]
    fn the_containers_word_comes_before_what_the_bridge_has_learnt() {
        let mut snapshot = asked_host(&[("172.31.0.2", 1)], &[("172.31.0.3", 1)]);
        let mac = MAC_B;
        let neighbour = Neighbour { mac, ..NEIGHBOUR };
        snapshot.neighbours.insert((3, ip("172.31.0.2")), neighbour);
        snapshot.forwarding = [((3, MAC_A), 6), ((3, MAC_B), 6)].into();
        let hop = resolve(&snapshot, ip("172.31.0.2")).expect("a route").hop;
        assert_eq!(
            hop,
            Hop {
                ifindex: 4,
                mac: MAC_A,
                source_mac: MAC_BR,
                delivery: delivery::PEER
            }
        );
    }

    #[test]
    fn what_is_routed_by_way_of_a_container_is_behind_its_veth_alone() {
        // The other one says that it has such an address itself.
        let mut snapshot = asked_host(&[("10.8.0.7", 1)], &[("172.31.0.3", 1)]);
        snapshot.routes.push(route("10.8.0.0", 24, 3, true));
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
        let last = snapshot.routes.len() - 1;
        snapshot.routes[last].gateway = Some(ip("0.0.0.0"));
        let location = super::locations(&snapshot)[&"10.8.0.0/24".parse().expect("a literal")];
        assert_eq!((location.network, location.device), (3, 0));
    }

    #[test]
    fn addresses_and_local_prefixes_are_this_hosts_own() {
        let mut snapshot = host();
        let local = |destination, prefix| Route {
            local: true,
            ..route(destination, prefix, 1, false)
        };
        let routes = [local("203.0.113.0", 28), local("127.0.0.0", 8)];
        snapshot.routes.extend(routes);
        let container = |network| Location { network, device: 0 };
        let expected = [
            ("10.44.0.1/32", Location::HERE),
            ("10.44.0.2/32", container(5)),
            ("172.31.0.0/24", container(3)),
            ("172.31.0.1/32", Location::HERE),
            ("198.51.100.2/32", Location::HERE),
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
        snapshot.routes.clear();
        for (ifindex, priority) in [(3, 100), (2, 50)] {
            let route = route("172.31.0.0", 24, ifindex, false);
            snapshot.routes.push(Route { priority, ..route });
        }
        assert!(networks(&snapshot).is_empty());
        snapshot.routes[1].priority = 200;
        let networks = networks(&snapshot).into_values();
        assert_eq!(networks.map(|it| it.network).collect::<Vec<_>>(), [3]);
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
    fn a_bridge_whose_routes_are_in_another_table_is_not_judged() {
        let mut snapshot = host();
        snapshot.routes = vec![route("fe80::", 64, 3, false)];
        let behind: Vec<u32> = interfaces(&snapshot)
            .map(|(_, device)| device.network)
            .collect();
        assert_eq!(behind, [0; 5]);
    }
}
