//! The packages that `cargo xtask dist` makes: installed in a clean Debian that systemd runs, they serve, and purged they
//! leave nothing.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::Duration,
};

use forwarder::privilege::CAPABILITIES;
use forwarder_tests::{
    deadline::wait_for,
    document::{Finding, Row},
    machine::Machine,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask},
};

const PORT: u16 = 8080;
const BACKEND_PORT: u16 = 9000;

fn variable(name: &str) -> PathBuf {
    let value = std::env::var_os(name);
    value
        .unwrap_or_else(|| panic!("{name} is not set: run `cargo xtask test --tier 3`"))
        .into()
}

/// The package whose name ends like that.
fn package(end: &str) -> PathBuf {
    let folder = variable("FORWARDER_PACKAGES");
    let mut files = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let found = files.find(|path| path.to_string_lossy().ends_with(end));
    found.unwrap_or_else(|| panic!("no *{end} in {}", folder.display()))
}

struct Scene {
    topology: Topology,
    machine: Machine,
    _backend: Backend,
}

impl Scene {
    fn new() -> Self {
        let topology = Topology::new().unwrap();
        let machine = Machine::boot(&variable("FORWARDER_ROOT"), &topology.host).unwrap();
        let _backend =
            Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT).unwrap();
        Self {
            topology,
            machine,
            _backend,
        }
    }

    #[track_caller]
    fn run(&self, line: &str) -> String {
        self.machine
            .run(line)
            .unwrap_or_else(|error| panic!("{error:#}"))
    }

    fn install(&self) {
        let package = package(".deb");
        self.machine.put(&package, "/tmp/forwarder.deb").unwrap();
        self.run("apt-get install -y /tmp/forwarder.deb");
    }

    fn frontend(&self) -> SocketAddr {
        SocketAddr::new(self.topology.host_address(Family::V4), PORT)
    }

    /// A client on another machine is answered, and its own address is what the backend sees.
    #[track_caller]
    fn serves(&self) {
        let answer = ask(
            &self.topology.client,
            Protocol::Tcp,
            self.frontend(),
            "hello",
        );
        let answer = answer.unwrap_or_else(|error| {
            panic!(
                "{error:#}\n{}",
                self.run("journalctl --no-pager -u forwarder; forwarder list; true")
            )
        });
        let client = self.topology.client_address(Family::V4);
        assert_eq!(
            answer.seen.ip(),
            client,
            "{}",
            self.run("forwarder list; journalctl --no-pager -u forwarder")
        );
    }

    #[track_caller]
    fn is_closed(&self) {
        ask(
            &self.topology.client,
            Protocol::Tcp,
            self.frontend(),
            "hello",
        )
        .unwrap_err();
    }

    /// The only publish, as `list` has it.
    fn entry(&self) -> Row {
        let rows: Vec<Row> = serde_json::from_str(&self.run("forwarder list --json")).unwrap();
        let [row] = <[Row; 1]>::try_from(rows).unwrap();
        row
    }

    /// Publishes the backend's port by the unit.
    fn start(&self) {
        let backend = SocketAddr::new(self.topology.backend.address(Family::V4), BACKEND_PORT);
        let flags = format!("FORWARDER_FLAGS=\"-p {PORT}:{backend}\"");
        self.run(&format!("echo '{flags}' >/etc/default/forwarder"));
        self.run("systemctl enable --now forwarder");
    }
}

#[test]
fn a_debian_package_serves_and_purged_leaves_nothing() {
    let scene = Scene::new();
    let before = scene.machine.files().unwrap();
    scene.install();

    assert_eq!(
        scene.run("systemctl is-enabled forwarder || true").trim(),
        "disabled"
    );
    scene.run("forwarder --version");
    scene.run("test -s /usr/share/man/man1/forwarder.1.gz && test -s /usr/share/man/man1/forwarder-publish.1.gz");
    scene.run("bash -n /usr/share/bash-completion/completions/forwarder");
    scene.run("cd /usr/share/doc/forwarder && test -s README.md && test -s docs/operations.md && test -s forwarder/packaging/fail2ban/forwarder.conf");
    scene.is_closed();

    scene.start();
    scene.serves();
    let entry = scene.entry();
    assert_eq!(entry.datapath, "ebpf", "{entry:?}");
    assert!(entry.packets > 0, "{entry:?}");

    is_confined(&scene);
    // Killed, it is started again, and forwards meanwhile.
    scene.run("systemctl kill --signal=KILL forwarder");
    scene.serves();
    wait_for("the unit after a crash", || {
        scene.machine.run("forwarder list").ok()
    })
    .unwrap();
    scene.serves();

    scene.run("apt-get remove -y forwarder");
    scene.is_closed();
    scene.run("test -e /etc/default/forwarder && ! test -e /usr/bin/forwarder");
    scene.run("apt-get purge -y forwarder");
    let after = scene.machine.files().unwrap();
    let left: Vec<_> = after.difference(&before).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    let lost: Vec<_> = before
        .difference(&after)
        .filter(|path| !path.starts_with("/run/"))
        .collect();
    assert!(lost.is_empty(), "taken away: {lost:?}");
    let filters = scene
        .topology
        .host
        .run("tc filter show dev eth0 ingress")
        .unwrap_or_default();
    assert_eq!(filters, "");
}

