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

use crate::scene::{
    BACKEND_PORT, PORT, Scene, backend, frontend, on_the_fast_path, packets, spec, suffix,
};

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
    let scene = Scene::tcp().silent().auto();
    let scene = scene.flags(&["--proxy-protocol"]).start();
    let (topology, daemon) = scene.parts();
    let any = (Ipv4Addr::UNSPECIFIED, BACKEND_PORT);
    let listener = topology.backend.netns.enter(|| TcpListener::bind(any));
    let listener = listener.unwrap();
    let entry = daemon.entry().unwrap();
    assert_eq!(entry.datapath, "userland", "{entry:?}");
    let reason = entry.reason();
    assert!(reason.contains("PROXY protocol"), "{reason}");
    for (family, kind) in [(V4, 0x11), (V6, 0x21)] {
        let frontend = frontend(topology, family);
        let got = got_by_the_backend(&topology.client, frontend, &listener);
        assert_eq!(&got[..12], b"\r\n\r\n\0\r\nQUIT\n", "{family:?}");
        assert_eq!(got[13], kind, "{family:?}");
        let client = match topology.client_address(family) {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        assert_eq!(got[16..16 + client.len()], client, "{family:?}");
    }
    scene.stop();
}

#[test]
fn the_proxy_protocol_of_tcp_leaves_udp_alone() {
    let scene = Scene::udp().auto().flags(&["--proxy-protocol"]).start();
    on_the_fast_path(&scene.daemon, || drop(scene.ask("hello").unwrap()));
    // By the proxy, which the backend sees as plainly.
    let topology = &scene.topology;
    let v6 = frontend(topology, V6);
    let answer = ask(&topology.client, Protocol::Udp, v6, "six").unwrap();
    assert_eq!(answer.payload, "six");
    scene.stop();
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
    let allow = ["--allow", "::ffff:198.51.100.0/120"];
    let scene = Scene::tcp().by(datapath).flags(&allow).start();
    let (topology, daemon) = scene.parts();
    assert_eq!(daemon.entry().unwrap().allow, ["198.51.100.0/24"]);
    scene.ask("hello").unwrap();
    let elsewhere = SocketAddr::new(topology.other.gateway(V4), PORT);
    ask(&topology.other.netns, Protocol::Tcp, elsewhere, "hello").unwrap_err();
    let name = match datapath {
        Datapath::Userland => "userland_not_allowed",
        _ => "not_allowed",
    };
    assert!(daemon.counted(name).unwrap() > 0, "{name}");
    scene.stop();
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
    let scene = Scene::of(backend, protocol).auto().start();
    let Topology {
        host,
        client: outside,
        backend: container,
        ..
    } = &scene.topology;
    let to = frontend(&scene.topology, client);
    let answer = ask(outside, protocol, to, "hello").unwrap();
    assert_eq!(answer.seen.ip(), container.gateway(backend));
    let local = SocketAddr::new(client.localhost(), PORT);
    ask(host, protocol, local, "hello").unwrap();
    on_the_fast_path(&scene.daemon, || drop(scene.ask("hello").unwrap()));
    scene.stop();
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
    let scene = Scene::udp().and_another().by(datapath).start();
    let (topology, daemon) = scene.parts();
    let (backends, specs) = (&scene.backends, &scene.specs);
    let client = |family: Family| {
        let any = (family.unspecified(), 0);
        let socket = topology.client.enter(|| UdpSocket::bind(any)).unwrap();
        (socket, frontend(topology, family))
    };
    // IPv6 clients of an IPv4 backend are the proxy's in any case.
    let old = [client(V6), client(V4)];
    let old = match datapath {
        Datapath::Userland => &old[..],
        _ => &old[..1], // a new publish cuts what drains by the fast path
    };
    let asked = |payload: &str| {
        for (socket, frontend) in old {
            ask_by(socket, *frontend, payload).unwrap();
        }
    };
    asked("before");
    daemon
        .control(&["unpublish", &specs[0], "--drain"])
        .unwrap();
    asked("while it drains");
    let before = backends[0].requests();
    let (stranger, to) = client(V6);
    stranger.connect(to).unwrap();
    stranger.send(b"to nobody").unwrap();
    stranger.set_read_timeout(Some(patience())).unwrap();
    let refused = stranger.recv(&mut [0]).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);

    daemon.control(&["publish", &specs[1]]).unwrap();
    for family in [V4, V6] {
        let frontend = frontend(topology, family);
        ask(&topology.client, Protocol::Udp, frontend, "new").unwrap();
    }
    let after = backends[0].requests();
    assert_eq!(after, before, "the old one has a new client");
    let new = backends[1].requests();
    asked("beside the new one");
    assert_eq!(backends[1].requests(), new, "the new one has an old client");
    scene.stop();
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
    let specs = [2, 3].map(|at| format!("7000-7999:172.31.0.{at}:{BACKEND_PORT}/udp"));
    let scene = Scene::udp().and_another().publishing(&specs[..1]).start();
    let (topology, daemon) = scene.parts();
    // IPv6 clients of an IPv4 backend are the proxy's.
    let client = || {
        let any = (Ipv6Addr::UNSPECIFIED, 0);
        topology.client.enter(|| UdpSocket::bind(any)).unwrap()
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
    let requests: Vec<_> = scene.backends.iter().map(Backend::requests).collect();
    assert_eq!(requests, [4, 2]);
    scene.stop();
}

