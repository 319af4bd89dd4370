//! A flow: one tracked conversation, found from either direction by the tuple after NAT
//! (client or SNAT source, backend).

use core::mem::offset_of;

use bytemuck::{Pod, Zeroable};

use crate::{
    layout::layout,
    tuple::{Address, Tuple},
};

/// How a packet leaves towards somebody.
pub mod delivery {
    /// Not resolved: the slow path serves it.
    pub const NONE: u32 = 0;
    /// Into the other end of a veth pair: MAC set, `bpf_redirect_peer`.
    pub const PEER: u32 = 1;
    /// Out of a device whose far end has a known MAC (a VM's tap on a bridge): `bpf_redirect`.
    pub const DEVICE: u32 = 2;
    /// By the kernel's own neighbour resolution: `bpf_redirect_neigh`.
    pub const NEIGHBOUR: u32 = 3;
    /// Up into the stack, for netfilter to see it.
    pub const STACK: u32 = 4;
}

/// Where packets for one side of a flow go out.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Hop {
    /// Host byte order; 0 when unresolved.
    pub ifindex: u32,
    /// Destination MAC, for `PEER` and `DEVICE`.
    pub mac: [u8; 6],
    /// Source MAC, for `PEER` and `DEVICE`: the gateway's.
    pub source_mac: [u8; 6],
    /// One of [`delivery`].
    pub delivery: u32,
}

const _: () = assert!(size_of::<Hop>() == 20);

/// Directions, as indices of what a flow keeps for each.
pub const ORIGINAL: usize = 0;
pub const REPLY: usize = 1;

/// Bits of [`Flow::state`].
pub mod state {
    /// The backend's side has answered (TCP: a SYN-ACK that acknowledges the client's SYN).
    pub const REPLIED: u32 = 1;
    /// The client's side has heard that: TCP acknowledged it, UDP spoke again.
    pub const ESTABLISHED: u32 = 1 << 1;
    /// The client has sent a FIN that counts.
    pub const FIN_ORIGINAL: u32 = 1 << 2;
    pub const FIN_REPLY: u32 = 1 << 3;
    pub const RESET: u32 = 1 << 4;
    /// The client's FIN was acknowledged.
    pub const FIN_ORIGINAL_ACKNOWLEDGED: u32 = 1 << 5;
    pub const FIN_REPLY_ACKNOWLEDGED: u32 = 1 << 6;
    /// The client has sent a SYN while this was established.
    pub const SYN_AGAIN: u32 = 1 << 7;
    /// The client is on this host: only packets from `lo` belong to the original direction.
    pub const LOCAL_CLIENT: u32 = 1 << 8;
    /// In `FLOWS`: proven, or from the beginning because the backend sees an address of this host. On an entry of `HALF_OPEN`: what was left behind there.
    pub const KEPT: u32 = 1 << 9;
    /// The client has gone on after a reset.
    pub const SPOKE_ORIGINAL: u32 = 1 << 10;
    pub const SPOKE_REPLY: u32 = 1 << 11;
    /// Another conversation has the tuple, one that does not come by a port of this host.
    pub const FOREIGN: u32 = 1 << 12;
    /// Not a flow, but where one is found whose source port is not the first of its conversation's. The key is the
    /// conversation's original tuple, and client and frontend stand for source and destination of the flow's key.
    pub const ALIAS: u32 = 1 << 13;

    /// TCP: begun in the midst of the connection, and settled when this is `ESTABLISHED`.
    pub const PICKED_UP: u32 = 1 << 14;

    /// Cut off, for both sides to hear: the program answers a segment of either by a reset, and carries nothing on.
    pub const CUT: u32 = 1 << 15;

    /// The client's side has sent a FIN that may have been guessed: it counts once the backend's has acknowledged it.
    pub const GUESSED_ORIGINAL: u32 = 1 << 16;
    pub const GUESSED_REPLY: u32 = 1 << 17;

