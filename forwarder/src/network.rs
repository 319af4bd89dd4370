//! What the kernel says about this host's network: links, addresses, routes, neighbours and bridges'
//! forwarding tables, read by netlink as one [`Snapshot`], which then follows what the kernel tells of changes.
//! What follows from a snapshot is decided in `plan/locations.rs` and `plan.rs`.

pub mod containers;
pub mod dump;
mod events;
pub mod firewall;
pub mod local;
pub mod netlink;
mod offload;
mod reader;
mod routes;
mod rules;
mod snapshot;
pub mod xfrm;

use std::{collections::BTreeMap, net::IpAddr, ops::ControlFlow};

use anyhow::{Context as _, Result};
use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{
        BridgeStpState, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData,
        LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    tc::{TcAttribute, TcHandle, TcMessage},
};

pub use self::{
    events::{Event, Events},
    reader::Reader,
    routes::{Applied, Route, Routes, Told},
    rules::Selective,
    snapshot::{
        Answer, Bridging, Claim, FarEnd, Header, Kind, Link, Local, Mac, Neighbour, Peer, Queueing,
        Snapshot, Standing,
    },
};

/// Hands over what the kernel lists, each message as it comes and then no more: decoded, a device alone takes 20 KB.
fn list(
    asked: RouteNetlinkMessage,
    what: &str,
    mut take: impl FnMut(RouteNetlinkMessage),
) -> Result<()> {
    let listed = netlink::Socket::open().and_then(|socket| {
        socket.ask(asked, NLM_F_DUMP, |answer| {
            answer.into_iter().for_each(&mut take);
            ControlFlow::Continue(())
        })
    });
    match listed {
        // A family that the kernel was built or started without has nothing to list.
        Err(error)
            if !matches!(
                error.raw_os_error(),
                Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
            ) =>
        {
            Err(error).with_context(|| format!("read {what}"))
        }
        _ => Ok(()),
    }
}

fn link(message: &LinkMessage) -> Option<(u32, Link)> {
    let mut name = None;
    let (mut info_kind, mut mac, mut controller, mut namespace) = (None, None, None, None);
    let (mut bridging, mut parent) = (Bridging::default(), None);
    let mut mtu = u32::MAX;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Address(value) => mac = Mac::try_from(value.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::Controller(value) => controller = Some(*value),
            LinkAttribute::LinkNetNsId(id) => namespace = Some(*id),
            LinkAttribute::Link(index) => parent = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                info_kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
                infos.iter().for_each(|info| bridging.note(info));
            }
            _ => {}
        }
    }
    let header = match message.header.link_layer_type {
        LinkLayerType::Ether | LinkLayerType::Loopback => Header::Ethernet,
        LinkLayerType::None | LinkLayerType::Rawip | LinkLayerType::Ppp => Header::Ip,
        _ => Header::Other,
    };
    let is_vlan = info_kind == Some(InfoKind::Vlan);
    let kind = match info_kind {
        _ if message.header.link_layer_type == LinkLayerType::Loopback => Kind::Loopback,
        Some(InfoKind::Bridge) => Kind::Bridge,
        Some(InfoKind::Veth) => Kind::Veth {
            peer: namespace.map(|namespace| Peer {
                namespace,
                // Older kernels leave it out where the number is the same.
                ifindex: parent.unwrap_or(message.header.index),
            }),
        },
        Some(InfoKind::Tun) if header == Header::Ethernet => Kind::Tap,
        Some(InfoKind::Bond | InfoKind::Team) => Kind::Bond,
        _ => Kind::Other,
    };
    let up = message.header.flags.contains(LinkFlags::Up);
    let mac = mac.filter(|_| header == Header::Ethernet);
    Some((
        message.header.index,
        Link {
            name: name?,
            kind,
            header,
            mac,
            controller,
            up,
            mtu,
            queueing: Queueing::default(),
            bridging,
            vlan_of: parent.filter(|_| is_vlan && namespace.is_none()),
            other_end: parent.filter(|_| kind == Kind::Veth { peer: None }),
            hides_tags: false,
        },
    ))
}

