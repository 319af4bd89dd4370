//! Published ports: what the program looks up to find a backend.

use bytemuck::{Pod, Zeroable};

use crate::{
    flow::Hop,
    tuple::{Address, TCP, UDP},
};

/// An element of `PORTS`: what one port of one protocol has to do with any publish. Zero: nothing.
///
/// One array lookup for each of a packet's ports tells nearly all foreign traffic apart, and a range costs
/// eight bytes a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Port {
    /// Index in `PUBLISHES` of the publish on every local IPv4 address; 0 for none.
    pub every_v4: u16,
    /// The same for IPv6.
    pub every_v6: u16,
    /// How many entries of `FRONTENDS` have this port; 0 saves the lookup.
    pub exact: u16,
    /// How many publishes lead to this port of their backend: 0 for what no reply comes from.
    pub backends: u16,
}

const _: () = assert!(size_of::<Port>() == 8 && crate::limits::PUBLISHES <= 1 << u16::BITS);

/// Ports of one protocol in `PORTS`.
pub const PORTS_PER_PROTOCOL: u32 = 1 << 16;
/// Protocols in `PORTS`.
pub const PROTOCOLS: u32 = 2;

/// The element of `PORTS` for a protocol and a port in host order; `None` for a protocol that the
/// fast path doesn't serve.
#[inline(always)]
pub const fn port_index(protocol: u8, port: u16) -> Option<u32> {
    match protocol {
        TCP => Some(port as u32),
        UDP => Some(PORTS_PER_PROTOCOL + port as u32),
        _ => None,
    }
}

/// A key of `FRONTENDS`: a port on one address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Frontend {
    pub address: Address,
    /// Wire order.
    pub port: u16,
    /// IANA protocol number.
    pub protocol: u16,
}

const _: () = assert!(size_of::<Frontend>() == 20);

/// Bits of [`Publish::flags`].
pub mod flag {
    /// All ports of the range go to one backend port.
    pub const SINGLE_PORT: u16 = 1;
    /// The backend answers only to addresses of this host: SNAT for every client.
    pub const REMOTE: u16 = 1 << 1;
    /// Only sources in `ALLOW` are served.
    pub const ALLOW_LIST: u16 = 1 << 2;
    /// No new flows: the publish was taken back, and its flows may end in peace.
    pub const DRAINING: u16 = 1 << 3;
    /// A wide range: one socket of `SOCKETS` holds all of its ports.
    pub const STEERED: u16 = 1 << 4;
    /// Packets of other machines go through this host's stack, for its firewall to see them.
    pub const STACK: u16 = 1 << 5;
    /// `LIMITS` has an entry of it.
    pub const LIMITED: u16 = 1 << 6;
}

/// An element of `PUBLISHES`: one publish and how its backend is reached now.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Publish {
    pub backend: Address,
    /// The host's address on the backend's network, the source after SNAT.
    pub source: Address,
    /// How packets get to the backend.
    pub hop: Hop,
    /// First frontend port, host order.
    pub first_port: u16,
    /// Backend port of `first_port`, host order.
    pub backend_port: u16,
    /// Bits of [`flag`].
    pub flags: u16,
    /// The publish that had the port before and still drains; 0 for none.
    pub previous: u16,
}

const _: () = assert!(size_of::<Publish>() == 60);

impl Publish {
    /// The backend's port for a frontend port, both in host order.
    #[inline(always)]
    pub const fn backend_port_of(&self, frontend_port: u16) -> u16 {
        if self.flags & flag::SINGLE_PORT != 0 {
            self.backend_port
        } else {
            self.backend_port
                .wrapping_add(frontend_port.wrapping_sub(self.first_port))
        }
    }
}

/// A source of a publish's clients, which is the key of `ALLOW`, `BANNED`, `BANNED_NETWORKS` and `SOURCES`. Prefix lengths of the
/// tries count the 32 bits of the publish.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PublishSource {
    /// Index in `PUBLISHES`, wire order.
    pub publish: u32,
    pub source: Address,
}

/// Values of `ALLOW`.
pub mod allow {
    pub const YES: u32 = 1;
    /// All of IPv4, which is mapped, where a wider network is allowed that means IPv6 alone.
    pub const NO: u32 = 2;
}

/// Bits of the element of `BANS`, and what else is special about bans.
pub mod ban {
    /// `BANNED` has an entry.
    pub const ADDRESSES: u32 = 1;
    /// `BANNED_NETWORKS` has one.
    pub const NETWORKS: u32 = 1 << 1;
    /// One of them has one of a single publish.
    pub const OF_A_PUBLISH: u32 = 1 << 2;
    /// The publish that stands for all: no publish has this index.
    pub const EVERYWHERE: u32 = 0;
    /// The value of a ban without an end.
    pub const FOR_EVER: u64 = u64::MAX;
}

/// Bits of the element of `SEVERAL_UPLINKS`.
pub mod uplinks {
    /// There are several.
    pub const SEVERAL: u32 = 1;
    /// Beside that, rules choose among routes of IPv4 by marks.
    pub const MARKS_V4: u32 = 1 << 1;
    /// The same of IPv6.
    pub const MARKS_V6: u32 = 1 << 2;
}

