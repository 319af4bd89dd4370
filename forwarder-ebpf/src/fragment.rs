//! Fragments: the first one's ports, remembered for the others, which have none. Only of datagrams that the
//! fast path carries: of all others the stack must get every part, also if it got one before the first came.

use forwarder_common::{
    reason::Reason,
    tuple::{Tuple, UDP},
};

use crate::{
    clock,
    maps::FRAGMENTS,
    parse::{Packet, Part},
};

/// How long the parts of a datagram may take (RFC 791 has 15 s, Linux' `ipfrag_time` 30). After that its
/// identification is another's.
const PATIENCE: u64 = 30_000_000_000;

/// A value of `FRAGMENTS`: what becomes of a datagram.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Datagram {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    since: u64,
    /// Source and destination, in wire order; 0 if the stack has it.
    ports: u32,
    reserved: u32,
}

/// What the parts of one datagram have in common (RFC 791 section 3.2, RFC 8200 section 4.5); the
/// identification stands where the ports would.
#[inline(always)]
fn key(packet: &Packet) -> Tuple {
    Tuple {
        source_port: packet.id as u16,
        destination_port: (packet.id >> 16) as u16,
        ..packet.tuple
    }
}

/// The ports of the packet's datagram; 0 if the stack has it, `None` if it is not known.
#[inline(always)]
fn ports(packet: &Packet) -> Option<u32> {
    // SAFETY: an element's memory stays readable until the program ends.
    // RACE: one that is replaced meanwhile is that of the longest unused datagram.
    let datagram = unsafe { FRAGMENTS.get(&key(packet)) }?;
    (clock::now().wrapping_sub(datagram.since) < PATIENCE).then_some(datagram.ports)
}

#[inline(always)]
fn insert(packet: &Packet, ports: u32) {
    let datagram = Datagram {
        since: clock::now(),
        ports,
        reserved: 0,
    };
    // Without it, the others go up the stack and the datagram is lost, as any may be.
    let _ = FRAGMENTS.insert(&key(packet), &datagram, 0);
}

/// Gives a later fragment the ports of its first.
///
/// # Errors
/// `Fragment` if the first was not carried, or has not come yet.
#[inline(always)]
pub fn complete(packet: &mut Packet) -> Result<(), Reason> {
    if packet.part != Part::Later {
        return Ok(());
    }
    match ports(packet) {
        Some(ports) if ports != 0 => {
            packet.tuple.source_port = ports as u16;
            packet.tuple.destination_port = (ports >> 16) as u16;
            Ok(())
        }
        _ => Err(Reason::Fragment),
    }
}

/// Remembers that the stack has a part of this datagram. It puts the parts together, and the proxy serves it. Not TCP's,
/// of whose connection no socket of this host knows; TCP sends again what is lost.
#[inline(always)]
pub fn leave(packet: &Packet) {
    if packet.protocol == UDP {
        insert(packet, 0);
    }
}

/// Keeps a client's first fragment with those that came before it.
///
/// # Errors
/// `Fragment` if the stack has one.
#[inline(always)]
pub fn rejoin(packet: &Packet) -> Result<(), Reason> {
    if packet.part == Part::First && ports(packet) == Some(0) {
        return Err(Reason::Fragment);
    }
    Ok(())
}

/// Remembers a first fragment that was carried.
#[inline(always)]
pub fn remember(packet: &Packet) {
    if packet.part == Part::First {
        let ports = packet.tuple.source_port as u32 | (packet.tuple.destination_port as u32) << 16;
        insert(packet, ports);
    }
}