/// Link-local addresses on both sides, by the devices that they are on.
fn link_local(protocol: Protocol) {
    let topology = Topology::new().unwrap();
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
    let scene = Scene::of(V6, protocol).publishing(&[&spec]).auto();
    let scene = scene.start_in(topology);
    let (topology, daemon) = scene.parts();
    let entry = daemon.entry().unwrap();
    let reason = entry.reason();
    assert!(reason.contains("link-local"), "{reason}");
    topology.client.enter(|| {
        let scope = nix::net::if_::if_nametoindex("eth0").unwrap();
        let frontend = std::net::SocketAddrV6::new("fe80::77".parse().unwrap(), PORT, 0, scope);
        let answer = ask(&topology.client, protocol, frontend.into(), "hello").unwrap();
        assert_eq!(answer.payload, "hello");
    });
    if protocol == Protocol::Tcp {
        scene.ask("hello").unwrap_err();
    }
    daemon.control(&["unpublish", &spec]).unwrap();
    scene.stop();
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
    let scene = Scene::udp().by(datapath).start();
    let (topology, daemon) = scene.parts();
    let before = (datapath == Datapath::Ebpf).then(|| packets(daemon));
    // What answers is another machine than the destination names.
    let Topology { client, .. } = topology;
    let socket = client.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)));
    let socket = socket.unwrap();
    socket.set_broadcast(true).unwrap();
    socket.set_read_timeout(Some(patience())).unwrap();
    client.ip("route add 255.255.255.255/32 dev eth0").unwrap();
    for everybody in ["198.51.100.255", "255.255.255.255"] {
        let everybody: IpAddr = everybody.parse().unwrap();
        socket.send_to(b"who is there?", (everybody, PORT)).unwrap();
        let mut buffer = [0; 100];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(from, scene.frontend(), "to {everybody}");
        assert!(buffer[..length].ends_with(b" who is there?"));
    }
    assert_eq!(before, before.map(|_| packets(daemon)), "by the proxy");
    scene.stop();
}

#[test]
fn a_broadcast_is_answered_by_the_hosts_own_address_in_user_space() {
    broadcast(Datapath::Userland);
}

#[test]
fn a_broadcast_is_answered_by_the_hosts_own_address_beside_the_fast_path() {
    broadcast(Datapath::Ebpf);
}

#[test]
fn every_address_of_a_local_prefix_is_served_and_answers() {
    for datapath in [Datapath::Ebpf, Datapath::Userland] {
        let topology = Topology::new().unwrap();
        let Topology { host, client, .. } = &topology;
        for (family, prefix) in [(V4, "203.0.113.0/28"), (V6, "2001:db8:203::/64")] {
            let via = topology.host_address(family);
            host.ip(&format!("route add local {prefix} dev lo"))
                .unwrap();
            client.ip(&format!("route add {prefix} via {via}")).unwrap();
        }
        for family in [V4, V6] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let _backend = backend(&topology.backend, protocol);
                let spec = spec(&topology.backend, family, protocol);
                let daemon = Daemon::start(host, &[&spec], datapath).unwrap();
                let address = match family {
                    V4 => "203.0.113.7",
                    V6 => "2001:db8:203::7",
                };
                let frontend = SocketAddr::new(address.parse().unwrap(), PORT);
                for from in [client, host] {
                    let answer = ask(from, protocol, frontend, "hello").unwrap();
                    assert_eq!(answer.payload, "hello");
                }
                daemon.stop().unwrap();
            }
        }
    }
}
