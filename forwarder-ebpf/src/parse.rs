//! The only reader of packet bytes: Ethernet, IPv4 or IPv6, TCP or UDP, or an ICMP error that quotes one of them.

// The paths are for `fuzz/`, which compiles this file too.
#[path = "parse/icmp.rs"]
mod icmp;
#[path = "parse/l3.rs"]
pub mod l3;
#[path = "parse/options.rs"]
mod options;

use core::ffi::c_void;

use aya_ebpf::programs::TcContext;
use forwarder_common::{
    reason::Reason,
    tcp::{ACK, FIN, RST, SYN, Segment},
    tuple::{Address, TCP, Tuple, UDP},
};

use crate::{
    frame::{Frame, SentTo, header},
    maps::PACKET,
    words::read_address,
};

/// lo is device 1 in every network namespace (include/net/flow.h).
pub const LOOPBACK_IFINDEX: u32 = 1;

/// Offsets from the start of the frame. The transport header is further back if there are options, see [`Packet::l4`].
pub const L3: usize = 14;
pub const L4_V4: usize = L3 + 20;
pub const L4_V6: usize = L3 + 40;
/// Behind IPv6's fragment header (RFC 8200 section 4.5).
pub const L4_V6_FRAGMENT: usize = L4_V6 + 8;
/// The part of TCP's header that is read.
pub const TCP_LENGTH: usize = 20;
/// Where the checksums are in their headers.
pub const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
/// ICMP's header, type to the four octets that depend on it; an error's quotation follows (RFC 792, RFC 4443).
pub const ICMP_LENGTH: usize = 8;

pub use options::NONE as NO_OPTIONS;

pub const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
pub const ETHERTYPE_IPV6: u16 = 0x86dd_u16.to_be();
/// RFC 791: do not fragment; more fragments follow; the offset in units of eight bytes.
const DONT: u16 = 0x4000;
const MORE: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;
/// IPv6's fragment header: its number, and where the offset is in its third and fourth byte.
pub const FRAGMENT_HEADER: u8 = 44;
/// Other extension headers of IPv6 (RFC 8200 section 4), each of which begins with the number of what follows.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
pub const DESTINATION: u8 = 60;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;
const OFFSET_V6: u16 = 0xfff8;

#[repr(C, packed(2))]
pub struct Ethernet {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: u16,
}

#[repr(C, packed(2))]
pub struct Ipv4 {
    pub version_and_length: u8,
    pub tos: u8,
    pub total_length: u16,
    pub id: u16,
    pub fragment: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: u16,
    pub source: u32,
    pub destination: u32,
}

#[repr(C, packed(2))]
pub struct Ipv6 {
    pub version_and_flow: u32,
    pub payload_length: u16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

#[repr(C, packed(2))]
struct FragmentHeader {
    next_header: u8,
    reserved: u8,
    offset: u16,
    id: u32,
}

/// The start that TCP and UDP share.
#[repr(C, packed(2))]
pub struct Ports {
    pub source: u16,
    pub destination: u16,
}

#[repr(C, packed(2))]
pub struct Tcp {
    pub ports: Ports,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub data_offset: u8,
    pub flags: u8,
    pub window: u16,
    pub checksum: u16,
    pub urgent: u16,
}

#[repr(C, packed(2))]
pub struct Udp {
    pub ports: Ports,
    pub length: u16,
    pub checksum: u16,
}

#[repr(C, packed(2))]
pub struct Icmp {
    pub kind: u8,
    pub code: u8,
    pub checksum: u16,
    /// The MTU, in an error that tells it; in wire order.
    pub rest: u32,
}

/// Which part of a datagram the packet has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// Its beginning, quoted in an ICMP error. The error belongs to the flow of what it quotes and travels the
    /// other way, so the tuple is the quoted one reversed: that of packets in the error's own direction.
    Quoted,
    /// Has the ports, and others follow.
    First,
    /// Has no ports: those in the tuple are zero until somebody remembers them.
    Later,
}

/// What the pipeline knows of a packet.
pub struct Packet {
    pub tuple: Tuple,
    /// What it becomes, or is looked for under.
    pub new: Tuple,
    pub part: Part,
    /// What the parts of one datagram share, as it stands in the packet; 0 for a whole one.
    pub id: u32,
    pub protocol: u8,
    pub is_v4: bool,
    pub sent_to: SentTo,
    /// No router may cut it up: it is IPv6, or says so (RFC 791).
    pub dont_fragment: bool,
    /// Type of service, or IPv6's traffic class.
    pub tos: u8,
    pub ttl: u8,
    /// TCP's flags; 0 for UDP.
    pub flags: u8,
    /// Octets of options between the IP header and the transport header, both of what is quoted if it is. They say nothing, or
    /// the packet would not be ours.
    options: u8,
    pub length: u32,
    pub ifindex: u32,
}

