//! Other people's tc filters and qdiscs, and what an instance leaves of its own. The same on every kernel, but for
//! what is attached: a TCX link (6.6), which `tc` does not show, or a filter of the qdisc clsact.

use std::net::SocketAddr;

use forwarder::datapath::kernel::{Attach, kernel};
use forwarder_tests::{
    daemon::{Daemon, Datapath, WITHOUT_BPFFS, down},
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Protocol, ask, send_datagram},
};

use crate::scene::{Scene, served_to_the_client};

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

#[test]
fn somebodys_filter_works_on_and_so_does_the_fast_path() {
    let topology = Topology::new().unwrap();
    topology.host.run("tc qdisc add dev eth0 clsact").unwrap();
    somebodys_filter(&topology.host, "eth0", "ingress");
    let dropped = Backend::start(&topology.host, Protocol::Udp, DROPPED).unwrap();
    let scene = Scene::tcp().start_in(topology);
    let to = SocketAddr::new(scene.topology.host_address(Family::V4), DROPPED);
    send_datagram(&scene.topology.client, to, "dropped").unwrap();
    scene.served_on_the_fast_path();
    assert_eq!(dropped.requests(), 0, "the filter let a datagram pass");
    scene.stop();
}

#[test]
fn what_somebody_has_on_a_device_stays_when_we_go() {
    let topology = Topology::new().unwrap();
    let empty = filters(&topology.host);
    topology.host.run("tc qdisc add dev eth0 clsact").unwrap();
    somebodys_filter(&topology.host, "eth0", "ingress");
    let before = filters(&topology.host);
    assert_ne!(empty, before);
    let scene = Scene::tcp().start_in(topology);
    scene.served_on_the_fast_path();
    scene.daemon.stop().unwrap();
    assert_eq!(filters(&scene.topology.host), before);
}

#[test]
fn a_qdisc_that_we_made_stays_while_somebody_uses_it() {
    let scene = Scene::tcp().start();
    let host = &scene.topology.host;
    let _ = host.run("tc qdisc add dev eth0 clsact");
    somebodys_filter(host, "eth0", "ingress");
    scene.daemon.stop().unwrap();
    let left = host.run("tc filter show dev eth0 ingress").unwrap();
    assert!(left.contains(&DROPPED.to_string()), "{left}");
}

#[test]
fn down_after_a_kill_takes_ours_and_leaves_the_rest() {
    let topology = Topology::new().unwrap();
    topology.host.run("tc qdisc add dev eth0 clsact").unwrap();
    somebodys_filter(&topology.host, "eth0", "ingress");
    let before = filters(&topology.host);
    let mut scene = Scene::tcp().start_in(topology);
    scene.daemon.kill().unwrap();
    scene.served("still there");
    scene.daemon.control(&["down"]).unwrap();
    assert_eq!(filters(&scene.topology.host), before);
    assert!(scene.ask("gone").is_err());
}

#[test]
fn a_restart_replaces_what_a_kill_left() {
    let topology = Topology::new().unwrap();
    let before = filters(&topology.host);
    let mut scene = Scene::tcp().start_in(topology);
    let during = filters(&scene.topology.host);
    let ours = during.matches(" ingress direct-action").count();
    match kernel().attach {
        Attach::Tcx => assert_eq!(ours, 0, "tc does not show links:\n{during}"),
        Attach::Clsact => assert!(ours > 2, "lo, eth0 and the veths:\n{during}"),
    }
    scene.daemon.kill().unwrap();
    scene.daemon.restart().unwrap();
    let after = filters(&scene.topology.host);
    assert_eq!(after.matches(" ingress direct-action").count(), ours);
    scene.served_on_the_fast_path();
    scene.daemon.stop().unwrap();
    let after = filters(&scene.topology.host);
    assert_eq!(after, before, "also the qdiscs of the first");
}

#[test]
fn a_kept_datapath_forwards_until_down() {
    let topology = Topology::new().unwrap();
    let before = filters(&topology.host);
    let scene = Scene::tcp().flags(&["--keep"]).start_in(topology);
    let topology = &scene.topology;
    let (frontend, instance) = (scene.frontend(), scene.daemon.instance().to_owned());
    let mut conversation = scene.connect();
    conversation.ask("before").unwrap();
    scene.daemon.stop().unwrap();
    conversation.ask("after").unwrap();
    served_to_the_client(topology, Protocol::Tcp, "new");
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
        let scene = Scene::tcp().wrapped(wrapper).flags(&["--respect-firewall"]);
        let scene = scene.start_in(topology);
        scene.served_on_the_fast_path();
        scene.daemon.stop().unwrap();
        let after = filters(&scene.topology.host);
        assert_eq!(after, before, "{wrapper:?}");
    }
}

#[test]
fn an_instance_takes_down_only_itself() {
    let scene = Scene::tcp().start();
    let spec = scene.spec().replacen("8080", "8081", 1);
    let mut other = Daemon::start(&scene.topology.host, &[&spec], Datapath::Ebpf).unwrap();
    other.kill().unwrap();
    other.control(&["down"]).unwrap();
    scene.served_on_the_fast_path();
    scene.stop();
}
