//! Wide ranges: one socket in each family holds all of their ports, for clients, for other processes and for the
//! proxy.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
};

use forwarder_tests::{
    api,
    daemon::{Daemon, run_to_failure},
    deadline::wait_for,
    link,
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Protocol, ask, ask_by},
};

use crate::scene::{BACKEND_PORT, Scene, Setting, on_the_fast_path, suffix};

const FIRST: u16 = 10_000;
const LAST: u16 = 59_999;
const SOME: [u16; 4] = [FIRST, FIRST + 1, 33_333, LAST];

/// 50,000 ports, all of them to one of the backend.
fn range(protocol: Protocol) -> String {
    let suffix = suffix(protocol);
    format!("{FIRST}-{LAST}:172.31.0.2:{BACKEND_PORT}{suffix}")
}

fn published<'a>(protocol: Protocol) -> Setting<'a> {
    Scene::of(Family::V4, protocol).publishing(&[range(protocol)])
}

/// Sockets of a namespace, by lines of its tables.
fn sockets(netns: &Netns) -> usize {
    netns.enter(|| {
        let tables = ["tcp", "tcp6", "udp", "udp6"].iter().map(|table| {
            let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap();
            text.lines().count() - 1
        });
        tables.sum()
    })
}

#[track_caller]
fn served(scene: &Scene, protocol: Protocol, client: &Netns, host: IpAddr) {
    for port in SOME {
        let frontend = SocketAddr::new(host, port);
        let payload = format!("to {frontend}");
        let answer = ask(client, protocol, frontend, &payload)
            .unwrap_or_else(|error| panic!("{frontend} from {}: {error:#}", client.label()));
        assert_eq!(answer.payload, payload);
    }
    let sockets = sockets(&scene.topology.host);
    assert!(sockets < 12, "a socket for each port");
}

fn in_the_kernel(protocol: Protocol) {
    let scene = published(protocol).start();
    let Topology { host, client, .. } = &scene.topology;
    let lan = scene.frontend().ip();
    for (client, host) in [(client, lan), (host, Family::V4.localhost())] {
        on_the_fast_path(&scene.daemon, || served(&scene, protocol, client, host));
    }
    scene.stop();
}

#[test]
fn every_port_of_a_tcp_range_is_served_in_the_kernel() {
    in_the_kernel(Protocol::Tcp);
}

#[test]
fn every_port_of_a_udp_range_is_served_in_the_kernel() {
    in_the_kernel(Protocol::Udp);
}

/// IPv6 clients of an IPv4 backend are the proxy's, which gets them by its one socket.
fn by_the_proxy(protocol: Protocol) {
    let scene = published(protocol).start();
    let (topology, daemon) = scene.parts();
    let host = topology.host_address(Family::V6);
    served(&scene, protocol, &topology.client, host);
    let count = daemon.counted("other_family").unwrap();
    assert!(count > 0, "not by the proxy");
    scene.stop();
}

#[test]
fn every_port_of_a_tcp_range_reaches_the_proxy() {
    by_the_proxy(Protocol::Tcp);
}

#[test]
fn every_port_of_a_udp_range_reaches_the_proxy_and_answers() {
    by_the_proxy(Protocol::Udp);
}

/// Two sockets of the host, one after the other, each from the port that the other asks: what answers one is no question of the
/// other's.
#[test]
fn answers_are_not_taken_for_questions_of_a_client_with_a_port_of_the_range() {
    let (first, last) = (45_000, 45_001);
    let topology = Topology::new().unwrap();
    let range = format!("{first} {last}");
    topology
        .host
        .set("ipv4/ip_local_port_range", &range)
        .unwrap();
    let scene = published(Protocol::Udp).start_in(topology);
    let (topology, daemon) = scene.parts();
    on_the_fast_path(daemon, || {
        for (port, asked) in [(first, last), (last, first)] {
            // The kernel chooses one of the two.
            let socket = wait_for("its port", || {
                let socket = topology
                    .host
                    .enter(|| UdpSocket::bind("127.0.0.1:0"))
                    .ok()?;
                (socket.local_addr().ok()?.port() == port).then_some(socket)
            })
            .unwrap();
            let to = SocketAddr::from((Ipv4Addr::LOCALHOST, asked));
            for text in ["first", "second"] {
                assert_eq!(ask_by(&socket, to, text).unwrap().payload, text);
            }
        }
    });
    scene.stop();
}

#[test]
fn no_other_process_gets_a_port_of_the_range_until_it_is_free() {
    let scene = published(Protocol::Tcp).silent().start();
    let (topology, daemon) = scene.parts();
    let at = |port| (Ipv4Addr::UNSPECIFIED, port);
    let listen = |netns: &Netns, port| netns.enter(|| TcpListener::bind(at(port)));
    for port in SOME {
        let error = listen(&topology.host, port).expect_err("the port is published");
        let refused = [ErrorKind::AddrInUse, ErrorKind::PermissionDenied];
        assert!(refused.contains(&error.kind()), "port {port}: {error}");
        listen(&topology.client, port).expect("another network namespace has its own ports");
    }
    listen(&topology.host, LAST + 1).expect("a port beside the range");
    let udp = topology.host.enter(|| UdpSocket::bind(at(FIRST)));
    udp.expect("another protocol has its own ports");
    daemon.control(&["unpublish", "1"]).unwrap();
    listen(&topology.host, SOME[2]).expect("free again");
    scene.stop();
}

