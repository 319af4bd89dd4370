//! Frames that say they come from somebody else: of a container, and of another machine.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Instant,
};

use forwarder_tests::{
    daemon::{Daemon, Datapath, doctor},
    deadline::{slack, wait_for, wait_until},
    frame::{Frame, Mac},
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Protocol, ask, ask_by},
    tun,
    wire::Wire,
};

use crate::scene::{
    BACKEND_PORT, backend, frontend, packets, served_to_the_client, spec, wait_for_peer,
};

fn shown(mac: Mac) -> String {
    mac.map(|octet| format!("{octet:02x}")).join(":")
}

/// Sends a SYN or a datagram from `forger`'s network card to the host's `device`, whatever its addresses say.
fn forge(
    topology: &Topology,
    forger: &Netns,
    device: &str,
    (protocol, source, to): (Protocol, SocketAddr, SocketAddr),
) {
    let mut forged = Frame::first(protocol, source, to);
    forged.destination_mac = topology.host.mac(device).unwrap();
    if protocol == Protocol::Udp {
        forged.payload = b"forged".to_vec();
    }
    let wire = Wire::open(forger, "eth0").unwrap();
    wire.send(&forged.bytes()).unwrap();
}

/// One more container on the backend's bridge, at number 4 of its network.
struct Third(Netns);

impl Third {
    fn join(topology: &Topology) -> Self {
        let third = Netns::new("third").unwrap();
        let path = third.path();
        let host = format!(
            "link add veththird type veth peer name eth0 netns {path}\nlink set veththird master br0 up"
        );
        topology.host.ip(&host).unwrap();
        let gateway = topology.backend.gateway(Family::V4);
        let inside = format!(
            "link set lo up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n\
             link set eth0 up\nroute add default via {gateway}",
            Self::address(topology, Family::V4),
            Self::address(topology, Family::V6),
        );
        third.ip(&inside).unwrap();
        Self(third)
    }

    fn address(topology: &Topology, family: Family) -> IpAddr {
        match topology.backend.address(family) {
            IpAddr::V4(v4) => IpAddr::from((u32::from(v4) + 2).to_be_bytes()),
            IpAddr::V6(v6) => IpAddr::from((u128::from(v6) + 2).to_be_bytes()),
        }
    }
}

struct Scene {
    topology: Topology,
    backend: Backend,
    daemon: Daemon,
    family: Family,
    protocol: Protocol,
    third: Third,
}

impl Scene {
    /// A published UDP port, served by the fast path. `flags` are the daemon's.
    fn new(family: Family, flags: &[&str]) -> Self {
        Self::of(family, Protocol::Udp, &[], flags)
    }

    /// The daemon is started by `wrapper`, which takes something from it.
    fn of(family: Family, protocol: Protocol, wrapper: &[&str], flags: &[&str]) -> Self {
        let topology = Topology::new().unwrap();
        let third = Third::join(&topology);
        let backend = backend(&topology.backend, protocol);
        let spec = spec(&topology.backend, family, protocol);
        let (host, specs) = (&topology.host, [spec.as_str()]);
        let daemon = Daemon::start_wrapped(host, wrapper, &specs, Datapath::Ebpf, flags).unwrap();
        wait_for_peer(&daemon);
        Self {
            topology,
            backend,
            daemon,
            family,
            protocol,
            third,
        }
    }

    fn frontend(&self) -> SocketAddr {
        frontend(&self.topology, self.family)
    }

    /// What `client` hears first after `forger` has answered in the backend's name is the backend's own answer.
    fn hears_the_backend_alone(self, client: &Netns, forger: &Netns, device: &str) {
        let frontend = self.frontend();
        let any = (self.family.unspecified(), 0);
        let socket = client.enter(|| UdpSocket::bind(any)).unwrap();
        let seen = ask_by(&socket, frontend, "before").unwrap().seen;

        let backend = SocketAddr::new(self.topology.backend.address(self.family), BACKEND_PORT);
        forge(
            &self.topology,
            forger,
            device,
            (self.protocol, backend, seen),
        );
        socket.send_to(b"after", frontend).unwrap();
        let mut buffer = [0; 100];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(from, frontend);
        let heard = String::from_utf8_lossy(&buffer[..length]);
        assert!(heard.contains("after"), "{heard}");
        self.daemon.stop().unwrap();
    }

