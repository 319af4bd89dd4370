//! What one reading of the network says: plain types, which know nothing of how they were read.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    routes::{Route, Routes},
    rules::Selective,
    xfrm::Policy,
};

pub type Mac = [u8; 6];

/// What a device is, as far as delivery cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Loopback,
    Bridge,
    /// One end of a pair, and the other end where that is in another network namespace.
    Veth {
        peer: Option<Peer>,
    },
    /// A virtual machine's end.
    Tap,
    /// Carries others: a bond or a team, whose ports are not attached themselves.
    Bond,
    /// Everything else that leads off this machine.
    Other,
}

/// A veth's other end, as this host's network namespace names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The id that this network namespace has for the other one; negative where it has none.
    pub namespace: i32,
    /// The index in that namespace.
    pub ifindex: u32,
}

/// What packets begin with at a device's tc ingress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    Ethernet,
    /// The IP header: tun, WireGuard, PPP.
    Ip,
    /// Something else, such as a tunnel's outer header on kernels before 5.14.
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub name: String,
    pub kind: Kind,
    pub header: Header,
    /// `None` for devices without Ethernet headers.
    pub mac: Option<Mac>,
    /// The bridge or bond that it is a port of.
    pub controller: Option<u32>,
    pub up: bool,
    pub mtu: u32,
    pub queueing: Queueing,
    pub bridging: Bridging,
    /// The device that it is a VLAN of.
    pub vlan_of: Option<u32>,
    /// The other end of a veth pair that has both ends here.
    pub other_end: Option<u32>,
    /// It carries VLANs and takes their tags off, so that XDP sees tagged frames as untagged (rx-vlan-offload).
    pub hides_tags: bool,
}

/// What a bridge, or a port of one, forbids or chooses, which the fast path goes round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bridging {
    /// Of a bridge: ports have VLANs.
    pub vlan_filtering: bool,
    /// Of a bridge: the spanning tree protocol may block ports.
    pub stp: bool,
    /// Of a port: it may not speak with other isolated ones.
    pub isolated: bool,
}

/// The queueing disciplines of a device, as far as the fast path has to do with them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queueing {
    /// The kind of the root qdisc, where that may hold packets back to meet a limit.
    pub shaper: Option<String>,
    /// The qdisc `ingress`, which has no egress side as `clsact` has.
    pub ingress_only: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Local {
    pub ifindex: u32,
    pub address: IpAddr,
    pub prefix: u8,
    pub standing: Standing,
}

/// Whether this host sends from an address of its own (RFC 4862).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// Another machine may have it: it is being looked for (tentative), or was found.
    Unusable,
    /// Not for what begins now.
    Deprecated,
    Preferred,
}

/// The kernel's answer to how it reaches one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub route: Route,
    /// The address that it sends from (RFC 6724), where the route names none.
    pub source: Option<IpAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub mac: Mac,
    /// Set by hand, and never asked for.
    pub permanent: bool,
}

/// What a container's namespace says of the end that it has of a veth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FarEnd {
    pub peer: Peer,
    pub mac: Mac,
    pub addresses: Vec<Claim>,
}

/// An address that a container has given to its end of a veth. Whether its word counts is decided in `plan/locations.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    pub address: IpAddr,
    /// When the kernel took it, in hundredths of a second from one moment in the past.
    pub since: u64,
}

/// One reading. Indices are the kernel's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub links: BTreeMap<u32, Link>,
    pub addresses: Vec<Local>,
    pub routes: Routes,
    /// By device and address.
    pub neighbours: HashMap<(u32, IpAddr), Neighbour>,
    /// Bridge and MAC to port, of neighbours.
    pub forwarding: HashMap<(u32, Mac), u32>,
    /// By the host's end, of containers whose namespace answers.
    pub far_ends: BTreeMap<u32, FarEnd>,
    /// The containers' addresses, and the host's end of the veth of each one's container.
    pub owners: BTreeMap<IpAddr, u32>,
    /// The host's ends of veths whose containers say that they have addresses of others too, with one such address each.
    pub disputed: BTreeMap<u32, IpAddr>,
    /// Whether this host routes IPv4, and IPv6.
    pub forwards: (bool, bool),
    /// Devices whose packets must come the way that answers go (rp_filter is 1), of those that networks are behind.
    pub strict: BTreeSet<u32>,
    /// Whether other rules than the kernel's own choose routes, for IPv4 and IPv6, or routes are listed without their devices: then
    /// `routes` do not tell the way.
    pub rules: (bool, bool),
    /// Whether any of them chooses by a mark, for IPv4 and IPv6.
    pub marks: (bool, bool),
    /// Those of them that choose by protocol or ports.
    pub selective: Vec<Selective>,
    /// The kernel's answers for single addresses; `None` where it has no route.
    pub answers: HashMap<IpAddr, Option<Answer>>,
    /// IPsec policies that forbid packets or transform them.
    pub policies: Vec<Policy>,
}

impl Snapshot {
    /// Networks all of whose addresses are this host's.
    pub fn local_prefixes(&self) -> impl Iterator<Item = IpNet> + Clone {
        let routes = self.links.keys().flat_map(|it| self.routes.by(*it, true));
        routes.filter_map(|route| IpNet::new(route.destination, route.prefix).ok())
    }

    /// Devices that tagged frames come in by for others here: for a VLAN's device, or a bridge that tells VLANs apart.
    pub fn carrying_vlans(&self) -> BTreeSet<u32> {
        let filters = |bridge: &u32| {
            let bridge = self.links.get(bridge);
            bridge.is_some_and(|bridge| bridge.bridging.vlan_filtering)
        };
        let vlans = self.links.values().filter_map(|link| link.vlan_of);
        let ports = self.links.iter();
        let ports = ports.filter(|(_, link)| link.controller.as_ref().is_some_and(filters));
        vlans.chain(ports.map(|(index, _)| *index)).collect()
    }
}
