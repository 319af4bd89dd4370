//! A restart or an upgrade, while clients talk, stream and come: nobody is refused, and nothing is reset. What the fast path
//! carries goes on by itself; the proxy's sockets and conversations are handed to the next process.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Stdio,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread::{self, Scope, ScopedJoinHandle},
    time::Duration,
};

use forwarder_tests::{
    daemon::{Daemon, Datapath, forwarder},
    deadline::{patience, wait_for, wait_until},
    layout::lay_out_otherwise,
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask},
};

use crate::{
    fallback::Client,
    scene::{self, BACKEND_PORT, PORT, backends, suffix},
};

const FAMILY: Family = Family::V4;
const STREAM_PORT: u16 = 9100;
const CONVERSATIONS: usize = 100;

struct Scene {
    topology: Topology,
    _backends: [Backend; 2],
}

impl Scene {
    fn new() -> Self {
        let topology = Topology::new().unwrap();
        let _backends = backends(&topology.backend.netns);
        Self {
            topology,
            _backends,
        }
    }

    fn start(&self, datapath: Datapath) -> Daemon {
        let backend = self.topology.backend.address(FAMILY);
        let specs = [
            format!("{PORT}:{backend}:{BACKEND_PORT}"),
            format!("{PORT}:{backend}:{BACKEND_PORT}/udp"),
            format!("{STREAM_PORT}:{backend}:{STREAM_PORT}"),
        ];
        let specs: Vec<&str> = specs.iter().map(String::as_str).collect();
        Daemon::start_as_service(&self.topology.host, &specs, datapath, &[]).unwrap()
    }

    fn frontend(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.topology.host_address(FAMILY), port)
    }

    /// New connections, as many as come about, each with its answer.
    fn newcomers<'a>(&'a self, load: &'a Load) {
        while !load.is_over() {
            ask(
                &self.topology.client,
                Protocol::Tcp,
                self.frontend(PORT),
                "new",
            )
            .unwrap();
            load.done.fetch_add(1, Relaxed);
            thread::sleep(Duration::from_millis(4));
        }
    }

    fn conversations(&self) -> Vec<Connection> {
        let localhost = SocketAddr::from(([127, 0, 0, 1], PORT));
        let open = |number| {
            if number % 4 == 0 {
                Connection::open(&self.topology.host, localhost).unwrap()
            } else {
                Connection::open(&self.topology.client, self.frontend(PORT)).unwrap()
            }
        };
        let mut all: Vec<Connection> = (0..CONVERSATIONS).map(open).collect();
        all.iter_mut()
            .for_each(|it| drop(it.ask("before").unwrap()));
        all
    }

    /// Datagrams that are sent once, by one socket, and all answered.
    fn datagrams<'a>(&'a self, load: &'a Load) {
        let client = &self.topology.client;
        let socket = client.enter(|| UdpSocket::bind(("0.0.0.0", 0)).unwrap());
        socket.set_read_timeout(Some(patience())).unwrap();
        socket.connect(self.frontend(PORT)).unwrap();
        let mut seen = None;
        for number in 0.. {
            if load.is_over() {
                return;
            }
            let payload = format!("datagram {number}");
            socket.send(payload.as_bytes()).unwrap();
            let mut got = [0; 256];
            let length = socket.recv(&mut got).unwrap();
            let got = String::from_utf8_lossy(&got[..length]).into_owned();
            let (source, answer) = got.split_once(' ').unwrap();
            assert_eq!(answer, payload);
            // The backend sees the same client all the while.
            assert_eq!(seen.get_or_insert_with(|| source.to_owned()), source);
            load.done.fetch_add(1, Relaxed);
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// As much as goes through both ways, every octet of which has to come back in its place.
    fn stream<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        load: &'scope Load,
    ) -> [ScopedJoinHandle<'scope, ()>; 3] {
        let at = |position: usize| (position ^ (position >> 11)) as u8;
        let backend = &self.topology.backend.netns;
        let listener = backend.enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, STREAM_PORT)));
        let listener = listener.unwrap();
        let client = self
            .topology
            .client
            .enter(|| TcpStream::connect(self.frontend(STREAM_PORT)));
        let client = client.unwrap();
        let (echo, _) = listener.accept().unwrap();
        for stream in [&client, &echo] {
            stream.set_read_timeout(Some(3 * patience())).unwrap();
            stream.set_write_timeout(Some(3 * patience())).unwrap();
        }
        let reader = client.try_clone().unwrap();
        let echo = scope.spawn(move || {
            std::io::copy(&mut &echo, &mut &echo).unwrap();
            echo.shutdown(Shutdown::Write).unwrap();
        });
        let sent = std::sync::Arc::new(AtomicU64::new(0));
        let counted = sent.clone();
        let write = scope.spawn(move || {
            let mut position = 0;
            while !load.is_over() {
                let data: Vec<u8> = (position..position + (64 << 10)).map(at).collect();
                (&client).write_all(&data).unwrap();
                position += data.len();
                counted.store(position as u64, Relaxed);
            }
            client.shutdown(Shutdown::Write).unwrap();
        });
        let read = scope.spawn(move || {
            let (mut position, mut buffer) = (0, vec![0; 64 << 10]);
            loop {
                // More is on its way than the sockets take.
                thread::sleep(Duration::from_millis(5));
                let count = (&reader).read(&mut buffer).unwrap();
                if count == 0 {
                    break;
                }
                let good = buffer[..count]
                    .iter()
                    .zip(position..)
                    .all(|(it, p)| *it == at(p));
                assert!(good, "between {position} and {}", position + count);
                position += count;
                load.done.fetch_add(1, Relaxed);
            }
            assert_eq!(position as u64, sent.load(Relaxed), "octets that came back");
        });
        [echo, write, read]
    }
}

