//! A loaded program in a network namespace of its own, with an uplink and a container's device that nothing
//! is attached to; what it publishes, and frames through it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use forwarder::datapath::{Datapath, Options, devices::Hook, maps::Installed, xdp::Mode};
use forwarder_common::{
    flow::{Flow, Hop, Timeouts, delivery},
    limits,
    publish::{Interface, Location, Publish, flag, xdp},
    reason::Reason,
    tuple::Tuple,
};
use forwarder_tests::{
    deadline::wait_for,
    frame::{Frame, Mac, Protocol},
    netns::Netns,
    wire::Wire,
};
use ipnet::IpNet;
use nix::net::if_::if_nametoindex;

pub(crate) const CONTAINER_MAC: Mac = [2, 0, 0, 0, 0, 0xc];
pub(crate) const BRIDGE_MAC: Mac = [2, 0, 0, 0, 0, 0xb];
/// Where frames go unless they say otherwise.
pub(crate) const HOST_MAC: Mac = [2, 0, 0, 0, 0, 2];
/// Addresses of the host: LAN, and on the backend's network.
pub(crate) const HOST: [&str; 4] = [
    "198.51.100.2",
    "172.31.0.1",
    "2001:db8:100::2",
    "fd00:31::1",
];
pub(crate) const LO: u32 = 1;
/// tc's actions (include/uapi/linux/pkt_cls.h).
pub(crate) const REDIRECT: u32 = 7;
pub(crate) const SHOT: u32 = 2;
pub(crate) const UNSPEC: u32 = u32::MAX;
/// XDP's (include/uapi/linux/bpf.h).
pub(crate) const XDP_DROP: u32 = 1;
pub(crate) const XDP_PASS: u32 = 2;
pub(crate) const XDP_TX: u32 = 3;

/// What the loader writes for an uplink, an Ethernet device.
pub(crate) const UPLINK: Interface = Interface {
    delivery: delivery::NEIGHBOUR,
    mtu: 1500,
    ethernet: 1,
    xdp: xdp::NO,
    network: 0,
    layer3: 0,
    mac: HOST_MAC,
    strict: 0,
    default_v4: 0,
    container: 0,
    narrow: 0,
};

/// The same of a device that is no bridge's port.
pub(crate) fn behind(ifindex: u32, interface: Interface) -> Interface {
    Interface {
        layer3: ifindex,
        ..interface
    }
}

/// The longest that there is (CONFIG_HZ=100), and a little more.
pub(crate) const TICK: Duration = Duration::from_millis(20);

pub(crate) struct Bench {
    pub(crate) datapath: Datapath,
    pub(crate) uplink: u32,
    pub(crate) container: u32,
    locations: BTreeMap<IpNet, Location>,
}

/// What became of a frame.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) action: u32,
    pub(crate) bytes: Vec<u8>,
    /// Reasons that were counted for it.
    pub(crate) reasons: Vec<&'static str>,
}

impl Outcome {
    /// The frame that was redirected.
    #[track_caller]
    pub(crate) fn forwarded(self) -> Frame {
        assert_eq!(self.action, REDIRECT, "{self:?}");
        Frame::parse(&self.bytes).unwrap_or_else(|error| panic!("{error:#}: {self:?}"))
    }

    /// The frame was left alone, for `reason`; an empty one is not counted.
    #[track_caller]
    pub(crate) fn passed(self, frame: &[u8], reason: &str) {
        let reasons = if reason.is_empty() {
            vec![]
        } else {
            vec![reason]
        };
        assert_eq!((self.action, &self.reasons), (UNSPEC, &reasons), "{self:?}");
        assert_eq!(self.bytes, frame, "a frame that is passed stays as it is");
    }

    #[track_caller]
    pub(crate) fn dropped(self, reason: &str) {
        assert_eq!(
            (self.action, &self.reasons[..]),
            (SHOT, &[reason][..]),
            "{self:?}"
        );
    }
}

/// Runs a scenario on a fresh program.
pub(crate) fn bench(scenario: impl FnOnce(&mut Bench) + Send) {
    bench_with(options(), scenario);
}

/// The same, with SNAT ports: the first, and how many.
pub(crate) fn bench_with_ports(snat: (u16, u32), scenario: impl FnOnce(&mut Bench) + Send) {
    bench_with(Options { snat, ..options() }, scenario);
}

/// What a program is loaded with unless a test says otherwise.
pub(crate) fn options() -> Options {
    Options {
        instance: "bench".into(),
        pins: None,
        snat: (61_000, 4_000),
        flows: limits::FLOWS,
        timeouts: Timeouts::default(),
        respects_firewall: false,
    }
}

pub(crate) fn bench_with(options: Options, scenario: impl FnOnce(&mut Bench) + Send) {
    let netns = Netns::new("bench").unwrap();
    netns.ip(LINKS).unwrap();
    netns.enter(|| scenario(&mut Bench::here(&options)));
}

/// The devices of a bench.
pub(crate) const LINKS: &str = "link set lo up\n\
     link add eth0 type veth peer name eth0p\nlink set eth0 up\n\
     link add veth0 type veth peer name veth0p\nlink set veth0 up";