/// The service has a user of its own, whose files are its own, and who may do no more than the list says.
#[track_caller]
fn is_confined(scene: &Scene) {
    for (path, wanted) in [
        ("/run/forwarder", "forwarder forwarder 755"),
        ("/run/forwarder/default.sock", "forwarder forwarder 660"),
        ("/run/forwarder/default.lock", "forwarder forwarder 600"),
        ("/var/lib/forwarder", "forwarder forwarder 700"),
        ("/var/lib/forwarder/default.json", "forwarder forwarder 600"),
        ("/sys/fs/bpf/forwarder", "forwarder forwarder 700"),
    ] {
        let found = scene.run(&format!("stat --format='%U %G %a' {path}"));
        assert_eq!(found.trim(), wanted, "{path}");
    }
    let status =
        scene.run("cat /proc/$(systemctl show --property=MainPID --value forwarder)/status");
    let all: u64 = CAPABILITIES.iter().map(caps::Capability::bitmask).sum();
    let user = scene.run("id -u forwarder").trim().to_owned();
    for (name, wanted) in [
        ("Uid", [user.as_str(); 4].join("\t")),
        ("CapPrm", format!("{all:016x}")),
        ("CapBnd", format!("{all:016x}")),
        ("NoNewPrivs", "1".into()),
        ("Seccomp", "2".into()),
    ] {
        let line = format!("{name}:\t{wanted}");
        assert!(status.lines().any(|it| it == line), "no {line} in {status}");
    }
    let list = |user: &str| {
        let groups = "--reuid=65534 --clear-groups";
        scene
            .machine
            .run(&format!("setpriv {groups} --regid={user} forwarder list"))
    };
    assert!(
        list("forwarder").unwrap().contains("8080"),
        "a member of the group"
    );
    let error = list("nogroup").unwrap_err().to_string();
    assert!(
        error.contains("no permission for instance default"),
        "{error}"
    );
    let journal = scene.run("journalctl --no-pager -u forwarder");
    assert!(!journal.contains("not restricted"), "{journal}");
    // What is not confined weighs no more than 2.0 of 10.
    scene.run("systemd-analyze security --offline=true --threshold=20 /lib/systemd/system/forwarder.service");
}

#[test]
fn the_service_takes_over_what_an_instance_of_root_left() {
    let scene = Scene::new();
    scene.install();
    let backend = SocketAddr::new(scene.topology.backend.address(Family::V4), BACKEND_PORT);
    scene.run("systemd-run --unit=by-hand forwarder run");
    wait_for("root's instance", || {
        scene.machine.run("forwarder list").ok()
    })
    .unwrap();
    scene.run(&format!("forwarder publish {PORT}:{backend}"));
    scene.serves();
    scene.run("systemctl kill --signal=KILL by-hand; systemctl start forwarder || { journalctl --no-pager -u forwarder; false; }");
    scene.serves();
    let entry = scene.entry();
    assert_eq!(entry.datapath, "ebpf", "{entry:?}");
    is_confined(&scene);
    scene.run("apt-get purge -y forwarder");
    scene.is_closed();
}

