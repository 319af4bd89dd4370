//! The pipeline: every packet that enters by a device of this host, from top to bottom.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_NOEXIST},
    programs::TcContext,
};
use forwarder_common::{
    flow::{Flow, Hop, ORIGINAL, REPLY, delivery, state},
    publish::flag,
    reason::Reason,
    tuple::Tuple,
};

use crate::{
    deliver, flow, fragment, icmp,
    icmp::Obstacle,
    maps::count,
    parse::{self, Packet},
    publish::{self, Published},
    rewrite, setting,
    source_port::Ports,
    steer,
    trace::Trail,
    verdict::{Forwarded, Verdict},
    words::{copy_address, zero},
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
    let packet = parse::packet(ctx)?;
    if fragment::complete(packet).is_err() {
        fragment::leave(ctx, packet)?;
    }
    let published = publish::find(packet);
    if published.is_some() {
        fragment::rejoin(packet)?;
    }
    trail.parsed(packet, published.map_or(0, |published| published.index));
    if let Some(published) = &published
        && setting(&PEER_FROM_LO) == 0
        && packet.is_from_this_host()
    {
        deliver::fits(ctx, &published.publish.hop)?;
    }
    let verdict = forward(ctx, packet, published, trail);
    if verdict.is_ok() {
        fragment::remember(packet);
    }
    verdict
}

#[inline(always)]
fn forward(
    ctx: &TcContext,
    packet: &Packet,
    published: Option<Published>,
    trail: &mut Trail,
) -> Verdict {
    if let Some(published) = published {
        let mut key = publish::dnat(packet, published.publish);
        if let Some(flow) = original(packet, &published, &mut key) {
            if let Some(obstacle) = before_backend(ctx, packet, &published)? {
                return tell(ctx, packet, obstacle, 0);
            }
            flow::update(ctx, flow, packet, ORIGINAL);
            follow_client(ctx, packet, &mut flow.back);
            flow::keep(&key, flow);
            return to_backend(ctx, packet, &published, &key, trail);
        }
    }
    if let Some(flow) = flow::get_by_reply(packet) {
        if is_stack(&flow.back) {
            return Err(Reason::NotOurs); // until it leaves
        }
        if fragment::is_late(packet) {
            flow::update(ctx, flow, packet, REPLY);
            fragment::hand_over(ctx.skb.skb);
            return Err(Reason::OutOfOrder);
        }
        return to_client(ctx, packet, flow, trail);
    }
    // An ICMP error is carried in both directions like a packet of its flow, but begins none.
    let published = published
        .filter(|_| !packet.is_error())
        .ok_or(Reason::NotOurs)?;
    publish::arrived(packet)?;
    steer::give_way(ctx, packet, &published)?;
    publish::admit(packet, &published)?;
    if let Some(obstacle) = before_backend(ctx, packet, &published)? {
        return tell(ctx, packet, obstacle, 0);
    }
    let mut key = publish::dnat(packet, published.publish);
    begin(ctx, packet, &published, &mut key)?;
    count(Reason::NewFlow);
    to_backend(ctx, packet, &published, &key, trail)
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

/// The flow of a packet from the client's side. `key` is the tuple after DNAT and becomes the
/// flow's key.
#[inline(always)]
pub fn original(
    packet: &Packet,
    published: &Published,
    key: &mut Tuple,
) -> Option<&'static mut Flow> {
    if publish::needs_snat(packet, published.publish) {
        copy_address(&published.publish.source, &mut key.source);
    } else if let Some(flow) = flow::get_original(key, packet) {
        return Some(flow);
    }
    flow::get_by_ports(key, packet, Ports::of(&packet.tuple)?)
}

/// Has answers go where the client's packets come from now: to another MAC behind its device, or by another device if its
/// own has gone. By no other, or a container could speak for somebody else and be answered.
#[inline(always)]
fn follow_client(ctx: &TcContext, packet: &Packet, way: &mut Hop) {
    let stays = way.ifindex == packet.ifindex;
    if packet.is_error() || is_stack(way) || stays && way.delivery == delivery::NEIGHBOUR {
        return;
    }
    let delivery = if stays {
        way.delivery
    } else if publish::exists(way.ifindex) {
        return;
    } else {
        publish::way_back(packet.ifindex)
    };
    if let Ok(new) = deliver::back(ctx, packet.ifindex, delivery)
        && *way != new
    {
        // RACE: an answer on another CPU may read some of both, and is lost.
        *way = new;
    }
}

