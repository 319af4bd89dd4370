//! The daemon dies, or never had what it needs.

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use forwarder_tests::{
    api,
    daemon::{Daemon, Datapath, WITHOUT_CAPABILITIES, down},
    deadline::wait_for,
    layout::lay_out_otherwise,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask},
};

use nix::net::if_::if_nametoindex;
use serde_json::json;

use crate::scene::{
    BACKEND_PORT, PORT, on_the_fast_path, packets, served_to_the_client, spec, wait_for_delivery,
};

#[test]
fn flows_and_published_ports_outlive_a_kill_and_a_restart() {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let mut daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    let localhost = SocketAddr::from(([127, 0, 0, 1], PORT));
    let mut external = Connection::open(&topology.client, frontend).unwrap();
    let mut local = Connection::open(&topology.host, localhost).unwrap();
    external.ask("before").unwrap();
    local.ask("before").unwrap();

    daemon.kill().unwrap();
    external.ask("while it is dead").unwrap();
    local.ask("while it is dead").unwrap();
    served_to_the_client(&topology, Protocol::Tcp, "a new connection");

    daemon.restart().unwrap();
    on_the_fast_path(&daemon, || {
        external.ask("after").unwrap();
        local.ask("after").unwrap();
    });
    on_the_fast_path(&daemon, || {
        served_to_the_client(&topology, Protocol::Tcp, "later")
    });
    daemon.stop().unwrap();
}

/// Connections to a backend that a publish had before, and to one that was taken back with `--drain`; each beside a new one.
#[test]
fn what_drains_outlives_a_kill_and_a_restart() {
    let topology = Topology::new().unwrap();
    let containers = [&topology.backend, &topology.peer];
    let _backends = containers
        .map(|container| Backend::start(&container.netns, Protocol::Tcp, BACKEND_PORT).unwrap());
    let [first, second] = containers.map(|container| spec(container, Family::V4, Protocol::Tcp));
    let host = &topology.host;
    let mut daemon = Daemon::start_with_state(host, &[], Datapath::Ebpf, &[]).unwrap();
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    let connect = || {
        let mut connection = Connection::open(&topology.client, frontend).unwrap();
        connection.ask("before").unwrap();
        connection
    };
    daemon.control(&["publish", &first]).unwrap();
    let mut replaced = connect();
    let backend = containers[1].address(Family::V4);
    let backends = json!([{"address": backend, "port": BACKEND_PORT}]).to_string();
    let answer = api::ask(&daemon, "PUT", "/v1/publishes/1/backends", &backends).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    let mut drained = connect();
    daemon.control(&["unpublish", &second, "--drain"]).unwrap();
    daemon.control(&["publish", &first]).unwrap();
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
    wait_for("the end of what drains", || {
        (ids(&daemon) == [(2, false)]).then_some(())
    })
    .unwrap();
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
        let topology = Topology::new().unwrap();
        let _backend =
            Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
        let spec = spec(&topology.backend, family, Protocol::Tcp);
        let mut daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
        let frontend = SocketAddr::new(topology.host_address(family), PORT);
        let mut external = Connection::open(&topology.client, frontend).unwrap();
        let mut container = Connection::open(&topology.peer.netns, frontend).unwrap();
        external.ask("before").unwrap();
        container.ask("before").unwrap();
        daemon.kill().unwrap();
        down(&topology.host, daemon.instance()).unwrap();

        daemon.restart().unwrap();
        on_the_fast_path(&daemon, || {
            for payload in ["after", "and on"] {
                external.ask(payload).unwrap();
                container.ask(payload).unwrap();
            }
        });
        daemon.stop().unwrap();
    }
}

#[test]
fn a_restart_with_many_publishes_disturbs_no_conversation() {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    // The one that is used comes last.
    let specs: Vec<String> = (20_000..22_000)
        .map(|port| {
            format!(
                "{port}:{}",
                SocketAddr::new(topology.backend.address(Family::V4), 80)
            )
        })
        .chain([spec(&topology.backend, Family::V4, Protocol::Tcp)])
        .collect();
    let specs: Vec<&str> = specs.iter().map(String::as_str).collect();
    let mut daemon = Daemon::start(&topology.host, &specs, Datapath::Ebpf).unwrap();
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    let mut conversation = Connection::open(&topology.client, frontend).unwrap();
    daemon.kill().unwrap();
    let restarted = AtomicBool::new(false);
    thread::scope(|scope| {
        let talk = scope.spawn(|| {
            while !restarted.load(Relaxed) {
                conversation.ask("still there?").unwrap();
            }
            conversation.ask("goodbye").unwrap();
        });
        daemon.restart().unwrap();
        restarted.store(true, Relaxed);
        talk.join().unwrap();
    });
    daemon.stop().unwrap();
}