    /// What has that source does not reach the backend; an honest request, sent after it, does.
    fn never_begins(self, forger: &Netns, device: &str, source: IpAddr) {
        let from = SocketAddr::new(source, 4000);
        let words = (self.protocol, from, self.frontend());
        let (forwarded, _) = packets(&self.daemon);
        forge(&self.topology, forger, device, words);
        assert_eq!(self.daemon.counted("martian_source").unwrap(), 1);
        assert_eq!(packets(&self.daemon).0, forwarded, "{source} was forwarded");
        self.serves_the_client("honest");
        assert_eq!(self.backend.requests(), 1, "{source} reached the backend");
        self.daemon.stop().unwrap();
    }

    #[track_caller]
    fn serves_the_client(&self, payload: &str) {
        let client = &self.topology.client;
        let answer = ask(client, self.protocol, self.frontend(), payload).unwrap();
        assert_eq!(answer.payload, payload);
    }

    /// The client is served for as long as a change would take to be noticed, and longer, by the fast path alone.
    fn goes_on_serving(self) {
        let (forwarded, _) = packets(&self.daemon);
        let end = Instant::now() + slack() / 2;
        let mut requests = 0;
        while Instant::now() < end {
            self.serves_the_client("as before");
            requests += 1;
        }
        let sent = packets(&self.daemon).0 - forwarded;
        assert_eq!(sent, requests, "some were sent again, or by the proxy");
        self.daemon.stop().unwrap();
    }
}

#[test]
fn a_container_answers_for_no_other_over_ipv4() {
    let scene = Scene::new(Family::V4, &[]);
    let (client, forger) = (
        scene.topology.client.clone(),
        scene.topology.peer.netns.clone(),
    );
    scene.hears_the_backend_alone(&client, &forger, "br0");
}

#[test]
fn a_container_answers_for_no_other_over_ipv6() {
    let scene = Scene::new(Family::V6, &[]);
    let (client, forger) = (
        scene.topology.client.clone(),
        scene.topology.peer.netns.clone(),
    );
    scene.hears_the_backend_alone(&client, &forger, "br0");
}

#[test]
fn another_machine_answers_for_no_container() {
    let scene = Scene::new(Family::V4, &[]);
    let (client, forger) = (
        scene.topology.other.netns.clone(),
        scene.topology.client.clone(),
    );
    scene.hears_the_backend_alone(&client, &forger, "eth0");
}

#[test]
fn a_container_does_not_get_past_an_allow_list_with_anothers_address() {
    let scene = Scene::new(
        Family::V4,
        &["--allow", "203.0.113.0/24", "--allow", "198.51.100.0/24"],
    );
    let forger = scene.topology.peer.netns.clone();
    scene.never_begins(&forger, "br0", "203.0.113.7".parse().unwrap());
}

#[test]
fn another_machine_does_not_begin_as_a_container() {
    let scene = Scene::new(Family::V4, &[]);
    let forger = scene.topology.client.clone();
    let source = scene.topology.peer.address(Family::V4);
    scene.never_begins(&forger, "eth0", source);
}

/// What the host routes by way of a container belongs to that container, which may speak for it.
#[test]
fn a_container_speaks_for_what_is_routed_to_it() {
    let scene = Scene::new(Family::V4, &[]);
    let topology = &scene.topology;
    let peer = topology.peer.address(Family::V4);
    topology
        .host
        .ip(&format!("route add 10.8.0.0/24 via {peer}"))
        .unwrap();
    topology
        .peer
        .netns
        .ip("addr add 10.8.0.7/32 dev lo")
        .unwrap();
    let frontend = scene.frontend();
    let socket = topology
        .peer
        .netns
        .enter(|| UdpSocket::bind("10.8.0.7:4000"))
        .unwrap();
    let seen = wait_for("the route is known", || {
        let seen = ask_by(&socket, frontend, "hello").ok()?.seen;
        (seen == socket.local_addr().unwrap()).then_some(seen)
    });
    assert_eq!(seen.unwrap().ip(), IpAddr::from([10, 8, 0, 7]));
    // The bridge stays what it was for everybody else.
    served_to_the_client(topology, Protocol::Udp, "as before");
    scene.daemon.stop().unwrap();
}

