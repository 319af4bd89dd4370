//! A host with two uplinks: by which of them clients are answered, and who may come by which.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::{wait_for, wait_until},
    frame::Frame,
    icmp::IcmpError,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask, ask_by},
    wire::Wire,
};

use crate::scene::{BACKEND_PORT, PORT, backend, on_the_fast_path, spec};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// A client behind a router that both uplinks, eth0 and eth1, lead to.
struct Scene {
    topology: Topology,
    backend: Backend,
}

impl Scene {
    fn new(protocol: Protocol) -> Self {
        let topology = Topology::new().unwrap();
        let Topology { host, client, .. } = &topology;
        let second = format!(
            "link add eth1 type veth peer name eth1 netns {}\n\
             addr add 192.0.2.2/24 dev eth1\naddr add 2001:db8:2::2/64 dev eth1 nodad\n\
             link set eth1 up",
            client.path()
        );
        host.ip(&second).unwrap();
        // Neither end is particular about where packets come from, until a test says so.
        for netns in [host, client] {
            for device in ["all", "eth0", "eth1"] {
                let setting = format!("ipv4/conf/{device}/rp_filter");
                netns.set(&setting, "0").unwrap();
            }
        }
        // The router speaks and answers for no address of the client behind it.
        client.set("ipv4/conf/all/arp_announce", "2").unwrap();
        client.set("ipv4/conf/all/arp_ignore", "1").unwrap();
        client
            .ip(
                "addr add 192.0.2.9/24 dev eth1\naddr add 2001:db8:2::9/64 dev eth1 nodad\n\
                 link set eth1 up\naddr add 203.0.113.9/32 dev lo\naddr add 2001:db8:3::9/128 dev lo nodad",
            )
            .unwrap();
        let backend = backend(&topology.backend, protocol);
        Self { topology, backend }
    }

    fn far_client(family: Family) -> IpAddr {
        match family {
            Family::V4 => [203, 0, 113, 9].into(),
            Family::V6 => "2001:db8:3::9".parse().unwrap(),
        }
    }

    /// The client's own address on an uplink's network.
    fn router(&self, family: Family, uplink: &str) -> IpAddr {
        match (family, uplink) {
            (_, "eth0") => self.topology.client_address(family),
            (Family::V4, _) => [192, 0, 2, 9].into(),
            (Family::V6, _) => "2001:db8:2::9".parse().unwrap(),
        }
    }

    fn host(&self, family: Family, uplink: &str) -> IpAddr {
        match (family, uplink) {
            (_, "eth0") => self.topology.host_address(family),
            (Family::V4, _) => [192, 0, 2, 2].into(),
            (Family::V6, _) => "2001:db8:2::2".parse().unwrap(),
        }
    }

    /// Has the host reach the far client by an uplink alone.
    fn host_answers_by(&self, family: Family, uplink: &str) {
        let (far, via) = (Self::far_client(family), self.router(family, uplink));
        let length = if far.is_ipv4() { 32 } else { 128 };
        let route = format!("route replace {far}/{length} via {via} dev {uplink}");
        self.topology.host.ip(&route).unwrap();
    }

    /// Has the far client reach the published address by an uplink.
    fn client_comes_by(&self, family: Family, uplink: &str) {
        let (far, frontend) = (Self::far_client(family), self.host(family, "eth0"));
        let via = self.host(family, uplink);
        let length = if far.is_ipv4() { 32 } else { 128 };
        let route = format!("route replace {frontend}/{length} via {via} dev {uplink} src {far}");
        self.topology.client.ip(&route).unwrap();
    }

    fn start(&self, family: Family, protocol: Protocol, flags: &[&str]) -> Daemon {
        let spec = spec(&self.topology.backend, family, protocol);
        Daemon::start_with(&self.topology.host, &[&spec], Datapath::Ebpf, flags).unwrap()
    }

