//! How a rewritten packet leaves: `bpf_redirect_peer`, `bpf_redirect` or `bpf_redirect_neigh`.
//! Which of them is the loader's decision, kept in the [`Hop`].

use core::ptr;

use aya_ebpf::{
    bindings::{TC_ACT_REDIRECT, TC_ACT_UNSPEC},
    helpers::{bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, generated::bpf_skb_vlan_pop},
    programs::TcContext,
};
use forwarder_common::{
    flow::{Hop, delivery},
    reason::Reason,
};

use crate::{
    frame::header,
    left,
    maps::INTERFACES,
    parse::{self, LOOPBACK_IFINDEX, Packet},
    rewrite, route,
    words::read_mac,
};

const PACKET_HOST: u32 = 0;

/// Sends what the context holds towards `hop`, or leaves it to the stack; the action to return. It has the addresses of
/// `packet`'s new tuple.
///
/// # Errors
/// `Unresolved` if the hop leads nowhere, `Unwritable` if the kernel refuses to change the packet.
#[inline(always)]
pub fn deliver(
    ctx: &TcContext,
    hop: &Hop,
    peer_from_lo: bool,
    packet: &Packet,
) -> Result<i32, Reason> {
    // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
    let (pkt_type, from, mark, tagged) = unsafe {
        let skb = ctx.skb.skb;
        (
            (*skb).pkt_type,
            (*skb).ifindex,
            (*skb).mark,
            (*skb).vlan_present != 0,
        )
    };
    if tagged {
        // Of no VLAN, or it would not be here: the priority counts on that link alone.
        // SAFETY: a valid context.
        if unsafe { bpf_skb_vlan_pop(ctx.skb.skb) } != 0 {
            return Err(Reason::Unwritable);
        }
    }
    if pkt_type != PACKET_HOST {
        // A frame to the bridge's MAC is somebody else's on a bridge port, and the other end would drop it.
        ctx.change_type(PACKET_HOST)
            .map_err(|_| Reason::Unwritable)?;
    }
    let action = match hop.delivery {
        delivery::PEER if peer_from_lo || from != LOOPBACK_IFINDEX => {
            rewrite::macs(ctx, hop.mac, hop.source_mac)?;
            // SAFETY: a helper without pointers.
            unsafe { bpf_redirect_peer(hop.ifindex, 0) }
        }
        delivery::PEER | delivery::DEVICE => {
            rewrite::macs(ctx, hop.mac, hop.source_mac)?;
            // SAFETY: a helper without pointers.
            unsafe { bpf_redirect(hop.ifindex, 0) }
        }
        delivery::NEIGHBOUR => {
            // SAFETY: `skb` is the context that the kernel gave; this field is writable.
            unsafe { (*ctx.skb.skb).tc_index = left::OURS as u32 };
            if hop.ifindex == LOOPBACK_IFINDEX {
                // Back to a client on this host. lo has no MAC, and would take any other for a stranger's.
                rewrite::macs(ctx, [0; 6], [0; 6])?;
            }
            // Rules by mark: the helper that is asked does not know marks.
            let (ifindex, route) = if hop.ifindex != LOOPBACK_IFINDEX && mark == 0 {
                route::get(ctx.skb.skb.cast(), packet, hop.ifindex, 0)
            } else {
                (hop.ifindex, None)
            };
            if let Some(route) = route {
                let [destination, source] = route.macs();
                rewrite::macs(ctx, destination, source)?;
                // SAFETY: a helper without pointers.
                unsafe { bpf_redirect(ifindex, 0) }
            } else {
                // SAFETY: a null pointer with length 0 asks the helper for its own route lookup.
                unsafe { bpf_redirect_neigh(ifindex, ptr::null_mut(), 0, 0) }
            }
        }
        delivery::STACK => return Ok(TC_ACT_UNSPEC),
        _ => return Err(Reason::Unresolved),
    };
    if action == TC_ACT_REDIRECT as i64 {
        Ok(action as i32)
    } else {
        Err(Reason::Unresolved)
    }
}

/// The device that the packet leaves by towards `hop`.
#[inline(always)]
pub fn device(ctx: &TcContext, packet: &Packet, hop: &Hop) -> u32 {
    if hop.delivery == delivery::NEIGHBOUR && hop.ifindex != LOOPBACK_IFINDEX {
        route::device(ctx.skb.skb.cast(), packet, hop.ifindex)
    } else {
        hop.ifindex
    }
}

/// What any way takes (RFC 791), so that most packets need no lookup.
const LEAST_MTU: u32 = 576;

/// The MTU of the way, if the packet, which has its new tuple, is longer, or what it will be cut into is (GSO). A container at
/// the other end of a veth takes packets of any length.
#[inline(always)]
pub fn exceeded_mtu(ctx: &TcContext, packet: &Packet, hop: &Hop) -> Option<u32> {
    if packet.length <= LEAST_MTU || hop.delivery == delivery::PEER {
        return None;
    }
    let mtu = route::mtu(device(ctx, packet, hop), &packet.new.destination);
    (parse::length_on_the_wire(ctx, packet) > mtu).then_some(mtu)
}

/// Whether the queue of a container's veth takes a packet: one that is no longer than its MTU, or that is many
/// segments. `lo` carries longer ones. Other ways are looked at by [`exceeded_mtu`].
#[inline(always)]
pub fn fits(ctx: &TcContext, hop: &Hop) -> Result<(), Reason> {
    if hop.delivery != delivery::PEER {
        return Ok(());
    }
    // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
    let (length, segment) = unsafe { ((*ctx.skb.skb).len, (*ctx.skb.skb).gso_size) };
    // SAFETY: values of this map are two words, replaced as a whole.
    let mtu = unsafe { INTERFACES.get(hop.ifindex) }.map_or(LEAST_MTU, |device| device.mtu);
    if length > mtu.saturating_add(parse::L3 as u32) && segment == 0 {
        return Err(Reason::LongerThanMtu);
    }
    Ok(())
}

/// Where replies go to the client of this packet: out of the device that it came in by.
#[inline(always)]
pub fn back(ctx: &TcContext, (ifindex, delivery): (u32, u32), way: &mut Hop) -> Result<(), Reason> {
    let ethernet = header::<parse::Ethernet>(ctx, 0).ok_or(Reason::NotOurs)?;
    (way.ifindex, way.delivery) = (ifindex, delivery);
    // SAFETY: `header` checked the bounds; both headers and hops are aligned to two.
    unsafe {
        read_mac(&raw const (*ethernet).source, &mut way.mac);
        read_mac(&raw const (*ethernet).destination, &mut way.source_mac);
    }
    Ok(())
}
