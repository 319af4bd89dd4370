//! By which route a backend is reached, and from which address of this host: what table main says, or the kernel's answer. How
//! long packets may be by routes.

use std::{collections::BTreeMap, net::IpAddr};

use forwarder_common::{limits, tuple::Address};
use ipnet::{IpNet, Ipv4Net};

use super::{contains, is_link_local, resolve};
use crate::{
    network::{Answer, Local, Selective, Snapshot, Standing},
    publish::Spec,
};

/// Whether only the kernel knows the way to a backend ([`Snapshot::answers`]): rules choose the table, by more than the
/// destination; or which of its IPv6 addresses it sends from to another machine.
pub fn takes_an_answer(snapshot: &Snapshot, backend: IpAddr) -> bool {
    match backend {
        IpAddr::V4(_) => snapshot.rules.0,
        IpAddr::V6(_) => {
            snapshot.rules.1 || resolve(snapshot, backend).is_ok_and(|resolved| resolved.remote)
        }
    }
}

/// A rule that may choose the way of packets to a publish's backend by their protocol or ports. The stack, which the proxy's
/// packets pass, knows those; the kernel is not asked by them.
pub(super) fn rule_by_ports<'a>(snapshot: &'a Snapshot, spec: &Spec) -> Option<&'a Selective> {
    let (protocol, ports) = (spec.protocol.number(), spec.backend_ports);
    snapshot.selective.iter().find(|rule| {
        rule.is_v4 == spec.backend.is_ipv4()
            && rule.protocol.is_none_or(|it| it == protocol)
            && (rule.ports).is_none_or(|(first, last)| first <= ports.last && ports.first <= last)
            && (rule.destination).is_none_or(|it| it.contains(&spec.backend))
    })
}

pub(super) fn route_to(snapshot: &Snapshot, backend: IpAddr) -> Option<Answer> {
    match snapshot.answers.get(&backend) {
        Some(answer) => *answer,
        None => snapshot.routes.to(backend).map(|route| Answer {
            route,
            source: None,
        }),
    }
}

/// Whether a publish goes on with the source address that it has, so that live connections go on: an IPv6 address of the
/// way's device that is still preferred, whichever the kernel would choose now. With privacy addresses that changes every
/// day. What a route names counts at once.
pub fn keeps_source(snapshot: &Snapshot, backend: IpAddr, present: Address) -> bool {
    route_to(snapshot, backend).is_some_and(|Answer { route, .. }| {
        let mut addresses = snapshot.addresses.iter();
        let stays = addresses.any(|local| {
            Address::from(local.address) == present
                && local.ifindex == route.ifindex
                && local.standing == Standing::Preferred
        });
        stays && backend.is_ipv6() && route.preferred_source.is_none()
    })
}

/// The source address that this host would use: the route's own, else the kernel's choice. Where that is not asked for, one
/// on the device, in the backend's subnet if there is one, else any other of the family.
pub(super) fn source(snapshot: &Snapshot, answer: &Answer, backend: IpAddr) -> Option<IpAddr> {
    let route = &answer.route;
    let usable = |local: &&Local| {
        let address = local.address;
        address.is_ipv4() == backend.is_ipv4()
            && !address.is_loopback()
            && !is_link_local(address)
            && local.standing != Standing::Unusable
    };
    route.preferred_source.or(answer.source).or_else(|| {
        let best = snapshot
            .addresses
            .iter()
            .filter(usable)
            .rev() // of equals the first, which is the primary address
            .max_by_key(|local| {
                let here = local.ifindex == route.ifindex;
                let near = here && contains(local.address, local.prefix, backend);
                (local.standing, near, here)
            })?;
        Some(best.address)
    })
}

