//! Fragments: the first one's ports, remembered for the others, which have none. Only of datagrams that the
//! fast path carries: of all others the stack must get every part, also if it got one before the first came.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_ANY, BPF_NOEXIST},
    helpers::generated::bpf_skb_load_bytes,
};
use forwarder_common::{
    handover::{FRAME, Fragment, JUMBO_FRAME, LONGEST_FRAME},
    reason::Reason,
    tuple::{Tuple, UDP},
};

use crate::{
    clock,
    maps::{FRAGMENTS, HANDOVER},
    parse::{L3, Packet, Part},
    publish,
    verdict::Verdict,
    words::copy_tuple,
};

/// How long the parts of a datagram may take (RFC 791 has 15 s, Linux' `ipfrag_time` 30). After that its
/// identification is another's.
const PATIENCE: u64 = 30_000_000_000;

/// A value of `FRAGMENTS`: what becomes of a datagram.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Datagram {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    since: u64,
    /// Source and destination, in wire order; 0 if the stack has it.
    ports: u32,
    reserved: u32,
}

/// What the parts of one datagram have in common (RFC 791 section 3.2, RFC 8200 section 4.5); the
/// identification stands where the ports would. It is put where the packet's new tuple will be.
#[inline(always)]
fn key(packet: &mut Packet) -> &Tuple {
    copy_tuple(&packet.tuple, &mut packet.new);
    packet.new.source_port = packet.id as u16;
    packet.new.destination_port = (packet.id >> 16) as u16;
    &packet.new
}

/// The ports of the packet's datagram; 0 if the stack has it, `None` if it is not known.
#[inline(always)]
fn ports(packet: &mut Packet) -> Option<u32> {
    // SAFETY: an element's memory stays readable until the program ends.
    // RACE: one that is replaced meanwhile is that of the longest unused datagram.
    let datagram = unsafe { FRAGMENTS.get(key(packet)) }?;
    (clock::now().wrapping_sub(datagram.since) < PATIENCE).then_some(datagram.ports)
}

/// Whether it was done, as `flags` say. Without it, the others go up the stack and the datagram is lost, as any may be.
#[inline(always)]
fn insert(packet: &mut Packet, ports: u32, flags: u32) -> bool {
    let datagram = Datagram {
        since: clock::now(),
        ports,
        reserved: 0,
    };
    FRAGMENTS
        .insert(key(packet), &datagram, flags as u64)
        .is_ok()
}

/// Gives a later fragment the ports of its first.
///
/// # Errors
/// `Fragment` if the first was not carried, or has not come yet.
#[inline(always)]
pub fn complete(packet: &mut Packet) -> Result<(), Reason> {
    if packet.part == Part::Later {
        find(packet)
    } else {
        Ok(())
    }
}

// VERIFIER (here and below): a function of its own, for its share of the stack.
#[inline(never)]
fn find(packet: &mut Packet) -> Result<(), Reason> {
    match ports(packet) {
        Some(ports) if ports != 0 => {
            set_ports(packet, ports);
            Ok(())
        }
        _ => Err(Reason::Fragment),
    }
}

#[inline(always)]
fn set_ports(packet: &mut Packet, ports: u32) {
    packet.tuple.source_port = ports as u16;
    packet.tuple.destination_port = (ports >> 16) as u16;
}

#[inline(always)]
fn own_ports(packet: &Packet) -> u32 {
    packet.tuple.source_port as u32 | (packet.tuple.destination_port as u32) << 16
}

/// Decides by the first of its parts that comes here what becomes of a datagram, and returns that: the ports, or 0.
#[inline(never)]
fn decide(packet: &mut Packet, ports: u32) -> u32 {
    // RACE: two parts on two CPUs: one of them has come first.
    if insert(packet, ports, BPF_NOEXIST) {
        return ports;
    }
    self::ports(packet).unwrap_or_else(|| {
        insert(packet, ports, BPF_ANY); // in place of one that has had its time
        ports
    })
}

