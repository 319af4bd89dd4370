//! The kernel's route and neighbour for a packet, asked for once a tick and not for every packet. What it says may be
//! outdated when the packet leaves, as it may when a packet has waited in a queue for so long.
//!
//! A kernel that is only asked does not probe neighbours, and nobody would find out that one has gone. So there is no
//! answer in a pair's first tick, and once a second none for one packet: those leave by the stack's own output, which probes.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_OUTPUT, bpf_fib_lookup},
    helpers::bpf_fib_lookup as lookup,
};
use forwarder_common::{
    limits,
    tuple::{Address, Tuple},
};

use crate::{
    clock,
    maps::{INTERFACES, ROUTES},
    parse::{LOOPBACK_IFINDEX, Packet},
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
    /// The device that the packet leaves by.
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
    reserved: u8,
    lookup: Lookup,
}

const _: () = assert!(size_of::<Route>() == 128 && limits::ROUTES.is_power_of_two());

impl Route {
    /// The next hop's MAC and the device's own.
    #[inline(always)]
    pub fn macs(&self) -> [[u8; 6]; 2] {
        let [source, destination] = bytemuck::cast(self.lookup.macs);
        [destination, source]
    }

    /// Whether the device takes frames from XDP.
    #[inline(always)]
    pub fn takes_frames(&self) -> bool {
        self.takes_frames
    }

    #[inline(always)]
    fn is_of(&self, new: &Tuple, ifindex: u32, class: u32) -> bool {
        self.destination == new.destination
            && self.source == new.source
            && self.ifindex == ifindex
            && self.class == class
    }

    #[inline(always)]
    fn begin(&mut self, new: &Tuple, ifindex: u32, class: u32, now: u64) {
        copy_address(&new.source, &mut self.source);
        copy_address(&new.destination, &mut self.destination);
        (self.ifindex, self.class) = (ifindex, class);
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

/// The place of a pair of addresses.
#[inline(always)]
fn index(new: &Tuple) -> u32 {
    let word = |at: usize| new.source.0[at] ^ new.destination.0[at];
    let number = word(3) ^ word(1).rotate_left(16);
    number.wrapping_mul(0x9e37_79b1) >> (u32::BITS - limits::ROUTES.ilog2())
}

/// How a packet with its new tuple leaves by a device. `context` is the program's. XDP gives the packet's `length` without
/// its link header; to tc, which knows that it fits, it is 0.
#[inline(always)]
pub fn get(
    context: *mut c_void,
    packet: &Packet,
    ifindex: u32,
    length: u32,
) -> Option<&'static Route> {
    let is_early = length != 0;
    let new = &packet.new;
    let class = u32::from_ne_bytes([packet.is_v4 as u8, packet.protocol, packet.tos & DSCP, 0]);
    let now = clock::now();
    let mut route = element(index(new))?;
    if !route.is_of(new, ifindex, class) {
        if route.asked != now {
            route.begin(new, ifindex, class, now);
            return None;
        }
        if !is_early {
            return None; // the stack's output takes no longer than the question
        }
        route = element(limits::ROUTES)?;
        route.begin(new, ifindex, class, now);
        ask(context, route, length);
    } else if now.wrapping_sub(route.tended) >= SECOND {
        route.tended = now;
        route.is_passed = is_early;
        return None;
    } else if route.is_passed && !is_early {
        route.is_passed = false;
        return None;
    } else if route.asked != now || length > route.length {
        route.asked = now;
        ask(context, route, length);
    }
    route.is_known.then_some(route)
}

/// Asks the kernel as its own output would: for a route by that device.
// VERIFIER: a function of its own, which is walked in one state.
#[inline(never)]
fn ask(context: *mut c_void, route: &mut Route, length: u32) {
    let [is_v4, protocol, tos, _] = route.class.to_ne_bytes();
    let [low, high] = (length as u16).to_ne_bytes();
    let (source, destination) = (&route.source, &route.destination);
    let question = &mut route.lookup;
    question.length = u32::from_ne_bytes([0, 0, low, high]);
    question.vlan = 0;
    let flags = if is_v4 != 0 {
        question.family_and_protocol = u32::from_ne_bytes([AF_INET, protocol, 0, 0]);
        question.ifindex = route.ifindex;
        question.flow = u32::from_ne_bytes([tos, 0, 0, 0]);
        question.source[0] = source.v4();
        question.destination[0] = destination.v4();
        BPF_FIB_LOOKUP_OUTPUT
    } else {
        // As a packet of this host's own: with the flag, rules by source address are passed over (`strict` in
        // bpf_ipv6_fib_lookup, net/core/filter.c). The device is compared below.
        question.family_and_protocol = u32::from_ne_bytes([AF_INET6, protocol, 0, 0]);
        question.ifindex = LOOPBACK_IFINDEX;
        question.flow = ((tos as u32) << 20).to_be();
        question.source = source.0;
        question.destination = destination.0;
        0
    };
    // SAFETY: the caller's context is the program's, and the length is that of the structure.
    let answer = unsafe {
        lookup(
            context,
            (&raw mut *question).cast(),
            size_of::<Lookup>() as i32,
            flags,
        )
    };
    let found = answer == BPF_FIB_LKUP_RET_SUCCESS as i64 && question.ifindex == route.ifindex;
    // SAFETY: values of this map are words, each replaced as a whole.
    let interface = unsafe { INTERFACES.get(route.ifindex) };
    // Without an Ethernet header there is nothing to write: kernels before 6.6 would send it over PPP.
    route.is_known = found && interface.is_some_and(|interface| interface.ethernet != 0);
    route.length = if route.is_known { length } else { u32::MAX };
    route.takes_frames = interface.is_some_and(|interface| interface.xdp != 0);
}
