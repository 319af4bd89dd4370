//! A whole host beside another: the same frames come to one that runs an instance, and to one that has nftables' DNAT and
//! masquerading, a strict reverse path and the same addresses, routes and MACs. Two machines of two networks and two containers
//! send what they may and what they invent, and the two machines also what comes from one far away, whose route moves from one to the
//! other; what then comes out at all four of them is compared octet by octet.

use std::{
    cell::Cell,
    net::{IpAddr, SocketAddr, UdpSocket},
    thread::sleep,
    time::Duration,
};

use forwarder_tests::{
    cpu::pin_this_thread,
    daemon::{Daemon, Datapath},
    deadline::{wait_for, wait_until},
    document::Delivery,
    frame::{ACK, FIN_ACK, Flags, Frame, Mac, Protocol as Carried, RST, SYN, SYN_ACK},
    netns::Netns,
    table::way_to,
    topology::Family,
    wire::{Wire, is_traffic},
};
use nix::net::if_::if_nametoindex;
use proptest::{
    prelude::*,
    sample::Index,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

/// A machine or a container, and the host's end of its link.
struct End {
    name: &'static str,
    /// The host's device, its addresses there and its MAC.
    device: &'static str,
    host: [&'static str; 2],
    host_mac: Mac,
    addresses: [&'static str; 2],
    mac: Mac,
}

const ENDS: [End; 4] = [
    End {
        name: "client",
        device: "eth0",
        host: ["198.51.100.2/24", "2001:db8:100::2/64"],
        host_mac: [2, 0, 0, 0, 1, 1],
        addresses: ["198.51.100.9", "2001:db8:100::9"],
        mac: [2, 0, 0, 0, 2, 1],
    },
    End {
        name: "neighbour",
        device: "eth1",
        host: ["203.0.113.2/24", "2001:db8:113::2/64"],
        host_mac: [2, 0, 0, 0, 1, 2],
        addresses: ["203.0.113.9", "2001:db8:113::9"],
        mac: [2, 0, 0, 0, 2, 2],
    },
    End {
        name: "backend",
        device: "veth0",
        host: ["172.31.0.1/32", "fd00:31::1/128"],
        host_mac: [2, 0, 0, 0, 1, 3],
        addresses: ["172.31.0.2", "fd00:31::2"],
        mac: [2, 0, 0, 0, 2, 3],
    },
    End {
        name: "container",
        device: "veth1",
        host: ["172.31.1.1/32", "fd00:32::1/128"],
        host_mac: [2, 0, 0, 0, 1, 4],
        addresses: ["172.31.1.2", "fd00:32::2"],
        mac: [2, 0, 0, 0, 2, 4],
    },
];
const CLIENT: usize = 0;
const BACKEND: usize = 2;
const CONTAINER: usize = 3;
/// A machine that is behind the client or behind its neighbour, as routes say at the time.
const FAR: usize = 4;
const FAR_ADDRESSES: [&str; 2] = ["192.0.2.9", "2001:db8:192::9"];
/// Published, of the host's address on the client's network.
const PUBLISHED: u16 = 8080;
/// The program asks for a route again after this time.
const ONCE_A_TICK: Duration = Duration::from_millis(20);
/// Where markers go.
const MARKER: u16 = 9;

/// Both hosts have the strict reverse path in front of conntrack, which would heed an invented reset else. Over IPv6, which has no
/// `rp_filter`, that concerns containers' addresses alone. And they masquerade what a container sends to the client.
const RULES: &str = "table inet host {\n\
     chain reverse {\ntype filter hook prerouting priority raw\n\
     meta nfproto ipv6 icmpv6 type { 133-137 } accept\n\
     meta nfproto ipv4 iif != lo fib saddr . iif oif missing drop\n\
     meta nfproto ipv6 iifname \"veth*\" fib saddr . iif oif missing drop\n\
     meta nfproto ipv6 iifname \"eth*\" fib saddr oifname \"veth*\" drop\n}\n\
     chain postrouting {\ntype nat hook postrouting priority srcnat\n\
     iifname veth1 oifname eth0 masquerade\n}\n}\n";
const DNAT: &str = "table inet published {\nchain prerouting {\ntype nat hook prerouting priority dstnat\n\
     ip daddr 198.51.100.2 meta l4proto { tcp, udp } th dport 8080 dnat ip to 172.31.0.2:80\n\
     ip6 daddr 2001:db8:100::2 meta l4proto { tcp, udp } th dport 8080 dnat ip6 to [fd00:31::2]:80\n}\n}\n";
/// The ends' kernels say nothing of what comes, also not that they have no route for it, as IPv6 hosts do once in a while.
const SILENCE: &str = "table inet silence {\nchain input {\ntype filter hook input priority 0\n\
     meta nfproto ipv6 icmpv6 type { 133-137 } accept\nmeta l4proto { tcp, udp, icmp, 58 } drop\n}\n\
     chain output {\ntype filter hook output priority 0\n\
     meta nfproto ipv6 icmpv6 type { 133-137 } accept\nmeta l4proto { icmp, 58 } drop\n}\n}\n";

struct Host {
    wires: [Wire; 4],
    /// Hears and sends what tells that all before it have had their turn.
    marker: UdpSocket,
    daemon: Option<Daemon>,
    netns: [Netns; 5],
}

impl Host {
    fn wired(forwards: bool) -> (Netns, [Netns; 4]) {
        let host = Netns::new("host").unwrap();
        let ends = ENDS.each_ref().map(|end| Netns::new(end.name).unwrap());
        for setting in ["all", "default"] {
            let setting = format!("ipv4/conf/{setting}/rp_filter");
            host.set(&setting, "1").unwrap();
        }
        host.ip("link set lo up").unwrap();
        let text = |mac: Mac| mac.map(|octet| format!("{octet:02x}")).join(":");
        for (end, netns) in ENDS.iter().zip(&ends) {
            let (device, mac, [v4, v6]) = (end.device, text(end.mac), end.addresses);
            let [host_v4, host_v6] = end.host;
            let host_mac = text(end.host_mac);
            host.ip(&format!(
                "link add {device} address {host_mac} type veth peer name eth0 address {mac} netns {}\n\
                 addr add {host_v4} dev {device}\naddr add {host_v6} dev {device} nodad\n\
                 link set {device} up",
                netns.path()
            ))
            .unwrap();
            let length = host_v4.split_once('/').unwrap().1;
            let length_v6 = host_v6.split_once('/').unwrap().1;
            netns
                .ip(&format!(
                    "link set lo up\naddr add {v4}/{length} dev eth0\naddr add {v6}/{length_v6} dev eth0 nodad\n\
                     link set eth0 up"
                ))
                .unwrap();
            netns.feed("nft -f -", SILENCE).unwrap();
            if length == "32" {
                host.ip(&format!(
                    "route add {v4}/32 dev {device}\nroute add {v6}/128 dev {device}"
                ))
                .unwrap();
            }
            host.ip(&format!(
                "neigh add {v4} lladdr {mac} dev {device}\nneigh add {v6} lladdr {mac} dev {device}"
            ))
            .unwrap();
        }
        host.forwards(forwards).unwrap();
        host.feed("nft -f -", RULES).unwrap();
        (host, ends)
    }

    fn open(host: Netns, ends: [Netns; 4], daemon: Option<Daemon>) -> Self {
        let wires = ends.each_ref().map(|end| Wire::open(end, "eth0").unwrap());
        let marker = host.enter(|| UdpSocket::bind(("0.0.0.0", MARKER)));
        let marker = marker.unwrap();
        let [a, b, c, d] = ends;
        Self {
            wires,
            marker,
            daemon,
            netns: [host, a, b, c, d],
        }
    }

    /// The oracle.
    fn nftables() -> Self {
        let (host, ends) = Self::wired(true);
        host.feed("nft -f -", DNAT).unwrap();
        // Segments here have no sequence that makes sense.
        host.set("netfilter/nf_conntrack_tcp_be_liberal", "1")
            .unwrap();
        Self::open(host, ends, None)
    }

    fn forwarder(forwards: bool) -> Self {
        let (host, ends) = Self::wired(forwards);
        let specs = ["tcp", "udp"].map(|protocol| {
            [
                format!("198.51.100.2:8080:172.31.0.2:80/{protocol}"),
                format!("[2001:db8:100::2]:8080:[fd00:31::2]:80/{protocol}"),
            ]
        });
        let specs = specs.as_flattened().iter().map(String::as_str);
        let specs: Vec<&str> = specs.collect();
        let daemon = Daemon::start(&host, &specs, Datapath::Ebpf).unwrap();
        wait_for("delivery of all by `peer`", || {
            let rows = daemon.list().ok()?;
            rows.iter()
                .all(|row| row.delivery == Some(Delivery::Peer))
                .then_some(())
        })
        .unwrap();
        Self::open(host, ends, Some(daemon))
    }

    /// Has the far machine's packets go by an end.
    fn route_far_by(&self, end: usize) {
        let [v4, v6] = FAR_ADDRESSES;
        let [by_v4, by_v6] = ENDS[end].addresses;
        self.netns[0]
            .ip(&format!(
                "route replace {v4}/32 via {by_v4}\nroute replace {v6}/128 via {by_v6}"
            ))
            .unwrap();
    }

    /// Waits until the daemon has told the program of the far machine's way, which cannot ask where the host does not forward.
    fn is_told(&self, end: usize) {
        let device = self.netns[0].enter(|| if_nametoindex(ENDS[end].device).unwrap());
        let pid = self.daemon.as_ref().unwrap().pid();
        wait_until("the program knows the way", || {
            let mut far = [Family::V4, Family::V6]
                .map(|family| address(family, FAR))
                .into_iter();
            far.all(|far| way_to(pid, far).is_ok_and(|by| by == device))
        });
    }

    /// Sends a frame from an end; what then comes out at each.
    fn outcome(&self, from: usize, frame: &[u8]) -> [Vec<Vec<u8>>; 4] {
        self.wires[from].send(frame).unwrap();
        // The host has had the frame when it has what was sent after it, and only then may it send what is to come last.
        self.wires[from].send(&to_the_host(from).bytes()).unwrap();
        self.marker.recv(&mut []).unwrap();
        std::array::from_fn(|to| {
            let to_it = SocketAddr::new(address(Family::V4, to), MARKER);
            self.marker.send_to(b"marker", to_it).unwrap();
            until_marker(&self.wires[to])
        })
    }
}

fn until_marker(wire: &Wire) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    loop {
        let frame = wire.receive().unwrap();
        // Its checksum is left to a device that there is none of.
        if frame[12..14] == [0x08, 0x00] && frame[23] == 17 && frame[36..38] == MARKER.to_be_bytes()
        {
            return frames;
        }
        if is_traffic(&frame) {
            frames.push(frame);
        }
    }
}

fn address(family: Family, end: usize) -> IpAddr {
    let [v4, v6] = ENDS.get(end).map_or(FAR_ADDRESSES, |end| end.addresses);
    let text = if family == Family::V4 { v4 } else { v6 };
    text.parse().unwrap()
}

fn published(family: Family, port: u16) -> SocketAddr {
    let [v4, v6] = ENDS[CLIENT].host;
    let network = if family == Family::V4 { v4 } else { v6 };
    let (address, _) = network.split_once('/').unwrap();
    SocketAddr::new(address.parse().unwrap(), port)
}

/// A packet from one end's port to another's, as the first sends it.
fn packet(
    family: Family,
    carried: Carried,
    [(from, port), (to, to_port)]: [(usize, u16); 2],
) -> Frame {
    let source = SocketAddr::new(address(family, from), port);
    let destination = SocketAddr::new(address(family, to), to_port);
    sent_by(from, Frame::first(carried, source, destination))
}

/// What the host's marker hears.
fn to_the_host(from: usize) -> Frame {
    let source = SocketAddr::new(address(Family::V4, from), MARKER);
    let (host, _) = ENDS[from].host[0].split_once('/').unwrap();
    let destination = SocketAddr::new(host.parse().unwrap(), MARKER);
    sent_by(from, Frame::first(Carried::Udp, source, destination))
}

/// By the link of that end.
fn sent_by(from: usize, mut frame: Frame) -> Frame {
    (frame.source_mac, frame.destination_mac) = (ENDS[from].mac, ENDS[from].host_mac);
    frame
}

/// Between whom a conversation is.
#[derive(Clone, Copy, Debug)]
enum Who {
    /// A client of the published port: the client's machine, its neighbour, the other container, or the far machine.
    Of(usize),
    /// The other container asks the client, from the very port number that is published, which the host masquerades.
    Masqueraded,
}

#[derive(Clone, Debug)]
struct Conversation {
    family: Family,
    carried: Carried,
    who: Who,
    /// Before each packet of the conversation, what somebody invents.
    forged: Vec<Vec<Forged>>,
    /// By which end the far machine's packets go first, and before which packet that changes.
    far: (usize, usize),
    /// Frames have a VLAN tag of number 0, which only says a priority (IEEE 802.1Q).
    tagged: bool,
}

/// A packet like one of the conversation's, by an end that neither sends it nor may.
#[derive(Clone, Debug)]
struct Forged {
    from: Index,
    is_reply: bool,
    flags: Index,
    /// Whose address it has, where it is no reply.
    source: Index,
}

const FLAGS: [Flags; 5] = [SYN, SYN_ACK, ACK, FIN_ACK, RST];
/// A conversation's packets: the direction, and TCP's flags.
const ORDER: [(usize, Flags); 8] = [
    (0, SYN),
    (1, SYN_ACK),
    (0, ACK),
    (1, ACK),
    (0, ACK),
    (1, ACK),
    (0, FIN_ACK),
    (1, FIN_ACK),
];

/// What happens next.
enum Event {
    /// An end sends.
    Sent(usize, Frame),
    /// The far machine's packets go by that end from now on.
    Moved(usize),
}

/// Masquerading is forwarding, by the host itself.
fn conversations(forwards: bool) -> impl Strategy<Value = Conversation> {
    let forged = (
        any::<Index>(),
        any::<bool>(),
        any::<Index>(),
        any::<Index>(),
    );
    let forged = forged.prop_map(|(from, is_reply, flags, source)| Forged {
        from,
        is_reply,
        flags,
        source,
    });
    let forged = proptest::collection::vec(proptest::collection::vec(forged, 0..3), 8);
    let who = prop_oneof![
        6 => Just(Who::Of(CLIENT)),
        4 => Just(Who::Of(1)),
        4 => Just(Who::Of(CONTAINER)),
        1 => Just(Who::Of(FAR)),
        2 * u32::from(forwards) => Just(Who::Masqueraded),
    ];
    let family = prop_oneof![Just(Family::V4), Just(Family::V6)];
    let carried = prop_oneof![Just(Carried::Tcp), Just(Carried::Udp)];
    let far = (0..BACKEND, 0..=ORDER.len());
    (family, carried, who, forged, far, any::<bool>()).prop_map(
        |(family, carried, who, forged, far, tagged)| Conversation {
            family,
            carried,
            who,
            forged,
            far,
            tagged,
        },
    )
}

impl Conversation {
    /// Its packets to and fro, with the ends that send them, while those of the far machine go by `way`.
    fn directions(&self, port: u16, way: usize) -> [(usize, Frame); 2] {
        let (family, carried) = (self.family, self.carried);
        match self.who {
            Who::Of(end) => {
                let client = SocketAddr::new(address(family, end), port);
                let original = Frame::first(carried, client, published(family, PUBLISHED));
                let mut reply = original.reply();
                reply.source = SocketAddr::new(address(family, BACKEND), 80);
                let end = if end == FAR { way } else { end };
                [
                    (end, sent_by(end, original)),
                    (BACKEND, sent_by(BACKEND, reply)),
                ]
            }
            Who::Masqueraded => {
                let original = packet(family, carried, [(CONTAINER, PUBLISHED), (CLIENT, port)]);
                let mut reply = original.reply();
                reply.destination = published(family, PUBLISHED);
                [(CONTAINER, original), (CLIENT, sent_by(CLIENT, reply))]
            }
        }
    }

    fn events(&self, port: u16) -> Vec<Event> {
        let is_tcp = self.carried == Carried::Tcp;
        let flags = |frame: &Frame, flags| match is_tcp {
            true => frame.clone().with_flags(flags),
            false => frame.clone(),
        };
        let is_far = matches!(self.who, Who::Of(FAR));
        let (mut way, changes) = self.far;
        let mut events = Vec::new();
        if is_far {
            events.push(Event::Moved(way));
        }
        for (number, ((direction, meant), forged)) in ORDER.iter().zip(&self.forged).enumerate() {
            if is_far && number == changes {
                way = 1 - way;
                events.push(Event::Moved(way));
            }
            let directions = self.directions(port, way);
            for forged in forged {
                let (owner, frame) = &directions[usize::from(forged.is_reply)];
                let from = forged.from.index(ENDS.len());
                let mut frame = flags(frame, FLAGS[forged.flags.index(FLAGS.len())]);
                let mut claimed = *owner;
                if !forged.is_reply {
                    claimed = forged.source.index(ENDS.len() + usize::from(is_far));
                    let claims = address(self.family, claimed);
                    frame.source.set_ip(claims);
                    if claimed == FAR {
                        claimed = way;
                    }
                }
                // Which of two uplinks another machine is behind is nobody's business over IPv6.
                let are_machines = from.max(claimed) < BACKEND;
                let is_told = !are_machines || self.family == Family::V4;
                // By the end that they came by last, the far machine's packets are heeded until they come by the other.
                let was_way = is_far && number >= changes && from == 1 - way && claimed == way;
                let is_told = is_told && !was_way;
                if from != claimed && is_told {
                    events.push(Event::Sent(from, sent_by(from, frame)));
                }
            }
            let (from, frame) = &directions[*direction];
            events.push(Event::Sent(*from, flags(frame, *meant)));
        }
        events
    }
}

/// With a VLAN tag that names no VLAN.
fn tagged(mut frame: Vec<u8>) -> Vec<u8> {
    frame.splice(12..12, [0x81, 0x00, 0x60, 0x00]);
    frame
}

fn what_comes_out_is_what_nftables_makes_of_it(forwards: bool) {
    // Frames of one CPU arrive in order, so that the marker is the last.
    pin_this_thread(&[0]).unwrap();
    let (oracle, ours) = (Host::nftables(), Host::forwarder(forwards));
    let config = Config {
        cases: 1000,
        failure_persistence: None,
        max_shrink_iters: 64,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let (port, way) = (Cell::new(10_000), Cell::new(None));
    let mut runner = TestRunner::new_with_rng(config, rng);
    let run = runner.run(&conversations(forwards), |conversation| {
        port.set(port.get() + 1);
        let events = conversation.events(port.get());
        for (number, event) in events.into_iter().enumerate() {
            let (from, frame) = match event {
                Event::Sent(from, frame) => (from, frame),
                Event::Moved(end) => {
                    if way.replace(Some(end)) != Some(end) {
                        oracle.route_far_by(end);
                        ours.route_far_by(end);
                        if !forwards {
                            ours.is_told(end);
                        }
                        sleep(ONCE_A_TICK);
                    }
                    continue;
                }
            };
            let mut bytes = frame.bytes();
            if conversation.tagged {
                bytes = tagged(bytes);
            }
            let expected = oracle.outcome(from, &bytes);
            let got = ours.outcome(from, &bytes);
            let by = ENDS[from].name;
            prop_assert_eq!(
                got,
                expected,
                "event {}, a frame from the {}: {:?}",
                number,
                by,
                frame
            );
        }
        Ok(())
    });
    let daemon = ours.daemon.as_ref().unwrap();
    run.unwrap_or_else(|error| panic!("{error}\n{}", daemon.control(&["stats"]).unwrap()));
}

#[test]
fn on_a_host_that_forwards_what_comes_out_is_what_nftables_makes_of_it() {
    what_comes_out_is_what_nftables_makes_of_it(true);
}

#[test]
fn on_a_host_that_forwards_nothing_else_what_comes_out_is_what_nftables_makes_of_it() {
    what_comes_out_is_what_nftables_makes_of_it(false);
}
