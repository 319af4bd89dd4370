//! Other networks than an Ethernet card with an address: what the uplink is, how long its packets may be, and
//! which families there are. In each, clients are served by the kernel, or the list says why not.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use forwarder::datapath::kernel::kernel;
use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::wait_for,
    netns::Netns,
    topology::{
        Family::{self, V4, V6},
        Topology,
    },
    traffic::{Backend, Connection, Protocol, ask, send_datagram},
    tun,
};

use crate::scene::{
    BACKEND_PORT, PORT, Scene, backends, packets, suffix, wait_for_delivery, wait_for_peer,
};

pub(crate) const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];
pub(crate) const FAMILIES: [Family; 2] = [V4, V6];
/// What one request carries, where its length does not matter.
pub(crate) const WORD: [usize; 1] = [5];

/// Whether the kernel has a kind of device, by its own word. `cargo xtask vm` sets the variable: its kernels have all.
pub(crate) fn has(kind: &str, options: &str) -> bool {
    let there = Netns::new("there").unwrap();
    there.ip("link add eth0 type veth peer name eth1").unwrap();
    let made = there.run(&format!("ip link add name probe0 {options} type {kind}"));
    if let Err(error) = &made {
        let error = format!("{error:#}");
        assert!(
            error.contains("Unknown device type")
                && std::env::var_os("FORWARDER_TEST_DEVICES").is_none(),
            "{error}"
        );
        eprintln!("this kernel says that it has no {kind}");
    }
    made.is_ok()
}

/// Publishes a port of each address and protocol.
pub(crate) fn publish(
    host: &Netns,
    frontends: [IpAddr; 2],
    backend: impl Fn(Family) -> IpAddr,
    datapath: Datapath,
) -> Daemon {
    let specs: Vec<String> = FAMILIES
        .into_iter()
        .zip(frontends)
        .flat_map(|(family, address)| {
            let backend = SocketAddr::new(backend(family), BACKEND_PORT);
            let frontend = SocketAddr::new(address, PORT);
            PROTOCOLS.map(|protocol| format!("{frontend}:{backend}{}", suffix(protocol)))
        })
        .collect();
    let specs: Vec<&str> = specs.iter().map(String::as_str).collect();
    Daemon::start(host, &specs, datapath).unwrap()
}

/// Asserts that requests of such lengths are answered and carried by the fast path both ways, and who the backend saw.
#[track_caller]
pub(crate) fn carried(
    daemon: &Daemon,
    client: &Netns,
    protocol: Protocol,
    frontend: IpAddr,
    lengths: &[usize],
    seen: IpAddr,
) {
    let before = packets(daemon);
    let said = || format!("{:?}\n{}", daemon.list(), daemon.said());
    let frontend = SocketAddr::new(frontend, PORT);
    for &length in lengths {
        let payload = "x".repeat(length);
        let answer = ask(client, protocol, frontend, &payload)
            .unwrap_or_else(|error| panic!("{length} bytes: {error:#}\n{}", said()));
        assert!(answer.payload == payload, "another answer\n{}", said());
        assert_eq!(answer.seen.ip(), seen, "who the backend saw\n{}", said());
    }
    let (after, count) = (packets(daemon), lengths.len() as u64);
    assert!(
        after.0 >= before.0 + count && after.1 >= before.1 + count,
        "{protocol:?} to {frontend} not by the fast path: {before:?} then {after:?}\n{}",
        said()
    );
}

/// The usual clients of a container are served by the kernel, and the backend sees who they are.
#[track_caller]
pub(crate) fn served(topology: &Topology, lengths: &[usize]) {
    let Topology {
        host,
        client,
        backend,
        peer,
        ..
    } = topology;
    let _backends = backends(&backend.netns);
    let lan = FAMILIES.map(|family| topology.host_address(family));
    let daemon = publish(host, lan, |family| backend.address(family), Datapath::Ebpf);
    wait_for_peer(&daemon);
    let link = host.run(&format!("ip link show {}", backend.veth)).unwrap();
    let (_, mtu) = link.split_once(" mtu ").unwrap();
    let mtu: usize = mtu.split(' ').next().unwrap().parse().unwrap();
    for (family, frontend) in FAMILIES.into_iter().zip(lan) {
        for protocol in PROTOCOLS {
            let clients = [
                (client, topology.client_address(family)),
                (&peer.netns, peer.address(family)),
                (host, frontend),
            ];
            for (from, seen) in clients {
                // Before 6.1 nothing but the proxy gets the longer ones to the container.
                let by_proxy =
                    !kernel().peer_from_lo && (protocol, seen) == (Protocol::Udp, frontend);
                let (longer, others): (Vec<usize>, Vec<usize>) = lengths
                    .iter()
                    .partition(|length| by_proxy && **length > mtu - 48);
                carried(&daemon, from, protocol, frontend, &others, seen);
                for length in longer {
                    let to = SocketAddr::new(frontend, PORT);
                    let answer = ask(from, protocol, to, &"x".repeat(length)).unwrap();
                    assert_eq!(answer.seen.ip(), backend.gateway(family));
                }
            }
        }
    }
    daemon.stop().unwrap();
}

