//! The path of new connections changes while an instance runs: to the proxy when a program is detached and cannot be attached
//! again, and back. Connections that exist stay on their path.

use std::{
    net::{SocketAddr, UdpSocket},
    os::fd::OwnedFd,
};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::wait_for,
    link,
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask, ask_by},
};

use crate::scene::{BACKEND_PORT, PORT, on_the_fast_path, spec, wait_for_peer};

const FAMILY: Family = Family::V4;
const UPLINK: &str = "eth0";

/// A client that asks more than once.
enum Client {
    Tcp(Connection),
    Udp(UdpSocket, SocketAddr),
}

impl Client {
    fn begin(netns: &Netns, protocol: Protocol, frontend: SocketAddr) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp(Connection::open(netns, frontend).unwrap()),
            Protocol::Udp => {
                let socket = netns.enter(|| UdpSocket::bind("0.0.0.0:0").unwrap());
                Self::Udp(socket, frontend)
            }
        }
    }

    /// The source that the backend sees.
    #[track_caller]
    fn asks(&mut self, payload: &str) -> SocketAddr {
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

    /// Takes our program off the uplink, and the last place for it there, until what is returned is dropped. None: this kernel
    /// has places for any number.
    fn takes_the_uplink(&self) -> Option<Vec<OwnedFd>> {
        let Topology { host, .. } = &self.topology;
        let ifindex = host.enter(|| nix::net::if_::if_nametoindex(UPLINK).unwrap());
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

    /// Waits until `list` says so.
    #[track_caller]
    fn is_served_by(&self, datapath: &str, reason_code: Option<&str>) {
        let said = wait_for("the other path", || {
            let entry = self.daemon.entry().ok()?;
            let why = entry.reason_code.as_deref();
            (entry.datapath == datapath && why == reason_code).then_some(())
        });
        said.unwrap_or_else(|error| {
            panic!(
                "{error:#}\n{:?}\n{}",
                self.daemon.entry(),
                self.daemon.said()
            )
        });
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
    let Some(taken) = scene.takes_the_uplink() else {
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
