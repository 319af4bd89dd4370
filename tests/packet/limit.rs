//! The limits of a publish: flows at once, new flows and bytes a second, the device of its clients. And that they are none of
//! another's.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::{Duration, Instant},
};

use forwarder::datapath::xdp::Mode;
use forwarder_common::{policy::Limits, publish::flag};
use forwarder_tests::frame::{ACK, FIN_ACK, Frame, Protocol, RST};

use crate::bench::{Bench, LO, REDIRECT, XDP_DROP, XDP_PASS, at, bench, network};

const PORT: u16 = 8080;
/// Client, host, backend, the host's own client and where that connects to.
const WORLDS: [[&str; 5]; 2] = [
    [
        "198.51.100.9:4000",
        "198.51.100.2:8080",
        "172.31.0.2:80",
        "127.0.0.1:4000",
        "127.0.0.1:8080",
    ],
    [
        "[2001:db8:100::9]:4000",
        "[2001:db8:100::2]:8080",
        "[fd00:31::2]:80",
        "[::1]:4000",
        "[::1]:8080",
    ],
];

fn limit(bench: &mut Bench, limits: Limits) {
    bench.datapath.maps.set_limits(1, &limits).unwrap();
}

fn first(protocol: Protocol, client: &str, host: &str, port: u16) -> Frame {
    let mut client = at(client);
    client.set_port(port);
    Frame::first(protocol, client, at(host))
}

/// Has both sides speak; what the client says then.
fn answered(bench: &Bench, first: &Frame, by: u32) -> Frame {
    let arrived = bench.send(first, by).forwarded();
    bench.send(&arrived.reply(), bench.container).forwarded();
    first.clone().with_flags(ACK)
}

fn refused(bench: &Bench, reason: &str) -> u64 {
    let usage = bench.datapath.maps.usage(1).unwrap();
    usage.refused.get(reason).copied().unwrap_or_default()
}

#[test]
fn no_more_flows_at_once_than_may_be() {
    for [client, host, backend, ..] in WORLDS {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            bench(|bench| {
                bench.publish(protocol, PORT, backend);
                let entry = bench.entry(9090, backend);
                bench.publish_entry(2, None, protocol, 9090, &entry);
                limit(
                    bench,
                    Limits {
                        flows: 2,
                        ..Limits::default()
                    },
                );
                for port in [4000, 4001] {
                    let first = first(protocol, client, host, port);
                    let ack = answered(bench, &first, bench.uplink);
                    bench.send(&ack, bench.uplink).forwarded();
                }
                let third = first(protocol, client, host, 4002);
                bench.send(&third, bench.uplink).dropped("too_many_flows");
                assert_eq!(refused(bench, "too_many_flows"), 1);
                let mut other = third.clone();
                other.destination.set_port(9090);
                bench.send(&other, bench.uplink).forwarded();
                // Those that are there go on, and one that ends makes room.
                let one = first(protocol, client, host, 4000).with_flags(ACK);
                bench.send(&one, bench.uplink).forwarded();
                let mut flows = bench.datapath.maps.flows.all().map(Result::unwrap);
                let (key, _) = flows.find(|(_, flow)| flow.publish() == 1).unwrap();
                drop(flows);
                bench.datapath.maps.flows.end(&key, |_| true).unwrap();
                bench.send(&third, bench.uplink).forwarded();
            });
        }
    }
}

/// A client's connection that is over: either side takes leave, or the client resets it.
fn over(bench: &Bench, first: &Frame, by: u32, reset: bool) {
    let ack = answered(bench, first, by);
    let arrived = bench.send(&ack, by).forwarded();
    if reset {
        bench.send(&ack.with_flags(RST), by).forwarded();
        return;
    }
    let bye = arrived.reply().with_flags(FIN_ACK);
    let bye = bench.send(&bye, bench.container).forwarded();
    let leave = Frame {
        source_mac: first.source_mac,
        destination_mac: first.destination_mac,
        ..bye.reply()
    };
    let leave = bench.send(&leave, by).forwarded();
    let last = leave.reply().with_flags(ACK);
    bench.send(&last, bench.container).forwarded();
}

