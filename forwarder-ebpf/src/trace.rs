//! `forwarder trace`: one line a packet, in the traced program only, so that the other pays nothing.

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::info;
use forwarder_common::reason::Reason;

use crate::{parse::Packet, verdict::Verdict};

/// Logs what became of a packet that was parsed: publish, reason, device, protocol, the tuple, and, if it was
/// forwarded, the new tuple, delivery and device. User space makes names of the numbers.
#[inline(always)]
pub fn packet(ctx: &TcContext, packet: &Packet, publish: u32, verdict: Verdict) {
    let (reason, publish) = match &verdict {
        Ok(forwarded) => (forwarded.reason, forwarded.publish),
        Err(Reason::NotOurs) => return,
        Err(reason) => (*reason, publish),
    };
    let old = &packet.tuple;
    let Ok(forwarded) = &verdict else {
        return info!(
            ctx,
            "{} {} {} {} {:i} {} {:i} {}",
            publish,
            reason as u32,
            packet.ifindex,
            packet.protocol,
            old.source.octets(),
            u16::from_be(old.source_port),
            old.destination.octets(),
            u16::from_be(old.destination_port)
        );
    };
    let new = &forwarded.tuple;
    info!(
        ctx,
        "{} {} {} {} {:i} {} {:i} {} {:i} {} {:i} {} {} {}",
        publish,
        reason as u32,
        packet.ifindex,
        packet.protocol,
        old.source.octets(),
        u16::from_be(old.source_port),
        old.destination.octets(),
        u16::from_be(old.destination_port),
        new.source.octets(),
        u16::from_be(new.source_port),
        new.destination.octets(),
        u16::from_be(new.destination_port),
        forwarded.hop.delivery,
        forwarded.hop.ifindex
    );
}
