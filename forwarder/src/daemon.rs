//! A running instance: the publishes that are wanted, and the kernel and the proxy made to match them.
//! Events (requests, network changes, the sweep, signals) come one at a time; deciding is in
//! `backends.rs`, doing in `datapath.rs`, `maps.rs` and `proxy/`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use forwarder_common::{
    flow::{Flow, Hop, Timeouts, delivery},
    limits,
    publish::{Publish as Entry, flag},
    tuple::{Address, Tuple},
};
use futures_util::StreamExt as _;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{broadcast, mpsc},
    time::{Instant, sleep_until},
};
use tracing::{debug, info, warn};

use crate::{
    backends::{self, Resolved},
    cli::{DatapathChoice, Named, Run},
    control::{self, Call, Ending, Request, Response, Socket},
    datapath::{self, Datapath},
    interfaces::{self, Reader, Snapshot},
    proxy::{Held, Options as ProxyOptions, Proxy, Stop},
    spec::{Protocol, Spec},
};

/// Network changes come in bursts; one reading serves all that come within this time.
const SETTLE: Duration = Duration::from_millis(10);
const SWEEP: Duration = Duration::from_secs(2);

/// A publish as `list` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    pub id: u32,
    pub protocol: Protocol,
    pub frontend: Endpoint,
    pub backend: Endpoint,
    /// `ebpf` or `userland`.
    pub datapath: String,
    pub delivery: Option<String>,
    pub reason: Option<String>,
    pub allow: Vec<IpNet>,
    pub flows: u64,
    pub packets: u64,
    pub bytes: u64,
}

/// An address and its ports. No address: every address of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: Option<IpAddr>,
    pub port: u16,
    pub end_port: u16,
}

/// A flow as `flows` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ListedFlow {
    pub publish: u32,
    pub protocol: String,
    pub client: String,
    pub frontend: String,
    pub source: String,
    pub backend: String,
    pub state: String,
    pub idle_seconds: u64,
    pub packets: [u64; 2],
    pub bytes: [u64; 2],
}

/// A packet counter as `stats` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Counter {
    pub reason: String,
    pub packets: u64,
}

struct Published {
    spec: Spec,
    allow: Vec<IpNet>,
    /// `None` once the publish drains.
    proxy: Option<Proxy>,
    /// What `PUBLISHES` holds.
    entry: Option<Entry>,
    /// Why the fast path doesn't serve it.
    reason: Option<String>,
    /// Packets and bytes of flows that have ended.
    ended: (u64, u64),
}

impl Published {
    fn draining(&self) -> bool {
        self.proxy.is_none()
    }
}

pub struct Daemon {
    options: Run,
    datapath: Option<Datapath>,
    /// Why there is no datapath.
    without: String,
    reader: Option<Reader>,
    snapshot: Snapshot,
    publishes: BTreeMap<u32, Published>,
    last_id: u32,
    timeouts: Timeouts,
    tracing: broadcast::Sender<String>,
}

/// Serves an instance until a signal; prints a line for each publish and then `ready`.
///
/// # Errors
/// What could not be begun; everything begun before is undone.
pub async fn run(instance: &str, options: Run) -> Result<()> {
    let mut socket = Socket::bind(instance)?;
    let mut daemon = Daemon::new(instance, options).await?;
    let specs = daemon.options.publish.clone();
    let allow = daemon.options.allow.clone();
    match daemon.publish(&specs, &allow).await {
        Ok(ids) => {
            for id in ids {
                println!("{}", daemon.describe(id));
            }
        }
        Err(error) => {
            daemon.stop(false).await;
            return Err(error);
        }
    }
    if let Some(datapath) = &daemon.datapath {
        datapath.forget_others();
    }
    daemon.adopt();
    let (sender, calls) = mpsc::channel(64);
    socket.serve(sender);
    println!("ready");
    notify_ready();
    daemon.serve(calls).await
}

