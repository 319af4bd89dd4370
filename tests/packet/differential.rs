//! The kernel's own NAT as the oracle: the same frames go through nftables' DNAT in one host and through the attached
//! program in another with the same addresses and MACs, and what comes out at both ends is compared octet by octet.
//!
//! Known and intended differences are those of [`without_differences`], and what is not generated: IPv4 options and IPv6
//! extension headers (left to the stack if they say something), SNAT (other source ports), TCP out of order (conntrack
//! judges sequence numbers, the program does not), redirects (nf_nat drops them, the program leaves them to the host), fragments
//! (conntrack reassembles and cuts anew), and packets that are too long and may be cut up (so does the router; the
//! program leaves a client's to the proxy and answers a backend's).

use std::net::SocketAddr;

use forwarder::datapath::{Datapath, Options, devices::Hook, maps::Installed};
use forwarder_common::{
    flow::{Hop, Timeouts, delivery},
    limits,
    publish::{Interface, Location, Publish, flag},
};
use forwarder_tests::{
    cpu::pin_this_thread,
    fragment::fix_header_checksum,
    frame::{ACK, FIN_ACK, Flags, Frame, Mac, Protocol, SYN, SYN_ACK},
    icmp::{IcmpError, quote},
    netns::Netns,
    wire::{Wire, is_traffic},
};
use nix::net::if_::if_nametoindex;
use proptest::{
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use crate::bench::{UPLINK, at, behind};

const CLIENT_MAC: Mac = [2, 0, 0, 0, 0, 1];
const UPLINK_MAC: Mac = [2, 0, 0, 0, 0, 2];
const VETH_MAC: Mac = [2, 0, 0, 0, 0, 0xb];
const CONTAINER_MAC: Mac = [2, 0, 0, 0, 0, 0xc];
/// Client, frontend, backend, and routers on the client's and the backend's side.
const V4: [&str; 5] = [
    "198.51.100.9:0",
    "198.51.100.2:8080",
    "172.31.0.2:80",
    "192.0.2.7:0",
    "10.9.9.9:0",
];
const V6: [&str; 5] = [
    "[2001:db8:100::9]:0",
    "[2001:db8:100::2]:8080",
    "[fd00:31::2]:80",
    "[2001:db8:7::7]:0",
    "[fd00:9::9]:0",
];
/// A conversation whose packets tell that all before them have had their turn.
const MARKER: u16 = 9;
/// Of the uplink, which is narrower than the container's link.
const MTU: u32 = 1300;

/// A host between a client and a container, which are nothing but ends of wires.
struct Arena {
    client: Wire,
    container: Wire,
    _netns: [Netns; 3],
    _datapath: Option<Datapath>,
}

impl Arena {
    fn wired() -> (Netns, [Netns; 2]) {
        let host = Netns::new("host").unwrap();
        let ends = ["client", "container"].map(|label| Netns::new(label).unwrap());
        let mac = |mac: Mac| mac.map(|octet| format!("{octet:02x}")).join(":");
        let [client, uplink, veth, container] =
            [CLIENT_MAC, UPLINK_MAC, VETH_MAC, CONTAINER_MAC].map(mac);
        for end in &ends {
            end.enter(|| {
                std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap()
            });
        }
        host.ip(&format!(
            "link set lo up\n\
             link add eth0 address {uplink} type veth peer name eth0 address {client} netns {}\n\
             link add veth0 address {veth} type veth peer name eth0 address {container} netns {}\n\
             addr add 198.51.100.2/24 dev eth0\naddr add 2001:db8:100::2/64 dev eth0 nodad\n\
             addr add 172.31.0.1/24 dev veth0\naddr add fd00:31::1/64 dev veth0 nodad\n\
             link set eth0 mtu {MTU} up\nlink set veth0 up\n\
             neigh add 198.51.100.9 lladdr {client} dev eth0\nneigh add 2001:db8:100::9 lladdr {client} dev eth0\n\
             neigh add 172.31.0.2 lladdr {container} dev veth0\nneigh add fd00:31::2 lladdr {container} dev veth0\n",
            ends[0].path(),
            ends[1].path()
        ))
        .unwrap();
        ends.iter()
            .for_each(|end| end.ip("link set eth0 up").unwrap());
        (host, ends)
    }

    fn open(host: Netns, [client, container]: [Netns; 2], datapath: Option<Datapath>) -> Self {
        Self {
            client: Wire::open(&client, "eth0").unwrap(),
            container: Wire::open(&container, "eth0").unwrap(),
            _netns: [host, client, container],
            _datapath: datapath,
        }
    }

    /// The oracle.
    fn nftables() -> Self {
        let (host, ends) = Self::wired();
        host.feed(
            "nft -f -",
            "table inet nat {\nchain prerouting {\ntype nat hook prerouting priority -100\n\
             ip daddr 198.51.100.2 meta l4proto { tcp, udp } th dport 8080 dnat ip to 172.31.0.2:80\n\
             ip6 daddr 2001:db8:100::2 meta l4proto { tcp, udp } th dport 8080 dnat ip6 to [fd00:31::2]:80\n\
             }\n}\n",
        )
        .unwrap();
        host.forwards(true).unwrap();
        host.enter(|| {
            for (setting, value) in [
                // It must not send fewer errors than it would once a second.
                ("ipv4/icmp_ratelimit", "0"),
                ("ipv6/icmp/ratelimit", "0"),
                // Segments here have no sequence that makes sense.
                ("netfilter/nf_conntrack_tcp_be_liberal", "1"),
            ] {
                std::fs::write(format!("/proc/sys/net/{setting}"), value)
                    .unwrap_or_else(|error| panic!("{setting}: {error}"));
            }
        });
        Self::open(host, ends, None)
    }

    fn forwarder() -> Self {
        let (host, ends) = Self::wired();
        let datapath = host.enter(|| {
            let options = Options {
                instance: "bench".into(),
                pins: None,
                snat: (61_000, 4_000),
                flows: limits::FLOWS,
                timeouts: Timeouts::default(),
                respects_firewall: false,
            };
            let mut datapath = Datapath::load(&options).unwrap();
            let [uplink, veth] = ["eth0", "veth0"].map(|name| if_nametoindex(name).unwrap());
            let here = [V4[1], V6[1], "172.31.0.1:0", "[fd00:31::1]:0"];
            let here = here.map(|address| (at(address).ip().into(), Location::HERE));
            let maps = &mut datapath.maps;
            maps.set_locations(&here.into()).unwrap();
            for (index, addresses) in [(1, V4), (2, V6)] {
                let backend = at(addresses[2]);
                let source = if index == 1 {
                    at("172.31.0.1:0")
                } else {
                    at("[fd00:31::1]:0")
                };
                let hop = Hop {
                    ifindex: veth,
                    mac: CONTAINER_MAC,
                    source_mac: VETH_MAC,
                    delivery: delivery::PEER,
                };
                let publish = Publish {
                    backend: backend.ip().into(),
                    source: source.ip().into(),
                    hop,
                    first_port: 8080,
                    backend_port: 80,
                    flags: flag::SINGLE_PORT,
                    previous: 0,
                };
                for (index, protocol) in [(index, 6), (index + 2, 17)] {
                    let installed = Installed {
                        entry: publish,
                        frontends: vec![at(addresses[1]).ip()],
                        protocol,
                        ports: (8080, 8080),
                        backend: backend.ip(),
                        backend_ports: (80, 80),
                        allow: vec![],
                    };
                    datapath.maps.install(index, &installed).unwrap();
                }
            }
            for (index, name, delivery) in [
                (uplink, "eth0", delivery::NEIGHBOUR),
                (veth, "veth0", delivery::PEER),
            ] {
                let mtu = if name == "eth0" { MTU } else { 1500 };
                let interface = Interface {
                    delivery,
                    mtu,
                    ..UPLINK
                };
                datapath
                    .maps
                    .set_interface(index, Some(behind(index, interface)))
                    .unwrap();
                datapath.attach((index, Hook::Ingress), name).unwrap();
            }
            datapath
        });
        Self::open(host, ends, Some(datapath))
    }

    /// Sends a frame from one end; what then comes out at the client's and at the container's.
    fn outcome(&self, from_client: bool, frame: &[u8]) -> [Vec<Vec<u8>>; 2] {
        let wire = if from_client {
            &self.client
        } else {
            &self.container
        };
        wire.send(frame).unwrap();
        let there = frame_of(true, Protocol::Udp, true, MARKER);
        self.client.send(&there.bytes()).unwrap();
        let container = until_marker(&self.container);
        let back = frame_of(true, Protocol::Udp, false, MARKER);
        self.container.send(&back.bytes()).unwrap();
        [until_marker(&self.client), container]
    }
}

fn until_marker(wire: &Wire) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    loop {
        let frame = wire.receive().unwrap();
        if let Ok(parsed) = Frame::parse(&frame)
            && [parsed.source.port(), parsed.destination.port()].contains(&MARKER)
        {
            return frames;
        }
        if is_traffic(&frame) {
            frames.push(frame);
        }
    }
}

