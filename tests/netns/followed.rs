//! What is known of the network from events is what a reading from the beginning finds, whatever has changed meanwhile.

use forwarder::network::{Event, Events, Reader, Snapshot};
use forwarder_tests::{
    deadline::{wait_for, wait_until},
    netns::Netns,
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use tokio::runtime::{Builder, Runtime};

/// A host with a bridge, two links to elsewhere, and a link out of use.
const HOST: &str = "\
link add br0 type bridge
link add a0 type veth peer name a1
link add b0 type veth peer name b1
link set lo up
link set br0 up
link set a0 up
link set a1 up
link set b0 up
link set b1 up
addr add 192.0.2.1/24 dev a0
addr add 198.51.100.1/24 dev b0
addr add 172.31.0.1/24 dev br0
addr add 2001:db8:a::1/64 dev a0 nodad
addr add 2001:db8:b::1/64 dev b0 nodad
";

/// Some change; not every one is possible every time.
fn change() -> impl Strategy<Value = String> {
    let device = || prop::sample::select(vec!["a0", "b0", "br0", "a1", "c0"]);
    let add = || prop::sample::select(vec!["add", "del"]);
    let put = prop::sample::select(vec!["add", "del", "replace", "append", "prepend", "change"]);
    let route =
        (put, 0..3_u8, any::<bool>(), 0..9_u8, 0..3_u8).prop_map(|(put, to, is_v6, way, more)| {
            let (network, gateways) = match is_v6 {
                false => (format!("10.{to}.0.0/16"), ["192.0.2.9", "198.51.100.9"]),
                true => (
                    format!("2001:db8:1:{to}::/64"),
                    ["2001:db8:a::9", "2001:db8:b::9"],
                ),
            };
            let [a, b] = gateways;
            let source = if is_v6 { "2001:db8:a::7" } else { "192.0.2.7" };
            let way = match way {
                0 => format!("via {a}"),
                1 => format!("via {b}"),
                2 => "dev a0".to_owned(),
                3 => "dev br0".to_owned(),
                4 => format!("dev a0 src {source}"),
                5 => format!("nexthop via {a} nexthop via {b}"),
                6 => "nhid 1".to_owned(),
                7 => format!("via {a} table 52"),
                _ => format!("via {b} tos 4"),
            };
            let more = ["", " metric 7", " mtu 1400"][usize::from(more)];
            let way = if put == "del" && to == 0 {
                String::new()
            } else {
                way
            };
            format!("route {put} {network} {way}{more}")
        });
    let address =
        (add(), device(), 0..2_u8, any::<bool>()).prop_map(|(add, device, last, is_v6)| {
            let last = last + 7;
            let address = match (device, is_v6) {
                (_, true) => format!("2001:db8:a::{last}/64 nodad"),
                ("br0", _) => format!("172.31.0.{last}/24"),
                ("b0", _) => format!("198.51.100.{last}/24"),
                _ => format!("192.0.2.{last}/24"),
            };
            format!("addr {add} {address} dev {device}")
        });
    let neighbour = (add(), device(), 0..3_u8, 0..3_u8, any::<bool>()).prop_map(
        |(add, device, last, mac, is_stale)| {
            let state = if is_stale { "stale" } else { "permanent" };
            let mac = match add {
                "add" => format!("lladdr 02:00:00:00:00:0{mac} nud {state}"),
                _ => String::new(),
            };
            let put = if add == "add" { "replace" } else { add };
            format!("neigh {put} 172.31.0.{last} {mac} dev {device}")
        },
    );
    let link = (device(), 0..7_u8).prop_map(|(device, what)| match what {
        0 | 1 => format!("link set {device} up"),
        2 => format!("link set {device} down"),
        3 => format!("link set {device} master br0"),
        4 => format!("link set {device} nomaster"),
        5 => format!("addr flush dev {device}"),
        _ => format!("link set {device} mtu 1400"),
    });
    let other = prop::sample::select(vec![
        "link add c0 type veth peer name c1",
        "link del c0",
        "link set c0 down\nlink set c0 up",
        "addr add 192.0.2.1/24 dev a0",
        "addr del 192.0.2.1/24 dev a0",
        "nexthop add id 1 via 192.0.2.9 dev a0",
        "nexthop replace id 1 via 198.51.100.9 dev b0",
        "nexthop del id 1",
        "rule add to 10.9.0.0/16 lookup 52",
        "rule del to 10.9.0.0/16 lookup 52",
        "route add local 203.0.113.0/28 dev lo",
        "route del local 203.0.113.0/28 dev lo",
        "route add unreachable 10.1.0.0/16",
        "neigh flush all",
        "neigh add proxy 172.31.0.1 dev br0",
    ]);
    prop_oneof![
        8 => route,
        4 => address,
        3 => neighbour,
        3 => link,
        4 => other.prop_map(str::to_owned),
    ]
}

struct Follower {
    runtime: Runtime,
    reader: Reader,
    events: Events,
    snapshot: Snapshot,
}

impl Follower {
    fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let (events, reader) = {
            let _inside = runtime.enter();
            (Events::open().unwrap(), Reader::open().unwrap())
        };
        Self {
            runtime,
            reader,
            events,
            snapshot: Snapshot::default(),
        }
    }

    /// As the daemon does it; whether events were lost.
    fn follow(&mut self) -> bool {
        let mut lost = false;
        self.runtime.block_on(async {
            while let Some(event) = self.events.heard() {
                lost |= event == Event::Lost;
                self.reader.hear(event, &mut self.snapshot);
            }
            self.reader.read(&mut self.snapshot).await.unwrap();
        });
        lost
    }

    /// Follows until there is no difference to a reading from the beginning.
    fn compare(&mut self) -> Result<(), String> {
        let mut last = None;
        let is_same = wait_for("the same", || {
            self.follow();
            let mut fresh = Self::new();
            fresh.follow();
            last = difference(&self.snapshot, &fresh.snapshot);
            last.is_none().then_some(())
        });
        is_same.map_err(|_| last.unwrap_or_default())
    }
}