impl Daemon {
    async fn new(instance: &str, options: Run) -> Result<Self> {
        let (datapath, without) = match options.datapath {
            DatapathChoice::Userland => (None, "--datapath userland".to_owned()),
            choice => match load(instance) {
                Ok(datapath) => (Some(datapath), String::new()),
                Err(error) if choice == DatapathChoice::Ebpf => return Err(error),
                Err(error) => {
                    warn!("serving in user space: {error:#}");
                    (None, format!("{error:#}"))
                }
            },
        };
        let reader = datapath.is_some().then(Reader::open).transpose()?;
        let mut daemon = Self {
            options,
            datapath,
            without,
            reader,
            snapshot: Snapshot::default(),
            publishes: BTreeMap::new(),
            last_id: 0,
            timeouts: Timeouts::default(),
            tracing: broadcast::channel(1024).0,
        };
        daemon.refresh().await?;
        Ok(daemon)
    }

    async fn serve(mut self, mut calls: mpsc::Receiver<Call>) -> Result<()> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut changes = match self.reader {
            Some(_) => interfaces::changes()?.left_stream(),
            None => futures_util::stream::pending().right_stream(),
        };
        let mut settled: Option<Instant> = None;
        let mut sweep = tokio::time::interval(SWEEP);
        let (untrace, mut traces_ended) = mpsc::channel(1);
        loop {
            tokio::select! {
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                call = calls.recv() => match call {
                    Some(call) => self.answer(call, &untrace).await,
                    None => break,
                },
                Some(()) = changes.next() => {
                    settled.get_or_insert_with(|| Instant::now() + SETTLE);
                }
                () = sleep_until(settled.unwrap_or_else(Instant::now)), if settled.is_some() => {
                    settled = None;
                    if let Err(error) = self.refresh().await {
                        warn!("{error:#}");
                    }
                }
                _ = sweep.tick() => self.sweep(),
                Some(()) = traces_ended.recv() => self.end_trace(),
            }
        }
        let keep = self.options.keep;
        self.stop(keep).await;
        Ok(())
    }

    /// Undoes everything, or with `keep` leaves the pinned programs forwarding.
    async fn stop(mut self, keep: bool) {
        for published in std::mem::take(&mut self.publishes).into_values() {
            if let Some(proxy) = published.proxy {
                proxy.stop(Stop::Cut).await;
            }
        }
        match self.datapath.take() {
            Some(datapath) if !keep => datapath.remove(),
            _ => {}
        }
    }

    /// Reads the network again and makes the kernel match.
    async fn refresh(&mut self) -> Result<()> {
        let Some(reader) = &self.reader else {
            return Ok(());
        };
        let before = std::mem::take(&mut self.snapshot);
        let after = reader.snapshot(&before).await;
        self.snapshot = match after {
            Ok(after) => after,
            Err(error) => {
                self.snapshot = before;
                return Err(error);
            }
        };
        self.forget_moved_neighbours(&before).await;
        self.reconcile_devices(&before)?;
        let ids: Vec<u32> = self.publishes.keys().copied().collect();
        for id in ids {
            self.resolve(id)?;
        }
        self.ask_for_neighbours().await;
        Ok(())
    }

    /// A backend's MAC whose bridge port has gone is asked for anew: the container may be back with another,
    /// and the kernel would try the old one for seconds.
    async fn forget_moved_neighbours(&self, before: &Snapshot) {
        let Some(reader) = &self.reader else {
            return;
        };
        let backends: BTreeSet<IpAddr> = self.publishes.values().map(|p| p.spec.backend).collect();
        for (&(device, address), &mac) in &self.snapshot.neighbours {
            let port = (device, mac);
            if backends.contains(&address)
                && before.forwarding.contains_key(&port)
                && !self.snapshot.forwarding.contains_key(&port)
            {
                debug!("{address} has left its bridge port");
                reader.forget_neighbour(device, address, mac).await;
            }
        }
    }

    /// Backends on this machine whose MAC isn't known are asked for it, so that they get the
    /// fastest delivery before the first packet.
    async fn ask_for_neighbours(&self) {
        let Some(reader) = &self.reader else {
            return;
        };
        for published in self.publishes.values() {
            let Some(entry) = &published.entry else {
                continue;
            };
            let waits = entry.hop.delivery == delivery::NEIGHBOUR
                && entry.flags & flag::REMOTE == 0
                && !self
                    .snapshot
                    .neighbours
                    .contains_key(&(entry.hop.ifindex, published.spec.backend));
            if waits {
                reader
                    .ask_neighbour(entry.hop.ifindex, published.spec.backend)
                    .await;
            }
        }
    }

    fn reconcile_devices(&mut self, before: &Snapshot) -> Result<()> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        let wanted: BTreeMap<u32, String> = backends::attached(&self.snapshot)
            .map(|(ifindex, link)| (ifindex, link.name.clone()))
            .collect();
        let have: Vec<u32> = datapath.attached().collect();
        for ifindex in have.iter().filter(|ifindex| !wanted.contains_key(ifindex)) {
            datapath.detach(*ifindex);
        }
        for (ifindex, name) in wanted.iter().filter(|(ifindex, _)| !have.contains(ifindex)) {
            match datapath.attach(*ifindex, name) {
                Ok(()) => debug!("attached to {name}"),
                Err(error) => warn!("{error:#}"),
            }
        }
        let old: BTreeSet<IpAddr> = backends::local_addresses(before).collect();
        let new: BTreeSet<IpAddr> = backends::local_addresses(&self.snapshot).collect();
        for address in old.symmetric_difference(&new) {
            datapath.maps.set_local(*address, new.contains(address))?;
        }
        let old: BTreeMap<u32, u32> = backends::ways_back(before).collect();
        let new: BTreeMap<u32, u32> = backends::ways_back(&self.snapshot).collect();
        for ifindex in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
            if old.get(ifindex) != new.get(ifindex) {
                datapath
                    .maps
                    .set_way_back(*ifindex, new.get(ifindex).copied())?;
            }
        }
        Ok(())
    }

    /// Decides how a publish is served now, and writes that to the kernel if it changed.
    fn resolve(&mut self, id: u32) -> Result<()> {
        let (Some(datapath), Some(published)) = (&mut self.datapath, self.publishes.get_mut(&id))
        else {
            return Ok(());
        };
        let spec = &published.spec;
        let resolved = match spec.protocol {
            Protocol::Sctp => Err("SCTP is served in user space".to_owned()),
            Protocol::Tcp | Protocol::Udp => backends::resolve(&self.snapshot, spec.backend),
        };
        let (resolved, reason) = match resolved {
            Ok(resolved) => (resolved, None),
            // Without a hop, the program passes packets up to the proxy's socket.
            Err(reason) => {
                let nowhere = Address::UNSPECIFIED;
                let resolved = Resolved {
                    hop: Hop::default(),
                    source: nowhere,
                    remote: false,
                };
                (resolved, Some(reason))
            }
        };
        let mut flags = 0;
        flags |= if spec.backend_is_single() {
            flag::SINGLE_PORT
        } else {
            0
        };
        flags |= if resolved.remote { flag::REMOTE } else { 0 };
        flags |= if published.allow.is_empty() {
            0
        } else {
            flag::ALLOW_LIST
        };
        flags |= if published.draining() {
            flag::DRAINING
        } else {
            0
        };
        let entry = Entry {
            backend: spec.backend.into(),
            source: resolved.source,
            hop: resolved.hop,
            first_port: spec.ports.first,
            backend_port: spec.backend_ports.first,
            flags,
            reserved: 0,
        };
        published.reason = reason;
        if published.entry != Some(entry) {
            // RACE: a packet may meet half of the old entry and half of the new: one with a MAC of the old
            // hop is dropped by its receiver. The backend itself never changes in an entry.
            datapath.maps.set_publish(id, &entry)?;
            published.entry = Some(entry);
            debug!(
                "publish {id} is delivered by {:?}",
                delivery_name(entry.hop.delivery)
            );
        }
        Ok(())
    }

    /// Publishes all of them or none.
    async fn publish(&mut self, specs: &[Spec], allow: &[IpNet]) -> Result<Vec<u32>> {
        for (at, spec) in specs.iter().enumerate() {
            let others = self
                .publishes
                .values()
                .filter(|p| !p.draining())
                .map(|p| &p.spec);
            if let Some(other) = others
                .chain(&specs[..at])
                .find(|other| other.overlaps(spec))
            {
                bail!(
                    "publish {spec}: overlaps with {other}; unpublish that or choose other ports"
                );
            }
        }
        let mut ids = Vec::new();
        for spec in specs {
            match self.publish_one(spec, allow).await {
                Ok(id) => ids.push(id),
                Err(error) => {
                    for id in ids {
                        self.unpublish(id, Ending::Cut).await?;
                    }
                    return Err(error);
                }
            }
        }
        self.ask_for_neighbours().await;
        Ok(ids)
    }

    async fn publish_one(&mut self, spec: &Spec, allow: &[IpNet]) -> Result<u32> {
        // A publish that drains on these ports has had its time.
        let drained: Vec<u32> = self
            .publishes
            .iter()
            .filter(|(_, other)| other.draining() && other.spec.overlaps(spec))
            .map(|(id, _)| *id)
            .collect();
        for id in drained {
            self.unpublish(id, Ending::Cut).await?;
        }
        let held = Held::bind(spec)?;
        let id = self.free_id()?;
        let options = ProxyOptions {
            proxy_protocol: self.options.proxy_protocol,
            allow: allow.to_vec(),
        };
        let published = Published {
            spec: spec.clone(),
            allow: allow.to_vec(),
            proxy: Some(Proxy::start(held, spec.clone(), options)),
            entry: None,
            reason: self.datapath.is_none().then(|| self.without.clone()),
            ended: (0, 0),
        };
        self.publishes.insert(id, published);
        let result = self.resolve(id).and_then(|()| self.set_frontends(id, true));
        let refused = self.publishes[&id].reason.clone();
        let result = match (result, self.options.datapath, refused) {
            (Ok(()), DatapathChoice::Ebpf, Some(reason)) => Err(anyhow::anyhow!(
                "publish {spec}: {reason}; --datapath auto would serve it in user space"
            )),
            (result, ..) => result.with_context(|| format!("publish {spec}")),
        };
        if let Err(error) = result {
            self.unpublish(id, Ending::Cut).await?;
            return Err(error);
        }
        Ok(id)
    }

    /// The next number, so that one is not used again soon.
    fn free_id(&mut self) -> Result<u32> {
        for _ in 1..limits::PUBLISHES {
            self.last_id = self.last_id % (limits::PUBLISHES - 1) + 1;
            if !self.publishes.contains_key(&self.last_id) {
                return Ok(self.last_id);
            }
        }
        bail!("more than {} publishes", limits::PUBLISHES - 1)
    }

    /// Points the publish's ports at it, or at nothing.
    fn set_frontends(&mut self, id: u32, on: bool) -> Result<()> {
        let (Some(datapath), Some(published)) = (&mut self.datapath, self.publishes.get(&id))
        else {
            return Ok(());
        };
        let spec = &published.spec;
        for network in &published.allow {
            datapath.maps.set_allowed(id, *network, on)?;
        }
        let index = if on { id } else { 0 };
        for port in spec.ports.first..=spec.ports.last {
            datapath
                .maps
                .set_frontend(spec.address, spec.protocol.number(), port, index)?;
        }
        Ok(())
    }

    async fn unpublish(&mut self, id: u32, how: Ending) -> Result<()> {
        let Some(published) = self.publishes.get_mut(&id) else {
            bail!("no publish {id}; `forwarder list` shows them");
        };
        let proxy = published.proxy.take();
        if how == Ending::Drain {
            self.resolve(id)?;
        } else {
            self.set_frontends(id, false)?;
            self.remove_flows(id)?;
            if let Some(datapath) = &mut self.datapath {
                datapath.maps.set_publish(id, &Entry::default())?;
            }
            self.publishes.remove(&id);
        }
        if let Some(proxy) = proxy {
            proxy
                .stop(match how {
                    Ending::Cut => Stop::Cut,
                    Ending::Drain => Stop::Drain,
                    Ending::Reset => Stop::Reset,
                })
                .await;
        }
        Ok(())
    }

    fn remove_flows(&mut self, id: u32) -> Result<()> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        for (key, flow) in datapath.maps.flows()? {
            if flow.publish == id {
                datapath.maps.remove_flow(&key, &flow)?;
            }
        }
        Ok(())
    }

    fn find(&self, named: &Named) -> Result<u32> {
        match named {
            Named::Id(id) if self.publishes.contains_key(id) => Ok(*id),
            Named::Id(id) => bail!("no publish {id}; `forwarder list` shows them"),
            Named::Spec(spec) => self
                .publishes
                .iter()
                .find(|(_, published)| published.spec.to_string() == *spec)
                .map(|(id, _)| *id)
                .with_context(|| format!("no publish {spec}; `forwarder list` shows them")),
        }
    }

    /// Flows of an earlier instance go on if they are of a publish that is there again, under its number.
    fn adopt(&mut self) {
        let Some(datapath) = &mut self.datapath else {
            return;
        };
        let Ok(flows) = datapath.maps.flows() else {
            return;
        };
        for (key, mut flow) in flows {
            let owner = self
                .publishes
                .iter()
                .find(|(_, published)| owns(&published.spec, &key, &flow));
            let result = match owner {
                Some((id, _)) if flow.publish == *id => Ok(()),
                Some((id, _)) => {
                    flow.publish = *id;
                    datapath.maps.set_flow(&key, &flow)
                }
                None => datapath.maps.remove_flow(&key, &flow),
            };
            if let Err(error) = result {
                warn!("{error:#}");
            }
        }
    }

    /// Ends flows that have been silent for too long, and publishes that have drained.
    fn sweep(&mut self) {
        let Some(datapath) = &mut self.datapath else {
            return;
        };
        let flows = match datapath.maps.flows() {
            Ok(flows) => flows,
            Err(error) => return warn!("{error:#}"),
        };
        let now = monotonic();
        let mut alive: HashMap<u32, u64> = HashMap::new();
        for (key, flow) in flows {
            let idle = now.saturating_sub(flow.last_seen) / 1_000_000_000;
            if idle < self.timeouts.of(key.protocol, flow.state) {
                *alive.entry(flow.publish).or_default() += 1;
                continue;
            }
            if let Err(error) = datapath.maps.remove_flow(&key, &flow) {
                warn!("{error:#}");
            }
            if let Some(published) = self.publishes.get_mut(&flow.publish) {
                published.ended.0 += flow.packets[0] + flow.packets[1];
                published.ended.1 += flow.bytes[0] + flow.bytes[1];
            }
        }
        let drained: Vec<u32> = self
            .publishes
            .iter()
            .filter(|(id, published)| published.draining() && !alive.contains_key(id))
            .map(|(id, _)| *id)
            .collect();
        for id in drained {
            if let Err(error) = self.end_drained(id) {
                warn!("{error:#}");
            }
        }
    }

    fn end_drained(&mut self, id: u32) -> Result<()> {
        self.set_frontends(id, false)?;
        if let Some(datapath) = &mut self.datapath {
            datapath.maps.set_publish(id, &Entry::default())?;
        }
        self.publishes.remove(&id);
        info!("publish {id} has drained");
        Ok(())
    }

    async fn answer(&mut self, call: Call, untrace: &mpsc::Sender<()>) {
        let result = match call.request {
            Request::List => self.list().and_then(json),
            Request::Flows => self.flows().and_then(json),
            Request::Stats => self.stats().and_then(json),
            Request::Publish { specs, allow } => self.publish_texts(&specs, &allow).await,
            Request::Unpublish { publishes, how } => self.unpublish_named(&publishes, how).await,
            Request::Trace => match self.begin_trace(call.answer.clone(), untrace.clone()) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
        };
        let response = match result {
            Ok(value) => Response::Done(value),
            Err(error) => Response::Failed(format!("{error:#}")),
        };
        let _ = call.answer.send(response).await;
    }

    async fn publish_texts(
        &mut self,
        texts: &[String],
        allow: &[IpNet],
    ) -> Result<serde_json::Value> {
        let specs: Vec<Spec> = texts
            .iter()
            .map(|text| text.parse())
            .collect::<Result<_, _>>()?;
        let allow = if allow.is_empty() {
            self.options.allow.clone()
        } else {
            allow.to_vec()
        };
        let ids = self.publish(&specs, &allow).await?;
        json(
            ids.into_iter()
                .map(|id| self.describe(id))
                .collect::<Vec<_>>(),
        )
    }

    async fn unpublish_named(&mut self, named: &[Named], how: Ending) -> Result<serde_json::Value> {
        // All names are checked before anything is changed.
        let ids: BTreeSet<u32> = named
            .iter()
            .map(|name| self.find(name))
            .collect::<Result<_>>()?;
        for id in ids {
            self.unpublish(id, how).await?;
        }
        Ok(serde_json::Value::Null)
    }

    /// The line that says how a publish is served.
    fn describe(&self, id: u32) -> String {
        let published = &self.publishes[&id];
        let spec = &published.spec;
        let how = match (&published.reason, &published.entry) {
            (None, Some(entry)) => format!(
                "ebpf, {}",
                delivery_name(entry.hop.delivery).unwrap_or("unresolved")
            ),
            (Some(reason), _) => format!("userland: {reason}"),
            (None, None) => "userland".into(),
        };
        let all_to_one = if spec.ports.first != spec.ports.last && spec.backend_is_single() {
            format!(
                ", all {} ports to port {}",
                spec.ports.count(),
                spec.backend_ports.first
            )
        } else {
            String::new()
        };
        format!("{id}: {spec} ({how}{all_to_one})")
    }

    fn list(&self) -> Result<Vec<Listed>> {
        let mut sums: HashMap<u32, (u64, u64, u64)> = HashMap::new();
        if let Some(datapath) = &self.datapath {
            for flow in datapath.maps.flows()?.values() {
                let sum = sums.entry(flow.publish).or_default();
                sum.0 += 1;
                sum.1 += flow.packets[0] + flow.packets[1];
                sum.2 += flow.bytes[0] + flow.bytes[1];
            }
        }
        let listed = self.publishes.iter().map(|(&id, published)| {
            let spec = &published.spec;
            let (flows, packets, bytes) = sums.get(&id).copied().unwrap_or_default();
            let proxy = published
                .proxy
                .as_ref()
                .map(Proxy::counters)
                .unwrap_or_default();
            let hop = published
                .entry
                .filter(|_| published.reason.is_none())
                .map(|e| e.hop.delivery);
            Listed {
                id,
                protocol: spec.protocol,
                frontend: Endpoint {
                    address: spec.address,
                    port: spec.ports.first,
                    end_port: spec.ports.last,
                },
                backend: Endpoint {
                    address: Some(spec.backend),
                    port: spec.backend_ports.first,
                    end_port: spec.backend_ports.last,
                },
                datapath: if hop.is_some() { "ebpf" } else { "userland" }.into(),
                delivery: hop.and_then(delivery_name).map(Into::into),
                reason: published.reason.clone(),
                allow: published.allow.clone(),
                flows: flows + proxy.flows,
                packets: packets + published.ended.0 + proxy.packets,
                bytes: bytes + published.ended.1 + proxy.bytes,
            }
        });
        Ok(listed.collect())
    }

    fn flows(&self) -> Result<Vec<ListedFlow>> {
        let Some(datapath) = &self.datapath else {
            return Ok(Vec::new());
        };
        let now = monotonic();
        let flows = datapath.maps.flows()?;
        let mut listed: Vec<ListedFlow> = flows.iter().map(|(k, f)| list_flow(k, f, now)).collect();
        listed.sort_by(|a, b| (a.publish, &a.client).cmp(&(b.publish, &b.client)));
        Ok(listed)
    }

    fn stats(&self) -> Result<Vec<Counter>> {
        let counters = match &self.datapath {
            Some(datapath) => datapath.maps.stats()?,
            None => Vec::new(),
        };
        let counter = |(reason, packets): (forwarder_common::reason::Reason, u64)| Counter {
            reason: reason.name().into(),
            packets,
        };
        Ok(counters.into_iter().map(counter).collect())
    }

    /// Sends each line to the client until it goes. The first trace switches the programs.
    fn begin_trace(
        &mut self,
        client: mpsc::Sender<Response>,
        ended: mpsc::Sender<()>,
    ) -> Result<()> {
        let Some(datapath) = &mut self.datapath else {
            bail!("nothing to trace: {}", self.without);
        };
        if self.tracing.receiver_count() == 0 {
            datapath.trace(true)?;
            let lines = self.tracing.clone();
            let log = datapath.log(move |line| drop(lines.send(line)))?;
            let lines = self.tracing.clone();
            tokio::spawn(async move {
                tokio::select! {
                    _ = log => {}
                    () = lines.closed() => {}
                }
            });
        }
        let mut lines = self.tracing.subscribe();
        tokio::spawn(async move {
            loop {
                let line = tokio::select! {
                    line = lines.recv() => line,
                    () = client.closed() => break,
                };
                let value = match line {
                    Ok(line) => line,
                    Err(broadcast::error::RecvError::Lagged(n)) => format!("lost {n}"),
                    Err(broadcast::error::RecvError::Closed) => break,
                };
                if client.send(Response::Done(value.into())).await.is_err() {
                    break;
                }
            }
            drop(lines);
            let _ = ended.send(()).await;
        });
        Ok(())
    }

    fn end_trace(&mut self) {
        if self.tracing.receiver_count() > 0 {
            return;
        }
        if let Some(datapath) = &mut self.datapath
            && let Err(error) = datapath.trace(false)
        {
            warn!("{error:#}");
        }
    }
}