/// A backend on the client's machine is reached by the kernel, from this host and from a container. It sees the
/// address that this host would use itself.
#[track_caller]
pub(crate) fn reaches_another_machine(topology: &Topology) {
    let _backends = backends(&topology.client);
    let peer = &topology.peer;
    let gateways = FAMILIES.map(|family| peer.gateway(family));
    let far = |family| topology.client_address(family);
    let daemon = publish(&topology.host, gateways, far, Datapath::Ebpf);
    for (family, frontend) in FAMILIES.into_iter().zip(gateways) {
        let route = format!("ip route get {}", far(family));
        let route = topology.host.run(&route).unwrap();
        let (_, own) = route.split_once(" src ").unwrap();
        let own: IpAddr = own.split(' ').next().unwrap().parse().unwrap();
        for protocol in PROTOCOLS {
            for from in [&topology.host, &peer.netns] {
                carried(&daemon, from, protocol, frontend, &WORD, own);
            }
        }
    }
    daemon.stop().unwrap();
}

/// Commands that give a device the addresses of the host or the client.
fn addressed(topology: &Topology, device: &str, of: fn(&Topology, Family) -> IpAddr) -> String {
    format!(
        "addr add {}/24 dev {device}\naddr add {}/64 dev {device} nodad\nlink set {device} up\n",
        of(topology, V4),
        of(topology, V6)
    )
}

/// Moves the host's address from eth0 to a device that `commands` make.
pub(crate) fn uplink_is(topology: &Topology, device: &str, commands: &str) {
    let addresses = addressed(topology, device, Topology::host_address);
    topology
        .host
        .ip(&format!("addr flush dev eth0\n{commands}\n{addresses}"))
        .unwrap();
}

/// The same for the client.
pub(crate) fn client_is(topology: &Topology, device: &str, commands: &str) {
    let addresses = addressed(topology, device, Topology::client_address);
    topology
        .client
        .ip(&format!("addr flush dev eth0\n{commands}\n{addresses}"))
        .unwrap();
}

/// Gives every device of the scene an MTU.
fn mtu(topology: &Topology, mtu: u32) {
    let Topology {
        host,
        client,
        backend,
        peer,
        ..
    } = topology;
    let mut commands = String::new();
    for device in ["eth0", &backend.veth, &peer.veth, "br0"] {
        commands += &format!("link set {device} mtu {mtu}\n");
    }
    host.ip(&commands).unwrap();
    for netns in [client, &backend.netns, &peer.netns] {
        netns.ip(&format!("link set eth0 mtu {mtu}")).unwrap();
    }
}

/// As long as one packet, longer, and many.
fn lengths(mtu: usize) -> [usize; 4] {
    [5, mtu - 100, mtu + 100, 20_000]
}

#[test]
fn frames_of_9000_bytes_are_carried_whole() {
    let topology = Topology::new().unwrap();
    mtu(&topology, 9000);
    served(&topology, &lengths(9000));
}

#[test]
fn a_network_of_1280_bytes_is_served() {
    let topology = Topology::new().unwrap();
    mtu(&topology, 1280);
    served(&topology, &lengths(1280));
}

