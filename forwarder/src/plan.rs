//! Decides, from a snapshot and without IO: how packets get to a backend, which devices the program is
//! attached to, and how replies leave by each.

mod behind;
mod bypassed;
pub mod locations;
mod routes;
mod unserved;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use forwarder_common::{
    flow::{Hop, delivery},
    publish::{Interface, Publish as PublishEntry, flag, uplinks as bits, xdp},
    tuple::Address,
};
use ipnet::IpNet;

use self::{
    behind::{bridges_behind, is_way_between},
    routes::{route_to, rule_by_ports, source},
};
pub use self::{
    bypassed::{allows_xdp, bypassed_bridging},
    routes::{keeps_source, mtus, takes_an_answer},
    unserved::Unserved,
};
use crate::{
    config::XdpChoice,
    datapath::{maps::Installed, xdp::Mode},
    network::{Header, Kind, Link, Mac, Peer, Route, Snapshot, xfrm::covering_policy},
    plan::locations::{
        container_networks, is_host_route, is_link_local, is_local_bridge, is_routed, way_to,
    },
    publish::{Publish, Spec, spec::Protocol},
};

/// What the kernel is to have of a publish, and why the fast path does not serve it, if it does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    pub installed: Installed,
    pub unserved: Option<Unserved>,
    /// An IPsec policy covers it: flows that were begun before would go round that.
    pub covered: bool,
}

/// How a publish stands, beside what is wanted of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Standing<'a> {
    /// The source after SNAT that it has.
    pub source: Option<Address>,
    /// One socket holds all of its ports.
    pub steered: bool,
    pub draining: bool,
    /// The backend is told of each client.
    pub proxy_protocol: bool,
    pub respects_firewall: bool,
    /// The place of the publish that had the port before and drains; 0 for none.
    pub previous: u32,
    pub unattached: &'a [Unattached],
}

/// A device that is without its program for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unattached {
    pub ifindex: u32,
    /// The container network behind it, as [`Interface::network`] has it; 0 for none.
    pub network: u32,
}

impl Unattached {
    /// Whether the program misses what a publish takes: clients of this host or of others, which its row speaks of, or
    /// answers of its backend. Of a container that is a client there, the proxy hears by itself.
    fn concerns(&self, backend: &Hop) -> bool {
        self.network == 0 || [self.ifindex, self.network].contains(&backend.ifindex)
    }
}

