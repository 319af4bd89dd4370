//! What containers say of themselves: the MAC and the addresses of the far end of each veth, asked in its own network
//! namespace, and a watch that tells when to ask again. Whether a container's word counts is decided in `plan/locations.rs`.

#![expect(
    unsafe_code,
    reason = "the runtime watches a descriptor that another crate owns"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, IoSliceMut},
    ops::ControlFlow,
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::Result;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{LinkAttribute, LinkExtentMask, LinkMessage},
};
use netlink_sys::{SocketAddr, protocols::NETLINK_ROUTE};
use nix::{
    errno::Errno,
    sys::socket::{ControlMessageOwned, MsgFlags, NetlinkAddr, recvmsg},
    time::{ClockId, clock_gettime},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep_until},
};
use tracing::debug;

use crate::network::{Claim, FarEnd, Mac, Peer, Reader, Snapshot, address, netlink::Socket};

/// Addresses that one container is known by. It can give itself any number of them.
const ADDRESSES: usize = 256;
/// How often containers are asked whose changes cannot be heard.
const UNHEARD: Duration = Duration::from_secs(2);
/// Events that are heard at once; of more, all containers are asked.
const EVENTS: usize = 1024;
/// include/uapi/linux/netlink.h
const NETLINK_LISTEN_ALL_NSID: i32 = 8;

/// Listens to what changes inside of containers, by a socket of its own: what one has too much to say overflows here.
pub struct Watch {
    events: Option<AsyncFd<netlink_sys::Socket>>,
    asked: Instant,
}

/// Whose answers are out of date.
enum Stale {
    Everyone,
    Namespaces(BTreeSet<i32>),
}

impl Watch {
    /// Listens where that is permitted (CAP_NET_BROADCAST).
    pub fn open() -> Self {
        let events = listen()
            .inspect_err(|error| debug!("changes inside of containers are not heard: {error}"));
        Self {
            events: events.ok(),
            ..Self::deaf()
        }
    }

    /// Listens to nothing.
    pub fn deaf() -> Self {
        Self {
            events: None,
            asked: Instant::now(),
        }
    }

    /// Waits until something may have changed.
    pub async fn changed(&self) {
        match &self.events {
            Some(events) => drop(events.readable().await),
            None => sleep_until(self.asked + UNHEARD).await,
        }
    }

    /// Reads what the kernel says, then what containers do: those of which `asked` has the veths.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub async fn read(
        &mut self,
        reader: &mut Reader,
        snapshot: &mut Snapshot,
        asked: impl Fn(&Snapshot) -> BTreeMap<u32, Peer>,
    ) -> Result<()> {
        reader.read(snapshot).await?;
        let veths = asked(snapshot);
        self.read_far_ends(&veths, &mut snapshot.far_ends);
        Ok(())
    }

    /// The far ends of `veths`: as they are known, or asked for if they are new or something has changed.
    fn read_far_ends(&mut self, veths: &BTreeMap<u32, Peer>, known: &mut BTreeMap<u32, FarEnd>) {
        // Before they are asked: what changes meanwhile is heard the next time.
        let stale = self.stale();
        known.retain(|veth, end| {
            let is_stale = match &stale {
                Stale::Everyone => true,
                Stale::Namespaces(stale) => stale.contains(&end.peer.namespace),
            };
            !is_stale && veths.get(veth) == Some(&end.peer)
        });
        let mut socket = None;
        for (&veth, &peer) in veths.iter().filter(|(_, peer)| peer.namespace >= 0) {
            if known.contains_key(&veth) {
                continue;
            }
            match far_end(&mut socket, peer) {
                Ok(end) => drop(known.insert(veth, end)),
                Err(error) => debug!("device {veth}: its far end cannot be asked: {error}"),
            }
        }
    }

    fn stale(&mut self) -> Stale {
        let Some(events) = &self.events else {
            if self.asked + UNHEARD > Instant::now() {
                return Stale::Namespaces(BTreeSet::new());
            }
            self.asked = Instant::now();
            return Stale::Everyone;
        };
        let (mut namespaces, mut lost) = (BTreeSet::new(), false);
        for _ in 0..EVENTS {
            match events.try_io(Interest::READABLE, namespace) {
                Ok(namespace) => namespaces.extend(namespace),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => lost = true, // ENOBUFS
                Err(_) if lost => break,
                Err(_) => return Stale::Namespaces(namespaces),
            }
        }
        Stale::Everyone
    }
}

fn listen() -> io::Result<AsyncFd<netlink_sys::Socket>> {
    let mut socket = netlink_sys::Socket::new(NETLINK_ROUTE)?;
    socket.set_listen_all_namespaces(true)?;
    socket.set_non_blocking(true)?;
    let groups = libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;
    socket.bind(&SocketAddr::new(0, groups.cast_unsigned()))?;
    // SAFETY: the descriptor is the socket's own for as long as that lives.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? })
}

