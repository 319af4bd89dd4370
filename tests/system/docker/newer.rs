//! Engines of the newest Debian, in a root of their own: Docker 28 or newer, which binds a port itself and hands the socket to
//! its proxy (descriptor 4), and whose raw table drops what others send to a container's address.

use std::{fs, net::SocketAddr, os::unix::fs::FileTypeExt as _};

use forwarder_tests::{
    topology::Topology,
    traffic::{Protocol, ask},
};

use super::{
    BACKEND_PORT, PORT, Programs, Scene, every_client_of_a_container_is_served, held,
    page::isolate, podman,
};

/// Runs a test with the newest Debian's programs.
fn with_newest(test: impl FnOnce(Topology, Programs) + Send) {
    let topology = Topology::new().unwrap();
    let host = topology.host.clone();
    host.enter(|| {
        isolate(&["/run"]);
        let changes = tempfile::tempdir().unwrap();
        let programs = Programs::newest(&host, changes.path()).unwrap();
        test(topology, programs);
    });
}

impl Scene {
    /// It is one of which the older tests do not know.
    #[track_caller]
    fn is_new(&self) {
        let version = ["version", "--format", "{{.Server.Version}}"];
        let version = self.engine.docker(&version).unwrap();
        let major = version.split('.').next().and_then(|it| it.parse().ok());
        assert!(
            major.is_some_and(|major: u32| major >= 28),
            "{version}: remove target/root-sid"
        );
    }
}

#[test]
fn the_drop_in_serves_every_client() {
    with_newest(|topology, host| {
        let scene = Scene::served(topology, host, true);
        scene.is_new();
        every_client_of_a_container_is_served(scene);
    });
}

#[test]
fn the_drop_in_takes_the_socket_that_docker_has_bound_and_passes_its_raw_rules() {
    with_newest(|topology, host| {
        let scene = Scene::served(topology, host, true);
        let _backends = scene.run("web");
        let address = scene.engine.address("web").unwrap();
        let loopback = PORT + 1;
        let local = format!("127.0.0.1:{loopback}:{BACKEND_PORT}");
        scene.engine.run("local", &["-p", &local]).unwrap();
        let proxies = scene.engine.proxy_processes().unwrap();
        assert_eq!(proxies.len(), 5, "{proxies:?}");
        for (process, words) in &proxies {
            assert!(words.contains("-use-listen-fd"), "{words}");
            let socket = fs::metadata(format!("/proc/{process}/fd/4")).unwrap();
            assert!(socket.file_type().is_socket(), "{words}");
        }
        let rules = scene.engine.output_of("iptables -t raw -S").unwrap();
        let drops = format!("-A PREROUTING -d {address}/32 ! -i docker0 -j DROP");
        assert!(rules.contains(&drops), "{rules}");
        scene.serves_the_lan("past the raw table");
        // What is published on loopback is for this host alone.
        let to = SocketAddr::new(scene.lan().ip(), loopback);
        let client = &scene.topology.client;
        ask(client, Protocol::Tcp, to, "from outside").unwrap_err();
        // Its end is reported as Docker wants it: nothing of it is left, and the port is free for the next.
        scene.engine.docker(&["rm", "-f", "web"]).unwrap();
        assert_eq!(scene.daemon.list().unwrap().len(), 1);
        let _backends = scene.run("next");
        scene.serves_the_lan("the next");
        scene.stop();
    });
}

#[test]
fn the_page_with_podman_is_followed_with_and_without_its_rules() {
    with_newest(|topology, host| podman::follow(&topology, host, podman::Network::Netavark));
}

#[test]
fn the_watcher_serves_ports_that_dockerd_holds() {
    with_newest(held::serves_ports_of);
}
