//! `forwarder trace`: one line a packet, in the traced program only, so that the other pays nothing.

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::info;
use forwarder_common::{flow::Hop, reason::Reason, tuple::Tuple};

use crate::{parse::Packet, verdict::Verdict};

/// What the pipeline leaves behind of a packet; in the program that is not traced nobody reads it, and the
/// compiler takes it away.
// VERIFIER: before 6.8 every function's stack counts in steps of 32 bytes, and the logger is a second function: this
// program has 480 bytes. Plain fields that are always initialised. An enum with data would be copied with the parts of
// it that are not there.
#[derive(Default)]
pub struct Trail {
    /// Its protocol is 0 until the packet was parsed.
    tuple: Tuple,
    publish: u32,
    new: Tuple,
    /// 0 until the packet was rewritten.
    delivery: u32,
    to: u32,
}

impl Trail {
    #[inline(always)]
    pub fn parsed(&mut self, packet: &Packet, publish: u32) {
        self.tuple = packet.tuple;
        self.publish = publish;
    }

    #[inline(always)]
    pub fn rewritten(&mut self, publish: u32, new: &Tuple, hop: &Hop) {
        self.publish = publish;
        self.new = *new;
        self.delivery = hop.delivery;
        self.to = hop.ifindex;
    }
}

/// Logs what became of a packet that was parsed: publish, reason, device, protocol, the tuple, and, if it was
/// rewritten, the new tuple, delivery and device. User space makes names of the numbers.
#[inline(always)]
pub fn packet(ctx: &TcContext, trail: &Trail, verdict: &Verdict) {
    let reason = match verdict {
        Ok(forwarded) => forwarded.reason,
        Err(Reason::NotOurs) => return,
        Err(reason) => *reason,
    };
    if trail.tuple.protocol == 0 {
        return;
    }
    let (old, new) = (&trail.tuple, &trail.new);
    // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    if trail.delivery == 0 {
        return info!(
            ctx,
            "{} {} {} {} {:i} {} {:i} {}",
            trail.publish,
            reason as u32,
            ifindex,
            old.protocol,
            old.source.octets(),
            u16::from_be(old.source_port),
            old.destination.octets(),
            u16::from_be(old.destination_port)
        );
    }
    info!(
        ctx,
        "{} {} {} {} {:i} {} {:i} {} {:i} {} {:i} {} {} {}",
        trail.publish,
        reason as u32,
        ifindex,
        old.protocol,
        old.source.octets(),
        u16::from_be(old.source_port),
        old.destination.octets(),
        u16::from_be(old.destination_port),
        new.source.octets(),
        u16::from_be(new.source_port),
        new.destination.octets(),
        u16::from_be(new.destination_port),
        trail.delivery,
        trail.to
    );
}
