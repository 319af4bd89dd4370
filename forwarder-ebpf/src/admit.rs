//! Who may begin a flow: not whom a ban, the publish's allow-list, its device or its limits keep out. The proxy asks the same
//! (`forwarder/src/proxy`).

use aya_ebpf::{
    bindings::__sk_buff, helpers::bpf_ktime_get_boot_ns, maps::lpm_trie::Key, programs::TcContext,
};
use forwarder_common::{
    flow::{Hop, delivery},
    publish::{Publish, PublishSource, allow, ban, flag},
    reason::Reason,
    tuple::{Address, Tuple},
};

use crate::{
    flow,
    frame::Frame as _,
    limit,
    maps::{ALLOW, BANNED, BANNED_NETWORKS, BANS},
    parse::{self, LOOPBACK_IFINDEX, Packet},
    publish::{self, Published},
    route, usage,
};

/// Whether a new flow may begin with this packet, which has arrived. If so, it counts among the new flows.
///
/// # Errors
/// The reason against it.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
pub fn admit(packet: &Packet, publish: &'static Publish, index: u32) -> Result<(), Reason> {
    permitted(packet, &Published { publish, index }).map_err(|reason| refused(reason, index))?;
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
/// `Martian`, `Banned`, `NotAllowed` or `OtherInterface`, which [`refused`] counts.
#[inline(always)]
pub fn permitted(packet: &Packet, published: &Published) -> Result<(), Reason> {
    comes_from(&packet.tuple.source, packet.ifindex)?;
    policy(packet, published)
}

/// Counts what a publish's policy refuses, whoever else may be refused; gives the reason.
#[inline(always)]
pub fn refused(reason: Reason, index: u32) -> Reason {
    match reason {
        Reason::Martian => reason,
        _ => usage::refused(index, reason),
    }
}

/// Whether a packet that came by that device may be of that source. What is on lo has been through this host's own checks.
///
/// # Errors
/// `Martian`.
#[inline(always)]
fn comes_from(source: &Address, ifindex: u32) -> Result<(), Reason> {
    let is_possible = ifindex == LOOPBACK_IFINDEX
        || source.is_unicast() && !source.is_loopback() && publish::is_behind(source, ifindex);
    if is_possible {
        Ok(())
    } else {
        Err(Reason::Martian)
    }
}

/// Whether an ICMP error about a packet that has left by `way` may be of the router that it says it is of.
///
/// # Errors
/// `Martian`.
#[inline(always)]
pub fn error(skb: *mut __sk_buff, packet: &Packet, way: &Hop) -> Result<(), Reason> {
    if !publish::leads(way, packet.ifindex) {
        return Err(Reason::Martian);
    }
    let router = router(skb, packet.ifindex)?;
    route::came_back(skb.cast(), packet, &router.source)
}

// VERIFIER (and below): a function of its own, for its share of the stack.
#[inline(never)]
fn router(skb: *mut __sk_buff, ifindex: u32) -> Result<&'static Tuple, Reason> {
    let own = own_header(skb).ok_or(Reason::NotOurs)?;
    if !publish::is_of_container_at(&own.source, ifindex) {
        comes_from(&own.source, ifindex)?;
    }
    Ok(own)
}

/// Why a packet goes on that the pipeline does not read: for `reason`, unless it is for this host, whose proxy would serve it,
/// and of a source that cannot be.
#[inline(never)]
pub fn unread(skb: *mut __sk_buff, reason: Reason) -> Reason {
    let ctx = &TcContext::new(skb);
    let ifindex = ctx.ifindex();
    if reason != Reason::Options || ifindex == LOOPBACK_IFINDEX {
        return reason;
    }
    let Some(own) = own_header(skb) else {
        return reason;
    };
    if !publish::is_of_this_host(&own.destination) {
        return reason;
    }
    publish::may_ask(&own.source, ifindex)
        .err()
        .unwrap_or(reason)
}

/// The addresses of a packet's own IP header, where no flow is drafted yet: the stack has no room for them.
#[inline(always)]
fn own_header(skb: *mut __sk_buff) -> Option<&'static Tuple> {
    let own = &mut flow::draft()?.other;
    parse::addresses(&TcContext::new(skb), own)?;
    Some(own)
}

#[inline(always)]
fn policy(packet: &Packet, published: &Published) -> Result<(), Reason> {
    let (source, flags) = (&packet.tuple.source, published.publish.flags);
    if is_banned(source, published.index) {
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
    if is_banned(&packet.tuple.source, publish) {
        return Err(usage::refused(publish, Reason::Banned));
    }
    Ok(())
}

#[inline(always)]
fn is_banned(source: &Address, publish: u32) -> bool {
    let kinds = BANS.get(0).copied().unwrap_or_default();
    kinds != 0
        && (is_in_force(source, ban::EVERYWHERE, kinds)
            || kinds & ban::OF_A_PUBLISH != 0 && is_in_force(source, publish, kinds))
}

// VERIFIER (and below): a function of its own, for its share of the stack.
#[inline(never)]
fn is_in_force(source: &Address, publish: u32, kinds: u32) -> bool {
    let data = PublishSource {
        publish: publish.to_be(),
        source: *source,
    };
    let key = Key::new(32 + 128, data);
    let data = &raw const key.data;
    let mut until = 0;
    if kinds & ban::ADDRESSES != 0
        // SAFETY: aligned as the prefix length before it is. Values of this map are one word, replaced as a whole.
        && let Some(there) = unsafe { BANNED.get(&*data) }
    {
        until = *there;
    }
    if kinds & ban::NETWORKS != 0
        && let Some(&there) = BANNED_NETWORKS.get(&key)
        && there > until
    {
        until = there;
    }
    // SAFETY: a helper without arguments.
    until > unsafe { bpf_ktime_get_boot_ns() }
}

#[inline(never)]
fn is_allowed(publish: u32, source: &Address) -> bool {
    let data = PublishSource {
        publish: publish.to_be(),
        source: *source,
    };
    ALLOW.get(Key::new(32 + 128, data)) == Some(&allow::YES)
}
