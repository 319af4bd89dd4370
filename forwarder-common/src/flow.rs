//! A flow: one tracked conversation, found from either direction by the tuple after NAT
//! (client or SNAT source, backend).

use bytemuck::{Pod, Zeroable};

use crate::tuple::Address;

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

/// Bits of [`Flow::state`].
pub mod state {
    /// The backend's side has answered (TCP: with anything but a reset).
    pub const REPLIED: u32 = 1;
    /// The client's side has heard that: TCP acknowledged it, UDP spoke again.
    pub const ESTABLISHED: u32 = 1 << 1;
    pub const FIN_ORIGINAL: u32 = 1 << 2;
    pub const FIN_REPLY: u32 = 1 << 3;
    pub const RESET: u32 = 1 << 4;
    /// The client is on this host: only packets from `lo` belong to the original direction.
    pub const LOCAL_CLIENT: u32 = 1 << 8;
    /// In `FLOWS`. On an entry of `HALF_OPEN`: what was left behind there.
    pub const KEPT: u32 = 1 << 9;

    /// Everything that a new conversation on the same tuple starts without.
    pub const PROGRESS: u32 = REPLIED | ESTABLISHED | FIN_ORIGINAL | FIN_REPLY | RESET;
    pub const BOTH_FIN: u32 = FIN_ORIGINAL | FIN_REPLY;
}

/// A value of `FLOWS` and `HALF_OPEN`. Key: [`crate::tuple::Tuple`] from the client (or its SNAT source) to the
/// backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Flow {
    /// Who connected, before SNAT.
    pub client: Address,
    /// What it connected to, before DNAT.
    pub frontend: Address,
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
    /// Nanoseconds of `CLOCK_MONOTONIC`, of the newest packet, to the tick.
    pub last_seen: u64,
    /// Original direction, reply direction.
    pub packets: [u64; 2],
    /// Lengths of the packets as the program saw them, link header included.
    pub bytes: [u64; 2],
}

const _: () = assert!(size_of::<Flow>() == 104);

/// How long a flow may stay silent, in seconds; nf_conntrack's defaults
/// (Documentation/networking/nf_conntrack-sysctl.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub tcp_syn: u64,
    pub tcp_established: u64,
    pub tcp_fin: u64,
    pub tcp_time_wait: u64,
    pub tcp_reset: u64,
    pub udp: u64,
    pub udp_stream: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_syn: 60,
            tcp_established: 432_000,
            tcp_fin: 120,
            tcp_time_wait: 120,
            tcp_reset: 10,
            udp: 30,
            udp_stream: 120,
        }
    }
}

impl Timeouts {
    /// The silence, in seconds, after which a flow in `state` ends.
    pub const fn of(&self, protocol: u32, state: u32) -> u64 {
        if protocol != crate::tuple::TCP as u32 {
            return if state & state::REPLIED == 0 {
                self.udp
            } else {
                self.udp_stream
            };
        }
        if state & state::RESET != 0 {
            self.tcp_reset
        } else if state & state::BOTH_FIN == state::BOTH_FIN {
            self.tcp_time_wait
        } else if state & state::BOTH_FIN != 0 {
            self.tcp_fin
        } else if state & state::ESTABLISHED != 0 {
            self.tcp_established
        } else {
            self.tcp_syn
        }
    }
}

#[cfg(feature = "user")]
mod user {
    // SAFETY: `#[repr(C)]` and `bytemuck::Pod`: any bytes are a valid value, and there is no padding.
    unsafe impl aya::Pod for super::Flow {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tuple::{TCP, UDP};

    #[test]
    fn a_tcp_flow_gets_the_timeout_of_its_state() {
        let t = Timeouts::default();
        let tcp = |state| t.of(TCP.into(), state);
        assert_eq!(tcp(0), 60);
        assert_eq!(tcp(state::REPLIED), 60);
        assert_eq!(tcp(state::REPLIED | state::ESTABLISHED), 432_000);
        assert_eq!(tcp(state::ESTABLISHED | state::FIN_REPLY), 120);
        assert_eq!(tcp(state::ESTABLISHED | state::BOTH_FIN), 120);
        assert_eq!(tcp(state::ESTABLISHED | state::BOTH_FIN | state::RESET), 10);
    }

    #[test]
    fn a_udp_flow_lives_longer_once_answered() {
        let t = Timeouts::default();
        assert_eq!(t.of(UDP.into(), 0), 30);
        assert_eq!(t.of(UDP.into(), state::REPLIED), 120);
    }
}