/// A literal.
pub(crate) fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A prefix, or one address.
pub(crate) fn network(text: &str) -> IpNet {
    let address = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse().or_else(|_| address()).unwrap()
}

impl Bench {
    /// A fresh program in the network namespace that we are in, which has the [`LINKS`].
    pub(crate) fn here(options: &Options) -> Self {
        let datapath = Datapath::load(options).unwrap();
        let index = |name| if_nametoindex(name).unwrap();
        let mut bench = Self {
            datapath,
            uplink: index("eth0"),
            container: index("veth0"),
            locations: BTreeMap::new(),
        };
        let maps = &mut bench.datapath.maps;
        let uplink = Interface {
            mtu: u32::MAX,
            ..UPLINK
        };
        maps.set_interface(bench.uplink, Some(behind(bench.uplink, uplink)))
            .unwrap();
        let container = Interface {
            delivery: delivery::PEER,
            ..UPLINK
        };
        maps.set_interface(bench.container, Some(behind(bench.container, container)))
            .unwrap();
        for address in HOST {
            bench.locate(address, Location::HERE);
        }
        bench
    }

    /// Says what an address, or the addresses of a prefix, are behind.
    pub(crate) fn locate(&mut self, prefix: &str, location: Location) {
        self.change_locations(|locations| locations.insert(network(prefix), location));
    }

    /// Takes that back.
    pub(crate) fn forget(&mut self, prefix: &str) {
        self.change_locations(|locations| locations.remove(&network(prefix)));
    }

    fn change_locations<T>(&mut self, change: impl FnOnce(&mut BTreeMap<IpNet, Location>) -> T) {
        change(&mut self.locations);
        let maps = &mut self.datapath.maps;
        maps.set_locations(&self.locations).unwrap();
    }

    /// Publishes a port of every local address, to a container.
    pub(crate) fn publish(&mut self, protocol: Protocol, port: u16, backend: &str) {
        let entry = self.entry(port, backend);
        self.publish_entry(1, None, protocol, port, &entry);
    }

    /// What `publish` writes.
    pub(crate) fn entry(&self, port: u16, backend: &str) -> Publish {
        let backend = at(backend);
        let source = if backend.is_ipv4() {
            "172.31.0.1"
        } else {
            "fd00:31::1"
        };
        Publish {
            backend: backend.ip().into(),
            source: source.parse::<std::net::IpAddr>().unwrap().into(),
            hop: Hop {
                ifindex: self.container,
                mac: CONTAINER_MAC,
                source_mac: BRIDGE_MAC,
                delivery: delivery::PEER,
            },
            first_port: port,
            backend_port: backend.port(),
            flags: flag::SINGLE_PORT,
            previous: 0,
        }
    }

    pub(crate) fn publish_entry(
        &mut self,
        index: u32,
        address: Option<&str>,
        protocol: Protocol,
        port: u16,
        entry: &Publish,
    ) {
        let installed = self.installed(address, protocol, port, entry);
        self.datapath.maps.install(index, &installed).unwrap();
    }

    /// Publishes a range of ports of every local address.
    pub(crate) fn publish_range(&mut self, protocol: Protocol, ports: (u16, u16), entry: &Publish) {
        let mut installed = self.installed(None, protocol, ports.0, entry);
        installed.ports = ports;
        installed.backend_ports.1 = entry.backend_port_of(ports.1);
        self.datapath.maps.install(1, &installed).unwrap();
    }

    /// What `publish_entry` writes.
    pub(crate) fn installed(
        &self,
        address: Option<&str>,
        protocol: Protocol,
        port: u16,
        entry: &Publish,
    ) -> Installed {
        let addresses = address.map_or_else(|| vec!["0.0.0.0", "::"], |address| vec![address]);
        let backend_port = entry.backend_port_of(port);
        Installed {
            entry: *entry,
            frontends: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            protocol: if protocol == Protocol::Tcp { 6 } else { 17 },
            ports: (port, port),
            backend: entry.backend.into(),
            backend_ports: (backend_port, backend_port),
            allow: vec![],
        }
    }

    pub(crate) fn send(&self, frame: &Frame, ifindex: u32) -> Outcome {
        self.send_bytes(&frame.bytes(), ifindex)
    }

    pub(crate) fn send_bytes(&self, bytes: &[u8], ifindex: u32) -> Outcome {
        self.send_marked(bytes, ifindex, 0)
    }

    /// The same, with the mark that another program or this host gave it.
    pub(crate) fn send_marked(&self, bytes: &[u8], ifindex: u32, mark: u32) -> Outcome {
        self.outcome(|| self.datapath.try_frame(bytes, ifindex, mark).unwrap())
    }

    fn outcome(&self, run: impl FnOnce() -> (u32, Vec<u8>)) -> Outcome {
        let before = self.stats();
        let (action, bytes) = run();
        let after = self.stats();
        let counted = |name: &&str| (0..after[name] - before[name]).map(|_| ()).count() > 0;
        let reasons = after.keys().copied().filter(counted).collect();
        Outcome {
            action,
            bytes,
            reasons,
        }
    }

