//! The daemon dies, or never had what it needs.

use std::{
    net::{SocketAddr, TcpListener},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use forwarder_tests::{
    api,
    daemon::{Daemon, Datapath, WITHOUT_CAPABILITIES, down},
    deadline::wait_until,
    layout::lay_out_otherwise,
    topology::Family,
    traffic::{Connection, Protocol, ask},
};

use nix::net::if_::if_nametoindex;
use serde_json::json;

use crate::scene::{
    BACKEND_PORT, PORT, Scene, frontend, on_the_fast_path, packets, wait_for_delivery,
};

#[test]
fn flows_and_published_ports_outlive_a_kill_and_a_restart() {
    let mut scene = Scene::tcp().start();
    let localhost = SocketAddr::from(([127, 0, 0, 1], PORT));
    let mut external = scene.connect();
    let mut local = Connection::open(&scene.topology.host, localhost).unwrap();
    external.ask("before").unwrap();
    local.ask("before").unwrap();

    scene.daemon.kill().unwrap();
    external.ask("while it is dead").unwrap();
    local.ask("while it is dead").unwrap();
    scene.served("a new connection");

    scene.daemon.restart().unwrap();
    on_the_fast_path(&scene.daemon, || {
        external.ask("after").unwrap();
        local.ask("after").unwrap();
    });
    scene.served_on_the_fast_path();
    scene.stop();
}

/// What the next instance says of its publishes and bans holds, though programs were left.
#[test]
fn nothing_goes_past_an_instance_in_user_space_after_a_kill() {
    for family in [Family::V4, Family::V6] {
        let mut scene = Scene::of(family, Protocol::Tcp).and_udp().start();
        scene.served("by the fast path");
        scene.daemon.kill().unwrap();
        scene.served("while it is dead");
        let in_user_space = |words: &mut Vec<String>| {
            let flag = words.iter().position(|word| word == "--datapath").unwrap();
            words[flag + 1] = Datapath::Userland.name().into();
        };
        scene.daemon.restart_with(in_user_space).unwrap();
        let frontend = scene.frontend();
        let ask = |protocol| ask(&scene.topology.client, protocol, frontend, "hello");
        for (protocol, id) in [(Protocol::Tcp, "1"), (Protocol::Udp, "2")] {
            let client = scene.topology.client_address(family);
            assert_ne!(ask(protocol).unwrap().seen.ip(), client, "by the proxy");
            scene.daemon.control(&["unpublish", id]).unwrap();
            assert!(ask(protocol).is_err(), "{family:?} {protocol:?}");
        }
        assert!(!scene.daemon.pins().exists());
        scene.stop();
    }
}

/// Connections to a backend that a publish had before, and to one that was taken back with `--drain`; each beside a new one.
#[test]
fn what_drains_outlives_a_kill_and_a_restart() {
    let scene = Scene::tcp().and_another().idle().with_state().start();
    let Scene {
        backends: _backends,
        topology,
        specs,
        mut daemon,
        ..
    } = scene;
    let [first, second] = &specs[..] else {
        unreachable!("one of each container")
    };
    let connect = || {
        let frontend = frontend(&topology, Family::V4);
        let mut connection = Connection::open(&topology.client, frontend).unwrap();
        connection.ask("before").unwrap();
        connection
    };
    daemon.control(&["publish", first]).unwrap();
    let mut replaced = connect();
    let backend = topology.peer.address(Family::V4);
    let backends = json!([{"address": backend, "port": BACKEND_PORT}]).to_string();
    let answer = api::ask(&daemon, "PUT", "/v1/publishes/1/backends", &backends).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    let mut drained = connect();
    daemon.control(&["unpublish", second, "--drain"]).unwrap();
    daemon.control(&["publish", first]).unwrap();
    let mut live = connect();
    let ids = |daemon: &Daemon| -> Vec<(u64, bool)> {
        let rows = daemon.list().unwrap();
        rows.iter().map(|row| (row.id, row.draining)).collect()
    };
    assert_eq!(ids(&daemon), [(1, true), (2, false)]);
    for turn in ["once", "twice"] {
        daemon.kill().unwrap();
        daemon.restart().unwrap();
        for connection in [&mut replaced, &mut drained, &mut live] {
            let before = packets(&daemon);
            connection.ask(turn).unwrap();
            let after = packets(&daemon);
            assert!(after.0 > before.0 && after.1 > before.1);
        }
        assert_eq!(ids(&daemon), [(1, true), (2, false)]);
        connect().close().unwrap();
    }
    // Each has ended when its last connection has.
    replaced.close().unwrap();
    drained.close().unwrap();
    wait_until("the end of what drains", || ids(&daemon) == [(2, false)]);
    live.ask("after").unwrap();
    daemon.kill().unwrap();
    daemon.restart().unwrap();
    assert_eq!(ids(&daemon), [(2, false)]);
    live.ask("at last").unwrap();
    daemon.stop().unwrap();
}

#[test]
fn connections_of_other_machines_outlive_the_loss_of_all_flows() {
    for family in [Family::V4, Family::V6] {
        let mut scene = Scene::of(family, Protocol::Tcp).start();
        let peer = &scene.topology.peer.netns;
        let mut container = Connection::open(peer, scene.frontend()).unwrap();
        let mut external = scene.connect();
        external.ask("before").unwrap();
        container.ask("before").unwrap();
        scene.daemon.kill().unwrap();
        down(&scene.topology.host, scene.daemon.instance()).unwrap();

        scene.daemon.restart().unwrap();
        on_the_fast_path(&scene.daemon, || {
            for payload in ["after", "and on"] {
                external.ask(payload).unwrap();
                container.ask(payload).unwrap();
            }
        });
        scene.stop();
    }
}

#[test]
fn a_restart_with_many_publishes_disturbs_no_conversation() {
    // The one that is used comes last.
    let specs: Vec<String> = (20_000..22_000)
        .map(|port| format!("{port}:172.31.0.2:80"))
        .chain([format!("{PORT}:172.31.0.2:{BACKEND_PORT}")])
        .collect();
    let mut scene = Scene::tcp().publishing(&specs).start();
    let mut conversation = scene.connect();
    scene.daemon.kill().unwrap();
    let restarted = AtomicBool::new(false);
    thread::scope(|scope| {
        let talk = scope.spawn(|| {
            while !restarted.load(Relaxed) {
                conversation.ask("still there?").unwrap();
            }
            conversation.ask("goodbye").unwrap();
        });
        scene.daemon.restart().unwrap();
        restarted.store(true, Relaxed);
        talk.join().unwrap();
    });
    scene.stop();
}

#[test]
fn what_a_version_left_that_does_not_say_its_layout_is_replaced_and_said() {
    let mut scene = Scene::tcp().start();
    scene.daemon.kill().unwrap();
    let pins = scene.daemon.pins();
    let left = std::fs::read_dir(&pins).unwrap().next().unwrap().unwrap();
    let other = pins.join("other");
    std::fs::rename(left.path(), &other).unwrap();
    std::fs::remove_file(other.join("FORMAT")).unwrap();
    scene.daemon.restart().unwrap();
    assert!(!other.exists());
    let said = scene.daemon.said();
    assert!(said.contains("its flows end"), "{said}");
    scene.served_on_the_fast_path();
    scene.stop();
}

/// A start that fails, as somebody has the port by now.
fn leaves_what_was_forwarding(prepare: impl FnOnce(&Daemon)) {
    let specs = [PORT, PORT + 1].map(|port| format!("{port}:172.31.0.2:{BACKEND_PORT}"));
    let mut scene = Scene::tcp().publishing(&specs).start();
    let topology = &scene.topology;
    let localhost = SocketAddr::from(([127, 0, 0, 1], PORT));
    let ends = [
        (&topology.client, scene.frontend()),
        (&topology.host, localhost),
    ];
    let mut conversations = ends.map(|(netns, to)| Connection::open(netns, to).unwrap());
    let mut ask = |payload| {
        for conversation in &mut conversations {
            conversation.ask(payload).unwrap();
        }
    };
    ask("before");
    scene.daemon.kill().unwrap();
    prepare(&scene.daemon);
    let host = &scene.topology.host;
    let somebody = host.enter(|| TcpListener::bind(("0.0.0.0", PORT + 1)).unwrap());
    let failed = format!("{:#}", scene.daemon.restart().unwrap_err());
    assert!(failed.contains("address already in use"), "{failed}");
    ask("after");
    scene.served("a new connection");
    drop(somebody);
    scene.daemon.restart().unwrap();
    let before = packets(&scene.daemon);
    scene.served("later");
    let after = packets(&scene.daemon);
    assert!(
        after.0 > before.0 && after.1 > before.1,
        "{before:?}, then {after:?}"
    );
    scene.stop();
}

#[test]
fn a_start_that_fails_leaves_what_a_kill_left() {
    leaves_what_was_forwarding(|_| {});
}

#[test]
fn a_start_that_fails_leaves_what_another_layout_left() {
    leaves_what_was_forwarding(|daemon| drop(lay_out_otherwise(&daemon.pins()).unwrap()));
}

#[test]
fn a_device_that_came_back_while_it_was_dead_gets_the_program_anew() {
    let mut scene = Scene::tcp().start();
    scene.daemon.kill().unwrap();
    let topology = &mut scene.topology;
    let veth = topology.backend.veth.clone();
    let number = topology.host.enter(|| if_nametoindex(&*veth)).unwrap();
    topology.unplug_backend().unwrap();
    topology.plug_backend_at(Some(number)).unwrap();
    scene.daemon.restart().unwrap();
    wait_for_delivery(&scene.daemon);
    scene.served_on_the_fast_path();
    let said = scene.daemon.said();
    assert!(!said.contains("attach"), "{said}");
    scene.stop();
}

#[test]
fn down_removes_what_a_kill_left() {
    let mut scene = Scene::tcp().start();
    let left = [scene.daemon.pins(), scene.daemon.socket()];
    assert!(left.iter().all(|path| path.exists()), "{left:?}");
    scene.daemon.kill().unwrap();
    scene.served("still there");
    scene.daemon.control(&["down"]).unwrap();
    assert!(!left.iter().any(|path| path.exists()), "{left:?}");
    assert!(scene.ask("gone").is_err());
}

#[test]
fn down_refuses_while_it_runs() {
    let scene = Scene::tcp().silent().idle().start();
    let error = scene.daemon.control(&["down"]).unwrap_err().to_string();
    assert!(error.contains("is running"), "{error}");
    scene.stop();
}

#[test]
fn without_capabilities_it_forwards_in_user_space_and_says_why() {
    forwards_in_user_space(&WITHOUT_CAPABILITIES, "CAP_BPF");
}

#[test]
fn root_of_a_user_namespace_forwards_in_user_space_and_hears_why() {
    let wrapper = ["unshare", "--user", "--map-root-user", "--"];
    forwards_in_user_space(&wrapper, "CAP_PERFMON outside of this user namespace");
}

#[track_caller]
fn forwards_in_user_space(wrapper: &[&str], why: &str) {
    let scene = Scene::tcp().and_udp().auto();
    let scene = scene.wrapped(wrapper).start();
    let (topology, daemon) = scene.parts();
    let pins = daemon.pins();
    assert!(!pins.exists(), "{pins:?} is of no use");
    for entry in daemon.list().unwrap() {
        assert_eq!(entry.datapath, "userland");
        let reason = entry.reason();
        assert!(reason.contains(why), "{reason}");
    }
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let answer = ask(&topology.client, protocol, scene.frontend(), "hello").unwrap();
        assert_eq!(answer.payload, "hello");
    }
    scene.stop();
}
