//! The program as a container runtime runs a CNI plugin: variables, a configuration on standard input, a result or an error
//! on standard output; while an instance runs and while none does.

use std::{
    io::Write as _,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use forwarder_tests::{
    daemon::{Daemon, Datapath, binary},
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Protocol, ask},
};
use serde_json::{Value, json};

use crate::scene::{BACKEND_PORT, PORT, Scene, wait_for_peer};

/// What a run of the plugin came to.
#[derive(Debug)]
struct Ran {
    success: bool,
    /// `Null` if there was nothing.
    answer: Value,
    said: String,
}

impl Ran {
    #[track_caller]
    fn good(self) -> Value {
        assert!(self.success, "{self:?}");
        self.answer
    }

    #[track_caller]
    fn failed(self, code: u32) -> Value {
        assert!(!self.success, "{self:?}");
        assert_eq!(self.answer["code"], code, "{self:?}");
        for key in ["cniVersion", "msg", "details"] {
            assert!(self.answer[key].is_string(), "{self:?}");
        }
        self.answer
    }
}

/// A plugin of one network, run for containers.
struct Plugin {
    host: Netns,
    instance: String,
}

impl Plugin {
    fn of(scene: &Scene) -> Self {
        Self {
            host: scene.topology.host.clone(),
            instance: scene.daemon.instance().into(),
        }
    }

    fn run(&self, command: &str, container: &str, config: &Value) -> Ran {
        let variables = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", container),
            ("CNI_NETNS", "/run/netns/any"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
            ("FORWARDER_INSTANCE", &self.instance),
        ];
        run(&self.host, "portmap", &variables, &config.to_string())
    }

    fn add(&self, container: &str, config: &Value) -> Ran {
        self.run("ADD", container, config)
    }
}

fn run(host: &Netns, name: &str, variables: &[(&str, &str)], input: &str) -> Ran {
    let mut command = host.command(&binary().to_string_lossy());
    command.arg0(name).env_clear();
    command.envs(
        variables
            .iter()
            .filter(|(_, value)| !value.is_empty())
            .copied(),
    );
    let pipes = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = pipes.spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let answer = match text.trim() {
        "" => Value::Null,
        text => serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}")),
    };
    Ran {
        success: output.status.success(),
        answer,
        said: String::from_utf8(output.stderr).unwrap(),
    }
}

/// What the bridge plugin has answered, in the words of a version.
fn result_of_bridge(topology: &Topology, version: &str) -> Value {
    let given = |family, length| {
        let address = format!("{}/{length}", topology.backend.address(family));
        let gateway = topology.backend.gateway(family).to_string();
        let mut given = json!({"address": address, "gateway": gateway, "interface": 1});
        if !version.starts_with('1') {
            given["version"] = if family == Family::V4 { "4" } else { "6" }.into();
        }
        given
    };
    json!({
        "cniVersion": version,
        "interfaces": [
            {"name": "br0", "mac": "0a:00:00:00:00:01"},
            {"name": "eth0", "mac": "0a:00:00:00:00:02", "sandbox": "/run/netns/any"},
        ],
        "ips": [given(Family::V4, 24), given(Family::V6, 64)],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dns": {},
    })
}

fn config(topology: &Topology, version: &str, mappings: &Value) -> Value {
    json!({
        "cniVersion": version, "name": "test-net", "type": "portmap",
        "capabilities": {"portMappings": true},
        "runtimeConfig": {"portMappings": mappings},
        "prevResult": result_of_bridge(topology, version),
    })
}

fn mapping(protocol: &str) -> Value {
    json!([{"hostPort": PORT, "containerPort": BACKEND_PORT, "protocol": protocol}])
}

fn owners(daemon: &Daemon) -> Vec<String> {
    let list = daemon.list().unwrap();
    let mut owners: Vec<String> = list.into_iter().map(|row| row.owner).collect();
    owners.dedup();
    owners
}

