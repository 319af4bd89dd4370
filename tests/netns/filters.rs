//! Other people's tc filters and qdiscs, and what an instance leaves of its own. The same on every kernel, but for
//! what is attached: a TCX link (6.6), which `tc` does not show, or a filter of the qdisc clsact.

use std::net::SocketAddr;

use forwarder::datapath::kernel::{Attach, kernel};
use forwarder_tests::{
    daemon::{Daemon, Datapath, WITHOUT_BPFFS, down},
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask, send_datagram},
};

use crate::scene::{BACKEND_PORT, PORT, on_the_fast_path, served_to_the_client, spec};

/// A port that nothing publishes, and that somebody's filter drops.
pub(crate) const DROPPED: u16 = 7777;

/// Everything that `tc` shows on the ingress and egress of all devices.
fn filters(netns: &Netns) -> String {
    let mut seen = netns.run("tc qdisc show").unwrap();
    for line in netns.run("ip -br link").unwrap().lines() {
        let device = line.split([' ', '@']).next().unwrap();
        for side in ["ingress", "egress"] {
            let shown = netns.run(&format!("tc filter show dev {device} {side}"));
            seen += &format!("{device} {side}: {}\n", shown.unwrap());
        }
    }
    seen
}

/// It drops UDP over IPv4 to that port, and lets everything else go on: classic BPF, which kernels have that lack
/// every other classifier.
pub(crate) fn somebodys_filter(netns: &Netns, device: &str, side: &str) {
    let code = format!(
        "8,40 0 0 12,21 0 5 2048,48 0 0 23,21 0 3 17,40 0 0 36,21 0 1 {DROPPED},6 0 0 2,6 0 0 4294967295"
    );
    let filter = format!(
        "filter add dev {device} {side} prio 10 protocol all bpf bytecode '{code}' direct-action\n"
    );
    netns.feed("tc -batch -", &filter).unwrap();
}

fn started(topology: &Topology) -> (Backend, Daemon) {
    let backend = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    (backend, daemon)
}

fn served_on_the_fast_path(topology: &Topology, daemon: &Daemon) {
    on_the_fast_path(daemon, || {
        served_to_the_client(topology, Protocol::Tcp, "hello")
    });
}

#[test]
fn somebodys_filter_works_on_and_so_does_the_fast_path() {
    let topology = Topology::new().unwrap();
    topology.host.run("tc qdisc add dev eth0 clsact").unwrap();
    somebodys_filter(&topology.host, "eth0", "ingress");
    let dropped = Backend::start(&topology.host, Protocol::Udp, DROPPED).unwrap();
    let (_backend, daemon) = started(&topology);
    let to = SocketAddr::new(topology.host_address(Family::V4), DROPPED);
    send_datagram(&topology.client, to, "dropped").unwrap();
    served_on_the_fast_path(&topology, &daemon);
    assert_eq!(dropped.requests(), 0, "the filter let a datagram pass");
    daemon.stop().unwrap();
}

#[test]
fn what_somebody_has_on_a_device_stays_when_we_go() {
    let topology = Topology::new().unwrap();
    let empty = filters(&topology.host);
    topology.host.run("tc qdisc add dev eth0 clsact").unwrap();
    somebodys_filter(&topology.host, "eth0", "ingress");
    let before = filters(&topology.host);
    assert_ne!(empty, before);
    let (_backend, daemon) = started(&topology);
    served_on_the_fast_path(&topology, &daemon);
    daemon.stop().unwrap();
    assert_eq!(filters(&topology.host), before);
}

#[test]
fn a_qdisc_that_we_made_stays_while_somebody_uses_it() {
    let topology = Topology::new().unwrap();
    let (_backend, daemon) = started(&topology);
    let _ = topology.host.run("tc qdisc add dev eth0 clsact");
    somebodys_filter(&topology.host, "eth0", "ingress");
    daemon.stop().unwrap();
    let left = topology
        .host
        .run("tc filter show dev eth0 ingress")
        .unwrap();
    assert!(left.contains(&DROPPED.to_string()), "{left}");
}

#[test]
fn down_after_a_kill_takes_ours_and_leaves_the_rest() {
    let topology = Topology::new().unwrap();
    topology.host.run("tc qdisc add dev eth0 clsact").unwrap();
    somebodys_filter(&topology.host, "eth0", "ingress");
    let before = filters(&topology.host);
    let (_backend, mut daemon) = started(&topology);
    daemon.kill().unwrap();
    served_to_the_client(&topology, Protocol::Tcp, "still there");
    daemon.control(&["down"]).unwrap();
    assert_eq!(filters(&topology.host), before);
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    assert!(ask(&topology.client, Protocol::Tcp, frontend, "gone").is_err());
}

#[test]
fn a_restart_replaces_what_a_kill_left() {
    let topology = Topology::new().unwrap();
    let before = filters(&topology.host);
    let (_backend, mut daemon) = started(&topology);
    let during = filters(&topology.host);
    let ours = during.matches(" ingress direct-action").count();
    match kernel().attach {
        Attach::Tcx => assert_eq!(ours, 0, "tc does not show links:\n{during}"),
        Attach::Clsact => assert!(ours > 2, "lo, eth0 and the veths:\n{during}"),
    }
    daemon.kill().unwrap();
    daemon.restart().unwrap();
    let after = filters(&topology.host);
    assert_eq!(after.matches(" ingress direct-action").count(), ours);
    served_on_the_fast_path(&topology, &daemon);
    daemon.stop().unwrap();
    assert_eq!(
        filters(&topology.host),
        before,
        "also the qdiscs of the first"
    );
}

#[test]
fn a_kept_datapath_forwards_until_down() {
    let topology = Topology::new().unwrap();
    let before = filters(&topology.host);
    let _backend = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let keep = ["--keep"];
    let daemon = Daemon::start_with(&topology.host, &[&spec], Datapath::Ebpf, &keep).unwrap();
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    let mut conversation = Connection::open(&topology.client, frontend).unwrap();
    conversation.ask("before").unwrap();
    let instance = daemon.instance().to_owned();
    daemon.stop().unwrap();
    conversation.ask("after").unwrap();
    served_to_the_client(&topology, Protocol::Tcp, "new");
    down(&topology.host, &instance).unwrap();
    assert!(ask(&topology.client, Protocol::Tcp, frontend, "gone").is_err());
    assert_eq!(filters(&topology.host), before);
}

/// With filters on both sides of a device, and with nothing that remembers whose the qdisc is.
#[test]
fn an_instance_that_respects_the_firewall_leaves_nothing() {
    for wrapper in [&[][..], &WITHOUT_BPFFS[..]] {
        let topology = Topology::new().unwrap();
        let before = filters(&topology.host);
        let backend = &topology.backend;
        let _backend = Backend::start(&backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
        let spec = spec(backend, Family::V4, Protocol::Tcp);
        let flags = ["--respect-firewall"];
        let host = &topology.host;
        let daemon = Daemon::start_wrapped(host, wrapper, &[&spec], Datapath::Ebpf, &flags);
        let daemon = daemon.unwrap();
        served_on_the_fast_path(&topology, &daemon);
        daemon.stop().unwrap();
        assert_eq!(filters(&topology.host), before, "{wrapper:?}");
    }
}

#[test]
fn an_instance_takes_down_only_itself() {
    let topology = Topology::new().unwrap();
    let (_backend, daemon) = started(&topology);
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp).replacen("8080", "8081", 1);
    let mut other = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    other.kill().unwrap();
    other.control(&["down"]).unwrap();
    served_on_the_fast_path(&topology, &daemon);
    daemon.stop().unwrap();
}
