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

/// Whether one that is due then may pass now.
const fn conforms(next: u64, now: u64, pace: Pace) -> bool {
    pace.interval == 0 || next.saturating_sub(now) <= pace.burst
}

/// Puts the next one off.
fn put_off(next: &mut u64, now: u64, pace: Pace) {
    *next = (*next).max(now) + pace.interval;
}

impl Account {
    /// In the units of paces; more than 0, which is before everything.
    fn now(&self) -> u64 {
        let elapsed = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        elapsed.saturating_mul(UNITS_PER_NANOSECOND)
    }

    /// Whether a source may begin one more now, which is then counted. What a source's own pace refuses takes nothing from
    /// the pace of all.
    fn begin(&self, source: IpAddr, now: u64, policy: &Policy) -> Result<(), Refusal> {
        let (all, each) = (policy.new_flows, policy.new_flows_by_source);
        let mut next = lock(&self.next_flow);
        if !conforms(*next, now, all) {
            return Err(Refusal::RateLimited);
        }
        if each.interval > 0 {
            let mut sources = lock(&self.next_by_source);
            if sources.len() >= SOURCES {
                sources.clear();
            }
            let next = sources.entry(network(source)).or_default();
            if !conforms(*next, now, each) {
                return Err(Refusal::SourceRateLimited);
            }
            put_off(next, now, each);
        }
        put_off(&mut next, now, all);
        Ok(())
    }

    /// How long so many octets are ahead of their time.
    fn carry(
        &self,
        direction: usize,
        octets: usize,
        now: u64,
        policy: &Policy,
        counts: impl Fn(u64) -> bool,
    ) -> u64 {
        let (bits, burst) = (policy.bits[direction], policy.bits_burst[direction]);
        let mut next = lock(&self.next_octets[direction]);
        let due = (*next).max(now);
        let ahead = (due - now).saturating_sub(burst);
        if counts(ahead) {
            *next = due + time_of(octets as u64, bits);
        }
        ahead
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
        if self.common.is_banned(source, self.publish) {
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
        let begun = if limits.flows > 0 && self.flows.load(Relaxed) >= limits.flows {
            Err(Refusal::FlowLimit)
        } else {
            let account = &self.used().account;
            account.begin(source, account.now(), &Policy::from(&limits))
        };
        begun.map_err(|why| self.refuse(why)).is_ok()
    }

    /// How long so many octets are ahead of their time; nothing without a limit. They are counted if `counts` says so of that.
    fn ahead(&self, direction: usize, octets: usize, counts: impl Fn(u64) -> bool) -> u64 {
        let limits = self.now().limits;
        if limits.bits[direction] == 0 {
            return 0;
        }
        let (account, policy) = (&self.used().account, Policy::from(&limits));
        account.carry(direction, octets, account.now(), &policy, counts)
    }

    /// Waits until octets of a stream are due.
    pub(super) async fn pace(&self, direction: usize, octets: usize) {
        let ahead = self.ahead(direction, octets, |_| true);
        if ahead > 0 {
            tokio::time::sleep(Duration::from_nanos(ahead / UNITS_PER_NANOSECOND)).await;
        }
    }

    /// Whether a datagram is due. What is dropped is not counted.
    pub(super) fn is_due(&self, direction: usize, octets: usize) -> bool {
        let is_due = |ahead| ahead == 0;
        if is_due(self.ahead(direction, octets, is_due)) {
            return true;
        }
        self.refuse(Refusal::BandwidthExceeded);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000 * UNITS_PER_NANOSECOND;

    fn policy(new_flows: u32, new_flows_by_source: u32) -> Policy {
        Policy::from(&Limits {
            new_flows,
            new_flows_by_source,
            ..Limits::default()
        })
    }

    /// Three are offered for each that is due.
    #[test]
    fn conversations_begin_at_the_pace_that_was_asked_for() {
        let source: IpAddr = "192.0.2.1".parse().expect("an address");
        for (rate, policy) in [1000, 100_000]
            .into_iter()
            .flat_map(|rate| [(rate, policy(rate, 0)), (rate, policy(0, rate))])
        {
            let account = Account::default();
            let step = SECOND / (3 * u64::from(rate));
            let times = (1..=6 * u64::from(rate)).map(|nth| nth * step);
            let begun = times.filter(|now| account.begin(source, *now, &policy).is_ok());
            let share = begun.count() as f64 / (f64::from(rate) * 2.05);
            assert!((0.99..1.01).contains(&share), "{rate}/s: {share}");
        }
    }

    #[test]
    fn what_one_source_may_not_takes_nothing_from_others() {
        let (account, policy) = (Account::default(), policy(1000, 1));
        let begun = |source: IpAddr| account.begin(source, SECOND, &policy).is_ok();
        let greedy = (0..1000).filter(|_| begun("192.0.2.1".parse().expect("an address")));
        assert_eq!(greedy.count(), 5);
        for other in 1..=40 {
            assert!(begun(IpAddr::from([198, 51, 100, other])), "{other}");
        }
    }

    #[test]
    fn of_datagrams_that_come_at_once_no_more_pass_than_are_due() {
        let policy = Policy::from(&Limits {
            bits: [80_000_000; 2],
            ..Limits::default()
        });
        let account = Account::default();
        let is_due = |ahead| ahead == 0;
        let send = |direction| {
            let sent = (0..10_000)
                .filter(|_| is_due(account.carry(direction, 1000, SECOND, &policy, is_due)));
            sent.count()
        };
        let passed = std::thread::scope(|scope| {
            let senders = [0; 4].map(|direction| scope.spawn(move || send(direction)));
            senders
                .map(|it| it.join().expect("sent"))
                .iter()
                .sum::<usize>()
        });
        // What is due in 250 ms, and the first.
        assert_eq!(passed, 2_500_000 / 1000 + 1);
    }
}