/// What clients do while something happens.
#[derive(Default)]
struct Load {
    over: AtomicBool,
    /// Exchanges that went well.
    done: AtomicU64,
}

impl Load {
    fn is_over(&self) -> bool {
        self.over.load(Relaxed)
    }

    /// Waits for some more of them.
    fn goes_on(&self) {
        let before = self.done.load(Relaxed);
        wait_until("clients are served", || {
            self.done.load(Relaxed) > before + 50
        });
    }
}

/// Ends the load also when a test fails, so that it is reported.
struct End<'a>(&'a Load);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Relaxed);
    }
}

/// Of all publishes.
fn packets(daemon: &Daemon) -> u64 {
    let all = daemon.list().unwrap();
    all.iter().map(|it| it.packets).sum()
}

fn nobody_notices(datapath: Datapath, hand_over: impl Fn(&mut Daemon)) {
    let scene = Scene::new();
    let mut daemon = scene.start(datapath);
    let mut conversations = scene.conversations();
    let load = Load::default();
    thread::scope(|scope| {
        let end = End(&load);
        scope.spawn(|| scene.newcomers(&load));
        scope.spawn(|| scene.datagrams(&load));
        let _stream = scene.stream(scope, &load);
        let talk = scope.spawn(|| {
            while !load.is_over() {
                for conversation in &mut conversations {
                    conversation.ask("still there?").unwrap();
                    load.done.fetch_add(1, Relaxed);
                }
            }
        });
        for _ in 0..3 {
            load.goes_on();
            let before = packets(&daemon);
            hand_over(&mut daemon);
            load.goes_on();
            let after = packets(&daemon);
            if datapath == Datapath::Ebpf {
                assert!(after > before, "{after} packets, and {before} before");
            }
        }
        drop(end);
        assert!(talk.join().is_ok(), "{}", daemon.said());
    });
    for entry in daemon.list().unwrap() {
        assert_eq!(entry.datapath, datapath.name(), "{entry:?}");
    }
    for conversation in &mut conversations {
        conversation.ask("goodbye").unwrap();
    }
    daemon.stop().unwrap();
}

#[test]
fn nobody_notices_a_restart_by_ebpf() {
    nobody_notices(Datapath::Ebpf, |daemon| daemon.hand_over().unwrap());
}

