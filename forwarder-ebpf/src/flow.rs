//! Flows: found from both directions, made once, their state followed. They begin in `HALF_OPEN`, where a flood
//! makes the oldest go, and are kept in `FLOWS` when the client has answered the backend's answer, which no
//! sender of invented addresses does.

use aya_ebpf::bindings::{__sk_buff, BPF_ANY, BPF_EXIST, BPF_NOEXIST};
use forwarder_common::{
    flow::{Flow, Phase, REPLY, is_over, state},
    limits,
    reason::Reason,
    tcp,
    tuple::{TCP, Tuple},
};

use crate::{
    clock,
    frame::Frame,
    limit,
    maps::{CLAIMS, DIRECT, DRAFT, Draft, FLOWS, HALF_OPEN, count},
    parse::{self, Packet},
    publish, setting, share,
    source_port::Ports,
    steer, usage,
    words::{copy_address, reverse},
};

const EEXIST: i32 = -17;

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
    get(&packet.new).filter(|flow| flow.reply.state & (state::FOREIGN | state::ALIAS) == 0)
}

/// The flow whose key is what the packet becomes, if the packet is of its original direction.
#[inline(always)]
pub fn get_original(packet: &Packet) -> Option<&'static mut Flow> {
    get(&packet.new).filter(|flow| is_original(flow, packet))
}

/// The same, with the source port that this host chose for the conversation, which the packet gets: nearly always the first
/// that it tries.
#[inline(always)]
pub fn get_by_ports(packet: &mut Packet) -> Option<&'static mut Flow> {
    packet.new.source_port = Ports::of(&packet.tuple)?.nth(0);
    get_original(packet).or_else(|| get_by_alias(packet))
}

/// The same, with the source port that the conversation's alias has.
#[inline(always)]
pub fn get_by_alias(packet: &mut Packet) -> Option<&'static mut Flow> {
    if !share::has_aliases() {
        return None;
    }
    packet.new.source_port = alias(packet)?;
    get_original(packet)
}

// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
fn alias(packet: &Packet) -> Option<u16> {
    let alias = get(&packet.tuple)?;
    (alias.state() & state::ALIAS != 0).then_some(alias.ports().0)
}

/// Whether the packet is from this flow's client to its frontend; a client on this host is one that came by `lo`.
#[inline(always)]
fn is_original(flow: &Flow, packet: &Packet) -> bool {
    is_of(flow, &packet.tuple, local_client(packet))
}

#[inline(always)]
fn is_of(flow: &Flow, original: &Tuple, local_client: u32) -> bool {
    flow.ports() == (original.source_port, original.destination_port)
        && flow.client == original.source
        && flow.frontend == original.destination
        && flow.state() & (state::LOCAL_CLIENT | state::FOREIGN | state::ALIAS) == local_client
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
    let side = flow.side_mut(direction);
    side.last_seen = clock::now();
    let state = side.state;
    if packet.protocol == TCP {
        if let Some(segment) = parse::segment(frame, packet)
            && !tcp::follow(flow, direction, segment, || is_direct(packet))
        {
            return false;
        }
        if flow.side(direction).state & state::UNSETTLED != state::ESTABLISHED {
            usage::follow(flow);
        }
    } else if direction == REPLY {
        if state & state::REPLIED == 0 {
            flow.set_state(state | state::REPLIED);
        }
    } else if state & (state::REPLIED | state::ESTABLISHED) == state::REPLIED {
        flow.set_state(state | state::ESTABLISHED);
    }
    let side = flow.side_mut(direction);
    side.packets += 1;
    side.bytes += packet.length as u64;
    true
}

/// Notes the SYN of a connection that goes to a backend's port by itself, not by a port of this host.
#[inline(never)]
pub fn note_direct(packet: &Packet) {
    let _ = DIRECT.insert(&packet.tuple, &0, BPF_ANY as u64);
}

/// Whether the packet may be an answer to such a connection.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
fn is_direct(packet: &Packet) -> bool {
    let mut asked = Tuple::default();
    reverse(&packet.tuple, &mut asked);
    DIRECT.get_ptr(&asked).is_some()
}

/// Puts a flow that is proven where no new one takes its place. Called with a packet of the original direction, which has its
/// new tuple. What `HALF_OPEN` has of it goes when it is the oldest: to remove it now would give its element to another
/// flow while a reply on another CPU still reads it.
///
/// # Errors
/// `TooManyFlows`: as with a full backlog, the client tries again until there is room.
#[inline(always)]
pub fn keep(packet: &Packet, flow: &mut Flow) -> Result<(), Reason> {
    const BITS: u32 = state::ESTABLISHED | state::RESET | state::KEPT;
    if flow.state() & BITS == state::ESTABLISHED {
        if !limit::has_room(flow.publish()) {
            return Err(usage::refused(flow.publish(), Reason::TooManyFlows));
        }
        keep_now(packet, flow);
    }
    Ok(())
}

// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
fn keep_now(packet: &Packet, flow: &mut Flow) {
    let (key, share) = (&packet.new, share::of(&packet.tuple.source));
    if !share::has_room(share) {
        count(Reason::SourceShare);
        return;
    }
    flow.set_state(flow.state() | state::KEPT);
    // RACE: two CPUs at once: the first's entry stays, both packets go on. What another CPU writes
    // during the copy is a counter, or a state that the next packet's follows.
    match enter(key, flow, share) {
        Ok(()) => usage::kept(flow.publish()),
        Err(EEXIST) => {}
        Err(_) => {
            flow.set_state(flow.state() & !state::KEPT);
            count(Reason::FlowsFull);
            return;
        }
    }
    // RACE: the element may have become another flow's while it was copied.
    if let Some(kept) = FLOWS.get_ptr(key) {
        // SAFETY: an element's memory stays readable until the program ends.
        let kept = unsafe { &*kept };
        if !is_original(kept, packet) {
            usage::ended(kept);
            leave(key, share::of(&kept.client));
            return;
        }
    }
    if key.source_port != packet.tuple.source_port
        && let Some(alias) = HALF_OPEN.get_ptr(&packet.tuple)
    {
        // SAFETY: as above.
        let _ = enter(&packet.tuple, unsafe { &*alias }, share);
    }
}

/// Puts an entry into `FLOWS`, which counts for its source.
#[inline(always)]
fn enter(key: &Tuple, flow: &Flow, share: u32) -> Result<(), i32> {
    FLOWS.insert(key, flow, BPF_NOEXIST as u64)?;
    share::entered(share);
    Ok(())
}

/// Takes an entry out of `FLOWS`, if it is there.
#[inline(always)]
fn leave(key: &Tuple, share: u32) {
    if FLOWS.remove(key).is_ok() {
        share::left(share);
    }
}

/// Gives a backend's answer the addresses and ports that the client gets it with.
#[inline(always)]
pub fn answer(flow: &Flow, packet: &mut Packet) {
    let new = &mut packet.new;
    copy_address(&flow.frontend, &mut new.source);
    copy_address(&flow.client, &mut new.destination);
    new.source_port = flow.reply.frontend_port;
    new.destination_port = flow.reply.client_port;
    new.protocol = packet.tuple.protocol;
}

/// Where a flow is looked for or made, before anybody can find it. There is one.
#[inline(always)]
pub fn draft() -> Option<&'static mut Draft> {
    // SAFETY: the element belongs to this CPU, and tc programs are not preempted by one another on a CPU.
    DRAFT.get_ptr_mut(0).map(|draft| unsafe { &mut *draft })
}

/// What became of a flow that was to begin.
pub enum Begun {
    /// As drafted.
    New,
    /// Another CPU has begun it with another packet of this moment.
    Already,
    /// Another conversation has its tuple.
    Taken,
}

/// Begins the flow that is drafted for a packet, with the client's own source port.
///
/// # Errors
/// `NoEntry`.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
pub fn insert(packet: &Packet) -> Result<Begun, Reason> {
    let draft = draft().ok_or(Reason::NoEntry)?;
    let there = || match get_original(packet) {
        Some(_) => Begun::Already,
        None => Begun::Taken,
    };
    if FLOWS.get_ptr(&draft.key).is_some() {
        return Ok(there());
    }
    match HALF_OPEN.insert(&draft.key, &draft.flow, BPF_NOEXIST as u64) {
        Ok(()) => Ok(Begun::New),
        Err(EEXIST) => Ok(there()),
        Err(_) => Err(Reason::NoEntry),
    }
}

/// Begins the flow that is drafted with a source port that nobody else has towards its backend, which the packet gets: no
/// flow, and no socket of this host, whose conversation with the backend it would cut. Returns whether the flow is new.
///
/// # Errors
/// `NoFreePort`, `NoSourcePort` or `NoEntry`.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
pub fn insert_by_ports(
    skb: *mut __sk_buff,
    packet: &mut Packet,
    is_snat: bool,
) -> Result<bool, Reason> {
    const OF_THIS_HOST: u32 = state::KEPT | state::LOCAL_CLIENT;
    let draft = draft().ok_or(Reason::NoFreePort)?;
    draft.hash = Ports::of(&draft.original).ok_or(Reason::NoFreePort)?.hash;
    draft.attempt = 0;
    draft.share = share::of(&draft.original.source);
    for _ in 0..limits::SNAT_SOCKETS {
        match take_port() {
            TAKEN => break,
            FULL if packet.protocol == TCP => return Err(Reason::NoEntry),
            FULL => return Err(Reason::NoSourcePort),
            OWN => {
                packet.new.source_port = draft.key.source_port;
                if draft.attempt != 0 || !is_snat {
                    make_alias(); // it may have lost its own
                }
                return Ok(false);
            }
            _ => {}
        }
        packet.new.source_port = draft.key.source_port;
        if draft.flow.state() & OF_THIS_HOST == 0 || !steer::has_socket(skb, packet) {
            if (draft.attempt != 0 || !is_snat) && !make_alias() {
                give_back();
                return Err(Reason::NoEntry);
            }
            return Ok(true);
        }
        give_back();
        draft.attempt += 1;
    }
    Err(if packet.protocol == TCP {
        Reason::NoFreePort
    } else {
        Reason::NoSourcePort
    })
}

