//! What is dropped: sources that cannot be, or may not.

use forwarder_tests::frame::{Frame, Protocol};

use crate::bench::{LO, at, bench};

#[test]
fn a_martian_source_is_dropped() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        for source in [
            "127.0.0.1:4000",
            "0.0.0.0:4000",
            "224.0.0.1:4000",
            "198.51.100.2:4000",
        ] {
            let frame = Frame::first(Protocol::Udp, at(source), at("198.51.100.2:53"));
            bench.send(&frame, bench.uplink).dropped("martian_source");
        }
        bench.publish(Protocol::Udp, 53, "[fd00:31::2]:53");
        for source in [
            "[::1]:4000",
            "[::]:4000",
            "[ff02::1]:4000",
            "[2001:db8:100::2]:4000",
        ] {
            let frame = Frame::first(Protocol::Udp, at(source), at("[2001:db8:100::2]:53"));
            bench.send(&frame, bench.uplink).dropped("martian_source");
        }
    });
}

#[test]
fn a_flow_of_this_host_cannot_be_joined_from_outside() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        let frame = Frame::first(
            Protocol::Udp,
            at("198.51.100.2:4000"),
            at("198.51.100.2:53"),
        );
        bench.send(&frame, LO).forwarded();
        bench.send(&frame, bench.uplink).dropped("martian_source");
        let frame = Frame::first(Protocol::Udp, at("127.0.0.1:4000"), at("127.0.0.1:53"));
        bench.send(&frame, LO).forwarded();
        bench
            .send(&frame, bench.uplink)
            .passed(&frame.bytes(), "not_local");
    });
}

#[test]
fn only_the_allow_list_is_served() {
    bench(|bench| {
        let mut entry = bench.entry(8080, "172.31.0.2:80");
        entry.flags |= forwarder_common::publish::flag::ALLOW_LIST;
        bench.publish_entry(1, None, Protocol::Tcp, 8080, &entry);
        for network in ["198.51.100.0/28", "192.0.2.7/32"] {
            bench
                .datapath
                .maps
                .set_allowed(1, network.parse().unwrap(), true)
                .unwrap();
        }
        // Another publish's list does not count.
        bench
            .datapath
            .maps
            .set_allowed(2, "0.0.0.0/0".parse().unwrap(), true)
            .unwrap();
        let from = |source| Frame::first(Protocol::Tcp, at(source), at("198.51.100.2:8080"));
        bench
            .send(&from("198.51.100.15:4000"), bench.uplink)
            .forwarded();
        bench
            .send(&from("192.0.2.7:4000"), bench.uplink)
            .forwarded();
        bench
            .send(&from("198.51.100.16:4000"), bench.uplink)
            .dropped("not_allowed");
        bench
            .send(&from("192.0.2.8:4000"), bench.uplink)
            .dropped("not_allowed");
    });
}
