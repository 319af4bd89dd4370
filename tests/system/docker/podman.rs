//! podman by its compatible socket: docs/with-podman.md, followed. It binds the ports of its own `-p` itself.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::wait_for,
    document::{Delivery, Endpoint, Row},
    topology::{Family, Topology},
};

use super::{Programs, engine, page::isolate};
use crate::documents::{
    block::{Block, blocks, commands},
    repository,
};

const SOCKET: &str = "/run/podman.sock";
/// Where `[network]` of containers.conf begins, which the page changes.
const NETWORK: &str = "[network]\n";

/// Who sets up podman's networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Network {
    /// The plugins, as podman 4 may.
    Cni,
    Netavark,
}

/// podman's service, and the files that its commands read.
struct Podman {
    service: Child,
    host: Programs,
    folder: tempfile::TempDir,
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.shell("podman rm -af -t 0").status();
        let _ = self.service.kill();
        let _ = self.service.wait();
    }
}

impl Podman {
    fn start(host: Programs, network: Network) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().display();
        fs::create_dir_all(folder.path().join("networks")).unwrap();
        let backend = match network {
            Network::Cni => "network_backend = \"cni\"\ncni_plugin_dirs = [\"/usr/lib/cni\"]",
            Network::Netavark => "network_backend = \"netavark\"",
        };
        let containers = format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
             {NETWORK}{backend}\nnetwork_config_dir = \"{root}/networks\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nruntime = \"runc\"\nevents_logger = \"file\"\n"
        );
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{root}/storage\"\nrunroot = \"/run/storage\"\n"
        );
        fs::write(configuration(folder.path()), containers).unwrap();
        fs::write(folder.path().join("storage.conf"), storage).unwrap();
        let mut command = host.command("podman");
        with_files(&mut command, &folder);
        let url = format!("unix://{SOCKET}");
        command.args(["system", "service", "--time", "0", &url]);
        let service = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let podman = Self {
            service,
            host,
            folder,
        };
        let is_there = || fs::exists(SOCKET).ok()?.then_some(());
        wait_for("podman's socket", is_there).unwrap();
        podman.import_web_server("docker.io/library/nginx");
        podman
    }

    fn import_web_server(&self, name: &str) {
        let root = engine::root_of_image(self.folder.path()).unwrap();
        let command = r#"'CMD ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/"]'"#;
        let root = root.display();
        self.run(&format!("podman import --change {command} {root} {name}"));
    }

    /// Adds to its configuration what a page says of its networks.
    fn configure(&self, block: &str) {
        let path = configuration(self.folder.path());
        let before = fs::read_to_string(&path).unwrap();
        assert!(block.starts_with(NETWORK), "{block}");
        fs::write(path, before.replace(NETWORK, block)).unwrap();
    }

    /// Whether it has rules of its own in the kernel.
    fn has_rules(&self) -> bool {
        self.run("nft list tables").contains("netavark")
    }

    fn shell(&self, line: &str) -> Command {
        let mut command = self.host.command("sh");
        with_files(&mut command, &self.folder);
        command.args(["-c", line]);
        command
    }

    #[track_caller]
    fn run(&self, line: &str) -> String {
        let output = self.shell(line).output().unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

fn configuration(folder: &Path) -> std::path::PathBuf {
    folder.join("containers.conf")
}

fn with_files(command: &mut Command, folder: &tempfile::TempDir) {
    command.env("CONTAINERS_CONF", configuration(folder.path()));
    command.env(
        "CONTAINERS_STORAGE_CONF",
        folder.path().join("storage.conf"),
    );
}

/// podman and an instance that follows it.
struct Scene<'a> {
    podman: Podman,
    daemon: Daemon,
    topology: &'a Topology,
}

