//! One contender's own machines: client, host and containers, with the servers running and the contender set up.
//! Arenas stand side by side, so that rounds can take turns without setting anything up anew.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use forwarder_tests::{
    daemon::{Daemon, Datapath},
    netns::Netns,
    topology::{Family, Topology},
    traffic,
};

use aya::Ebpf;
use tempfile::TempDir;

use crate::{
    generator::{self, Frames, Load, Until},
    process::{Placement, Process, pin, wait_for_port},
    rules::{self, Port},
};

pub(crate) const BULK: u16 = 5201;
pub(crate) const ROUND_TRIP: u16 = 5301;
pub(crate) const DATAGRAM: u16 = 5302;
pub(crate) const STREAM: u16 = 5303;
pub(crate) const HTTP: u16 = 5401;
/// The first source port of the generator, which so can make frames that answer others.
pub(crate) const SINK: u16 = 1 << 15;

/// What every contender publishes.
pub(crate) const PORTS: [Port; 6] = [
    Port {
        protocol: "tcp",
        number: BULK,
    },
    Port {
        protocol: "tcp",
        number: ROUND_TRIP,
    },
    Port {
        protocol: "udp",
        number: DATAGRAM,
    },
    Port {
        protocol: "udp",
        number: STREAM,
    },
    Port {
        protocol: "tcp",
        number: HTTP,
    },
    Port {
        protocol: "udp",
        number: SINK,
    },
];

/// So many ports that nobody asks for.
pub(crate) fn other_ports(count: u16) -> Vec<Port> {
    let port = |number| Port {
        protocol: "tcp",
        number,
    };
    (0..count).map(|n| port(20_000 + n)).collect()
}

/// Where the generator's flows say they come from, behind the client.
const SOURCES: &str = "198.19.0.0/16";
const NETNS_FILE: &str = "netns";
const WIRE: [&str; 2] = ["10.99.0.1", "10.99.0.2"];
/// The host's address towards the other machine, and that machine's.
const REMOTE_NEAR: &str = "10.98.0.1";
const REMOTE: &str = "10.98.0.2";

/// Who carries the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Contender {
    Wire,
    /// What a hop through the host by tc costs at least: other MACs and a redirect, and no NAT.
    Hop,
    Routing,
    /// Routing past a program that returns at once: what any program costs others at least.
    RoutingBesideNothing,
    /// Routing past a forwarder with so many publishes, none of which is meant.
    RoutingBeside(u16),
    Iptables,
    IptablesBare,
    Nftables,
    Flowtable,
    /// What a relay in user space costs at least.
    Relay,
    DockerProxy,
    Haproxy,
    Pasta,
    Forwarder,
    /// With Docker's rules loaded for other ports.
    ForwarderAmongRules,
    /// Through the stack, among Docker's rules for the same ports.
    ForwarderRespecting,
    Userland,
    /// As `Hop`, by XDP, to another machine behind a second uplink.
    RemoteHop,
    /// To that machine.
    RemoteIptables,
    RemoteForwarder,
    RemoteForwarderXdp,
}

