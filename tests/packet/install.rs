//! A publish is written as a whole or not at all, and a failure of one is none of another's.

use forwarder::datapath::maps::Installed;
use forwarder_common::{limits, publish::flag};
use forwarder_tests::frame::{Frame, Protocol};
use ipnet::{IpNet, Ipv4Net};

use crate::bench::{Bench, at, bench, network};

const BACKEND: [&str; 2] = ["172.31.0.2:80", "[fd00:31::2]:80"];

/// So many networks, none of which has another.
fn networks(count: u32) -> Vec<IpNet> {
    (0..count)
        .map(|number| Ipv4Net::new_assert((0x0a00_0000 | number).into(), 32).into())
        .collect()
}

/// A publish of a port with an allow-list.
fn allowing(bench: &Bench, port: u16, backend: &str, allow: Vec<IpNet>) -> Installed {
    let mut entry = bench.entry(port, backend);
    entry.flags |= flag::ALLOW_LIST;
    Installed {
        allow,
        ..bench.installed(None, Protocol::Tcp, port, &entry)
    }
}

/// Whether a new client of a port gets to its backend and hears its answer, by IPv4 or IPv6 as the backend has it.
fn serves(bench: &Bench, port: u16, backend: &str) -> bool {
    let (client, host) = if at(backend).is_ipv4() {
        ("198.51.100.9:4000", "198.51.100.2:0")
    } else {
        ("[2001:db8:100::9]:4000", "[2001:db8:100::2]:0")
    };
    let mut host = at(host);
    host.set_port(port);
    let outcome = bench.send(&Frame::first(Protocol::Tcp, at(client), host), bench.uplink);
    if outcome.reasons.is_empty() {
        return false;
    }
    let arrived = outcome.forwarded();
    assert_eq!(arrived.destination, at(backend));
    bench.send(&arrived.reply(), bench.container).forwarded();
    true
}

#[test]
fn a_full_allow_list_fails_in_words_and_leaves_all_others_as_they_were() {
    for backend in BACKEND {
        bench(|bench| {
            bench.publish(Protocol::Tcp, 8080, backend);
            let much = allowing(bench, 7000, backend, networks(limits::ALLOW - 10));
            let maps = &mut bench.datapath.maps;
            maps.install(2, &much).unwrap();
            let everyone = ["198.51.100.0/24", "2001:db8:100::/64"].map(network);
            let too_much = [&everyone[..], &networks(20)[..]].concat();
            let too_much = allowing(bench, 9090, backend, too_much);
            let maps = &mut bench.datapath.maps;
            for _ in 0..3 {
                let error = maps.install(3, &too_much).unwrap_err().to_string();
                assert_eq!(
                    error,
                    "the kernel's table of networks of all allow-lists (ALLOW) is full: it holds 65536"
                );
            }
            assert!(serves(bench, 8080, backend), "to the same backend port");
            assert!(!serves(bench, 9090, backend), "it has failed");
            // The operator's own shorter retry.
            let shorter = allowing(bench, 9090, backend, everyone.to_vec());
            bench.datapath.maps.install(3, &shorter).unwrap();
            assert!(serves(bench, 9090, backend));
            bench.datapath.maps.uninstall(2).unwrap();
            bench.datapath.maps.install(3, &too_much).unwrap();
        });
    }
}

#[test]
fn full_frontends_fail_in_words_and_close_no_port() {
    bench(|bench| {
        let backend = BACKEND[1];
        let mut entry = bench.entry(1, backend);
        entry.flags &= !flag::SINGLE_PORT;
        let address = |number: u32| {
            let address = u128::from(number) | 0xfd00_0099 << 96;
            std::net::IpAddr::V6(std::net::Ipv6Addr::from_bits(address))
        };
        let wide = |numbers: std::ops::Range<u32>, ports| Installed {
            frontends: numbers.map(address).collect(),
            ports,
            backend_ports: ports,
            ..bench.installed(None, Protocol::Tcp, 1, &entry)
        };
        let (fills, over) = (wide(0..2, (1, u16::MAX)), wide(2..6, (1, 2)));
        let one = bench.installed(Some("2001:db8:100::2"), Protocol::Tcp, 8080, &entry);
        let maps = &mut bench.datapath.maps;
        maps.install(1, &fills).unwrap();
        let error = maps.install(2, &over).unwrap_err().to_string();
        let words = "the kernel's table of ports published on one address (FRONTENDS) is full: it holds 131072";
        assert_eq!(error, words);
        // There is room for two: nothing was left behind.
        let mut pair = one.clone();
        pair.frontends.push("2001:db8:100::3".parse().unwrap());
        pair.entry = bench.entry(8080, backend);
        pair.backend_ports = (80, 80);
        let maps = &mut bench.datapath.maps;
        maps.install(3, &pair).unwrap();
        assert!(serves(bench, 8080, backend));
        bench.datapath.maps.uninstall(3).unwrap();
        assert!(!serves(bench, 8080, backend));
    });
}

#[test]
fn a_publish_is_replaced_in_place() {
    for (old, new) in [
        (BACKEND[0], "172.31.0.3:81"),
        (BACKEND[1], "[fd00:31::3]:81"),
    ] {
        bench(|bench| {
            bench.publish(Protocol::Tcp, 8080, old);
            assert!(serves(bench, 8080, old));
            let entry = bench.entry(8080, new);
            let installed = bench.installed(None, Protocol::Tcp, 8080, &entry);
            bench.datapath.maps.install(1, &installed).unwrap();
            assert!(serves(bench, 8080, new));
            // One that fails leaves the one that is there.
            let much = allowing(bench, 8080, old, networks(limits::ALLOW + 1));
            bench.datapath.maps.install(1, &much).unwrap_err();
            assert!(serves(bench, 8080, new));
            bench.datapath.maps.uninstall(1).unwrap();
            assert!(!serves(bench, 8080, new));
        });
    }
}

#[test]
fn publishes_to_one_backend_port_end_one_by_one() {
    bench(|bench| {
        for (index, port) in [(1, 8080), (2, 9090), (3, 7070)] {
            let entry = bench.entry(port, BACKEND[0]);
            bench.publish_entry(index, None, Protocol::Tcp, port, &entry);
        }
        let maps = &mut bench.datapath.maps;
        maps.uninstall(1).unwrap();
        maps.uninstall(1).unwrap();
        maps.uninstall(2).unwrap();
        assert!(serves(bench, 7070, BACKEND[0]));
        assert!(!serves(bench, 8080, BACKEND[0]));
    });
}
