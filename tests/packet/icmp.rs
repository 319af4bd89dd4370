//! ICMP errors about packets of a flow: they go to who sent the packet, and speak of the packet that it sent.

use forwarder_common::{
    flow::delivery,
    publish::{Interface, Location},
};
use forwarder_tests::{
    frame::{Frame, Mac, Protocol},
    icmp::{IcmpError, quote},
    netns::Netns,
};
use nix::net::if_::if_nametoindex;

use crate::bench::{
    BRIDGE_MAC, CONTAINER_MAC, HOST_MAC, LO, Outcome, REDIRECT, UPLINK, at, behind, bench,
};

/// Everything; and the least that an error quotes.
const LENGTHS: [usize; 2] = [1000, 8];

/// One family's client, frontend and backend, and routers on both sides.
struct Addresses {
    client: &'static str,
    frontend: &'static str,
    backend: &'static str,
    router_at_client: &'static str,
    router_at_backend: &'static str,
}

const V4: Addresses = Addresses {
    client: "198.51.100.9:4000",
    frontend: "198.51.100.2:8080",
    backend: "172.31.0.2:80",
    router_at_client: "192.0.2.7:0",
    router_at_backend: "10.9.9.9:0",
};
const V6: Addresses = Addresses {
    client: "[2001:db8:100::9]:4000",
    frontend: "[2001:db8:100::2]:8080",
    backend: "[fd00:31::2]:80",
    router_at_client: "[2001:db8:7::7]:0",
    router_at_backend: "[fd00:9::9]:0",
};

/// Each protocol in each family, a datagram without a checksum, and such with 0xffff.
fn conversations() -> Vec<(&'static Addresses, Frame)> {
    let mut all = Vec::new();
    for addresses in [&V4, &V6] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let (client, frontend) = (at(addresses.client), at(addresses.frontend));
            all.push((addresses, Frame::first(protocol, client, frontend)));
        }
    }
    let mut bare = all[1].1.clone();
    bare.no_checksum = true;
    all.push((&V4, bare));
    all.push((&V4, all[1].1.clone().with_checksum_ffff()));
    all.push((&V6, all[3].1.clone().with_checksum_ffff()));
    all
}

fn too_big(about: &Frame, from: &str, octets: usize) -> IcmpError {
    let v4 = about.source.is_ipv4();
    IcmpError {
        source: at(from).ip(),
        kind: if v4 { 3 } else { 2 },
        code: if v4 { 4 } else { 0 },
        rest: 1400,
        quoted: quote(about, octets),
        ..IcmpError::port_unreachable(about)
    }
}

#[track_caller]
fn translated(outcome: Outcome) -> IcmpError {
    assert_eq!(
        (outcome.action, &outcome.reasons[..]),
        (REDIRECT, &["forwarded_error"][..]),
        "{outcome:?}"
    );
    IcmpError::parse(&outcome.bytes).unwrap_or_else(|error| panic!("{error:#}: {outcome:?}"))
}

/// Without MACs, which are the kernel's business where it leaves by `bpf_redirect_neigh`.
fn bare(error: IcmpError) -> IcmpError {
    IcmpError {
        source_mac: Mac::default(),
        destination_mac: Mac::default(),
        ..error
    }
}

#[test]
fn the_client_is_told_about_what_it_sent() {
    for (addresses, sent) in conversations() {
        bench(|bench| {
            bench.publish(sent.protocol, 8080, addresses.backend);
            let forwarded = bench.send(&sent, bench.uplink).forwarded();
            for (from, octets) in [
                (addresses.backend, 1000),
                (addresses.backend, 8),
                (addresses.router_at_backend, 8),
            ] {
                let error = too_big(&forwarded, from, octets);
                let outcome = bench.send_bytes(&error.bytes(), bench.container);
                // As it sent it, but for the hop on the way.
                let sent = Frame {
                    ttl: 63,
                    ..sent.clone()
                };
                let expected = IcmpError {
                    source: at(addresses.frontend).ip(),
                    destination: at(addresses.client).ip(),
                    ttl: 63,
                    quoted: quote(&sent, octets),
                    ..error
                };
                assert_eq!(bare(translated(outcome)), bare(expected));
            }
        });
    }
}