impl Contender {
    pub(crate) const ALL: [Self; 22] = [
        Self::Wire,
        Self::Hop,
        Self::Routing,
        Self::RoutingBesideNothing,
        Self::RoutingBeside(0),
        Self::RoutingBeside(10_000),
        Self::Iptables,
        Self::IptablesBare,
        Self::Nftables,
        Self::Flowtable,
        Self::Relay,
        Self::DockerProxy,
        Self::Haproxy,
        Self::Pasta,
        Self::Forwarder,
        Self::ForwarderAmongRules,
        Self::ForwarderRespecting,
        Self::Userland,
        Self::RemoteHop,
        Self::RemoteIptables,
        Self::RemoteForwarder,
        Self::RemoteForwarderXdp,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Wire => "wire",
            Self::Hop => "redirect alone",
            Self::Routing => "routing",
            Self::RoutingBesideNothing => "routing beside an empty program",
            Self::RoutingBeside(0) => "routing beside forwarder",
            Self::RoutingBeside(_) => "routing beside 10,000 publishes",
            Self::Iptables => "iptables",
            Self::IptablesBare => "iptables, bare DNAT",
            Self::Nftables => "nftables map",
            Self::Flowtable => "nftables flowtable",
            Self::Relay => "relay alone",
            Self::DockerProxy => "docker-proxy",
            Self::Haproxy => "haproxy",
            Self::Pasta => "pasta",
            Self::Forwarder => "forwarder",
            Self::ForwarderAmongRules => "forwarder among Docker's rules",
            Self::ForwarderRespecting => "forwarder --respect-firewall",
            Self::Userland => "forwarder, userland",
            Self::RemoteHop => "XDP redirect alone, remote backend",
            Self::RemoteIptables => "iptables, remote backend",
            Self::RemoteForwarder => "forwarder, remote backend",
            Self::RemoteForwarderXdp => "forwarder --xdp native, remote backend",
        }
    }

    /// Whether it carries datagrams.
    pub(crate) fn has_udp(self) -> bool {
        self != Self::Haproxy
    }

    /// Whether the backend is another machine.
    pub(crate) fn is_remote(self) -> bool {
        matches!(
            self,
            Self::RemoteHop
                | Self::RemoteIptables
                | Self::RemoteForwarder
                | Self::RemoteForwarderXdp
        )
    }
}

/// Who connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Client {
    /// Another machine, to the host's address.
    External,
    /// A process on the host, to 127.0.0.1.
    Localhost,
    /// A container on the backend's network, to the host's address.
    Hairpin,
}

impl Client {
    pub(crate) const ALL: [Self; 3] = [Self::External, Self::Localhost, Self::Hairpin];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::External => "external",
            Self::Localhost => "localhost",
            Self::Hairpin => "hairpin",
        }
    }
}

/// What the contenders need that is not part of the system.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) docker_proxy: Option<PathBuf>,
}

pub(crate) struct Arena {
    pub(crate) contender: Contender,
    topology: Topology,
    /// Where the servers are.
    pub(crate) backend: Netns,
    servers: Vec<Process>,
    proxies: Vec<Process>,
    pub(crate) daemon: Option<Daemon>,
    /// Configuration of haproxy.
    files: TempDir,
    sink: Option<Ebpf>,
    hops: Vec<Ebpf>,
}

impl Arena {
    /// # Errors
    /// Something that the contender needs isn't there; the message names it.
    pub(crate) fn new(contender: Contender, programs: &Programs) -> Result<Self> {
        let others = match contender {
            Contender::RoutingBeside(publishes) => publishes,
            Contender::ForwarderAmongRules => 100,
            _ => 0,
        };
        Self::among(contender, programs, others)
    }

    /// The same, among so many other published ports, all of which come first where there is an order.
    ///
    /// # Errors
    /// As [`Arena::new`].
    pub(crate) fn among(contender: Contender, programs: &Programs, others: u16) -> Result<Self> {
        let topology = Topology::new()?;
        let backend = if contender == Contender::Pasta {
            Netns::new("pasta")?
        } else if contender.is_remote() {
            Netns::new("remote")?
        } else {
            topology.backend.netns.clone()
        };
        let mut arena = Self {
            contender,
            topology,
            backend,
            servers: Vec::new(),
            proxies: Vec::new(),
            daemon: None,
            files: TempDir::new()?,
            sink: None,
            hops: Vec::new(),
        };
        arena.wire()?;
        arena.set_up(programs, &other_ports(others))?;
        arena.serve()?;
        let devices: &[&str] = match contender {
            Contender::Pasta => &["eth1"],
            _ if contender.is_remote() => &["eth0"],
            _ => &["eth0", "wire0"],
        };
        // Another machine takes frames in the way that costs this one least.
        arena.sink = Some(match contender {
            Contender::RemoteHop | Contender::RemoteForwarderXdp => {
                generator::sink_early(&arena.backend, "eth0", SINK)
            }
            _ => generator::sink(&arena.backend, devices, SINK),
        }?);
        Ok(arena)
    }

