//! The pipeline: every packet that enters by a device of this host, from top to bottom.

use core::ffi::c_void;

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use forwarder_common::{
    flow::{Flow, Hop, ORIGINAL, REPLY, delivery, state},
    limits,
    publish::{Publish, flag},
    reason::Reason,
    tcp::{self, ACK, RST, SYN},
    tuple::TCP,
};

use crate::{
    admit, clock, deliver,
    flow::{self, Begun},
    fragment, icmp,
    icmp::Obstacle,
    left, limit,
    maps::{PUBLISHES, count},
    parse::{self, Packet, Part},
    publish::{self, Published},
    rewrite, route, setting, steer,
    trace::Trail,
    usage,
    verdict::{Forwarded, Verdict},
    words::{copy_address, copy_tuple, reverse, zero},
};

/// Set by the loader: `bpf_redirect_peer` works for packets from `lo` (kernel 6.1 and later).
#[unsafe(no_mangle)]
static PEER_FROM_LO: u8 = 1;

/// The stack routes, resolves neighbours, cuts up and answers as ever.
static THROUGH_THE_STACK: Hop = Hop {
    ifindex: 0,
    mac: [0; 6],
    source_mac: [0; 6],
    delivery: delivery::STACK,
};

/// An existing flow in either direction comes first, then a published port may begin one.
#[inline(always)]
pub fn ingress(ctx: &TcContext, trail: &mut Trail) -> Verdict {
    let packet = parse::packet(ctx).map_err(|reason| admit::unread(ctx.skb.skb, reason))?;
    if fragment::complete(packet).is_err() {
        fragment::leave(ctx.skb.skb, packet)?;
    }
    let published = publish::find(ctx, packet)?;
    if published.is_some() {
        fragment::rejoin(packet)?;
    }
    trail.parsed(packet, published.map_or(0, |published| published.index));
    if packet.is_from_this_host() && left::is_ours(ctx) {
        // An answer on its way to its client, whose own port may be published.
        if let Some(published) = &published {
            steer::give_way(ctx, packet, published)?;
        }
        return Err(Reason::NotOurs);
    }
    if let Some(published) = &published
        && setting(&PEER_FROM_LO) == 0
        && packet.is_from_this_host()
    {
        deliver::fits(ctx, &published.publish.hop)?;
    }
    let verdict = forward(ctx, packet, published, trail);
    fragment::remember(packet, &verdict);
    verdict
}

#[inline(always)]
fn forward(
    ctx: &TcContext,
    packet: &mut Packet,
    published: Option<Published>,
    trail: &mut Trail,
) -> Verdict {
    if let Some(published) = published
        && let Some((published, flow)) = original(packet, published)
    {
        if packet.is_error() {
            admit::error(ctx.skb.skb, packet, flow.back())?;
        } else {
            is_from_client(ctx.skb.skb.cast(), packet, flow)?;
        }
        if flow.state() & state::CUT != 0 {
            return reset(ctx, packet);
        }
        if packet.opens() {
            if tcp::is_used_again(flow.state()) {
                begin_again(packet, &published, flow)?;
            } else if flow.state() & state::ESTABLISHED != 0
                && published.publish.flags & flag::LIMITED != 0
            {
                limit::begin_anew(&packet.tuple.source, published.index)?;
            }
        }
        if let Some(obstacle) = before_backend(ctx, packet, &published)? {
            return tell(ctx, packet, obstacle, 0);
        }
        limit::carry(packet, published.publish.flags, published.index, ORIGINAL)?;
        follow_client(ctx, packet, flow);
        flow::update(ctx, flow, packet, ORIGINAL);
        flow::keep(packet, flow)?;
        return to_backend(ctx, packet, &published, trail);
    }
    if let Some(flow) = flow::get_by_reply(packet) {
        let flags = if packet.is_error() {
            let publish = PUBLISHES
                .get(flow.reply.publish)
                .ok_or(Reason::Unresolved)?;
            admit::error(ctx.skb.skb, packet, &publish.hop)?;
            0
        } else {
            is_from_backend(ctx.skb.skb.cast(), packet, flow.reply.publish)?
        };
        if flow.reply.state & state::CUT != 0 {
            return reset(ctx, packet);
        }
        if is_stack(&flow.reply.back) {
            return Err(Reason::NotOurs); // until it leaves
        }
        limit::carry(packet, flags, flow.reply.publish, REPLY)?;
        if fragment::is_late(packet) {
            flow::update(ctx, flow, packet, REPLY);
            fragment::hand_over(ctx.skb.skb);
            return Err(Reason::OutOfOrder);
        }
        return to_client(ctx, packet, flow, trail);
    }
    if packet.opens() && publish::is_backend(&packet.tuple.destination) {
        flow::note_direct(packet);
    }
    // An ICMP error is carried in both directions like a packet of its flow, but begins none.
    let published = published
        .filter(|_| !packet.is_error())
        .ok_or(Reason::NotOurs)?;
    publish::arrived(packet)?;
    may_begin(ctx.skb.skb, packet, published.publish, published.index)?;
    // Again, as it may have been looked for as another's.
    let is_snat = publish::translate(packet, published.publish);
    if let Some(obstacle) = before_backend(ctx, packet, &published)? {
        return tell(ctx, packet, obstacle, 0);
    }
    let Published { publish, index } = published;
    begin(ctx.skb.skb, packet, publish, index, is_snat)?;
    let draft = flow::draft().ok_or(Reason::NoEntry)?;
    flow::update(ctx, &mut draft.flow, packet, ORIGINAL);
    let begun = if is_snat {
        Begun::Taken
    } else {
        flow::insert(packet)?
    };
    let is_new = match begun {
        Begun::New => true,
        Begun::Already => false,
        Begun::Taken => flow::insert_by_ports(ctx.skb.skb, packet, is_snat)?,
    };
    if is_new {
        count(Reason::NewFlow);
        usage::begun(published.index, is_snat);
    }
    to_backend(ctx, packet, &published, trail)
}

