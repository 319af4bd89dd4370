//! The kernel's route and neighbour for a packet, asked for once a tick and not for every packet. What it says may be
//! outdated when the packet leaves, as it may when a packet has waited in a queue for so long.
//!
//! A kernel that is only asked does not probe neighbours, and nobody would find out that one has gone. So there is no
//! answer in a pair's first tick, and once a second none for one packet: those leave by the stack's own output, which probes.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_BLACKHOLE, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_PROHIBIT, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNREACHABLE,
        BPF_FIB_LOOKUP_OUTPUT, bpf_fib_lookup,
    },
    helpers::bpf_fib_lookup as lookup,
    maps::lpm_trie::Key,
};
use forwarder_common::{
    limits,
    publish::{PublishSource, uplinks, xdp},
    reason::Reason,
    tuple::{Address, Tuple},
};

use crate::{
    clock,
    maps::{FORBIDDING, INTERFACES, ROUTE_MTUS, ROUTES, SEVERAL_UPLINKS},
    parse::{LOOPBACK_IFINDEX, Packet},
    publish,
    words::copy_address,
};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const SECOND: u64 = 1_000_000_000;
/// The bits of IPv4's type of service that are not of ECN (RFC 3168).
const DSCP: u8 = 0xfc;

/// `struct bpf_fib_lookup` (include/uapi/linux/bpf.h) in words. IPv4 addresses are in the first words of theirs.
#[repr(C)]
#[derive(Clone, Copy)]
struct Lookup {
    family_and_protocol: u32,
    /// The second half is the packet's length.
    length: u32,
    ifindex: u32,
    flow: u32,
    source: [u32; 4],
    destination: [u32; 4],
    vlan: u32,
    /// Source and destination.
    macs: [u32; 3],
}

const _: () = assert!(size_of::<Lookup>() == size_of::<bpf_fib_lookup>());

/// A value of `ROUTES`, each CPU's own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Route {
    source: Address,
    destination: Address,
    /// The device that the packet is to leave by, and the one that it does; 0 if a route forbids it.
    wanted: u32,
    ifindex: u32,
    /// Protocol and type of service, by which rules may choose.
    class: u32,
    /// Nanoseconds of `CLOCK_MONOTONIC`: when a packet was last left to the stack's output.
    tended: u64,
    /// Nanoseconds of `CLOCK_MONOTONIC`: the tick that the answer, or that there is none, is of.
    asked: u64,
    /// The answer holds for packets of at most so many octets.
    length: u32,
    is_known: bool,
    takes_frames: bool,
    /// XDP has left a packet to tc, for the stack's output.
    is_passed: bool,
    /// Also from a frame that came in by it.
    only_redirects: bool,
    /// What the kernel answered, one of BPF_FIB_LKUP_RET_*.
    answer: u32,
    lookup: Lookup,
    unused: u32,
}

const _: () = assert!(size_of::<Route>() == 144 && limits::ROUTES.is_power_of_two());

impl Route {
    /// The next hop's MAC and the device's own.
    #[inline(always)]
    pub fn macs(&self) -> [[u8; 6]; 2] {
        let [source, destination] = bytemuck::cast(self.lookup.macs);
        [destination, source]
    }

    /// The device that the packet leaves by.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// Whether the device takes frames from XDP.
    #[inline(always)]
    pub fn takes_frames(&self) -> bool {
        self.takes_frames
    }

    /// Whether a frame that came in by the device leaves by it only if it is redirected.
    #[inline(always)]
    pub fn only_redirects(&self) -> bool {
        self.only_redirects
    }

    #[inline(always)]
    fn is_v4(&self) -> bool {
        self.class.to_ne_bytes()[0] != 0
    }

    /// The destination as a look-up has it before it is asked; after it, the next hop is there.
    #[inline(always)]
    fn question(&self) -> [u32; 4] {
        if self.is_v4() {
            let [_, a, b, c] = self.lookup.destination;
            [self.destination.v4(), a, b, c]
        } else {
            self.destination.0
        }
    }

    #[inline(always)]
    fn is_of(&self, new: &Tuple, wanted: u32, class: u32) -> bool {
        self.destination == new.destination
            && self.source == new.source
            && self.wanted == wanted
            && self.class == class
    }

    #[inline(always)]
    fn begin(&mut self, [from, to]: [&Address; 2], wanted: u32, class: u32, now: u64) {
        copy_address(from, &mut self.source);
        copy_address(to, &mut self.destination);
        (self.wanted, self.ifindex, self.class) = (wanted, wanted, class);
        (self.tended, self.asked) = (now, now);
        (self.length, self.is_known, self.is_passed) = (u32::MAX, false, false);
    }
}

