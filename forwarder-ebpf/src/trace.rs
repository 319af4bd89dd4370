//! `forwarder trace`: one line a packet, in the traced program only, so that the other pays nothing.

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::info;
use forwarder_common::reason::Reason;

use crate::{parse::Packet, verdict::Verdict};

/// Logs what became of a packet that was parsed. User space makes the names from the numbers.
#[inline(always)]
pub fn packet(ctx: &TcContext, packet: &Packet, publish: u32, verdict: Verdict) {
    let reason = match verdict {
        Ok(forwarded) => forwarded.reason,
        Err(Reason::NotOurs) => return,
        Err(reason) => reason,
    };
    let tuple = &packet.tuple;
    info!(
        ctx,
        "{} {} {} {} {:i} {} {:i} {}",
        publish,
        reason as u32,
        packet.ifindex,
        packet.protocol,
        tuple.source.octets(),
        u16::from_be(tuple.source_port),
        tuple.destination.octets(),
        u16::from_be(tuple.destination_port)
    );
}
