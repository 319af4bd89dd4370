//! `forwarder trace`: one line a packet, in the traced program only, so that the other pays nothing.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use aya_log_ebpf::info;
use forwarder_common::{flow::Hop, reason::Reason, tuple::Tuple};

use crate::{maps::TRAIL, parse::Packet, verdict::Verdict};

/// What the pipeline leaves behind of a packet; in the program that is not traced nobody reads it, and the
/// compiler takes it away. The traced program's is in a map, since its stack is full.
// VERIFIER: plain fields that are always initialised. An enum with data would be copied with the parts of
// it that are not there.
#[derive(Default)]
pub struct Trail {
    /// 0 until the packet was parsed.
    protocol: u32,
    ifindex: u32,
    tuple: Tuple,
    publish: u32,
    new: Tuple,
    /// 0 until the packet was rewritten.
    delivery: u32,
    to: u32,
    /// A [`Reason`].
    reason: u32,
}

impl Trail {
    /// An empty one, this CPU's own.
    #[inline(always)]
    pub fn of_this_cpu() -> Option<&'static mut Self> {
        let trail = TRAIL.get_ptr_mut(0)?;
        // SAFETY: the element belongs to this CPU, and tc programs are not preempted by one another on a CPU.
        unsafe {
            *trail = Self::default();
            Some(&mut *trail)
        }
    }

    #[inline(always)]
    pub fn parsed(&mut self, packet: &Packet, publish: u32) {
        self.protocol = packet.tuple.protocol;
        self.ifindex = packet.ifindex;
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

    #[inline(always)]
    pub fn ended(&mut self, verdict: &Verdict) {
        self.reason = match verdict {
            Ok(forwarded) => forwarded.reason as u32,
            Err(reason) => *reason as u32,
        };
    }
}

/// Logs what became of a packet that was parsed: publish, reason, device, protocol, the tuple, and, if it was
/// rewritten, the new tuple, delivery and device. User space makes names of the numbers.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
pub fn packet(skb: *mut __sk_buff, trail: &Trail) {
    let ctx = &TcContext::new(skb);
    let reason = trail.reason;
    if trail.protocol == 0 || reason == Reason::NotOurs as u32 {
        return;
    }
    let (old, new) = (&trail.tuple, &trail.new);
    if trail.delivery == 0 {
        return info!(
            ctx,
            "{} {} {} {} {:i} {} {:i} {}",
            trail.publish,
            reason,
            trail.ifindex,
            trail.protocol,
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
        reason,
        trail.ifindex,
        trail.protocol,
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