    fn frontend(&self, family: Family) -> SocketAddr {
        SocketAddr::new(self.host(family, "eth0"), PORT)
    }
}

#[test]
fn a_conversation_goes_on_when_routes_move_to_the_other_uplink() {
    for family in FAMILIES {
        let scene = Scene::new(Protocol::Tcp);
        scene.host_answers_by(family, "eth0");
        scene.client_comes_by(family, "eth0");
        let daemon = scene.start(family, Protocol::Tcp, &[]);
        let mut conversation =
            Connection::open(&scene.topology.client, scene.frontend(family)).unwrap();
        let answer = conversation.ask("before").unwrap();
        assert_eq!(answer.seen.ip(), Scene::far_client(family));
        scene.host_answers_by(family, "eth1");
        scene.client_comes_by(family, "eth1");
        on_the_fast_path(&daemon, || {
            for text in ["after", "later"] {
                conversation.ask(text).unwrap();
            }
        });
        let mut new = Connection::open(&scene.topology.client, scene.frontend(family)).unwrap();
        new.ask("new").unwrap();
        daemon.stop().unwrap();
    }
}

#[test]
fn a_conversation_goes_on_when_its_uplink_goes_down() {
    for family in FAMILIES {
        let scene = Scene::new(Protocol::Tcp);
        // The published address is on neither of the two.
        let frontend: IpAddr = match family {
            Family::V4 => [198, 18, 0, 2].into(),
            Family::V6 => "2001:db8:18::2".parse().unwrap(),
        };
        let length = if frontend.is_ipv4() { 32 } else { 128 };
        let Topology { host, client, .. } = &scene.topology;
        let address = format!("addr add {frontend}/{length} dev lo");
        host.ip(&address).unwrap();
        let far = Scene::far_client(family);
        let comes_by = |uplink| {
            let via = scene.host(family, uplink);
            let route =
                format!("route replace {frontend}/{length} via {via} dev {uplink} src {far}");
            client.ip(&route).unwrap();
        };
        scene.host_answers_by(family, "eth0");
        comes_by("eth0");
        let daemon = scene.start(family, Protocol::Tcp, &[]);
        let mut conversation = Connection::open(client, SocketAddr::new(frontend, PORT)).unwrap();
        conversation.ask("before").unwrap();
        host.ip("link set eth0 down").unwrap();
        scene.host_answers_by(family, "eth1");
        comes_by("eth1");
        for text in ["after", "later"] {
            conversation.ask(text).unwrap();
        }
        daemon.stop().unwrap();
    }
}

#[test]
fn who_comes_by_one_uplink_is_answered_by_the_one_that_leads_back() {
    by_eth1_and_back_by_eth0(|scene, family| scene.client_comes_by(family, "eth1"));
}

/// As behind a load balancer that answers go round.
#[test]
fn who_comes_by_an_uplink_without_any_route_is_answered_by_the_one_that_leads_back() {
    by_eth1_and_back_by_eth0(|scene, family| {
        let Topology { host, client, .. } = &scene.topology;
        host.ip("addr flush dev eth1").unwrap();
        let mac = host.mac("eth1").unwrap();
        let mac = mac.map(|octet| format!("{octet:02x}")).join(":");
        let (far, frontend) = (Scene::far_client(family), scene.host(family, "eth0"));
        let length = if far.is_ipv4() { 32 } else { 128 };
        client
            .ip(&format!(
                "route replace {frontend}/{length} dev eth1 src {far}\n\
                 neigh replace {frontend} lladdr {mac} dev eth1"
            ))
            .unwrap();
    });
}