/// The longest packets that leave by each route of devices with a route that has an MTU of its own, by device; IPv6 to the least that
/// its links carry (RFC 8200 section 5). None if there are too many routes.
pub fn mtus(snapshot: &Snapshot) -> BTreeMap<(u32, IpNet), u32> {
    const LEAST_OF_IPV6: u32 = 1280;
    let mut mtus = BTreeMap::new();
    for device in snapshot.routes.narrow() {
        for route in snapshot.routes.by(device, false) {
            let mtu = match (route.mtu, route.destination) {
                (0, _) => u32::MAX, // as the device has it
                (mtu, IpAddr::V4(_)) => mtu,
                (mtu, IpAddr::V6(_)) => mtu.max(LEAST_OF_IPV6),
            };
            if let Ok(prefix) = IpNet::new(route.destination, route.prefix) {
                mtus.entry((device, prefix.trunc())).or_insert(mtu); // the first of equals counts
            }
        }
        let v4 = (device, Ipv4Net::default().into());
        mtus.entry(v4).or_insert(u32::MAX); // or it would be part of ::/0
    }
    if mtus.len() > limits::ROUTE_MTUS as usize {
        mtus.clear();
    }
    mtus
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        network::Route,
        plan::locations::tests::{change, host, ip, route},
    };

    #[test]
    fn the_kernels_answer_comes_before_table_main() {
        let (mut host, backend) = (host(), ip("172.31.0.2"));
        assert!(!takes_an_answer(&host, backend));
        host.rules.0 = true;
        assert!(takes_an_answer(&host, backend));
        let answer = Answer {
            route: route("172.31.0.0", 16, 2, true),
            source: Some(ip("198.51.100.2")),
        };
        host.answers.insert(backend, Some(answer));
        let resolved = resolve(&host, backend).expect("a route");
        assert_eq!((resolved.hop.ifindex, resolved.remote), (2, true));
        assert_eq!(IpAddr::from(resolved.source), ip("198.51.100.2"));
        host.answers.insert(backend, None);
        let reason = resolve(&host, backend).expect_err("no fast path");
        assert_eq!(reason.to_string(), "no route to 172.31.0.2");
    }

    #[test]
    fn a_routes_own_mtu_is_told_with_all_routes_of_its_device() {
        let mut host = host();
        assert!(mtus(&host).is_empty());
        let (far, within) = (
            route("10.0.0.0", 8, 2, true),
            route("10.1.0.0", 16, 2, true),
        );
        let worse = Route {
            priority: 7,
            mtu: 1200,
            ..far
        };
        let small = Route {
            mtu: 600,
            ..route("2001:db8:7::", 48, 2, true)
        };
        host.routes
            .extend([Route { mtu: 1400, ..far }, within, worse, small]);
        let mtus = mtus(&host);
        let mtu = |prefix: &str| mtus.get(&(2, prefix.parse().expect("a literal"))).copied();
        assert_eq!(mtu("10.0.0.0/8"), Some(1400), "the better one's");
        assert_eq!(mtu("10.1.0.0/16"), Some(u32::MAX), "the device's");
        assert_eq!(mtu("2001:db8:7::/48"), Some(1280));
        assert_eq!(mtu("0.0.0.0/0"), Some(u32::MAX));
        assert!(mtus.keys().all(|(device, _)| *device == 2));
    }

    const FAR: &str = "2001:db8:200::a";

    /// A host with IPv6 addresses on the way to a machine, the newest first.
    fn with_addresses(addresses: &[(&str, Standing)]) -> Snapshot {
        let mut host = host();
        host.routes.insert(route("2001:db8:200::", 64, 2, false));
        host.addresses
            .extend(addresses.iter().map(|&(address, standing)| Local {
                ifindex: 2,
                address: ip(address),
                prefix: 64,
                standing,
            }));
        host
    }

    #[test]
    fn this_host_sends_from_no_address_that_may_be_anothers() {
        let mut host = with_addresses(&[
            ("2001:db8:200::4", Standing::Unusable),
            ("2001:db8:200::3", Standing::Deprecated),
            ("2001:db8:200::2", Standing::Preferred),
        ]);
        let source = |host: &Snapshot| {
            let resolved = resolve(host, ip(FAR)).ok()?;
            Some(IpAddr::from(resolved.source))
        };
        assert_eq!(source(&host), Some(ip("2001:db8:200::2")));
        host.addresses.pop();
        assert_eq!(source(&host), Some(ip("2001:db8:200::3")), "if no other");
        host.addresses.pop();
        assert_eq!(source(&host), None);
    }

    #[test]
    fn to_another_machine_the_source_is_the_kernels_choice_until_that_goes() {
        let [new, old] = ["2001:db8:200::3", "2001:db8:200::2"];
        let mut host = with_addresses(&[(new, Standing::Preferred), (old, Standing::Preferred)]);
        assert!(takes_an_answer(&host, ip(FAR)));
        assert!(!takes_an_answer(&host, ip("198.51.100.77")), "IPv4");
        let answer = Answer {
            route: route("2001:db8:200::", 64, 2, false),
            source: Some(ip(old)),
        };
        host.answers.insert(ip(FAR), Some(answer));
        let resolved = resolve(&host, ip(FAR)).expect("a route");
        assert_eq!(IpAddr::from(resolved.source), ip(old));

        let keeps = |host: &Snapshot, present| keeps_source(host, ip(FAR), ip(present).into());
        assert!(keeps(&host, new) && keeps(&host, old));
        assert!(!keeps(&host, "2001:db8:200::9"), "gone");
        let far = "2001:db8:200::";
        change(&mut host, far, |it| it.preferred_source = Some(ip(old)));
        host.answers.clear();
        assert!(!keeps(&host, new), "the route names another");
        change(&mut host, far, |it| it.preferred_source = None);
        host.addresses[3].standing = Standing::Deprecated;
        assert!(!keeps(&host, new));
    }
}
