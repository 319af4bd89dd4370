//! Packets of a flow that cannot go on: their time is over, or they are longer than the way's MTU. The sender is told.

use std::net::SocketAddr;

use forwarder_common::{
    flow::{Hop, delivery},
    publish::Interface,
};
use forwarder_tests::{
    cpu::pin_this_thread,
    fragment::{cut, fix_header_checksum},
    frame::{Frame, Protocol},
    icmp::{IcmpError, quote},
};

use crate::bench::{Bench, HOST, LO, Outcome, REDIRECT, SHOT, UPLINK, at, behind, bench};

const V4: [&str; 3] = ["198.51.100.9:4000", "198.51.100.2:8080", "172.31.0.2:80"];
const V6: [&str; 3] = [
    "[2001:db8:100::9]:4000",
    "[2001:db8:100::2]:8080",
    "[fd00:31::2]:80",
];
const MTU: usize = 1400;

/// A client's first packet, in each family by each protocol, and the backend.
fn packets() -> Vec<(Frame, &'static str)> {
    let mut all = Vec::new();
    for [client, frontend, backend] in [V4, V6] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            all.push((Frame::first(protocol, at(client), at(frontend)), backend));
        }
    }
    all
}

/// The frame with a payload that makes its packet so long.
fn long(frame: &Frame, length: usize) -> Frame {
    let mut frame = frame.clone();
    frame.payload = (0..length - (frame.bytes().len() - 14 - frame.payload.len()))
        .map(|at| (at ^ at >> 8) as u8)
        .collect();
    frame
}

/// What an error about `frame` says and quotes, apart from MACs.
fn told(frame: &Frame, from: &str, kinds: [(u8, u8); 2], mtu: usize) -> IcmpError {
    let v4 = frame.source.is_ipv4();
    let (kind, code) = kinds[usize::from(!v4)];
    let mut quoted = quote(frame, 9000);
    quoted.truncate(if v4 { 576 - 28 } else { 1280 - 48 });
    IcmpError {
        source_mac: [0; 6],
        destination_mac: [0; 6],
        source: at(from).ip(),
        kind,
        code,
        rest: mtu as u32,
        quoted,
        ..IcmpError::port_unreachable(frame)
    }
}

fn expired(frame: &Frame) -> IcmpError {
    told(frame, &frame.destination.to_string(), [(11, 0), (3, 0)], 0)
}

fn too_big(frame: &Frame, from: &str) -> IcmpError {
    told(frame, from, [(3, 4), (2, 0)], MTU)
}

#[track_caller]
fn answered(outcome: Outcome, reason: &str) -> IcmpError {
    assert_eq!(outcome.action, REDIRECT, "{outcome:?}");
    assert!(outcome.reasons.contains(&reason), "{outcome:?}");
    let error = IcmpError::parse(&outcome.bytes);
    error.unwrap_or_else(|error| panic!("{error:#}: {outcome:?}"))
}

fn bare(error: IcmpError) -> IcmpError {
    IcmpError {
        source_mac: [0; 6],
        destination_mac: [0; 6],
        ..error
    }
}

/// The backend is on another machine, and the way there has an MTU of its own.
fn remote(bench: &mut Bench, protocol: Protocol, backend: &str) {
    let mut entry = bench.entry(8080, backend);
    entry.hop = Hop {
        ifindex: bench.uplink,
        delivery: delivery::NEIGHBOUR,
        ..Hop::default()
    };
    bench.publish_entry(1, None, protocol, 8080, &entry);
    narrow_uplink(bench);
}

fn narrow_uplink(bench: &mut Bench) {
    let uplink = Interface {
        mtu: MTU as u32,
        ..UPLINK
    };
    let maps = &mut bench.datapath.maps;
    maps.set_interface(bench.uplink, Some(behind(bench.uplink, uplink)))
        .unwrap();
}

#[test]
fn a_client_is_told_that_its_packets_time_is_over() {
    for (frame, backend) in packets() {
        bench(|bench| {
            bench.publish(frame.protocol, 8080, backend);
            for length in [80, 81, 500, 1500] {
                let mut sent = long(&frame, length);
                sent.ttl = 1;
                let outcome = bench.send(&sent, bench.uplink);
                assert_eq!(bare(answered(outcome, "ttl_expired")), expired(&sent));
            }
            let flows = bench.datapath.maps.flows.all().count();
            assert_eq!(flows, 0, "it begins nothing");
        });
    }
}

#[test]
fn a_backend_is_told_that_its_answers_time_is_over() {
    for (frame, backend) in packets() {
        bench(|bench| {
            bench.publish(frame.protocol, 8080, backend);
            let mut answer = bench.send(&frame, bench.uplink).forwarded().reply();
            answer.ttl = 1;
            let outcome = bench.send(&answer, bench.container);
            let error = answered(outcome, "ttl_expired");
            assert_eq!(error.destination_mac, answer.source_mac);
            assert_eq!(error.source_mac, answer.destination_mac);
            let gateway = if frame.source.is_ipv4() {
                HOST[1]
            } else {
                HOST[3]
            };
            let expected = IcmpError {
                source: gateway.parse().unwrap(),
                ..expired(&answer)
            };
            assert_eq!(bare(error), expected);
        });
    }
}

