//! What the kernel tells of changes: by a socket of its own, in the order in which they happen. What follows from them is in
//! `network/reader.rs`.

use std::{collections::VecDeque, future, io, net::IpAddr, pin::Pin};

use futures_util::{Stream, StreamExt as _, stream};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkFlags, LinkMessage},
    neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage},
};
use netlink_sys::{
    AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE,
};
use tokio::select;

use super::{
    Mac, Neighbour, address, mac, neighbour, neighbour_address,
    netlink::messages,
    routes::{Route, Told, route},
    xfrm,
};

// include/uapi/linux/rtnetlink.h: messages that the crate cannot read, or whose content does not matter.
const RTM_NEWNETCONF: u16 = 80;
const RTM_DELNETCONF: u16 = 81;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;
/// Groups of events, by number.
const GROUPS: [u32; 12] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_NEIGH,
    libc::RTNLGRP_TC,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV4_RULE,
    libc::RTNLGRP_IPV6_RULE,
    libc::RTNLGRP_IPV4_NETCONF,
    libc::RTNLGRP_IPV6_NETCONF,
    libc::RTNLGRP_NEXTHOP,
];

/// What has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Anything may have: events were lost.
    Lost,
    /// A device, which may have gone or be down now.
    Link {
        ifindex: u32,
        up: bool,
    },
    Address,
    /// From a device.
    AddressGone(u32, IpAddr),
    Route(Route, Told),
    /// Hops that routes have by reference.
    NextHops,
    /// What is known of a neighbour now, by its device and address.
    Neighbour((u32, IpAddr), Option<Neighbour>),
    /// A bridge has learnt, or forgotten, where a MAC is.
    Learnt(u32, Mac),
    /// Rules, and settings that say whether and how this host routes.
    Rules,
    /// Qdiscs and IPsec policies.
    Other,
}

impl Event {
    /// Whether it may change by which route an address is reached, or from which source.
    pub fn is_of_routing(&self) -> bool {
        !matches!(self, Self::Neighbour(..) | Self::Learnt(..) | Self::Other)
    }
}

/// All changes of what a snapshot holds, one after the other.
pub struct Events {
    /// `None` where nothing is to be heard.
    network: Option<TokioSocket>,
    policies: Pin<Box<dyn Stream<Item = ()> + Send>>,
    /// Of one datagram.
    told: VecDeque<Event>,
}

impl Events {
    /// Listens in the current network namespace.
    ///
    /// # Errors
    /// The kernel refuses the socket.
    pub fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
        for group in GROUPS {
            socket.socket_mut().add_membership(group)?;
        }
        Ok(Self {
            network: Some(socket),
            policies: Box::pin(xfrm::changes()),
            told: VecDeque::new(),
        })
    }

    /// Hears nothing.
    pub fn silent() -> Self {
        Self {
            network: None,
            policies: Box::pin(stream::pending()),
            told: VecDeque::new(),
        }
    }

    /// Waits for the next one.
    pub async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.told.pop_front() {
                return event;
            }
            let Some(socket) = &self.network else {
                return future::pending().await;
            };
            let received = select! {
                received = socket.recv_from_full() => received,
                Some(()) = self.policies.next() => return Event::Other,
            };
            self.take(received);
        }
    }

    /// The next one, if it has happened.
    pub fn heard(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.told.pop_front() {
                return Some(event);
            }
            match self.network.as_ref()?.socket_ref().recv_from_full() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                received => self.take(received),
            }
        }
    }

    fn take(&mut self, received: io::Result<(Vec<u8>, SocketAddr)>) {
        match received {
            Ok((datagram, _)) => self.told.extend(messages(&datagram).filter_map(event)),
            Err(_) => self.told.push_back(Event::Lost), // ENOBUFS
        }
    }
}

/// Reads one message; `None` if it is of something that no snapshot holds.
fn event(message: &[u8]) -> Option<Event> {
    use RouteNetlinkMessage as Message;
    match u16::from_ne_bytes([message[4], message[5]]) {
        RTM_NEWNETCONF | RTM_DELNETCONF => return Some(Event::Rules),
        RTM_NEWNEXTHOP | RTM_DELNEXTHOP => return Some(Event::NextHops),
        _ => {}
    }
    let Ok(message) = NetlinkMessage::<Message>::deserialize(message) else {
        return Some(Event::Lost);
    };
    let NetlinkPayload::InnerMessage(told) = message.payload else {
        return Some(Event::Lost);
    };
    match told {
        Message::NewLink(link) => Some(link_event(&link, true)),
        Message::DelLink(link) => Some(link_event(&link, false)),
        Message::NewAddress(_) => Some(Event::Address),
        Message::DelAddress(told) => {
            address(&told).map(|it| Event::AddressGone(it.ifindex, it.address))
        }
        Message::NewRoute(told) => {
            let how = Told::of_new(message.header.flags);
            route(&told).map(|route| Event::Route(route, how))
        }
        Message::DelRoute(told) => route(&told).map(|route| Event::Route(route, Told::Gone)),
        Message::NewNeighbour(told) => {
            let known = neighbour(&told).map(|(_, it)| it);
            neighbour_event(&told, known)
        }
        Message::DelNeighbour(told) => neighbour_event(&told, None),
        Message::NewRule(_) | Message::DelRule(_) => Some(Event::Rules),
        _ => Some(Event::Other),
    }
}

fn link_event(message: &LinkMessage, is_there: bool) -> Event {
    Event::Link {
        ifindex: message.header.index,
        up: is_there && message.header.flags.contains(LinkFlags::Up),
    }
}

fn neighbour_event(message: &NeighbourMessage, known: Option<Neighbour>) -> Option<Event> {
    if message.header.family == AddressFamily::Bridge {
        let bridge = message.attributes.iter().find_map(|it| match it {
            NeighbourAttribute::Controller(bridge) => Some(*bridge),
            _ => None,
        });
        return Some(Event::Learnt(bridge?, mac(message)?));
    }
    // One that this host answers for, which is not there.
    if message.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let address = neighbour_address(message)?;
    Some(Event::Neighbour((message.header.ifindex, address), known))
}
