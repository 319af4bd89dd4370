//! What is dropped: sources that cannot be, or may not.

use forwarder_common::{
    flow::delivery,
    publish::{Interface, Location, flag},
};
use forwarder_tests::{
    frame::{ACK, Frame, Mac, Protocol},
    netns::Netns,
    options::{HEEDED, of, with_options},
};
use nix::net::if_::if_nametoindex;

use crate::bench::{Bench, LO, UPLINK, at, behind, bench, network};

#[test]
fn a_martian_source_is_dropped() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        for source in [
            "127.0.0.1:4000",
            "0.0.0.0:4000",
            "224.0.0.1:4000",
            "198.51.100.2:4000",
        ] {
            let frame = Frame::first(Protocol::Udp, at(source), at("198.51.100.2:53"));
            bench.send(&frame, bench.uplink).dropped("martian_source");
        }
        bench.publish(Protocol::Udp, 53, "[fd00:31::2]:53");
        for source in [
            "[::1]:4000",
            "[::]:4000",
            "[ff02::1]:4000",
            "[2001:db8:100::2]:4000",
        ] {
            let frame = Frame::first(Protocol::Udp, at(source), at("[2001:db8:100::2]:53"));
            bench.send(&frame, bench.uplink).dropped("martian_source");
        }
    });
}

#[test]
fn a_flow_of_this_host_cannot_be_joined_from_outside() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        let frame = Frame::first(
            Protocol::Udp,
            at("198.51.100.2:4000"),
            at("198.51.100.2:53"),
        );
        bench.send(&frame, LO).forwarded();
        bench.send(&frame, bench.uplink).dropped("martian_source");
        let frame = Frame::first(Protocol::Udp, at("127.0.0.1:4000"), at("127.0.0.1:53"));
        bench.send(&frame, LO).forwarded();
        bench.send(&frame, bench.uplink).passed(&frame.bytes(), "");
    });
}

#[test]
fn only_the_allow_list_is_served() {
    bench(|bench| {
        let mut entry = bench.entry(8080, "172.31.0.2:80");
        entry.flags |= flag::ALLOW_LIST;
        let mut installed = bench.installed(None, Protocol::Tcp, 8080, &entry);
        installed.allow = vec![network("198.51.100.0/28"), network("192.0.2.7")];
        bench.datapath.maps.install(1, &installed).unwrap();
        // Another publish's list does not count.
        let mut other = bench.installed(None, Protocol::Tcp, 9090, &entry);
        other.allow = vec![network("0.0.0.0/0")];
        bench.datapath.maps.install(2, &other).unwrap();
        let from = |source| Frame::first(Protocol::Tcp, at(source), at("198.51.100.2:8080"));
        bench
            .send(&from("198.51.100.15:4000"), bench.uplink)
            .forwarded();
        bench
            .send(&from("192.0.2.7:4000"), bench.uplink)
            .forwarded();
        bench
            .send(&from("198.51.100.16:4000"), bench.uplink)
            .dropped("not_allowed");
        bench
            .send(&from("192.0.2.8:4000"), bench.uplink)
            .dropped("not_allowed");
    });
}

/// Backends and clients of both families: a container's address, and one of another machine.
const FAMILIES: [(&str, &str, &str, &str); 2] = [
    (
        "172.31.0.2:80",
        "172.31.0.3:4000",
        "198.51.100.9:4000",
        "198.51.100.2:8080",
    ),
    (
        "[fd00:31::2]:80",
        "[fd00:31::3]:4000",
        "[2001:db8:100::9]:4000",
        "[2001:db8:100::2]:8080",
    ),
];
const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

/// Has the bench's container and a neighbour, whose device is returned, be on one network, and the uplink lead elsewhere.
fn containers(bench: &mut Bench) -> u32 {
    let netns = Netns::current().unwrap();
    netns
        .ip("link add veth1 type veth peer name veth1p\nlink set veth1 up\nlink add br0 type bridge")
        .unwrap();
    let [neighbour, bridge] = ["veth1", "br0"].map(|name| if_nametoindex(name).unwrap());
    let maps = &mut bench.datapath.maps;
    for device in [bench.container, neighbour, bridge] {
        let interface = Interface {
            delivery: delivery::PEER,
            network: bridge,
            ..UPLINK
        };
        maps.set_interface(device, Some(behind(device, interface)))
            .unwrap();
    }
    maps.set_interface(bench.uplink, Some(behind(bench.uplink, UPLINK)))
        .unwrap();
    for prefix in ["172.31.0.0/24", "fd00:31::/64"] {
        bench.locate(
            prefix,
            Location {
                network: bridge,
                device: 0,
            },
        );
    }
    neighbour
}

