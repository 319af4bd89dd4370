//! Many clients of the control socket, and slow ones: whoever else asks is answered.

use std::os::unix::net::UnixStream;

use forwarder_tests::{
    api::{self, Open},
    daemon::{Daemon, Datapath},
    topology::Topology,
};
use serde_json::json;

/// More than are served at once.
const MANY: u16 = 300;

fn idle(topology: &Topology) -> Daemon {
    Daemon::start(&topology.host, &[], Datapath::Userland).unwrap()
}

/// That many connections on which something goes on.
fn opened(daemon: &Daemon, method: &str, path: &str, body: impl Fn(u16) -> String) -> Vec<Open> {
    let open = |number| {
        let mut open = api::open(daemon, method, path, &body(number), &[]).unwrap();
        let (status, _) = open.head().unwrap();
        let is_refused = status == 503 && open.line().unwrap()["title"] == "Too many";
        assert!(status < 300 || is_refused, "{path}: {status}");
        (!is_refused).then_some(open)
    };
    (0..MANY).filter_map(open).collect()
}

/// As Docker's proxies have them, one for each port and family.
#[test]
fn leases_leave_the_control_socket_to_others() {
    let topology = Topology::new().unwrap();
    let daemon = idle(&topology);
    let body = |number| json!([format!("127.0.0.1:{}:172.31.0.2:80", 20_000 + number)]).to_string();
    let leases = opened(&daemon, "POST", "/v1/leases", body);
    assert_eq!(daemon.list().unwrap().len(), leases.len());
    assert_eq!(leases.len(), usize::from(MANY));
    daemon.control(&["publish", "8080:172.31.0.2:80"]).unwrap();
    daemon.stop().unwrap();
}

#[test]
fn who_follows_events_leaves_the_control_socket_to_others() {
    let topology = Topology::new().unwrap();
    let daemon = idle(&topology);
    let mut followers = opened(&daemon, "GET", "/v1/events", |_| String::new());
    assert!(followers.len() < usize::from(MANY));
    daemon.control(&["publish", "8080:172.31.0.2:80"]).unwrap();
    for follower in &mut followers {
        assert_eq!(follower.line().unwrap()["event"], "published");
    }
    daemon.stop().unwrap();
}

#[test]
fn who_reads_nothing_of_an_answer_does_not_keep_its_place() {
    let topology = Topology::new().unwrap();
    let daemon = idle(&topology);
    // More than a socket's buffer takes.
    let specs = (20_000..21_500).map(|port| format!("127.0.0.1:{port}:172.31.0.2:80/udp"));
    let body = json!(specs.collect::<Vec<_>>()).to_string();
    let answer = api::ask(&daemon, "POST", "/v1/publishes", &body).unwrap();
    assert_eq!(answer.status, 201);
    let ask = |_| -> UnixStream {
        let mut stream = api::connect(&daemon.socket()).unwrap();
        let text = api::text("GET", "/v1/publishes", "");
        std::io::Write::write_all(&mut stream, text.as_bytes()).unwrap();
        stream
    };
    let _silent: Vec<UnixStream> = (0..MANY).map(ask).collect();
    assert_eq!(daemon.list().unwrap().len(), 1500);
    daemon.stop().unwrap();
}
