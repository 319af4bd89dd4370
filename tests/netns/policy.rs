//! Who is kept out, and how much a publish may be used for: bans and limits, with real sockets on both paths.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, SocketAddrV6, TcpStream, UdpSocket},
    process::Stdio,
    time::{Duration, Instant},
};

use forwarder_tests::{
    api,
    daemon::{Daemon, Datapath, forwarder},
    deadline::{patience, slack, wait_for, wait_until},
    document::{Flow, Row},
    netns::Netns,
    topology::{Family, Topology},
    traffic::{Backend, Connection, Protocol, ask},
};
use serde_json::json;

use crate::{
    bulk::there_and_back,
    scene::{BACKEND_PORT, PORT, Scene},
};

const BOTH: [Datapath; 2] = [Datapath::Ebpf, Datapath::Userland];

/// Whether a client is connected soon.
fn connects(netns: &Netns, frontend: SocketAddr) -> bool {
    let connected =
        netns.enter(|| TcpStream::connect_timeout(&frontend, Duration::from_millis(300)));
    let Ok(mut stream) = connected else {
        return false;
    };
    // In user space a client that is not served is reset after it was accepted.
    stream
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    stream.write_all(b"hello\n").is_ok() && stream.read(&mut [0; 64]).is_ok_and(|count| count > 0)
}

fn a_banned_source_gets_nothing(family: Family, protocol: Protocol) {
    for datapath in BOTH {
        let scene = Scene::of(family, protocol).by(datapath).start();
        let (topology, daemon) = scene.parts();
        let frontend = scene.frontend();
        scene.ask("hello").unwrap();
        let mut open = (protocol == Protocol::Tcp).then(|| {
            let mut open = scene.connect();
            open.ask("before").unwrap();
            open
        });
        let client = topology.client_address(family).to_string();
        daemon.control(&["ban", &client, "192.0.2.0/24"]).unwrap();
        // The answer comes after that.
        let flows: Vec<Flow> = daemon.document(&["flows"]).unwrap();
        assert!(flows.is_empty(), "{flows:?}");
        if let Some(open) = &mut open {
            wait_for("the end of what it had", || open.ask("after").err()).unwrap();
        }
        if protocol == Protocol::Tcp {
            assert!(!connects(&topology.client, frontend), "{datapath:?}");
        }
        let reason = if datapath == Datapath::Ebpf {
            "banned"
        } else {
            "userland_banned"
        };
        if protocol == Protocol::Udp {
            forwarder_tests::traffic::send_datagram(&topology.client, frontend, "hello").unwrap();
            wait_until("the datagram is refused", || {
                daemon.counted(reason).unwrap() > 0
            });
        }
        assert!(daemon.counted(reason).unwrap() > 0);
        // Others go on.
        ask(&topology.host, protocol, frontend, "this host").unwrap();
        daemon.control(&["unban", &client]).unwrap();
        scene.ask("hello").unwrap();
        let bans = daemon.control(&["bans", "--json"]).unwrap();
        assert!(
            bans.contains("192.0.2.0/24") && !bans.contains(&client),
            "{bans}"
        );
        scene.stop();
    }
}

#[test]
fn a_banned_source_gets_nothing_by_tcp() {
    a_banned_source_gets_nothing(Family::V4, Protocol::Tcp);
}

#[test]
fn a_banned_source_gets_nothing_by_tcp_over_ipv6() {
    a_banned_source_gets_nothing(Family::V6, Protocol::Tcp);
}

#[test]
fn a_banned_source_gets_nothing_by_udp() {
    a_banned_source_gets_nothing(Family::V4, Protocol::Udp);
}