/// Runs `scenario` for both families and protocols, with the neighbour's device, backend, neighbour, other machine and
/// frontend.
fn everywhere(scenario: impl Fn(&Bench, Protocol, u32, [&str; 4]) + Sync) {
    for (backend, neighbour, machine, frontend) in FAMILIES {
        for protocol in PROTOCOLS {
            bench(|bench| {
                let device = containers(bench);
                bench.publish(protocol, 8080, backend);
                scenario(
                    bench,
                    protocol,
                    device,
                    [backend, neighbour, machine, frontend],
                );
            });
        }
    }
}

#[test]
fn a_container_cannot_begin_with_another_machines_address() {
    everywhere(
        |bench, protocol, device, [_, neighbour, machine, frontend]| {
            let forged = Frame::first(protocol, at(machine), at(frontend));
            bench.send(&forged, device).dropped("martian_source");
            let own = Frame::first(protocol, at(neighbour), at(frontend));
            bench.send(&own, device).forwarded();
        },
    );
}

#[test]
fn an_uplink_cannot_bring_a_containers_address() {
    everywhere(|bench, protocol, _, [_, neighbour, machine, frontend]| {
        let forged = Frame::first(protocol, at(neighbour), at(frontend));
        bench.send(&forged, bench.uplink).dropped("martian_source");
        let honest = Frame::first(protocol, at(machine), at(frontend));
        bench.send(&honest, bench.uplink).forwarded();
    });
}

#[test]
fn an_address_that_is_routed_elsewhere_is_no_containers() {
    bench(|bench| {
        containers(bench);
        bench.locate("172.31.0.64/26", Location::default());
        bench.publish(Protocol::Udp, 8080, "172.31.0.2:80");
        let frame = Frame::first(
            Protocol::Udp,
            at("172.31.0.65:4000"),
            at("198.51.100.2:8080"),
        );
        bench.send(&frame, bench.uplink).forwarded();
        bench.forget("172.31.0.64/26");
        let frame = Frame::first(
            Protocol::Udp,
            at("172.31.0.65:4001"),
            at("198.51.100.2:8080"),
        );
        bench.send(&frame, bench.uplink).dropped("martian_source");
    });
}

#[test]
fn a_reply_is_the_backends_own() {
    everywhere(|bench, protocol, device, [_, _, machine, frontend]| {
        let request = Frame::first(protocol, at(machine), at(frontend));
        let forwarded = bench.send(&request, bench.uplink).forwarded();
        for forger in [bench.uplink, device] {
            bench
                .send(&forwarded.reply(), forger)
                .dropped("martian_source");
        }
        let reply = bench.send(&forwarded.reply(), bench.container).forwarded();
        assert_eq!(
            (reply.source, reply.destination),
            (at(frontend), at(machine))
        );
    });
}

/// Its default route may lead by another network than the one that it was asked by.
#[test]
fn a_reply_by_another_device_of_the_backends_container_is_its_own() {
    for (backend, _, machine, frontend) in FAMILIES {
        for protocol in PROTOCOLS {
            bench(|bench| {
                let device = containers(bench);
                bench.publish(protocol, 8080, backend);
                let is_of = |bench: &mut Bench, device, network, container| {
                    let interface = Interface {
                        delivery: delivery::PEER,
                        network,
                        container,
                        ..UPLINK
                    };
                    let maps = &mut bench.datapath.maps;
                    let interface = Some(behind(device, interface));
                    maps.set_interface(device, interface).unwrap();
                };
                let (first, other) = (bench.container, 77);
                let bridge = if_nametoindex("br0").unwrap();
                is_of(bench, first, bridge, 1);
                is_of(bench, device, other, 2);
                let request = Frame::first(protocol, at(machine), at(frontend));
                let reply = bench.send(&request, bench.uplink).forwarded().reply();
                bench.send(&reply, device).dropped("martian_source");
                is_of(bench, device, other, 1);
                bench.send(&reply, device).forwarded();
            });
        }
    }
}

