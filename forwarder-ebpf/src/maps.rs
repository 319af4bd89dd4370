//! The maps, and nothing else. Types and sizes come from `forwarder_common`; user space fills all but `FLOWS`, `HALF_OPEN`,
//! `DIRECT`, `LEFT`, `LAST_LEFT`, `CLAIMS`, `DRAFT`, `FRAGMENTS`, `HANDOVER`, `NETNS`, `LOOKING`, `ROUTES`, `STATS`, `USAGE`,
//! `REFUSED`, `SHARES`, `SOURCES`, `CLOCK`, `TOLD` and `TRAIL`.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{
        Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, ProgramArray, RingBuf,
        SockHash,
    },
};
use forwarder_common::{
    flow::Flow,
    handover, limits,
    policy::Policy,
    publish::{
        FILTER_WORDS, Frontend, Interface, Location, PORTS_PER_PROTOCOL, PROTOCOLS, Port, Publish,
        PublishSource,
    },
    reason::Reason,
    share::{self, Share},
    tuple::{Address, Tuple},
    usage::{Refused, Usage},
};

use crate::{
    clock::Reading, fragment::Datagram, icmp::Told, parse::Packet, route::Route, trace::Trail,
};

/// What is published on each port, by [`forwarder_common::publish::port_index`].
#[map]
pub static PORTS: Array<Port> = Array::with_max_entries(PORTS_PER_PROTOCOL * PROTOCOLS, 0);

/// Ports published on one address: index in `PUBLISHES`.
#[map]
pub static FRONTENDS: HashMap<Frontend, u32> =
    HashMap::with_max_entries(limits::FRONTENDS, BPF_F_NO_PREALLOC);

#[map]
pub static PUBLISHES: Array<Publish> = Array::with_max_entries(limits::PUBLISHES, 0);

/// What publishes are used for, by their index. Of one value for all CPUs, as flows end on others than they begin, and user
/// space adds to it as well.
#[map]
pub static USAGE: Array<Usage> = Array::with_max_entries(limits::PUBLISHES, BPF_F_MMAPABLE);

/// Packets that a publish's policy has refused. For each CPU, as a flood of them must not wait for other CPUs.
#[map]
pub static REFUSED: PerCpuHashMap<Refused, u64> =
    PerCpuHashMap::with_max_entries(limits::REFUSED, BPF_F_NO_PREALLOC);

/// The addresses of backends, and how many publishes lead there.
#[map]
pub static BACKENDS: HashMap<Address, u32> =
    HashMap::with_max_entries(limits::BACKENDS, BPF_F_NO_PREALLOC);

/// The devices.
#[map]
pub static INTERFACES: HashMap<u32, Interface> =
    HashMap::with_max_entries(limits::INTERFACES, BPF_F_NO_PREALLOC);

/// Bits of [`forwarder_common::publish::uplinks`]: while this host has several uplinks, routes tell by which of them an answer leaves.
#[map]
pub static SEVERAL_UPLINKS: Array<u32> = Array::with_max_entries(1, 0);

/// Not 0 while a route or a rule of this host may say that packets of IPv4 end here: then answers are asked for that.
#[map]
pub static FORBIDDING: Array<u32> = Array::with_max_entries(1, 0);

/// The MTU of the route by a device, which stands in the publish's place, to an address. Asked for [`Interface::narrow`] alone.
#[map]
pub static ROUTE_MTUS: LpmTrie<PublishSource, u32> =
    LpmTrie::with_max_entries(limits::ROUTE_MTUS, BPF_F_NO_PREALLOC);

/// What addresses are behind: this host's own but for loopback ones, and those that its routes to containers lead to. No
/// entry is the rest of the world.
#[map]
pub static LOCATIONS: LpmTrie<Address, Location> =
    LpmTrie::with_max_entries(limits::LOCATIONS, BPF_F_NO_PREALLOC);

/// The bits of this host's addresses, by [`forwarder_common::publish::filter_bit`]: tells nearly all traffic to others apart
/// before anything is looked up for it.
#[map]
pub static LOCAL_FILTER: Array<u64> = Array::with_max_entries(FILTER_WORDS, 0);

#[map]
pub static ALLOW: LpmTrie<PublishSource, u32> =
    LpmTrie::with_max_entries(limits::ALLOW, BPF_F_NO_PREALLOC);

/// Which of the next two tables has any entry, as the bits of [`forwarder_common::publish::ban`].
#[map]
pub static BANS: Array<u32> = Array::with_max_entries(1, 0);

/// Addresses from which nothing gets to a publish, or to any, until so many nanoseconds of `CLOCK_BOOTTIME`.
#[map]
pub static BANNED: HashMap<PublishSource, u64> =
    HashMap::with_max_entries(limits::BANNED, BPF_F_NO_PREALLOC);

/// The same of networks. The value of one that is part of another is the later one of both.
#[map]
pub static BANNED_NETWORKS: LpmTrie<PublishSource, u64> =
    LpmTrie::with_max_entries(limits::BANNED_NETWORKS, BPF_F_NO_PREALLOC);

/// Limits of publishes that have any, by their index.
#[map]
pub static LIMITS: HashMap<u32, Policy> =
    HashMap::with_max_entries(limits::PUBLISHES, BPF_F_NO_PREALLOC);

/// When the next new flow of a source would be due, of publishes that limit that.
#[map]
pub static SOURCES: LruHashMap<PublishSource, u64> =
    LruHashMap::with_max_entries(limits::SOURCES, 0);

