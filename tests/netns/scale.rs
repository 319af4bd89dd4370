//! As many flows as there may be, and what goes on meanwhile.

use std::{
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use forwarder_common::{
    flow::{Flow, state},
    limits,
    tuple::{Address, Tuple, UDP},
};
use forwarder_tests::{
    api,
    deadline::{slack, wait_until},
    document::Row,
    table::Table,
    traffic::Connection,
};

use crate::scene::{BACKEND_PORT, PORT, Scene};

/// How long the sweep of a full table may take, in units of [`slack`].
const SWEEP: u32 = 60;

/// The flow of that number, and its key.
fn flow(number: u32, last_seen: u64) -> (Tuple, Flow) {
    let client = Address::from_v4((u32::from(Ipv4Addr::new(10, 0, 0, 0)) + number).to_be());
    let key = Tuple {
        source: client,
        destination: Address::from_v4(u32::from(Ipv4Addr::new(172, 31, 0, 2)).to_be()),
        source_port: 4000,
        destination_port: BACKEND_PORT.to_be(),
        protocol: UDP.into(),
    };
    let mut flow = Flow {
        client,
        ..Flow::default()
    };
    flow.set_ports(4000, PORT.to_be());
    flow.set_publish(1);
    flow.set_state(state::REPLIED | state::ESTABLISHED | state::KEPT);
    flow.original.last_seen = last_seen;
    (key, flow)
}

/// Writes as many flows as the table has room for.
pub(crate) fn fill(table: &Table, last_seen: u64) -> u32 {
    let mut written = 0;
    while written < limits::FLOWS {
        let part = written..limits::FLOWS.min(written + 65_536);
        let (keys, flows): (Vec<_>, Vec<_>) = part.clone().map(|n| flow(n, last_seen)).unzip();
        let room = table.write(&keys, &flows).unwrap();
        written += room as u32;
        if room < part.len() {
            break;
        }
    }
    written
}

#[test]
fn a_full_table_is_counted_and_its_sweep_stalls_nobody() {
    let scene = Scene::tcp().start();
    let (topology, daemon) = scene.parts();
    let frontend = scene.frontend();
    let localhost = SocketAddr::from(([127, 0, 0, 1], PORT));
    let mut kept = scene.connect();
    kept.ask("before").unwrap();

    let table = Table::open(daemon.instance()).unwrap();
    let written = fill(&table, u64::MAX); // of tomorrow: no sweep takes them
    assert!(written > limits::FLOWS / 10 * 9, "only {written} fit");
    // Flows that cannot be kept go on among the half-open, and are seen.
    let mut others = [(&topology.client, frontend), (&topology.host, localhost)]
        .map(|(netns, frontend)| Connection::open(netns, frontend).unwrap());
    for connection in &mut others {
        connection.ask("no room").unwrap();
    }
    kept.ask("as before").unwrap();
    assert!(daemon.counted("flows_full").unwrap() > 0);

    fill(&table, 1); // long ago
    let deadline = Instant::now() + slack() * SWEEP;
    let step = written as usize / 1000;
    let mut longest = Duration::ZERO;
    while (0..written)
        .step_by(step)
        .any(|number| table.has(&flow(number, 0).0))
    {
        assert!(Instant::now() < deadline, "the sweep does not end");
        let asked = Instant::now();
        kept.ask("meanwhile").unwrap();
        for connection in &mut others {
            connection.ask("meanwhile").unwrap();
        }
        scene.served("new");
        daemon.counted("new_flow").unwrap();
        longest = longest.max(asked.elapsed());
    }
    assert!(longest < slack() * 10, "an answer took {longest:?}");
    let before = daemon.counted("flows_full").unwrap();
    for connection in others.iter_mut().chain([&mut kept]) {
        connection.ask("after").unwrap();
    }
    scene.served("after");
    assert_eq!(daemon.counted("flows_full").unwrap(), before);
    scene.stop();
}

/// So many that it is seen when one loses its former backend.
const REPLACED: usize = 60;

#[test]
fn beside_many_flows_what_a_former_backend_carried_counts_once() {
    let scene = Scene::tcp().start();
    let (topology, daemon) = scene.parts();
    let table = Table::open(daemon.instance()).unwrap();
    let (keys, flows): (Vec<_>, Vec<_>) = (0..70_000).map(|n| flow(n, u64::MAX)).unzip();
    assert_eq!(table.write(&keys, &flows).unwrap(), keys.len());
    let ports = 8081..8081 + REPLACED as u16;
    let spec = |port: u16| format!("{port}:172.31.0.2:{BACKEND_PORT}");
    let specs: Vec<String> = ports.clone().map(spec).collect();
    let mut words = vec!["publish"];
    words.extend(specs.iter().map(String::as_str));
    daemon.control(&words).unwrap();
    for port in ports {
        let frontend = SocketAddr::new(scene.frontend().ip(), port);
        let mut connection = Connection::open(&topology.client, frontend).unwrap();
        connection.ask("counted").unwrap();
    }
    let rows = || daemon.list().unwrap().split_off(1);
    let all = |holds: fn(&Row) -> bool| rows().iter().all(holds);
    let packets = || -> Vec<u64> { rows().iter().map(|row| row.packets).collect() };
    let mut before = Vec::new();
    wait_until(
        "the connections are over, and a sweep has counted them",
        || {
            let counted = all(|row| row.flows == 1 && row.packets > 0);
            let seen = std::mem::replace(&mut before, packets());
            thread::sleep(slack() * 5 / 2); // longer than from one sweep to the next
            counted && seen == before && packets() == before
        },
    );
    // What is just being moved may be missed for once.
    let assert_no_more = || {
        let now = packets();
        let more = now.iter().zip(&before).any(|(now, before)| now > before);
        assert!(!more, "{now:?} are more than {before:?}");
    };

    let other = r#"[{"address": "172.31.0.2", "port": 9}]"#;
    for row in rows() {
        let path = format!("/v1/publishes/{}/backends", row.id);
        let replaced = api::ask(daemon, "PUT", &path, other).unwrap();
        assert_eq!(replaced.status, 200, "{}", replaced.body);
        assert_no_more();
    }
    // Without a pause, to see each moment.
    let deadline = Instant::now() + slack() * 5;
    while Instant::now() < deadline {
        assert_no_more();
    }
    wait_until("their places were cleared", || {
        all(|row| row.flows == 0) && packets() == before
    });
    scene.stop();
}