/// Whether a flow is one that this publish would make.
fn owns(spec: &Spec, key: &Tuple, flow: &Flow) -> bool {
    let port = u16::from_be(flow.frontend_port);
    u32::from(spec.protocol.number()) == key.protocol
        && (spec.ports.first..=spec.ports.last).contains(&port)
        && Address::from(spec.backend) == key.destination
        && spec.backend_port(port).to_be() == key.destination_port
        && spec.address.is_none_or(|address| {
            address.is_unspecified() || Address::from(address) == flow.frontend
        })
}

fn list_flow(key: &Tuple, flow: &Flow, now: u64) -> ListedFlow {
    use forwarder_common::flow::state;
    let show = |address: Address, port: u16| {
        std::net::SocketAddr::new(address.into(), u16::from_be(port)).to_string()
    };
    let tcp = key.protocol == u32::from(forwarder_common::tuple::TCP);
    let is = |bits| flow.state & bits == bits;
    let state = match tcp {
        true if is(state::RESET) => "reset",
        true if is(state::BOTH_FIN) => "time_wait",
        true if flow.state & state::BOTH_FIN != 0 => "fin_wait",
        true if is(state::ESTABLISHED) => "established",
        true if is(state::REPLIED) => "syn_received",
        true => "syn_sent",
        false if is(state::REPLIED) => "replied",
        false => "unreplied",
    };
    ListedFlow {
        publish: flow.publish,
        protocol: if tcp { "tcp" } else { "udp" }.into(),
        client: show(flow.client, flow.client_port),
        frontend: show(flow.frontend, flow.frontend_port),
        source: show(key.source, key.source_port),
        backend: show(key.destination, key.destination_port),
        state: state.into(),
        idle_seconds: now.saturating_sub(flow.last_seen) / 1_000_000_000,
        packets: flow.packets,
        bytes: flow.bytes,
    }
}

