//! What leaves by the stack, because its firewall is respected: the backend's answers, which get the frontend's address
//! when the firewall has seen them. The destination is rewritten at ingress and the source here, as netfilter's own
//! NAT does it in PREROUTING and POSTROUTING.

use aya_ebpf::programs::TcContext;
use forwarder_common::{flow::delivery, reason::Reason};

use crate::{
    flow, fragment, ingress,
    parse::{self, Packet},
    trace::Trail,
    verdict::Verdict,
};

#[inline(always)]
pub fn egress(ctx: &TcContext, trail: &mut Trail) -> Verdict {
    let packet = parse::packet(ctx)?;
    fragment::complete(packet)?;
    trail.parsed(packet, 0);
    let verdict = reply(ctx, packet, trail);
    if verdict.is_ok() {
        fragment::remember(packet);
    }
    verdict
}

#[inline(always)]
fn reply(ctx: &TcContext, packet: &mut Packet, trail: &mut Trail) -> Verdict {
    match flow::get_by_reply(packet) {
        Some(flow) if flow.back.delivery == delivery::STACK => {
            ingress::to_client(ctx, packet, flow, trail)
        }
        _ => Err(Reason::NotOurs),
    }
}
