//! An instance as an administrator meets it: its name, its signals, its configuration file, and what outlives it.

use std::{
    collections::BTreeMap,
    fs,
    hash::{BuildHasher as _, RandomState},
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use forwarder_tests::{
    api,
    daemon::{Daemon, Datapath, binary, forwarder, run_to_failure},
    deadline::{slack, wait_for, wait_until},
    document::{Endpoint, Row},
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Protocol, ask},
};
use nix::sys::signal::Signal;

use crate::scene::{PORT, Scene};

/// What a restart must not change of a list.
fn published(daemon: &Daemon) -> Vec<(u64, String, Endpoint, Vec<String>)> {
    let list = daemon.list().unwrap().into_iter();
    list.map(|row| (row.id, row.owner, row.frontend, row.allow))
        .collect()
}

#[test]
fn what_was_published_survives_a_stop_and_a_kill() {
    let flags = ["--allow", "198.51.100.0/24"];
    let scene = Scene::tcp().silent().auto().with_state();
    let mut scene = scene.flags(&flags).start();
    let daemon = &mut scene.daemon;
    daemon
        .control(&["publish", "8081:172.31.0.2:81", "8082:172.31.0.2:82"])
        .unwrap();
    let policy = ["--owner", "team", "--allow", "fd00::/8"];
    daemon
        .control(&[&["publish", "8083:172.31.0.2:83"][..], &policy].concat())
        .unwrap();
    daemon.control(&["unpublish", "2"]).unwrap();
    let before = published(daemon);
    assert_eq!(before.len(), 3);
    daemon.terminate().unwrap();
    daemon.restart().unwrap();
    assert_eq!(published(daemon), before, "after a stop");
    daemon.kill().unwrap();
    daemon.restart().unwrap();
    assert_eq!(published(daemon), before, "after a kill");
    daemon.control(&["publish", "8084:172.31.0.2:84"]).unwrap();
    let last = daemon.list().unwrap().pop().unwrap();
    assert_eq!(last.id, 5, "numbers go on: {last:?}");
    scene.stop();
}

/// What a client knows to be published, while the instance may die at any moment.
#[derive(Default)]
struct Acknowledged {
    /// By port, with its number.
    ports: BTreeMap<u16, u64>,
    /// The port of the request that no answer has come to.
    asked: Option<u16>,
}

impl Acknowledged {
    /// Publishes and takes back until nobody answers.
    fn go_on(&mut self, socket: &Path) {
        for turn in 0_u16.. {
            let port = 20_000 + turn % 500;
            self.asked = Some(port);
            let (method, path, body) = match self.ports.get(&port) {
                Some(id) => ("DELETE", format!("/v1/publishes/{id}"), String::new()),
                None => (
                    "POST",
                    "/v1/publishes".into(),
                    format!(r#"["{port}:172.31.0.2:80"]"#),
                ),
            };
            let Ok(answer) = api::send(socket, api::text(method, &path, &body).as_bytes()) else {
                return;
            };
            // An answer that was cut off is none.
            match (answer.status, answer.body[0]["id"].as_u64(), method) {
                (200 | 201, Some(id), "POST") => drop(self.ports.insert(port, id)),
                (200 | 204, _, "DELETE") => drop(self.ports.remove(&port)),
                _ => return,
            }
            self.asked = None;
        }
    }

    /// Compares with what there is, and takes on what the last request came to.
    fn compare(&mut self, listed: &[Row]) {
        let number = |row: &Row| (row.frontend.port, row.id);
        let mut there: BTreeMap<u16, u64> = listed.iter().map(number).collect();
        if let Some(port) = self.asked.take() {
            let came_to = there.remove(&port);
            self.ports.remove(&port);
            assert_eq!(self.ports, there);
            self.ports.extend(came_to.map(|id| (port, id)));
        }
        assert_eq!(self.ports.len(), listed.len());
    }
}

#[test]
fn a_hundred_kills_lose_nothing_that_was_acknowledged() {
    let scene = Scene::tcp().silent().idle().by(Datapath::Userland);
    let mut scene = scene.with_state().start();
    let daemon = &mut scene.daemon;
    let mut acknowledged = Acknowledged::default();
    let mut answered = 0;
    for _ in 0..100 {
        let socket = daemon.socket();
        // At most 65 ms.
        let moment = slack() / 1_000_000 * u32::from(RandomState::new().hash_one(0) as u16);
        thread::scope(|scope| {
            let client = scope.spawn(|| acknowledged.go_on(&socket));
            thread::sleep(moment);
            daemon.kill().unwrap();
            client.join().unwrap();
        });
        daemon.restart().unwrap();
        answered += acknowledged.ports.len();
        acknowledged.compare(&daemon.list().unwrap());
    }
    assert!(answered > 100, "{answered}");
    scene.stop();
}

#[test]
fn what_a_flag_asked_for_once_does_not_come_back() {
    let scene = Scene::tcp().silent().by(Datapath::Userland);
    let mut scene = scene.with_state().start();
    let Scene {
        daemon, topology, ..
    } = &mut scene;
    daemon.control(&["publish", "8081:172.31.0.2:81"]).unwrap();
    let (instance, binary) = (daemon.instance().to_owned(), binary());
    daemon.terminate().unwrap();
    // The same name, with another flag.
    let mut command = topology.host.command(&binary.to_string_lossy());
    command.args([
        "run",
        "--instance",
        &instance,
        "--datapath",
        "userland",
        "-p",
        "8090:172.31.0.2:90",
    ]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let said: Vec<String> = lines
        .map_while(Result::ok)
        .take_while(|line| line != "ready")
        .collect();
    child.kill().unwrap();
    child.wait().unwrap();
    forwarder_tests::daemon::down(&topology.host, &instance).unwrap();
    let text = said.join("\n");
    assert!(
        text.contains("8081:") && text.contains("8090:") && !text.contains("8080:"),
        "{text}"
    );
}

#[test]
fn a_port_that_somebody_took_meanwhile_keeps_nothing_else_from_being_served() {
    let mut scene = Scene::tcp().idle().auto().with_state().start();
    let other = scene.spec().replacen(&PORT.to_string(), "8081", 1);
    scene.daemon.control(&["publish", &other]).unwrap();
    scene.daemon.control(&["publish", scene.spec()]).unwrap();
    scene.daemon.terminate().unwrap();
    let host = &scene.topology.host;
    let taken = host.enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8081)).unwrap());
    scene.daemon.restart().unwrap();
    scene.served("beside it");
    let first = || scene.daemon.list().unwrap().remove(0);
    let row = first();
    assert!(row.waits(), "{row:?}");
    assert!(row.reason().contains("address already in use"), "{row:?}");
    drop(taken);
    wait_until("the port is had", || !first().waits());
    let frontend = SocketAddr::new(scene.frontend().ip(), 8081);
    ask(&scene.topology.client, Protocol::Tcp, frontend, "hello").unwrap();
    scene.stop();
}