/// Asserts that the far client is answered by the one uplink when `comes` has it come by the other, on hosts that forward, which
/// the kernel can be asked on, and on others.
fn by_eth1_and_back_by_eth0(comes: impl Fn(&Scene, Family)) {
    for (family, forwards) in FAMILIES
        .into_iter()
        .flat_map(|it| [(it, true), (it, false)])
    {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let scene = Scene::new(protocol);
            let Topology { host, client, .. } = &scene.topology;
            host.forwards(forwards).unwrap();
            scene.host_answers_by(family, "eth0");
            comes(&scene, family);
            let daemon = scene.start(family, protocol, &[]);
            on_the_fast_path(&daemon, || {
                for text in ["one", "two"] {
                    let answer = ask(client, protocol, scene.frontend(family), text);
                    let answer = answer.unwrap_or_else(|error| {
                        panic!("{family:?} {protocol:?}, forwards: {forwards}: {error:#}")
                    });
                    assert_eq!(answer.seen.ip(), Scene::far_client(family));
                }
            });
            daemon.stop().unwrap();
        }
    }
}

/// Its time has come where it enters.
#[test]
fn who_comes_by_one_uplink_is_told_of_an_obstacle_by_the_one_that_leads_back() {
    for (family, forwards) in FAMILIES
        .into_iter()
        .flat_map(|it| [(it, true), (it, false)])
    {
        let scene = Scene::new(Protocol::Udp);
        let Topology { host, client, .. } = &scene.topology;
        host.forwards(forwards).unwrap();
        scene.host_answers_by(family, "eth0");
        let daemon = scene.start(family, Protocol::Udp, &[]);
        let far = SocketAddr::new(Scene::far_client(family), 4000);
        let mut probe = Frame::first(Protocol::Udp, far, scene.frontend(family));
        (probe.destination_mac, probe.ttl) = (host.mac("eth1").unwrap(), 1);
        let [by_first, by_second] = ["eth0", "eth1"].map(|it| Wire::open(client, it).unwrap());
        by_second.send(&probe.bytes()).unwrap();
        let mut frames = std::iter::from_fn(|| by_first.receive().ok());
        let told = frames
            .any(|frame| IcmpError::parse(&frame).is_ok_and(|error| error.destination == far.ip()));
        assert!(
            told,
            "{family:?}, forwards: {forwards}\n{}",
            daemon.control(&["stats"]).unwrap()
        );
        daemon.stop().unwrap();
    }
}

/// The uplink that leads back takes no packet as long as the one that requests come by.
#[test]
fn an_answer_is_no_longer_than_the_uplink_takes_that_leads_back() {
    for family in FAMILIES {
        let scene = Scene::new(Protocol::Udp);
        let Topology { host, client, .. } = &scene.topology;
        for netns in [host, client] {
            netns.ip("link set eth0 mtu 1300").unwrap();
        }
        scene.host_answers_by(family, "eth0");
        scene.client_comes_by(family, "eth1");
        let daemon = scene.start(family, Protocol::Udp, &[]);
        let long = "x".repeat(1300);
        // The first answer is too long, and the backend learns it.
        wait_for("an answer", || {
            let answer = ask(client, Protocol::Udp, scene.frontend(family), &long).ok()?;
            (answer.seen.ip() == Scene::far_client(family)).then_some(())
        })
        .unwrap_or_else(|_| panic!("{family:?}\n{}", daemon.control(&["stats"]).unwrap()));
        daemon.stop().unwrap();
    }
}

/// Connections that come by eth1, which no route without a mark leads back by, are marked for that.
const MARKS: &str = "table inet marks {
    chain prerouting {
        type filter hook prerouting priority mangle;
        iifname eth1 ct state new ct mark set 2
        iifname != eth1 ct mark 2 meta mark set ct mark
    }
    chain output {
        type route hook output priority mangle;
        ct mark 2 meta mark set ct mark
    }
}
";

