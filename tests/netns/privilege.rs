//! What a running instance may do: what it needs, and no more.

use std::{collections::BTreeSet, fs};

use forwarder::privilege::kept;
use forwarder_tests::{
    daemon::{Daemon, WITHOUT_CAPABILITIES, binary},
    deadline::wait_for,
};

use crate::scene::Scene;

/// The lines of /proc/PID/status that say what each of its threads may do, without repetition.
fn privileges(daemon: &Daemon) -> BTreeSet<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let tasks = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    let lines = tasks.flat_map(|status| {
        let lines = status.lines().filter(|line| {
            ["CapPrm", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp:"]
                .iter()
                .any(|name| line.starts_with(name))
        });
        lines
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect::<Vec<_>>()
    });
    lines.collect()
}

#[track_caller]
fn has(daemon: &Daemon, permitted: u64) {
    let all: u64 = kept().iter().map(caps::Capability::bitmask).sum();
    let bounding = if permitted == 0 { 0 } else { all };
    let expected = [
        format!("CapPrm: {permitted:016x}"),
        format!("CapEff: {permitted:016x}"),
        format!("CapBnd: {bounding:016x}"),
        "NoNewPrivs: 1".into(),
        "Seccomp: 2".into(),
    ];
    // A thread that has just begun gives up the rest as the first thing that it does.
    let found = wait_for("every thread has given up the rest", || {
        (privileges(daemon) == BTreeSet::from(expected.clone())).then_some(())
    });
    found.unwrap_or_else(|error| panic!("{error}: {:?}", privileges(daemon)));
}

#[test]
fn started_by_root_it_keeps_what_it_needs_alone() {
    let scene = Scene::tcp().start();
    let all = kept().iter().map(caps::Capability::bitmask).sum();
    has(&scene.daemon, all);
    scene.served_on_the_fast_path();
    scene.stop();
}

/// With the package, the directories are the service's user's. An instance of root's has its pins there all the same.
#[test]
fn roots_instance_works_in_directories_of_the_services_user() {
    let beside = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        r#"
set -e
mount -t tmpfs tmpfs /var/lib/forwarder
grep -v ^forwarder: /etc/passwd > /var/lib/forwarder/passwd
echo forwarder:x:997:997::/:/bin/false >> /var/lib/forwarder/passwd
mount --bind /var/lib/forwarder/passwd /etc/passwd
mount -t bpf bpf /sys/fs/bpf
mkdir /sys/fs/bpf/forwarder
chmod 700 /sys/fs/bpf/forwarder
chown forwarder /sys/fs/bpf/forwarder
exec "$@""#,
        "sh",
    ];
    fs::create_dir_all("/var/lib/forwarder").unwrap();
    let scene = Scene::tcp().wrapped(&beside).start();
    scene.served_on_the_fast_path();
    let said = scene.daemon.said();
    assert!(!said.contains("denied"), "{said}");
    scene.stop();
}

#[test]
fn without_capabilities_it_is_confined_too() {
    let scene = Scene::tcp().silent().auto();
    let scene = scene.wrapped(&WITHOUT_CAPABILITIES).start();
    has(&scene.daemon, 0);
    scene.stop();
}

/// Nothing of the eBPF programs is loaded by anybody who has less.
#[test]
fn each_capability_that_the_fast_path_takes_is_missed() {
    for left_out in ["bpf", "perfmon", "net_admin"] {
        let bounding = format!("--bounding-set=-{left_out},-sys_admin");
        let wrapper = ["setpriv", &bounding, "--"];
        let scene = Scene::tcp().silent().auto().wrapped(&wrapper).start();
        let entry = scene.daemon.entry().unwrap();
        let name = format!("CAP_{} missing", left_out.to_uppercase());
        let reason = entry.reason();
        assert!(reason.contains(&name), "{entry:?}");
        scene.stop();
    }
}

/// Runs what follows where somebody has made the directory of all pins before, and may change what is in it.
const SOMEBODYS_PINS: [&str; 6] = [
    "unshare",
    "--mount",
    "sh",
    "-c",
    "mount -t bpf bpf /sys/fs/bpf && mkdir -p /sys/fs/bpf/forwarder/probe/v6/links \
     && chown -R 65534 /sys/fs/bpf/forwarder && exec \"$@\"",
    "sh",
];

#[test]
fn nothing_is_pinned_in_somebodys_directory_and_nothing_removed() {
    let scene = Scene::tcp().silent().auto();
    let scene = scene.wrapped(&SOMEBODYS_PINS).start();
    let entry = scene.daemon.entry().unwrap();
    let reason = entry.reason();
    let refusal = "/sys/fs/bpf/forwarder belongs to user 65534, not to 0; remove it";
    assert!(reason.contains(refusal), "{entry:?}");
    scene.daemon.stop().unwrap();

    let binary = binary().to_string_lossy().into_owned();
    let words = [
        &SOMEBODYS_PINS[1..],
        &[binary.as_str(), "down", "--instance", "probe"],
    ]
    .concat();
    let mut command = scene.topology.host.command(SOMEBODYS_PINS[0]);
    let output = command.args(words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains(refusal),
        "{output:?}"
    );
}
