//! Which publish a destination belongs to, and whether it takes this client.

use aya_ebpf::maps::lpm_trie::Key;
use forwarder_common::{
    flow::{Hop, delivery},
    publish::{Frontend, Interface, Location, Publish, filter_bit, flag, port_index},
    reason::Reason,
    tuple::Address,
};

use crate::{
    frame::{Frame, SentTo},
    maps::{BACKENDS, FRONTENDS, INTERFACES, LOCAL_FILTER, LOCATIONS, PORTS, PUBLISHES},
    parse::{self, LOOPBACK_IFINDEX, Packet},
    words::copy_address,
};

/// A publish and its index.
#[derive(Clone, Copy)]
pub struct Published {
    pub publish: &'static Publish,
    pub index: u32,
}

/// The publish of the packet's destination, unless a few instructions tell that the packet is for somebody else. What they
/// leave, [`arrived`] tells.
///
/// # Errors
/// `Martian` for a frame to everybody from a source that cannot be: the stack would give it to the proxy.
#[inline(always)]
pub fn find(frame: &impl Frame, packet: &Packet) -> Result<Option<Published>, Reason> {
    let tuple = &packet.tuple;
    let Some(published) = at(&tuple.destination, tuple.destination_port, packet.protocol) else {
        return Ok(None);
    };
    if packet.is_from_this_host() {
        return Ok(Some(published));
    }
    if packet.sent_to == SentTo::Everybody && !packet.is_error() {
        may_ask(&tuple.source, packet.ifindex)?;
    }
    let is_here = may_be_local(&tuple.destination) && reaches(frame, packet);
    Ok(is_here.then_some(published))
}

/// Whether what has that source and came by that device may go up the stack. Who has no address yet may ask for one.
///
/// # Errors
/// `Martian`.
#[inline(always)]
pub fn may_ask(source: &Address, ifindex: u32) -> Result<(), Reason> {
    if source.is_unspecified() || is_behind(source, ifindex) {
        Ok(())
    } else {
        Err(Reason::Martian)
    }
}

/// Whether the port (wire order) is published on any address.
#[inline(always)]
pub fn is_published(protocol: u8, port: u16) -> bool {
    port_index(protocol, u16::from_be(port))
        .and_then(|index| PORTS.get(index))
        .is_some_and(|port| (port.every_v4 | port.every_v6 | port.exact) != 0)
}

#[inline(always)]
pub fn may_be_local(address: &Address) -> bool {
    let (word, bit) = filter_bit(address);
    LOCAL_FILTER.get(word).is_some_and(|word| word & bit != 0)
}

/// Whether the frame was sent to this host, by the kernel's word, or to the bridge that its device is a port of.
#[inline(always)]
fn reaches(frame: &impl Frame, packet: &Packet) -> bool {
    match packet.sent_to {
        SentTo::Host => true,
        SentTo::Everybody => false,
        SentTo::Other => is_to_device(frame, packet),
    }
}

/// Whether the frame's destination is this host's MAC on the packet's device.
#[inline(always)]
pub fn is_to_device(frame: &impl Frame, packet: &Packet) -> bool {
    interface(packet.ifindex).is_some_and(|interface| parse::is_to(frame, &interface.mac))
}

/// The publish of an address and port (wire order): that on this very address, or that on all of its family.
#[inline(always)]
pub fn at(address: &Address, port: u16, protocol: u8) -> Option<Published> {
    let element = PORTS.get(port_index(protocol, u16::from_be(port))?)?;
    let mut index = if address.is_v4() {
        element.every_v4
    } else {
        element.every_v6
    } as u32;
    if element.exact != 0 {
        index = exact(address, port, protocol as u16).unwrap_or(index);
    }
    if index == 0 {
        return None;
    }
    let publish = PUBLISHES.get(index)?;
    Some(Published { publish, index })
}

/// Whether the packet may be a backend's reply: its source is the backend port of some publish.
#[inline(always)]
pub fn may_be_reply(packet: &Packet) -> bool {
    port_index(packet.protocol, u16::from_be(packet.tuple.source_port))
        .and_then(|index| PORTS.get(index))
        .is_some_and(|port| port.backends != 0)
}

