//! A running instance: the publishes that are wanted, and the kernel and the proxy made to match them.
//! Events (requests, network changes, the sweep, signals) come one at a time; deciding is in
//! `plan.rs`, doing in `datapath.rs`, `maps.rs` and `proxy/`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

mod fragments;
mod reconcile;
mod report;
mod sweep;

use anyhow::{Context as _, Result, bail};
use forwarder_common::{
    flow::Timeouts,
    limits,
    publish::{Interface, Publish as Entry},
};
use futures_util::StreamExt as _;
use ipnet::IpNet;
use serde::Serialize;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{broadcast, mpsc},
    time::{Instant, sleep_until},
};
use tracing::warn;

use self::fragments::Fragments;
pub use self::report::{Counter, Endpoint, Listed, ListedFlow, delivery_name};
use crate::{
    cli::tables,
    cli::{DatapathChoice, Named, Run},
    control::{self, Call, Ending, Request, Response, Socket},
    datapath::kernel,
    datapath::maps::Installed,
    datapath::{self, Datapath},
    memory,
    network::containers::Watch,
    network::{self, Change, Reader, Snapshot},
    proxy::{Held, Idle, Options as ProxyOptions, Proxy, Stop, is_wide, raise_descriptor_limit},
    publish::spec::Spec,
};

/// Network changes come in bursts; one reading serves all that come within this time.
const SETTLE: Duration = Duration::from_millis(10);
/// The network is read for changes inside of containers at most this often.
const CONTAINERS: Duration = Duration::from_millis(100);
/// For these, of each second at most a twentieth is spent, however many containers there are.
const SHARE: u32 = 20;
/// A backend that does not answer is asked for again after this time.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// Answers about routes are asked for again after so many times what asking took.
const ASK_ROUTES_PAUSE: u32 = 10;
const SWEEP: Duration = Duration::from_secs(2);

struct Published {
    spec: Arc<Spec>,
    allow: Vec<IpNet>,
    /// `None` once the publish drains.
    proxy: Option<Proxy>,
    /// What `PUBLISHES` holds.
    entry: Option<Entry>,
    /// Why the fast path doesn't serve it.
    reason: Option<String>,
    /// An IPsec policy keeps it from the fast path.
    covered: bool,
    /// One socket in each family holds all of its ports.
    steered: bool,
    /// Whether its ports are in `PORTS` and `FRONTENDS`.
    in_front: bool,
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
    /// Held ports that nobody has come to by the slow path.
    idle: Idle,
    datapath: Option<Datapath>,
    /// Why there is no datapath.
    without: String,
    reader: Option<Reader>,
    watch: Watch,
    snapshot: Snapshot,
    /// Whether the kernel's answers in the snapshot may be out of date.
    routing_changed: bool,
    /// When the kernel may be asked for all of them again.
    ask_routes_after: Instant,
    publishes: BTreeMap<u32, Published>,
    last_id: u32,
    timeouts: Arc<Timeouts>,
    tracing: broadcast::Sender<String>,
    /// What `INTERFACES` holds.
    interfaces: BTreeMap<u32, Interface>,
    /// Devices that XDP cannot be had on.
    without_xdp: BTreeSet<u32>,
    /// Devices whose containers were warned of: they say that they have addresses of others.
    warned: BTreeSet<u32>,
    /// The traced program's lines are being read.
    logging: bool,
    /// When the kernel was last asked for a backend's MAC, by device and address.
    asked: HashMap<(u32, IpAddr), Instant>,
}

/// Serves an instance until a signal; prints a line for each publish and then `ready`.
///
/// # Errors
/// What could not be begun; everything begun before is undone.
pub async fn run(instance: &str, options: Run) -> Result<()> {
    // Before anything is made that a signal would have to undo, and long before anybody reads `ready`.
    let signals = [SignalKind::interrupt(), SignalKind::terminate()].map(signal);
    let mut socket = Socket::bind(instance)?;
    raise_descriptor_limit();
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
    // An earlier instance's programs know its publishes until these take over.
    daemon.reconcile_devices()?;
    if let Some(datapath) = &daemon.datapath {
        datapath.forget_others();
    }
    daemon.adopt();
    let (sender, calls) = mpsc::channel(64);
    socket.serve(sender);
    println!("ready");
    notify_ready();
    memory::trim();
    daemon.serve(calls, signals).await
}

