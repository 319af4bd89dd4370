//! Tuples that clash after DNAT get another source port, and keep their conversations apart.

use std::{
    collections::BTreeSet,
    net::{SocketAddr, UdpSocket},
    sync::Barrier,
    thread,
};

use forwarder_common::flow::{Phase, state};
use forwarder_tests::cpu::pin_this_thread;
use forwarder_tests::frame::{ACK, FIN_ACK, Frame, Protocol, RST, SYN, SYN_ACK};

use crate::bench::{Bench, LO, Outcome, REDIRECT, at, bench, bench_with_ports};

#[test]
fn two_frontends_of_one_backend_stay_apart() {
    bench(|bench| {
        let entry = bench.entry(8080, "172.31.0.2:80");
        bench.publish_entry(1, None, Protocol::Tcp, 8080, &entry);
        bench.publish_entry(2, None, Protocol::Tcp, 9090, &entry);
        let client = at("198.51.100.9:4000");
        let first = Frame::first(Protocol::Tcp, client, at("198.51.100.2:8080"));
        let second = Frame::first(Protocol::Tcp, client, at("198.51.100.2:9090"));
        let first = bench.send(&first, bench.uplink).forwarded();
        let second = bench.send(&second, bench.uplink).forwarded();
        assert_eq!(first.source, client);
        assert_eq!(second.source.ip(), client.ip());
        assert_ne!(second.source.port(), client.port());
        for (frame, port) in [(first, 8080), (second, 9090)] {
            let answer = bench.send(&frame.reply(), bench.container).forwarded();
            assert_eq!((answer.source.port(), answer.destination), (port, client));
        }
    });
}

#[test]
fn many_local_clients_never_share_a_port() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        let mut ports = BTreeSet::new();
        for port in 10_000..11_000 {
            let client = std::net::SocketAddr::from(([127, 0, 0, 1], port));
            let frame = Frame::first(Protocol::Udp, client, at("127.0.0.1:53"));
            let forwarded = bench.send(&frame, LO).forwarded();
            assert!(
                ports.insert(forwarded.source.port()),
                "{client} shares its port"
            );
            let answer = bench.send(&forwarded.reply(), bench.container).forwarded();
            assert_eq!(answer.destination, client);
        }
    });
}

#[test]
fn when_all_ports_are_in_use_a_new_client_is_refused_and_the_others_go_on() {
    bench_with_ports((61_000, 2), |bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        let client = |port| {
            let source = std::net::SocketAddr::from(([127, 0, 0, 1], port));
            Frame::first(Protocol::Udp, source, at("127.0.0.1:53"))
        };
        for port in [4000, 4001] {
            let arrived = bench.send(&client(port), LO).forwarded();
            bench.send(&arrived.reply(), bench.container).forwarded();
            bench.send(&client(port), LO).forwarded();
        }
        let late = client(4002);
        bench.send(&late, LO).dropped("no_source_port");
        bench.send(&client(4000), LO).forwarded();
        let (key, flow) = bench.datapath.maps.flows.all().next().unwrap().unwrap();
        bench.datapath.maps.flows.remove(&key, &flow).unwrap();
        bench.send(&client(4002), LO).forwarded();
    });
}

#[test]
fn ports_that_are_in_use_towards_one_backend_are_free_towards_the_next() {
    bench_with_ports((61_000, 2), |bench| {
        for backend in ["172.31.0.2:53", "172.31.0.3:53", "172.31.0.3:54"] {
            bench.publish(Protocol::Udp, 53, backend);
            for port in [4000, 4001] {
                let client = SocketAddr::from(([127, 0, 0, 1], port));
                let frame = Frame::first(Protocol::Udp, client, at("127.0.0.1:53"));
                let arrived = bench.send(&frame, LO).forwarded();
                assert_eq!(arrived.destination, at(backend));
                let answer = bench.send(&arrived.reply(), bench.container).forwarded();
                assert_eq!(answer.destination, client);
                bench.send(&frame, LO).forwarded();
            }
        }
    });
}

/// Sends a frame that must go on, without a look at the counters, and returns it.
fn carried(bench: &Bench, frame: &Frame, ifindex: u32) -> Frame {
    let (action, bytes) = bench
        .datapath
        .try_frame(&frame.bytes(), ifindex, 0)
        .unwrap();
    assert_eq!(action, REDIRECT, "{frame:?}");
    Frame::parse(&bytes).unwrap()
}

