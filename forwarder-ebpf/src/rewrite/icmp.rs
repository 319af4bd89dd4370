//! Writes the addresses and ports of an ICMP error: its own, those of the packet that it quotes, and their
//! checksums.
//!
//! What a checksum covers and the checksum itself sum up to a constant. So where a quoted checksum is there and
//! corrected, the error's own need not know what changed below it.

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_csum_diff, programs::TcContext};
use forwarder_common::{checksum, reason::Reason, tuple::Tuple};

use super::{header_changed, ipv4, pseudo_header};
use crate::frame::header;
use crate::parse::{
    DESTINATION, FRAGMENT_HEADER, ICMP_LENGTH, Ipv4, Ipv6, L3, L4_V4, L4_V6, Ports, Tcp, Udp,
};

/// Bits of `how`.
pub(super) const HOP: u32 = 1;
pub(super) const IS_TCP: u32 = 1 << 1;
pub(super) const KEEPS_SOURCE: u32 = 1 << 2;

/// Gives the error the addresses of `new`, and what it quotes those of `new` reversed. The error keeps its source
/// only where that side's address and port are kept. Otherwise it changes, also if it is a router's in between, as
/// nf_nat_icmp_reply_translation has it (net/netfilter/nf_nat_proto.c): an address behind a translation
/// means nothing before it. Returns whether all could be written.
// VERIFIER: functions of their own, for their share of the stack. The old addresses and ports are read from what
// is quoted: a pointer to the caller's packet would keep that in memory for all traffic.
#[inline(never)]
pub(super) fn error_v4(skb: *mut __sk_buff, new: &Tuple, how: u32) -> bool {
    v4(&TcContext::new(skb), new, how).is_ok()
}

/// As [`error_v4`].
#[inline(never)]
pub(super) fn error_v6(skb: *mut __sk_buff, new: &Tuple, how: u32) -> bool {
    v6(&TcContext::new(skb), new, how).is_ok()
}

#[inline(always)]
fn v4(ctx: &TcContext, new: &Tuple, how: u32) -> Result<(), Reason> {
    const QUOTED: usize = L4_V4 + ICMP_LENGTH;
    let outer = header::<Ipv4>(ctx, L3).ok_or(Reason::Unwritable)?;
    let quoted = header::<Ipv4>(ctx, QUOTED).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let (outer, quoted) = unsafe { (&*outer, &*quoted) };
    let (source, destination) = (new.source.v4(), new.destination.v4());
    let from = if how & KEEPS_SOURCE != 0 {
        outer.source
    } else {
        source
    };
    let end = L3 + u16::from_be(outer.total_length) as usize;
    let change = checksum::add(
        checksum::difference(outer.source, from),
        checksum::difference(outer.destination, destination),
    );
    let addresses = checksum::add(
        checksum::difference(quoted.source, destination),
        checksum::difference(quoted.destination, source),
    );
    ipv4(ctx, L3, from, destination, change, how & HOP != 0)?;
    let l4 = QUOTED + 4 * (quoted.version_and_length & 0xf) as usize;
    ipv4(ctx, QUOTED, destination, source, addresses, false)?;
    let ports = ports(ctx, l4, new)?;
    let below = checksum::add(addresses, ports);
    let mut change = ports;
    if transport(ctx, l4, end, below, how)? {
        change = checksum::add(change, !below);
    }
    ctx.l4_csum_replace(L4_V4 + 2, 0, change as u64, 0)
        .map_err(|_| Reason::Unwritable)
}

