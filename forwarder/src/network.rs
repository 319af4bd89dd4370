//! What the kernel says about this host's network: links, addresses, routes, neighbours and bridges'
//! forwarding tables, read by netlink as one [`Snapshot`], and a watch that tells when to read again.
//! What follows from a snapshot is decided in `plan/locations.rs` and `plan.rs`.

pub mod containers;
pub mod dump;
pub mod firewall;
pub mod local;
pub mod netlink;
mod offload;
mod rules;
mod snapshot;
pub mod xfrm;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::ControlFlow,
};

use anyhow::{Context as _, Result};
use futures_util::{Stream, StreamExt as _};
use netlink_packet_core::{NLM_F_ACK, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{
        BridgeStpState, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData,
        LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
    },
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
    },
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType, RouteVia},
    tc::{TcAttribute, TcHandle, TcMessage},
};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};

pub use self::snapshot::{
    Answer, Bridging, Claim, FarEnd, Header, Kind, Link, Local, Mac, Neighbour, Peer, Queueing,
    Route, Snapshot, Standing,
};

/// include/uapi/linux/rtnetlink.h
const RT_TABLE_LOCAL: u32 = 255;

/// A netlink connection that reads snapshots.
#[derive(Debug)]
pub struct Reader {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
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
        })
    }

    /// Reads everything but what containers say. What `previous` knew of a bridge's ports is kept while the port is
    /// there and the MAC is not known elsewhere: the fast path goes round the bridge, which
    /// therefore forgets. Its answers are kept too: who asks knows when they are out of date.
    ///
    /// # Errors
    /// The kernel refuses a dump.
    pub async fn snapshot(&self, previous: &Snapshot) -> Result<Snapshot> {
        let mut snapshot = Snapshot::default();
        let links: Vec<_> = collect(self.handle.link().get().execute(), "links").await?;
        snapshot.links = links.iter().filter_map(link).collect();
        let qdiscs: Vec<_> = collect(self.handle.qdisc().get().execute(), "qdiscs").await?;
        for qdisc in &qdiscs {
            let index = qdisc.header.index.cast_unsigned();
            if let Some(link) = snapshot.links.get_mut(&index) {
                link.queueing.note(qdisc);
            }
        }
        for ifindex in snapshot.carrying_vlans() {
            if let Some(link) = snapshot.links.get_mut(&ifindex) {
                link.hides_tags = offload::takes_tags_off(&link.name);
            }
        }
        let addresses: Vec<_> = collect(self.handle.address().get().execute(), "addresses").await?;
        snapshot.addresses = addresses.iter().filter_map(address).collect();
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        for wanted in [v4, v6] {
            let routes: Vec<_> =
                collect(self.handle.route().get(wanted).execute(), "routes").await?;
            snapshot.routes.extend(routes.iter().filter_map(route));
        }
        let neighbours: Vec<_> =
            collect(self.handle.neighbours().get().execute(), "neighbours").await?;
        snapshot.neighbours = neighbours.iter().filter_map(neighbour).collect();
        snapshot.rules = self.has_rules().await?;
        snapshot.answers = previous.answers.clone();
        snapshot.policies = xfrm::policies().await?;
        snapshot.forwards = (is_on("ipv4/ip_forward"), is_on("ipv6/conf/all/forwarding"));
        snapshot.strict = strict(&snapshot);
        snapshot.forwarding = ports(&snapshot, previous)?;
        Ok(snapshot)
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

/// The ports that bridges have learnt their neighbours' MACs on. Each is asked for by itself: a container may send from any
/// number of MACs, and a table may be long.
fn ports(snapshot: &Snapshot, previous: &Snapshot) -> Result<HashMap<(u32, Mac), u32>> {
    let links = &snapshot.links;
    let is_bridge = |bridge: &u32| links.get(bridge).is_some_and(|it| it.kind == Kind::Bridge);
    let neighbours = snapshot.neighbours.iter();
    let neighbours = neighbours.map(|((device, _), neighbour)| (*device, neighbour.mac));
    let wanted: BTreeSet<(u32, Mac)> = neighbours.filter(|(it, _)| is_bridge(it)).collect();
    let socket = netlink::Socket::open().context("open a netlink socket")?;
    let mut ports = HashMap::new();
    for (bridge, mac) in wanted {
        let is_port = |port: &u32| {
            let link = links.get(port);
            link.is_some_and(|link| link.controller == Some(bridge))
        };
        let known = previous.forwarding.get(&(bridge, mac)).copied();
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
        if let Some(port) = port.filter(is_port).or(known.filter(is_port)) {
            ports.insert((bridge, mac), port);
        }
    }
    Ok(ports)
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
    let networks = snapshot
        .routes
        .iter()
        .filter(|route| !route.local && route.destination.is_ipv4() && route.prefix < 32);
    let devices: BTreeSet<u32> = networks.map(|route| route.ifindex).collect();
    let is_strict = |ifindex: &u32| {
        let link = snapshot.links.get(ifindex);
        link.is_some_and(|link| value(&link.name).max(all) == 1)
    };
    devices.into_iter().filter(is_strict).collect()
}

/// Whether a sysctl of the own network namespace is set.
fn is_on(setting: &str) -> bool {
    std::fs::read_to_string(format!("/proc/sys/net/{setting}")).is_ok_and(|text| text.trim() != "0")
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Something that decides by which route an address is reached, and from which source.
    Routing,
    /// What is known of a neighbour now, by its device and address.
    Neighbour((u32, IpAddr), Option<Neighbour>),
    /// A bridge has learnt, or forgotten, where a MAC is.
    Learnt(Mac),
    Other,
}

impl Change {
    /// Whether it changes anything that a snapshot tells.
    pub fn matters_to(&self, snapshot: &Snapshot) -> bool {
        match self {
            Self::Neighbour(key, neighbour) => snapshot.neighbours.get(key) != neighbour.as_ref(),
            Self::Learnt(mac) => snapshot.neighbours.values().any(|it| it.mac == *mac),
            Self::Routing | Self::Other => true,
        }
    }
}

/// A stream that yields when something that a snapshot holds has changed.
///
/// # Errors
/// The kernel refuses the socket.
pub fn changes() -> Result<impl Stream<Item = Change> + Unpin> {
    let (connection, _, messages) = rtnetlink::new_multicast_connection(&[
        MulticastGroup::Link,
        MulticastGroup::Neigh,
        MulticastGroup::Tc,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Rule,
        MulticastGroup::Ipv4Netconf,
        MulticastGroup::Ipv6Netconf,
    ])
    .context("open a netlink socket for events")?;
    tokio::spawn(connection);
    let network = messages.map(|(message, _)| change(&message.payload));
    let policies = xfrm::changes().map(|()| Change::Other);
    Ok(futures_util::stream::select(network, policies))
}

fn change(event: &NetlinkPayload<RouteNetlinkMessage>) -> Change {
    use RouteNetlinkMessage as Message;
    match event {
        NetlinkPayload::InnerMessage(Message::NewNeighbour(message)) => {
            neighbour_change(message, neighbour(message).map(|(_, it)| it))
        }
        NetlinkPayload::InnerMessage(Message::DelNeighbour(message)) => {
            neighbour_change(message, None)
        }
        NetlinkPayload::InnerMessage(
            Message::NewQueueDiscipline(_)
            | Message::DelQueueDiscipline(_)
            | Message::NewTrafficFilter(_)
            | Message::DelTrafficFilter(_),
        ) => Change::Other,
        // Where events were lost, any may have been.
        _ => Change::Routing,
    }
}

fn neighbour_change(message: &NeighbourMessage, neighbour: Option<Neighbour>) -> Change {
    if message.header.family == AddressFamily::Bridge {
        return mac(message).map_or(Change::Other, Change::Learnt);
    }
    let address = neighbour_address(message);
    address.map_or(Change::Other, |address| {
        Change::Neighbour((message.header.ifindex, address), neighbour)
    })
}

async fn collect<T>(
    stream: impl Stream<Item = Result<T, rtnetlink::Error>>,
    what: &str,
) -> Result<Vec<T>> {
    let mut stream = std::pin::pin!(stream);
    let mut all = Vec::new();
    while let Some(item) = stream.next().await {
        match item {
            Ok(item) => all.push(item),
            // A family that the kernel was built or started without has nothing to list.
            Err(rtnetlink::Error::NetlinkError(error))
                if matches!(-error.raw_code(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP) => {}
            Err(error) => return Err(error).with_context(|| format!("read {what}")),
        }
    }
    Ok(all)
}

fn link(message: &LinkMessage) -> Option<(u32, Link)> {
    let mut name = None;
    let (mut info_kind, mut mac, mut controller, mut namespace) = (None, None, None, None);
    let (mut bridging, mut parent) = (Bridging::default(), None);
    let mut mtu = u32::MAX;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Address(value) => mac = Mac::try_from(value.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::Controller(value) => controller = Some(*value),
            LinkAttribute::LinkNetNsId(id) => namespace = Some(*id),
            LinkAttribute::Link(index) => parent = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                info_kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
                infos.iter().for_each(|info| bridging.note(info));
            }
            _ => {}
        }
    }
    let header = match message.header.link_layer_type {
        LinkLayerType::Ether | LinkLayerType::Loopback => Header::Ethernet,
        LinkLayerType::None | LinkLayerType::Rawip | LinkLayerType::Ppp => Header::Ip,
        _ => Header::Other,
    };
    let is_vlan = info_kind == Some(InfoKind::Vlan);
    let kind = match info_kind {
        _ if message.header.link_layer_type == LinkLayerType::Loopback => Kind::Loopback,
        Some(InfoKind::Bridge) => Kind::Bridge,
        Some(InfoKind::Veth) => Kind::Veth {
            peer: namespace.map(|namespace| Peer {
                namespace,
                // Older kernels leave it out where the number is the same.
                ifindex: parent.unwrap_or(message.header.index),
            }),
        },
        Some(InfoKind::Tun) if header == Header::Ethernet => Kind::Tap,
        Some(InfoKind::Bond | InfoKind::Team) => Kind::Bond,
        _ => Kind::Other,
    };
    let up = message.header.flags.contains(LinkFlags::Up);
    let mac = mac.filter(|_| header == Header::Ethernet);
    Some((
        message.header.index,
        Link {
            name: name?,
            kind,
            header,
            mac,
            controller,
            up,
            mtu,
            queueing: Queueing::default(),
            bridging,
            vlan_of: parent.filter(|_| is_vlan && namespace.is_none()),
            hides_tags: false,
        },
    ))
}

