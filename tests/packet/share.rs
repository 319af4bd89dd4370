//! What part of the flow table a source has: above three quarters no more than a sixteenth, and less the fuller it is.

use std::net::SocketAddr;

use forwarder::datapath::{Options, maps::Walk};
use forwarder_common::{
    flow::state,
    publish::flag,
    share::{ALIASES, ALL},
    tuple::Address,
};
use forwarder_tests::frame::{ACK, FIN_ACK, Frame, Protocol};

use crate::bench::{Bench, LO, at, bench_with, options};

const PORT: u16 = 8080;
/// Entries of the table.
const FLOWS: u32 = 256;
/// What one source may have of it where it is three quarters full.
const SIXTEENTH: usize = FLOWS as usize / 16;

/// Client, host and backend of each family.
const WORLDS: [[&str; 3]; 2] = [
    ["198.51.100.9", "198.51.100.2:8080", "172.31.0.2:80"],
    [
        "2001:db8:100::9",
        "[2001:db8:100::2]:8080",
        "[fd00:31::2]:80",
    ],
];

fn bench(scenario: impl FnOnce(&mut Bench) + Send) {
    let options = Options {
        flows: FLOWS,
        ..options()
    };
    bench_with(options, scenario);
}

fn first(protocol: Protocol, client: &str, port: u16, frontend: &str) -> Frame {
    let client = SocketAddr::new(client.parse().unwrap(), port);
    Frame::first(protocol, client, at(frontend))
}

/// Has both sides speak, as far as the program carries them.
fn converse(bench: &Bench, sent: &Frame, by: u32) -> Vec<&'static str> {
    let arrived = bench.send(sent, by);
    if arrived.action != crate::bench::REDIRECT {
        return arrived.reasons;
    }
    bench
        .send(&arrived.forwarded().reply(), bench.container)
        .forwarded();
    bench.send(&sent.clone().with_flags(ACK), by).reasons
}

/// Entries that a source has among the proven flows.
fn kept(bench: &Bench, source: &str) -> usize {
    let source: Address = source.parse::<std::net::IpAddr>().unwrap().into();
    let flows = bench.datapath.maps.flows.all().map(Result::unwrap);
    flows
        .filter(|(_, flow)| flow.client == source && flow.state() & state::KEPT != 0)
        .count()
}

/// The counters are what the table has.
#[track_caller]
fn is_counted(bench: &Bench) {
    let flows = &bench.datapath.maps.flows;
    let mut kept = vec![0_u64; ALL as usize + 1];
    let mut walk = Walk::default();
    loop {
        let is_kept = walk.is_kept();
        let Some(slice) = flows.slice(&mut walk).unwrap() else {
            break;
        };
        for (key, flow) in slice.filter(|_| is_kept) {
            let source = flows.shares.index(flow.source(&key));
            for index in [source, ALL] {
                kept[index as usize] += 1;
            }
        }
    }
    for (index, kept) in (0..).zip(kept) {
        assert_eq!(flows.shares.held(index), kept, "element {index}");
    }
}

/// Fills three quarters of the table by one source. One whose first port another has takes two entries.
fn fill(bench: &Bench, protocol: Protocol, client: &str, frontend: &str, by: u32) {
    let mut ports = 10_000..;
    while bench.datapath.maps.flows.shares.held(ALL) < u64::from(FLOWS / 4 * 3) {
        let sent = first(protocol, client, ports.next().unwrap(), frontend);
        let reasons = converse(bench, &sent, by);
        assert_eq!(reasons, ["forwarded_original"], "{sent:?}");
    }
}