#[test]
fn the_backend_is_told_about_what_it_answered() {
    for (addresses, sent) in conversations() {
        bench(|bench| {
            bench.publish(sent.protocol, 8080, addresses.backend);
            let answer = bench.send(&sent, bench.uplink).forwarded().reply();
            let reply = bench.send(&answer, bench.container).forwarded();
            for from in [addresses.client, addresses.router_at_client] {
                for octets in LENGTHS {
                    let mut error = too_big(&reply, from, octets);
                    error.destination_mac = HOST_MAC;
                    let outcome = bench.send_bytes(&error.bytes(), bench.uplink);
                    let answer = Frame {
                        ttl: 63,
                        ..answer.clone()
                    };
                    let expected = IcmpError {
                        source_mac: BRIDGE_MAC,
                        destination_mac: CONTAINER_MAC,
                        source: at(from).ip(),
                        destination: at(addresses.backend).ip(),
                        ttl: 63,
                        quoted: quote(&answer, octets),
                        ..error
                    };
                    assert_eq!(translated(outcome), expected);
                }
            }
        });
    }
}

#[test]
fn a_local_client_is_told_by_the_address_that_it_asked() {
    for (client, frontend, backend, protocol) in [
        (
            "127.0.0.1:4000",
            "127.0.0.1:8080",
            V4.backend,
            Protocol::Tcp,
        ),
        (
            "127.0.0.1:4000",
            "127.0.0.1:8080",
            V4.backend,
            Protocol::Udp,
        ),
        (
            "198.51.100.2:4000",
            "198.51.100.2:8080",
            V4.backend,
            Protocol::Udp,
        ),
        ("[::1]:4000", "[::1]:8080", V6.backend, Protocol::Tcp),
        ("[::1]:4000", "[::1]:8080", V6.backend, Protocol::Udp),
    ] {
        bench(|bench| {
            bench.publish(protocol, 8080, backend);
            let sent = Frame::first(protocol, at(client), at(frontend));
            let forwarded = bench.send(&sent, LO).forwarded();
            for octets in LENGTHS {
                let error = IcmpError {
                    quoted: quote(&forwarded, octets),
                    ..IcmpError::port_unreachable(&forwarded)
                };
                let outcome = bench.send_bytes(&error.bytes(), bench.container);
                let expected = IcmpError {
                    source: at(frontend).ip(),
                    destination: at(client).ip(),
                    quoted: quote(&sent, octets),
                    ..error
                };
                assert_eq!(bare(translated(outcome)), bare(expected));
            }
        });
    }
}

#[test]
fn a_backend_is_told_of_a_local_client_by_the_source_that_it_saw() {
    for (client, frontend, backend) in [
        ("127.0.0.1:4000", "127.0.0.1:8080", V4.backend),
        ("[::1]:4000", "[::1]:8080", V6.backend),
    ] {
        bench(|bench| {
            bench.publish(Protocol::Udp, 8080, backend);
            let sent = Frame::first(Protocol::Udp, at(client), at(frontend));
            let answer = bench.send(&sent, LO).forwarded().reply();
            let reply = bench.send(&answer, bench.container).forwarded();
            let error = IcmpError::port_unreachable(&reply);
            let outcome = bench.send_bytes(&error.bytes(), LO);
            let expected = IcmpError {
                source_mac: BRIDGE_MAC,
                destination_mac: CONTAINER_MAC,
                source: answer.destination.ip(),
                destination: at(backend).ip(),
                quoted: quote(&answer, 1000),
                ..error
            };
            assert_eq!(translated(outcome), expected);
            // Nobody outside speaks for a client on this host.
            bench
                .send_bytes(&error.bytes(), bench.uplink)
                .passed(&error.bytes(), "");
        });
    }
}

#[test]
fn an_error_says_what_it_said() {
    let kinds = [
        (&V4, [(3, 1), (3, 13), (4, 0), (11, 0), (12, 2)]),
        (&V6, [(1, 0), (1, 4), (2, 0), (3, 0), (4, 1)]),
    ];
    for (addresses, kinds) in kinds {
        bench(|bench| {
            bench.publish(Protocol::Udp, 8080, addresses.backend);
            let sent = Frame::first(Protocol::Udp, at(addresses.client), at(addresses.frontend));
            let forwarded = bench.send(&sent, bench.uplink).forwarded();
            for (kind, code) in kinds {
                let error = IcmpError {
                    kind,
                    code,
                    rest: 0x0102_0304,
                    ..IcmpError::port_unreachable(&forwarded)
                };
                let told = translated(bench.send_bytes(&error.bytes(), bench.container));
                assert_eq!((told.kind, told.code, told.rest), (kind, code, 0x0102_0304));
            }
        });
    }
}

