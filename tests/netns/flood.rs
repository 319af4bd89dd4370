//! Floods from a machine with many addresses, and what they must not disturb.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use forwarder_common::{
    limits,
    tuple::{TCP, Tuple, UDP},
};
use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::wait_for,
    netns::Netns,
    table::Table,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask},
    wire::Wire,
};

use crate::scene::{BACKEND_PORT, PORT, Scene, backends, packets, served_to_the_client, spec};

/// Ports of a source address that the flood uses.
const PORTS: u32 = 1000;

/// Sends one datagram from each of many sources, and again, until it is told to end.
fn flood(frontend: SocketAddr, ended: &AtomicBool, sent: &AtomicU32) {
    while !ended.load(Relaxed) {
        for number in 0..2 * limits::HALF_OPEN {
            if ended.load(Relaxed) {
                break;
            }
            let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 1, 0, 0)) + number / PORTS);
            let port = 20_000 + (number % PORTS) as u16;
            // Without waiting: the socket is closed before an answer comes.
            if let Ok(socket) = UdpSocket::bind((address, port))
                && socket.send_to(b"flood", frontend).is_ok()
            {
                sent.fetch_add(1, Relaxed);
            }
        }
    }
}

/// A bridge learns all of them, and tells.
#[test]
fn a_container_that_sends_from_many_macs_takes_no_memory_and_holds_nobody_up() {
    const MACS: u32 = 200_000;
    let scene = Scene::tcp().start();
    let (topology, daemon) = scene.parts();
    scene.served("before");
    let before = daemon.resident().unwrap();
    let wire = Wire::open(&topology.peer.netns, "eth0").unwrap();
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]); // of nobody (IEEE 802)
    for number in 0..MACS {
        frame[6..8].copy_from_slice(&[0x02, 0x77]);
        frame[8..12].copy_from_slice(&number.to_be_bytes());
        wire.send(&frame).unwrap();
    }
    // What changes meanwhile is followed: an address that comes now is served by the fast path.
    let host = &topology.host;
    host.ip("addr add 198.51.100.77/24 dev eth0").unwrap();
    let frontend = SocketAddr::from(([198, 51, 100, 77], PORT));
    let followed = wait_for("the new address is served", || {
        let before = packets(daemon);
        ask(&topology.client, Protocol::Tcp, frontend, "after").ok()?;
        (packets(daemon).0 > before.0).then_some(())
    });
    followed.unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.said()));
    let after = daemon.resident().unwrap();
    assert!(after < before + 16, "{before} MiB, then {after}");
    scene.stop();
}

#[test]
fn a_flood_from_many_sources_disturbs_neither_conversations_nor_new_clients() {
    let scene = Scene::tcp().and_udp().start();
    let (topology, daemon) = scene.parts();
    scene.served("first");
    let localhost = SocketAddr::from(([127, 0, 0, 1], PORT));
    let mut external = scene.connect();
    let mut local = Connection::open(&topology.host, localhost).unwrap();
    external.ask("before").unwrap();
    local.ask("before").unwrap();

    let (ended, sent) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        let host = &topology.host;
        let (ended, sent) = (&ended, &sent);
        scope.spawn(move || host.enter(|| flood(localhost, ended, sent)));
        let mut flooded = || {
            wait_for("more datagrams than half-open flows", || {
                external.ask("meanwhile").unwrap();
                local.ask("meanwhile").unwrap();
                scene.served("new");
                served_to_the_client(topology, Protocol::Udp, "new");
                (sent.load(Relaxed) > limits::HALF_OPEN + limits::HALF_OPEN / 2).then_some(())
            })
        };
        // An emulated machine sends a thousand in a second.
        let flooded = flooded().or_else(|_| flooded()).or_else(|_| flooded());
        ended.store(true, Relaxed);
        flooded.unwrap();
    });
    external.ask("after").unwrap();
    local.ask("after").unwrap();
    assert_eq!(daemon.counted("no_entry").unwrap(), 0);
    scene.stop();
}

/// Entries of tables that are full soon.
const FEW: u32 = 4096;
const FEWER: u32 = 1024;
/// The published port of a backend on another machine, and where that listens.
const REMOTE_PORT: u16 = 8081;
const REMOTE_BACKEND_PORT: u16 = 9001;

/// Publishes the backend by both protocols, and the client's machine as a backend elsewhere, by a daemon with a small table.
fn start_with_few_flows(topology: &Topology, family: Family, flows: u32) -> Daemon {
    let specs = [Protocol::Tcp, Protocol::Udp].map(|p| spec(&topology.backend, family, p));
    let remote = SocketAddr::new(topology.client_address(family), REMOTE_BACKEND_PORT);
    let remote = format!("{REMOTE_PORT}:{remote}/udp");
    let specs = [&specs[0][..], &specs[1], &remote];
    let mut daemon = Daemon::start(&topology.host, &specs, Datapath::Ebpf).unwrap();
    daemon.kill().unwrap();
    Table::replace(daemon.instance(), flows).unwrap();
    daemon.restart().unwrap();
    daemon
}