/// A backend that goes on sending is heard by a banned source no more, as its flow has ended.
fn a_banned_source_hears_no_more(datapath: Datapath, drains: bool) {
    let scene = Scene::udp().silent().by(datapath).start();
    let (topology, daemon) = scene.parts();
    let bind = |netns: &Netns, address: (IpAddr, u16)| {
        let socket = netns.enter(|| UdpSocket::bind(address)).unwrap();
        socket.set_read_timeout(Some(patience())).unwrap();
        socket
    };
    let backend = &topology.backend;
    let server = bind(&backend.netns, (backend.address(Family::V4), BACKEND_PORT));
    let client = bind(&topology.client, (topology.client_address(Family::V4), 0));
    client.connect(scene.frontend()).unwrap();
    let mut buffer = [0; 64];
    client.send(b"first").unwrap();
    let (_, source) = server.recv_from(&mut buffer).unwrap();
    server.send_to(b"answer", source).unwrap();
    client.recv(&mut buffer).unwrap();
    if drains {
        daemon.control(&["unpublish", "1", "--drain"]).unwrap();
        server.send_to(b"drains", source).unwrap();
        client.recv(&mut buffer).unwrap();
    }
    let banned = topology.client_address(Family::V4).to_string();
    daemon.control(&["ban", &banned]).unwrap();
    wait_until("its flow has ended", || {
        server.send_to(b"more", source).unwrap();
        client
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        client.recv(&mut buffer).is_err()
    });
    // Nor is it heard.
    server
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    for _ in 0..3 {
        let _ = client.send(b"hello?"); // a refusal of before is told now
        assert!(server.recv_from(&mut buffer).is_err());
    }
    let flows: Vec<Flow> = daemon.document(&["flows"]).unwrap();
    assert!(flows.is_empty(), "{flows:?}");
    scene.stop();
}

#[test]
fn a_banned_source_hears_no_more_of_a_backend_that_goes_on_sending() {
    for datapath in BOTH {
        a_banned_source_hears_no_more(datapath, false);
        a_banned_source_hears_no_more(datapath, true);
    }
}

#[test]
fn a_source_is_banned_from_one_publish() {
    for (datapath, family) in BOTH.into_iter().zip([Family::V6, Family::V4]) {
        let topology = Topology::new().unwrap();
        let backend = SocketAddr::new(topology.backend.address(family), BACKEND_PORT);
        let specs = [PORT, 9090].map(|port| format!("{port}:{backend}"));
        let host = topology.host_address(family);
        let [barred, free] = [PORT, 9090].map(|port| SocketAddr::new(host, port));
        let scene = Scene::of(family, Protocol::Tcp).publishing(&specs[1..]);
        let scene = scene.by(datapath).with_state().start_in(topology);
        let Scene {
            backends: _backends,
            topology,
            mut daemon,
            ..
        } = scene;
        daemon.control(&["publish", &specs[0]]).unwrap();
        let open = |frontend| {
            let mut open = Connection::open(&topology.client, frontend).unwrap();
            open.ask("before").unwrap();
            open
        };
        let (mut ended, mut going) = (open(barred), open(free));
        let client = topology.client_address(family).to_string();
        let unknown = daemon.control(&["ban", &client, "--publish", "7:192.0.2.1:80"]);
        let error = unknown.unwrap_err().to_string();
        assert!(error.contains("7:192.0.2.1:80"), "{error}");
        daemon
            .control(&["ban", &client, "--publish", &specs[0]])
            .unwrap();
        wait_for("the end of what it had", || ended.ask("after").err()).unwrap();
        going.ask("after").unwrap();
        let is_kept_out = |what: &str| {
            assert!(!connects(&topology.client, barred), "{datapath:?} {what}");
            assert!(connects(&topology.client, free), "{datapath:?} {what}");
            let others = ask(&topology.host, Protocol::Tcp, barred, "this host");
            others.unwrap();
        };
        is_kept_out("at once");
        let list = daemon.list().unwrap();
        let is_barred = |row: &&Row| row.owner == "cli" && row.frontend.port == PORT;
        let id = list.iter().find(is_barred).unwrap().id.to_string();
        let shown = daemon.control(&["bans"]).unwrap();
        let row = shown.lines().nth(1).unwrap();
        assert_eq!(row.split_whitespace().nth(1), Some(&id[..]), "{shown}");
        // Another backend, in place.
        let body = json!([{"address": backend.ip(), "port": BACKEND_PORT + 1}]);
        let path = format!("/v1/publishes/{id}/backends");
        let other = Backend::start(&topology.backend.netns, Protocol::Tcp, BACKEND_PORT + 1);
        let answer = api::ask(&daemon, "PUT", &path, &body.to_string()).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        let _other = other.unwrap();
        is_kept_out("with another backend");
        daemon.kill().unwrap();
        daemon.restart().unwrap();
        is_kept_out("after a kill");
        // What is banned from all is another ban.
        daemon.control(&["ban", &client]).unwrap();
        assert!(!connects(&topology.client, free));
        daemon.control(&["unban", &client]).unwrap();
        is_kept_out("after another ban");
        let other = SocketAddr::new(backend.ip(), BACKEND_PORT + 1);
        let spec = format!("{PORT}:{other}");
        daemon
            .control(&["unban", &client, "--publish", &spec])
            .unwrap();
        assert!(connects(&topology.client, barred), "{datapath:?}");
        // It goes with its publish.
        daemon
            .control(&["ban", &client, "--publish", &id, "--for", "1h"])
            .unwrap();
        daemon.control(&["unpublish", &id]).unwrap();
        wait_until("the end of the ban", || {
            let bans = daemon.control(&["bans", "--json"]).unwrap();
            bans.trim() == "[]"
        });
        daemon.control(&["publish", &specs[0]]).unwrap();
        assert!(connects(&topology.client, barred), "{datapath:?}");
        daemon.stop().unwrap();
    }
}

