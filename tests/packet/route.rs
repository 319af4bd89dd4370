//! Packets that leave by a route: the kernel is asked for the next hop once a tick, and says it itself at other times.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use forwarder::datapath::devices::Hook;
use forwarder_common::publish::{Interface, uplinks};
use forwarder_tests::{
    deadline::wait_for,
    frame::{Frame, Mac, Protocol},
    netns::Netns,
    wire::Wire,
};
use nix::net::if_::if_nametoindex;

use crate::bench::{Bench, REDIRECT, TICK, UPLINK, XDP_TX, at, behind, bench};

const PORT: u16 = 8080;
const BACKENDS: [&str; 2] = ["198.51.100.10:80", "[2001:db8:100::10]:80"];

/// A bench whose uplink leads to the backend and to clients, with the answer to each client's first datagram; returns
/// whether XDP can be run.
fn with_answers(clients: u16, scenario: impl FnOnce(&mut Bench, &[Vec<u8>], bool) + Send) {
    bench(|bench| {
        let xdp_runs = bench.publish_beside(Protocol::Udp, PORT, BACKENDS[0]);
        let neighbours: Vec<_> = (0..clients)
            .map(|client| neighbour(client, mac(client)))
            .collect();
        ip("route add 198.51.0.0/16 dev eth0");
        ip(&neighbours.join("\n"));
        let answer = |client| {
            let client = SocketAddr::new(address(client), 4000);
            answer_to(bench, client, at("198.51.100.2:8080"))
        };
        let answers: Vec<_> = (0..clients).map(answer).collect();
        scenario(bench, &answers, xdp_runs);
    });
}

/// A backend's answer to a client's first datagram.
fn answer_to(bench: &Bench, client: SocketAddr, frontend: SocketAddr) -> Vec<u8> {
    let first = Frame::first(Protocol::Udp, client, frontend);
    let arrived = bench.send(&first, bench.uplink).forwarded();
    arrived.reply().bytes()
}

fn ip(commands: &str) {
    Netns::current().unwrap().ip(commands).unwrap();
}

fn address(client: u16) -> IpAddr {
    let [high, low] = client.to_be_bytes();
    [198, 51, 101 + high, low].into()
}

fn mac(client: u16) -> Mac {
    let [high, low] = client.to_be_bytes();
    [2, 0, 0, 1, high, low]
}

fn neighbour(client: u16, [a, b, c, d, e, f]: Mac) -> String {
    let address = address(client);
    let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    format!("neigh replace {address} lladdr {mac} dev eth0")
}

/// The MAC that the program has given to the answer; `None` if it leaves by the kernel's output, which does that later.
fn next_hop(bench: &Bench, answer: &[u8]) -> Option<Mac> {
    let outcome = bench.send_bytes(answer, bench.uplink);
    assert_eq!(outcome.action, REDIRECT, "{outcome:?}");
    let mac = outcome.bytes[..6].try_into().unwrap();
    (mac != answer[..6]).then_some(mac)
}

/// Tries for so long that the kernel is asked.
#[track_caller]
fn goes_to(bench: &Bench, answer: &[u8], mac: Mac) {
    let known = wait_for("the kernel is asked", || next_hop(bench, answer));
    assert_eq!(known.unwrap(), mac);
}

#[test]
fn an_answer_goes_to_the_mac_that_its_client_has_now() {
    with_answers(1, |bench, answers, _| {
        let first = next_hop(bench, &answers[0]);
        assert_eq!(first, None, "the first is the kernel's");
        goes_to(bench, &answers[0], mac(0));
        ip(&neighbour(0, mac(9)));
        thread::sleep(TICK);
        goes_to(bench, &answers[0], mac(9));
    });
}

