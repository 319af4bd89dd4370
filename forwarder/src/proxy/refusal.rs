//! Why the proxy did not serve somebody, counted: for each publish, and for all of a runtime since its start.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A reason not to serve a connection or a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its source is not on the allow-list.
    NotAllowed,
    /// Its source is banned.
    Banned,
    /// The publish has as many conversations as it may have.
    FlowLimit,
    /// More begin than may.
    RateLimited,
    /// More begin of one source than may.
    SourceRateLimited,
    /// A datagram is more than the publish's bandwidth.
    BandwidthExceeded,
    /// No descriptors are left for the publish. A connection waits for some, a datagram is dropped.
    NoDescriptors,
    /// The publish has as many UDP flows as it may have.
    TooManyFlows,
    /// It has come by too many of our own publishes.
    Loop,
    /// No source port is left towards the backend.
    NoSourcePort,
}

impl Refusal {
    pub const ALL: [Self; 10] = [
        Self::NotAllowed,
        Self::Banned,
        Self::FlowLimit,
        Self::RateLimited,
        Self::SourceRateLimited,
        Self::BandwidthExceeded,
        Self::NoDescriptors,
        Self::TooManyFlows,
        Self::Loop,
        Self::NoSourcePort,
    ];

    /// As `stats` shows it, beside the reasons of the eBPF program.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotAllowed => "userland_not_allowed",
            Self::Banned => "userland_banned",
            Self::FlowLimit => "userland_flow_limit",
            Self::RateLimited => "userland_rate_limited",
            Self::SourceRateLimited => "userland_source_rate_limited",
            Self::BandwidthExceeded => "userland_bandwidth_exceeded",
            Self::NoDescriptors => "userland_no_descriptors",
            Self::TooManyFlows => "userland_too_many_flows",
            Self::Loop => "userland_loop",
            Self::NoSourcePort => "userland_no_source_port",
        }
    }
}

/// How often each was met.
#[derive(Debug, Default)]
pub(super) struct Refusals([AtomicU64; Refusal::ALL.len()]);

impl Refusals {
    pub(super) fn count(&self, why: Refusal) {
        self.0[why as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn get(&self, why: Refusal) -> u64 {
        self.0[why as usize].load(Relaxed)
    }
}
