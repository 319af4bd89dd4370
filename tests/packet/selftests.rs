//! What the kernel's own tests of its NAT expect one to survive (tools/testing/selftests/net/netfilter), each named after
//! its script. Scenarios of several machines at once are in `netns/selftests.rs`.

use forwarder_tests::{
    frame::{ACK, Frame, Protocol},
    icmp::IcmpError,
};

use crate::bench::{LO, at, bench};

#[test]
fn nft_nat_port_shadowing_leaves_a_published_port_to_its_publish() {
    bench(|bench| {
        let first = bench.entry(8080, "172.31.0.2:80");
        let second = bench.entry(9090, "172.31.0.3:80");
        bench.publish_entry(1, None, Protocol::Udp, 8080, &first);
        bench.publish_entry(2, None, Protocol::Udp, 9090, &second);
        // Flows whose client has a published port as its own, and whose backend answers to it.
        for (client, ifindex) in [
            ("172.31.0.9:8080", bench.container),
            ("198.51.100.9:8080", bench.uplink),
            ("198.51.100.2:8080", LO),
        ] {
            let frame = Frame::first(Protocol::Udp, at(client), at("198.51.100.2:9090"));
            let arrived = bench.send(&frame, ifindex).forwarded();
            let answer = bench.send(&arrived.reply(), bench.container).forwarded();
            assert_eq!(answer.destination, at(client));
        }
        // Who asks that port is served by its publish, whatever port he asks from.
        for port in [4000, 80, 8080, 9090] {
            let mut frame =
                Frame::first(Protocol::Udp, at("198.51.100.8:0"), at("198.51.100.2:8080"));
            frame.source.set_port(port);
            let arrived = bench.send(&frame, bench.uplink).forwarded();
            assert_eq!(arrived.destination, at("172.31.0.2:80"));
            assert_eq!(arrived.source, frame.source);
        }
    });
}

#[test]
fn conntrack_reverse_clash_an_answer_before_the_question_begins_nothing() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        let (client, frontend) = (at("198.51.100.9:4000"), at("198.51.100.2:53"));
        let question = Frame::first(Protocol::Udp, client, frontend);
        let early = Frame::first(Protocol::Udp, at("172.31.0.2:53"), client);
        let outcome = bench.send(&early, bench.container);
        outcome.passed(&early.bytes(), "");
        assert_eq!(bench.datapath.maps.flows.all().count(), 0);
        let arrived = bench.send(&question, bench.uplink).forwarded();
        assert_eq!(arrived.source, client);
        let answer = bench.send(&early, bench.container).forwarded();
        assert_eq!((answer.source, answer.destination), (frontend, client));
    });
}

#[test]
fn nf_nat_edemux_clients_that_have_one_port_each_keep_their_conversation() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let clients = ["127.0.0.1", "127.0.0.2", "172.31.0.1", "198.51.100.2"];
        let mut arrived = Vec::new();
        for client in clients.map(|client| at(&format!("{client}:10000"))) {
            let frontend = std::net::SocketAddr::new(client.ip(), 8080);
            let frame = Frame::first(Protocol::Tcp, client, frontend);
            arrived.push((frame.clone(), bench.send(&frame, LO).forwarded()));
        }
        for (number, (frame, one)) in arrived.iter().enumerate() {
            let others = arrived.iter().skip(number + 1);
            assert!(
                others
                    .map(|(_, other)| other.source)
                    .all(|source| source != one.source)
            );
            let answer = bench.send(&one.reply(), bench.container).forwarded();
            assert_eq!(answer.destination, frame.source);
            assert_eq!(answer.source, frame.destination);
        }
        for (frame, one) in &arrived {
            let again = bench.send(&frame.clone().with_flags(ACK), LO).forwarded();
            assert_eq!(again.source, one.source);
        }
    });
}

#[test]
fn conntrack_icmp_related_an_error_belongs_to_the_flow_that_it_quotes() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        let (client, frontend) = (at("198.51.100.9:4000"), at("198.51.100.2:53"));
        let frame = Frame::first(Protocol::Udp, client, frontend);
        let arrived = bench.send(&frame, bench.uplink).forwarded();
        let before = bench.flow();
        let related = IcmpError::port_unreachable(&arrived);
        let outcome = bench.send_bytes(&related.bytes(), bench.container);
        assert_eq!(outcome.reasons, ["forwarded_error"]);
        assert_eq!(bench.flow(), before);
        // About what this flow never sent.
        let mut other = arrived.clone();
        other.source.set_port(4001);
        let unrelated = IcmpError::port_unreachable(&other).bytes();
        let outcome = bench.send_bytes(&unrelated, bench.container);
        outcome.passed(&unrelated, "");
    });
}

#[test]
fn conntrack_tcp_unreplied_a_syn_that_nobody_answered_goes_to_the_backend_of_now() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let (client, frontend) = (at("198.51.100.9:4000"), at("198.51.100.2:8080"));
        let syn = Frame::first(Protocol::Tcp, client, frontend);
        for _ in 0..3 {
            let arrived = bench.send(&syn, bench.uplink).forwarded();
            assert_eq!(arrived.destination, at("172.31.0.2:80"));
        }
        let other = bench.entry(8080, "172.31.0.3:80");
        bench.datapath.maps.set_publish(1, &other).unwrap();
        let arrived = bench.send(&syn, bench.uplink).forwarded();
        assert_eq!(arrived.destination, at("172.31.0.3:80"));
        let answer = bench.send(&arrived.reply(), bench.container).forwarded();
        assert_eq!((answer.source, answer.destination), (frontend, client));
    });
}