#[test]
fn sixty_thousand_clients_of_this_host_each_keep_their_conversation() {
    const CLIENTS: usize = 60_000;
    bench_with_ports((1024, 64_512), |bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let mut conversations = Vec::new();
        let mut refused = 0;
        for number in 0_u32.. {
            if conversations.len() == CLIENTS {
                break;
            }
            let address = [127, 0, 0, 1 + (number / 40_000) as u8];
            let client = SocketAddr::from((address, 20_000 + (number % 40_000) as u16));
            let frame = Frame::first(Protocol::Tcp, client, at("127.0.0.1:8080"));
            let (action, bytes) = bench.datapath.try_frame(&frame.bytes(), LO, 0).unwrap();
            if action != REDIRECT {
                refused += 1; // then it takes another port
                assert!(refused < 10, "after {} clients", conversations.len());
                continue;
            }
            let arrived = Frame::parse(&bytes).unwrap();
            carried(bench, &arrived.reply(), bench.container);
            let again = carried(bench, &frame.with_flags(ACK), LO);
            assert_eq!(again.source, arrived.source);
            conversations.push((client, arrived));
        }
        let ports: BTreeSet<u16> = conversations.iter().map(|(_, a)| a.source.port()).collect();
        assert_eq!(ports.len(), CLIENTS, "two share a port");
        for (client, arrived) in conversations {
            let answer = carried(bench, &arrived.reply(), bench.container);
            assert_eq!(answer.destination, client);
        }
    });
}

#[test]
fn a_range_onto_one_port_keeps_the_conversations_of_one_client_apart() {
    bench(|bench| {
        let entry = bench.entry(7000, "172.31.0.2:443");
        bench.publish_range(Protocol::Udp, (7000, 7099), &entry);
        let client = at("198.51.100.9:4000");
        let mut sources = BTreeSet::new();
        let mut arrived = Vec::new();
        for port in 7000..7100 {
            let frontend = SocketAddr::from(([198, 51, 100, 2], port));
            let frame = carried(
                bench,
                &Frame::first(Protocol::Udp, client, frontend),
                bench.uplink,
            );
            assert_eq!(frame.destination, at("172.31.0.2:443"));
            assert!(sources.insert(frame.source), "{frontend} shares its source");
            arrived.push((frontend, frame));
        }
        for (frontend, frame) in arrived {
            let answer = carried(bench, &frame.reply(), bench.container);
            assert_eq!((answer.source, answer.destination), (frontend, client));
        }
    });
}

/// A client's SYN to the published port, and what its direct connection to the backend has at the same time: the backend's
/// SYN-ACK for it, and its next segment.
fn forwarded_and_direct() -> (Frame, [Frame; 2]) {
    let client = at("198.51.100.9:4000");
    let forwarded = Frame::first(Protocol::Tcp, client, at("198.51.100.2:8080"));
    let mut direct = Frame::first(Protocol::Tcp, client, at("172.31.0.2:80"));
    direct.sequence = 700_000_000;
    direct.acknowledgement = 800_000_001;
    let answer = direct.reply();
    (forwarded, [answer.clone(), answer.with_flags(ACK)])
}

/// Both are passed as they came.
#[track_caller]
fn left_alone(bench: &Bench, frames: &[Frame; 2]) {
    for frame in frames {
        bench
            .send(frame, bench.container)
            .passed(&frame.bytes(), "");
    }
}

#[test]
fn a_client_with_a_live_direct_connection_gets_another_port() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let (syn, direct) = forwarded_and_direct();
        let begins = direct[0].reply().with_flags(SYN);
        bench
            .send(&begins, bench.uplink)
            .passed(&begins.bytes(), "");
        let arrived = bench.send(&syn, bench.uplink).forwarded();
        assert_eq!(arrived.source, syn.source);
        // The backend takes the SYN for one of the connection that it has (RFC 5961).
        let challenge = &direct[1];
        bench
            .send(challenge, bench.container)
            .passed(&challenge.bytes(), "");
        let arrived = bench.send(&syn, bench.uplink).forwarded();
        assert_ne!(arrived.source, syn.source);
        let answer = bench.send(&arrived.reply(), bench.container).forwarded();
        assert_eq!(answer.destination, syn.source);
        left_alone(bench, &direct);
        let acknowledged = syn.with_flags(ACK);
        let again = bench.send(&acknowledged, bench.uplink).forwarded();
        assert_eq!(again.source, arrived.source);
    });
}