    /// Makes the uplink lead to another machine, the backend of a publish, with XDP and the kernel's answers that it needs.
    /// Returns whether the kernel can run XDP programs for a device by themselves.
    pub(crate) fn publish_beside(&mut self, protocol: Protocol, port: u16, backend: &str) -> bool {
        let backend = at(backend);
        let netns = Netns::current().unwrap();
        netns
            .ip(
                "addr add 198.51.100.2/24 dev eth0\naddr add 2001:db8:100::2/64 dev eth0 nodad\n\
                 link set eth0p up\n\
                 neigh replace 198.51.100.9 lladdr 02:00:00:00:00:09 dev eth0\n\
                 neigh replace 198.51.100.10 lladdr 02:00:00:00:00:10 dev eth0\n\
                 neigh replace 2001:db8:100::9 lladdr 02:00:00:00:00:09 dev eth0\n\
                 neigh replace 2001:db8:100::10 lladdr 02:00:00:00:00:10 dev eth0",
            )
            .unwrap();
        netns.forwards(true).unwrap();
        self.datapath.attach_xdp(self.uplink, Mode::Native).unwrap();
        let uplink = Interface {
            xdp: xdp::TURNS,
            ..UPLINK
        };
        let maps = &mut self.datapath.maps;
        maps.set_interface(self.uplink, Some(behind(self.uplink, uplink)))
            .unwrap();
        let mut entry = self.entry(port, &backend.to_string());
        let source = if backend.is_ipv4() { HOST[0] } else { HOST[2] };
        entry.source = source.parse::<std::net::IpAddr>().unwrap().into();
        entry.flags |= flag::REMOTE;
        entry.hop = Hop {
            ifindex: self.uplink,
            delivery: delivery::NEIGHBOUR,
            ..Hop::default()
        };
        self.publish_entry(1, None, protocol, port, &entry);
        self.datapath.try_early(&[0; 60], self.uplink).is_ok()
    }

    /// Has a container's query to 198.51.100.9:53, with that source port, leave by the uplink as this host's own, and returns
    /// the answer that comes.
    pub(crate) fn masqueraded_query(&mut self, port: u16) -> Frame {
        self.masqueraded(port, Frame::bytes)
    }

    /// The same of a query that `written` makes a frame's bytes of.
    pub(crate) fn masqueraded(&mut self, port: u16, written: fn(&Frame) -> Vec<u8>) -> Frame {
        let netns = Netns::current().unwrap();
        netns
            .ip(
                "addr add 198.51.100.2/24 dev eth0\naddr add 172.31.0.1/24 dev veth0\n\
                 link set eth0p up\nlink set veth0p up\n\
                 neigh replace 198.51.100.9 lladdr 02:00:00:00:00:09 dev eth0",
            )
            .unwrap();
        netns.forwards(true).unwrap();
        let rules = "table ip nat { chain postrouting { type nat hook postrouting priority 100;
            oifname eth0 masquerade
        }
        }\n";
        netns.feed("nft -f -", rules).unwrap();
        let place = (self.uplink, Hook::Egress);
        self.datapath.attach(place, "eth0").unwrap();
        let source = SocketAddr::from(([172, 31, 0, 3], port));
        let mut query = Frame::first(Protocol::Udp, source, at("198.51.100.9:53"));
        query.destination_mac = netns.mac("veth0").unwrap();
        let outside = Wire::open(&netns, "eth0p").unwrap();
        let inside = Wire::open(&netns, "veth0p").unwrap();
        inside.send(&written(&query)).unwrap();
        let left = loop {
            let frame = Frame::parse(&outside.receive().unwrap());
            if let Ok(frame) = frame
                && frame.destination == query.destination
            {
                break frame;
            }
        };
        assert_eq!(left.source, SocketAddr::from(([198, 51, 100, 2], port)));
        Frame {
            source_mac: [2, 0, 0, 0, 0, 9],
            destination_mac: HOST_MAC,
            ..left.reply()
        }
    }

    /// Has the XDP program see the frame.
    pub(crate) fn send_early(&self, bytes: &[u8]) -> Outcome {
        self.outcome(|| self.datapath.try_early(bytes, self.uplink).unwrap())
    }

    /// The same when the program knows the packet's way: once a second it does not, for a tick.
    pub(crate) fn send_early_on_its_way(&self, bytes: &[u8]) -> Outcome {
        wait_for("XDP knows the way", || {
            let outcome = self.send_early(bytes);
            (outcome.action != XDP_PASS).then_some(outcome)
        })
        .unwrap()
    }

    fn stats(&self) -> BTreeMap<&'static str, u64> {
        let stats = self.datapath.maps.stats().unwrap();
        stats
            .into_iter()
            .map(|(reason, packets): (Reason, u64)| (reason.name(), packets))
            .collect()
    }

    /// The only flow.
    pub(crate) fn flow(&self) -> (Tuple, Flow) {
        let flows: Vec<_> = self.datapath.maps.flows.all().map(Result::unwrap).collect();
        assert_eq!(flows.len(), 1, "{flows:?}");
        flows.into_iter().next().unwrap()
    }
}
