//! What observers see of the daemon, at any time and without asking it: its publishes, and the kernel's flows and
//! counters. Walks over flows happen on the observer's thread.

mod measure;
mod places;
mod rates;

use std::{
    collections::BTreeMap,
    iter,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Release},
        },
    },
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use forwarder_common::{
    flow::{Flow, Phase, delivery, state},
    tuple::{Address, TCP, Tuple},
};
use ipnet::IpNet;
use tokio::sync::broadcast;

pub(super) use self::places::Sums;
use self::{
    measure::Kept,
    places::{Places, Sum},
    rates::Rates,
};
use crate::{
    clock,
    control::{
        api::{Ban, Counter, Endpoint, Event, Listed, ListedFlow, NamedPublish, Running},
        server::{FlowFilter, Observe, Rows},
    },
    datapath::maps::{Counters, FlowTables, Mapped, Maps, RefusedCounters, Walk},
    metrics::{Durations, Measured},
    plan::Unserved,
    proxy::{self, Idle, Meant, Meter},
    publish::{
        Holder, Id, Owner, Wanted,
        bans::{self, Banned, Until},
        spec::{Ports, Zone},
    },
};

/// Events that a slow observer may be behind; it is told how many more were lost.
const EVENTS: usize = 1024;

/// A publish as it is served now.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub wanted: Wanted,
    /// In `PUBLISHES`.
    pub index: u32,
    /// One of [`delivery`] if the fast path serves it.
    pub delivery: Option<u32>,
    pub xdp: Option<&'static str>,
    pub unserved: Option<Unserved>,
    pub allow: Arc<[IpNet]>,
    pub draining: bool,
    pub meter: Option<Meter>,
    /// Packets and bytes of flows to backends that it had before.
    pub ended: Arc<[AtomicU64; 2]>,
}

impl Row {
    /// Of one that nothing carries yet.
    pub(super) fn new(wanted: Wanted) -> Self {
        Self {
            wanted,
            index: 0,
            delivery: None,
            xdp: None,
            unserved: None,
            allow: Arc::default(),
            draining: false,
            meter: None,
            ended: Arc::default(),
        }
    }

    fn listed(&self, carried: Sum, [packets_per_second, bytes_per_second]: [f64; 2]) -> Listed {
        let publish = &self.wanted.publish;
        let spec = &publish.spec;
        let endpoint = |address, zone: &Option<Zone>, ports: Ports| Endpoint {
            address,
            zone: zone.clone(),
            port: ports.first,
            end_port: ports.last,
        };
        Listed {
            id: self.wanted.id,
            owner: self.wanted.owner.clone(),
            protocol: spec.protocol,
            frontend: endpoint(spec.address, &spec.zone, spec.ports),
            backend: endpoint(Some(spec.backend), &spec.backend_zone, spec.backend_ports),
            datapath: match (self.delivery, publish.holder) {
                (Some(_), _) => "ebpf",
                (None, Holder::Forwarder) => "userland",
                (None, Holder::Engine) => "engine",
            }
            .into(),
            holder: publish.holder,
            container: publish.container.as_ref().map(|it| it.name.clone()),
            delivery: self.delivery.and_then(delivery_name).map(Into::into),
            xdp: self.xdp.map(Into::into),
            reason: self.unserved.as_ref().map(ToString::to_string),
            reason_code: self.unserved.as_ref().map(|why| why.code().into()),
            allow: self.allow.to_vec(),
            limits: publish.policy.limits.clone(),
            draining: self.draining,
            since: self.wanted.since,
            flows: carried.flows,
            packets: carried.packets,
            bytes: carried.bytes,
            packets_per_second,
            bytes_per_second,
        }
    }
}

#[derive(Debug)]
pub(super) struct View {
    rows: RwLock<BTreeMap<Id, Arc<Row>>>,
    places: Places,
    kernel: Option<Kernel>,
    respects_firewall: bool,
    /// Counts whom the proxy has refused.
    idle: Idle,
    events: broadcast::Sender<Event>,
    kept: Kept,
    rates: Rates,
    swept: Mutex<Option<Arc<Sums>>>,
    pub durations: Durations,
}

