//! Containers that have addresses of both families on Docker's bridge: each family is served by itself, and the container sees
//! who asks.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use forwarder_tests::{
    topology::{Family, Topology},
    traffic::ask,
};
use serde_json::json;

use super::{BOTH, Engine, PORT, Programs, Scene};

/// Of the bridge, as `fixed-cidr-v6` has it.
const NETWORK: &str = "fd00:31:7::/64";
const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x31, 7, 0, 0, 0, 0, 1);

fn serves_both_families(scene: Scene) {
    let (container, _backends) = scene.run("web");
    scene.wait_for_list("all of it on the fast path", |rows| {
        rows.len() == 4 && rows.iter().all(|row| row.datapath == "ebpf")
    });
    scene.serves_the_lan("by IPv4");
    let client = &scene.topology.client;
    let lan = SocketAddr::new(scene.topology.host_address(Family::V6), PORT);
    let forwarded = || scene.daemon.counted("forwarded_original").unwrap();
    for protocol in BOTH {
        let before = forwarded();
        let answer = ask(client, protocol, lan, "by IPv6").unwrap();
        let address = scene.topology.client_address(Family::V6);
        assert_eq!(answer.seen, SocketAddr::new(address, answer.local_port));
        assert!(forwarded() > before, "{}", scene.shown());
        for (who, host) in [
            (scene.host(), IpAddr::from(Ipv6Addr::LOCALHOST)),
            (scene.host(), lan.ip()),
            (&container, GATEWAY.into()),
            (&container, lan.ip()),
        ] {
            let answer = ask(who, protocol, SocketAddr::new(host, PORT), "hello");
            answer.unwrap_or_else(|error| panic!("{} to {host}: {error:#}", who.label()));
        }
    }
    scene.engine.docker(&["rm", "-f", "web"]).unwrap();
    scene.wait_for_list("its end", |rows| rows.is_empty());
    scene.stop();
}

#[test]
fn the_drop_in_serves_both_families() {
    let topology = Topology::new().unwrap();
    let config = json!({"ipv6": true, "fixed-cidr-v6": NETWORK});
    let host = Programs::from(&topology.host);
    serves_both_families(Scene::served_with(topology, host, config));
}

#[test]
fn the_watcher_serves_both_families() {
    let topology = Topology::new().unwrap();
    let config = json!({"userland-proxy": false, "ipv6": true, "fixed-cidr-v6": NETWORK});
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start_with(&topology.host, folder, config, None).unwrap();
    serves_both_families(Scene::followed(topology, engine, &[]));
}