    /// It is over, and does not count among its publish's flows any more, though it is still in `FLOWS` for stray segments.
    pub const OVER: u32 = 1 << 18;

    pub const BOTH_FIN: u32 = FIN_ORIGINAL | FIN_REPLY;
    pub const BOTH_GUESSED: u32 = GUESSED_ORIGINAL | GUESSED_REPLY;
    pub const BOTH_ACKNOWLEDGED: u32 = FIN_ORIGINAL_ACKNOWLEDGED | FIN_REPLY_ACKNOWLEDGED;
    pub const BOTH_SPOKE: u32 = SPOKE_ORIGINAL | SPOKE_REPLY;
    /// Everything that a new conversation on the same tuple starts without.
    pub const PROGRESS: u32 = REPLIED
        | ESTABLISHED
        | BOTH_FIN
        | RESET
        | BOTH_ACKNOWLEDGED
        | SYN_AGAIN
        | BOTH_SPOKE
        | PICKED_UP
        | BOTH_GUESSED;
    /// Of these, an established TCP connection of which nobody has taken leave has `ESTABLISHED` alone.
    pub const UNSETTLED: u32 = ESTABLISHED | BOTH_FIN | RESET | BOTH_GUESSED;
}

/// What the packets of one direction read and write of a flow, beside the addresses. What both directions need is in both
/// sides, and is the same there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Side {
    /// Wire order.
    pub client_port: u16,
    /// Wire order.
    pub frontend_port: u16,
    /// Index in `PUBLISHES`.
    pub publish: u32,
    /// Where replies go.
    pub back: Hop,
    /// Bits of [`state`].
    pub state: u32,
    /// TCP: the number that this side has acknowledged last, whether that can be or not; host byte order.
    pub acknowledged: u32,
    /// TCP: the number behind the last octet that this side has sent; host byte order.
    pub sent: u32,
    /// Nanoseconds of `CLOCK_MONOTONIC`, of the newest packet, to the tick.
    pub last_seen: u64,
    pub packets: u64,
    /// Lengths of the packets as the program saw them, link header included.
    pub bytes: u64,
}

const _: () = assert!(size_of::<Side>() == 64);

/// A value of `FLOWS` and `HALF_OPEN`. Key: [`crate::tuple::Tuple`] from the client (or its SNAT source) to the
/// backend.
///
/// It is laid out by who writes it, for two processors that carry a direction each: from Linux 6.1 on the kernel has values of
/// such tables begin 32 octets behind a cache line's begin (kernel/bpf/hashtab.c and memalloc.c: eight octets, 48 of the
/// element, and a key of 40), so that each side has a line of its own. One octet more, and an element would take 512.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Flow {
    /// Who connected, before SNAT.
    pub client: Address,
    /// What it connected to, before DNAT.
    pub frontend: Address,
    /// The client's.
    pub original: Side,
    /// The backend's.
    pub reply: Side,
}

const _: () = assert!(size_of::<Flow>() == 160);
const _: () = assert!(offset_of!(Flow, original) == 32 && offset_of!(Flow, reply) == 96);

layout!(
    Flow: client, frontend,
    original.client_port, original.frontend_port, original.publish, original.back, original.state, original.acknowledged,
    original.sent, original.last_seen, original.packets, original.bytes,
    reply.client_port, reply.frontend_port, reply.publish, reply.back, reply.state, reply.acknowledged, reply.sent,
    reply.last_seen, reply.packets, reply.bytes
);

impl Flow {
    #[inline(always)]
    pub const fn side(&self, direction: usize) -> &Side {
        if direction == ORIGINAL {
            &self.original
        } else {
            &self.reply
        }
    }

    #[inline(always)]
    pub const fn side_mut(&mut self, direction: usize) -> &mut Side {
        if direction == ORIGINAL {
            &mut self.original
        } else {
            &mut self.reply
        }
    }

    /// Bits of [`state`].
    #[inline(always)]
    pub const fn state(&self) -> u32 {
        self.original.state
    }

