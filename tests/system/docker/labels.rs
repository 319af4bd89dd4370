//! `run --docker --docker-labels`: an engine that starts no process for a port, and containers that say by a label what is to
//! be published.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use forwarder_tests::{
    deadline::{wait_for, wait_until},
    document::{Delivery, Row},
    topology::Topology,
    traffic::ask,
};
use serde_json::json;

use super::{BOTH, Engine, PORT, Scene};

const LABEL: &str = "forwarder.publish=8080:9000,8080:9000/udp";

fn scene() -> Scene {
    let topology = Topology::new().unwrap();
    let engine = Engine::start(&topology.host, json!({}), None).unwrap();
    Scene::followed(topology, engine, &["--docker-labels"])
}

impl Scene {
    /// Waits until so many publishes are there, all of containers and on the fast path, and returns whose.
    #[track_caller]
    fn wait_for_owners(&self, count: usize) -> Vec<String> {
        let owners = wait_for("the publishes of containers", || {
            let list = self.daemon.list().ok()?;
            let is_fast = list.iter().all(|row| row.datapath == "ebpf");
            let is_so = list.len() == count && is_fast;
            is_so.then(|| list.into_iter().map(|row| row.owner).collect())
        });
        owners.unwrap_or_else(|error| panic!("{error:#}\n{}", self.shown()))
    }
}

#[test]
fn a_label_publishes_a_container_wherever_it_is() {
    let mut scene = scene();
    let id = scene.engine.run("web", &["--label", LABEL]).unwrap();
    let owner = format!("docker:{id}");
    assert_eq!(scene.wait_for_owners(2), [owner.clone(), owner.clone()]);
    let backends = scene.backends("web");
    scene.serves_the_lan("by its label");
    for protocol in BOTH {
        for host in [
            IpAddr::from(Ipv4Addr::LOCALHOST),
            Ipv6Addr::LOCALHOST.into(),
        ] {
            ask(
                scene.host(),
                protocol,
                SocketAddr::new(host, PORT),
                "from the host",
            )
            .unwrap();
        }
    }
    // It comes back with another address, the second time while there is no instance.
    let mut squatters = ["one", "two"].into_iter();
    let mut moves = |scene: &Scene| {
        let before = scene.engine.address("web").unwrap();
        scene.engine.docker(&["stop", "-t", "0", "web"]).unwrap();
        scene.engine.run(squatters.next().unwrap(), &[]).unwrap();
        scene.engine.docker(&["start", "web"]).unwrap();
        assert_ne!(scene.engine.address("web").unwrap(), before);
    };
    drop(backends);
    moves(&scene);
    let backends = scene.backends("web");
    let is_there = |scene: &Scene| {
        let address = scene.engine.address("web").unwrap();
        wait_for("the new address", || {
            let list = scene.daemon.list().ok()?;
            let is_there = |row: &Row| {
                let at = row.backend.address.map(|it| it.to_string());
                at == Some(address.clone()) && row.delivery == Some(Delivery::Peer)
            };
            (list.len() == 2 && list.iter().all(is_there)).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", scene.shown()));
    };
    is_there(&scene);
    scene.serves_the_lan("somewhere else");
    scene.daemon.kill().unwrap();
    drop(backends);
    moves(&scene);
    let _backends = scene.backends("web");
    scene.daemon.restart().unwrap();
    is_there(&scene);
    scene.serves_the_lan("after all");
    // One that has gone meanwhile is gone.
    scene.daemon.kill().unwrap();
    scene.engine.docker(&["rm", "-f", "web"]).unwrap();
    scene.daemon.restart().unwrap();
    scene.wait_for_owners(0);
    scene.stop();
}

#[test]
fn an_image_publishes_nothing() {
    let scene = scene();
    let archive = scene.engine.archive();
    let label = format!("LABEL {LABEL}");
    scene
        .engine
        .docker(&["import", "--change", &label, &archive, "labelled"])
        .unwrap();
    let start = |name: &str, flags: &[&str]| {
        let words = [&["run", "-d", "--name", name], flags].concat();
        let words = [&words[..], &["labelled", "/bin/busybox", "sleep", "100000"]].concat();
        scene.engine.docker(&words).unwrap()
    };
    start("image", &[]);
    let other = "forwarder.publish=127.0.0.1:8081:9000";
    let own = start("own", &["--label", other]);
    // Events come in order: the second's are seen behind the first's.
    assert_eq!(scene.wait_for_owners(1), [format!("docker:{own}")]);
    scene.stop();
}

#[test]
fn of_two_containers_with_one_port_the_second_waits_for_the_end_of_the_first() {
    let scene = scene();
    let first = scene.engine.run("first", &["--label", LABEL]).unwrap();
    scene.wait_for_owners(2);
    let second = scene.engine.run("second", &["--label", LABEL]).unwrap();
    let told = wait_for("the conflict", || {
        let said = scene.daemon.said();
        said.contains("container second: ").then_some(said)
    });
    assert!(told.unwrap().contains(&format!("docker:{first}")));
    scene
        .engine
        .run("wrong", &["--label", "forwarder.publish=80"])
        .unwrap();
    wait_until("what is wrong", || {
        scene.daemon.said().contains("container wrong: ")
    });
    scene.engine.docker(&["rm", "-f", "first"]).unwrap();
    let owner = format!("docker:{second}");
    wait_for("the second", || {
        let list = scene.daemon.list().ok()?;
        (list.len() == 2 && list.iter().all(|row| row.owner == owner)).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", scene.shown()));
    let _backends = scene.backends("second");
    scene.serves_the_lan("the second");
    scene.stop();
}
