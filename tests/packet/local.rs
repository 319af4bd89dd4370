//! Clients on the host itself, and a backend that asks for itself: SNAT.

use forwarder::datapath::kernel::kernel;
use forwarder_tests::frame::{Frame, Protocol};

use crate::bench::{Bench, LO, at, bench};

/// The source that the backend sees for a client, on a device; and the reply comes back whole.
fn seen(bench: &mut Bench, ifindex: u32, client: &str, host: &str, backend: &str) -> Frame {
    bench.publish(Protocol::Tcp, 8080, backend);
    let sent = Frame::first(Protocol::Tcp, at(client), at(host));
    let forwarded = bench.send(&sent, ifindex).forwarded();
    assert_eq!(forwarded.destination, at(backend));
    let answer = bench.send(&forwarded.reply(), bench.container).forwarded();
    assert_eq!((answer.source, answer.destination), (at(host), at(client)));
    // The second packet finds the same flow.
    let again = bench.send(&sent.with_flags(forwarder_tests::frame::ACK), ifindex);
    assert_eq!(again.reasons, ["forwarded_original"]);
    assert_eq!(again.forwarded().source, forwarded.source);
    forwarded
}

#[test]
fn localhost_is_seen_as_the_gateway() {
    bench(|b| {
        let frame = seen(b, LO, "127.0.0.1:4000", "127.0.0.1:8080", "172.31.0.2:80");
        assert_eq!(frame.source.ip(), at("172.31.0.1:0").ip());
        assert!(
            (61_000..65_000).contains(&frame.source.port()),
            "a port no socket gets"
        );
        assert_eq!(frame.ttl, 64, "the host's own packets are not routed");
    });
}

#[test]
fn localhost_of_ipv6_is_seen_as_the_gateway() {
    bench(|b| {
        let frame = seen(b, LO, "[::1]:4000", "[::1]:8080", "[fd00:31::2]:80");
        assert_eq!(frame.source.ip(), at("[fd00:31::1]:0").ip());
    });
}

#[test]
fn all_of_127_is_localhost() {
    bench(|b| {
        drop(seen(
            b,
            LO,
            "127.0.0.1:4000",
            "127.9.8.7:8080",
            "172.31.0.2:80",
        ))
    });
}

#[test]
fn the_hosts_own_address_stays() {
    bench(|b| {
        let frame = seen(
            b,
            LO,
            "198.51.100.2:4000",
            "198.51.100.2:8080",
            "172.31.0.2:80",
        );
        assert_eq!(frame.source, at("198.51.100.2:4000"));
    });
}

#[test]
fn the_gateways_address_gets_a_port_of_its_own() {
    bench(|b| {
        // A direct connection to the container could have the same address and port.
        let frame = seen(b, LO, "172.31.0.1:4000", "172.31.0.1:8080", "172.31.0.2:80");
        assert_eq!(frame.source.ip(), at("172.31.0.1:0").ip());
        assert_ne!(frame.source.port(), 4000);
    });
}

#[test]
fn a_backend_that_asks_for_itself_sees_the_gateway() {
    bench(|b| {
        let container = b.container;
        let frame = seen(
            b,
            container,
            "172.31.0.2:4000",
            "198.51.100.2:8080",
            "172.31.0.2:80",
        );
        assert_eq!(frame.source.ip(), at("172.31.0.1:0").ip());
        assert_eq!(frame.ttl, 63);
    });
}

/// A datagram of that length from a client on the host.
fn from_localhost(bench: &mut Bench, length: usize) -> (Vec<u8>, crate::bench::Outcome) {
    bench.publish(Protocol::Udp, 8080, "172.31.0.2:80");
    let client = at("127.0.0.1:4000");
    let mut frame = Frame::first(Protocol::Udp, client, at("127.0.0.1:8080"));
    frame.payload = vec![7; length];
    (frame.bytes(), bench.send(&frame, LO))
}

#[test]
fn a_datagram_of_the_mtu_is_forwarded_from_localhost() {
    bench(|b| drop(from_localhost(b, 1_472).1.forwarded()));
}

#[test]
fn a_longer_datagram_from_localhost_is_the_proxys_where_the_kernel_cannot_deliver_it() {
    bench(|b| {
        let (bytes, outcome) = from_localhost(b, 1_473);
        if kernel().peer_from_lo {
            outcome.forwarded();
        } else {
            outcome.passed(&bytes, "longer_than_mtu");
        }
    });
}