impl Bridging {
    fn note(&mut self, info: &LinkInfo) {
        match info {
            LinkInfo::Data(InfoData::Bridge(settings)) => {
                for setting in settings {
                    match setting {
                        InfoBridge::VlanFiltering(on) => self.vlan_filtering = *on,
                        InfoBridge::StpState(state) => {
                            self.stp = *state != BridgeStpState::Disabled
                        }
                        _ => {}
                    }
                }
            }
            LinkInfo::PortData(InfoPortData::BridgePort(settings)) => {
                self.isolated = settings.contains(&InfoBridgePort::Isolated(true));
            }
            _ => {}
        }
    }
}

/// Root qdiscs that hold no packet back: queues, and those that share the link among flows or devices' queues.
const NOT_SHAPING: [&str; 16] = [
    "noqueue",
    "noop",
    "pfifo",
    "bfifo",
    "pfifo_fast",
    "pfifo_head_drop",
    "fq",
    "fq_codel",
    "fq_pie",
    "codel",
    "pie",
    "sfq",
    "red",
    "hhf",
    "mq",
    "mqprio",
];

impl Queueing {
    fn note(&mut self, qdisc: &TcMessage) {
        let kind = qdisc.attributes.iter().find_map(|a| match a {
            TcAttribute::Kind(kind) => Some(kind.as_str()),
            _ => None,
        });
        match kind {
            Some("ingress") => self.ingress_only = true,
            Some(kind) if qdisc.header.parent == TcHandle::ROOT && !NOT_SHAPING.contains(&kind) => {
                self.shaper = Some(kind.to_owned());
            }
            _ => {}
        }
    }
}

/// An address of a device, wherever that is.
pub(crate) fn address(message: &AddressMessage) -> Option<Local> {
    // For IPv4 on a point-to-point link, Address is the far end and Local this one.
    let find =
        |pick: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(pick);
    let address = find(|a| match a {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    })
    .or_else(|| {
        find(|a| match a {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })?;
    Some(Local {
        ifindex: message.header.index,
        address,
        prefix: message.header.prefix_len,
        standing: standing(message),
    })
}

/// IPv4 knows none of this: its addresses are used whatever their lifetime.
fn standing(message: &AddressMessage) -> Standing {
    let flags = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    let flags = flags.unwrap_or(AddressFlags::empty());
    let has = |flag| flags.contains(flag);
    if message.header.family != AddressFamily::Inet6 {
        Standing::Preferred
    } else if has(AddressFlags::Dadfailed) || has(AddressFlags::Tentative) {
        Standing::Unusable
    } else if has(AddressFlags::Deprecated) {
        Standing::Deprecated
    } else {
        Standing::Preferred
    }
}

fn mac(message: &NeighbourMessage) -> Option<Mac> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => Mac::try_from(bytes.as_slice()).ok(),
            _ => None,
        })
}

fn neighbour_address(message: &NeighbourMessage) -> Option<IpAddr> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
            _ => None,
        })
}

fn neighbour(message: &NeighbourMessage) -> Option<((u32, IpAddr), Neighbour)> {
    if matches!(
        message.header.state,
        NeighbourState::Incomplete | NeighbourState::Failed | NeighbourState::Noarp
    ) {
        return None;
    }
    let address = neighbour_address(message)?;
    let permanent = message.header.state == NeighbourState::Permanent;
    let neighbour = Neighbour {
        mac: mac(message)?,
        permanent,
    };
    Some(((message.header.ifindex, address), neighbour))
}

/// The port of an entry of a bridge's table.
fn learnt(message: &NeighbourMessage, links: &BTreeMap<u32, Link>) -> Option<u32> {
    let port = message.header.ifindex;
    // The port's own address is listed as permanent, and is the bridge's.
    let is_own =
        message.header.state == NeighbourState::Permanent && links.get(&port)?.mac == mac(message);
    (!is_own).then_some(port)
}
