//! Nobody is starved by others: loops are refused, and what one publish's clients can take leaves enough for all others, and
//! for whoever asks the instance.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    ops::Range,
    thread,
    time::Instant,
};

use forwarder_tests::{
    api,
    daemon::{Daemon, Datapath, run_to_failure},
    deadline::{slack, wait_for},
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask, ask_by},
};

use crate::scene::{self, BACKEND_PORT, PORT, suffix};

/// At most so many open files.
fn limited(files: u32) -> [String; 3] {
    let words = format!("ulimit -n {files}; exec \"$0\" \"$@\"");
    ["sh".into(), "-c".into(), words]
}

/// A publish whose clients want more files than there are, and another one of the same protocol.
struct Scene {
    topology: Topology,
    daemon: Daemon,
    _backends: Vec<Backend>,
}

const OTHER: u16 = PORT + 1;

impl Scene {
    fn new(files: u32, protocol: Protocol) -> Self {
        let to = format!("172.31.0.2:{BACKEND_PORT}{}", suffix(protocol));
        let specs = [PORT, OTHER].map(|port| format!("{port}:{to}"));
        let limit = limited(files);
        let limit = limit.each_ref().map(String::as_str);
        let usual = scene::Scene::of(Family::V4, protocol).publishing(&specs);
        let usual = usual.by(Datapath::Userland).wrapped(&limit).start();
        Self {
            topology: usual.topology,
            daemon: usual.daemon,
            _backends: usual.backends,
        }
    }

    fn frontend(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.topology.host_address(Family::V4), port)
    }

    /// The other publish serves a new client, and the instance answers, at once.
    #[track_caller]
    fn everybody_else_is_served(&self, protocol: Protocol) {
        let begun = Instant::now();
        ask(
            &self.topology.client,
            protocol,
            self.frontend(OTHER),
            "hello",
        )
        .unwrap();
        assert_eq!(self.daemon.list().unwrap().len(), 2);
        let took = begun.elapsed();
        assert!(took < slack() * 2, "{took:?}\n{}", self.daemon.said());
    }

    /// What was warned of, once and with its remedy.
    #[track_caller]
    fn said_once(&self) {
        wait_for("no files are left for the publish", || {
            let counted = self.daemon.counted("userland_no_descriptors").ok()?;
            (counted > 0 && self.daemon.said().contains("LimitNOFILE")).then_some(())
        })
        .unwrap();
        let said = self.daemon.said();
        let mut lines = said.lines().filter(|line| line.contains("LimitNOFILE"));
        let line = lines.next().unwrap_or_default();
        assert!(line.contains(&format!("{PORT}:")), "{line}");
        assert_eq!(lines.next(), None, "more than one warning: {said}");
    }
}

/// Sends something from each of these ports, but from those that somebody else has: a child of another test has a copy of each
/// descriptor until it is another program.
fn send_from(client: &Netns, ports: Range<u16>, frontend: SocketAddr) {
    client.enter(|| {
        for port in ports {
            if let Ok(socket) = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)) {
                socket.send_to(b"hello", frontend).unwrap();
            }
        }
    });
}

/// Each source port is a flow of its own.
fn source_ports(files: u32, count: u16) {
    let scene = Scene::new(files, Protocol::Udp);
    let (client, frontend) = (&scene.topology.client, scene.frontend(PORT));
    // What waits for the first answer of ARP is lost.
    ask(client, Protocol::Udp, frontend, "first").unwrap();
    // A slow machine drops what it has no time to read.
    wait_for("no files are left for flows", || {
        send_from(client, 20_000..20_000 + count, frontend);
        let counted = scene.daemon.counted("userland_no_descriptors").ok()?;
        (counted > 0).then_some(())
    })
    .unwrap();
    scene.said_once();
    scene.everybody_else_is_served(Protocol::Udp);
    scene.daemon.stop().unwrap();
}

#[test]
fn a_thousand_source_ports_leave_files_for_others() {
    source_ports(1_000, 1_200);
}

#[test]
fn five_thousand_source_ports_leave_files_for_others() {
    source_ports(4_096, 5_000);
}