#[inline(always)]
fn element(index: u32) -> Option<&'static mut Route> {
    // SAFETY: the element belongs to this CPU, and the programs are not preempted by one another on a CPU.
    ROUTES
        .get_ptr_mut(index)
        .map(|route| unsafe { &mut *route })
}

/// The place of a pair of addresses. Networks that number their machines alike have pairs of the same difference.
#[inline(always)]
fn index(new: &Tuple) -> u32 {
    let word = |at: usize| new.source.0[at] ^ new.destination.0[at].rotate_left(16);
    let number = word(3) ^ word(1).rotate_left(8);
    number.wrapping_mul(0x9e37_79b1) >> (u32::BITS - limits::ROUTES.ilog2())
}

/// Protocol and type of service.
#[inline(always)]
fn class(packet: &Packet) -> u32 {
    u32::from_ne_bytes([packet.is_v4 as u8, packet.protocol, packet.tos & DSCP, 0])
}

/// By which device a packet with its new tuple leaves: by the one that is wanted, unless routes lead by another. `context` is the
/// program's.
#[inline(always)]
pub fn device(context: *mut c_void, packet: &Packet, wanted: u32) -> u32 {
    if !several() {
        return wanted;
    }
    let found = find(packet, wanted);
    let Some(route) = element(index(&packet.new)) else {
        return wanted; // there are all elements
    };
    if found == OTHER {
        return wanted;
    }
    if found == NEW {
        choose(context, route);
    }
    route.ifindex
}

/// The longest packet, without its link header, that may leave by a device to an address: as the device takes it, and the route if
/// that says less. No limit is known of a device that is not there.
#[inline(always)]
pub fn mtu(ifindex: u32, address: &Address) -> u32 {
    let Some(interface) = publish::interface(ifindex) else {
        return u32::MAX;
    };
    if interface.narrow == 0 {
        return interface.mtu;
    }
    interface.mtu.min(of_route(interface.layer3, address))
}

// VERIFIER: as below.
#[inline(never)]
fn of_route(ifindex: u32, address: &Address) -> u32 {
    let data = PublishSource {
        publish: ifindex.to_be(),
        source: *address,
    };
    let key = Key::new(32 + 128, data);
    ROUTE_MTUS.get(key).copied().unwrap_or(u32::MAX)
}

/// What is at the place of a pair of addresses: another's, of this tick,
const OTHER: u32 = 0;
/// its own,
const OWN: u32 = 1;
/// or its own from now on, for which nothing is chosen yet.
const NEW: u32 = 2;

// VERIFIER: as below.
#[inline(never)]
fn find(packet: &Packet, wanted: u32) -> u32 {
    let (new, class, now) = (&packet.new, class(packet), clock::now());
    match element(index(new)) {
        Some(route) if route.is_of(new, wanted, class) => OWN,
        Some(route) if route.asked != now => {
            route.begin([&new.source, &new.destination], wanted, class, now);
            NEW
        }
        _ => OTHER,
    }
}

/// By which device a packet with its new tuple leaves, and how: by the one that is wanted, unless routes lead by another, and by
/// none (0) if a route forbids it. An answer is about the packet's conversation, not the packet, where it is an ICMP error.
/// `context` is the program's. XDP gives the packet's `length` without its link header; to tc, which knows that it fits, it is 0.
#[inline(always)]
pub fn get(
    context: *mut c_void,
    packet: &Packet,
    wanted: u32,
    length: u32,
) -> (u32, Option<&'static Route>) {
    let is_early = length != 0;
    let new = &packet.new;
    let class = class(packet);
    let now = clock::now();
    let Some(mut route) = element(index(new)) else {
        return (wanted, None); // there are all elements
    };
    if !route.is_of(new, wanted, class) {
        let is_taken = route.asked == now;
        if is_taken {
            let Some(last) = element(limits::ROUTES) else {
                return (wanted, None);
            };
            route = last;
        }
        route.begin([&new.source, &new.destination], wanted, class, now);
        choose(context, route);
        if !is_taken || !is_early {
            return (route.ifindex, None); // the stack's output takes no longer than the question
        }
        ask(context, route, length);
    } else if now.wrapping_sub(route.tended) >= SECOND {
        route.tended = now;
        route.is_passed = is_early;
        if route.asked != now {
            choose(context, route);
        }
        return (route.ifindex, None);
    } else if route.is_passed && !is_early {
        route.is_passed = false;
        return (route.ifindex, None);
    } else if route.asked != now || length > route.length {
        route.asked = now;
        choose(context, route);
        ask(context, route, length);
    }
    let is_known = route.is_known && !packet.is_error();
    (route.ifindex, is_known.then_some(&*route))
}