/// The client's forwarded connection, closed by `end`; then it connects directly, then by the port again.
fn direct_after(end: &[(bool, forwarder_tests::frame::Flags)]) {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let (syn, direct) = forwarded_and_direct();
        let mut arrived = bench.send(&syn, bench.uplink).forwarded();
        let answer = arrived.reply();
        bench.send(&answer, bench.container).forwarded();
        for &(from_client, flags) in [(true, ACK)].iter().chain(end) {
            let (frame, ifindex) = if from_client {
                (&syn, bench.uplink)
            } else {
                (&answer, bench.container)
            };
            bench
                .send(&frame.clone().with_flags(flags), ifindex)
                .forwarded();
        }
        left_alone(bench, &direct);
        assert_eq!(bench.flow().1.state() & state::PROGRESS, 0);
        let (key, flow) = bench.flow();
        assert_eq!(Phase::of(key.protocol, flow.state()), Phase::TcpSynSent);
        arrived = bench.send(&syn, bench.uplink).forwarded();
        assert_ne!(arrived.source, syn.source);
        let answer = bench.send(&arrived.reply(), bench.container).forwarded();
        assert_eq!(answer.destination, syn.source);
    });
}

#[test]
fn the_tuple_of_a_closed_flow_is_free_for_a_direct_connection() {
    direct_after(&[(true, FIN_ACK), (false, FIN_ACK), (true, ACK)]);
}

#[test]
fn the_tuple_of_a_closing_flow_is_free_for_a_direct_connection() {
    direct_after(&[(true, FIN_ACK), (false, FIN_ACK)]);
}

#[test]
fn the_tuple_of_a_reset_flow_is_free_for_a_direct_connection() {
    direct_after(&[(false, forwarder_tests::frame::RST)]);
}

#[test]
fn a_live_flow_is_not_disturbed_by_a_direct_connection() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let (syn, [direct, _]) = forwarded_and_direct();
        let arrived = bench.send(&syn, bench.uplink).forwarded();
        bench.send(&arrived.reply(), bench.container).forwarded();
        let acknowledged = syn.clone().with_flags(ACK);
        bench.send(&acknowledged, bench.uplink).forwarded();
        assert_eq!(direct.flags, SYN_ACK);
        bench.send(&direct, bench.container).forwarded(); // no backend does that
        let again = bench.send(&acknowledged, bench.uplink).forwarded();
        assert_eq!(again.source, arrived.source);
        let answer = arrived.reply().with_flags(ACK);
        let answer = bench.send(&answer, bench.container).forwarded();
        assert_eq!(answer.source, syn.destination);
    });
}

/// A server may trust privileged ports alone, and the lower half of them less (NFS).
#[test]
fn a_privileged_port_stays_one() {
    bench(|bench| {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            bench.publish(protocol, 2049, "172.31.0.2:2049");
            for (port, class) in [(700, 512..1024), (100, 1..512), (4000, 61_000..65_000)] {
                let from = |address: &str| {
                    let client = SocketAddr::new(address.parse().unwrap(), port);
                    let frame = Frame::first(protocol, client, at("127.0.0.1:2049"));
                    bench.send(&frame, LO).forwarded().source.port()
                };
                let (first, second) = (from("127.0.0.1"), from("127.0.0.2"));
                assert!(class.contains(&first) && class.contains(&second));
                assert_ne!(first, second);
                if port < 1024 {
                    assert_eq!(first, port, "free, so it is kept");
                }
            }
        }
    });
}

#[test]
fn the_port_of_a_socket_of_this_host_is_not_taken() {
    bench_with_ports((61_000, 2), |bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        let _socket = UdpSocket::bind("0.0.0.0:61000").unwrap();
        let from = |port| {
            let client = SocketAddr::from(([127, 0, 0, 1], port));
            Frame::first(Protocol::Udp, client, at("127.0.0.1:53"))
        };
        // One client in sixteen draws the other port four times.
        let mut clients = (4000..).map(|port| (from(port), bench.send(&from(port), LO)));
        let served = |(_, outcome): &(Frame, Outcome)| outcome.action == REDIRECT;
        let (client, arrived) = clients.find(served).unwrap();
        assert_eq!(arrived.forwarded().source.port(), 61_001);
        let again = bench.send(&client, LO).forwarded();
        assert_eq!(again.source.port(), 61_001);
        let (_, late) = clients.next().unwrap();
        late.dropped("no_source_port");
    });
}

