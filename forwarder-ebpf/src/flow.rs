//! Flows: found from both directions, made once, their state followed. They begin in `HALF_OPEN`, where a flood
//! makes the oldest go, and are kept in `FLOWS` when the client has answered the backend's answer, which no
//! sender of invented addresses does.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use forwarder_common::{
    flow::{Flow, REPLY, state},
    limits,
    reason::Reason,
    tcp,
    tuple::{TCP, Tuple},
};

use crate::{
    clock,
    frame::Frame,
    maps::{DRAFT, Draft, FLOWS, HALF_OPEN, count},
    parse::{self, Packet},
    publish,
    source_port::Ports,
    words::{copy_address, copy_tuple, reverse},
};

const EEXIST: i32 = -17;
const NO_PORT: u32 = u32::MAX;

/// The flow whose key is `tuple`. Proven ones come first: what is left of them in `HALF_OPEN` is not looked at.
#[inline(always)]
pub fn get(tuple: &Tuple) -> Option<&'static mut Flow> {
    FLOWS
        .get_ptr_mut(tuple)
        .or_else(|| HALF_OPEN.get_ptr_mut(tuple))
        // SAFETY: an element's memory stays readable and writable until the program ends, whatever becomes of it.
        // RACE: other CPUs write the same element: a counter may lose a packet, and a state bit set
        // on one CPU between another's read and write may come a packet late.
        // RACE: an element of `HALF_OPEN` whose flow is evicted is another's at once. It is taken from those that were
        // not looked up for longest, so not from under this packet, but for a lookup in the very nanoseconds between
        // the kernel's choice and its removal: then one packet would go to the other client.
        .map(|flow| unsafe { &mut *flow })
}

/// The flow that the packet is a backend's answer of. Nearly always it is the answer that carries the key, reversed.
#[inline(always)]
pub fn get_by_reply(packet: &mut Packet) -> Option<&'static mut Flow> {
    if !publish::may_be_reply(packet) {
        return None;
    }
    reverse(&packet.tuple, &mut packet.new);
    get(&packet.new).filter(|flow| flow.state & state::FOREIGN == 0)
}

/// The flow whose key is what the packet becomes, if the packet is of its original direction.
#[inline(always)]
pub fn get_original(packet: &Packet) -> Option<&'static mut Flow> {
    get(&packet.new).filter(|flow| is_original(flow, packet))
}

/// The same, with one of the conversation's own source ports, which the packet gets: nearly always the first.
#[inline(always)]
pub fn get_by_ports(packet: &mut Packet, ports: Ports) -> Option<&'static mut Flow> {
    let tries = ports.tries();
    if tries == 0 {
        return None;
    }
    packet.new.source_port = ports.nth(0);
    let first = get_original(packet);
    if first.is_some() || tries == 1 {
        return first;
    }
    let draft = draft()?;
    copy_tuple(&packet.new, &mut draft.key);
    copy_tuple(&packet.tuple, &mut draft.original);
    draft.flow.state = local_client(packet);
    packet.new.source_port = u16::try_from(find_port(ports.0)).ok()?;
    get_original(packet)
}

/// The source port of the flow that is drafted, if it is not the first; more than a port if there is none.
// VERIFIER: a function that others may call is walked once, and not in every state that a packet may come in.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_port(hash: u32) -> u32 {
    let ports = Ports(hash);
    let Some(draft) = draft() else {
        return NO_PORT;
    };
    let tries = ports.tries();
    for attempt in 1..limits::SNAT_TRIES {
        if attempt >= tries {
            break;
        }
        draft.key.source_port = ports.nth(attempt);
        if let Some(flow) = get(&draft.key)
            && is_of(flow, &draft.original, draft.flow.state)
        {
            return draft.key.source_port as u32;
        }
    }
    NO_PORT
}

/// Whether the packet is from this flow's client to its frontend; a client on this host is one that came by `lo`.
#[inline(always)]
fn is_original(flow: &Flow, packet: &Packet) -> bool {
    is_of(flow, &packet.tuple, local_client(packet))
}

#[inline(always)]
fn is_of(flow: &Flow, original: &Tuple, local_client: u32) -> bool {
    flow.client_port == original.source_port
        && flow.frontend_port == original.destination_port
        && flow.client == original.source
        && flow.frontend == original.destination
        && flow.state & (state::LOCAL_CLIENT | state::FOREIGN) == local_client
}

/// The part of a flow's state that its first packet says.
#[inline(always)]
pub fn local_client(packet: &Packet) -> u32 {
    if packet.is_from_this_host() {
        state::LOCAL_CLIENT
    } else {
        0
    }
}

