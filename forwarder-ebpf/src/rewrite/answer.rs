//! Turns a packet into the ICMP error that tells its sender about it: headers in front, and behind them as much of
//! the packet as an error may quote (RFC 1812 section 4.3.2.3, RFC 4443 section 2.4).

use core::ptr;

use aya_ebpf::{
    bindings::{__sk_buff, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::{bpf_csum_diff, bpf_csum_update, bpf_skb_change_tail},
    programs::TcContext,
};
use forwarder_common::{checksum, reason::Reason, tuple::Address};

use crate::frame::header;
use crate::parse::{ICMP, ICMP_LENGTH, ICMPV6, Icmp, Ipv4, Ipv6, L3, L4_V4, L4_V6, Packet, Part};

/// What an error quotes at most: it has 576 octets, or IPv6's least MTU, and so goes everywhere.
const MOST_V4: usize = 576 - 20 - ICMP_LENGTH;
const MOST_V6: usize = 1280 - 40 - ICMP_LENGTH;
/// Type and code of time exceeded, and of too big (RFC 792, RFC 1191, RFC 4443).
const EXPIRED_V4: (u8, u8) = (11, 0);
const TOO_BIG_V4: (u8, u8) = (3, 4);
const EXPIRED_V6: (u8, u8) = (3, 0);
const TOO_BIG_V6: (u8, u8) = (2, 0);
/// As other routers send them: internetwork control, do not fragment.
const TOS: u8 = 0xc0;
pub(super) const DONT_FRAGMENT: u16 = 0x4000_u16.to_be();
pub(super) const TTL: u8 = 64;

/// Makes the packet an error to its sender, from `from` or the address that the packet was sent to: too big for
/// `mtu`, or time exceeded if that is 0.
///
/// # Errors
/// `Unwritable` if the kernel refuses.
#[inline(always)]
pub fn into_error(
    ctx: &TcContext,
    packet: &Packet,
    mtu: u32,
    from: Option<&Address>,
) -> Result<(), Reason> {
    let written = if packet.is_v4 {
        error_v4(ctx.skb.skb, packet, mtu, from)
    } else {
        error_v6(ctx.skb.skb, packet, mtu, from)
    };
    if written {
        Ok(())
    } else {
        Err(Reason::Unwritable)
    }
}

// VERIFIER: functions of their own, for their share of the stack.
#[inline(never)]
fn error_v4(skb: *mut __sk_buff, packet: &Packet, mtu: u32, from: Option<&Address>) -> bool {
    v4(&TcContext::new(skb), packet, mtu, from).is_ok()
}

#[inline(never)]
fn error_v6(skb: *mut __sk_buff, packet: &Packet, mtu: u32, from: Option<&Address>) -> bool {
    v6(&TcContext::new(skb), packet, mtu, from).is_ok()
}

#[inline(always)]
fn v4(ctx: &TcContext, packet: &Packet, mtu: u32, from: Option<&Address>) -> Result<(), Reason> {
    const QUOTED: usize = L4_V4 + ICMP_LENGTH;
    let ip = header::<Ipv4>(ctx, L3).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let declared = u16::from_be(unsafe { (*ip).total_length }) as usize;
    let length = cut(ctx, declared, MOST_V4)?;
    let quoted = if is_partial(ctx, packet)? {
        sum_of_partial(ctx, packet)? // the IP header's is zero (RFC 791)
    } else {
        let packet = header::<[u8; MOST_V4]>(ctx, L3).ok_or(Reason::Unwritable)?;
        octets(packet, MOST_V4)
    };
    grow(ctx, QUOTED - L3)?;

    let (kind, code) = if mtu == 0 { EXPIRED_V4 } else { TOO_BIG_V4 };
    let ip = header::<Ipv4>(ctx, L3).ok_or(Reason::Unwritable)?;
    let icmp = header::<Icmp>(ctx, L4_V4).ok_or(Reason::Unwritable)?;
    let told = header::<Ipv4>(ctx, QUOTED).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds, and the three don't overlap; packed structs have no alignment.
    let (ip, icmp, told) = unsafe { (&mut *ip, &mut *icmp, &*told) };
    *ip = Ipv4 {
        version_and_length: 0x45,
        tos: TOS,
        total_length: ((QUOTED - L3 + length) as u16).to_be(),
        id: 0,
        fragment: DONT_FRAGMENT,
        ttl: TTL,
        protocol: ICMP,
        checksum: 0,
        source: from.map_or(told.destination, |from| from.v4()),
        destination: told.source,
    };
    ip.checksum = !checksum::fold(octets(ip, 20));
    *icmp = Icmp {
        kind,
        code,
        checksum: 0,
        rest: mtu.to_be(),
    };
    icmp.checksum = !checksum::fold(checksum::add(quoted, octets(icmp, 8)));
    inserted(ctx, octets(ip, 28));
    set_length(ctx, QUOTED + length)
}

#[inline(always)]
fn v6(ctx: &TcContext, packet: &Packet, mtu: u32, from: Option<&Address>) -> Result<(), Reason> {
    const QUOTED: usize = L4_V6 + ICMP_LENGTH;
    let ip = header::<Ipv6>(ctx, L3).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let declared = match u16::from_be(unsafe { (*ip).payload_length }) {
        0 => 0,
        payload => 40 + payload as usize,
    };
    let length = cut(ctx, declared, MOST_V6)?;
    let quoted = if packet.part == Part::Whole && is_partial(ctx, packet)? {
        let mut headers = octets(header::<[u8; 40]>(ctx, L3).ok_or(Reason::Unwritable)?, 40);
        if packet.options() != 0 {
            let options = header::<[u8; 8]>(ctx, L4_V6).ok_or(Reason::Unwritable)?;
            headers = checksum::add(headers, octets(options, 8));
        }
        checksum::add(headers, sum_of_partial(ctx, packet)?)
    } else {
        let packet = header::<[u8; MOST_V6]>(ctx, L3).ok_or(Reason::Unwritable)?;
        octets(packet, MOST_V6)
    };
    grow(ctx, QUOTED - L3)?;

    let (kind, code) = if mtu == 0 { EXPIRED_V6 } else { TOO_BIG_V6 };
    let ip = header::<Ipv6>(ctx, L3).ok_or(Reason::Unwritable)?;
    let icmp = header::<Icmp>(ctx, L4_V6).ok_or(Reason::Unwritable)?;
    let told = header::<Ipv6>(ctx, QUOTED).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds, and the three don't overlap; packed structs have no alignment.
    let (ip, icmp, told) = unsafe { (&mut *ip, &mut *icmp, &*told) };
    let payload = ((ICMP_LENGTH + length) as u16).to_be();
    ip.version_and_flow = 0x6000_0000_u32.to_be();
    ip.payload_length = payload;
    ip.next_header = ICMPV6;
    ip.hop_limit = TTL;
    // VERIFIER: as whole arrays they would be moved by a function, which the traced program has no stack for.
    for word in 0..4 {
        ip.destination[word] = told.source[word];
        ip.source[word] = told.destination[word];
    }
    if let Some(from) = from {
        ip.source = from.0;
    }
    *icmp = Icmp {
        kind,
        code,
        checksum: 0,
        rest: mtu.to_be(),
    };
    // ICMPv6 covers addresses, length and number of the header in front as well (RFC 8200 section 8.1).
    let pseudo = checksum::add(
        octets(&raw const ip.source, 32),
        checksum::add(payload as u32, (ICMPV6 as u16).to_be() as u32),
    );
    let covered = checksum::add(checksum::add(quoted, pseudo), octets(icmp, 8));
    icmp.checksum = !checksum::fold(covered);
    inserted(ctx, octets(ip, 48));
    set_length(ctx, QUOTED + length)
}

/// Makes the packet, of which `declared` octets are not padding, `most` octets long, by zeros if need be; returns how
/// many there were, but no more than that. Merged segments (GSO) are one packet then, in the linear part.
// VERIFIER: a sum over as many octets as there are takes it too long to follow, and zeros change no sum.
#[inline(always)]
fn cut(ctx: &TcContext, declared: usize, most: usize) -> Result<usize, Reason> {
    let there = ctx.len() as usize - L3;
    // More than 64 KB of merged segments declare nothing.
    let length = if declared < there && declared >= 28 {
        declared.min(most)
    } else {
        there.min(most)
    };
    set_length(ctx, L3 + length)?;
    set_length(ctx, L3 + most)?;
    Ok(length)
}

#[inline(always)]
pub(super) fn set_length(ctx: &TcContext, length: usize) -> Result<(), Reason> {
    // SAFETY: a valid context.
    let result = unsafe { bpf_skb_change_tail(ctx.skb.skb, length as u32, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(Reason::Unwritable)
    }
}

/// Whether the packet's own checksum is still to be completed by a device (CHECKSUM_PARTIAL), perhaps when it is
/// an error's quotation. A program is not told, but then the helper does not touch the field.
#[inline(always)]
pub(super) fn is_partial(ctx: &TcContext, packet: &Packet) -> Result<bool, Reason> {
    let offset = packet.checksum();
    let field = header::<u16>(ctx, offset).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds; fields are at even offsets of the frame.
    let before = unsafe { field.read_unaligned() };
    ctx.l4_csum_replace(offset, 0, 1, 0)
        .map_err(|_| Reason::Unwritable)?;
    let field = header::<u16>(ctx, offset).ok_or(Reason::Unwritable)?;
    // SAFETY: as above.
    let after = unsafe { field.read_unaligned() };
    // SAFETY: as above.
    unsafe { field.write_unaligned(before) };
    Ok(before == after)
}

/// Room for `length` octets, all zero, behind the link header.
#[inline(always)]
fn grow(ctx: &TcContext, length: usize) -> Result<(), Reason> {
    ctx.adjust_room(length as i32, BPF_ADJ_ROOM_MAC, 0)
        .map_err(|_| Reason::Unwritable)
}

/// The sum of what is behind the IP header and its options after a device has completed the checksum: what the field, now
/// the sum of the pseudo header, says.
#[inline(always)]
fn sum_of_partial(ctx: &TcContext, packet: &Packet) -> Result<u32, Reason> {
    let field = header::<u16>(ctx, packet.checksum()).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds.
    Ok(!unsafe { field.read_unaligned() } as u32)
}

/// The sum of the first `length` octets of a header or of two that follow each other.
#[inline(always)]
pub(super) fn octets<T>(from: *const T, length: usize) -> u32 {
    /// What the helper takes at once before 6.13: its scratch space (net/core/filter.c).
    const AT_ONCE: usize = 512;
    let mut sum = 0;
    let mut at = 0;
    while at < length {
        let part = if length - at < AT_ONCE {
            length - at
        } else {
            AT_ONCE
        };
        // SAFETY: so many octets are there, as the caller checked.
        sum = unsafe {
            let from = from.cast::<u8>().add(at).cast_mut().cast();
            bpf_csum_diff(ptr::null_mut(), 0, from, part as u32, sum) as u32
        };
        at += part;
    }
    sum
}

/// Headers with this sum were written where `grow` left zeros.
#[inline(always)]
fn inserted(ctx: &TcContext, sum: u32) {
    // SAFETY: a valid context; the helper ignores packets that have no sum over everything (CHECKSUM_COMPLETE).
    unsafe { bpf_csum_update(ctx.skb.skb, sum) };
}
