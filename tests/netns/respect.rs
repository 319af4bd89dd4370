//! `--respect-firewall`: what FORWARD rules decide on is the traffic of other machines, as Docker's own NAT shows it to
//! them; what they let pass is served as ever, and answers come from the frontend.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::{patience, wait_for},
    topology::{
        Family::{self, V4, V6},
        Topology,
    },
    traffic::{
        Backend, Connection,
        Protocol::{self, Tcp, Udp},
        ask, send_datagram,
    },
};

use crate::{
    bulk::there_and_back,
    filters::{DROPPED, somebodys_filter},
    scene::{BACKEND_PORT, PORT, on_the_fast_path, served_to_the_client, spec},
};

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

fn start(topology: &Topology, family: Family, protocol: Protocol) -> Daemon {
    let spec = spec(&topology.backend, family, protocol);
    let flags = ["--respect-firewall"];
    Daemon::start_with(&topology.host, &[&spec], Datapath::Auto, &flags).unwrap()
}

fn permitted(family: Family, protocol: Protocol) {
    let topology = Topology::new().unwrap();
    only_the_client(&topology, &topology.client_address(V4).to_string());
    let _backend = Backend::start(&topology.backend.netns, protocol, BACKEND_PORT).unwrap();
    let daemon = start(&topology, family, protocol);
    assert_eq!(daemon.entry().unwrap()["delivery"], "stack");
    let frontend = SocketAddr::new(topology.host_address(family), PORT);
    for _ in 0..2 {
        on_the_fast_path(&daemon, || {
            let answer = ask(&topology.client, protocol, frontend, "hello").unwrap();
            let client = SocketAddr::new(topology.client_address(family), answer.local_port);
            assert_eq!((answer.payload.as_str(), answer.seen), ("hello", client));
        });
    }
    daemon.stop().unwrap();
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
    let topology = Topology::new().unwrap();
    only_the_client(&topology, "203.0.113.99");
    let _backend = Backend::start(&topology.backend.netns, Tcp, BACKEND_PORT).unwrap();
    let daemon = start(&topology, V4, Tcp);
    let frontend = SocketAddr::new(topology.host_address(V4), PORT);
    let error = topology
        .client
        .enter(|| TcpStream::connect_timeout(&frontend, patience()))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    assert!(daemon.counted("forwarded_error").unwrap() > 0);
    daemon.stop().unwrap();
}