/// More clients than there is room for, so that they take each other's.
#[test]
fn no_answer_goes_to_anothers_mac() {
    const CLIENTS: u16 = 300;
    with_answers(CLIENTS, |bench, answers, xdp_runs| {
        let (mut by_tc, mut by_xdp) = (0, 0);
        let all: Vec<_> = (0..CLIENTS).zip(answers).collect();
        // A few at a time, so that less than a second goes by between two of one.
        for few in all.chunks(20) {
            for _ in 0..4 {
                for &(client, answer) in few {
                    if let Some(next) = next_hop(bench, answer) {
                        assert_eq!(next, mac(client));
                        by_tc += 1;
                    }
                    if !xdp_runs {
                        continue;
                    }
                    let early = bench.send_early(answer);
                    if early.action == XDP_TX {
                        assert_eq!(early.bytes[..6], mac(client));
                        by_xdp += 1;
                    }
                }
                thread::sleep(TICK);
            }
        }
        assert!(by_tc > CLIENTS, "{by_tc}");
        assert!(by_xdp > CLIENTS || !xdp_runs, "{by_xdp}");
    });
}

/// Where packets only pass by its knowledge, the kernel would not find out that a neighbour has gone.
#[test]
fn once_a_second_packets_leave_by_the_kernels_output() {
    with_answers(1, |bench, answers, _| {
        goes_to(bench, &answers[0], mac(0));
        let mut changes = 0;
        let mut was_known = true;
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(3500) {
            let is_known = next_hop(bench, &answers[0]).is_some();
            changes += usize::from(was_known && !is_known);
            was_known = is_known;
        }
        // Each processor that this has run on has its own second.
        assert!(changes >= 3, "{changes} times in 3.5 s");
    });
}

/// Answers that a rule sends by another router on the same link.
fn by_the_other_router(bench: &Bench, rule: &str, answer: &[u8], mark: u32) {
    let is_v4 = answer[12..14] == [8, 0];
    let (family, router) = if is_v4 {
        ("-4", "198.51.100.77")
    } else {
        ("-6", "2001:db8:100::77")
    };
    let netns = Netns::current().unwrap();
    for command in [
        format!("neigh replace {router} lladdr 02:00:00:00:00:77 dev eth0"),
        format!("route add default via {router} dev eth0 table 77"),
        format!("rule add {rule} lookup 77"),
    ] {
        netns.run(&format!("ip {family} {command}")).unwrap();
    }
    let mut known = Vec::new();
    for _ in 0..20 {
        let outcome = bench.send_marked(answer, bench.uplink, mark);
        assert_eq!(outcome.action, REDIRECT, "{outcome:?}");
        if outcome.bytes[..6] != answer[..6] {
            known.push(outcome.bytes[5]);
        }
        thread::sleep(TICK);
    }
    assert!(known.iter().all(|&last| last == 0x77), "{known:x?}");
    // What the kernel is not asked about, its output finds out.
    assert_eq!(known.is_empty(), mark != 0, "{known:x?}");
}

#[test]
fn a_rule_may_choose_by_the_type_of_service() {
    with_answers(1, |bench, answers, _| {
        let mut urgent = answers[0].clone();
        urgent[15] = 0x10;
        let checksum = u16::from_be_bytes([urgent[24], urgent[25]]);
        urgent[24..26].copy_from_slice(&(checksum - 0x10).to_be_bytes());
        goes_to(bench, &answers[0], mac(0));
        by_the_other_router(bench, "dsfield 0x10", &urgent, 0);
        goes_to(bench, &answers[0], mac(0));
    });
}

#[test]
fn a_rule_may_choose_by_the_source() {
    for (backend, client, frontend) in [
        (BACKENDS[0], "198.51.100.9:4000", "198.51.100.2:8080"),
        (
            BACKENDS[1],
            "[2001:db8:100::9]:4000",
            "[2001:db8:100::2]:8080",
        ),
    ] {
        bench(|bench| {
            bench.publish_beside(Protocol::Udp, PORT, backend);
            let answer = answer_to(bench, at(client), at(frontend));
            let rule = format!("from {}", at(frontend).ip());
            by_the_other_router(bench, &rule, &answer, 0);
        });
    }
}

#[test]
fn a_rule_may_choose_by_the_mark() {
    with_answers(1, |bench, answers, _| {
        goes_to(bench, &answers[0], mac(0));
        by_the_other_router(bench, "fwmark 5", &answers[0], 5);
    });
}