/// A packet as the client or the container sends it.
fn frame_of(v4: bool, protocol: Protocol, from_client: bool, port: u16) -> Frame {
    let addresses = if v4 { V4 } else { V6 };
    let client = SocketAddr::new(at(addresses[0]).ip(), port);
    let mut frame = Frame::first(protocol, client, at(addresses[1]));
    if !from_client {
        frame = frame.reply();
        frame.source = at(addresses[2]);
    }
    (frame.source_mac, frame.destination_mac) = if from_client {
        (CLIENT_MAC, UPLINK_MAC)
    } else {
        (CONTAINER_MAC, VETH_MAC)
    };
    frame
}

/// What a packet is like apart from where it goes.
#[derive(Clone, Debug)]
struct Shape {
    payload: usize,
    ttl: u8,
    class: u8,
    id: u16,
    dont_fragment: bool,
    no_checksum: bool,
}

#[derive(Clone, Debug)]
enum Step {
    Packet(bool, Shape),
    Error(Report),
}

/// An ICMP error about the last packet's like: from the container's side or the client's, by a router or by the end
/// itself.
#[derive(Clone, Debug)]
struct Report {
    from_client: bool,
    router: bool,
    kind: (u8, u8),
    rest: u32,
    octets: usize,
    ttl: u8,
    about: Shape,
}