/// Until the backend's port of the bridge is known, its network is as much as can be asked.
#[test]
fn a_reply_of_a_backend_whose_port_is_not_known_comes_from_its_network() {
    bench(|bench| {
        let device = containers(bench);
        let mut entry = bench.entry(8080, "172.31.0.2:80");
        entry.hop.ifindex = if_nametoindex("br0").unwrap();
        entry.hop.delivery = delivery::NEIGHBOUR;
        bench.publish_entry(1, None, Protocol::Udp, 8080, &entry);
        let request = Frame::first(
            Protocol::Udp,
            at("198.51.100.9:4000"),
            at("198.51.100.2:8080"),
        );
        let forwarded = bench.send(&request, bench.uplink).forwarded();
        bench
            .send(&forwarded.reply(), bench.uplink)
            .dropped("martian_source");
        bench.send(&forwarded.reply(), device).forwarded();
    });
}

/// A container's link that has gone, while the daemon does not know the new one.
#[test]
fn a_reply_by_a_backends_new_link_is_left_until_that_is_known() {
    bench(|bench| {
        let device = containers(bench);
        bench.publish(Protocol::Udp, 8080, "172.31.0.2:80");
        let request = Frame::first(
            Protocol::Udp,
            at("198.51.100.9:4000"),
            at("198.51.100.2:8080"),
        );
        let reply = bench.send(&request, bench.uplink).forwarded().reply();
        bench
            .datapath
            .maps
            .set_interface(bench.container, None)
            .unwrap();
        bench
            .send(&reply, device)
            .passed(&reply.bytes(), "unresolved");
    });
}

#[test]
fn a_containers_conversation_is_continued_by_its_own_device() {
    everywhere(|bench, protocol, device, [_, neighbour, _, frontend]| {
        let request = Frame::first(protocol, at(neighbour), at(frontend));
        bench.send(&request, device).forwarded();
        let next = request.with_flags(ACK);
        for forger in [bench.uplink, bench.container] {
            bench.send(&next, forger).dropped("martian_source");
        }
        bench.send(&next, device).forwarded();
    });
}

#[test]
fn a_machines_conversation_is_not_continued_by_a_container() {
    everywhere(|bench, protocol, device, [_, _, machine, frontend]| {
        let request = Frame::first(protocol, at(machine), at(frontend));
        bench.send(&request, bench.uplink).forwarded();
        let next = request.with_flags(ACK);
        bench.send(&next, device).dropped("martian_source");
        bench.send(&next, bench.uplink).forwarded();
    });
}

#[test]
fn xdp_takes_no_reply_of_a_local_backend_from_an_uplink() {
    bench(|bench| {
        containers(bench);
        if !bench.publish_beside(Protocol::Udp, 9090, "198.51.100.10:80") {
            return; // this kernel runs XDP programs for no single device
        }
        let entry = bench.entry(8080, "172.31.0.2:80");
        bench.publish_entry(2, None, Protocol::Udp, 8080, &entry);
        let request = Frame::first(
            Protocol::Udp,
            at("198.51.100.9:4000"),
            at("198.51.100.2:8080"),
        );
        let reply = bench.send(&request, bench.uplink).forwarded().reply();
        let outcome = bench.send_early(&reply.bytes());
        assert_eq!(
            (outcome.action, &outcome.reasons[..]),
            (crate::bench::XDP_DROP, &["martian_source"][..])
        );
    });
}

/// A frame that a switch has flooded, or that was meant for another machine with the same address (VRRP), or broadcast.
#[test]
fn a_frame_to_another_mac_is_not_for_this_host() {
    const MACS: [Mac; 3] = [[2, 0, 0, 0, 0, 0x77], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]];
    bench(|bench| {
        for protocol in PROTOCOLS {
            for (backend, _, machine, frontend) in FAMILIES {
                bench.publish(protocol, 8080, backend);
                let honest = Frame::first(protocol, at(machine), at(frontend));
                for destination_mac in MACS {
                    let frame = Frame {
                        destination_mac,
                        ..honest.clone()
                    };
                    bench.send(&frame, bench.uplink).passed(&frame.bytes(), "");
                }
                bench.send(&honest, bench.uplink).forwarded();
                let flooded = Frame {
                    destination_mac: MACS[0],
                    ..honest
                };
                bench
                    .send(&flooded, bench.uplink)
                    .passed(&flooded.bytes(), "");
            }
        }
    });
}