#[inline(always)]
fn v6(ctx: &TcContext, new: &Tuple, how: u32) -> Result<(), Reason> {
    const QUOTED: usize = L4_V6 + ICMP_LENGTH;
    let outer = header::<Ipv6>(ctx, L3).ok_or(Reason::Unwritable)?;
    let quoted = header::<Ipv6>(ctx, QUOTED).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds, and the two don't overlap; packed structs have no alignment.
    let (outer, quoted) = unsafe { (&mut *outer, &mut *quoted) };
    let end = L4_V6 + u16::from_be(outer.payload_length) as usize;
    outer.hop_limit -= (how & HOP != 0) as u8;
    // Of both addresses at once: a sum has no order.
    let addresses = difference(&raw const quoted.source, new, 32);
    let mut pseudo = difference(&raw const outer.destination, &new.destination, 16);
    outer.destination = new.destination.0;
    if how & KEEPS_SOURCE == 0 {
        let change = difference(&raw const outer.source, &new.source, 16);
        pseudo = checksum::add(pseudo, change);
        outer.source = new.source.0;
    }
    quoted.source = new.destination.0;
    quoted.destination = new.source.0;
    let change = if matches!(quoted.next_header, FRAGMENT_HEADER | DESTINATION) {
        below_v6(ctx, QUOTED + 48, end, addresses, new, how)?
    } else {
        below_v6(ctx, QUOTED + 40, end, addresses, new, how)?
    };
    ctx.l4_csum_replace(L4_V6 + 2, 0, change as u64, 0)
        .map_err(|_| Reason::Unwritable)?;
    header_changed(ctx, pseudo, how & HOP != 0);
    pseudo_header(ctx, L4_V6 + 2, pseudo, 0)
}

/// What the quoted IPv6 header has behind it, with its change of addresses; returns the change of the error's sum.
// VERIFIER: called with each offset by itself, so that it is a constant.
#[inline(always)]
fn below_v6(
    ctx: &TcContext,
    l4: usize,
    end: usize,
    addresses: u32,
    new: &Tuple,
    how: u32,
) -> Result<u32, Reason> {
    let below = checksum::add(addresses, ports(ctx, l4, new)?);
    if transport(ctx, l4, end, below, how)? {
        Ok(checksum::add(below, !below))
    } else {
        Ok(below)
    }
}

/// The change of a sum when `length` octets of a header are replaced by those at `new`.
// VERIFIER: the helper takes memory. The same in registers needs more of the stack than there is.
#[inline(always)]
fn difference<T, U>(old: *const T, new: *const U, length: u32) -> u32 {
    // SAFETY: both point to so many octets, in a header whose bounds were checked and in a tuple.
    unsafe {
        bpf_csum_diff(
            old.cast_mut().cast(),
            length,
            new.cast_mut().cast(),
            length,
            0,
        ) as u32
    }
}

/// The quoted ports; returns the change of their sum.
#[inline(always)]
fn ports(ctx: &TcContext, l4: usize, new: &Tuple) -> Result<u32, Reason> {
    let ports = header::<Ports>(ctx, l4).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let ports = unsafe { &mut *ports };
    let before = ports.source as u32 | (ports.destination as u32) << 16;
    ports.source = new.destination_port;
    ports.destination = new.source_port;
    let after = ports.source as u32 | (ports.destination as u32) << 16;
    Ok(checksum::difference(before, after))
}

/// The quoted TCP's or UDP's checksum, if the error quotes so much and there is one; returns whether.
#[inline(always)]
fn transport(
    ctx: &TcContext,
    l4: usize,
    end: usize,
    change: u32,
    how: u32,
) -> Result<bool, Reason> {
    if how & IS_TCP != 0 {
        // Of TCP's header only eight octets are sure to be there. A frame may be longer than what it holds.
        let Some(tcp) = header::<Tcp>(ctx, l4).filter(|_| l4 + size_of::<Tcp>() <= end) else {
            return Ok(false);
        };
        // SAFETY: `header` checked the bounds; packed structs have no alignment.
        let tcp = unsafe { &mut *tcp };
        tcp.checksum = checksum::update(tcp.checksum, change);
        return Ok(true);
    }
    let udp = header::<Udp>(ctx, l4).ok_or(Reason::Unwritable)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let udp = unsafe { &mut *udp };
    if udp.checksum == 0 {
        return Ok(false); // the sender made none (RFC 768)
    }
    udp.checksum = match checksum::update(udp.checksum, change) {
        0 => 0xffff,
        sum => sum,
    };
    Ok(true)
}
