//! Who connects x protocol x family x datapath: each row asserts the payload, the source that the
//! backend saw, and which path carried it.

use std::net::{IpAddr, SocketAddr};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    netns::Netns,
    topology::{Container, Family, Topology},
    traffic::{Backend, Protocol, ask},
};

use crate::scene::{BACKEND_PORT, PORT, Scene, frontend, on_the_fast_path, spec, wait_for_peer};

/// Who connects, to which address of the host, and to whom that leads.
#[derive(Debug, Clone, Copy)]
enum Client {
    /// Another machine.
    External,
    /// A process on the host, to 127.0.0.1 or ::1.
    Localhost,
    /// A process on the host, to its own LAN address.
    HostLocal,
    /// A process on the host, to its address on the backend's bridge.
    HostGateway,
    /// A container on the backend's bridge, to the LAN address.
    HairpinSameBridge,
    /// The same, to its gateway.
    HairpinGateway,
    /// A container on another bridge.
    HairpinOtherBridge,
    /// A container without a bridge.
    HairpinFromRouted,
    /// The backend itself.
    SelfHairpin,
    /// As above, with a backend that has a routed veth and no bridge.
    ExternalToRouted,
    LocalhostToRouted,
    HostLocalToRouted,
    HairpinToRouted,
    SelfHairpinRouted,
}

/// A client as it is in one topology and family.
struct Case<'a> {
    from: &'a Netns,
    connects_to: IpAddr,
    backend: &'a Container,
    /// What the fast path must show the backend as the source.
    seen: IpAddr,
    /// Whether the port is the client's own as well.
    own_port: bool,
}

impl Client {
    fn case(self, topology: &Topology, family: Family) -> Case<'_> {
        let Topology {
            host,
            client,
            backend,
            peer,
            other,
            ptp,
            ..
        } = topology;
        let lan = topology.host_address(family);
        let localhost = match family {
            Family::V4 => IpAddr::from([127, 0, 0, 1]),
            Family::V6 => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
        };
        let gateway = backend.gateway(family);
        let (from, connects_to, backend, seen) = match self {
            Self::External => (client, lan, backend, topology.client_address(family)),
            Self::Localhost => (host, localhost, backend, gateway),
            Self::HostLocal => (host, lan, backend, lan),
            Self::HostGateway => (host, gateway, backend, gateway),
            Self::HairpinSameBridge => (&peer.netns, lan, backend, peer.address(family)),
            Self::HairpinGateway => (&peer.netns, gateway, backend, peer.address(family)),
            Self::HairpinOtherBridge => (&other.netns, lan, backend, other.address(family)),
            Self::HairpinFromRouted => (&ptp.netns, lan, backend, ptp.address(family)),
            Self::SelfHairpin => (&backend.netns, lan, backend, gateway),
            Self::ExternalToRouted => (client, lan, ptp, topology.client_address(family)),
            Self::LocalhostToRouted => (host, localhost, ptp, ptp.gateway(family)),
            Self::HostLocalToRouted => (host, lan, ptp, lan),
            Self::HairpinToRouted => (&backend.netns, lan, ptp, backend.address(family)),
            Self::SelfHairpinRouted => (&ptp.netns, lan, ptp, ptp.gateway(family)),
        };
        let own_port = matches!(
            self,
            Self::External
                | Self::HairpinSameBridge
                | Self::HairpinGateway
                | Self::HairpinOtherBridge
                | Self::HairpinFromRouted
                | Self::ExternalToRouted
                | Self::HairpinToRouted
        );
        Case {
            from,
            connects_to,
            backend,
            seen,
            own_port,
        }
    }
}

fn row(client: Client, protocol: Protocol, family: Family, datapath: Datapath) {
    let topology = Topology::new().unwrap();
    let case = client.case(&topology, family);
    let _backend = Backend::start(&case.backend.netns, protocol, BACKEND_PORT).unwrap();
    let spec = spec(case.backend, family, protocol);
    let daemon = Daemon::start(&topology.host, &[&spec], datapath).unwrap();
    assert_eq!(
        daemon.entry().unwrap().datapath,
        datapath.name(),
        "{}",
        daemon.said()
    );

    if datapath == Datapath::Ebpf {
        // The first client finds a neighbour that the kernel has not resolved, the second one the
        // direct way; both are served, and by the fast path.
        on_the_fast_path(&daemon, || case.ask(&daemon, protocol));
        wait_for_peer(&daemon);
        on_the_fast_path(&daemon, || case.ask(&daemon, protocol));
        topology.host.forwards(false).unwrap(); // as little as it takes
        on_the_fast_path(&daemon, || case.ask(&daemon, protocol));
    } else {
        let proxied = Case {
            seen: case.backend.gateway(family),
            own_port: false,
            ..case
        };
        proxied.ask(&daemon, protocol);
    }
    daemon.stop().unwrap();
}

impl Case<'_> {
    /// Asserts payload and source of one request.
    #[track_caller]
    fn ask(&self, daemon: &Daemon, protocol: Protocol) {
        let frontend = SocketAddr::new(self.connects_to, PORT);
        let context = || format!("{:?}\n{}", daemon.list(), daemon.said());
        let answer = ask(self.from, protocol, frontend, "hello")
            .unwrap_or_else(|error| panic!("{error:#}\n{}", context()));
        assert_eq!(answer.payload, "hello");
        assert_eq!(
            answer.seen.ip(),
            self.seen,
            "source that the backend saw\n{}",
            context()
        );
        if self.own_port {
            assert_eq!(
                answer.seen.port(),
                answer.local_port,
                "client's port\n{}",
                context()
            );
        }
    }
}

/// Each `name: Client` becomes eight tests, `name::tcp_v4_ebpf` and so on.
macro_rules! matrix {
    ($($name:ident: $client:ident,)*) => {
        $(mod $name {
            use super::{Client::$client, Datapath::*, Family::*, Protocol::*, row};

            #[test] fn tcp_v4_ebpf() { row($client, Tcp, V4, Ebpf); }
            #[test] fn tcp_v6_ebpf() { row($client, Tcp, V6, Ebpf); }
            #[test] fn udp_v4_ebpf() { row($client, Udp, V4, Ebpf); }
            #[test] fn udp_v6_ebpf() { row($client, Udp, V6, Ebpf); }
            #[test] fn tcp_v4_userland() { row($client, Tcp, V4, Userland); }
            #[test] fn tcp_v6_userland() { row($client, Tcp, V6, Userland); }
            #[test] fn udp_v4_userland() { row($client, Udp, V4, Userland); }
            #[test] fn udp_v6_userland() { row($client, Udp, V6, Userland); }
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
    self_hairpin: SelfHairpin,
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