#[test]
fn what_a_version_left_that_does_not_say_its_layout_is_replaced_and_said() {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let mut daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    daemon.kill().unwrap();
    let pins = daemon.pins();
    let left = std::fs::read_dir(&pins).unwrap().next().unwrap().unwrap();
    let other = pins.join("other");
    std::fs::rename(left.path(), &other).unwrap();
    std::fs::remove_file(other.join("FORMAT")).unwrap();
    daemon.restart().unwrap();
    assert!(!other.exists());
    assert!(daemon.said().contains("its flows end"), "{}", daemon.said());
    on_the_fast_path(&daemon, || {
        served_to_the_client(&topology, Protocol::Tcp, "hello")
    });
    daemon.stop().unwrap();
}

/// A start that fails, as somebody has the port by now.
fn leaves_what_was_forwarding(prepare: impl FnOnce(&Daemon)) {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let taken = spec.replacen(&PORT.to_string(), &(PORT + 1).to_string(), 1);
    let mut daemon = Daemon::start(&topology.host, &[&spec, &taken], Datapath::Ebpf).unwrap();
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    let localhost = SocketAddr::from(([127, 0, 0, 1], PORT));
    let ends = [(&topology.client, frontend), (&topology.host, localhost)];
    let mut conversations = ends.map(|(netns, to)| Connection::open(netns, to).unwrap());
    let mut ask = |payload| {
        for conversation in &mut conversations {
            conversation.ask(payload).unwrap();
        }
    };
    ask("before");
    daemon.kill().unwrap();
    prepare(&daemon);
    let somebody = topology
        .host
        .enter(|| TcpListener::bind(("0.0.0.0", PORT + 1)).unwrap());
    let failed = format!("{:#}", daemon.restart().unwrap_err());
    assert!(failed.contains("address already in use"), "{failed}");
    ask("after");
    served_to_the_client(&topology, Protocol::Tcp, "a new connection");
    drop(somebody);
    daemon.restart().unwrap();
    let before = packets(&daemon);
    served_to_the_client(&topology, Protocol::Tcp, "later");
    let after = packets(&daemon);
    assert!(
        after.0 > before.0 && after.1 > before.1,
        "{before:?}, then {after:?}"
    );
    daemon.stop().unwrap();
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
    let mut topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let mut daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    daemon.kill().unwrap();
    let veth = topology.backend.veth.clone();
    let number = topology.host.enter(|| if_nametoindex(&*veth)).unwrap();
    topology.unplug_backend().unwrap();
    topology.plug_backend_at(Some(number)).unwrap();
    daemon.restart().unwrap();
    wait_for_delivery(&daemon);
    on_the_fast_path(&daemon, || {
        served_to_the_client(&topology, Protocol::Tcp, "hello")
    });
    let said = daemon.said();
    assert!(!said.contains("attach"), "{said}");
    daemon.stop().unwrap();
}

#[test]
fn down_removes_what_a_kill_left() {
    let topology = Topology::new().unwrap();
    let _backend = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let mut daemon = Daemon::start(&topology.host, &[&spec], Datapath::Ebpf).unwrap();
    let left = [
        daemon.pins(),
        PathBuf::from("/run/forwarder").join(format!("{}.sock", daemon.instance())),
    ];
    assert!(left.iter().all(|path| path.exists()), "{left:?}");
    daemon.kill().unwrap();
    served_to_the_client(&topology, Protocol::Tcp, "still there");
    daemon.control(&["down"]).unwrap();
    assert!(!left.iter().any(|path| path.exists()), "{left:?}");
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    assert!(ask(&topology.client, Protocol::Tcp, frontend, "gone").is_err());
}

#[test]
fn down_refuses_while_it_runs() {
    let topology = Topology::new().unwrap();
    let daemon = Daemon::start(&topology.host, &[], Datapath::Ebpf).unwrap();
    let error = daemon.control(&["down"]).unwrap_err().to_string();
    assert!(error.contains("is running"), "{error}");
    daemon.stop().unwrap();
}

#[test]
fn without_capabilities_it_forwards_in_user_space_and_says_why() {
    let topology = Topology::new().unwrap();
    let spec = |protocol| spec(&topology.backend, Family::V4, protocol);
    let _tcp = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
    let _udp = Backend::start(&topology.backend.netns, Protocol::Udp, BACKEND_PORT).unwrap();
    let specs = [spec(Protocol::Tcp), spec(Protocol::Udp)];
    let specs: Vec<&str> = specs.iter().map(String::as_str).collect();
    let daemon = Daemon::start_wrapped(
        &topology.host,
        &WITHOUT_CAPABILITIES,
        &specs,
        Datapath::Auto,
        &[],
    )
    .unwrap();
    let pins = daemon.pins();
    assert!(!pins.exists(), "{pins:?} is of no use");
    for entry in daemon.list().unwrap() {
        assert_eq!(entry.datapath, "userland");
        let reason = entry.reason();
        assert!(reason.contains("CAP_BPF"), "{reason}");
    }
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let answer = ask(&topology.client, protocol, frontend, "hello").unwrap();
        assert_eq!(answer.payload, "hello");
    }
    daemon.stop().unwrap();
}