/// Makes the flow that this packet begins, with the packet counted, and leaves its key.
#[inline(always)]
fn begin(
    ctx: &TcContext,
    packet: &Packet,
    published: &Published,
    key: &mut Tuple,
) -> Result<(), Reason> {
    let way_back = if packet.is_from_this_host() {
        delivery::NEIGHBOUR
    } else {
        publish::way_back(packet.ifindex)
    };
    let back = if is_stack(way(packet, published)) {
        if way_back != delivery::NEIGHBOUR {
            return Err(Reason::ContainerClient);
        }
        THROUGH_THE_STACK
    } else {
        deliver::back(ctx, packet.ifindex, way_back)?
    };
    let draft = flow::draft().ok_or(Reason::NoEntry)?;
    let none = zero();
    draft.flow = Flow {
        client: packet.tuple.source,
        frontend: packet.tuple.destination,
        client_port: packet.tuple.source_port,
        frontend_port: packet.tuple.destination_port,
        publish: published.index,
        back,
        state: flow::local_client(packet),
        acknowledged: [none as u32; 2],
        last_seen: none,
        packets: [none; 2],
        bytes: [none; 2],
    };
    flow::update(ctx, &mut draft.flow, packet, ORIGINAL);
    if publish::needs_snat(packet, published.publish) {
        copy_address(&published.publish.source, &mut key.source);
    } else if flow::insert(key, &draft.flow, BPF_NOEXIST)? {
        return Ok(());
    }
    let ports = Ports::of(&packet.tuple).ok_or(Reason::NoSourcePort)?;
    flow::insert_by_ports(key, draft, ports)
}

/// DNAT, and SNAT where the key says so; an ICMP error is told whether it does.
#[inline(always)]
fn to_backend(
    ctx: &TcContext,
    packet: &Packet,
    published: &Published,
    key: &Tuple,
    trail: &mut Trail,
) -> Verdict {
    let way = way(packet, published);
    trail.rewritten(published.index, key, way);
    let hop = counts(packet, way);
    if packet.is_error() {
        let old = &packet.tuple;
        let keeps_source = key.source == old.source && key.source_port == old.source_port;
        rewrite::error(ctx, packet, key, hop, keeps_source)?;
    } else {
        rewrite::tuple(ctx, packet, key, hop)?;
    }
    let conversation = (!packet.is_error()).then_some((packet, key));
    let action = deliver::deliver(ctx, way, setting(&PEER_FROM_LO) != 0, conversation)?;
    Ok(Forwarded {
        action,
        reason: reason(packet, Reason::ForwardedOriginal),
    })
}

/// The reverse: from the frontend, to the client.
#[inline(always)]
pub fn to_client(ctx: &TcContext, packet: &Packet, flow: &mut Flow, trail: &mut Trail) -> Verdict {
    let hop = flow.state & state::LOCAL_CLIENT == 0 && !is_stack(&flow.back);
    if let Some(obstacle) = icmp::obstacle(ctx, packet, &flow.back, hop) {
        return tell(ctx, packet, obstacle, flow.publish);
    }
    if !flow::update(ctx, flow, packet, REPLY) {
        return Err(Reason::NotOurs);
    }
    let new = flow.answer(packet.tuple.protocol);
    trail.rewritten(flow.publish, &new, &flow.back);
    if packet.is_error() {
        rewrite::error(ctx, packet, &new, hop, false)?;
    } else {
        rewrite::tuple(ctx, packet, &new, hop)?;
    }
    let conversation = (!packet.is_error()).then_some((packet, &new));
    let action = deliver::deliver(ctx, &flow.back, setting(&PEER_FROM_LO) != 0, conversation)
        .map_err(|_| Reason::NoWayBack)?;
    Ok(Forwarded {
        action,
        reason: reason(packet, Reason::ForwardedReply),
    })
}

/// Turns the packet round, as an ICMP error that tells its sender of the obstacle. It comes from the address that the
/// packet was sent to, or from this host's on the network of `publish`'s backend.
#[inline(always)]
fn tell(ctx: &TcContext, packet: &Packet, obstacle: Obstacle, publish: u32) -> Verdict {
    icmp::may_tell(ctx, packet)?;
    rewrite::into_error(ctx, packet, obstacle.mtu, publish::source(publish))?;
    let action = send_back(ctx.skb.skb);
    if action < 0 {
        return Err(Reason::NoWayBack);
    }
    Ok(Forwarded {
        action,
        reason: obstacle.reason,
    })
}

/// Sends what was turned round the way that it came; the action, or a negative number.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
fn send_back(skb: *mut __sk_buff) -> i32 {
    let ctx = &TcContext::new(skb);
    // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
    let ifindex = unsafe { (*skb).ifindex };
    deliver::back(ctx, ifindex, publish::way_back(ifindex))
        .and_then(|back| deliver::deliver(ctx, &back, setting(&PEER_FROM_LO) != 0, None))
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
