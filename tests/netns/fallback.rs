//! The path of new connections changes while an instance runs: to the proxy when the fast path cannot serve them any more, and
//! back when it can. Connections that exist stay on their path.

use std::{
    net::{SocketAddr, UdpSocket},
    os::fd::OwnedFd,
    time::Instant,
};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::{slack, wait_for, wait_until},
    link,
    netns::{Netns, has_ipv6},
    table::{FullFrontends, Table, freeze},
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask, ask_by},
};

use crate::{
    scale::fill,
    scene::{BACKEND_PORT, PORT, on_the_fast_path, spec, suffix, wait_for_peer},
};

const FAMILY: Family = Family::V4;
/// Another published port.
const OTHER: u16 = PORT + 1;
/// Tables that a publish is written to, and that of flows.
const WRITTEN: [&str; 6] = [
    "PORTS",
    "PUBLISHES",
    "FRONTENDS",
    "BACKENDS",
    "ALLOW",
    "FLOWS",
];
const UPLINK: &str = "eth0";

/// A client that asks more than once.
pub(crate) enum Client {
    Tcp(Connection),
    Udp(UdpSocket, SocketAddr),
}

impl Client {
    pub(crate) fn begin(netns: &Netns, protocol: Protocol, frontend: SocketAddr) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp(Connection::open(netns, frontend).unwrap()),
            Protocol::Udp => {
                let any: SocketAddr = match frontend {
                    SocketAddr::V4(_) => "0.0.0.0:0".parse().unwrap(),
                    SocketAddr::V6(_) => "[::]:0".parse().unwrap(),
                };
                let socket = netns.enter(|| UdpSocket::bind(any).unwrap());
                Self::Udp(socket, frontend)
            }
        }
    }

    /// The source that the backend sees.
    #[track_caller]
    pub(crate) fn asks(&mut self, payload: &str) -> SocketAddr {
        let answer = match self {
            Self::Tcp(connection) => connection.ask(payload),
            Self::Udp(socket, frontend) => ask_by(socket, *frontend, payload),
        };
        let answer = answer.unwrap_or_else(|error| panic!("{payload}: {error:#}"));
        assert_eq!(answer.payload, payload);
        answer.seen
    }
}

struct Scene {
    topology: Topology,
    protocol: Protocol,
    _backend: Backend,
    daemon: Daemon,
}

impl Scene {
    fn new(protocol: Protocol) -> Self {
        let topology = Topology::new().unwrap();
        let backend = &topology.backend;
        let server = Backend::start(&backend.netns, protocol, BACKEND_PORT).unwrap();
        let spec = spec(backend, FAMILY, protocol);
        let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Auto).unwrap();
        let scene = Self {
            topology,
            protocol,
            _backend: server,
            daemon,
        };
        on_the_fast_path(&scene.daemon, || {
            scene.newcomer("before");
        });
        wait_for_peer(&scene.daemon);
        scene
    }

    fn frontend(&self) -> SocketAddr {
        SocketAddr::new(self.topology.host_address(FAMILY), PORT)
    }

    fn begin(&self, netns: &Netns) -> Client {
        Client::begin(netns, self.protocol, self.frontend())
    }

    /// The source that the backend sees of another machine's new connection.
    #[track_caller]
    fn newcomer(&self, payload: &str) -> SocketAddr {
        let Topology { client, .. } = &self.topology;
        let answer = ask(client, self.protocol, self.frontend(), payload);
        answer
            .unwrap_or_else(|error| panic!("{payload}: {error:#}"))
            .seen
    }

    /// Waits until they do.
    #[track_caller]
    fn newcomers_take_the_fast_path(&self) {
        let machine = self.topology.client_address(FAMILY);
        wait_until("new ones take the fast path", || {
            let answer = ask(&self.topology.client, self.protocol, self.frontend(), "new");
            answer.is_ok_and(|answer| answer.seen.ip() == machine)
        });
    }

    /// Takes our program off a device, and the last place for it there, until what is returned is dropped. None: this kernel
    /// has places for any number.
    fn takes(&self, device: &str) -> Option<Vec<OwnedFd>> {
        let Topology { host, .. } = &self.topology;
        let ifindex = host.enter(|| nix::net::if_::if_nametoindex(device).unwrap());
        let mut ours = link::held(self.daemon.pid()).unwrap();
        ours.retain(|link| link.ifindex == Some(ifindex) && link.is_ingress());
        let [ours] = &ours[..] else {
            return None;
        };
        let mut all = host.enter(|| link::fill_ingress(ifindex).unwrap());
        ours.detach().unwrap();
        let last = host.enter(|| link::fill_ingress(ifindex).unwrap());
        assert_eq!(last.len(), 1, "it was attached again before");
        all.extend(last);
        Some(all)
    }

    /// Waits until `list` says so of the published port.
    #[track_caller]
    fn is_served_by(&self, datapath: &str, reason_code: Option<&str>) {
        self.is_served_at(PORT, datapath, reason_code);
    }

    #[track_caller]
    fn is_served_at(&self, port: u16, datapath: &str, reason_code: Option<&str>) {
        let begun = Instant::now();
        let said = wait_for("the other path", || {
            let rows = self.daemon.list().ok()?;
            let row = rows.iter().find(|row| row.frontend.port == port)?;
            let why = row.reason_code.as_deref();
            (row.datapath == datapath && why == reason_code).then_some(())
        });
        said.unwrap_or_else(|error| {
            panic!(
                "{error:#}\n{:?}\n{}",
                self.daemon.list(),
                self.daemon.said()
            )
        });
        let elapsed = begun.elapsed();
        println!("{datapath} {reason_code:?} after {elapsed:?}");
        // Whatever it is, it is seen within a second.
        assert!(elapsed < slack() * 3 / 2, "{elapsed:?}");
    }
}

