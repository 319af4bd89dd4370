//! The only reader of packet bytes: Ethernet, IPv4 or IPv6, TCP or UDP.

use aya_ebpf::programs::TcContext;
use forwarder_common::{
    reason::Reason,
    tuple::{Address, TCP, Tuple, UDP},
};

/// Offsets from the start of the frame. IPv4 with options and IPv6 with extension headers are left
/// to the slow path, so the transport header has one place in each family.
pub const L3: usize = 14;
pub const L4_V4: usize = L3 + 20;
pub const L4_V6: usize = L3 + 40;
/// Behind IPv6's fragment header (RFC 8200 section 4.5), the one extension header that is understood.
pub const L4_V6_FRAGMENT: usize = L4_V6 + 8;
/// The part of TCP's header that is read.
const TCP_LENGTH: usize = 20;

const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
const ETHERTYPE_IPV6: u16 = 0x86dd_u16.to_be();
/// RFC 791: more fragments follow; the offset in units of eight bytes.
const MORE: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;
/// IPv6's fragment header: its number, and where the offset is in its third and fourth byte.
const FRAGMENT_HEADER: u8 = 44;
const OFFSET_V6: u16 = 0xfff8;

/// TCP's flags (RFC 9293 section 3.1).
pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

#[repr(C, packed)]
pub struct Ethernet {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: u16,
}

#[repr(C, packed)]
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

#[repr(C, packed)]
pub struct Ipv6 {
    pub version_and_flow: u32,
    pub payload_length: u16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

#[repr(C, packed)]
struct FragmentHeader {
    next_header: u8,
    reserved: u8,
    offset: u16,
    id: u32,
}

/// The start that TCP and UDP share.
#[repr(C, packed)]
pub struct Ports {
    pub source: u16,
    pub destination: u16,
}

#[repr(C, packed)]
struct Tcp {
    ports: Ports,
    sequence: [u32; 2],
    data_offset: u8,
    flags: u8,
    rest: [u16; 3],
}

#[repr(C, packed)]
struct Udp {
    ports: Ports,
    length: u16,
    checksum: u16,
}

/// Which part of a datagram the packet is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// Has the ports, and others follow.
    First,
    /// Has no ports: those in the tuple are zero until somebody remembers them.
    Later,
}

/// What the pipeline knows of a packet.
pub struct Packet {
    pub tuple: Tuple,
    pub part: Part,
    /// What the parts of one datagram share, as it stands in the packet; 0 for a whole one.
    pub id: u32,
    pub protocol: u8,
    pub is_v4: bool,
    pub ttl: u8,
    /// TCP's flags; 0 for UDP.
    pub flags: u8,
    pub length: u32,
    pub ifindex: u32,
}

impl Packet {
    /// lo is device 1 in every network namespace (`LOOPBACK_IFINDEX`, include/net/flow.h).
    #[inline(always)]
    pub fn is_from_this_host(&self) -> bool {
        self.ifindex == 1
    }

    /// Where the transport header is.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        match (self.is_v4, self.part) {
            (true, _) => L4_V4,
            (false, Part::Whole) => L4_V6,
            (false, _) => L4_V6_FRAGMENT,
        }
    }

    /// The first packet of a TCP connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }
}

/// A pointer to a header, if the frame's linear part holds all of it.
#[inline(always)]
pub fn header<T>(ctx: &TcContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data() + offset;
    // VERIFIER: the comparison with data_end, of the very pointer that is used, is what allows access.
    if start + size_of::<T>() > ctx.data_end() {
        None
    } else {
        Some(start as *mut T)
    }
}

/// Reads what the pipeline needs.
///
/// # Errors
/// `NotOurs` for everything that cannot belong to a published port.
#[inline(always)]
pub fn packet(ctx: &TcContext) -> Result<Packet, Reason> {
    // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
    let (vlan, ifindex) = unsafe { ((*ctx.skb.skb).vlan_present, (*ctx.skb.skb).ifindex) };
    if vlan != 0 {
        return Err(Reason::NotOurs); // comes again, untagged, on the VLAN's own device
    }
    let ethernet = header::<Ethernet>(ctx, 0).ok_or(Reason::NotOurs)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    match unsafe { (*ethernet).ethertype } {
        ETHERTYPE_IPV4 => {
            linear(ctx, L4_V4 + TCP_LENGTH)?;
            ipv4(ctx, ifindex)
        }
        ETHERTYPE_IPV6 => {
            linear(ctx, L4_V6 + TCP_LENGTH)?;
            ipv6(ctx, ifindex)
        }
        _ => Err(Reason::NotOurs),
    }
}

