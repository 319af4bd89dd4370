//! Tuples that clash after DNAT get another source port, and keep their conversations apart.

use std::collections::BTreeSet;

use forwarder_tests::frame::{Frame, Protocol};

use crate::bench::{LO, at, bench, bench_with_ports};

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
        bench.send(&client(4002), LO).dropped("no_source_port");
        bench.send(&client(4000), LO).forwarded();
        let (key, _) = bench.datapath.maps.flows().next().unwrap().unwrap();
        bench.datapath.maps.remove_flow(&key).unwrap();
        bench.send(&client(4002), LO).forwarded();
    });
}
