//! The program as dockerd starts it for a published port: its descriptors, its words, its end; with an instance, without
//! one, and while that goes and comes.

#![expect(
    unsafe_code,
    reason = "descriptors for a child, as dockerd hands them over"
)]

use std::{
    cell::RefCell,
    fs::File,
    io::Read as _,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    path::PathBuf,
    process::{Child, Stdio},
};

use forwarder_tests::{
    daemon::{Datapath, binary, make_program, program},
    deadline::{wait_for, wait_until},
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Connection, Protocol, ask},
};
use nix::{
    fcntl::OFlag,
    sys::signal::{Signal, kill},
    unistd::{Pid, dup2_raw, pipe2},
};

use crate::scene::{BACKEND_PORT, PORT, Scene, backend, frontend};

thread_local! {
    /// What is started by that name.
    static PROGRAM: RefCell<PathBuf> = RefCell::new(program("forwarder-docker-proxy"));
}

/// A running one; killed when dropped.
pub(crate) struct Shim {
    child: Child,
    status: File,
}

impl Shim {
    /// Started as dockerd does: nothing on the standard streams, a pipe as descriptor 3, and a bound socket as 4 if there
    /// is one.
    fn start(netns: &Netns, instance: &str, flags: &[&str], listener: Option<OwnedFd>) -> Self {
        let (status, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let mut command = PROGRAM.with_borrow(|program| netns.command(&program.to_string_lossy()));
        command
            .arg0("docker-proxy")
            .args(flags)
            .env("FORWARDER_INSTANCE", instance);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: two system calls between fork and exec, which take no lock.
        unsafe {
            command.pre_exec(move || {
                std::mem::forget(dup2_raw(&write, 3)?);
                if let Some(listener) = &listener {
                    std::mem::forget(dup2_raw(listener, 4)?);
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        drop(command); // and with it our end of the pipe
        Self {
            child,
            status: status.into(),
        }
    }

    /// All that it says until it closes the pipe.
    pub(crate) fn said(&mut self) -> String {
        let mut said = String::new();
        self.status.read_to_string(&mut said).unwrap();
        said
    }

    /// Ends it by a signal, and returns its status.
    pub(crate) fn end(mut self, signal: Signal) -> Option<i32> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
        let ended = wait_for("the end of the proxy", || self.child.try_wait().unwrap());
        ended.unwrap().code()
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn flags(topology: &Topology, protocol: &str, host: &str) -> Vec<String> {
    let container = topology.backend.address(Family::V4).to_string();
    let (port, backend) = (PORT.to_string(), BACKEND_PORT.to_string());
    let words = [
        "-proto",
        protocol,
        "-host-ip",
        host,
        "-host-port",
        &port,
        "-container-ip",
        &container,
        "-container-port",
        &backend,
    ];
    words.map(Into::into).to_vec()
}

pub(crate) fn start(topology: &Topology, instance: &str, protocol: &str, host: &str) -> Shim {
    let flags = flags(topology, protocol, host);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Shim::start(&topology.host, instance, &flags, None)
}

fn frontends(topology: &Topology) -> [(&Netns, SocketAddr); 2] {
    let localhost = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    [
        (&topology.client, frontend(topology, Family::V4)),
        (&topology.host, localhost),
    ]
}

fn a_container_is_published_until_its_end(datapath: Datapath, protocol: Protocol, name: &str) {
    let scene = Scene::of(Family::V4, protocol).idle().by(datapath).start();
    let (topology, daemon) = scene.parts();
    let mut v4 = start(topology, daemon.instance(), name, "0.0.0.0");
    assert_eq!(v4.said(), "0\n");
    let mut v6 = start(topology, daemon.instance(), name, "::");
    assert_eq!(v6.said(), "0\n");
    assert_eq!(daemon.list().unwrap().len(), 2);
    for (netns, frontend) in frontends(topology) {
        ask(netns, protocol, frontend, "hello").unwrap();
    }
    let six = SocketAddr::new(Family::V6.localhost(), PORT);
    ask(&topology.host, protocol, six, "by IPv6").unwrap();
    assert_eq!(v4.end(Signal::SIGINT), Some(0));
    assert_eq!(daemon.list().unwrap().len(), 1, "at the time of its end");
    // The port is free for the next container at once.
    let mut again = start(topology, daemon.instance(), name, "0.0.0.0");
    assert_eq!(again.said(), "0\n");
    assert_eq!(again.end(Signal::SIGTERM), Some(0));
    assert_eq!(v6.end(Signal::SIGINT), Some(0));
    assert!(daemon.list().unwrap().is_empty());
    scene.stop();
}

#[test]
fn a_container_is_published_until_its_end_by_tcp() {
    a_container_is_published_until_its_end(Datapath::Auto, Protocol::Tcp, "tcp");
}

#[test]
fn a_container_is_published_until_its_end_by_udp() {
    a_container_is_published_until_its_end(Datapath::Auto, Protocol::Udp, "udp");
}

#[test]
fn a_container_is_published_until_its_end_in_user_space() {
    a_container_is_published_until_its_end(Datapath::Userland, Protocol::Tcp, "tcp");
}

#[test]
fn the_socket_that_dockerd_has_bound_is_used() {
    let scene = Scene::tcp().silent().idle().auto().start();
    let (topology, daemon) = scene.parts();
    let bound = (Ipv4Addr::UNSPECIFIED, PORT);
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let _backend = backend(&topology.backend, protocol);
        let (name, listener): (_, OwnedFd) = topology.host.enter(|| match protocol {
            Protocol::Tcp => ("tcp", TcpListener::bind(bound).unwrap().into()),
            Protocol::Udp => ("udp", UdpSocket::bind(bound).unwrap().into()),
        });
        let container = topology.backend.address(Family::V4).to_string();
        let backend = BACKEND_PORT.to_string();
        // The host's address and port are those of the socket.
        let flags = [
            "-proto",
            name,
            "-host-ip",
            "192.0.2.1",
            "-host-port",
            "1",
            "-container-ip",
            &container,
            "-container-port",
            &backend,
            "-use-listen-fd",
        ];
        let mut shim = Shim::start(&topology.host, daemon.instance(), &flags, Some(listener));
        assert_eq!(shim.said(), "0\n");
        for (netns, frontend) in frontends(topology) {
            ask(netns, protocol, frontend, "hello").unwrap();
        }
        assert_eq!(daemon.entry().unwrap().frontend.port, PORT);
        assert_eq!(shim.end(Signal::SIGINT), Some(0));
    }
    scene.stop();
}

#[test]
fn a_socket_of_another_protocol_is_refused() {
    let topology = Topology::new().unwrap();
    let any = (Ipv4Addr::LOCALHOST, 0);
    let tcp = TcpListener::bind(any).unwrap().into();
    let udp = UdpSocket::bind(any).unwrap().into();
    for (name, listener) in [("udp", tcp), ("tcp", udp)] {
        let flags = [
            "-proto",
            name,
            "-container-ip",
            "172.31.0.2",
            "-container-port",
            "80",
            "-use-listen-fd",
        ];
        let mut shim = Shim::start(&topology.host, "none", &flags, Some(listener));
        assert_eq!(
            shim.said(),
            format!("1\ndescriptor 4 is no socket of {name}")
        );
    }
}

#[test]
fn a_port_that_is_taken_is_said_as_docker_says_it() {
    let scene = Scene::tcp().silent().idle().auto().start();
    let (topology, daemon) = scene.parts();
    let _taken = topology
        .host
        .enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))
        .unwrap();
    let mut shim = start(topology, daemon.instance(), "tcp", "0.0.0.0");
    let said = shim.said();
    assert!(
        said.starts_with("1\n") && said.contains("address already in use"),
        "{said:?}"
    );
    let status = wait_for("the end of the proxy", || shim.child.try_wait().unwrap()).unwrap();
    assert_eq!(status.code(), Some(1));
    daemon
        .control(&["publish", &format!("0.0.0.0:{}:172.31.0.2:80", PORT + 1)])
        .unwrap();
    scene.stop();
}

#[test]
fn wrong_words_are_refused_with_an_empty_pipe() {
    let topology = Topology::new().unwrap();
    for (flags, code, said) in [
        (&["-nonsense"][..], 2, ""),
        (&["-host-ip", "nonsense"], 2, ""),
        (
            &["-proto", "icmp", "-host-port", "1"],
            1,
            "1\nunsupported protocol icmp",
        ),
        (&["-v"], 0, ""),
    ] {
        let mut shim = Shim::start(&topology.host, "none", flags, None);
        assert_eq!(shim.said(), said, "{flags:?}");
        let status = wait_for("the end of the proxy", || shim.child.try_wait().unwrap()).unwrap();
        assert_eq!(status.code(), Some(code), "{flags:?}");
    }
}

#[test]
fn by_hand_it_has_no_pipe_and_says_what_is_wrong_on_standard_error() {
    let topology = Topology::new().unwrap();
    let mut command = topology.host.command(&binary().to_string_lossy());
    let output = command
        .args(["docker-proxy", "-host-ip", "198.51.100.77"])
        .args(["-host-port", "8080", "-container-ip", "172.31.0.2"])
        .args(["-container-port", "80"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    let start =
        "error: publish 198.51.100.77:8080/tcp: 198.51.100.77 is not an address of this host";
    assert!(errors.starts_with(start), "{errors}");
}

#[test]
fn without_an_instance_it_forwards_by_itself_until_there_is_one() {
    let mut scene = Scene::tcp().idle().auto().start();
    scene.daemon.terminate().unwrap();
    let mut shim = start(&scene.topology, scene.daemon.instance(), "tcp", "0.0.0.0");
    assert_eq!(shim.said(), "0\n");
    for (netns, frontend) in frontends(&scene.topology) {
        ask(netns, Protocol::Tcp, frontend, "by itself").unwrap();
    }
    let mut old = scene.connect();
    old.ask("before").unwrap();
    scene.daemon.restart().unwrap();
    wait_until("the lease", || scene.daemon.list().unwrap().len() == 1);
    for (netns, frontend) in frontends(&scene.topology) {
        ask(netns, Protocol::Tcp, frontend, "by the instance").unwrap();
    }
    old.ask("what it had begun goes on").unwrap();
    assert_eq!(shim.end(Signal::SIGINT), Some(0));
    scene.stop();
}

#[test]
fn without_its_instance_it_serves_only_whom_that_allowed() {
    for whole in [false, true] {
        if whole {
            PROGRAM.set(binary());
        }
        let topology = Topology::new().unwrap();
        let client = format!("{}/32", topology.client_address(Family::V4));
        let allow = ["--allow", &client];
        let scene = Scene::tcp().idle().by(Datapath::Userland).flags(&allow);
        let Scene {
            backends: _backends,
            topology,
            daemon,
            ..
        } = scene.start_in(topology);
        let mut proxy = start(&topology, daemon.instance(), "tcp", "0.0.0.0");
        assert_eq!(proxy.said(), "0\n");
        let [allowed, other] = frontends(&topology)
            .map(|(netns, frontend)| move || ask(netns, Protocol::Tcp, frontend, "hello").is_ok());
        assert!(allowed() && !other());
        daemon.stop().unwrap();
        wait_until("an answer without an instance", &allowed);
        assert!(!other(), "whole: {whole}");
        assert_eq!(proxy.end(Signal::SIGINT), Some(0));
    }
}

#[test]
fn connections_outlive_the_death_of_the_instance() {
    let mut scene = Scene::tcp().idle().with_state().start();
    let mut shim = start(&scene.topology, scene.daemon.instance(), "tcp", "0.0.0.0");
    assert_eq!(shim.said(), "0\n");
    let mut connections = frontends(&scene.topology).map(|(netns, frontend)| {
        let mut connection = Connection::open(netns, frontend).unwrap();
        connection.ask("before").unwrap();
        connection
    });
    scene.daemon.kill().unwrap();
    for connection in &mut connections {
        connection.ask("while it is dead").unwrap();
    }
    scene.daemon.restart().unwrap();
    for connection in &mut connections {
        connection.ask("after").unwrap();
    }
    assert_eq!(scene.daemon.list().unwrap().len(), 1);
    assert_eq!(shim.end(Signal::SIGINT), Some(0));
    scene.stop();
}

#[test]
fn connections_stay_with_the_publish_of_their_family() {
    // As Docker asks for a container without IPv6, in the order that leases may come in after a restart.
    let specs = ["[::]", "0.0.0.0"].map(|host| format!("{host}:{PORT}:172.31.0.2:{BACKEND_PORT}"));
    let mut scene = Scene::tcp().publishing(&specs).auto().start();
    let mut connection = scene.connect();
    connection.ask("before").unwrap();
    scene.daemon.kill().unwrap();
    scene.daemon.restart().unwrap();
    connection.ask("after").unwrap();
    scene.stop();
}

#[test]
fn a_killed_one_takes_its_port_with_it() {
    let scene = Scene::tcp().silent().idle().auto().start();
    let (topology, daemon) = scene.parts();
    let mut shim = start(topology, daemon.instance(), "tcp", "0.0.0.0");
    assert_eq!(shim.said(), "0\n");
    shim.child.kill().unwrap();
    shim.child.wait().unwrap();
    let mut next = start(topology, daemon.instance(), "tcp", "0.0.0.0");
    assert_eq!(next.said(), "0\n");
    assert_eq!(next.end(Signal::SIGINT), Some(0));
    scene.stop();
}

#[test]
fn the_whole_program_keeps_the_contract_under_that_name() {
    PROGRAM.set(binary());
    a_container_is_published_until_its_end(Datapath::Auto, Protocol::Tcp, "tcp");
    the_socket_that_dockerd_has_bound_is_used();
    a_port_that_is_taken_is_said_as_docker_says_it();
    wrong_words_are_refused_with_an_empty_pipe();
    without_an_instance_it_forwards_by_itself_until_there_is_one();
}

/// It would hang on Docker's signal: nothing else ends it.
#[test]
fn one_that_cannot_become_the_whole_program_ends() {
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("forwarder-docker-proxy");
    let shim = std::fs::read(program("forwarder-docker-proxy")).unwrap();
    make_program(&own, &shim).unwrap();
    let whole = folder.path().join("forwarder");
    make_program(&whole, b"#!/nowhere").unwrap();
    PROGRAM.set(own);
    let mut scene = Scene::tcp().idle().auto().start();
    let mut shim = start(&scene.topology, scene.daemon.instance(), "tcp", "0.0.0.0");
    assert_eq!(shim.said(), "0\n");
    scene.daemon.terminate().unwrap();
    let ended = wait_for("the end of the proxy", || shim.child.try_wait().unwrap());
    assert_eq!(ended.unwrap().code(), Some(1));
    // Before anything was promised, dockerd is told.
    let mut shim = start(&scene.topology, scene.daemon.instance(), "tcp", "0.0.0.0");
    let said = shim.said();
    assert!(said.starts_with("1\nno instance is running"), "{said}");
}