    pub(crate) fn host(&self) -> &Netns {
        &self.topology.host
    }

    fn wire(&self) -> Result<()> {
        let Topology {
            client,
            host,
            backend,
            peer,
            ..
        } = &self.topology;
        let gateway = self.topology.host_address(Family::V4);
        let [near, far] = WIRE;
        client.ip(&format!(
            "route add 172.31.0.0/24 via {gateway}\n\
             link add wire0 type veth peer name wire0 netns {}\n\
             addr add {near}/24 dev wire0\nlink set wire0 up\n",
            backend.netns.path()
        ))?;
        let back = backend.gateway(Family::V4);
        backend.netns.ip(&format!(
            "addr add {far}/24 dev wire0\nlink set wire0 up\n\
             route replace default via {back}\nroute add {SOURCES} via {near}\n"
        ))?;
        peer.netns
            .ip(&format!("route replace default via {back}\n"))?;
        // Without pacing, which would measure timers, whatever this machine prefers. Any namespace may have it.
        for netns in [client, host, &backend.netns, &peer.netns, &self.backend] {
            set_sysctl(netns, "net/ipv4/tcp_congestion_control", "reno")?;
        }
        let behind = self.topology.client_address(Family::V4);
        host.ip(&format!("route add {SOURCES} via {behind}\n"))?;
        if self.contender.is_remote() {
            host.ip(&format!(
                "link add eth1 type veth peer name eth0 netns {}\naddr add {REMOTE_NEAR}/24 dev eth1\n\
                 link set eth1 up\n",
                self.backend.path()
            ))?;
            self.backend.ip(&format!(
                "link set lo up\naddr add {REMOTE}/24 dev eth0\nlink set eth0 up\n"
            ))?;
        }
        Ok(())
    }