#[test]
fn an_uplink_that_is_a_bond_outlives_one_of_its_ports() {
    if !has("bond", "") {
        return;
    }
    let topology = Topology::new().unwrap();
    let Topology { host, client, .. } = &topology;
    host.ip(&format!(
        "link add eth1 type veth peer name eth1 netns {}",
        client.path()
    ))
    .unwrap();
    uplink_is(
        &topology,
        "bond0",
        "link add bond0 type bond mode active-backup miimon 20\n\
         link set eth0 down\nlink set eth0 master bond0\nlink set eth1 master bond0\n\
         link set bond0 type bond active_slave eth0",
    );
    client_is(
        &topology,
        "lan",
        "link add lan type bridge\nlink set eth0 master lan\n\
         link set eth1 up\nlink set eth1 master lan",
    );
    served(&topology, &WORD);
    reaches_another_machine(&topology);

    let _backends = backends(&topology.backend.netns);
    let lan = FAMILIES.map(|family| topology.host_address(family));
    let backend = |family| topology.backend.address(family);
    let daemon = publish(host, lan, backend, Datapath::Ebpf);
    let mut conversation = Connection::open(client, SocketAddr::new(lan[0], PORT)).unwrap();
    conversation.ask("before").unwrap();
    client.ip("link set eth0 down").unwrap();
    conversation.ask("after").unwrap();
    let active = host.run("ip -d link show bond0").unwrap();
    assert!(active.contains("active_slave eth1"), "{active}");
    daemon.stop().unwrap();
}

/// As a pod's: its gateway is on no network of this host's.
#[test]
fn an_uplink_with_a_route_to_its_gateway_alone_is_served() {
    let topology = Topology::new().unwrap();
    let far: [IpAddr; 2] = ["203.0.113.9", "2001:db8:3::9"].map(|it| it.parse().unwrap());
    let (mut on_host, mut on_client) = (String::from("addr flush dev eth0\n"), String::new());
    for ((family, far), (length, nodad)) in FAMILIES
        .into_iter()
        .zip(far)
        .zip([(32, ""), (128, "nodad")])
    {
        let [own, router] =
            [Topology::host_address, Topology::client_address].map(|of| of(&topology, family));
        on_host += &format!(
            "addr add {own}/{length} dev eth0 {nodad}\nroute add {router}/{length} dev eth0\n\
             route add default via {router}\n"
        );
        on_client += &format!(
            "addr add {far}/{length} dev lo {nodad}\nroute add {own}/{length} dev eth0 src {far}\n"
        );
    }
    topology.host.ip(&on_host).unwrap();
    topology.client.ip(&on_client).unwrap();
    let _backends = backends(&topology.backend.netns);
    let lan = FAMILIES.map(|family| topology.host_address(family));
    let backend = |family| topology.backend.address(family);
    let daemon = publish(&topology.host, lan, backend, Datapath::Ebpf);
    for (frontend, far) in lan.into_iter().zip(far) {
        for protocol in PROTOCOLS {
            carried(&daemon, &topology.client, protocol, frontend, &WORD, far);
        }
    }
    daemon.stop().unwrap();
}

pub(crate) const BRIDGED: &str = "link add lan type bridge\nlink set eth0 master lan";

#[test]
fn an_uplink_that_is_a_bridge_is_served() {
    let topology = Topology::new().unwrap();
    uplink_is(&topology, "lan", BRIDGED);
    served(&topology, &WORD);
    // Its port is a veth, as a container's is. The default route tells that it leads elsewhere.
    let router = FAMILIES.map(|family| topology.client_address(family));
    topology
        .host
        .ip(&format!(
            "route add default via {}\nroute add default via {}",
            router[0], router[1]
        ))
        .unwrap();
    reaches_another_machine(&topology);
}

#[test]
fn a_bridge_with_a_mac_of_its_own_is_served() {
    let topology = Topology::new().unwrap();
    let commands = format!("{BRIDGED}\nlink set lan address 02:aa:bb:cc:dd:ee");
    uplink_is(&topology, "lan", &commands);
    served(&topology, &WORD);
}

/// Moves the backend to a bridge of its own, as a firewall has one for each machine: a veth pair connects it with the bridge that has
/// the addresses.
fn move_behind(topology: &Topology) {
    let veth = &topology.backend.veth;
    let commands = format!(
        "link add name behind type bridge\nlink set behind up\n\
         link add way0 type veth peer name way1\nlink set way0 master br0 up\n\
         link set way1 master behind up\nlink set {veth} master behind"
    );
    topology.host.ip(&commands).unwrap();
}

