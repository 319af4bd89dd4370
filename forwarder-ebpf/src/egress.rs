//! What leaves by the stack. Behind the host's own NAT, packets from published port numbers are noted. This host's own ICMP
//! errors about packets that the program has sent on are told as the client knows it. And where the firewall
//! is respected, the backend's answers get the frontend's address when the firewall has seen them: the destination is
//! rewritten at ingress and the source here, as netfilter's own NAT does it in PREROUTING and POSTROUTING.

use aya_ebpf::{bindings::TC_ACT_UNSPEC, programs::TcContext};
use forwarder_common::{
    flow::{REPLY, delivery},
    reason::Reason,
};

use crate::{
    flow, fragment, ingress, left, limit,
    parse::{self, Packet},
    publish, rewrite, setting,
    trace::Trail,
    verdict::{Forwarded, Verdict},
};

/// Set by the loader: the firewall is respected.
#[unsafe(no_mangle)]
static RESPECTS_FIREWALL: u8 = 1;

#[inline(always)]
pub fn egress(ctx: &TcContext, trail: &mut Trail) -> Verdict {
    if setting(&RESPECTS_FIREWALL) != 0 {
        match reply(ctx, trail) {
            Err(Reason::NotOurs) => {}
            verdict => return verdict,
        }
    }
    // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
    let socket = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    let is_own = !socket.is_null();
    let may_concern = match is_own {
        true => parse::is_icmp(ctx),
        false => left::may_be_from_published_port(ctx),
    };
    if left::is_ours(ctx) || !may_concern {
        return Err(Reason::NotOurs);
    }
    let packet = parse::packet(ctx).map_err(|_| Reason::NotOurs)?;
    if is_own {
        return own_error(ctx, packet, trail);
    }
    left::note(packet);
    Err(Reason::NotOurs)
}

/// An ICMP error of this host's own, for which the kernel has a socket (net/ipv4/icmp.c): nobody answers for a backend's
/// address, say. It quotes the packet as the program has sent it on, and its destination is right.
#[inline(always)]
fn own_error(ctx: &TcContext, packet: &mut Packet, trail: &mut Trail) -> Verdict {
    let flow = flow::get_by_reply(packet).filter(|_| packet.is_error());
    let flow = flow.ok_or(Reason::NotOurs)?;
    trail.parsed(packet, 0);
    flow::answer(flow, packet);
    trail.rewritten(flow.reply.publish, &packet.new, &flow.reply.back);
    rewrite::error(ctx, packet, false, false)?;
    Ok(Forwarded {
        action: TC_ACT_UNSPEC,
        reason: Reason::ForwardedError,
    })
}

#[inline(always)]
fn reply(ctx: &TcContext, trail: &mut Trail) -> Verdict {
    let packet = parse::packet(ctx)?;
    fragment::complete(packet)?;
    trail.parsed(packet, 0);
    let verdict = rewritten(ctx, packet, trail);
    fragment::remember(packet, &verdict);
    verdict
}

#[inline(always)]
fn rewritten(ctx: &TcContext, packet: &mut Packet, trail: &mut Trail) -> Verdict {
    match flow::get_by_reply(packet) {
        Some(flow) if flow.reply.back.delivery == delivery::STACK => {
            let flags = publish::flags(flow.reply.publish);
            limit::carry(packet, flags, flow.reply.publish, REPLY)?;
            ingress::to_client(ctx, packet, flow, trail)
        }
        _ => Err(Reason::NotOurs),
    }
}