fn a_container_is_published_until_it_is_deleted(protocol: Protocol, name: &str) {
    let scene = Scene::of(Family::V4, protocol).idle().auto().start();
    let (topology, daemon) = scene.parts();
    let plugin = Plugin::of(&scene);
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let config = config(topology, version, &mapping(name));
        let result = plugin.add("c0ffee", &config).good();
        assert_eq!(
            result,
            result_of_bridge(topology, version),
            "passed through"
        );
        assert_eq!(owners(daemon), ["cni:test-net/c0ffee/eth0"]);
        scene.served(version);
        let lan = topology.host_address(Family::V6);
        for (netns, host) in [
            (&topology.client, lan),
            (&topology.host, Family::V4.localhost()),
            (&topology.host, Family::V6.localhost()),
            (
                &topology.backend.netns,
                topology.backend.gateway(Family::V4),
            ),
        ] {
            ask(netns, protocol, SocketAddr::new(host, PORT), version).unwrap();
        }
        // Asked for again, it is the same.
        let ids = || -> Vec<u64> {
            let list = daemon.list().unwrap();
            list.iter().map(|row| row.id).collect()
        };
        let before = ids();
        plugin.add("c0ffee", &config).good();
        assert_eq!(ids(), before);
        assert_eq!(plugin.run("CHECK", "c0ffee", &config).good(), Value::Null);
        for _ in 0..2 {
            assert_eq!(plugin.run("DEL", "c0ffee", &config).good(), Value::Null);
        }
        assert!(daemon.list().unwrap().is_empty());
    }
    scene.stop();
}

#[test]
fn a_container_is_published_until_it_is_deleted_by_tcp() {
    a_container_is_published_until_it_is_deleted(Protocol::Tcp, "tcp");
}

#[test]
fn a_container_is_published_until_it_is_deleted_by_udp() {
    a_container_is_published_until_it_is_deleted(Protocol::Udp, "udp");
}

#[test]
fn the_address_of_the_host_is_the_only_one() {
    let scene = Scene::tcp().idle().auto().start();
    let topology = &scene.topology;
    let plugin = Plugin::of(&scene);
    let mappings = json!([
        {"hostPort": PORT, "containerPort": BACKEND_PORT, "hostIP": "127.0.0.1"},
        {"hostPort": PORT + 1, "containerPort": BACKEND_PORT, "hostIP": "::"},
    ]);
    plugin
        .add("c0ffee", &config(topology, "1.0.0", &mappings))
        .good();
    let local = SocketAddr::new(Family::V4.localhost(), PORT);
    ask(&topology.host, Protocol::Tcp, local, "loopback").unwrap();
    let answers = |host, port| {
        let frontend = SocketAddr::new(host, port);
        ask(&topology.client, Protocol::Tcp, frontend, "hello").is_ok()
    };
    let [v4, v6] = [Family::V4, Family::V6].map(|family| topology.host_address(family));
    assert!(answers(v6, PORT + 1));
    for (host, port) in [(v4, PORT), (v4, PORT + 1), (v6, PORT)] {
        assert!(!answers(host, port), "{host} {port}");
    }
    scene.stop();
}

#[test]
fn new_clients_go_to_the_new_address_whatever_becomes_of_the_old() {
    let scene = Scene::tcp().and_another().idle().auto().start();
    let (topology, daemon) = scene.parts();
    let plugin = Plugin::of(&scene);
    let config = config(topology, "1.0.0", &mapping("tcp"));
    plugin.add("c0ffee", &config).good();
    scene.served("the old one");
    let mut moved = config.clone();
    moved["prevResult"]["ips"] = json!([{"address": "172.31.0.3/24", "interface": 1}]);
    plugin.add("c0ffee", &moved).good();
    scene.served("the new one");
    // What drains is written anew when its link goes.
    topology.unplug_backend().unwrap();
    wait_for_peer(daemon);
    for _ in 0..20 {
        scene.served("the new one still");
    }
    scene.stop();
}