#[test]
fn nobody_notices_a_version_whose_tables_are_laid_out_in_another_way() {
    nobody_notices(Datapath::Ebpf, |daemon| {
        daemon.quit().unwrap();
        let other = lay_out_otherwise(&daemon.pins()).unwrap();
        daemon.restart().unwrap();
        assert!(!other.exists());
        let said = daemon.said();
        assert!(!said.contains("earlier version"), "{said}");
    });
}

#[test]
fn nobody_notices_a_restart_in_user_space() {
    nobody_notices(Datapath::Userland, |daemon| daemon.hand_over().unwrap());
}

#[test]
fn a_restart_loses_no_command() {
    let scene = Scene::new();
    let host = &scene.topology.host;
    let mut daemon = scene.start(Datapath::Userland);
    let instance = daemon.instance().to_owned();
    let load = Load::default();
    let banned = thread::scope(|scope| {
        let end = End(&load);
        let commands = scope.spawn(|| {
            let mut banned: Vec<String> = Vec::new();
            while !load.is_over() {
                let source = format!("10.9.{}.{}", banned.len() / 256, banned.len() % 256);
                let command = ["ban", &source, "--instance", &instance];
                let output = forwarder(host).args(command).output().unwrap();
                assert!(output.status.success(), "{output:?}");
                banned.push(source);
                load.done.fetch_add(1, Relaxed);
            }
            banned
        });
        for _ in 0..3 {
            load.goes_on();
            daemon.hand_over().unwrap();
        }
        load.goes_on();
        drop(end);
        commands.join().unwrap()
    });
    let shown = daemon.control(&["bans", "--json"]).unwrap();
    for source in banned {
        assert!(shown.contains(&format!("\"{source}/32\"")), "{shown}");
    }
    daemon.stop().unwrap();
}

/// A start that fails loses nothing of what it was handed: the next one has it.
fn outlives_a_start_that_fails(
    spoil: impl FnOnce(&Scene, &Daemon) -> Box<dyn FnOnce()>,
    why: &str,
) {
    let scene = Scene::new();
    let mut daemon = scene.start(Datapath::Userland);
    let client = &scene.topology.client;
    let mut conversation = Connection::open(client, scene.frontend(PORT)).unwrap();
    conversation.ask("before").unwrap();
    daemon.quit().unwrap();
    let mend = spoil(&scene, &daemon);
    let failed = format!("{:#}", daemon.restart().unwrap_err());
    assert!(failed.contains(why), "{failed}");
    let waiting = client.enter(|| TcpStream::connect(scene.frontend(PORT)).unwrap());
    let mut command = forwarder(&scene.topology.host);
    command.args(["list", "--instance", daemon.instance()]);
    let mut command = command.stdout(Stdio::null()).spawn().unwrap();
    mend();
    daemon.restart().unwrap();
    assert!(command.wait().unwrap().success());
    conversation.ask("after").unwrap();
    waiting.set_read_timeout(Some(patience())).unwrap();
    (&waiting).write_all(b"hello\n").unwrap();
    assert!((&waiting).read(&mut [0; 64]).unwrap() > 0);
    daemon.stop().unwrap();
}

/// Takes the port as soon as it is free: processes that other tests start have the manager's descriptors until they begin
/// with their programs.
fn taken_by_somebody(host: &Netns) -> UdpSocket {
    let bound = || host.enter(|| UdpSocket::bind(("0.0.0.0", PORT)).ok());
    wait_for("the port is free", bound).unwrap()
}

#[test]
fn conversations_outlive_a_start_that_finds_a_port_taken() {
    outlives_a_start_that_fails(
        |scene, daemon| {
            daemon.manager().unwrap().lose("p2");
            let somebody = taken_by_somebody(&scene.topology.host);
            Box::new(move || drop(somebody))
        },
        "address already in use",
    );
}

#[test]
fn conversations_outlive_a_start_that_cannot_read_its_state() {
    outlives_a_start_that_fails(
        |_, daemon| {
            let state = format!("/var/lib/forwarder/{}.json", daemon.instance());
            let before = std::fs::read(&state).unwrap();
            std::fs::write(&state, "{").unwrap();
            Box::new(move || std::fs::write(&state, before).unwrap())
        },
        ".json",
    );
}