    fn set_up(&mut self, programs: &Programs, others: &[Port]) -> Result<()> {
        let host = self.topology.host.clone();
        let all = [others, &PORTS].concat();
        let published = match self.contender {
            Contender::RoutingBeside(_) => others,
            Contender::ForwarderAmongRules => &PORTS,
            _ => &all,
        };
        let specs: Vec<String> = if self.contender.is_remote() {
            published.iter().map(|port| port.spec_to(REMOTE)).collect()
        } else {
            published.iter().map(Port::spec).collect()
        };
        let specs: Vec<&str> = specs.iter().map(String::as_str).collect();
        match self.contender {
            Contender::Wire | Contender::Routing => {}
            Contender::Hop => {
                let Topology {
                    client, backend, ..
                } = &self.topology;
                let (near, far) = (mac(client, "eth0")?, mac(&backend.netns, "eth0")?);
                let (uplink, bridge) = (mac(&host, "eth0")?, mac(&host, "br0")?);
                let veth = backend.veth.as_str();
                let there = generator::hop(&host, "eth0", veth, [far, bridge], true)?;
                let back = generator::hop(&host, veth, "eth0", [near, uplink], false)?;
                self.hops = vec![there, back];
            }
            Contender::RoutingBesideNothing => {
                let Topology { backend, peer, .. } = &self.topology;
                let devices = ["eth0", &backend.veth, &peer.veth];
                self.hops = vec![generator::nothing(&host, &devices)?];
            }
            Contender::RoutingBeside(_) => {
                self.daemon = Some(Daemon::start(&host, &specs, Datapath::Ebpf)?);
            }
            Contender::Iptables => {
                masquerade_localhost(&host)?;
                host.feed("iptables-restore", &rules::docker(&all))?;
            }
            Contender::IptablesBare => {
                host.feed("iptables-restore", &rules::bare(&all))?;
            }
            Contender::Nftables | Contender::Flowtable => {
                masquerade_localhost(&host)?;
                let fast = self.contender == Contender::Flowtable;
                let loaded = host.feed("nft -f -", &rules::nftables(&all, fast));
                match loaded {
                    Err(_) if fast => bail!("this kernel's nftables has no flowtable"),
                    result => result?,
                };
            }
            Contender::DockerProxy => {
                let program = programs.docker_proxy.as_ref().context(
                    "no docker-proxy: `apt-get install docker.io`, or unpack that package and give --docker-proxy PATH",
                )?;
                for Port { protocol, number } in PORTS {
                    // It reports to file descriptor 3, which dockerd gives it.
                    let mut command = host.command("sh");
                    command
                        .args(["-c", "exec \"$0\" \"$@\" 3>/dev/null"])
                        .arg(program);
                    command.args(["-proto", protocol, "-host-ip", "0.0.0.0", "-host-port"]);
                    command.args([&number.to_string(), "-container-ip", "172.31.0.2"]);
                    command.args(["-container-port", &number.to_string()]);
                    self.proxies.push(Process::start_command(command)?);
                    wait_for_port(&host, protocol, number).context("docker-proxy")?;
                }
            }
            Contender::Relay => {
                let program = std::env::current_exe()?;
                let mut command = host.command(program.to_str().context("its path is no text")?);
                command.args(["--relay", "172.31.0.2"]);
                self.proxies.push(Process::start_command(command)?);
                wait_for_port(&host, "udp", DATAGRAM).context("relay")?;
            }
            Contender::Haproxy => {
                let mut text = "global\n maxconn 4096\ndefaults\n mode tcp\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n".to_owned();
                for port in PORTS.iter().filter(|port| port.protocol == "tcp") {
                    let number = port.number;
                    text += &format!(
                        "listen p{number}\n bind 0.0.0.0:{number}\n server s 172.31.0.2:{number}\n"
                    );
                }
                let file = self.files.path().join("proxy.cfg");
                fs::write(&file, text)?;
                let line = format!("haproxy -db -f {}", file.display());
                self.proxies.push(Process::start(&host, &line)?);
                wait_for_port(&host, "tcp", HTTP).context("haproxy")?;
            }
            Contender::Pasta => {
                host.ip(&format!(
                    "route replace default via {}\n",
                    self.topology.client_address(Family::V4)
                ))?;
                let line = format!(
                    "pasta --foreground --runas 0 --no-netns-quit --config-net --interface eth0 --ns-ifname eth1 \
                     --tcp-ports {BULK},{ROUND_TRIP},{HTTP} --udp-ports {DATAGRAM},{STREAM},{SINK} --netns {}",
                    self.mounted_backend()?.display()
                );
                self.proxies.push(Process::start(&host, &line)?);
                wait_for_port(&host, "tcp", HTTP).context("pasta")?;
            }
            Contender::Forwarder => {
                self.daemon = Some(Daemon::start(&host, &specs, Datapath::Ebpf)?);
            }
            Contender::ForwarderAmongRules => {
                host.feed("iptables-restore", &rules::docker(others))?;
                self.daemon = Some(Daemon::start(&host, &specs, Datapath::Ebpf)?);
            }
            Contender::ForwarderRespecting => {
                host.feed("iptables-restore", &rules::docker(&all))?;
                let flags = ["--respect-firewall"];
                self.daemon = Some(Daemon::start_with(&host, &specs, Datapath::Ebpf, &flags)?);
            }
            Contender::RemoteHop => {
                let (near, far) = (
                    mac(&self.topology.client, "eth0")?,
                    mac(&self.backend, "eth0")?,
                );
                let there = [far, mac(&host, "eth1")?];
                let back = [near, mac(&host, "eth0")?];
                self.hops = vec![
                    generator::hop_early(&host, "eth0", "eth1", there)?,
                    generator::hop_early(&host, "eth1", "eth0", back)?,
                ];
            }
            Contender::RemoteIptables => {
                host.feed(
                    "iptables-restore",
                    &rules::remote(&all, REMOTE, "10.98.0.0/24"),
                )?;
            }
            Contender::RemoteForwarder | Contender::RemoteForwarderXdp => {
                let native = self.contender == Contender::RemoteForwarderXdp;
                let flags = ["--xdp", if native { "native" } else { "off" }];
                self.daemon = Some(Daemon::start_with(&host, &specs, Datapath::Ebpf, &flags)?);
            }
            Contender::Userland => {
                self.daemon = Some(Daemon::start(&host, &specs, Datapath::Userland)?);
            }
        }
        Ok(())
    }

