//! Both paths mean the same: what the one does for a client, the other does, or the publish belongs to one of them.

use std::{
    io::Read as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
};

use forwarder_tests::{
    daemon::{Daemon, Datapath, run_to_failure},
    deadline::patience,
    netns::Netns,
    topology::{
        Family::{self, V4, V6},
        Topology,
    },
    traffic::{Backend, Protocol, ask, ask_by},
};

use crate::scene::{BACKEND_PORT, PORT, on_the_fast_path, packets, spec, suffix};

fn frontend(topology: &Topology, family: Family) -> SocketAddr {
    SocketAddr::new(topology.host_address(family), PORT)
}

/// Connects, ends, and returns what the backend got.
fn got_by_the_backend(client: &Netns, frontend: SocketAddr, listener: &TcpListener) -> Vec<u8> {
    let stream = client.enter(|| TcpStream::connect_timeout(&frontend, patience()));
    drop(stream.unwrap());
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(patience())).unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    got
}

#[test]
fn the_proxy_protocol_names_clients_of_both_families() {
    let topology = Topology::new().unwrap();
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, BACKEND_PORT));
    let listener = topology.backend.netns.enter(|| TcpListener::bind(any));
    let listener = listener.unwrap();
    let tcp = spec(&topology.backend, V4, Protocol::Tcp);
    let flags = ["--proxy-protocol"];
    let daemon = Daemon::start_with(&topology.host, &[&tcp], Datapath::Auto, &flags).unwrap();
    let entry = daemon.entry().unwrap();
    assert_eq!(entry["datapath"], "userland", "{entry}");
    let reason = entry["reason"].as_str().unwrap();
    assert!(reason.contains("PROXY protocol"), "{reason}");
    for (family, kind) in [(V4, 0x11), (V6, 0x21)] {
        let frontend = frontend(&topology, family);
        let got = got_by_the_backend(&topology.client, frontend, &listener);
        assert_eq!(&got[..12], b"\r\n\r\n\0\r\nQUIT\n", "{family:?}");
        assert_eq!(got[13], kind, "{family:?}");
        let client = match topology.client_address(family) {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        assert_eq!(got[16..16 + client.len()], client, "{family:?}");
    }
    daemon.stop().unwrap();
}

#[test]
fn the_proxy_protocol_of_tcp_leaves_udp_alone() {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Udp, BACKEND_PORT).unwrap();
    let udp = spec(&topology.backend, V4, Protocol::Udp);
    let flags = ["--proxy-protocol"];
    let daemon = Daemon::start_with(&topology.host, &[&udp], Datapath::Auto, &flags).unwrap();
    on_the_fast_path(&daemon, || {
        ask(
            &topology.client,
            Protocol::Udp,
            frontend(&topology, V4),
            "hello",
        )
        .unwrap();
    });
    // By the proxy, which the backend sees as plainly.
    let answer = ask(
        &topology.client,
        Protocol::Udp,
        frontend(&topology, V6),
        "six",
    )
    .unwrap();
    assert_eq!(answer.payload, "six");
    daemon.stop().unwrap();
}

#[test]
fn the_proxy_protocol_by_ebpf_alone_is_refused() {
    let topology = Topology::new().unwrap();
    let flags = ["--proxy-protocol", "--datapath", "ebpf"];
    let (status, errors) = run_to_failure(&topology.host, &flags).unwrap();
    assert_eq!(status.code(), Some(2));
    assert!(
        errors.contains("--proxy-protocol --datapath ebpf"),
        "{errors}"
    );
}

fn a_network_written_in_ipv6(datapath: Datapath) {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let tcp = spec(&topology.backend, V4, Protocol::Tcp);
    let allow = ["--allow", "::ffff:198.51.100.0/120"];
    let daemon = Daemon::start_with(&topology.host, &[&tcp], datapath, &allow).unwrap();
    assert_eq!(daemon.entry().unwrap()["allow"][0], "198.51.100.0/24");
    ask(
        &topology.client,
        Protocol::Tcp,
        frontend(&topology, V4),
        "hello",
    )
    .unwrap();
    let elsewhere = SocketAddr::new(topology.other.gateway(V4), PORT);
    ask(&topology.other.netns, Protocol::Tcp, elsewhere, "hello").unwrap_err();
    let name = match datapath {
        Datapath::Userland => "userland_not_allowed",
        _ => "not_allowed",
    };
    assert!(daemon.counted(name).unwrap() > 0, "{name}");
    daemon.stop().unwrap();
}

#[test]
fn an_ipv4_network_written_in_ipv6_is_let_in_by_the_fast_path() {
    a_network_written_in_ipv6(Datapath::Ebpf);
}

#[test]
fn an_ipv4_network_written_in_ipv6_is_let_in_by_the_proxy() {
    a_network_written_in_ipv6(Datapath::Userland);
}