#[test]
fn a_debian_package_is_replaced_while_it_serves() {
    let scene = Scene::new();
    scene.install();
    scene.start();
    scene.serves();
    // A port that no fast path serves: its conversations are the proxy's.
    let proxied = SocketAddr::new(scene.frontend().ip(), PORT + 1);
    let backend = SocketAddr::new(scene.topology.backend.address(Family::V4), BACKEND_PORT);
    let publish = "forwarder publish --proxy-protocol=v1";
    scene.run(&format!("{publish} {}:{backend}", proxied.port()));
    let client = &scene.topology.client;
    let mut conversations =
        [scene.frontend(), proxied].map(|frontend| Connection::open(client, frontend).unwrap());
    conversations[0].ask("hello").unwrap();
    let header = conversations[1].ask("hello").unwrap();
    assert!(header.payload.starts_with("PROXY TCP4"), "{header:?}");
    assert_eq!(conversations[1].hear().unwrap().payload, "hello");
    let over = AtomicBool::new(false);
    for restart in [
        "apt-get install -y --reinstall /tmp/forwarder.deb",
        "systemctl restart forwarder",
    ] {
        let before = scene.run("systemctl show --property=MainPID forwarder");
        over.store(false, Relaxed);
        thread::scope(|scope| {
            // Whoever comes meanwhile waits, and nobody is refused.
            for frontend in [scene.frontend(), proxied] {
                let over = &over;
                scope.spawn(move || {
                    while !over.load(Relaxed) {
                        Connection::open(client, frontend).unwrap();
                        thread::sleep(Duration::from_millis(5));
                    }
                });
            }
            let restarted = scene.machine.run(restart);
            over.store(true, Relaxed);
            restarted.unwrap_or_else(|error| panic!("{error:#}"));
        });
        let after = scene.run("systemctl show --property=MainPID forwarder");
        assert_ne!(before, after, "the new program runs");
        for conversation in &mut conversations {
            let answer = conversation.ask("still there?");
            let answer = answer.unwrap_or_else(|error| {
                panic!(
                    "{restart}: {error:#}\n{}",
                    scene.run("journalctl --no-pager -u forwarder")
                )
            });
            assert_eq!(answer.payload, "still there?");
        }
        scene.serves();
    }
    scene.run("grep -q FORWARDER_FLAGS=.-p /etc/default/forwarder");
}

