//! What ICMP errors are for, with the kernels of all parties sending and believing them: a closed port is refused,
//! the MTU of a path is found out, and a path can be traced.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
};

use forwarder_tests::{
    clients::{Client, Kind},
    daemon::{Daemon, Datapath},
    deadline::{patience, wait_for},
    hearsay::{Heard, Listener},
    netns::Netns,
    topology::{
        Family::{self, V4, V6},
        Plan, Topology,
    },
    traffic::Protocol,
};

use crate::{
    bulk::there_and_back,
    scene::{BACKEND_PORT, PORT, Scene, on_the_fast_path, suffix, wait_for_peer},
};

const NARROW: u32 = 1300;

/// Publishes the backend's port, and waits until it is delivered to directly.
fn published(topology: Topology, family: Family, protocol: Protocol) -> Scene {
    let scene = Scene::of(family, protocol).silent().start_in(topology);
    wait_for_peer(&scene.daemon);
    scene
}

/// A machine behind two routers, of which the topology's client is the one next to the host. One of two links is
/// narrow, and neither end of the path can see it.
struct Far {
    netns: Netns,
    _router: Netns,
}

#[derive(Clone, Copy)]
enum Narrow {
    /// The one between the routers.
    Middle,
    /// The host's own.
    Uplink,
    None,
}

impl Far {
    fn behind(topology: &Topology, narrow: Narrow) -> Self {
        let [near, router, far] = [
            topology.client.clone(),
            Netns::new("router").unwrap(),
            Netns::new("far").unwrap(),
        ];
        let (uplink, middle) = match narrow {
            Narrow::Middle => (1500, NARROW),
            Narrow::Uplink => (NARROW, 1500),
            Narrow::None => (1500, 1500),
        };
        for router in [&near, &router] {
            router.forwards(true).unwrap();
        }
        let (host4, host6) = (topology.host_address(V4), topology.host_address(V6));
        let (near4, near6) = (topology.client_address(V4), topology.client_address(V6));
        let add = |netns: &Netns, commands: String| netns.ip(&commands).unwrap();
        add(
            &topology.host,
            format!(
                "link set eth0 mtu {uplink}\n\
                 route add 192.0.2.0/24 via {near4}\nroute add 2001:db8:2::/64 via {near6}\n"
            ),
        );
        add(
            &near,
            format!(
                "link set eth0 mtu {uplink}\n\
                 link add mid0 mtu {middle} type veth peer name mid0 mtu {middle} netns {}\n\
                 addr add 203.0.113.1/24 dev mid0\naddr add 2001:db8:3::1/64 dev mid0 nodad\n\
                 link set mid0 up\n\
                 route add 192.0.2.0/24 via 203.0.113.2\nroute add 2001:db8:2::/64 via 2001:db8:3::2\n",
                router.path()
            ),
        );
        add(
            &router,
            format!(
                "addr add 203.0.113.2/24 dev mid0\naddr add 2001:db8:3::2/64 dev mid0 nodad\n\
                 link set mid0 up\n\
                 link add far0 type veth peer name eth0 netns {}\n\
                 addr add 192.0.2.1/24 dev far0\naddr add 2001:db8:2::1/64 dev far0 nodad\n\
                 link set far0 up\n\
                 route add {host4}/32 via 203.0.113.1\nroute add {host6}/128 via 2001:db8:3::1\n",
                far.path()
            ),
        );
        add(
            &far,
            "link set lo up\n\
             addr add 192.0.2.2/24 dev eth0\naddr add 2001:db8:2::2/64 dev eth0 nodad\n\
             link set eth0 up\n\
             route add 0.0.0.0/0 via 192.0.2.1\nroute add ::/0 via 2001:db8:2::1\n"
                .to_owned(),
        );
        Self {
            netns: far,
            _router: router,
        }
    }
}

fn far_address(family: Family) -> IpAddr {
    match family {
        V4 => [192, 0, 2, 2].into(),
        V6 => [0x2001, 0xdb8, 2, 0, 0, 0, 0, 2].into(),
    }
}

/// Publishes a port of the machine behind the router.
fn published_far(topology: &Topology, family: Family, protocol: Protocol) -> Daemon {
    let backend = SocketAddr::new(far_address(family), BACKEND_PORT);
    let spec = format!("{PORT}:{backend}{}", suffix(protocol));
    Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap()
}