#[test]
fn a_late_delete_never_takes_the_port_of_the_next_container() {
    let scene = Scene::tcp().idle().auto().start();
    let (topology, daemon) = scene.parts();
    let plugin = Plugin::of(&scene);
    let config = config(topology, "1.0.0", &mapping("tcp"));
    plugin.add("first", &config).good();
    let taken = plugin.add("second", &config).failed(100);
    let message = taken["msg"].as_str().unwrap();
    assert!(message.contains("cni:test-net/first/eth0"), "{message}");
    plugin.run("DEL", "first", &config).good();
    plugin.add("second", &config).good();
    plugin.run("DEL", "first", &config).good();
    assert_eq!(owners(daemon), ["cni:test-net/second/eth0"]);
    scene.served("still there");
    scene.stop();
}

#[test]
fn a_delete_while_the_instance_is_down_is_remembered() {
    let mut scene = Scene::tcp().idle().auto().with_state().start();
    let plugin = Plugin::of(&scene);
    let second = json!([{"hostPort": PORT + 1, "containerPort": BACKEND_PORT}]);
    let second = config(&scene.topology, "1.1.0", &second);
    let first = config(&scene.topology, "1.1.0", &mapping("tcp"));
    plugin.add("first", &first).good();
    plugin.add("second", &second).good();
    plugin.run("STATUS", "", &first).good();
    scene.daemon.kill().unwrap();
    plugin.run("STATUS", "", &first).failed(50);
    plugin.add("third", &first).failed(11);
    plugin.run("CHECK", "first", &first).failed(11);
    let without_ports = config(&scene.topology, "1.1.0", &json!([]));
    plugin.add("fourth", &without_ports).good();
    for _ in 0..2 {
        plugin.run("DEL", "first", &first).good();
    }
    scene.daemon.restart().unwrap();
    assert_eq!(owners(&scene.daemon), ["cni:test-net/second/eth0"]);
    plugin.run("STATUS", "", &first).good();
    // What is deleted while it ends is deleted, too.
    scene.daemon.terminate().unwrap();
    plugin
        .run(
            "GC",
            "",
            &json!({"cniVersion": "1.1.0", "name": "test-net", "cni.dev/valid-attachments": []}),
        )
        .good();
    scene.daemon.restart().unwrap();
    assert!(scene.daemon.list().unwrap().is_empty());
    scene.stop();
}

#[test]
fn deletes_do_not_keep_an_instance_from_starting() {
    let userland = Scene::tcp().silent().idle().by(Datapath::Userland);
    let mut scene = userland.with_state().start();
    let plugin = Plugin::of(&scene);
    let config = config(&scene.topology, "1.1.0", &mapping("tcp"));
    let ends = AtomicBool::new(false);
    thread::scope(|scope| {
        let deletes = || {
            while !ends.load(Relaxed) {
                plugin.run("DEL", "c0ffee", &config).good();
            }
        };
        let all = [(); 3].map(|()| scope.spawn(deletes));
        let mut restarts = || -> anyhow::Result<()> {
            for _ in 0..30 {
                scene.daemon.kill()?;
                scene.daemon.restart()?;
            }
            Ok(())
        };
        let restarted = restarts();
        ends.store(true, Relaxed);
        all.into_iter().for_each(|one| one.join().unwrap());
        restarted.unwrap();
    });
    scene.stop();
}

#[test]
fn garbage_is_what_one_network_does_not_list() {
    let scene = Scene::tcp().silent().idle().auto().start();
    let (topology, daemon) = scene.parts();
    let plugin = Plugin::of(&scene);
    for (number, (network, container)) in [
        ("test-net", "kept"),
        ("test-net", "left"),
        ("test-net2", "left"),
    ]
    .into_iter()
    .enumerate()
    {
        let mappings =
            json!([{"hostPort": PORT + number as u16, "containerPort": 80, "hostIP": "127.0.0.1"}]);
        let mut config = config(topology, "1.1.0", &mappings);
        config["name"] = network.into();
        plugin.add(container, &config).good();
    }
    daemon.control(&["publish", "9999:172.31.0.2:80"]).unwrap();
    let mut gc = config(topology, "1.1.0", &json!([]));
    plugin.run("GC", "", &gc).failed(7);
    gc["cni.dev/valid-attachments"] = json!([{"containerID": "kept", "ifname": "eth0"}]);
    plugin.run("GC", "", &gc).good();
    let expected = ["cni:test-net/kept/eth0", "cni:test-net2/left/eth0", "cli"];
    assert_eq!(owners(daemon), expected);
    scene.stop();
}

