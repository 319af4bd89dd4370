//! What is not ours, or not for the fast path, goes up the stack as it came.

use forwarder_common::flow::Hop;
use forwarder_tests::{
    frame::{ACK, Frame, Protocol},
    options::{HEEDED, with_options},
};

use crate::bench::{LO, at, bench};

fn syn() -> Frame {
    Frame::first(
        Protocol::Tcp,
        at("198.51.100.9:4000"),
        at("198.51.100.2:8080"),
    )
}

#[test]
fn an_unpublished_port_is_not_ours() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8081, "172.31.0.2:80");
        bench.send(&syn(), bench.uplink).passed(&syn().bytes(), "");
    });
}

#[test]
fn the_other_protocols_port_is_not_ours() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 8080, "172.31.0.2:80");
        bench.send(&syn(), bench.uplink).passed(&syn().bytes(), "");
    });
}

#[test]
fn transit_traffic_is_never_captured() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        let query = Frame::first(Protocol::Udp, at("172.31.0.3:4000"), at("203.0.113.8:53"));
        bench
            .send(&query, bench.container)
            .passed(&query.bytes(), "");
    });
}

#[test]
fn a_loopback_address_from_outside_is_not_local() {
    bench(|bench| {
        let entry = bench.entry(8080, "172.31.0.2:80");
        bench.publish_entry(1, Some("127.0.0.1"), Protocol::Tcp, 8080, &entry);
        let frame = Frame::first(Protocol::Tcp, at("198.51.100.9:4000"), at("127.0.0.1:8080"));
        bench.send(&frame, bench.uplink).passed(&frame.bytes(), "");
        bench
            .send(&frame, bench.container)
            .passed(&frame.bytes(), "");
    });
    bench(|bench| {
        let entry = bench.entry(8080, "[fd00:31::2]:80");
        bench.publish_entry(1, Some("::1"), Protocol::Tcp, 8080, &entry);
        let frame = Frame::first(
            Protocol::Tcp,
            at("[2001:db8:100::9]:4000"),
            at("[::1]:8080"),
        );
        for ifindex in [bench.uplink, bench.container] {
            let outcome = bench.send(&frame, ifindex);
            outcome.passed(&frame.bytes(), "");
        }
    });
}

#[test]
fn a_packet_to_the_backend_itself_is_of_no_flow() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 80, "172.31.0.2:80");
        let client = at("198.51.100.9:4000");
        let through = Frame::first(Protocol::Udp, client, at("198.51.100.2:80"));
        let direct = Frame::first(Protocol::Udp, client, at("172.31.0.2:80"));
        for _ in 0..2 {
            let outcome = bench.send(&direct, bench.uplink);
            outcome.passed(&direct.bytes(), "");
            let arrived = bench.send(&through, bench.uplink).forwarded();
            assert_eq!(arrived.destination, direct.destination);
        }
        assert_eq!(bench.flow().1.packets(), [2, 0]);
    });
}

#[test]
fn an_answer_to_no_flow_is_left_alone() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        bench(|bench| {
            bench.publish(protocol, 8080, "172.31.0.2:80");
            let frame = Frame::first(protocol, syn().source, syn().destination);
            let answer = bench.send(&frame, bench.uplink).forwarded().reply();
            bench.send(&answer, bench.container).forwarded();
            for (source, destination) in [
                ("172.31.0.2:80", "198.51.100.9:4001"),
                ("172.31.0.2:80", "198.51.100.8:4000"),
                ("172.31.0.3:80", "198.51.100.9:4000"),
                ("172.31.0.2:81", "198.51.100.9:4000"),
            ] {
                let mut other = answer.clone();
                (other.source, other.destination) = (at(source), at(destination));
                let outcome = bench.send(&other, bench.container);
                outcome.passed(&other.bytes(), "");
            }
            let (key, flow) = bench.flow();
            bench.datapath.maps.flows.remove(&key, &flow).unwrap();
            let outcome = bench.send(&answer, bench.container);
            outcome.passed(&answer.bytes(), "");
        });
    }
}

