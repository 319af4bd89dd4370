//! What the scenarios have in common: a machine with a container whose port is published, a client that asks for it, and
//! the row that the list has of it. A test whose scene is another one builds that itself.

use std::net::SocketAddr;

use anyhow::Result;
use aya::util::KernelVersion;
use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::wait_for,
    document::{Delivery, Row},
    netns::Netns,
    topology::{Container, Family, Topology},
    traffic::{
        Answer, Backend, Connection,
        Protocol::{self, Tcp, Udp},
        ask,
    },
};

/// The published port.
pub(crate) const PORT: u16 = 8080;
/// Where the backends listen.
pub(crate) const BACKEND_PORT: u16 = 9000;

/// What a scene is to be: by default, the container `backend` answers, and an instance publishes its port by the fast
/// path.
pub(crate) struct Setting<'a> {
    family: Family,
    protocols: Vec<Protocol>,
    container: fn(&Topology) -> &Container,
    has_another: bool,
    listens: bool,
    specs: Option<Vec<String>>,
    datapath: Datapath,
    wrapper: &'a [&'a str],
    flags: &'a [&'a str],
    keeps_state: bool,
}

/// The scene, whose parts end in this order.
pub(crate) struct Scene {
    pub(crate) daemon: Daemon,
    /// Of each container, by protocol.
    pub(crate) backends: Vec<Backend>,
    pub(crate) topology: Topology,
    /// What publishes the port, in the order of `backends`. The instance has those of the first container.
    pub(crate) specs: Vec<String>,
    family: Family,
    protocol: Protocol,
}

impl Scene {
    /// The usual scene with TCP over IPv4.
    pub(crate) fn tcp<'a>() -> Setting<'a> {
        Self::of(Family::V4, Tcp)
    }

    /// The usual scene with UDP over IPv4.
    pub(crate) fn udp<'a>() -> Setting<'a> {
        Self::of(Family::V4, Udp)
    }

    /// The usual scene with another protocol or family.
    pub(crate) fn of<'a>(family: Family, protocol: Protocol) -> Setting<'a> {
        Setting {
            family,
            protocols: vec![protocol],
            container: |topology| &topology.backend,
            has_another: false,
            listens: true,
            specs: None,
            datapath: Datapath::Ebpf,
            wrapper: &[],
            flags: &[],
            keeps_state: false,
        }
    }

    /// What most tests need of it.
    pub(crate) fn parts(&self) -> (&Topology, &Daemon) {
        (&self.topology, &self.daemon)
    }

    /// The SPEC of the first container and protocol.
    pub(crate) fn spec(&self) -> &str {
        &self.specs[0]
    }

    pub(crate) fn family(&self) -> Family {
        self.family
    }

    /// The port as other machines see it.
    pub(crate) fn frontend(&self) -> SocketAddr {
        frontend(&self.topology, self.family)
    }

    /// Asks the port from outside.
    pub(crate) fn ask(&self, payload: &str) -> Result<Answer> {
        let Topology { client, .. } = &self.topology;
        ask(client, self.protocol, self.frontend(), payload)
    }

    /// A connection from outside.
    #[track_caller]
    pub(crate) fn connect(&self) -> Connection {
        Connection::open(&self.topology.client, self.frontend()).unwrap()
    }

    /// Asks the port from outside; the backend must see the client.
    #[track_caller]
    pub(crate) fn served(&self, payload: &str) {
        served(&self.topology, self.family, self.protocol, payload);
    }

    /// As [`Scene::served`], by the fast path both ways.
    #[track_caller]
    pub(crate) fn served_on_the_fast_path(&self) {
        on_the_fast_path(&self.daemon, || self.served("hello"));
    }

    /// How many requests all backends have got.
    pub(crate) fn requests(&self) -> u64 {
        self.backends.iter().map(Backend::requests).sum()
    }