/// Whether a TCP packet is of a connection that is begun already.
#[inline(always)]
fn goes_on(packet: &Packet) -> bool {
    packet.protocol == TCP && !packet.opens()
}

/// Whether a flow may begin with this packet, which has arrived.
///
/// # Errors
/// The reason against it.
#[inline(always)]
fn may_begin(
    skb: *mut __sk_buff,
    packet: &mut Packet,
    publish: &'static Publish,
    index: u32,
) -> Result<(), Reason> {
    let (ctx, published) = (&TcContext::new(skb), &Published { publish, index });
    steer::give_way(ctx, packet, published)?;
    left::is_no_answer(packet)?;
    if goes_on(packet) && !may_go_on(ctx, packet, published) {
        // A socket of this host, such as the proxy's, has its own word on whom it hears.
        if !steer::is_connected(skb, packet) {
            admit::is_not_banned(packet, index)?;
        }
        return Err(Reason::NotSyn);
    }
    if packet.is_from_this_host() && !steer::has_own_source(skb, packet) {
        return Err(Reason::SourceTranslated);
    }
    admit::admit(packet, publish, index)?;
    route::came_back(skb.cast(), packet, &packet.tuple.source)?;
    if !is_stack(way(packet, published)) && route::depends_on_marks(skb.cast(), packet) {
        return Err(Reason::MarksDecide);
    }
    Ok(())
}

/// Whether a new connection may begin with the tuple of a flow that is over: a limit would be none for whoever uses one port again
/// and again.
///
/// # Errors
/// The reason against it.
#[inline(always)]
fn begin_again(packet: &Packet, published: &Published, flow: &mut Flow) -> Result<(), Reason> {
    if let Err(reason) = admit::admit(packet, published.publish, published.index) {
        if !reason.drops() {
            flow.set_state(flow.state() | state::FOREIGN); // it is the proxy's from here on
        }
        return Err(reason);
    }
    count(Reason::NewFlow);
    usage::begun(published.index, false);
    Ok(())
}

/// Whether a connection whose flow is not known, any more or yet, goes on by this packet: as nf_conntrack_tcp_loose has it
/// (Documentation/networking/nf_conntrack-sysctl.rst), where packet and publish alone tell what it becomes, and no socket
/// of this host has the connection.
#[inline(always)]
fn may_go_on(ctx: &TcContext, packet: &Packet, published: &Published) -> bool {
    packet.flags & (SYN | RST | ACK) == ACK
        && published.publish.flags & (flag::STACK | flag::STEERED) == 0
        && !publish::needs_snat(packet, published.publish)
        && !steer::is_connected(ctx.skb.skb, packet)
}

/// The packet's way to the backend. This host's own clients have been through its firewall.
#[inline(always)]
fn way(packet: &Packet, published: &Published) -> &'static Hop {
    if published.publish.flags & flag::STACK != 0 && !packet.is_from_this_host() {
        &THROUGH_THE_STACK
    } else {
        &published.publish.hop
    }
}

