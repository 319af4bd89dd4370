//! A flow that was cut off: its ends hear a reset that they believe, and nothing of it goes on.

use forwarder_tests::{
    frame::{ACK, Frame, Protocol, RST, RST_ACK, SYN, SYN_ACK},
    summed,
};

use crate::bench::{Bench, LO, REDIRECT, XDP_PASS, at, bench};

const PORT: u16 = 8080;
/// Client, host and backend.
const WORLDS: [[&str; 3]; 4] = [
    ["198.51.100.9:4000", "198.51.100.2:8080", "172.31.0.2:80"],
    [
        "[2001:db8:100::9]:4000",
        "[2001:db8:100::2]:8080",
        "[fd00:31::2]:80",
    ],
    ["127.0.0.1:4000", "127.0.0.1:8080", "172.31.0.2:80"],
    ["[::1]:4000", "[::1]:8080", "[fd00:31::2]:80"],
];

/// A proven flow that is cut off: what the client sends, the backend, and where the client's come in.
fn cut(bench: &mut Bench, protocol: Protocol, [client, host, backend]: [&str; 3]) -> [Frame; 2] {
    bench.publish(protocol, PORT, backend);
    let by = by(bench, client);
    let first = Frame::first(protocol, at(client), at(host));
    let arrived = bench.send(&first, by).forwarded();
    let answer = arrived.reply();
    bench.send(&answer, bench.container).forwarded();
    let next = first.with_flags(ACK);
    bench.send(&next, by).forwarded();
    let (key, _) = bench.flow();
    let maps = &mut bench.datapath.maps;
    assert_eq!(maps.flows.cut(&key, |_| false).unwrap(), None);
    maps.flows.cut(&key, |_| true).unwrap();
    let answer = answer.with_flags(ACK);
    [next, answer].map(|mut frame| {
        frame.payload = vec![7; 1000];
        frame.sequence = 3_000_000_000;
        frame.acknowledgement = 123_456_789;
        frame
    })
}

fn by(bench: &Bench, client: &str) -> u32 {
    if at(client).ip().is_loopback() {
        LO
    } else {
        bench.uplink
    }
}

/// The reset that answers a segment, and its checksums.
fn answered(bench: &Bench, segment: &Frame, by: u32) -> Frame {
    let outcome = bench.send(segment, by);
    assert_eq!(outcome.reasons, ["cut"]);
    let headers = if segment.source.is_ipv4() { 54 } else { 74 };
    assert_eq!(outcome.bytes.len(), headers);
    let reset = outcome.forwarded();
    assert_eq!(reset.source, segment.destination);
    assert_eq!(reset.destination, segment.source);
    assert!(reset.payload.is_empty());
    assert_eq!(reset.ttl, 64);
    reset
}

#[test]
fn both_ends_are_answered_by_the_number_that_they_wait_for() {
    for world in WORLDS {
        bench(|bench| {
            let [mut segment, answer] = cut(bench, Protocol::Tcp, world);
            let by = by(bench, world[0]);
            let both = [(&mut segment, by), (&mut answer.clone(), bench.container)];
            for (segment, by) in both {
                let reset = answered(bench, segment, by);
                assert_eq!(reset.flags, RST);
                assert_eq!(reset.sequence, segment.acknowledgement);
                if by == bench.container {
                    assert_eq!(reset.destination_mac, segment.source_mac);
                }
                // A client that begins again from the same port.
                let syn = segment.clone().with_flags(SYN);
                let reset = answered(bench, &syn, by);
                assert_eq!(reset.flags, RST_ACK);
                assert_eq!(
                    (reset.sequence, reset.acknowledgement),
                    (0, syn.sequence.wrapping_add(1))
                );
                let answers = segment.clone().with_flags(SYN_ACK);
                assert_eq!(answered(bench, &answers, by).flags, RST);
                let ends = segment.clone().with_flags(RST);
                bench.send(&ends, by).dropped("cut");
            }
            let before = bench.flow().1;
            assert_eq!(before.packets(), [2, 1], "nothing was carried");
            let (key, _) = bench.flow();
            bench.datapath.maps.flows.end(&key, |_| true).unwrap();
            assert_eq!(bench.datapath.maps.usage(1).unwrap().flows, 0);
        });
    }
}

#[test]
fn of_datagrams_nothing_goes_on() {
    for world in WORLDS {
        bench(|bench| {
            let [datagram, answer] = cut(bench, Protocol::Udp, world);
            let by = by(bench, world[0]);
            bench.send(&datagram, by).dropped("cut");
            bench.send(&answer, bench.container).dropped("cut");
        });
    }
}

#[test]
fn xdp_leaves_the_answer_to_tc() {
    for (client, backend) in [
        ("198.51.100.9:4000", "198.51.100.10:80"),
        ("[2001:db8:100::9]:4000", "[2001:db8:100::10]:80"),
    ] {
        bench(|bench| {
            if !bench.publish_beside(Protocol::Tcp, PORT, backend) {
                return;
            }
            let host = if at(client).is_ipv4() {
                "198.51.100.2:8080"
            } else {
                "[2001:db8:100::2]:8080"
            };
            let first = Frame::first(Protocol::Tcp, at(client), at(host));
            let arrived = bench.send(&first, bench.uplink).forwarded();
            bench.send(&arrived.reply(), bench.uplink).forwarded();
            let next = first.with_flags(ACK);
            bench.send(&next, bench.uplink).forwarded();
            let (key, _) = bench.flow();
            bench.datapath.maps.flows.cut(&key, |_| true).unwrap();
            let answer = arrived.reply().with_flags(ACK);
            for segment in [next, answer] {
                assert_eq!(bench.send_early(&segment.bytes()).action, XDP_PASS);
                answered(bench, &segment, bench.uplink);
            }
        });
    }
}

/// A device has summed up the whole segment (CHECKSUM_COMPLETE). One that is cut to its headers has no such sum any more.
#[test]
fn the_sum_of_the_whole_packet_stays_right() {
    for world in WORLDS {
        bench(|bench| {
            let segments = cut(bench, Protocol::Tcp, world);
            let devices = [by(bench, world[0]), bench.container];
            let program = bench.datapath.ingress_fd().unwrap();
            for (mut segment, by) in segments.into_iter().zip(devices) {
                segment.payload.clear();
                // The kernel can be asked from 6.17 on.
                match summed::run(program, &segment.bytes(), by) {
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                    outcome => assert_eq!(outcome.unwrap().0, REDIRECT),
                }
            }
        });
    }
}
