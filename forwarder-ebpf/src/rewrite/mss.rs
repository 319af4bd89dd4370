//! The greatest segment that a side of a TCP connection says it takes (RFC 9293 section 3.7.1), made no greater than the way
//! between the two carries. A rule of the firewall that does so is gone past, and some links tell nobody of their MTU.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};

use crate::{
    frame::header,
    parse::{Packet, TCP_CHECKSUM, TCP_LENGTH, Tcp},
};

/// Kinds of options (RFC 9293 section 3.2). The first has no length.
const NOTHING: u8 = 1;
const END: u8 = 0;
const MSS: u8 = 2;
/// Octets of the options at most, and how many are looked at before one is found.
const MOST: usize = 40;
const LOOKED_AT: usize = 8;

/// Lowers what a SYN or SYN-ACK says to what packets of `mtu` octets have room for.
// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
pub fn clamp(skb: *mut __sk_buff, packet: &Packet, mtu: u32) {
    let ctx = &TcContext::new(skb);
    let l4 = packet.l4();
    let headers = if packet.is_v4 { 40 } else { 60 };
    let most = mtu.saturating_sub(headers).min(u16::MAX as u32) as u16;
    let Some(tcp) = header::<Tcp>(ctx, l4) else {
        return;
    };
    // SAFETY: `header` checked the bounds; packed structs have no alignment.
    let length = (unsafe { (*tcp).data_offset } >> 4 << 2) as usize;
    let mut at = 0;
    for _ in 0..LOOKED_AT {
        if at > MOST - 4 || TCP_LENGTH + at + 4 > length {
            return;
        }
        // VERIFIER: by the helper, since a pointer that is computed would have to be compared each time that it is used.
        let Ok([kind, octets, high, low]) = ctx.load::<[u8; 4]>(l4 + TCP_LENGTH + at) else {
            return;
        };
        match kind {
            NOTHING => at += 1,
            END => return,
            MSS if octets == 4 => {
                let said = u16::from_be_bytes([high, low]);
                if said > most {
                    lower(ctx, l4, TCP_LENGTH + at + 2, [said, most]);
                }
                return;
            }
            _ if octets < 2 => return,
            _ => at += octets as usize,
        }
    }
}

/// Writes the value at `offset` behind the TCP header's start, and takes that into the checksum.
#[inline(always)]
fn lower(ctx: &TcContext, l4: usize, offset: usize, [said, most]: [u16; 2]) {
    if ctx.store(l4 + offset, &most.to_be_bytes(), 0).is_err() {
        return;
    }
    let mut words = [said.to_be(), most.to_be()];
    if offset & 1 != 0 {
        words = words.map(u16::swap_bytes); // it is the halves of two words
    }
    let [from, to] = words.map(u64::from);
    // A failure leaves a checksum that is wrong, and the SYN is sent again.
    let _ = ctx.l4_csum_replace(l4 + TCP_CHECKSUM, from, to, 2);
}