/// As a resolver's question for A and for AAAA, by one socket. Where few ports are left, the second may find none.
#[test]
fn two_first_datagrams_at_once_are_one_conversation() {
    bench_with_ports((45_000, 16_000), |bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        for address in ["198.51.100.9", "127.0.0.1"] {
            for port in 10_000..14_000 {
                let client = SocketAddr::new(address.parse().unwrap(), port);
                let (frontend, ifindex) = if client.ip().is_loopback() {
                    (at("127.0.0.1:53"), LO)
                } else {
                    (at("198.51.100.2:53"), bench.uplink)
                };
                let frame = Frame::first(Protocol::Udp, client, frontend).bytes();
                let start = Barrier::new(2);
                let sources = thread::scope(|scope| {
                    let datapath = &bench.datapath;
                    let send = |cpu: usize| {
                        let (start, frame) = (&start, &frame);
                        scope.spawn(move || {
                            pin_this_thread(&[cpu]).unwrap();
                            start.wait();
                            let (_, bytes) = datapath.try_frame(frame, ifindex, 0).unwrap();
                            Frame::parse(&bytes).unwrap().source
                        })
                    };
                    [send(0), send(1)].map(|sender| sender.join().unwrap())
                });
                assert_eq!(sources[0], sources[1], "of {client}");
            }
        }
    });
}

/// The forwarder has been without its flows for a while, and the client connects again from the same port: the backend
/// answers for the connection that it still has, and learns from the client that it is over (RFC 9293 section 3.5.2).
#[test]
fn a_backend_that_still_has_the_old_connection_learns_that_it_is_over() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let (syn, [_, challenge]) = forwarded_and_direct();
        for _ in 0..2 {
            bench.send(&syn, bench.uplink).forwarded();
            let heard = bench.send(&challenge, bench.container).forwarded();
            assert_eq!(
                (heard.source, heard.destination),
                (syn.destination, syn.source)
            );
            let mut reset = syn.clone().with_flags(RST);
            reset.sequence = challenge.acknowledgement;
            let arrived = bench.send(&reset, bench.uplink).forwarded();
            assert_eq!(arrived.destination, challenge.source);
        }
        // The SYN, sent again, finds nobody.
        let arrived = bench.send(&syn, bench.uplink).forwarded();
        assert_eq!(arrived.source, syn.source, "the port is the same");
        let answer = bench.send(&arrived.reply(), bench.container).forwarded();
        assert_eq!(answer.destination, syn.source);
        bench.send(&syn.with_flags(ACK), bench.uplink).forwarded();
        let (key, flow) = bench.flow();
        assert_eq!(Phase::of(key.protocol, flow.state()), Phase::TcpEstablished);
    });
}

/// What the backend had under way when the client reset a connection and made another from the same port.
#[test]
fn a_late_segment_of_the_connection_before_does_not_end_the_next() {
    for late in [ACK, FIN_ACK] {
        bench(|bench| {
            bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
            let (mut syn, _) = forwarded_and_direct();
            let arrived = bench.send(&syn, bench.uplink).forwarded();
            let answer = arrived.reply();
            bench.send(&answer, bench.container).forwarded();
            for flags in [ACK, RST] {
                let segment = syn.clone().with_flags(flags);
                bench.send(&segment, bench.uplink).forwarded();
            }
            let late = answer.with_flags(late);
            syn.sequence = syn.sequence.wrapping_add(1 << 28);
            let arrived = bench.send(&syn, bench.uplink).forwarded();
            let heard = bench.send(&late, bench.container).forwarded();
            assert_eq!(heard.destination, syn.source);
            let answer = bench.send(&arrived.reply(), bench.container).forwarded();
            assert_eq!(answer.destination, syn.source);
            bench.send(&syn.with_flags(ACK), bench.uplink).forwarded();
            let (key, flow) = bench.flow();
            assert_eq!(Phase::of(key.protocol, flow.state()), Phase::TcpEstablished);
        });
    }
}
