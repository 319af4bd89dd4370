//! Frames whose IP header has options, or is followed by IPv6's destination options.

use crate::{fragment::fix_header_checksum, frame::Frame};

/// A no operation three times and the end of the list; padding of six octets.
pub const IGNORED: [&[u8]; 2] = [&[1, 1, 1, 0], &[1, 4, 0, 0, 0, 0]];
/// A router alert (RFC 2113), and an option for experiments (RFC 4727).
pub const HEEDED: [&[u8]; 2] = [&[0x94, 4, 0, 0], &[0x1e, 4, 0, 0, 0, 0]];

/// The one of the frame's family.
#[must_use]
pub fn of<'a>(frame: &Frame, options: [&'a [u8]; 2]) -> &'a [u8] {
    options[usize::from(!frame.source.is_ipv4())]
}

/// The frame with options: of an IPv4 header in words, and of IPv6's destination options all but the first two octets.
#[must_use]
pub fn with_options(frame: &Frame, options: &[u8]) -> Vec<u8> {
    insert(frame.bytes(), options)
}

/// The same of a frame's bytes.
#[must_use]
pub fn insert(mut bytes: Vec<u8>, options: &[u8]) -> Vec<u8> {
    let is_v4 = bytes[12] == 0x08;
    let (l4, length) = if is_v4 { (34, 16) } else { (54, 18) };
    let header = if is_v4 {
        vec![]
    } else {
        vec![bytes[20], (options.len() / 8) as u8]
    };
    let header = [&header, options].concat();
    let longer = u16::from_be_bytes([bytes[length], bytes[length + 1]]) + header.len() as u16;
    bytes[length..length + 2].copy_from_slice(&longer.to_be_bytes());
    if is_v4 {
        bytes[14] += (header.len() / 4) as u8;
    } else {
        bytes[20] = 60;
    }
    let after = l4 + header.len();
    bytes.splice(l4..l4, header);
    if is_v4 {
        fix_header_checksum(&mut bytes[14..after]);
    }
    bytes
}
