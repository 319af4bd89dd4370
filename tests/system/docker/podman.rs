//! podman by its compatible socket: docs/with-podman.md, followed. Its own `-p` binds the port itself, so a label publishes.

use std::{
    fs,
    process::{Child, Command, Stdio},
};

use forwarder_tests::{
    daemon::{Daemon, Datapath},
    deadline::wait_for,
    netns::Netns,
    topology::{Family, Topology},
};

use super::{engine, page::isolate};
use crate::documents::{
    block::{blocks, commands},
    repository,
};

const SOCKET: &str = "/run/podman.sock";

/// podman's service, and the files that its commands read.
struct Podman {
    service: Child,
    host: Netns,
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
    fn start(host: &Netns) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().display();
        fs::create_dir_all(folder.path().join("networks")).unwrap();
        let containers = format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
             [network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [\"/usr/lib/cni\"]\n\
             network_config_dir = \"{root}/networks\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n"
        );
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{root}/storage\"\nrunroot = \"/run/storage\"\n"
        );
        fs::write(folder.path().join("containers.conf"), containers).unwrap();
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
            host: host.clone(),
            folder,
        };
        let is_there = || fs::exists(SOCKET).ok()?.then_some(());
        wait_for("podman's socket", is_there).unwrap();
        podman
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

fn with_files(command: &mut Command, folder: &tempfile::TempDir) {
    let path = |name: &str| folder.path().join(name);
    command.env("CONTAINERS_CONF", path("containers.conf"));
    command.env("CONTAINERS_STORAGE_CONF", path("storage.conf"));
}

#[test]
fn the_page_with_podman_is_followed() {
    let topology = Topology::new().unwrap();
    topology.host.enter(|| follow(&topology));
}

fn follow(topology: &Topology) {
    isolate(&["/run"]);
    let podman = Podman::start(&topology.host);
    let root = engine::root_of_image(podman.folder.path()).unwrap();
    let command = r#"'CMD ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/"]'"#;
    let name = "docker.io/library/nginx";
    podman.run(&format!(
        "podman import --change {command} {} {name}",
        root.display()
    ));
    let flags = ["--docker", SOCKET, "--docker-labels"];
    let daemon = Daemon::start_with(&topology.host, &[], Datapath::Auto, &flags).unwrap();
    let served = || {
        let row = daemon.entry().ok()?;
        (row["delivery"] == "peer").then(|| row["backend"]["address"].clone())
    };
    let page = fs::read_to_string(repository().join("docs/with-podman.md")).unwrap();
    let blocks = blocks(&page)
        .into_iter()
        .filter(|block| block.language == "sh");
    let mut followed = 0;
    for command in blocks.flat_map(|block| commands(&block.text)) {
        followed += 1;
        podman.run(command.strip_prefix("sudo ").unwrap_or(&command));
        wait_for("the container on the fast path", served)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.said()));
    }
    assert!(followed > 1, "the page has no commands");
    let url = format!("http://{}:8080/", topology.host_address(Family::V4));
    let asked = || topology.client.run(&format!("curl -fsS {url}")).unwrap();
    assert_eq!(asked(), engine::PAGE);
    let before = served();
    podman.run("podman restart -t 0 web");
    wait_for("the new address", || {
        served().filter(|address| Some(address) != before.as_ref())
    })
    .unwrap();
    assert_eq!(asked(), engine::PAGE);
    podman.run("podman rm -f -t 0 web");
    let empty = || daemon.list().ok()?.is_empty().then_some(());
    wait_for("the end of its publish", empty).unwrap();
    daemon.stop().unwrap();
}
