//! What comes and goes: containers, publishes, and the daemon itself.

#![expect(unsafe_code, reason = "a descriptor that a filter holds")]

use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
    os::unix::net::UnixStream,
    path::Path,
};

use forwarder_tests::{
    daemon::{Daemon, Datapath, interrupt_at_start},
    deadline::{wait_for, wait_until},
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Protocol, ask, ask_by},
};

use crate::scene::{
    BACKEND_PORT, PORT, Scene, backend, frontend, on_the_fast_path, packets, spec, suffix,
    wait_for_delivery,
};

#[test]
fn a_container_that_starts_after_the_publish_is_served() {
    let topology = Topology::new().unwrap();
    topology.unplug_backend().unwrap();
    let mut scene = Scene::tcp().silent().auto().start_in(topology);
    scene.topology.plug_backend().unwrap();
    let _backend = backend(&scene.topology.backend, Protocol::Tcp);
    wait_for_delivery(&scene.daemon);
    scene.served_on_the_fast_path();
    scene.stop();
}

/// One that is tentative, as at boot, and one of a local prefix: IPv6 lets no socket bind either by itself.
#[test]
fn an_ipv6_address_that_will_be_this_hosts_is_published() {
    let family = Family::V6;
    for datapath in [Datapath::Ebpf, Datapath::Userland] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let topology = Topology::new().unwrap();
            let Topology { host, client, .. } = &topology;
            host.set("ipv6/conf/eth0/dad_transmits", "3").unwrap();
            host.ip(
                "addr add 2001:db8:100::77/64 dev eth0\nroute add local 2001:db8:203::/64 dev lo",
            )
            .unwrap();
            let via = topology.host_address(family);
            client
                .ip(&format!("route add 2001:db8:203::/64 via {via}"))
                .unwrap();
            let _backend = backend(&topology.backend, protocol);
            let to = SocketAddr::new(topology.backend.address(family), BACKEND_PORT);
            let frontends = ["2001:db8:203::7", "2001:db8:100::77"];
            let frontends = frontends.map(|it| SocketAddr::new(it.parse().unwrap(), PORT));
            let specs = frontends.map(|it| format!("{it}:{to}{}", suffix(protocol)));
            let daemon = Daemon::start(host, &[&specs[0], &specs[1]], datapath).unwrap();
            for frontend in frontends {
                wait_for("it is served", || ask(client, protocol, frontend, "x").ok()).unwrap();
            }
            daemon.stop().unwrap();
        }
    }
}

fn served_after_a_restart(protocol: Protocol) {
    let mut scene = Scene::of(Family::V4, protocol).start();
    on_the_fast_path(&scene.daemon, || scene.served("before"));

    scene.topology.unplug_backend().unwrap();
    scene.topology.plug_backend().unwrap();
    // The daemon may not have noticed yet; then a request can be lost, but not for long.
    let before = packets(&scene.daemon);
    wait_for("the restarted container is served by the fast path", || {
        let answer = scene.ask("after").ok()?;
        let seen = scene.topology.client_address(Family::V4) == answer.seen.ip();
        (seen && packets(&scene.daemon) > before).then_some(())
    })
    .unwrap();
    on_the_fast_path(&scene.daemon, || scene.served("later"));
    scene.stop();
}

#[test]
fn tcp_reaches_a_container_that_came_back_with_another_mac_and_veth() {
    served_after_a_restart(Protocol::Tcp);
}

#[test]
fn udp_reaches_a_container_that_came_back_with_another_mac_and_veth() {
    served_after_a_restart(Protocol::Udp);
}

#[test]
fn an_address_that_comes_later_is_published_and_one_that_goes_is_not() {
    let scene = Scene::tcp().start();
    let topology = &scene.topology;
    let host = &topology.host;
    host.ip("addr add 198.51.100.77/24 dev eth0").unwrap();
    let frontend = SocketAddr::from(([198, 51, 100, 77], PORT));
    let client = topology.client_address(Family::V4);
    wait_for("the new address is served by the fast path", || {
        let answer = ask(&topology.client, Protocol::Tcp, frontend, "hello").ok()?;
        (answer.seen.ip() == client).then_some(())
    })
    .unwrap();
    host.ip("addr del 198.51.100.77/24 dev eth0").unwrap();
    wait_for("the address is nobody's", || {
        ask(&topology.client, Protocol::Tcp, frontend, "hello").err()
    })
    .unwrap();
    scene.stop();
}

#[test]
fn a_publish_comes_and_goes_while_it_runs() {
    let scene = Scene::tcp().idle().auto().start();
    let daemon = &scene.daemon;
    assert!(daemon.list().unwrap().is_empty());

    daemon.control(&["publish", scene.spec()]).unwrap();
    wait_for_delivery(daemon);
    scene.served_on_the_fast_path();

    daemon.control(&["unpublish", scene.spec()]).unwrap();
    assert!(daemon.list().unwrap().is_empty());
    assert!(scene.ask("hello").is_err());
    scene.stop();
}

