//! Datagrams in parts: the later ones have no ports, and go where the first went.

use std::{cell::RefCell, time::Duration};

use forwarder_tests::{
    fragment::{cut, put_together},
    frame::{Frame, Protocol},
};

use tokio::{runtime::Builder, time::timeout};

use crate::bench::{Bench, REDIRECT, at, bench};

fn carried(bench: &Bench, frame: &Frame, ifindex: u32) -> Frame {
    let parts = cut::<3>(frame, 7).map(|part| {
        let outcome = bench.send_bytes(&part, ifindex);
        assert_eq!(outcome.action, REDIRECT, "{outcome:?}");
        outcome.bytes
    });
    put_together(frame.source.is_ipv4(), &parts)
}

fn both_ways(client: &str, host: &str, backend: &str) {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, backend);
        let mut sent = Frame::first(Protocol::Udp, at(client), at(host));
        sent.payload = (0..100).collect();
        let forwarded = carried(bench, &sent, bench.uplink);
        assert_eq!(
            (forwarded.source, forwarded.destination),
            (at(client), at(backend))
        );
        assert_eq!(forwarded.payload, sent.payload);
        let answer = carried(bench, &forwarded.reply(), bench.container);
        assert_eq!((answer.source, answer.destination), (at(host), at(client)));
        assert_eq!(answer.payload, sent.payload);
    });
}

#[test]
fn ipv4_fragments_follow_their_first() {
    both_ways("198.51.100.9:4000", "198.51.100.2:53", "172.31.0.2:5353");
}

#[test]
fn ipv6_fragments_follow_their_first() {
    both_ways(
        "[2001:db8:100::9]:4000",
        "[2001:db8:100::2]:53",
        "[fd00:31::2]:5353",
    );
}

#[test]
fn a_fragment_without_its_first_is_the_stacks() {
    for (client, host, backend) in [
        ("198.51.100.9:4000", "198.51.100.2:53", "172.31.0.2:53"),
        (
            "[2001:db8:100::9]:4000",
            "[2001:db8:100::2]:53",
            "[fd00:31::2]:53",
        ),
    ] {
        bench(|bench| {
            bench.publish(Protocol::Udp, 53, backend);
            let mut frame = Frame::first(Protocol::Udp, at(client), at(host));
            frame.payload = vec![1; 100];
            let [_, later] = cut(&frame, 7);
            bench
                .send_bytes(&later, bench.uplink)
                .passed(&later, "fragment");
        });
    }
}

#[test]
fn the_parts_of_a_datagram_that_is_not_ours_stay_together() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        let elsewhere = at("198.51.100.2:54");
        let mut frame = Frame::first(Protocol::Udp, at("198.51.100.9:4000"), elsewhere);
        frame.payload = vec![1; 100];
        let [first, later] = cut(&frame, 7);
        bench.send_bytes(&first, bench.uplink).passed(&first, "");
        bench
            .send_bytes(&later, bench.uplink)
            .passed(&later, "fragment");
    });
}

/// Client, frontend and backend of each family.
const ENDS: [[&str; 3]; 2] = [
    ["198.51.100.9:4000", "198.51.100.2:53", "172.31.0.2:53"],
    [
        "[2001:db8:100::9]:4000",
        "[2001:db8:100::2]:53",
        "[fd00:31::2]:53",
    ],
];

/// Runs a scenario with a long first packet of each family, whose port is published.
fn with_long_frames(protocol: Protocol, scenario: impl Fn(&mut Bench, &Frame) + Sync) {
    for [client, host, backend] in ENDS {
        bench(|bench| {
            bench.publish(protocol, 53, backend);
            let mut frame = Frame::first(protocol, at(client), at(host));
            frame.payload = (0..100).collect();
            scenario(bench, &frame);
        });
    }
}