/// Begins flows that are proven, from every address in turn, until it is told to end. Each closes as anybody does: that keeps
/// its flow for two minutes.
fn prove(
    netns: &Netns,
    sources: &[IpAddr],
    frontend: SocketAddr,
    protocol: Protocol,
    end: &AtomicBool,
) {
    let mut ports = (10_000..30_000).cycle();
    while !end.load(Relaxed) {
        let port = ports.next().unwrap_or_default();
        for &source in sources {
            let own = SocketAddr::new(source, port);
            if protocol == Protocol::Tcp {
                drop(Connection::open_at(netns, own, frontend));
                continue;
            }
            let twice = netns.enter(|| {
                let socket = UdpSocket::bind(own)?;
                socket.set_read_timeout(Some(Duration::from_secs(1)))?;
                for _ in 0..2 {
                    socket.send_to(b"flood", frontend)?;
                    socket.recv_from(&mut [0; 64])?;
                }
                std::io::Result::Ok(())
            });
            let _ = twice;
        }
    }
}

/// What honest clients do: conversations go on, and new ones are served; of the LAN, on this host, and of another machine.
struct Honest<'a> {
    topology: &'a Topology,
    daemon: &'a Daemon,
    family: Family,
    kept: Vec<Connection>,
}

impl<'a> Honest<'a> {
    fn begin(topology: &'a Topology, daemon: &'a Daemon, family: Family) -> Self {
        let mut honest = Self {
            topology,
            daemon,
            family,
            kept: Vec::new(),
        };
        for (netns, frontend) in honest.ways() {
            honest.kept.push(Connection::open(netns, frontend).unwrap());
        }
        honest
    }

    fn ways(&self) -> [(&'a Netns, SocketAddr); 2] {
        [
            (
                &self.topology.client,
                self.topology.host_address(self.family),
            ),
            (&self.topology.host, self.family.localhost()),
        ]
        .map(|(netns, address)| (netns, SocketAddr::new(address, PORT)))
    }

    fn go_on(&mut self) {
        for connection in &mut self.kept {
            connection.ask("as before").unwrap();
        }
    }

    /// One of each; how many were served.
    fn round(&mut self) -> u32 {
        self.go_on();
        let ways = self.ways();
        for (netns, frontend) in ways {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                ask(netns, protocol, frontend, "new").unwrap();
            }
        }
        let (netns, mut remote) = ways[1];
        remote.set_port(REMOTE_PORT);
        ask(netns, Protocol::Udp, remote, "new, elsewhere").unwrap();
        self.topology
            .peer
            .netns
            .enter(|| {
                let socket = UdpSocket::bind((self.family.unspecified(), 0)).unwrap();
                let host = SocketAddr::new(self.topology.host_address(self.family), REMOTE_PORT);
                forwarder_tests::traffic::ask_by(&socket, host, "of a container")
            })
            .unwrap();
        6
    }

    /// How many are served in a second. Each takes an entry or two, and a source has no more than some 200 here.
    fn rate(&mut self) -> f64 {
        let (begun, mut served) = (Instant::now(), 0);
        for _ in 0..8 {
            served += self.round();
        }
        f64::from(served) / begun.elapsed().as_secs_f64()
    }

    fn counted(&self) -> [u64; 4] {
        let reasons = ["flows_full", "no_entry", "no_source_port", "source_share"];
        self.daemon.counts(reasons).unwrap()
    }
}

/// Has a machine fill the table, and goes on as long as it does.
fn a_full_share_is_nobody_elses(
    topology: &Topology,
    family: Family,
    netns: &Netns,
    sources: &[IpAddr],
    protocol: Protocol,
) {
    let _backends = [
        Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT),
        Backend::start(&topology.backend.netns, Protocol::Udp, BACKEND_PORT),
        Backend::start(&topology.client, Protocol::Udp, REMOTE_BACKEND_PORT),
    ]
    .map(Result::unwrap);
    let daemon = start_with_few_flows(topology, family, FEW);
    let mut honest = Honest::begin(topology, &daemon, family);
    let before = honest.rate();
    let frontend = SocketAddr::new(topology.host_address(family), PORT);
    let end = AtomicBool::new(false);
    let (mut meanwhile, mut rounds) = (0.0, 0);
    thread::scope(|scope| {
        let flood = scope.spawn(|| prove(netns, sources, frontend, protocol, &end));
        let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut full = || {
                wait_for("the source has its share", || {
                    honest.go_on();
                    (honest.counted()[3] > 100).then_some(())
                })
            };
            full().or_else(|_| full()).or_else(|_| full()).unwrap();
            for _ in 0..3 {
                meanwhile += honest.rate();
                rounds += 1;
            }
        }));
        end.store(true, Relaxed);
        flood.join().unwrap();
        served.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let rate = meanwhile / f64::from(rounds) / before;
    println!("new clients are served at {rate:.2} of the rate without the flood");
    honest.round();
    assert_eq!(honest.counted()[..3], [0; 3], "{}", daemon.said());
    daemon.stop().unwrap();
}