/// Its flow stays for two minutes, for stray segments.
#[test]
fn a_connection_that_is_over_is_none_of_those_at_once() {
    for [client, host, backend, local, localhost] in WORLDS {
        for (reset, on_this_host) in [(false, false), (true, false), (false, true), (true, true)] {
            bench(|bench| {
                bench.publish(Protocol::Tcp, PORT, backend);
                let limits = Limits {
                    flows: 1,
                    ..Limits::default()
                };
                limit(bench, limits);
                let (client, host, by) = match on_this_host {
                    true => (local, localhost, LO),
                    false => (client, host, bench.uplink),
                };
                for port in 4000..4005 {
                    over(bench, &first(Protocol::Tcp, client, host, port), by, reset);
                }
                // One of them again, and then there is no room.
                let again = answered(bench, &first(Protocol::Tcp, client, host, 4002), by);
                bench.send(&again, by).forwarded();
                let usage = bench.datapath.maps.usage(1).unwrap();
                assert_eq!((usage.flows, usage.begun), (1, 6));
                let other = first(Protocol::Tcp, client, host, 4009);
                bench.send(&other, by).dropped("too_many_flows");
                let flows = bench.datapath.maps.flows.all().map(Result::unwrap);
                for (key, _) in flows.collect::<Vec<_>>() {
                    bench.datapath.maps.flows.end(&key, |_| true).unwrap();
                }
                assert_eq!(bench.datapath.maps.usage(1).unwrap().flows, 0);
            });
        }
    }
}

/// Its flow is there still.
#[test]
fn a_connection_from_the_port_of_one_that_is_over_counts_as_a_new_one() {
    for [client, host, backend, ..] in WORLDS {
        for reset in [false, true] {
            bench(|bench| {
                bench.publish(Protocol::Tcp, PORT, backend);
                let limits = Limits {
                    new_flows_by_source: 1,
                    ..Limits::default()
                };
                limit(bench, limits);
                let first = first(Protocol::Tcp, client, host, 4000);
                for _ in 0..5 {
                    over(bench, &first, bench.uplink, reset);
                }
                bench
                    .send(&first, bench.uplink)
                    .dropped("source_rate_limited");
                limit(bench, Limits::default());
                let mut entry = bench.entry(PORT, backend);
                entry.flags |= flag::ALLOW_LIST;
                bench.publish_entry(1, None, Protocol::Tcp, PORT, &entry);
                bench.send(&first, bench.uplink).dropped("not_allowed");
                entry.flags = flag::DRAINING;
                bench.publish_entry(1, None, Protocol::Tcp, PORT, &entry);
                let (bytes, by) = (first.bytes(), bench.uplink);
                bench.send(&first, by).passed(&bytes, "draining");
                let next = first.with_flags(ACK);
                bench.send(&next, by).passed(&next.bytes(), "draining");
            });
        }
    }
}

/// Who makes the backend alone believe that the last connection is over, by a reset that the program does not heed, gets no new ones
/// for nothing. How many flows there may be does not matter, as there is no more than there was.
#[test]
fn a_connection_from_the_port_of_one_that_seems_alive_counts_as_a_new_one() {
    for [client, host, backend, ..] in WORLDS {
        bench(|bench| {
            bench.publish(Protocol::Tcp, PORT, backend);
            let limits = Limits {
                new_flows_by_source: 1,
                flows: 1,
                ..Limits::default()
            };
            limit(bench, limits);
            let first = first(Protocol::Tcp, client, host, 4000);
            for _ in 0..5 {
                let ack = answered(bench, &first, bench.uplink);
                bench.send(&ack, bench.uplink).forwarded();
            }
            bench
                .send(&first, bench.uplink)
                .dropped("source_rate_limited");
            // The one that may be alive goes on.
            let ack = first.with_flags(ACK);
            bench.send(&ack, bench.uplink).forwarded();
        });
    }
}

/// As where the backlog is full: the client's next try is let in as soon as there is room.
#[test]
fn handshakes_at_once_do_not_get_round_the_number_of_flows() {
    for [client, host, backend, ..] in WORLDS {
        bench(|bench| {
            bench.publish(Protocol::Tcp, PORT, backend);
            limit(
                bench,
                Limits {
                    flows: 2,
                    ..Limits::default()
                },
            );
            let acks: Vec<_> = (4000..4003)
                .map(|port| {
                    let first = first(Protocol::Tcp, client, host, port);
                    answered(bench, &first, bench.uplink)
                })
                .collect();
            bench.send(&acks[0], bench.uplink).forwarded();
            bench.send(&acks[1], bench.uplink).forwarded();
            bench.send(&acks[2], bench.uplink).dropped("too_many_flows");
            let mut flows = bench.datapath.maps.flows.all().map(Result::unwrap);
            let (key, _) = flows
                .find(|(_, flow)| flow.ports().0 == acks[0].source.port().to_be())
                .unwrap();
            drop(flows);
            bench.datapath.maps.flows.end(&key, |_| true).unwrap();
            bench.send(&acks[2], bench.uplink).forwarded();
            assert_eq!(bench.datapath.maps.usage(1).unwrap().flows, 2);
        });
    }
}

