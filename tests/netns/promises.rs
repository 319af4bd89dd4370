//! What must not be reachable, and by whom.

use std::net::{IpAddr, SocketAddr};

use forwarder_tests::{
    topology::{Family, Topology},
    traffic::{Backend, Protocol, ask, send_datagram},
};

use crate::scene::{BACKEND_PORT, PORT, Scene};

const LOCALHOST: [u8; 4] = [127, 0, 0, 1];

#[test]
fn transit_traffic_is_not_captured() {
    let scene = Scene::udp().start();
    let topology = &scene.topology;
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
    scene.served("ours");
    assert_eq!(scene.requests(), 1, "one was to {elsewhere}");
    scene.stop();
}

#[test]
fn a_specific_address_does_not_open_the_others() {
    let spec = format!("198.51.100.2:{PORT}:172.31.0.2:{BACKEND_PORT}");
    let scene = Scene::tcp().publishing(&[&spec]).start();
    scene.served_on_the_fast_path();

    let Topology {
        host,
        backend,
        peer,
        ..
    } = &scene.topology;
    let gateway = SocketAddr::new(backend.gateway(Family::V4), PORT);
    assert!(ask(&peer.netns, Protocol::Tcp, gateway, "hello").is_err());
    let localhost = SocketAddr::from((LOCALHOST, PORT));
    assert!(ask(host, Protocol::Tcp, localhost, "hello").is_err());
    scene.stop();
}

#[test]
fn a_port_on_localhost_is_not_open_to_others() {
    let local = format!("127.0.0.1:{PORT}:172.31.0.2:{BACKEND_PORT}/udp");
    let open = format!("{}:172.31.0.2:{BACKEND_PORT}/udp", PORT + 1);
    let scene = Scene::udp().publishing(&[&local, &open]).start();
    let topology = &scene.topology;
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
    let requests = scene.requests();
    assert_eq!(requests, 1, "127.0.0.1 was reached from another machine");

    let localhost = SocketAddr::from((LOCALHOST, PORT));
    let answer = ask(&topology.host, Protocol::Udp, localhost, "hello").unwrap();
    assert_eq!(answer.seen.ip(), topology.backend.gateway(Family::V4));
    scene.stop();
}

#[test]
fn only_allowed_clients_are_served() {
    let allow = ["--allow", "198.51.100.0/24"];
    let scene = Scene::udp().flags(&allow).start();
    let other = &scene.topology.other;
    let gateway = SocketAddr::new(other.gateway(Family::V4), PORT);
    send_datagram(&other.netns, gateway, "not allowed").unwrap();
    scene.served_on_the_fast_path();
    let requests = scene.requests();
    assert_eq!(requests, 1, "from a client that is not allowed");
    scene.stop();
}

#[test]
fn a_backends_own_address_is_not_reached_through_the_host() {
    let topology = Topology::new().unwrap();
    topology.host.forwards(false).unwrap();
    let address = SocketAddr::new(topology.backend.address(Family::V4), BACKEND_PORT);
    let specs = [BACKEND_PORT, PORT].map(|port| format!("{port}:{address}/udp"));
    let scene = Scene::udp().publishing(&specs).start_in(topology);
    let Topology { client, .. } = &scene.topology;
    let host = scene.frontend().ip();
    let route = format!("route add {}/32 via {host}", address.ip());
    client.ip(&route).unwrap();

    send_datagram(client, address, "direct").unwrap();
    scene.served("through the port");
    assert_eq!(scene.requests(), 1, "{address} was reached");
    scene.stop();
}

#[test]
fn only_published_ports_open() {
    let topology = Topology::new().unwrap();
    let ports = [BACKEND_PORT, BACKEND_PORT + 1, PORT + 1];
    let backends = ports.map(|port| Backend::start(&topology.backend.netns, Protocol::Tcp, port));
    let scene = Scene::tcp().silent().start_in(topology);
    scene.served_on_the_fast_path();
    let host = scene.topology.host_address(Family::V4);
    for port in ports {
        let closed = SocketAddr::new(host, port);
        assert!(ask(&scene.topology.client, Protocol::Tcp, closed, "hello").is_err());
    }
    drop(backends);
    scene.stop();
}

#[test]
fn nothing_opens_when_the_daemon_dies() {
    let backend = format!("172.31.0.2:{BACKEND_PORT}/udp");
    let open = format!("{PORT}:{backend}");
    let local = format!("127.0.0.1:{}:{backend}", PORT + 1);
    let allow = ["--allow", "198.51.100.0/24"];
    let scene = Scene::udp().publishing(&[&open, &local]).flags(&allow);
    let mut scene = scene.start();
    scene.served("before");
    scene.daemon.kill().unwrap();

    let before = scene.requests();
    let Topology { client, other, .. } = &scene.topology;
    let not_allowed = SocketAddr::new(other.gateway(Family::V4), PORT);
    send_datagram(&other.netns, not_allowed, "not allowed").unwrap();
    for port in [PORT + 1, PORT + 2, BACKEND_PORT] {
        let closed = SocketAddr::new(scene.frontend().ip(), port);
        send_datagram(client, closed, "closed").unwrap();
    }
    scene.served("after");
    assert_eq!(scene.requests(), before + 1);
}
