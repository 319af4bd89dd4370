//! What the kernel's own tests of its NAT expect one to survive (tools/testing/selftests/net/netfilter), each named after
//! its script: the scenarios that need several machines or threads. The others are in `packet/selftests.rs`.

use std::{net::UdpSocket, thread};

use forwarder_tests::{
    deadline::patience,
    topology::{Family, Topology},
    traffic::Protocol,
};

use crate::{
    bulk,
    scene::{PORT, Scene, on_the_fast_path},
};

#[test]
fn conntrack_clash_first_datagrams_of_two_threads_all_arrive() {
    let scene = Scene::udp().start();
    let (topology, daemon) = scene.parts();
    let frontend = (topology.host_address(Family::V4), PORT);
    on_the_fast_path(daemon, || {
        topology.client.enter(|| {
            for _ in 0..50 {
                let socket = UdpSocket::bind(("0.0.0.0", 0)).unwrap();
                socket.connect(frontend).unwrap();
                socket.set_read_timeout(Some(patience())).unwrap();
                thread::scope(|scope| {
                    for _ in 0..4 {
                        scope.spawn(|| socket.send(b"first").unwrap());
                    }
                });
                for _ in 0..4 {
                    let mut answer = [0; 100];
                    let length = socket.recv(&mut answer).unwrap();
                    assert!(answer[..length].ends_with(b" first"));
                }
            }
        });
    });
    assert_eq!(scene.requests(), 200);
    scene.stop();
}

#[test]
fn nft_flowtable_bulk_passes_between_links_of_any_mtu() {
    for (family, [client, bridge, backend]) in [
        (Family::V4, [1500, 1300, 1300]),
        (Family::V6, [1280, 1500, 1500]),
        (Family::V4, [2000, 1500, 1400]),
        (Family::V6, [1400, 9000, 9000]),
    ] {
        let topology = Topology::new().unwrap();
        let veth = &topology.backend.veth;
        topology
            .host
            .ip(&format!(
                "link set eth0 mtu {client}\nlink set {veth} mtu {backend}\nlink set br0 mtu {bridge}"
            ))
            .unwrap();
        let set = |mtu: u32| format!("link set eth0 mtu {mtu}");
        topology.client.ip(&set(client)).unwrap();
        topology.backend.netns.ip(&set(backend)).unwrap();
        let scene = Scene::of(family, Protocol::Tcp).silent().start_in(topology);
        let Topology {
            client, backend, ..
        } = &scene.topology;
        on_the_fast_path(&scene.daemon, || {
            bulk::there_and_back(&backend.netns, client, scene.frontend().ip());
        });
        scene.stop();
    }
}
