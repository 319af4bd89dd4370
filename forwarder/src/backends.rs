//! Decides, from a snapshot and without IO: how packets get to a backend, which devices the program is
//! attached to, and how replies leave by each.

mod bypassed;
mod routes;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use forwarder_common::{
    flow::{Hop, delivery},
    publish::{Interface, Location},
    tuple::Address,
};
use ipnet::IpNet;

use self::routes::{route_to, source};
pub use self::{
    bypassed::{allows_xdp, bypassed_bridging},
    routes::{keeps_source, takes_an_answer},
};
use crate::{
    cli::XdpChoice,
    datapath::xdp::Mode,
    interfaces::{Header, Kind, Link, Route, Snapshot},
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
    let answer = route_to(snapshot, backend).ok_or_else(|| format!("no route to {backend}"))?;
    let route = answer.route;
    if route.local {
        return Err("the backend is this host".into());
    }
    let device = snapshot
        .links
        .get(&route.ifindex)
        .ok_or_else(|| format!("no device for the route to {backend}"))?;
    let source = source(snapshot, &answer, backend)
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
    // Until the kernel has resolved the neighbour, it does so itself by `bpf_redirect_neigh`.
    let hop = snapshot
        .neighbours
        .get(&(route.ifindex, backend))
        .and_then(|neighbour| {
            let mac = neighbour.mac;
            let port = if device.kind == Kind::Bridge {
                *snapshot.forwarding.get(&(route.ifindex, mac))?
            } else {
                route.ifindex
            };
            let delivery = way_to(snapshot.links.get(&port)?)?;
            Some(Hop {
                ifindex: port,
                mac,
                source_mac: device_mac,
                delivery,
            })
        });
    Ok(Resolved {
        hop: hop.unwrap_or(neighbour),
        source,
        remote,
    })
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

/// How frames get to what is behind a container's or a virtual machine's device. Straight to a veth's other end nothing waits in
/// the veth's own queue, so a limit there would not be met.
fn way_to(port: &Link) -> Option<u32> {
    match port.kind {
        Kind::Veth {
            peer_elsewhere: true,
        } if port.queueing.shaper.is_none() => Some(delivery::PEER),
        Kind::Veth { .. } | Kind::Tap => Some(delivery::DEVICE),
        Kind::Other | Kind::Loopback | Kind::Bridge | Kind::Bond => None,
    }
}

/// Whether the route ends on this machine: at a bridge all of whose ports do and that leads to no gateway, or at a
/// veth that has a route of its own for one address, as CNI's ptp and Calico lay them.
fn leads_to_local(snapshot: &Snapshot, route: &Route, device: &Link) -> bool {
    if route.gateway {
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
        routes.any(|route| route.ifindex == bridge && route.gateway && route.prefix == 0);
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
            _ if link.header != Header::Ethernet || !allows_xdp(link) => return None,
            (XdpChoice::Auto, Kind::Veth { .. }) => return None,
            (XdpChoice::Auto | XdpChoice::Native, _) => Mode::Native,
            (XdpChoice::Generic, _) => Mode::Generic,
        };
        uplinks.contains(&index).then_some((index, mode))
    })
}

/// The container network that a device leads to, as [`Interface::network`] has it. LAN machines are behind other ports of a
/// bridge that an uplink is a port of, so its ports have none.
fn network(snapshot: &Snapshot, ifindex: u32) -> u32 {
    let Some(link) = snapshot.links.get(&ifindex) else {
        return 0;
    };
    let bridge = match link.kind {
        Kind::Bridge => Some(ifindex),
        _ => link.controller.filter(|controller| {
            let controller = snapshot.links.get(controller);
            controller.is_some_and(|link| link.kind == Kind::Bridge)
        }),
    };
    let device = match bridge {
        Some(bridge) if is_local_bridge(snapshot, bridge) => bridge,
        None if way_to(link).is_some() && is_routed(snapshot, ifindex) => ifindex,
        _ => return 0,
    };
    // Of one whose routes are in another table, a VRF's, nothing can be said.
    let mut routes = snapshot.routes.iter();
    let is_reached = routes.any(|route| route.ifindex == device && tells_networks(route));
    if is_reached { device } else { 0 }
}

/// Whether a route says what is behind its device. Link-local addresses are everywhere.
fn tells_networks(route: &Route) -> bool {
    !route.local && route.prefix > 0 && !is_link_local(route.destination)
}

/// Whether a device has a route of its own for one address, as a container without a bridge has.
fn is_routed(snapshot: &Snapshot, ifindex: u32) -> bool {
    let mut routes = snapshot.routes.iter();
    routes.any(|route| route.ifindex == ifindex && is_host_route(route) && !route.gateway)
}

