//! What leaves by the stack. Behind the host's own NAT, packets from published port numbers are noted. And where the firewall
//! is respected, the backend's answers get the frontend's address when the firewall has seen them: the destination is
//! rewritten at ingress and the source here, as netfilter's own NAT does it in PREROUTING and POSTROUTING.

use aya_ebpf::programs::TcContext;
use forwarder_common::{
    flow::{REPLY, delivery},
    reason::Reason,
};

use crate::{
    flow, fragment, ingress, left, limit,
    parse::{self, Packet},
    publish, setting,
    trace::Trail,
    verdict::Verdict,
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
    left::note(ctx)?;
    Err(Reason::NotOurs)
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
