//! Another machine's packets to a container, and the container's answers: DNAT and its reverse.

use forwarder_common::{
    flow::delivery,
    publish::{Interface, flag},
};
use forwarder_tests::{
    fragment::cut,
    frame::{Frame, Protocol},
    icmp::IcmpError,
    summed,
};
use proptest::prelude::*;

use crate::bench::{
    BRIDGE_MAC, Bench, CONTAINER_MAC, Outcome, REDIRECT, UPLINK, at, behind, bench,
};

fn there_and_back(bench: &mut Bench, protocol: Protocol, client: &str, host: &str, backend: &str) {
    bench.publish(protocol, at(host).port(), backend);
    let sent = Frame::first(protocol, at(client), at(host));
    let outcome = bench.send(&sent, bench.uplink);
    assert_eq!(outcome.reasons, ["forwarded_original", "new_flow"]);
    let forwarded = outcome.forwarded();
    let expected = Frame {
        source_mac: BRIDGE_MAC,
        destination_mac: CONTAINER_MAC,
        destination: at(backend),
        ttl: 63,
        ..sent.clone()
    };
    assert_eq!(forwarded, expected);

    let answer = forwarded.reply();
    let outcome = bench.send(&answer, bench.container);
    assert_eq!(outcome.reasons, ["forwarded_reply"]);
    // MACs are the kernel's business: it leaves by `bpf_redirect_neigh`.
    let expected = Frame {
        source: at(host),
        destination: at(client),
        ttl: 63,
        ..answer
    };
    assert_eq!(outcome.forwarded(), expected);
}

#[test]
fn tcp_over_ipv4() {
    bench(|b| {
        there_and_back(
            b,
            Protocol::Tcp,
            "198.51.100.9:4000",
            "198.51.100.2:8080",
            "172.31.0.2:80",
        )
    });
}

#[test]
fn tcp_over_ipv6() {
    bench(|b| {
        there_and_back(
            b,
            Protocol::Tcp,
            "[2001:db8:100::9]:4000",
            "[2001:db8:100::2]:8080",
            "[fd00:31::2]:80",
        )
    });
}

#[test]
fn udp_over_ipv4() {
    bench(|b| {
        there_and_back(
            b,
            Protocol::Udp,
            "198.51.100.9:4000",
            "198.51.100.2:53",
            "172.31.0.2:5353",
        )
    });
}

#[test]
fn udp_over_ipv6() {
    bench(|b| {
        there_and_back(
            b,
            Protocol::Udp,
            "[2001:db8:100::9]:4000",
            "[2001:db8:100::2]:53",
            "[fd00:31::2]:5353",
        )
    });
}

#[test]
fn the_same_port_on_both_sides() {
    bench(|b| {
        there_and_back(
            b,
            Protocol::Tcp,
            "198.51.100.9:4000",
            "198.51.100.2:80",
            "172.31.0.2:80",
        )
    });
}

#[test]
fn udp_zero_checksum_stays_zero() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:5353");
        let mut sent = Frame::first(
            Protocol::Udp,
            at("198.51.100.9:4000"),
            at("198.51.100.2:53"),
        );
        sent.no_checksum = true;
        assert!(bench.send(&sent, bench.uplink).forwarded().no_checksum);
    });
}

#[test]
fn a_udp_checksum_that_comes_out_as_zero_is_sent_as_ffff() {
    for (client, host, backend) in [
        ("198.51.100.9:4000", "198.51.100.2:53", "172.31.0.2:5353"),
        (
            "[2001:db8:100::9]:4000",
            "[2001:db8:100::2]:53",
            "[fd00:31::2]:5353",
        ),
    ] {
        bench(|bench| {
            bench.publish(Protocol::Udp, 53, backend);
            let arrives = Frame::first(Protocol::Udp, at(client), at(backend));
            let mut sent = arrives.with_checksum_ffff();
            sent.destination = at(host);
            let forwarded = bench.send(&sent, bench.uplink).forwarded();
            assert!(!forwarded.no_checksum);

            let mut answer = Frame::first(Protocol::Udp, at(host), at(client)).with_checksum_ffff();
            answer.source = at(backend);
            let answered = bench.send(&answer, bench.container).forwarded();
            assert!(!answered.no_checksum);
        });
    }
}

