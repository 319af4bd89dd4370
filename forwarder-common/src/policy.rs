//! What a publish may be used for at most, as people say it and as the program reads it.

use bytemuck::{Pod, Zeroable};

/// The limits of a publish; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Flows at once. Those that are not proven do not count, or forged handshakes would use it up.
    pub flows: u64,
    /// New flows a second, of all sources. As many as are due in 50 ms may begin at once, but at least five.
    pub new_flows: u32,
    /// New flows a second of one source: an IPv4 address, or an IPv6 network of 64 bits. As many at once as above.
    pub new_flows_by_source: u32,
    /// Bits a second to the backend and to the client, link headers included. As many as are due in 250 ms may pass at
    /// once, but at least 256 KiB.
    pub bits: [u64; 2],
    /// The device that clients come by: that which has this host's addresses there, or the one that packets enter by.
    pub ifindex: u32,
}

/// What the program counts time in: a sixteenth of a nanosecond. The price of a short packet on a fast link has no more than
/// a few nanoseconds.
pub const UNITS_PER_NANOSECOND: u64 = 16;
const SECOND: u64 = 1_000_000_000 * UNITS_PER_NANOSECOND;

/// At most one each `interval`, and so many more at once as `burst` has intervals; an interval of 0 is no limit. In units.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Pace {
    pub interval: u64,
    pub burst: u64,
}

impl Pace {
    /// So many a second.
    pub const fn per_second(count: u32) -> Self {
        if count == 0 {
            return Self {
                interval: 0,
                burst: 0,
            };
        }
        const LEAST: u64 = 5;
        let interval = SECOND / count as u64;
        let due = count as u64 / 20;
        let most = if due > LEAST { due } else { LEAST };
        Self {
            interval,
            burst: interval * (most - 1),
        }
    }
}

/// A value of `LIMITS`: what [`Limits`] says, and how much of that is used up.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Policy {
    pub flows: u64,
    pub new_flows: Pace,
    pub new_flows_by_source: Pace,
    /// Bits a second in each direction.
    pub bits: [u64; 2],
    /// How far ahead of its time a packet may come in each direction, in units.
    pub bits_burst: [u64; 2],
    /// When the next new flow would be due.
    pub next_flow: u64,
    /// When the next packet would be due in each direction.
    pub next_packet: [u64; 2],
    pub ifindex: u32,
    pub reserved: u32,
}

const _: () = assert!(size_of::<Policy>() == 104);

/// What a publish may carry at once. TCP on a short way sends that much, loses what follows and is silent until it sends again,
/// at the earliest after 200 ms (`TCP_RTO_MIN` in include/net/tcp.h): what is due in less time than that would be lost to it.
const AT_ONCE: u64 = SECOND / 4;
/// The same in octets, however slow the pace is: a few merged segments of 64 KiB.
const LEAST_OCTETS: u64 = 256 << 10;

impl From<&Limits> for Policy {
    fn from(limits: &Limits) -> Self {
        let burst = |bits| {
            let least = time_of(LEAST_OCTETS, bits);
            least.max(AT_ONCE)
        };
        Self {
            flows: limits.flows,
            new_flows: Pace::per_second(limits.new_flows),
            new_flows_by_source: Pace::per_second(limits.new_flows_by_source),
            bits: limits.bits,
            bits_burst: limits.bits.map(burst),
            ifindex: limits.ifindex,
            ..Self::default()
        }
    }
}

/// How long so many octets take at so many bits a second, in units; 0 without a limit.
#[inline(always)]
pub const fn time_of(octets: u64, bits: u64) -> u64 {
    if bits == 0 {
        return 0;
    }
    octets * (8 * SECOND) / bits
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "the marker that aya asks for")]
mod user {
    // SAFETY: `#[repr(C)]` and `bytemuck::Pod`: any bytes are a valid value, and there is no padding.
    unsafe impl aya::Pod for super::Policy {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paces_are_those_that_were_asked_for() {
        for count in [1, 3, 1000, 100_000, 1_000_000] {
            let pace = Pace::per_second(count);
            let error = SECOND.abs_diff(pace.interval * u64::from(count));
            assert!(error * 1000 < SECOND, "{count}");
        }
        assert_eq!(Pace::per_second(0).interval, 0);
        assert_eq!(Pace::per_second(1).burst, 4 * SECOND);
        assert_eq!(Pace::per_second(1000).burst, 49 * SECOND / 1000);
    }

    #[test]
    fn short_and_long_packets_take_their_time_on_slow_and_fast_links() {
        assert_eq!(time_of(125, 1000), SECOND);
        assert_eq!(time_of(64, 100_000_000_000), 81); // 5.12 ns
        // The greatest that the kernel merges, of the slowest pace, is no overflow.
        assert_eq!(time_of(512 << 10, 8000), 524 * SECOND + 288 * SECOND / 1000);
    }
}
