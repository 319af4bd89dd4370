//! Backends on other machines: one beside the client, so that packets leave by the device that they came in by, and one
//! behind another uplink. By tc, and by XDP, which the machines' veths carry once both ends are prepared for it.

use std::net::{SocketAddr, UdpSocket};

use forwarder::datapath::{self, xdp::Mode};
use forwarder_tests::{
    cpu::pin_this_thread,
    daemon::{Daemon, Datapath},
    deadline::{slack, wait_for, wait_until},
    document::Delivery,
    link,
    netns::Netns,
    topology::{
        Family::{self, V4, V6},
        Network,
    },
    traffic::{
        Backend, Connection,
        Protocol::{self, Tcp, Udp},
        ask,
    },
};

use crate::{
    bulk::there_and_back,
    scene::{BACKEND_PORT, PORT, on_the_fast_path, packets, suffix, veths_take_frames_with_gro},
};

/// ```text
///   client ----+
///   near ------+ lan (a bridge) ---- eth0 | host | eth1 ---- far
/// ```
struct Lan {
    host: Netns,
    client: Netns,
    near: Netns,
    far: Netns,
    bridge: Netns,
    /// Programs of the machines at the other ends of the host's veths.
    peers: Vec<datapath::Datapath>,
}

const LAN: Network = Network {
    v4: [198, 51, 100],
    v6: [0x2001, 0xdb8, 0x100, 0],
};
const FAR: Network = Network {
    v4: [203, 0, 113],
    v6: [0x2001, 0xdb8, 0x200, 0],
};
const HOST: u8 = 2;
const CLIENT: u8 = 9;
const OTHER: u8 = 10;

#[derive(Clone, Copy, Debug)]
enum Where {
    Near,
    Far,
}

/// Passes everything: it serves nothing.
fn other_program() -> datapath::Datapath {
    datapath::Datapath::load(&datapath::Options {
        instance: "peer".into(),
        pins: None,
        snat: (1024, 1),
        flows: 1,
        timeouts: forwarder_common::flow::Timeouts::default(),
        respects_firewall: false,
    })
    .unwrap()
}

impl Lan {
    fn new() -> Self {
        let [host, client, near, far, bridge] =
            ["host", "client", "near", "far", "lan"].map(|label| Netns::new(label).unwrap());
        bridge
            .ip("link add lan type bridge\nlink set lan up\n")
            .unwrap();
        for (netns, port) in [(&host, "host0"), (&client, "client0"), (&near, "near0")] {
            bridge
                .ip(&format!(
                    "link add {port} type veth peer name eth0 netns {}\nlink set {port} master lan up\n",
                    netns.path()
                ))
                .unwrap();
        }
        host.ip(&format!(
            "link add eth1 type veth peer name eth0 netns {}\n",
            far.path()
        ))
        .unwrap();
        for (netns, network, machine, device) in [
            (&host, LAN, HOST, "eth0"),
            (&host, FAR, HOST, "eth1"),
            (&client, LAN, CLIENT, "eth0"),
            (&near, LAN, OTHER, "eth0"),
            (&far, FAR, OTHER, "eth0"),
        ] {
            let [v4, v6] = [V4, V6].map(|family| network.address(family, machine));
            netns
                .ip(&format!(
                    "link set lo up\naddr add {v4}/24 dev {device}\naddr add {v6}/64 dev {device} nodad\n\
                     link set {device} up\n"
                ))
                .unwrap();
        }
        Self {
            host,
            client,
            near,
            far,
            bridge,
            peers: Vec::new(),
        }
    }

    /// What native XDP on a veth needs: an other end that takes frames, which one with a program of its own does; and
    /// a host that routes, which XDP asks for the next hop.
    fn with_xdp(mut self) -> Self {
        for (netns, device) in [(&self.bridge, "host0"), (&self.far, "eth0")] {
            let peer = netns.enter(|| {
                let mut datapath = other_program();
                let ifindex = nix::net::if_::if_nametoindex(device).unwrap();
                datapath.attach_xdp(ifindex, Mode::Native).unwrap();
                datapath
            });
            self.peers.push(peer);
        }
        self.host.forwards(true).unwrap();
        self
    }