/// Whether this host has several uplinks.
#[inline(always)]
fn several() -> bool {
    SEVERAL_UPLINKS.get(0).is_some_and(|bits| *bits != 0)
}

/// Whether a mark may have answers to a client leave by the uplink that its packet came by, to which unmarked ones do not lead. The
/// program does not know what the firewall marks. `context` is the program's.
#[inline(always)]
pub fn depends_on_marks(context: *mut c_void, packet: &Packet) -> bool {
    let marks = if packet.is_v4 {
        uplinks::MARKS_V4
    } else {
        uplinks::MARKS_V6
    };
    if SEVERAL_UPLINKS.get(0).is_none_or(|bits| *bits & marks == 0) {
        return false;
    }
    match publish::interface(packet.ifindex) {
        Some(interface) if interface.network == 0 && !packet.is_from_this_host() => {
            is_answered_by_another(context, packet, interface.layer3)
        }
        _ => false,
    }
}

// VERIFIER: as below.
#[inline(never)]
fn is_answered_by_another(context: *mut c_void, packet: &Packet, device: u32) -> bool {
    let Some(route) = element(limits::ROUTES) else {
        return false;
    };
    let (class, tuple) = (class(packet), &packet.tuple);
    route.begin([&tuple.destination, &tuple.source], device, class, 0);
    choose(context, route);
    route.ifindex != device
}

/// Decides by which device the packet leaves: by the one that is wanted, because the client's packets come by it, if it has a
/// route to the client; but not round by a gateway where the client is a neighbour of this host. Without such a route, by
/// the best one.
#[inline(always)]
fn choose(context: *mut c_void, route: &mut Route) {
    route.ifindex = route.wanted;
    if several() {
        choose_uplink(context, route);
        if route.answer == BPF_FIB_LKUP_RET_FWD_DISABLED {
            choose_unasked(route);
        }
    }
    forbid(context, route);
}

/// Lets the packet leave by no device, which ends it, if a route says that packets to the destination end here. The stack's
/// output heeds that over IPv6 alone: over IPv4, it takes whom no route leads to by the given device for a neighbour.
// VERIFIER: as below.
#[inline(never)]
fn forbid(context: *mut c_void, route: &mut Route) {
    let forbidding = FORBIDDING.get(0).is_some_and(|forbidding| *forbidding != 0);
    if !forbidding || !route.is_v4() {
        return;
    }
    look_up(context, route, route.ifindex, BPF_FIB_LOOKUP_OUTPUT, 0);
    if matches!(
        route.answer,
        BPF_FIB_LKUP_RET_BLACKHOLE | BPF_FIB_LKUP_RET_UNREACHABLE | BPF_FIB_LKUP_RET_PROHIBIT
    ) {
        route.ifindex = 0;
    }
}

// VERIFIER: as below.
#[inline(never)]
fn choose_uplink(context: *mut c_void, route: &mut Route) {
    // IPv6 chooses among all routes to a prefix by their metric before it looks at the device.
    let wanted = route.is_v4()
        && look_up(context, route, route.wanted, BPF_FIB_LOOKUP_OUTPUT, 0)
        && route.lookup.ifindex == route.wanted;
    let by_gateway = route.lookup.destination != route.question();
    if wanted && !by_gateway {
        return;
    }
    // As a packet of this host's own.
    if look_up(context, route, LOOPBACK_IFINDEX, 0, 0)
        && (!wanted || route.lookup.destination == route.question())
    {
        route.ifindex = route.lookup.ifindex;
    }
}

/// The same by what the daemon has written, where the kernel cannot be asked as it does not forward.
// VERIFIER: as below.
#[inline(never)]
fn choose_unasked(route: &mut Route) {
    let is_default = publish::interface(route.wanted).is_some_and(|it| it.default_v4 != 0);
    if let Some(best) = publish::uplink_to(&route.destination)
        && !(is_default && route.is_v4())
    {
        route.ifindex = best;
    }
}

/// Whether a packet that begins a flow, or comes by another device than those before it, came by the device that this host's
/// best route to its source leads to, where that is asked for (rp_filter is 1). A kernel that does not forward cannot be asked:
/// there the daemon has written what its routes say, here and for answers. `context` is the program's.
///
/// # Errors
/// `Martian` if not.
#[inline(always)]
pub fn came_back(context: *mut c_void, packet: &Packet, source: &Address) -> Result<(), Reason> {
    // IPv6 has no such setting.
    if !several() || packet.is_from_this_host() || !packet.is_v4 {
        return Ok(());
    }
    let device = match publish::interface(packet.ifindex) {
        Some(interface) if interface.strict != 0 && interface.network == 0 => interface.layer3,
        _ => return Ok(()),
    };
    let is_possible = match is_reverse_path(context, packet, source, device) {
        NOT_KNOWN => may_lead_to(device, source),
        answer => answer == YES,
    };
    if is_possible {
        Ok(())
    } else {
        Err(Reason::Martian)
    }
}

