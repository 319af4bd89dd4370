//! A client in the midst of a conversation gets another MAC, or another link: answers go where its packets come from now. And a
//! backend answers by another link than it is asked by.

use std::{
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
};

use forwarder_tests::{
    deadline::{patience, wait_for},
    topology::{Family, Topology},
    traffic::{Protocol, ask, ask_by},
    tun,
};

use crate::{
    scene::{Scene, on_the_fast_path, wait_for_peer},
    worlds::{client_is, uplink_is},
};

/// The MAC of the client's device changes, and the host's neighbour entry is found to be stale.
fn outlives_another_mac(topology: Topology, device: &str, uplink: &str) {
    let scene = Scene::tcp().start_in(topology);
    let (topology, daemon) = scene.parts();
    let mut conversation = scene.connect();
    conversation.ask("before").unwrap();
    wait_for_peer(daemon);
    let mac = format!("link set {device} address 02:00:00:00:99:99");
    topology.client.ip(&mac).unwrap();
    let client = topology.client_address(Family::V4);
    let stale = format!("neigh del {client} dev {uplink}");
    topology.host.ip(&stale).unwrap();
    on_the_fast_path(daemon, || {
        for text in ["after", "later"] {
            conversation.ask(text).unwrap();
        }
    });
    scene.stop();
}

#[test]
fn a_conversation_outlives_another_mac_of_the_client() {
    outlives_another_mac(Topology::new().unwrap(), "eth0", "eth0");
}

/// A backend on two networks: its default route leads by the other one than it is asked by.
fn on_two_networks(family: Family) -> Topology {
    let topology = Topology::new().unwrap();
    let Topology {
        host,
        backend,
        other,
        ..
    } = &topology;
    let (own, nodad) = match family {
        Family::V4 => ("172.31.1.7/24", ""),
        Family::V6 => ("fd00:31:1::7/64", "nodad"),
    };
    let netns = &backend.netns;
    host.ip(&format!(
        "link add vethboth type veth peer name eth1 netns {}\nlink set vethboth master br1 up",
        netns.path()
    ))
    .unwrap();
    netns
        .ip(&format!(
            "addr add {own} dev eth1 {nodad}\nlink set eth1 up\nroute replace default via {} dev eth1",
            other.gateway(family)
        ))
        .unwrap();
    topology
}

#[test]
fn a_backend_that_answers_by_its_other_network_is_heard() {
    for family in [Family::V4, Family::V6] {
        let topology = on_two_networks(family);
        let scene = Scene::of(family, Protocol::Tcp).start_in(topology);
        wait_for_peer(&scene.daemon);
        scene.served_on_the_fast_path();
        scene.stop();
    }
}

#[test]
fn a_backend_that_refuses_by_its_other_network_is_heard() {
    for family in [Family::V4, Family::V6] {
        let topology = on_two_networks(family);
        let scene = Scene::of(family, Protocol::Udp).silent().start_in(topology);
        wait_for_peer(&scene.daemon);
        let any = (family.unspecified(), 0);
        let client = &scene.topology.client;
        let socket = client.enter(|| UdpSocket::bind(any)).unwrap();
        socket.set_read_timeout(Some(patience())).unwrap();
        socket.connect(scene.frontend()).unwrap();
        socket.send(b"anybody there?").unwrap();
        let error = socket.recv(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
        scene.stop();
    }
}

/// The host's uplink is a bridge, whose port is no veth.
#[test]
fn a_conversation_by_a_bridges_port_outlives_another_mac_of_the_client() {
    let topology = Topology::new().unwrap();
    let Topology { host, client, .. } = &topology;
    let _wire = tun::Wire::between(tun::Kind::Tap, [(host, "tap0"), (client, "tap0")]).unwrap();
    let bridge = "link add lan type bridge\nlink set tap0 up\nlink set tap0 master lan";
    uplink_is(&topology, "lan", bridge);
    client_is(&topology, "tap0", "");
    outlives_another_mac(topology, "tap0", "lan");
}

#[test]
fn a_conversation_outlives_that_the_uplink_becomes_a_port_of_a_bridge() {
    for family in [Family::V4, Family::V6] {
        let scene = Scene::of(family, Protocol::Tcp).start();
        let (topology, daemon) = scene.parts();
        let mut conversation = scene.connect();
        conversation.ask("before").unwrap();
        wait_for_peer(daemon);
        let host = topology.host_address(family);
        let (length, nodad) = match family {
            Family::V4 => (24, ""),
            Family::V6 => (64, "nodad"),
        };
        topology
            .host
            .ip(&format!(
                "link add lan type bridge\nlink set lan up\naddr flush dev eth0\nlink set eth0 master lan\n\
                 addr add {host}/{length} dev lan {nodad}"
            ))
            .unwrap();
        wait_for("new clients take the fast path", || {
            let before = daemon.counted("new_flow").unwrap();
            ask(&topology.client, Protocol::Tcp, scene.frontend(), "new").ok()?;
            (daemon.counted("new_flow").unwrap() > before).then_some(())
        })
        .unwrap();
        on_the_fast_path(daemon, || drop(conversation.ask("after").unwrap()));
        scene.stop();
    }
}

/// A container that is a client, and whose port stays the same, so that its conversation does.
#[test]
fn a_conversation_of_a_container_outlives_another_link_of_it() {
    let mut scene = Scene::udp().container(|it| &it.peer).start();
    let (frontend, container) = (scene.frontend(), &scene.topology.backend);
    let socket = container.netns.enter(|| UdpSocket::bind(("0.0.0.0", 5000)));
    let socket = socket.unwrap();
    let by_itself = SocketAddr::new(container.address(Family::V4), 5000);
    for text in ["before", "soon"] {
        assert_eq!(ask_by(&socket, frontend, text).unwrap().seen, by_itself);
    }
    scene.topology.unplug_backend().unwrap();
    scene.topology.plug_backend().unwrap();
    // The proxy answers until the device has the program.
    wait_for("the fast path has its new link", || {
        let seen = ask_by(&socket, frontend, "after").ok()?.seen;
        (seen == by_itself).then_some(())
    })
    .unwrap();
    scene.stop();
}