    /// The same by GRO at the other ends, without programs.
    fn with_gro(self) -> Self {
        for (netns, device) in [(&self.bridge, "host0"), (&self.far, "eth0")] {
            netns.run(&format!("ethtool -K {device} gro on")).unwrap();
        }
        self.host.forwards(true).unwrap();
        self
    }

    /// Senders that finish their checksums, and cut up what is longer than the MTU.
    fn without_offloads(self) -> Self {
        for machine in [&self.client, &self.near, &self.far] {
            machine.run("ethtool -K eth0 tx off").unwrap();
        }
        self
    }

    fn backend(&self, location: Where) -> (&Netns, Network) {
        match location {
            Where::Near => (&self.near, LAN),
            Where::Far => (&self.far, FAR),
        }
    }

    /// One for each protocol on both machines.
    fn backends(&self) -> Vec<Backend> {
        let all = [&self.near, &self.far].map(|netns| [(netns, Tcp), (netns, Udp)]);
        all.into_iter()
            .flatten()
            .map(|(netns, protocol)| Backend::start(netns, protocol, BACKEND_PORT).unwrap())
            .collect()
    }

    fn publish(&self, location: Where, family: Family, protocol: Protocol, xdp: &str) -> Daemon {
        let (_, network) = self.backend(location);
        let backend = SocketAddr::new(network.address(family, OTHER), BACKEND_PORT);
        let spec = format!("{PORT}:{backend}{}", suffix(protocol));
        let flags = ["--xdp", xdp];
        Daemon::start_with(&self.host, &[&spec], Datapath::Ebpf, &flags).unwrap()
    }

    /// Asks from another machine, and from the host itself; the backend sees the host.
    #[track_caller]
    fn served(&self, location: Where, family: Family, protocol: Protocol) {
        let (_, network) = self.backend(location);
        let host = LAN.address(family, HOST);
        for (from, address) in [
            (&self.client, host),
            (&self.host, host),
            (&self.host, family.localhost()),
        ] {
            let frontend = SocketAddr::new(address, PORT);
            let answer = ask(from, protocol, frontend, "hello").unwrap();
            assert_eq!(answer.payload, "hello");
            assert_eq!(answer.seen.ip(), network.address(family, HOST));
        }
    }

    /// The same, again and again: the first packets of a second, and of a flow, are not XDP's.
    fn served_early(&self, daemon: &Daemon, location: Where, family: Family, protocol: Protocol) {
        wait_for("XDP carries packets", || {
            self.served(location, family, protocol);
            (daemon.counted("forwarded_xdp").ok()? > 2).then_some(())
        })
        .unwrap();
    }
}

const ALL: [(Family, Protocol); 4] = [(V4, Tcp), (V6, Tcp), (V4, Udp), (V6, Udp)];

#[test]
fn tc_carries_both_ways() {
    let lan = Lan::new();
    let _backends = lan.backends();
    for location in [Where::Near, Where::Far] {
        for (family, protocol) in ALL {
            let daemon = lan.publish(location, family, protocol, "off");
            let delivery = daemon.entry().unwrap().delivery;
            assert_eq!(delivery, Some(Delivery::Neighbour));
            on_the_fast_path(&daemon, || lan.served(location, family, protocol));
            assert_eq!(daemon.counted("forwarded_xdp").unwrap(), 0);
            daemon.stop().unwrap();
        }
    }
}

fn xdp_carries(mode: &str) {
    let lan = Lan::new().with_xdp().without_offloads();
    let _backends = lan.backends();
    for location in [Where::Near, Where::Far] {
        for (family, protocol) in ALL {
            let daemon = lan.publish(location, family, protocol, mode);
            assert!(
                daemon.said().contains(&format!("{mode} XDP")),
                "{}",
                daemon.said()
            );
            lan.served_early(&daemon, location, family, protocol);
            daemon.stop().unwrap();
        }
    }
}

