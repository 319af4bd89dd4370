//! A client that reaches a published port, and the backend itself as well, from one and the same port of its own.

use std::net::SocketAddr;

use forwarder_tests::{topology::Family, traffic::Connection};

use crate::scene::{BACKEND_PORT, PORT, Scene};

/// Another container on the backend's bridge, the published port as it sees it, and the backend itself.
fn scene() -> (Scene, [SocketAddr; 2]) {
    let scene = Scene::tcp().start();
    let topology = &scene.topology;
    let ends = [
        SocketAddr::new(topology.peer.gateway(Family::V4), PORT),
        SocketAddr::new(topology.backend.address(Family::V4), BACKEND_PORT),
    ];
    (scene, ends)
}

#[test]
fn a_live_direct_connection_and_a_forwarded_one_each_keep_their_conversation() {
    let (scene, [frontend, backend]) = scene();
    let peer = &scene.topology.peer;
    let own = SocketAddr::new(peer.address(Family::V4), 5555);
    let mut direct = Connection::open_from(&peer.netns, 5555, backend).unwrap();
    assert_eq!(direct.ask("direct").unwrap().seen, own);
    let mut forwarded = Connection::open_from(&peer.netns, 5555, frontend).unwrap();
    let seen = forwarded.ask("forwarded").unwrap().seen;
    assert_eq!(seen.ip(), own.ip());
    assert_ne!(seen.port(), own.port());
    for _ in 0..10 {
        assert_eq!(direct.ask("direct").unwrap().seen, own);
        assert_eq!(forwarded.ask("forwarded").unwrap().seen, seen);
    }
    drop(direct);
    assert_eq!(forwarded.ask("forwarded").unwrap().seen, seen);
    scene.stop();
}

#[test]
fn a_direct_connection_follows_a_forwarded_one_that_is_closed() {
    let (scene, [frontend, backend]) = scene();
    let peer = &scene.topology.peer;
    let own = SocketAddr::new(peer.address(Family::V4), 5556);
    let mut forwarded = Connection::open_from(&peer.netns, 5556, frontend).unwrap();
    assert_eq!(forwarded.ask("forwarded").unwrap().seen, own);
    forwarded.close().unwrap();
    let mut direct = Connection::open_from(&peer.netns, 5556, backend).unwrap();
    for _ in 0..10 {
        assert_eq!(direct.ask("direct").unwrap().seen, own);
    }
    scene.stop();
}
