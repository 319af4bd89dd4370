//! Floods from invented addresses: what they may cost, and whom. A flow is proven, and kept for good, when the client
//! has answered the backend's answer.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use forwarder::datapath::Options;
use forwarder_common::{
    flow::{Flow, Phase, Timeouts, state},
    limits,
    publish::flag,
    tuple::Tuple,
};
use forwarder_tests::frame::{ACK, FIN_ACK, Frame, Protocol, RST, SYN_ACK};

use crate::bench::{Bench, LO, at, bench, bench_with, bench_with_ports, options};

const PORT: u16 = 8080;

fn client(port: u16) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, 9], port))
}

fn first(protocol: Protocol, client: SocketAddr) -> Frame {
    Frame::first(protocol, client, at("198.51.100.2:8080"))
}

/// Sends a client's first packet and has the backend answer it; returns the packet as the backend got it.
#[track_caller]
fn answered(bench: &Bench, sent: &Frame, ifindex: u32) -> Frame {
    let arrived = bench.send(sent, ifindex).forwarded();
    let answer = bench.send(&arrived.reply(), bench.container).forwarded();
    assert_eq!(
        (answer.source, answer.destination),
        (sent.destination, sent.source)
    );
    arrived
}

/// The same, and the client answers in turn.
#[track_caller]
fn proven(bench: &Bench, sent: &Frame, ifindex: u32) -> Frame {
    let arrived = answered(bench, sent, ifindex);
    let again = bench.send(&sent.clone().with_flags(ACK), ifindex);
    assert_eq!(again.reasons, ["forwarded_original"]);
    assert_eq!(again.forwarded().source, arrived.source);
    arrived
}

/// First packets from as many addresses.
fn flood(bench: &Bench, protocol: Protocol, packets: u32) {
    for number in 0..packets {
        let source = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 1)) + number);
        let frame = first(protocol, SocketAddr::from((source, 4000)));
        let (action, _) = bench
            .datapath
            .try_frame(&frame.bytes(), bench.uplink, 0)
            .unwrap();
        assert_eq!(action, crate::bench::REDIRECT, "{source}");
    }
}

fn state_of(bench: &Bench, client: SocketAddr) -> Option<Flow> {
    let flows = bench.datapath.maps.flows.all().map(Result::unwrap);
    let mut of_client = flows.filter(|(_, flow)| {
        (flow.client, flow.ports().0) == (client.ip().into(), client.port().to_be())
    });
    let found: Option<(Tuple, Flow)> = of_client.next();
    assert!(of_client.next().is_none(), "{client} has two flows");
    found.map(|(_, flow)| flow)
}

fn is_kept(bench: &Bench, client: SocketAddr) -> bool {
    state_of(bench, client).is_some_and(|flow| flow.state() & state::KEPT != 0)
}

fn is_kept_when_the_client_answers_the_answer(protocol: Protocol) {
    bench(|bench| {
        bench.publish(protocol, PORT, "172.31.0.2:80");
        let sent = first(protocol, client(4000));
        answered(bench, &sent, bench.uplink);
        assert!(!is_kept(bench, client(4000)));
        let acknowledged = sent.clone().with_flags(ACK);
        bench.send(&acknowledged, bench.uplink).forwarded();
        assert!(is_kept(bench, client(4000)));
        let flow = bench.flow().1;
        let length = sent.bytes().len() as u64;
        assert_eq!(
            (flow.packets(), flow.bytes()),
            ([2, 1], [2 * length, length])
        );
        bench.send(&acknowledged, bench.uplink).forwarded();
        assert_eq!(bench.flow().1.packets(), [3, 1], "it counts on");
    });
}

#[test]
fn a_tcp_flow_is_kept_when_its_handshake_is_complete() {
    is_kept_when_the_client_answers_the_answer(Protocol::Tcp);
}

#[test]
fn a_udp_flow_is_kept_when_the_client_answers_the_answer() {
    is_kept_when_the_client_answers_the_answer(Protocol::Udp);
}

#[test]
fn a_client_that_nobody_answers_is_not_kept_however_often_it_asks() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        bench(|bench| {
            bench.publish(protocol, PORT, "172.31.0.2:80");
            for _ in 0..3 {
                bench
                    .send(&first(protocol, client(4000)), bench.uplink)
                    .forwarded();
            }
            assert!(!is_kept(bench, client(4000)));
        });
    }
}

#[test]
fn a_handshake_that_the_client_resets_is_not_kept() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, PORT, "172.31.0.2:80");
        let sent = first(Protocol::Tcp, client(4000));
        answered(bench, &sent, bench.uplink);
        let reset = forwarder_tests::frame::Flags { ack: true, ..RST };
        bench
            .send(&sent.with_flags(reset), bench.uplink)
            .forwarded();
        assert!(!is_kept(bench, client(4000)));
    });
}