impl Daemon {
    async fn new(instance: &str, options: Run) -> Result<Self> {
        let mut timeouts = Timeouts::default();
        for timeout in &options.timeout {
            timeouts.set(timeout.phase, timeout.seconds);
        }
        let (datapath, without) = match options.datapath {
            DatapathChoice::Userland => (None, "--datapath userland".to_owned()),
            choice => match load(instance, &timeouts, options.respect_firewall) {
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
            idle: Idle::start().context("watch held ports")?,
            datapath,
            without,
            watch: if reader.is_some() {
                Watch::open()
            } else {
                Watch::deaf()
            },
            reader,
            snapshot: Snapshot::default(),
            routing_changed: true, // since the first reading, for all that is known
            ask_routes_after: Instant::now(),
            publishes: BTreeMap::new(),
            last_id: 0,
            timeouts: Arc::new(timeouts),
            tracing: broadcast::channel(1024).0,
            interfaces: BTreeMap::new(),
            without_xdp: BTreeSet::new(),
            warned: BTreeSet::new(),
            logging: false,
            asked: HashMap::new(),
        };
        if let Some(reader) = &daemon.reader {
            let nothing = Snapshot::default();
            daemon.snapshot = daemon.watch.snapshot(reader, &nothing).await?;
            daemon.warn_of_disputes();
        }
        Ok(daemon)
    }

    async fn serve(
        mut self,
        mut calls: mpsc::Receiver<Call>,
        [interrupt, terminate]: [std::io::Result<Signal>; 2],
    ) -> Result<()> {
        let (mut interrupt, mut terminate) = (interrupt?, terminate?);
        let mut changes = match self.reader {
            Some(_) => network::changes()?.left_stream(),
            None => futures_util::stream::pending().right_stream(),
        };
        // What has changed since the first reading was not told.
        let mut settled = self.reader.is_some().then(Instant::now);
        let sooner = |settled: &mut Option<Instant>, at: Instant| {
            *settled = Some(settled.map_or(at, |settled| settled.min(at)));
        };
        // Until then nothing is heard of containers, whatever they do.
        let mut deaf_until = Instant::now();
        let mut sweep = tokio::time::interval(SWEEP);
        let mut sweeping: Option<sweep::Sweep> = None;
        let (untrace, mut traces_ended) = mpsc::channel(1);
        let (whole, mut datagrams) = mpsc::channel(64);
        if let Some(datapath) = &mut self.datapath {
            let mut fragments = Fragments::default();
            let handover = datapath.handover(move |frame| {
                if let Some(datagram) = fragments.add(frame) {
                    let _ = whole.try_send(datagram); // lost, as any datagram may be
                }
            })?;
            tokio::spawn(async move {
                if let Err(error) = handover.await {
                    warn!("fragments that come out of order are lost: {error:#}");
                }
            });
        }
        loop {
            tokio::select! {
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                call = calls.recv() => match call {
                    Some(call) => self.answer(call, &untrace).await,
                    None => break,
                },
                Some(change) = changes.next() => {
                    self.routing_changed |= change == Change::Routing;
                    sooner(&mut settled, Instant::now() + SETTLE);
                }
                () = self.watch.changed(), if settled.is_none() && self.reader.is_some() => {
                    settled = Some(deaf_until.max(Instant::now() + SETTLE));
                }
                () = sleep_until(settled.unwrap_or_else(Instant::now)), if settled.is_some() => {
                    let begun = Instant::now();
                    settled = match self.refresh().await {
                        Ok(()) => self.routing_changed.then_some(self.ask_routes_after),
                        Err(error) => {
                            warn!("{error:#}");
                            None
                        }
                    };
                    deaf_until = Instant::now() + CONTAINERS.max(begun.elapsed() * SHARE);
                }
                _ = sweep.tick() => {
                    sweeping.get_or_insert_default();
                    self.ask_for_neighbours().await;
                }
                // A slice at a time, and whatever else is due in between.
                sweep = async { sweeping.as_mut() }, if sweeping.is_some() => {
                    if !sweep.is_some_and(|sweep| self.sweep(sweep)) {
                        sweeping = None;
                    }
                    tokio::task::yield_now().await;
                }
                Some(()) = traces_ended.recv() => self.end_trace(),
                Some(datagram) = datagrams.recv() => self.answer_client(&datagram),
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

    /// Publishes all of them or none.
    async fn publish(&mut self, specs: &[Spec], allow: &[IpNet]) -> Result<Vec<u32>> {
        let present = self.publishes.values().filter(|p| !p.draining());
        if let Some((spec, other)) = Spec::first_overlap(present.map(|p| &*p.spec), specs) {
            bail!("publish {spec}: overlaps with {other}; unpublish that or choose other ports");
        }
        // A publish that drains on these ports has had its time.
        let drained: Vec<u32> = self
            .publishes
            .iter()
            .filter(|(_, other)| {
                other.draining() && specs.iter().any(|spec| other.spec.overlaps(spec))
            })
            .map(|(id, _)| *id)
            .collect();
        for id in drained {
            self.unpublish(id, Ending::Cut).await?;
        }
        self.ask_for_routes(specs.iter().map(|spec| spec.backend))
            .await;
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
        self.follow_xdp()?;
        self.ask_for_neighbours().await;
        Ok(ids)
    }

    async fn publish_one(&mut self, spec: &Spec, allow: &[IpNet]) -> Result<u32> {
        let id = self.free_id()?;
        let (held, steered) = self.hold(id, spec)?;
        let options = ProxyOptions {
            proxy_protocol: self.options.proxy_protocol,
            allow: allow.to_vec(),
            timeouts: self.timeouts.clone(),
        };
        let spec = Arc::new(spec.clone());
        let published = Published {
            spec: spec.clone(),
            allow: allow.to_vec(),
            proxy: Some(Proxy::start(held, spec.clone(), options, &self.idle)?),
            entry: None,
            reason: self.datapath.is_none().then(|| self.without.clone()),
            covered: false,
            steered,
            in_front: false,
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

    /// Holds a publish's ports: by a socket each, or a wide range by one socket if the kernel can steer. Returns
    /// which.
    fn hold(&mut self, id: u32, spec: &Spec) -> Result<(Held, bool)> {
        let Some(datapath) = self.datapath.as_mut().filter(|_| is_wide(spec)) else {
            return Ok((Held::bind(spec)?, false));
        };
        if let Err(error) = datapath.enable_steering() {
            warn!("{spec} is held by a socket for each port: {error:#}");
            return Ok((Held::bind(spec)?, false));
        }
        let held = Held::bind_steered(spec, datapath.own_mark())?;
        held.try_for_each(|is_v4, socket| datapath.steer(id, is_v4, &socket))
            .with_context(|| format!("publish {spec}"))?;
        Ok((held, true))
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
        let (Some(datapath), Some(published)) = (&mut self.datapath, self.publishes.get_mut(&id))
        else {
            return Ok(());
        };
        if std::mem::replace(&mut published.in_front, on) == on {
            return Ok(());
        }
        if !on {
            return datapath.maps.uninstall(id);
        }
        let spec = &published.spec;
        datapath.maps.install(
            id,
            &Installed {
                entry: published.entry.unwrap_or_default(),
                frontends: spec.frontends(),
                protocol: spec.protocol.number(),
                ports: (spec.ports.first, spec.ports.last),
                backend: spec.backend,
                backend_ports: (spec.backend_ports.first, spec.backend_ports.last),
                allow: published.allow.clone(),
            },
        )
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
            self.remove_flows(&BTreeSet::from([id]))?;
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

    /// Sends each line to the client until it goes. The first trace switches the programs.
    fn begin_trace(
        &mut self,
        client: mpsc::Sender<Response>,
        ended: mpsc::Sender<()>,
    ) -> Result<()> {
        let Some(datapath) = &mut self.datapath else {
            bail!("nothing to trace: {}", self.without);
        };
        datapath.trace(true)?;
        if !self.logging {
            let lines = self.tracing.clone();
            let log = datapath.log(move |line| drop(lines.send(tables::name_devices(&line))))?;
            tokio::spawn(log);
            self.logging = true;
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

fn json(value: impl Serialize) -> Result<serde_json::Value> {
    Ok(serde_json::to_value(value)?)
}

fn load(instance: &str, timeouts: &Timeouts, respects_firewall: bool) -> Result<Datapath> {
    let pins = kernel::has_bpffs().then(|| datapath::pin_directory(instance));
    let snat = kernel::snat_ports();
    if snat.1 == 0 {
        warn!(
            "no source ports are left: clients on this host, and all clients of a backend on another machine, are \
             served in user space; {} would change that",
            kernel::SNAT_REMEDY
        );
    }
    let mut datapath = Datapath::load(&datapath::Options {
        instance: instance.to_owned(),
        pins,
        snat,
        flows: limits::FLOWS,
        timeouts: *timeouts,
        respects_firewall,
    })?;
    if let Err(error) = datapath.rehearse() {
        datapath.remove();
        return Err(error);
    }
    Ok(datapath)
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
    let socket = control::remove_stale(instance);
    Ok(datapath::remove_left(instance)? || socket)
}
