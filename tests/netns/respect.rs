//! `--respect-firewall`: what FORWARD rules decide on is the traffic of other machines, as Docker's own NAT shows it to
//! them; what they let pass is served as ever, and answers come from the frontend.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpStream, UdpSocket},
};

use forwarder_tests::{
    deadline::patience,
    document::Delivery,
    topology::{
        Family::{self, V4, V6},
        Topology,
    },
    traffic::{
        Backend,
        Protocol::{self, Tcp, Udp},
        ask, send_datagram,
    },
    tun,
};

use crate::{
    bulk::there_and_back,
    filters::{DROPPED, somebodys_filter},
    machine::bridged,
    scene::{BACKEND_PORT, PORT, Scene, Setting, on_the_fast_path, spec, wait_for_delivery_by},
};

/// The usual client.
const CLIENT: &str = "198.51.100.9";
/// No client of the scene.
const NOBODY: &str = "203.0.113.99";

/// Nothing is forwarded but what comes from the client to the backend's own address and port, and what belongs to
/// such a conversation: so a packet that is not as Docker's NAT would leave it does not pass.
fn only_the_client(topology: &Topology, client: &str) {
    let backend = |family| topology.backend.address(family);
    let rules = format!(
        "table inet filter {{ chain forward {{
            type filter hook forward priority 0; policy drop;
            ct state established,related accept
            iifname eth0 oifname br0 ip saddr {client} ip daddr {} meta l4proto {{ tcp, udp }} th dport {BACKEND_PORT} accept
            iifname eth0 oifname br0 ip6 daddr {} meta l4proto {{ tcp, udp }} th dport {BACKEND_PORT} accept
            iifname eth0 reject
        }}
        }}
        table ip nat {{ chain postrouting {{
            type nat hook postrouting priority 100;
            ip saddr 172.31.0.0/24 oifname != br0 masquerade
        }}
        }}\n",
        backend(V4),
        backend(V6),
    );
    topology.host.feed("nft -f -", &rules).unwrap();
}

/// Starts an instance that respects the firewall.
fn respecting(topology: Topology, setting: Setting<'_>) -> Scene {
    let setting = setting.auto().flags(&["--respect-firewall"]);
    setting.start_in(topology)
}

/// The same, where rules let the client of an address alone pass.
fn only_for(client: &str, setting: Setting<'_>) -> Scene {
    let topology = Topology::new().unwrap();
    only_the_client(&topology, client);
    respecting(topology, setting)
}

fn permitted(family: Family, protocol: Protocol) {
    let scene = only_for(CLIENT, Scene::of(family, protocol));
    let delivery = scene.daemon.entry().unwrap().delivery;
    assert_eq!(delivery, Some(Delivery::Stack));
    for _ in 0..2 {
        scene.served_on_the_fast_path();
    }
    scene.stop();
}

#[test]
fn forward_rules_see_tcp_v4() {
    permitted(V4, Tcp);
}

#[test]
fn forward_rules_see_tcp_v6() {
    permitted(V6, Tcp);
}

#[test]
fn forward_rules_see_udp_v4() {
    permitted(V4, Udp);
}

#[test]
fn forward_rules_see_udp_v6() {
    permitted(V6, Udp);
}

/// The refusal of a rule is the host's own ICMP error about a packet that the client has not sent as it is quoted.
#[test]
fn a_forward_rule_refuses_and_the_client_learns_it() {
    let scene = only_for(NOBODY, Scene::tcp());
    let (topology, daemon) = scene.parts();
    let connect = || TcpStream::connect_timeout(&scene.frontend(), patience());
    let error = topology.client.enter(connect).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    assert!(daemon.counted("forwarded_error").unwrap() > 0);
    scene.stop();
}

