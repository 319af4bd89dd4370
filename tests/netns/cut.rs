//! A publish that is taken back, or an instance that stops: both ends of every connection hear it, whatever they are doing.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::{patience, slack},
    document::Flow,
    netns::Netns,
    topology::{Family, Topology},
    traffic::Protocol,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::scene::{BACKEND_PORT, PORT, Scene, backend, spec};

/// Connections of a test, half of which are busy in both directions.
const CONNECTIONS: usize = 18;

/// Who connects.
#[derive(Clone, Copy, Debug)]
enum Client {
    /// Another machine.
    Outside,
    /// The host, by its loopback address.
    Here,
    /// A container on the backend's bridge, and one behind another bridge.
    Peer,
    Other,
}

impl Client {
    fn netns(self, topology: &Topology) -> &Netns {
        match self {
            Self::Outside => &topology.client,
            Self::Here => &topology.host,
            Self::Peer => &topology.peer.netns,
            Self::Other => &topology.other.netns,
        }
    }

    fn frontend(self, topology: &Topology, family: Family) -> SocketAddr {
        let address = match self {
            Self::Outside => topology.host_address(family),
            Self::Here => family.localhost(),
            Self::Peer => topology.peer.gateway(family),
            Self::Other => topology.other.gateway(family),
        };
        SocketAddr::new(address, PORT)
    }
}

/// An end of a connection, whose thread says how it ended. A busy one sends all the time.
struct End(mpsc::Receiver<ErrorKind>);

impl End {
    fn of(stream: TcpStream, is_busy: bool) -> Self {
        let (sender, ends) = mpsc::channel();
        let mut reader = stream.try_clone().unwrap();
        let says = sender.clone();
        std::thread::spawn(move || {
            let mut octets = [0; 4096];
            let how = loop {
                match reader.read(&mut octets) {
                    Ok(0) => break ErrorKind::UnexpectedEof,
                    Ok(_) => {}
                    Err(error) => break error.kind(),
                }
            };
            let _ = says.send(how);
        });
        if is_busy {
            let mut writer = stream;
            std::thread::spawn(move || {
                let how = loop {
                    if let Err(error) = writer.write_all(&[7; 4096]) {
                        break error.kind();
                    }
                };
                let _ = sender.send(how);
            });
        }
        Self(ends)
    }

    /// Whether it hears that the connection was reset. The socket says so once, to whoever asks first.
    fn is_reset(&self) -> bool {
        let heard = |_: usize| self.0.recv_timeout(2 * slack());
        (0..2)
            .map(heard)
            .any(|how| how == Ok(ErrorKind::ConnectionReset))
    }
}

/// Opens the connections; both ends of each.
fn open(topology: &Topology, client: Client, family: Family) -> Vec<[End; 2]> {
    let address = SocketAddr::new(topology.backend.address(family), BACKEND_PORT);
    let listener = topology
        .backend
        .netns
        .enter(|| TcpListener::bind(address).unwrap());
    let frontend = client.frontend(topology, family);
    (0..CONNECTIONS)
        .map(|number| {
            let connected = client
                .netns(topology)
                .enter(|| TcpStream::connect_timeout(&frontend, patience()).unwrap());
            let (accepted, _) = listener.accept().unwrap();
            for (mut from, mut to) in [(&connected, &accepted), (&accepted, &connected)] {
                from.write_all(b"hello").unwrap();
                to.read_exact(&mut [0; 5]).unwrap();
            }
            [connected, accepted].map(|stream| End::of(stream, number % 2 == 0))
        })
        .collect()
}

fn both_ends_hear(client: Client, flags: &[&str], ends: impl Fn(Daemon, &str) -> Option<Daemon>) {
    for family in [Family::V4, Family::V6] {
        let scene = Scene::of(family, Protocol::Tcp)
            .silent()
            .flags(flags)
            .start();
        let connections = open(&scene.topology, client, family);
        let flows: Vec<Flow> = scene.daemon.document(&["flows"]).unwrap();
        assert_eq!(flows.len(), CONNECTIONS, "on the fast path");
        let daemon = ends(scene.daemon, &scene.specs[0]);
        for (number, [client_end, backend_end]) in connections.iter().enumerate() {
            let heard = (client_end.is_reset(), backend_end.is_reset());
            let said = daemon.as_ref().map(Daemon::said);
            assert_eq!(
                heard,
                (true, true),
                "{client:?}, {family:?}, connection {number}: {said:?}"
            );
        }
        if let Some(daemon) = daemon {
            daemon.stop().unwrap();
        }
    }
}