/// Every address of the host is published, whatever the backend has.
fn clients_of_the_other_family(backend: Family, client: Family, protocol: Protocol) {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, protocol, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, backend, protocol);
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Auto).unwrap();
    let answer = ask(
        &topology.client,
        protocol,
        frontend(&topology, client),
        "hello",
    )
    .unwrap();
    assert_eq!(answer.seen.ip(), topology.backend.gateway(backend));
    let local: IpAddr = match client {
        V4 => Ipv4Addr::LOCALHOST.into(),
        V6 => Ipv6Addr::LOCALHOST.into(),
    };
    ask(
        &topology.host,
        protocol,
        SocketAddr::new(local, PORT),
        "hello",
    )
    .unwrap();
    on_the_fast_path(&daemon, || {
        ask(
            &topology.client,
            protocol,
            frontend(&topology, backend),
            "hello",
        )
        .unwrap();
    });
    daemon.stop().unwrap();
}

#[test]
fn tcp_clients_of_ipv4_reach_a_backend_that_has_ipv6_alone() {
    clients_of_the_other_family(V6, V4, Protocol::Tcp);
}

#[test]
fn udp_clients_of_ipv4_reach_a_backend_that_has_ipv6_alone() {
    clients_of_the_other_family(V6, V4, Protocol::Udp);
}

#[test]
fn tcp_clients_of_ipv6_reach_a_backend_that_has_ipv4_alone() {
    clients_of_the_other_family(V4, V6, Protocol::Tcp);
}

#[test]
fn udp_clients_of_ipv6_reach_a_backend_that_has_ipv4_alone() {
    clients_of_the_other_family(V4, V6, Protocol::Udp);
}

/// A UDP publish that drains while another takes its port. Clients by either path.
fn a_drain_beside_a_new_publish(datapath: Datapath) {
    let topology = Topology::new().unwrap();
    let containers = [&topology.backend, &topology.peer];
    let backends = containers
        .map(|container| Backend::start(&container.netns, Protocol::Udp, BACKEND_PORT).unwrap());
    let specs = containers.map(|container| spec(container, V4, Protocol::Udp));
    let daemon = Daemon::start(&topology.host, &[&specs[0]], datapath).unwrap();
    let socket = |any: IpAddr| topology.client.enter(|| UdpSocket::bind((any, 0))).unwrap();
    // IPv6 clients of an IPv4 backend are the proxy's in any case.
    let old = [
        (
            socket(Ipv6Addr::UNSPECIFIED.into()),
            frontend(&topology, V6),
        ),
        (
            socket(Ipv4Addr::UNSPECIFIED.into()),
            frontend(&topology, V4),
        ),
    ];
    let old = match datapath {
        Datapath::Userland => &old[..],
        _ => &old[..1], // a new publish cuts what drains by the fast path
    };
    for (socket, frontend) in old {
        ask_by(socket, *frontend, "before").unwrap();
    }
    daemon
        .control(&["unpublish", &specs[0], "--drain"])
        .unwrap();
    for (socket, frontend) in old {
        ask_by(socket, *frontend, "while it drains").unwrap();
    }
    let before = backends[0].requests();
    let stranger = (
        socket(Ipv6Addr::UNSPECIFIED.into()),
        frontend(&topology, V6),
    );
    stranger.0.connect(stranger.1).unwrap();
    stranger.0.send(b"to nobody").unwrap();
    stranger.0.set_read_timeout(Some(patience())).unwrap();
    let refused = stranger.0.recv(&mut [0]).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);

    daemon.control(&["publish", &specs[1]]).unwrap();
    for family in [V4, V6] {
        let frontend = frontend(&topology, family);
        ask(&topology.client, Protocol::Udp, frontend, "new").unwrap();
    }
    assert_eq!(
        backends[0].requests(),
        before,
        "the old one has a new client"
    );
    let new = backends[1].requests();
    for (socket, frontend) in old {
        ask_by(socket, *frontend, "beside the new one").unwrap();
    }
    assert_eq!(backends[1].requests(), new, "the new one has an old client");
    daemon.stop().unwrap();
}

#[test]
fn a_udp_publish_drains_in_user_space_beside_a_new_one() {
    a_drain_beside_a_new_publish(Datapath::Userland);
}

#[test]
fn clients_of_the_proxy_drain_beside_the_fast_path_too() {
    a_drain_beside_a_new_publish(Datapath::Ebpf);
}