#[test]
fn this_hosts_own_clients_count_from_their_first_packet() {
    for [.., backend, client, host] in WORLDS {
        bench(|bench| {
            bench.publish(Protocol::Udp, PORT, backend);
            limit(
                bench,
                Limits {
                    flows: 1,
                    ..Limits::default()
                },
            );
            let mine = first(Protocol::Udp, client, host, 4000);
            bench.send(&mine, LO).forwarded();
            bench
                .send(&first(Protocol::Udp, client, host, 4001), LO)
                .dropped("too_many_flows");
            bench.send(&mine, LO).forwarded();
        });
    }
}

/// Offers new flows on two CPUs for as long; how many began, were offered, and after how long.
fn flood(bench: &Bench, world: [&str; 5], time: Duration) -> (u32, u32, Duration) {
    let (begun, offered) = (AtomicU32::new(0), AtomicU32::new(0));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for cpu in 0..2_u16 {
            let (begun, offered) = (&begun, &offered);
            scope.spawn(move || {
                let mut client = at(world[0]);
                while start.elapsed() < time {
                    for port in (cpu..50_000).step_by(500) {
                        client.set_port(1024 + port + (offered.load(Relaxed) as u16 & 0xff));
                        let nth = offered.fetch_add(1, Relaxed);
                        client.set_ip(match client.ip() {
                            IpAddr::V4(_) => IpAddr::from([198, 18, (nth >> 8) as u8, nth as u8]),
                            IpAddr::V6(_) => {
                                format!("2001:db8:{:x}::9", nth & 0xffff).parse().unwrap()
                            }
                        });
                        let frame = Frame::first(Protocol::Udp, client, at(world[1]));
                        let (action, _) = bench
                            .datapath
                            .try_frame(&frame.bytes(), bench.uplink, 0)
                            .unwrap();
                        if action == REDIRECT {
                            begun.fetch_add(1, Relaxed);
                        }
                    }
                }
            });
        }
    });
    (begun.into_inner(), offered.into_inner(), start.elapsed())
}

/// More never begin. Where this machine is busy with other things for longer than a burst, fewer do: then it is tried again.
#[test]
fn new_flows_begin_at_the_pace_that_was_asked_for_on_two_cpus() {
    const TRIES: usize = 20;
    for (world, rate) in WORLDS.into_iter().zip([1000, 100_000]) {
        let mut tries = Vec::new();
        while !tries.last().is_some_and(|(_, _, exact)| *exact) {
            assert!(tries.len() < TRIES, "{rate}/s: {tries:?}");
            bench(|bench| {
                bench.publish(Protocol::Udp, PORT, world[2]);
                limit(
                    bench,
                    Limits {
                        new_flows: rate,
                        ..Limits::default()
                    },
                );
                let (begun, offered, time) = flood(bench, world, Duration::from_millis(600));
                let due = f64::from(rate) * (time.as_secs_f64() + 0.05);
                let share = f64::from(begun) / due;
                assert!(share < 1.05, "{rate}/s: {begun} of {offered} in {time:?}");
                let refused = refused(bench, "rate_limited");
                assert_eq!(u64::from(offered - begun), refused);
                // An emulated machine cannot offer as many.
                let all = u64::from(begun) * 100 > u64::from(offered) * 95;
                tries.push((offered, share, share > 0.95 || all));
            });
        }
    }
}

#[test]
fn an_idle_publish_lets_five_begin_at_once_and_then_waits() {
    for [client, host, backend, ..] in WORLDS {
        bench(|bench| {
            bench.publish(Protocol::Tcp, PORT, backend);
            limit(
                bench,
                Limits {
                    new_flows: 1,
                    ..Limits::default()
                },
            );
            for port in 4000..4005 {
                let frame = first(Protocol::Tcp, client, host, port);
                bench.send(&frame, bench.uplink).forwarded();
            }
            let sixth = first(Protocol::Tcp, client, host, 4005);
            bench.send(&sixth, bench.uplink).dropped("rate_limited");
            // Without the limit it is let in at once, and flows that are there never ask.
            limit(bench, Limits::default());
            bench.send(&sixth, bench.uplink).forwarded();
        });
    }
}