/// A client of the host's and one of another machine, each by one and the same socket all the time.
fn follows_its_publish(datapath: Datapath) {
    let scene = Scene::udp().and_another().idle().by(datapath).start();
    let (topology, daemon) = scene.parts();
    let requests = || [0, 1].map(|number: usize| scene.backends[number].requests());
    let clients = [
        (&topology.client, scene.frontend().ip()),
        (&topology.host, Family::V4.localhost()),
    ]
    .map(|(netns, host)| {
        let socket = netns.enter(|| UdpSocket::bind(("0.0.0.0", 0))).unwrap();
        (socket, SocketAddr::new(host, PORT))
    });
    let to_nobody = || {
        for (socket, frontend) in &clients {
            socket.send_to(b"to nobody", frontend).unwrap();
        }
    };
    for number in [0, 1, 0] {
        to_nobody();
        let (before, spec) = (requests(), &scene.specs[number]);
        daemon.control(&["publish", spec]).unwrap();
        for text in ["first", "second", "third"] {
            for (socket, frontend) in &clients {
                ask_by(socket, *frontend, &format!("{text} {number}")).unwrap();
            }
        }
        let other = 1 - number;
        let after = requests();
        assert!(after[number] > before[number]);
        assert_eq!(after[other], before[other], "to the old one");
        daemon.control(&["unpublish", spec]).unwrap();
    }
    let before = scene.requests();
    to_nobody();
    scene.daemon.stop().unwrap();
    let after: u64 = scene.backends.iter().map(Backend::requests).sum();
    assert_eq!(after, before);
}

#[test]
fn a_udp_conversation_goes_where_its_port_leads_now() {
    follows_its_publish(Datapath::Ebpf);
}

#[test]
fn a_udp_conversation_of_the_proxy_goes_where_its_port_leads_now() {
    follows_its_publish(Datapath::Userland);
}

#[test]
fn every_port_of_a_range_leads_to_its_own() {
    let range = ["7000-7099:172.31.0.2:9000-9099/udp"];
    let scene = Scene::udp().silent().publishing(&range).start();
    let topology = &scene.topology;
    let ports = [0, 1, 99].map(|offset| {
        let started = Backend::start(&topology.backend.netns, Protocol::Udp, 9000 + offset);
        (offset, started.unwrap())
    });
    on_the_fast_path(&scene.daemon, || {
        for (offset, server) in &ports {
            let frontend = SocketAddr::new(scene.frontend().ip(), 7000 + offset);
            let answer = ask(&topology.client, Protocol::Udp, frontend, "hello").unwrap();
            assert_eq!(answer.seen.ip(), topology.client_address(Family::V4));
            assert!(
                server.requests() > 0,
                "port {offset} of the range led elsewhere"
            );
        }
    });
    scene.stop();
}

#[test]
fn a_range_in_front_of_one_port_leads_there() {
    let range = format!("7000-7099:172.31.0.2:{BACKEND_PORT}/udp");
    let scene = Scene::udp().publishing(&[&range]).start();
    on_the_fast_path(&scene.daemon, || {
        for port in [7000, 7050, 7099] {
            let frontend = SocketAddr::new(scene.frontend().ip(), port);
            let answer = ask(&scene.topology.client, Protocol::Udp, frontend, "hello").unwrap();
            assert_eq!(answer.payload, "hello");
        }
    });
    scene.stop();
}

#[test]
fn an_interrupt_at_the_start_leaves_nothing_either() {
    let topology = Topology::new().unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let (status, pins) = interrupt_at_start(&topology.host, &[&spec]).unwrap();
    assert!(status.success(), "{status}");
    assert!(!pins.exists(), "{pins:?} is left");
}

/// What a forwarder could have left in the host's namespace: sysctls, and everything else.
fn traces(netns: &Netns) -> (BTreeMap<String, String>, String) {
    let mut seen = String::new();
    for command in [
        "ip rule",
        "ip route",
        "ip -6 route",
        "tc qdisc show",
        "nft list ruleset",
    ] {
        // The state of a device that has just been made still changes by itself.
        seen += &netns.run(command).unwrap().replace("linkdown ", "");
    }
    // Name and MAC.
    for line in netns.run("ip -br link").unwrap().lines() {
        seen.extend(line.split_whitespace().step_by(2).take(2).chain(["\n"]));
    }
    for command in ["ip -o -4 addr", "ip -o -6 addr show scope global"] {
        seen += &netns.run(command).unwrap();
    }
    (netns.enter(|| sysctls(Path::new("/proc/sys/net"))), seen)
}