/// A transparent proxy on this host has the kernel lead its connections to other machines over lo.
#[test]
fn what_this_host_sends_to_others_over_lo_is_not_ours() {
    bench(|bench| {
        for protocol in PROTOCOLS {
            for (backend, _, machine, frontend) in FAMILIES {
                bench.publish(protocol, 8080, backend);
                let mut to = at(machine);
                to.set_port(8080);
                let mut from = at(frontend);
                from.set_port(4000);
                let frame = Frame::first(protocol, from, to);
                bench.send(&frame, LO).passed(&frame.bytes(), "not_local");
                let frame = Frame::first(protocol, from, at(frontend));
                bench.send(&frame, LO).forwarded();
            }
        }
    });
}

#[test]
fn a_local_prefix_is_served_like_an_address() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 8080, "172.31.0.2:80");
        let frame = Frame::first(
            Protocol::Udp,
            at("198.51.100.9:4000"),
            at("203.0.113.5:8080"),
        );
        bench.send(&frame, bench.uplink).passed(&frame.bytes(), "");
        bench.locate("203.0.113.0/28", Location::HERE);
        bench.send(&frame, bench.uplink).forwarded();
        bench.forget("203.0.113.0/28");
        let frame = Frame::first(
            Protocol::Udp,
            at("198.51.100.9:4001"),
            at("203.0.113.5:8080"),
        );
        bench.send(&frame, bench.uplink).passed(&frame.bytes(), "");
    });
}

/// The neighbour's own address is known to be behind its device: nobody else on the bridge has it.
#[test]
fn a_container_does_not_speak_for_its_neighbour() {
    bench(|bench| {
        let neighbour = containers(bench);
        let bridge = if_nametoindex("br0").unwrap();
        for (backend, client, _, frontend) in FAMILIES {
            let address = at(client).ip().to_string();
            let behind = |device| Location {
                network: bridge,
                device,
            };
            for protocol in PROTOCOLS {
                bench.publish(protocol, 8080, backend);
                let frame = Frame::first(protocol, at(client), at(frontend));
                bench.locate(&address, behind(bench.container));
                bench.send(&frame, neighbour).dropped("martian_source");
                bench.locate(&address, behind(neighbour));
                bench.send(&frame, neighbour).forwarded();
            }
        }
    });
}

/// An IPv4 address in an IPv6 header (RFC 4291 section 2.5.5.2) is nobody's: it would pass for that machine on lists and in
/// flows of IPv4.
#[test]
fn an_ipv4_address_in_an_ipv6_header_is_not_ours() {
    bench(|bench| {
        let mut entry = bench.entry(8080, "[fd00:31::2]:80");
        entry.flags |= flag::ALLOW_LIST;
        let mut installed = bench.installed(None, Protocol::Udp, 8080, &entry);
        installed.allow = vec![network("198.51.100.0/24")];
        bench.datapath.maps.install(1, &installed).unwrap();
        let [mapped, frontend] = ["[::ffff:198.51.100.9]:4000", "[2001:db8:100::2]:8080"];
        let forged = Frame::first(Protocol::Udp, at(mapped), at(frontend));
        bench
            .send(&forged, bench.uplink)
            .passed(&forged.bytes(), "");

        for protocol in PROTOCOLS {
            let (backend, _, client, frontend) = FAMILIES[0];
            bench.publish(protocol, 8080, backend);
            let frame = Frame::first(protocol, at(client), at(frontend));
            bench.send(&frame, bench.uplink).forwarded();
            let [source, destination] = [client, frontend].map(|text| {
                let (address, port) = text.split_once(':').unwrap();
                at(&format!("[::ffff:{address}]:{port}"))
            });
            let joining = Frame {
                source,
                destination,
                ..frame
            };
            let outcome = bench.send(&joining, bench.uplink);
            outcome.passed(&joining.bytes(), "");
        }
    });
}

