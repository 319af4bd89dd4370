//! The control API as programs use it: owners, leases, changes in place, and requests that are wrong.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::AsFd as _,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use forwarder_tests::{
    api::{self, Open},
    daemon::{Daemon, Datapath},
    deadline::wait_until,
    topology::{Container, Family, Topology},
    traffic::{Connection, Protocol, ask, ask_by},
};
use serde_json::{Value, json};

use crate::scene::{BACKEND_PORT, PORT, Scene, frontend, spec};

/// A host with an instance that has published nothing.
fn idle(datapath: Datapath) -> (Topology, Daemon) {
    let scene = Scene::tcp().silent().idle().by(datapath).start();
    (scene.topology, scene.daemon)
}

fn ids(daemon: &Daemon) -> Vec<u64> {
    let list = daemon.list().unwrap();
    list.iter().map(|row| row.id).collect()
}

#[test]
fn a_wrong_request_is_a_problem_with_a_remedy_or_a_name() {
    let (_topology, daemon) = idle(Datapath::Userland);
    let good = r#"["8080:172.31.0.2:80"]"#;
    for (method, path, body, status, part) in [
        ("GET", "/v2/publishes", "", 404, "no such call"),
        ("PATCH", "/v1/publishes", "", 405, "takes no PATCH"),
        ("POST", "/v1/publishes", "nonsense", 422, "expected"),
        ("POST", "/v1/publishes", "{}", 422, "expected a sequence"),
        (
            "POST",
            "/v1/publishes",
            r#"[{"spec": "80:10.0.0.2:80", "alow": []}]"#,
            422,
            "`alow`",
        ),
        ("POST", "/v1/publishes", r#"["80"]"#, 422, "HOST_PORT"),
        (
            "POST",
            "/v1/publishes",
            r#"[{"spec": "80:10.0.0.2:80/udp", "proxy_protocol": "v1"}]"#,
            422,
            "take version 2",
        ),
        (
            "POST",
            "/v1/publishes",
            r#"[{"spec": "80:10.0.0.2:80/sctp", "proxy_protocol": "v2"}]"#,
            422,
            "of TCP and UDP alone",
        ),
        ("POST", "/v1/publishes?ower=me", good, 400, "`ower`"),
        ("PUT", "/v1/owners/a%20b", good, 422, "a b"),
        ("GET", "/v1/publishes/7", "", 404, "`forwarder list`"),
        ("GET", "/v1/publishes/x", "", 400, "`x`"),
        ("DELETE", "/v1/publishes/%ff", "", 400, "UTF-8"),
        ("GET", "/v1/publishes?x=1", "", 400, "unknown field `x`"),
        ("GET", "/v1/stats?x=1", "", 400, "unknown field `x`"),
        ("GET", "/metrics?x=1", "", 400, "unknown field `x`"),
        ("GET", "/v1/openapi.json?x=1", "", 400, "unknown field `x`"),
        ("PUT", "/v1/owners/me?owner=you", good, 400, "`owner`"),
        ("PUT", "/v1/owners/lease:1", good, 403, "choose another"),
        (
            "POST",
            "/v1/publishes?owner=lease:1",
            good,
            403,
            "choose another",
        ),
        (
            "POST",
            "/v1/publishes",
            r#"[{"spec": "80:10.0.0.2:80", "max_flows": 0}]"#,
            422,
            "nonzero",
        ),
        (
            "POST",
            "/v1/publishes",
            r#"[{"spec": "80:10.0.0.2:80", "rate": "x"}]"#,
            422,
            r#""remedy":"1000/s is one""#,
        ),
        ("GET", "/v1/flows?publish=7", "", 404, "no publish 7"),
        ("DELETE", "/v1/flows?publish=7", "", 404, "no publish 7"),
        ("GET", "/v1/bans/192.0.2.7", "", 404, "is not banned"),
        ("DELETE", "/v1/bans/192.0.2.7", "", 404, "is not banned"),
        ("POST", "/v1/unban", r#"["x"]"#, 422, "is not a network"),
        ("DELETE", "/v1/publishes/7", "", 404, "`forwarder list`"),
        (
            "POST",
            "/v1/unpublish",
            r#"{"publishes": [7]}"#,
            404,
            "no publish 7",
        ),
        ("DELETE", "/v1/flows", "", 400, "name a publish"),
        ("POST", "/v1/reload", "", 422, "--config"),
        ("POST", "/v1/reload", r#"{"file": 1}"#, 422, "`file`"),
        (
            "DELETE",
            "/v1/owners/me",
            r#"{"ending": 1}"#,
            422,
            "`ending`",
        ),
        (
            "DELETE",
            "/v1/bans",
            r#"["192.0.2.7"]"#,
            422,
            "takes no body",
        ),
        ("GET", "/v1/publishes", r#"{"id": 7}"#, 422, "`id`"),
        ("GET", "/v1/stats", "nonsense", 422, "takes no body"),
        ("GET", "/v1/trace", r#"{"id": 7}"#, 422, "`id`"),
    ] {
        let answer = api::ask(&daemon, method, path, body).unwrap();
        let text = answer.body.to_string();
        assert_eq!(answer.status, status, "{method} {path} {body}: {text}");
        assert_eq!(answer.kind, "application/problem+json", "{method} {path}");
        assert!(text.contains(part), "{method} {path} {body}: {text}");
        assert!(answer.body["title"].is_string() && answer.body["detail"].is_string());
    }
    let endless = vec![b' '; 17 << 20];
    let mut request = api::text("POST", "/v1/publishes", "").replace(": 0", ": 17825792");
    request.push_str(std::str::from_utf8(&endless).unwrap());
    assert_eq!(
        api::send(&daemon.socket(), request.as_bytes())
            .unwrap()
            .status,
        413
    );
    assert_eq!(
        api::send(&daemon.socket(), b"\xff\xfe\n\n").unwrap().status,
        400
    );
    assert!(daemon.list().unwrap().is_empty());
    daemon.stop().unwrap();
}

#[test]
fn a_request_that_ends_in_its_midst_is_wrong_and_not_too_long() {
    let (_topology, daemon) = idle(Datapath::Userland);
    let request = api::text("POST", "/v1/bans", "[]").replace(": 2", ": 20");
    let answer = api::send(&daemon.socket(), request.as_bytes()).unwrap();
    assert_eq!(answer.status, 400, "{}", answer.body);
}

#[test]
fn bans_are_changed_one_by_one_and_as_lists() {
    let (topology, daemon) = idle(Datapath::Ebpf);
    let ask = |method: &str, path: &str, body: &str| {
        let answer = api::ask(&daemon, method, path, body).unwrap();
        (answer.status, answer.body)
    };
    let later = r#"{"until": 4102444800}"#;
    assert_eq!(ask("PUT", "/v1/bans/192.0.2.1", later).0, 204);
    let ban = json!({"network": "192.0.2.1/32", "until": 4_102_444_800_u64});
    assert_eq!(ask("GET", "/v1/bans/192.0.2.1", ""), (200, ban));
    assert_eq!(ask("PUT", "/v1/bans/192.0.2.1?until=1", later).0, 400);
    assert_eq!(ask("PUT", "/v1/bans/192.0.2.1", r#"{"for": 1}"#).0, 422);
    // A time that no clock gets to.
    let path = format!("/v1/bans/192.0.2.1?until={}", u64::MAX);
    assert_eq!(ask("PUT", &path, "").0, 204);
    assert_eq!(
        ask("GET", "/v1/bans/192.0.2.1", ""),
        (200, json!({"network": "192.0.2.1/32"}))
    );
    let long = format!(
        r#"[{{"network": "192.0.2.2"}}, {{"network": "198.51.100.0/24"}}{}]"#,
        " ".repeat(17 << 20)
    );
    assert_eq!(ask("POST", "/v1/bans", &long).0, 204);
    // All or none.
    let some = r#"["192.0.2.2", "203.0.113.1"]"#;
    assert_eq!(ask("POST", "/v1/unban", some).0, 404);
    assert_eq!(ask("GET", "/v1/bans/192.0.2.2", "").0, 200);
    let some = r#"["192.0.2.2/32", "192.0.2.2", "198.51.100.7/24"]"#;
    assert_eq!(ask("POST", "/v1/unban", some).0, 204);
    let left = ask("GET", "/v1/bans", "").1;
    assert_eq!(left, json!([{"network": "192.0.2.1/32"}]));
    // From one publish, by its number or its SPEC.
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    daemon.control(&["publish", &spec]).unwrap();
    let id = &json!(ids(&daemon)[0]);
    let of_it = json!([{"network": "192.0.2.1/32"}, {"network": "192.0.2.1/32", "publish": id}]);
    for named in [id, &json!(spec)] {
        let body = json!([{"network": "192.0.2.1", "publish": named}]).to_string();
        assert_eq!(ask("POST", "/v1/bans", &body).0, 204);
        assert_eq!(ask("GET", "/v1/bans", ""), (200, of_it.clone()));
        let one = format!("/v1/bans/192.0.2.1?publish={id}");
        assert_eq!(ask("GET", &one, ""), (200, of_it[1].clone()));
        let name = named.to_string().replace('"', "");
        let path = format!("/v1/unban?publish={name}");
        assert_eq!(ask("POST", &path, r#"["192.0.2.1"]"#).0, 204);
        assert_eq!(ask("GET", &one, "").0, 404);
        let one = format!("/v1/bans/192.0.2.1?publish={name}");
        assert_eq!(ask("PUT", &one, "").0, 204);
        assert_eq!(ask("DELETE", &one, "").0, 204);
    }
    let unknown = r#"[{"network": "192.0.2.1", "publish": 77}]"#;
    assert_eq!(ask("POST", "/v1/bans", unknown).0, 404);
    assert_eq!(ask("GET", "/v1/bans", ""), (200, json!([of_it[0]])));
    assert_eq!(ask("DELETE", "/v1/bans", "").0, 204);
    assert_eq!(ask("GET", "/v1/bans", ""), (200, json!([])));
}

#[test]
fn a_port_that_somebody_has_is_refused_with_that_process() {
    let (topology, daemon) = idle(Datapath::Userland);
    let _holder = topology
        .host
        .enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))
        .unwrap();
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let error = daemon.control(&["publish", &spec]).unwrap_err().to_string();
    let pid = std::process::id();
    let named = format!("publish 0.0.0.0:{PORT}/tcp: address already in use (held by pid {pid}, ");
    assert!(error.contains(&named), "{error}");
}

#[test]
fn a_number_that_is_no_publishs_is_refused_where_nothing_would_be_seen() {
    let (_topology, daemon) = idle(Datapath::Userland);
    for words in [&["trace", "7"][..], &["flows", "--publish", "7"]] {
        let error = daemon.control(words).unwrap_err().to_string();
        assert!(error.contains("no publish 7; `forwarder list`"), "{error}");
    }
}

#[test]
fn two_requests_on_one_connection_are_both_answered() {
    let (_topology, daemon) = idle(Datapath::Userland);
    let mut stream = api::connect(&daemon.socket()).unwrap();
    let request = "GET /v1/publishes HTTP/1.1\r\nHost: forwarder\r\n\r\n";
    stream.write_all(request.repeat(2).as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("200 OK").count(), 2, "{text}");
    daemon.stop().unwrap();
}

#[test]
fn an_owner_states_all_that_it_wants() {
    let (_topology, daemon) = idle(Datapath::Auto);
    let put = |owner: &str, body: Value| {
        api::ask(
            &daemon,
            "PUT",
            &format!("/v1/owners/{owner}"),
            &body.to_string(),
        )
        .unwrap()
    };
    let answer = put(
        "cni:net/0a/eth0",
        json!(["8080:172.31.0.2:80", "8081:172.31.0.2:81"]),
    );
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.body[0]["owner"], "cni:net/0a/eth0");
    assert_eq!(put("docker:web", json!(["8082:172.31.0.2:82"])).status, 200);
    let answer = put(
        "cni:net/0a/eth0",
        json!(["8083:172.31.0.2:83", {"spec": "8081:172.31.0.3:81", "allow": ["10.0.0.0/8"]}]),
    );
    assert_eq!(answer.body[1]["id"], 2, "changed in place: {answer:?}");
    assert_eq!(answer.body[1]["backend"]["address"], "172.31.0.3");
    assert_eq!(ids(&daemon), [2, 3, 4]);
    // The same again changes nothing, and what is another's is refused by its name.
    let before = daemon.list().unwrap();
    put(
        "cni:net/0a/eth0",
        json!(["8083:172.31.0.2:83", {"spec": "8081:172.31.0.3:81", "allow": ["10.0.0.0/8"]}]),
    );
    let answer = put("cni:net/0a/eth0", json!(["8082:172.31.0.9:82"]));
    assert_eq!(answer.status, 409, "{answer:?}");
    assert!(answer.body.to_string().contains("docker:web"), "{answer:?}");
    for request in [&["unpublish", "3"][..], &["publish", "8082:172.31.0.9:82"]] {
        let error = daemon.control(request).unwrap_err().to_string();
        assert!(error.contains("docker:web"), "{error}");
    }
    assert_eq!(daemon.list().unwrap(), before);
    daemon
        .control(&["unpublish", "3", "--owner", "docker:web"])
        .unwrap();
    assert_eq!(
        api::ask(&daemon, "DELETE", "/v1/owners/cni:net/0a/eth0", "")
            .unwrap()
            .status,
        204
    );
    assert!(daemon.list().unwrap().is_empty());
    daemon.stop().unwrap();
}

#[test]
fn any_owners_name_can_be_typed() {
    let (_topology, daemon) = idle(Datapath::Userland);
    let spec = "8080:172.31.0.2:80";
    let owner = ["--owner", "team-a@host/x+y:z"];
    let with_owner = |words: &[&str]| daemon.control(&[words, &owner].concat()).unwrap();
    with_owner(&["publish", spec]);
    assert_eq!(daemon.entry().unwrap().owner, owner[1]);
    with_owner(&["unpublish", spec]);
    daemon.stop().unwrap();
}

/// A lease on one port, with the row that it was answered with.
fn leased(daemon: &Daemon, spec: &str, listener: Option<&TcpListener>) -> (Open, Value) {
    let body = json!([spec]).to_string();
    let descriptors: Vec<_> = listener.into_iter().map(|it| it.as_fd()).collect();
    let mut open = api::open(daemon, "POST", "/v1/leases", &body, &descriptors).unwrap();
    let (status, _) = open.head().unwrap();
    let line = open.line().unwrap();
    assert_eq!(status, 201, "{line}");
    (open, line[0].clone())
}

#[test]
fn a_lease_lasts_as_long_as_its_connection() {
    let (topology, daemon) = idle(Datapath::Auto);
    let spec = spec(&topology.backend, Family::V4, Protocol::Tcp);
    let (lease, row) = leased(&daemon, &spec, None);
    assert_eq!(row["owner"], "lease:1", "{row}");
    let (other, _) = leased(&daemon, "9090:172.31.0.2:80", None);
    assert_eq!(ids(&daemon).len(), 2);
    drop(lease);
    wait_until("the end of the lease", || ids(&daemon) == [2]);
    let frontend = frontend(&topology, Family::V4);
    assert!(ask(&topology.client, Protocol::Tcp, frontend, "hello").is_err());
    drop(other);
    daemon.stop().unwrap();
}

fn a_lease_serves_a_given_listener(datapath: Datapath) {
    let scene = Scene::tcp().idle().by(datapath).start();
    let (topology, daemon) = scene.parts();
    // As Docker does it: somebody else has bound the port, and hands the socket on.
    let bound = (Ipv4Addr::UNSPECIFIED, PORT);
    let listener = topology.host.enter(|| TcpListener::bind(bound)).unwrap();
    let spec = format!("0.0.0.0:{}", scene.spec());
    let (lease, row) = leased(daemon, &spec, Some(&listener));
    let is_userland = datapath == Datapath::Userland;
    let served_by = if is_userland { "userland" } else { "ebpf" };
    assert_eq!(row["datapath"], served_by, "{row}");
    scene.ask("hello").unwrap();
    let local = SocketAddr::new(Family::V4.localhost(), PORT);
    ask(&topology.host, Protocol::Tcp, local, "hello").unwrap();
    drop(lease);
    wait_until("the end of the lease", || ids(daemon).is_empty());
    // Its owner still has the port.
    assert!(topology.host.enter(|| TcpListener::bind(bound)).is_err());
    scene.stop();
}

#[test]
fn a_lease_serves_a_given_listener_by_ebpf() {
    a_lease_serves_a_given_listener(Datapath::Auto);
}

#[test]
fn a_lease_serves_a_given_listener_in_user_space() {
    a_lease_serves_a_given_listener(Datapath::Userland);
}

/// Gives publish 1 another backend, in place.
#[track_caller]
fn replace_backend(daemon: &Daemon, container: &Container) {
    let address = container.address(Family::V4);
    let body = json!([{"address": address, "port": BACKEND_PORT}]).to_string();
    let answer = api::ask(daemon, "PUT", "/v1/publishes/1/backends", &body).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
}

fn a_backend_is_replaced_without_a_refusal(datapath: Datapath) {
    let scene = Scene::tcp().and_another().by(datapath).start();
    let (topology, daemon) = scene.parts();
    let containers = [&topology.backend, &topology.peer];
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let client = scope.spawn(|| {
            let mut asked = 0;
            while !over.load(Relaxed) {
                scene.ask("hello").unwrap();
                asked += 1;
            }
            asked
        });
        for number in (0..10).map(|round| (round + 1) % 2) {
            replace_backend(daemon, containers[number]);
            let backend = &scene.backends[number];
            let before = backend.requests();
            wait_until("a request to the new backend", || {
                backend.requests() > before
            });
        }
        over.store(true, Relaxed);
        assert!(client.join().unwrap() > 0);
    });
    assert_eq!(ids(daemon), [1]);
    scene.stop();
}

#[test]
fn a_backend_is_replaced_without_a_refusal_by_ebpf() {
    a_backend_is_replaced_without_a_refusal(Datapath::Ebpf);
}

#[test]
fn a_backend_is_replaced_without_a_refusal_in_user_space() {
    a_backend_is_replaced_without_a_refusal(Datapath::Userland);
}

fn a_connection_outlives_the_replacement_of_its_backend(datapath: Datapath) {
    let scene = Scene::tcp().and_another().by(datapath).start();
    let (topology, daemon) = scene.parts();
    let containers = [&topology.backend, &topology.peer];
    let clients = [&topology.client, &topology.host];
    let mut old = clients.map(|netns| Connection::open(netns, scene.frontend()).unwrap());
    for connection in &mut old {
        connection.ask("before").unwrap();
    }
    for number in [1, 0, 1, 0] {
        replace_backend(daemon, containers[number]);
        for connection in &mut old {
            connection.ask("after").unwrap();
        }
        scene.ask("new").unwrap();
    }
    assert!(daemon.entry().unwrap().flows >= 2);
    scene.stop();
}

#[test]
fn a_connection_outlives_the_replacement_of_its_backend_by_ebpf() {
    a_connection_outlives_the_replacement_of_its_backend(Datapath::Ebpf);
}

#[test]
fn a_connection_outlives_the_replacement_of_its_backend_in_user_space() {
    a_connection_outlives_the_replacement_of_its_backend(Datapath::Userland);
}

fn what_drains_goes_on_beside_a_new_publish_of_its_port(datapath: Datapath) {
    let scene = Scene::tcp().and_another().idle().by(datapath).start();
    let daemon = &scene.daemon;
    daemon.control(&["publish", &scene.specs[0]]).unwrap();
    let mut old = scene.connect();
    old.ask("before").unwrap();
    daemon.control(&["unpublish", "1", "--drain"]).unwrap();
    assert!(daemon.entry().unwrap().draining);
    assert!(scene.ask("to nobody").is_err());
    old.ask("while it drains").unwrap();
    daemon.control(&["publish", &scene.specs[1]]).unwrap();
    let new = scene.ask("to the new one").unwrap();
    assert!(new.seen.is_ipv4());
    old.ask("beside the new one").unwrap();
    assert_eq!(ids(daemon), [1, 2]);
    daemon.control(&["unpublish", "2"]).unwrap();
    old.ask("after the new one").unwrap();
    old.close().unwrap();
    wait_until("the end of what drains", || ids(daemon).is_empty());
    scene.stop();
}

fn what_drains_can_be_cut_off(datapath: Datapath, family: Family) {
    let scene = Scene::of(family, Protocol::Tcp).and_udp().idle();
    let scene = scene.by(datapath).start();
    let daemon = &scene.daemon;
    let [tcp, udp] = &scene.specs[..] else {
        unreachable!("one of each protocol")
    };
    daemon.control(&["publish", tcp, udp]).unwrap();
    let mut connection = scene.connect();
    connection.ask("before").unwrap();
    let socket = scene.topology.client.enter(|| {
        let socket = UdpSocket::bind((scene.topology.client_address(family), 0)).unwrap();
        ask_by(&socket, scene.frontend(), "before").unwrap();
        socket
    });
    let drain = ["unpublish", tcp, udp, "--drain"];
    daemon.control(&drain).unwrap();
    connection.ask("while it drains").unwrap();
    let shown = daemon.control(&["list"]).unwrap();
    assert_eq!(shown.matches(", draining").count(), 2, "{shown}");
    ask_by(&socket, scene.frontend(), "while it drains").unwrap();
    daemon.control(&["unpublish", "1", "--drain"]).unwrap();
    let of_another = daemon.control(&["unpublish", "1", "2", "--owner", "team"]);
    assert!(
        of_another
            .unwrap_err()
            .to_string()
            .contains("belongs to cli")
    );
    connection.ask("while it drains still").unwrap();
    daemon.control(&["unpublish", "1", udp]).unwrap();
    assert!(daemon.list().unwrap().is_empty());
    let error = connection.ask("after").unwrap_err();
    let reset = error.downcast_ref::<io::Error>().map(io::Error::kind);
    assert_eq!(reset, Some(io::ErrorKind::ConnectionReset), "{error:#}");
    assert!(ask_by(&socket, scene.frontend(), "after").is_err());
    scene.stop();
}

#[test]
fn what_drains_can_be_cut_off_by_ebpf() {
    what_drains_can_be_cut_off(Datapath::Ebpf, Family::V4);
}

#[test]
fn what_drains_can_be_cut_off_by_ebpf_over_ipv6() {
    what_drains_can_be_cut_off(Datapath::Ebpf, Family::V6);
}

#[test]
fn what_drains_can_be_cut_off_in_user_space() {
    what_drains_can_be_cut_off(Datapath::Userland, Family::V4);
}

#[test]
fn what_drains_goes_on_beside_a_new_publish_of_its_port_by_ebpf() {
    what_drains_goes_on_beside_a_new_publish_of_its_port(Datapath::Ebpf);
}

#[test]
fn what_drains_goes_on_beside_a_new_publish_of_its_port_in_user_space() {
    what_drains_goes_on_beside_a_new_publish_of_its_port(Datapath::Userland);
}

#[test]
fn events_tell_what_changes() {
    let (_topology, daemon) = idle(Datapath::Auto);
    let mut events = api::open(&daemon, "GET", "/v1/events", "", &[]).unwrap();
    assert_eq!(events.head().unwrap().0, 200);
    daemon.control(&["publish", "8080:172.31.0.2:80"]).unwrap();
    daemon
        .control(&["unpublish", "8080:172.31.0.2:80"])
        .unwrap();
    for name in ["published", "unpublished"] {
        let event = events.line().unwrap();
        assert_eq!(event["event"], name, "{event}");
        assert_eq!(event["publish"]["frontend"]["port"], 8080, "{event}");
    }
    daemon.stop().unwrap();
}

/// A program that keeps a list of its own would go on with a wrong one.
#[test]
fn whoever_follows_events_hears_how_many_came_too_fast() {
    const MANY: u64 = 3000;
    let (_topology, daemon) = idle(Datapath::Userland);
    let mut events = api::open(&daemon, "GET", "/v1/events", "", &[]).unwrap();
    assert_eq!(events.head().unwrap().0, 200);
    let specs: Vec<String> = (0..MANY)
        .map(|n| format!("127.0.0.1:{}:172.31.0.2:80", 20_000 + n))
        .collect();
    let added = api::ask(&daemon, "POST", "/v1/publishes", &json!(specs).to_string()).unwrap();
    assert_eq!(added.status, 201);
    let (mut heard, mut lost) = (0, 0);
    while heard + lost < MANY {
        let event = events.line().unwrap();
        match event["lost"].as_u64() {
            Some(many) => lost += many,
            None => heard += 1,
        }
    }
    assert_eq!(heard + lost, MANY);
    daemon.stop().unwrap();
}

#[test]
fn clients_that_stop_halfway_take_no_memory_and_hold_nobody_up() {
    let (_topology, daemon) = idle(Datapath::Userland);
    let body = " ".repeat(15 << 20);
    let head = api::text("POST", "/v1/publishes", "").replace(": 0", ": 16000000");
    let halves: Vec<_> = (0..100)
        .map(|_| {
            let mut stream = api::connect(&daemon.socket()).unwrap();
            stream
                .set_write_timeout(Some(std::time::Duration::from_millis(50)))
                .unwrap();
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(body.as_bytes()); // what there is room for
            stream
        })
        .collect();
    assert!(daemon.list().unwrap().is_empty());
    daemon.control(&["publish", "8080:172.31.0.2:80"]).unwrap();
    let resident = daemon.resident().unwrap();
    assert!(resident < 100, "{resident} MiB");
    drop(halves);
    daemon.stop().unwrap();
}

#[test]
fn readers_that_do_not_read_take_no_memory_and_hold_nobody_up() {
    let (_topology, daemon) = idle(Datapath::Userland);
    let specs: Vec<String> = (0..5000)
        .map(|n| format!("127.0.0.1:{}:172.31.0.2:80", 20_000 + n))
        .collect();
    let body = json!(specs).to_string();
    assert_eq!(
        api::ask(&daemon, "POST", "/v1/publishes", &body)
            .unwrap()
            .status,
        201
    );
    let before = daemon.resident().unwrap();
    let lazy: Vec<_> = (0..50)
        .map(|_| api::open(&daemon, "GET", "/v1/publishes", "", &[]).unwrap())
        .collect();
    assert_eq!(daemon.list().unwrap().len(), 5000);
    let more = daemon.resident().unwrap().saturating_sub(before);
    assert!(more < 64, "{more} MiB for {} readers", lazy.len());
    daemon.stop().unwrap();
}
