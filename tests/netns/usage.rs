//! Mistakes: each gets one line that names the thing, and the right exit status.

use std::net::{Ipv4Addr, TcpListener};

use forwarder_tests::{daemon::run_to_failure, netns::Netns};

use crate::scene::{PORT, Scene};

/// The line that begins with `error: `, and that there is only one.
#[track_caller]
fn error_line(errors: &str) -> &str {
    let mut lines = errors.lines().filter(|line| line.starts_with("error: "));
    let line = lines
        .next()
        .unwrap_or_else(|| panic!("no line begins with `error: `:\n{errors}"));
    assert_eq!(lines.next(), None, "more than one error:\n{errors}");
    line
}

fn empty_host() -> Netns {
    let host = Netns::new("host").unwrap();
    host.ip("link set lo up").unwrap();
    host
}

fn port_held_by_another_process(datapath: &str) {
    let host = empty_host();
    let _held = host
        .enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))
        .unwrap();
    let spec = format!("{PORT}:172.31.0.2:80");
    let flags = ["-p", &spec, "--datapath", datapath];
    let (status, errors) = run_to_failure(&host, &flags).unwrap();
    let line = error_line(&errors);
    assert_eq!(status.code(), Some(1), "{line}");
    assert!(line.contains("address already in use"), "{line}");
    assert!(
        line.contains(&format!("pid {}", std::process::id())),
        "the holder is named: {line}"
    );
}

#[test]
fn a_port_held_by_another_process_is_an_error_that_names_it() {
    port_held_by_another_process("auto");
}

#[test]
fn a_port_held_by_another_process_is_an_error_in_user_space_too() {
    port_held_by_another_process("userland");
}

#[test]
fn a_published_port_is_held() {
    let scene = Scene::tcp().silent().start();
    let host = &scene.topology.host;
    let taken = host.enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)));
    assert_eq!(taken.unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    scene.stop();
}

fn wrong_usage(flags: &[&str], names: &str) {
    let (status, errors) = run_to_failure(&empty_host(), flags).unwrap();
    assert_eq!(status.code(), Some(2), "{errors}");
    assert!(errors.contains(names), "{names} is not named:\n{errors}");
}

#[test]
fn a_spec_without_a_backend_is_wrong_usage() {
    wrong_usage(&["-p", "8080"], "8080");
}

#[test]
fn a_port_that_is_none_is_wrong_usage() {
    wrong_usage(&["-p", "70000:172.31.0.2:80"], "70000");
}

#[test]
fn ranges_of_different_length_are_wrong_usage() {
    wrong_usage(&["-p", "7000-7009:172.31.0.2:80-81"], "7000-7009");
}

#[test]
fn an_unknown_protocol_is_wrong_usage() {
    wrong_usage(&["-p", "8080:172.31.0.2:80/icmp"], "icmp");
}

#[test]
fn a_timeout_that_is_none_is_wrong_usage() {
    wrong_usage(&["--timeout", "tcp-establised=5d"], "tcp-established");
    wrong_usage(&["--timeout", "udp=0"], "udp=0");
}

#[test]
fn publishes_that_overlap_are_refused() {
    let flags = [
        "-p",
        "8080:172.31.0.2:80",
        "-p",
        "8000-8100:172.31.0.3:8000-8100",
    ];
    let (status, errors) = run_to_failure(&empty_host(), &flags).unwrap();
    assert!(!status.success());
    assert!(error_line(&errors).contains("8080"), "{errors}");
}

#[test]
fn a_request_that_fails_changes_nothing() {
    let scene = Scene::tcp().start();
    let (topology, daemon) = scene.parts();
    let mut connection = scene.connect();
    connection.ask("before").unwrap();
    let _held = topology
        .host
        .enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT + 2)))
        .unwrap();

    let good = format!("{}:172.31.0.2:80", PORT + 1);
    let held = format!("{}:172.31.0.2:80", PORT + 2);
    for (request, named) in [
        (["publish", &good, &held], "8082"),
        (["publish", &good, scene.spec()], "8080"),
        (["unpublish", scene.spec(), "77"], "77"),
    ] {
        let error = daemon.control(&request).unwrap_err().to_string();
        assert!(error_line_of(&error).contains(named), "{error}");
        let listed = daemon.list().unwrap();
        assert_eq!(listed.len(), 1, "after {request:?}: {listed:?}");
        connection.ask("meanwhile").unwrap();
    }
    scene.stop();
}

/// The same line in what a failed command said.
fn error_line_of(said: &str) -> &str {
    said.split("error: ").nth(1).unwrap_or(said)
}
