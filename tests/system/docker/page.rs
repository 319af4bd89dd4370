//! docs/with-docker.md, followed from top to bottom as root of a small machine: its commands run as they stand there, but for
//! systemctl, in whose place this starts what it names.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Child, Stdio},
};

use anyhow::Result;
use forwarder_tests::{
    daemon::{binary, program},
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

fn start_instance(host: &Netns, flags: &[String]) -> Instance {
    let _ = fs::remove_file("/run/forwarder/default.sock");
    let mut command = host.command(&binary().to_string_lossy());
    command.arg("run").args(flags).stdin(Stdio::null());
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
    for name in ["forwarder", "forwarder-docker-proxy"] {
        symlink(program(name), tools.path().join(name)).unwrap();
    }
    let path = format!(
        "{}:{}",
        tools.path().display(),
        std::env::var("PATH").unwrap()
    );
    let mut flags = Vec::new();
    let mut instance = None;
    let mut engine: Option<Engine> = None;
    let page = fs::read_to_string(repository().join("docs/with-docker.md")).unwrap();
    for block in blocks(&page) {
        match block.language.as_str() {
            "json" => fs::write("/etc/docker/daemon.json", &block.text).unwrap(),
            "ini" => flags.extend(flags_of_the_service(&block.text)),
            _ => {}
        }
        if block.language != "sh" {
            continue;
        }
        for command in commands(&block.text) {
            match command.as_str() {
                "sudo systemctl enable --now forwarder" => {
                    instance = Some(start_instance(host, &flags));
                }
                "sudo systemctl restart docker" => engine = Some(start_engine(host)),
                "sudo systemctl restart docker forwarder" => {
                    drop((engine.take(), instance.take()));
                    let started = start_engine(host);
                    // Where the flag says nothing, it is the usual place.
                    let at = flags.iter().position(|flag| flag == "--docker").unwrap();
                    flags.insert(at + 1, started.socket());
                    (engine, instance) = (Some(started), Some(start_instance(host, &flags)));
                }
                command => {
                    let words = command.strip_prefix("sudo ").unwrap_or(command);
                    if words.starts_with("forwarder unpublish") {
                        another_machine_is_served(topology, 8090);
                    }
                    let socket = engine.as_ref().map(Engine::socket).unwrap_or_default();
                    let run = || {
                        let mut shell = host.command("sh");
                        shell.args(["-c", words]).env("PATH", &path);
                        shell.env("DOCKER_HOST", format!("unix://{socket}"));
                        shell.output().unwrap()
                    };
                    let output = run();
                    assert!(output.status.success(), "{command}: {output:?}");
                    if words == "forwarder list" {
                        // An engine that is followed is heard a moment later.
                        let listed = || String::from_utf8(run().stdout).unwrap();
                        let is_fast = || listed().contains("ebpf (").then_some(());
                        wait_for("the fast path in the list", is_fast)
                            .unwrap_or_else(|error| panic!("{error:#}: {:?}", run()));
                        let port = if flags.is_empty() { 8080 } else { 8081 };
                        another_machine_is_served(topology, port);
                    }
                }
            }
        }
    }
    assert!(!flags.is_empty(), "the page has come to the flags");
    assert!(ask(topology, 8090).is_err(), "the page has taken it back");
    engine.unwrap().stop().unwrap();
    drop(instance);
}

fn start_engine(host: &Netns) -> Engine {
    let config = fs::read_to_string("/etc/docker/daemon.json").unwrap();
    let config = serde_json::from_str(&config).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let started = Engine::start_with(host, folder, config, None).unwrap();
    started.import_web_server("nginx").unwrap();
    started
}

/// What a file of the service's environment has it run with.
fn flags_of_the_service(text: &str) -> Vec<String> {
    let lines = text.lines();
    let flags = lines.filter_map(|line| line.strip_prefix("FORWARDER_FLAGS="));
    flags
        .flat_map(str::split_whitespace)
        .map(Into::into)
        .collect()
}

fn another_machine_is_served(topology: &Topology, port: u16) {
    assert_eq!(ask(topology, port).unwrap(), engine::PAGE);
}

/// What another machine gets.
fn ask(topology: &Topology, port: u16) -> Result<String> {
    let url = format!("http://{}:{port}/", topology.host_address(Family::V4));
    topology.client.run(&format!("curl -fsS {url}"))
}