#[inline(always)]
fn is_stack(way: &Hop) -> bool {
    way.delivery == delivery::STACK
}

/// Whether this step takes one from the packet's TTL: the stack does so itself, and between processes of one host
/// there is none.
#[inline(always)]
fn counts(packet: &Packet, way: &Hop) -> bool {
    !packet.is_from_this_host() && !is_stack(way)
}

/// What keeps the packet from its backend, if anything.
///
/// # Errors
/// `ToFragment` if the slow path gets round it.
#[inline(always)]
fn before_backend(
    ctx: &TcContext,
    packet: &Packet,
    published: &Published,
) -> Result<Option<Obstacle>, Reason> {
    let way = way(packet, published);
    let obstacle = icmp::obstacle(ctx, packet, way, counts(packet, way));
    match obstacle {
        Some(obstacle)
            if obstacle.reason == Reason::TooBig && icmp::slow_path_fragments(packet) =>
        {
            Err(Reason::ToFragment)
        }
        obstacle => Ok(obstacle),
    }
}

/// The flow of a packet from the client's side, which gets its new tuple, and the publish that it is of: the one that has
/// the port, or one that had it before and drains.
#[inline(always)]
pub fn original(
    packet: &mut Packet,
    published: Published,
) -> Option<(Published, &'static mut Flow)> {
    if let Some(flow) = flow_of(packet, published.publish) {
        return Some((published, flow));
    }
    if published.publish.previous == 0 {
        return None;
    }
    let index = former(packet, published.publish.previous.into());
    let publish = PUBLISHES.get(index).filter(|_| index != 0)?;
    let flow = flow_of(packet, publish)?;
    Some((Published { publish, index }, flow))
}

/// The flow of a packet from the client's side, if this publish has it.
#[inline(always)]
fn flow_of(packet: &mut Packet, publish: &Publish) -> Option<&'static mut Flow> {
    if publish::translate(packet, publish) {
        flow::get_by_ports(packet)
    } else {
        flow::get_original(packet).or_else(|| flow::get_by_alias(packet))
    }
}

/// The first of the publishes that drain on a port, from this one on, that has the packet's flow; 0 for none.
// VERIFIER: a function of its own, as it is rarely needed; it can return no pointer.
#[inline(never)]
fn former(packet: &mut Packet, mut index: u32) -> u32 {
    for _ in 0..limits::DRAINING {
        let Some(publish) = PUBLISHES.get(index) else {
            return 0;
        };
        // A SYN that is sent again is of the flow that it began. A new one is not, though its client had the same port.
        let opens = packet.opens();
        if let Some(flow) = flow_of(packet, publish)
            && (!opens || flow.state() & (state::UNSETTLED | state::CUT) == 0)
        {
            return index;
        }
        index = publish.previous.into();
        if index == 0 {
            return 0;
        }
    }
    0
}

/// Whether a packet of a flow's original direction came in as its client's may.
///
/// # Errors
/// `Martian`.
#[inline(always)]
pub fn is_from_client(context: *mut c_void, packet: &Packet, flow: &Flow) -> Result<(), Reason> {
    let back = flow.back();
    if packet.ifindex == back.ifindex || publish::layer3(packet.ifindex) == back.ifindex {
        return Ok(());
    }
    if !publish::moved(packet, back) {
        return Err(Reason::Martian);
    }
    if is_stack(back) {
        return Ok(()); // which asks itself
    }
    route::came_back(context, packet, &packet.tuple.source)
}

/// Whether a packet, whose source is the backend of a publish, came from there. Returns the publish's bits.
///
/// # Errors
/// `Martian`, or `Unresolved` while the backend's device is not known or has gone.
#[inline(always)]
pub fn is_from_backend(context: *mut c_void, packet: &Packet, index: u32) -> Result<u16, Reason> {
    let publish = PUBLISHES.get(index).ok_or(Reason::Unresolved)?;
    if !publish::is_at_backend(packet, publish)? {
        route::came_back(context, packet, &packet.tuple.source)?;
    }
    Ok(publish.flags)
}

/// Has answers go where the client's packets come from now: to another MAC behind its device, by another uplink, or by
/// another device if its own has gone or its address is another container's now. By no other, or a container could speak for
/// somebody else and be answered.
#[inline(always)]
fn follow_client(ctx: &TcContext, packet: &Packet, flow: &mut Flow) {
    let way = flow.back();
    let by_route = way.delivery == delivery::NEIGHBOUR;
    // The same device may have become a port of a bridge, which is asked once a tick.
    let was_asked = way.ifindex == packet.ifindex && flow.original.last_seen == clock::now();
    if !(packet.is_error() || is_stack(way) || by_route && was_asked) {
        follow(ctx.skb.skb, packet, flow);
    }
}

// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
fn follow(skb: *mut __sk_buff, packet: &Packet, flow: &mut Flow) {
    let ctx = &TcContext::new(skb);
    let way = flow.back();
    let stays = way.ifindex == packet.ifindex;
    let by_route = way.delivery == delivery::NEIGHBOUR;
    if by_route && way.ifindex == publish::layer3(packet.ifindex) {
        return;
    }
    let (ifindex, delivery) = publish::way_back(packet);
    let mut new = *way;
    if by_route && delivery == delivery::NEIGHBOUR {
        new.ifindex = ifindex;
    } else if !stays && publish::exists(way.ifindex) && !publish::is_known_behind(packet)
        || deliver::back(ctx, (ifindex, delivery), &mut new).is_err()
    {
        return;
    }
    if *way != new {
        // RACE: an answer on another CPU may read some of both, and is lost.
        (flow.original.back, flow.reply.back) = (new, new);
    }
}

/// Drafts the flow that this packet, which has its new tuple, begins, or that its connection goes on with. With SNAT it lacks a
/// source port yet.
///
/// # Errors
/// `ContainerClient` where answers would not pass the stack.
// VERIFIER (here and below): a function of its own, for its share of the stack.
#[inline(never)]
fn begin(
    skb: *mut __sk_buff,
    packet: &Packet,
    publish: &'static Publish,
    index: u32,
    is_snat: bool,
) -> Result<(), Reason> {
    let ctx = &TcContext::new(skb);
    let draft = flow::draft().ok_or(Reason::NoEntry)?;
    copy_tuple(&packet.new, &mut draft.key);
    copy_tuple(&packet.tuple, &mut draft.original);
    let flow = &mut draft.flow;
    let (ifindex, delivery) = publish::way_back(packet);
    let through_stack = is_stack(way(packet, &Published { publish, index }));
    // Of a client with the backend's address answers would come to this host itself.
    if through_stack && (delivery != delivery::NEIGHBOUR || is_snat) {
        return Err(Reason::ContainerClient);
    }
    if through_stack && !publish::has_ethernet(packet.ifindex) {
        return Err(Reason::NotOurs); // as in `l3.rs`, which has not seen the ports of a fragment
    }
    let (ifindex, delivery) = if through_stack {
        (0, delivery::STACK)
    } else {
        (ifindex, delivery)
    };
    deliver::back(ctx, (ifindex, delivery), &mut flow.original.back)?;
    flow.reply.back = flow.original.back;
    copy_address(&packet.tuple.source, &mut flow.client);
    copy_address(&packet.tuple.destination, &mut flow.frontend);
    flow.set_ports(packet.tuple.source_port, packet.tuple.destination_port);
    flow.set_publish(index);
    flow.set_state(flow::local_client(packet) | if is_snat { state::KEPT } else { 0 });
    let none = zero();
    for side in [&mut flow.original, &mut flow.reply] {
        (side.acknowledged, side.sent) = (none as u32, none as u32);
        (side.last_seen, side.packets, side.bytes) = (none, none, none);
    }
    if goes_on(packet)
        && let Some(segment) = parse::segment(ctx, packet)
    {
        tcp::pick_up(flow, segment);
    }
    Ok(())
}

/// DNAT, and SNAT where the packet's new tuple says so; an ICMP error is told whether it does.
#[inline(always)]
fn to_backend(
    ctx: &TcContext,
    packet: &Packet,
    published: &Published,
    trail: &mut Trail,
) -> Verdict {
    let way = way(packet, published);
    trail.rewritten(published.index, &packet.new, way);
    let hop = counts(packet, way);
    if packet.is_error() {
        let (old, new) = (&packet.tuple, &packet.new);
        let keeps_source = new.source == old.source && new.source_port == old.source_port;
        rewrite::error(ctx, packet, hop, keeps_source)?;
    } else {
        rewrite::tuple(ctx, packet, hop)?;
        clamp_segments(ctx, packet, way);
    }
    let action = deliver::deliver(ctx, way, setting(&PEER_FROM_LO) != 0, packet)?;
    Ok(Forwarded {
        action,
        reason: reason(packet, Reason::ForwardedOriginal),
    })
}

