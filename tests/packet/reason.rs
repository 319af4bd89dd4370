//! Every reason is counted for some packet. A new one does not compile here until it has a scenario.

use std::net::UdpSocket;

use forwarder::{datapath::Options, datapath::kernel::kernel};
use forwarder_common::{
    flow::{Hop, delivery},
    policy::Limits,
    publish::{Interface, flag, uplinks},
    reason::Reason,
};
use forwarder_tests::{
    fragment::cut,
    frame::{ACK, Frame, Protocol, SYN_ACK},
    icmp::IcmpError,
    options::{HEEDED, with_options},
};

use crate::{
    bench::{Bench, LO, Outcome, UPLINK, at, behind, bench_with, options},
    route::second_uplink,
};

const PORT: u16 = 8080;
const BACKEND: &str = "172.31.0.2:80";

fn first(protocol: Protocol) -> Frame {
    let (client, frontend) = (at("198.51.100.9:4000"), at("198.51.100.2:8080"));
    Frame::first(protocol, client, frontend)
}

/// A client's connection that is proven.
fn proven(bench: &Bench, port: u16) -> Outcome {
    converse(bench, tcp_from(port))
}

/// As many of them as there may be, of a client each.
fn fill(bench: &Bench) {
    for number in 0..FLOWS as u8 {
        let mut frame = tcp_from(4000);
        frame.source.set_ip([198, 51, 100, 20 + number].into());
        converse(bench, frame);
    }
}

fn converse(bench: &Bench, frame: Frame) -> Outcome {
    let arrived = bench.send(&frame, bench.uplink).forwarded();
    bench.send(&arrived.reply(), bench.container).forwarded();
    bench.send(&frame.with_flags(ACK), bench.uplink)
}

fn tcp_from(port: u16) -> Frame {
    let mut frame = first(Protocol::Tcp);
    frame.source.set_port(port);
    frame
}

/// Publishes the port with limits.
fn limited(bench: &mut Bench, limits: Limits) {
    bench.datapath.maps.set_limits(1, &limits).unwrap();
    publish(bench, Protocol::Tcp, |_| {});
}

/// Publishes the port with an entry that `change` has made another.
fn publish(
    bench: &mut Bench,
    protocol: Protocol,
    change: impl FnOnce(&mut forwarder_common::publish::Publish),
) {
    let mut entry = bench.entry(PORT, BACKEND);
    change(&mut entry);
    bench.publish_entry(1, None, protocol, PORT, &entry);
}

/// A client's first datagram to a backend that is behind the uplink, too long for that by one octet.
fn too_long(bench: &mut Bench) -> Frame {
    let uplink = Hop {
        ifindex: bench.uplink,
        delivery: delivery::NEIGHBOUR,
        ..Hop::default()
    };
    publish(bench, Protocol::Udp, |entry| entry.hop = uplink);
    let narrow = Interface {
        mtu: 1000,
        ..UPLINK
    };
    let maps = &mut bench.datapath.maps;
    maps.set_interface(bench.uplink, Some(behind(bench.uplink, narrow)))
        .unwrap();
    let mut frame = first(Protocol::Udp);
    frame.payload = vec![0; 1000 - 27];
    frame
}