/// The peer says that it is its neighbours on the bridge: the backend, and another container.
fn a_container_does_not_begin_as_a_neighbour(family: Family, protocol: Protocol) {
    let neighbours = [
        |topology: &Topology, family| topology.backend.address(family),
        Third::address,
    ];
    for neighbour in neighbours {
        let scene = Scene::of(family, protocol, &[], &[]);
        let forger = scene.topology.peer.netns.clone();
        let source = neighbour(&scene.topology, family);
        scene.never_begins(&forger, "br0", source);
    }
}

#[test]
fn a_container_does_not_begin_as_a_neighbour_by_udp_over_ipv4() {
    a_container_does_not_begin_as_a_neighbour(Family::V4, Protocol::Udp);
}

#[test]
fn a_container_does_not_begin_as_a_neighbour_by_udp_over_ipv6() {
    a_container_does_not_begin_as_a_neighbour(Family::V6, Protocol::Udp);
}

#[test]
fn a_container_does_not_begin_as_a_neighbour_by_tcp_over_ipv4() {
    a_container_does_not_begin_as_a_neighbour(Family::V4, Protocol::Tcp);
}

#[test]
fn a_container_does_not_begin_as_a_neighbour_by_tcp_over_ipv6() {
    a_container_does_not_begin_as_a_neighbour(Family::V6, Protocol::Tcp);
}

#[test]
fn a_container_does_not_get_past_an_allow_list_with_a_neighbours_address() {
    // 172.31.0.4 is the third container.
    let flags = ["--allow", "172.31.0.4/32", "--allow", "198.51.100.0/24"];
    let scene = Scene::new(Family::V4, &flags);
    let forger = scene.topology.peer.netns.clone();
    let source = Third::address(&scene.topology, Family::V4);
    scene.never_begins(&forger, "br0", source);
}

/// The bridge takes the backend to be behind the peer's port.
#[test]
fn a_container_with_the_backends_mac_gets_none_of_its_packets() {
    let scene = Scene::new(Family::V4, &[]);
    let Topology {
        host,
        backend,
        peer,
        ..
    } = &scene.topology;
    scene.serves_the_client("before");
    let (to, from) = ("172.31.0.1:9", "172.31.0.3:9");
    let mut frame = Frame::first(Protocol::Udp, from.parse().unwrap(), to.parse().unwrap());
    frame.source_mac = backend.netns.mac("eth0").unwrap();
    frame.destination_mac = host.mac("br0").unwrap();
    let wire = Wire::open(&peer.netns, "eth0").unwrap();
    wire.send(&frame.bytes()).unwrap();
    let learnt = format!("{} master br0", shown(frame.source_mac));
    wait_for("the bridge takes it", || {
        let table = host
            .run(&format!("bridge fdb show dev {}", peer.veth))
            .ok()?;
        table.contains(&learnt).then_some(())
    })
    .unwrap();
    scene.goes_on_serving();
}

/// The host takes the backend to have the peer's MAC (a gratuitous ARP, RFC 5227).
#[test]
fn a_container_that_answers_arp_for_the_backend_gets_none_of_its_packets() {
    let scene = Scene::new(Family::V4, &[]);
    let Topology {
        host,
        backend,
        peer,
        ..
    } = &scene.topology;
    let address = backend.address(Family::V4);
    let frontend = SocketAddr::new(address, BACKEND_PORT);
    ask(host, Protocol::Udp, frontend, "the host knows the backend").unwrap();
    let own = peer.netns.mac("eth0").unwrap();
    let IpAddr::V4(v4) = address else {
        unreachable!("asked for above")
    };
    let (ethernet, reply) = ([[0xff; 6], own].concat(), [0, 1, 8, 0, 6, 4, 0, 2]);
    let sides = [&own[..], &v4.octets(), &own, &v4.octets()].concat();
    let arp = [&ethernet[..], &[8, 6], &reply, &sides].concat();
    let wire = Wire::open(&peer.netns, "eth0").unwrap();
    wire.send(&arp).unwrap();
    wait_for("the host takes it", || {
        let neighbour = host.run(&format!("ip neigh show {address} dev br0")).ok()?;
        neighbour.contains(&shown(own)).then_some(())
    })
    .unwrap();
    scene.goes_on_serving();
}