/// What is read of the kernel. One walk at a time: more would only take longer.
#[derive(Debug)]
pub(super) struct Kernel {
    flows: Mutex<FlowTables>,
    counters: Arc<Counters>,
    usage: Arc<Mapped>,
    refused: RefusedCounters,
}

impl Kernel {
    /// # Errors
    /// There are no descriptors left.
    pub(super) fn new(maps: &Maps) -> Result<Self> {
        Ok(Self {
            flows: Mutex::new(maps.flows.try_clone()?),
            counters: maps.counters(),
            usage: maps.mapped_usage(),
            refused: maps.refused()?,
        })
    }
}

impl View {
    pub(super) fn new(kernel: Option<Kernel>, idle: Idle, respects_firewall: bool) -> Self {
        Self {
            respects_firewall,
            idle,
            rows: RwLock::default(),
            places: Places::default(),
            kernel,
            events: broadcast::channel(EVENTS).0,
            kept: Kept::default(),
            rates: Rates::default(),
            swept: Mutex::default(),
            durations: Durations::default(),
        }
    }

    /// A place is a publish's, also one that it had before it got another backend.
    pub(super) fn belongs(&self, index: u32, id: Id) {
        self.places.belongs(index, id);
    }

    /// Shows a publish as it is now.
    pub(super) fn show(&self, row: &Arc<Row>) {
        let (id, index) = (row.wanted.id, row.index);
        if index != 0 {
            self.belongs(index, id);
        }
        let mut rows = self.rows.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = rows.insert(id, row.clone()) {
            self.kept.change(&before, row);
        }
    }

    pub(super) fn hide(&self, id: Id) {
        self.rows
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
        self.kept.forget(id);
        self.rates.forget(id);
    }

    /// Forgets whose a place was. What was carried there, the publish has carried.
    pub(super) fn free(&self, index: u32) {
        let id = self.places.free(index);
        let row = id.and_then(|id| self.rows(Some(id)).pop());
        if let (Some(row), Some(kernel)) = (row, &self.kernel) {
            let (packets, bytes) = kernel.usage.carried(index);
            row.ended[0].fetch_add(packets, Release);
            row.ended[1].fetch_add(bytes, Release);
            self.kept.free(row.wanted.id, kernel, index);
        }
    }

    /// The publish that has a place in `PUBLISHES`, or had it before it got another backend.
    pub(super) fn id(&self, index: u32) -> Option<Id> {
        self.places.id(index)
    }

    /// Not of one that was taken back, whose last flows end.
    fn is_shown(&self, id: Id) -> bool {
        let rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        rows.contains_key(&id)
    }

    /// A publish, without what the flows at its places have carried.
    pub(super) fn row(&self, id: Id) -> Option<Listed> {
        let row = self.rows(Some(id)).pop()?;
        Some(self.listed(&row, &Sums::default()))
    }

    fn listed(&self, row: &Row, sums: &Sums) -> Listed {
        let rates = self.rates.of(row.wanted.id);
        row.listed(self.carried(row, sums), rates)
    }

    /// Packets and bytes in both directions together. What a freed place has added to the row is read first, so that nothing is
    /// counted twice.
    fn carried(&self, row: &Row, sums: &Sums) -> Sum {
        let [packets, bytes] = row.ended.each_ref().map(|it| it.load(Acquire));
        let proxied = row.meter.as_ref().map(Meter::counters).unwrap_or_default();
        let live = self.places.sum(sums, row.wanted.id);
        Sum {
            flows: live.flows + proxied.flows,
            begun: live.begun + proxied.begun,
            packets: live.packets + packets + proxied.packets,
            bytes: live.bytes + bytes + proxied.bytes,
        }
    }

    /// Tells whoever listens.
    pub(super) fn tell(&self, event: &str, publish: Listed) {
        if self.events.receiver_count() == 0 {
            return;
        }
        let time = SystemTime::now().duration_since(UNIX_EPOCH);
        let _ = self.events.send(Event {
            time: time.unwrap_or_default().as_secs_f64(),
            event: event.into(),
            publish,
        });
    }

