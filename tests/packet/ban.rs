//! Bans: to published ports nothing of a banned source gets in, on either hook, until the ban ends.

use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};

use forwarder::{clock::boot, datapath::xdp::Mode};
use forwarder_common::{limits, publish::ban};
use forwarder_tests::frame::{ACK, Frame, Protocol};
use ipnet::IpNet;

use crate::bench::{Bench, XDP_DROP, at, bench, network};

const PORT: u16 = 8080;
/// Client, host, backend; networks of the client, the inner one first; another family's everything.
const WORLDS: [[&str; 6]; 2] = [
    [
        "198.51.100.9:4000",
        "198.51.100.2:8080",
        "172.31.0.2:80",
        "198.51.100.0/28",
        "198.51.0.0/16",
        "::/0",
    ],
    [
        "[2001:db8:100::9]:4000",
        "[2001:db8:100::2]:8080",
        "[fd00:31::2]:80",
        "2001:db8:100::/64",
        "2001:db8::/32",
        "0.0.0.0/0",
    ],
];

fn banned(bench: &Bench, frame: &Frame) {
    bench.send(frame, bench.uplink).dropped("banned");
    // Programs are run for a device from 5.15 on.
    if bench.datapath.try_early(&[0; 60], bench.uplink).is_ok() {
        let early = bench.send_early(&frame.bytes());
        assert_eq!(
            (early.action, &early.reasons[..]),
            (XDP_DROP, &["banned"][..])
        );
    }
}

fn let_in(bench: &Bench, frame: &Frame) {
    bench.send(frame, bench.uplink).forwarded();
}

fn end_flows(bench: &mut Bench) {
    let flows = &mut bench.datapath.maps.flows;
    let ended = flows.change_all(|key, _, tables| tables.end(key, |_| true).map(drop));
    ended.unwrap();
}

/// For each world and protocol: a publish, XDP on the uplink, and a client's first packet.
fn each(scenario: impl Fn(&mut Bench, Frame, [&str; 6]) + Send + Sync + Copy) {
    for world in WORLDS {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            bench(|bench| {
                bench.publish(protocol, PORT, world[2]);
                bench
                    .datapath
                    .attach_xdp(bench.uplink, Mode::Native)
                    .unwrap();
                let first = Frame::first(protocol, at(world[0]), at(world[1]));
                scenario(bench, first, world);
            });
        }
    }
}

#[test]
fn a_banned_address_gets_to_no_published_port_until_it_is_unbanned() {
    each(|bench, first, [client, ..]| {
        let source = IpNet::from(at(client).ip());
        bench.datapath.maps.ban(source, None).unwrap();
        banned(bench, &first);
        let mut other = first.clone();
        other.destination.set_port(9090);
        bench.send(&other, bench.uplink).passed(&other.bytes(), "");
        let mut neighbour = first.clone();
        neighbour.source.set_ip(match at(client).ip() {
            IpAddr::V4(_) => "198.51.100.10".parse().unwrap(),
            IpAddr::V6(_) => "2001:db8:100::10".parse().unwrap(),
        });
        let_in(bench, &neighbour);
        let usage = bench.datapath.maps.usage(1).unwrap();
        assert_eq!(usage.refused.keys().collect::<Vec<_>>(), [&"banned"]);
        bench.datapath.maps.unban(source).unwrap();
        let_in(bench, &first);
    });
}

#[test]
fn a_flow_that_exists_goes_on_until_it_is_ended() {
    each(|bench, first, [client, ..]| {
        let arrived = bench.send(&first, bench.uplink).forwarded();
        let source = IpNet::from(at(client).ip());
        bench.datapath.maps.ban(source, None).unwrap();
        bench.send(&arrived.reply(), bench.container).forwarded();
        let next = first.clone().with_flags(ACK);
        bench.send(&next, bench.uplink).forwarded();
        let (key, _) = bench.flow();
        bench.datapath.maps.flows.end(&key, |_| true).unwrap();
        bench.send(&next, bench.uplink).dropped("banned");
    });
}

#[test]
fn a_ban_ends_by_itself() {
    each(|bench, first, [client, _, _, inner, ..]| {
        for network in [IpNet::from(at(client).ip()), network(inner)] {
            let maps = &mut bench.datapath.maps;
            maps.ban(network, Some(boot() + 3_600_000_000_000)).unwrap();
            banned(bench, &first);
            // Its new end is over.
            let maps = &mut bench.datapath.maps;
            maps.ban(network, Some(boot())).unwrap();
            let_in(bench, &first);
            let (key, _) = bench.flow();
            let maps = &mut bench.datapath.maps;
            maps.flows.end(&key, |_| true).unwrap();
            maps.unban(network).unwrap();
        }
    });
}

#[test]
fn a_network_that_is_part_of_another_is_banned_for_as_long_as_either() {
    each(|bench, first, [_, _, _, inner, outer, _]| {
        let [inner, outer] = [inner, outer].map(network);
        let over = Some(boot());
        for [one, other] in [[inner, outer], [outer, inner]] {
            let maps = &mut bench.datapath.maps;
            let bans = [(one, over), (other, None)];
            maps.ban_all(&bans.map(|(network, until)| ((ban::EVERYWHERE, network), until)))
                .unwrap();
            banned(bench, &first);
            let maps = &mut bench.datapath.maps;
            maps.unban(one).unwrap();
            banned(bench, &first);
            let maps = &mut bench.datapath.maps;
            maps.ban(one, over).unwrap();
            maps.unban(other).unwrap();
            let_in(bench, &first);
            let (key, _) = bench.flow();
            let maps = &mut bench.datapath.maps;
            maps.flows.end(&key, |_| true).unwrap();
            maps.unban(one).unwrap();
        }
    });
}