fn a_flood_ends_no_conversation(protocol: Protocol) {
    bench(|bench| {
        bench.publish(protocol, PORT, "172.31.0.2:80");
        for port in 1..=100 {
            proven(bench, &first(protocol, client(port)), bench.uplink);
        }
        flood(bench, protocol, 2 * limits::HALF_OPEN);
        for port in 1..=100 {
            let outcome = bench.send(&first(protocol, client(port)).with_flags(ACK), bench.uplink);
            assert_eq!(outcome.reasons, ["forwarded_original"]);
            bench
                .send(&outcome.forwarded().reply(), bench.container)
                .forwarded();
        }
        proven(bench, &first(protocol, client(5000)), bench.uplink);
        assert!(is_kept(bench, client(5000)));
        let flows = bench.datapath.maps.flows.all().count();
        assert!(flows <= limits::HALF_OPEN as usize + 101, "{flows} flows");
    });
}

#[test]
fn a_flood_of_syns_ends_no_conversation() {
    a_flood_ends_no_conversation(Protocol::Tcp);
}

#[test]
fn a_flood_of_datagrams_ends_no_conversation() {
    a_flood_ends_no_conversation(Protocol::Udp);
}

#[test]
fn the_answer_to_a_forgotten_client_goes_nowhere_and_the_client_begins_again() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, PORT, "172.31.0.2:80");
        let sent = first(Protocol::Tcp, client(4000));
        let arrived = bench.send(&sent, bench.uplink).forwarded();
        flood(bench, Protocol::Tcp, 2 * limits::HALF_OPEN);
        let late = arrived.reply();
        bench.send(&late, bench.container).passed(&late.bytes(), "");
        proven(bench, &sent, bench.uplink);
    });
}

/// A backend on another machine: every client gets a source port.
fn publish_remote(bench: &mut Bench, protocol: Protocol) {
    let mut entry = bench.entry(PORT, "172.31.0.2:80");
    entry.flags |= flag::REMOTE;
    bench.publish_entry(1, None, protocol, PORT, &entry);
}

#[test]
fn a_flood_towards_another_machine_ends_no_conversation_and_leaves_ports_for_new_ones() {
    bench(|bench| {
        publish_remote(bench, Protocol::Tcp);
        let before: Vec<_> = (1..=100)
            .map(|port| proven(bench, &first(Protocol::Tcp, client(port)), bench.uplink).source)
            .collect();
        flood(bench, Protocol::Tcp, 20_000); // there are 4,000 ports
        for (port, source) in (1..=100).zip(before) {
            let sent = first(Protocol::Tcp, client(port)).with_flags(ACK);
            assert_eq!(bench.send(&sent, bench.uplink).forwarded().source, source);
        }
        for port in 5000..5100 {
            proven(bench, &first(Protocol::Tcp, client(port)), bench.uplink);
        }
    });
}

#[test]
fn the_port_of_an_unproven_connection_gives_way_and_that_of_a_proven_one_never() {
    bench_with_ports((61_000, 2), |bench| {
        publish_remote(bench, Protocol::Tcp);
        let [first, second, third, fourth] =
            [2001, 2002, 2003, 2004].map(|port| first(Protocol::Tcp, client(port)));
        let kept = proven(bench, &first, bench.uplink).source;
        let half_open = answered(bench, &second, bench.uplink).source;
        assert_ne!(kept, half_open);
        assert_eq!(proven(bench, &third, bench.uplink).source, half_open);
        for late in [&fourth, &second] {
            bench
                .send(late, bench.uplink)
                .passed(&late.bytes(), "no_free_port");
        }
        let first = first.with_flags(ACK);
        assert_eq!(bench.send(&first, bench.uplink).forwarded().source, kept);
    });
}

/// Nothing in a datagram would tell whose answer it is.
#[test]
fn no_other_client_gets_the_port_of_datagrams_before_their_time() {
    bench_with_ports((61_000, 2), |bench| {
        publish_remote(bench, Protocol::Udp);
        let clients = [2001, 2002].map(client);
        let arrived = clients.map(|client| {
            bench
                .send(&first(Protocol::Udp, client), bench.uplink)
                .forwarded()
        });
        let third = first(Protocol::Udp, client(2003));
        bench.send(&third, bench.uplink).dropped("no_source_port");
        for (client, arrived) in clients.into_iter().zip(arrived) {
            let answer = bench.send(&arrived.reply(), bench.container).forwarded();
            assert_eq!(answer.destination, client);
        }
    });
}