    pub(super) fn has_listeners(&self) -> bool {
        self.events.receiver_count() > 0
    }

    fn rows(&self, id: Option<Id>) -> Vec<Arc<Row>> {
        let rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        match id {
            Some(id) => rows.get(&id).cloned().into_iter().collect(),
            None => rows.values().cloned().collect(),
        }
    }

    fn meters(&self, id: Option<Id>) -> Vec<Meter> {
        let rows = self.rows(id).into_iter();
        rows.filter_map(|row| row.meter.clone()).collect()
    }

    /// Live flows, a slice of the table at a time.
    fn walk(&self) -> Rows<(Tuple, Flow)> {
        let Some(kernel) = &self.kernel else {
            return Box::new(iter::empty());
        };
        let flows = kernel.flows.lock().unwrap_or_else(PoisonError::into_inner);
        let flows = match flows.try_clone() {
            Ok(flows) => flows,
            Err(error) => return Box::new(iter::once(Err(error))),
        };
        let mut walk = Walk::default();
        let slices = iter::from_fn(move || flows.slice(&mut walk).transpose());
        Box::new(slices.flat_map(|slice| -> Rows<(Tuple, Flow)> {
            match slice {
                Ok(entries) => {
                    let flows =
                        entries.filter(|(_, flow)| flow.state() & (state::ALIAS | state::CUT) == 0);
                    // Made into a list, which holds no more than a slice.
                    Box::new(flows.map(Ok).collect::<Vec<_>>().into_iter())
                }
                Err(error) => Box::new(iter::once(Err(error))),
            }
        }))
    }
}

/// Whether a client's flows with a publish are meant.
fn is_meant(of: &FlowFilter, publish: Option<Id>, client: IpAddr) -> bool {
    (of.publish.is_none() || of.publish == publish)
        && of.client.is_none_or(|network| network.contains(&client))
}

/// The same, for the proxy to ask.
fn meant(of: FlowFilter) -> Meant {
    Arc::new(move |publish, client| is_meant(&of, Some(publish), client))
}

impl Observe for Arc<View> {
    fn instance(&self) -> Running {
        Running {
            version: env!("CARGO_PKG_VERSION").into(),
            respects_firewall: self.respects_firewall,
        }
    }

    fn list(&self, id: Option<Id>) -> Rows<Listed> {
        let sums = match self.sums() {
            Ok(sums) => sums,
            Err(error) => return Box::new(iter::once(Err(error))),
        };
        let view = self.clone();
        let rows = self.rows(id).into_iter();
        Box::new(rows.map(move |row| Ok(view.listed(&row, &sums))))
    }

    fn containers(&self) -> Vec<(Owner, Option<String>)> {
        let rows = self.rows(None).into_iter();
        let named = rows.map(|row| {
            let container = row.wanted.publish.container.as_ref();
            (
                row.wanted.owner.clone(),
                container.map(|it| it.name.clone()),
            )
        });
        named.collect()
    }

    fn flows(&self, of: &FlowFilter) -> Rows<ListedFlow> {
        let (view, of) = (self.clone(), *of);
        let now = clock::monotonic();
        let by_fast_path = self.walk().filter_map(move |flow| match flow {
            Ok((key, flow)) => {
                let id = view.id(flow.publish());
                let is_meant = is_meant(&of, id, flow.client.into());
                id.filter(|id| is_meant && view.is_shown(*id))
                    .map(|id| Ok(list_flow(id, &key, &flow, now)))
            }
            Err(error) => Some(Err(error)),
        });
        let meant = meant(of);
        let meters = self.meters(of.publish);
        let connections = self.idle.connections(&meant);
        let others = meters
            .into_iter()
            .flat_map(move |meter| meter.flows(&meant));
        let by_proxy = connections.chain(others).map(|it| Ok(list_proxied(&it)));
        Box::new(by_fast_path.chain(by_proxy))
    }