#[test]
fn the_other_family_is_the_proxys() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let frame = Frame::first(
            Protocol::Tcp,
            at("[2001:db8:100::9]:4000"),
            at("[2001:db8:100::2]:8080"),
        );
        bench
            .send(&frame, bench.uplink)
            .passed(&frame.bytes(), "other_family");
    });
}

#[test]
fn a_link_local_client_is_the_proxys() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "[fd00:31::2]:80");
        let frame = Frame::first(
            Protocol::Tcp,
            at("[fe80::9]:4000"),
            at("[2001:db8:100::2]:8080"),
        );
        bench
            .send(&frame, bench.uplink)
            .passed(&frame.bytes(), "link_local");
    });
}

#[test]
fn a_backend_that_cannot_be_reached_is_the_proxys() {
    bench(|bench| {
        let mut entry = bench.entry(8080, "172.31.0.2:80");
        entry.hop = Hop::default();
        bench.publish_entry(1, None, Protocol::Tcp, 8080, &entry);
        bench
            .send(&syn(), bench.uplink)
            .passed(&syn().bytes(), "unresolved");
    });
}

#[test]
fn a_draining_publish_takes_no_new_flow_and_keeps_its_old_ones() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        bench.send(&syn(), bench.uplink).forwarded();
        let mut entry = bench.entry(8080, "172.31.0.2:80");
        entry.flags |= forwarder_common::publish::flag::DRAINING;
        bench.datapath.maps.set_publish(1, &entry).unwrap();
        bench.send(&syn().with_flags(ACK), bench.uplink).forwarded();
        let mut other = syn();
        other.source.set_port(4001);
        bench
            .send(&other, bench.uplink)
            .passed(&other.bytes(), "draining");
    });
}

#[test]
fn headers_that_are_not_understood_are_left_alone() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let whole = syn().bytes();
        let mut icmp = whole.clone();
        icmp[14 + 9] = 1;
        let mut arp = whole.clone();
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        let mut short = whole.clone();
        short.truncate(14 + 20 + 8); // half of a TCP header
        let mut tagged = whole.clone();
        tagged.splice(12..12, [0x81, 0x00, 0, 10]); // comes again on the VLAN's device
        for bytes in [icmp, arp, short, tagged] {
            bench.send_bytes(&bytes, bench.uplink).passed(&bytes, "");
        }
    });
}

#[test]
fn a_multicast_packet_on_lo_is_the_stacks() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 5353, "172.31.0.2:5353");
        let frame = Frame::first(Protocol::Udp, at("127.0.0.1:4000"), at("224.0.0.251:5353"));
        bench.send(&frame, LO).passed(&frame.bytes(), "not_local");
    });
}

#[test]
fn what_is_behind_options_is_left_alone_and_counted() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        bench.send(&syn(), bench.uplink).forwarded();
        let mut bytes = with_options(&syn(), HEEDED[0]);
        bench
            .send_bytes(&bytes, bench.uplink)
            .passed(&bytes, "options");
        bytes[14 + 9] = 2; // IGMP always has one, and is nobody's
        bench.send_bytes(&bytes, bench.uplink).passed(&bytes, "");
    });
}

#[test]
fn what_is_behind_extension_headers_is_left_alone_and_counted() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 8080, "[fd00:31::2]:80");
        let (client, host) = (at("[2001:db8:100::9]:4000"), at("[2001:db8:100::2]:8080"));
        let plain = Frame::first(Protocol::Udp, client, host);
        for extension in [0, 43, 60] {
            let mut bytes = with_options(&plain, HEEDED[1]);
            bytes[20] = extension;
            bench
                .send_bytes(&bytes, bench.uplink)
                .passed(&bytes, "options");
            bytes[54] = 58; // multicast listener discovery always has one
            bench.send_bytes(&bytes, bench.uplink).passed(&bytes, "");
        }
    });
}
