//! TCP connections whose flow is not known, any more or yet: where packet and publish alone tell what a segment becomes, the
//! connection goes on.

use std::net::{SocketAddr, TcpListener, TcpStream};

use forwarder_common::{
    flow::{Phase, state},
    publish::flag,
};
use forwarder_tests::{
    frame::{ACK, FIN_ACK, Flags, Frame, Protocol, RST, RST_ACK, SYN_ACK},
    netns::Netns,
};

use crate::bench::{Bench, LO, at, bench};

const ALL: [[&str; 3]; 2] = [
    ["198.51.100.9:4000", "198.51.100.2:8080", "172.31.0.2:80"],
    [
        "[2001:db8:100::9]:4000",
        "[2001:db8:100::2]:8080",
        "[fd00:31::2]:80",
    ],
];

fn forget_all(bench: &mut Bench) {
    let flows: Vec<_> = bench
        .datapath
        .maps
        .flows
        .all()
        .map(Result::unwrap)
        .collect();
    for (key, flow) in flows {
        bench.datapath.maps.flows.remove(&key, &flow).unwrap();
    }
}

fn phase(bench: &Bench) -> Phase {
    let (key, flow) = bench.flow();
    Phase::of(key.protocol, flow.state())
}

/// A client's segment in the midst of a connection.
fn segment(client: &str, frontend: &str, flags: Flags) -> Frame {
    let mut frame = Frame::first(Protocol::Tcp, at(client), at(frontend)).with_flags(flags);
    frame.sequence = 700_000_000;
    frame.acknowledgement = 3_000_000_000;
    frame
}

#[test]
fn a_connection_whose_flow_was_lost_goes_on() {
    for [client, frontend, backend] in ALL {
        bench(|bench| {
            bench.publish(Protocol::Tcp, 8080, backend);
            let mut sent = segment(client, frontend, ACK);
            sent.payload = b"more".to_vec();
            for _ in 0..2 {
                let outcome = bench.send(&sent, bench.uplink);
                assert_eq!(outcome.reasons, ["forwarded_original", "new_flow"]);
                let arrived = outcome.forwarded();
                assert_eq!(
                    (arrived.source, arrived.destination),
                    (at(client), at(backend))
                );
                assert_ne!(
                    phase(bench),
                    Phase::TcpEstablished,
                    "one side alone has spoken"
                );
                let answer = bench
                    .send(&arrived.reply().with_flags(ACK), bench.container)
                    .forwarded();
                assert_eq!(
                    (answer.source, answer.destination),
                    (at(frontend), at(client))
                );
                let acknowledged = Frame {
                    sequence: answer.acknowledgement,
                    acknowledgement: answer.sequence,
                    payload: Vec::new(),
                    ..sent.clone()
                };
                bench.send(&acknowledged, bench.uplink).forwarded();
                assert_eq!(phase(bench), Phase::TcpEstablished);
                assert_ne!(bench.flow().1.state() & state::KEPT, 0);
                let end = acknowledged.with_flags(FIN_ACK);
                bench.send(&end, bench.uplink).forwarded();
                assert_eq!(phase(bench), Phase::TcpFinWait, "its end is heeded");
                forget_all(bench);
            }
        });
    }
}

#[test]
fn a_backend_that_knows_nothing_of_the_connection_says_so() {
    bench(|bench| {
        let [client, frontend, backend] = ALL[0];
        bench.publish(Protocol::Tcp, 8080, backend);
        let sent = segment(client, frontend, ACK);
        let arrived = bench.send(&sent, bench.uplink).forwarded();
        let mut reset = arrived.reply().with_flags(RST);
        reset.sequence = sent.acknowledgement;
        let heard = bench.send(&reset, bench.container).forwarded();
        assert_eq!(heard.destination, at(client));
    });
}

#[test]
fn what_is_no_part_of_a_connection_begins_nothing() {
    bench(|bench| {
        let [client, frontend, backend] = ALL[0];
        bench.publish(Protocol::Tcp, 8080, backend);
        for flags in [RST, RST_ACK, SYN_ACK, Flags::default()] {
            let frame = segment(client, frontend, flags);
            bench
                .send(&frame, bench.uplink)
                .passed(&frame.bytes(), "not_syn");
        }
    });
}

/// Which source port the backend has seen, nobody knows any more.
#[test]
fn a_connection_with_another_source_is_the_stacks() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let frame = segment("127.0.0.1:4000", "127.0.0.1:8080", ACK);
        bench.send(&frame, LO).passed(&frame.bytes(), "not_syn");
    });
}