    fn end_flows(&self, of: &FlowFilter) -> Result<u64> {
        let meant = meant(*of);
        let meters = self.meters(of.publish);
        let others: u64 = meters.iter().map(|it| it.end_flows(&meant)).sum();
        let by_proxy = others + self.idle.end_connections(&meant);
        let Some(kernel) = &self.kernel else {
            return Ok(by_proxy);
        };
        let flows = kernel.flows.lock();
        let mut flows = flows.unwrap_or_else(PoisonError::into_inner).try_clone()?;
        let mut ended = 0;
        for flow in self.walk() {
            let (key, flow) = flow?;
            if is_meant(of, self.id(flow.publish()), flow.client.into())
                && flows.end(&key, |_| true)?.is_some()
            {
                ended += 1;
            }
        }
        Ok(ended + by_proxy)
    }

    fn stats(&self) -> Result<Vec<Counter>> {
        let counter = |(reason, packets): (&str, u64)| Counter {
            reason: reason.into(),
            packets,
        };
        let kernel = match &self.kernel {
            Some(kernel) => kernel.counters.all()?,
            None => Vec::new(),
        };
        let kernel = kernel.into_iter().map(|(reason, it)| (reason.name(), it));
        let proxy = self.idle.refused().map(|(why, it)| (why.name(), it));
        Ok(kernel.chain(proxy).map(counter).collect())
    }

    fn bans(&self) -> Rows<Ban> {
        let bans = self.idle.bans();
        let bans = bans.iter();
        let mut bans: Vec<(Banned, Owner, Until)> = bans
            .map(|(it, owner, until)| (it, owner.clone(), until))
            .collect();
        bans.sort_unstable_by(|(a, by, _), (b, other, _)| {
            (a.network, a.publish, by).cmp(&(b.network, b.publish, other))
        });
        let bans = bans.into_iter();
        Box::new(bans.map(|(Banned { publish, network }, owner, until)| {
            Ok(Ban {
                network,
                until: until.map(bans::seconds),
                publish: publish.map(NamedPublish::Id),
                owner,
            })
        }))
    }

    fn measure(&self) -> Result<Measured> {
        self.measured()
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }
}

fn list_flow(publish: Id, key: &Tuple, flow: &Flow, now: u64) -> ListedFlow {
    let show = |address: Address, port: u16| {
        SocketAddr::new(address.into(), u16::from_be(port)).to_string()
    };
    let tcp = key.protocol == u32::from(TCP);
    let (client_port, frontend_port) = flow.ports();
    let state = match Phase::of(key.protocol, flow.state()) {
        Phase::Udp => "unreplied".into(),
        Phase::UdpStream => "replied".into(),
        phase => phase.name().trim_start_matches("tcp-").replace('-', "_"),
    };
    ListedFlow {
        publish,
        protocol: if tcp { "tcp" } else { "udp" }.into(),
        client: show(flow.client, client_port),
        frontend: show(flow.frontend, frontend_port),
        source: show(key.source, key.source_port),
        backend: show(key.destination, key.destination_port),
        state,
        idle_seconds: now.saturating_sub(flow.last_seen()) / 1_000_000_000,
        packets: flow.packets(),
        bytes: flow.bytes(),
        datapath: "ebpf".into(),
    }
}

fn list_proxied(flow: &proxy::Flow) -> ListedFlow {
    ListedFlow {
        publish: flow.publish,
        protocol: flow.protocol.to_string(),
        client: plain(flow.client),
        frontend: plain(flow.frontend),
        source: plain(flow.source),
        backend: plain(flow.backend),
        state: flow.state.into(),
        idle_seconds: flow.idle.as_secs(),
        packets: flow.packets,
        bytes: flow.bytes,
        datapath: "userland".into(),
    }
}

/// Without its scope, as the fast path shows it.
fn plain(address: SocketAddr) -> String {
    SocketAddr::new(address.ip(), address.port()).to_string()
}

/// The name of a delivery in `list` and in traces; `None` for none.
pub(super) fn delivery_name(number: u32) -> Option<&'static str> {
    match number {
        delivery::PEER => Some("peer"),
        delivery::DEVICE => Some("device"),
        delivery::NEIGHBOUR => Some("neighbour"),
        delivery::STACK => Some("stack"),
        _ => None,
    }
}