/// Passes up what has come before its first. Whoever puts the parts together must get all of them: of a client's datagram
/// the stack, whose proxy serves it, and of a backend's the daemon, since no socket of this host waits for an answer to
/// the client. Not of TCP, which sends again what is lost.
///
/// # Errors
/// `Fragment`, unless its first has come meanwhile.
#[inline(always)]
pub fn leave(skb: *mut __sk_buff, packet: &mut Packet) -> Result<(), Reason> {
    if packet.protocol != UDP {
        return Err(Reason::Fragment);
    }
    let belongs = publish::belongs(packet);
    let (source, ifindex) = (&packet.tuple.source, packet.ifindex);
    let of_backend =
        publish::is_backend(source) && (belongs || publish::is_of_container_at(source, ifindex));
    // Of nobody else, or others' datagrams could be kept from the fast path in their name.
    if !of_backend && (publish::arrived(packet).is_err() || !belongs) {
        return Err(Reason::Fragment);
    }
    let ports = decide(packet, 0);
    if ports != 0 {
        set_ports(packet, ports);
        return Ok(());
    }
    if of_backend {
        hand_over(skb);
    }
    Err(Reason::Fragment)
}

/// Gives the daemon a backend's datagram that cannot leave as it is: a whole one, or the first of its parts, which the others
/// follow.
#[inline(always)]
pub fn leave_to_daemon(skb: *mut __sk_buff, packet: &mut Packet) {
    if packet.part == Part::First {
        forget_ports(packet);
    }
    hand_over(skb);
}

#[inline(never)]
fn forget_ports(packet: &mut Packet) {
    insert(packet, 0, BPF_ANY);
}

/// Gives the daemon a copy. Without one the datagram is lost, as any may be.
#[inline(never)]
pub fn hand_over(skb: *mut __sk_buff) {
    // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
    let (length, segment) = unsafe { ((*skb).len, (*skb).gso_size) };
    if length <= FRAME as u32 {
        copy::<FRAME>(skb, length, segment);
    } else if length <= JUMBO_FRAME as u32 {
        copy::<JUMBO_FRAME>(skb, length, segment);
    } else if length <= LONGEST_FRAME as u32 {
        copy::<LONGEST_FRAME>(skb, length, segment);
    }
}

/// Copies a frame of at most `N` octets.
// VERIFIER: that bound stands before `reserve` and the other behind it, since the compiler would make one comparison, of
// another value, of the two.
#[inline(always)]
fn copy<const N: usize>(skb: *mut __sk_buff, length: u32, segment: u32) {
    let Some(mut entry) = HANDOVER.reserve::<Fragment<N>>(0) else {
        return;
    };
    let to = entry.as_mut_ptr();
    // SAFETY: the entry has room for the frame. What is behind the frame stays unwritten, and unread.
    let copied = unsafe {
        (&raw mut (*to).length).write(length);
        (&raw mut (*to).segment).write(segment);
        length >= L3 as u32
            && bpf_skb_load_bytes(skb.cast(), 0, (&raw mut (*to).frame).cast(), length) == 0
    };
    if copied {
        entry.submit(0);
    } else {
        entry.discard(0);
    }
}

/// Whether this is the first fragment of a backend's datagram of which a later one has come before.
#[inline(always)]
pub fn is_late(packet: &mut Packet) -> bool {
    packet.part == Part::First && {
        let ports = own_ports(packet);
        decide(packet, ports) == 0
    }
}

/// Keeps a client's first fragment with those that came before it.
///
/// # Errors
/// `Fragment` if the stack has one.
#[inline(always)]
pub fn rejoin(packet: &mut Packet) -> Result<(), Reason> {
    if packet.part == Part::First && is_left(packet) {
        Err(Reason::Fragment)
    } else {
        Ok(())
    }
}

/// Whether the stack has a part of the packet's datagram.
#[inline(never)]
fn is_left(packet: &mut Packet) -> bool {
    ports(packet) == Some(0)
}

/// Remembers a first fragment that was carried, and not answered by an error.
#[inline(always)]
pub fn remember(packet: &mut Packet, verdict: &Verdict) {
    if packet.part == Part::First
        && let Ok(forwarded) = verdict
        && !matches!(forwarded.reason, Reason::Expired | Reason::TooBig)
    {
        carried(packet);
    }
}

#[inline(never)]
fn carried(packet: &mut Packet) {
    let ports = own_ports(packet);
    insert(packet, ports, BPF_ANY);
}