#[derive(Clone, Debug)]
struct Conversation {
    v4: bool,
    tcp: bool,
    steps: Vec<Step>,
}

fn shapes() -> impl Strategy<Value = Shape> {
    let ttl = prop_oneof![4 => Just(64), 1 => 0_u8..4, 2 => any::<u8>()];
    let payload = prop_oneof![0..64_usize, 0..1400_usize];
    (
        payload,
        ttl,
        any::<u8>(),
        any::<u16>(),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(
            |(payload, ttl, class, id, dont_fragment, no_checksum)| Shape {
                payload,
                ttl,
                class,
                id,
                dont_fragment,
                no_checksum,
            },
        )
}

fn steps() -> impl Strategy<Value = Step> {
    let octets = prop_oneof![Just(8_usize), 8..24_usize, 8..1000_usize];
    let kind = (any::<prop::sample::Index>(), 0_u8..16);
    let ttl = prop_oneof![4 => Just(64_u8), 1 => any::<u8>()];
    let error = (any::<(bool, bool, u32)>(), kind, octets, ttl, shapes()).prop_map(
        |((from_client, router, rest), (kind, code), octets, ttl, about)| {
            let kind = (kind.index(4) as u8, code);
            Step::Error(Report {
                from_client,
                router,
                kind,
                rest,
                octets,
                ttl,
                about,
            })
        },
    );
    prop_oneof![
        (any::<bool>(), shapes()).prop_map(|(from_client, shape)| Step::Packet(from_client, shape)),
        error
    ]
}

fn conversations() -> impl Strategy<Value = Conversation> {
    let steps = proptest::collection::vec(steps(), 1..6);
    (any::<bool>(), any::<bool>(), steps).prop_map(|(v4, tcp, steps)| Conversation {
        v4,
        tcp,
        steps,
    })
}

impl Shape {
    fn plain() -> Self {
        Self {
            payload: 0,
            ttl: 64,
            class: 0,
            id: 7,
            dont_fragment: true,
            no_checksum: false,
        }
    }

    fn apply(&self, frame: &mut Frame) {
        frame.payload = (0..self.payload).map(|at| (at ^ at >> 8) as u8).collect();
        frame.ttl = self.ttl;
        frame.no_checksum =
            self.no_checksum && frame.protocol == Protocol::Udp && frame.source.is_ipv4();
    }

    /// The frame with the fields that `Frame` does not know of.
    fn bytes(&self, frame: &Frame) -> Vec<u8> {
        let mut bytes = frame.bytes();
        if frame.source.is_ipv4() {
            bytes[15] = self.class;
            bytes[18..20].copy_from_slice(&self.id.to_be_bytes());
            bytes[20] = if self.dont_fragment { 0x40 } else { 0 };
            fix_header_checksum(&mut bytes[14..34]);
        } else {
            bytes[14] = 0x60 | self.class >> 4;
            bytes[15] = self.class << 4;
            bytes[16..18].copy_from_slice(&self.id.to_be_bytes());
        }
        bytes
    }
}

impl Report {
    /// The error's frame.
    fn bytes(&self, v4: bool, protocol: Protocol, port: u16) -> Vec<u8> {
        let addresses = if v4 { V4 } else { V6 };
        // What this end was sent: by the container from its frontend, by the client to its backend.
        let mut quoted = frame_of(v4, protocol, !self.from_client, port);
        if self.from_client {
            quoted.source = at(addresses[1]);
        } else {
            quoted.destination = at(addresses[2]);
        }
        if protocol == Protocol::Tcp {
            quoted = quoted.with_flags(ACK);
        }
        self.about.apply(&mut quoted);
        let quoted_bytes = self.about.bytes(&quoted);
        let length = quote(&quoted, self.octets).len();
        let mut error = IcmpError::port_unreachable(&quoted);
        (error.source_mac, error.destination_mac) = if self.from_client {
            (CLIENT_MAC, UPLINK_MAC)
        } else {
            (CONTAINER_MAC, VETH_MAC)
        };
        if self.router {
            error.source = at(addresses[if self.from_client { 3 } else { 4 }]).ip();
        }
        error.kind = if v4 { [3, 4, 11, 12] } else { [1, 2, 3, 4] }[usize::from(self.kind.0)];
        error.code = self.kind.1;
        (error.rest, error.ttl) = (self.rest, self.ttl);
        error.quoted = quoted_bytes[14..14 + length].to_vec();
        error.bytes()
    }
}

/// The frames of a conversation and the end that each is sent from.
fn frames(conversation: &Conversation, port: u16) -> Vec<(bool, Vec<u8>)> {
    let Conversation { v4, tcp, steps } = conversation;
    let protocol = if *tcp { Protocol::Tcp } else { Protocol::Udp };
    let packet = |from_client, flags: Flags, shape: &Shape| {
        let mut frame = frame_of(*v4, protocol, from_client, port);
        if *tcp {
            frame = frame.with_flags(flags);
        }
        let mut shape = shape.clone();
        if from_client {
            shape.payload = shape.payload.min(1200);
        }
        shape.dont_fragment |= shape.payload > 1200;
        shape.apply(&mut frame);
        (from_client, shape.bytes(&frame))
    };
    let plain = Shape::plain();
    let mut all = vec![
        packet(true, SYN, &plain),
        packet(false, SYN_ACK, &plain),
        packet(true, ACK, &plain),
    ];
    for step in steps {
        all.push(match step {
            Step::Packet(from_client, shape) => packet(*from_client, ACK, shape),
            Step::Error(report) => (report.from_client, report.bytes(*v4, protocol, port)),
        });
    }
    all.push(packet(true, FIN_ACK, &plain));
    all.push(packet(false, FIN_ACK, &plain));
    all
}

/// A frame without what differs and is meant to: errors that the host itself sends, which have had no hop yet, have
/// another identification and no flow label, may not be cut up, and do not take over the class of what they are
/// about. Their checksums are verified before.
fn without_differences(mut frame: Vec<u8>) -> Vec<u8> {
    let own = match (&frame[12..14], frame[23], frame[20]) {
        ([0x08, 0x00], 1, _) => {
            frame[22] == 64 && [[11, 0], [3, 4]].contains(&[frame[34], frame[35]])
        }
        ([0x86, 0xdd], _, 58) => {
            frame[21] == 64 && [[3, 0], [2, 0]].contains(&[frame[54], frame[55]])
        }
        _ => false,
    };
    if !own {
        return frame;
    }
    IcmpError::parse(&frame).unwrap_or_else(|error| panic!("{error:#}: {frame:02x?}"));
    if frame[12] == 0x08 {
        frame[15] = 0;
        frame[18..22].fill(0);
        fix_header_checksum(&mut frame[14..34]);
    } else {
        frame[14] = 0x60;
        frame[15..18].fill(0);
    }
    frame
}

#[test]
fn what_comes_out_is_what_nftables_makes_of_it() {
    // Frames of one CPU arrive in order, so that the marker is the last.
    pin_this_thread(&[0]).unwrap();
    let (oracle, ours) = (Arena::nftables(), Arena::forwarder());
    let config = Config {
        cases: 2000,
        failure_persistence: None,
        max_shrink_iters: 64,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let port = std::cell::Cell::new(10_000);
    let mut runner = TestRunner::new_with_rng(config, rng);
    runner
        .run(&conversations(), |conversation| {
            port.set(port.get() + 1);
            for (number, (from_client, frame)) in
                frames(&conversation, port.get()).into_iter().enumerate()
            {
                let all = |arena: &Arena| {
                    arena.outcome(from_client, &frame).map(|frames| {
                        frames
                            .into_iter()
                            .map(without_differences)
                            .collect::<Vec<_>>()
                    })
                };
                let (expected, got) = (all(&oracle), all(&ours));
                prop_assert_eq!(
                    got,
                    expected,
                    "frame {} from the {}: {:02x?}",
                    number,
                    if from_client { "client" } else { "container" },
                    frame
                );
            }
            Ok(())
        })
        .unwrap();
}