impl Bridging {
    fn note(&mut self, info: &LinkInfo) {
        match info {
            LinkInfo::Data(InfoData::Bridge(settings)) => {
                for setting in settings {
                    match setting {
                        InfoBridge::VlanFiltering(on) => self.vlan_filtering = *on,
                        InfoBridge::StpState(state) => {
                            self.stp = *state != BridgeStpState::Disabled
                        }
                        _ => {}
                    }
                }
            }
            LinkInfo::PortData(InfoPortData::BridgePort(settings)) => {
                self.isolated = settings.contains(&InfoBridgePort::Isolated(true));
            }
            _ => {}
        }
    }
}

/// Root qdiscs that hold no packet back: queues, and those that share the link among flows or devices' queues.
const NOT_SHAPING: [&str; 16] = [
    "noqueue",
    "noop",
    "pfifo",
    "bfifo",
    "pfifo_fast",
    "pfifo_head_drop",
    "fq",
    "fq_codel",
    "fq_pie",
    "codel",
    "pie",
    "sfq",
    "red",
    "hhf",
    "mq",
    "mqprio",
];

impl Queueing {
    fn note(&mut self, qdisc: &TcMessage) {
        let kind = qdisc.attributes.iter().find_map(|a| match a {
            TcAttribute::Kind(kind) => Some(kind.as_str()),
            _ => None,
        });
        match kind {
            Some("ingress") => self.ingress_only = true,
            Some(kind) if qdisc.header.parent == TcHandle::ROOT && !NOT_SHAPING.contains(&kind) => {
                self.shaper = Some(kind.to_owned());
            }
            _ => {}
        }
    }
}