/// Nothing listens: the backend's own refusal comes back through the rules.
#[test]
fn a_closed_port_is_refused() {
    for (family, protocol) in [(V4, Tcp), (V6, Tcp), (V4, Udp), (V6, Udp)] {
        let scene = only_for(CLIENT, Scene::of(family, protocol).silent());
        let frontend = scene.frontend();
        let error = scene.topology.client.enter(|| match protocol {
            Tcp => TcpStream::connect_timeout(&frontend, patience()).unwrap_err(),
            Udp => {
                let socket = UdpSocket::bind((family.unspecified(), 0)).unwrap();
                socket.connect(frontend).unwrap();
                socket.set_read_timeout(Some(patience())).unwrap();
                socket.send(b"anybody?").unwrap();
                socket.recv(&mut [0; 16]).unwrap_err()
            }
        });
        let kind = error.kind();
        assert_eq!(
            kind,
            ErrorKind::ConnectionRefused,
            "{family:?} {protocol:?}"
        );
        scene.stop();
    }
}

/// What goes into the container directly does not pass it.
#[test]
fn somebodys_filter_on_a_containers_link_decides() {
    let topology = Topology::new().unwrap();
    let Topology { host, backend, .. } = &topology;
    let dropped = Backend::start(&backend.netns, Udp, DROPPED).unwrap();
    let clsact = format!("tc qdisc add dev {} clsact", backend.veth);
    host.run(&clsact).unwrap();
    somebodys_filter(host, &backend.veth, "egress");
    let to_dropped = format!("{DROPPED}:{}:{DROPPED}/udp", backend.address(V4));
    let specs = [spec(backend, V4, Udp), to_dropped];
    let scene = Scene::udp().publishing(&specs);
    let scene = scene.flags(&["--respect-firewall"]).start_in(topology);
    let frontend = SocketAddr::new(scene.frontend().ip(), DROPPED);
    // The first ones find the container's neighbour entry, those behind could go without the stack.
    for _ in 0..20 {
        send_datagram(&scene.topology.client, frontend, "dropped").unwrap();
        scene.served("hello");
    }
    assert_eq!(dropped.requests(), 0, "it went past the filter");
    scene.stop();
}

#[test]
fn the_hosts_own_clients_take_the_direct_way() {
    let scene = only_for(NOBODY, Scene::tcp());
    let Topology { host, backend, .. } = &scene.topology;
    let lan = scene.frontend().ip();
    for (address, seen) in [(V4.localhost(), backend.gateway(V4)), (lan, lan)] {
        on_the_fast_path(&scene.daemon, || {
            let frontend = SocketAddr::new(address, PORT);
            let answer = ask(host, Tcp, frontend, "hello").unwrap();
            assert_eq!(answer.seen.ip(), seen);
        });
    }
    scene.stop();
}

/// As with docker-proxy: INPUT rules see them, and the backend sees its gateway.
#[test]
fn containers_are_served_in_user_space() {
    let scene = respecting(Topology::new().unwrap(), Scene::tcp());
    let (topology, daemon) = scene.parts();
    let containers = [
        &topology.peer,
        &topology.other,
        &topology.ptp,
        &topology.backend,
    ];
    for container in containers {
        let answer = ask(&container.netns, Tcp, scene.frontend(), "hello").unwrap();
        assert_eq!(answer.seen.ip(), topology.backend.gateway(V4));
    }
    assert!(daemon.counted("container_client").unwrap() > 0);
    scene.stop();
}

/// Its link is not known, as that of a virtual machine is not.
#[test]
fn a_machine_reaches_its_own_published_port() {
    let topology = Topology::new().unwrap();
    let machine = bridged(&topology);
    let _backend = Backend::start(&machine, Tcp, BACKEND_PORT).unwrap();
    let scene = Scene::tcp().container(|it| &it.peer).silent();
    let scene = respecting(topology, scene);
    for _ in 0..2 {
        let answer = ask(&machine, Tcp, scene.frontend(), "hello").unwrap();
        assert_eq!(answer.seen.ip(), scene.topology.peer.gateway(V4));
    }
    scene.served("from outside");
    scene.stop();
}

