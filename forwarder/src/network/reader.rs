//! The reading of the network: whole at the start and after events were lost. Then events are applied, and only what they do
//! not tell in full is read anew: small tables, and a large one where an event leaves it unclear.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::ControlFlow,
};

use anyhow::{Context as _, Result};
use netlink_packet_core::NLM_F_ACK;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::AddressMessage,
    link::{LinkAttribute, LinkExtentMask, LinkMessage},
    neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    tc::TcMessage,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{
    Applied, Event, Kind, Link, Mac, Route, Routes, Snapshot, address, learnt, link, list,
    neighbour, netlink, offload, routes::route, rules::rules, xfrm,
};

/// A netlink connection that reads snapshots.
#[derive(Debug)]
pub struct Reader {
    pub(super) handle: Handle,
    connection: tokio::task::JoinHandle<()>,
    stale: Stale,
    /// Bridges and MACs whose ports were asked for since they were last learnt.
    asked: HashSet<(u32, Mac)>,
}

/// What has to be read anew.
#[derive(Debug)]
struct Stale {
    /// All that is small.
    tables: bool,
    routes: bool,
    neighbours: bool,
    /// Devices that were down or without an IPv4 address, or have gone: the kernel drops their routes without a word.
    devices: BTreeSet<u32>,
    /// Addresses that have gone: it drops routes that packets leave from them by.
    sources: BTreeSet<IpAddr>,
}

impl Stale {
    fn new(all: bool) -> Self {
        Self {
            tables: all,
            routes: all,
            neighbours: all,
            devices: BTreeSet::new(),
            sources: BTreeSet::new(),
        }
    }

    /// Whether the kernel may have dropped one of the routes that are known.
    fn has_doubtful(&self, routes: &Routes) -> bool {
        let is_doubtful = |route: &Route| {
            self.devices.contains(&route.ifindex)
                || route.has_several_hops() && !self.devices.is_empty()
                || route
                    .preferred_source
                    .is_some_and(|it| self.sources.contains(&it))
        };
        let is_clear = self.devices.is_empty() && self.sources.is_empty();
        !is_clear && routes.iter().any(is_doubtful)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Reader {
    /// Opens a netlink socket in the current network namespace.
    ///
    /// # Errors
    /// The kernel refuses the socket.
    pub fn open() -> Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("open a netlink socket")?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
            stale: Stale::new(true),
            asked: HashSet::new(),
        })
    }

    /// Applies an event to what was read before; whether anything may be different now. What the event does not tell is read by
    /// the next [`Reader::read`].
    pub fn hear(&mut self, event: Event, snapshot: &mut Snapshot) -> bool {
        match event {
            Event::Lost => {
                self.stale = Stale::new(true);
                self.asked.clear();
            }
            Event::Link { ifindex, up } => {
                self.stale.tables = true;
                if !up {
                    self.stale.devices.insert(ifindex);
                }
            }
            Event::AddressGone(ifindex, address) => {
                self.stale.tables = true;
                self.stale.sources.insert(address);
                let addresses = &mut snapshot.addresses;
                addresses.retain(|it| (it.ifindex, it.address) != (ifindex, address));
                let mut others = addresses.iter().filter(|it| it.ifindex == ifindex);
                if !others.any(|it| it.address.is_ipv4()) {
                    self.stale.devices.insert(ifindex);
                }
            }
            Event::Address | Event::Rules | Event::Other => self.stale.tables = true,
            Event::NextHops => self.stale.routes = true,
            Event::Route(route, told) => match snapshot.routes.apply(route, told) {
                Applied::Changed => {}
                Applied::AsBefore => return false,
                Applied::Unclear => self.stale.routes = true,
            },
            Event::Neighbour(key, Some(neighbour)) => {
                return snapshot.neighbours.insert(key, neighbour) != Some(neighbour);
            }
            Event::Neighbour(key, None) => return snapshot.neighbours.remove(&key).is_some(),
            Event::Learnt(bridge, mac) => return self.asked.remove(&(bridge, mac)),
        }
        true
    }

    /// Reads what is not known, or not any more, but for what containers say. What was known of a bridge's ports is kept while
    /// the port is there and the MAC is not known elsewhere: the fast path goes round the bridge, which therefore forgets. The
    /// kernel's answers are kept too: who asks knows when they are out of date.
    ///
    /// # Errors
    /// The kernel refuses a dump; the next reading tries it again.
    pub async fn read(&mut self, snapshot: &mut Snapshot) -> Result<()> {
        if self.stale.tables {
            Self::read_tables(snapshot).await?;
            self.stale.tables = false;
        }
        if self.stale.routes || self.stale.has_doubtful(&snapshot.routes) {
            self.stale.routes = true;
            snapshot.routes = routes()?;
            self.stale.routes = false;
        }
        if self.stale.neighbours {
            let all = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
            let mut neighbours = HashMap::new();
            list(all, "neighbours", |it| {
                if let RouteNetlinkMessage::NewNeighbour(it) = it {
                    neighbours.extend(neighbour(&it));
                }
            })?;
            snapshot.neighbours = neighbours;
        }
        self.stale = Stale::new(false);
        snapshot.strict = strict(snapshot);
        self.read_ports(snapshot)
    }

    async fn read_tables(snapshot: &mut Snapshot) -> Result<()> {
        let mut all = LinkMessage::default();
        // Counters are half of what a link has to say.
        all.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
        let all = RouteNetlinkMessage::GetLink(all);
        let mut links = BTreeMap::new();
        list(all, "links", |it| {
            if let RouteNetlinkMessage::NewLink(it) = it {
                links.extend(link(&it));
            }
        })?;
        let all = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        list(all, "qdiscs", |it| {
            if let RouteNetlinkMessage::NewQueueDiscipline(it) = it
                && let Some(link) = links.get_mut(&it.header.index.cast_unsigned())
            {
                link.queueing.note(&it);
            }
        })?;
        let all = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let mut addresses = Vec::new();
        list(all, "addresses", |it| {
            if let RouteNetlinkMessage::NewAddress(it) = it {
                addresses.extend(address(&it));
            }
        })?;
        snapshot.links = links;
        for ifindex in snapshot.carrying_vlans() {
            if let Some(link) = snapshot.links.get_mut(&ifindex) {
                link.hides_tags = offload::takes_tags_off(&link.name);
            }
        }
        snapshot.addresses = addresses;
        (snapshot.rules, snapshot.marks, snapshot.selective) = rules()?;
        snapshot.policies = xfrm::policies().await?;
        snapshot.forwards = (is_on("ipv4/ip_forward"), is_on("ipv6/conf/all/forwarding"));
        Ok(())
    }

    /// The ports that bridges have learnt their neighbours' MACs on. Each is asked for by itself: a container may send from any
    /// number of MACs, and a table may be long.
    fn read_ports(&mut self, snapshot: &mut Snapshot) -> Result<()> {
        let links = &snapshot.links;
        let is_bridge = |bridge: &u32| links.get(bridge).is_some_and(|it| it.kind == Kind::Bridge);
        let neighbours = snapshot.neighbours.iter();
        let neighbours = neighbours.map(|((device, _), neighbour)| (*device, neighbour.mac));
        let wanted: HashSet<(u32, Mac)> = neighbours.filter(|(it, _)| is_bridge(it)).collect();
        self.asked.retain(|key| wanted.contains(key));
        let is_port = |(bridge, _): &(u32, Mac), port: &u32| {
            let link = links.get(port);
            link.is_some_and(|link| link.controller == Some(*bridge))
        };
        let ports = &mut snapshot.forwarding;
        ports.retain(|key, port| wanted.contains(key) && is_port(key, port));
        if self.asked.len() == wanted.len() {
            return Ok(());
        }
        let socket = netlink::Socket::open().context("open a netlink socket")?;
        for key in wanted {
            // Before it is asked for: what changes meanwhile is heard.
            if self.asked.insert(key)
                && let Some(port) = port_of(&socket, key, links).filter(|port| is_port(&key, port))
            {
                ports.insert(key, port);
            }
        }
        Ok(())
    }
}

