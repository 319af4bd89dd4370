//! Options that say nothing are carried along, in the kernel; packets with any other are the stack's.

use forwarder_common::{
    flow::{Hop, delivery},
    publish::Interface,
};
use forwarder_tests::{
    fragment::{cut, fix_header_checksum},
    frame::{ACK, Frame, Protocol},
    icmp::IcmpError,
    options::{HEEDED, IGNORED, insert, of, with_options},
};

use crate::bench::{Bench, Outcome, REDIRECT, UPLINK, XDP_TX, at, behind, bench};

const PORT: u16 = 8080;
/// Client, frontend, a container, and another machine.
const ENDS: [[&str; 4]; 2] = [
    [
        "198.51.100.9:4000",
        "198.51.100.2:8080",
        "172.31.0.2:80",
        "198.51.100.10:80",
    ],
    [
        "[2001:db8:100::9]:4000",
        "[2001:db8:100::2]:8080",
        "[fd00:31::2]:80",
        "[2001:db8:100::10]:80",
    ],
];
const MOST_V4: &[u8] = &[1; 40];

/// Runs a scenario with a client's first packet of each family and protocol, whose port is published.
fn everywhere(scenario: impl Fn(&mut Bench, &Frame) + Sync) {
    for [client, frontend, backend, _] in ENDS {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            bench(|bench| {
                bench.publish(protocol, PORT, backend);
                let mut frame = Frame::first(protocol, at(client), at(frontend));
                frame.payload = b"odd".to_vec();
                scenario(bench, &frame);
            });
        }
    }
}

/// Options of the frame's family that say nothing.
fn ignored(frame: &Frame) -> Vec<&'static [u8]> {
    if frame.source.is_ipv4() {
        vec![
            IGNORED[0],
            &[0; 4],
            &[1; 4],
            &[1, 1, 1, 1, 1, 0, 0, 0],
            MOST_V4,
        ]
    } else {
        vec![
            IGNORED[1],
            &[0; 6],
            &[0, 1, 3, 0, 0, 0],
            &[1, 0, 1, 2, 0, 0],
            &[1, 1, 0, 1, 1, 0],
            &[0, 0, 0, 0, 1, 0],
        ]
    }
}

/// The frame that was redirected, whose options are still there.
#[track_caller]
fn carried(outcome: Outcome, sent: &[u8], options: &[u8]) -> Frame {
    assert_eq!(outcome.bytes.len(), sent.len(), "{outcome:?}");
    let (length, start) = if sent[12] == 0x08 { (16, 34) } else { (18, 56) };
    assert_eq!(outcome.bytes[length..length + 2], sent[length..length + 2]);
    assert_eq!(&outcome.bytes[start..][..options.len()], options);
    outcome.forwarded()
}

#[test]
fn options_that_say_nothing_are_carried_both_ways() {
    everywhere(|bench, first| {
        for (number, options) in (0_u16..).zip(ignored(first)) {
            let mut first = first.clone();
            let by_port = |frame: &mut Frame| frame.source.set_port(5000 + number);
            by_port(&mut first);
            let sent = with_options(&first, options);
            let arrived = carried(bench.send_bytes(&sent, bench.uplink), &sent, options);
            // The same packet without them comes out alike.
            assert_eq!(arrived, bench.send(&first, bench.uplink).forwarded());
            let mut answer = arrived.reply();
            answer.payload = b"an answer".to_vec();
            let sent = with_options(&answer, options);
            let heard = carried(bench.send_bytes(&sent, bench.container), &sent, options);
            assert_eq!(heard.source, first.destination);
            assert_eq!(heard.destination, first.source);
            assert_eq!(heard.payload, answer.payload);
        }
    });
}

