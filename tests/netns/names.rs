//! The names in the documents, as scripts read them, which know nothing of types. Every other test reads them by the types of
//! `forwarder_tests::document`.

use std::collections::BTreeMap;

use forwarder_tests::daemon::Daemon;
use serde_json::{Value, json};

use crate::scene::{BACKEND_PORT, PORT, Scene};

/// Those of a document's first element, in the order of the alphabet.
fn names(daemon: &Daemon, command: &str) -> String {
    let document: Vec<BTreeMap<String, Value>> = daemon.document(&[command]).unwrap();
    let names: Vec<&str> = document[0].keys().map(String::as_str).collect();
    names.join(" ")
}

#[test]
fn documents_have_the_names_that_clients_rely_on() {
    let scene = Scene::udp().idle().start();
    let daemon = &scene.daemon;
    let limits = "--max-flows 9 --rate 9/s --rate-per-source 9/s --bandwidth 8Mbit --on eth0";
    let limits: Vec<&str> = limits.split(' ').collect();
    let publish = [&["publish", scene.spec()], &limits[..]].concat();
    daemon.control(&publish).unwrap();
    scene.ask("hello").unwrap();
    let ban = ["ban", "192.0.2.1", "--for", "1h"];
    daemon.control(&ban).unwrap();
    for (command, expected) in [
        (
            "list",
            "allow backend bandwidth bytes bytes_per_second container datapath delivery draining flows frontend holder id \
             max_flows on owner packets packets_per_second protocol rate rate_per_source reason reason_code since xdp",
        ),
        (
            "flows",
            "backend bytes client datapath frontend idle_seconds packets protocol publish source state",
        ),
        ("stats", "packets reason"),
        ("bans", "network until"),
        ("doctor", "check found ok remedy"),
    ] {
        assert_eq!(names(daemon, command), expected, "{command}");
    }
    scene.stop();
}

#[test]
fn a_row_says_what_is_published_and_how() {
    let scene = Scene::tcp().start();
    scene.served_on_the_fast_path();
    let rows: Value = scene.daemon.document(&["list"]).unwrap();
    let row = &rows[0];
    for (name, value) in [
        ("id", json!(1)),
        ("owner", json!("cli")),
        ("protocol", json!("tcp")),
        (
            "frontend",
            json!({"address": null, "port": PORT, "end_port": PORT}),
        ),
        (
            "backend",
            json!({"address": "172.31.0.2", "port": BACKEND_PORT, "end_port": BACKEND_PORT}),
        ),
        ("datapath", json!("ebpf")),
        ("holder", json!("forwarder")),
        ("allow", json!([])),
        ("draining", json!(false)),
        ("reason", Value::Null),
        ("reason_code", Value::Null),
    ] {
        assert_eq!(row[name], value, "{name} of {row}");
    }
    let deliveries = ["peer", "neighbour"];
    assert!(
        deliveries.contains(&row["delivery"].as_str().unwrap()),
        "{row}"
    );
    scene.stop();
}