/// Kernels before 6.6 would send Ethernet's header over PPP.
#[test]
fn what_has_no_ethernet_header_is_left_to_the_kernel() {
    with_answers(1, |bench, answers, _| {
        let uplink = Interface {
            ethernet: 0,
            ..UPLINK
        };
        let maps = &mut bench.datapath.maps;
        maps.set_interface(bench.uplink, Some(behind(bench.uplink, uplink)))
            .unwrap();
        for _ in 0..20 {
            assert_eq!(next_hop(bench, &answers[0]), None);
            thread::sleep(TICK);
        }
    });
}

/// One more uplink, eth1, with a gateway on each; returns it.
pub(crate) fn second_uplink(bench: &mut Bench, strict: u8) -> u32 {
    let netns = Netns::current().unwrap();
    netns
        .ip(
            "link add eth1 type veth peer name eth1p\nlink set eth1 up\nlink set eth1p up\nlink set eth0p up\n\
             addr add 198.51.100.2/24 dev eth0\naddr add 203.0.113.2/24 dev eth1\n\
             neigh replace 198.51.100.1 lladdr 02:00:00:00:00:a0 dev eth0\n\
             neigh replace 203.0.113.1 lladdr 02:00:00:00:00:a1 dev eth1",
        )
        .unwrap();
    netns.forwards(true).unwrap();
    let second = if_nametoindex("eth1").unwrap();
    let maps = &mut bench.datapath.maps;
    for device in [bench.uplink, second] {
        let interface = behind(device, Interface { strict, ..UPLINK });
        maps.set_interface(device, Some(interface)).unwrap();
    }
    maps.set_uplinks(uplinks::SEVERAL).unwrap();
    second
}

#[test]
fn clients_by_either_leg_of_one_route_are_no_martians() {
    bench(|bench| {
        second_uplink(bench, 1);
        let netns = Netns::current().unwrap();
        let both = "nexthop via 198.51.100.1 dev eth0 nexthop via 203.0.113.1 dev eth1";
        netns.ip(&format!("route add default {both}")).unwrap();
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        // An address of this host that is on neither of the two.
        for last in 1..=100 {
            let client = SocketAddr::from(([192, 0, 2, last], 4000));
            let frame = Frame::first(Protocol::Udp, client, at("172.31.0.1:53"));
            bench.send(&frame, bench.uplink).forwarded();
        }
        // But not a neighbour by the other uplink.
        let frame = Frame::first(Protocol::Udp, at("203.0.113.9:4000"), at("172.31.0.1:53"));
        bench.send(&frame, bench.uplink).dropped("martian_source");
    });
}

/// Less than a packet in a second, each of which is left to the stack's output.
#[test]
fn a_conversation_that_speaks_seldom_follows_the_routes() {
    bench(|bench| {
        second_uplink(bench, 0);
        let netns = Netns::current().unwrap();
        netns
            .ip("link set veth0p up\nroute add default via 198.51.100.1 dev eth0")
            .unwrap();
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        let client = at("192.0.2.9:4000");
        let first = Frame::first(Protocol::Udp, client, at("198.51.100.2:53"));
        let mut answer = bench.send(&first, bench.uplink).forwarded().reply();
        answer.destination_mac = netns.mac("veth0").unwrap();
        let place = (bench.container, Hook::Ingress);
        bench.datapath.attach(place, "veth0").unwrap();
        let [inside, by_first, by_second] =
            ["veth0p", "eth0p", "eth1p"].map(|device| Wire::open(&netns, device).unwrap());
        let answered_by = |wire: &Wire| {
            inside.send(&answer.bytes()).unwrap();
            while let Ok(bytes) = wire.receive() {
                if Frame::parse(&bytes).is_ok_and(|frame| frame.destination == client) {
                    return true;
                }
            }
            false
        };
        assert!(answered_by(&by_first));
        netns
            .ip("route replace default via 203.0.113.1 dev eth1")
            .unwrap();
        for _ in 0..2 {
            thread::sleep(Duration::from_millis(1200));
            assert!(answered_by(&by_second));
        }
    });
}
