//! Options that whoever forwards a packet may ignore, as they say nothing: IPv4's end of the list and no operation (RFC 791
//! section 3.1), and padding in IPv6's destination options (RFC 8200 sections 4.2 and 4.6). All others are the host's stack's.

use super::linear;
use crate::frame::{Frame, header};

/// The first octet of an IPv4 header without options.
pub const NONE: u8 = 0x45;
/// Octets of options, in words: there are at most ten in IPv4's header.
pub(super) const MASK: u8 = 0x3c;
const WORDS: usize = 10;
/// All bits but the one by which no operation differs from the end of the list, in each of two options.
const SAYS_SOMETHING: u16 = 0xfefe;
/// IPv6's header, with the padding that it takes to be there at all. Linux takes no packet with more padding than that
/// (`ip6_parse_tlv` in net/ipv6/exthdrs.c).
pub(super) const PADDED: u8 = 8;
/// The kind of padding of several octets; one of zero is an octet of padding.
const SEVERAL: u8 = 1;

/// Stands beside [`PADDED`]: the octets are the kernel's own, see [`jumbo`].
pub(super) const JUMBO: u8 = 1;
/// The kind and length of the one option there (RFC 2675).
const JUMBO_PAYLOAD: u16 = 0xc204;

/// What follows IPv6's hop-by-hop options at `start`, if the kernel has put those there: the length of merged segments that are
/// too long for the header (BIG TCP; `struct hop_jumbo_hdr` in include/net/ipv6.h, before Linux 7). It takes them off again
/// where it cuts the segments apart.
#[inline(always)]
pub(super) fn jumbo(frame: &impl Frame, start: usize) -> Option<u8> {
    if !frame.is_merged() {
        return None;
    }
    linear(frame, start + PADDED as usize).ok()?;
    let words = header::<[u16; 4]>(frame, start)?;
    // SAFETY: `header` checked the bounds; fields are at even offsets of the frame.
    let [first, option, _, _] = unsafe { *words }.map(u16::from_be);
    (first as u8 == 0 && option == JUMBO_PAYLOAD).then_some((first >> 8) as u8)
}

/// How many octets of options the IPv4 header at `start` has, if they say nothing. `first` is its first octet.
#[inline(always)]
pub(super) fn v4(frame: &impl Frame, start: usize, first: u8) -> Option<u8> {
    let octets = (first & 0xf).checked_sub(NONE & 0xf)? << 2;
    let options = start + 20;
    if first >> 4 != 4 || linear(frame, options + octets as usize).is_err() {
        return None;
    }
    for word in 0..WORDS {
        if word * 4 >= octets as usize {
            break;
        }
        let word = header::<[u16; 2]>(frame, options + word * 4)?;
        // SAFETY: `header` checked the bounds; fields are at even offsets of the frame.
        let [a, b] = unsafe { *word };
        if (a | b) & SAYS_SOMETHING != 0 {
            return None;
        }
    }
    Some(octets)
}

/// What follows IPv6's destination options at `start`, if they say nothing.
#[inline(always)]
pub(super) fn v6(frame: &impl Frame, start: usize) -> Option<u8> {
    linear(frame, start + PADDED as usize).ok()?;
    let words = header::<[u16; 4]>(frame, start)?;
    // SAFETY: as above.
    let [first, a, b, c] = unsafe { *words }.map(|word| u64::from(u16::from_be(word)));
    let has_no_more_octets = first as u8 == 0;
    (has_no_more_octets && is_padding(a << 32 | b << 16 | c)).then_some((first >> 8) as u8)
}

/// Whether six octets of options are padding alone, of zeros.
#[inline(always)]
fn is_padding(octets: u64) -> bool {
    let (mut says_how_many, mut more) = (false, 0);
    for left in (0..6).rev() {
        let octet = (octets >> (8 * left)) as u8;
        if says_how_many {
            if octet > left {
                return false;
            }
            (says_how_many, more) = (false, octet);
        } else if more > 0 {
            if octet != 0 {
                return false;
            }
            more -= 1;
        } else if octet == SEVERAL {
            says_how_many = true;
        } else if octet != 0 {
            return false;
        }
    }
    !says_how_many
}