/// What is behind each container network: the destinations of this host's routes there, also by way of a container. Routes
/// that lead elsewhere from within are exceptions, with 0.
pub fn networks(snapshot: &Snapshot) -> BTreeMap<IpNet, u32> {
    // Once for each device and not for each route, of which there may be many more.
    let devices = snapshot.links.keys();
    let devices: BTreeMap<u32, u32> = devices
        .map(|&ifindex| (ifindex, network(snapshot, ifindex)))
        .collect();
    let mut routes: Vec<(IpNet, u32, u32)> = snapshot
        .routes
        .iter()
        .filter(|route| tells_networks(route))
        .filter_map(|route| {
            let prefix = IpNet::new(route.destination, route.prefix).ok()?;
            Some((
                prefix.trunc(),
                route.priority,
                devices.get(&route.ifindex).copied().unwrap_or(0),
            ))
        })
        .collect();
    // Of equal prefixes the one that counts comes last.
    routes.sort_by_key(|(prefix, priority, _)| (*prefix, std::cmp::Reverse(*priority)));
    let mut networks: BTreeMap<IpNet, u32> = routes
        .iter()
        .map(|(prefix, _, device)| (*prefix, *device))
        .collect();
    let inside: Vec<IpNet> = networks
        .iter()
        .filter(|(_, device)| **device != 0)
        .map(|(prefix, _)| *prefix)
        .collect();
    networks
        .retain(|prefix, device| *device != 0 || inside.iter().any(|outer| outer.contains(prefix)));
    networks
}

/// How packets leave by each device. Replies to a client that came in by it go back to the MAC where a container or
/// a virtual machine is behind it, and by a bridge's ports; the others are uplinks.
pub fn interfaces(snapshot: &Snapshot) -> impl Iterator<Item = (u32, Interface)> {
    snapshot.links.iter().map(|(&index, link)| {
        let bridged = link.controller.is_some_and(|bridge| {
            snapshot
                .links
                .get(&bridge)
                .is_some_and(|b| b.kind == Kind::Bridge)
        });
        let routed = is_routed(snapshot, index);
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
                network: network(snapshot, index),
                mac: mac.unwrap_or_default(),
                reserved: 0,
            },
        )
    })
}

fn contains(network: IpAddr, prefix: u8, address: IpAddr) -> bool {
    IpNet::new(network, prefix).is_ok_and(|net| net.contains(&address))
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// What addresses are behind, as `LOCATIONS` has it: [`networks`], and this host's own addresses and local prefixes but for
/// loopback ones, which only `lo` serves. Prefixes that are local in another table than *local* (a transparent proxy's) are
/// not this host's.
pub fn locations(snapshot: &Snapshot) -> BTreeMap<IpNet, Location> {
    let networks = networks(snapshot).into_iter().map(|(prefix, network)| {
        let location = Location { network, device: 0 };
        (prefix, location)
    });
    let addresses = snapshot.addresses.iter();
    let addresses = addresses.map(|local| IpNet::from(local.address));
    let prefixes = snapshot.routes.iter().filter(|route| route.local);
    let prefixes = prefixes.filter_map(|route| IpNet::new(route.destination, route.prefix).ok());
    let local = addresses
        .chain(prefixes)
        .filter(|prefix| !prefix.addr().is_loopback())
        .map(|prefix| (prefix.trunc(), Location::HERE));
    networks.chain(local).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::interfaces::{Bridging, Local, Mac, Neighbour, Queueing, Standing};

    pub(super) const MAC_A: Mac = [2, 0, 0, 0, 0, 0xa];
    pub(super) const NEIGHBOUR: Neighbour = Neighbour {
        mac: MAC_A,
        permanent: false,
    };
    const MAC_BR: Mac = [2, 0, 0, 0, 0, 0xb];

    pub(super) fn link(name: &str, kind: Kind, controller: Option<u32>) -> Link {
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
            hides_tags: false,
        }
    }

    pub(super) fn route(destination: &str, prefix: u8, ifindex: u32, gateway: bool) -> Route {
        Route {
            destination: destination.parse().expect("a literal"),
            prefix,
            ifindex,
            gateway,
            preferred_source: None,
            priority: 0,
            local: false,
        }
    }

    pub(super) fn ip(text: &str) -> IpAddr {
        text.parse().expect("a literal")
    }

    /// lo, an uplink, a bridge with a container, a routed container.
    pub(crate) fn host() -> Snapshot {
        let mut snapshot = Snapshot::default();
        let veth = Kind::Veth {
            peer_elsewhere: true,
        };
        snapshot.links.insert(1, link("lo", Kind::Loopback, None));
        snapshot.links.insert(2, link("eth0", Kind::Other, None));
        snapshot.links.insert(3, link("br0", Kind::Bridge, None));
        snapshot.links.insert(4, link("veth0", veth, Some(3)));
        snapshot.links.insert(5, link("ptp0", veth, None));
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
                standing: Standing::Preferred,
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
            .map(|(prefix, device)| format!("{prefix} {device}"))
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
        assert_eq!(networks(&snapshot).into_values().collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn a_bridge_that_is_an_uplink_is_no_container_network() {
        let mut snapshot = host();
        snapshot.links.insert(6, link("eth1", Kind::Other, Some(3)));
        assert!(!networks(&snapshot).values().any(|device| *device == 3));
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