#[test]
fn what_follows_the_error_in_the_frame_is_not_part_of_it() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, V4.backend);
        let sent = Frame::first(Protocol::Tcp, at(V4.client), at(V4.frontend));
        let forwarded = bench.send(&sent, bench.uplink).forwarded();
        let error = too_big(&forwarded, V4.backend, 8);
        let mut padded = error.bytes();
        padded.extend([0xee; 40]);
        let outcome = bench.send_bytes(&padded, bench.container);
        assert_eq!(outcome.bytes[padded.len() - 40..], [0xee; 40]);
        translated(outcome);
    });
}

#[test]
fn an_error_neither_refreshes_nor_ends_a_flow() {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, V4.backend);
        let sent = Frame::first(Protocol::Tcp, at(V4.client), at(V4.frontend));
        let forwarded = bench.send(&sent, bench.uplink).forwarded();
        let reply = bench.send(&forwarded.reply(), bench.container).forwarded();
        let before = bench.flow();
        for (about, ifindex) in [(&forwarded, bench.container), (&reply, bench.uplink)] {
            let mut error = IcmpError::port_unreachable(about);
            error.destination_mac = HOST_MAC;
            translated(bench.send_bytes(&error.bytes(), ifindex));
        }
        assert_eq!(bench.flow(), before);
    });
}

#[test]
fn other_peoples_errors_are_untouched() {
    for addresses in [&V4, &V6] {
        bench(|bench| {
            bench.publish(Protocol::Udp, 8080, addresses.backend);
            let (client, frontend) = (at(addresses.client), at(addresses.frontend));
            let sent = Frame::first(Protocol::Udp, client, frontend);
            let forwarded = bench.send(&sent, bench.uplink).forwarded();
            let error = IcmpError::port_unreachable(&forwarded);

            // Another client's, and one about a port that is published but was not asked.
            let mut other = forwarded.clone();
            other.source.set_port(4001);
            let other = IcmpError::port_unreachable(&other);
            let never = Frame::first(Protocol::Udp, frontend, at(addresses.client));
            let mut never = never;
            never.destination.set_port(4002);
            let never = IcmpError::port_unreachable(&never);
            // One that goes to somebody else than who sent what it quotes.
            let astray = IcmpError {
                destination: at(addresses.router_at_client).ip(),
                ..error.clone()
            };
            // An echo request, and a redirect, which is for the router that it is sent to.
            let v4 = client.is_ipv4();
            let echo = IcmpError {
                kind: if v4 { 8 } else { 128 },
                ..error.clone()
            };
            let redirect = IcmpError {
                kind: if v4 { 5 } else { 137 },
                ..error.clone()
            };
            // Too short to have ports.
            let short = IcmpError {
                quoted: quote(&forwarded, 4),
                ..error
            };
            for error in [other, never, astray, echo, redirect, short] {
                let bytes = error.bytes();
                for ifindex in [bench.container, bench.uplink] {
                    bench.send_bytes(&bytes, ifindex).passed(&bytes, "");
                }
            }
            assert_eq!(bench.flow().1.packets(), [1, 0], "none of them made a flow");
        });
    }
}

/// A router speaks by an address of its own. One that cannot be comes from somebody who wants to be taken for another.
#[test]
fn an_error_from_a_source_that_cannot_be_is_dropped() {
    for (addresses, sent) in conversations() {
        bench(|bench| {
            bench.publish(sent.protocol, 8080, addresses.backend);
            let forwarded = bench.send(&sent, bench.uplink).forwarded();
            let reply = bench.send(&forwarded.reply(), bench.container).forwarded();
            let impossible = if at(addresses.client).is_ipv4() {
                ["127.0.0.1:0", "0.0.0.0:0", "224.0.0.1:0", "198.51.100.2:0"]
            } else {
                ["[::1]:0", "[::]:0", "[ff02::1]:0", "[2001:db8:100::2]:0"]
            };
            for from in impossible {
                let error = too_big(&forwarded, from, 8);
                bench
                    .send_bytes(&error.bytes(), bench.container)
                    .dropped("martian_source");
                let mut error = too_big(&reply, from, 8);
                error.destination_mac = HOST_MAC;
                bench
                    .send_bytes(&error.bytes(), bench.uplink)
                    .dropped("martian_source");
            }
            // About other conversations it is none of ours.
            let mut other = sent.clone();
            other.source.set_port(4001);
            let mut error = too_big(&other.reply(), impossible[0], 8);
            error.destination_mac = HOST_MAC;
            let outcome = bench.send_bytes(&error.bytes(), bench.uplink);
            outcome.passed(&error.bytes(), "");
        });
    }
}

