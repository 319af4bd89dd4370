//! Turns a TCP segment into the reset that answers it, as a host without that connection sends it (RFC 9293 section 3.10.7.1): of
//! the very number that its sender waits for, so that it is believed (RFC 5961 section 3).

use aya_ebpf::{
    bindings::{__sk_buff, bpf_adj_room_mode::BPF_ADJ_ROOM_NET},
    helpers::bpf_csum_update,
    programs::TcContext,
};
use forwarder_common::{
    checksum,
    reason::Reason,
    tcp::{ACK, RST},
    tuple::TCP,
};

use super::answer::{DONT_FRAGMENT, TTL, is_partial, octets, set_length};
use crate::{
    frame::header,
    parse::{Ipv4, Ipv6, L3, L4_V4, L4_V6, Packet, TCP_LENGTH, Tcp},
};

/// Makes the segment, which is whole and no reset, the reset to its sender.
///
/// # Errors
/// `Unwritable` if the kernel refuses.
#[inline(always)]
pub fn into_reset(ctx: &TcContext, packet: &Packet) -> Result<(), Reason> {
    let written = if packet.is_v4 {
        reset_v4(ctx.skb.skb, packet)
    } else {
        reset_v6(ctx.skb.skb, packet)
    };
    if written {
        Ok(())
    } else {
        Err(Reason::Unwritable)
    }
}

// VERIFIER: functions of their own, for their share of the stack.
#[inline(never)]
fn reset_v4(skb: *mut __sk_buff, packet: &Packet) -> bool {
    v4(&TcContext::new(skb), packet).is_ok()
}

#[inline(never)]
fn reset_v6(skb: *mut __sk_buff, packet: &Packet) -> bool {
    v6(&TcContext::new(skb), packet).is_ok()
}

#[inline(always)]
fn v4(ctx: &TcContext, packet: &Packet) -> Result<(), Reason> {
    const LENGTH: usize = 20 + TCP_LENGTH;
    let partial = is_partial(ctx, packet)?;
    shorten(ctx, packet, LENGTH)?;
    let ip = header::<Ipv4>(ctx, L3).ok_or(Reason::Unwritable)?;
    let tcp = header::<Tcp>(ctx, L4_V4).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds, and the two don't overlap; packed structs have no alignment.
    let (ip, tcp) = unsafe { (&mut *ip, &mut *tcp) };
    let before = checksum::add(octets(ip, 20), octets(tcp, TCP_LENGTH));
    let (source, destination) = (ip.destination, ip.source);
    *ip = Ipv4 {
        version_and_length: 0x45,
        tos: 0,
        total_length: (LENGTH as u16).to_be(),
        id: 0,
        fragment: DONT_FRAGMENT,
        ttl: TTL,
        protocol: TCP,
        checksum: 0,
        source,
        destination,
    };
    ip.checksum = !checksum::fold(octets(ip, 20));
    let addresses = octets(&raw const ip.source, 8);
    answer(tcp, addresses, partial);
    let after = checksum::add(octets(ip, 20), octets(tcp, TCP_LENGTH));
    changed(ctx, before, after);
    Ok(())
}

#[inline(always)]
fn v6(ctx: &TcContext, packet: &Packet) -> Result<(), Reason> {
    const LENGTH: usize = 40 + TCP_LENGTH;
    let partial = is_partial(ctx, packet)?;
    shorten(ctx, packet, LENGTH)?;
    let ip = header::<Ipv6>(ctx, L3).ok_or(Reason::Unwritable)?;
    let tcp = header::<Tcp>(ctx, L4_V6).ok_or(Reason::Unwritable)?;
    // SAFETY: as above.
    let (ip, tcp) = unsafe { (&mut *ip, &mut *tcp) };
    let before = checksum::add(octets(ip, 40), octets(tcp, TCP_LENGTH));
    ip.version_and_flow = 0x6000_0000_u32.to_be();
    ip.payload_length = (TCP_LENGTH as u16).to_be();
    ip.next_header = TCP;
    ip.hop_limit = TTL;
    // VERIFIER: as whole arrays they would be moved by a function.
    for word in 0..4 {
        let (source, destination) = (ip.source[word], ip.destination[word]);
        ip.source[word] = destination;
        ip.destination[word] = source;
    }
    let addresses = octets(&raw const ip.source, 32);
    answer(tcp, addresses, partial);
    let after = checksum::add(octets(ip, 40), octets(tcp, TCP_LENGTH));
    changed(ctx, before, after);
    Ok(())
}

/// Leaves the two headers of the segment, without options.
#[inline(always)]
fn shorten(ctx: &TcContext, packet: &Packet, length: usize) -> Result<(), Reason> {
    if packet.options() != 0 {
        ctx.adjust_room(-(packet.options() as i32), BPF_ADJ_ROOM_NET, 0)
            .map_err(|_| Reason::Unwritable)?;
    }
    set_length(ctx, L3 + length)
}

/// The header of the reset in place of the segment's. `addresses` is their sum; `partial` says that a device completes the
/// checksum (CHECKSUM_PARTIAL).
#[inline(always)]
fn answer(tcp: &mut Tcp, addresses: u32, partial: bool) {
    let (from, to) = (tcp.ports.source, tcp.ports.destination);
    (tcp.ports.source, tcp.ports.destination) = (to, from);
    if tcp.flags & ACK != 0 {
        tcp.sequence = tcp.acknowledgement;
        tcp.acknowledgement = 0;
        tcp.flags = RST;
    } else {
        // A SYN, as nothing else comes without.
        let next = u32::from_be(tcp.sequence).wrapping_add(1);
        tcp.sequence = 0;
        tcp.acknowledgement = next.to_be();
        tcp.flags = RST | ACK;
    }
    tcp.data_offset = (TCP_LENGTH as u8 / 4) << 4;
    tcp.window = 0;
    tcp.checksum = 0;
    tcp.urgent = 0;
    let rest = (TCP_LENGTH as u16).to_be() as u32 + (TCP as u16).to_be() as u32;
    let pseudo = checksum::add(addresses, rest);
    tcp.checksum = if partial {
        checksum::fold(pseudo)
    } else {
        !checksum::fold(checksum::add(pseudo, octets(tcp, TCP_LENGTH)))
    };
}

/// Takes the change into the sum over everything, if the packet has one (CHECKSUM_COMPLETE).
#[inline(always)]
fn changed(ctx: &TcContext, before: u32, after: u32) {
    // SAFETY: a valid context; the helper ignores packets in any other state.
    unsafe { bpf_csum_update(ctx.skb.skb, checksum::difference(before, after)) };
}
