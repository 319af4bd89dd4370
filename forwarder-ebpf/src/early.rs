//! XDP, before there is an skb: what is refused ends here, and packets of flows with a backend on another machine go
//! on. All else is tc's, which begins flows, resolves neighbours, tells senders of obstacles and knows every kind of packet.

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup,
        xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    },
    helpers::{bpf_fib_lookup as lookup, bpf_redirect},
    programs::XdpContext,
};
use forwarder_common::{
    flow::{Flow, ORIGINAL, REPLY, delivery, state},
    publish::flag,
    reason::Reason,
    tuple::Tuple,
};

use crate::{
    flow,
    frame::Frame as _,
    ingress,
    maps::{INTERFACES, count},
    parse::{self, Packet, Part},
    publish,
    rewrite::{self, Complete},
    words::zero,
};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// `struct bpf_fib_lookup` (include/uapi/linux/bpf.h) in words, all of which are set: a call to clear it first would cost
/// more than the lookup. IPv4 addresses are in the first words of theirs.
#[repr(C)]
struct Route {
    family_and_protocol: u32,
    /// The second half is the packet's length.
    length: u32,
    ifindex: u32,
    flow: u32,
    source: [u32; 4],
    destination: [u32; 4],
    vlan: u32,
    /// Source and destination.
    macs: [u32; 3],
}

const _: () = assert!(size_of::<Route>() == size_of::<bpf_fib_lookup>());

/// XDP's action.
#[inline(always)]
pub fn early(ctx: &XdpContext) -> u32 {
    match go_on(ctx) {
        Ok(action) => {
            count(Reason::ForwardedEarly);
            action
        }
        Err(reason) if reason.drops() => {
            count(reason);
            XDP_DROP
        }
        Err(_) => XDP_PASS, // tc counts it
    }
}

/// Sends the packet on, or says why not.
#[inline(always)]
fn go_on(ctx: &XdpContext) -> Result<u32, Reason> {
    let packet = parse::packet(ctx)?;
    if packet.part != Part::Whole {
        return Err(Reason::NotOurs);
    }
    let published = publish::find(packet);
    if let Some(published) = published
        && published.publish.flags & flag::REMOTE != 0
    {
        let mut key = publish::dnat(packet, published.publish);
        if let Some(flow) = ingress::original(packet, &published, &mut key) {
            return to_backend(ctx, packet, flow, &key);
        }
    }
    if let Some(flow) = flow::get_by_reply(packet) {
        return to_client(ctx, packet, flow);
    }
    let published = published.ok_or(Reason::NotOurs)?;
    publish::arrived(packet)?;
    publish::permitted(packet, &published)?;
    Err(Reason::NotOurs)
}

#[inline(always)]
fn to_backend(
    ctx: &XdpContext,
    packet: &Packet,
    flow: &mut Flow,
    key: &Tuple,
) -> Result<u32, Reason> {
    let route = route(ctx, packet, key)?;
    flow::update(ctx, flow, packet, ORIGINAL);
    flow::keep(key, flow);
    send(ctx, packet, key, route)
}

/// Replies of other backends come by devices without this program.
#[inline(always)]
fn to_client(ctx: &XdpContext, packet: &Packet, flow: &mut Flow) -> Result<u32, Reason> {
    if flow.state & state::LOCAL_CLIENT != 0 || flow.back.delivery != delivery::NEIGHBOUR {
        return Err(Reason::NotOurs);
    }
    let new = flow.answer(packet.tuple.protocol);
    let route = route(ctx, packet, &new)?;
    if !flow::update(ctx, flow, packet, REPLY) {
        return Err(Reason::NotOurs);
    }
    send(ctx, packet, &new, route)
}

/// The packet's next hop, if the kernel knows it and the device takes frames, and how its checksum is updated.
///
/// # Errors
/// `NotOurs`: tc knows what to do.
#[inline(always)]
fn route(ctx: &XdpContext, packet: &Packet, new: &Tuple) -> Result<(Route, Complete), Reason> {
    if packet.ttl <= 1 {
        return Err(Reason::NotOurs);
    }
    let [low, high] = (packet.length as u16 - parse::L3 as u16).to_ne_bytes();
    let family = if packet.is_v4 { AF_INET } else { AF_INET6 };
    let none = zero() as u32;
    let mut route = Route {
        family_and_protocol: u32::from_ne_bytes([family, packet.protocol, 0, 0]),
        length: u32::from_ne_bytes([0, 0, low, high]),
        ifindex: ctx.ifindex(),
        flow: 0,
        source: new.source.0,
        destination: new.destination.0,
        vlan: none,
        macs: [none; 3],
    };
    if packet.is_v4 {
        (route.source[0], route.destination[0]) = (new.source.v4(), new.destination.v4());
    }
    // SAFETY: the context is valid, and the length is that of the structure.
    let found = unsafe {
        lookup(
            ctx.ctx.cast(),
            (&raw mut route).cast(),
            size_of::<Route>() as i32,
            0,
        )
    };
    if found != BPF_FIB_LKUP_RET_SUCCESS as i64 || !takes_frames(route.ifindex) {
        return Err(Reason::NotOurs);
    }
    let complete = rewrite::complete(ctx, packet).ok_or(Reason::NotOurs)?;
    Ok((route, complete))
}

/// Rewrites the packet and sends it.
#[inline(always)]
fn send(
    ctx: &XdpContext,
    packet: &Packet,
    new: &Tuple,
    (route, complete): (Route, Complete),
) -> Result<u32, Reason> {
    complete.tuple(ctx, packet, new)?;
    let [source, destination]: [[u8; 6]; 2] = bytemuck::cast(route.macs);
    rewrite::macs(ctx, destination, source)?;
    if route.ifindex == ctx.ifindex() {
        return Ok(XDP_TX);
    }
    // SAFETY: a helper without pointers.
    let action = unsafe { bpf_redirect(route.ifindex, 0) } as u32;
    if action == XDP_REDIRECT {
        Ok(action)
    } else {
        Err(Reason::Unwritable)
    }
}

/// Whether this program is on the device too: others may not take frames from it.
#[inline(always)]
fn takes_frames(ifindex: u32) -> bool {
    // SAFETY: values of this map are words, each replaced as a whole.
    unsafe { INTERFACES.get(ifindex) }.is_some_and(|interface| interface.xdp != 0)
}