/// What became of a source port, or of the search for one: another conversation has it,
const TAKEN: u32 = 0;
/// nobody has, or needs it: the flow has begun,
const FREE: u32 = 1;
/// the conversation itself has it, by another packet of this moment;
const OWN: u32 = 2;
/// or there is no room for a flow.
const FULL: u32 = 3;

/// Begins the flow that is drafted with the first port, from the draft's attempt on, that no flow has; else with that of a
/// flow that is over, or the oldest that is not proven. Not of datagrams, whose late answers nothing tells apart. In a
/// bounded number of steps, however many are taken.
// VERIFIER (and below): a function that others may call is walked once, and not in every state that a packet may come in.
// What it keeps is in the draft, for its share of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn take_port() -> u32 {
    let Some(draft) = draft() else {
        return FULL;
    };
    (draft.over, draft.unproven, draft.oldest) = (NONE, NONE, u64::MAX);
    draft.full = 0;
    let takes_entry = draft.flow.state() & state::KEPT != 0;
    draft.capped = (takes_entry && !share::has_room(draft.share)) as u32;
    for step in 0..limits::SNAT_TRIES {
        match try_port() {
            TAKEN => {}
            FULL => draft.full = 1, // but another's place can be had
            became => return became,
        }
        if draft.over != NONE && step >= limits::SNAT_FREE_TRIES {
            break;
        }
        draft.attempt += 1;
    }
    draft.attempt = if draft.over == NONE {
        draft.unproven
    } else {
        draft.over
    };
    if draft.attempt == NONE {
        if draft.capped != 0 {
            count(Reason::SourceShare);
        }
        return if draft.full != 0 { FULL } else { TAKEN };
    }
    draft.key.source_port = ports(draft).nth(draft.attempt);
    if take_over(draft) { FREE } else { TAKEN }
}

/// No attempt.
const NONE: u32 = u32::MAX;

#[inline(always)]
fn ports(draft: &Draft) -> Ports {
    Ports {
        hash: draft.hash,
        client: draft.original.source_port,
    }
}

/// Begins the flow that is drafted with the attempt's port if no flow has it, and notes in the draft what else could be done.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn try_port() -> u32 {
    let Some(draft) = draft() else {
        return FULL;
    };
    draft.key.source_port = ports(draft).nth(draft.attempt);
    let mut there = get(&draft.key);
    if there.is_none() {
        if draft.capped != 0 {
            return FULL;
        }
        match table(draft) {
            Ok(()) => return FREE,
            Err(EEXIST) => there = get(&draft.key),
            Err(_) => return FULL,
        }
    }
    let Some(flow) = there else {
        return TAKEN; // and gone again
    };
    if is_of(
        flow,
        &draft.original,
        draft.flow.state() & state::LOCAL_CLIENT,
    ) {
        return OWN;
    }
    if draft.capped != 0 && !share::is_same(&draft.original.source, &flow.client) {
        return TAKEN; // one of its own may give way
    }
    match remains(flow, draft.key.protocol) {
        Remains::Nothing if draft.over == NONE => draft.over = draft.attempt,
        Remains::Hope if flow.last_seen() < draft.oldest => {
            (draft.unproven, draft.oldest) = (draft.attempt, flow.last_seen());
        }
        _ => {}
    }
    TAKEN
}

/// Where a new flow with a source port of this host's choice goes. Of this host's addresses there are no more than ports
/// towards each backend, and none must be given to another before its time.
#[inline(always)]
fn table(draft: &Draft) -> Result<(), i32> {
    if draft.flow.state() & state::KEPT != 0 {
        enter(&draft.key, &draft.flow, draft.share)
    } else {
        HALF_OPEN.insert(&draft.key, &draft.flow, BPF_NOEXIST as u64)
    }
}

/// What another conversation would take from a flow with its source port.
enum Remains {
    /// Nothing: it has ended, or has been silent for too long.
    Nothing,
    /// A handshake that has not come about. A flood holds no ports that way: of those the oldest gives way.
    Hope,
    All,
}

