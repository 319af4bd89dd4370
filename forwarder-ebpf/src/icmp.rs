//! ICMP errors of this host's own: a packet of a flow cannot go on, and its sender is told (RFC 1812 section 4.3,
//! RFC 4443 section 2.4). Errors that others send are packets like any; `parse/icmp.rs` reads them.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use forwarder_common::{flow::Hop, limits, reason::Reason, tuple::UDP};

use crate::{
    clock, deliver,
    maps::TOLD,
    parse::{Packet, Part},
};

/// `PACKET_BROADCAST` and `PACKET_MULTICAST`: who the frame was sent to (include/uapi/linux/if_packet.h).
const BROADCAST: u32 = 1;
const MULTICAST: u32 = 2;
/// At most so many are told in a window, by each CPU: of all senders whose packets' time has come, and of those whose packets
/// are too long, of each group. Who does not learn of an MTU has a black hole, so that nobody may use up another's share.
const WINDOW: u64 = 100_000_000;
const MOST: u32 = 100;

/// A value of `TOLD`, each CPU's own: the first is of expired packets, the others are of groups of senders.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Told {
    /// Nanoseconds of `CLOCK_MONOTONIC` when the window began.
    since: u64,
    count: u32,
    reserved: u32,
}

/// What keeps a packet from going on: `Expired`, or `TooBig` and the MTU that it exceeds.
#[derive(Clone, Copy)]
pub struct Obstacle {
    pub reason: Reason,
    pub mtu: u32,
}

/// What keeps the packet from going `way`, if anything; `hop` says whether its TTL counts.
#[inline(always)]
pub fn obstacle(ctx: &TcContext, packet: &Packet, way: &Hop, hop: bool) -> Option<Obstacle> {
    if hop && packet.ttl <= 1 {
        return Some(Obstacle {
            reason: Reason::Expired,
            mtu: 0,
        });
    }
    let mtu = deliver::exceeded_mtu(ctx, packet, way)?;
    Some(Obstacle {
        reason: Reason::TooBig,
        mtu,
    })
}

/// Whether the slow path can take the packet over: a datagram that may be cut up, or of a client on this host,
/// which would remember a small MTU for its loopback address.
#[inline(always)]
pub fn slow_path_fragments(packet: &Packet) -> bool {
    packet.protocol == UDP
        && !packet.is_error()
        && (!packet.dont_fragment || packet.is_from_this_host())
}

/// Which value of `TOLD` counts what is told of this obstacle.
#[inline(always)]
fn group(packet: &Packet, reason: Reason) -> u32 {
    if reason == Reason::Expired {
        return 0;
    }
    let [a, b, c, d] = packet.tuple.source.0;
    let mixed = (a ^ b ^ c.rotate_left(16) ^ d).wrapping_mul(0x9e37_79b1);
    1 + (mixed >> (u32::BITS - limits::TOLD_GROUPS.ilog2()))
}

/// Whether the packet's sender may be told.
///
/// # Errors
/// `Untold`.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
pub fn may_tell(skb: *mut __sk_buff, packet: &Packet, reason: Reason) -> Result<(), Reason> {
    // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
    let to_everybody = matches!(unsafe { (*skb).pkt_type }, BROADCAST | MULTICAST);
    if to_everybody || packet.is_error() || packet.part == Part::Later {
        return Err(Reason::Untold);
    }
    let told = TOLD
        .get_ptr_mut(group(packet, reason))
        .ok_or(Reason::Untold)?;
    // SAFETY: the element belongs to this CPU, and tc programs are not preempted by one another on a CPU.
    let told = unsafe { &mut *told };
    let now = clock::now();
    if now.wrapping_sub(told.since) > WINDOW {
        (told.since, told.count) = (now, 0);
    }
    told.count += 1;
    if told.count > MOST {
        return Err(Reason::Untold);
    }
    Ok(())
}