#[test]
fn who_may_not_begin_may_not_go_on() {
    bench(|bench| {
        let mut entry = bench.entry(8080, "172.31.0.2:80");
        entry.flags |= flag::ALLOW_LIST;
        bench.publish_entry(1, None, Protocol::Tcp, 8080, &entry);
        let frame = segment("198.51.100.9:4000", "198.51.100.2:8080", ACK);
        bench.send(&frame, bench.uplink).dropped("not_allowed");
        let frame = segment("127.0.0.1:4000", "198.51.100.2:8080", ACK);
        bench.send(&frame, bench.uplink).dropped("martian_source");
    });
}

#[test]
fn the_connection_of_a_socket_of_this_host_stays_its_own() {
    bench(|bench| {
        let netns = Netns::current().unwrap();
        netns.ip("addr add 198.51.100.2/24 dev eth0").unwrap();
        let listener = TcpListener::bind("198.51.100.2:8080").unwrap();
        let client = TcpStream::connect("198.51.100.2:8080").unwrap();
        let (server, _) = listener.accept().unwrap();
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let from = |address: SocketAddr| {
            let frame = Frame::first(Protocol::Tcp, address, at("198.51.100.2:8080"));
            frame.with_flags(ACK)
        };
        let its_own = from(client.local_addr().unwrap());
        bench.send(&its_own, LO).passed(&its_own.bytes(), "not_syn");
        let anothers = from(at("198.51.100.2:999"));
        bench.send(&anothers, LO).forwarded();
        drop(server);
    });
}

/// A client's own connection to the backend goes on, whatever somebody sends to the published port in its name.
#[test]
fn a_forged_segment_does_not_cut_a_direct_connection() {
    bench(|bench| {
        let [client, frontend, backend] = ALL[0];
        bench.publish(Protocol::Tcp, 8080, backend);
        let direct = Frame::first(Protocol::Tcp, at(client), at(backend));
        bench
            .send(&direct, bench.uplink)
            .passed(&direct.bytes(), "");
        let forged = segment(client, frontend, ACK);
        bench.send(&forged, bench.uplink).forwarded();
        let mut data = direct.reply().with_flags(ACK);
        data.payload = b"more".to_vec();
        bench.send(&data, bench.container).passed(&data.bytes(), "");
    });
}

#[test]
fn a_connection_whose_flow_was_lost_ends_all_the_same() {
    bench(|bench| {
        let [client, frontend, backend] = ALL[0];
        bench.publish(Protocol::Tcp, 8080, backend);
        let end = segment(client, frontend, FIN_ACK);
        let arrived = bench.send(&end, bench.uplink).forwarded();
        let answer = arrived.reply().with_flags(FIN_ACK);
        let heard = bench.send(&answer, bench.container).forwarded();
        let last = Frame {
            destination_mac: end.destination_mac,
            ..heard.reply().with_flags(ACK)
        };
        bench.send(&last, bench.uplink).forwarded();
        assert_eq!(phase(bench), Phase::TcpTimeWait);
    });
}

#[test]
fn a_connection_from_the_port_of_one_that_was_over_is_a_new_one() {
    bench(|bench| {
        let [client, frontend, backend] = ALL[0];
        bench.publish(Protocol::Tcp, 8080, backend);
        let late = segment(client, frontend, FIN_ACK);
        let arrived = bench.send(&late, bench.uplink).forwarded();
        let mut reset = arrived.reply().with_flags(RST);
        reset.sequence = late.acknowledgement;
        bench.send(&reset, bench.container).forwarded();
        let syn = Frame::first(Protocol::Tcp, at(client), at(frontend));
        let arrived = bench.send(&syn, bench.uplink).forwarded();
        bench.send(&arrived.reply(), bench.container).forwarded();
        bench.send(&syn.with_flags(ACK), bench.uplink).forwarded();
        assert_eq!(phase(bench), Phase::TcpEstablished);
    });
}

/// Somebody acknowledges in the client's name what nobody has sent: the end of the connection is heeded all the same, once the
/// client has acknowledged it.
#[test]
fn a_connection_that_goes_on_believes_no_more_than_was_sent() {
    bench(|bench| {
        let [client, frontend, backend] = ALL[0];
        bench.publish(Protocol::Tcp, 8080, backend);
        let mut sent = segment(client, frontend, ACK);
        let first = sent.acknowledgement;
        let arrived = bench.send(&sent, bench.uplink).forwarded();
        let answer = arrived.reply().with_flags(ACK);
        bench.send(&answer, bench.container).forwarded();
        for beyond in [1 << 22, 1 << 29] {
            sent.acknowledgement = first + beyond;
            bench.send(&sent, bench.uplink).forwarded();
        }
        bench
            .send(&answer.with_flags(FIN_ACK), bench.container)
            .forwarded();
        sent.acknowledgement = first + 1;
        bench.send(&sent, bench.uplink).forwarded();
        assert_eq!(phase(bench), Phase::TcpCloseWait);
    });
}