#[test]
fn a_port_of_a_wide_range_drains_beside_a_new_publish() {
    let topology = Topology::new().unwrap();
    let containers = [&topology.backend, &topology.peer];
    let backends = containers
        .map(|container| Backend::start(&container.netns, Protocol::Udp, BACKEND_PORT).unwrap());
    let specs = containers.map(|container| {
        let backend = SocketAddr::new(container.address(V4), BACKEND_PORT);
        format!("7000-7999:{backend}/udp")
    });
    let daemon = Daemon::start(&topology.host, &[&specs[0]], Datapath::Ebpf).unwrap();
    // IPv6 clients of an IPv4 backend are the proxy's.
    let client = || {
        let socket = topology
            .client
            .enter(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)));
        socket.unwrap()
    };
    let (first, inner) = (client(), client());
    let frontend = |port| SocketAddr::new(topology.host_address(V6), port);
    for (socket, port) in [(&first, 7000), (&inner, 7500)] {
        ask_by(socket, frontend(port), "before").unwrap();
    }
    daemon
        .control(&["unpublish", &specs[0], "--drain"])
        .unwrap();
    daemon.control(&["publish", &specs[1]]).unwrap();
    for (socket, port) in [(&first, 7000), (&inner, 7500)] {
        let old = ask_by(socket, frontend(port), "beside").unwrap();
        let new = ask_by(&client(), frontend(port), "new").unwrap();
        assert_eq!((old.payload, new.payload), ("beside".into(), "new".into()));
    }
    assert_eq!(backends.each_ref().map(Backend::requests), [4, 2]);
    daemon.stop().unwrap();
}

/// Link-local addresses on both sides, by the devices that they are on.
fn link_local(protocol: Protocol) {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, protocol, BACKEND_PORT).unwrap();
    // Those that each device gives itself are not yet to be used.
    let container = &topology.backend.netns;
    for (netns, address, device) in [
        (&topology.host, "fe80::77", "eth0"),
        (&topology.host, "fe80::78", "br0"),
        (&topology.client, "fe80::79", "eth0"),
        (container, "fe80::88", "eth0"),
    ] {
        let command = format!("addr add {address}/64 dev {device} nodad");
        netns.ip(&command).unwrap();
    }
    let suffix = suffix(protocol);
    let spec = format!("[fe80::77%eth0]:{PORT}:[fe80::88%br0]:{BACKEND_PORT}{suffix}");
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Auto).unwrap();
    let entry = daemon.entry().unwrap();
    let reason = entry["reason"].as_str().unwrap();
    assert!(reason.contains("link-local"), "{reason}");
    topology.client.enter(|| {
        let scope = nix::net::if_::if_nametoindex("eth0").unwrap();
        let frontend = std::net::SocketAddrV6::new("fe80::77".parse().unwrap(), PORT, 0, scope);
        let answer = ask(&topology.client, protocol, frontend.into(), "hello").unwrap();
        assert_eq!(answer.payload, "hello");
    });
    let other = SocketAddr::new(topology.host_address(V6), PORT);
    if protocol == Protocol::Tcp {
        ask(&topology.client, protocol, other, "hello").unwrap_err();
    }
    daemon.control(&["unpublish", &spec]).unwrap();
    daemon.stop().unwrap();
}

#[test]
fn tcp_between_link_local_addresses() {
    link_local(Protocol::Tcp);
}

#[test]
fn udp_between_link_local_addresses() {
    link_local(Protocol::Udp);
}

#[test]
fn a_device_that_is_none_is_said() {
    let topology = Topology::new().unwrap();
    let flags = ["-p", "[fe80::77%eth9]:80:172.31.0.2:80"];
    let (status, errors) = run_to_failure(&topology.host, &flags).unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(errors.contains("there is no device eth9"), "{errors}");
}

/// Datagrams to all hosts of the network are answered by the host's own address there.
fn broadcast(datapath: Datapath) {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Udp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, V4, Protocol::Udp);
    let daemon = Daemon::start(&topology.host, &[&spec], datapath).unwrap();
    let before = (datapath == Datapath::Ebpf).then(|| packets(&daemon));
    // What answers is another machine than the destination names.
    let socket = topology
        .client
        .enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)));
    let socket = socket.unwrap();
    socket.set_broadcast(true).unwrap();
    socket.set_read_timeout(Some(patience())).unwrap();
    topology
        .client
        .ip("route add 255.255.255.255/32 dev eth0")
        .unwrap();
    for everybody in ["198.51.100.255", "255.255.255.255"] {
        let everybody: IpAddr = everybody.parse().unwrap();
        socket.send_to(b"who is there?", (everybody, PORT)).unwrap();
        let mut buffer = [0; 100];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(from, frontend(&topology, V4), "to {everybody}");
        assert!(buffer[..length].ends_with(b" who is there?"));
    }
    assert_eq!(before, before.map(|_| packets(&daemon)), "by the proxy");
    daemon.stop().unwrap();
}

#[test]
fn a_broadcast_is_answered_by_the_hosts_own_address_in_user_space() {
    broadcast(Datapath::Userland);
}

#[test]
fn a_broadcast_is_answered_by_the_hosts_own_address_beside_the_fast_path() {
    broadcast(Datapath::Ebpf);
}