/// Plans how a publish is served.
pub fn publish(
    snapshot: &Snapshot,
    publish: &Publish,
    allow: &[IpNet],
    standing: Standing<'_>,
) -> Planned {
    let spec = &publish.spec;
    let policy = covering_policy(snapshot, spec);
    let resolved = match (for_user_space(spec), policy) {
        (Some(why), _) => Err(why),
        _ if standing.proxy_protocol => Err(Unserved::ProxyProtocol),
        (_, Some(policy)) => Err(Unserved::Ipsec(policy.to_string())),
        _ => match rule_by_ports(snapshot, spec) {
            Some(rule) => Err(Unserved::Rule(rule.priority)),
            None => resolve(snapshot, spec.backend),
        },
    };
    let resolved = resolved.and_then(|resolved| {
        if standing.respects_firewall {
            through_the_stack(snapshot, spec.backend, &resolved)?;
        }
        let keeps = |source: &Address| keeps_source(snapshot, spec.backend, *source);
        let source = standing.source.filter(keeps).unwrap_or(resolved.source);
        Ok(Resolved { source, ..resolved })
    });
    let (resolved, unserved) = match resolved {
        Ok(resolved) => (resolved, None),
        // Without a hop, the program passes packets up to the proxy's socket.
        Err(reason) => {
            let nowhere = Resolved {
                hop: Hop::default(),
                source: Address::UNSPECIFIED,
                remote: false,
            };
            (nowhere, Some(reason))
        }
    };
    // Flows that exist keep their hop: they may not pass the device.
    let mut unattached = standing.unattached.iter();
    let detached = unattached.find(|it| it.concerns(&resolved.hop));
    let detached = detached.and_then(|it| snapshot.links.get(&it.ifindex));
    let unserved = unserved.or(detached.map(|link| Unserved::Detached(link.name.clone())));
    let flags = [
        (flag::SINGLE_PORT, spec.backend_is_single()),
        (flag::REMOTE, resolved.remote),
        (flag::ALLOW_LIST, !allow.is_empty()),
        (flag::STEERED, standing.steered),
        (flag::DRAINING, standing.draining || detached.is_some()),
        (flag::STACK, standing.respects_firewall),
    ];
    let set = flags.into_iter().filter(|(_, set)| *set);
    let entry = PublishEntry {
        backend: spec.backend.into(),
        source: resolved.source,
        hop: resolved.hop,
        first_port: spec.ports.first,
        backend_port: spec.backend_ports.first,
        flags: set.fold(0, |flags, (flag, _)| flags | flag),
        previous: u16::try_from(standing.previous).unwrap_or(0), // there are no more places
    };
    let installed = Installed {
        entry,
        frontends: spec.frontends(),
        protocol: spec.protocol.number(),
        ports: (spec.ports.first, spec.ports.last),
        backend: spec.backend,
        backend_ports: (spec.backend_ports.first, spec.backend_ports.last),
        allow: allow.to_vec(),
    };
    Planned {
        installed,
        unserved,
        covered: policy.is_some(),
    }
}

/// Why no client of a publish can have the fast path, as far as that alone says so.
fn for_user_space(spec: &Spec) -> Option<Unserved> {
    let addresses = [spec.address, Some(spec.backend)];
    if spec.protocol == Protocol::Sctp {
        Some(Unserved::Sctp)
    } else if addresses.into_iter().flatten().any(is_link_local) {
        Some(Unserved::LinkLocal)
    } else if (spec.address).is_some_and(|it| it.is_ipv4() != spec.backend.is_ipv4()) {
        Some(Unserved::OtherFamily)
    } else {
        None
    }
}

