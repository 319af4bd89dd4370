//! Fragments: the first one's ports, remembered for the others, which have none. Only of datagrams that the
//! fast path carries: of all others the stack must get every part.

use forwarder_common::{reason::Reason, tuple::Tuple};

use crate::{
    maps::FRAGMENTS,
    parse::{Packet, Part},
};

/// What the parts of one datagram have in common (RFC 791 section 3.2, RFC 8200 section 4.5); the
/// identification stands where the ports would.
#[inline(always)]
fn key(packet: &Packet) -> Tuple {
    Tuple {
        source_port: packet.id as u16,
        destination_port: (packet.id >> 16) as u16,
        ..packet.tuple
    }
}

/// Gives a later fragment the ports of its first.
///
/// # Errors
/// `Fragment` if the first was not carried, or has not come yet.
#[inline(always)]
pub fn complete(packet: &mut Packet) -> Result<(), Reason> {
    if packet.part != Part::Later {
        return Ok(());
    }
    // SAFETY: values of this map are one word, replaced as a whole.
    let ports = *unsafe { FRAGMENTS.get(&key(packet)) }.ok_or(Reason::Fragment)?;
    packet.tuple.source_port = ports as u16;
    packet.tuple.destination_port = (ports >> 16) as u16;
    Ok(())
}

/// Remembers a first fragment that was carried.
#[inline(always)]
pub fn remember(packet: &Packet) {
    if packet.part == Part::First {
        let ports = packet.tuple.source_port as u32 | (packet.tuple.destination_port as u32) << 16;
        // Without it, the others go up the stack and the datagram is lost, as any may be.
        let _ = FRAGMENTS.insert(&key(packet), &ports, 0);
    }
}
