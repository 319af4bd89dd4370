//! XDP, before there is an skb: what is refused ends here, and packets of flows with a backend on another machine go
//! on. All else is tc's, which begins flows, resolves neighbours, tells senders of obstacles and knows every kind of packet.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    helpers::bpf_redirect,
    programs::XdpContext,
};
use forwarder_common::{
    flow::{Flow, Hop, ORIGINAL, REPLY, delivery, state},
    publish::flag,
    reason::Reason,
    tcp::SYN,
    tuple::TCP,
};

use crate::{
    admit, flow,
    frame::Frame as _,
    ingress, left, limit,
    maps::count,
    parse::{self, Packet, Part},
    publish::{self, Published},
    rewrite::{self, Complete},
    route::{self, Route},
};

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
    let opens = packet.flags & SYN != 0; // tc clamps the segments' size
    let published = publish::find(ctx, packet)?;
    if let Some(published) = published
        && published.publish.flags & flag::REMOTE != 0
        && !opens
        && let Some((published, flow)) = ingress::original(packet, published)
        && published.publish.flags & flag::REMOTE != 0
    {
        if flow.state() & state::CUT != 0 {
            return Err(Reason::NotOurs);
        }
        if !parse::is_to(ctx, &flow.back().source_mac) && !publish::is_to_device(ctx, packet) {
            return Err(Reason::NotOurs);
        }
        ingress::is_from_client(ctx.ctx.cast(), packet, flow)?;
        return to_backend(ctx, packet, flow, &published);
    }
    if !opens && let Some(flow) = flow::get_by_reply(packet) {
        let flags = ingress::is_from_backend(ctx.ctx.cast(), packet, flow.reply.publish)?;
        return to_client(ctx, packet, flow, flags);
    }
    let published = published.ok_or(Reason::NotOurs)?;
    if packet.is_error() || packet.protocol == TCP && !packet.opens() {
        return Err(Reason::NotOurs);
    }
    if packet.protocol != TCP && published.publish.flags & flag::STEERED != 0 {
        return Err(Reason::NotOurs); // a socket of this host may have the port
    }
    publish::arrived(packet)?;
    left::is_no_answer(packet)?;
    if publish::is_to_device(ctx, packet)
        && let Err(reason) = admit::permitted(packet, &published)
        && (packet.protocol == TCP || ingress::original(packet, published).is_none())
    {
        return Err(admit::refused(reason, published.index));
    }
    Err(Reason::NotOurs)
}

#[inline(always)]
fn to_backend(
    ctx: &XdpContext,
    packet: &Packet,
    flow: &mut Flow,
    published: &Published,
) -> Result<u32, Reason> {
    let publish = published.publish;
    let route = route(ctx, packet, &publish.hop)?;
    limit::carry(packet, publish.flags, published.index, ORIGINAL)?;
    flow::update(ctx, flow, packet, ORIGINAL);
    flow::keep(packet, flow)?;
    send(ctx, packet, route)
}

/// Replies of other backends come by devices without this program.
#[inline(always)]
fn to_client(
    ctx: &XdpContext,
    packet: &mut Packet,
    flow: &mut Flow,
    flags: u16,
) -> Result<u32, Reason> {
    if flow.reply.state & (state::LOCAL_CLIENT | state::CUT) != 0 {
        return Err(Reason::NotOurs);
    }
    flow::answer(flow, packet);
    let route = route(ctx, packet, &flow.reply.back)?;
    limit::carry(packet, flags, flow.reply.publish, REPLY)?;
    if !flow::update(ctx, flow, packet, REPLY) {
        return Err(Reason::NotOurs);
    }
    send(ctx, packet, route)
}

/// The packet's next hop by `hop`'s device, if the kernel knows it and the device takes frames, and how its checksum is
/// updated.
///
/// # Errors
/// `NotOurs`: tc knows what to do.
#[inline(always)]
fn route(
    ctx: &XdpContext,
    packet: &Packet,
    hop: &Hop,
) -> Result<(&'static Route, Complete), Reason> {
    if packet.ttl <= 1 || hop.delivery != delivery::NEIGHBOUR {
        return Err(Reason::NotOurs);
    }
    let length = packet.length - parse::L3 as u32;
    let (_, route) = route::get(ctx.ctx.cast(), packet, hop.ifindex, length);
    let route = route
        .filter(|route| route.takes_frames())
        .ok_or(Reason::NotOurs)?;
    if length > route::mtu(route.ifindex(), &packet.new.destination) {
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
    (route, complete): (&Route, Complete),
) -> Result<u32, Reason> {
    complete.tuple(ctx, packet)?;
    let [destination, source] = route.macs();
    rewrite::macs(ctx, destination, source)?;
    if route.ifindex() == ctx.ifindex() && !route.only_redirects() {
        return Ok(XDP_TX);
    }
    // SAFETY: a helper without pointers.
    let action = unsafe { bpf_redirect(route.ifindex(), 0) } as u32;
    if action == XDP_REDIRECT {
        Ok(action)
    } else {
        Err(Reason::Unwritable)
    }
}