#[test]
fn whether_it_runs_is_no_matter_of_its_socket() {
    let scene = Scene::tcp().start();
    let (topology, daemon) = scene.parts();
    fs::remove_file(daemon.socket()).unwrap();
    let error = daemon.control(&["down"]).unwrap_err().to_string();
    assert!(error.contains("is running"), "{error}");
    let mut command = topology.host.command(&binary().to_string_lossy());
    let second = command
        .args(["run", "--ephemeral", "--instance", daemon.instance()])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(error.contains("already running"), "{error}");
    scene.served("hello");
    scene.stop();
}

#[test]
fn signals_that_mean_nothing_end_nothing() {
    let scene = Scene::tcp().start();
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        scene.daemon.signal(signal).unwrap();
    }
    scene.served_on_the_fast_path();
    wait_until("a word about SIGHUP", || {
        scene.daemon.said().contains("SIGHUP")
    });
    scene.stop();
}

#[test]
fn a_reader_of_its_output_may_leave() {
    let topology = Topology::new().unwrap();
    let instance = format!("unread-{}", std::process::id());
    let flags = [
        "run",
        "--ephemeral",
        "--instance",
        &instance,
        "-p",
        "8080:172.31.0.2:80",
    ];
    let mut command: Command = topology.host.command(&binary().to_string_lossy());
    let mut child = command.args(flags).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let list = || {
        let mut command = topology.host.command(&binary().to_string_lossy());
        let output = command
            .args(["list", "--instance", &instance])
            .stderr(Stdio::null())
            .output();
        output
            .is_ok_and(|output| output.status.success())
            .then_some(())
    };
    let served = wait_for("an answer", list);
    let running = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    forwarder_tests::daemon::down(&topology.host, &instance).unwrap();
    served.unwrap();
    assert!(running);
}

/// A configuration file in a folder of its own, removed when dropped.
struct File(PathBuf);

impl File {
    fn new(text: &str) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("forwarder-test-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir_all(directory.join("conf.d")).unwrap();
        let file = Self(directory.join("forwarder.toml"));
        file.write(text);
        file
    }

    fn write(&self, text: &str) {
        fs::write(&self.0, text).unwrap();
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0.parent().unwrap());
    }
}