/// Far more than there are ports, one after the other, as a client does that closes each.
#[test]
fn the_ports_of_closed_connections_are_used_again() {
    bench_with_ports((61_000, 100), |bench| {
        publish_remote(bench, Protocol::Tcp);
        for port in 2000..3000 {
            let sent = first(Protocol::Tcp, client(port));
            let arrived = proven(bench, &sent, bench.uplink);
            let answer = arrived.reply().with_flags(FIN_ACK);
            bench
                .send(&sent.clone().with_flags(FIN_ACK), bench.uplink)
                .forwarded();
            let answer = bench.send(&answer, bench.container).forwarded();
            assert_eq!(answer.destination, client(port));
            bench.send(&sent.with_flags(ACK), bench.uplink).forwarded();
        }
        let flows = bench.datapath.maps.flows.all().count();
        assert!(flows <= 100, "{flows}");
    });
}

/// With a backend on another machine, eleven source ports towards it, and a second for datagrams that have no answer.
fn bench_with_eleven_ports(test: impl FnOnce(&mut Bench) + Send) {
    let mut timeouts = Timeouts::default();
    timeouts.set(Phase::Udp, 1);
    let options = Options {
        snat: (61_000, 11),
        timeouts,
        ..options()
    };
    bench_with(options, |bench| {
        publish_remote(bench, Protocol::Udp);
        test(bench);
    });
}

/// Nobody expires flows while the daemon is away.
#[test]
fn the_ports_of_silent_datagrams_are_used_again_without_the_daemon() {
    bench_with_eleven_ports(|bench| {
        for round in 0..2 {
            for port in 2000..2011 {
                let sent = first(Protocol::Udp, client(port + 11 * round));
                bench.send(&sent, bench.uplink).forwarded();
            }
            let late = first(Protocol::Udp, client(4000));
            bench.send(&late, bench.uplink).dropped("no_source_port");
            std::thread::sleep(Duration::from_millis(1100));
        }
    });
}

/// As many as nf_conntrack serves, which keeps one question and its answer for no longer.
#[test]
fn the_ports_of_clients_that_had_one_answer_are_used_again_sooner() {
    bench_with_eleven_ports(|bench| {
        let goes_on = proven(bench, &first(Protocol::Udp, client(2000)), bench.uplink);
        for port in 2001..2011 {
            answered(bench, &first(Protocol::Udp, client(port)), bench.uplink);
        }
        let refused = |port| {
            let late = first(Protocol::Udp, client(port));
            bench.send(&late, bench.uplink).dropped("no_source_port");
        };
        refused(4000);
        std::thread::sleep(Duration::from_millis(1100));
        for port in 3001..3011 {
            answered(bench, &first(Protocol::Udp, client(port)), bench.uplink);
        }
        refused(4000);
        let answer = bench.send(&goes_on.reply(), bench.container).forwarded();
        assert_eq!(answer.destination, client(2000));
    });
}

#[test]
fn an_answer_goes_to_the_client_that_has_the_port_now() {
    bench_with_ports((61_000, 1), |bench| {
        publish_remote(bench, Protocol::Tcp);
        let arrived = answered(bench, &first(Protocol::Tcp, client(2001)), bench.uplink);
        proven(bench, &first(Protocol::Tcp, client(2002)), bench.uplink);
        let answer = bench.send(&arrived.reply(), bench.container).forwarded();
        assert_eq!(answer.destination, client(2002));
    });
}

#[test]
fn a_flow_with_another_port_outlives_the_one_that_had_its_own() {
    bench(|bench| {
        let entry = bench.entry(8080, "172.31.0.2:80");
        bench.publish_entry(1, None, Protocol::Tcp, 8080, &entry);
        bench.publish_entry(2, None, Protocol::Tcp, 9090, &entry);
        let one = Frame::first(Protocol::Tcp, client(4000), at("198.51.100.2:8080"));
        let other = Frame::first(Protocol::Tcp, client(4000), at("198.51.100.2:9090"));
        proven(bench, &one, bench.uplink);
        let port = proven(bench, &other, bench.uplink).source.port();
        let mut flows = bench.datapath.maps.flows.all().map(Result::unwrap);
        let own = flows.find(|(key, _)| key.source_port == 4000_u16.to_be());
        drop(flows);
        let (key, flow) = own.unwrap();
        bench.datapath.maps.flows.remove(&key, &flow).unwrap();
        let again = bench.send(&other.with_flags(ACK), bench.uplink).forwarded();
        assert_eq!(again.source.port(), port);
    });
}

