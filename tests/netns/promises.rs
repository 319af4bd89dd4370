//! What must not be reachable, and by whom.

use std::net::{IpAddr, SocketAddr};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    topology::{Family, Topology},
    traffic::{Backend, Protocol, ask, send_datagram},
};

use crate::scene::{BACKEND_PORT, PORT, on_the_fast_path, served_to_the_client, spec};

const LOCALHOST: [u8; 4] = [127, 0, 0, 1];

#[test]
fn transit_traffic_is_not_captured() {
    let topology = Topology::new().unwrap();
    let backend = Backend::start(&topology.backend.netns, Protocol::Udp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Udp);
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    let elsewhere = IpAddr::from([203, 0, 113, 5]);
    let host = topology.host_address(Family::V4);
    topology
        .client
        .ip(&format!("route add {elsewhere}/32 via {host}"))
        .unwrap();

    // The second one travels behind the first, so once it is answered the first has had its turn.
    send_datagram(
        &topology.client,
        SocketAddr::new(elsewhere, PORT),
        "transit",
    )
    .unwrap();
    served_to_the_client(&topology, Protocol::Udp, "ours");
    assert_eq!(
        backend.requests(),
        1,
        "the datagram to {elsewhere} reached the backend"
    );
    daemon.stop().unwrap();
}

#[test]
fn a_specific_address_does_not_open_the_others() {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let host = topology.host_address(Family::V4);
    let backend = SocketAddr::new(topology.backend.address(Family::V4), BACKEND_PORT);
    let spec = format!("{host}:{PORT}:{backend}");
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    on_the_fast_path(&daemon, || {
        served_to_the_client(&topology, Protocol::Tcp, "hello")
    });

    let gateway = SocketAddr::new(topology.backend.gateway(Family::V4), PORT);
    assert!(ask(&topology.peer.netns, Protocol::Tcp, gateway, "hello").is_err());
    let localhost = SocketAddr::from((LOCALHOST, PORT));
    assert!(ask(&topology.host, Protocol::Tcp, localhost, "hello").is_err());
    daemon.stop().unwrap();
}

#[test]
fn a_port_on_localhost_is_not_open_to_others() {
    let topology = Topology::new().unwrap();
    let backend = Backend::start(&topology.backend.netns, Protocol::Udp, BACKEND_PORT).unwrap();
    let address = SocketAddr::new(topology.backend.address(Family::V4), BACKEND_PORT);
    let local = format!("127.0.0.1:{PORT}:{address}/udp");
    let open = format!("{}:{address}/udp", PORT + 1);
    let daemon = Daemon::start(&topology.host, &[&local, &open], Datapath::Ebpf).unwrap();
    // A neighbour that wants in routes 127.0.0.1 through the host. Both settings are the client's.
    topology.client.enter(|| {
        std::fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1").unwrap();
    });
    let host = topology.host_address(Family::V4);
    let client = topology.client_address(Family::V4);
    topology
        .client
        .ip(&format!(
            "route del local 127.0.0.1 table local\n\
             route add 127.0.0.1/32 via {host} dev eth0 src {client}\n"
        ))
        .unwrap();

    send_datagram(
        &topology.client,
        SocketAddr::from((LOCALHOST, PORT)),
        "intruder",
    )
    .unwrap();
    let frontend = SocketAddr::new(host, PORT + 1);
    let answer = ask(&topology.client, Protocol::Udp, frontend, "hello").unwrap();
    assert_eq!(answer.payload, "hello");
    assert_eq!(
        backend.requests(),
        1,
        "127.0.0.1 was reached from another machine"
    );

    let localhost = SocketAddr::from((LOCALHOST, PORT));
    let answer = ask(&topology.host, Protocol::Udp, localhost, "hello").unwrap();
    assert_eq!(answer.seen.ip(), topology.backend.gateway(Family::V4));
    daemon.stop().unwrap();
}