impl Packet {
    #[inline(always)]
    pub fn is_from_this_host(&self) -> bool {
        self.ifindex == LOOPBACK_IFINDEX
    }

    /// Where the transport header is.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        let without_options = match (self.is_v4, self.part) {
            (true, _) => L4_V4,
            (false, Part::Whole | Part::Quoted) => L4_V6,
            (false, _) => L4_V6_FRAGMENT,
        };
        without_options + self.options()
    }

    /// Ends the packet `length` octets (wire order) behind `start`, as its IP header says: what the frame has behind that is a
    /// short frame's padding (IEEE 802.3 section 4.2.3.3), a checksum that the device has left there, or a switch's trailer. Of
    /// merged segments that are too long for the field, it is 0.
    #[inline(always)]
    fn end_at(&mut self, start: usize, length: u16) {
        if length != 0 {
            self.length = self.length.min(start as u32 + u16::from_be(length) as u32);
        }
    }

    /// Octets of options in front of the transport header.
    #[inline(always)]
    pub fn options(&self) -> usize {
        // VERIFIER: read and bounded each time. What it knows of the value otherwise is contradictory where its way
        // cannot be (6.12), and lost where it was put on the stack (5.10).
        // SAFETY: a reference.
        let octets = unsafe { (&raw const self.options).read_volatile() };
        (octets & options::MASK) as usize
    }

    /// How many of them the kernel takes off where it cuts merged segments apart.
    #[inline(always)]
    fn jumbo(&self) -> usize {
        if self.options & options::JUMBO != 0 {
            options::PADDED as usize
        } else {
            0
        }
    }

    /// Where the transport header's checksum is.
    #[inline(always)]
    pub fn checksum(&self) -> usize {
        self.l4()
            + if self.protocol == TCP {
                TCP_CHECKSUM
            } else {
                UDP_CHECKSUM
            }
    }

    /// An ICMP error about a packet of the tuple's conversation.
    #[inline(always)]
    pub fn is_error(&self) -> bool {
        self.part == Part::Quoted
    }

    /// The first packet of a TCP connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }
}

/// Whether a frame's link header names this MAC as its destination.
#[inline(always)]
pub fn is_to(frame: &impl Frame, mac: &[u8; 6]) -> bool {
    header::<Ethernet>(frame, 0).is_some_and(|ethernet| {
        // SAFETY: `header` checked the bounds; packed structs have no alignment.
        unsafe { (*ethernet).destination == *mac }
    })
}

/// Reads the addresses of the packet's own IP header, whatever is behind that.
#[inline(always)]
pub fn addresses(frame: &impl Frame, to: &mut Tuple) -> Option<()> {
    let ethernet = header::<Ethernet>(frame, 0)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    if unsafe { (*ethernet).ethertype } == ETHERTYPE_IPV4 {
        let ip = header::<Ipv4>(frame, L3)?;
        // SAFETY: as above.
        let ip = unsafe { &*ip };
        to.source = Address::from_v4(ip.source);
        to.destination = Address::from_v4(ip.destination);
    } else {
        let ip = header::<Ipv6>(frame, L3)?;
        // SAFETY: as above, and references to both, which are aligned to two.
        unsafe {
            read_address(&raw const (*ip).source, &mut to.source);
            read_address(&raw const (*ip).destination, &mut to.destination);
        }
    }
    Some(())
}

/// What the header of a TCP packet says, if the packet has one.
#[inline(always)]
pub fn segment(frame: &impl Frame, packet: &Packet) -> Option<Segment> {
    if packet.part == Part::Later {
        return None;
    }
    // VERIFIER: read again, since the stack has no room for it between the two.
    let tcp = header::<Tcp>(frame, packet.l4())?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let tcp = unsafe { &*tcp };
    let header = packet.l4() as u32 + (tcp.data_offset as u32 >> 4 << 2);
    Some(Segment {
        payload: packet.length.saturating_sub(header),
        flags: tcp.flags,
        sequence: u32::from_be(tcp.sequence),
        acknowledgement: u32::from_be(tcp.acknowledgement),
    })
}

/// Where the packet's IP header and TCP header are, for helpers that read them.
#[inline(always)]
pub fn headers(frame: &impl Frame, packet: &Packet) -> Option<(*mut c_void, u32, *mut c_void)> {
    let tcp = header::<Tcp>(frame, packet.l4())?;
    let (ip, length) = if packet.is_v4 {
        (header::<Ipv4>(frame, L3)?.cast(), size_of::<Ipv4>())
    } else {
        (header::<Ipv6>(frame, L3)?.cast(), size_of::<Ipv6>())
    };
    Some((ip, length as u32, tcp.cast()))
}