/// Flows that both sides have taken part in, by the tuple after NAT, from the client's side.
#[map]
pub static FLOWS: HashMap<Tuple, Flow> =
    HashMap::with_max_entries(limits::FLOWS, BPF_F_NO_PREALLOC);

/// How many of these entries each source has, by [`share::index`], and all together; and how many aliases there are. Of one
/// value for all CPUs, as [`USAGE`].
#[map]
pub static SHARES: Array<Share> = Array::with_max_entries(share::COUNT, BPF_F_MMAPABLE);

/// Where every flow begins, by the same key: a flood turns over these entries alone. Small, to stay in the cache.
#[map]
pub static HALF_OPEN: LruHashMap<Tuple, Flow> = LruHashMap::with_max_entries(limits::HALF_OPEN, 0);

/// Connections to backends' ports that did not come by a port of this host, of which the SYN was seen.
#[map]
pub static DIRECT: LruHashMap<Tuple, u32> = LruHashMap::with_max_entries(limits::DIRECT, 0);

/// When something left this host from a published port's number, by the tuple that its answers have: nanoseconds of
/// `CLOCK_MONOTONIC`. User space adds conversations that it keeps, with a time to come.
#[map]
pub static LEFT: LruHashMap<Tuple, u64> = LruHashMap::with_max_entries(limits::LEFT, 0);

/// When anything was last noted there, of TCP and of UDP: mostly nothing ever was.
#[map]
pub static LAST_LEFT: Array<u64> = Array::with_max_entries(2, 0);

/// Keys of flows that another flow is about to take the place of.
#[map]
pub static CLAIMS: HashMap<Tuple, u32> = HashMap::with_max_entries(limits::CLAIMS, 0);

/// What the order of source ports is a hash by: random, as nobody but root may foresee them (RFC 6056 section 3.3.3), and the
/// same for as long as flows are.
#[map]
pub static KEYS: Array<[u64; 5]> = Array::with_max_entries(1, 0);

/// Datagrams of which a fragment has come, by addresses and identification.
#[map]
pub static FRAGMENTS: LruHashMap<Tuple, Datagram> =
    LruHashMap::with_max_entries(limits::FRAGMENTS, 0);

/// Fragments that the daemon puts together.
#[map]
pub static HANDOVER: RingBuf = RingBuf::with_byte_size(handover::BYTES, 0);

/// A flow that is made.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Draft {
    pub key: Tuple,
    pub original: Tuple,
    pub flow: Flow,
    /// The original tuple of the flow whose place this one takes.
    pub other: Tuple,
    /// What its source ports follow from, and which of them is tried.
    pub hash: u32,
    pub attempt: u32,
    /// Which attempt at a source port found a flow that is over, and the oldest that is not proven.
    pub over: u32,
    pub unproven: u32,
    /// When that was last seen.
    pub oldest: u64,
    /// Not 0 if a port was free, but the table full.
    pub full: u32,
    /// Where its source is counted in `SHARES`.
    pub share: u32,
    /// Not 0 if the source may have no more entries than it has.
    pub capped: u32,
    pub reserved: u32,
}

// VERIFIER: on the stack, it would take more than a third of what there is.
#[map]
pub static DRAFT: PerCpuArray<Draft> = PerCpuArray::with_max_entries(1, 0);

// VERIFIER: as above. And what was read of a packet counts as unknown from here on, so that the pipeline is walked once
// and not for each kind of packet.
#[map]
pub static PACKET: PerCpuArray<Packet> = PerCpuArray::with_max_entries(1, 0);

/// Sockets that hold wide ranges, by [`forwarder_common::publish::socket_index`].
#[map]
pub static SOCKETS: SockHash<u32> = SockHash::with_max_entries(limits::SOCKETS, 0);

/// Cookie of the network namespace that the instance is in; 0 until it has bound a socket.
#[map]
pub static NETNS: Array<u64> = Array::with_max_entries(1, 0);

/// Not 0 while this CPU asks for a socket and means the ones that nothing is steered to.
#[map]
pub static LOOKING: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);

/// What a socket is looked for by: `struct bpf_sock_tuple` (include/uapi/linux/bpf.h).
// VERIFIER: as above.
#[map]
pub static ASKED: PerCpuArray<[u32; 9]> = PerCpuArray::with_max_entries(1, 0);

/// The program that `ingress_l3` hands packets to.
#[map]
pub static PIPELINE: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// Packets, by [`Reason`].
#[map]
pub static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Reason::COUNT, 0);

/// Where packets go, by a hash of their addresses. The last is for those whose place is taken.
#[map]
pub static ROUTES: PerCpuArray<Route> = PerCpuArray::with_max_entries(limits::ROUTES + 1, 0);

/// How many senders were told of an obstacle just now.
#[map]
pub static TOLD: PerCpuArray<Told> = PerCpuArray::with_max_entries(1 + limits::TOLD_GROUPS, 0);

/// The time, and when it was read.
#[map]
pub static CLOCK: PerCpuArray<Reading> = PerCpuArray::with_max_entries(1, 0);

/// What the traced program knows of the packet that it has.
#[map]
pub static TRAIL: PerCpuArray<Trail> = PerCpuArray::with_max_entries(1, 0);

/// Adds one to a reason's counter.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = STATS.get_ptr_mut(reason as u32) {
        // SAFETY: a pointer that the map gave out is valid until the program ends, and the element
        // belongs to this CPU; tc programs are not preempted by one another on a CPU.
        unsafe { *counter += 1 };
    }
}