#[test]
fn only_allowed_clients_are_served() {
    let topology = Topology::new().unwrap();
    let backend = Backend::start(&topology.backend.netns, Protocol::Udp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Udp);
    let allow = ["--allow", "198.51.100.0/24"];
    let daemon = Daemon::start_with(&topology.host, &[&spec], Datapath::Ebpf, &allow).unwrap();
    let gateway = SocketAddr::new(topology.other.gateway(Family::V4), PORT);
    send_datagram(&topology.other.netns, gateway, "not allowed").unwrap();
    on_the_fast_path(&daemon, || {
        served_to_the_client(&topology, Protocol::Udp, "hello")
    });
    assert_eq!(
        backend.requests(),
        1,
        "a client that is not allowed reached the backend"
    );
    daemon.stop().unwrap();
}

#[test]
fn a_backends_own_address_is_not_reached_through_the_host() {
    let topology = Topology::new().unwrap();
    topology.host.forwards(false).unwrap();
    let backend = Backend::start(&topology.backend.netns, Protocol::Udp, BACKEND_PORT).unwrap();
    let address = SocketAddr::new(topology.backend.address(Family::V4), BACKEND_PORT);
    let same_port = format!("{BACKEND_PORT}:{address}/udp");
    let specs = [
        &*same_port,
        &spec(&topology.backend, Family::V4, Protocol::Udp),
    ];
    let daemon = Daemon::start(&topology.host, &specs, Datapath::Ebpf).unwrap();
    let host = topology.host_address(Family::V4);
    let route = format!("route add {}/32 via {host}", address.ip());
    topology.client.ip(&route).unwrap();

    send_datagram(&topology.client, address, "direct").unwrap();
    served_to_the_client(&topology, Protocol::Udp, "through the port");
    assert_eq!(backend.requests(), 1, "{address} was reached");
    daemon.stop().unwrap();
}

#[test]
fn only_published_ports_open() {
    let topology = Topology::new().unwrap();
    let ports = [BACKEND_PORT, BACKEND_PORT + 1, PORT + 1];
    let backends = ports.map(|port| Backend::start(&topology.backend.netns, Protocol::Tcp, port));
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    on_the_fast_path(&daemon, || {
        served_to_the_client(&topology, Protocol::Tcp, "hello")
    });
    let host = topology.host_address(Family::V4);
    for port in ports {
        let closed = SocketAddr::new(host, port);
        assert!(ask(&topology.client, Protocol::Tcp, closed, "hello").is_err());
    }
    drop(backends);
    daemon.stop().unwrap();
}

#[test]
fn nothing_opens_when_the_daemon_dies() {
    let topology = Topology::new().unwrap();
    let backend = Backend::start(&topology.backend.netns, Protocol::Udp, BACKEND_PORT).unwrap();
    let address = SocketAddr::new(topology.backend.address(Family::V4), BACKEND_PORT);
    let specs = [
        format!("{PORT}:{address}/udp"),
        format!("127.0.0.1:{}:{address}/udp", PORT + 1),
    ];
    let specs = specs.each_ref().map(String::as_str);
    let allow = ["--allow", "198.51.100.0/24"];
    let mut daemon = Daemon::start_with(&topology.host, &specs, Datapath::Ebpf, &allow).unwrap();
    served_to_the_client(&topology, Protocol::Udp, "before");
    daemon.kill().unwrap();

    let before = backend.requests();
    let host = topology.host_address(Family::V4);
    let not_allowed = SocketAddr::new(topology.other.gateway(Family::V4), PORT);
    send_datagram(&topology.other.netns, not_allowed, "not allowed").unwrap();
    for port in [PORT + 1, PORT + 2, BACKEND_PORT] {
        send_datagram(&topology.client, SocketAddr::new(host, port), "closed").unwrap();
    }
    served_to_the_client(&topology, Protocol::Udp, "after");
    assert_eq!(backend.requests(), before + 1);
}