    #[inline(always)]
    pub const fn set_state(&mut self, state: u32) {
        self.original.state = state;
        self.reply.state = state;
    }

    /// The same flow in another state.
    #[must_use]
    pub const fn with_state(mut self, state: u32) -> Self {
        self.set_state(state);
        self
    }

    /// Index in `PUBLISHES`.
    #[inline(always)]
    pub const fn publish(&self) -> u32 {
        self.original.publish
    }

    #[inline(always)]
    pub const fn set_publish(&mut self, index: u32) {
        self.original.publish = index;
        self.reply.publish = index;
    }

    /// Where replies go.
    #[inline(always)]
    pub const fn back(&self) -> &Hop {
        &self.original.back
    }

    /// The client's and the frontend's, wire order.
    #[inline(always)]
    pub const fn ports(&self) -> (u16, u16) {
        (self.original.client_port, self.original.frontend_port)
    }

    #[inline(always)]
    pub const fn set_ports(&mut self, client: u16, frontend: u16) {
        (self.original.client_port, self.original.frontend_port) = (client, frontend);
        (self.reply.client_port, self.reply.frontend_port) = (client, frontend);
    }

    /// Nanoseconds of `CLOCK_MONOTONIC`, of the newest packet, to the tick.
    #[inline(always)]
    pub const fn last_seen(&self) -> u64 {
        let (original, reply) = (self.original.last_seen, self.reply.last_seen);
        if original > reply { original } else { reply }
    }

    /// By direction.
    pub const fn packets(&self) -> [u64; 2] {
        [self.original.packets, self.reply.packets]
    }

    /// By direction: lengths of the packets as the program saw them, link header included.
    pub const fn bytes(&self) -> [u64; 2] {
        [self.original.bytes, self.reply.bytes]
    }

    /// The conversation's tuple as the client sends it.
    #[inline(always)]
    pub const fn tuple(&self, protocol: u32) -> Tuple {
        let (source_port, destination_port) = self.ports();
        Tuple {
            source: self.client,
            destination: self.frontend,
            source_port,
            destination_port,
            protocol,
        }
    }

    /// Who has begun it, of an alias too.
    #[inline(always)]
    pub const fn source<'a>(&'a self, key: &'a Tuple) -> &'a Address {
        if self.state() & state::ALIAS == 0 {
            &self.client
        } else {
            &key.source
        }
    }

    /// What an alias and the flow that it leads to have in common, with the two keys' parts exchanged: of a flow its alias,
    /// of an alias its flow.
    #[must_use]
    pub const fn counterpart(&self, key: &Tuple) -> (Tuple, Self) {
        let mut flow = self.with_state(self.state() ^ state::ALIAS);
        (flow.client, flow.frontend) = (key.source, key.destination);
        flow.set_ports(key.source_port, key.destination_port);
        (self.tuple(key.protocol), flow)
    }
}

macro_rules! phases {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $seconds:literal;)*) => {
        /// What a flow is in the midst of: what nf_conntrack calls its state, and has a timeout for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Phase { $($(#[$doc])* $name,)* }

        impl Phase {
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The protocol and nf_conntrack's name, as in `tcp-time-wait`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }

        impl Default for Timeouts {
            /// nf_conntrack's (Documentation/networking/nf_conntrack-sysctl.rst).
            fn default() -> Self {
                Self([$($seconds,)*])
            }
        }
    };
}

phases! {
    TcpSynSent = "tcp-syn-sent", 120;
    TcpSynRecv = "tcp-syn-recv", 60;
    TcpEstablished = "tcp-established", 432_000;
    /// One side has sent a FIN.
    TcpFinWait = "tcp-fin-wait", 120;
    /// The other side has acknowledged that.
    TcpCloseWait = "tcp-close-wait", 60;
    /// Both have sent one.
    TcpLastAck = "tcp-last-ack", 30;
    /// Both were acknowledged.
    TcpTimeWait = "tcp-time-wait", 120;
    /// Reset.
    TcpClose = "tcp-close", 10;
    /// Nobody has answered.
    Udp = "udp", 30;
    UdpStream = "udp-stream", 120;
}