#[test]
fn who_comes_by_an_uplink_that_only_a_mark_leads_back_by_is_answered_by_it() {
    for family in FAMILIES {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let scene = Scene::new(protocol);
            let Topology { host, client, .. } = &scene.topology;
            host.forwards(true).unwrap();
            scene.host_answers_by(family, "eth0");
            scene.client_comes_by(family, "eth1");
            let (far, via) = (Scene::far_client(family), scene.router(family, "eth1"));
            host.ip(&format!("route add {far} via {via} dev eth1 table 2"))
                .unwrap();
            let number = if far.is_ipv4() { 4 } else { 6 };
            host.run(&format!("ip -{number} rule add fwmark 2 table 2"))
                .unwrap();
            host.feed("nft -f -", MARKS).unwrap();
            let ip = if far.is_ipv4() { "ip" } else { "ip6" };
            let drops = format!(
                "table inet lost {{\nchain prerouting {{\n\
                 type filter hook prerouting priority raw;\niifname eth0 {ip} daddr {far} drop\n}}\n}}\n"
            );
            client.feed("nft -f -", &drops).unwrap();
            let spec = spec(&scene.topology.backend, family, protocol);
            let daemon = Daemon::start(host, &[&spec], Datapath::Auto).unwrap();
            for _ in 0..2 {
                ask(client, protocol, scene.frontend(family), "hello")
                    .unwrap_or_else(|error| panic!("{family:?}: {error:#}"));
            }
            assert!(daemon.counted("marks_decide").unwrap() > 0);
            // Others are carried as ever.
            on_the_fast_path(&daemon, || {
                let frontend = SocketAddr::new(scene.host(family, "eth1"), PORT);
                ask(client, protocol, frontend, "hello").unwrap();
            });
            daemon.stop().unwrap();
        }
    }
}

/// Two ways to the Internet: each client is answered by the one that it came by. IPv6 knows no such way but by rules.
#[test]
fn who_comes_by_a_default_route_is_answered_by_it() {
    for forwards in [true, false] {
        let (scene, family) = (Scene::new(Protocol::Tcp), Family::V4);
        scene.topology.host.forwards(forwards).unwrap();
        let Topology { host, client, .. } = &scene.topology;
        for (uplink, metric) in [("eth0", 100), ("eth1", 200)] {
            let via = scene.router(family, uplink);
            let route = format!("route add default via {via} dev {uplink} metric {metric}");
            host.ip(&route).unwrap();
        }
        scene.client_comes_by(family, "eth1");
        let daemon = scene.start(family, Protocol::Tcp, &[]);
        let sent = || {
            let shown = host.run("cat /proc/net/dev").unwrap();
            let line = shown.lines().find(|it| it.trim().starts_with("eth1"));
            let field = line.unwrap().split_whitespace().nth(10);
            field.unwrap().parse::<u64>().unwrap()
        };
        let mut conversation = Connection::open(client, scene.frontend(family)).unwrap();
        let before = sent();
        for _ in 0..20 {
            conversation.ask("asked").unwrap();
        }
        let after = sent();
        assert!(
            after >= before + 20,
            "{before} then {after} packets by eth1"
        );
        daemon.stop().unwrap();
    }
}

/// A machine on one network takes an address of the other's, which the allow-list trusts. The host asks for the reverse path
/// (rp_filter 1).
#[test]
fn a_machine_of_one_uplinks_network_does_not_speak_for_the_others() {
    for forwards in [true, false] {
        let scene = Scene::new(Protocol::Udp);
        let Topology { host, client, .. } = &scene.topology;
        host.forwards(forwards).unwrap();
        host.set("ipv4/conf/all/rp_filter", "1").unwrap();
        let daemon = scene.start(Family::V4, Protocol::Udp, &["--allow", "192.0.2.0/24"]);
        let by_its_own = SocketAddr::from(([192, 0, 2, 2], PORT));
        let answer = ask(client, Protocol::Udp, by_its_own, "honest").unwrap();
        assert_eq!(answer.seen.ip(), IpAddr::from([192, 0, 2, 9]));

        let mac = host
            .mac("eth0")
            .unwrap()
            .map(|octet| format!("{octet:02x}"));
        let (mac, frontend) = (mac.join(":"), scene.host(Family::V4, "eth0"));
        client
            .ip(&format!(
                "addr add 192.0.2.77/32 dev lo\nneigh replace {frontend} lladdr {mac} dev eth0"
            ))
            .unwrap();
        let forger = client.enter(|| UdpSocket::bind("192.0.2.77:4000")).unwrap();
        forger
            .send_to(b"forged", scene.frontend(Family::V4))
            .unwrap();
        wait_until("the forgery is counted", || {
            daemon.counted("martian_source").unwrap() > 0
        });
        assert_eq!(
            scene.backend.requests(),
            1,
            "the forgery reached the backend"
        );
        daemon.stop().unwrap();
    }
}

