//! Rewrites a packet whose transport checksum is that of the packet, by arithmetic alone: there is no helper for it before
//! there is an skb. A checksum that a device would complete (CHECKSUM_PARTIAL) is the pseudo header's sum, and
//! nothing says so; a packet that looks like that is left alone.

use forwarder_common::{
    checksum,
    reason::Reason,
    tuple::{Address, TCP},
};

use super::{ipv4, ipv6, ports};
use crate::{
    frame::{Frame, header},
    parse::{Ipv4, Ipv6, L3, L4_V4, Packet},
};

/// Where a whole packet's transport checksum is, and that it can be updated.
#[derive(Clone, Copy)]
pub struct Complete {
    checksum: u16,
}

/// What [`Complete::tuple`] needs, if the packet's checksum is complete. One packet in 65,536 only looks as if it
/// were not.
#[inline(always)]
pub fn complete(frame: &impl Frame, packet: &Packet) -> Option<Complete> {
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let checksum = unsafe { header::<u16>(frame, packet.checksum())?.read_unaligned() };
    let length = if packet.is_v4 {
        let ip = header::<Ipv4>(frame, L3)?;
        // SAFETY: as above.
        u16::from_be(unsafe { (*ip).total_length }).wrapping_sub((L4_V4 - L3) as u16)
    } else {
        let ip = header::<Ipv6>(frame, L3)?;
        // SAFETY: as above.
        u16::from_be(unsafe { (*ip).payload_length })
    };
    let length = length.wrapping_sub(packet.options() as u16);
    let addresses = checksum::add(sum(packet.tuple.source), sum(packet.tuple.destination));
    let rest = (packet.protocol as u16).to_be() as u32 + length.to_be() as u32;
    let partial = checksum::fold(checksum::add(addresses, rest));
    (checksum != partial).then_some(Complete { checksum })
}

/// The sum of an address's words; IPv4's mapped prefix is none of it.
#[inline(always)]
fn sum(address: Address) -> u32 {
    if address.is_v4() {
        return address.v4();
    }
    let [a, b, c, d] = address.0;
    checksum::add(checksum::add(a, b), checksum::add(c, d))
}

impl Complete {
    /// As [`super::tuple`], one hop on.
    ///
    /// # Errors
    /// As there.
    #[inline(always)]
    pub fn tuple(self, frame: &impl Frame, packet: &Packet) -> Result<(), Reason> {
        let (old, new) = (&packet.tuple, &packet.new);
        let addresses = checksum::add(
            checksum::address_difference(old.source, new.source),
            checksum::address_difference(old.destination, new.destination),
        );
        if packet.is_v4 {
            let (source, destination) = (new.source.v4(), new.destination.v4());
            ipv4(frame, L3, source, destination, addresses, true)?;
        } else {
            ipv6(frame, new, true)?;
        }
        ports(frame, packet.l4(), new)?;
        if packet.protocol != TCP && self.checksum == 0 {
            return Ok(()); // none was made (RFC 768)
        }
        let ports = checksum::add(
            checksum::difference(old.source_port as u32, new.source_port as u32),
            checksum::difference(old.destination_port as u32, new.destination_port as u32),
        );
        let mut checksum = checksum::update(self.checksum, checksum::add(addresses, ports));
        if packet.protocol != TCP && checksum == 0 {
            checksum = 0xffff;
        }
        let field = header::<u16>(frame, packet.checksum()).ok_or(Reason::Unwritable)?;
        // SAFETY: `header` checked the bounds.
        unsafe { field.write_unaligned(checksum) };
        Ok(())
    }
}