/// Nothing listens: the backend's own refusal comes back through the rules.
#[test]
fn a_closed_port_is_refused() {
    let topology = Topology::new().unwrap();
    only_the_client(&topology, &topology.client_address(V4).to_string());
    for (family, protocol) in [(V4, Tcp), (V6, Tcp), (V4, Udp), (V6, Udp)] {
        let daemon = start(&topology, family, protocol);
        let frontend = SocketAddr::new(topology.host_address(family), PORT);
        let error = topology.client.enter(|| match protocol {
            Tcp => TcpStream::connect_timeout(&frontend, patience()).unwrap_err(),
            Udp => {
                let unspecified: IpAddr = match family {
                    V4 => Ipv4Addr::UNSPECIFIED.into(),
                    V6 => Ipv6Addr::UNSPECIFIED.into(),
                };
                let socket = UdpSocket::bind((unspecified, 0)).unwrap();
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
        daemon.stop().unwrap();
    }
}

/// What goes into the container directly does not pass it.
#[test]
fn somebodys_filter_on_a_containers_link_decides() {
    let topology = Topology::new().unwrap();
    let Topology { host, backend, .. } = &topology;
    let ports = [BACKEND_PORT, DROPPED];
    let backends = ports.map(|port| Backend::start(&backend.netns, Udp, port).unwrap());
    let clsact = format!("tc qdisc add dev {} clsact", backend.veth);
    host.run(&clsact).unwrap();
    somebodys_filter(host, &backend.veth, "egress");
    let to_dropped = format!("{DROPPED}:{}:{DROPPED}/udp", backend.address(V4));
    let specs = [&*spec(backend, V4, Udp), &to_dropped];
    let flags = ["--respect-firewall"];
    let daemon = Daemon::start_with(host, &specs, Datapath::Ebpf, &flags).unwrap();
    let frontend = SocketAddr::new(topology.host_address(V4), DROPPED);
    // The first ones find the container's neighbour entry, those behind could go without the stack.
    for _ in 0..20 {
        send_datagram(&topology.client, frontend, "dropped").unwrap();
        served_to_the_client(&topology, Udp, "hello");
    }
    assert_eq!(backends[1].requests(), 0, "it went past the filter");
    daemon.stop().unwrap();
}

#[test]
fn the_hosts_own_clients_take_the_direct_way() {
    let topology = Topology::new().unwrap();
    only_the_client(&topology, "203.0.113.99");
    let _backend = Backend::start(&topology.backend.netns, Tcp, BACKEND_PORT).unwrap();
    let daemon = start(&topology, V4, Tcp);
    for (address, seen) in [
        (Ipv4Addr::LOCALHOST.into(), topology.backend.gateway(V4)),
        (topology.host_address(V4), topology.host_address(V4)),
    ] {
        on_the_fast_path(&daemon, || {
            let frontend = SocketAddr::new(address, PORT);
            let answer = ask(&topology.host, Tcp, frontend, "hello").unwrap();
            assert_eq!(answer.seen.ip(), seen);
        });
    }
    daemon.stop().unwrap();
}

/// As with docker-proxy: INPUT rules see them, and the backend sees its gateway.
#[test]
fn containers_are_served_in_user_space() {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Tcp, BACKEND_PORT).unwrap();
    let daemon = start(&topology, V4, Tcp);
    let frontend = SocketAddr::new(topology.host_address(V4), PORT);
    let containers = [
        &topology.peer,
        &topology.other,
        &topology.ptp,
        &topology.backend,
    ];
    for container in containers {
        let answer = ask(&container.netns, Tcp, frontend, "hello").unwrap();
        assert_eq!(answer.seen.ip(), topology.backend.gateway(V4));
    }
    assert!(daemon.counted("container_client").unwrap() > 0);
    daemon.stop().unwrap();
}

#[test]
fn a_host_that_does_not_forward_serves_in_user_space_until_it_does() {
    let topology = Topology::new().unwrap();
    topology.host.forwards(false).unwrap();
    let _backend = Backend::start(&topology.backend.netns, Tcp, BACKEND_PORT).unwrap();
    let daemon = start(&topology, V4, Tcp);
    let entry = daemon.entry().unwrap();
    assert_eq!(entry["datapath"], "userland");
    let reason = entry["reason"].as_str().unwrap();
    assert!(reason.contains("net.ipv4.ip_forward"), "{reason}");
    let frontend = SocketAddr::new(topology.host_address(V4), PORT);
    let answer = ask(&topology.client, Tcp, frontend, "hello").unwrap();
    assert_eq!(answer.seen.ip(), topology.backend.gateway(V4));

    topology.host.forwards(true).unwrap();
    wait_for("delivery by the stack", || {
        (daemon.entry().ok()?["delivery"] == "stack").then_some(())
    })
    .unwrap();
    on_the_fast_path(&daemon, || served_to_the_client(&topology, Tcp, "hello"));
    daemon.stop().unwrap();
}

#[test]
fn bulk_passes_both_ways() {
    for family in [V4, V6] {
        let topology = Topology::new().unwrap();
        only_the_client(&topology, &topology.client_address(V4).to_string());
        let daemon = start(&topology, family, Tcp);
        on_the_fast_path(&daemon, || {
            let host = topology.host_address(family);
            there_and_back(&topology.backend.netns, &topology.client, host);
        });
        daemon.stop().unwrap();
    }
}

/// Longer than the MTU: the stack puts the parts together for its rules, and cuts them up again.
#[test]
fn fragments_pass_both_ways() {
    for family in [V4, V6] {
        let topology = Topology::new().unwrap();
        only_the_client(&topology, &topology.client_address(V4).to_string());
        let _backend = Backend::start(&topology.backend.netns, Udp, BACKEND_PORT).unwrap();
        let daemon = start(&topology, family, Udp);
        let frontend = SocketAddr::new(topology.host_address(family), PORT);
        let payload = "long ".repeat(1000);
        on_the_fast_path(&daemon, || {
            let answer = ask(&topology.client, Udp, frontend, &payload).unwrap();
            assert_eq!(answer.payload, payload);
            assert_eq!(answer.seen.ip(), topology.client_address(family));
        });
        daemon.stop().unwrap();
    }
}

#[test]
fn conversations_outlive_a_kill_and_a_restart() {
    let topology = Topology::new().unwrap();
    only_the_client(&topology, &topology.client_address(V4).to_string());
    let _backend = Backend::start(&topology.backend.netns, Tcp, BACKEND_PORT).unwrap();
    let mut daemon = start(&topology, V4, Tcp);
    let frontend = SocketAddr::new(topology.host_address(V4), PORT);
    let mut conversation = Connection::open(&topology.client, frontend).unwrap();
    conversation.ask("before").unwrap();
    daemon.kill().unwrap();
    conversation.ask("while it is dead").unwrap();
    daemon.restart().unwrap();
    on_the_fast_path(&daemon, || drop(conversation.ask("after").unwrap()));
    daemon.stop().unwrap();
}

#[test]
fn a_trace_shows_answers_where_they_leave() {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Tcp, BACKEND_PORT).unwrap();
    let daemon = start(&topology, V4, Tcp);
    let frontend = SocketAddr::new(topology.host_address(V4), PORT);
    let line = daemon
        .trace(
            &[],
            |line| line.contains("forwarded_reply"),
            || {
                ask(&topology.client, Tcp, frontend, "hello").unwrap();
            },
        )
        .unwrap();
    assert!(
        line.contains("stack") && line.contains(&frontend.to_string()),
        "{line}"
    );
    // And the programs are the plain ones again.
    on_the_fast_path(&daemon, || served_to_the_client(&topology, Tcp, "hello"));
    daemon.stop().unwrap();
}