/// New connections go to the proxy, and `list` says why, and then by the fast path again. Those that exist, on either path, go on as
/// they began.
fn follows_the_programs(protocol: Protocol) {
    let scene = Scene::new(protocol);
    let Topology { client, peer, .. } = &scene.topology;
    let machine = scene.topology.client_address(FAMILY);
    // Its packets do not pass the uplink.
    let mut by_fast_path = scene.begin(&peer.netns);
    let seen_fast = by_fast_path.asks("on the fast path");
    let Some(taken) = scene.takes(UPLINK) else {
        return;
    };
    scene.is_served_by("userland", Some("detached"));
    assert_ne!(scene.newcomer("by the proxy").ip(), machine);
    assert_eq!(by_fast_path.asks("still there?"), seen_fast);
    let mut by_proxy = scene.begin(client);
    let seen_proxy = by_proxy.asks("by the proxy");
    drop(taken);
    scene.is_served_by("ebpf", None);
    assert_eq!(scene.newcomer("by the fast path").ip(), machine);
    assert_eq!(by_proxy.asks("from before"), seen_proxy);
    assert_eq!(by_fast_path.asks("still by the fast path"), seen_fast);
    scene.daemon.stop().unwrap();
}

#[test]
fn tcp_goes_to_the_proxy_while_a_program_cannot_be_attached_again() {
    follows_the_programs(Protocol::Tcp);
}

#[test]
fn udp_goes_to_the_proxy_while_a_program_cannot_be_attached_again() {
    follows_the_programs(Protocol::Udp);
}

