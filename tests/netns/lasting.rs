//! What an instance holds does not grow with what it has done: open files, threads and memory are as before. The same for much longer is
//! `forwarder-bench --soak`.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use forwarder_tests::{
    api,
    daemon::{Daemon, Datapath},
    deadline::{patience, wait_for, wait_until},
    topology::{Family, Topology},
    traffic::{Protocol, ask},
};
use serde_json::{Value, json};

use crate::scene::{Scene, frontend, spec};

/// Times that something is done before anything is looked at, and again.
const TIMES: usize = 150;
const ROUNDS: usize = 5;
/// Threads that have nothing to do are kept for some seconds.
const IDLE: usize = 16;
/// What may be more, in MiB: a leak of 6 KB each time shows.
const SPARE: u64 = 4;

fn held(daemon: &Daemon) -> (usize, usize) {
    (daemon.held("fd").unwrap(), daemon.held("task").unwrap())
}

/// Does something again and again.
fn leaves_nothing(daemon: &Daemon, mut it: impl FnMut()) {
    // What is made once is there then, and the allocator knows how much is needed.
    (0..TIMES).for_each(|_| it());
    let before = held(daemon);
    let resident = daemon.resident().unwrap();
    (0..ROUNDS * TIMES).for_each(|_| it());
    let as_before = wait_for("open files and threads are as before", || {
        let now = held(daemon);
        (now.0 <= before.0 && now.1 <= before.1 + IDLE).then_some(())
    });
    as_before.unwrap_or_else(|error| panic!("{error:#}: {before:?}, then {:?}", held(daemon)));
    let now = daemon.resident().unwrap();
    assert!(now <= resident + SPARE, "{resident} MiB, then {now}");
}

#[test]
fn conversations_leave_nothing() {
    let scene = Scene::tcp().and_udp().by(Datapath::Userland).start();
    let frontend = scene.frontend();
    leaves_nothing(&scene.daemon, || {
        ask(&scene.topology.client, Protocol::Tcp, frontend, "tcp").unwrap();
    });
    scene.stop();
}

/// Each is asked for by TCP once, which has it served by every thread.
#[test]
fn publishes_that_come_and_go_leave_nothing_in_user_space() {
    publishes(Datapath::Userland);
}

#[test]
fn publishes_that_come_and_go_leave_nothing_in_the_kernel() {
    publishes(Datapath::Ebpf);
}

fn publishes(datapath: Datapath) {
    let scene = Scene::tcp().by(datapath).idle().start();
    let specs = json!([spec(&scene.topology.backend, Family::V4, Protocol::Tcp)]);
    let call = |path, body: Value| {
        let answer = api::ask(&scene.daemon, "POST", path, &body.to_string()).unwrap();
        assert!(answer.status < 300, "{path}: {answer:?}");
    };
    leaves_nothing(&scene.daemon, || {
        call("/v1/publishes", specs.clone());
        scene.ask("hello").unwrap();
        call("/v1/unpublish", json!({ "publishes": specs }));
    });
    scene.stop();
}

#[test]
fn a_backend_that_refuses_leaves_nothing() {
    let scene = Scene::tcp().silent().by(Datapath::Userland).start();
    leaves_nothing(&scene.daemon, || {
        let Topology { client, .. } = &scene.topology;
        client.enter(|| {
            // The reset may be there before the client has noticed that it was connected.
            if let Ok(mut stream) = TcpStream::connect(frontend(&scene.topology, Family::V4)) {
                stream.set_read_timeout(Some(patience())).unwrap();
                assert!(stream.read(&mut [0]).is_err(), "nobody resets it");
            }
        });
    });
    scene.stop();
}

/// Readers that do not read keep what the kernel's buffers take, and a pipe for each direction that is full; nobody else waits
/// for them.
#[test]
fn clients_that_do_not_read_hold_nobody_up_and_leave_nothing() {
    const READERS: usize = 20;
    let scene = Scene::tcp().by(Datapath::Userland).start();
    scene.ask("first").unwrap();
    let before = held(&scene.daemon);
    let resident = scene.daemon.resident().unwrap();
    let fill = || {
        let stream = TcpStream::connect(frontend(&scene.topology, Family::V4)).unwrap();
        stream.set_nonblocking(true).unwrap();
        // The backend answers each line, until nobody takes its answers, and it takes no more lines.
        let line = [&[b'x'; 1023][..], b"\n"].concat().repeat(64);
        wait_until("all buffers are full", || (&stream).write(&line).is_err());
        stream
    };
    let streams: Vec<TcpStream> = scene
        .topology
        .client
        .enter(|| (0..READERS).map(|_| fill()).collect());
    for _ in 0..TIMES {
        scene.ask("meanwhile").unwrap();
    }
    let now = scene.daemon.resident().unwrap();
    assert!(now <= resident + SPARE, "{resident} MiB, then {now}");
    drop(streams);
    wait_until("open files are as before", || {
        held(&scene.daemon).0 <= before.0
    });
    scene.stop();
}
