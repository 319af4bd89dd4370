//! Who may begin a conversation, and how fast it goes: the twin of the program's `admit.rs` and `limit.rs`.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use forwarder_common::policy::{Limits, Pace, Policy, UNITS_PER_NANOSECOND, time_of};

use super::{Refusal, shared::Shared};

/// Sources that are remembered at once. More, and all are forgotten.
const SOURCES: usize = 32_768;

/// What of a publish's limits is used up.
#[derive(Debug)]
pub(super) struct Account {
    began: Instant,
    next_flow: Mutex<u64>,
    next_by_source: Mutex<HashMap<IpAddr, u64>>,
    /// To the backend, and to the client.
    next_octets: [Mutex<u64>; 2],
}

impl Default for Account {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            next_flow: Mutex::default(),
            next_by_source: Mutex::default(),
            next_octets: Default::default(),
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether one more is due, which is then counted.
fn passes(next: &mut u64, now: u64, pace: Pace) -> bool {
    if pace.interval == 0 {
        return true;
    }
    let due = (*next).max(now);
    if due - now > pace.burst {
        return false;
    }
    *next = due + pace.interval;
    true
}

impl Account {
    /// In the units of paces; more than 0, which is before everything.
    fn now(&self) -> u64 {
        let elapsed = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        elapsed.saturating_mul(UNITS_PER_NANOSECOND)
    }
}

/// An IPv4 address, or an IPv6 network of 64 bits.
fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) >> 64 << 64).into(),
        v4 => v4,
    }
}

impl Shared {
    /// Whether a source may be served at all.
    pub(super) fn allows(&self, source: IpAddr) -> bool {
        let source = source.to_canonical();
        if self.common.is_banned(source, self.options.publish) {
            self.refuse(Refusal::Banned);
            return false;
        }
        let now = self.now();
        let allow = &now.allow;
        let allowed = allow.is_empty() || allow.iter().any(|network| network.contains(&source));
        if !allowed {
            self.refuse(Refusal::NotAllowed);
        }
        allowed
    }

    /// Whether a source, which is allowed, may begin a conversation now.
    pub(super) fn may_begin(&self, source: IpAddr) -> bool {
        let limits = self.now().limits;
        if limits == Limits::default() {
            return true;
        }
        let (policy, account) = (Policy::from(&limits), &self.account);
        let now = account.now();
        let why = if limits.flows > 0 && self.flows.load(Relaxed) >= limits.flows {
            Refusal::FlowLimit
        } else if !passes(&mut lock(&account.next_flow), now, policy.new_flows) {
            Refusal::RateLimited
        } else if policy.new_flows_by_source.interval > 0 {
            let mut sources = lock(&account.next_by_source);
            if sources.len() >= SOURCES {
                sources.clear();
            }
            let next = sources.entry(network(source)).or_default();
            if passes(next, now, policy.new_flows_by_source) {
                return true;
            }
            Refusal::SourceRateLimited
        } else {
            return true;
        };
        self.refuse(why);
        false
    }

    /// How long so many octets are ahead of their time; nothing without a limit. They are counted.
    fn ahead(&self, direction: usize, octets: usize) -> u64 {
        let limits = self.now().limits;
        let bits = limits.bits[direction];
        if bits == 0 {
            return 0;
        }
        let burst = Policy::from(&limits).bits_burst[direction];
        let now = self.account.now();
        let mut next = lock(&self.account.next_octets[direction]);
        let due = (*next).max(now);
        *next = due + time_of(octets as u64, bits);
        (due - now).saturating_sub(burst)
    }

    /// Waits until octets of a stream are due.
    pub(super) async fn pace(&self, direction: usize, octets: usize) {
        let ahead = self.ahead(direction, octets);
        if ahead > 0 {
            tokio::time::sleep(Duration::from_nanos(ahead / UNITS_PER_NANOSECOND)).await;
        }
    }

    /// Whether a datagram is due.
    pub(super) fn is_due(&self, direction: usize, octets: usize) -> bool {
        let before = *lock(&self.account.next_octets[direction]);
        if self.ahead(direction, octets) == 0 {
            return true;
        }
        // What is dropped is not counted.
        *lock(&self.account.next_octets[direction]) = before;
        self.refuse(Refusal::BandwidthExceeded);
        false
    }
}