/// The publish on that address alone.
// VERIFIER (here and below): a function of its own, for its share of the stack.
#[inline(never)]
fn exact(address: &Address, port: u16, protocol: u16) -> Option<u32> {
    let frontend = Frontend {
        address: *address,
        port,
        protocol,
    };
    // SAFETY: values of this map are one word, replaced as a whole.
    unsafe { FRONTENDS.get(&frontend) }.copied()
}

/// Whether the packet is for this host, as a published port must be.
///
/// # Errors
/// `NotLocal`.
#[inline(always)]
pub fn arrived(packet: &Packet) -> Result<(), Reason> {
    let destination = &packet.tuple.destination;
    if packet.is_from_this_host() && destination.is_loopback() || is_of_this_host(destination) {
        Ok(())
    } else {
        Err(Reason::NotLocal)
    }
}

/// Whether it is an address of this host other than a loopback one.
#[inline(always)]
pub fn is_of_this_host(address: &Address) -> bool {
    location(address).network == Location::HERE.network
}

/// Whether the packet came in by the device that its source is behind, as far as this host and container networks are
/// concerned: a container cannot speak for another container, another network or another machine, no other machine for a
/// container, and nobody outside for this host.
#[inline(always)]
pub fn belongs(packet: &Packet) -> bool {
    is_behind(&packet.tuple.source, packet.ifindex)
}

/// The same of any address and device.
#[inline(never)]
pub fn is_behind(source: &Address, ifindex: u32) -> bool {
    let there = location_here(source);
    if source.is_link_local() {
        return there.network != Location::HERE.network; // the others are everywhere
    }
    let is_any = there.device == 0 || there.network == 0;
    there.network == network(ifindex) && (is_any || there.device == ifindex)
}

// VERIFIER: as above.
#[inline(never)]
fn location(address: &Address) -> Location {
    location_here(address)
}

#[inline(always)]
fn location_here(address: &Address) -> Location {
    let key = Key::new(128, *address);
    LOCATIONS.get(key).copied().unwrap_or_default()
}

/// Whether a packet of a flow's client, which came in by another device than the flow's `way` back, may be the client's: by
/// another uplink, of a container whose device has gone, or of the one that has the client's address now. A container does
/// not speak by two devices.
#[inline(always)]
pub fn moved(packet: &Packet, way: &Hop) -> bool {
    (network(packet.ifindex) == 0 || !exists(way.ifindex) || is_known_behind(packet))
        && belongs(packet)
}

/// Whether an ICMP error that came by a device may be about a packet that has left by `way`: only who is on that sees such a
/// packet. This host's own come by lo.
#[inline(always)]
pub fn leads(way: &Hop, ifindex: u32) -> bool {
    way.ifindex == ifindex
        || ifindex == LOOPBACK_IFINDEX
        || way.delivery == delivery::NEIGHBOUR && network(way.ifindex) == network(ifindex)
        || is_same_container(way.ifindex, ifindex)
        || !exists(way.ifindex)
}

/// Whether the packet came in by the device of the one container that has its source.
#[inline(always)]
pub fn is_known_behind(packet: &Packet) -> bool {
    let there = location(&packet.tuple.source);
    there.network != 0 && there.device == packet.ifindex
}

/// The device that the best route to an address of the rest of the world leads to, if the daemon has said that.
#[inline(always)]
pub fn uplink_to(address: &Address) -> Option<u32> {
    let there = location_here(address);
    (there.network == 0 && there.device != 0).then_some(there.device)
}

/// The bits of a publish.
#[inline(always)]
pub fn flags(publish: u32) -> u16 {
    PUBLISHES.get(publish).map_or(0, |publish| publish.flags)
}

/// Whether the packet, whose source is the backend of a publish, came in where packets leave for that: by the backend's own
/// device or another of its container's, or where that is not known, from its network. If not, but by another uplink, routes tell
/// whether it may.
///
/// # Errors
/// `Martian`, or `Unresolved` while the backend's device is not known or has gone.
#[inline(always)]
pub fn is_at_backend(packet: &Packet, publish: &Publish) -> Result<bool, Reason> {
    let (device, known) = (publish.hop.ifindex, publish.hop.delivery);
    if device == packet.ifindex {
        return Ok(true);
    }
    if known == delivery::NEIGHBOUR && network(device) == network(packet.ifindex) {
        return Ok(layer3(packet.ifindex) == device);
    }
    if known == delivery::NONE || !exists(device) {
        return Err(Reason::Unresolved);
    }
    if is_same_container(device, packet.ifindex) {
        return Ok(true);
    }
    Err(Reason::Martian)
}