#[test]
fn native_xdp_carries_both_ways() {
    xdp_carries("native");
}

/// A veth whose other end has GRO and no program keeps frames that are turned round until others follow.
#[test]
fn what_leaves_by_the_veth_that_it_came_in_by_waits_for_nothing_that_follows() {
    let lan = Lan::new();
    let lan = if veths_take_frames_with_gro() {
        lan.with_gro()
    } else {
        lan.with_xdp()
    };
    let lan = lan.without_offloads();
    let _backends = lan.backends();
    for family in [V4, V6] {
        let daemon = lan.publish(Where::Near, family, Udp, "native");
        let socket = lan.client.enter(|| {
            let socket = UdpSocket::bind((family.unspecified(), 0)).unwrap();
            socket.connect((LAN.address(family, HOST), PORT)).unwrap();
            socket
        });
        socket.set_read_timeout(Some(slack())).unwrap();
        wait_for("XDP carries packets", || {
            socket.send(b"hello").unwrap();
            socket.recv(&mut [0; 99]).unwrap(); // of each that was sent once
            (daemon.counted("forwarded_xdp").ok()? > 20).then_some(())
        })
        .unwrap();
        daemon.stop().unwrap();
    }
}

#[test]
fn generic_xdp_carries_both_ways() {
    xdp_carries("generic");
}

/// Checksums that a device would finish, and what is longer than the MTU: XDP leaves them to tc.
#[test]
fn native_xdp_passes_what_it_cannot_carry() {
    let lan = Lan::new().with_xdp();
    for location in [Where::Near, Where::Far] {
        for family in [V4, V6] {
            let daemon = lan.publish(location, family, Tcp, "native");
            let (backend, _) = lan.backend(location);
            on_the_fast_path(&daemon, || {
                there_and_back(backend, &lan.client, LAN.address(family, HOST));
            });
            daemon.stop().unwrap();
        }
    }
}

#[test]
fn bulk_passes_by_native_xdp() {
    let lan = Lan::new().with_xdp().without_offloads();
    for location in [Where::Near, Where::Far] {
        let daemon = lan.publish(location, V4, Tcp, "native");
        let (backend, _) = lan.backend(location);
        there_and_back(backend, &lan.client, LAN.address(V4, HOST));
        assert!(daemon.counted("forwarded_xdp").unwrap() > 1000);
        daemon.stop().unwrap();
    }
}

/// A veth gets none by itself: its other end would lose TSO.
#[test]
fn auto_leaves_veths_alone() {
    let lan = Lan::new();
    let daemon = lan.publish(Where::Far, V4, Tcp, "auto");
    let links = lan.host.run("ip -details link").unwrap();
    assert!(!links.contains("xdp"), "{links}");
    daemon.stop().unwrap();
}

#[test]
fn xdp_drops_what_an_allow_list_refuses() {
    let lan = Lan::new().with_xdp().without_offloads();
    let backend = SocketAddr::new(FAR.address(V4, OTHER), BACKEND_PORT);
    let _backend = Backend::start(&lan.far, Tcp, BACKEND_PORT).unwrap();
    let spec = format!("{PORT}:{backend}");
    let flags = ["--xdp", "native", "--allow", "198.51.100.9/32"];
    let daemon = Daemon::start_with(&lan.host, &[&spec], Datapath::Ebpf, &flags).unwrap();
    let frontend = SocketAddr::new(LAN.address(V4, HOST), PORT);
    ask(&lan.client, Tcp, frontend, "hello").unwrap();
    // tc's own counters see nothing of what XDP drops; the program's do.
    assert_eq!(daemon.counted("not_allowed").unwrap(), 0);
    assert!(ask(&lan.near, Tcp, frontend, "hello").is_err());
    assert!(daemon.counted("not_allowed").unwrap() > 0);
    daemon.stop().unwrap();
}