/// Follows the conversation: counters, time and state. An ICMP error neither refreshes nor ends it. Returns whether the
/// packet is of this conversation.
#[inline(always)]
pub fn update(frame: &impl Frame, flow: &mut Flow, packet: &Packet, direction: usize) -> bool {
    if packet.is_error() {
        return true;
    }
    flow.last_seen = clock::now();
    if packet.protocol == TCP {
        if let Some(segment) = parse::segment(frame, packet)
            && !tcp::follow(flow, direction, segment)
        {
            return false;
        }
    } else if direction == REPLY {
        if flow.state & state::REPLIED == 0 {
            flow.state |= state::REPLIED;
        }
    } else if flow.state & (state::REPLIED | state::ESTABLISHED) == state::REPLIED {
        flow.state |= state::ESTABLISHED;
    }
    flow.packets[direction] += 1;
    flow.bytes[direction] += packet.length as u64;
    true
}

/// Puts a flow that is proven where no new one takes its place. Called with a packet of the original direction. What
/// `HALF_OPEN` has of it goes when it is the oldest: to remove it now would give its element to another flow
/// while a reply on another CPU still reads it.
#[inline(always)]
pub fn keep(key: &Tuple, flow: &mut Flow) {
    const BITS: u32 = state::ESTABLISHED | state::RESET | state::KEPT;
    if flow.state & BITS != state::ESTABLISHED {
        return;
    }
    flow.state |= state::KEPT;
    // RACE: two CPUs at once: the first's entry stays, both packets go on. What another CPU writes
    // during the copy is a counter, or a state that the next packet's follows.
    match FLOWS.insert(key, &*flow, BPF_NOEXIST as u64) {
        Ok(()) | Err(EEXIST) => {}
        Err(_) => {
            flow.state &= !state::KEPT;
            count(Reason::FlowsFull);
        }
    }
}

/// Gives a backend's answer the addresses and ports that the client gets it with.
#[inline(always)]
pub fn answer(flow: &Flow, packet: &mut Packet) {
    let new = &mut packet.new;
    copy_address(&flow.frontend, &mut new.source);
    copy_address(&flow.client, &mut new.destination);
    new.source_port = flow.frontend_port;
    new.destination_port = flow.client_port;
    new.protocol = packet.tuple.protocol;
}

/// Where a flow is looked for or made, before anybody can find it. There is one.
#[inline(always)]
pub fn draft() -> Option<&'static mut Draft> {
    // SAFETY: the element belongs to this CPU, and tc programs are not preempted by one another on a CPU.
    DRAFT.get_ptr_mut(0).map(|draft| unsafe { &mut *draft })
}

/// Begins a flow under a tuple after NAT. `Ok(false)`: the tuple is taken. With `BPF_ANY` a half-open flow gives way.
///
/// # Errors
/// `NoEntry`.
#[inline(always)]
pub fn insert(key: &Tuple, flow: &Flow, flags: u32) -> Result<bool, Reason> {
    // RACE: a flow that another CPU puts into `FLOWS` right now is in `HALF_OPEN` too. Of two first packets at once
    // the second takes another source port; answers to either come back, and later packets go by the first's.
    if FLOWS.get_ptr(key).is_some() {
        return Ok(false);
    }
    match HALF_OPEN.insert(key, flow, flags as u64) {
        Ok(()) => Ok(true),
        Err(EEXIST) => Ok(false),
        Err(_) => Err(Reason::NoEntry),
    }
}

/// Begins the flow that is drafted with a source port nobody else has towards its backend, which the packet gets.
///
/// # Errors
/// `NoSourcePort`.
#[inline(always)]
pub fn insert_by_ports(packet: &mut Packet) -> Result<(), Reason> {
    let ports = Ports::of(&packet.tuple).ok_or(Reason::NoSourcePort)?;
    let port = u16::try_from(take_port(ports.0)).map_err(|_| Reason::NoSourcePort)?;
    packet.new.source_port = port;
    Ok(())
}

/// Begins the flow that is drafted, and returns its port; more than a port if there is none. If all are taken, the
/// half-open flow of one gives way, so that a flood cannot hold them.
// VERIFIER: as above.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn take_port(hash: u32) -> u32 {
    let ports = Ports(hash);
    let Some(draft) = draft() else {
        return NO_PORT;
    };
    for attempt in 0..2 * limits::SNAT_TRIES {
        let (attempt, flags) = if attempt < limits::SNAT_TRIES {
            (attempt, BPF_NOEXIST)
        } else {
            (attempt - limits::SNAT_TRIES, BPF_ANY)
        };
        draft.key.source_port = ports.nth(attempt);
        if let Ok(true) = insert(&draft.key, &draft.flow, flags) {
            // RACE: a packet of this conversation that comes before this takes a port of its own, as above.
            ports.remember(attempt);
            return draft.key.source_port as u32;
        }
    }
    NO_PORT
}