#[test]
fn one_source_leaves_a_quarter_to_others() {
    for [client, host, backend] in WORLDS {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            bench(|bench| {
                bench.publish(protocol, PORT, backend);
                fill(bench, protocol, client, host, bench.uplink);
                let held = kept(bench, client);
                for port in 20_000..20_100 {
                    let sent = first(protocol, client, port, host);
                    let reasons = converse(bench, &sent, bench.uplink);
                    assert_eq!(reasons, ["forwarded_original", "source_share"]);
                }
                assert_eq!(kept(bench, client), held);
                is_counted(bench);
                for port in 4000..4000 + SIXTEENTH as u16 / 2 {
                    for other in others(client) {
                        let sent = first(protocol, &other, port, host);
                        let reasons = converse(bench, &sent, bench.uplink);
                        assert_eq!(reasons, ["forwarded_original"], "{other}");
                    }
                }
                is_counted(bench);
            });
        }
    }
}

/// Sources of other networks than the client's.
fn others(client: &str) -> [String; 3] {
    if client.contains(':') {
        [1, 2, 3].map(|network| format!("2001:db8:{network}::9"))
    } else {
        [11, 12, 13].map(|host| format!("198.51.100.{host}"))
    }
}

#[test]
fn above_three_quarters_no_source_gets_more_than_a_sixteenth() {
    for [client, host, backend] in WORLDS {
        bench(|bench| {
            bench.publish(Protocol::Tcp, PORT, backend);
            fill(bench, Protocol::Tcp, client, host, bench.uplink);
            let [other, last, _] = others(client);
            for port in 4000..4100 {
                let sent = first(Protocol::Tcp, &other, port, host);
                converse(bench, &sent, bench.uplink);
            }
            let held = kept(bench, &other);
            assert!((SIXTEENTH / 2..=SIXTEENTH).contains(&held), "{held}");
            let reasons = converse(
                bench,
                &first(Protocol::Tcp, &last, 4000, host),
                bench.uplink,
            );
            assert_eq!(reasons, ["forwarded_original"]);
            assert_eq!(kept(bench, &last), 1);
        });
    }
}

#[test]
fn addresses_of_one_ipv6_network_are_one_source() {
    let [_, host, backend] = WORLDS[1];
    bench(|bench| {
        bench.publish(Protocol::Udp, PORT, backend);
        for number in 0..400 {
            let client = format!("2001:db8:77::{number:x}:1");
            converse(
                bench,
                &first(Protocol::Udp, &client, 4000, host),
                bench.uplink,
            );
        }
        let flows = bench.datapath.maps.flows.all().map(Result::unwrap);
        let kept = flows.filter(|(_, flow)| flow.state() & state::KEPT != 0);
        assert_eq!(kept.count(), FLOWS as usize / 4 * 3);
        is_counted(bench);
    });
}

/// Those of this host and those of a backend on another machine take entries from their first packet on.
#[test]
fn new_clients_with_a_source_port_are_served_beside_a_source_that_has_its_share() {
    for [client, host, backend] in WORLDS {
        bench(|bench| {
            let mut remote = bench.entry(PORT, backend);
            remote.flags |= flag::REMOTE;
            for (index, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp)] {
                bench.publish_entry(index, None, protocol, PORT, &remote);
            }
            fill(bench, Protocol::Tcp, client, host, bench.uplink);
            let late = first(Protocol::Tcp, client, 20_000, host);
            let outcome = bench.send(&late, bench.uplink);
            assert_eq!(outcome.reasons, ["no_entry", "source_share"]);
            let late = first(Protocol::Udp, client, 20_000, host);
            let outcome = bench.send(&late, bench.uplink);
            assert_eq!(outcome.reasons, ["no_source_port", "source_share"]);
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let [other, ..] = others(client);
                let sent = first(protocol, &other, 4000, host);
                let reasons = converse(bench, &sent, bench.uplink);
                assert_eq!(reasons, ["forwarded_original"]);
                let local = if client.contains(':') {
                    ("::1", "[::1]:8080")
                } else {
                    ("127.0.0.1", "127.0.0.1:8080")
                };
                let sent = first(protocol, local.0, 4000, local.1);
                assert_eq!(converse(bench, &sent, LO), ["forwarded_original"]);
            }
            is_counted(bench);
        });
    }
}