/// An address of a device, wherever that is.
pub(crate) fn address(message: &AddressMessage) -> Option<Local> {
    // For IPv4 on a point-to-point link, Address is the far end and Local this one.
    let find =
        |pick: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(pick);
    let address = find(|a| match a {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    })
    .or_else(|| {
        find(|a| match a {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })?;
    Some(Local {
        ifindex: message.header.index,
        address,
        prefix: message.header.prefix_len,
        standing: standing(message),
    })
}

/// IPv4 knows none of this: its addresses are used whatever their lifetime.
fn standing(message: &AddressMessage) -> Standing {
    let flags = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    let flags = flags.unwrap_or(AddressFlags::empty());
    let has = |flag| flags.contains(flag);
    if message.header.family != AddressFamily::Inet6 {
        Standing::Preferred
    } else if has(AddressFlags::Dadfailed) || has(AddressFlags::Tentative) {
        Standing::Unusable
    } else if has(AddressFlags::Deprecated) {
        Standing::Deprecated
    } else {
        Standing::Preferred
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

/// A route that every packet may take: of table main, or of this host's own addresses.
fn route(message: &RouteMessage) -> Option<Route> {
    let (route, table) = route_and_table(message)?;
    let wanted = if route.local {
        RT_TABLE_LOCAL
    } else {
        u32::from(RouteHeader::RT_TABLE_MAIN)
    };
    (table == wanted).then_some(route)
}

/// A route that leads somewhere, and the table that it is in.
fn route_and_table(message: &RouteMessage) -> Option<(Route, u32)> {
    let header = &message.header;
    let unspecified = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut table = u32::from(header.table);
    let mut route = Route {
        destination: unspecified,
        prefix: header.destination_prefix_length,
        ifindex: 0,
        gateway: None,
        preferred_source: None,
        priority: 0,
        local: header.kind == RouteType::Local,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => route.destination = ip(address)?,
            RouteAttribute::Oif(index) => route.ifindex = *index,
            RouteAttribute::Gateway(address) => route.gateway = ip(address).or(Some(unspecified)),
            RouteAttribute::Via(via) => {
                route.gateway = Some(match via {
                    RouteVia::Inet(v4) => IpAddr::V4(*v4),
                    RouteVia::Inet6(v6) => IpAddr::V6(*v6),
                    _ => unspecified,
                });
            }
            RouteAttribute::PrefSource(address) => route.preferred_source = ip(address),
            RouteAttribute::Priority(priority) => route.priority = *priority,
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::MultiPath(hops) => {
                route.ifindex = hops.first()?.interface_index;
                route.gateway = Some(unspecified);
            }
            _ => {}
        }
    }
    let leads = matches!(header.kind, RouteType::Unicast | RouteType::Local);
    (leads && route.ifindex != 0).then_some((route, table))
}

fn mac(message: &NeighbourMessage) -> Option<Mac> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => Mac::try_from(bytes.as_slice()).ok(),
            _ => None,
        })
}

fn neighbour_address(message: &NeighbourMessage) -> Option<IpAddr> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
            _ => None,
        })
}

fn neighbour(message: &NeighbourMessage) -> Option<((u32, IpAddr), Neighbour)> {
    if matches!(
        message.header.state,
        NeighbourState::Incomplete | NeighbourState::Failed | NeighbourState::Noarp
    ) {
        return None;
    }
    let address = neighbour_address(message)?;
    let permanent = message.header.state == NeighbourState::Permanent;
    let neighbour = Neighbour {
        mac: mac(message)?,
        permanent,
    };
    Some(((message.header.ifindex, address), neighbour))
}

/// The port of an entry of a bridge's table.
fn learnt(message: &NeighbourMessage, links: &BTreeMap<u32, Link>) -> Option<u32> {
    let port = message.header.ifindex;
    // The port's own address is listed as permanent, and is the bridge's.
    let is_own =
        message.header.state == NeighbourState::Permanent && links.get(&port)?.mac == mac(message);
    (!is_own).then_some(port)
}
