//! Frames that nobody meant: frames of every kind with octets that were changed. Whatever they are, the program writes only
//! where addresses, ports, TTL and checksums are, and none becomes longer or shorter but what is answered by an error.
//! `fuzz/` looks for more of them.

use forwarder_tests::{
    fragment::cut,
    frame::{ACK, Frame, Protocol},
    icmp::IcmpError,
    options::{IGNORED, of, with_options},
};

use crate::bench::{Bench, LO, REDIRECT, SHOT, UNSPEC, at};

/// Client, frontend and backend.
const ENDS: [[&str; 3]; 2] = [
    ["198.51.100.9:4000", "198.51.100.2:8080", "172.31.0.2:80"],
    [
        "[2001:db8:100::9]:4000",
        "[2001:db8:100::2]:8080",
        "[fd00:31::2]:80",
    ],
];

/// Publishes what the frames are for, and begins a flow of each kind.
pub(crate) fn prepare(bench: &mut Bench) {
    for (index, (ends, protocol)) in kinds().enumerate() {
        let entry = bench.entry(8080, ends[2]);
        let frontend = at(ends[1]).ip().to_string();
        bench.publish_entry(1 + index as u32, Some(&frontend), protocol, 8080, &entry);
        let frame = Frame::first(protocol, at(ends[0]), at(ends[1]));
        bench.send(&frame, bench.uplink).forwarded();
    }
}

fn kinds() -> impl Iterator<Item = ([&'static str; 3], Protocol)> {
    ENDS.into_iter()
        .flat_map(|ends| [Protocol::Tcp, Protocol::Udp].map(|protocol| (ends, protocol)))
}

/// Frames of every kind that the program takes, of both directions.
pub(crate) fn frames() -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for (ends, protocol) in kinds() {
        let mut frame = Frame::first(protocol, at(ends[0]), at(ends[1]));
        frames.push(frame.bytes());
        frame.payload = (0..100).collect();
        let answer = Frame {
            source: at(ends[2]),
            ..frame.reply()
        };
        for frame in [frame.with_flags(ACK), answer] {
            frames.push(frame.bytes());
            frames.push(with_options(&frame, of(&frame, IGNORED)));
            frames.extend(cut::<3>(&frame, 7));
            let answered = Frame {
                source: if frame.source == at(ends[2]) {
                    at(ends[1])
                } else {
                    frame.source
                },
                destination: if frame.destination == at(ends[1]) {
                    at(ends[2])
                } else {
                    frame.destination
                },
                ..frame
            };
            frames.push(IcmpError::port_unreachable(&answered).bytes());
        }
    }
    frames
}

/// One of these with octets changed, and cut off or made longer.
pub(crate) fn changed(which: usize, length: usize, changes: &[(u16, u8)]) -> Vec<u8> {
    let frames = frames();
    let mut bytes = frames[which % frames.len()].clone();
    for (offset, value) in changes {
        // Mostly headers.
        let offset = usize::from(*offset) % bytes.len().min(110);
        bytes[offset] = *value;
    }
    match length {
        0 => {}
        length if length < 256 => bytes.truncate(length.max(14)),
        length => bytes.resize(bytes.len() + length % 2048, 0x5a),
    }
    bytes
}