#[test]
fn a_client_whose_own_port_another_flow_was_given_is_not_taken_for_it() {
    bench_with_ports((61_000, 1), |bench| {
        let entry = bench.entry(8080, "172.31.0.2:80");
        bench.publish_entry(1, None, Protocol::Udp, 8080, &entry);
        bench.publish_entry(2, None, Protocol::Udp, 9090, &entry);
        let at_9090 = |port| Frame::first(Protocol::Udp, client(port), at("198.51.100.2:9090"));
        proven(bench, &first(Protocol::Udp, client(4000)), bench.uplink);
        let given = proven(bench, &at_9090(4000), bench.uplink).source;
        assert_eq!(given, client(61_000));
        let own = at_9090(61_000);
        bench.send(&own, bench.uplink).dropped("no_source_port");
    });
}

#[test]
fn answered_datagrams_of_a_flood_are_forgotten_too() {
    bench(|bench| {
        bench.publish(Protocol::Udp, PORT, "172.31.0.2:80");
        for port in 1..=100 {
            answered(bench, &first(Protocol::Udp, client(port)), bench.uplink);
            assert!(!is_kept(bench, client(port)));
        }
    });
}

#[test]
fn a_local_client_is_kept_as_others_are() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, PORT, "172.31.0.2:80");
        let local = at("127.0.0.1:4000");
        let sent = Frame::first(Protocol::Tcp, local, at("127.0.0.1:8080"));
        assert_eq!(sent.reply().flags, SYN_ACK);
        proven(bench, &sent, LO);
        assert!(is_kept(bench, local));
    });
}

/// A connection goes on by the port that it was given, though another conversation gets the one that it did not.
#[test]
fn a_port_that_changes_hands_takes_no_others_with_it() {
    bench_with_ports((61_000, 2), |bench| {
        publish_remote(bench, Protocol::Tcp);
        let syn = first(Protocol::Tcp, client(2001));
        let arrived = bench.send(&syn, bench.uplink).forwarded();
        // The backend answers another connection of this host with the same port.
        let mut direct = arrived.reply();
        direct.acknowledgement = 77;
        bench
            .send(&direct, bench.container)
            .passed(&direct.bytes(), "");
        let own = proven(bench, &syn, bench.uplink).source;
        assert_ne!(own, arrived.source);
        let late = bench
            .send(&first(Protocol::Tcp, client(2002)), bench.uplink)
            .forwarded();
        assert_eq!(late.source, arrived.source);
        let on = syn.with_flags(ACK);
        assert_eq!(bench.send(&on, bench.uplink).forwarded().source, own);
    });
}

#[test]
fn the_ports_of_closed_connections_are_used_again_though_the_table_is_full() {
    let options = Options {
        snat: (61_000, 400),
        flows: 100,
        ..options()
    };
    bench_with(options, |bench| {
        publish_remote(bench, Protocol::Tcp);
        for port in 2000..2300 {
            let sent = first(Protocol::Tcp, client(port));
            let arrived = proven(bench, &sent, bench.uplink);
            let end = sent.with_flags(FIN_ACK);
            bench.send(&end, bench.uplink).forwarded();
            let answer = arrived.reply().with_flags(FIN_ACK);
            bench.send(&answer, bench.container).forwarded();
            bench.send(&end.with_flags(ACK), bench.uplink).forwarded();
        }
    });
}

/// What leads to a flow was forgotten in a flood, and the flow was not.
#[test]
fn a_flow_that_is_found_again_is_followed_again() {
    bench(|bench| {
        let entry = bench.entry(8080, "172.31.0.2:80");
        bench.publish_entry(1, None, Protocol::Tcp, 8080, &entry);
        bench.publish_entry(2, None, Protocol::Tcp, 9090, &entry);
        let one = Frame::first(Protocol::Tcp, client(4000), at("198.51.100.2:8080"));
        let other = Frame::first(Protocol::Tcp, client(4000), at("198.51.100.2:9090"));
        bench.send(&one, bench.uplink).forwarded();
        let arrived = answered(bench, &other, bench.uplink);
        let port = arrived.source.port().to_be();
        let mut flows = bench.datapath.maps.flows.all().map(Result::unwrap);
        let (key, flow) = flows.find(|(key, _)| key.source_port == port).unwrap();
        drop(flows);
        let (alias_key, alias) = flow.counterpart(&key);
        bench
            .datapath
            .maps
            .flows
            .remove(&alias_key, &alias)
            .unwrap();
        for _ in 0..3 {
            let on = other.clone().with_flags(ACK);
            let again = bench.send(&on, bench.uplink).forwarded();
            assert_eq!(again.source, arrived.source);
        }
        let flow = bench.datapath.maps.flows.get(&key).unwrap().unwrap();
        assert_eq!(Phase::of(key.protocol, flow.state()), Phase::TcpEstablished);
    });
}