#[test]
fn a_container_on_a_bridge_behind_another_is_served() {
    let topology = Topology::new().unwrap();
    move_behind(&topology);
    let Topology { host, backend, .. } = &topology;
    let _backends = backends(&backend.netns);
    let lan = FAMILIES.map(|family| topology.host_address(family));
    let daemon = publish(host, lan, |family| backend.address(family), Datapath::Ebpf);
    for (family, frontend) in FAMILIES.into_iter().zip(lan) {
        for protocol in PROTOCOLS {
            for (from, seen) in [
                (&topology.client, topology.client_address(family)),
                (&topology.peer.netns, topology.peer.address(family)),
                (host, frontend),
                (&backend.netns, backend.gateway(family)),
            ] {
                carried(&daemon, from, protocol, frontend, &WORD, seen);
            }
        }
    }
    wait_for_peer(&daemon);
    // Each bridge answers ARP for the gateway.
    let mac = "02:00:00:00:be:01";
    host.ip(&format!("link set behind address {mac}")).unwrap();
    let neighbour = format!(
        "neigh replace {} dev eth0 lladdr {mac}",
        backend.gateway(V4)
    );
    backend.netns.ip(&neighbour).unwrap();
    for (from, seen) in [
        (host, lan[0]),
        (&topology.client, topology.client_address(V4)),
    ] {
        carried(&daemon, from, Protocol::Tcp, lan[0], &WORD, seen);
    }
    daemon.stop().unwrap();
}

/// The two ends of a tunnel without Ethernet headers, in place of the wire between host and client.
fn tunnel(topology: &Topology) -> tun::Wire {
    let Topology { host, client, .. } = topology;
    let wire = tun::Wire::between(tun::Kind::Tun, [(host, "tun0"), (client, "tun0")]).unwrap();
    uplink_is(topology, "tun0", "link set tun0 mtu 1420");
    client_is(topology, "tun0", "link set tun0 mtu 1420");
    wire
}

#[test]
fn a_tunnel_without_ethernet_headers_is_served() {
    let topology = Topology::new().unwrap();
    let _wire = tunnel(&topology);
    served(&topology, &lengths(1420));
}

#[test]
fn a_backend_behind_a_tunnel_without_ethernet_headers_is_reached() {
    let topology = Topology::new().unwrap();
    let _wire = tunnel(&topology);
    reaches_another_machine(&topology);
}

#[test]
fn a_tunnel_that_comes_later_is_served_and_traced() {
    let topology = Topology::new().unwrap();
    let _backends = backends(&topology.backend.netns);
    let lan = FAMILIES.map(|family| topology.host_address(family));
    let backend = |family| topology.backend.address(family);
    let daemon = publish(&topology.host, lan, backend, Datapath::Ebpf);
    let _wire = tunnel(&topology);
    let ask = || {
        ask(
            &topology.client,
            Protocol::Udp,
            SocketAddr::new(lan[0], PORT),
            "x",
        )
    };
    wait_for("the tunnel is served by the fast path", || {
        let answer = ask().ok()?;
        (answer.seen.ip() == topology.client_address(V4)).then_some(())
    })
    .unwrap();
    let client = topology.client_address(V4).to_string();
    daemon
        .trace(&[], |line| line.contains(&client), || drop(ask()))
        .unwrap();
    let (client, seen) = (&topology.client, topology.client_address(V4));
    carried(&daemon, client, Protocol::Udp, lan[0], &WORD, seen);
    daemon.stop().unwrap();
}

#[test]
fn a_tunnel_is_served_while_the_daemon_is_dead_and_when_it_is_back() {
    let topology = Topology::new().unwrap();
    let _wire = tunnel(&topology);
    let client = &topology.client;
    let _backends = backends(&topology.backend.netns);
    let lan = FAMILIES.map(|family| topology.host_address(family));
    let backend = |family| topology.backend.address(family);
    let mut daemon = publish(&topology.host, lan, backend, Datapath::Ebpf);
    let frontend = SocketAddr::new(lan[0], PORT);
    let mut conversation = Connection::open(client, frontend).unwrap();
    conversation.ask("before").unwrap();
    daemon.kill().unwrap();
    conversation.ask("meanwhile").unwrap();
    let answer = ask(client, Protocol::Tcp, frontend, "new").unwrap();
    assert_eq!(answer.seen.ip(), topology.client_address(V4));
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Relaxed) {
                conversation.ask("while it comes back").unwrap();
            }
        });
        let restarted = daemon.restart();
        ended.store(true, Relaxed);
        restarted.unwrap();
    });
    conversation.ask("after").unwrap();
    let seen = topology.client_address(V4);
    carried(&daemon, client, Protocol::Tcp, lan[0], &WORD, seen);
    daemon.stop().unwrap();
}

