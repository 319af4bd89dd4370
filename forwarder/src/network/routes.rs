//! Routes, however many there are: kept in order, so that one is found, added or taken away without a look at the others.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily,
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
        RouteType, RouteVia,
    },
};

/// include/uapi/linux/rtnetlink.h
pub(super) const RT_TABLE_LOCAL: u32 = 255;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub destination: IpAddr,
    pub prefix: u8,
    /// A `local` route: the destination is this host.
    pub local: bool,
    pub priority: u32,
    pub ifindex: u32,
    /// The next hop; the unspecified address where there are several.
    pub gateway: Option<IpAddr>,
    pub preferred_source: Option<IpAddr>,
    /// The route's own; 0 where the device's counts.
    pub mtu: u32,
}

impl Route {
    /// The first in order of those to a prefix.
    const fn least(destination: IpAddr, prefix: u8, local: bool) -> Self {
        Self {
            destination,
            prefix,
            local,
            priority: 0,
            ifindex: 0,
            gateway: None,
            preferred_source: None,
            mtu: 0,
        }
    }

    pub fn has_several_hops(&self) -> bool {
        self.gateway.is_some_and(|gateway| gateway.is_unspecified())
    }
}

/// What an event says of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Added,
    /// In the place of another, which is not named.
    Replaced,
    /// Beside others, or as one more hop of them.
    Appended,
    Gone,
}

impl Told {
    pub(super) fn of_new(flags: u16) -> Self {
        match flags {
            _ if flags & NLM_F_REPLACE != 0 => Self::Replaced,
            _ if flags & NLM_F_APPEND != 0 => Self::Appended,
            _ => Self::Added,
        }
    }
}

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    Changed,
    AsBefore,
    /// It does not tell all: routes have to be read anew.
    Unclear,
}

/// All routes that every packet may take, of table main and of this host's own addresses, and how many are alike in all that is
/// known of them. Those of no device lead nowhere: they forbid.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    all: BTreeMap<Route, usize>,
    by_device: BTreeSet<Behind>,
    /// Those that have an MTU of their own.
    narrow: BTreeSet<Route>,
}

/// What a device has a route to: its index, whether that is somebody else, how many bits an address there has of its own, and
/// its first address.
type Behind = (u32, bool, u8, IpAddr);

const fn behind(route: &Route) -> Behind {
    let bits = if route.destination.is_ipv4() { 32 } else { 128 };
    let own = bits - route.prefix;
    (route.ifindex, !route.local, own, route.destination)
}

impl Routes {
    /// Those that lead somewhere.
    pub fn iter(&self) -> impl Iterator<Item = &Route> {
        self.all.keys().filter(|route| route.ifindex != 0)
    }

    pub fn insert(&mut self, route: Route) {
        self.by_device.insert(behind(&route));
        if route.mtu != 0 {
            self.narrow.insert(route);
        }
        *self.all.entry(route).or_default() += 1;
    }

    fn remove(&mut self, route: &Route) {
        self.all.remove(route);
        self.narrow.remove(route);
        let others = self.exactly(route.destination, route.prefix, route.local);
        if !{ others }.any(|(other, _)| other.ifindex == route.ifindex) {
            self.by_device.remove(&behind(route));
        }
    }