/// Whoever has an address first keeps it. A container may give itself any.
#[test]
fn a_container_that_gives_itself_the_backends_address_gets_none_of_its_packets() {
    let scene = Scene::new(Family::V4, &[]);
    let Topology {
        host,
        backend,
        peer,
        ..
    } = &scene.topology;
    let address = backend.address(Family::V4);
    let check = "containers' addresses";
    assert!(doctor(host, &[]).unwrap()[check].ok);
    let taken = format!("addr add {address}/32 dev eth0");
    peer.netns.ip(&taken).unwrap();
    let dispute = format!(
        "{address} is taken to be behind {}: {} claims it too, and did so later",
        backend.veth, peer.veth
    );
    wait_until("the daemon warns", || {
        scene.daemon.said().contains(&dispute)
    });
    let found = doctor(host, &[]).unwrap()[check].clone();
    assert!(!found.ok);
    assert_eq!(found.found, dispute);
    scene.goes_on_serving();
}

/// An address that the peer adds is its own, until it gives it to another container.
fn an_address_moves(wrapper: &[&str]) {
    let scene = Scene::of(Family::V4, Protocol::Udp, wrapper, &[]);
    let (peer, third) = (&scene.topology.peer.netns, &scene.third.0);
    let moving = SocketAddr::from(([172, 31, 0, 77], 4000));
    let add = format!("addr add {}/32 dev eth0", moving.ip());
    let served = |netns: &Netns, from: SocketAddr| {
        let socket = netns.enter(|| UdpSocket::bind(from)).unwrap();
        let answer = ask_by(&socket, scene.frontend(), "hello").unwrap();
        assert_eq!(answer.seen, from);
    };
    peer.ip(&add).unwrap();
    served(peer, moving);
    let mut ports = 4001..;
    wait_for("it is known whose address it is", || {
        // A port that a flow was let begin at is of no use any more.
        let from = SocketAddr::new(moving.ip(), ports.next()?);
        let forged = (Protocol::Udp, from, scene.frontend());
        forge(&scene.topology, third, "br0", forged);
        (scene.daemon.counted("martian_source").ok()? > 0).then_some(())
    })
    .unwrap();
    served(peer, moving);
    let moving = SocketAddr::new(moving.ip(), 3999);
    served(peer, moving);
    peer.ip(&format!("addr del {}/32 dev eth0", moving.ip()))
        .unwrap();
    third.ip(&add).unwrap();
    // Also from the very port whose flow the other container has begun. What it sends until the change is noticed is lost.
    let socket = third.enter(|| UdpSocket::bind(moving)).unwrap();
    wait_for("it is known whose address it is now", || {
        let answer = ask_by(&socket, scene.frontend(), "hello").ok()?;
        (answer.seen == moving).then_some(())
    })
    .unwrap();
    scene.daemon.stop().unwrap();
}

#[test]
fn an_address_is_the_containers_that_has_added_it_until_another_has_it() {
    an_address_moves(&[]);
}

/// The daemon does not hear of the change, and asks from time to time.
#[test]
fn without_the_right_to_listen_it_is_noticed_whose_an_address_is() {
    an_address_moves(&[
        "setpriv",
        "--bounding-set=-net_broadcast",
        "--inh-caps=-net_broadcast",
        "--",
    ]);
}

#[test]
fn a_container_does_not_speak_for_what_is_routed_to_a_neighbour() {
    let scene = Scene::new(Family::V4, &[]);
    let Topology { host, peer, .. } = &scene.topology;
    let route = format!("route add 10.8.0.0/24 via {}", peer.address(Family::V4));
    host.ip(&route).unwrap();
    // It may say that it has the address itself.
    scene.third.0.ip("addr add 10.8.0.7/32 dev eth0").unwrap();
    let source = SocketAddr::from(([10, 8, 0, 7], 4000));
    let forged = (Protocol::Udp, source, scene.frontend());
    // Until the route is known, the source is another machine's, and as bad: an honest one tells when it is.
    peer.netns.ip("addr add 10.8.0.8/32 dev lo").unwrap();
    let honest = peer.netns.enter(|| UdpSocket::bind("10.8.0.8:4000"));
    let honest = honest.unwrap();
    wait_for("the route is known", || {
        let seen = ask_by(&honest, scene.frontend(), "hello").ok()?.seen;
        (seen == honest.local_addr().unwrap()).then_some(())
    })
    .unwrap();
    let before = scene.daemon.counted("martian_source").unwrap();
    forge(&scene.topology, &scene.third.0, "br0", forged);
    assert_eq!(scene.daemon.counted("martian_source").unwrap(), before + 1);
    scene.daemon.stop().unwrap();
}