/// Whether some publish leads to this address.
#[inline(always)]
pub fn is_backend(address: &Address) -> bool {
    BACKENDS.get_ptr(address).is_some()
}

/// By which device replies leave to the client of this packet, and how. Straight to a container whose address is known to be
/// behind that device; to all others by the routing table and the neighbours that the kernel has, as on a bridge anybody
/// may send from any MAC.
#[inline(always)]
pub fn way_back(packet: &Packet) -> (u32, u32) {
    let ifindex = packet.ifindex;
    let Some(interface) = interface(ifindex) else {
        return (ifindex, delivery::NEIGHBOUR);
    };
    let is_straight = interface.delivery != delivery::NEIGHBOUR
        && (interface.layer3 == ifindex || is_known_behind(packet));
    if is_straight {
        (ifindex, interface.delivery)
    } else {
        (interface.layer3, delivery::NEIGHBOUR)
    }
}

/// The device that this host's addresses are on where packets come in by this one.
#[inline(always)]
pub fn layer3(ifindex: u32) -> u32 {
    interface(ifindex).map_or(ifindex, |interface| interface.layer3)
}

/// The container at the other end of a device; 0 where that is not known.
#[inline(always)]
fn container(ifindex: u32) -> u32 {
    interface(ifindex).map_or(0, |interface| interface.container)
}

/// Whether two devices lead to one container.
#[inline(always)]
fn is_same_container(a: u32, b: u32) -> bool {
    let there = container(a);
    there != 0 && there == container(b)
}

/// Whether the source is an address of the container at the other end of a device, which may answer by each of its devices.
#[inline(never)]
pub fn is_of_container_at(source: &Address, ifindex: u32) -> bool {
    is_same_container(location_here(source).device, ifindex)
}

/// The container network behind a device; 0 for an uplink.
#[inline(always)]
fn network(ifindex: u32) -> u32 {
    interface(ifindex).map_or(0, |interface| interface.network)
}

#[inline(always)]
pub fn interface(ifindex: u32) -> Option<&'static Interface> {
    // SAFETY: values of this map are words, each replaced as a whole.
    unsafe { INTERFACES.get(ifindex) }
}

/// Whether packets by a device begin with an Ethernet header before one is put there.
#[inline(always)]
pub fn has_ethernet(ifindex: u32) -> bool {
    interface(ifindex).is_none_or(|interface| interface.ethernet != 0)
}

/// Whether there is such a device.
#[inline(always)]
pub fn exists(ifindex: u32) -> bool {
    INTERFACES.get_ptr(&ifindex).is_some()
}

/// This host's address on the network of a publish's backend.
#[inline(always)]
pub fn source(publish: u32) -> Option<&'static Address> {
    let publish = if publish == 0 {
        None
    } else {
        PUBLISHES.get(publish)
    };
    publish.map(|publish| &publish.source)
}

/// Gives the packet the tuple that the backend gets: its destination changes, and its source to this host's address on
/// the backend's network where it has to. Returns whether it had to: then it lacks a port that nobody else has.
#[inline(always)]
pub fn translate(packet: &mut Packet, publish: &Publish) -> bool {
    let is_ours = needs_snat(packet, publish);
    let (old, new) = (&packet.tuple, &mut packet.new);
    copy_address(
        if is_ours {
            &publish.source
        } else {
            &old.source
        },
        &mut new.source,
    );
    copy_address(&publish.backend, &mut new.destination);
    new.source_port = old.source_port;
    new.destination_port = publish
        .backend_port_of(u16::from_be(old.destination_port))
        .to_be();
    new.protocol = old.protocol;
    is_ours
}

/// Whether the backend must see an address of this host as the source: a loopback address means
/// another machine there, its own address would make it answer itself, a remote backend's
/// answers would go past us, and the address that the kernel itself uses towards the backend
/// could meet a connection of its own.
#[inline(always)]
pub fn needs_snat(packet: &Packet, publish: &Publish) -> bool {
    let source = packet.tuple.source;
    publish.flags & flag::REMOTE != 0
        || source == publish.backend
        || packet.is_from_this_host() && (source.is_loopback() || source == publish.source)
}