/// Every readable sysctl below a folder, but for those that count.
fn sysctls(folder: &Path) -> BTreeMap<String, String> {
    let mut values = BTreeMap::new();
    let Ok(entries) = std::fs::read_dir(folder) else {
        return values;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = path.display().to_string();
        if path.is_dir() {
            values.extend(sysctls(&path));
        } else if !name.ends_with("_count")
            && let Ok(value) = std::fs::read_to_string(&path)
        {
            values.insert(name, value);
        }
    }
    values
}

/// Whether the kernel still has a BPF program of that number.
fn program_exists(number: u32) -> bool {
    const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
    let attributes = [number, 0, 0];
    // SAFETY: the command reads 12 bytes of attributes, which is what there is.
    let descriptor = unsafe {
        let size = size_of_val(&attributes);
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_GET_FD_BY_ID,
            attributes.as_ptr(),
            size,
        )
    };
    if descriptor >= 0 {
        // SAFETY: the call above opened it and nobody else knows it.
        unsafe { libc::close(descriptor as libc::c_int) };
    }
    descriptor >= 0
}

#[test]
fn ctrl_c_leaves_nothing_behind() {
    let topology = Topology::new().unwrap();
    let before = traces(&topology.host);
    let scene = Scene::tcp().start_in(topology);
    let (host, daemon) = (&scene.topology.host, &scene.daemon);
    scene.served("hello");
    let during = traces(host);
    assert_eq!(before.0, during.0, "a sysctl was changed");
    let programs = daemon.programs().unwrap();
    assert!(!programs.is_empty(), "no BPF program is loaded");
    let pins = daemon.pins().to_string_lossy().into_owned();
    let socket = format!("/run/forwarder/{}.sock", daemon.instance());
    assert!(Path::new(&socket).exists(), "no control socket {socket}");

    scene.daemon.stop().unwrap();

    assert!(!Path::new(&pins).exists(), "{pins} is left");
    assert!(!Path::new(&socket).exists(), "{socket} is left");
    let after = traces(host);
    assert_eq!(before.0, after.0, "a sysctl was left changed");
    assert_eq!(before.1, after.1, "devices, addresses, qdiscs or rules");
    // The kernel frees programs a little after their last reference.
    wait_until("the programs are gone", || {
        !programs.iter().any(|number| program_exists(*number))
    });
}

#[test]
fn an_instance_that_ran_out_of_descriptors_can_be_asked_again() {
    let limit = ["sh", "-c", "ulimit -n 100; exec \"$0\" \"$@\""];
    let scene = Scene::tcp().silent().by(Datapath::Userland);
    let scene = scene.wrapped(&limit).start();
    let daemon = &scene.daemon;
    let socket = format!("/run/forwarder/{}.sock", daemon.instance());
    let clients: Vec<_> = (0..120).map(|_| UnixStream::connect(&socket)).collect();
    wait_until("descriptors run out", || {
        let said = daemon.said();
        said.contains("accepts no more for now")
    });
    drop(clients);
    assert_eq!(daemon.list().unwrap().len(), 1);
    scene.stop();
}

#[test]
fn each_family_may_have_its_own_publish_of_a_port() {
    // A backend that has IPv6 alone is published to clients that have it.
    let v6 = format!("[::]:{PORT}:[fd00:31::3]:{BACKEND_PORT}");
    let v4 = format!("0.0.0.0:{PORT}:172.31.0.2:{BACKEND_PORT}");
    let scene = Scene::tcp().and_another().publishing(&[&v6, &v4]).start();
    let (topology, daemon) = scene.parts();
    let ask = |family| {
        let frontend = frontend(topology, family);
        ask(&topology.client, Protocol::Tcp, frontend, "hello")
    };
    let served = |family| {
        let before = packets(daemon);
        let answer = ask(family).unwrap();
        assert_eq!(answer.seen.ip(), topology.client_address(family));
        let after = packets(daemon);
        assert!(after.0 > before.0 && after.1 > before.1, "{family:?}");
    };
    served(Family::V4);
    served(Family::V6);
    daemon.control(&["unpublish", &v6]).unwrap();
    served(Family::V4);
    ask(Family::V6).unwrap_err();
    scene.stop();
}

/// The programs are attached just when some of the devices go.
#[test]
fn containers_that_are_gone_soon_are_no_reason_to_warn() {
    let scene = Scene::tcp().auto().start();
    let host = &scene.topology.host;
    for round in 0..10 {
        let containers: Vec<_> = (0..10)
            .map(|number| {
                let container = Netns::new("container").unwrap();
                let (device, far) = (format!("gone{round}{number}"), container.path());
                let add = format!("link add {device} type veth peer name eth0 netns {far}");
                host.ip(&format!("{add}\nlink set {device} up")).unwrap();
                container
            })
            .collect();
        drop(containers);
    }
    scene.served_on_the_fast_path();
    let said = scene.daemon.said();
    assert!(!said.contains("without our program"), "{said}");
    scene.stop();
}
