//! Source ports of flows that cannot keep the client's own: which are tried, in which order. The order follows from the
//! conversation's original tuple, so that its later packets find the flow by trying the same ports: no table of such
//! flows, and no entry that outlives its flow.

use forwarder_common::{limits, tuple::Tuple};

use crate::{
    maps::{KEYS, TRIES},
    setting,
};

/// Set by the loader: ports that the kernel gives to no socket.
#[unsafe(no_mangle)]
static SNAT_FIRST: u16 = 0;
#[unsafe(no_mangle)]
static SNAT_PORTS: u32 = 0;

/// The ports of one conversation: the hash of its original tuple.
#[derive(Clone, Copy)]
pub struct Ports(pub u32);

impl Ports {
    /// `None` where there are none.
    #[inline(always)]
    pub fn of(original: &Tuple) -> Option<Self> {
        let keys = KEYS.get(0)?;
        (setting(&SNAT_PORTS) != 0).then(|| Self(original.hash(|at| keys[at])))
    }

    /// The port to try, in wire order.
    #[inline(always)]
    pub fn nth(self, attempt: u32) -> u16 {
        let ports = setting(&SNAT_PORTS);
        // A division would take longer than all else here.
        let mut offset = ((self.0 as u64 * ports as u64) >> 32) as u32;
        if attempt != 0 {
            // Each conversation's own step: with one for all, ports that are taken would stand in rows. It is of
            // bits that say nothing of where it begins.
            let step = attempt.wrapping_mul(self.0 & 0xffff | 1);
            // `of` has made sure that there are some.
            offset = offset.wrapping_add(step) % ports.max(1);
        }
        setting(&SNAT_FIRST).wrapping_add(offset as u16).to_be()
    }

    /// How many ports flows of this hash may have: 0 for most conversations, which have the client's.
    #[inline(always)]
    pub fn tries(self) -> u32 {
        TRIES
            .get(self.0 % limits::TRIES)
            .copied()
            .unwrap_or_default()
    }

    /// Has later packets try this port too.
    #[inline(always)]
    pub fn remember(self, attempt: u32) {
        let tries = attempt + 1;
        if let Some(most) = TRIES.get_ptr_mut(self.0 % limits::TRIES) {
            // SAFETY: an element of an array is there for as long as the map.
            // RACE: two flows of one hash at once: the smaller number may stay. The other flow's next packet does not
            // find it, and begins again if it may.
            unsafe {
                if *most < tries {
                    *most = tries;
                }
            }
        }
    }
}
