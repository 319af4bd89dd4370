//! A machine with containers, and another machine beside it, built of namespaces:
//!
//! ```text
//!   client ---- uplink | host | bridge 0 --+-- backend
//!                      |      |            +-- peer
//!                      |      | bridge 1 ----- other
//!                      |      | veth --------- ptp      (routed, no bridge)
//! ```
//! The client knows no route to the containers, and no sysctl is changed anywhere. Everything is
//! gone when the `Topology` is.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Result, bail};

use crate::netns::Netns;

/// IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// 127.0.0.1 or ::1.
    pub fn localhost(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::LOCALHOST.into(),
            Self::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }

    /// Any address, to bind a socket to.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

/// A network with an IPv4 /24 and an IPv6 /64; its machines have the same number in both.
#[derive(Debug, Clone, Copy)]
pub struct Network {
    pub v4: [u8; 3],
    pub v6: [u16; 4],
}

impl Network {
    pub fn address(&self, family: Family, machine: u8) -> IpAddr {
        let [a, b, c] = self.v4;
        let [p, q, r, s] = self.v6;
        match family {
            Family::V4 => Ipv4Addr::new(a, b, c, machine).into(),
            Family::V6 => Ipv6Addr::new(p, q, r, s, 0, 0, 0, u16::from(machine)).into(),
        }
    }

    fn v4(&self, machine: u8) -> IpAddr {
        self.address(Family::V4, machine)
    }

    fn v6(&self, machine: u8) -> IpAddr {
        self.address(Family::V6, machine)
    }
}

/// Names and addresses to build with.
#[derive(Debug, Clone)]
pub struct Plan {
    pub uplink: &'static str,
    pub bridges: [&'static str; 2],
    /// What the names of the host's ends of the containers' veths begin with.
    pub veth: &'static str,
    pub lan: Network,
    pub bridged: [Network; 2],
    pub routed: Network,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            uplink: "eth0",
            bridges: ["br0", "br1"],
            veth: "veth",
            lan: Network {
                v4: [198, 51, 100],
                v6: [0x2001, 0xdb8, 0x100, 0],
            },
            bridged: [
                Network {
                    v4: [172, 31, 0],
                    v6: [0xfd00, 0x31, 0, 0],
                },
                Network {
                    v4: [172, 31, 1],
                    v6: [0xfd00, 0x31, 1, 0],
                },
            ],
            routed: Network {
                v4: [10, 44, 0],
                v6: [0xfd00, 0x44, 0, 0],
            },
        }
    }
}

const GATEWAY: u8 = 1;
const HOST: u8 = 2;
const CLIENT: u8 = 9;

/// A container: its namespace and where it is.
#[derive(Debug)]
pub struct Container {
    pub netns: Netns,
    network: Network,
    machine: u8,
    /// The host's end of its veth.
    pub veth: String,
    /// `None` for a routed container.
    bridge: Option<&'static str>,
}

impl Container {
    pub fn address(&self, family: Family) -> IpAddr {
        self.network.address(family, self.machine)
    }

    /// The host's address on this container's network.
    pub fn gateway(&self, family: Family) -> IpAddr {
        self.network.address(family, GATEWAY)
    }
}

/// The whole scene.
#[derive(Debug)]
pub struct Topology {
    pub host: Netns,
    pub client: Netns,
    pub backend: Container,
    pub peer: Container,
    pub other: Container,
    pub ptp: Container,
    plan: Plan,
    /// Whether the host's devices have to be removed by name: it is not a namespace of ours.
    shared: bool,
}

impl Topology {
    /// The scene with a host of its own.
    ///
    /// # Errors
    /// Missing privilege, or no `ip`.
    pub fn new() -> Result<Self> {
        let host = Netns::new("host")?;
        host.ip("link set lo up")?;
        host.forwards(true)?; // as hosts of containers do
        Self::build(host, Plan::default(), false)
    }

    /// The scene around the namespace we are in, whose own devices and addresses stay as they are.
    ///
    /// # Errors
    /// As [`Topology::new`]; also when another scene of the same plan stands there.
    pub fn around_here(plan: Plan) -> Result<Self> {
        let host = Netns::current()?;
        let exists = |device| host.run(&format!("ip link show {device}")).is_ok();
        if exists(plan.uplink) {
            bail!("device {} exists: another one is running here", plan.uplink);
        }
        // What a scene leaves whose process was killed: the veths go with the namespaces.
        for bridge in plan.bridges.into_iter().filter(|bridge| exists(bridge)) {
            host.ip(&format!("link del {bridge}"))?;
        }
        Self::build(host, plan, true)
    }

    fn build(host: Netns, plan: Plan, shared: bool) -> Result<Self> {
        let container = |label: &str, network: Network, machine, bridge| -> Result<Container> {
            let veth = format!("{}{label}", plan.veth);
            Ok(Container {
                netns: Netns::new(label)?,
                network,
                machine,
                veth,
                bridge,
            })
        };
        let [net0, net1] = plan.bridged;
        let [br0, br1] = plan.bridges;
        let topology = Self {
            client: Netns::new("client")?,
            backend: container("backend", net0, 2, Some(br0))?,
            peer: container("peer", net0, 3, Some(br0))?,
            other: container("other", net1, 2, Some(br1))?,
            ptp: container("ptp", plan.routed, 2, None)?,
            host,
            plan,
            shared,
        };
        topology.wire()?;
        Ok(topology)
    }

