//! What somebody else does to devices, programs and the bridge under a running instance: the fast path is right again
//! by itself, and the log says so where nothing else does.

use std::{fs, net::SocketAddr, path::Path, thread::sleep, time::Duration};

use forwarder_tests::{
    daemon::{Daemon, WITHOUT_BPFFS},
    deadline::{wait_for, wait_until},
    link,
    topology::{Family, Topology},
    traffic::{Backend, Protocol, ask},
};

use nix::sys::signal::Signal;

use crate::scene::{self, PORT, frontend, on_the_fast_path, packets, wait_for_peer};

const FAMILY: Family = Family::V4;

struct Scene {
    topology: Topology,
    _backends: Vec<Backend>,
    daemon: Daemon,
}

impl Scene {
    fn new() -> Self {
        Self::wrapped(&[])
    }

    /// The instance is started by a program that takes something away.
    fn wrapped(wrapper: &[&str]) -> Self {
        let usual = scene::Scene::udp().wrapped(wrapper).start();
        let scene = Self {
            topology: usual.topology,
            daemon: usual.daemon,
            _backends: usual.backends,
        };
        on_the_fast_path(&scene.daemon, || scene.asks("before"));
        wait_for_peer(&scene.daemon);
        scene
    }

    fn frontend(&self) -> SocketAddr {
        frontend(&self.topology, FAMILY)
    }

    fn asks(&self, payload: &str) {
        let Topology { client, .. } = &self.topology;
        ask(client, Protocol::Udp, self.frontend(), payload).unwrap();
    }

    /// Waits until the client's packets take the fast path both ways, and the backend sees the client.
    #[track_caller]
    fn heals(&self) {
        let client = self.topology.client_address(FAMILY);
        let healed = wait_for("the fast path is back", || {
            let before = packets(&self.daemon);
            let answer = ask(
                &self.topology.client,
                Protocol::Udp,
                self.frontend(),
                "healed?",
            )
            .ok()?;
            let after = packets(&self.daemon);
            let both_ways = after.0 > before.0 && after.1 > before.1;
            (both_ways && answer.seen.ip() == client).then_some(())
        });
        healed.unwrap_or_else(|error| panic!("{error:#}\n{}", self.daemon.said()));
    }

    /// How often the log says that a program was put back on a device.
    fn said_of(&self, device: &str) -> usize {
        let line = format!("somebody detached our program from {device}; it is attached again");
        self.daemon.said().matches(&line).count()
    }

    /// Its links to a device.
    fn links_to(&self, device: &str) -> Vec<link::Link> {
        let Topology { host, .. } = &self.topology;
        let ifindex = host.enter(|| nix::net::if_::if_nametoindex(device).unwrap());
        let mut links = link::held(self.daemon.pid()).unwrap();
        links.retain(|link| link.ifindex == Some(ifindex));
        links
    }

    /// Detaches every program from a device, as `bpftool link detach` or `tc qdisc del` would.
    fn detach_from(&self, device: &str) {
        let links = self.links_to(device);
        if links.is_empty() {
            let host = &self.topology.host;
            host.run(&format!("tc qdisc del dev {device} clsact"))
                .unwrap();
        }
        for link in links {
            link.detach().unwrap();
        }
    }

    #[track_caller]
    fn awaits_line_of(&self, device: &str, times: usize) {
        let said = wait_for("the log says so", || {
            (self.said_of(device) == times).then_some(())
        });
        said.unwrap_or_else(|error| panic!("{device}: {error:#}\n{}", self.daemon.said()));
    }
}

fn heals_what_is_detached(scene: &Scene) {
    let veth = scene.topology.backend.veth.clone();
    for (times, device) in [(1, "eth0"), (1, veth.as_str()), (2, "eth0")] {
        scene.detach_from(device);
        scene.heals();
        scene.awaits_line_of(device, times);
    }
}

#[test]
fn programs_that_somebody_detached_are_attached_again() {
    let scene = Scene::new();
    heals_what_is_detached(&scene);
    scene.daemon.stop().unwrap();
}

#[test]
fn without_bpffs_programs_that_somebody_detached_are_attached_again() {
    let scene = Scene::wrapped(&WITHOUT_BPFFS);
    assert!(scene.daemon.links().is_empty());
    heals_what_is_detached(&scene);
    scene.daemon.stop().unwrap();
}

#[test]
fn links_that_somebody_had_run_another_program_run_ours_again() {
    let scene = Scene::new();
    let links = scene.links_to("eth0");
    if links.is_empty() {
        return; // a filter with another program is another filter
    }
    let [first, second] = &links[..] else {
        panic!("eth0 has not one for each direction: {links:?}");
    };
    // Each runs the other's.
    second.update(first.program).unwrap();
    first.update(second.program).unwrap();
    scene.heals();
    scene.awaits_line_of("eth0", 1);
    let programs = |links: &[link::Link]| {
        let mut programs: Vec<_> = links
            .iter()
            .map(|it| (it.attach_type, it.program))
            .collect();
        programs.sort_unstable();
        programs
    };
    assert_eq!(programs(&scene.links_to("eth0")), programs(&links));
    scene.daemon.stop().unwrap();
}