#[test]
fn every_checksum_is_right() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:5353");
        let entry = bench.entry(53, "172.31.0.2:5353");
        bench.publish_entry(2, None, Protocol::Tcp, 53, &entry);
        let frames = (
            any::<[u8; 3]>(),
            1_u16..,
            any::<bool>(),
            proptest::collection::vec(any::<u8>(), 0..64),
        );
        let mut runner = proptest::test_runner::TestRunner::default();
        runner
            .run(&frames, |([a, b, c], port, tcp, payload)| {
                let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
                let client = std::net::SocketAddr::from(([10, a, b, c], port));
                let mut sent = Frame::first(protocol, client, at("198.51.100.2:53"));
                sent.payload = payload;
                let forwarded = bench.send(&sent, bench.uplink).forwarded(); // recomputes them
                bench.send(&forwarded.reply(), bench.container).forwarded();
                Ok(())
            })
            .unwrap();
    });
}

#[test]
fn a_range_maps_one_to_one() {
    bench(|bench| {
        let mut entry = bench.entry(10_000, "172.31.0.2:20000");
        entry.flags &= !flag::SINGLE_PORT;
        bench.publish_range(Protocol::Udp, (10_000, 10_099), &entry);
        let sent = Frame::first(
            Protocol::Udp,
            at("198.51.100.9:4000"),
            at("198.51.100.2:10042"),
        );
        let forwarded = bench.send(&sent, bench.uplink).forwarded();
        assert_eq!(forwarded.destination, at("172.31.0.2:20042"));
        let answer = bench.send(&forwarded.reply(), bench.container).forwarded();
        assert_eq!(answer.source, at("198.51.100.2:10042"));
    });
}

#[test]
fn the_exact_address_wins_over_every_address() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let special = bench.entry(8080, "172.31.0.3:81");
        bench.publish_entry(2, Some("172.31.0.1"), Protocol::Tcp, 8080, &special);
        for (host, backend) in [
            ("172.31.0.1:8080", "172.31.0.3:81"),
            ("198.51.100.2:8080", "172.31.0.2:80"),
        ] {
            let sent = Frame::first(Protocol::Tcp, at("198.51.100.9:4000"), at(host));
            assert_eq!(
                bench.send(&sent, bench.uplink).forwarded().destination,
                at(backend)
            );
        }
    });
}

#[test]
fn the_unspecified_address_is_one_familys_addresses() {
    bench(|bench| {
        let entry = bench.entry(8080, "172.31.0.2:80");
        bench.publish_entry(1, Some("0.0.0.0"), Protocol::Tcp, 8080, &entry);
        let sent = Frame::first(
            Protocol::Tcp,
            at("198.51.100.9:4000"),
            at("198.51.100.2:8080"),
        );
        assert_eq!(
            bench.send(&sent, bench.uplink).forwarded().destination,
            at("172.31.0.2:80")
        );
        let sent = Frame::first(
            Protocol::Tcp,
            at("[2001:db8:100::9]:4000"),
            at("[2001:db8:100::2]:8080"),
        );
        bench.send(&sent, bench.uplink).passed(&sent.bytes(), "");
    });
}

#[test]
fn each_family_has_its_own_publish_of_a_port() {
    bench(|bench| {
        let v4 = bench.entry(8080, "172.31.0.2:80");
        bench.publish_entry(1, Some("0.0.0.0"), Protocol::Tcp, 8080, &v4);
        let v6 = bench.entry(8080, "[fd00:31::2]:81");
        bench.publish_entry(2, Some("::"), Protocol::Tcp, 8080, &v6);
        let first = |client, host| Frame::first(Protocol::Tcp, at(client), at(host));
        let by_v4 = first("198.51.100.9:4000", "198.51.100.2:8080");
        let by_v6 = first("[2001:db8:100::9]:4000", "[2001:db8:100::2]:8080");
        let backend = |bench: &Bench, sent| bench.send(sent, bench.uplink).forwarded().destination;
        assert_eq!(backend(bench, &by_v4), at("172.31.0.2:80"));
        assert_eq!(backend(bench, &by_v6), at("[fd00:31::2]:81"));
        bench.datapath.maps.uninstall(1).unwrap();
        bench.send(&by_v4, bench.uplink).passed(&by_v4.bytes(), "");
        assert_eq!(backend(bench, &by_v6), at("[fd00:31::2]:81"));
    });
}