#[test]
fn all_of_one_family_is_nothing_of_the_other() {
    each(|bench, first, [.., outer, other]| {
        let maps = &mut bench.datapath.maps;
        maps.ban(network(other), None).unwrap();
        let_in(bench, &first);
        let (key, _) = bench.flow();
        let maps = &mut bench.datapath.maps;
        maps.flows.end(&key, |_| true).unwrap();
        maps.ban(network(outer), None).unwrap();
        banned(bench, &first);
        bench.datapath.maps.unban(network(other)).unwrap();
        banned(bench, &first);
        bench.datapath.maps.unban(network(outer)).unwrap();
        let_in(bench, &first);
    });
}

#[test]
fn a_ban_from_one_publish_is_none_from_the_others_and_goes_with_it() {
    each(|bench, first, [client, _, backend, inner, ..]| {
        let Frame { protocol, .. } = first;
        let entry = bench.entry(9090, backend);
        bench.publish_entry(2, None, protocol, 9090, &entry);
        let mut other = first.clone();
        other.destination.set_port(9090);
        for source in [IpNet::from(at(client).ip()), network(inner)] {
            let maps = &mut bench.datapath.maps;
            maps.ban_all(&[((2, source), None)]).unwrap();
            assert!(maps.has_bans_of(2) && !maps.has_bans_of(1));
            banned(bench, &other);
            let_in(bench, &first);
            let maps = &mut bench.datapath.maps;
            maps.unban_all(&[(2, source)]).unwrap();
            assert!(!maps.has_bans_of(2));
            let_in(bench, &other);
            // From all of them as well, and taken back there.
            end_flows(bench);
            let maps = &mut bench.datapath.maps;
            let both = [1, ban::EVERYWHERE].map(|index| ((index, source), None));
            maps.ban_all(&both).unwrap();
            banned(bench, &first);
            banned(bench, &other);
            let maps = &mut bench.datapath.maps;
            maps.unban(source).unwrap();
            banned(bench, &first);
            let_in(bench, &other);
            let maps = &mut bench.datapath.maps;
            maps.unban_all(&[(1, source)]).unwrap();
            end_flows(bench);
        }
        // Its place is another's then.
        let source = IpNet::from(at(client).ip());
        let maps = &mut bench.datapath.maps;
        maps.ban_all(&[((2, source), None), ((2, network(inner)), None)])
            .unwrap();
        maps.uninstall(2).unwrap();
        let entry = bench.entry(9090, backend);
        bench.publish_entry(2, None, protocol, 9090, &entry);
        let_in(bench, &other);
    });
}

#[test]
fn a_segment_without_a_flow_is_dropped_but_for_what_a_socket_of_this_host_has() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, PORT, "[fd00:31::2]:80"); // IPv4 is the proxy's
        let netns = forwarder_tests::netns::Netns::current().unwrap();
        netns
            .ip("addr add 198.51.100.2/24 dev eth0\naddr add 198.51.100.9/32 dev lo")
            .unwrap();
        let listener = TcpListener::bind("198.51.100.2:8080").unwrap();
        let client = TcpStream::connect("198.51.100.2:8080").unwrap();
        let _served = listener.accept().unwrap();
        let mut frame = Frame::first(Protocol::Tcp, at("198.51.100.2:1"), at("198.51.100.2:8080"))
            .with_flags(ACK);
        frame.source = client.local_addr().unwrap();
        let maps = &mut bench.datapath.maps;
        maps.ban(network("198.51.100.0/24"), None).unwrap();
        bench
            .send(&frame, crate::bench::LO)
            .passed(&frame.bytes(), "not_syn");
        frame
            .source
            .set_port(client.local_addr().unwrap().port() ^ 1);
        bench.send(&frame, crate::bench::LO).dropped("banned");
    });
}

#[test]
fn a_million_addresses_are_banned_and_one_more_is_refused_in_words() {
    bench(|bench| {
        bench.publish(Protocol::Udp, PORT, "172.31.0.2:80");
        let address = |number: u32| IpNet::from(IpAddr::V4(Ipv4Addr::from_bits(number)));
        let first = 0x0a00_0000;
        let bans: Vec<_> = (0..limits::BANNED)
            .map(|number| ((ban::EVERYWHERE, address(first + number)), None))
            .collect();
        let maps = &mut bench.datapath.maps;
        maps.ban_all(&bans).unwrap();
        maps.ban_all(&bans[..10]).unwrap();
        let error = maps.ban(address(1), None).unwrap_err().to_string();
        assert_eq!(
            error,
            "the kernel's table of banned addresses (BANNED) is full: it holds 1000000"
        );
        let last = Ipv4Addr::from_bits(first + limits::BANNED - 1);
        let from = |ip: Ipv4Addr| {
            let client = std::net::SocketAddr::from((ip, 4000));
            Frame::first(Protocol::Udp, client, at("198.51.100.2:8080"))
        };
        bench.send(&from(last), bench.uplink).dropped("banned");
        let_in(bench, &from(Ipv4Addr::from_bits(u32::from(last) + 1)));
    });
}