#[test]
fn a_source_is_limited_by_itself_and_an_ipv6_one_by_its_network() {
    for ([client, host, backend, ..], same, other) in [
        (WORLDS[0], "198.51.100.9:1", "198.51.100.10:1"),
        (WORLDS[1], "[2001:db8:100::8]:1", "[2001:db8:101::9]:1"),
    ] {
        bench(|bench| {
            bench.publish(Protocol::Udp, PORT, backend);
            let entry = bench.entry(9090, backend);
            bench.publish_entry(2, None, Protocol::Udp, 9090, &entry);
            let limits = Limits {
                new_flows_by_source: 1,
                ..Limits::default()
            };
            limit(bench, limits);
            bench.datapath.maps.set_limits(2, &limits).unwrap();
            for port in 4000..4005 {
                let frame = first(Protocol::Udp, client, host, port);
                bench.send(&frame, bench.uplink).forwarded();
            }
            let mut sixth = first(Protocol::Udp, same, host, 4005);
            bench
                .send(&sixth, bench.uplink)
                .dropped("source_rate_limited");
            assert_eq!(refused(bench, "source_rate_limited"), 1);
            let frame = first(Protocol::Udp, other, host, 4005);
            bench.send(&frame, bench.uplink).forwarded();
            sixth.destination.set_port(9090);
            bench.send(&sixth, bench.uplink).forwarded();
        });
    }
}

/// How many packets of 1,400 octets 80,000 bits a second let pass from then on: what 256 KiB are at once, and a few more while
/// time goes by.
fn due(start: Instant) -> std::ops::RangeInclusive<usize> {
    // With the headers of IPv6 and of IPv4.
    let [least, most] = [1462, 1442].map(|octets| (256 << 10) / octets);
    let later = start.elapsed().as_secs_f64() * 10_000.0 / 1400.0;
    least..=most + 4 + later as usize
}

/// Sends 200 of these; how many were forwarded. The others were dropped for the reason.
fn carried(bench: &Bench, frame: &Frame, by: u32) -> usize {
    (0..200).filter(|_| is_carried(bench, frame, by)).count()
}

/// Whether it was forwarded. Otherwise it was dropped for the reason.
fn is_carried(bench: &Bench, frame: &Frame, by: u32) -> bool {
    let outcome = bench.send(frame, by);
    let forwarded = outcome.action == REDIRECT;
    if !forwarded {
        outcome.dropped("bandwidth_exceeded");
    }
    forwarded
}

#[test]
fn each_direction_has_its_own_bandwidth() {
    for [client, host, backend, ..] in WORLDS {
        for direction in [0, 1] {
            bench(|bench| {
                bench.publish(Protocol::Udp, PORT, backend);
                let mut bits = [0; 2];
                bits[direction] = 80_000;
                limit(
                    bench,
                    Limits {
                        bits,
                        ..Limits::default()
                    },
                );
                let mut there = first(Protocol::Udp, client, host, 4000);
                there.payload = vec![0; 1400];
                let back = bench.send(&there, bench.uplink).forwarded().reply();
                let start = Instant::now();
                let sent = carried(bench, &there, bench.uplink);
                let answered = carried(bench, &back, bench.container);
                let (limited, free) = if direction == 0 {
                    (sent, answered)
                } else {
                    (answered, sent)
                };
                assert_eq!(free, 200);
                let due = due(start);
                assert!(due.contains(&limited), "{limited}, not {due:?}");
                // What is dropped is no packet of the flow.
                let (_, flow) = bench.flow();
                let packets = [sent as u64 + 1, answered as u64];
                assert_eq!(flow.packets(), packets);
                assert_eq!(refused(bench, "bandwidth_exceeded"), 200 - limited as u64);
            });
        }
    }
}

#[test]
fn xdp_heeds_the_bandwidth_too() {
    for (client, backend, neighbour) in [
        ("198.51.100.9:4000", "198.51.100.10:80", "198.51.100.2:8080"),
        (
            "[2001:db8:100::9]:4000",
            "[2001:db8:100::10]:80",
            "[2001:db8:100::2]:8080",
        ),
    ] {
        bench(|bench| {
            if !bench.publish_beside(Protocol::Udp, PORT, backend) {
                return;
            }
            limit(
                bench,
                Limits {
                    bits: [80_000; 2],
                    ..Limits::default()
                },
            );
            let mut there = first(Protocol::Udp, client, neighbour, 4000);
            there.payload = vec![0; 1400];
            let start = Instant::now();
            bench.send(&there, bench.uplink).forwarded();
            let mut carried = 1;
            let mut dropped = 0;
            for _ in 0..300 {
                let early = bench.send_early(&there.bytes());
                match early.action {
                    XDP_DROP => {
                        assert_eq!(early.reasons, ["bandwidth_exceeded"]);
                        dropped += 1;
                    }
                    XDP_PASS => {
                        // The kernel resolves the neighbour anew, and tc goes on by the same account.
                        carried += usize::from(is_carried(bench, &there, bench.uplink));
                    }
                    _ => carried += 1,
                }
            }
            assert_ne!(dropped, 0);
            let due = due(start);
            assert!(due.contains(&carried), "{carried}, not {due:?}");
        });
    }
}

