//! Internet checksum arithmetic (RFC 1071, RFC 1624), on words in wire order: the one's complement
//! sum does not depend on byte order.

use crate::tuple::Address;

/// One's complement sum of two 32-bit words.
#[inline(always)]
pub const fn add(a: u32, b: u32) -> u32 {
    let sum = a as u64 + b as u64;
    (sum as u32).wrapping_add((sum >> 32) as u32)
}

/// The change of a sum when `old` becomes `new`: new + ~old.
#[inline(always)]
pub const fn difference(old: u32, new: u32) -> u32 {
    add(new, !old)
}

/// The change of a sum when one address takes another's place. For two IPv4 addresses the mapped
/// prefix cancels out.
#[inline(always)]
pub const fn address_difference(old: Address, new: Address) -> u32 {
    if new.is_v4() {
        difference(old.v4(), new.v4())
    } else {
        let a = add(
            difference(old.0[0], new.0[0]),
            difference(old.0[1], new.0[1]),
        );
        let b = add(
            difference(old.0[2], new.0[2]),
            difference(old.0[3], new.0[3]),
        );
        add(a, b)
    }
}

/// A 32-bit sum folded to 16 bits.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    ((once & 0xffff) + (once >> 16)) as u16
}

/// A header checksum after its data changed by `difference` (RFC 1624, equation 3).
#[inline(always)]
pub const fn update(checksum: u16, difference: u32) -> u16 {
    !fold(add(!checksum as u32 & 0xffff, difference))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use proptest::prelude::*;
    use std::vec::Vec;

    use super::*;

    fn full(words: &[u32]) -> u16 {
        !fold(words.iter().fold(0, |sum, word| add(sum, *word)))
    }

    proptest! {
        #[test]
        fn an_update_equals_the_sum_from_scratch(mut words in proptest::collection::vec(any::<u32>(), 1..10), at in 0_usize..10, new in any::<u32>()) {
            let at = at % words.len();
            let before = full(&words);
            let change = difference(words[at], new);
            words[at] = new;
            let rest: Vec<u32> = words.clone();
            // 0x0000 and 0xffff are the same number in one's complement (RFC 1624 section 3).
            let (got, want) = (update(before, change), full(&rest));
            prop_assert!(got == want || (got ^ want) == 0xffff && (got == 0 || want == 0));
        }
    }

    #[test]
    fn the_example_of_rfc_1624() {
        // Section 4: HC = 0xdd2f, m = 0x5555, m' = 0x3285 gives 0x0000.
        assert_eq!(update(0xdd2f, difference(0x5555, 0x3285)), 0x0000);
    }
}