/// Values of [`Interface::xdp`].
pub mod xdp {
    /// Not at all: the program is not attached.
    pub const NO: u32 = 0;
    /// What came in by it is turned round (XDP_TX), the rest redirected.
    pub const TURNS: u32 = 1;
    /// All is redirected: what a veth turns round waits until another frame follows, unless the other end has a program too (veth_xdp_flush,
    /// drivers/net/veth.c).
    pub const REDIRECTS: u32 = 2;
}

/// An element of `INTERFACES`: how packets leave by a device.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Interface {
    /// How replies get back to a client that came in by it, one of [`crate::flow::delivery`]: `PEER` and `DEVICE`
    /// answer to the MAC that the packet came from, `NEIGHBOUR` asks the kernel, by the layer 3 device.
    pub delivery: u32,
    /// The longest packet that it takes, without the link header.
    pub mtu: u32,
    /// Not 0 where packets have Ethernet headers.
    pub ethernet: u32,
    /// How XDP sends frames by it, one of [`xdp`].
    pub xdp: u32,
    /// The container network behind it: the device that this host's routes to the containers lead to, which is the bridge
    /// or the device itself. 0 for an uplink. Sources are of the same network ([`Location`]), or forged.
    pub network: u32,
    /// The device that this host's addresses there are on: itself, or the bridge that it is a port of.
    pub layer3: u32,
    /// That device's MAC.
    pub mac: [u8; 6],
    /// Not 0 where packets must come by the device that the best route to their source leads to (rp_filter is 1).
    pub strict: u8,
    /// Not 0 where a default route of IPv4 leads by it.
    pub default_v4: u8,
    /// The container at the other end, by a number that all of its devices have; 0 where that is not known.
    pub container: u32,
    /// Not 0 where a route by the layer 3 device has an MTU of its own.
    pub narrow: u32,
}

const _: () = assert!(size_of::<Interface>() == 40);

/// A value of `LOCATIONS`: what an address is behind. Zero is the rest of the world.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Location {
    /// The device of the container network, as in [`Interface::network`]; that of [`Location::HERE`] for addresses of this
    /// host, and of [`Location::EVERYBODY`] for broadcast addresses.
    pub network: u32,
    /// The device that the address's own container is behind. In the rest of the world, the one that the best route leads to, on
    /// a host that the program cannot ask for it. 0 where that is not known.
    pub device: u32,
}

impl Location {
    /// An address of this host: what is behind lo, which is device 1 in every network namespace (include/net/flow.h).
    pub const HERE: Self = Self {
        network: 1,
        device: 0,
    };
    /// All machines of a network: the address is no single one's, by whatever device a packet comes.
    pub const EVERYBODY: Self = Self {
        network: u32::MAX,
        device: 0,
    };
}

/// Words of `LOCAL_FILTER`, of 64 bits each.
pub const FILTER_WORDS: u32 = 1024;

/// The word and the bit of `LOCAL_FILTER` that belong to an address.
#[inline(always)]
pub const fn filter_bit(address: &Address) -> (u32, u64) {
    let [a, b, c, d] = address.0;
    let mixed = d ^ a.rotate_left(8) ^ b.rotate_left(16) ^ c.rotate_left(24);
    let hash = mixed.wrapping_mul(0x9e37_79b1) >> 16;
    (hash >> 6, 1 << (hash & 63))
}

/// The priority (SO_PRIORITY) of sockets that answer from a port of a wide range, by the instance's mark. Its low four
/// bits, which some queueing disciplines heed, are those of ordinary traffic.
#[inline(always)]
pub const fn own_priority(mark: u32) -> u32 {
    mark & !0xf | 1 << 4
}

/// The key of `SOCKETS`: a publish and an address family.
#[inline(always)]
pub const fn socket_index(publish: u32, is_v4: bool) -> u32 {
    publish << 1 | !is_v4 as u32
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "the marker that aya asks for")]
mod user {
    // SAFETY: `#[repr(C)]` and `bytemuck::Pod`: any bytes are a valid value, and there is no padding.
    unsafe impl aya::Pod for super::Port {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Frontend {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Publish {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PublishSource {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Interface {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Location {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_maps_one_to_one() {
        let publish = Publish {
            first_port: 10_000,
            backend_port: 20_000,
            ..Publish::default()
        };
        assert_eq!(publish.backend_port_of(10_000), 20_000);
        assert_eq!(publish.backend_port_of(10_099), 20_099);
    }

    #[test]
    fn a_range_can_lead_to_one_port() {
        let publish = Publish {
            first_port: 10_000,
            backend_port: 443,
            flags: flag::SINGLE_PORT,
            ..Publish::default()
        };
        assert_eq!(publish.backend_port_of(10_099), 443);
    }

    #[test]
    fn tcp_and_udp_do_not_share_elements() {
        assert_ne!(port_index(TCP, 53), port_index(UDP, 53));
        assert_eq!(
            port_index(UDP, u16::MAX),
            Some(PORTS_PER_PROTOCOL * PROTOCOLS - 1)
        );
        assert_eq!(port_index(1, 53), None);
    }
}
