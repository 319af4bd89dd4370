//! docs/with-docker.md, followed from top to bottom as root of a small machine: its commands run as they stand there, but for
//! systemctl, in whose place this starts what it names.

use std::{
    fs,
    path::Path,
    process::{Child, Stdio},
};

use forwarder_tests::{
    daemon::binary,
    deadline::wait_for,
    netns::Netns,
    topology::{Family, Topology},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use super::{Engine, engine};
use crate::documents::{
    block::{blocks, commands},
    repository,
};

/// Killed when dropped.
struct Instance(Child);

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Gives this thread, and what it starts, folders of its own where the page and the instance write.
pub(super) fn isolate(folders: &[&str]) {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none: Option<&str> = None;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).unwrap();
    for folder in folders {
        fs::create_dir_all(folder).unwrap();
        mount(
            Some("none"),
            *folder,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("mode=755"),
        )
        .unwrap();
    }
    mount(
        Some("bpf"),
        "/sys/fs/bpf",
        Some("bpf"),
        MsFlags::empty(),
        none,
    )
    .unwrap();
}

fn start_instance(host: &Netns) -> Instance {
    let mut command = host.command(&binary().to_string_lossy());
    command.arg("run").stdin(Stdio::null());
    let instance = Instance(command.spawn().unwrap());
    let socket = Path::new("/run/forwarder/default.sock");
    wait_for("the instance", || socket.exists().then_some(())).unwrap();
    instance
}

#[test]
fn the_page_with_docker_is_followed() {
    let topology = Topology::new().unwrap();
    topology.host.enter(|| follow(&topology));
}

fn follow(topology: &Topology) {
    isolate(&[
        "/usr/local/libexec",
        "/etc/docker",
        "/run/forwarder",
        "/var/lib/forwarder",
    ]);
    let host = &topology.host;
    let tools = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(binary(), tools.path().join("forwarder")).unwrap();
    let path = format!(
        "{}:{}",
        tools.path().display(),
        std::env::var("PATH").unwrap()
    );
    let mut instance = None;
    let mut engine: Option<Engine> = None;
    let page = fs::read_to_string(repository().join("docs/with-docker.md")).unwrap();
    let mut last = String::new();
    for block in blocks(&page) {
        if block.language == "json" {
            fs::write("/etc/docker/daemon.json", &block.text).unwrap();
        }
        if block.language != "sh" {
            continue;
        }
        for command in commands(&block.text) {
            match command.as_str() {
                "sudo systemctl enable --now forwarder" => instance = Some(start_instance(host)),
                "sudo systemctl restart docker" => {
                    let config = fs::read_to_string("/etc/docker/daemon.json").unwrap();
                    let config = serde_json::from_str(&config).unwrap();
                    let folder = tempfile::tempdir().unwrap();
                    let started = Engine::start_with(host, folder, config, None).unwrap();
                    started.import_web_server("nginx").unwrap();
                    engine = Some(started);
                }
                command => {
                    let words = command.strip_prefix("sudo ").unwrap_or(command);
                    let socket = engine.as_ref().map(Engine::socket).unwrap_or_default();
                    let mut shell = host.command("sh");
                    shell.args(["-c", words]).env("PATH", &path);
                    shell.env("DOCKER_HOST", format!("unix://{socket}"));
                    let output = shell.output().unwrap();
                    assert!(output.status.success(), "{command}: {output:?}");
                    last = String::from_utf8(output.stdout).unwrap();
                }
            }
        }
    }
    assert!(
        last.contains("0.0.0.0:8080") && last.contains("ebpf"),
        "the list: {last}"
    );
    let url = format!("http://{}:8080/", topology.host_address(Family::V4));
    let answer = topology.client.run(&format!("curl -fsS {url}")).unwrap();
    assert_eq!(answer, engine::PAGE);
    engine.unwrap().stop().unwrap();
    drop(instance);
}