#[test]
fn pins_that_somebody_removed_are_made_again_and_outlive_a_kill() {
    let mut scene = Scene::new();
    let before = scene.daemon.links();
    if before.is_empty() {
        return; // filters stay without pins
    }
    // With the folder that they are in.
    fs::remove_dir_all(before[0].parent().unwrap()).unwrap();
    let back = wait_for("the pins are back", || {
        (scene.daemon.links() == before).then_some(())
    });
    back.unwrap_or_else(|error| {
        let now = scene.daemon.links();
        panic!("{error:#}: {now:?} of {before:?}\n{}", scene.daemon.said())
    });
    scene.heals();
    scene.daemon.kill().unwrap();
    scene.asks("while it is dead");
    scene.daemon.restart().unwrap();
    scene.heals();
    scene.daemon.stop().unwrap();
}

#[test]
fn a_flushed_bridge_is_learnt_again() {
    let scene = Scene::new();
    // As `bridge fdb flush`, which takes Linux 6.0.
    for line in [
        "ip link set br0 type bridge fdb_flush",
        "ip neigh flush dev br0",
    ] {
        scene.topology.host.run(line).unwrap();
    }
    scene.heals();
    wait_for_peer(&scene.daemon);
    scene.daemon.stop().unwrap();
}

/// A device comes up again, and packets by it come before the instance has heard of that: they are those of the connection.
#[test]
fn a_connection_outlives_an_uplink_that_goes_down_and_comes_up() {
    let scene = scene::Scene::tcp().start();
    let (topology, daemon) = scene.parts();
    wait_for_peer(daemon);
    let mut conversation = scene.connect();
    conversation.ask("before").unwrap();
    let host = &topology.host;
    host.ip("link set eth0 down\naddr add 192.0.2.1/32 dev lo")
        .unwrap();
    wait_for("the instance has heard of both", || {
        let before = daemon.counted("new_flow").unwrap();
        let added = SocketAddr::from(([192, 0, 2, 1], PORT));
        ask(host, Protocol::Tcp, added, "there?").ok()?;
        (daemon.counted("new_flow").unwrap() > before).then_some(())
    })
    .unwrap();
    daemon.signal(Signal::SIGSTOP).unwrap();
    host.ip("link set eth0 up").unwrap();
    let answer = conversation.ask("after");
    daemon.signal(Signal::SIGCONT).unwrap();
    answer.unwrap();
    scene.stop();
}

/// How many files and folders there are in one, at any depth.
fn within(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| 1 + within(&entry.path())).sum()
}

/// Whether the instance first hears that a device has gone, or looks whether its program is still there.
#[test]
fn of_containers_that_come_and_go_nothing_is_left() {
    let scene = Scene::new();
    let pinned = || within(&scene.daemon.pins());
    let before = pinned();
    let host = &scene.topology.host;
    for _ in 0..6 {
        host.ip("link add passing type veth peer name passing1\nlink set passing up")
            .unwrap();
        wait_until("the program is on both ends", || pinned() >= before + 2);
        scene.daemon.signal(Signal::SIGSTOP).unwrap();
        host.ip("link del passing").unwrap();
        sleep(Duration::from_millis(600));
        scene.daemon.signal(Signal::SIGCONT).unwrap();
        wait_until("nothing is left", || pinned() == before);
    }
    scene.daemon.stop().unwrap();
}

#[test]
fn an_uplink_may_get_another_name() {
    let scene = Scene::new();
    let Topology { host, .. } = &scene.topology;
    // Before Linux 6.2, a device that is up keeps its name.
    host.ip("link set eth0 name wan0").unwrap_or_else(|_| {
        host.ip("link set eth0 down\nlink set eth0 name wan0\nlink set wan0 up")
            .unwrap();
    });
    scene.heals();
    scene.detach_from("wan0");
    scene.heals();
    scene.daemon.stop().unwrap();
}

#[test]
fn an_uplink_that_is_made_anew_is_served() {
    let scene = Scene::new();
    let Topology { host, client, .. } = &scene.topology;
    let (host_address, client_address) = (
        scene.topology.host_address(FAMILY),
        scene.topology.client_address(FAMILY),
    );
    host.ip(&format!(
        "link del eth0\n\
         link add eth0 type veth peer name eth0 netns {}\n\
         addr add {host_address}/24 dev eth0\nlink set eth0 up",
        client.path()
    ))
    .unwrap();
    let up = format!("addr add {client_address}/24 dev eth0\nlink set eth0 up");
    client.ip(&up).unwrap();
    scene.heals();
    assert_eq!(scene.said_of("eth0"), 0, "{}", scene.daemon.said());
    scene.daemon.stop().unwrap();
}

#[test]
fn a_container_may_move_to_another_bridge() {
    let scene = Scene::new();
    let Topology { host, backend, .. } = &scene.topology;
    let gateway = backend.gateway(FAMILY);
    host.ip(&format!(
        "link add br9 type bridge\nlink set br9 up\n\
         addr del {gateway}/24 dev br0\naddr add {gateway}/24 dev br9\n\
         link set {} master br9",
        backend.veth
    ))
    .unwrap();
    scene.heals();
    wait_for_peer(&scene.daemon);
    scene.daemon.stop().unwrap();
}