#[test]
fn the_xdp_program_outlives_a_kill_is_taken_over_and_goes() {
    let lan = Lan::new().with_xdp().without_offloads();
    let _backend = Backend::start(&lan.far, Udp, BACKEND_PORT).unwrap();
    let mut daemon = lan.publish(Where::Far, V4, Udp, "native");
    let attached = || {
        let links = lan.host.run("ip -details link show eth0").unwrap();
        links.contains("xdp")
    };
    daemon.kill().unwrap();
    assert!(attached());
    let frontend = SocketAddr::new(LAN.address(V4, HOST), PORT);
    ask(&lan.client, Udp, frontend, "while it is dead").unwrap();
    daemon.restart().unwrap();
    lan.served_early(&daemon, Where::Far, V4, Udp);
    daemon.stop().unwrap();
    assert!(!attached());
}

#[test]
fn xdp_that_somebody_detached_is_attached_again() {
    let lan = Lan::new().with_xdp().without_offloads();
    let _backend = Backend::start(&lan.far, Udp, BACKEND_PORT).unwrap();
    let daemon = lan.publish(Where::Far, V4, Udp, "native");
    lan.served_early(&daemon, Where::Far, V4, Udp);
    for link in link::held(daemon.pid()).unwrap() {
        if link.kind == "xdp" {
            link.detach().unwrap();
        }
    }
    let before = daemon.counted("forwarded_xdp").unwrap();
    wait_for("XDP carries again", || {
        let frontend = SocketAddr::new(LAN.address(V4, HOST), PORT);
        ask(&lan.client, Udp, frontend, "again?").ok()?;
        (daemon.counted("forwarded_xdp").ok()? > before + 2).then_some(())
    })
    .unwrap();
    // Its pin alone is made again.
    let links = daemon.links();
    for pin in &links {
        std::fs::remove_file(pin).unwrap();
    }
    wait_until("the pins are back", || daemon.links() == links);
    daemon.stop().unwrap();
}

#[test]
fn xdp_that_somebody_replaced_is_tcs_until_they_give_it_back() {
    let lan = Lan::new().with_xdp().without_offloads();
    let _backend = Backend::start(&lan.far, Udp, BACKEND_PORT).unwrap();
    let daemon = lan.publish(Where::Far, V4, Udp, "native");
    lan.served_early(&daemon, Where::Far, V4, Udp);
    let mut theirs = lan.host.enter(other_program);
    let devices = ["eth0", "eth1"].map(|device| {
        let ifindex = lan
            .host
            .enter(|| nix::net::if_::if_nametoindex(device).unwrap());
        // The instance may have it back already, and is then faster only so often.
        let attached = wait_for("somebody else has the device", || {
            let mut links = link::held(daemon.pid()).unwrap().into_iter();
            let ours = links.find(|it| it.kind == "xdp" && it.ifindex == Some(ifindex));
            if let Some(link) = ours {
                link.detach().unwrap();
            }
            let attached = lan.host.enter(|| theirs.attach_xdp(ifindex, Mode::Native));
            attached.ok()
        });
        attached.unwrap();
        ifindex
    });
    wait_until("the log says so", || {
        let said = daemon.said();
        let said = |device| said.contains(&format!("{device} has no native XDP"));
        said("eth0") && said("eth1")
    });
    let frontend = SocketAddr::new(LAN.address(V4, HOST), PORT);
    on_the_fast_path(&daemon, || {
        ask(&lan.client, Udp, frontend, "by tc").unwrap();
    });
    let theirs_is_there = |ifindex| theirs.xdp().any(|(it, _)| it == ifindex);
    assert!(devices.into_iter().all(theirs_is_there));
    let said = daemon.said().matches("has no native XDP").count();
    drop(theirs);
    let before = daemon.counted("forwarded_xdp").unwrap();
    wait_for("XDP carries again", || {
        ask(&lan.client, Udp, frontend, "again?").ok()?;
        (daemon.counted("forwarded_xdp").ok()? > before + 2).then_some(())
    })
    .unwrap();
    let again = daemon.said().matches("has no native XDP").count();
    assert_eq!(again, said, "{}", daemon.said());
    daemon.stop().unwrap();
}