/// What the program does not read on is not kept from a source that cannot be: the proxy would take its word for it.
#[test]
fn a_source_behind_options_is_no_better_than_another() {
    everywhere(
        |bench, protocol, device, [_, neighbour, machine, frontend]| {
            let with_options = |source, frontend| {
                let frame = Frame::first(protocol, at(source), at(frontend));
                with_options(&frame, of(&frame, HEEDED))
            };
            let forged = with_options(machine, frontend);
            bench.send_bytes(&forged, device).dropped("martian_source");
            for (source, device) in [(machine, bench.uplink), (neighbour, device)] {
                let honest = with_options(source, frontend);
                bench.send_bytes(&honest, device).passed(&honest, "options");
            }
            // One header may follow another.
            if !at(machine).is_ipv4() {
                let mut forged = forged.clone();
                forged.splice(54..54, [60, 0, 1, 4, 0, 0, 0, 0]);
                forged[19] += 8;
                bench.send_bytes(&forged, device).dropped("martian_source");
            }
            let elsewhere = if at(frontend).is_ipv4() {
                "203.0.113.5:8080"
            } else {
                "[2001:db8:5::5]:8080"
            };
            let transit = with_options(machine, elsewhere);
            bench
                .send_bytes(&transit, device)
                .passed(&transit, "options");
        },
    );
}

/// A frame to everybody is the stack's, which gives a datagram to the proxy.
#[test]
fn a_source_in_a_frame_to_everybody_is_no_better_than_another() {
    everywhere(
        |bench, protocol, device, [_, neighbour, machine, frontend]| {
            let to_everybody = |source| Frame {
                destination_mac: [0xff; 6],
                ..Frame::first(protocol, at(source), at(frontend))
            };
            let forged = to_everybody(machine);
            bench.send(&forged, device).dropped("martian_source");
            for (source, device) in [(machine, bench.uplink), (neighbour, device)] {
                let honest = to_everybody(source);
                bench.send(&honest, device).passed(&honest.bytes(), "");
            }
            // Who has no address yet asks for one (RFC 2131).
            let mut asking = to_everybody(neighbour);
            asking.source.set_ip(if asking.source.is_ipv4() {
                "0.0.0.0".parse().unwrap()
            } else {
                "::".parse().unwrap()
            });
            bench.send(&asking, device).passed(&asking.bytes(), "");
        },
    );
}

/// The address that stands for all machines of a network is no single machine's.
#[test]
fn a_networks_broadcast_address_speaks_for_nobody() {
    bench(|bench| {
        let device = containers(bench);
        bench.publish(Protocol::Udp, 8080, "172.31.0.2:80");
        for address in ["198.51.100.255", "172.31.0.255"] {
            bench.locate(address, Location::EVERYBODY);
        }
        for (source, device) in [
            ("198.51.100.255:4000", bench.uplink),
            ("172.31.0.255:4000", device),
        ] {
            let frame = Frame::first(Protocol::Udp, at(source), at("198.51.100.2:8080"));
            bench.send(&frame, device).dropped("martian_source");
        }
        let to = Frame::first(
            Protocol::Udp,
            at("198.51.100.9:4000"),
            at("198.51.100.255:8080"),
        );
        bench.send(&to, bench.uplink).passed(&to.bytes(), "");
    });
}

/// An address that has been given to another container takes its conversations along.
#[test]
fn a_conversation_is_continued_by_the_container_that_has_the_address_now() {
    for (backend, client, _, frontend) in FAMILIES {
        for protocol in PROTOCOLS {
            bench(|bench| {
                let neighbour = containers(bench);
                let bridge = if_nametoindex("br0").unwrap();
                let address = at(client).ip().to_string();
                let behind = |device| Location {
                    network: bridge,
                    device,
                };
                bench.publish(protocol, 8080, backend);
                let frame = Frame::first(protocol, at(client), at(frontend));
                let way = |bench: &Bench| bench.flow().1.back().ifindex;
                bench.locate(&address, behind(neighbour));
                bench.send(&frame, neighbour).forwarded();
                bench.send(&frame, bridge).dropped("martian_source");
                assert_eq!(way(bench), neighbour);
                bench.locate(&address, behind(bench.container));
                bench.send(&frame, bench.container).forwarded();
                assert_eq!(way(bench), bench.container);
                bench.send(&frame, neighbour).dropped("martian_source");
            });
        }
    }
}