impl Phase {
    pub const fn of(protocol: u32, state: u32) -> Self {
        if protocol != crate::tuple::TCP as u32 {
            return if state & state::REPLIED != 0 {
                Self::UdpStream
            } else {
                Self::Udp
            };
        }
        if state & state::RESET != 0 {
            return Self::TcpClose;
        }
        match (state & state::BOTH_FIN, state & state::BOTH_ACKNOWLEDGED) {
            (state::BOTH_FIN, state::BOTH_ACKNOWLEDGED) => Self::TcpTimeWait,
            (state::BOTH_FIN, _) => Self::TcpLastAck,
            (0, _) if state & state::ESTABLISHED != 0 => Self::TcpEstablished,
            (0, _) if state & state::REPLIED != 0 => Self::TcpSynRecv,
            (0, _) => Self::TcpSynSent,
            (_, 0) => Self::TcpFinWait,
            _ => Self::TcpCloseWait,
        }
    }
}

/// Whether neither side has anything more to say: both have taken leave, or a reset that is believed has ended it. Of datagrams
/// nobody can tell.
#[inline(always)]
pub const fn is_over(protocol: u32, state: u32) -> bool {
    match Phase::of(protocol, state) {
        Phase::TcpTimeWait => true,
        Phase::TcpClose => state & state::BOTH_SPOKE == 0,
        _ => false,
    }
}

/// How long a flow may stay silent in each [`Phase`], in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts([u64; Phase::ALL.len()]);

impl Timeouts {
    pub const fn of(&self, phase: Phase) -> u64 {
        self.0[phase as usize]
    }

    /// In nanoseconds, by [`Phase`].
    pub fn nanoseconds(&self) -> [u64; Phase::ALL.len()] {
        self.0.map(|seconds| seconds.saturating_mul(1_000_000_000))
    }

    pub const fn set(&mut self, phase: Phase, seconds: u64) {
        self.0[phase as usize] = seconds;
    }
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "the marker that aya asks for")]
mod user {
    // SAFETY: `#[repr(C)]` and `bytemuck::Pod`: any bytes are a valid value, and there is no padding.
    unsafe impl aya::Pod for super::Flow {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tuple::{TCP, UDP};

    #[test]
    fn timeouts_are_nf_conntracks() {
        let t = Timeouts::default();
        let of = |protocol: u8, state| {
            let phase = Phase::of(protocol.into(), state);
            (phase.name(), t.of(phase))
        };
        let established = state::REPLIED | state::ESTABLISHED;
        let closed = established | state::BOTH_FIN | state::BOTH_ACKNOWLEDGED;
        for (state, phase) in [
            (0, ("tcp-syn-sent", 120)),
            (state::REPLIED, ("tcp-syn-recv", 60)),
            (established, ("tcp-established", 432_000)),
            (established | state::FIN_REPLY, ("tcp-fin-wait", 120)),
            (
                established | state::FIN_REPLY | state::FIN_REPLY_ACKNOWLEDGED,
                ("tcp-close-wait", 60),
            ),
            (established | state::BOTH_FIN, ("tcp-last-ack", 30)),
            (closed, ("tcp-time-wait", 120)),
            (closed | state::RESET, ("tcp-close", 10)),
        ] {
            assert_eq!(of(TCP, state), phase);
        }
        assert_eq!(of(UDP, 0), ("udp", 30));
        assert_eq!(of(UDP, state::REPLIED), ("udp-stream", 120));
    }

    #[test]
    fn each_timeout_can_be_set() {
        let mut t = Timeouts::default();
        for (seconds, phase) in (1..).zip(Phase::ALL) {
            t.set(*phase, seconds);
        }
        for (seconds, phase) in (1..).zip(Phase::ALL) {
            assert_eq!(t.of(*phase), seconds);
        }
    }
}