#[test]
fn a_trace_shows_what_xdp_carries_otherwise() {
    let lan = Lan::new().with_xdp().without_offloads();
    let _backend = Backend::start(&lan.far, Tcp, BACKEND_PORT).unwrap();
    let daemon = lan.publish(Where::Far, V4, Tcp, "native");
    let frontend = SocketAddr::new(LAN.address(V4, HOST), PORT);
    daemon
        .trace(
            &[],
            |line| line.contains("forwarded_reply"),
            || {
                ask(&lan.client, Tcp, frontend, "hello").unwrap();
            },
        )
        .unwrap();
    wait_for("XDP is back", || {
        ask(&lan.client, Tcp, frontend, "hello").unwrap();
        (daemon.counted("forwarded_xdp").ok()? > 10).then_some(())
    })
    .unwrap();
    daemon.stop().unwrap();
}

/// The backend's machine is replaced by another, which says nothing by itself, and need not ask for the host.
fn a_silent_backend_is_found_again(xdp: &str) {
    const HOST_MAC: &str = "02:00:00:00:11:11";
    const BACKEND_MAC: &str = "02:00:00:00:22:22";
    let lan = Lan::new().with_xdp().without_offloads();
    let host_is = format!("link set eth1 address {HOST_MAC}");
    lan.host.ip(&host_is).unwrap();
    let host = FAR.address(V4, HOST);
    let knows_host = format!(
        "link set eth0 address {BACKEND_MAC}\nneigh replace {host} lladdr {HOST_MAC} dev eth0"
    );
    lan.far.ip(&knows_host).unwrap();
    let daemon = lan.publish(Where::Far, V4, Udp, xdp);
    let bind = |netns: &Netns, port| {
        let socket = netns.enter(|| UdpSocket::bind(("0.0.0.0", port))).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    };
    let (backend, client) = (bind(&lan.far, BACKEND_PORT), bind(&lan.client, 5000));
    // Each processor asks the kernel for itself, and lets it look after the neighbour then.
    pin_this_thread(&[0]).unwrap();
    let frontend = SocketAddr::new(LAN.address(V4, HOST), PORT);
    let arrives = || {
        wait_for("a datagram arrives", || {
            client.send_to(b"hello", frontend).ok()?;
            backend.recv(&mut [0; 8]).ok()
        })
    };
    // As fast as in a second, not half a minute.
    lan.host.enter(|| {
        for (setting, value) in [("delay_first_probe_time", "1"), ("retrans_time_ms", "100")] {
            let path = format!("/proc/sys/net/ipv4/neigh/eth1/{setting}");
            std::fs::write(path, value).unwrap();
        }
    });
    arrives().unwrap();
    // The kernel has not heard of it for a while.
    let backend_is = FAR.address(V4, OTHER);
    let stale = format!("neigh replace {backend_is} lladdr {BACKEND_MAC} dev eth1 nud stale");
    lan.host.ip(&stale).unwrap();
    lan.far
        .ip("link set eth0 address 02:00:00:00:99:99")
        .unwrap();
    while backend.recv(&mut [0; 8]).is_ok() {}
    arrives().unwrap();
    daemon.stop().unwrap();
}

#[test]
fn a_silent_backend_by_tc_is_found_again() {
    a_silent_backend_is_found_again("off");
}

#[test]
fn a_silent_backend_by_xdp_is_found_again() {
    a_silent_backend_is_found_again("native");
}