#[test]
fn a_container_is_answered_at_the_mac_that_it_sent_from() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let sent = Frame::first(Protocol::Tcp, at("172.31.0.3:4000"), at("172.31.0.1:8080"));
        let forwarded = bench.send(&sent, bench.container).forwarded();
        assert_eq!(
            forwarded.source, sent.source,
            "a hairpin keeps the client's address"
        );
        let answer = bench.send(&forwarded.reply(), bench.container).forwarded();
        assert_eq!(answer.destination_mac, sent.source_mac);
        assert_eq!(answer.source_mac, sent.destination_mac);
        assert_eq!(
            (answer.source, answer.destination),
            (sent.destination, sent.source)
        );
    });
}

#[test]
fn a_client_is_answered_where_it_is_now() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let uplink = Interface {
            delivery: delivery::DEVICE, // a bridge's port
            ..UPLINK
        };
        let maps = &mut bench.datapath.maps;
        maps.set_interface(bench.uplink, Some(behind(bench.uplink, uplink)))
            .unwrap();
        let mut sent = Frame::first(
            Protocol::Tcp,
            at("198.51.100.9:4000"),
            at("198.51.100.2:8080"),
        );
        let answer = bench.send(&sent, bench.uplink).forwarded().reply();
        let back = |bench: &Bench| {
            let answer = bench.send(&answer, bench.container).forwarded();
            (answer.destination_mac, bench.flow().1.back().ifindex)
        };
        assert_eq!(back(bench), (sent.source_mac, bench.uplink));
        let first = sent.source_mac;
        sent.source_mac = [2, 0, 0, 0, 0, 77];
        // Somebody else's device.
        bench.send(&sent, bench.container).forwarded();
        assert_eq!(back(bench), (first, bench.uplink));
        bench.send(&sent, bench.uplink).forwarded();
        assert_eq!(back(bench), (sent.source_mac, bench.uplink));
        // Its device has gone.
        sent.source_mac = [2, 0, 0, 0, 0, 78];
        bench
            .datapath
            .maps
            .set_interface(bench.uplink, None)
            .unwrap();
        bench.send(&sent, bench.container).forwarded();
        assert_eq!(back(bench), (sent.source_mac, bench.container));
    });
}

#[test]
fn the_verifier_accepts_the_traced_program_too() {
    bench(|bench| {
        bench.datapath.trace(true).unwrap();
        bench.datapath.trace(false).unwrap();
    });
}

/// A device has summed up the whole packet, and whoever checks that must find it right afterwards: of a container's answer
/// nobody else computes a sum.
#[test]
fn a_devices_sum_of_the_packet_stays_right() {
    bench(|bench| {
        let frame = Frame::first(
            Protocol::Udp,
            at("198.51.100.9:4000"),
            at("198.51.100.2:53"),
        );
        let program = bench.datapath.ingress_fd().unwrap();
        if summed::run(program, &frame.bytes(), bench.uplink).is_err() {
            return; // kernels before 6.17 cannot be asked
        }
        for (client, frontend, backend) in [
            ("198.51.100.9:4000", "198.51.100.2:8080", "172.31.0.2:80"),
            (
                "[2001:db8:100::9]:4000",
                "[2001:db8:100::2]:8080",
                "[fd00:31::2]:80",
            ),
        ] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                bench.publish(protocol, 8080, backend);
                let carried = |bytes: &[u8], ifindex| {
                    let program = bench.datapath.ingress_fd().unwrap();
                    let outcome = summed::run(program, bytes, ifindex);
                    let (action, bytes) = outcome.unwrap_or_else(|error| {
                        panic!("{protocol:?} from {client} to {backend}: {error}")
                    });
                    assert_eq!(action, REDIRECT);
                    bytes
                };
                let mut sent = Frame::first(protocol, at(client), at(frontend));
                let arrived = carried(&sent.bytes(), bench.uplink);
                let arrived = Frame::parse(&arrived).unwrap();
                let mut answer = arrived.reply();
                carried(&answer.bytes(), bench.container);
                let error = IcmpError::port_unreachable(&arrived);
                carried(&error.bytes(), bench.container);
                if protocol == Protocol::Udp {
                    sent.payload = vec![7; 100];
                    answer.payload = vec![7; 100];
                    for part in cut::<3>(&sent, 7) {
                        carried(&part, bench.uplink);
                    }
                    for part in cut::<3>(&answer, 8) {
                        carried(&part, bench.container);
                    }
                }
            }
        }
    });
}

