//! Who connects x protocol x family x datapath: each row asserts the payload, the source that the
//! backend saw, and which path carried it.

use std::net::SocketAddr;

use forwarder_tests::{
    clients::{Client, Kind},
    daemon::{Daemon, Datapath},
    topology::{Family, Topology},
    traffic::{Answer, Protocol, ask},
};

use crate::scene::{PORT, Scene, backend, frontend, on_the_fast_path, spec, wait_for_peer};

fn row(kind: Kind, protocol: Protocol, family: Family, datapath: Datapath) {
    let topology = Topology::new().unwrap();
    let client = kind.client(&topology, family);
    let _backend = backend(client.backend, protocol);
    let spec = spec(client.backend, family, protocol);
    let daemon = Daemon::start(&topology.host, &[&spec], datapath).unwrap();
    let entry = daemon.entry().unwrap();
    assert_eq!(entry.datapath, datapath.name(), "{}", daemon.said());

    if datapath == Datapath::Ebpf {
        let served = || {
            let answer = answer(&client, &daemon, protocol);
            if client.keeps_its_port() {
                let own = answer.local_port;
                assert_eq!(answer.seen.port(), own, "the client's own port");
            }
        };
        // The first client finds a neighbour that the kernel has not resolved, the second one the
        // direct way; both are served, and by the fast path.
        on_the_fast_path(&daemon, served);
        wait_for_peer(&daemon);
        on_the_fast_path(&daemon, served);
        topology.host.forwards(false).unwrap(); // as little as it takes
        on_the_fast_path(&daemon, served);
    } else {
        let seen = client.backend.gateway(family);
        answer(&Client { seen, ..client }, &daemon, protocol);
    }
    daemon.stop().unwrap();
}

/// Asserts payload and source of one request.
#[track_caller]
fn answer(client: &Client<'_>, daemon: &Daemon, protocol: Protocol) -> Answer {
    let frontend = SocketAddr::new(client.connects_to, PORT);
    let context = || format!("{}\n{:?}\n{}", client.what, daemon.list(), daemon.said());
    let answer = ask(client.netns, protocol, frontend, "hello")
        .unwrap_or_else(|error| panic!("{error:#}\n{}", context()));
    assert_eq!(answer.payload, "hello");
    let seen = answer.seen.ip();
    assert_eq!(
        seen,
        client.seen,
        "source that the backend saw\n{}",
        context()
    );
    answer
}

/// Each `name: Kind` becomes eight tests, `name::tcp_v4_ebpf` and so on.
macro_rules! matrix {
    ($($name:ident: $kind:ident,)*) => {
        $(mod $name {
            use super::{Kind::$kind, Datapath::*, Family::*, Protocol::*, row};

            #[test] fn tcp_v4_ebpf() { row($kind, Tcp, V4, Ebpf); }
            #[test] fn tcp_v6_ebpf() { row($kind, Tcp, V6, Ebpf); }
            #[test] fn udp_v4_ebpf() { row($kind, Udp, V4, Ebpf); }
            #[test] fn udp_v6_ebpf() { row($kind, Udp, V6, Ebpf); }
            #[test] fn tcp_v4_userland() { row($kind, Tcp, V4, Userland); }
            #[test] fn tcp_v6_userland() { row($kind, Tcp, V6, Userland); }
            #[test] fn udp_v4_userland() { row($kind, Udp, V4, Userland); }
            #[test] fn udp_v6_userland() { row($kind, Udp, V6, Userland); }
        })*
    };
}

matrix! {
    external: External,
    localhost: Localhost,
    host_local: HostLocal,
    host_gateway: HostGateway,
    hairpin_same_bridge: HairpinSameBridge,
    hairpin_gateway: HairpinGateway,
    hairpin_other_bridge: HairpinOtherBridge,
    hairpin_from_routed: HairpinFromRouted,
    hairpin_from_routed_gateway: HairpinFromRoutedGateway,
    self_hairpin: SelfHairpin,
    self_hairpin_gateway: SelfHairpinGateway,
    external_to_routed: ExternalToRouted,
    localhost_to_routed: LocalhostToRouted,
    host_local_to_routed: HostLocalToRouted,
    hairpin_to_routed: HairpinToRouted,
    self_hairpin_routed: SelfHairpinRouted,
}

#[test]
fn an_ipv6_client_reaches_an_ipv4_backend_through_the_proxy() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let scene = Scene::of(Family::V4, protocol).auto().start();
        let topology = &scene.topology;
        let frontend = frontend(topology, Family::V6);
        let answer = ask(&topology.client, protocol, frontend, "hello").unwrap();
        assert_eq!(answer.payload, "hello");
        assert_eq!(answer.seen.ip(), topology.backend.gateway(Family::V4));
        scene.stop();
    }
}