fn refused(family: Family) {
    let scene = published(Topology::new().unwrap(), family, Protocol::Udp);
    let (topology, daemon) = scene.parts();
    for kind in [
        Kind::External,
        Kind::Localhost,
        Kind::HostLocal,
        Kind::HairpinSameBridge,
        Kind::HairpinOtherBridge,
        Kind::SelfHairpin,
    ] {
        let Client {
            netns: client,
            connects_to: host,
            ..
        } = kind.client(topology, family);
        let before = daemon.counted("forwarded_error").unwrap();
        let any = (family.unspecified(), 0);
        let socket = client.enter(|| UdpSocket::bind(any)).unwrap();
        socket.set_read_timeout(Some(patience())).unwrap();
        socket.connect(SocketAddr::new(host, PORT)).unwrap();
        socket.send(b"anybody there?").unwrap();
        let error = socket.recv(&mut [0; 16]).unwrap_err();
        let who = client.label();
        assert_eq!(
            error.kind(),
            ErrorKind::ConnectionRefused,
            "{who} asks {host}: {error}"
        );
        assert!(
            daemon.counted("forwarded_error").unwrap() > before,
            "{who} asks {host}"
        );
    }
    scene.stop();
}

#[test]
fn a_closed_port_of_the_backend_refuses_over_ipv4() {
    refused(V4);
}

#[test]
fn a_closed_port_of_the_backend_refuses_over_ipv6() {
    refused(V6);
}

/// The backend's machine is off: the kernel asks for its MAC in vain, and tells the client of it.
#[track_caller]
fn told_that_nobody_is_there(family: Family) {
    let topology = Topology::new().unwrap();
    let nobody = Plan::default().bridged[0].address(family, 200);
    let spec = format!("{PORT}:{}", SocketAddr::new(nobody, BACKEND_PORT));
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    for kind in [Kind::External, Kind::Localhost, Kind::HostLocal] {
        let Client {
            netns: client,
            connects_to: host,
            ..
        } = kind.client(&topology, family);
        let before = daemon.counted("forwarded_error").unwrap();
        let to = SocketAddr::new(host, PORT);
        let connected = client.enter(|| TcpStream::connect_timeout(&to, patience()));
        let error = connected.unwrap_err();
        let who = client.label();
        assert_eq!(error.kind(), ErrorKind::HostUnreachable, "{who}: {error}");
        let after = daemon.counted("forwarded_error").unwrap();
        assert!(after > before, "{who} asks {host}");
    }
    daemon.stop().unwrap();
}

#[test]
fn a_client_is_told_that_the_backends_machine_is_not_there_over_ipv4() {
    told_that_nobody_is_there(V4);
}

#[test]
fn a_client_is_told_that_the_backends_machine_is_not_there_over_ipv6() {
    told_that_nobody_is_there(V6);
}

/// Datagrams from `sender` until it knows an MTU of `NARROW`; `to` is where, if it is not connected.
#[track_caller]
fn learns(sender: &Listener, to: Option<SocketAddr>) {
    let datagram = [0; 1400];
    let send = || match to {
        Some(to) => sender.socket.send_to(&datagram, to),
        None => sender.socket.send(&datagram),
    };
    wait_for("EMSGSIZE", || {
        let error = send().err()?;
        (error.raw_os_error() == Some(libc::EMSGSIZE)).then_some(())
    })
    .unwrap();
    if let Some(to) = to {
        sender.socket.connect(to).unwrap();
    }
    assert_eq!(sender.path_mtu().unwrap(), NARROW);
}

/// A client's first datagram reaches the backend; returns where the backend saw it come from.
#[track_caller]
fn greeted(client: &Listener, backend: &Listener) -> SocketAddr {
    backend.socket.set_read_timeout(Some(patience())).unwrap();
    client.socket.send(b"hello").unwrap();
    backend.socket.recv_from(&mut [0; 16]).unwrap().1
}

fn backend_learns(family: Family, narrow: Narrow) {
    let topology = Topology::new().unwrap();
    let far = Far::behind(&topology, narrow);
    let scene = published(topology, family, Protocol::Udp);
    let backend = &scene.topology.backend.netns;
    let backend = Listener::bind(backend, family == V4, BACKEND_PORT).unwrap();
    let client = Listener::connect(&far.netns, scene.frontend()).unwrap();
    let seen = greeted(&client, &backend);
    learns(&backend, Some(seen));
    scene.stop();
}

/// A connection in bulk, none of whose ends knows of the narrow link.
fn bulk_passes(family: Family, narrow: Narrow) {
    let topology = Topology::new().unwrap();
    let far = Far::behind(&topology, narrow);
    let scene = published(topology, family, Protocol::Tcp);
    on_the_fast_path(&scene.daemon, || {
        let backend = &scene.topology.backend.netns;
        there_and_back(backend, &far.netns, scene.frontend().ip());
    });
    scene.stop();
}

#[test]
fn a_connection_passes_a_narrow_link_before_the_client() {
    for family in [V4, V6] {
        bulk_passes(family, Narrow::Middle);
    }
}

#[test]
fn a_connection_passes_a_narrow_uplink() {
    for family in [V4, V6] {
        bulk_passes(family, Narrow::Uplink);
    }
}

#[test]
fn a_backend_learns_the_mtu_of_a_link_before_the_client_over_ipv4() {
    backend_learns(V4, Narrow::Middle);
}