#[test]
fn a_configuration_is_read_again_as_a_whole_or_not_at_all() {
    let file = File::new("publish = [\"8080:172.31.0.2:80\", \"8081:172.31.0.2:81\"]");
    let flags = ["--config", file.path()];
    let scene = Scene::tcp().silent().publishing(&["9090:172.31.0.2:90"]);
    let scene = scene.auto().flags(&flags).start();
    let (topology, daemon) = scene.parts();
    daemon.control(&["publish", "8085:172.31.0.2:85"]).unwrap();
    let owners = |daemon: &Daemon| -> Vec<String> {
        let list = daemon.list().unwrap();
        list.iter()
            .map(|row| format!("{} {}", row.owner, row.frontend.port))
            .collect()
    };
    let mut before = owners(daemon);
    before.sort();
    assert_eq!(
        before,
        ["cli 8085", "cli 9090", "config 8080", "config 8081"]
    );
    // What is wrong, and what another owner or process has, changes nothing.
    let _taken = topology
        .host
        .enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8087)))
        .unwrap();
    for (text, part) in [
        (
            "publish = [\"8086:172.31.0.2:86\"]\nxpd = 1",
            "forwarder.toml:2:1",
        ),
        (
            "publish = [\"8086:172.31.0.2:86\", \"8085:172.31.0.2:1\"]",
            "owner cli",
        ),
        (
            "publish = [\"8086:172.31.0.2:86\", \"8087:172.31.0.2:1\"]",
            "address already in use",
        ),
        ("respect-firewall = true", "restart"),
    ] {
        file.write(text);
        let error = daemon.control(&["reload"]).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
        assert_eq!(daemon.list().unwrap().len(), 4, "after {text}");
    }
    file.write(
        "publish = [\"8081:172.31.0.3:81\", \"8086:172.31.0.2:86\"]\nallow = [\"10.0.0.0/8\"]",
    );
    let said = daemon.control(&["reload"]).unwrap();
    assert_eq!(said.trim(), "1 added, 1 changed, 1 removed");
    let list = daemon.list().unwrap();
    assert!(
        list.iter().all(|row| row.allow == ["10.0.0.0/8"]),
        "{list:?}"
    );
    let mut after = owners(daemon);
    after.sort();
    assert_eq!(
        after,
        ["cli 8085", "cli 9090", "config 8081", "config 8086"]
    );
    file.write("publish = []");
    daemon.signal(Signal::SIGHUP).unwrap();
    wait_until("two publishes", || daemon.list().unwrap().len() == 2);
    scene.stop();
}

/// Nobody could take back what is in the way while no instance runs.
#[test]
fn what_was_published_before_gives_way_to_flags_and_file() {
    let file = File::new("publish = []");
    let flags = ["--config", file.path()];
    let specs = ["8080:172.31.0.2:80", "[::]:5353:172.31.0.2:53/udp"];
    let scene = Scene::tcp().silent().publishing(&specs).with_state();
    let scene = scene.auto().flags(&flags).start();
    let (topology, mut daemon) = (scene.topology, scene.daemon);
    let lines = [
        "8081:172.31.0.2:81",
        "8082:172.31.0.2:82",
        "7000-7009:172.31.0.2:70/udp",
    ];
    let publish = |daemon: &Daemon, owner, specs: &[&str]| {
        let words = [&["publish", "--owner", owner], specs].concat();
        daemon.control(&words).unwrap();
    };
    publish(&daemon, "cli", &lines[..1]);
    publish(&daemon, "team", &lines[1..]);
    daemon.terminate().unwrap();
    // A flag and a command have become lines of the file, and what somebody else has is a flag now.
    file.write(
        "publish = [\"8080:172.31.0.2:80\", \"8081:172.31.0.2:81\", \"7005:172.31.0.2:75/udp\"]",
    );
    let other = |words: &mut Vec<String>| {
        let flag = words.iter().position(|word| word == specs[0]).unwrap();
        words[flag] = "8082:172.31.0.2:82".into();
    };
    daemon.restart_with(other).unwrap();
    let mut rows: Vec<String> = daemon
        .list()
        .unwrap()
        .iter()
        .map(|row| format!("{} {}", row.owner, row.frontend.port))
        .collect();
    rows.sort();
    assert_eq!(
        rows,
        [
            "cli 5353",
            "cli 8082",
            "config 7005",
            "config 8080",
            "config 8081"
        ]
    );
    assert!(daemon.said().contains("gives way"), "{}", daemon.said());
    daemon.stop().unwrap();
    drop(topology);
}

/// So many networks that there is room for those of one publish.
fn many_networks() -> String {
    let networks = (0..40_000).map(|it| format!("\"10.{}.{}.0/24\"", it / 256, it % 256));
    networks.collect::<Vec<_>>().join(", ")
}

