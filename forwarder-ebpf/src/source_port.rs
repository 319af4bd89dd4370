//! Source ports of flows that cannot keep the client's own: which are tried, in which order. The order follows from the
//! conversation's original tuple, so that nearly all of its later packets find the flow by the first port; a flow that has
//! another is found by its alias.

use forwarder_common::tuple::Tuple;

use crate::{maps::KEYS, setting};

/// Set by the loader: ports that the kernel gives to no socket.
#[unsafe(no_mangle)]
static SNAT_FIRST: u16 = 0;
#[unsafe(no_mangle)]
static SNAT_PORTS: u32 = 0;

/// Of privileged ports, 512 and above were once for what asks for them by itself (rresvport(3)): a server that trusts such
/// a port goes on to see one, as with nf_nat (net/netfilter/nf_nat_core.c).
const PRIVILEGED: u16 = 1024;
const RESERVED: u16 = 512;

/// The ports of one conversation: the hash of its original tuple, and the client's own port.
#[derive(Clone, Copy)]
pub struct Ports {
    pub hash: u32,
    /// Wire order.
    pub client: u16,
}

impl Ports {
    /// `None` where there are none.
    #[inline(always)]
    pub fn of(original: &Tuple) -> Option<Self> {
        let client = original.source_port;
        let there_are = setting(&SNAT_PORTS) != 0 || u16::from_be(client) < PRIVILEGED;
        there_are.then(|| Self {
            hash: hash(original),
            client,
        })
    }

    /// The first, and how many there are.
    #[inline(always)]
    fn range(self) -> (u16, u32) {
        match u16::from_be(self.client) {
            0..RESERVED => (1, (RESERVED - 1) as u32),
            RESERVED..PRIVILEGED => (RESERVED, (PRIVILEGED - RESERVED) as u32),
            PRIVILEGED.. => (setting(&SNAT_FIRST), setting(&SNAT_PORTS)),
        }
    }

    /// The port to try, in wire order.
    #[inline(always)]
    pub fn nth(self, attempt: u32) -> u16 {
        let (first, ports) = self.range();
        if attempt == 0 && u16::from_be(self.client) < PRIVILEGED {
            return self.client;
        }
        // Each conversation's own row of ports, as if drawn at random: by steps of any size, those that are taken would
        // stand in rows too. The first needs no more mixing. A division would take longer than all else here.
        let mut drawn = self.hash;
        if attempt != 0 {
            drawn ^= attempt.wrapping_mul(0x9e37_79b1);
            drawn = (drawn ^ drawn >> 16).wrapping_mul(0x85eb_ca6b);
            drawn ^= drawn >> 13;
        }
        let offset = ((drawn as u64 * ports as u64) >> 32) as u32;
        first.wrapping_add(offset as u16).to_be()
    }
}

// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
fn hash(original: &Tuple) -> u32 {
    KEYS.get(0).map_or(0, |keys| original.hash(|at| keys[at]))
}