    fn wire(&self) -> Result<()> {
        let Plan {
            uplink,
            bridges,
            lan,
            bridged,
            ..
        } = &self.plan;
        let mut host = format!(
            "link add {uplink} type veth peer name eth0 netns {client}\n\
             addr add {}/24 dev {uplink}\naddr add {}/64 dev {uplink} nodad\n\
             link set {uplink} up\n",
            lan.v4(HOST),
            lan.v6(HOST),
            client = self.client.path(),
        );
        for (bridge, network) in bridges.iter().zip(bridged) {
            host += &format!(
                "link add {bridge} type bridge\n\
                 addr add {}/24 dev {bridge}\naddr add {}/64 dev {bridge} nodad\n\
                 link set {bridge} up\n",
                network.v4(GATEWAY),
                network.v6(GATEWAY),
            );
        }
        let containers = [&self.backend, &self.peer, &self.other, &self.ptp];
        for container in containers {
            host += &self.plugged(container, None);
        }
        self.host.ip(&host)?;
        self.client.ip(&format!(
            "link set lo up\n\
             addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\nlink set eth0 up\n",
            lan.v4(CLIENT),
            lan.v6(CLIENT),
        ))?;
        for container in containers {
            configure(container)?;
        }
        Ok(())
    }

    /// The host's side of starting a container, with a device of that number.
    fn plugged(&self, container: &Container, ifindex: Option<u32>) -> String {
        let Container { veth, network, .. } = container;
        let index = ifindex.map_or(String::new(), |number| format!("index {number}"));
        let mut commands = format!(
            "link add {veth} {index} address {} type veth peer name eth0 address {} netns {}\n",
            fresh_mac(),
            fresh_mac(),
            container.netns.path(),
        );
        if let Some(bridge) = container.bridge {
            commands += &format!("link set {veth} master {bridge} up\n");
        } else {
            let (v4, v6) = (network.v4(container.machine), network.v6(container.machine));
            commands += &format!(
                "addr add {}/32 dev {veth}\naddr add {}/128 dev {veth} nodad\n\
                 link set {veth} up\nroute add {v4}/32 dev {veth}\nroute add {v6}/128 dev {veth}\n",
                network.v4(GATEWAY),
                network.v6(GATEWAY),
            );
        }
        commands
    }

    /// The host's address on the network that it shares with the client.
    pub fn host_address(&self, family: Family) -> IpAddr {
        self.plan.lan.address(family, HOST)
    }

    pub fn client_address(&self, family: Family) -> IpAddr {
        self.plan.lan.address(family, CLIENT)
    }

    /// Takes the backend's link away, as when a container stops.
    ///
    /// # Errors
    /// It has none.
    pub fn unplug_backend(&self) -> Result<()> {
        self.host.ip(&format!("link del {}", self.backend.veth))
    }

    /// Gives the backend a new link, as when a container starts: another veth of another name,
    /// other MACs on both ends, the same addresses.
    ///
    /// # Errors
    /// It still has one.
    pub fn plug_backend(&mut self) -> Result<()> {
        self.plug_backend_at(None)
    }

    /// The same, with a device of that number at the host's end.
    ///
    /// # Errors
    /// It still has one, or another device has the number.
    pub fn plug_backend_at(&mut self, ifindex: Option<u32>) -> Result<()> {
        static RESTARTS: AtomicU32 = AtomicU32::new(0);
        let number = RESTARTS.fetch_add(1, Ordering::Relaxed);
        self.backend.veth = format!("{}be{number}", self.plan.veth);
        self.host.ip(&self.plugged(&self.backend, ifindex))?;
        configure(&self.backend)
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        if !self.shared {
            return;
        }
        // One by one: what was never made must not keep the rest.
        let containers = [&self.backend, &self.peer, &self.other, &self.ptp];
        let veths = containers
            .into_iter()
            .map(|container| container.veth.as_str());
        for device in veths.chain(self.plan.bridges).chain([self.plan.uplink]) {
            let _ = self.host.run(&format!("ip link del {device}"));
        }
    }
}

/// The container's side of its start.
fn configure(container: &Container) -> Result<()> {
    let network = container.network;
    let (v4, v6) = (network.v4(container.machine), network.v6(container.machine));
    let (gateway4, gateway6) = (network.v4(GATEWAY), network.v6(GATEWAY));
    let (prefix4, prefix6) = if container.bridge.is_some() {
        (24, 64)
    } else {
        (32, 128)
    };
    container.netns.ip(&format!(
        "link set lo up\n\
         addr add {v4}/{prefix4} dev eth0\naddr add {v6}/{prefix6} dev eth0 nodad\n\
         link set eth0 up\n\
         route add 0.0.0.0/0 via {gateway4} dev eth0 onlink\n\
         route add ::/0 via {gateway6} dev eth0 onlink\n"
    ))
}

/// A locally administered MAC that nobody else in this process has.
fn fresh_mac() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    let [_, a, b, c] = COUNT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let id = std::process::id() as u16;
    format!(
        "02:{:02x}:{:02x}:{a:02x}:{b:02x}:{c:02x}",
        id >> 8,
        id & 0xff
    )
}
