//! podman by its compatible socket: docs/with-podman.md, followed. It binds the ports of its own `-p` itself.

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
    // The backends' addresses, once the fast path has them all.
    let served = |count: usize| {
        let rows = daemon.list().ok()?;
        let is_fast = rows.iter().all(|row| row["delivery"] == "peer");
        let backends = rows.iter().map(|row| row["backend"]["address"].clone());
        (is_fast && rows.len() == count).then(|| backends.collect::<Vec<_>>())
    };
    let page = fs::read_to_string(repository().join("docs/with-podman.md")).unwrap();
    let blocks = blocks(&page)
        .into_iter()
        .filter(|block| block.language == "sh");
    let mut count = 0;
    for block in blocks {
        count += 1;
        for command in commands(&block.text) {
            match command.strip_prefix("sudo forwarder ") {
                Some(words) => drop(
                    daemon
                        .control(&words.split(' ').collect::<Vec<_>>())
                        .unwrap(),
                ),
                None => drop(podman.run(command.strip_prefix("sudo ").unwrap_or(&command))),
            }
            wait_for("the container on the fast path", || served(count)).unwrap_or_else(|error| {
                panic!("{error:#}\n{:?}\n{}", daemon.list(), daemon.said())
            });
        }
    }
    let rows = daemon.list().unwrap();
    let holders: Vec<_> = rows.iter().map(|row| row["holder"].as_str()).collect();
    let expected = ["engine", "forwarder", "forwarder"].map(Some);
    assert_eq!(holders, expected, "the page's three ways: {rows:?}");
    let asked = || {
        for port in [8080, 8081, 8090] {
            let url = format!("http://{}:{port}/", topology.host_address(Family::V4));
            let answer = topology.client.run(&format!("curl -fsS {url}"));
            assert_eq!(answer.unwrap(), engine::PAGE);
        }
    };
    asked();
    let before = served(count).unwrap();
    podman.run("podman restart -t 0 web api");
    wait_for("the new addresses", || {
        let after = served(count)?;
        let moved = before.iter().all(|address| !after.contains(address));
        moved.then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{:?}\n{}", daemon.list(), daemon.said()));
    asked();
    podman.run("podman rm -f -t 0 web api");
    let waits = |row: &serde_json::Value| row["reason_code"] == "waiting";
    let left = || {
        let rows = daemon.list().ok()?;
        (rows.len() == 1 && rows.iter().all(waits)).then_some(())
    };
    wait_for("the end of what they published themselves", left).unwrap();
    daemon.stop().unwrap();
}