#[test]
fn other_options_are_the_stacks() {
    everywhere(|bench, first| {
        let others: &[&[u8]] = if first.source.is_ipv4() {
            &[
                HEEDED[0],
                &[1, 1, 1, 2],
                &[7, 7, 4, 0, 0, 0, 0, 0],
                &[0, 0, 0, 0, 0, 0, 0, 0x83],
            ]
        } else {
            // Padding of more than zeros, or of more than it takes, is none that a Linux host takes.
            &[
                HEEDED[1],
                &[1, 4, 0, 0, 0, 9],
                &[0, 0, 0, 0, 0, 1],
                &[1, 5, 0, 0, 0, 0],
                &[1, 0, 0x1e, 2, 0, 0],
                &[1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ]
        };
        for options in others {
            let sent = with_options(first, options);
            let outcome = bench.send_bytes(&sent, bench.uplink);
            outcome.passed(&sent, "options");
        }
        if !first.source.is_ipv4() {
            // Hop-by-hop options are every router's, whatever they say.
            let mut sent = with_options(first, IGNORED[1]);
            sent[20] = 0;
            let outcome = bench.send_bytes(&sent, bench.uplink);
            outcome.passed(&sent, "options");
        }
    });
}

/// A header that says that it is longer than the frame, and one that is shorter than a header can be.
#[test]
fn options_that_are_not_there_are_not_read() {
    bench(|bench| {
        bench.publish(Protocol::Udp, PORT, ENDS[0][2]);
        let mut frame = Frame::first(Protocol::Udp, at(ENDS[0][0]), at(ENDS[0][1]));
        frame.payload = vec![];
        for first in [0x4f, 0x44, 0x56] {
            let mut sent = frame.bytes();
            sent[14] = first;
            let outcome = bench.send_bytes(&sent, bench.uplink);
            outcome.passed(&sent, "options");
        }
    });
}

#[test]
fn xdp_carries_them_too() {
    for [client, frontend, _, backend] in ENDS {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            bench(|bench| {
                if !bench.publish_beside(protocol, PORT, backend) {
                    return;
                }
                let first = Frame::first(protocol, at(client), at(frontend));
                bench.send(&first, bench.uplink).forwarded();
                let first = first.with_flags(ACK);
                for options in ignored(&first) {
                    let sent = with_options(&first, options);
                    let by_tc = bench.send_bytes(&sent, bench.uplink);
                    let early = bench.send_early_on_its_way(&sent);
                    assert_eq!(early.action, XDP_TX, "{early:?}");
                    assert_eq!(early.bytes[14..], by_tc.bytes[14..]);
                    let answer = carried(by_tc, &sent, options).reply();
                    let sent = with_options(&answer, options);
                    let by_tc = bench.send_bytes(&sent, bench.uplink);
                    let early = bench.send_early_on_its_way(&sent);
                    assert_eq!(early.action, XDP_TX, "{early:?}");
                    assert_eq!(early.bytes[14..], by_tc.bytes[14..]);
                    carried(by_tc, &sent, options);
                }
            });
        }
    }
}

/// The sum of the pseudo header has the transport's length, without options.
#[test]
fn xdp_leaves_an_unfinished_checksum_behind_options_to_tc() {
    for [client, frontend, _, backend] in ENDS {
        bench(|bench| {
            if !bench.publish_beside(Protocol::Udp, PORT, backend) {
                return;
            }
            let first = Frame::first(Protocol::Udp, at(client), at(frontend));
            bench.send(&first, bench.uplink).forwarded();
            let options = of(&first, IGNORED);
            let mut sent = with_options(&first, options);
            bench.send_early_on_its_way(&sent);
            let udp = sent.len() - 8 - first.payload.len();
            let addresses = if first.source.is_ipv4() {
                26..34
            } else {
                22..54
            };
            let words = sent[addresses].chunks_exact(2);
            let sum = words.fold(17 + 13, |sum, word| {
                sum + u32::from(u16::from_be_bytes([word[0], word[1]]))
            });
            let sum = (sum & 0xffff) + (sum >> 16);
            sent[udp + 6..udp + 8].copy_from_slice(&(sum as u16).to_be_bytes());
            assert_eq!(bench.send_early(&sent).action, crate::bench::XDP_PASS);
        });
    }
}

#[test]
fn fragments_keep_their_options() {
    bench(|bench| {
        bench.publish(Protocol::Udp, PORT, ENDS[0][2]);
        let mut frame = Frame::first(Protocol::Udp, at(ENDS[0][0]), at(ENDS[0][1]));
        frame.payload = (0..100).collect();
        for part in cut::<3>(&frame, 7) {
            let sent = insert(part, IGNORED[0]);
            let outcome = bench.send_bytes(&sent, bench.uplink);
            assert_eq!(outcome.action, REDIRECT, "{outcome:?}");
            assert_eq!(outcome.bytes[30..34], [172, 31, 0, 2]);
            assert_eq!(outcome.bytes[34..38], *IGNORED[0]);
            let mut header = outcome.bytes[14..38].to_vec();
            fix_header_checksum(&mut header);
            assert_eq!(outcome.bytes[14..38], header);
        }
    });
    // What IPv6 has behind the fragment header is in the first part alone.
    bench(|bench| {
        bench.publish(Protocol::Udp, PORT, ENDS[1][2]);
        let mut frame = Frame::first(Protocol::Udp, at(ENDS[1][0]), at(ENDS[1][1]));
        frame.payload = (0..100).collect();
        for mut part in cut::<3>(&frame, 7) {
            part[54] = 60;
            let outcome = bench.send_bytes(&part, bench.uplink);
            assert_ne!(outcome.action, REDIRECT, "{outcome:?}");
            assert_eq!(outcome.bytes, part);
        }
    });
}