impl Scene<'_> {
    /// The backends, once the fast path has so many, and all that there are.
    fn served(&self, count: usize) -> Option<Vec<Endpoint>> {
        let rows = self.daemon.list().ok()?;
        let is_fast = rows.iter().all(|row| row.delivery == Some(Delivery::Peer));
        let is_so = is_fast && rows.len() == count;
        is_so.then(|| rows.into_iter().map(|row| row.backend).collect())
    }

    #[track_caller]
    fn wait<T>(&self, what: &str, is_so: impl FnMut() -> Option<T>) -> T {
        wait_for(what, is_so).unwrap_or_else(|error| {
            panic!(
                "{error:#}\n{:?}\n{}",
                self.daemon.list(),
                self.daemon.said()
            )
        })
    }

    /// Runs the commands of the page, each block of which publishes once, by this holder; each port is served to another
    /// machine.
    #[track_caller]
    fn follow(&self, blocks: &[Block], ports: &[u16], holders: &[&str]) {
        let blocks = blocks.iter().filter(|block| block.language == "sh");
        for (block, count) in blocks.zip(1..) {
            for command in commands(&block.text) {
                match command.strip_prefix("sudo forwarder ") {
                    Some(words) => {
                        let words: Vec<&str> = words.split(' ').collect();
                        drop(self.daemon.control(&words).unwrap());
                    }
                    None => {
                        let command = command.strip_prefix("sudo ").unwrap_or(&command);
                        drop(self.podman.run(command));
                    }
                }
                self.wait("the container on the fast path", || self.served(count));
            }
        }
        let rows = self.daemon.list().unwrap();
        let held: Vec<_> = rows.iter().map(|row| row.holder.as_str()).collect();
        assert_eq!(held, holders, "the page's ways: {rows:?}");
        self.serves_the_lan(ports);
    }

    #[track_caller]
    fn serves_the_lan(&self, ports: &[u16]) {
        for port in ports {
            let host = self.topology.host_address(Family::V4);
            let url = format!("http://{host}:{port}/");
            let answer = self.topology.client.run(&format!("curl -fsS {url}"));
            assert_eq!(answer.unwrap(), engine::PAGE);
        }
    }
}

#[test]
fn the_page_with_podman_is_followed() {
    let topology = Topology::new().unwrap();
    topology.host.enter(|| {
        isolate(&["/run"]);
        follow(&topology, Programs::from(&topology.host), Network::Cni);
    });
}

/// Follows the page from its top, with podman's own rules beside us, and to its end where podman can do without them.
pub(super) fn follow(topology: &Topology, host: Programs, network: Network) {
    let podman = Podman::start(host, network);
    let flags = ["--docker", SOCKET, "--docker-labels"];
    let daemon = Daemon::start_with(&topology.host, &[], Datapath::Auto, &flags).unwrap();
    let scene = Scene {
        podman,
        daemon,
        topology,
    };
    let page = fs::read_to_string(repository().join("docs/with-podman.md")).unwrap();
    let blocks = blocks(&page);
    let setting = blocks.iter().position(|block| block.language == "ini");
    let (beside, without) = blocks.split_at(setting.expect("the setting"));
    let ports = [8080, 8081, 8090];
    scene.follow(beside, &ports, &["engine", "forwarder", "forwarder"]);
    let before = scene.served(ports.len()).unwrap();
    scene.podman.run("podman restart -t 0 web api");
    scene.wait("the new addresses", || {
        let after = scene.served(ports.len())?;
        let moved = before.iter().all(|address| !after.contains(address));
        moved.then_some(())
    });
    scene.serves_the_lan(&ports);
    if network == Network::Netavark {
        assert!(scene.podman.has_rules(), "as the page says");
    }
    scene.podman.run("podman rm -f -t 0 web api");
    scene.wait("the end of what they published themselves", || {
        let rows = scene.daemon.list().ok()?;
        (rows.len() == 1 && rows.iter().all(Row::waits)).then_some(())
    });
    let unpublish = ["unpublish", "--container", "api"];
    scene.daemon.control(&unpublish).unwrap();
    if network == Network::Netavark {
        scene.podman.run("nft delete table inet netavark");
        scene.podman.configure(&without[0].text);
        scene.follow(&without[1..], &[8082, 8083], &["engine", "forwarder"]);
        assert!(!scene.podman.has_rules(), "as it was told");
    }
    scene.daemon.stop().unwrap();
}