#[test]
fn no_other_process_gets_an_ipv4_port_of_the_range_by_an_ipv6_socket() {
    let spec = format!("0.0.0.0:{}", range(Protocol::Tcp));
    let scene = Scene::tcp().silent().publishing(&[spec]).start();
    let listen = |address: &str| {
        let at = (address.parse::<IpAddr>().unwrap(), SOME[2]);
        scene.topology.host.enter(|| TcpListener::bind(at))
    };
    let error = listen("::ffff:127.0.0.1").expect_err("the port is published");
    let refused = [ErrorKind::AddrInUse, ErrorKind::PermissionDenied];
    assert!(refused.contains(&error.kind()), "{error}");
    listen("::1").expect("IPv6 has its own ports");
    scene.stop();
}

#[test]
fn a_port_of_the_range_that_somebody_has_is_an_error_that_names_it() {
    let topology = Topology::new().unwrap();
    let taken = topology
        .host
        .enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 33_333)))
        .unwrap();
    let spec = range(Protocol::Tcp);
    let (status, errors) = run_to_failure(&topology.host, &["-p", &spec]).unwrap();
    assert_eq!(status.code(), Some(1));
    let holder = format!("held by pid {}", std::process::id());
    assert!(
        errors.contains("33333/tcp: address already in use") && errors.contains(&holder),
        "{errors}"
    );
    drop(taken);
}

/// The line that the log has when a program is back.
fn said_of(daemon: &Daemon, program: &str) -> usize {
    let line = format!("somebody detached our program {program}, of wide ranges");
    daemon.said().matches(&line).count()
}

#[test]
fn programs_of_ranges_that_somebody_detached_are_attached_again() {
    let scene = published(Protocol::Udp).start();
    let (topology, daemon) = scene.parts();
    let mut kinds = Vec::new();
    for link in link::held(daemon.pid()).unwrap() {
        if ["netns", "cgroup"].contains(&link.kind.as_str()) {
            link.detach().unwrap();
            kinds.push(link.kind);
        }
    }
    kinds.sort_unstable();
    assert_eq!(kinds, ["cgroup", "cgroup", "netns"]);
    for program in ["steer", "bind4", "bind6"] {
        let said = wait_for("the program is back", || {
            (said_of(daemon, program) == 1).then_some(())
        });
        said.unwrap_or_else(|error| panic!("{program}: {error:#}\n{}", daemon.said()));
    }
    // The proxy gets what comes for every port, and no other process does.
    let frontend = SocketAddr::new(topology.host_address(Family::V6), SOME[2]);
    ask(&topology.client, Protocol::Udp, frontend, "by the proxy").unwrap();
    for any in ["0.0.0.0", "::"] {
        let at = (any.parse::<IpAddr>().unwrap(), SOME[2]);
        let bound = topology.host.enter(|| UdpSocket::bind(at));
        bound.expect_err("the port is published");
    }
    scene.stop();
}

/// Others of the same owner take the place of a range, and it takes theirs; what fails leaves it as it was.
#[test]
fn a_range_and_one_of_its_ports_take_each_others_place() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let scene = Scene::of(Family::V4, protocol).idle().start();
        let (topology, daemon) = scene.parts();
        let spec =
            |ports: &str| format!("\"{ports}:172.31.0.2:{BACKEND_PORT}{}\"", suffix(protocol));
        let want = |all: &[String]| {
            let body = format!("[{}]", all.join(","));
            let answer = api::ask(daemon, "PUT", "/v1/owners/test", &body).unwrap();
            (answer.status, answer.body.to_string())
        };
        let asks = |port: u16| {
            let frontend = SocketAddr::new(topology.host_address(Family::V4), port);
            ask(&topology.client, protocol, frontend, "hello").map(|it| it.seen.ip())
        };
        let machine = topology.client_address(Family::V4);
        let (range, one) = (spec("10000-10400"), spec("10000"));
        for all in [[range.clone()], [one], [range.clone()]] {
            let (status, said) = want(&all);
            assert_eq!(status, 200, "{said}");
            assert_eq!(asks(10_000).unwrap(), machine);
        }
        let host = &topology.host;
        let taken = host.enter(|| {
            let at = (Ipv4Addr::UNSPECIFIED, 10_500);
            (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap())
        });
        let (status, said) = want(&[spec("10001"), spec("10500")]);
        assert_eq!(status, 409, "{said}");
        assert!(said.contains("10500"), "{said}");
        for port in [10_000, 10_001, 10_400] {
            assert_eq!(asks(port).unwrap(), machine);
        }
        assert!(
            !daemon.said().contains("not all undone"),
            "{}",
            daemon.said()
        );
        drop(taken);
        scene.stop();
    }
}