    /// The backend's namespace as a file: without CAP_SYS_PTRACE, which pasta gives up, nobody may look into our
    /// /proc/PID/fd.
    fn mounted_backend(&self) -> Result<PathBuf> {
        let file = self.files.path().join(NETNS_FILE);
        fs::write(&file, "")?;
        let bind = nix::mount::MsFlags::MS_BIND;
        let nothing = None::<&str>;
        nix::mount::mount(
            Some(self.backend.path().as_str()),
            &file,
            nothing,
            bind,
            nothing,
        )
        .context("bind a network namespace to a file")?;
        Ok(file)
    }

    fn serve(&mut self) -> Result<()> {
        let http = self.files.path().join("http.cfg");
        fs::write(
            &http,
            format!(
                "global\n nbthread 1\n maxconn 4096\ndefaults\n mode http\n timeout client 60s\n timeout server 60s\n timeout connect 5s\n\
                 frontend http\n bind 0.0.0.0:{HTTP}\n http-request return status 200 content-type text/plain string ok\n"
            ),
        )?;
        for line in [
            format!("iperf3 -s -p {BULK}"),
            format!("sockperf sr --tcp -i 0.0.0.0 -p {ROUND_TRIP}"),
            format!("sockperf sr -i 0.0.0.0 -p {DATAGRAM}"),
            format!("haproxy -db -f {}", http.display()),
        ] {
            self.servers.push(Process::start(&self.backend, &line)?);
        }
        // The others' receivers come with a measurement.
        let served = |port: &Port| ![SINK, STREAM].contains(&port.number);
        for Port { protocol, number } in PORTS.into_iter().filter(served) {
            wait_for_port(&self.backend, protocol, number)?;
        }
        // Neighbours get known and backends resolved, as they are on a machine in use.
        for client in [Client::External, Client::Localhost, Client::Hairpin] {
            if let Some((netns, address)) = self.path(client) {
                let _ = traffic::send_datagram(netns, (address, SINK).into(), "hello");
            }
        }
        std::thread::sleep(Duration::from_millis(200));
        Ok(())
    }

    /// Where a client of this kind is, and the address that it connects to; `None` where the contender
    /// has no such path.
    pub(crate) fn path(&self, client: Client) -> Option<(&Netns, IpAddr)> {
        let Topology {
            host,
            client: outside,
            peer,
            backend,
            ..
        } = &self.topology;
        let netns = match client {
            Client::External => outside,
            Client::Localhost => host,
            Client::Hairpin => &peer.netns,
        };
        let direct = backend.address(Family::V4);
        let published = match client {
            Client::Localhost => IpAddr::from([127, 0, 0, 1]),
            _ => self.topology.host_address(Family::V4),
        };
        let address = match (self.contender, client) {
            (Contender::Wire, Client::External) => WIRE[1].parse().ok()?,
            (Contender::Wire, _) => return None,
            (
                Contender::Hop | Contender::RemoteHop | Contender::Relay,
                Client::Localhost | Client::Hairpin,
            ) => return None,
            (Contender::RemoteHop, Client::External) => REMOTE.parse().ok()?,
            (
                Contender::Hop
                | Contender::Routing
                | Contender::RoutingBesideNothing
                | Contender::RoutingBeside(_),
                _,
            ) => direct,
            (Contender::IptablesBare, Client::Localhost | Client::Hairpin) => return None,
            (Contender::Pasta, Client::Hairpin) => return None,
            _ => published,
        };
        Some((netns, address))
    }

    pub(crate) fn has_udp(&self) -> bool {
        self.contender.has_udp()
    }

