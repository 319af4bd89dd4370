//! SCTP by the userland proxy: messages as they came, both ends of an association, a peer that others wrote. A kernel
//! without SCTP refuses the publish, and says why.

use std::{io::ErrorKind, net::SocketAddr};

use forwarder_tests::{
    daemon::{Daemon, Datapath, run_to_failure},
    sctp::{Association, Listener, Message, exists},
    topology::{
        Family::{self, V4, V6},
        Topology,
    },
};

use crate::scene::{BACKEND_PORT, PORT, frontend};

fn spec(topology: &Topology, family: Family) -> String {
    let backend = SocketAddr::new(topology.backend.address(family), BACKEND_PORT);
    format!("{PORT}:{backend}/sctp")
}

/// Runs a scenario with a published listener; on a kernel without SCTP, that is refused.
fn published(family: Family, scenario: impl FnOnce(&Topology, Listener)) {
    let topology = Topology::new().unwrap();
    let spec = spec(&topology, family);
    if !exists() {
        let (status, errors) = run_to_failure(&topology.host, &["-p", &spec]).unwrap();
        assert_eq!(status.code(), Some(1));
        assert!(errors.contains("this kernel has no SCTP"), "{errors}");
        return;
    }
    let address = SocketAddr::new(topology.backend.address(family), BACKEND_PORT);
    let netns = &topology.backend.netns;
    let listener = netns.enter(|| Listener::bind(address)).unwrap();
    let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Auto).unwrap();
    let entry = daemon.entry().unwrap();
    assert_eq!(entry.datapath, "userland");
    assert_eq!(entry.protocol, "sctp");
    scenario(&topology, listener);
    daemon.stop().unwrap();
}

/// A client's association, and the backend's that it became.
fn associate(
    topology: &Topology,
    listener: &Listener,
    family: Family,
) -> (Association, Association) {
    let frontend = frontend(topology, family);
    let client = topology.client.enter(|| Association::connect(frontend));
    (client.unwrap(), listener.accept().unwrap())
}

fn messages_pass(family: Family) {
    published(family, |topology, listener| {
        let (client, backend) = associate(topology, &listener, family);
        assert_eq!(
            backend.peer().unwrap().ip(),
            topology.backend.gateway(family)
        );
        let long: Vec<u8> = (0..100_000_u32).map(|at| (at ^ (at >> 8)) as u8).collect();
        for (from, to) in [(&client, &backend), (&backend, &client)] {
            let messages = [
                Message::new(0, b"one"),
                Message::new(3, b"two"),
                Message::new(0, &long),
                Message::new(9, b"three"),
            ];
            for message in &messages {
                from.send(message).unwrap();
            }
            for message in messages {
                assert_eq!(to.receive().unwrap(), Some(message));
            }
        }
    });
}

#[test]
fn messages_pass_as_they_are_over_ipv4() {
    messages_pass(V4);
}

#[test]
fn messages_pass_as_they_are_over_ipv6() {
    messages_pass(V6);
}

#[test]
fn an_ipv6_client_reaches_an_ipv4_backend() {
    published(V4, |topology, listener| {
        let (client, backend) = associate(topology, &listener, V6);
        let message = Message::new(1, b"hello");
        client.send(&message).unwrap();
        assert_eq!(backend.receive().unwrap(), Some(message));
    });
}

#[test]
fn the_end_of_either_side_passes() {
    published(V4, |topology, listener| {
        let (client, backend) = associate(topology, &listener, V4);
        client.send(&Message::new(0, b"the last")).unwrap();
        drop(client);
        let last = backend.receive().unwrap();
        assert_eq!(last, Some(Message::new(0, b"the last")));
        assert_eq!(backend.receive().unwrap(), None);

        let (client, backend) = associate(topology, &listener, V4);
        client.send(&Message::new(0, b"hello")).unwrap();
        backend.receive().unwrap();
        backend.abort().unwrap();
        let error = client.receive().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    });
}

#[test]
fn a_client_whose_backend_refuses_is_aborted() {
    published(V4, |topology, listener| {
        drop(listener);
        let frontend = frontend(topology, V4);
        let client = topology.client.enter(|| Association::connect(frontend));
        let client = client.unwrap();
        let error = client.receive().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    });
}

/// lksctp-tools' own test program on both sides.
#[test]
fn sctp_test_is_served() {
    published(V4, |topology, _| {
        let backend = topology.backend.address(V4);
        let other_port = BACKEND_PORT + 1;
        let mut server = topology
            .backend
            .netns
            .command("sctp_test")
            .args([
                "-H",
                &backend.to_string(),
                "-P",
                &other_port.to_string(),
                "-l",
            ])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("sctp_test: `apt-get install lksctp-tools`");
        let spec = format!("{}:{backend}:{other_port}/sctp", PORT + 1);
        let daemon = Daemon::start(&topology.host, &[&spec], Datapath::Auto).unwrap();
        let (client, host) = (topology.client_address(V4), topology.host_address(V4));
        // Sequences of messages of 1 to 32,768 octets over several streams.
        let sent = topology.client.run(&format!(
            "sctp_test -H {client} -P 7000 -h {host} -p {} -s -c 3 -x 2",
            PORT + 1
        ));
        let carried = daemon.entry().unwrap();
        server.kill().unwrap();
        server.wait().unwrap();
        sent.unwrap_or_else(|error| panic!("{error:#}\n{carried:?}"));
        assert!(carried.bytes > 32_768, "{carried:?}");
        daemon.stop().unwrap();
    });
}
