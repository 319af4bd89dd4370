//! Devices without Ethernet headers (tun, WireGuard, PPP): a packet that may be ours gets one, and goes through the
//! pipeline like any other. What is not ours stays as it came, for programs behind this one.

use aya_ebpf::programs::TcContext;
use forwarder_common::{publish::flag, reason::Reason};

use crate::{
    maps::PIPELINE,
    parse::{self, Part},
    publish, rewrite,
};

/// Does not return if the packet is for the pipeline.
///
/// # Errors
/// Why it is not.
#[inline(always)]
pub fn enter(ctx: &TcContext) -> Result<(), Reason> {
    let packet = parse::l3::packet(ctx)?;
    // Clients ask this host, and backends behind such a device answer it: SNAT sees to that.
    publish::arrived(&packet)?;
    let without_ports = packet.part == Part::Later;
    let published = publish::find(ctx, &packet)?;
    if published.is_some_and(|published| published.publish.flags & flag::STACK != 0) {
        return Err(Reason::NotOurs); // answers could not be rewritten where they leave
    }
    if without_ports || published.is_some() || publish::may_be_reply(&packet) {
        rewrite::push_ethernet(ctx)?;
        // SAFETY: the map holds programs of this type.
        unsafe { PIPELINE.tail_call(ctx, 0) };
    }
    Err(Reason::NotOurs)
}