fn json(value: impl Serialize) -> Result<serde_json::Value> {
    Ok(serde_json::to_value(value)?)
}

fn delivery_name(number: u32) -> Option<&'static str> {
    match number {
        delivery::PEER => Some("peer"),
        delivery::DEVICE => Some("device"),
        delivery::NEIGHBOUR => Some("neighbour"),
        delivery::STACK => Some("stack"),
        _ => None,
    }
}

fn load(instance: &str) -> Result<Datapath> {
    let pins = datapath::has_bpffs().then(|| datapath::pin_directory(instance));
    Datapath::load(&datapath::Options {
        pins,
        snat: snat_ports(),
    })
}

/// The larger part of the unprivileged ports that the kernel gives to no socket by itself.
fn snat_ports() -> (u16, u32) {
    let text =
        std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut bounds = text
        .split_whitespace()
        .filter_map(|word| word.parse::<u16>().ok());
    let low = bounds.next().unwrap_or(32_768);
    let high = bounds.next().unwrap_or(60_999);
    let below = u32::from(low.saturating_sub(1024));
    let above = u32::from(u16::MAX - high);
    if below >= above {
        (1024, below)
    } else {
        (high + 1, above)
    }
}

/// CLOCK_MONOTONIC in nanoseconds, as `bpf_ktime_get_ns` gives it.
fn monotonic() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(|time| {
            Duration::from(time)
                .as_nanos()
                .try_into()
                .unwrap_or(u64::MAX)
        })
        .unwrap_or(0)
}

/// Tells systemd, where it asked for that (sd_notify(3)).
fn notify_ready() {
    use std::os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    };
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let address = match path.as_encoded_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent =
        address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    if let Err(error) = sent {
        warn!("NOTIFY_SOCKET: {error}");
    }
}

/// Removes what an instance left behind. Returns whether there was anything.
///
/// # Errors
/// The instance is running, or a pin cannot be removed.
pub fn down(instance: &str) -> Result<bool> {
    if control::is_running(instance) {
        bail!("instance {instance} is running: stop it by SIGINT or SIGTERM first");
    }
    datapath::remove_pins(&datapath::pin_directory(instance))
}
