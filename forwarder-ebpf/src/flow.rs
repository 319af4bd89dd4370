//! Flows: found from both directions, made once, their state followed.

use aya_ebpf::{bindings::BPF_NOEXIST, helpers::bpf_get_prandom_u32};
use forwarder_common::{
    flow::{Flow, state},
    limits,
    reason::Reason,
    tuple::{TCP, Tuple},
};

use crate::{
    clock,
    maps::{ALIASES, FLOWS},
    parse::{ACK, FIN, Packet, RST},
};

const EEXIST: i32 = -17;

pub const ORIGINAL: usize = 0;
pub const REPLY: usize = 1;

/// The flow whose key is `tuple`.
#[inline(always)]
pub fn get(tuple: &Tuple) -> Option<&'static mut Flow> {
    // SAFETY: an element stays readable and writable until the program ends, also when it is deleted
    // meanwhile (RCU).
    // RACE: other CPUs write the same element: a counter may lose a packet, and a state bit set
    // on one CPU between another's read and write may come a packet late.
    FLOWS.get_ptr_mut(tuple).map(|flow| unsafe { &mut *flow })
}

/// The key of the flow whose original tuple this is, if its source was changed.
#[inline(always)]
pub fn alias(original: &Tuple) -> Option<Tuple> {
    // SAFETY: aliases are written once, before anybody can find them, and then deleted.
    unsafe { ALIASES.get(original) }.copied()
}

/// Whether the packet belongs to the flow's original direction: it asked for this frontend, and
/// a client on this host is one that came by `lo`.
#[inline(always)]
pub fn is_original(flow: &Flow, packet: &Packet) -> bool {
    flow.frontend == packet.tuple.destination
        && flow.frontend_port == packet.tuple.destination_port
        && (flow.state & state::LOCAL_CLIENT != 0) == packet.is_from_this_host()
}

/// Follows the conversation: counters, time and state. An ICMP error neither refreshes nor ends it.
#[inline(always)]
pub fn update(flow: &mut Flow, packet: &Packet, direction: usize) {
    if packet.is_error() {
        return;
    }
    flow.last_seen = clock::now();
    if direction == ORIGINAL {
        flow.packets[0] += 1;
        flow.bytes[0] += packet.length as u64;
    } else {
        flow.packets[1] += 1;
        flow.bytes[1] += packet.length as u64;
    }
    let before = flow.state;
    let mut after = before;
    if packet.protocol == TCP {
        let flags = packet.flags;
        if direction == ORIGINAL {
            if packet.opens()
                && (before & state::BOTH_FIN == state::BOTH_FIN || before & state::RESET != 0)
            {
                after &= !state::PROGRESS; // the tuple is used again
            }
            if flags & ACK != 0 && before & state::REPLIED != 0 {
                after |= state::ESTABLISHED;
            }
            if flags & FIN != 0 {
                after |= state::FIN_ORIGINAL;
            }
        } else {
            if flags & RST == 0 {
                after |= state::REPLIED;
            }
            if flags & FIN != 0 {
                after |= state::FIN_REPLY;
            }
        }
        if flags & RST != 0 {
            after |= state::RESET;
        }
    } else if direction == REPLY {
        after |= state::REPLIED;
    }
    if after != before {
        flow.state = after;
    }
}

/// Inserts a flow under the tuple after DNAT. `Ok(false)`: the tuple is taken.
///
/// # Errors
/// `FlowsFull`.
#[inline(always)]
pub fn insert(key: &Tuple, flow: &Flow) -> Result<bool, Reason> {
    match FLOWS.insert(key, flow, BPF_NOEXIST as u64) {
        Ok(()) => Ok(true),
        Err(EEXIST) => Ok(false),
        Err(_) => Err(Reason::FlowsFull),
    }
}

/// Inserts a flow with a source port nobody else has towards this backend, and an alias from the
/// original tuple to it; leaves the port in `key`.
///
/// # Errors
/// `NoSourcePort`, `FlowsFull`.
#[inline(always)]
pub fn insert_with_source_port(
    original: &Tuple,
    key: &mut Tuple,
    flow: &Flow,
    first: u16,
    ports: u32,
) -> Result<(), Reason> {
    if ports == 0 {
        return Err(Reason::NoSourcePort);
    }
    // SAFETY: a helper without arguments.
    let start = unsafe { bpf_get_prandom_u32() };
    for attempt in 0..limits::SNAT_TRIES {
        let offset = start.wrapping_add(attempt.wrapping_mul(0x9e37)) % ports;
        key.source_port = first.wrapping_add(offset as u16).to_be();
        if !insert(key, flow)? {
            continue;
        }
        // RACE: two packets of one conversation at once: the second finds the alias taken, gives its port
        // back and lets the stack have the packet; the client's retransmission finds the first's flow.
        if ALIASES.insert(original, &*key, BPF_NOEXIST as u64).is_err() {
            let _ = FLOWS.remove(&*key);
            return Err(Reason::FlowsFull);
        }
        return Ok(());
    }
    Err(Reason::NoSourcePort)
}