/// As one that closes each connection before the next: what is over makes room, but for its own source alone.
#[test]
fn a_source_with_its_share_uses_its_own_entries_again_and_no_others() {
    let [client, host, backend] = WORLDS[0];
    let options = Options {
        flows: FLOWS,
        snat: (61_000, 400),
        ..options()
    };
    bench_with(options, |bench| {
        let mut remote = bench.entry(PORT, backend);
        remote.flags |= flag::REMOTE;
        bench.publish_entry(1, None, Protocol::Tcp, PORT, &remote);
        let close = |client: &str, port| {
            let sent = first(Protocol::Tcp, client, port, host);
            let arrived = bench.send(&sent, bench.uplink);
            if arrived.action != crate::bench::REDIRECT {
                return false;
            }
            let answer = arrived.forwarded().reply();
            bench.send(&answer, bench.container).forwarded();
            let end = sent.with_flags(FIN_ACK);
            bench.send(&end, bench.uplink).forwarded();
            let answer = answer.with_flags(FIN_ACK);
            bench.send(&answer, bench.container).forwarded();
            bench.send(&end.with_flags(ACK), bench.uplink).forwarded();
            true
        };
        for port in 10_000..11_600 {
            assert!(close(client, port), "{port}");
        }
        is_counted(bench);
        let all = bench.datapath.maps.flows.shares.held(ALL);
        assert!(all <= u64::from(FLOWS / 4 * 3) + 1, "{all}, with aliases");
        let (held, [other, ..]) = (kept(bench, client), others(client));
        for port in 10_000..10_040 {
            close(&other, port);
        }
        let (less, has) = (kept(bench, client), kept(bench, &other));
        assert!(has <= SIXTEENTH, "{has}");
        assert_eq!(less, held, "its entries are its own");
        is_counted(bench);
    });
}

#[test]
fn what_ends_makes_room() {
    let [client, host, backend] = WORLDS[0];
    bench(|bench| {
        bench.publish(Protocol::Tcp, PORT, backend);
        fill(bench, Protocol::Tcp, client, host, bench.uplink);
        let late = first(Protocol::Tcp, client, 20_000, host);
        converse(bench, &late, bench.uplink);
        let (key, _) = bench
            .datapath
            .maps
            .flows
            .all()
            .map(Result::unwrap)
            .find(|(_, flow)| flow.state() & state::KEPT != 0)
            .unwrap();
        bench.datapath.maps.flows.end(&key, |_| true).unwrap();
        is_counted(bench);
        let again = bench.send(&late.with_flags(ACK), bench.uplink);
        assert_eq!(again.reasons, ["forwarded_original"]);
        assert_eq!(kept(bench, client), FLOWS as usize / 4 * 3);
        is_counted(bench);
    });
}

/// Publishes a backend twice; what one client sends to both by one port, of which the second conversation cannot keep it.
fn twice(bench: &mut Bench, protocol: Protocol) -> [Frame; 2] {
    let [client, host, backend] = WORLDS[0];
    let entry = bench.entry(8080, backend);
    for (index, port) in [(1, 8080), (2, 9090)] {
        bench.publish_entry(index, None, protocol, port, &entry);
    }
    let mut other = at(host);
    other.set_port(9090);
    [host, &other.to_string()].map(|frontend| first(protocol, client, 4000, frontend))
}

/// A client with its own port taken: the entry that leads to its flow counts as well.
#[test]
fn aliases_count_for_their_source() {
    bench(|bench| {
        for sent in twice(bench, Protocol::Tcp) {
            converse(bench, &sent, bench.uplink);
        }
        assert_eq!(bench.datapath.maps.flows.shares.held(ALL), 3);
        is_counted(bench);
        let all: Vec<_> = bench.datapath.maps.flows.all().collect();
        for (key, flow) in all.into_iter().map(Result::unwrap) {
            bench.datapath.maps.flows.remove(&key, &flow).unwrap();
        }
        assert_eq!(bench.datapath.maps.flows.shares.held(ALL), 0);
    });
}

