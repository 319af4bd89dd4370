//! XDP rewrites as tc does, byte for byte, and leaves to tc what it is not sure of.

use std::thread;

use forwarder_tests::frame::{ACK, Frame, Protocol};

use crate::bench::{Bench, TICK, XDP_DROP, XDP_PASS, XDP_TX, at, bench};

const PORT: u16 = 8080;
const ALL: [(&str, &str, &str); 2] = [
    ("198.51.100.9:4000", "198.51.100.2:8080", "198.51.100.10:80"),
    (
        "[2001:db8:100::9]:4000",
        "[2001:db8:100::2]:8080",
        "[2001:db8:100::10]:80",
    ),
];

/// Runs a scenario for both families and protocols with a flow that tc has begun, where the kernel can run XDP programs for
/// a device.
fn with_flow(scenario: impl Fn(&mut Bench, &Frame) + Sync) {
    for (client, frontend, backend) in ALL {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            bench(|bench| {
                if !bench.publish_beside(protocol, PORT, backend) {
                    return;
                }
                let mut frame = Frame::first(protocol, at(client), at(frontend));
                frame.payload = b"odd".to_vec();
                let passed = bench.send_early(&frame.bytes());
                assert_eq!(passed.action, XDP_PASS, "a first packet is tc's");
                bench.send(&frame, bench.uplink).forwarded();
                let frame = frame.with_flags(ACK);
                let known = bench.send_early_on_its_way(&frame.bytes());
                assert_eq!(known.action, XDP_TX);
                scenario(bench, &frame);
            });
        }
    }
}

#[test]
fn both_ways_come_out_as_tc_has_them() {
    with_flow(|bench, frame| {
        let by_tc = bench.send(frame, bench.uplink);
        let early = bench.send_early_on_its_way(&frame.bytes());
        assert_eq!(
            (early.action, &early.reasons[..]),
            (XDP_TX, &["forwarded_xdp"][..])
        );
        assert_eq!(
            early.bytes[14..],
            by_tc.bytes[14..],
            "behind Ethernet's header"
        );
        assert_eq!(early.bytes[..6], [2, 0, 0, 0, 0, 0x10], "the backend's MAC");

        let answer = by_tc.forwarded().reply();
        let by_tc = bench.send(&answer, bench.uplink);
        let early = bench.send_early_on_its_way(&answer.bytes());
        assert_eq!(early.action, XDP_TX, "{early:?}");
        assert_eq!(
            early.bytes[14..],
            by_tc.bytes[14..],
            "behind Ethernet's header"
        );
        assert_eq!(early.bytes[..6], [2, 0, 0, 0, 0, 9], "the client's MAC");
    });
}

#[test]
fn a_datagram_without_a_checksum_stays_so() {
    bench(|bench| {
        if !bench.publish_beside(Protocol::Udp, PORT, ALL[0].2) {
            return;
        }
        let frame = Frame::first(Protocol::Udp, at(ALL[0].0), at(ALL[0].1));
        bench.send(&frame, bench.uplink).forwarded();
        let mut bytes = frame.bytes();
        bytes[40..42].fill(0);
        let early = bench.send_early_on_its_way(&bytes);
        assert_eq!((early.action, &early.bytes[40..42]), (XDP_TX, &[0, 0][..]));
    });
}

#[test]
fn a_udp_checksum_that_comes_out_as_zero_is_sent_as_ffff() {
    with_flow(|bench, frame| {
        if frame.protocol == Protocol::Tcp {
            return;
        }
        let arrived = bench.send(frame, bench.uplink).forwarded();
        let answer = bench.send(&arrived.reply(), bench.uplink).forwarded();
        for (sent, arrives) in [(frame.clone(), arrived.clone()), (arrived.reply(), answer)] {
            let sent = Frame {
                payload: arrives.with_checksum_ffff().payload,
                ..sent
            };
            let early = bench.send_early_on_its_way(&sent.bytes());
            assert_eq!(early.action, XDP_TX);
            assert!(!Frame::parse(&early.bytes).unwrap().no_checksum);
        }
    });
}

/// What a sender on the same machine leaves for a device to finish: the sum of the pseudo header.
#[test]
fn an_unfinished_checksum_is_left_to_tc() {
    with_flow(|bench, frame| {
        let mut bytes = frame.bytes();
        let l4 = if frame.source.is_ipv4() { 34 } else { 54 };
        let field = l4
            + if frame.protocol == Protocol::Tcp {
                16
            } else {
                6
            };
        let addresses = if frame.source.is_ipv4() {
            26..34
        } else {
            22..54
        };
        let protocol = if frame.protocol == Protocol::Tcp {
            6
        } else {
            17
        };
        let length = u32::try_from(bytes.len() - l4).unwrap();
        let words = bytes[addresses].chunks(2);
        let sum: u32 = words
            .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
            .sum();
        let sum = sum + protocol + length;
        let folded = (sum & 0xffff) + (sum >> 16);
        let folded = u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap();
        bytes[field..field + 2].copy_from_slice(&folded.to_be_bytes());
        let early = bench.send_early(&bytes);
        assert_eq!((early.action, &early.bytes), (XDP_PASS, &bytes));
    });
}

#[test]
fn what_tc_answers_or_resolves_is_left_to_it() {
    with_flow(|bench, frame| {
        let ends_here = Frame {
            ttl: 1,
            ..frame.clone()
        };
        assert_eq!(bench.send_early(&ends_here.bytes()).action, XDP_PASS);
        let mut long = frame.clone();
        long.payload = vec![0; 1501];
        assert_eq!(bench.send_early(&long.bytes()).action, XDP_PASS);
        let netns = forwarder_tests::netns::Netns::current().unwrap();
        for backend in ["198.51.100.10", "2001:db8:100::10"] {
            netns.ip(&format!("neigh del {backend} dev eth0")).unwrap();
        }
        thread::sleep(TICK);
        let early = bench.send_early(&frame.bytes());
        assert_eq!((early.action, early.bytes), (XDP_PASS, frame.bytes()));
    });
}

#[test]
fn impossible_sources_are_dropped() {
    bench(|bench| {
        if !bench.publish_beside(Protocol::Udp, PORT, ALL[0].2) {
            return;
        }
        for source in ["127.0.0.1:4000", "172.31.0.1:4000", "224.0.0.1:4000"] {
            let frame = Frame::first(Protocol::Udp, at(source), at(ALL[0].1));
            let early = bench.send_early(&frame.bytes());
            assert_eq!(
                (early.action, &early.reasons[..]),
                (XDP_DROP, &["martian_source"][..])
            );
        }
        // Transit to somebody else's port of that number is nobody's business.
        let transit = Frame::first(Protocol::Udp, at("127.0.0.1:4000"), at("203.0.113.1:8080"));
        assert_eq!(bench.send_early(&transit.bytes()).action, XDP_PASS);
    });
}