/// As many docker-proxies have them.
#[test]
fn leases_and_source_ports_leave_files_for_others() {
    let scene = Scene::new(500, Protocol::Udp);
    let leases: Vec<_> = (30_000..30_100)
        .map(|port| {
            let body = format!("[\"127.0.0.1:{port}:172.31.0.2:80\"]");
            let mut lease = api::open(&scene.daemon, "POST", "/v1/leases", &body, &[]).unwrap();
            assert_eq!(lease.head().unwrap().0, 201);
            lease
        })
        .collect();
    let client = &scene.topology.client;
    for frontend in [PORT, OTHER].map(|port| scene.frontend(port)) {
        ask(client, Protocol::Udp, frontend, "first").unwrap();
        send_from(client, 20_000..20_300, frontend);
    }
    wait_for("no files are left for flows", || {
        let counted = scene.daemon.counted("userland_no_descriptors").ok()?;
        (counted > 300).then_some(())
    })
    .unwrap();
    let begun = Instant::now();
    assert_eq!(scene.daemon.list().unwrap().len(), 2 + leases.len());
    let took = begun.elapsed();
    assert!(took < slack() * 2, "{took:?}\n{}", scene.daemon.said());
    scene.daemon.stop().unwrap();
}

#[test]
fn connections_leave_files_for_others_and_are_served_in_turn() {
    let scene = Scene::new(400, Protocol::Tcp);
    let (client, frontend) = (&scene.topology.client, scene.frontend(PORT));
    let mut connections: Vec<Connection> = Vec::new();
    for _ in 0..300 {
        connections.push(Connection::open(client, frontend).unwrap());
    }
    scene.said_once();
    scene.everybody_else_is_served(Protocol::Tcp);
    // Who waits is served when others have gone.
    let mut last = connections.pop().unwrap();
    drop(connections);
    last.ask("at last").unwrap();
    scene.daemon.stop().unwrap();
}

#[test]
fn what_leads_to_itself_is_refused_by_its_name() {
    let topology = Topology::new().unwrap();
    let host = topology.host_address(Family::V6);
    for datapath in ["auto", "userland"] {
        let itself = format!("{PORT}:[{host}]:{PORT}");
        for (specs, named) in [
            (vec!["8080:127.0.0.1:8080"], "8080:127.0.0.1:8080/tcp"),
            (vec!["8080:[::1]:8080/udp"], "8080:[::1]:8080/udp"),
            (vec![itself.as_str()], "8080/tcp: it leads back to itself"),
            (
                vec!["81:127.0.0.1:82", "82:[::1]:81"],
                "81:127.0.0.1:82/tcp",
            ),
        ] {
            let mut flags = vec!["--datapath", datapath];
            flags.extend(specs.iter().flat_map(|spec| ["-p", *spec]));
            let (status, errors) = run_to_failure(&topology.host, &flags).unwrap();
            assert_eq!(status.code(), Some(1), "{specs:?}: {errors}");
            assert!(errors.contains("leads back to itself"), "{errors}");
            assert!(errors.contains(named), "{named} is not named: {errors}");
        }
    }
}

/// A backend that becomes an address of this host: what is sent there comes back.
fn a_loop_that_comes_later(protocol: Protocol) {
    let specs = [(81, 82), (82, 81)]
        .map(|(port, to)| format!("{port}:203.0.113.7:{to}{}", suffix(protocol)));
    let limit = limited(1_000);
    let limit = limit.each_ref().map(String::as_str);
    let scene = scene::Scene::tcp().silent().publishing(&specs);
    let scene = scene.by(Datapath::Userland).wrapped(&limit).start();
    let (topology, daemon) = scene.parts();
    topology.host.ip("addr add 203.0.113.7/32 dev lo").unwrap();
    topology.host.enter(|| {
        let frontend = SocketAddr::from((Ipv4Addr::LOCALHOST, 81));
        match protocol {
            Protocol::Tcp => {
                // The reset may be there before the client has noticed that it was connected.
                let connected = TcpStream::connect_timeout(&frontend, slack() * 10);
                let ended = connected.and_then(|mut stream| {
                    stream.set_read_timeout(Some(slack() * 10))?;
                    let _ = stream.write_all(b"hello");
                    stream.read(&mut [0; 16])
                });
                let is_late = |e: std::io::Error| {
                    matches!(
                        e.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    )
                };
                let timed_out = ended.is_err_and(is_late);
                assert!(!timed_out, "the client hears nothing");
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
                socket.send_to(b"hello", frontend).unwrap();
            }
        }
    });
    wait_for("the loop is seen", || {
        (daemon.counted("userland_loop").ok()? > 0).then_some(())
    })
    .unwrap();
    let files = daemon.held("fd").unwrap();
    assert!(files < 100, "{files} open files");
    assert!(daemon.said().contains("leads back"), "{}", daemon.said());
    scene.stop();
}