#[test]
fn the_padding_of_a_short_frame_is_not_quoted() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 8080, V4[2]);
        let mut sent = Frame::first(Protocol::Udp, at(V4[0]), at(V4[1]));
        sent.ttl = 1;
        let mut bytes = sent.bytes();
        bytes.resize(60, 0xee);
        let outcome = bench.send_bytes(&bytes, bench.uplink);
        assert_eq!(outcome.bytes.len(), 14 + 28 + sent.bytes().len() - 14);
        assert_eq!(bare(answered(outcome, "ttl_expired")), expired(&sent));
    });
}

/// A device may leave the frame's checksum there, and a switch a trailer.
#[test]
fn what_a_frame_has_behind_its_packet_makes_that_no_longer() {
    for (frame, backend) in packets() {
        bench(|bench| {
            remote(bench, frame.protocol, backend);
            let mut bytes = long(&frame, MTU).bytes();
            bytes.extend([0xee; 4]);
            bench.send_bytes(&bytes, bench.uplink).forwarded();
        });
    }
}

#[test]
fn a_client_is_told_the_mtu_of_the_way_to_the_backend() {
    for (frame, backend) in packets() {
        bench(|bench| {
            remote(bench, frame.protocol, backend);
            bench.send(&long(&frame, MTU), bench.uplink).forwarded();
            let sent = long(&frame, MTU + 1);
            let outcome = bench.send(&sent, bench.uplink);
            let expected = too_big(&sent, &frame.destination.to_string());
            assert_eq!(bare(answered(outcome, "too_big")), expected);
        });
    }
}

#[test]
fn a_backend_is_told_the_mtu_of_the_way_to_the_client() {
    for (frame, backend) in packets() {
        bench(|bench| {
            bench.publish(frame.protocol, 8080, backend);
            narrow_uplink(bench);
            let answer = bench.send(&frame, bench.uplink).forwarded().reply();
            bench.send(&long(&answer, MTU), bench.container).forwarded();
            let answer = long(&answer, MTU + 1);
            let outcome = bench.send(&answer, bench.container);
            let gateway = if frame.source.is_ipv4() {
                "172.31.0.1:0"
            } else {
                "[fd00:31::1]:0"
            };
            let error = bare(answered(outcome, "too_big"));
            assert_eq!(error, too_big(&answer, gateway));
        });
    }
}

#[test]
fn a_container_takes_packets_of_any_length() {
    for (frame, backend) in packets() {
        bench(|bench| {
            bench.publish(frame.protocol, 8080, backend);
            let interface = Interface {
                delivery: delivery::PEER,
                mtu: MTU as u32,
                ..UPLINK
            };
            let maps = &mut bench.datapath.maps;
            maps.set_interface(bench.container, Some(behind(bench.container, interface)))
                .unwrap();
            bench
                .send(&long(&frame, MTU + 100), bench.uplink)
                .forwarded();
        });
    }
}

/// As a server answers that leaves it to routers (IP_PMTUDISC_OMIT), and heeds no ICMP error.
#[test]
fn an_answer_that_may_be_cut_up_is_the_daemons() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 8080, V4[2]);
        narrow_uplink(bench);
        let sent = Frame::first(Protocol::Udp, at(V4[0]), at(V4[1]));
        let answer = bench.send(&sent, bench.uplink).forwarded().reply();
        let mut bytes = long(&answer, MTU + 1).bytes();
        bytes[20] = 0;
        fix_header_checksum(&mut bytes[14..34]);
        let outcome = bench.send_bytes(&bytes, bench.container);
        assert_eq!(outcome.reasons, ["cut_up", "too_big"], "{outcome:?}");
    });
}

#[test]
fn a_datagram_that_may_be_cut_up_is_the_proxys() {
    bench(|bench| {
        remote(bench, Protocol::Udp, V4[2]);
        let sent = long(&Frame::first(Protocol::Udp, at(V4[0]), at(V4[1])), MTU + 1);
        bench.send(&long(&sent, 100), bench.uplink).forwarded();
        let mut bytes = sent.bytes();
        assert_eq!(bytes[20], 0x40, "frames say do not fragment");
        bytes[20] = 0;
        let sum = u16::from_be_bytes([bytes[24], bytes[25]]);
        let (sum, carry) = sum.overflowing_add(0x4000);
        bytes[24..26].copy_from_slice(&(sum + u16::from(carry)).to_be_bytes());
        bench
            .send_bytes(&bytes, bench.uplink)
            .passed(&bytes, "to_fragment");
    });
}