#[test]
fn somebodys_filter_on_a_tunnel_finds_the_ip_header_where_it_was() {
    const DROPPED: u16 = 7777;
    let topology = Topology::new().unwrap();
    let _wire = tunnel(&topology);
    topology.host.run("tc qdisc add dev tun0 clsact").unwrap();
    // Classic BPF: UDP (offset 9) to that port (offset 22) is dropped, all else goes on.
    let code = format!("6,48 0 0 9,21 0 3 17,40 0 0 22,21 0 1 {DROPPED},6 0 0 2,6 0 0 4294967295");
    let filter = format!(
        "filter add dev tun0 ingress prio 10 protocol all bpf bytecode '{code}' direct-action\n"
    );
    topology.host.feed("tc -batch -", &filter).unwrap();
    let dropped = Backend::start(&topology.host, Protocol::Udp, DROPPED).unwrap();
    let _backends = backends(&topology.backend.netns);
    let lan = FAMILIES.map(|family| topology.host_address(family));
    let backend = |family| topology.backend.address(family);
    let daemon = publish(&topology.host, lan, backend, Datapath::Ebpf);
    send_datagram(&topology.client, SocketAddr::new(lan[0], DROPPED), "x").unwrap();
    let (client, seen) = (&topology.client, topology.client_address(V4));
    carried(&daemon, client, Protocol::Udp, lan[0], &WORD, seen);
    assert_eq!(dropped.requests(), 0, "the filter let a datagram pass");
    daemon.stop().unwrap();
}

#[test]
fn a_tunnel_with_other_headers_is_left_to_user_space_with_its_reason() {
    if !has("gre local 198.51.100.2 remote 198.51.100.9", "") {
        return;
    }
    let topology = Topology::new().unwrap();
    let Topology { host, client, .. } = &topology;
    let [v4, v6] = FAMILIES.map(|family| {
        [1, 2].map(|machine| match family {
            V4 => IpAddr::from([192, 0, 2, machine]),
            V6 => format!("2001:db8:9::{machine}").parse().unwrap(),
        })
    });
    for (netns, at, local, remote) in [
        (
            host,
            0,
            topology.host_address(V4),
            topology.client_address(V4),
        ),
        (
            client,
            1,
            topology.client_address(V4),
            topology.host_address(V4),
        ),
    ] {
        netns
            .ip(&format!(
                "link add gre1 type gre local {local} remote {remote}\nlink set gre1 up\n\
                 addr add {}/24 dev gre1\naddr add {}/64 dev gre1 nodad",
                v4[at], v6[at]
            ))
            .unwrap();
    }
    let far = [v4[1], v6[1]];
    let near = [v4[0], v6[0]];

    // A backend behind it.
    let _far = backends(client);
    let gateways = FAMILIES.map(|family| topology.peer.gateway(family));
    let daemon = publish(
        host,
        gateways,
        |family| far[family as usize],
        Datapath::Auto,
    );
    for entry in daemon.list().unwrap() {
        assert_eq!(entry.datapath, "userland", "{entry:?}");
        let reason = entry.reason();
        assert!(reason.contains("gre1"), "{reason}");
    }
    for (gateway, seen) in gateways.into_iter().zip(near) {
        for protocol in PROTOCOLS {
            let frontend = SocketAddr::new(gateway, PORT);
            let answer = ask(&topology.peer.netns, protocol, frontend, "hello").unwrap();
            assert_eq!(answer.seen.ip(), seen);
        }
    }
    daemon.stop().unwrap();

    // Clients that come by it.
    let _near = backends(&topology.backend.netns);
    let backend = |family| topology.backend.address(family);
    let daemon = publish(host, near, backend, Datapath::Auto);
    for (family, address) in FAMILIES.into_iter().zip(near) {
        for protocol in PROTOCOLS {
            let answer = ask(client, protocol, SocketAddr::new(address, PORT), "hello").unwrap();
            assert_eq!(answer.seen.ip(), topology.backend.gateway(family));
        }
    }
    daemon.stop().unwrap();
}