#[test]
fn a_connection_that_comes_back_ends() {
    a_loop_that_comes_later(Protocol::Tcp);
}

#[test]
fn a_datagram_that_comes_back_ends() {
    a_loop_that_comes_later(Protocol::Udp);
}

#[test]
fn publishes_may_lead_to_each_other_in_a_row() {
    let last = format!("83:172.31.0.2:{BACKEND_PORT}");
    let specs = ["81:127.0.0.1:82", "82:[::1]:83", &last];
    let scene = scene::Scene::tcp().publishing(&specs).auto().start();
    for family in [Family::V4, Family::V6] {
        let frontend = SocketAddr::new(family.localhost(), 81);
        ask(&scene.topology.host, Protocol::Tcp, frontend, "hello").unwrap();
    }
    scene.stop();
}

/// A backend that all source ports of this host are in use towards.
fn without_source_ports(protocol: Protocol, family: Family) {
    let topology = Topology::new().unwrap();
    let few = "32000 32005";
    topology.host.set("ipv4/ip_local_port_range", few).unwrap();
    let scene = scene::Scene::of(family, protocol).by(Datapath::Userland);
    let scene = scene.start_in(topology);
    let ((topology, daemon), frontend) = (scene.parts(), scene.frontend());
    scene.ask("first").unwrap();
    let sockets: Vec<Box<dyn Send>> = topology.client.enter(|| {
        let begin = |_| -> Box<dyn Send> {
            match protocol {
                Protocol::Tcp => Box::new(TcpStream::connect(frontend).unwrap()),
                Protocol::Udp => {
                    let socket = UdpSocket::bind((family.unspecified(), 0)).unwrap();
                    socket.send_to(b"hello", frontend).unwrap();
                    Box::new(socket)
                }
            }
        };
        (0..10).map(begin).collect()
    });
    wait_for("no source port is left", || {
        (daemon.counted("userland_no_source_port").ok()? > 1).then_some(())
    })
    .unwrap();
    let said = daemon.said();
    let warnings = said.matches("net.ipv4.ip_local_port_range").count();
    assert_eq!(warnings, 1, "{said}");
    drop(sockets);
    scene.stop();
}

#[test]
fn a_want_of_source_ports_for_tcp_is_said_once() {
    without_source_ports(Protocol::Tcp, Family::V4);
}

#[test]
fn a_want_of_source_ports_for_tcp_over_ipv6_is_said_once() {
    without_source_ports(Protocol::Tcp, Family::V6);
}

#[test]
fn a_want_of_source_ports_for_udp_is_said_once() {
    without_source_ports(Protocol::Udp, Family::V4);
}

#[test]
fn a_want_of_source_ports_for_udp_over_ipv6_is_said_once() {
    without_source_ports(Protocol::Udp, Family::V6);
}

/// Source ports that there are, and connections that there are to be.
const PORTS: &str = "32000 32009";
const CONNECTIONS: usize = 15;

/// More conversations at once than one address has ports for, by further addresses of the host, which the backend sees.
fn further_addresses(protocol: Protocol, family: Family) {
    let topology = Topology::new().unwrap();
    let further = match family {
        Family::V4 => "172.31.0.77/24",
        Family::V6 => "fd00:31::77/64 nodad",
    };
    let words = format!("addr add dev br0 {further}");
    topology.host.ip(&words).unwrap();
    has_further_ports(scene::Scene::of(family, protocol), topology, protocol, 2);
}

