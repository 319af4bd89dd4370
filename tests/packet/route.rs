//! Packets that leave by a route: the kernel is asked for the next hop once a tick, and says it itself at other times.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use forwarder_tests::{
    frame::{Frame, Mac, Protocol},
    netns::Netns,
};

use crate::bench::{Bench, REDIRECT, TICK, at, bench};

const PORT: u16 = 8080;
const BACKEND: &str = "198.51.100.10:80";

/// A bench whose uplink leads to the backend and to clients, with the answer to each client's first datagram.
fn with_answers(clients: u16, scenario: impl FnOnce(&mut Bench, &[Vec<u8>]) + Send) {
    bench(|bench| {
        bench.publish_beside(Protocol::Udp, PORT, BACKEND);
        let neighbours: Vec<_> = (0..clients)
            .map(|client| neighbour(client, mac(client)))
            .collect();
        ip("route add 198.51.0.0/16 dev eth0");
        ip(&neighbours.join("\n"));
        let answer = |client| {
            let client = SocketAddr::new(address(client), 4000);
            let first = Frame::first(Protocol::Udp, client, at("198.51.100.2:8080"));
            let arrived = bench.send(&first, bench.uplink).forwarded();
            arrived.reply().bytes()
        };
        let answers: Vec<_> = (0..clients).map(answer).collect();
        scenario(bench, &answers);
    });
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
    let tries = (0..100).find_map(|_| {
        thread::sleep(Duration::from_millis(5));
        next_hop(bench, answer)
    });
    assert_eq!(tries, Some(mac));
}

#[test]
fn an_answer_goes_to_the_mac_that_its_client_has_now() {
    with_answers(1, |bench, answers| {
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
    with_answers(CLIENTS, |bench, answers| {
        let mut known = 0;
        let all: Vec<_> = (0..CLIENTS).zip(answers).collect();
        // A few at a time, so that less than a second goes by between two of one.
        for few in all.chunks(20) {
            for _ in 0..4 {
                for &(client, answer) in few {
                    if let Some(next) = next_hop(bench, answer) {
                        assert_eq!(next, mac(client));
                        known += 1;
                    }
                }
                thread::sleep(TICK);
            }
        }
        assert!(known > usize::from(CLIENTS), "{known}");
    });
}

/// Where packets only pass by its knowledge, the kernel would not find out that a neighbour has gone.
#[test]
fn once_a_second_packets_leave_by_the_kernels_output() {
    with_answers(1, |bench, answers| {
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

#[test]
fn a_rule_may_choose_by_the_type_of_service() {
    with_answers(1, |bench, answers| {
        ip(
            "neigh replace 198.51.100.77 lladdr 02:00:00:00:00:77 dev eth0\n\
            route add default via 198.51.100.77 dev eth0 table 77\n\
            rule add dsfield 0x10 lookup 77",
        );
        let mut other = answers[0].clone();
        other[15] = 0x10;
        let checksum = u16::from_be_bytes([other[24], other[25]]);
        other[24..26].copy_from_slice(&(checksum - 0x10).to_be_bytes());
        for _ in 0..3 {
            goes_to(bench, &answers[0], mac(0));
            goes_to(bench, &other, [2, 0, 0, 0, 0, 0x77]);
        }
    });
}