/// As fail2ban's jails ban the same source for different times.
#[test]
fn a_source_is_kept_out_until_the_last_of_its_owners_lets_it_in() {
    for datapath in BOTH {
        let scene = Scene::tcp().by(datapath).with_state().start();
        let Scene {
            backends: _backends,
            topology,
            mut daemon,
            ..
        } = scene;
        let frontend = SocketAddr::new(topology.host_address(Family::V4), PORT);
        let client = topology.client_address(Family::V4).to_string();
        let is_served = || connects(&topology.client, frontend);
        let ban = |daemon: &Daemon, owner: &str, time: &[&str]| {
            let words = [&["ban", &client, "--owner", owner], time].concat();
            daemon.control(&words).unwrap();
        };
        ban(&daemon, "fail2ban:recidive", &["--for", "1h"]);
        ban(&daemon, "fail2ban:sshd", &["--for", "1s"]);
        wait_until("the end of the shorter ban", || {
            !daemon.control(&["bans"]).unwrap().contains("sshd")
        });
        assert!(!is_served(), "{datapath:?}");
        ban(&daemon, "fail2ban:sshd", &[]);
        daemon.kill().unwrap();
        daemon.restart().unwrap();
        let unban = |owner: &str| daemon.control(&["unban", &client, "--owner", owner]);
        unban("fail2ban:sshd").unwrap();
        assert!(!is_served(), "{datapath:?}");
        let error = unban("fail2ban:sshd").unwrap_err().to_string();
        assert!(error.contains("is not banned by fail2ban:sshd"), "{error}");
        unban("fail2ban:recidive").unwrap();
        assert!(is_served(), "{datapath:?}");
        // Who names no owner lets it in, whoever has banned it.
        ban(&daemon, "fail2ban:sshd", &[]);
        ban(&daemon, "crowdsec", &[]);
        daemon.control(&["unban", &client]).unwrap();
        assert!(is_served(), "{datapath:?}");
        daemon.stop().unwrap();
    }
}