/// Has a machine on the first uplink's network send a datagram with a source on the other's; the host asks for the reverse path
/// (rp_filter 1) and drops it.
#[track_caller]
fn is_dropped_by_the_first_uplink(
    scene: &Scene,
    daemon: &Daemon,
    source: SocketAddr,
    to: SocketAddr,
) {
    let Topology { host, client, .. } = &scene.topology;
    let mut forged = Frame::first(Protocol::Udp, source, to);
    forged.destination_mac = host.mac("eth0").unwrap();
    forged.payload = b"forged".to_vec();
    let before = daemon.counted("martian_source").unwrap();
    Wire::open(client, "eth0")
        .unwrap()
        .send(&forged.bytes())
        .unwrap();
    wait_for("the forgery is counted", || {
        (daemon.counted("martian_source").ok()? > before).then_some(())
    })
    .unwrap();
}

#[test]
fn a_machine_of_one_uplinks_network_does_not_join_the_others_conversation() {
    for forwards in [true, false] {
        let scene = Scene::new(Protocol::Udp);
        let Topology { host, client, .. } = &scene.topology;
        host.forwards(forwards).unwrap();
        host.set("ipv4/conf/all/rp_filter", "1").unwrap();
        let daemon = scene.start(Family::V4, Protocol::Udp, &[]);
        let frontend = SocketAddr::from(([192, 0, 2, 2], PORT));
        let socket = client.enter(|| UdpSocket::bind("192.0.2.9:4000")).unwrap();
        ask_by(&socket, frontend, "before").unwrap();
        let source = socket.local_addr().unwrap();
        is_dropped_by_the_first_uplink(&scene, &daemon, source, frontend);
        assert_eq!(ask_by(&socket, frontend, "after").unwrap().payload, "after");
        assert_eq!(
            scene.backend.requests(),
            2,
            "the forgery reached the backend"
        );
        daemon.stop().unwrap();
    }
}

#[test]
fn a_machine_of_one_uplinks_network_does_not_answer_for_the_others() {
    for forwards in [true, false] {
        let scene = Scene::new(Protocol::Udp);
        let Topology { host, client, .. } = &scene.topology;
        host.forwards(forwards).unwrap();
        host.set("ipv4/conf/all/rp_filter", "1").unwrap();
        let _remote = Backend::start(client, Protocol::Udp, BACKEND_PORT).unwrap();
        let backend = SocketAddr::from(([192, 0, 2, 9], BACKEND_PORT));
        let specs = [format!("{PORT}:{backend}/udp")];
        let daemon = Daemon::start(host, &[&specs[0]], Datapath::Ebpf).unwrap();
        let socket = host.enter(|| UdpSocket::bind("127.0.0.1:0")).unwrap();
        let frontend = SocketAddr::from(([127, 0, 0, 1], PORT));
        let mut seen = None;
        on_the_fast_path(&daemon, || {
            seen = Some(ask_by(&socket, frontend, "before").unwrap().seen);
        });
        is_dropped_by_the_first_uplink(&scene, &daemon, backend, seen.unwrap());
        let answer = ask_by(&socket, frontend, "after").unwrap();
        assert_eq!(answer.payload, "after");
        daemon.stop().unwrap();
    }
}