/// A container's device without a program costs its own port the fast path, and no other's.
#[test]
fn what_is_lost_at_one_container_is_that_ones_alone() {
    let scene = Scene::new(Protocol::Tcp);
    let Topology { peer, backend, .. } = &scene.topology;
    let _other = Backend::start(&peer.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let to_peer = SocketAddr::new(peer.address(FAMILY), BACKEND_PORT);
    let publish = format!("{OTHER}:{to_peer}");
    scene.daemon.control(&["publish", &publish]).unwrap();
    let Some(taken) = scene.takes(&backend.veth) else {
        return;
    };
    let machine = scene.topology.client_address(FAMILY);
    scene.is_served_by("userland", Some("detached"));
    scene.is_served_at(OTHER, "ebpf", None);
    assert_ne!(scene.newcomer("by the proxy").ip(), machine);
    let other = SocketAddr::new(scene.frontend().ip(), OTHER);
    let ask_other = |netns| {
        ask(netns, Protocol::Tcp, other, "another")
            .unwrap()
            .seen
            .ip()
    };
    assert_eq!(ask_other(&scene.topology.client), machine);
    // As a client, that container has the proxy, without anybody deciding it.
    assert_ne!(ask_other(&backend.netns), backend.address(FAMILY));
    drop(taken);
    scene.is_served_by("ebpf", None);
    assert_eq!(scene.newcomer("by the fast path").ip(), machine);
    scene.daemon.stop().unwrap();
}

/// Clients whose conversations begin before something happens and go on after it, with the sources that the backend sees.
struct Kept(Vec<(&'static str, Client, SocketAddr)>);

impl Kept {
    /// Of another machine by the fast path, and of the same by the proxy: it asks over IPv6, which the backend is not asked by.
    fn of_another_machine(scene: &Scene) -> Self {
        let Topology { client, .. } = &scene.topology;
        let mut all = Self(Vec::new());
        all.add("by the fast path", scene.begin(client));
        if has_ipv6() {
            let frontend = SocketAddr::new(scene.topology.host_address(Family::V6), PORT);
            let by_proxy = Client::begin(client, scene.protocol, frontend);
            all.add("by the proxy", by_proxy);
            assert_eq!(all.0[1].2.ip(), scene.topology.backend.gateway(FAMILY));
        }
        let machine = scene.topology.client_address(FAMILY);
        assert_eq!(all.0[0].2.ip(), machine);
        all
    }

    fn add(&mut self, which: &'static str, mut client: Client) {
        let seen = client.asks(which);
        self.0.push((which, client, seen));
    }

    #[track_caller]
    fn go_on(&mut self) {
        for (which, client, before) in &mut self.0 {
            assert_eq!(client.asks(which), *before, "{which}");
        }
    }
}

/// The uplink goes to another namespace and comes back. Conversations go on, and others hear nothing of it.
fn goes_on_when_the_uplink_is_back(protocol: Protocol) {
    let scene = Scene::new(protocol);
    let Topology { host, peer, .. } = &scene.topology;
    let elsewhere = Netns::new("elsewhere").unwrap();
    let mut kept = Kept::of_another_machine(&scene);
    let mut neighbour = Kept(Vec::new());
    let inside = SocketAddr::new(scene.topology.backend.gateway(FAMILY), PORT);
    neighbour.add(
        "of a container",
        Client::begin(&peer.netns, protocol, inside),
    );
    host.ip(&format!("link set {UPLINK} netns {}", elsewhere.path()))
        .unwrap();
    neighbour.go_on();
    scene.is_served_by("ebpf", None);
    elsewhere
        .ip(&format!("link set {UPLINK} netns {}", host.path()))
        .unwrap();
    let [v4, v6] = [Family::V4, Family::V6].map(|family| scene.topology.host_address(family));
    host.ip(&format!(
        "addr add {v4}/24 dev {UPLINK}\naddr add {v6}/64 dev {UPLINK} nodad\nlink set {UPLINK} up"
    ))
    .unwrap();
    let begun = Instant::now();
    scene.newcomers_take_the_fast_path();
    println!("new ones take the fast path after {:?}", begun.elapsed());
    kept.go_on();
    neighbour.go_on();
    scene.daemon.stop().unwrap();
}

#[test]
fn tcp_goes_on_when_the_uplink_has_gone_and_is_back() {
    goes_on_when_the_uplink_is_back(Protocol::Tcp);
}

#[test]
fn udp_goes_on_when_the_uplink_has_gone_and_is_back() {
    goes_on_when_the_uplink_is_back(Protocol::Udp);
}

/// The bridge is removed and made again. Meanwhile nothing can reach the backend, and `list` says why.
fn goes_on_when_the_bridge_is_back(protocol: Protocol) {
    let scene = Scene::new(protocol);
    let Topology { host, backend, .. } = &scene.topology;
    let mut kept = Kept::of_another_machine(&scene);
    host.ip("link del br0").unwrap();
    scene.is_served_by("userland", Some("no_route"));
    let [v4, v6] = [Family::V4, Family::V6].map(|family| backend.gateway(family));
    host.ip(&format!(
        "link add br0 type bridge\naddr add {v4}/24 dev br0\naddr add {v6}/64 dev br0 nodad\n\
         link set br0 up\nlink set {} master br0",
        backend.veth
    ))
    .unwrap();
    scene.is_served_by("ebpf", None);
    scene.newcomers_take_the_fast_path();
    kept.go_on();
    scene.daemon.stop().unwrap();
}

#[test]
fn tcp_goes_on_when_the_bridge_has_gone_and_is_back() {
    goes_on_when_the_bridge_is_back(Protocol::Tcp);
}

#[test]
fn udp_goes_on_when_the_bridge_has_gone_and_is_back() {
    goes_on_when_the_bridge_is_back(Protocol::Udp);
}

/// The kernel has no room for a port on one address.
fn what_does_not_fit_is_served_by_the_proxy(protocol: Protocol) {
    let scene = Scene::new(protocol);
    let mut kept = Kept::of_another_machine(&scene);
    let full = FullFrontends::fill(scene.daemon.pid()).unwrap();
    let frontend = SocketAddr::new(scene.frontend().ip(), OTHER);
    let backend = SocketAddr::new(scene.topology.backend.address(FAMILY), BACKEND_PORT);
    let spec = format!("{frontend}:{backend}{}", suffix(protocol));
    scene.daemon.control(&["publish", &spec]).unwrap();
    scene.is_served_at(OTHER, "userland", Some("refused"));
    scene.is_served_by("ebpf", None);
    let machine = scene.topology.client_address(FAMILY);
    let new = |payload| {
        let answer = ask(&scene.topology.client, protocol, frontend, payload);
        answer.unwrap().seen.ip()
    };
    assert_ne!(new("by the proxy"), machine);
    kept.go_on();
    kept.add(
        "from before",
        Client::begin(&scene.topology.peer.netns, protocol, frontend),
    );
    drop(full);
    scene.is_served_at(OTHER, "ebpf", None);
    assert_eq!(new("by the fast path"), machine);
    if protocol == Protocol::Udp {
        kept.0.pop(); // it has no beginning to tell it by
    }
    kept.go_on();
    scene.daemon.control(&["unpublish", &spec]).unwrap();
    kept.0.truncate(2);
    kept.go_on();
    scene.daemon.stop().unwrap();
}

#[test]
fn tcp_of_a_port_without_room_in_the_kernel_is_served_by_the_proxy() {
    what_does_not_fit_is_served_by_the_proxy(Protocol::Tcp);
}

#[test]
fn udp_of_a_port_without_room_in_the_kernel_is_served_by_the_proxy() {
    what_does_not_fit_is_served_by_the_proxy(Protocol::Udp);
}

/// What a process may not write any more, the programs still read.
#[test]
fn without_a_word_to_the_kernel_new_ports_are_served_by_the_proxy() {
    let scene = Scene::new(Protocol::Tcp);
    let Topology { client, host, .. } = &scene.topology;
    let mut kept = Kept::of_another_machine(&scene);
    freeze(scene.daemon.pid(), &WRITTEN).unwrap();
    let backend = SocketAddr::new(scene.topology.backend.address(FAMILY), BACKEND_PORT);
    let new = format!("{OTHER}:{backend}");
    scene.daemon.control(&["publish", &new]).unwrap();
    scene.is_served_at(OTHER, "userland", Some("refused"));
    scene.is_served_by("ebpf", None);
    for (netns, address) in [(client, scene.frontend().ip()), (host, FAMILY.localhost())] {
        let frontend = SocketAddr::new(address, OTHER);
        ask(netns, Protocol::Tcp, frontend, "by the proxy").unwrap();
    }
    let machine = scene.topology.client_address(FAMILY);
    assert_eq!(scene.newcomer("by the fast path, as before").ip(), machine);
    kept.go_on();
    // What it may not take from the kernel stays published, which it says.
    let old = spec(&scene.topology.backend, FAMILY, Protocol::Tcp);
    let refused = scene.daemon.control(&["unpublish", &old]);
    assert!(refused.is_err(), "{refused:?}");
    scene.daemon.control(&["unpublish", &new]).unwrap();
    assert_eq!(scene.daemon.list().unwrap().len(), 1);
    scene.daemon.stop().unwrap();
}

/// The table of flows is full of others' flows. Another machine's new connections find room among the half-open; those of
/// this host, which need a source port of its own, are the proxy's.
#[test]
fn with_a_full_table_of_flows_new_connections_of_this_host_go_to_the_proxy() {
    const FEW: u32 = 4096;
    let mut scene = Scene::new(Protocol::Tcp);
    scene.daemon.kill().unwrap();
    Table::replace(scene.daemon.instance(), FEW).unwrap();
    scene.daemon.restart().unwrap();
    wait_for_peer(&scene.daemon);
    let Topology { host, .. } = &scene.topology;
    let mut kept = Kept::of_another_machine(&scene);
    let localhost = SocketAddr::new(FAMILY.localhost(), PORT);
    let local = || Client::begin(host, Protocol::Tcp, localhost);
    kept.add("of this host", local());
    let table = Table::open(scene.daemon.instance()).unwrap();
    fill(&table, u64::MAX); // of tomorrow: no sweep takes them
    let counted = || {
        let counts = ["flows_full", "source_share", "no_entry"];
        let [full, share, no_entry] = scene.daemon.counts(counts).unwrap();
        [full + share, no_entry]
    };
    let before = counted();
    kept.add("of this host by the proxy", local());
    assert!(counted()[1] > before[1], "{before:?}");
    on_the_fast_path(&scene.daemon, || {
        kept.add("of another machine", scene.begin(&scene.topology.client));
    });
    kept.go_on();
    assert!(counted()[0] > before[0], "{before:?}");
    fill(&table, 1); // long ago
    let begun = Instant::now();
    wait_until("there is room again", || {
        let before = counted();
        local().asks("new");
        counted()[1] == before[1]
    });
    println!("there is room again after {:?}", begun.elapsed());
    kept.go_on();
    scene.daemon.stop().unwrap();
}