#[test]
fn clients_come_by_the_device_that_the_publish_serves() {
    for [client, host, backend, local, here] in WORLDS {
        bench(|bench| {
            bench.publish(Protocol::Tcp, PORT, backend);
            bench
                .datapath
                .attach_xdp(bench.uplink, Mode::Native)
                .unwrap();
            let limits = |ifindex| Limits {
                ifindex,
                ..Limits::default()
            };
            let outside = first(Protocol::Tcp, client, host, 4000);
            limit(bench, limits(bench.container));
            bench
                .send(&outside, bench.uplink)
                .dropped("other_interface");
            if bench.datapath.try_early(&[0; 60], bench.uplink).is_ok() {
                let early = bench.send_early(&outside.bytes());
                assert_eq!(early.action, XDP_DROP);
            }
            limit(bench, limits(bench.uplink));
            bench.send(&outside, bench.uplink).forwarded();
            let inside = first(Protocol::Tcp, local, here, 4000);
            bench.send(&inside, LO).dropped("other_interface");
            let container = if at(client).is_ipv4() {
                "172.31.0.3"
            } else {
                "fd00:31::3"
            };
            let source = SocketAddr::new(container.parse().unwrap(), 4000);
            let container = Frame::first(Protocol::Tcp, source, at(host));
            bench
                .send(&container, bench.container)
                .dropped("other_interface");
            limit(bench, limits(LO));
            bench.send(&inside, LO).forwarded();
        });
    }
}

/// The device that has the host's addresses there stands for all its ports.
#[test]
fn a_bridge_stands_for_its_ports() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, PORT, WORLDS[0][2]);
        let interface = forwarder_common::publish::Interface {
            layer3: 77,
            ..crate::bench::UPLINK
        };
        let maps = &mut bench.datapath.maps;
        maps.set_interface(bench.uplink, Some(interface)).unwrap();
        let outside = first(Protocol::Tcp, WORLDS[0][0], WORLDS[0][1], 4000);
        limit(
            bench,
            Limits {
                ifindex: 77,
                ..Limits::default()
            },
        );
        bench.send(&outside, bench.uplink).forwarded();
    });
}

#[test]
fn limits_end_with_their_publish() {
    bench(|bench| {
        let [client, host, backend, ..] = WORLDS[0];
        limit(
            bench,
            Limits {
                ifindex: 77,
                ..Limits::default()
            },
        );
        bench.publish(Protocol::Tcp, PORT, backend);
        let frame = first(Protocol::Tcp, client, host, 4000);
        bench.send(&frame, bench.uplink).dropped("other_interface");
        bench.datapath.maps.uninstall(1).unwrap();
        bench.publish(Protocol::Tcp, PORT, backend);
        bench.send(&frame, bench.uplink).forwarded();
    });
}

/// `::/0` is all of IPv6.
#[test]
fn an_allow_list_of_all_ipv6_lets_no_ipv4_in() {
    bench(|bench| {
        let mut entry = bench.entry(PORT, WORLDS[0][2]);
        entry.flags |= forwarder_common::publish::flag::ALLOW_LIST;
        let mut installed = bench.installed(None, Protocol::Tcp, PORT, &entry);
        installed.allow = vec![network("::/0"), network("::ffff:192.0.2.0/120")];
        bench.datapath.maps.install(1, &installed).unwrap();
        let from = |client| first(Protocol::Tcp, client, WORLDS[0][1], 4000);
        bench
            .send(&from("198.51.100.9:1"), bench.uplink)
            .dropped("not_allowed");
        bench.send(&from("192.0.2.9:1"), bench.uplink).forwarded();
        let mut installed = installed.clone();
        installed.entry = bench.entry(PORT, WORLDS[1][2]);
        installed.entry.flags |= forwarder_common::publish::flag::ALLOW_LIST;
        installed.backend = at(WORLDS[1][2]).ip();
        bench.datapath.maps.install(1, &installed).unwrap();
        let frame = first(Protocol::Tcp, WORLDS[1][0], WORLDS[1][1], 4000);
        bench.send(&frame, bench.uplink).forwarded();
    });
}