/// What a kill leaves: its own conversations end, but whoever comes waits, and is served.
#[test]
fn who_comes_after_a_kill_waits_for_the_next_process() {
    let scene = Scene::new();
    let mut daemon = scene.start(Datapath::Userland);
    let mut old = Connection::open(&scene.topology.client, scene.frontend(PORT)).unwrap();
    old.ask("before").unwrap();
    daemon.kill().unwrap();
    let waiting = TcpStream::connect;
    let waiting = scene
        .topology
        .client
        .enter(|| waiting(scene.frontend(PORT)));
    let waiting = waiting.unwrap();
    assert!(old.ask("after").is_err());
    daemon.restart().unwrap();
    waiting.set_read_timeout(Some(patience())).unwrap();
    (&waiting).write_all(b"hello\n").unwrap();
    let mut answer = [0; 64];
    let length = (&waiting).read(&mut answer).unwrap();
    assert!(answer[..length].ends_with(b"hello\n"));
    daemon.stop().unwrap();
}

#[test]
fn what_is_taken_back_is_kept_no_more() {
    let scene = Scene::new();
    let mut daemon = scene.start(Datapath::Userland);
    let every = ["p1", "p1", "p2", "p2", "p3", "p3"];
    wait_until("all are kept", || daemon.stored() == every);
    let id = daemon.list().unwrap()[1].id.to_string();
    daemon.control(&["unpublish", &id]).unwrap();
    assert_eq!(daemon.stored(), ["p1", "p1", "p3", "p3"]);
    // The port is free: for somebody else, and for another publish.
    drop(taken_by_somebody(&scene.topology.host));
    // A flag asks for it again, which is another publish.
    daemon.hand_over().unwrap();
    let every = ["p1", "p1", "p3", "p3", "p4", "p4"];
    wait_until("all are kept", || daemon.stored() == every);
    daemon.stop().unwrap();
}

/// Where nobody keeps anything, there is nobody to hand over to.
#[test]
fn without_a_manager_it_ends_as_by_any_other_signal() {
    let mut scene = scene::Scene::tcp().silent().start();
    let pins = scene.daemon.pins();
    assert!(pins.exists());
    scene.daemon.quit().unwrap();
    assert!(!pins.exists());
}

/// Conversations that began in user space stay there, with the source that their backends know, when the next process has the fast
/// path, and the one after that too; who comes new takes it. Without eBPF a wide range has a socket for each port.
fn datagrams_stay_with_the_proxy(family: Family, ports: &str) {
    let scene = Scene::new();
    let backend = SocketAddr::new(scene.topology.backend.address(family), BACKEND_PORT);
    let spec = format!("{ports}:{backend}/udp");
    let host = &scene.topology.host;
    let userland = Datapath::Userland;
    let mut daemon = Daemon::start_as_service(host, &[&spec], userland, &[]).unwrap();
    let frontend = SocketAddr::new(scene.topology.host_address(family), PORT);
    let Topology { client, .. } = &scene.topology;
    let begin = |netns| Client::begin(netns, Protocol::Udp, frontend);
    let mut all = [client, host, &scene.topology.peer.netns].map(begin);
    let seen = all.each_mut().map(|it| it.asks("by the proxy"));
    let machine = scene.topology.client_address(family);
    assert_ne!(seen[0].ip(), machine);
    for number in 0..2 {
        daemon.quit().unwrap();
        let stored = || daemon.stored().contains(&"conversations".into());
        wait_until("all is kept", stored);
        let changed = daemon.restart_with(|words| {
            let place = words.iter().position(|it| it == "userland");
            place.into_iter().for_each(|at| words[at] = "ebpf".into());
        });
        changed.unwrap();
        let payload = format!("after {number}");
        wait_until("newcomers take the fast path", || {
            begin(client).asks("new").ip() == machine
        });
        for (client, seen) in all.iter_mut().zip(seen) {
            assert_eq!(client.asks(&payload), seen);
        }
    }
    daemon.stop().unwrap();
}

