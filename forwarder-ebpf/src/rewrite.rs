//! The only writer of packet bytes: addresses, ports, TTL, their checksums, and MACs.

mod answer;
mod complete;
mod icmp;
mod mss;
mod reset;

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::{bpf_csum_update, bpf_skb_change_head},
    programs::TcContext,
};
use forwarder_common::{
    checksum,
    reason::Reason,
    tuple::{TCP, Tuple},
};

pub use answer::into_error;
pub use complete::{Complete, complete};
pub use mss::clamp;
pub use reset::into_reset;

use crate::{
    frame::{Frame, header},
    parse::{Ethernet, Ipv4, Ipv6, L3, Packet, Part, Ports},
    words::write_address,
};

/// Gives the packet the addresses and ports of its new tuple, and takes one from the TTL or hop limit if
/// `hop` is set, as a router does.
///
/// # Errors
/// `Unwritable` if the kernel refuses; nothing sensible can be sent then.
#[inline(always)]
pub fn tuple(ctx: &TcContext, packet: &Packet, hop: bool) -> Result<(), Reason> {
    let (old, new) = (&packet.tuple, &packet.new);
    let addresses = checksum::add(
        checksum::address_difference(old.source, new.source),
        checksum::address_difference(old.destination, new.destination),
    );
    if packet.is_v4 {
        ipv4(
            ctx,
            L3,
            new.source.v4(),
            new.destination.v4(),
            addresses,
            hop,
        )?;
    } else {
        ipv6(ctx, new, hop)?;
        header_changed(ctx, addresses, hop);
    }
    if packet.part == Part::Later {
        return Ok(()); // the transport header, and the checksum over all parts, is in the first
    }
    ports(ctx, packet.l4(), new)?;
    let old_ports = old.source_port as u32 | (old.destination_port as u32) << 16;
    let new_ports = new.source_port as u32 | (new.destination_port as u32) << 16;

    // The field's meaning depends on the packet's checksum state (CHECKSUM_PARTIAL holds the pseudo
    // header's sum alone), which only the kernel knows: so its helper, not our arithmetic.
    // A UDP checksum of zero stays zero, and a sum that comes out as zero is sent as 0xffff.
    let field = packet.checksum();
    let flags = if packet.protocol == TCP {
        0
    } else {
        BPF_F_MARK_MANGLED_0 as u64
    };
    if addresses != 0 {
        pseudo_header(ctx, field, addresses, flags)?;
    }
    if old_ports != new_ports {
        ctx.l4_csum_replace(field, old_ports as u64, new_ports as u64, flags | 4)
            .map_err(|_| Reason::Unwritable)?;
    }
    Ok(())
}

#[inline(always)]
fn ports(frame: &impl Frame, l4: usize, new: &Tuple) -> Result<(), Reason> {
    let ports = header::<Ports>(frame, l4).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    unsafe {
        (*ports).source = new.source_port;
        (*ports).destination = new.destination_port;
    }
    Ok(())
}

/// As [`tuple`], for an ICMP error: what it quotes gets the addresses and ports of the new tuple, the other way round.
/// The error's own source stays if `keeps_source` says that the new tuple has it too.
///
/// # Errors
/// As [`tuple`].
#[inline(always)]
pub fn error(
    ctx: &TcContext,
    packet: &Packet,
    hop: bool,
    keeps_source: bool,
) -> Result<(), Reason> {
    let mut how = 0;
    if hop {
        how |= icmp::HOP;
    }
    if packet.protocol == TCP {
        how |= icmp::IS_TCP;
    }
    if keeps_source {
        how |= icmp::KEEPS_SOURCE;
    }
    let written = if packet.is_v4 {
        icmp::error_v4(ctx.skb.skb, &packet.new, how)
    } else {
        icmp::error_v6(ctx.skb.skb, &packet.new, how)
    };
    if written {
        Ok(())
    } else {
        Err(Reason::Unwritable)
    }
}

/// Takes a change of addresses into the transport checksum at `field`.
#[inline(always)]
fn pseudo_header(ctx: &TcContext, field: usize, addresses: u32, flags: u64) -> Result<(), Reason> {
    ctx.l4_csum_replace(field, 0, addresses as u64, flags | BPF_F_PSEUDO_HDR as u64)
        .map_err(|_| Reason::Unwritable)
}

/// Takes a change of IPv6's header into the sum that a device has made of the whole packet (CHECKSUM_COMPLETE): the header
/// has no checksum of its own that would make up for it, as IPv4's has.
#[inline(always)]
fn header_changed(ctx: &TcContext, addresses: u32, hop: bool) {
    let mut change = addresses;
    if hop {
        change = checksum::add(change, checksum::difference(1_u16.to_be() as u32, 0));
    }
    // SAFETY: the context is valid; the helper ignores packets in any other state.
    unsafe { bpf_csum_update(ctx.skb.skb, change) };
}

/// The header at `offset`, of which `addresses` is the change.
#[inline(always)]
fn ipv4(
    frame: &impl Frame,
    offset: usize,
    source: u32,
    destination: u32,
    addresses: u32,
    hop: bool,
) -> Result<(), Reason> {
    let ip = header::<Ipv4>(frame, offset).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let ip = unsafe { &mut *ip };
    let mut change = addresses;
    if hop {
        ip.ttl -= 1;
        change = checksum::add(change, checksum::difference(0x0100_u16.to_be() as u32, 0));
    }
    ip.source = source;
    ip.destination = destination;
    ip.checksum = checksum::update(ip.checksum, change);
    Ok(())
}

#[inline(always)]
fn ipv6(frame: &impl Frame, new: &Tuple, hop: bool) -> Result<(), Reason> {
    let ip = header::<Ipv6>(frame, L3).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    unsafe {
        (*ip).hop_limit -= hop as u8;
        write_address(&new.source, &raw mut (*ip).source);
        write_address(&new.destination, &raw mut (*ip).destination);
    }
    Ok(())
}

/// Puts an Ethernet header without MACs in front of a packet that begins with its IP header.
///
/// # Errors
/// `Unwritable` if the kernel has no room for it.
#[inline(always)]
pub fn push_ethernet(ctx: &TcContext) -> Result<(), Reason> {
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_change_head(ctx.skb.skb, L3 as u32, 0) } != 0 {
        return Err(Reason::Unwritable);
    }
    let ethernet = header::<Ethernet>(ctx, 0).ok_or(Reason::Unwritable)?;
    // SAFETY: `skb` is the context that the kernel gave; `header` checked the bounds.
    unsafe { (*ethernet).ethertype = (*ctx.skb.skb).protocol as u16 };
    Ok(())
}

/// Sets both MACs.
///
/// # Errors
/// `Unwritable` if the frame is too short, which the parser excludes.
#[inline(always)]
pub fn macs(frame: &impl Frame, destination: [u8; 6], source: [u8; 6]) -> Result<(), Reason> {
    let ethernet = header::<Ethernet>(frame, 0).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    unsafe {
        (*ethernet).destination = destination;
        (*ethernet).source = source;
    }
    Ok(())
}