/// Also publishes the port again at once.
fn unpublished(daemon: Daemon, spec: &str) -> Option<Daemon> {
    daemon.control(&["unpublish", spec]).unwrap();
    assert_eq!(daemon.list().unwrap(), []);
    daemon.control(&["unpublish", spec]).unwrap_err();
    Some(daemon)
}

fn stopped(daemon: Daemon, _: &str) -> Option<Daemon> {
    daemon.stop().unwrap();
    None
}

#[test]
fn other_machines_and_their_backend_hear_that_a_publish_was_taken_back() {
    both_ends_hear(Client::Outside, &[], unpublished);
}

#[test]
fn this_hosts_clients_and_their_backend_hear_it() {
    both_ends_hear(Client::Here, &[], unpublished);
}

#[test]
fn containers_and_their_backend_hear_it() {
    both_ends_hear(Client::Peer, &[], unpublished);
    both_ends_hear(Client::Other, &[], unpublished);
}

#[test]
fn those_who_pass_the_firewall_hear_it() {
    both_ends_hear(Client::Outside, &["--respect-firewall"], unpublished);
}

#[test]
fn all_hear_that_the_instance_stops() {
    both_ends_hear(Client::Outside, &[], stopped);
    both_ends_hear(Client::Here, &[], stopped);
}

/// As many connections as are not ended by the time that the process could be.
fn all_clients_of_the_proxy_hear_that_the_instance_stops(drains: bool) {
    const MANY: usize = 4000;
    let (_, files) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, files, files).unwrap();
    let scene = Scene::tcp().silent().by(Datapath::Userland).start();
    let topology = &scene.topology;
    let address = SocketAddr::new(topology.backend.address(Family::V4), BACKEND_PORT);
    let bind = || TcpListener::bind(address).unwrap();
    let listener = topology.backend.netns.enter(bind);
    let frontend = scene.frontend();
    let pairs: Vec<[TcpStream; 2]> = (0..MANY)
        .map(|_| {
            let connect = || TcpStream::connect_timeout(&frontend, patience()).unwrap();
            let connected = topology.client.enter(connect);
            [connected, listener.accept().unwrap().0]
        })
        .collect();
    if drains {
        scene
            .daemon
            .control(&["unpublish", scene.spec(), "--drain"])
            .unwrap();
    }
    scene.daemon.stop().unwrap();
    let ends = pairs.iter().flatten().map(|mut end| {
        end.set_read_timeout(Some(patience())).unwrap();
        end.read(&mut [0]).map_err(|error| error.kind())
    });
    let heard = ends.filter(|end| *end == Err(ErrorKind::ConnectionReset));
    assert_eq!(heard.count(), 2 * MANY);
}

#[test]
fn all_clients_of_the_userland_proxy_hear_that_the_instance_stops() {
    all_clients_of_the_proxy_hear_that_the_instance_stops(false);
}

#[test]
fn what_drains_in_user_space_hears_that_the_instance_stops() {
    all_clients_of_the_proxy_hear_that_the_instance_stops(true);
}

/// The port is free at once, though the old connections are still being told.
#[test]
fn a_port_that_was_taken_back_is_published_anew_at_once() {
    let scene = Scene::tcp().silent().start();
    let (topology, daemon) = scene.parts();
    let connections = open(topology, Client::Outside, Family::V4);
    let new = spec(&topology.peer, Family::V4, Protocol::Tcp);
    daemon.control(&["unpublish", scene.spec()]).unwrap();
    daemon.control(&["publish", &new]).unwrap();
    let _backend = backend(&topology.peer, Protocol::Tcp);
    scene.served("new");
    // Their resets were on the way; who was busy meets the new backend, which does not know the connection either.
    for [client, _] in &connections {
        assert!(client.is_reset());
    }
    scene.stop();
}
