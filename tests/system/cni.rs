//! A network as containerd, CRI-O and nerdctl have it: the reference's `bridge` and `host-local`, and this program behind
//! them in the list, run as those engines run it.

use std::{
    fs,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::symlink,
    path::PathBuf,
    process::Stdio,
};

use forwarder_tests::{
    daemon::{Daemon, Datapath, binary},
    deadline::wait_for,
    document::Row,
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Protocol, ask},
};
use serde_json::{Value, json};

use crate::documents::{block::blocks, repository};

const REFERENCE: &str = "/usr/lib/cni";
const PORT: u16 = 8080;
const BACKEND_PORT: u16 = 9000;
const BOTH: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

/// A list of plugins, and the folder that has ours.
struct Network {
    host: Netns,
    instance: String,
    version: &'static str,
    folder: tempfile::TempDir,
}

/// A container that is attached.
struct Container {
    id: &'static str,
    netns: Netns,
    result: Value,
}

impl Network {
    fn new(host: &Netns, instance: &str, version: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        symlink(binary(), folder.path().join("forwarder-portmap")).unwrap();
        Self {
            host: host.clone(),
            instance: instance.to_owned(),
            version,
            folder,
        }
    }

    /// The list of docs/with-containerd.md, for this instance.
    fn plugins(&self) -> Vec<Value> {
        let page = fs::read_to_string(repository().join("docs/with-containerd.md")).unwrap();
        let list = blocks(&page)
            .into_iter()
            .find(|block| block.language == "json");
        let mut list: Value = serde_json::from_str(&list.unwrap().text).unwrap();
        let plugins = list["plugins"].as_array_mut().unwrap();
        plugins[0]["ipam"]["dataDir"] =
            self.folder.path().join("ipam").display().to_string().into();
        plugins[1]["instance"] = self.instance.as_str().into();
        plugins.clone()
    }

    fn program(&self, name: &str) -> PathBuf {
        let folders = [self.folder.path().into(), PathBuf::from(REFERENCE)];
        let found = folders
            .map(|folder| folder.join(name))
            .into_iter()
            .find(|it| it.exists());
        found.unwrap_or_else(|| panic!("no plugin {name} in {REFERENCE}"))
    }

    /// Runs one plugin as libcni does.
    fn run(
        &self,
        command: &str,
        mut config: Value,
        id: &str,
        netns: &str,
        before: &Value,
    ) -> Value {
        config["cniVersion"] = self.version.into();
        config["name"] = "pods".into();
        if config["capabilities"]["portMappings"] == true {
            let mapping = |protocol| json!({"hostPort": PORT, "containerPort": BACKEND_PORT, "protocol": protocol});
            config["runtimeConfig"]["portMappings"] = json!([mapping("tcp"), mapping("udp")]);
        }
        if !before.is_null() {
            config["prevResult"] = before.clone();
        }
        let name = config["type"].as_str().unwrap();
        let path = format!("{}:{REFERENCE}", self.folder.path().display());
        let mut plugin = self.host.command(&self.program(name).to_string_lossy());
        plugin
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", path);
        let pipes = plugin
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = pipes.spawn().unwrap();
        let text = config.to_string();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{command} {text}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    fn add(&self, id: &'static str) -> Container {
        let netns = Netns::new(id).unwrap();
        netns.ip("link set lo up").unwrap();
        let mut result = Value::Null;
        for plugin in self.plugins() {
            result = self.run("ADD", plugin, id, &netns.path(), &result);
        }
        Container { id, netns, result }
    }

    fn check(&self, container: &Container) {
        for plugin in self.plugins() {
            self.run(
                "CHECK",
                plugin,
                container.id,
                &container.netns.path(),
                &container.result,
            );
        }
    }

    fn delete(&self, container: &Container) {
        for plugin in self.plugins().into_iter().rev() {
            self.run(
                "DEL",
                plugin,
                container.id,
                &container.netns.path(),
                &container.result,
            );
        }
    }
}

impl Container {
    fn address(&self, family: Family) -> IpAddr {
        let ips = self.result["ips"].as_array().unwrap();
        let texts = ips
            .iter()
            .filter_map(|ip| ip["address"].as_str()?.split('/').next());
        let addresses = texts.map(|text| text.parse::<IpAddr>().unwrap());
        let mut of_family = addresses.filter(|it| it.is_ipv4() == (family == Family::V4));
        of_family
            .next()
            .unwrap_or_else(|| panic!("{}", self.result))
    }

    fn backends(&self) -> [Backend; 2] {
        BOTH.map(|protocol| Backend::start(&self.netns, protocol, BACKEND_PORT).unwrap())
    }
}

/// Waits until the fast path delivers to the container: IPv6 addresses are tentative at first.
fn wait_for_delivery(daemon: &Daemon) {
    let is_delivered = |row: &Row| row.datapath == "ebpf" && row.delivery.is_some();
    wait_for("the fast path", || {
        daemon.list().ok()?.iter().all(is_delivered).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", daemon.list()));
}

#[track_caller]
fn every_client_is_served(topology: &Topology, container: &Container) {
    for protocol in BOTH {
        for family in [Family::V4, Family::V6] {
            let frontend = SocketAddr::new(topology.host_address(family), PORT);
            let answer = ask(&topology.client, protocol, frontend, "from the LAN").unwrap();
            let client = SocketAddr::new(topology.client_address(family), answer.local_port);
            assert_eq!(answer.seen, client, "{protocol:?}");
            ask(&container.netns, protocol, frontend, "from itself").unwrap();
        }
        for host in [
            IpAddr::from(Ipv4Addr::LOCALHOST),
            Ipv6Addr::LOCALHOST.into(),
        ] {
            let local = SocketAddr::new(host, PORT);
            ask(&topology.host, protocol, local, "from the host").unwrap();
        }
    }
}

fn a_container_is_served_behind_the_bridge_plugin(version: &'static str) {
    let topology = Topology::new().unwrap();
    let mut daemon = Daemon::start_with_state(&topology.host, &[], Datapath::Auto, &[]).unwrap();
    let network = Network::new(&topology.host, daemon.instance(), version);
    let web = network.add("web");
    let backends = web.backends();
    wait_for_delivery(&daemon);
    every_client_is_served(&topology, &web);
    network.check(&web);
    // Started again, it has another address.
    network.delete(&web);
    assert!(daemon.list().unwrap().is_empty());
    drop(backends);
    let again = network.add("web");
    assert_ne!(again.address(Family::V4), web.address(Family::V4));
    let backends = again.backends();
    wait_for_delivery(&daemon);
    every_client_is_served(&topology, &again);
    // It ends while there is no instance, and another one gets the port.
    daemon.kill().unwrap();
    network.delete(&again);
    drop(backends);
    daemon.restart().unwrap();
    assert!(daemon.list().unwrap().is_empty());
    let next = network.add("next");
    let _backends = next.backends();
    wait_for_delivery(&daemon);
    every_client_is_served(&topology, &next);
    network.delete(&next);
    daemon.stop().unwrap();
}

#[test]
fn a_container_is_served_behind_the_bridge_plugin_by_version_0_4_0() {
    a_container_is_served_behind_the_bridge_plugin("0.4.0");
}

#[test]
fn a_container_is_served_behind_the_bridge_plugin_by_version_1_0_0() {
    a_container_is_served_behind_the_bridge_plugin("1.0.0");
}