#[test]
fn every_one_of_many_addresses_is_served_and_answers() {
    let topology = Topology::new().unwrap();
    let Topology { host, backend, .. } = &topology;
    let many: Vec<String> = (20..220).map(|n| format!("198.51.100.{n}")).collect();
    let mut commands: String = many
        .iter()
        .map(|address| format!("addr add {address}/24 dev eth0\n"))
        .collect();
    for n in 20..220 {
        commands += &format!("addr add 2001:db8:100::{n}/64 dev eth0 nodad\n");
    }
    host.ip(&commands).unwrap();
    let _backends = backends(&backend.netns);
    let any = ["0.0.0.0", "::"].map(|address| address.parse().unwrap());
    let daemon = publish(host, any, |family| backend.address(family), Datapath::Ebpf);
    for n in [20, 119, 219] {
        for (frontend, family) in [
            (format!("198.51.100.{n}"), V4),
            (format!("2001:db8:100::{n}"), V6),
        ] {
            let frontend = frontend.parse().unwrap();
            for protocol in PROTOCOLS {
                let (client, seen) = (&topology.client, topology.client_address(family));
                carried(&daemon, client, protocol, frontend, &WORD, seen);
            }
        }
    }
    daemon.stop().unwrap();
    reaches_another_machine(&topology);
}

#[test]
fn an_uplink_in_a_vrf_is_served() {
    if !has("vrf table 10", "") {
        return;
    }
    let topology = Topology::new().unwrap();
    let Topology {
        host,
        client,
        backend,
        peer,
        ..
    } = &topology;
    host.ip("link add blue type vrf table 10\nlink set blue up\nlink set eth0 master blue")
        .unwrap();
    // A device that changes sides loses its IPv6 addresses.
    let _ = host.ip(&format!(
        "addr add {}/64 dev eth0 nodad",
        topology.host_address(V6)
    ));
    let _backends = backends(&backend.netns);
    let lan = FAMILIES.map(|family| topology.host_address(family));
    let any = ["0.0.0.0", "::"].map(|address| address.parse().unwrap());
    let daemon = publish(host, any, |family| backend.address(family), Datapath::Ebpf);
    for (family, frontend) in FAMILIES.into_iter().zip(lan) {
        for protocol in PROTOCOLS {
            for (from, seen) in [
                (client, topology.client_address(family)),
                (&peer.netns, peer.address(family)),
            ] {
                carried(&daemon, from, protocol, frontend, &WORD, seen);
            }
        }
    }
    daemon.stop().unwrap();
}

/// A host that has no IPv6: its kernel was started without (`cargo xtask vm` does that too), or it is turned off.
mod without_ipv6 {
    use super::*;

    fn turned_off() -> Topology {
        let topology = Topology::new().unwrap();
        let switch = "/proc/sys/net/ipv6/conf/all/disable_ipv6";
        topology.host.enter(|| {
            if std::fs::exists(switch).unwrap() {
                std::fs::write(switch, "1").unwrap();
            }
        });
        topology
    }

    #[test]
    fn ipv4_is_served_by_the_kernel() {
        for protocol in PROTOCOLS {
            let scene = Scene::of(V4, protocol).start_in(turned_off());
            let (topology, daemon) = scene.parts();
            wait_for_delivery(daemon);
            let Topology {
                host,
                client,
                backend,
                ..
            } = topology;
            let lan = topology.host_address(V4);
            for (from, to, seen) in [
                (client, lan, topology.client_address(V4)),
                (host, V4.localhost(), backend.gateway(V4)),
            ] {
                carried(daemon, from, protocol, to, &WORD, seen);
            }
            scene.stop();
        }
    }

    #[test]
    fn a_wide_range_and_the_proxy_do_without() {
        let range = format!("8000-8999:172.31.0.2:{BACKEND_PORT}");
        for datapath in [Datapath::Ebpf, Datapath::Userland] {
            let scene = Scene::tcp().publishing(&[&range]).by(datapath);
            let scene = scene.start_in(turned_off());
            assert_eq!(scene.ask("hello").unwrap().payload, "hello");
            scene.stop();
        }
    }

    #[test]
    fn an_ipv6_backend_is_left_to_user_space_with_its_reason() {
        let scene = Scene::tcp().auto().start_in(turned_off());
        let (topology, daemon) = scene.parts();
        let backend = SocketAddr::new(topology.backend.address(V6), BACKEND_PORT);
        let published = daemon.control(&["publish", &format!("8081:{backend}")]);
        if published.is_ok() {
            let list = daemon.list().unwrap();
            let entry = list.iter().find(|entry| entry.frontend.port == 8081);
            let reason = entry.unwrap().reason();
            assert!(reason.starts_with("no route to"), "{reason}");
        }
        let (client, lan) = (&topology.client, topology.host_address(V4));
        let seen = topology.client_address(V4);
        carried(daemon, client, Protocol::Tcp, lan, &WORD, seen);
        scene.stop();
    }
}
