//! What has left this host by others than the program and the proxy, from a port number that is published: queries of masqueraded
//! containers above all; and datagrams' conversations that user space keeps. What answers it is no new client.

use aya_ebpf::{bindings::BPF_ANY, programs::TcContext};
use forwarder_common::{
    flow::{Phase, state},
    reason::Reason,
    tuple::{TCP, UDP},
};

use crate::{
    clock, flow,
    frame::header,
    maps::{HALF_OPEN, LAST_LEFT, LEFT},
    parse::{self, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Ipv4, Ipv6, L3, L4_V4, L4_V6, Ports},
    publish,
    words::{copy_tuple, reverse},
};

/// `tc_index` of packets that the program sends on.
pub const OURS: u16 = 0x6677;

/// Whether the program has sent the packet on, by the stack's own output.
#[inline(always)]
pub fn is_ours(ctx: &TcContext) -> bool {
    // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
    unsafe { (*ctx.skb.skb).tc_index == OURS as u32 }
}

/// Notes a packet of no socket of this host that is about to leave by an uplink, behind the host's own NAT. Sockets of this
/// host are found when an answer comes.
#[inline(always)]
pub fn note(packet: &mut parse::Packet) {
    if packet.is_error()
        || !publish::may_be_local(&packet.tuple.source)
        || !publish::is_published(packet.protocol, packet.tuple.source_port)
    {
        return;
    }
    reverse(&packet.tuple, &mut packet.new);
    let now = clock::now();
    // Before the entry, which nobody asks for without it.
    if let Some(last) = LAST_LEFT.get_ptr_mut(is_udp(packet)) {
        // SAFETY: a pointer that the map gave out is valid until the program ends.
        // RACE: of two CPUs the later writer's time stays, which is the other's but for a tick. User space's may be in the future.
        unsafe { *last = now.max(*last) };
    }
    if let Some(seen) = LEFT.get_ptr_mut(&packet.new) {
        // SAFETY: an element's memory stays writable until the program ends, whatever becomes of it.
        unsafe { *seen = now };
    } else {
        let _ = LEFT.insert(&packet.new, &now, BPF_ANY as u64);
        copy_tuple(&packet.new, &mut packet.tuple);
        end_mistaken(packet);
    }
}

/// Ends the flow that answers have begun which came before anything had left: as after the first start.
#[inline(never)]
fn end_mistaken(packet: &mut parse::Packet) {
    let tuple = &packet.tuple;
    let Some(published) = publish::at(&tuple.destination, tuple.destination_port, packet.protocol)
    else {
        return;
    };
    if !publish::translate(packet, published.publish)
        && flow::get_original(packet).is_some_and(|flow| flow.state() & state::ESTABLISHED == 0)
    {
        let _ = HALF_OPEN.remove(&packet.new);
    }
}

/// Whether the source port is published, told by as little as possible: it is asked of everything that leaves. Of packets with
/// options it is told later.
#[inline(always)]
pub fn may_be_from_published_port(ctx: &TcContext) -> bool {
    let Some(ethernet) = header::<Ethernet>(ctx, 0) else {
        return false;
    };
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let ethertype = unsafe { (*ethernet).ethertype };
    let (protocol, l4) = match ethertype {
        ETHERTYPE_IPV4 => match header::<Ipv4>(ctx, L3) {
            // SAFETY: as above.
            Some(ip) if unsafe { (*ip).version_and_length } != parse::NO_OPTIONS => return true,
            // SAFETY: as above.
            Some(ip) => (unsafe { (*ip).protocol }, L4_V4),
            None => return false,
        },
        ETHERTYPE_IPV6 => match header::<Ipv6>(ctx, L3) {
            // SAFETY: as above.
            Some(ip) if unsafe { (*ip).next_header } == parse::DESTINATION => return true,
            // SAFETY: as above.
            Some(ip) => (unsafe { (*ip).next_header }, L4_V6),
            None => return false,
        },
        _ => return false,
    };
    if protocol != TCP && protocol != UDP {
        return false;
    }
    let Some(ports) = header::<Ports>(ctx, l4) else {
        return false;
    };
    // SAFETY: as above.
    publish::is_published(protocol, unsafe { (*ports).source })
}

/// Whether the packet answers what has left, and is somebody else's.
///
/// # Errors
/// `OthersAnswer` if so.
#[inline(always)]
pub fn is_no_answer(packet: &parse::Packet) -> Result<(), Reason> {
    if packet.opens() {
        return Ok(()); // answers nothing
    }
    let phase = if packet.protocol == TCP {
        Phase::TcpEstablished
    } else {
        Phase::UdpStream
    };
    let is_recent = |seen: u64| clock::now().saturating_sub(seen) < flow::timeout(phase);
    let last = LAST_LEFT.get(is_udp(packet)).copied().unwrap_or_default();
    if last == 0 || !is_recent(last) {
        return Ok(()); // nothing has left
    }
    // SAFETY: an element's memory stays readable until the program ends.
    match unsafe { LEFT.get(&packet.tuple) } {
        Some(seen) if is_recent(*seen) => Err(Reason::OthersAnswer),
        _ => Ok(()),
    }
}

/// The element of `LAST_LEFT`.
#[inline(always)]
fn is_udp(packet: &parse::Packet) -> u32 {
    (packet.protocol == UDP) as u32
}