    /// Whether it carries more than a few long conversations.
    pub(crate) fn is_for_many(&self) -> bool {
        self.contender != Contender::Relay
    }

    /// Puts the servers and a userland proxy on their cores.
    pub(crate) fn place(&self, placement: Placement) -> Result<()> {
        let daemon = self.daemon.iter().map(Daemon::pid);
        let processes = self.servers.iter().chain(&self.proxies).map(Process::pid);
        for pid in processes.chain(daemon) {
            pin(pid, placement.others())?;
        }
        Ok(())
    }

    /// Sends frames to the host as fast as can be, from the source addresses of the `first` block on, and returns how
    /// many reached the container, and the time.
    ///
    /// # Errors
    /// The kernel cannot generate, or there is no path.
    pub(crate) fn flood(&self, frames: Frames, first: u8, until: Until) -> Result<(u64, Duration)> {
        let wire = self.contender == Contender::Wire;
        let device = if wire { "wire0" } else { "eth0" };
        let Some((client, IpAddr::V4(destination))) = self.path(Client::External) else {
            bail!("no path");
        };
        let receiver = if wire { &self.backend } else { self.host() };
        let load = Load {
            netns: client,
            device,
            macs: [mac(receiver, device)?, mac(client, device)?],
            source: source(first),
            destination,
            port: SINK,
            frames,
        };
        generator::send(
            &load,
            (receiver, device),
            (&self.backend, self.inside(device)),
            until,
        )
    }

    /// Answers such frames from the container, as fast as can be, as if they had had this source port and address, and returns
    /// how many reached the client, and the time.
    ///
    /// # Errors
    /// The kernel cannot generate, or the container is not on the bridge.
    pub(crate) fn answer(&self, first: u8, port: u16, until: Until) -> Result<(u64, Duration)> {
        let Topology {
            backend, client, ..
        } = &self.topology;
        let IpAddr::V4(address) = backend.address(Family::V4) else {
            bail!("no address");
        };
        let load = Load {
            netns: &self.backend,
            device: "eth0",
            macs: [mac(self.host(), "br0")?, mac(&self.backend, "eth0")?],
            source: address,
            destination: source(first),
            port,
            frames: Frames::ONE_FLOW,
        };
        let _sink = generator::sink(client, &["eth0"], port)?;
        generator::send(&load, (self.host(), &backend.veth), (client, "eth0"), until)
    }

    /// The name in the container of what frames get to by this device.
    fn inside<'a>(&self, device: &'a str) -> &'a str {
        if self.contender == Contender::Pasta {
            "eth1"
        } else {
            device
        }
    }
}

/// The first source address of a block of the generator's.
const fn source(block: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 19, block, 0)
}

impl Drop for Arena {
    fn drop(&mut self) {
        let file = self.files.path().join(NETNS_FILE);
        if file.exists() {
            let _ = nix::mount::umount(&file);
        }
    }
}

/// Without this, 127.0.0.1 cannot be sent to a container by DNAT.
fn masquerade_localhost(host: &Netns) -> Result<()> {
    set_sysctl(host, "net/ipv4/conf/all/route_localnet", "1")
}

/// Sets a sysctl of one of our own network namespaces.
fn set_sysctl(netns: &Netns, name: &str, value: &str) -> Result<()> {
    netns.enter(|| fs::write(format!("/proc/sys/{name}"), value).with_context(|| name.to_owned()))
}

fn mac(netns: &Netns, device: &str) -> Result<[u8; 6]> {
    let text = netns.run(&format!("ip -j link show {device}"))?;
    let links: serde_json::Value = serde_json::from_str(&text)?;
    let address = links[0]["address"].as_str().context("no MAC")?;
    let bytes: Vec<u8> = address
        .split(':')
        .map(|part| u8::from_str_radix(part, 16))
        .collect::<Result<_, _>>()?;
    bytes
        .try_into()
        .map_err(|_| anyhow::anyhow!("MAC {address}"))
}