#[test]
fn a_datagram_of_this_host_is_the_proxys_and_its_segment_is_answered() {
    bench(|bench| {
        remote(bench, Protocol::Udp, V4[2]);
        let first = |protocol| Frame::first(protocol, at("127.0.0.1:4000"), at("127.0.0.1:8080"));
        bench.send(&first(Protocol::Udp), LO).forwarded();
        let sent = long(&first(Protocol::Udp), MTU + 1);
        bench.send(&sent, LO).passed(&sent.bytes(), "to_fragment");
        remote(bench, Protocol::Tcp, V4[2]);
        let sent = long(&first(Protocol::Tcp), MTU + 1);
        let error = answered(bench.send(&sent, LO), "too_big");
        assert_eq!(bare(error), too_big(&sent, "127.0.0.1:0"));
    });
}

#[test]
fn nobody_is_told_about_an_error() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 8080, V4[2]);
        let sent = Frame::first(Protocol::Udp, at(V4[0]), at(V4[1]));
        let forwarded = bench.send(&sent, bench.uplink).forwarded();
        let mut error = IcmpError::port_unreachable(&forwarded);
        error.ttl = 1;
        bench
            .send_bytes(&error.bytes(), bench.container)
            .dropped("untold");
    });
}

#[test]
fn nobody_is_told_about_a_frame_to_everybody() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 8080, V4[2]);
        let sent = Frame::first(Protocol::Udp, at(V4[0]), at(V4[1]));
        let mut answer = bench.send(&sent, bench.uplink).forwarded().reply();
        answer.ttl = 1;
        for everybody in [[0xff; 6], [0x01, 0, 0x5e, 0, 0, 1]] {
            answer.destination_mac = everybody;
            bench.send(&answer, bench.container).dropped("untold");
        }
    });
}

#[test]
fn nobody_is_told_about_a_later_fragment() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 8080, V4[2]);
        let mut sent = Frame::first(Protocol::Udp, at(V4[0]), at(V4[1]));
        sent.payload = vec![0; 100];
        let [first, mut later] = cut(&sent, 7);
        let outcome = bench.send_bytes(&first, bench.uplink);
        assert_eq!(outcome.action, REDIRECT);
        later[14 + 8] = 1;
        fix_header_checksum(&mut later[14..34]);
        bench.send_bytes(&later, bench.uplink).dropped("untold");
    });
}

#[test]
fn a_flood_is_not_answered_by_a_flood() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 8080, V4[2]);
        let mut sent = Frame::first(Protocol::Udp, at(V4[0]), at(V4[1]));
        sent.ttl = 1;
        let started = std::time::Instant::now();
        let outcomes: Vec<_> = (0..5000).map(|_| bench.send(&sent, bench.uplink)).collect();
        let windows = started.elapsed().as_millis() as usize / 100 + 1;
        let told = outcomes
            .iter()
            .filter(|outcome| outcome.action == REDIRECT)
            .count();
        // Each CPU counts its own.
        let cpus = std::thread::available_parallelism().unwrap().get();
        assert!(
            told >= 100 && told <= 100 * (windows + 1) * cpus,
            "{told} were told"
        );
        // An emulated machine may be too slow for a flood.
        let flooded = 100 * windows < 5000;
        assert!(
            told < 5000 || !flooded,
            "all were told in {windows} windows"
        );
        let last = outcomes
            .into_iter()
            .rfind(|outcome| outcome.action != REDIRECT);
        if let Some(untold) = last {
            untold.dropped("untold");
        }
    });
}

/// Sends a packet again until its sender is not told any more, which an emulated machine may be too slow for.
fn is_flooded_by(bench: &Bench, frame: &Frame) -> bool {
    (0..1000).any(|_| bench.send(frame, bench.uplink).action == SHOT)
}

/// Whose path has a small MTU must learn of it, whatever others send.
#[test]
fn a_flood_of_packets_whose_time_has_come_hides_no_mtu() {
    for (frame, backend) in packets() {
        bench(|bench| {
            pin_this_thread(&[0]).unwrap();
            remote(bench, frame.protocol, backend);
            let mut expired = frame.clone();
            expired.ttl = 1;
            if !is_flooded_by(bench, &expired) {
                return;
            }
            let mut first = frame.clone();
            first.source.set_port(4001);
            let outcome = bench.send(&long(&first, MTU + 1), bench.uplink);
            assert_eq!(outcome.reasons, ["too_big"], "{outcome:?}");
        });
    }
}

/// One sender may use up its own share alone, or that of few others.
#[test]
fn a_flood_of_long_packets_hides_no_mtu_from_others() {
    bench(|bench| {
        pin_this_thread(&[0]).unwrap();
        remote(bench, Protocol::Tcp, V4[2]);
        let from = |address: [u8; 4]| {
            let client = SocketAddr::from((address, 4000));
            long(&Frame::first(Protocol::Tcp, client, at(V4[1])), MTU + 1)
        };
        let flood = from([198, 51, 100, 9]);
        let mut hidden = 0;
        for last in 10..110 {
            if !is_flooded_by(bench, &flood) {
                return;
            }
            let outcome = bench.send(&from([198, 51, 100, last]), bench.uplink);
            hidden += usize::from(outcome.reasons != ["too_big"]);
        }
        assert!(hidden < 10, "{hidden} of 100 were not told");
    });
}