/// Whether a client is served beside others, though one address has not so many ports.
fn has_further_ports(
    setting: scene::Setting<'_>,
    topology: Topology,
    protocol: Protocol,
    addresses: usize,
) {
    topology
        .host
        .set("ipv4/ip_local_port_range", PORTS)
        .unwrap();
    let scene = setting.by(Datapath::Userland).start_in(topology);
    let ((topology, daemon), frontend) = (scene.parts(), scene.frontend());
    scene.ask("first").unwrap();
    let (mut connections, mut sockets) = (Vec::new(), Vec::new());
    let mut seen = BTreeSet::new();
    for _ in 0..CONNECTIONS {
        let answer = match protocol {
            Protocol::Tcp => {
                let mut connection = Connection::open(&topology.client, frontend).unwrap();
                let answer = connection.ask("hello");
                connections.push(connection);
                answer
            }
            Protocol::Udp => {
                let any = scene.family().unspecified();
                let socket = topology.client.enter(|| UdpSocket::bind((any, 0)).unwrap());
                let answer = ask_by(&socket, frontend, "hello");
                sockets.push(socket);
                answer
            }
        };
        let answer = answer.unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.said()));
        seen.insert(answer.seen.ip());
    }
    assert_eq!(seen.len(), addresses, "{seen:?}");
    for connection in &mut connections {
        connection.ask("still there?").unwrap();
    }
    assert_eq!(daemon.counted("userland_no_source_port").unwrap(), 0);
    scene.stop();
}

#[test]
fn further_addresses_of_the_host_have_further_ports_for_tcp() {
    further_addresses(Protocol::Tcp, Family::V4);
}

#[test]
fn further_addresses_of_the_host_have_further_ports_for_tcp_over_ipv6() {
    further_addresses(Protocol::Tcp, Family::V6);
}

#[test]
fn further_addresses_of_the_host_have_further_ports_for_udp() {
    further_addresses(Protocol::Udp, Family::V4);
}

#[test]
fn the_kernel_chooses_source_ports_while_it_has_enough() {
    let scene = scene::Scene::tcp().by(Datapath::Userland).start();
    // So many at once that a thread waits for its turn when it has connected.
    let seen: Vec<u16> = thread::scope(|scope| {
        let clients = (0..16).map(|_| {
            scope.spawn(|| {
                let ports = (0..50).map(|_| {
                    let mut connection = scene.connect();
                    let asked = connection.ask("hello");
                    asked.map(|answer| answer.seen.port())
                });
                ports.collect::<anyhow::Result<Vec<_>>>()
            })
        });
        let clients: Vec<_> = clients.collect();
        let ports = clients.into_iter().map(|it| it.join().unwrap());
        let ports: anyhow::Result<Vec<_>> = ports.collect();
        let ports = ports.unwrap_or_else(|error| panic!("{error:#}\n{}", scene.daemon.said()));
        ports.concat()
    });
    // Of Linux's range the kernel takes odd ones last, and the proxy any.
    let odd = seen.iter().filter(|port| *port % 2 == 1);
    assert_eq!(odd.count(), 0, "of {}", seen.len());
    scene.stop();
}

#[test]
fn further_loopback_addresses_have_further_ports() {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.host, Protocol::Tcp, BACKEND_PORT).unwrap();
    let setting = scene::Scene::tcp().silent();
    let to_loopback = [format!("{PORT}:127.0.0.1:{BACKEND_PORT}")];
    has_further_ports(setting.publishing(&to_loopback), topology, Protocol::Tcp, 2);
}

#[test]
fn ports_of_connections_that_clients_have_closed_are_had_again_at_once() {
    let topology = Topology::new().unwrap();
    topology
        .host
        .set("ipv4/ip_local_port_range", PORTS)
        .unwrap();
    let scene = scene::Scene::tcp().by(Datapath::Userland);
    let scene = scene.start_in(topology);
    for number in 0..3 * CONNECTIONS {
        let mut connection = scene.connect();
        let asked = connection.ask("hello");
        asked.unwrap_or_else(|error| panic!("{number}: {error:#}\n{}", scene.daemon.said()));
        connection.close().unwrap();
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|number| number.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
    if version < (6, 3) {
        return scene.stop(); // such a kernel cannot be told which port to choose
    }
    // And nobody on this host wants for ports towards somebody else.
    let Topology { host, client, .. } = &scene.topology;
    let _other = Backend::start(client, Protocol::Tcp, BACKEND_PORT).unwrap();
    let other = SocketAddr::new(scene.topology.client_address(Family::V4), BACKEND_PORT);
    for _ in 0..3 {
        ask(host, Protocol::Tcp, other, "of somebody else").unwrap();
    }
    scene.stop();
}