    /// Ends the instance as Ctrl-C does, and the scene with it.
    #[track_caller]
    pub(crate) fn stop(self) {
        self.daemon.stop().unwrap();
    }
}

impl<'a> Setting<'a> {
    /// UDP as well; [`Scene::ask`] and the like go by the first protocol.
    pub(crate) fn and_udp(mut self) -> Self {
        self.protocols.push(Udp);
        self
    }

    /// Another container than `backend`.
    pub(crate) fn container(mut self, container: fn(&Topology) -> &Container) -> Self {
        self.container = container;
        self
    }

    /// The container `peer` answers as well, to which nothing leads yet.
    pub(crate) fn and_another(mut self) -> Self {
        self.has_another = true;
        self
    }

    /// Nobody listens in the container yet.
    pub(crate) fn silent(mut self) -> Self {
        self.listens = false;
        self
    }

    /// Publishes nothing yet.
    pub(crate) fn idle(self) -> Self {
        self.publishing::<&str>(&[])
    }

    /// Publishes this instead; the container `backend` is 172.31.0.2.
    pub(crate) fn publishing<S: AsRef<str>>(mut self, specs: &[S]) -> Self {
        self.specs = Some(specs.iter().map(|spec| spec.as_ref().into()).collect());
        self
    }

    /// The instance decides which path serves.
    pub(crate) fn auto(self) -> Self {
        self.by(Datapath::Auto)
    }

    pub(crate) fn by(mut self, datapath: Datapath) -> Self {
        self.datapath = datapath;
        self
    }

    /// The instance is started by a program that takes something from it.
    pub(crate) fn wrapped(mut self, wrapper: &'a [&'a str]) -> Self {
        self.wrapper = wrapper;
        self
    }

    /// Further flags of `run`.
    pub(crate) fn flags(mut self, flags: &'a [&'a str]) -> Self {
        self.flags = flags;
        self
    }

    /// What is published at run time survives a restart; such an instance is not `wrapped`.
    pub(crate) fn with_state(mut self) -> Self {
        self.keeps_state = true;
        self
    }

    #[track_caller]
    pub(crate) fn start(self) -> Scene {
        self.start_in(Topology::new().unwrap())
    }

    /// Starts it where something has been set up before.
    #[track_caller]
    pub(crate) fn start_in(self, topology: Topology) -> Scene {
        let mut containers = vec![(self.container)(&topology)];
        containers.extend(self.has_another.then_some(&topology.peer));
        let (mut backends, mut specs) = (Vec::new(), Vec::new());
        for container in containers {
            for &protocol in &self.protocols {
                if self.listens {
                    backends.push(backend(container, protocol));
                }
                specs.push(spec(container, self.family, protocol));
            }
        }
        let usual = &specs[..self.protocols.len()];
        let published = self.specs.as_deref().unwrap_or(usual);
        let published: Vec<&str> = published.iter().map(String::as_str).collect();
        let (host, datapath, flags) = (&topology.host, self.datapath, self.flags);
        let daemon = if self.keeps_state {
            Daemon::start_with_state(host, &published, datapath, flags)
        } else {
            Daemon::start_wrapped(host, self.wrapper, &published, datapath, flags)
        };
        Scene {
            daemon: daemon.unwrap(),
            backends,
            topology,
            specs,
            family: self.family,
            protocol: self.protocols[0],
        }
    }
}

/// Starts a backend behind the published port.
#[track_caller]
pub(crate) fn backend(container: &Container, protocol: Protocol) -> Backend {
    Backend::start(&container.netns, protocol, BACKEND_PORT).unwrap()
}

/// The same by both protocols.
#[track_caller]
pub(crate) fn backends(netns: &Netns) -> [Backend; 2] {
    [Tcp, Udp].map(|protocol| Backend::start(netns, protocol, BACKEND_PORT).unwrap())
}

/// The published port as other machines see it.
pub(crate) fn frontend(topology: &Topology, family: Family) -> SocketAddr {
    SocketAddr::new(topology.host_address(family), PORT)
}