#[test]
fn datagrams_of_a_source_are_kept_from_one_publish() {
    for datapath in BOTH {
        for family in [Family::V4, Family::V6] {
            let topology = Topology::new().unwrap();
            let backend = SocketAddr::new(topology.backend.address(family), BACKEND_PORT);
            let specs = [PORT, 9090].map(|port| format!("{port}:{backend}/udp"));
            let scene = Scene::of(family, Protocol::Udp).publishing(&specs);
            let scene = scene.by(datapath).start_in(topology);
            let (topology, daemon) = scene.parts();
            let served = |port| {
                let frontend = SocketAddr::new(topology.host_address(family), port);
                ask(&topology.client, Protocol::Udp, frontend, "hello").is_ok()
            };
            assert!(served(PORT) && served(9090));
            let client = topology.client_address(family).to_string();
            let ban = |what| {
                let words = [what, client.as_str(), "--publish", &specs[0]];
                daemon.control(&words).unwrap();
            };
            ban("ban");
            assert!(!served(PORT), "{datapath:?} {family:?}");
            assert!(served(9090), "{datapath:?} {family:?}");
            ban("unban");
            assert!(served(PORT), "{datapath:?} {family:?}");
            scene.stop();
        }
    }
}

#[test]
fn a_change_of_bans_that_cannot_be_written_to_disk_is_none() {
    for datapath in BOTH {
        let scene = Scene::tcp().by(datapath).with_state().start();
        let (topology, daemon) = scene.parts();
        let client = topology.client_address(Family::V4).to_string();
        let is_banned = || {
            let bans = daemon.control(&["bans", "--json"]).unwrap();
            let is_served = connects(&topology.client, scene.frontend());
            assert_eq!(bans.contains(&client), !is_served, "{datapath:?}: {bans}");
            !is_served
        };
        // A directory that has the file's name.
        let file = format!("/var/lib/forwarder/{}.bans", daemon.instance());
        std::fs::create_dir(&file).unwrap();
        let banned = daemon.control(&["ban", &client]);
        std::fs::remove_dir(&file).unwrap();
        let error = banned.unwrap_err().to_string();
        assert!(error.contains(&file), "{error}");
        assert!(!std::path::Path::new(&format!("{file}.new")).exists());
        assert!(!is_banned());
        daemon.control(&["ban", &client]).unwrap();
        assert!(is_banned());
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        let unbanned = daemon.control(&["unban", &client]);
        std::fs::remove_dir(&file).unwrap();
        let error = unbanned.unwrap_err().to_string();
        assert!(error.contains(&file), "{error}");
        assert!(is_banned());
        daemon.control(&["unban", &client]).unwrap();
        assert!(!is_banned());
        scene.stop();
    }
}

