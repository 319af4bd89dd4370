//! What is counted of a publish: flows that are there, have begun and have ended, and whom it has refused.

use std::path::PathBuf;

use forwarder::datapath::{Options, maps::Usage};
use forwarder_common::{
    flow::{Flow, Phase, Timeouts, state},
    publish::flag,
    tuple::Tuple,
};
use forwarder_tests::{
    frame::{ACK, Frame, Protocol},
    layout::lay_out_otherwise,
};

use crate::bench::{Bench, LO, XDP_DROP, at, bench, bench_with, options};

const PORT: u16 = 8080;
/// Client, host and backend.
const V4: [&str; 3] = ["198.51.100.9:4000", "198.51.100.2:8080", "172.31.0.2:80"];
const V6: [&str; 3] = [
    "[2001:db8:100::9]:4000",
    "[2001:db8:100::2]:8080",
    "[fd00:31::2]:80",
];

fn usage(bench: &Bench) -> Usage {
    bench.datapath.maps.usage(1).unwrap()
}

/// Has both sides speak, and the client again, by a device.
fn prove(bench: &Bench, first: &Frame, by: u32) {
    let arrived = bench.send(first, by).forwarded();
    bench.send(&arrived.reply(), bench.container).forwarded();
    bench.send(&first.clone().with_flags(ACK), by).forwarded();
}

#[test]
fn a_flow_is_there_from_when_it_is_proven_until_it_ends() {
    for [client, host, backend] in [V4, V6] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            bench(|bench| {
                bench.publish(protocol, PORT, backend);
                let first = Frame::first(protocol, at(client), at(host));
                bench.send(&first, bench.uplink).forwarded();
                let half_open = Usage {
                    begun: 1,
                    ..Usage::default()
                };
                assert_eq!(usage(bench), half_open);
                prove(bench, &first, bench.uplink);
                assert_eq!((usage(bench).flows, usage(bench).begun), (1, 1));
                let (key, flow) = bench.flow();
                let maps = &mut bench.datapath.maps;
                assert_eq!(maps.flows.end(&key, |_| false).unwrap(), None);
                assert_eq!(maps.usage(1).unwrap().flows, 1);
                maps.flows.end(&key, |_| true).unwrap();
                let over = Usage {
                    flows: 0,
                    begun: 1,
                    packets: flow.packets(),
                    bytes: flow.bytes(),
                    ..Usage::default()
                };
                assert_eq!(flow.packets(), [3, 1]);
                assert_eq!(usage(bench), over);
                // That it is gone already counts no more.
                bench.datapath.maps.flows.remove(&key, &flow).unwrap();
                assert_eq!(usage(bench), over);
                bench.datapath.maps.clear_usage(1).unwrap();
                assert_eq!(usage(bench), Usage::default());
            });
        }
    }
}

#[test]
fn a_flow_that_gives_its_source_port_away_has_ended() {
    for [_, host, backend] in [V4, V6] {
        let mut timeouts = Timeouts::default();
        timeouts.set(Phase::Udp, 0);
        timeouts.set(Phase::UdpStream, 0);
        let options = Options {
            timeouts,
            snat: (61_000, 1),
            ..options()
        };
        bench_with(options, |bench| {
            bench.publish(Protocol::Udp, PORT, backend);
            let local = |port| {
                let mut client = at(if at(host).is_ipv4() {
                    "127.0.0.1:1"
                } else {
                    "[::1]:1"
                });
                client.set_port(port);
                let mut host = client;
                host.set_port(PORT);
                Frame::first(Protocol::Udp, client, host)
            };
            bench.send(&local(4000), LO).forwarded();
            let kept = Usage {
                flows: 1,
                begun: 1,
                ..Usage::default()
            };
            assert_eq!(usage(bench), kept);
            bench.send(&local(4001), LO).forwarded();
            let taken = usage(bench);
            assert_eq!((taken.flows, taken.begun), (1, 2));
            assert_eq!(taken.packets, [1, 0]);
        });
    }
}

#[test]
fn flows_that_the_table_has_no_room_for_are_not_counted_as_there() {
    let options = Options {
        flows: 2,
        ..options()
    };
    bench_with(options, |bench| {
        bench.publish(Protocol::Tcp, PORT, V4[2]);
        for port in 4000..4004 {
            let client = std::net::SocketAddr::from(([198, 51, 100, 9], port));
            let first = Frame::first(Protocol::Tcp, client, at(V4[1]));
            prove(bench, &first, bench.uplink);
        }
        assert_eq!((usage(bench).flows, usage(bench).begun), (2, 4));
    });
}

