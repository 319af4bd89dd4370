//! Who may begin a flow: not whom a ban, the publish's allow-list, its device or its limits keep out. The proxy asks the same
//! (`forwarder/src/proxy`).

use aya_ebpf::{helpers::bpf_ktime_get_boot_ns, maps::lpm_trie::Key};
use forwarder_common::{
    flow::delivery,
    publish::{Allowed, Publish, allow, ban, flag},
    reason::Reason,
    tuple::Address,
};

use crate::{
    limit,
    maps::{ALLOW, BANNED, BANNED_NETWORKS, BANS},
    parse::Packet,
    publish::{self, Published},
    usage,
};

/// Whether a new flow may begin with this packet, which has arrived. If so, it counts among the new flows.
///
/// # Errors
/// The reason against it.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
pub fn admit(packet: &Packet, publish: &'static Publish, index: u32) -> Result<(), Reason> {
    permitted(packet, &Published { publish, index })?;
    if packet.tuple.source.is_link_local() {
        return Err(Reason::LinkLocal);
    }
    if publish.backend.is_v4() != packet.is_v4 {
        return Err(Reason::OtherFamily);
    }
    if publish.flags & flag::DRAINING != 0 {
        return Err(Reason::Draining);
    }
    if publish.hop.delivery == delivery::NONE {
        return Err(Reason::Unresolved);
    }
    if publish.flags & flag::LIMITED != 0 {
        limit::begin(&packet.tuple.source, index)
            .map_err(|reason| usage::refused(index, reason))?;
    }
    Ok(())
}

/// Whether the packet's source may ask at all. That changes nothing, so that it can be asked on both hooks.
///
/// # Errors
/// `Martian`, `Banned`, `NotAllowed` or `OtherInterface`.
#[inline(always)]
pub fn permitted(packet: &Packet, published: &Published) -> Result<(), Reason> {
    let source = &packet.tuple.source;
    let from_outside = !packet.is_from_this_host();
    if from_outside && (!source.is_unicast() || source.is_loopback() || !publish::belongs(packet)) {
        return Err(Reason::Martian);
    }
    policy(packet, published).map_err(|reason| usage::refused(published.index, reason))
}

#[inline(always)]
fn policy(packet: &Packet, published: &Published) -> Result<(), Reason> {
    let (source, flags) = (&packet.tuple.source, published.publish.flags);
    if is_banned(source) {
        return Err(Reason::Banned);
    }
    if flags & flag::ALLOW_LIST != 0 && !is_allowed(published.index, source) {
        return Err(Reason::NotAllowed);
    }
    if flags & flag::LIMITED != 0 && !limit::comes_by(packet.ifindex, published.index) {
        return Err(Reason::OtherInterface);
    }
    Ok(())
}

/// Refuses what a banned source sends for a connection that is not known.
///
/// # Errors
/// `Banned`.
#[inline(always)]
pub fn is_not_banned(packet: &Packet, publish: u32) -> Result<(), Reason> {
    if is_banned(&packet.tuple.source) {
        return Err(usage::refused(publish, Reason::Banned));
    }
    Ok(())
}

#[inline(always)]
fn is_banned(source: &Address) -> bool {
    match BANS.get(0) {
        Some(&kinds) if kinds != 0 => is_in_force(source, kinds),
        _ => false,
    }
}

// VERIFIER (and below): a function of its own, for its share of the stack.
#[inline(never)]
fn is_in_force(source: &Address, kinds: u32) -> bool {
    let mut until = 0;
    // SAFETY (both): values of these maps are one word, replaced as a whole.
    if kinds & ban::ADDRESSES != 0
        // SAFETY: values of this map are one word, replaced as a whole.
        && let Some(there) = unsafe { BANNED.get(source) }
    {
        until = *there;
    }
    if kinds & ban::NETWORKS != 0
        && let Some(&there) = BANNED_NETWORKS.get(Key::new(128, *source))
        && there > until
    {
        until = there;
    }
    // SAFETY: a helper without arguments.
    until != 0 && (until == ban::FOR_EVER || until > unsafe { bpf_ktime_get_boot_ns() })
}

#[inline(never)]
fn is_allowed(publish: u32, source: &Address) -> bool {
    let data = Allowed {
        publish: publish.to_be(),
        source: *source,
    };
    ALLOW.get(Key::new(32 + 128, data)) == Some(&allow::YES)
}
