//! Limits that somebody has set on a container's link: what the fast path delivers keeps to them.

use std::{
    io::{Read, Write},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use forwarder_tests::{
    daemon::doctor,
    deadline::patience,
    document::Delivery,
    topology::{Family::V4, Topology},
    traffic::Protocol::Tcp,
};

use crate::scene::{
    BACKEND_PORT, PORT, Scene, backend, on_the_fast_path, wait_for_delivery_by, wait_for_peer,
};

const SIZE: usize = 2 << 20;

/// How long a client takes to send `SIZE` bytes to the backend.
fn upload(topology: &Topology) -> Duration {
    let backend = &topology.backend.netns;
    let listener = backend
        .enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, BACKEND_PORT)))
        .unwrap();
    let received = std::thread::spawn(move || {
        let mut got = Vec::new();
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_to_end(&mut got).unwrap();
        got.len()
    });
    let frontend = SocketAddr::new(topology.host_address(V4), PORT);
    let begun = Instant::now();
    let mut stream = topology
        .client
        .enter(|| TcpStream::connect_timeout(&frontend, patience()))
        .unwrap();
    stream.write_all(&vec![0; SIZE]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(received.join().unwrap(), SIZE);
    begun.elapsed()
}

/// 8 Mbit/s towards the container.
fn limit(topology: &Topology) {
    let veth = &topology.backend.veth;
    topology
        .host
        .run(&format!(
            "tc qdisc add dev {veth} root tbf rate 8mbit burst 16kb latency 200ms"
        ))
        .unwrap();
}

#[test]
fn a_rate_limit_on_a_containers_link_is_met() {
    let scene = Scene::tcp().silent().start();
    let (topology, daemon) = scene.parts();
    let veth = &topology.backend.veth;
    let shaping = || doctor(&topology.host, &[]).unwrap()["shaping"].clone();
    assert_eq!(shaping().found, "no limits by qdiscs");
    on_the_fast_path(daemon, || {
        let _backend = backend(&topology.backend, Tcp);
        scene.served("hello");
    });
    wait_for_peer(daemon);
    limit(topology);
    wait_for_delivery_by(daemon, Delivery::Device);
    on_the_fast_path(daemon, || {
        let took = upload(topology);
        // 2.1 s without what the queue holds at the beginning.
        assert!(took > Duration::from_millis(1500), "{took:?}");
    });
    let found = shaping();
    assert_eq!(found.found, format!("limits are met on {veth} (tbf)"));
    let gone = format!("tc qdisc del dev {veth} root");
    topology.host.run(&gone).unwrap();
    wait_for_peer(daemon);
    scene.stop();
}