/// Has a SYN or SYN-ACK ask for no longer segments than the ways take that the connection comes and goes by. What passes
/// the stack is the firewall's business.
#[inline(always)]
fn clamp_segments(ctx: &TcContext, packet: &Packet, way: &Hop) {
    if packet.flags & SYN != 0 && !is_stack(way) {
        let back = route::mtu(packet.ifindex, &packet.tuple.source);
        let on = route::mtu(deliver::device(ctx, packet, way), &packet.new.destination);
        rewrite::clamp(ctx.skb.skb, packet, back.min(on));
    }
}

/// The reverse: from the frontend, to the client.
#[inline(always)]
pub fn to_client(
    ctx: &TcContext,
    packet: &mut Packet,
    flow: &mut Flow,
    trail: &mut Trail,
) -> Verdict {
    let hop = flow.reply.state & state::LOCAL_CLIENT == 0 && !is_stack(&flow.reply.back);
    flow::answer(flow, packet);
    if let Some(obstacle) = icmp::obstacle(ctx, packet, &flow.reply.back, hop) {
        if obstacle.reason == Reason::TooBig && icmp::slow_path_fragments(packet) {
            // And its sender is told all the same: one that heeds it sends what the fast path carries.
            flow::update(ctx, flow, packet, REPLY);
            fragment::leave_to_daemon(ctx.skb.skb, packet);
            count(Reason::CutUp);
        }
        return tell(ctx, packet, obstacle, flow.reply.publish);
    }
    if !flow::update(ctx, flow, packet, REPLY) {
        return Err(Reason::NotOurs);
    }
    trail.rewritten(flow.reply.publish, &packet.new, &flow.reply.back);
    if packet.is_error() {
        rewrite::error(ctx, packet, hop, false)?;
    } else {
        rewrite::tuple(ctx, packet, hop)?;
        clamp_segments(ctx, packet, &flow.reply.back);
    }
    let action = deliver::deliver(ctx, &flow.reply.back, setting(&PEER_FROM_LO) != 0, packet)
        .map_err(|_| Reason::NoWayBack)?;
    Ok(Forwarded {
        action,
        reason: reason(packet, Reason::ForwardedReply),
    })
}

/// Turns the packet round, as an ICMP error that tells its sender of the obstacle. It comes from the address that the
/// packet was sent to, or from this host's on the network of `publish`'s backend.
#[inline(always)]
fn tell(ctx: &TcContext, packet: &mut Packet, obstacle: Obstacle, publish: u32) -> Verdict {
    icmp::may_tell(ctx.skb.skb, packet, obstacle.reason)?;
    rewrite::into_error(ctx, packet, obstacle.mtu, publish::source(publish))?;
    let action = send_back(ctx.skb.skb, packet);
    if action < 0 {
        return Err(Reason::NoWayBack);
    }
    Ok(Forwarded {
        action,
        reason: obstacle.reason,
    })
}

/// Turns a segment of a flow that was cut off round, as the reset that its sender believes.
#[inline(always)]
fn reset(ctx: &TcContext, packet: &mut Packet) -> Verdict {
    let answerable = packet.protocol == TCP
        && packet.part == Part::Whole
        && packet.flags & RST == 0
        && packet.flags & (SYN | ACK) != 0;
    if !answerable {
        return Err(Reason::Cut);
    }
    rewrite::into_reset(ctx, packet)?;
    let action = send_back(ctx.skb.skb, packet);
    if action < 0 {
        return Err(Reason::NoWayBack);
    }
    Ok(Forwarded {
        action,
        reason: Reason::Cut,
    })
}

/// Sends what a packet was turned round into the way that it came, or the way that leads back from there; the action, or a negative
/// number.
#[inline(never)]
fn send_back(skb: *mut __sk_buff, packet: &mut Packet) -> i32 {
    let ctx = &TcContext::new(skb);
    reverse(&packet.tuple, &mut packet.new);
    // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
    let ifindex = unsafe { (*skb).ifindex };
    let delivery = publish::interface(ifindex).map_or(delivery::NEIGHBOUR, |it| it.delivery);
    let by_route = delivery == delivery::NEIGHBOUR;
    let device = if by_route {
        publish::layer3(ifindex)
    } else {
        ifindex
    };
    let mut back = Hop::default();
    deliver::back(ctx, (device, delivery), &mut back)
        .and_then(|()| deliver::deliver(ctx, &back, setting(&PEER_FROM_LO) != 0, packet))
        .unwrap_or(-1)
}

#[inline(always)]
fn reason(packet: &Packet, direction: Reason) -> Reason {
    if packet.is_error() {
        Reason::ForwardedError
    } else {
        direction
    }
}