#[test]
fn datagrams_of_the_proxy_stay_with_it_when_the_next_process_has_the_fast_path() {
    datagrams_stay_with_the_proxy(Family::V4, &PORT.to_string());
    datagrams_stay_with_the_proxy(Family::V6, &PORT.to_string());
}

#[test]
fn datagrams_to_a_wide_range_stay_with_the_proxy_when_the_next_process_has_the_fast_path() {
    let range = format!("{}-{}", PORT - 100, PORT + 160);
    datagrams_stay_with_the_proxy(Family::V4, &range);
    datagrams_stay_with_the_proxy(Family::V6, &range);
}

/// What the next start asks for has the ports that the process before has left for other publishes of them.
fn has_ports_that_were_held_in_another_way(before: [&str; 2], after: [&str; 2]) {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let scene = Scene::new();
        let backend = scene.topology.backend.address(FAMILY);
        let words = |[ports, datapath]: [&str; 2]| {
            let spec = format!("{ports}:{backend}:{BACKEND_PORT}{}", suffix(protocol));
            [spec, datapath.to_owned()]
        };
        let [before, after] = [words(before), words(after)];
        let datapath = match before[1].as_str() {
            "ebpf" => Datapath::Ebpf,
            _ => Datapath::Userland,
        };
        let host = &scene.topology.host;
        let mut daemon = Daemon::start_as_service(host, &[&before[0]], datapath, &[]).unwrap();
        daemon.quit().unwrap();
        let changed = daemon.restart_with(|words| {
            for word in words {
                if let Some(at) = before.iter().position(|it| it == word) {
                    word.clone_from(&after[at]);
                }
            }
        });
        changed.unwrap_or_else(|error| panic!("{before:?} {after:?}: {error:#}"));
        let answer = ask(
            &scene.topology.client,
            protocol,
            scene.frontend(PORT),
            "new",
        );
        answer.unwrap_or_else(|error| panic!("{before:?} {after:?}: {error:#}"));
        daemon.stop().unwrap();
    }
}

#[test]
fn ports_are_had_that_the_process_before_held_by_other_addresses() {
    let own = format!("198.51.100.2:{PORT}");
    let every = PORT.to_string();
    has_ports_that_were_held_in_another_way([&every, "userland"], [&own, "userland"]);
    has_ports_that_were_held_in_another_way([&own, "ebpf"], [&every, "ebpf"]);
}

/// Systemd before 255 forks for other services, which have copies of all its descriptors until they have closed them.
#[test]
fn ports_are_had_of_which_another_process_has_copies_for_a_moment() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let scene = Scene::new();
        let backend = scene.topology.backend.address(FAMILY);
        let rest = format!("{PORT}:{backend}:{BACKEND_PORT}{}", suffix(protocol));
        let own = format!("198.51.100.2:{rest}");
        let host = &scene.topology.host;
        let mut daemon = Daemon::start_as_service(host, &[&rest], Datapath::Userland, &[]).unwrap();
        daemon.quit().unwrap();
        let copied = daemon
            .manager()
            .unwrap()
            .copy_for(Duration::from_millis(200));
        copied.unwrap();
        let changed = daemon.restart_with(|words| {
            for word in words.iter_mut().filter(|word| **word == rest) {
                word.clone_from(&own);
            }
        });
        changed.unwrap();
        daemon.stop().unwrap();
    }
}

#[test]
fn ports_are_had_that_the_process_before_held_in_another_range() {
    let (every, range) = (PORT.to_string(), format!("{}-{}", PORT - 100, PORT + 160));
    has_ports_that_were_held_in_another_way([&every, "userland"], [&range, "ebpf"]);
    has_ports_that_were_held_in_another_way([&range, "userland"], [&range, "ebpf"]);
    has_ports_that_were_held_in_another_way([&range, "ebpf"], [&range, "userland"]);
    has_ports_that_were_held_in_another_way([&range, "ebpf"], [&every, "ebpf"]);
}