/// Brings so many bytes, or all that there are, into the frame's linear part. Locally sent TCP has its headers
/// there and its payload elsewhere: a byte more would copy both.
#[inline(always)]
fn linear(ctx: &TcContext, wanted: usize) -> Result<(), Reason> {
    let have = ctx.data_end() - ctx.data();
    if have < wanted && have < ctx.len() as usize {
        let wanted = ctx.len().min(wanted as u32);
        ctx.pull_data(wanted).map_err(|_| Reason::NotOurs)?;
    }
    Ok(())
}

#[inline(always)]
fn ipv4(ctx: &TcContext, ifindex: u32) -> Result<Packet, Reason> {
    let ip = header::<Ipv4>(ctx, L3).ok_or(Reason::NotOurs)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let ip = unsafe { &*ip };
    if ip.version_and_length != 0x45 || (ip.protocol != TCP && ip.protocol != UDP) {
        return Err(Reason::NotOurs);
    }
    let (offset, id) = (u16::from_be(ip.fragment), ip.id);
    let part = part(offset & OFFSET != 0, offset & MORE != 0);
    let source = Address::from_v4(ip.source);
    let destination = Address::from_v4(ip.destination);
    let (protocol, ttl) = (ip.protocol, ip.ttl);
    let (ports, flags) = transport(ctx, L4_V4, protocol, part)?;
    Ok(Packet {
        tuple: Tuple {
            source,
            destination,
            source_port: ports.0,
            destination_port: ports.1,
            protocol: protocol as u32,
        },
        part,
        id: id as u32,
        protocol,
        is_v4: true,
        ttl,
        flags,
        length: ctx.len(),
        ifindex,
    })
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
fn ipv6(ctx: &TcContext, ifindex: u32) -> Result<Packet, Reason> {
    let ip = header::<Ipv6>(ctx, L3).ok_or(Reason::NotOurs)?;
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let ip = unsafe { &*ip };
    let (mut protocol, mut part, mut id, mut l4) = (ip.next_header, Part::Whole, 0, L4_V6);
    let (source, destination) = (Address(ip.source), Address(ip.destination));
    let ttl = ip.hop_limit;
    if protocol == FRAGMENT_HEADER {
        linear(ctx, L4_V6_FRAGMENT + TCP_LENGTH)?;
        let fragment = header::<FragmentHeader>(ctx, L4_V6).ok_or(Reason::NotOurs)?;
        // SAFETY: `header` checked the bounds; packed structs have no alignment.
        let fragment = unsafe { &*fragment };
        // A fragment that is all of its datagram (RFC 6946) counts as the first: its header is there.
        part = self::part(u16::from_be(fragment.offset) & OFFSET_V6 != 0, true);
        (protocol, id, l4) = (fragment.next_header, fragment.id, L4_V6_FRAGMENT);
    }
    if protocol != TCP && protocol != UDP {
        return Err(Reason::NotOurs);
    }
    let (ports, flags) = transport(ctx, l4, protocol, part)?;
    Ok(Packet {
        tuple: Tuple {
            source,
            destination,
            source_port: ports.0,
            destination_port: ports.1,
            protocol: protocol as u32,
        },
        part,
        id,
        protocol,
        is_v4: false,
        ttl,
        flags,
        length: ctx.len(),
        ifindex,
    })
}

/// Source and destination port in wire order, and TCP's flags.
#[inline(always)]
fn transport(
    ctx: &TcContext,
    offset: usize,
    protocol: u8,
    part: Part,
) -> Result<((u16, u16), u8), Reason> {
    if part == Part::Later {
        return Ok(((0, 0), 0));
    }
    // SAFETY (both): `header` checked the bounds; packed structs have no alignment.
    if protocol == TCP {
        let tcp = header::<Tcp>(ctx, offset).ok_or(Reason::NotOurs)?;
        // SAFETY: as above.
        let tcp = unsafe { &*tcp };
        Ok(((tcp.ports.source, tcp.ports.destination), tcp.flags))
    } else {
        let udp = header::<Udp>(ctx, offset).ok_or(Reason::NotOurs)?;
        // SAFETY: as above.
        let udp = unsafe { &*udp };
        Ok(((udp.ports.source, udp.ports.destination), 0))
    }
}