/// Who is not on a packet's way has not seen it. A neighbour on the bridge, or another machine, could frighten off a client or a
/// backend in a router's name.
#[test]
fn an_error_comes_from_where_the_packet_went() {
    for (addresses, sent) in conversations() {
        bench(|bench| {
            let netns = Netns::current().unwrap();
            netns
                .ip("link add veth1 type veth peer name veth1p")
                .unwrap();
            let neighbour = if_nametoindex("veth1").unwrap();
            let device = bench.container;
            for ifindex in [device, neighbour] {
                let container = Interface {
                    delivery: delivery::PEER,
                    network: ifindex,
                    ..UPLINK
                };
                let maps = &mut bench.datapath.maps;
                maps.set_interface(ifindex, Some(behind(ifindex, container)))
                    .unwrap();
            }
            let [about_client, about_backend] =
                [addresses.router_at_client, addresses.router_at_backend];
            for (router, network) in [(about_backend, device), (about_client, 0)] {
                let there = Location { network, device: 0 };
                bench.locate(&at(router).ip().to_string(), there);
            }
            bench.publish(sent.protocol, 8080, addresses.backend);
            let forwarded = bench.send(&sent, bench.uplink).forwarded();
            let reply = bench.send(&forwarded.reply(), device).forwarded();
            let mut to_client = too_big(&forwarded, about_client, 8);
            to_client.destination_mac = HOST_MAC;
            let mut to_backend = too_big(&reply, about_client, 8);
            to_backend.destination_mac = HOST_MAC;
            // By the uplink, about what went to the backend, and by a container, about what went to the client.
            bench
                .send_bytes(&to_client.bytes(), bench.uplink)
                .dropped("martian_source");
            translated(bench.send_bytes(&to_backend.bytes(), bench.uplink));
            let there = Location {
                network: neighbour,
                device: 0,
            };
            bench.locate(&at(about_client).ip().to_string(), there);
            for error in [&to_client, &to_backend] {
                bench
                    .send_bytes(&error.bytes(), neighbour)
                    .dropped("martian_source");
            }
            let own = too_big(&forwarded, about_backend, 8);
            translated(bench.send_bytes(&own.bytes(), device));
        });
    }
}

/// What was cut up already may still be too long for a link further on, and its sender is told by a quotation of the first
/// part.
#[test]
fn an_error_about_a_fragment_is_translated_like_another() {
    for (addresses, sent) in conversations() {
        bench(|bench| {
            bench.publish(sent.protocol, 8080, addresses.backend);
            let answer = bench.send(&sent, bench.uplink).forwarded().reply();
            let reply = bench.send(&answer, bench.container).forwarded();
            for octets in LENGTHS {
                let mut error = too_big(&reply, addresses.router_at_client, octets);
                error.destination_mac = HOST_MAC;
                as_first_part(&mut error.quoted);
                let outcome = bench.send_bytes(&error.bytes(), bench.uplink);
                let answer = Frame {
                    ttl: 63,
                    ..answer.clone()
                };
                let mut quoted = quote(&answer, octets);
                as_first_part(&mut quoted);
                let translated = translated(outcome);
                assert_eq!(translated.quoted, quoted);
                assert_eq!(translated.destination, at(addresses.backend).ip());

                let mut later = error.clone();
                as_later_part(&mut later.quoted);
                let bytes = later.bytes();
                bench.send_bytes(&bytes, bench.uplink).passed(&bytes, "");
            }
        });
    }
}

/// Has the quoted packet say that it is the first of several (RFC 791 section 3.1, RFC 8200 section 4.5).
fn as_first_part(quoted: &mut Vec<u8>) {
    if quoted[0] >> 4 == 4 {
        quoted[6] |= 0x20;
        let sum = u16::from_be_bytes([quoted[10], quoted[11]]);
        let (sum, borrowed) = sum.overflowing_sub(0x2000);
        let sum = sum - u16::from(borrowed);
        quoted[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        let header = [quoted[6], 0, 0, 1, 0x12, 0x34, 0x56, 0x78];
        quoted.splice(40..40, header);
        quoted[6] = 44;
    }
}

/// The same of one that has no ports.
fn as_later_part(quoted: &mut [u8]) {
    let offset = if quoted[0] >> 4 == 4 { 7 } else { 43 };
    quoted[offset] |= 8;
}