#[test]
fn a_check_finds_what_is_gone() {
    let scene = Scene::tcp().silent().idle().auto().start();
    let (topology, daemon) = scene.parts();
    let plugin = Plugin::of(&scene);
    let config = config(topology, "1.0.0", &mapping("tcp"));
    plugin.add("c0ffee", &config).good();
    plugin.run("CHECK", "c0ffee", &config).good();
    let id = daemon.list().unwrap()[0].id.to_string();
    let owner = "cni:test-net/c0ffee/eth0";
    daemon
        .control(&["unpublish", &id, "--owner", owner])
        .unwrap();
    let failure = plugin.run("CHECK", "c0ffee", &config).failed(101);
    assert!(
        failure["details"]
            .as_str()
            .unwrap()
            .contains("0.0.0.0:8080"),
        "{failure}"
    );
    scene.stop();
}

#[test]
fn a_mistake_has_the_specifications_code() {
    let scene = Scene::tcp().silent().idle().auto().start();
    let (topology, daemon) = scene.parts();
    let plugin = Plugin::of(&scene);
    let good = config(topology, "1.0.0", &mapping("tcp"));
    let without = |key: &str| {
        let mut config = good.clone();
        config.as_object_mut().unwrap().remove(key);
        config
    };
    let with = |key: &str, value: Value| {
        let mut config = good.clone();
        config[key] = value;
        config
    };
    plugin.run("ADD", "", &good).failed(4);
    plugin.run("ADD", "../x", &good).failed(4);
    plugin.run("NONSENSE", "c0ffee", &good).failed(4);
    plugin.run("ADD", "c0ffee", &without("name")).failed(7);
    plugin
        .run("ADD", "c0ffee", &without("prevResult"))
        .failed(7);
    plugin
        .run("ADD", "c0ffee", &without("cniVersion"))
        .failed(1);
    plugin
        .run("ADD", "c0ffee", &with("cniVersion", "2.0.0".into()))
        .failed(1);
    plugin
        .run("ADD", "c0ffee", &with("instance", "../x".into()))
        .failed(7);
    let refused = plugin.run(
        "ADD",
        "c0ffee",
        &with("conditionsV4", json!(["-s", "10.0.0.0/8"])),
    );
    let refused = refused.failed(7);
    assert!(
        refused["msg"].as_str().unwrap().starts_with("conditionsV4"),
        "{refused}"
    );
    assert!(daemon.list().unwrap().is_empty());
    let noted = plugin.add("c0ffee", &with("snat", true.into()));
    assert!(noted.said.starts_with("snat "), "{noted:?}");
    noted.good();
    let broken = run(
        &topology.host,
        "portmap",
        &[("CNI_COMMAND", "DEL")],
        "nonsense",
    );
    broken.failed(6);
    scene.stop();
}

#[test]
fn versions_are_told_and_the_instance_is_named_in_the_configuration() {
    let scene = Scene::tcp().silent().idle().auto().start();
    let (topology, daemon) = scene.parts();
    let asked = r#"{"cniVersion": "1.0.0"}"#;
    let told = run(
        &topology.host,
        "forwarder-portmap",
        &[("CNI_COMMAND", "VERSION")],
        asked,
    );
    let expected = json!({
        "cniVersion": "1.0.0",
        "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    });
    assert_eq!(told.good(), expected);
    let version = [("CNI_COMMAND", "VERSION")];
    let told = run(&topology.host, "portmap", &version, "").good();
    assert_eq!(told["supportedVersions"], expected["supportedVersions"]);
    let about = run(&topology.host, "forwarder-portmap", &[], "");
    assert!(about.said.contains("a CNI plugin"), "{about:?}");
    about.good();
    let plugin = Plugin {
        host: topology.host.clone(),
        instance: "another".into(),
    };
    let mut config = config(topology, "1.0.0", &mapping("tcp"));
    config["instance"] = daemon.instance().into();
    plugin.add("c0ffee", &config).good();
    assert_eq!(owners(daemon), ["cni:test-net/c0ffee/eth0"]);
    scene.stop();
}