/// What is different; a bridge may have forgotten what was known before.
fn difference(followed: &Snapshot, fresh: &Snapshot) -> Option<String> {
    let is_known = |(key, port)| followed.forwarding.get(key) == Some(port);
    let ports_are_known = fresh.forwarding.iter().all(is_known);
    let fresh = Snapshot {
        forwarding: followed.forwarding.clone(),
        ..fresh.clone()
    };
    let is_same = *followed == fresh && ports_are_known;
    (!is_same).then(|| format!("followed: {followed:#?}\nfresh: {fresh:#?}"))
}

#[test]
fn what_is_followed_is_what_is_there() {
    let bursts = prop::collection::vec(prop::collection::vec(change(), 1..6), 1..8);
    let config = Config {
        cases: 16,
        failure_persistence: None,
        ..Config::default()
    };
    let outcome = TestRunner::new(config).run(&bursts, |bursts| {
        let host = Netns::new("host").unwrap();
        host.ip(HOST).unwrap();
        host.enter(|| {
            let mut follower = Follower::new();
            follower.follow();
            for burst in bursts {
                // What cannot be done is passed over.
                let _ = host.feed("ip -force -batch -", &(burst.join("\n") + "\n"));
                let same = follower.compare();
                prop_assert!(same.is_ok(), "after {burst:?}\n{}", same.unwrap_err());
            }
            Ok(())
        })
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn after_events_are_lost_the_network_is_read_anew() {
    let host = Netns::new("host").unwrap();
    host.ip(HOST).unwrap();
    host.enter(|| {
        let mut follower = Follower::new();
        follower.follow();
        let route = |number: u32| {
            let [_, high, middle, low] = number.to_be_bytes();
            format!("route add 10.{high}.{middle}.{low} dev a0\n")
        };
        wait_until("events are lost", || {
            let known = follower.snapshot.routes.iter().count() as u32;
            host.ip(&(known..known + 4096).map(route).collect::<String>())
                .unwrap();
            follower.follow()
        });
        follower.compare().unwrap();
    });
}