/// A flow whose client's port another has is found by its alias, for as long as that is there: after walks that met it, and after
/// the other has gone.
#[test]
fn an_alias_is_looked_for_until_a_walk_has_not_met_it() {
    bench(|bench| {
        let [sent, second] = twice(bench, Protocol::Udp);
        let held = |bench: &Bench| bench.datapath.maps.flows.shares.held(ALIASES);
        assert_eq!(held(bench), 1, "an earlier program may have left one");
        walk(bench);
        assert_eq!(held(bench), 0);
        bench.send(&sent, bench.uplink).forwarded();
        assert_eq!(held(bench), 0);
        let port = bench.send(&second, bench.uplink).forwarded().source.port();
        assert_ne!(port, 4000);
        assert_ne!(held(bench), 0);
        let flows = &mut bench.datapath.maps.flows;
        let (key, flow) = flows
            .all()
            .map(Result::unwrap)
            .find(|(key, _)| key.source_port == 4000_u16.to_be())
            .unwrap();
        flows.remove(&key, &flow).unwrap();
        for _ in 0..2 {
            walk(bench);
            assert_eq!(held(bench), 1);
            let again = bench.send(&second, bench.uplink).forwarded();
            assert_eq!(again.source.port(), port);
        }
        let flows = &mut bench.datapath.maps.flows;
        let (key, flow) = flows.all().map(Result::unwrap).next().unwrap();
        flows.remove(&key, &flow).unwrap();
        walk(bench);
        assert_eq!(held(bench), 0);
    });
}

/// As the daemon walks over both tables.
fn walk(bench: &Bench) {
    let flows = &bench.datapath.maps.flows;
    let (mut count, mut walk) = (flows.shares.begin_count(), Walk::default());
    loop {
        let is_kept = walk.is_kept();
        let Some(slice) = flows.slice(&mut walk).unwrap() else {
            break;
        };
        for (key, flow) in slice {
            if is_kept {
                count.saw(flows.shares.index(flow.source(&key)));
            }
            if flow.state() & state::ALIAS != 0 {
                count.saw_alias();
            }
        }
    }
    flows.shares.correct(&count);
}

/// A walk finds what was written there without being counted, and what was counted and is not there.
#[test]
fn a_walk_puts_the_counters_right() {
    let [client, host, backend] = WORLDS[0];
    bench(|bench| {
        bench.publish(Protocol::Tcp, PORT, backend);
        fill(bench, Protocol::Tcp, client, host, bench.uplink);
        let flows = &bench.datapath.maps.flows;
        let source: Address = at(&format!("{client}:1")).ip().into();
        let index = flows.shares.index(&source);
        let true_count = flows.shares.held(index);
        for wrong in [true_count / 2, true_count * 2] {
            // As if the table had so many of this source.
            let mut count = flows.shares.begin_count();
            (0..wrong).for_each(|_| count.saw(index));
            flows.shares.correct(&count);
            assert_eq!(flows.shares.held(index), wrong);
            assert_eq!(flows.shares.held(ALL), wrong);
        }
        let mut count = flows.shares.begin_count();
        (0..true_count).for_each(|_| count.saw(index));
        flows.shares.correct(&count);
        is_counted(bench);
        // What comes and goes while it walks is left alone.
        let mut count = flows.shares.begin_count();
        (0..true_count).for_each(|_| count.saw(index));
        let key = flows.all().map(Result::unwrap).next().unwrap().0;
        bench.datapath.maps.flows.end(&key, |_| true).unwrap();
        let before = bench.datapath.maps.flows.shares.held(ALL);
        bench.datapath.maps.flows.shares.correct(&count);
        assert_eq!(bench.datapath.maps.flows.shares.held(ALL), before);
    });
}
