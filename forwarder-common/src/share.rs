//! What part of the flow table a source has: an element of `SHARES`, and which of them a source counts in. An IPv6 source is its
//! /64, out of which one machine has as many addresses as it likes (RFC 4291 section 2.5.4).

use bytemuck::{Pod, Zeroable};

use crate::{
    layout::layout,
    limits,
    tuple::{Address, mix},
};

/// The element that counts the entries of all sources.
pub const ALL: u32 = limits::SHARES;
/// The element that counts aliases, in `HALF_OPEN` as well: each that is made enters, and those that have gone leave when a walk
/// over both tables has not met them. While it holds none, no alias is looked for.
pub const ALIASES: u32 = ALL + 1;
/// How many elements there are.
pub const COUNT: u32 = ALIASES + 1;

/// An element of `SHARES`. Both fields only grow, by atomic additions of the program and of user space.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Share {
    /// Entries that were put into `FLOWS`.
    pub entered: u64,
    /// Of these, those that are not there any more.
    pub left: u64,
}

const _: () = assert!(size_of::<Share>() == 16);

layout!(Share: entered, left);

impl Share {
    /// Entries that are there.
    #[inline(always)]
    pub const fn held(self) -> u64 {
        let held = self.entered.wrapping_sub(self.left);
        if held > i64::MAX as u64 { 0 } else { held }
    }
}

/// Which element counts a source, by the keys that source ports are chosen with. Others may count there too: nobody can foresee
/// who, and of a thousand sources one shares with one of the sixteen that may have the most.
#[inline(always)]
pub fn index(source: &Address, key: impl Fn(usize) -> u64) -> u32 {
    let [a, b, c, d] = source.0;
    let (c, d) = if source.is_v4() { (c, d) } else { (0, 0) };
    let (first, second) = (key(3), key(4));
    let product = |low: u32, high: u32, key: u64| {
        let low = low.wrapping_add(key as u32) as u64;
        low * high.wrapping_add((key >> 32) as u32) as u64
    };
    let sum = product(a, b, first).wrapping_add(product(c, d, second));
    mix(sum) >> (u32::BITS - limits::SHARES.ilog2())
}

/// Whether a source may have one more entry of a table that has room for `most` and holds `all`. Above three quarters of it a
/// source may have a quarter of what is free: a sixteenth of the table there, and the less the fuller it is. However much a few
/// sources take, they leave room for the rest. A full table speaks for itself.
#[inline(always)]
pub const fn has_room(held: u64, all: u64, most: u64) -> bool {
    all * 4 < most * 3 || all >= most || held * 4 < most - all
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "the marker that aya asks for")]
mod user {
    // SAFETY: `#[repr(C)]` and `bytemuck::Pod`: any bytes are a valid value, and there is no padding.
    unsafe impl aya::Pod for super::Share {}
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    const KEYS: [u64; 5] = [
        0x9216_d5d9_8979_fb1b,
        0xd131_0ba6_98df_b5ac,
        0x2ffd_72db_d01a_dfb7,
        0xb8e1_afed_6a26_7e96,
        0xba7c_9045_f12c_7f99,
    ];

    fn of(address: &str) -> u32 {
        let address: IpAddr = address.parse().unwrap();
        index(&address.into(), |at| KEYS[at])
    }

    #[test]
    fn a_source_is_an_ipv4_address_or_an_ipv6_network() {
        assert_ne!(of("198.51.100.9"), of("198.51.100.10"));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1:2:3"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_ne!(of("0.0.0.0"), of("::"));
    }

    #[test]
    fn sources_are_spread_evenly() {
        let mut sources = [0; limits::SHARES as usize];
        for number in 0..4 * limits::SHARES {
            let source = Address::from_v4((0x0a00_0000 + number).to_be());
            sources[index(&source, |at| KEYS[at]) as usize] += 1;
        }
        let most = sources.iter().max().unwrap();
        assert!(*most < 24, "{most} of 4 on average");
    }

    #[test]
    fn a_source_has_a_sixteenth_at_three_quarters_and_less_above() {
        const MOST: u64 = 1 << 20;
        let limit = |all| (0..=MOST).find(|held| !has_room(*held, all, MOST));
        assert_eq!(limit(MOST / 4 * 3 - 1), None);
        assert_eq!(limit(MOST / 4 * 3), Some(MOST / 16));
        assert_eq!(limit(MOST / 8 * 7), Some(MOST / 32));
        assert_eq!(limit(MOST - 1), Some(1));
        assert_eq!(limit(MOST), None);
    }

    /// Each takes all that it may, in turn, after one has had all that there was below three quarters.
    #[test]
    fn greedy_sources_leave_room() {
        const MOST: u64 = 1 << 20;
        for sources in [1_u64, 15, 255] {
            let (mut held, mut all) = (0, MOST / 4 * 3);
            while has_room(held, all, MOST) {
                held += 1;
                all += sources;
            }
            let left = MOST.saturating_sub(all);
            assert!(left > MOST / 4 / (sources + 8), "{sources}: {left}");
        }
    }
}