/// The uplink takes 1,400 octets and tells nobody. Each side learns from the other's SYN what fits, wherever the option is.
#[test]
fn a_connection_asks_for_no_longer_segments_than_its_way_carries() {
    const MSS: [u8; 4] = [2, 4, 0x05, 0xb4]; // 1460
    for ([client, frontend, backend], headers) in [
        (
            ["198.51.100.9:4000", "198.51.100.2:8080", "172.31.0.2:80"],
            40,
        ),
        (
            [
                "[2001:db8:100::9]:4000",
                "[2001:db8:100::2]:8080",
                "[fd00:31::2]:80",
            ],
            60,
        ),
    ] {
        for (before, after) in [(&[][..], &[][..]), (&[1], &[1, 1, 1]), (&[4, 2], &[1, 1])] {
            bench(|bench| {
                bench.publish(Protocol::Tcp, 8080, backend);
                let narrow = Interface {
                    mtu: 1400,
                    ..UPLINK
                };
                let maps = &mut bench.datapath.maps;
                maps.set_interface(bench.uplink, Some(behind(bench.uplink, narrow)))
                    .unwrap();
                let options = [before, &MSS, after].concat();
                let sent = Frame::first(Protocol::Tcp, at(client), at(frontend));
                let arrived = bench.send_bytes(&with_options(&sent, &options), bench.uplink);
                let expected = (1400 - headers as u16).to_be_bytes();
                let asked = |outcome: Outcome| {
                    assert_eq!(outcome.action, REDIRECT, "{outcome:?}");
                    let packet = etherparse::SlicedPacket::from_ethernet(&outcome.bytes).unwrap();
                    let Some(etherparse::TransportSlice::Tcp(tcp)) = &packet.transport else {
                        panic!("{packet:?}");
                    };
                    let sum = match packet.net.as_ref().unwrap() {
                        etherparse::NetSlice::Ipv4(ip) => {
                            tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination())
                        }
                        etherparse::NetSlice::Ipv6(ip) => {
                            tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination())
                        }
                        etherparse::NetSlice::Arp(_) => panic!(),
                    };
                    assert_eq!(tcp.checksum(), sum.unwrap());
                    let at = before.len();
                    tcp.options()[at + 2..at + 4].to_vec()
                };
                assert_eq!(asked(arrived), expected);
                let answer = Frame {
                    source: at(backend),
                    destination: at(client),
                    ..sent.reply()
                };
                let answer = with_options(&answer, &options);
                assert_eq!(asked(bench.send_bytes(&answer, bench.container)), expected);
            });
        }
    }
}

/// The frame with options behind its TCP header, as many words.
fn with_options(frame: &Frame, options: &[u8]) -> Vec<u8> {
    let bytes = frame.bytes();
    let packet = etherparse::SlicedPacket::from_ethernet(&bytes).unwrap();
    let Some(etherparse::TransportSlice::Tcp(tcp)) = &packet.transport else {
        panic!("{packet:?}");
    };
    let mut header = tcp.to_header();
    header.set_options_raw(options).unwrap();
    let ethernet = etherparse::PacketBuilder::ethernet2(frame.source_mac, frame.destination_mac);
    let builder = match packet.net.as_ref().unwrap() {
        etherparse::NetSlice::Ipv4(ip) => {
            let ip = ip.header();
            ethernet.ipv4(ip.source(), ip.destination(), ip.ttl())
        }
        etherparse::NetSlice::Ipv6(ip) => {
            let ip = ip.header();
            ethernet.ipv6(ip.source(), ip.destination(), ip.hop_limit())
        }
        etherparse::NetSlice::Arp(_) => panic!(),
    };
    let mut whole = Vec::new();
    builder.tcp_header(header).write(&mut whole, &[]).unwrap();
    whole
}