#[test]
fn an_allow_list_for_which_there_is_no_room_changes_nothing() {
    let published = "publish = [\"8080:172.31.0.2:9000\", \"8081:172.31.0.2:81\"]";
    let file = File::new(&format!("{published}\nallow = [\"198.51.100.0/24\"]"));
    let flags = ["--config", file.path()];
    let scene = Scene::tcp().publishing(&["8082:172.31.0.2:82"]);
    let scene = scene.flags(&flags).start();
    let daemon = &scene.daemon;
    let rows = || {
        let list = daemon.list().unwrap();
        let rows = list.into_iter();
        rows.map(|row| (row.frontend.port, row.allow))
            .collect::<Vec<_>>()
    };
    let before = rows();
    file.write(&format!(
        "publish = [\"8080:172.31.0.2:9000\", \"8083:172.31.0.2:83\"]\nallow = [{}]",
        many_networks()
    ));
    let error = daemon.control(&["reload"]).unwrap_err().to_string();
    assert!(error.contains("ALLOW"), "{error}");
    assert_eq!(rows(), before);
    scene.served("a client of the old list");
    file.write("publish = [\"8080:172.31.0.2:9000\"]\nallow = [\"198.51.0.0/16\"]");
    let said = daemon.control(&["reload"]).unwrap();
    assert_eq!(said.trim(), "0 added, 0 changed, 1 removed");
    assert!(rows().iter().all(|(_, allow)| allow == &["198.51.0.0/16"]));
    scene.served("a client of the new list");
    scene.stop();
}

/// A path that is named may be a mistake, or another instance's.
#[test]
fn a_socket_takes_the_place_of_nothing_else() {
    let host = Netns::new("host").unwrap();
    let file = File::new("a file of somebody's");
    let flags = ["--datapath", "userland", "--socket", file.path()];
    let (status, error) = run_to_failure(&host, &flags).unwrap();
    assert!(
        status.code() == Some(1) && error.contains("is no socket"),
        "{error}"
    );
    forwarder(&host)
        .args(["down", "--instance", "nobody", "--socket", file.path()])
        .output()
        .unwrap();
    assert!(Path::new(file.path()).exists());
    let socket = format!("{}.sock", file.path());
    let flags = ["--datapath", "userland", "--socket", &socket];
    let daemon = Daemon::start_with(&host, &[], Datapath::Userland, &flags[2..]).unwrap();
    let (status, error) = run_to_failure(&host, &flags).unwrap();
    assert!(
        status.code() == Some(1) && error.contains("another process serves"),
        "{error}"
    );
    let list = forwarder(&host)
        .args(["list", "--socket", &socket])
        .output();
    assert!(list.unwrap().status.success());
    daemon.stop().unwrap();
}

#[test]
fn a_configuration_is_checked_without_being_used() {
    let topology = Topology::new().unwrap();
    let file = File::new("publish = [\"8080:172.31.0.2:80\"]");
    let check = || {
        let mut command = topology.host.command(&binary().to_string_lossy());
        command.args(["check", file.path()]).output().unwrap()
    };
    let good = check();
    assert!(good.status.success(), "{good:?}");
    file.write("publish = [\n  \"8080:172.31.0.2:80\",\n  \"8080\",\n]");
    let bad = check();
    assert_eq!(bad.status.code(), Some(1));
    let error = String::from_utf8_lossy(&bad.stderr).into_owned();
    assert!(
        error.contains(&format!("error: {}:3:3: ", file.path())),
        "{error}"
    );
    let (status, error) = run_to_failure(&topology.host, &["--config", file.path()]).unwrap();
    assert!(!status.success() && error.contains(":3:3: "), "{error}");
    // So are those that the host itself makes wrong.
    let own = topology.host_address(Family::V4);
    for publishes in [
        "\"8080:127.0.0.1:8080\"".to_owned(),
        format!("\"8080:{own}:8081\", \"8081:{own}:8080\""),
    ] {
        file.write(&format!("publish = [{publishes}]"));
        let bad = check();
        let error = String::from_utf8_lossy(&bad.stderr).into_owned();
        let (status, said) = run_to_failure(&topology.host, &["--config", file.path()]).unwrap();
        assert!(!status.success());
        for error in [error, said] {
            assert!(error.contains("it leads back to itself"), "{error}");
        }
        assert_eq!(bad.status.code(), Some(1));
    }
}

#[test]
fn a_name_with_a_dot_has_the_fast_path_and_pins() {
    let scene = Scene::tcp().silent().start();
    let daemon = &scene.daemon;
    assert!(daemon.instance().contains('.'));
    assert!(daemon.pins().is_dir());
    let pins = daemon.pins();
    scene.stop();
    assert!(!pins.exists());
}