/// Whether the best route to an address may lead to a device, as far as the daemon has written that.
// VERIFIER: as below.
#[inline(never)]
fn may_lead_to(device: u32, address: &Address) -> bool {
    publish::uplink_to(address).is_none_or(|best| best == device)
}

/// What the kernel says.
const NO: u32 = 0;
const YES: u32 = 1;
const NOT_KNOWN: u32 = 2;

// VERIFIER: as below.
#[inline(never)]
fn is_reverse_path(context: *mut c_void, packet: &Packet, source: &Address, device: u32) -> u32 {
    let Some(route) = element(limits::ROUTES) else {
        return NO;
    };
    let class = class(packet);
    route.begin([&packet.tuple.destination, source], device, class, 0);
    if !look_up(context, route, LOOPBACK_IFINDEX, 0, 0) {
        return NOT_KNOWN;
    }
    if route.lookup.ifindex == device {
        return YES;
    }
    // Of several legs of one route the kernel has named another; it takes packets by each. A route of another metric, which is
    // where the question's `flow` was, is no leg of it, nor is one by a gateway to a neighbour of this host.
    let (next_hop, metric) = (route.lookup.destination, route.lookup.flow);
    let by_device = look_up(context, route, device, BPF_FIB_LOOKUP_OUTPUT, 0);
    let is_leg = next_hop != route.question() && metric == route.lookup.flow;
    (by_device && route.lookup.ifindex == device && is_leg) as u32
}

/// Asks the kernel as its own output would: for a route by that device.
// VERIFIER: a function of its own, which is walked in one state.
#[inline(never)]
fn ask(context: *mut c_void, route: &mut Route, length: u32) {
    // IPv6 as a packet of this host's own: with the flag, rules by source address are passed over (`strict` in
    // bpf_ipv6_fib_lookup, net/core/filter.c). The device is compared below.
    let (from, flags) = if route.is_v4() {
        (route.ifindex, BPF_FIB_LOOKUP_OUTPUT)
    } else {
        (LOOPBACK_IFINDEX, 0)
    };
    look_up(context, route, from, flags, length);
    let found = route.answer == BPF_FIB_LKUP_RET_SUCCESS && route.lookup.ifindex == route.ifindex;
    // SAFETY: values of this map are words, each replaced as a whole.
    let interface = unsafe { INTERFACES.get(route.ifindex) };
    // Without an Ethernet header there is nothing to write: kernels before 6.6 would send it over PPP.
    route.is_known = found && interface.is_some_and(|interface| interface.ethernet != 0);
    route.length = if route.is_known { length } else { u32::MAX };
    let by = interface.map_or(xdp::NO, |interface| interface.xdp);
    (route.takes_frames, route.only_redirects) = (by != xdp::NO, by == xdp::REDIRECTS);
}

/// Asks the kernel for a route of a packet that comes from a device, or with the flag leaves by it; whether there is one. A
/// neighbour that is not resolved is one, too: device and next hop are known.
#[inline(always)]
fn look_up(context: *mut c_void, route: &mut Route, from: u32, flags: u32, length: u32) -> bool {
    let [is_v4, protocol, tos, _] = route.class.to_ne_bytes();
    let [low, high] = (length as u16).to_ne_bytes();
    let (source, destination) = (&route.source, &route.destination);
    let question = &mut route.lookup;
    question.length = u32::from_ne_bytes([0, 0, low, high]);
    question.vlan = 0;
    question.ifindex = from;
    if is_v4 != 0 {
        question.family_and_protocol = u32::from_ne_bytes([AF_INET, protocol, 0, 0]);
        question.flow = u32::from_ne_bytes([tos, 0, 0, 0]);
        question.source[0] = source.v4();
        question.destination[0] = destination.v4();
    } else {
        question.family_and_protocol = u32::from_ne_bytes([AF_INET6, protocol, 0, 0]);
        question.flow = ((tos as u32) << 20).to_be();
        question.source = source.0;
        question.destination = destination.0;
    }
    // SAFETY: the caller's context is the program's, and the length is that of the structure.
    let answer = unsafe {
        lookup(
            context,
            (&raw mut *question).cast(),
            size_of::<Lookup>() as i32,
            flags,
        )
    };
    route.answer = answer as u32;
    matches!(
        route.answer,
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH
    )
}