impl Reader {
    /// Has the kernel find out a neighbour's MAC, as if a packet waited for it.
    pub async fn ask_neighbour(&self, ifindex: u32, address: IpAddr) {
        let mut request = self.handle.neighbours().add(ifindex, address).replace();
        request.message_mut().header.flags = NeighbourFlags::Use;
        request.message_mut().header.state = NeighbourState::None;
        if let Err(error) = request.execute().await {
            tracing::debug!("ask for neighbour {address}: {error}");
        }
    }

    /// Makes the kernel forget a neighbour's MAC.
    pub async fn forget_neighbour(&self, ifindex: u32, address: IpAddr, mac: Mac) {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = ifindex;
        message.header.family = if address.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        message
            .attributes
            .push(NeighbourAttribute::Destination(address.into()));
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        if let Err(error) = self.handle.neighbours().del(message).execute().await {
            tracing::debug!("forget neighbour {address}: {error}");
        }
    }
}

fn routes() -> Result<Routes> {
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    let mut all = Routes::default();
    for wanted in [v4, v6] {
        list(RouteNetlinkMessage::GetRoute(wanted), "routes", |it| {
            if let RouteNetlinkMessage::NewRoute(it) = it {
                all.extend(route(&it));
            }
        })?;
    }
    Ok(all)
}

/// The port that a bridge has learnt a MAC on.
fn port_of(
    socket: &netlink::Socket,
    (bridge, mac): (u32, Mac),
    links: &BTreeMap<u32, Link>,
) -> Option<u32> {
    let mut question = NeighbourMessage::default();
    question.header.family = AddressFamily::Bridge;
    question.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        NeighbourAttribute::Controller(bridge),
    ];
    let mut port = None;
    let asked = socket.ask(
        RouteNetlinkMessage::GetNeighbour(question),
        NLM_F_ACK,
        |answer| {
            if let Some(RouteNetlinkMessage::NewNeighbour(entry)) = answer {
                port = learnt(&entry, links).or(port);
            }
            ControlFlow::Continue(())
        },
    );
    match asked.map_err(|error| error.raw_os_error()) {
        Ok(()) | Err(Some(libc::ENOENT | libc::ENODEV)) => {}
        Err(_) => tracing::debug!("bridge {bridge} does not say where {mac:02x?} is"),
    }
    port
}

/// The devices with routes to networks that have rp_filter 1: the greater of the device's own value and that of all counts
/// (Documentation/networking/ip-sysctl.rst).
fn strict(snapshot: &Snapshot) -> BTreeSet<u32> {
    let value = |name: &str| {
        let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim().parse::<u32>().unwrap_or(0)
    };
    let all = value("all");
    let is_before_networks = |ifindex: u32| {
        let mut routes = snapshot.routes.by(ifindex, false);
        routes.any(|route| route.destination.is_ipv4() && route.prefix < 32)
    };
    let links = snapshot.links.iter();
    let links = links.filter(|(ifindex, _)| is_before_networks(**ifindex));
    let strict = links.filter(|(_, link)| value(&link.name).max(all) == 1);
    strict.map(|(ifindex, _)| *ifindex).collect()
}

/// Whether a sysctl of the own network namespace is set.
fn is_on(setting: &str) -> bool {
    std::fs::read_to_string(format!("/proc/sys/net/{setting}")).is_ok_and(|text| text.trim() != "0")
}