/// An error about a packet with options quotes them.
#[test]
fn an_error_about_such_a_packet_is_translated() {
    everywhere(|bench, first| {
        for options in ignored(first) {
            let sent = with_options(first, options);
            let arrived = bench.send_bytes(&sent, bench.uplink);
            let plain = bench.send(first, bench.uplink).forwarded();
            // All that was sent, and the least that is quoted.
            let headers = sent.len() - first.bytes().len() + if sent[12] == 0x08 { 20 } else { 40 };
            for octets in [arrived.bytes.len() - 14, headers + 8] {
                let quoted = |bytes: &[u8]| bytes[14..14 + octets].to_vec();
                let error = IcmpError {
                    quoted: quoted(&arrived.bytes),
                    ..IcmpError::port_unreachable(&plain)
                };
                let outcome = bench.send_bytes(&error.bytes(), bench.container);
                assert_eq!(outcome.reasons, ["forwarded_error"], "{outcome:?}");
                let told = IcmpError::parse(&outcome.bytes).unwrap();
                let as_sent = Frame {
                    ttl: 63,
                    ..first.clone()
                };
                assert_eq!(told.quoted, quoted(&with_options(&as_sent, options)));
                assert_eq!(told.source, first.destination.ip());
            }
        }
        let mut error = IcmpError::port_unreachable(&bench.send(first, bench.uplink).forwarded());
        error.quoted = insert(
            [vec![0; 12], ethertype(first), error.quoted].concat(),
            of(first, HEEDED),
        );
        error.quoted.drain(..14);
        let sent = error.bytes();
        bench.send_bytes(&sent, bench.container).passed(&sent, "");
    });
}

fn ethertype(frame: &Frame) -> Vec<u8> {
    if frame.source.is_ipv4() {
        vec![0x08, 0x00]
    } else {
        vec![0x86, 0xdd]
    }
}

/// An error of this host's own quotes what was sent, with its options.
#[test]
fn the_sender_is_told_of_an_obstacle() {
    for [client, frontend, _, backend] in ENDS {
        bench(|bench| {
            let mut entry = bench.entry(PORT, backend);
            entry.hop = Hop {
                ifindex: bench.uplink,
                delivery: delivery::NEIGHBOUR,
                ..Hop::default()
            };
            bench.publish_entry(1, None, Protocol::Tcp, PORT, &entry);
            let narrow = Interface {
                mtu: 1400,
                ..UPLINK
            };
            let maps = &mut bench.datapath.maps;
            maps.set_interface(bench.uplink, Some(behind(bench.uplink, narrow)))
                .unwrap();
            let mut frame = Frame::first(Protocol::Tcp, at(client), at(frontend));
            frame.payload = vec![7; 1400];
            let too_big = (frame.clone(), "too_big");
            (frame.payload, frame.ttl) = (vec![7; 100], 1);
            for (frame, reason) in [(frame, "ttl_expired"), too_big] {
                let sent = with_options(&frame, of(&frame, IGNORED));
                let outcome = bench.send_bytes(&sent, bench.uplink);
                assert_eq!(outcome.reasons, [reason], "{outcome:?}");
                let told = IcmpError::parse(&outcome.bytes).unwrap();
                assert_eq!(told.quoted, sent[14..][..told.quoted.len()]);
                assert!(told.quoted.len() > 60);
            }
        });
    }
}

/// A flow that was cut off: the reset has no options, so that its header is where every host looks for it.
#[test]
fn a_segment_with_options_is_answered_by_a_reset() {
    everywhere(|bench, first| {
        if first.protocol != Protocol::Tcp {
            return;
        }
        let mut first = first.clone();
        first.payload = vec![];
        let answer = bench.send(&first, bench.uplink).forwarded().reply();
        bench.send(&answer, bench.container).forwarded();
        let next = first.with_flags(ACK);
        bench.send(&next, bench.uplink).forwarded();
        let (key, _) = bench.flow();
        bench.datapath.maps.flows.cut(&key, |_| true).unwrap();
        for (frame, device) in [
            (next, bench.uplink),
            (answer.with_flags(ACK), bench.container),
        ] {
            for options in ignored(&frame) {
                let outcome = bench.send_bytes(&with_options(&frame, options), device);
                assert_eq!(outcome.reasons, ["cut"]);
                let headers = if frame.source.is_ipv4() { 54 } else { 74 };
                assert_eq!(outcome.bytes.len(), headers);
                let reset = outcome.forwarded();
                assert_eq!(reset.sequence, frame.acknowledgement);
                assert_eq!(reset.source, frame.destination);
            }
        }
    });
}
