//! Datagrams in parts (RFC 791, RFC 8200 section 4.5), cut and put together.

use crate::frame::Frame;

/// Cuts a datagram into `N` parts that have an identification in common: 24 octets of what is behind the IP header in
/// each, and the rest in the last.
///
/// # Panics
/// There is not so much.
pub fn cut<const N: usize>(frame: &Frame, id: u32) -> [Vec<u8>; N] {
    const CUT: usize = 24;
    let whole = frame.bytes();
    let v4 = frame.source.is_ipv4();
    let l4 = if v4 { 34 } else { 54 };
    std::array::from_fn(|number| {
        let start = l4 + number * CUT;
        let more = number + 1 < N;
        let data = if more {
            &whole[start..start + CUT]
        } else {
            &whole[start..]
        };
        let mut part = whole[..l4].to_vec();
        let offset = (number * CUT) as u16;
        if v4 {
            part[16..18].copy_from_slice(&(20 + data.len() as u16).to_be_bytes());
            part[18..20].copy_from_slice(&(id as u16).to_be_bytes());
            let field = offset >> 3 | u16::from(more) << 13;
            part[20..22].copy_from_slice(&field.to_be_bytes());
            fix_header_checksum(&mut part[14..34]);
        } else {
            part[18..20].copy_from_slice(&(8 + data.len() as u16).to_be_bytes());
            let next = std::mem::replace(&mut part[20], 44);
            part.extend([next, 0]);
            part.extend((offset | u16::from(more)).to_be_bytes());
            part.extend(id.to_be_bytes());
        }
        part.extend(data);
        part
    })
}

/// The datagram that all its parts make, as the receiver puts it together.
///
/// # Panics
/// They are none.
pub fn put_together(v4: bool, parts: &[Vec<u8>]) -> Frame {
    let (l4, headers) = if v4 { (34, 34) } else { (54, 62) };
    let mut whole = parts[0][..l4].to_vec();
    if !v4 {
        whole[20] = parts[0][l4];
    }
    for part in parts {
        whole.extend(&part[headers..]);
    }
    let length = whole.len() as u16;
    if v4 {
        whole[16..18].copy_from_slice(&(length - 14).to_be_bytes());
        whole[20..22].fill(0);
        fix_header_checksum(&mut whole[14..34]);
    } else {
        whole[18..20].copy_from_slice(&(length - 54).to_be_bytes());
    }
    Frame::parse(&whole).expect("a datagram whose parts were translated alike")
}

/// Sets the checksum of an IPv4 header.
///
/// # Panics
/// It is none.
pub fn fix_header_checksum(ip: &mut [u8]) {
    ip[10..12].fill(0);
    let header = etherparse::Ipv4HeaderSlice::from_slice(ip).expect("an IPv4 header");
    let sum = header.to_header().calc_header_checksum();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
}