#[inline(always)]
fn remains(flow: &Flow, protocol: u32) -> Remains {
    let silent = clock::now().saturating_sub(flow.last_seen());
    let phase = Phase::of(protocol, flow.state());
    // One datagram and its answer, as of DNS, which nf_conntrack gives no longer (net/netfilter/nf_conntrack_proto_udp.c).
    let is_brief = matches!(phase, Phase::UdpStream) && flow.state() & state::ESTABLISHED == 0;
    let time = timeout(if is_brief { Phase::Udp } else { phase });
    if silent >= time || is_over(protocol, flow.state()) {
        Remains::Nothing
    } else if matches!(phase, Phase::TcpSynSent | Phase::TcpSynRecv) {
        Remains::Hope
    } else {
        Remains::All
    }
}

/// Set by the loader: nanoseconds, by phase.
#[unsafe(no_mangle)]
static TIMEOUTS: [u64; Phase::ALL.len()] = [0; Phase::ALL.len()];

/// Nanoseconds.
#[inline(always)]
pub fn timeout(phase: Phase) -> u64 {
    setting(&TIMEOUTS[phase as usize])
}

/// Puts the flow that is drafted in place of another, whose alias goes; whether that went well. Of several that want the
/// place one has it: they claim it first.
#[inline(always)]
fn take_over(draft: &mut Draft) -> bool {
    if CLAIMS.insert(&draft.key, &0, BPF_NOEXIST as u64).is_err() {
        return false;
    }
    let taken = match get(&draft.key) {
        None => table(draft).is_ok(),
        Some(flow) if matches!(remains(flow, draft.key.protocol), Remains::All) => false,
        Some(flow) => {
            copy_address(&flow.client, &mut draft.other.source);
            copy_address(&flow.frontend, &mut draft.other.destination);
            (draft.other.source_port, draft.other.destination_port) = flow.ports();
            draft.other.protocol = draft.key.protocol;
            let (publish, counted) = (flow.publish(), usage::counts(flow));
            // Before its memory is another's.
            usage::ended(flow);
            let replaced = replace(draft);
            if !replaced && counted {
                usage::kept(publish); // it stays
            }
            replaced
        }
    };
    let _ = CLAIMS.remove(&draft.key);
    taken
}

#[inline(always)]
fn replace(draft: &Draft) -> bool {
    let other = share::of(&draft.other.source);
    forget_alias(&draft.other, other, draft.key.source_port);
    if draft.flow.state() & state::KEPT != 0 {
        return overwrite(&draft.key, &draft.flow, draft.share, other);
    }
    // In this order: whoever looks in between finds one of the two.
    let inserted = HALF_OPEN.insert(&draft.key, &draft.flow, BPF_ANY as u64);
    leave(&draft.key, other);
    inserted.is_ok()
}

/// Puts an entry into `FLOWS`, in place of one of the other source if there is one; whether that went well.
#[inline(always)]
fn overwrite(key: &Tuple, flow: &Flow, share: u32, other: u32) -> bool {
    match enter(key, flow, share) {
        Err(EEXIST) if FLOWS.insert(key, flow, BPF_EXIST as u64).is_ok() => {
            share::left(other);
            share::entered(share);
            true
        }
        entered => entered.is_ok(),
    }
}

/// Takes the drafted flow back, as nobody has used it yet.
// VERIFIER (and below): as above.
#[inline(never)]
fn give_back() {
    if let Some(draft) = draft() {
        leave(&draft.key, draft.share);
        let _ = HALF_OPEN.remove(&draft.key);
    }
}

/// Makes the alias of the drafted flow; whether that went well. Without it the flow would not be found again.
#[inline(never)]
fn make_alias() -> bool {
    let Some(draft) = draft() else {
        return false;
    };
    let flow = &mut draft.flow;
    copy_address(&draft.key.source, &mut flow.client);
    copy_address(&draft.key.destination, &mut flow.frontend);
    flow.set_ports(draft.key.source_port, draft.key.destination_port);
    flow.set_state(flow.state() | state::ALIAS);
    share::alias();
    if draft.capped != 0 {
        // The flow has the place of another of its source, which may have had no alias: there is no room for one entry more.
        flow.set_state(flow.state() & !state::KEPT);
    }
    if flow.state() & state::KEPT != 0 {
        if overwrite(&draft.original, &draft.flow, draft.share, draft.share) {
            return true;
        }
    } else {
        // One of an earlier flow would be found first.
        leave(&draft.original, draft.share);
    }
    HALF_OPEN
        .insert(&draft.original, &draft.flow, BPF_ANY as u64)
        .is_ok()
}

/// Removes the alias of a conversation, if it leads to that port.
#[inline(always)]
fn forget_alias(original: &Tuple, share: u32, port: u16) {
    let is_alias = get(original)
        .is_some_and(|there| there.state() & state::ALIAS != 0 && there.ports().0 == port);
    if is_alias {
        leave(original, share);
        let _ = HALF_OPEN.remove(original);
    }
}