/// Table main would lead to the machine beside the client.
#[test]
fn a_machine_whose_route_is_in_another_table_is_reached_by_that_route() {
    let lan = Lan::new();
    let _backends = lan.backends();
    let near = LAN.address(V4, OTHER);
    lan.host
        .ip(&format!(
            "route add default via {near}\nroute del 203.0.113.0/24 dev eth1\n\
             route add 203.0.113.0/24 dev eth1 table 52\nrule add to 203.0.113.0/24 lookup 52"
        ))
        .unwrap();
    for protocol in [Tcp, Udp] {
        let daemon = lan.publish(Where::Far, V4, protocol, "off");
        on_the_fast_path(&daemon, || lan.served(Where::Far, V4, protocol));
        daemon.stop().unwrap();
    }
}

/// One more IPv6 address of the host on the way to the far machine. The kernel lists the newest first.
fn with_another_address(lan: &Lan, flags: &str) {
    let address = FAR.address(V6, 77);
    lan.host
        .ip(&format!("addr add {address}/64 dev eth1 {flags}"))
        .unwrap();
}

#[test]
fn the_source_is_the_kernels_choice_and_never_a_deprecated_address() {
    let lan = Lan::new();
    let _backends = lan.backends();
    with_another_address(&lan, "nodad preferred_lft 0 valid_lft 600");
    let daemon = lan.publish(Where::Far, V6, Tcp, "off");
    lan.served(Where::Far, V6, Tcp);
    daemon.stop().unwrap();
}

#[test]
fn a_new_address_of_the_host_cuts_no_conversation() {
    let lan = Lan::new();
    let _backends = lan.backends();
    let daemon = lan.publish(Where::Far, V6, Tcp, "off");
    let frontend = SocketAddr::new(LAN.address(V6, HOST), PORT);
    let mut conversation = Connection::open(&lan.client, frontend).unwrap();
    conversation.ask("before").unwrap();
    with_another_address(&lan, "nodad");
    let entry = || daemon.entry().unwrap();
    assert_eq!(entry().datapath, "ebpf");
    // One that the daemon serves only after it has read the network again.
    let known = SocketAddr::new(FAR.address(V6, 77), PORT);
    wait_for("the new address is served", || {
        let before = packets(&daemon);
        ask(&lan.far, Tcp, known, "hello").ok()?;
        (packets(&daemon) > before).then_some(())
    })
    .unwrap();
    conversation.ask("after").unwrap();
    daemon.stop().unwrap();
}

/// A route's MTU stands for a link further on that tells nobody of its own.
fn longer_than_a_routes_own_mtu_arrives(xdp: &str) {
    for family in [V4, V6] {
        let lan = Lan::new().with_xdp().without_offloads();
        let _backends = lan.backends();
        let daemon = lan.publish(Where::Far, family, Udp, xdp);
        let frontend = SocketAddr::new(LAN.address(family, HOST), PORT);
        // On the way to the backend first, then on that to the client.
        for (network, device, machine) in [(FAR, "eth1", &lan.far), (LAN, "eth0", &lan.client)] {
            let to = network.address(family, 0);
            let to = match family {
                V4 => format!("{to}/24 dev {device}"),
                V6 => format!("{to}/64 dev {device} metric 256"),
            };
            let is = |mtu: &str| lan.host.ip(&format!("route change {to}{mtu}")).unwrap();
            is(" mtu 1300");
            machine.ip("link set eth0 mtu 1300").unwrap(); // what is longer is lost there
            wait_for("a long datagram and its answer", || {
                ask(&lan.client, Udp, frontend, &"x".repeat(1400)).ok()
            })
            .unwrap_or_else(|_| panic!("{family:?} {device}"));
            machine.ip("link set eth0 mtu 1500").unwrap();
            is("");
        }
        daemon.stop().unwrap();
    }
}

#[test]
fn what_is_longer_than_a_routes_own_mtu_arrives_by_tc() {
    longer_than_a_routes_own_mtu_arrives("off");
}

#[test]
fn what_is_longer_than_a_routes_own_mtu_arrives_by_xdp() {
    longer_than_a_routes_own_mtu_arrives("native");
}
