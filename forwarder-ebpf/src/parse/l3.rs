//! Reads packets that begin with their IP header: as much as tells whether they may be ours. All else is read
//! once they have an Ethernet header.

use aya_ebpf::programs::TcContext;
use forwarder_common::{
    reason::Reason,
    tuple::{Address, TCP, Tuple, UDP},
};

use crate::frame::{SentTo, header};

use super::{
    DESTINATION, ETHERTYPE_IPV4, ETHERTYPE_IPV6, FRAGMENT_HEADER, HOP_BY_HOP, ICMP, ICMPV6, Ipv4,
    Ipv6, MORE, OFFSET, Packet, Part, Ports, ROUTING, linear, options,
};

/// The packet's tuple; an ICMP error, a fragment and what has options count as parts without ports.
///
/// # Errors
/// `NotOurs`.
#[inline(always)]
pub fn packet(ctx: &TcContext) -> Result<Packet, Reason> {
    // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
    let (protocol, ifindex) = unsafe { ((*ctx.skb.skb).protocol, (*ctx.skb.skb).ifindex) };
    let mut packet = Packet {
        tuple: Tuple::default(),
        new: Tuple::default(),
        part: Part::Later,
        id: 0,
        protocol: 0,
        is_v4: protocol == ETHERTYPE_IPV4 as u32,
        sent_to: SentTo::Host,
        dont_fragment: true,
        tos: 0,
        ttl: 0,
        flags: 0,
        options: 0,
        length: ctx.len(),
        ifindex,
    };
    let l4 = if packet.is_v4 {
        linear(ctx, size_of::<Ipv4>())?;
        let ip = header::<Ipv4>(ctx, 0).ok_or(Reason::NotOurs)?;
        // SAFETY: `header` checked the bounds; packed structs have no alignment.
        let ip = unsafe { &*ip };
        packet.protocol = ip.protocol;
        packet.tuple.destination = Address::from_v4(ip.destination);
        if ip.protocol == ICMP
            || ip.version_and_length != options::NONE
            || u16::from_be(ip.fragment) & (MORE | OFFSET) != 0
        {
            return Ok(packet);
        }
        size_of::<Ipv4>()
    } else if protocol == ETHERTYPE_IPV6 as u32 {
        linear(ctx, size_of::<Ipv6>())?;
        let ip = header::<Ipv6>(ctx, 0).ok_or(Reason::NotOurs)?;
        // SAFETY: as above.
        let ip = unsafe { &*ip };
        packet.protocol = ip.next_header;
        packet.tuple.destination = Address(ip.destination);
        if matches!(
            ip.next_header,
            ICMPV6 | FRAGMENT_HEADER | HOP_BY_HOP | ROUTING | DESTINATION
        ) {
            return Ok(packet);
        }
        size_of::<Ipv6>()
    } else {
        return Err(Reason::NotOurs);
    };
    if packet.protocol != TCP && packet.protocol != UDP {
        return Err(Reason::NotOurs);
    }
    linear(ctx, l4 + size_of::<Ports>())?;
    let ports = header::<Ports>(ctx, l4).ok_or(Reason::NotOurs)?;
    // SAFETY: as above.
    let ports = unsafe { &*ports };
    packet.part = Part::Whole;
    packet.tuple.source_port = ports.source;
    packet.tuple.destination_port = ports.destination;
    Ok(packet)
}
