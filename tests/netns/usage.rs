//! Mistakes: each gets one line that names the thing, and the right exit status.

use std::{
    ffi::OsStr,
    fs::{self, File},
    net::{Ipv4Addr, TcpListener},
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use forwarder_tests::{
    daemon::{self, binary, make_program, run_to_failure},
    netns::Netns,
};

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
    let line = error_line(&errors);
    // None of the two is there that could be unpublished.
    let words = "publish 8000-8100:172.31.0.3:8000-8100/tcp: overlaps with 8080:172.31.0.2:80/tcp, which is asked for beside it";
    assert!(line.contains(words), "{line}");
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

#[test]
fn words_that_are_no_utf_8_are_wrong_usage() {
    let mut command = daemon::forwarder(&empty_host());
    command.args(["publish", "--max-flows", "5"]);
    let output = command.arg(OsStr::from_bytes(b"80:\xff:80")).output();
    let output = output.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error_line(&errors).contains("UTF-8"), "{errors}");
    assert_eq!(output.status.code(), Some(2), "{errors}");
}

#[test]
fn the_status_says_what_a_full_disk_keeps_from_standard_error() {
    for (words, status) in [(["publish", "80"], 2), (["unpublish", "80"], 1)] {
        let mut command = daemon::forwarder(&empty_host());
        command.args(words).args(["--instance", "none"]);
        command.stderr(File::options().write(true).open("/dev/full").unwrap());
        assert_eq!(command.status().unwrap().code(), Some(status), "{words:?}");
    }
}

/// What writes the log may end, and its disk may be full.
#[test]
fn an_instance_serves_while_it_cannot_write_its_log() {
    let unheard = ["sh", "-c", r#"exec "$@" 2>/dev/full"#, "sh"];
    let scene = Scene::tcp().wrapped(&unheard).flags(&["--log", "debug"]);
    let scene = scene.start();
    scene.served_on_the_fast_path();
    scene.stop();
}

/// What a command of a user without rights, who has nothing of its own, says; typed in a folder that anybody may write to.
fn as_nobody(host: &Netns, words: &[&str]) -> (Option<i32>, String, Vec<PathBuf>) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let folder = format!("forwarder-usage-{}-{number}", std::process::id());
    let folder = std::env::temp_dir().join(folder);
    let here = folder.join("here");
    fs::create_dir_all(&here).unwrap();
    let program = folder.join("forwarder");
    make_program(&program, &fs::read(binary()).unwrap()).unwrap();
    for (path, mode) in [(&folder, 0o755), (&here, 0o777)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let mut command = Command::new("timeout");
    command.args(["20", "setpriv", "--reuid=65534", "--regid=65534"]);
    command.arg("--clear-groups");
    command.arg(&program).args(words).current_dir(&here);
    command.env_remove("HOME").env("XDG_STATE_HOME", "state");
    let output = host.enter(|| command.output()).unwrap();
    let made = fs::read_dir(here).unwrap().map(|it| it.unwrap().path());
    let made = made.collect();
    fs::remove_dir_all(folder).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), errors, made)
}

/// Another user may not look at what root's instance has left, and must not hear that there is nothing.
#[test]
fn who_may_not_look_does_not_hear_that_nothing_is_left() {
    let mut scene = Scene::tcp().start();
    scene.daemon.kill().unwrap();
    let words = ["down", "--instance", scene.daemon.instance()];
    let (status, errors, _) = as_nobody(&scene.topology.host, &words);
    assert!(error_line(&errors).contains("run as root"), "{errors}");
    assert_eq!(status, Some(1), "{errors}");
    scene.daemon.restart().unwrap();
    scene.stop();
}

/// A state file that depends on where the command was typed would not be found again.
#[test]
fn without_a_home_no_state_is_kept_where_it_was_started() {
    let instance = format!("homeless-{}", std::process::id());
    let words = ["run", "--datapath", "userland", "--instance", &instance];
    let (status, errors, made) = as_nobody(&empty_host(), &words);
    assert!(made.is_empty(), "{made:?}");
    assert!(error_line(&errors).contains("--ephemeral"), "{errors}");
    assert_eq!(status, Some(1), "{errors}");
}

/// The same line in what a failed command said.
fn error_line_of(said: &str) -> &str {
    said.split("error: ").nth(1).unwrap_or(said)
}