#[test]
fn refusals_are_counted_by_publish_and_reason_on_both_hooks() {
    for [client, host, backend] in [V4, V6] {
        bench(|bench| {
            let mut entry = bench.entry(PORT, backend);
            entry.flags |= flag::ALLOW_LIST;
            bench.publish_entry(2, None, Protocol::Tcp, 9090, &entry);
            bench.publish_entry(1, None, Protocol::Tcp, PORT, &entry);
            let first = Frame::first(Protocol::Tcp, at(client), at(host));
            bench.send(&first, bench.uplink).dropped("not_allowed");
            bench.send(&first, bench.uplink).dropped("not_allowed");
            let mut refused = 2;
            let mode = forwarder::datapath::xdp::Mode::Native;
            bench.datapath.attach_xdp(bench.uplink, mode).unwrap();
            // Programs are run for a device from 5.15 on.
            if bench.datapath.try_early(&[0; 60], bench.uplink).is_ok() {
                assert_eq!(bench.send_early(&first.bytes()).action, XDP_DROP);
                refused += 1;
            }
            assert_eq!(usage(bench).refused, [("not_allowed", refused)].into());
            assert_eq!(usage(bench).begun, 0);
            assert_eq!(bench.datapath.maps.usage(2).unwrap(), Usage::default());
            bench.datapath.maps.clear_usage(1).unwrap();
            assert_eq!(usage(bench), Usage::default());
        });
    }
}

/// An instance with pins and a proven flow, which a later one with the same pins will know.
fn with_a_pinned_flow(name: &str, test: impl FnOnce(&mut Bench, &Options, Tuple, Flow) + Send) {
    let pins = PathBuf::from(format!("/sys/fs/bpf/forwarder-{name}-test"));
    let options = Options {
        pins: Some(pins.clone()),
        ..options()
    };
    bench_with(options.clone(), |bench| {
        bench.publish(Protocol::Tcp, PORT, V4[2]);
        bench.datapath.forget_others();
        let first = Frame::first(Protocol::Tcp, at(V4[0]), at(V4[1]));
        prove(bench, &first, bench.uplink);
        let (key, flow) = bench.flow();
        test(bench, &options, key, flow);
    });
    let _ = std::fs::remove_dir_all(pins);
}

#[test]
fn a_later_instance_knows_which_flows_are_there() {
    with_a_pinned_flow("usage", |_, options, key, flow| {
        let mut later = Bench::here(options).datapath;
        assert_eq!(later.maps.usage(1).unwrap().flows, 1);
        // Its publish has another number there.
        let mut flow = flow;
        flow.set_publish(7);
        later.maps.flows.set(&key, &flow).unwrap();
        assert_eq!(later.maps.usage(1).unwrap().flows, 0);
        assert_eq!(later.maps.usage(7).unwrap().flows, 1);
        later.maps.flows.end(&key, |_| true).unwrap();
        assert_eq!(later.maps.usage(7).unwrap().flows, 0);
        later.remove();
    });
}

#[test]
fn flows_are_carried_over_from_another_layout_as_far_as_they_have_come() {
    with_a_pinned_flow("layout", |_, options, key, flow| {
        let other = lay_out_otherwise(options.pins.as_ref().unwrap()).unwrap();
        let mut later = Bench::here(options).datapath;
        assert_eq!(later.maps.usage(1).unwrap().flows, 1);
        assert_eq!(later.maps.flows.get(&key).unwrap(), None);
        later.take_over();
        assert_eq!(later.maps.flows.get(&key).unwrap(), Some(flow));
        // What the earlier programs have done since.
        let mut behind = flow.with_state(flow.state() & !state::ESTABLISHED);
        for side in [&mut behind.original, &mut behind.reply] {
            (side.packets, side.sent) = (0, 1);
        }
        later.maps.flows.set(&key, &behind).unwrap();
        later.forget_others();
        assert_eq!(later.maps.flows.get(&key).unwrap(), Some(flow));
        assert_eq!(later.maps.usage(1).unwrap().flows, 1);
        assert!(!other.exists());
        later.remove();
    });
}

#[test]
fn flows_that_began_while_the_programs_were_replaced_are_carried_over_and_counted() {
    with_a_pinned_flow("late", |_, options, key, flow| {
        lay_out_otherwise(options.pins.as_ref().unwrap()).unwrap();
        let mut later = Bench::here(options).datapath;
        later.take_over();
        // As if it had not been there yet.
        later.maps.flows.remove(&key, &flow).unwrap();
        let begun = later.maps.usage(1).unwrap().begun;
        assert_eq!(later.maps.usage(1).unwrap().flows, 0);
        later.forget_others();
        assert_eq!(later.maps.flows.get(&key).unwrap(), Some(flow));
        assert_eq!(later.maps.usage(1).unwrap().flows, 1);
        assert_eq!(later.maps.usage(1).unwrap().begun, begun + 1);
        later.remove();
    });
}

/// A start that does not come as far as forwarding leaves an earlier layout's tables alone, and none of its own.
#[test]
fn tables_of_a_start_that_fails_are_not_taken_for_those_in_use() {
    with_a_pinned_flow("unused", |_, options, key, flow| {
        let pins = options.pins.as_ref().unwrap();
        let other = lay_out_otherwise(pins).unwrap();
        let folders = || std::fs::read_dir(pins).unwrap().count();
        drop(Bench::here(options).datapath); // killed
        assert_eq!(folders(), 2);
        Bench::here(options).datapath.abandon();
        assert_eq!(folders(), 1);
        assert!(other.exists());
        let mut later = Bench::here(options).datapath;
        later.take_over();
        later.forget_others();
        assert_eq!(later.maps.flows.get(&key).unwrap(), Some(flow));
        later.remove();
    });
}