#[test]
fn a_datagram_whose_first_part_comes_late_is_the_stacks_in_every_part() {
    with_long_frames(Protocol::Udp, |bench, frame| {
        bench.send(frame, bench.uplink).forwarded();
        for (id, order) in [(8, [1, 0, 2]), (9, [2, 1, 0]), (10, [1, 2, 0])] {
            let parts = cut::<3>(frame, id);
            for part in order.map(|number| &parts[number]) {
                bench
                    .send_bytes(part, bench.uplink)
                    .passed(part, "fragment");
            }
        }
        carried(bench, frame, bench.uplink);
    });
}

#[test]
fn once_the_first_part_was_carried_the_others_may_come_in_any_order() {
    with_long_frames(Protocol::Udp, |bench, frame| {
        let parts = cut::<4>(frame, 8);
        let mut sent = [0, 2, 3, 1].map(|number| {
            let outcome = bench.send_bytes(&parts[number], bench.uplink);
            assert_eq!(outcome.action, REDIRECT, "{outcome:?}");
            outcome.bytes
        });
        sent.swap(1, 3);
        sent.swap(2, 3);
        let whole = put_together(frame.source.is_ipv4(), &sent);
        assert_eq!(whole.payload, frame.payload);
    });
}

#[test]
fn a_late_first_part_of_tcp_is_carried_since_no_socket_of_the_host_could_take_it() {
    with_long_frames(Protocol::Tcp, |bench, frame| {
        let [first, later] = cut(frame, 8);
        bench
            .send_bytes(&later, bench.uplink)
            .passed(&later, "fragment");
        assert_eq!(bench.send_bytes(&first, bench.uplink).action, REDIRECT);
    });
}

#[test]
fn an_answer_whose_first_part_comes_late_is_the_daemons_in_every_part() {
    handed_over(100);
}

#[test]
fn an_answer_in_long_frames_is_the_daemons_too() {
    handed_over(2500);
}

/// An answer with that much payload, most of it in the last of three parts.
fn handed_over(length: usize) {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    with_long_frames(Protocol::Udp, |bench, frame| {
        let _runtime = runtime.enter();
        let frames = RefCell::new(Vec::new());
        let taking = bench
            .datapath
            .handover(|frame, _| frames.borrow_mut().push(frame.to_vec()));
        let mut answer = bench.send(frame, bench.uplink).forwarded().reply();
        answer.payload.resize(length, 1);
        let [first, second, third] = cut(&answer, 8);
        for part in [&second, &third] {
            bench
                .send_bytes(part, bench.container)
                .passed(part, "fragment");
        }
        bench
            .send_bytes(&first, bench.container)
            .dropped("out_of_order");
        let taking = taking.unwrap();
        let took = async { timeout(Duration::from_millis(100), taking).await };
        assert!(runtime.block_on(took).is_err(), "it goes on");
        assert_eq!(*frames.borrow(), [second, third, first]);
        carried(bench, &answer, bench.container);
    });
}

#[test]
fn fragments_of_others_are_not_handed_to_the_daemon() {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    with_long_frames(Protocol::Udp, |bench, frame| {
        let _runtime = runtime.enter();
        let taking = bench
            .datapath
            .handover(|frame, _| panic!("{frame:?}"))
            .unwrap();
        let [_, later] = cut(frame, 8);
        bench
            .send_bytes(&later, bench.uplink)
            .passed(&later, "fragment");
        let took = async { timeout(Duration::from_millis(100), taking).await };
        assert!(runtime.block_on(took).is_err(), "it goes on");
    });
}

#[test]
fn a_fragment_that_passes_through_this_host_is_not_remembered() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        let (client, elsewhere) = (at("198.51.100.9:4000"), at("203.0.113.1:53"));
        let mut frame = Frame::first(Protocol::Udp, client, elsewhere);
        frame.payload = vec![1; 100];
        let [first, later] = cut(&frame, 7);
        bench
            .send_bytes(&later, bench.uplink)
            .passed(&later, "fragment");
        bench.send_bytes(&first, bench.uplink).passed(&first, "");
    });
}