#[test]
fn a_backend_learns_the_mtu_of_a_link_before_the_client_over_ipv6() {
    backend_learns(V6, Narrow::Middle);
}

#[test]
fn a_backend_learns_the_mtu_of_the_uplink_over_ipv4() {
    backend_learns(V4, Narrow::Uplink);
}

#[test]
fn a_backend_learns_the_mtu_of_the_uplink_over_ipv6() {
    backend_learns(V6, Narrow::Uplink);
}

/// A backend on another machine behind a narrow link: a router's, or the host's own. All checksums are verified.
fn client_learns(family: Family, narrow: Narrow) {
    let topology = Topology::new().unwrap();
    let far = Far::behind(&topology, narrow);
    for device in ["eth0", &topology.peer.veth, &topology.other.veth] {
        topology.host.complete_checksums(device).unwrap();
    }
    let lan = topology.host_address(family);
    let daemon = published_far(&topology, family, Protocol::Udp);
    let backend = Listener::bind(&far.netns, family == V4, BACKEND_PORT).unwrap();
    let client = Listener::connect(&topology.peer.netns, SocketAddr::new(lan, PORT)).unwrap();
    greeted(&client, &backend);
    learns(&client, None);
    daemon.stop().unwrap();

    let daemon = published_far(&topology, family, Protocol::Tcp);
    for (client, host) in [
        (&topology.other.netns, lan),
        (&topology.host, family.localhost()),
    ] {
        on_the_fast_path(&daemon, || there_and_back(&far.netns, client, host));
    }
    daemon.stop().unwrap();
}

#[test]
fn a_client_learns_the_mtu_of_a_link_before_the_backend_over_ipv4() {
    client_learns(V4, Narrow::Middle);
}

#[test]
fn a_client_learns_the_mtu_of_a_link_before_the_backend_over_ipv6() {
    client_learns(V6, Narrow::Middle);
}

#[test]
fn a_client_learns_the_mtu_of_the_hosts_way_to_the_backend_over_ipv4() {
    client_learns(V4, Narrow::Uplink);
}

#[test]
fn a_client_learns_the_mtu_of_the_hosts_way_to_the_backend_over_ipv6() {
    client_learns(V6, Narrow::Uplink);
}

#[test]
fn a_container_with_a_narrow_link_is_served() {
    for family in [V4, V6] {
        let topology = Topology::new().unwrap();
        let Topology { host, backend, .. } = &topology;
        let veth = &backend.veth;
        host.ip(&format!("link set {veth} mtu 1280\nlink set br0 mtu 1280"))
            .unwrap();
        backend.netns.ip("link set eth0 mtu 1280").unwrap();
        let scene = published(topology, family, Protocol::Tcp);
        let Topology {
            host,
            client,
            backend,
            ..
        } = &scene.topology;
        let ends = [(client, scene.frontend().ip()), (host, family.localhost())];
        for (client, address) in ends {
            on_the_fast_path(&scene.daemon, || {
                there_and_back(&backend.netns, client, address);
            });
        }
        scene.stop();
    }
}

/// Time exceeded, and port unreachable.
fn kinds(family: Family) -> [(u8, u8); 2] {
    match family {
        V4 => [(11, 0), (3, 3)],
        V6 => [(3, 0), (1, 4)],
    }
}

fn traced(family: Family) {
    let topology = Topology::new().unwrap();
    let far = Far::behind(&topology, Narrow::None);
    // So that an error about a packet whose checksum was left to a device must be right, too.
    topology.host.complete_checksums("eth0").unwrap();
    let scene = published(topology, family, Protocol::Udp);
    let host = scene.frontend().ip();
    let routers: [IpAddr; 2] = match family {
        V4 => [[192, 0, 2, 1].into(), [203, 0, 113, 1].into()],
        V6 => [2, 3].map(|net| [0x2001, 0xdb8, net, 0, 0, 0, 0, 1].into()),
    };
    let [exceeded, unreachable] = kinds(family);
    let path = [
        (routers[0], exceeded),
        (routers[1], exceeded),
        (host, exceeded),
        (host, unreachable),
    ];
    for (ttl, (from, (kind, code))) in (1..).zip(path) {
        // As traceroute does: another port for each probe.
        let probe = Listener::connect(&far.netns, scene.frontend()).unwrap();
        probe.set_ttl(ttl).unwrap();
        probe.socket.send(b"how far?").unwrap();
        assert_eq!(
            probe.hear().unwrap(),
            Heard { kind, code, from },
            "TTL {ttl}"
        );
    }
    scene.stop();
}

#[test]
fn a_path_through_a_published_port_can_be_traced_over_ipv4() {
    traced(V4);
}

#[test]
fn a_path_through_a_published_port_can_be_traced_over_ipv6() {
    traced(V6);
}
