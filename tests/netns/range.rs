//! Wide ranges: one socket in each family holds all of their ports, for clients, for other processes and for the
//! proxy.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
};

use forwarder_tests::{
    daemon::{Daemon, Datapath, run_to_failure},
    deadline::wait_for,
    link,
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Protocol, ask},
};

use crate::scene::{BACKEND_PORT, on_the_fast_path, suffix};

const FIRST: u16 = 10_000;
const LAST: u16 = 59_999;
const SOME: [u16; 4] = [FIRST, FIRST + 1, 33_333, LAST];

/// 50,000 ports, all of them to one of the backend.
fn range(topology: &Topology, protocol: Protocol) -> String {
    let backend = SocketAddr::new(topology.backend.address(Family::V4), BACKEND_PORT);
    format!("{FIRST}-{LAST}:{backend}{}", suffix(protocol))
}

fn start(topology: &Topology, protocol: Protocol) -> Daemon {
    Daemon::start(
        &topology.host,
        &[&range(topology, protocol)],
        Datapath::Ebpf,
    )
    .unwrap()
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
fn served(topology: &Topology, protocol: Protocol, client: &Netns, host: IpAddr) {
    for port in SOME {
        let frontend = SocketAddr::new(host, port);
        let payload = format!("to {frontend}");
        let answer = ask(client, protocol, frontend, &payload)
            .unwrap_or_else(|error| panic!("{frontend} from {}: {error:#}", client.label()));
        assert_eq!(answer.payload, payload);
    }
    assert!(sockets(&topology.host) < 12, "a socket for each port");
}

fn in_the_kernel(protocol: Protocol) {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, protocol, BACKEND_PORT).unwrap();
    let daemon = start(&topology, protocol);
    let lan = topology.host_address(Family::V4);
    on_the_fast_path(&daemon, || {
        served(&topology, protocol, &topology.client, lan)
    });
    on_the_fast_path(&daemon, || {
        served(
            &topology,
            protocol,
            &topology.host,
            Ipv4Addr::LOCALHOST.into(),
        );
    });
    daemon.stop().unwrap();
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
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, protocol, BACKEND_PORT).unwrap();
    let daemon = start(&topology, protocol);
    served(
        &topology,
        protocol,
        &topology.client,
        topology.host_address(Family::V6),
    );
    assert!(
        daemon.counted("other_family").unwrap() > 0,
        "not by the proxy"
    );
    daemon.stop().unwrap();
}

#[test]
fn every_port_of_a_tcp_range_reaches_the_proxy() {
    by_the_proxy(Protocol::Tcp);
}

#[test]
fn every_port_of_a_udp_range_reaches_the_proxy_and_answers() {
    by_the_proxy(Protocol::Udp);
}

#[test]
fn no_other_process_gets_a_port_of_the_range_until_it_is_free() {
    let topology = Topology::new().unwrap();
    let daemon = start(&topology, Protocol::Tcp);
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
    daemon.stop().unwrap();
}

#[test]
fn no_other_process_gets_an_ipv4_port_of_the_range_by_an_ipv6_socket() {
    let topology = Topology::new().unwrap();
    let spec = format!("0.0.0.0:{}", range(&topology, Protocol::Tcp));
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    let listen = |address: &str| {
        let at = (address.parse::<IpAddr>().unwrap(), SOME[2]);
        topology.host.enter(|| TcpListener::bind(at))
    };
    let error = listen("::ffff:127.0.0.1").expect_err("the port is published");
    let refused = [ErrorKind::AddrInUse, ErrorKind::PermissionDenied];
    assert!(refused.contains(&error.kind()), "{error}");
    listen("::1").expect("IPv6 has its own ports");
    daemon.stop().unwrap();
}

#[test]
fn a_port_of_the_range_that_somebody_has_is_an_error_that_names_it() {
    let topology = Topology::new().unwrap();
    let taken = topology
        .host
        .enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 33_333)))
        .unwrap();
    let spec = range(&topology, Protocol::Tcp);
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
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Udp, BACKEND_PORT).unwrap();
    let daemon = start(&topology, Protocol::Udp);
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
            (said_of(&daemon, program) == 1).then_some(())
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
    daemon.stop().unwrap();
}