#[test]
fn a_machine_that_completes_handshakes_takes_no_more_than_its_share() {
    for (family, address) in [
        (Family::V4, "198.51.100.66"),
        (Family::V6, "2001:db8:66::66"),
    ] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let topology = Topology::new().unwrap();
            let source: IpAddr = address.parse().unwrap();
            have(&topology, &[source]);
            let client = &topology.client;
            a_full_share_is_nobody_elses(&topology, family, client, &[source], protocol);
        }
    }
}

#[test]
fn a_machine_with_many_addresses_of_one_ipv6_network_takes_no_more_than_one_share() {
    let topology = Topology::new().unwrap();
    let network = |number| Ipv6Addr::new(0x2001, 0xdb8, 0x66, 0, number, 0, 0, 66).into();
    let sources: Vec<IpAddr> = (0..64).map(network).collect();
    have(&topology, &sources);
    let client = &topology.client;
    a_full_share_is_nobody_elses(&topology, Family::V6, client, &sources, Protocol::Udp);
}

#[test]
fn a_container_that_completes_handshakes_takes_no_more_than_its_share() {
    for family in [Family::V4, Family::V6] {
        let topology = Topology::new().unwrap();
        let other = &topology.other;
        let source = other.address(family);
        a_full_share_is_nobody_elses(&topology, family, &other.netns, &[source], Protocol::Tcp);
    }
}

/// Gives the client's machine further addresses, those of IPv6 of a network of its own.
fn have(topology: &Topology, sources: &[IpAddr]) {
    let added = sources.iter().map(|source| match source {
        IpAddr::V4(_) => format!("addr add {source}/24 dev eth0\n"),
        IpAddr::V6(_) => format!("addr add {source}/128 dev eth0 nodad\n"),
    });
    topology.client.ip(&added.collect::<String>()).unwrap();
    let client = topology.client_address(Family::V6);
    let route = format!("route add 2001:db8:66::/48 via {client}");
    topology.host.ip(&route).unwrap();
}

/// The flows of a source above its share end, those that were silent for longest first; their clients' next packets make
/// them again.
#[test]
fn flows_above_a_share_end_early_and_go_on_all_the_same() {
    let topology = Topology::new().unwrap();
    let _backends = backends(&topology.backend.netns);
    let source: IpAddr = [198, 51, 100, 66].into();
    have(&topology, &[source]);
    let daemon = start_with_few_flows(&topology, Family::V4, FEWER);
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    let mut silent: Vec<_> = (9000..9016)
        .map(|port| {
            let own = SocketAddr::new(source, port);
            let mut connection = Connection::open_at(&topology.client, own, frontend).unwrap();
            connection.ask("before").unwrap();
            connection
        })
        .collect();
    let table = Table::open(daemon.instance()).unwrap();
    let key = |port: u16, protocol: u8| Tuple {
        source: source.into(),
        destination: topology.backend.address(Family::V4).into(),
        source_port: port.to_be(),
        destination_port: BACKEND_PORT.to_be(),
        protocol: protocol.into(),
    };
    let of_the_flood = || {
        let keys = (10_000..30_000).map(|port| key(port, UDP));
        keys.filter(|key| table.has(key)).count()
    };
    let are_silent = |has: bool| (9000..9016).all(|port| table.has(&key(port, TCP)) == has);
    assert!(are_silent(true));
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        let client = &topology.client;
        let flood = scope.spawn(|| prove(client, &[source], frontend, Protocol::Udp, &end));
        let full = wait_for("the source has its share", || {
            (daemon.counted("source_share").unwrap() > 0).then_some(())
        });
        end.store(true, Relaxed);
        flood.join().unwrap();
        full.unwrap();
    });
    // A table that is above three quarters full.
    let mut others: Vec<_> = (0..4)
        .map(|_| Connection::open(&topology.client, frontend).unwrap())
        .collect();
    for connection in &mut others {
        connection.ask("another").unwrap();
    }
    wait_for(
        "the flows above its share have ended, the oldest among them",
        || (of_the_flood() <= FEWER as usize / 16 && are_silent(false)).then_some(()),
    )
    .unwrap();
    assert!(
        of_the_flood() > FEWER as usize / 32,
        "more than the surplus"
    );
    for connection in silent.iter_mut().chain(&mut others) {
        connection.ask("goes on").unwrap();
    }
    assert!(are_silent(true));
    daemon.stop().unwrap();
}
