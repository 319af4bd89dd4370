//! Addresses, protocols and the tuple that names one direction of a conversation.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytemuck::{Pod, Zeroable};

use crate::layout::layout;

/// IANA protocol numbers of what can be published.
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;

/// An IPv4 or IPv6 address as four 32-bit words in wire order; IPv4 is IPv4-mapped
/// (`::ffff:a.b.c.d`, RFC 4291 section 2.5.5.2), so that one map serves both families.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Address(pub [u32; 4]);

const V4_MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Address {
    pub const UNSPECIFIED: Self = Self([0; 4]);

    /// From an IPv4 address as it stands in the packet (wire order).
    #[inline(always)]
    pub const fn from_v4(wire: u32) -> Self {
        Self([0, 0, V4_MAPPED, wire])
    }

    /// The IPv4 address in wire order; meaningful only for an IPv4 address.
    #[inline(always)]
    pub const fn v4(self) -> u32 {
        self.0[3]
    }

    #[inline(always)]
    pub const fn is_v4(self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == V4_MAPPED
    }

    /// The sixteen octets in wire order.
    #[inline(always)]
    pub fn octets(self) -> [u8; 16] {
        bytemuck::cast(self.0)
    }

    /// 127.0.0.0/8 or ::1 (RFC 6890).
    #[inline(always)]
    pub const fn is_loopback(self) -> bool {
        if self.is_v4() {
            u32::from_be(self.0[3]) >> 24 == 127
        } else {
            self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && self.0[3] == 1_u32.to_be()
        }
    }

    /// 0.0.0.0 or ::, which is nobody's (RFC 1122 section 3.2.1.3, RFC 4291 section 2.5.2).
    #[inline(always)]
    pub const fn is_unspecified(self) -> bool {
        let [a, b, c, d] = self.0;
        a == 0 && b == 0 && d == 0 && (c == 0 || c == V4_MAPPED)
    }

    /// An address of one host: not unspecified ("this network", 0.0.0.0/8), not multicast, not
    /// IPv4's 240.0.0.0/4 with the limited broadcast (RFC 1122 section 3.2.1.3, RFC 4291 section 2.7).
    #[inline(always)]
    pub const fn is_unicast(self) -> bool {
        if self.is_v4() {
            let first = u32::from_be(self.0[3]) >> 24;
            first != 0 && first < 224
        } else {
            let bits = self.0[0] | self.0[1] | self.0[2] | self.0[3];
            bits != 0 && u32::from_be(self.0[0]) >> 24 != 0xff
        }
    }

    /// fe80::/10 (RFC 4291 section 2.5.6).
    #[inline(always)]
    pub const fn is_link_local(self) -> bool {
        u32::from_be(self.0[0]) >> 22 == 0xfe80 >> 6
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self::from_v4(u32::from_ne_bytes(v4.octets())),
            IpAddr::V6(v6) => Self(bytemuck::cast(v6.octets())),
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        if address.is_v4() {
            Self::V4(Ipv4Addr::from(address.v4().to_ne_bytes()))
        } else {
            Self::V6(Ipv6Addr::from(address.octets()))
        }
    }
}

/// One direction of a conversation. Ports are in wire order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Tuple {
    pub source: Address,
    pub destination: Address,
    pub source_port: u16,
    pub destination_port: u16,
    /// IANA protocol number, widened so that the key has no padding.
    pub protocol: u32,
}

const _: () = assert!(size_of::<Tuple>() == 40);

layout!(Tuple: source, destination, source_port, destination_port, protocol);

impl Tuple {
    /// A hash that nobody without the keys can foresee: UMAC's NH (RFC 4418 section 5.2.2), whose multiplications do not
    /// wait for each other, mixed once. `key` gives the keys 0 to 4.
    #[inline(always)]
    pub fn hash(&self, key: impl Fn(usize) -> u64) -> u32 {
        let words: &[u32; size_of::<Self>() / 4] = bytemuck::cast_ref(self);
        let mut sum = 0_u64;
        for at in 0..words.len() / 2 {
            let key = key(at);
            let low = words[2 * at].wrapping_add(key as u32) as u64;
            let high = words[2 * at + 1].wrapping_add((key >> 32) as u32) as u64;
            sum = sum.wrapping_add(low * high);
        }
        mix(sum)
    }
}

/// The last step of such a hash.
#[inline(always)]
pub(crate) const fn mix(sum: u64) -> u32 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mixed = (sum ^ sum >> 32).wrapping_mul(ODD);
    ((mixed ^ mixed >> 29).wrapping_mul(ODD) >> 32) as u32
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "the marker that aya asks for")]
mod user {
    // SAFETY: `#[repr(C)]` and `bytemuck::Pod`: any bytes are a valid value, and there is no padding.
    unsafe impl aya::Pod for super::Tuple {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Address {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().expect("a literal").into()
    }

    #[test]
    fn both_families_survive_the_round_trip() {
        for text in ["192.0.2.1", "0.0.0.0", "2001:db8::1", "::1"] {
            let parsed: IpAddr = text.parse().expect("a literal");
            assert_eq!(IpAddr::from(Address::from(parsed)), parsed);
        }
    }

    #[test]
    fn loopback_is_the_whole_of_127_and_only_one_of_v6() {
        assert!(address("127.0.0.1").is_loopback() && address("127.9.8.7").is_loopback());
        assert!(address("::1").is_loopback());
        assert!(!address("128.0.0.1").is_loopback() && !address("::2").is_loopback());
    }

    #[test]
    fn unicast_excludes_what_no_single_host_has() {
        for text in ["0.0.0.0", "224.0.0.1", "255.255.255.255", "::", "ff02::1"] {
            assert!(!address(text).is_unicast(), "{text}");
        }
        for text in [
            "10.0.0.1",
            "223.255.255.255",
            "fe80::1",
            "::1",
            "2001:db8::1",
        ] {
            assert!(address(text).is_unicast(), "{text}");
        }
    }

    #[test]
    fn link_local_is_fe80_10_alone() {
        assert!(address("fe80::1").is_link_local() && address("febf::1").is_link_local());
        assert!(!address("fec0::1").is_link_local() && !address("169.254.0.1").is_link_local());
    }

    /// Of conversations that differ in nothing but the client's port, as many have the same source port as would by chance.
    #[test]
    fn hashes_of_neighbours_are_spread() {
        for seed in 1..50_u64 {
            let key = |at: usize| {
                let x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + at as u64;
                x.wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ x >> 31
            };
            let mut tuple = Tuple {
                source: address("127.0.0.1"),
                destination: address("127.0.0.1"),
                source_port: 0,
                destination_port: 8080_u16.to_be(),
                protocol: TCP.into(),
            };
            let mut taken = [0_u8; 28_000];
            for port in 0..28_000_u16 {
                tuple.source_port = port.to_be();
                taken[((u64::from(tuple.hash(key)) * 28_000) >> 32) as usize] += 1;
            }
            let free = taken.iter().filter(|&&count| count == 0).count();
            let most = taken.iter().max();
            // By chance 1/e of them, 10,300 with a deviation of 52.
            assert!((9800..10_800).contains(&free), "seed {seed}: {free} free");
            assert!(most < Some(&12), "seed {seed}: {most:?} on one");
        }
    }
}