    /// Those by a device to this host itself, or to others: to one address first, and the widest last.
    pub fn by(&self, ifindex: u32, local: bool) -> impl Iterator<Item = &Route> + Clone {
        let first = (ifindex, !local, 0, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let there = self.by_device.range(first..);
        let there = there.take_while(move |it| (it.0, it.1) == (ifindex, !local));
        there.flat_map(move |&(_, _, own, destination)| {
            let bits = if destination.is_ipv4() { 32 } else { 128 };
            let routes = self.exactly(destination, bits - own, local);
            let routes = routes.map(|(route, _)| route);
            routes.filter(move |route| route.ifindex == ifindex)
        })
    }

    /// The devices that a route with an MTU of its own leads to.
    pub fn narrow(&self) -> BTreeSet<u32> {
        self.narrow.iter().map(|route| route.ifindex).collect()
    }

    /// The route to others that counts for each prefix in a network, the network's own among them.
    pub fn within(&self, network: IpNet) -> impl Iterator<Item = &Route> {
        let first = Route::least(network.network(), network.prefix_len(), false);
        let there = self.all.range(first..).map(|(route, _)| route);
        let there = there.take_while(move |route| route.destination <= network.broadcast());
        let there = there.filter(move |route| {
            route.prefix >= network.prefix_len() && !route.local && route.ifindex != 0
        });
        let mut last = None;
        there.filter(move |route| {
            let prefix = Some((route.destination, route.prefix));
            std::mem::replace(&mut last, prefix) != prefix
        })
    }

    /// The route to an address of somebody else: of the longest prefix, and of such the one of least priority. `None` also where
    /// that leads nowhere.
    pub fn to(&self, address: IpAddr) -> Option<Route> {
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let networks = (0..=longest).rev();
        let networks = networks.filter_map(|length| IpNet::new(address, length).ok());
        let routes = networks.flat_map(|it| self.exactly(it.network(), it.prefix_len(), false));
        let (best, _) = routes.into_iter().next()?;
        (best.ifindex != 0).then_some(*best)
    }

    /// The default routes of both families.
    pub fn defaults(&self) -> impl Iterator<Item = &Route> {
        let [v4, v6] = [
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        ];
        let all = self.exactly(v4, 0, false);
        let all = all.chain(self.exactly(v6, 0, false));
        all.map(|(route, _)| route)
    }

    /// Those to one network, of least priority first.
    fn exactly(
        &self,
        destination: IpAddr,
        prefix: u8,
        local: bool,
    ) -> impl Iterator<Item = (&Route, &usize)> + Clone {
        let there = self.all.range(Route::least(destination, prefix, local)..);
        there.take_while(move |(route, _)| {
            (route.destination, route.prefix, route.local) == (destination, prefix, local)
        })
    }

    /// Does what an event says.
    pub fn apply(&mut self, route: Route, told: Told) -> Applied {
        let alike = self.exactly(route.destination, route.prefix, route.local);
        let alike = alike.filter(|(other, _)| other.priority == route.priority);
        let alike: Vec<(Route, usize)> = alike.map(|(other, count)| (*other, *count)).collect();
        let known = self.all.get(&route).copied().unwrap_or(0);
        // Routes of IPv6 by gateways become hops of one.
        let joins = |other: &Route| {
            route.destination.is_ipv6() && route.gateway.is_some() && other.gateway.is_some()
        };
        let is_clear = match told {
            Told::Added => known == 0 && !alike.iter().any(|(other, _)| joins(other)),
            Told::Replaced => alike.iter().map(|(_, count)| count).sum::<usize>() <= 1,
            Told::Appended => false,
            Told::Gone => known == 1,
        };
        if !is_clear {
            return Applied::Unclear;
        }
        match told {
            Told::Gone => self.remove(&route),
            Told::Replaced if known == 1 => return Applied::AsBefore,
            _ => {
                let replaced = alike.iter().filter(|_| told == Told::Replaced);
                for (other, _) in replaced {
                    self.remove(other);
                }
                self.insert(route);
            }
        }
        Applied::Changed
    }
}

impl Extend<Route> for Routes {
    fn extend<T: IntoIterator<Item = Route>>(&mut self, routes: T) {
        routes.into_iter().for_each(|route| self.insert(route));
    }
}

impl FromIterator<Route> for Routes {
    fn from_iter<T: IntoIterator<Item = Route>>(routes: T) -> Self {
        let mut all = Self::default();
        all.extend(routes);
        all
    }
}

pub(super) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

/// A route that every packet may take: of table main, or of this host's own addresses.
pub(super) fn route(message: &RouteMessage) -> Option<Route> {
    let (route, table) = route_and_table(message)?;
    let wanted = if route.local {
        RT_TABLE_LOCAL
    } else {
        u32::from(RouteHeader::RT_TABLE_MAIN)
    };
    // A cached path of one destination is listed too, and one of packets with some TOS is not for all.
    let is_for_all = !message.header.flags.contains(RouteFlags::Cloned) && message.header.tos == 0;
    (table == wanted && is_for_all).then_some(route)
}

/// A route that leads somewhere, or nowhere, and the table that it is in.
pub(super) fn route_and_table(message: &RouteMessage) -> Option<(Route, u32)> {
    let header = &message.header;
    let unspecified = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut table = u32::from(header.table);
    let mut route = Route {
        destination: unspecified,
        prefix: header.destination_prefix_length,
        ifindex: 0,
        gateway: None,
        preferred_source: None,
        priority: 0,
        local: header.kind == RouteType::Local,
        mtu: 0,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => route.destination = ip(address)?,
            RouteAttribute::Oif(index) => route.ifindex = *index,
            RouteAttribute::Gateway(address) => route.gateway = ip(address).or(Some(unspecified)),
            RouteAttribute::Via(via) => {
                route.gateway = Some(match via {
                    RouteVia::Inet(v4) => IpAddr::V4(*v4),
                    RouteVia::Inet6(v6) => IpAddr::V6(*v6),
                    _ => unspecified,
                });
            }
            RouteAttribute::PrefSource(address) => route.preferred_source = ip(address),
            RouteAttribute::Priority(priority) => route.priority = *priority,
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Metrics(metrics) => {
                let mtus = metrics.iter().filter_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
                route.mtu = mtus.sum(); // there is one at most
            }
            RouteAttribute::MultiPath(hops) => {
                route.ifindex = hops.first()?.interface_index;
                route.gateway = Some(unspecified);
            }
            _ => {}
        }
    }
    match header.kind {
        RouteType::Unicast | RouteType::Local => (route.ifindex != 0).then_some((route, table)),
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => {
            route.ifindex = 0;
            Some((route, table))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("a literal")
    }

    fn route(destination: &str, prefix: u8, ifindex: u32) -> Route {
        Route {
            destination: ip(destination),
            prefix,
            local: false,
            priority: 0,
            ifindex,
            gateway: None,
            preferred_source: None,
            mtu: 0,
        }
    }

    #[test]
    fn the_longest_prefix_comes_first_and_then_the_least_priority() {
        let better = route("10.1.0.0", 16, 3);
        let routes = [
            route("0.0.0.0", 0, 2),
            Route {
                priority: 7,
                ifindex: 4,
                ..better
            },
            better,
            Route {
                local: true,
                ..route("10.1.2.3", 32, 1)
            },
            route("10.1.9.0", 24, 0),
            route("::", 0, 5),
        ];
        let routes: Routes = routes.into_iter().collect();
        let by = |address: &str| routes.to(ip(address)).map(|route| route.ifindex);
        assert_eq!(by("10.1.2.3"), Some(3));
        assert_eq!(by("10.2.2.3"), Some(2));
        assert_eq!(by("10.1.9.1"), None, "it is forbidden");
        assert_eq!(by("2001:db8::1"), Some(5));
        assert_eq!(routes.defaults().count(), 2);
    }

    #[test]
    fn a_devices_routes_are_found_until_the_last_has_gone() {
        let one = route("10.1.0.0", 16, 2);
        let again = Route { priority: 7, ..one };
        let host = route("10.9.0.1", 32, 2);
        let local = Route {
            local: true,
            ..route("10.9.0.2", 32, 2)
        };
        let routes = [one, again, host, local, route("10.1.0.0", 16, 3)];
        let mut routes: Routes = routes.into_iter().collect();
        assert!(routes.by(2, false).eq([&host, &one, &again]));
        assert!(routes.by(2, true).eq([&local]));
        for gone in [one, again] {
            assert!(routes.by(2, false).any(|route| *route == gone));
            routes.apply(gone, Told::Gone);
        }
        assert!(routes.by(2, false).eq([&host]));
    }

    #[test]
    fn in_a_network_the_best_of_equal_routes_counts() {
        let better = route("10.1.0.0", 16, 3);
        let worse = Route {
            priority: 7,
            ..route("10.1.0.0", 16, 2)
        };
        let (inside, last) = (route("10.1.7.0", 24, 4), route("10.1.255.255", 32, 4));
        let outside = [route("10.0.0.0", 8, 2), route("10.2.0.0", 24, 2)];
        let routes = [better, worse, inside, last].into_iter().chain(outside);
        let routes: Routes = routes.collect();
        let network = "10.1.0.0/16".parse().expect("a literal");
        assert!(routes.within(network).eq([&better, &inside, &last]));
    }

    #[test]
    fn an_event_that_does_not_tell_all_changes_nothing() {
        let (one, other) = (route("10.0.0.0", 8, 2), route("10.0.0.0", 8, 3));
        let both: Routes = [one, other].into_iter().collect();
        let twice: Routes = [one, one].into_iter().collect();
        for (before, route, told) in [
            (&both, route("10.0.0.0", 8, 4), Told::Replaced), // which of the two?
            (&both, one, Told::Added),                        // one more that looks like it?
            (&both, one, Told::Appended),
            (&twice, one, Told::Gone), // is there another?
            (&twice, other, Told::Replaced),
            (&both, route("10.0.0.0", 8, 4), Told::Gone),
        ] {
            let mut routes = before.clone();
            assert_eq!(routes.apply(route, told), Applied::Unclear, "{told:?}");
            assert_eq!(routes, *before, "{told:?}");
        }
    }

    #[test]
    fn a_route_is_added_replaced_and_gone() {
        let (one, other) = (route("10.0.0.0", 8, 2), route("10.0.0.0", 8, 3));
        let mut routes = Routes::default();
        assert_eq!(routes.apply(one, Told::Added), Applied::Changed);
        assert_eq!(routes.apply(one, Told::Replaced), Applied::AsBefore);
        assert_eq!(routes.apply(other, Told::Replaced), Applied::Changed);
        assert!(routes.iter().eq([&other]));
        assert_eq!(routes.apply(other, Told::Gone), Applied::Changed);
        assert_eq!(routes, Routes::default());
    }

    #[test]
    fn ipv6_routes_by_several_gateways_become_one() {
        let by = |gateway| Route {
            gateway: Some(ip(gateway)),
            ..route("2001:db8::", 32, 2)
        };
        let mut routes: Routes = [by("fe80::1")].into_iter().collect();
        assert_eq!(routes.apply(by("fe80::2"), Told::Added), Applied::Unclear);
    }
}