/// The length of the longest packet that this becomes, without the link header. Segments that the kernel has merged
/// (GSO) are cut apart again behind us.
#[inline(always)]
pub fn length_on_the_wire(ctx: &TcContext, packet: &Packet) -> u32 {
    // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
    let segment = unsafe { (*ctx.skb.skb).gso_size };
    let whole = packet.length - L3 as u32;
    if segment == 0 {
        return whole;
    }
    let l4 = packet.l4();
    let transport = if packet.protocol == TCP {
        // SAFETY: `header` checked the bounds; packed structs have no alignment.
        header::<Tcp>(ctx, l4).map_or(0, |tcp| unsafe { (*tcp).data_offset } as u32 >> 4 << 2)
    } else {
        size_of::<Udp>() as u32
    };
    whole.min((l4 - L3 - packet.jumbo()) as u32 + transport + segment)
}

/// Whether a frame may be an ICMP error, told by as little as possible.
#[inline(always)]
pub fn is_icmp(ctx: &TcContext) -> bool {
    let Some(ethernet) = header::<Ethernet>(ctx, 0) else {
        return false;
    };
    // SAFETY: `header` checked the bounds of all three; packed structs have no alignment.
    unsafe {
        match (*ethernet).ethertype {
            ETHERTYPE_IPV4 => header::<Ipv4>(ctx, L3).is_some_and(|ip| (*ip).protocol == ICMP),
            ETHERTYPE_IPV6 => header::<Ipv6>(ctx, L3).is_some_and(|ip| (*ip).next_header == ICMPV6),
            _ => false,
        }
    }
}

/// Reads what the pipeline needs.
///
/// # Errors
/// `NotOurs` for everything that cannot belong to a published port.
#[inline(always)]
pub fn packet(frame: &impl Frame) -> Result<&'static mut Packet, Reason> {
    if frame.is_tagged() {
        return Err(Reason::NotOurs); // comes again, untagged, on the VLAN's own device
    }
    let packet = PACKET.get_ptr_mut(0).ok_or(Reason::NotOurs)?;
    // SAFETY: the element belongs to this CPU, and the programs are not preempted by one another on a CPU.
    let packet = unsafe { &mut *packet };
    // What not every kind of packet has; all else is set below, or the packet is not ours.
    (packet.tuple.source_port, packet.tuple.destination_port) = (0, 0);
    (packet.part, packet.id, packet.flags) = (Part::Whole, 0, 0);
    packet.options = 0;
    (packet.is_v4, packet.dont_fragment) = (false, true);
    packet.length = frame.length();
    packet.ifindex = frame.ifindex();
    packet.sent_to = frame.sent_to();
    let ethernet = header::<Ethernet>(frame, 0).ok_or(Reason::NotOurs)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    match unsafe { (*ethernet).ethertype } {
        ETHERTYPE_IPV4 => {
            linear(frame, L4_V4)?;
            ipv4(frame, packet)?;
        }
        ETHERTYPE_IPV6 => {
            linear(frame, L4_V6)?;
            ipv6(frame, packet)?;
        }
        _ => return Err(Reason::NotOurs),
    }
    packet.tuple.protocol = packet.protocol as u32;
    Ok(packet)
}

/// Brings so many bytes, or all that there are, into the frame's linear part. Locally sent TCP has its headers
/// there and its payload elsewhere: a byte more would copy both. And of packets of other protocols that are several in
/// one (SCTP's chunks as a list of fragments), a byte more would be taken from the next.
#[inline(always)]
fn linear(frame: &impl Frame, wanted: usize) -> Result<(), Reason> {
    let have = frame.data_end() - frame.data();
    if have < wanted
        && have < frame.length() as usize
        && !frame.pull(frame.length().min(wanted as u32))
    {
        return Err(Reason::NotOurs);
    }
    Ok(())
}

#[inline(always)]
fn ipv4(frame: &impl Frame, packet: &mut Packet) -> Result<(), Reason> {
    let ip = header::<Ipv4>(frame, L3).ok_or(Reason::NotOurs)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let (first, protocol) = unsafe { ((*ip).version_and_length, (*ip).protocol) };
    if first != options::NONE {
        let octets = options::v4(frame, L3, first);
        packet.options = octets.ok_or_else(|| behind_options(protocol))?;
    }
    let ip = header::<Ipv4>(frame, L3).ok_or(Reason::NotOurs)?;
    // SAFETY: as above.
    let ip = unsafe { &*ip };
    let fragment = u16::from_be(ip.fragment);
    packet.end_at(L3, ip.total_length);
    packet.is_v4 = true;
    packet.dont_fragment = fragment & DONT != 0;
    packet.tos = ip.tos;
    packet.ttl = ip.ttl;
    packet.protocol = ip.protocol;
    if ip.protocol != TCP && ip.protocol != UDP {
        if packet.options != 0 {
            return Err(Reason::NotOurs);
        }
        return icmp::v4(frame, packet);
    }
    packet.part = part(fragment & OFFSET != 0, fragment & MORE != 0);
    packet.id = ip.id as u32;
    packet.tuple.source = Address::from_v4(ip.source);
    packet.tuple.destination = Address::from_v4(ip.destination);
    transport(frame, packet)
}