/// `/tcp` or `/udp`, as a SPEC ends.
pub(crate) fn suffix(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "/tcp",
        Protocol::Udp => "/udp",
    }
}

/// The SPEC that publishes `PORT` on every local address.
pub(crate) fn spec(container: &Container, family: Family, protocol: Protocol) -> String {
    let backend = SocketAddr::new(container.address(family), BACKEND_PORT);
    format!("{PORT}:{backend}{}", suffix(protocol))
}

/// Asks the published port from outside over IPv4; the backend must see the client.
#[track_caller]
pub(crate) fn served_to_the_client(topology: &Topology, protocol: Protocol, payload: &str) {
    served(topology, Family::V4, protocol, payload);
}

#[track_caller]
fn served(topology: &Topology, family: Family, protocol: Protocol, payload: &str) {
    let frontend = frontend(topology, family);
    let answer = ask(&topology.client, protocol, frontend, payload).unwrap();
    assert_eq!(answer.payload, payload);
    let client = SocketAddr::new(topology.client_address(family), answer.local_port);
    assert_eq!(answer.seen, client, "source that the backend saw");
}

/// Packets that the program has forwarded, to the backend and back.
#[track_caller]
pub(crate) fn packets(daemon: &Daemon) -> (u64, u64) {
    let counts = daemon.counts(["forwarded_original", "forwarded_reply"]);
    counts.unwrap().into()
}

/// Asserts that what `traffic` sends, and its answers, were carried by the fast path.
#[track_caller]
pub(crate) fn on_the_fast_path(daemon: &Daemon, traffic: impl FnOnce()) {
    let entry = daemon.entry().unwrap();
    assert_eq!(entry.datapath, "ebpf", "{entry:?}\n{}", daemon.said());
    let before = packets(daemon);
    traffic();
    let after = packets(daemon);
    assert!(
        after.0 > before.0 && after.1 > before.1,
        "not both ways on the fast path: {before:?} then {after:?}\n{}",
        daemon.said()
    );
}

/// Waits until the only publish is delivered by the fast path, as after its backend came up.
#[track_caller]
pub(crate) fn wait_for_delivery(daemon: &Daemon) {
    wait_for_row(daemon, "the fast path finds the backend", |row| {
        row.datapath == "ebpf" && row.delivery.is_some()
    });
}

/// Waits until the backend, whose neighbour entry its first packets made, is delivered to directly. Until then, packets from
/// the host cross the bridge.
#[track_caller]
pub(crate) fn wait_for_peer(daemon: &Daemon) {
    wait_for_delivery_by(daemon, Delivery::Peer);
}

#[track_caller]
pub(crate) fn wait_for_delivery_by(daemon: &Daemon, delivery: Delivery) {
    let what = format!("delivery by {delivery:?}");
    wait_for_row(daemon, &what, |row| row.delivery == Some(delivery));
}

/// Waits until every publish is such a one.
#[track_caller]
pub(crate) fn wait_for_row(daemon: &Daemon, what: &str, is_so: impl Fn(&Row) -> bool) {
    let found = wait_for(what, || {
        let rows = daemon.list().ok()?;
        (!rows.is_empty() && rows.iter().all(&is_so)).then_some(())
    });
    found.unwrap_or_else(|error| panic!("{error:#}\n{:?}\n{}", daemon.list(), daemon.said()));
}

/// Whether datagrams that are sent in one buffer pass a veth in one. Linux 5.10 cuts them up there.
pub(crate) fn veths_keep_buffers() -> bool {
    KernelVersion::current().unwrap() >= KernelVersion::new(5, 11, 0)
}

/// Whether a veth takes frames from XDP where the other end has no program, but GRO.
pub(crate) fn veths_take_frames_with_gro() -> bool {
    KernelVersion::current().unwrap() >= KernelVersion::new(5, 13, 0)
}