/// A machine behind a tunnel without Ethernet headers takes a container's address, also behind headers that the fast path does
/// not read, which leaves such a datagram to the proxy.
#[test]
fn a_machine_behind_a_tunnel_does_not_begin_as_a_container() {
    let topology = Topology::new().unwrap();
    let Topology {
        host, client, peer, ..
    } = &topology;
    let ends = [(host, "tun0"), (client, "tun0")];
    let _tunnel = tun::Wire::between(tun::Kind::Tun, ends).unwrap();
    for (netns, own) in [(host, 2), (client, 9)] {
        netns
            .ip(&format!(
                "link set tun0 up\naddr add 2001:db8:77::{own}/64 dev tun0 nodad"
            ))
            .unwrap();
    }
    let backend = backend(&topology.backend, Protocol::Udp);
    let spec = spec(&topology.backend, Family::V6, Protocol::Udp);
    let flags = ["--allow", "fd00:31::/64"];
    let daemon = Daemon::start_with(host, &[&spec], Datapath::Ebpf, &flags).unwrap();
    let to = frontend(&topology, Family::V6);
    let source = SocketAddr::new(peer.address(Family::V6), 4000);
    let forged = Frame::first(Protocol::Udp, source, to).bytes();
    let behind = |number: u8, header: [u8; 8]| {
        let mut frame = forged.clone();
        frame.splice(54..54, header);
        frame[20] = number;
        frame[19] += 8;
        frame
    };
    // Padding, for every hop and for the destination, and a routing header that is used up.
    let padded = [17, 0, 1, 4, 0, 0, 0, 0];
    let routed = [17, 0, 3, 0, 0, 0, 0, 0];
    let all = [
        behind(0, padded),
        behind(60, padded),
        behind(43, routed),
        forged.clone(),
    ];
    let wire = Wire::open(client, "tun0").unwrap();
    for (number, frame) in all.iter().enumerate() {
        wire.send(&frame[14..]).unwrap();
        wait_for("the forgery is counted", || {
            (daemon.counted("martian_source").ok()? > number as u64).then_some(())
        })
        .unwrap_or_else(|_| panic!("number {number}: {}", daemon.control(&["stats"]).unwrap()));
    }
    ask(&peer.netns, Protocol::Udp, to, "honest").unwrap();
    assert_eq!(backend.requests(), 1, "a forgery reached the backend");
    daemon.stop().unwrap();
}

/// What the fast path does not read is the proxy's, which has to believe the source: a datagram behind a header for its
/// destination, and one in a frame to everybody.
#[test]
fn a_container_does_not_get_past_an_allow_list_by_way_of_the_proxy() {
    let flags = [
        "--allow",
        "2001:db8:66::/64",
        "--allow",
        "2001:db8:100::/64",
    ];
    let scene = Scene::new(Family::V6, &flags);
    let Topology { host, peer, .. } = &scene.topology;
    let source = SocketAddr::new("2001:db8:66::7".parse().unwrap(), 4000);
    let mut forged = Frame::first(Protocol::Udp, source, scene.frontend());
    forged.destination_mac = host.mac("br0").unwrap();
    let mut with_options = forged.bytes();
    // An option for experiments (RFC 4727), before the datagram.
    with_options.splice(54..54, [17, 0, 0x1e, 4, 0, 0, 0, 0]);
    with_options[20] = 60;
    with_options[19] += 8;
    let to_everybody = Frame {
        destination_mac: [0x33, 0x33, 0, 0, 0, 1],
        ..forged.clone()
    };
    let mut to_all = to_everybody.clone();
    to_all.destination.set_ip("ff02::1".parse().unwrap());
    let wire = Wire::open(&peer.netns, "eth0").unwrap();
    let all = [with_options, to_everybody.bytes(), to_all.bytes()];
    for (count, frame) in (1..).zip(all) {
        wire.send(&frame).unwrap();
        wait_for("the forgery is counted", || {
            (scene.daemon.counted("martian_source").ok()? == count).then_some(())
        })
        .unwrap_or_else(|_| {
            panic!(
                "number {count}: {}",
                scene.daemon.control(&["stats"]).unwrap()
            )
        });
    }
    scene.serves_the_client("honest");
    assert_eq!(scene.backend.requests(), 1, "a forgery reached the backend");
    scene.daemon.stop().unwrap();
}