#[inline(always)]
fn part(has_offset: bool, more: bool) -> Part {
    match (has_offset, more) {
        (true, _) => Part::Later,
        (false, true) => Part::First,
        (false, false) => Part::Whole,
    }
}

#[inline(always)]
fn ipv6(frame: &impl Frame, packet: &mut Packet) -> Result<(), Reason> {
    let ip = header::<Ipv6>(frame, L3).ok_or(Reason::NotOurs)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let ip = unsafe { &*ip };
    packet.end_at(L4_V6, ip.payload_length);
    packet.tos = (u32::from_be(ip.version_and_flow) >> 20) as u8;
    packet.ttl = ip.hop_limit;
    packet.protocol = ip.next_header;
    // SAFETY: references to both, which are aligned to two.
    unsafe {
        read_address(&raw const ip.source, &mut packet.tuple.source);
        read_address(&raw const ip.destination, &mut packet.tuple.destination);
    }
    if packet.tuple.source.is_v4() || packet.tuple.destination.is_v4() {
        return Err(Reason::NotOurs); // it would pass for the IPv4 address, and the stack takes none (RFC 4291 section 2.5.5.2)
    }
    // VERIFIER: read once, since a reference to the packet does not outlive that more of it becomes linear.
    let next_header = ip.next_header;
    let mut l4 = L4_V6;
    if next_header == FRAGMENT_HEADER {
        linear(frame, L4_V6_FRAGMENT)?;
        let fragment = header::<FragmentHeader>(frame, L4_V6).ok_or(Reason::NotOurs)?;
        // SAFETY: `header` checked the bounds; packed structs have no alignment.
        let fragment = unsafe { &*fragment };
        // A fragment that is all of its datagram (RFC 6946) counts as the first: its header is there.
        packet.part = part(u16::from_be(fragment.offset) & OFFSET_V6 != 0, true);
        packet.id = fragment.id;
        packet.protocol = fragment.next_header;
        l4 = L4_V6_FRAGMENT;
    } else if next_header == DESTINATION
        && let Some(next) = options::v6(frame, L4_V6)
        && (next == TCP || next == UDP)
    {
        packet.protocol = next;
        packet.options = options::PADDED;
    } else if next_header == HOP_BY_HOP
        && let Some(TCP) = options::jumbo(frame, L4_V6)
    {
        packet.protocol = TCP;
        packet.options = options::PADDED | options::JUMBO;
    }
    if packet.protocol != TCP && packet.protocol != UDP {
        if matches!(packet.protocol, HOP_BY_HOP | ROUTING | DESTINATION) {
            linear(frame, l4 + 1)?;
            let next = header::<u8>(frame, l4).ok_or(Reason::NotOurs)?;
            // SAFETY: `header` checked the bounds.
            return Err(behind_options(unsafe { *next }));
        }
        return icmp::v6(frame, packet);
    }
    transport(frame, packet)
}

/// What is behind them is the slow path's. Only what could be ours is counted: one header may follow another.
#[inline(always)]
fn behind_options(protocol: u8) -> Reason {
    match protocol {
        TCP | UDP | HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT_HEADER => Reason::Options,
        _ => Reason::NotOurs,
    }
}

/// The ports, and TCP's flags.
#[inline(always)]
fn transport(frame: &impl Frame, packet: &mut Packet) -> Result<(), Reason> {
    if packet.part == Part::Later {
        return Ok(());
    }
    let offset = packet.l4();
    // SAFETY (both): `header` checked the bounds; packed structs have no alignment.
    let ports = if packet.protocol == TCP {
        linear(frame, offset + TCP_LENGTH)?;
        let tcp = header::<Tcp>(frame, offset).ok_or(Reason::NotOurs)?;
        // SAFETY: as above.
        let tcp = unsafe { &*tcp };
        packet.flags = tcp.flags;
        &tcp.ports
    } else {
        linear(frame, offset + size_of::<Udp>())?;
        let udp = header::<Udp>(frame, offset).ok_or(Reason::NotOurs)?;
        // SAFETY: as above.
        unsafe { &(*udp).ports }
    };
    packet.tuple.source_port = ports.source;
    packet.tuple.destination_port = ports.destination;
    Ok(())
}