/// How packets of other machines get to the backend, one of [`delivery`].
pub const fn delivery_of(entry: &PublishEntry) -> u32 {
    if entry.flags & flag::STACK != 0 {
        delivery::STACK
    } else {
        entry.hop.delivery
    }
}

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
/// Why the fast path cannot serve it.
pub fn resolve(snapshot: &Snapshot, backend: IpAddr) -> Result<Resolved, Unserved> {
    if backend.is_loopback()
        || snapshot
            .addresses
            .iter()
            .any(|local| local.address == backend)
    {
        return Err(Unserved::ThisHost);
    }
    let answer = route_to(snapshot, backend).ok_or(Unserved::NoRoute(backend))?;
    let route = answer.route;
    if route.local {
        return Err(Unserved::ThisHost);
    }
    let device = snapshot
        .links
        .get(&route.ifindex)
        .ok_or(Unserved::NoDevice(backend))?;
    let source = source(snapshot, &answer, backend)
        .ok_or(Unserved::NoSource(backend))?
        .into();
    let neighbour = Hop {
        ifindex: route.ifindex,
        delivery: delivery::NEIGHBOUR,
        ..Hop::default()
    };
    let device_mac = device.mac.unwrap_or_default();
    let remote = !leads_to_local(snapshot, &route, device);
    if remote && device.header == Header::Other {
        return Err(Unserved::LinkHeader(device.name.clone()));
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
    // By which port of a bridge behind this one, is not known.
    let leads_on = snapshot.links.get(&port)?.other_end.is_some();
    (!leads_on).then_some((port, mac))
}

/// Whether the stack can carry packets of other machines to the backend, and its answers back.
///
/// # Errors
/// Why not.
pub fn through_the_stack(
    snapshot: &Snapshot,
    backend: IpAddr,
    resolved: &Resolved,
) -> Result<(), Unserved> {
    if resolved.remote {
        return Err(Unserved::FirewallRemote);
    }
    let (routes, setting) = match backend {
        IpAddr::V4(_) => (snapshot.forwards.0, "net.ipv4.ip_forward"),
        IpAddr::V6(_) => (snapshot.forwards.1, "net.ipv6.conf.all.forwarding"),
    };
    if routes {
        Ok(())
    } else {
        Err(Unserved::FirewallForwarding(setting))
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
        Kind::Veth { .. } | Kind::Tap => is_host_route(route) && is_routed(snapshot, route.ifindex),
        Kind::Loopback | Kind::Bond | Kind::Other => false,
    }
}

/// The devices that get the program: every one where packets enter, once. Those that are down too: when one comes up, packets of
/// live connections may be the first by it, and the stack would reset those.
pub fn attached(snapshot: &Snapshot) -> impl Iterator<Item = (u32, &Link)> {
    let behind = bridges_behind(snapshot);
    snapshot.links.iter().filter_map(move |(&index, link)| {
        let behind_bond = link
            .controller
            .and_then(|controller| snapshot.links.get(&controller))
            .is_some_and(|controller| controller.kind == Kind::Bond);
        // A bridge's frames are seen at its ports, a bond's at the bond.
        let enters = link.kind != Kind::Bridge
            && !(behind_bond || is_way_between(snapshot, &behind, (index, link)))
            && link.header != Header::Other;
        enters.then_some((index, link))
    })
}

/// Of these, the devices by which packets enter now.
pub fn entered(snapshot: &Snapshot) -> impl Iterator<Item = (u32, &Link)> {
    attached(snapshot).filter(|(_, link)| link.up)
}

/// The devices that get the XDP program, and how: uplinks. Not veths by default: with native XDP the other end loses
/// TSO; and not generically by default, which comes after GRO and copies.
pub fn with_xdp(snapshot: &Snapshot, choice: XdpChoice) -> impl Iterator<Item = (u32, Mode)> {
    let uplinks = interfaces(snapshot).filter(|(_, i)| i.delivery == delivery::NEIGHBOUR);
    let uplinks: BTreeSet<u32> = uplinks.map(|(index, _)| index).collect();
    entered(snapshot).filter_map(move |(index, link)| {
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

/// How XDP sends frames by a device, as [`Interface::xdp`] has it.
pub fn xdp_by(snapshot: &Snapshot, ifindex: u32, mode: Mode) -> u32 {
    let kind = snapshot.links.get(&ifindex).map(|link| link.kind);
    match (kind, mode) {
        (Some(Kind::Veth { .. }), Mode::Native) => xdp::REDIRECTS,
        _ => xdp::TURNS,
    }
}

/// The devices that other machines are behind.
pub fn uplinks(snapshot: &Snapshot) -> BTreeSet<u32> {
    let networks = container_networks(snapshot);
    let links = snapshot.links.iter();
    let others = links
        .filter(|(ifindex, link)| link.kind != Kind::Loopback && !networks.contains_key(ifindex));
    others.map(|(ifindex, _)| *ifindex).collect()
}

/// What is known of devices that are without their program.
pub fn unattached(snapshot: &Snapshot, devices: BTreeSet<u32>) -> Vec<Unattached> {
    if devices.is_empty() {
        return Vec::new();
    }
    let networks = container_networks(snapshot);
    let unattached = |ifindex| Unattached {
        ifindex,
        network: networks.get(&ifindex).copied().unwrap_or(0),
    };
    devices.into_iter().map(unattached).collect()
}

/// How packets leave by each device. Replies to a client that came in by it go back to the MAC where a container or
/// a virtual machine is behind it; the others are uplinks.
pub fn interfaces(snapshot: &Snapshot) -> impl Iterator<Item = (u32, Interface)> {
    let networks = container_networks(snapshot);
    let is_default_v4 = move |index| {
        let mut defaults = snapshot.routes.defaults();
        defaults.any(|route| route.ifindex == index && route.destination.is_ipv4())
    };
    let narrow = snapshot.routes.narrow();
    let behind = bridges_behind(snapshot);
    snapshot.links.iter().map(move |(&index, link)| {
        let bridge = bridge(snapshot, &behind, link);
        let delivery = match way_to(link) {
            Some(delivery) if bridge.is_some() || is_routed(snapshot, index) => delivery,
            _ => delivery::NEIGHBOUR,
        };
        let layer3 = bridge.unwrap_or(index);
        let network = networks.get(&index).copied().unwrap_or(0);
        let mac = snapshot.links.get(&layer3).and_then(|link| link.mac);
        let interface = Interface {
            delivery,
            mtu: link.mtu,
            ethernet: u32::from(link.header == Header::Ethernet),
            xdp: xdp::NO,
            network,
            layer3,
            mac: mac.unwrap_or_default(),
            strict: u8::from(snapshot.strict.contains(&layer3)),
            default_v4: u8::from(is_default_v4(index)),
            container: match link.kind {
                Kind::Veth { peer: Some(peer) } if network != 0 => container(peer),
                _ => 0,
            },
            narrow: u32::from(narrow.contains(&layer3)),
        };
        (index, interface)
    })
}

/// A container's number, as [`Interface::container`] has it: by its network namespace, if this one has an id for that.
fn container(peer: Peer) -> u32 {
    u32::try_from(peer.namespace).map_or(0, |namespace| namespace + 1)
}

/// The bridge that a device is a port of, or where that is behind another, what has this host's addresses.
fn bridge(snapshot: &Snapshot, behind: &BTreeMap<u32, u32>, link: &Link) -> Option<u32> {
    let bridge = port_of(snapshot, link)?;
    Some(behind.get(&bridge).copied().unwrap_or(bridge))
}

/// The bridge that a device is a port of.
fn port_of(snapshot: &Snapshot, link: &Link) -> Option<u32> {
    link.controller.filter(|controller| {
        let controller = snapshot.links.get(controller);
        controller.is_some_and(|link| link.kind == Kind::Bridge)
    })
}

/// Whether a route or a rule may say that packets of IPv4 to some address end here.
pub fn may_forbid(snapshot: &Snapshot) -> bool {
    let mut forbid = snapshot.routes.by(0, false); // they have no device
    snapshot.rules.0 || forbid.any(|route| route.destination.is_ipv4())
}

/// What the program has to know of several uplinks, as [`bits`].
pub fn uplinks_bits(snapshot: &Snapshot) -> u32 {
    let all = [
        (true, bits::SEVERAL),
        (snapshot.marks.0, bits::MARKS_V4),
        (snapshot.marks.1, bits::MARKS_V6),
    ];
    let set = all.into_iter().filter(|(set, _)| *set);
    if has_several_uplinks(snapshot) {
        set.fold(0, |bits, (_, bit)| bits | bit)
    } else {
        0
    }
}

/// Whether packets of other machines may come by one device whose answers leave by another: routes lead to them by several, or
/// they come by one that none leads by.
pub fn has_several_uplinks(snapshot: &Snapshot) -> bool {
    let leads_there = |ifindex: &u32| {
        let mut routes = snapshot.routes.by(*ifindex, false);
        routes.any(|route| !is_link_local(route.destination))
    };
    let (uplinks, behind) = (uplinks(snapshot), bridges_behind(snapshot));
    let entered = entered(snapshot).filter(|(ifindex, _)| uplinks.contains(ifindex));
    // A VRF, and what is in one, has routes of its own.
    let links = snapshot.links.values();
    let controllers: BTreeSet<u32> = links.filter_map(|link| link.controller).collect();
    let entered = entered.filter_map(|(ifindex, link)| match link.controller {
        None if link.kind != Kind::Bond && controllers.contains(&ifindex) => None,
        None => Some(ifindex),
        Some(_) => bridge(snapshot, &behind, link),
    });
    let all: BTreeSet<u32> = uplinks
        .iter()
        .copied()
        .filter(leads_there)
        .chain(entered)
        .collect();
    all.len() > 1
}

fn contains(network: IpAddr, prefix: u8, address: IpAddr) -> bool {
    IpNet::new(network, prefix).is_ok_and(|net| net.contains(&address))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        network::{Local, Neighbour, Standing},
        plan::locations::tests::{
            MAC_A, MAC_B, MAC_BR, NEIGHBOUR, asked_host, host, ip, link, route,
        },
    };

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
        host.routes.insert(route("203.0.113.0", 24, 6, false));
        let reason = resolve(&host, ip("203.0.113.5")).expect_err("no fast path");
        assert!(reason.to_string().contains("gre1"), "{reason}");
    }

    #[test]
    fn a_bridge_with_an_uplink_is_remote() {
        let mut host = host();
        host.links.insert(6, link("eth1", Kind::Other, Some(3)));
        assert!(resolve(&host, ip("172.31.0.2")).expect("a route").remote);
        host.links.remove(&6);
        assert!(!resolve(&host, ip("172.31.0.2")).expect("a route").remote);
        host.routes.insert(route("0.0.0.0", 0, 3, true));
        assert!(resolve(&host, ip("172.31.0.2")).expect("a route").remote);
    }

    #[test]
    fn what_cannot_be_reached_says_why() {
        let reason = |backend: &str| resolve(&host(), ip(backend)).expect_err("no fast path");
        assert_eq!(reason("198.51.100.2"), Unserved::ThisHost);
        assert_eq!(reason("127.0.0.1"), Unserved::ThisHost);
        assert_eq!(reason("fd00::1"), Unserved::NoRoute(ip("fd00::1")));
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
        host.links.entry(2).and_modify(|it| it.up = false);
        assert_eq!(attached(&host).count(), 6, "also what is down");
        assert_eq!(entered(&host).count(), 5);
    }

    #[test]
    fn packets_come_by_several_uplinks_or_leave_by_several() {
        let mut host = host();
        assert!(!has_several_uplinks(&host));
        host.links.insert(7, link("eth1", Kind::Other, None));
        assert!(has_several_uplinks(&host), "without a route by it");
        host.links.entry(7).and_modify(|it| it.up = false);
        assert!(!has_several_uplinks(&host));
        host.routes.insert(route("203.0.113.0", 24, 7, false));
        assert!(has_several_uplinks(&host));
        host.links.remove(&7);
        for (name, kind) in [
            ("blue", Kind::Other),
            ("bond0", Kind::Bond),
            ("br1", Kind::Bridge),
        ] {
            let mut host = host.clone();
            host.links.insert(8, link(name, kind, None));
            host.links.insert(9, link("eth2", Kind::Other, Some(8)));
            assert_eq!(has_several_uplinks(&host), kind != Kind::Other, "{name}");
        }
    }

    #[test]
    fn only_containers_devices_answer_to_the_mac() {
        let mut host = host();
        host.links.insert(6, link("eth1", Kind::Other, Some(3)));
        let ways: Vec<_> = interfaces(&host)
            .filter(|(_, interface)| interface.delivery != delivery::NEIGHBOUR)
            .map(|(index, interface)| (index, interface.delivery))
            .collect();
        assert_eq!(ways, [(4, delivery::PEER), (5, delivery::PEER)]);
        let layer3: Vec<_> = interfaces(&host).map(|(_, it)| it.layer3).collect();
        assert_eq!(layer3, [1, 2, 3, 3, 5, 3], "ports answer by their bridge");
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
}