#[test]
fn a_host_that_does_not_forward_serves_in_user_space_until_it_does() {
    let topology = Topology::new().unwrap();
    topology.host.forwards(false).unwrap();
    let scene = respecting(topology, Scene::tcp());
    let (topology, daemon) = scene.parts();
    let entry = daemon.entry().unwrap();
    assert_eq!(entry.datapath, "userland");
    let reason = entry.reason();
    assert!(reason.contains("net.ipv4.ip_forward"), "{reason}");
    let answer = scene.ask("hello").unwrap();
    assert_eq!(answer.seen.ip(), topology.backend.gateway(V4));

    topology.host.forwards(true).unwrap();
    wait_for_delivery_by(daemon, Delivery::Stack);
    scene.served_on_the_fast_path();
    scene.stop();
}

#[test]
fn bulk_passes_both_ways() {
    for family in [V4, V6] {
        let scene = only_for(CLIENT, Scene::of(family, Tcp).silent());
        let Topology {
            backend, client, ..
        } = &scene.topology;
        on_the_fast_path(&scene.daemon, || {
            there_and_back(&backend.netns, client, scene.frontend().ip());
        });
        scene.stop();
    }
}

/// Longer than the MTU: the stack puts the parts together for its rules, and cuts them up again.
#[test]
fn fragments_pass_both_ways() {
    for family in [V4, V6] {
        let scene = only_for(CLIENT, Scene::of(family, Udp));
        on_the_fast_path(&scene.daemon, || scene.served(&"long ".repeat(1000)));
        scene.stop();
    }
}

#[test]
fn conversations_outlive_a_kill_and_a_restart() {
    let mut scene = only_for(CLIENT, Scene::tcp());
    let mut conversation = scene.connect();
    conversation.ask("before").unwrap();
    scene.daemon.kill().unwrap();
    conversation.ask("while it is dead").unwrap();
    scene.daemon.restart().unwrap();
    on_the_fast_path(&scene.daemon, || drop(conversation.ask("after").unwrap()));
    scene.stop();
}

#[test]
fn a_trace_shows_answers_where_they_leave() {
    let scene = respecting(Topology::new().unwrap(), Scene::tcp());
    let back = |line: &str| line.contains("forwarded_reply");
    let line = scene.daemon.trace(&[], back, || scene.served("hello"));
    let line = line.unwrap();
    assert!(
        line.contains("stack") && line.contains(&scene.frontend().to_string()),
        "{line}"
    );
    // And the programs are the plain ones again.
    scene.served_on_the_fast_path();
    scene.stop();
}

/// By such a device answers leave that nothing can rewrite. A fragment shows no port before it has an Ethernet header.
#[test]
fn a_client_behind_a_tunnel_is_served_in_user_space_whatever_it_sends() {
    for (family, network) in [(V4, "203.0.113."), (V6, "2001:db8:77::")] {
        let topology = Topology::new().unwrap();
        let ends = [(&topology.host, "tun0"), (&topology.client, "tun0")];
        let _tunnel = tun::Wire::between(tun::Kind::Tun, ends).unwrap();
        let (prefix, flag) = if family == V4 {
            (24, "")
        } else {
            (64, "nodad")
        };
        for ((netns, device), own) in ends.into_iter().zip([2, 9]) {
            let address = format!("addr add {network}{own}/{prefix} dev {device} {flag}");
            netns
                .ip(&format!("link set {device} up\n{address}"))
                .unwrap();
        }
        let scene = respecting(topology, Scene::of(family, Udp));
        let Topology {
            client, backend, ..
        } = &scene.topology;
        let frontend = SocketAddr::new(format!("{network}2").parse().unwrap(), PORT);
        for length in [1, 3000] {
            let answer = ask(client, Udp, frontend, &"x".repeat(length)).unwrap();
            assert_eq!(answer.seen.ip(), backend.gateway(family));
        }
        scene.stop();
    }
}