#[test]
fn bans_are_taken_as_a_list_end_by_themselves_and_outlive_a_kill() {
    let mut scene = Scene::tcp().with_state().start();
    let connects = |scene: &Scene| connects(&scene.topology.client, scene.frontend());
    let client = scene.topology.client_address(Family::V4).to_string();
    let ban = |list: &str, expected: bool| {
        let mut command = forwarder(&scene.topology.host);
        let instance = scene.daemon.instance();
        command.args(["ban", "--file", "-", "--instance", instance]);
        let mut child = command
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(list.as_bytes())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.success(), expected, "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let error = ban("198.51.100.0/24\nnonsense\n", false);
    assert!(
        error.contains("-:2:") && error.contains("nonsense"),
        "{error}"
    );
    assert!(connects(&scene), "nothing of the list is in force");
    ban(
        &format!("# a list\n{client}  # this one\n\n2001:db8::/32\n"),
        true,
    );
    assert!(!connects(&scene));
    scene.daemon.kill().unwrap();
    assert!(!connects(&scene), "while it is dead");
    scene.daemon.restart().unwrap();
    assert!(!connects(&scene), "after a kill");
    let bans = api::ask(&scene.daemon, "GET", "/v1/bans", "").unwrap().body;
    assert_eq!(bans.as_array().unwrap().len(), 2, "{bans}");
    // In their place, and for a moment.
    let until = std::time::SystemTime::now() + Duration::from_secs(3);
    let until = until
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let body = json!([{"network": format!("{client}/32"), "until": until}]).to_string();
    assert_eq!(
        api::ask(&scene.daemon, "PUT", "/v1/bans", &body)
            .unwrap()
            .status,
        204
    );
    assert!(!connects(&scene));
    wait_for("the end of the ban", || connects(&scene).then_some(())).unwrap();
    assert_eq!(
        scene.daemon.control(&["bans", "--json"]).unwrap().trim(),
        "[]"
    );
    scene.stop();
}

/// A host with one publish of these flags.
fn limited(datapath: Datapath, flags: &[&str]) -> Scene {
    let scene = Scene::tcp().idle().by(datapath).start();
    let words = [&["publish", scene.spec()], flags].concat();
    scene.daemon.control(&words).unwrap();
    scene
}

#[test]
fn no_more_flows_at_once_than_were_asked_for() {
    for (datapath, reason) in BOTH
        .into_iter()
        .zip(["too_many_flows", "userland_flow_limit"])
    {
        let scene = limited(datapath, &["--max-flows", "2"]);
        let (topology, daemon) = scene.parts();
        assert_eq!(daemon.entry().unwrap().max_flows, Some(2));
        let mut open = [(); 2].map(|()| scene.connect());
        for connection in &mut open {
            connection.ask("served").unwrap();
        }
        assert!(
            !connects(&topology.client, scene.frontend()),
            "{datapath:?}"
        );
        assert!(daemon.counted(reason).unwrap() > 0);
        for connection in &mut open {
            connection.ask("still served").unwrap();
        }
        scene.stop();
    }
}

#[test]
fn no_more_new_flows_a_second_than_were_asked_for() {
    let reasons = [
        "rate_limited",
        "userland_rate_limited",
        "source_rate_limited",
        "userland_source_rate_limited",
    ];
    let flags = ["--rate", "--rate-per-source"];
    for (at, reason) in reasons.into_iter().enumerate() {
        let scene = limited(BOTH[at % 2], &[flags[at / 2], "1/s"]);
        let (client, frontend) = (&scene.topology.client, scene.frontend());
        // Five may begin at once.
        let served = (0..10).filter(|_| connects(client, frontend)).count();
        assert!((5..10).contains(&served), "{reason}: {served}");
        assert!(scene.daemon.counted(reason).unwrap() > 0, "{reason}");
        scene.stop();
    }
}

#[test]
fn clients_come_by_the_interface_that_was_asked_for() {
    for datapath in BOTH {
        let scene = Scene::tcp().idle().by(datapath).start();
        let (topology, daemon) = scene.parts();
        let on = |device| daemon.control(&["publish", scene.spec(), "--on", device]);
        let error = on("none0").unwrap_err().to_string();
        assert!(error.contains("no interface \"none0\""), "{error}");
        on("lo").unwrap();
        let local = SocketAddr::new(Family::V4.localhost(), PORT);
        assert!(connects(&topology.host, local), "{datapath:?}");
        let outside = scene.frontend();
        assert!(!connects(&topology.client, outside), "{datapath:?}");
        scene.stop();
    }
}

/// A pair of devices between the host and another network namespace. Each has addresses of both families.
fn pair(host: &Netns, far: &Netns) {
    let both = format!(
        "link add again0 type veth peer name far0 netns {}",
        far.path()
    );
    let addresses = |device, last| {
        format!(
            "link set {device} up\n\
             addr add 192.0.2.{last}/24 dev {device}\n\
             addr add fe80::{last}/64 dev {device} nodad\n"
        )
    };
    host.ip(&format!("{both}\n{}", addresses("again0", 1)))
        .unwrap();
    let way = "route add default via 192.0.2.1";
    far.ip(&format!("{}{way}", addresses("far0", 2))).unwrap();
}

/// As a tunnel or PPP does when it was down.
#[test]
fn an_interface_that_comes_back_as_another_device_is_the_one_that_was_asked_for() {
    for datapath in BOTH {
        let scene = Scene::tcp().idle().by(datapath).start();
        let (topology, daemon) = scene.parts();
        let (host, far) = (&topology.host, Netns::new("far").unwrap());
        let frontend = SocketAddr::from(([192, 0, 2, 1], PORT));
        pair(host, &far);
        let on = ["publish", scene.spec(), "--on", "again0"];
        daemon.control(&on).unwrap();
        wait_until("clients by it", || connects(&far, frontend));
        host.ip("link delete again0").unwrap();
        pair(host, &far);
        wait_until("clients by the new one", || connects(&far, frontend));
        assert!(
            !connects(&topology.client, scene.frontend()),
            "{datapath:?}"
        );
        let local = SocketAddr::new(Family::V4.localhost(), PORT);
        assert!(!connects(host, local), "{datapath:?}");
        scene.stop();
    }
}

#[test]
fn a_link_local_address_is_served_on_the_device_that_comes_back() {
    let scene = Scene::of(Family::V6, Protocol::Tcp).and_udp();
    let scene = scene.by(Datapath::Userland).idle().start();
    let (topology, daemon) = scene.parts();
    let (host, far) = (&topology.host, Netns::new("far").unwrap());
    let backend = SocketAddr::new(topology.backend.address(Family::V6), BACKEND_PORT);
    pair(host, &far);
    for protocol in ["tcp", "udp"] {
        let spec = format!("[fe80::1%again0]:{PORT}:{backend}/{protocol}");
        daemon.control(&["publish", &spec]).unwrap();
    }
    let is_served = || {
        let scope = far.enter(|| nix::net::if_::if_nametoindex("far0").unwrap());
        let address = "fe80::1".parse().unwrap();
        let frontend = SocketAddr::from(SocketAddrV6::new(address, PORT, 0, scope));
        let ask = |protocol| ask(&far, protocol, frontend, "hello");
        connects(&far, frontend) && ask(Protocol::Udp).is_ok()
    };
    wait_until("clients by it", is_served);
    host.ip("link delete again0").unwrap();
    pair(host, &far);
    wait_until("clients by the new one", is_served);
    scene.stop();
}

#[test]
fn bandwidth_is_what_was_asked_for_in_user_space() {
    let scene = limited(Datapath::Userland, &["--bandwidth", "8Mbit"]);
    let mut connection = scene.connect();
    let payload = "x".repeat(32 << 10);
    let begun = Instant::now();
    // 1.25 MiB there, of which a fifth may come at once, and the same back.
    for _ in 0..40 {
        connection.ask(&payload).unwrap();
    }
    let elapsed = begun.elapsed().as_secs_f64();
    assert!(elapsed > 0.8, "{elapsed} s for what takes 1.0");
    scene.stop();
}

#[test]
fn tcp_has_the_bandwidth_that_was_asked_for() {
    let scene = Scene::tcp().silent().idle().start();
    let words = ["publish", scene.spec(), "--bandwidth", "200Mbit"];
    scene.daemon.control(&words).unwrap();
    let topology = &scene.topology;
    for (client, host) in [
        (&topology.client, topology.host_address(Family::V4)),
        (&topology.host, Family::V4.localhost()),
    ] {
        // Other work on the machine may take from one try, and from the next.
        let in_time = (0..3).any(|_| {
            let begun = Instant::now();
            there_and_back(&topology.backend.netns, client, host);
            let elapsed = begun.elapsed();
            let least = Duration::from_millis(2000);
            assert!(least < elapsed, "{elapsed:?} for what takes 2.5 s");
            elapsed < 4 * slack()
        });
        assert!(in_time, "more than {:?} for what takes 2.5 s", 4 * slack());
    }
    scene.stop();
}