/// Sends a frame through the program, and asserts what holds for every one.
#[track_caller]
pub(crate) fn check(bench: &Bench, bytes: &[u8]) {
    // The kernel runs no program on what has no whole IP header.
    if bytes.len() < 14 + 40 && bench.datapath.try_frame(bytes, LO, 0).is_err() {
        return;
    }
    for ifindex in [bench.uplink, bench.container, LO] {
        let outcome = bench.send_bytes(bytes, ifindex);
        let told = ["ttl_expired", "too_big"];
        match outcome.action {
            UNSPEC => assert_eq!(outcome.bytes, bytes, "{outcome:?}"),
            SHOT => assert_eq!(outcome.reasons.len(), 1, "{outcome:?}"),
            REDIRECT if outcome.reasons.iter().any(|reason| told.contains(reason)) => {
                let most = if bytes[12] == 0x08 { 576 } else { 1280 };
                assert!(outcome.bytes.len() <= 14 + most, "{outcome:?}");
                IcmpError::parse(&outcome.bytes)
                    .unwrap_or_else(|error| panic!("{error:#}: {bytes:02x?}: {outcome:02x?}"));
            }
            REDIRECT => {
                assert_eq!(outcome.bytes.len(), bytes.len(), "{outcome:?}");
                let writable = writable(bytes);
                for (at, (before, after)) in bytes.iter().zip(&outcome.bytes).enumerate() {
                    let may = writable.iter().any(|range| range.contains(&at));
                    assert!(
                        before == after || may,
                        "octet {at} of {bytes:02x?}: {outcome:02x?}"
                    );
                }
            }
            other => panic!("action {other}: {bytes:02x?}"),
        }
    }
}

/// What a translation may write of a frame that was forwarded, which therefore has the headers that it says.
fn writable(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let macs = 0..12;
    let mut ranges = vec![macs];
    let v4 = bytes[12] == 0x08;
    let (protocol, l4) = addresses(bytes, 14, v4, &mut ranges);
    let (protocol, l4) = match protocol {
        1 | 58 => {
            ranges.push(l4 + 2..l4 + 4);
            addresses(bytes, l4 + 8, v4, &mut ranges)
        }
        44 => (bytes[l4], l4 + 8),
        _ => (protocol, l4),
    };
    let later = match v4 {
        true => (u16::from_be_bytes([bytes[20], bytes[21]]) & 0x1fff) != 0,
        false => bytes[20] == 44 && (u16::from_be_bytes([bytes[56], bytes[57]]) & 0xfff8) != 0,
    };
    if !later {
        ranges.push(l4..l4 + 4);
        let checksum = l4 + if protocol == 6 { 16 } else { 6 };
        ranges.push(checksum..checksum + 2);
    }
    ranges
}

/// Of an IP header; returns what follows it, and where.
fn addresses(
    bytes: &[u8],
    l3: usize,
    v4: bool,
    ranges: &mut Vec<std::ops::Range<usize>>,
) -> (u8, usize) {
    if v4 {
        ranges.extend([l3 + 8..l3 + 9, l3 + 10..l3 + 20]);
        (bytes[l3 + 9], l3 + 4 * usize::from(bytes[l3] & 0xf))
    } else {
        ranges.extend([l3 + 7..l3 + 8, l3 + 8..l3 + 40]);
        match bytes[l3 + 6] {
            60 => (bytes[l3 + 40], l3 + 48),
            next => (next, l3 + 40),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, test_runner::TestRunner};

    use super::*;
    use crate::bench::bench;

    #[test]
    fn every_kind_of_frame_is_carried() {
        bench(|bench| {
            prepare(bench);
            let frames = frames();
            for bytes in &frames {
                check(bench, bytes);
            }
            let carried = frames.iter().filter(|bytes| {
                let outcomes = [bench.uplink, bench.container]
                    .map(|ifindex| bench.send_bytes(bytes, ifindex).action);
                outcomes.contains(&REDIRECT)
            });
            assert_eq!(carried.count(), frames.len());
        });
    }

    #[test]
    fn no_frame_makes_the_program_write_elsewhere() {
        bench(|bench| {
            prepare(bench);
            let config = ProptestConfig {
                cases: 2000,
                failure_persistence: None,
                ..ProptestConfig::default()
            };
            let length = prop_oneof![3 => Just(0_usize), 1 => 14..4000_usize];
            let changes = proptest::collection::vec(any::<(u16, u8)>(), 0..6);
            let mut runner = TestRunner::new(config);
            runner
                .run(
                    &(any::<usize>(), length, changes),
                    |(which, length, changes)| {
                        check(bench, &changed(which, length, &changes));
                        Ok(())
                    },
                )
                .unwrap();
        });
    }
}
