//! Live conversations, as `flows` shows them and as they are ended, on both paths.

use std::net::SocketAddr;

use forwarder_tests::{
    api, daemon::Datapath, deadline::wait_until, document::Flow, topology::Family,
    traffic::Protocol,
};

use crate::{
    fallback::Client,
    scene::{BACKEND_PORT, Scene},
};

fn flows_are_shown_and_ended(datapath: Datapath, protocol: Protocol, family: Family) {
    let scene = Scene::of(family, protocol).by(datapath).start();
    let (topology, daemon) = scene.parts();
    let netns = [&topology.client, &topology.host];
    let mut open = netns.map(|netns| Client::begin(netns, protocol, scene.frontend()));
    let seen = open.each_mut().map(|client| client.asks("hello"));
    let client = topology.client_address(family).to_string();
    let shown = |words: &[&str]| -> Vec<Flow> {
        let words = [&["flows"], words].concat();
        daemon.document(&words).unwrap()
    };
    let all = shown(&[]);
    assert_eq!(all.len(), 2, "{all:?}");
    let backend = SocketAddr::new(topology.backend.address(family), BACKEND_PORT);
    for flow in &all {
        assert_eq!(flow.datapath, datapath.name());
        assert_eq!(
            flow.protocol,
            if protocol == Protocol::Tcp {
                "tcp"
            } else {
                "udp"
            }
        );
        assert_eq!(flow.frontend, scene.frontend().to_string());
        assert_eq!(flow.backend, backend.to_string());
        assert!(
            seen.iter().any(|it| it.to_string() == flow.source),
            "{flow:?} {seen:?}"
        );
        assert!(
            ["established", "replied"].contains(&flow.state.as_str()),
            "{flow:?}"
        );
        assert!(flow.packets.iter().all(|it| *it > 0), "{flow:?}");
        assert!(flow.bytes.iter().all(|it| *it >= 5), "{flow:?}");
    }
    assert_eq!(shown(&["--publish", "1"]).len(), 2);
    let other = format!("9:{}", SocketAddr::new(backend.ip(), 9));
    daemon.control(&["publish", &other]).unwrap();
    assert_eq!(shown(&["--publish", "2"]).len(), 0);
    assert_eq!(shown(&["--client", &client]).len(), 1);
    assert_eq!(
        shown(&["--publish", "1", "--client", "192.0.2.0/24"]).len(),
        0
    );
    let length = if client.contains(':') { 128 } else { 32 };
    let path = format!("/v1/flows?client={client}/{length}");
    let answer = api::ask(daemon, "DELETE", &path, "").unwrap();
    assert_eq!(answer.body["ended"], 1, "{answer:?}");
    wait_until("it is gone", || shown(&["--client", &client]).is_empty());
    assert_eq!(shown(&[]).len(), 1);
    let [ended, other] = &mut open;
    assert_eq!(other.asks("still there?"), seen[1]);
    if let (Client::Tcp(connection), Datapath::Userland) = (ended, datapath) {
        assert!(connection.ask("reset?").is_err());
    }
    scene.stop();
}

#[test]
fn flows_are_shown_and_ended_by_publish_and_by_client() {
    flows_are_shown_and_ended(Datapath::Ebpf, Protocol::Tcp, Family::V4);
    flows_are_shown_and_ended(Datapath::Ebpf, Protocol::Udp, Family::V6);
}

#[test]
fn flows_in_user_space_are_shown_and_ended_by_publish_and_by_client() {
    for family in [Family::V4, Family::V6] {
        flows_are_shown_and_ended(Datapath::Userland, Protocol::Tcp, family);
        flows_are_shown_and_ended(Datapath::Userland, Protocol::Udp, family);
    }
}