/// Takes an event, and tells the other network namespace that it is of.
fn namespace(socket: &netlink_sys::Socket) -> io::Result<Option<i32>> {
    let mut byte = [0]; // what has changed is asked for
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(i32);
    let fd = socket.as_raw_fd();
    let event = recvmsg::<NetlinkAddr>(fd, &mut parts, Some(&mut space), MsgFlags::MSG_DONTWAIT)?;
    let id = event.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Unknown(control)
            if control.cmsg_header.cmsg_level == libc::SOL_NETLINK
                && control.cmsg_header.cmsg_type == NETLINK_LISTEN_ALL_NSID =>
        {
            Some(i32::from_ne_bytes(*control.data_bytes.first_chunk()?))
        }
        _ => None,
    });
    Ok(id)
}

/// Asks a namespace for one of its devices, by `socket`, which is opened if there is none.
fn far_end(socket: &mut Option<Socket>, peer: Peer) -> io::Result<FarEnd> {
    // Strict: a kernel that does not take the namespace's id would answer with what this namespace has.
    let open = match socket.take() {
        Some(open) => open,
        None => Socket::open_strict()?,
    };
    let mac = mac(&open, peer)?.ok_or(Errno::ENODEV)?;
    let mut addresses = Vec::new();
    let now = now();
    open.ask(all_addresses(peer), NLM_F_DUMP, |answer| {
        addresses.extend(answer.and_then(|answer| claim(&answer, peer, now)));
        if addresses.len() < ADDRESSES {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    })?;
    if addresses.len() < ADDRESSES {
        *socket = Some(open); // which has no more to say
    }
    Ok(FarEnd {
        peer,
        mac,
        addresses,
    })
}

fn mac(socket: &Socket, peer: Peer) -> io::Result<Option<Mac>> {
    let mut message = LinkMessage::default();
    message.header.index = peer.ifindex;
    message.attributes = vec![
        LinkAttribute::IfNetnsId(peer.namespace),
        LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]),
    ];
    let mut mac = None;
    socket.ask(RouteNetlinkMessage::GetLink(message), NLM_F_ACK, |answer| {
        if let Some(RouteNetlinkMessage::NewLink(link)) = answer
            && link.header.index == peer.ifindex
            && link
                .attributes
                .contains(&LinkAttribute::IfNetnsId(peer.namespace))
        {
            mac = link
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::Address(octets) => Mac::try_from(octets.as_slice()).ok(),
                    _ => None,
                });
        }
        ControlFlow::Continue(())
    })?;
    Ok(mac)
}

fn all_addresses(peer: Peer) -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    message.header.index = peer.ifindex;
    message.attributes = vec![AddressAttribute::TargetNetNsId(peer.namespace)];
    RouteNetlinkMessage::GetAddress(message)
}

/// The address that an answer tells, if it is about that device in that namespace.
fn claim(answer: &RouteNetlinkMessage, peer: Peer, now: u64) -> Option<Claim> {
    let RouteNetlinkMessage::NewAddress(message) = answer else {
        return None;
    };
    let asked = AddressAttribute::TargetNetNsId(peer.namespace);
    if message.header.index != peer.ifindex || !message.attributes.contains(&asked) {
        return None;
    }
    let stamp = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::CacheInfo(info) => Some(info.cstamp),
            _ => None,
        })?;
    Some(Claim {
        address: address(message)?.address,
        since: unwrapped(stamp, now),
    })
}

/// Hundredths of a second since the machine started. A minute more, since stamps are of a clock that started a little
/// earlier or later, and none may be of the future.
fn now() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    (now + Duration::from_secs(60)).as_millis() as u64 / 10
}

/// A stamp of the past, of which the kernel tells 32 bits: they begin anew every 497 days. (A whole turn is added, for a
/// machine that started less than a turn ago.)
fn unwrapped(stamp: u32, now: u64) -> u64 {
    let age = (now as u32).wrapping_sub(stamp);
    (1 << 32) + now - u64::from(age)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: Peer = Peer {
        namespace: 7,
        ifindex: 2,
    };

    fn answer(attributes: Vec<AddressAttribute>, ifindex: u32) -> RouteNetlinkMessage {
        let mut message = AddressMessage::default();
        message.header.index = ifindex;
        message.attributes = attributes;
        message
            .attributes
            .push(AddressAttribute::Local([172, 31, 0, 2].into()));
        message
            .attributes
            .push(AddressAttribute::CacheInfo(Default::default()));
        RouteNetlinkMessage::NewAddress(message)
    }

    #[test]
    fn only_the_namespace_that_was_asked_is_believed() {
        let of = |namespace| vec![AddressAttribute::TargetNetNsId(namespace)];
        let told = claim(&answer(of(7), 2), PEER, 0).map(|claim| claim.address);
        assert_eq!(told, Some([172, 31, 0, 2].into()));
        assert_eq!(claim(&answer(vec![], 2), PEER, 0), None, "of this host");
        assert_eq!(claim(&answer(of(8), 2), PEER, 0), None);
        assert_eq!(claim(&answer(of(7), 3), PEER, 0), None, "another device");
    }

    #[test]
    fn an_older_address_stays_older_when_the_stamp_begins_anew() {
        let turn = 1 << 32;
        assert!(unwrapped(100, 6000) < unwrapped(5000, 6000));
        let (before, after) = (unwrapped(u32::MAX, turn + 500), unwrapped(3, turn + 500));
        assert!(before < after);
        assert_eq!(before, unwrapped(u32::MAX, turn + 90_000));
    }
}