#[test]
fn an_rpm_package_is_installed_and_erased() {
    let root = tempfile::tempdir().unwrap();
    let rpm = |arguments: &[&str]| {
        let output = Command::new("rpm")
            .arg("--root")
            .arg(root.path())
            .args(arguments)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "rpm {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let file = package(".rpm").to_string_lossy().into_owned();
    // Debian's rpm knows no package of this root, so dependencies are looked at by themselves.
    rpm(&["--install", "--nodeps", "--noscripts", &file]);
    let listed = rpm(&["--query", "--list", "forwarder"]);
    for path in listed.lines() {
        assert!(
            root.path().join(path.trim_start_matches('/')).exists(),
            "{path}"
        );
    }
    for path in [
        "/usr/bin/forwarder",
        "/usr/lib/systemd/system/forwarder.service",
        "/usr/lib/sysusers.d/forwarder.conf",
        "/usr/share/man/man1/forwarder-run.1",
    ] {
        assert!(
            listed.lines().any(|line| line == path),
            "no {path} in\n{listed}"
        );
    }
    let needs = rpm(&["--query", "--requires", "forwarder"]);
    assert!(needs.contains("libc.so.6"), "{needs}");
    rpm(&["--erase", "--noscripts", "forwarder"]);
    for path in listed.lines().filter(|path| path.contains("forwarder")) {
        assert!(
            !root.path().join(path.trim_start_matches('/')).exists(),
            "{path} is left"
        );
    }
}

/// Unpacks a static tarball and returns its program.
fn unpacked(target: &str, folder: &Path) -> PathBuf {
    let tarball = package(&format!("{target}.tar.gz"));
    let status = Command::new("tar")
        .arg("-xzf")
        .arg(&tarball)
        .arg("-C")
        .arg(folder)
        .status()
        .unwrap();
    assert!(status.success());
    let top = fs::read_dir(folder)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    top.join("usr/local/bin/forwarder")
}

#[test]
fn programs_are_small_and_list_what_they_are_made_of() {
    let folder = tempfile::tempdir().unwrap();
    let program = unpacked(
        &format!("{}-unknown-linux-musl", std::env::consts::ARCH),
        folder.path(),
    );
    let content = fs::read(&program).unwrap();
    assert!(content.len() < 9_000_000, "{} bytes", content.len());
    // The section that cargo-auditable adds.
    assert!(content.windows(7).any(|window| window == b".dep-v0"));
    // A static program names no interpreter (PT_INTERP).
    assert!(!content.windows(9).any(|window| window == b"ld-linux-"));
    let version = Command::new(program).arg("--version").output().unwrap();
    assert!(String::from_utf8_lossy(&version.stdout).starts_with("forwarder "));
}

fn cargo(words: &[&str]) {
    let output = Command::new(env!("CARGO"))
        .args(words)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "cargo {words:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_checkout_is_installed_into_a_prefix_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().to_str().unwrap();
    let defaults = folder.path().join("etc/default/forwarder");
    cargo(&["xtask", "install", "--prefix", prefix]);
    let program = folder.path().join("bin/forwarder");
    assert!(fs::metadata(&program).unwrap().len() < 9_000_000);
    for path in [
        "share/man/man1/forwarder-run.1",
        "share/fish/vendor_completions.d/forwarder.fish",
    ] {
        assert!(folder.path().join(path).exists(), "{path}");
    }
    let unit =
        fs::read_to_string(folder.path().join("lib/systemd/system/forwarder.service")).unwrap();
    assert!(
        unit.contains(&format!("ExecStart={} run", program.display())),
        "{unit}"
    );
    assert!(
        unit.contains(&format!("EnvironmentFile=-{}", defaults.display())),
        "{unit}"
    );

    // Installed again, while the program runs, it keeps the flags that somebody has written.
    fs::write(&defaults, "FORWARDER_FLAGS=\"--datapath userland\"\n").unwrap();
    let mut running = Command::new(&program)
        .args(["run", "--datapath", "userland", "--instance", "prefix"])
        .spawn()
        .unwrap();
    cargo(&["xtask", "install", "--prefix", prefix]);
    assert!(fs::read_to_string(&defaults).unwrap().contains("userland"));
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(running.id().cast_signed()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    running.wait().unwrap();

    cargo(&["xtask", "install", "--prefix", prefix, "--remove"]);
    assert_eq!(
        files(folder.path()),
        [defaults],
        "only what somebody has written stays"
    );
}

#[test]
fn cargo_installs_a_program_with_its_fast_path() {
    let folder = tempfile::tempdir().unwrap();
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let (folder_name, target) = (folder.path().to_str().unwrap(), target.to_str().unwrap());
    cargo(&[
        "install",
        "--path",
        "forwarder",
        "--root",
        folder_name,
        "--target-dir",
        target,
        "--locked",
    ]);
    let found = Command::new(folder.path().join("bin/forwarder"))
        .args(["doctor", "--json"])
        .output()
        .unwrap();
    let findings: Vec<Finding> = serde_json::from_slice(&found.stdout).unwrap();
    let load = findings.iter().find(|it| it.check == "load").unwrap();
    assert!(load.ok, "{load:?}");
}

/// A userland instance of the program for another processor serves a port.
#[test]
fn an_aarch64_program_serves_a_port_under_emulation() {
    let folder = tempfile::tempdir().unwrap();
    let program = unpacked("aarch64-unknown-linux-musl", folder.path());
    let topology = Topology::new().unwrap();
    let backends = [Protocol::Tcp, Protocol::Udp]
        .map(|protocol| Backend::start(&topology.backend.netns, protocol, BACKEND_PORT).unwrap());
    let backend = SocketAddr::new(topology.backend.address(Family::V4), BACKEND_PORT);
    let mut run = topology.host.command("qemu-aarch64-static");
    run.arg(program)
        .args(["run", "--datapath", "userland", "--instance", "aarch64"]);
    run.args([
        "-p",
        &format!("{PORT}:{backend}"),
        "-p",
        &format!("{PORT}:{backend}/udp"),
    ]);
    let mut running = run.spawn().unwrap();
    let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let answer = wait_for("an answer", || {
            ask(&topology.client, protocol, frontend, "hello").ok()
        });
        assert_eq!(answer.unwrap().payload, "hello");
    }
    assert!(backends.iter().all(|backend| backend.requests() > 0));
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(running.id().cast_signed()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    assert!(running.wait().unwrap().success());
}

#[test]
fn the_checksums_are_those_of_the_packages() {
    let folder = variable("FORWARDER_PACKAGES");
    let status = Command::new("sha256sum")
        .args(["--check", "--strict", "--quiet", "SHA256SUMS"])
        .current_dir(folder)
        .status();
    assert!(status.unwrap().success());
}
