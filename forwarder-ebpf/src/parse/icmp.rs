//! Reads ICMP errors that quote TCP or UDP, as packets of the conversation that they are about. All other ICMP
//! is not ours. What an error says (its type, code and MTU) passes through unread.

use forwarder_common::{
    reason::Reason,
    tuple::{Address, TCP, UDP},
};

use super::{
    DESTINATION, FRAGMENT_HEADER, FragmentHeader, ICMP, ICMP_LENGTH, ICMPV6, Icmp, Ipv4, Ipv6, L3,
    L4_V4, L4_V6, MORE, OFFSET, OFFSET_V6, Packet, Part, TCP_LENGTH, Udp, linear, options,
};
use crate::frame::{Frame, header};

/// What an error quotes of the transport header at least (RFC 792).
const QUOTED_LENGTH: usize = 8;

/// Destination unreachable, source quench, time exceeded, parameter problem (RFC 792). A redirect is for the
/// router that it is sent to, and is left to this host. The outer header was read.
#[inline(always)]
pub(super) fn v4(frame: &impl Frame, packet: &mut Packet) -> Result<(), Reason> {
    const QUOTED: usize = L4_V4 + ICMP_LENGTH;
    if packet.protocol != ICMP {
        return Err(Reason::NotOurs);
    }
    linear(frame, QUOTED + 20 + TCP_LENGTH)?;
    let outer = header::<Ipv4>(frame, L3).ok_or(Reason::NotOurs)?;
    let message = header::<Icmp>(frame, L4_V4).ok_or(Reason::NotOurs)?;
    let quoted = header::<Ipv4>(frame, QUOTED).ok_or(Reason::NotOurs)?;
    // SAFETY: `header` checked the bounds of all three; packed structs have no alignment.
    let (outer, message, quoted) = unsafe { (&*outer, &*message, &*quoted) };
    let length = u16::from_be(outer.total_length) as usize;
    if !matches!(message.kind, 3 | 4 | 11 | 12)
        || u16::from_be(outer.fragment) & (MORE | OFFSET) != 0
        || length < 20 + ICMP_LENGTH + 20 + QUOTED_LENGTH
    {
        return Err(Reason::NotOurs);
    }
    if u16::from_be(quoted.fragment) & OFFSET != 0 || quoted.source != outer.destination {
        return Err(Reason::NotOurs); // an error goes to who sent what it quotes
    }
    packet.tuple.source = Address::from_v4(quoted.destination);
    packet.tuple.destination = Address::from_v4(quoted.source);
    let protocol = quoted.protocol;
    if quoted.version_and_length == options::NONE {
        return about(frame, packet, protocol, QUOTED + 20);
    }
    let octets = options::v4(frame, QUOTED, quoted.version_and_length);
    packet.options = octets.ok_or(Reason::NotOurs)?;
    let options = packet.options();
    linear(frame, QUOTED + 20 + options + TCP_LENGTH)?;
    if length < 20 + ICMP_LENGTH + 20 + options + QUOTED_LENGTH {
        return Err(Reason::NotOurs);
    }
    about(frame, packet, protocol, QUOTED + 20 + packet.options())
}

/// Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443 section 3). The outer
/// header was read.
#[inline(always)]
pub(super) fn v6(frame: &impl Frame, packet: &mut Packet) -> Result<(), Reason> {
    const QUOTED: usize = L4_V6 + ICMP_LENGTH;
    if packet.protocol != ICMPV6 || packet.part != Part::Whole {
        return Err(Reason::NotOurs);
    }
    linear(frame, QUOTED + 48 + TCP_LENGTH)?;
    let outer = header::<Ipv6>(frame, L3).ok_or(Reason::NotOurs)?;
    let message = header::<Icmp>(frame, L4_V6).ok_or(Reason::NotOurs)?;
    let quoted = header::<Ipv6>(frame, QUOTED).ok_or(Reason::NotOurs)?;
    // SAFETY: `header` checked the bounds of all three; packed structs have no alignment.
    let (outer, message, quoted) = unsafe { (&*outer, &*message, &*quoted) };
    let length = u16::from_be(outer.payload_length) as usize;
    if !matches!(message.kind, 1..=4)
        || length < ICMP_LENGTH + 40 + QUOTED_LENGTH
        || Address(quoted.source) != packet.tuple.destination
    {
        return Err(Reason::NotOurs); // as above
    }
    packet.tuple.source = Address(quoted.destination);
    let next = match quoted.next_header {
        FRAGMENT_HEADER => {
            let fragment = header::<FragmentHeader>(frame, QUOTED + 40).ok_or(Reason::NotOurs)?;
            // SAFETY: as above.
            let fragment = unsafe { &*fragment };
            if u16::from_be(fragment.offset) & OFFSET_V6 != 0 {
                return Err(Reason::NotOurs);
            }
            fragment.next_header
        }
        DESTINATION => options::v6(frame, QUOTED + 40).ok_or(Reason::NotOurs)?,
        protocol => return about(frame, packet, protocol, QUOTED + 40),
    };
    if length < ICMP_LENGTH + 48 + QUOTED_LENGTH {
        return Err(Reason::NotOurs);
    }
    about(frame, packet, next, QUOTED + 48)
}

/// What the two families' errors have in common: the ports, at `l4`.
#[inline(always)]
fn about(frame: &impl Frame, packet: &mut Packet, protocol: u8, l4: usize) -> Result<(), Reason> {
    if protocol != TCP && protocol != UDP {
        return Err(Reason::NotOurs);
    }
    // As many octets as are quoted at least.
    let quoted = header::<Udp>(frame, l4).ok_or(Reason::NotOurs)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let quoted = unsafe { &(*quoted).ports };
    packet.part = Part::Quoted;
    packet.protocol = protocol;
    packet.tuple.source_port = quoted.destination;
    packet.tuple.destination_port = quoted.source;
    Ok(())
}