/// Has a packet counted for `reason`; `None` if this kernel has none for it.
fn scenario(reason: Reason, bench: &mut Bench) -> Option<Outcome> {
    let (tcp, udp) = (first(Protocol::Tcp), first(Protocol::Udp));
    let uplink = bench.uplink;
    Some(match reason {
        Reason::NewFlow | Reason::ForwardedOriginal => {
            publish(bench, Protocol::Tcp, |_| {});
            bench.send(&tcp, uplink)
        }
        Reason::ForwardedReply => {
            publish(bench, Protocol::Tcp, |_| {});
            let answer = bench.send(&tcp, uplink).forwarded().reply();
            bench.send(&answer, bench.container)
        }
        Reason::ForwardedError => {
            publish(bench, Protocol::Udp, |_| {});
            let arrived = bench.send(&udp, uplink).forwarded();
            let error = IcmpError::port_unreachable(&arrived);
            bench.send_bytes(&error.bytes(), bench.container)
        }
        Reason::NotOurs => bench.send(&tcp, uplink),
        Reason::NotLocal => {
            publish(bench, Protocol::Tcp, |_| {});
            let elsewhere = at("203.0.113.1:8080");
            bench.send(&Frame::first(Protocol::Tcp, tcp.source, elsewhere), LO)
        }
        Reason::OtherSocket => {
            publish(bench, Protocol::Udp, |entry| {
                entry.flags |= flag::STEERED;
                entry.first_port -= 1;
            });
            let _socket = UdpSocket::bind(("0.0.0.0", PORT)).unwrap();
            bench.send(&udp, uplink)
        }
        Reason::Fragment => {
            let mut frame = udp;
            frame.payload = vec![0; 100];
            let [_, later] = cut(&frame, 1);
            bench.send_bytes(&later, uplink)
        }
        Reason::OutOfOrder => {
            publish(bench, Protocol::Udp, |_| {});
            let mut answer = bench.send(&udp, uplink).forwarded().reply();
            answer.payload = vec![0; 100];
            let [first, later] = cut(&answer, 1);
            bench.send_bytes(&later, bench.container);
            bench.send_bytes(&first, bench.container)
        }
        Reason::Options => {
            let bytes = with_options(&tcp, HEEDED[0]);
            bench.send_bytes(&bytes, uplink)
        }
        Reason::NotSyn => {
            publish(bench, Protocol::Tcp, |_| {});
            bench.send(&tcp.with_flags(SYN_ACK), uplink)
        }
        Reason::CutUp => {
            publish(bench, Protocol::Udp, |_| {});
            let narrow = Interface {
                mtu: 1000,
                ..UPLINK
            };
            let maps = &mut bench.datapath.maps;
            maps.set_interface(uplink, Some(behind(uplink, narrow)))
                .unwrap();
            let arrived = bench.send(&first(Protocol::Udp), uplink).forwarded();
            let mut answer = arrived.reply();
            answer.payload = vec![0; 1000];
            let mut bytes = answer.bytes();
            bytes[20] = 0; // it may be cut up
            bench.send_bytes(&bytes, bench.container)
        }
        Reason::OthersAnswer => {
            publish(bench, Protocol::Udp, |_| {});
            let mut answer = bench.masqueraded_query(PORT);
            answer.destination.set_port(PORT);
            bench.send(&answer, uplink)
        }
        Reason::LinkLocal => {
            bench.publish(Protocol::Tcp, PORT, "[fd00:31::2]:80");
            let (client, frontend) = (at("[fe80::9]:4000"), at("[2001:db8:100::2]:8080"));
            bench.send(&Frame::first(Protocol::Tcp, client, frontend), uplink)
        }
        Reason::SourceTranslated => {
            publish(bench, Protocol::Udp, |_| {});
            let (client, frontend) = (at("198.51.100.2:4000"), at("127.0.0.1:8080"));
            bench.send(&Frame::first(Protocol::Udp, client, frontend), LO)
        }
        Reason::MarksDecide => {
            publish(bench, Protocol::Udp, |_| {});
            let second = second_uplink(bench, 0);
            let bits = uplinks::SEVERAL | uplinks::MARKS_V4;
            bench.datapath.maps.set_uplinks(bits).unwrap();
            bench.send(&udp, second)
        }
        Reason::OtherFamily => {
            bench.publish(Protocol::Tcp, PORT, "[fd00:31::2]:80");
            bench.send(&tcp, uplink)
        }
        Reason::Unresolved => {
            publish(bench, Protocol::Tcp, |entry| entry.hop = Hop::default());
            bench.send(&tcp, uplink)
        }
        Reason::Draining => {
            // What begins as one that drains gets no port.
            publish(bench, Protocol::Tcp, |_| {});
            publish(bench, Protocol::Tcp, |entry| entry.flags |= flag::DRAINING);
            bench.send(&tcp, uplink)
        }
        Reason::ToFragment => {
            let mut frame = too_long(bench);
            frame.source = at("127.0.0.1:4000");
            frame.destination = at("127.0.0.1:8080");
            bench.send(&frame, LO)
        }
        Reason::Expired => {
            publish(bench, Protocol::Tcp, |_| {});
            bench.send(&Frame { ttl: 1, ..tcp }, uplink)
        }
        Reason::TooBig => {
            let frame = too_long(bench);
            bench.send(&frame, uplink)
        }
        Reason::Untold => {
            publish(bench, Protocol::Udp, |_| {});
            let arrived = bench.send(&udp, uplink).forwarded();
            let mut error = IcmpError::port_unreachable(&arrived);
            error.ttl = 1;
            bench.send_bytes(&error.bytes(), bench.container)
        }
        Reason::LongerThanMtu => {
            if kernel().peer_from_lo {
                return None;
            }
            publish(bench, Protocol::Udp, |_| {});
            let (client, frontend) = (at("127.0.0.1:4000"), at("127.0.0.1:8080"));
            let mut frame = Frame::first(Protocol::Udp, client, frontend);
            frame.payload = vec![0; 1500];
            bench.send(&frame, LO)
        }
        Reason::ContainerClient => {
            publish(bench, Protocol::Tcp, |entry| entry.flags |= flag::STACK);
            bench.send(&tcp, bench.container)
        }
        Reason::ForwardedEarly => {
            if !bench.publish_beside(Protocol::Udp, PORT, "198.51.100.10:80") {
                return None;
            }
            bench.send(&udp, uplink);
            bench.send_early_on_its_way(&udp.bytes())
        }
        Reason::Martian => {
            publish(bench, Protocol::Udp, |_| {});
            let client = at("127.0.0.1:4000");
            bench.send(
                &Frame::first(Protocol::Udp, client, udp.destination),
                uplink,
            )
        }
        Reason::NotAllowed => {
            publish(bench, Protocol::Tcp, |entry| {
                entry.flags |= flag::ALLOW_LIST
            });
            bench.send(&tcp, uplink)
        }
        Reason::Cut => {
            publish(bench, Protocol::Tcp, |_| {});
            proven(bench, 4000);
            let (key, _) = bench.flow();
            let maps = &mut bench.datapath.maps;
            maps.flows.cut(&key, |_| true).unwrap();
            bench.send(&tcp.with_flags(ACK), uplink)
        }
        Reason::Banned => {
            publish(bench, Protocol::Tcp, |_| {});
            let client = tcp.source.ip().into();
            bench.datapath.maps.ban(client, None).unwrap();
            bench.send(&tcp, uplink)
        }
        Reason::OtherInterface => {
            let limits = Limits {
                ifindex: LO,
                ..Limits::default()
            };
            limited(bench, limits);
            bench.send(&tcp, uplink)
        }
        Reason::TooManyFlows => {
            let limits = Limits {
                flows: 1,
                ..Limits::default()
            };
            limited(bench, limits);
            proven(bench, 4000);
            bench.send(&tcp_from(4001), uplink)
        }
        Reason::RateLimited | Reason::SourceRateLimited => {
            let by_source = reason == Reason::SourceRateLimited;
            let limits = Limits {
                new_flows: u32::from(!by_source),
                new_flows_by_source: u32::from(by_source),
                ..Limits::default()
            };
            limited(bench, limits);
            (4000..4005).for_each(|port| drop(bench.send(&tcp_from(port), uplink)));
            bench.send(&tcp_from(4005), uplink)
        }
        Reason::BandwidthExceeded => {
            let limits = Limits {
                bits: [1, 0],
                ..Limits::default()
            };
            limited(bench, limits);
            proven(bench, 4000);
            let mut segment = tcp.with_flags(ACK);
            segment.payload = vec![0; 1400];
            (0..200).for_each(|_| drop(bench.send(&segment, uplink)));
            bench.send(&segment, uplink)
        }
        Reason::NoFreePort => {
            publish(bench, Protocol::Tcp, |_| {});
            let frontend = at("127.0.0.1:8080");
            for port in 4000..4002 {
                let client = std::net::SocketAddr::from(([127, 0, 0, 1], port));
                let frame = Frame::first(Protocol::Tcp, client, frontend);
                let arrived = bench.send(&frame, LO).forwarded();
                bench.send(&arrived.reply(), bench.container).forwarded();
                bench.send(&frame.with_flags(ACK), LO).forwarded();
            }
            let client = at("127.0.0.1:4002");
            bench.send(&Frame::first(Protocol::Tcp, client, frontend), LO)
        }
        Reason::NoSourcePort => {
            publish(bench, Protocol::Udp, |_| {});
            let frontend = at("127.0.0.1:8080");
            for port in 4000..4002 {
                let client = std::net::SocketAddr::from(([127, 0, 0, 1], port));
                let frame = Frame::first(Protocol::Udp, client, frontend);
                let arrived = bench.send(&frame, LO).forwarded();
                bench.send(&arrived.reply(), bench.container).forwarded();
                bench.send(&frame.with_flags(ACK), LO).forwarded();
            }
            let client = at("127.0.0.1:4002");
            bench.send(&Frame::first(Protocol::Udp, client, frontend), LO)
        }
        Reason::FlowsFull => {
            publish(bench, Protocol::Tcp, |_| {});
            fill(bench);
            proven(bench, 5000)
        }
        Reason::SourceShare => {
            publish(bench, Protocol::Tcp, |_| {});
            (4000..4000 + FLOWS as u16 - 1).for_each(|port| drop(proven(bench, port)));
            proven(bench, 5000)
        }
        Reason::NoWayBack => {
            publish(bench, Protocol::Tcp, |_| {});
            let nowhere = Interface {
                delivery: delivery::NONE,
                ..UPLINK
            };
            let maps = &mut bench.datapath.maps;
            maps.set_interface(uplink, Some(behind(uplink, nowhere)))
                .unwrap();
            let answer = bench.send(&tcp, uplink).forwarded().reply();
            bench.send(&answer, bench.container)
        }
        Reason::NoEntry => {
            publish(bench, Protocol::Tcp, |_| {});
            fill(bench);
            bench.send(
                &Frame::first(Protocol::Tcp, at("127.0.0.1:4000"), at("127.0.0.1:8080")),
                LO,
            )
        }
        // The parser has seen all headers that are written: this says what the verifier wants to be told, and what no
        // packet brings about.
        Reason::Unwritable => return None,
    })
}

/// With an alias for one of two source ports, and one that is left where a source has three.
const FLOWS: u32 = 4;

#[test]
fn every_reason_is_counted_for_some_packet() {
    let mut missing = Vec::new();
    for &reason in Reason::ALL {
        let options = Options {
            snat: (61_000, 2),
            flows: FLOWS,
            ..options()
        };
        bench_with(options, |bench| match scenario(reason, bench) {
            Some(outcome) if reason == Reason::NotOurs => {
                assert!(outcome.reasons.is_empty(), "{outcome:?}");
            }
            Some(outcome) => {
                let name = reason.name();
                assert!(outcome.reasons.contains(&name), "{name}: {outcome:?}");
            }
            None => missing.push(reason),
        });
    }
    let mut expected = vec![Reason::Unwritable];
    if kernel().peer_from_lo {
        expected.insert(0, Reason::LongerThanMtu);
    }
    // XDP programs are run for a device from 5.15 on.
    if missing.contains(&Reason::ForwardedEarly) {
        assert!(!kernel().bind_error, "5.18 can");
        expected.insert(0, Reason::ForwardedEarly);
    }
    missing.sort_by_key(|&reason| reason as u32);
    assert_eq!(missing, expected, "without a scenario");
}
