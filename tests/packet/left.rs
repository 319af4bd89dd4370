//! What answers traffic that left this host by others, from a port number that is published, is no new client.

use std::net::UdpSocket;

use forwarder::datapath::Options;
use forwarder_common::{
    flow::{Phase, Timeouts},
    publish::flag,
};
use forwarder_tests::{
    frame::{Frame, Protocol},
    options::{IGNORED, with_options},
};

use crate::bench::{XDP_DROP, XDP_PASS, at, bench, bench_with, options};

const PORT: u16 = 50_002;

#[test]
fn the_answer_to_a_masqueraded_container_is_its_own() {
    bench(|bench| {
        bench.publish(Protocol::Udp, PORT, "172.31.0.2:53");
        let answer = bench.masqueraded_query(PORT);
        bench
            .send(&answer, bench.uplink)
            .passed(&answer.bytes(), "others_answer");
        let mut client = answer.clone();
        client.source = at("198.51.100.9:54");
        bench.send(&client, bench.uplink).forwarded();
    });
}

#[test]
fn so_is_the_answer_to_a_query_with_options() {
    bench(|bench| {
        bench.publish(Protocol::Udp, PORT, "172.31.0.2:53");
        let answer = bench.masqueraded(PORT, |query| with_options(query, IGNORED[0]));
        bench
            .send(&answer, bench.uplink)
            .passed(&answer.bytes(), "others_answer");
    });
}

#[test]
fn a_query_that_is_long_over_hides_no_client() {
    let mut timeouts = Timeouts::default();
    timeouts.set(Phase::UdpStream, 0);
    let options = Options {
        timeouts,
        ..options()
    };
    bench_with(options, |bench| {
        bench.publish(Protocol::Udp, PORT, "172.31.0.2:53");
        let answer = bench.masqueraded_query(PORT);
        bench.send(&answer, bench.uplink).forwarded();
    });
}

#[test]
fn xdp_refuses_beginnings_alone() {
    bench(|bench| {
        if !bench.publish_beside(Protocol::Tcp, 9090, "198.51.100.10:80") {
            return;
        }
        for (index, protocol) in [(2, Protocol::Tcp), (3, Protocol::Udp)] {
            let mut entry = bench.entry(PORT, "172.31.0.2:53");
            entry.flags |= flag::ALLOW_LIST;
            bench.publish_entry(index, None, protocol, PORT, &entry);
        }
        let to = |protocol| Frame::first(protocol, at("198.51.100.9:53"), at("198.51.100.2:50002"));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let refused = bench.send_early(&to(protocol).bytes());
            assert_eq!(refused.action, XDP_DROP, "{protocol:?}");
        }
        // Of a connection that this host or a container has made from that port.
        let answer = to(Protocol::Tcp)
            .reply()
            .reply()
            .with_flags(forwarder_tests::frame::SYN_ACK);
        assert_eq!(bench.send_early(&answer.bytes()).action, XDP_PASS);
    });
    bench(|bench| {
        let mut entry = bench.entry(PORT, "172.31.0.2:53");
        entry.flags |= flag::ALLOW_LIST;
        bench.publish_entry(1, None, Protocol::Udp, PORT, &entry);
        let answer = bench.masqueraded_query(PORT);
        if bench
            .datapath
            .attach_xdp(bench.uplink, forwarder::datapath::xdp::Mode::Native)
            .is_err()
            || bench.datapath.try_early(&[0; 60], bench.uplink).is_err()
        {
            return;
        }
        assert_eq!(bench.send_early(&answer.bytes()).action, XDP_PASS);
    });
}

/// The allow-list has changed since it began. Nor do its packets count as refused.
#[test]
fn xdp_refuses_nothing_of_a_conversation_that_goes_on() {
    for (client, other, host, backend) in [
        (
            "198.51.100.9:4000",
            "198.51.100.8:4000",
            "198.51.100.2:50002",
            "172.31.0.2:53",
        ),
        (
            "[2001:db8:100::9]:4000",
            "[2001:db8:100::8]:4000",
            "[2001:db8:100::2]:50002",
            "[fd00:31::2]:53",
        ),
    ] {
        bench(|bench| {
            if !bench.publish_beside(Protocol::Tcp, 9090, "198.51.100.10:80") {
                return;
            }
            let mut entry = bench.entry(PORT, backend);
            bench.publish_entry(2, None, Protocol::Udp, PORT, &entry);
            let [known, other] =
                [client, other].map(|it| Frame::first(Protocol::Udp, at(it), at(host)));
            bench.send(&known, bench.uplink).forwarded();
            entry.flags |= flag::ALLOW_LIST;
            bench.publish_entry(2, None, Protocol::Udp, PORT, &entry);
            bench.send(&known, bench.uplink).forwarded();
            assert_eq!(bench.send_early(&known.bytes()).action, XDP_PASS);
            assert!(bench.datapath.maps.usage(2).unwrap().refused.is_empty());
            assert_eq!(bench.send_early(&other.bytes()).action, XDP_DROP);
            assert_eq!(
                bench.datapath.maps.usage(2).unwrap().refused["not_allowed"],
                1
            );
        });
    }
}

/// This host's own client has a port of a wide range, as the kernel gives it to one that asks for none.
#[test]
fn xdp_leaves_the_answer_to_a_socket_of_this_host() {
    bench(|bench| {
        if !bench.publish_beside(Protocol::Tcp, 9090, "198.51.100.10:80") {
            return;
        }
        let mut entry = bench.entry(50_000, "172.31.0.2:50000");
        entry.flags = flag::ALLOW_LIST | flag::STEERED;
        bench.publish_entry(2, None, Protocol::Udp, PORT, &entry);
        let socket = UdpSocket::bind("198.51.100.2:50002").unwrap();
        socket.connect("198.51.100.9:53").unwrap();
        let answer = Frame::first(
            Protocol::Udp,
            at("198.51.100.9:53"),
            at("198.51.100.2:50002"),
        );
        bench
            .send(&answer, bench.uplink)
            .passed(&answer.bytes(), "other_socket");
        assert_eq!(bench.send_early(&answer.bytes()).action, XDP_PASS);
    });
}

/// The server speaks before the container, as after the first start.
#[test]
fn a_conversation_that_was_mistaken_for_a_clients_is_given_back() {
    bench(|bench| {
        bench.publish(Protocol::Udp, PORT, "172.31.0.2:53");
        let early = Frame::first(
            Protocol::Udp,
            at("198.51.100.9:53"),
            at("198.51.100.2:50002"),
        );
        bench.send(&early, bench.uplink).forwarded();
        let answer = bench.masqueraded_query(PORT);
        bench
            .send(&answer, bench.uplink)
            .passed(&answer.bytes(), "others_answer");
    });
}
