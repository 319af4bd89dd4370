//! A running instance: start-up in order, an event loop, stop in reverse. What is wanted is in the registry; kernel and
//! proxy are made to match it in `daemon/reconcile.rs`, and follow the network in `daemon/network.rs`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io::Write as _,
    os::fd::AsFd as _,
    sync::Arc,
    time::Duration,
};

mod answer;
mod audit;
mod ban;
mod drain;
mod fragments;
mod install;
mod network;
mod reconcile;
mod signals;
mod slots;
mod start;
mod sweep;
mod trace;
mod view;

use anyhow::{Context as _, Result, bail};
use forwarder_common::{flow::Timeouts, limits};
use sd_notify::NotifyState;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tracing::{info, warn};

use self::{
    drain::Draining,
    fragments::{Datagram, Fragments},
    network::Network,
    reconcile::{Loose, Serving},
    signals::{Heard, Signals},
    slots::Slots,
    trace::Tracing,
    view::{Kernel, View},
};
use crate::{
    config::{Config, DatapathChoice, Flags},
    control::{
        Call,
        api::{Ending, Reloaded},
        server::{Locate, Socket},
        status::Status,
    },
    datapath::{
        self, Datapath,
        kernel::{self, kernel},
        resets,
    },
    engines::docker::{self, engine::Engine},
    instance::{self, Instance},
    memory,
    metrics::Slices,
    plan::Unserved,
    privilege,
    proxy::{Idle, Sockets, Store, raise_descriptor_limit},
    publish::{Id, Owner, Registry, bans::BansFile, state::State},
};

/// Network changes come in bursts; one reading serves all that come within this time.
const SETTLE: Duration = Duration::from_millis(10);
/// The network is read for changes inside of containers at most this often.
const CONTAINERS: Duration = Duration::from_millis(100);
/// For these, of each second at most a twentieth is spent, however many containers there are.
const SHARE: u32 = 20;
/// For changes of this host's own network a fifth, however many routes there are.
const OWN_SHARE: u32 = 4;
const SWEEP: Duration = Duration::from_secs(2);
/// Whether the programs are still attached is looked at this often.
const HEAL: Duration = Duration::from_millis(500);
/// How long a process that leaves everything to the next one answers who has asked before.
const LAST_CALLS: Duration = Duration::from_millis(20);
/// Bans that are over are taken away after this time at the latest.
const EXPIRE: Duration = Duration::from_secs(60);
/// Publishes of before whose ports somebody else has are tried again after this time.
const RETRY: Duration = Duration::from_secs(5);

pub struct Daemon {
    /// Which a reload puts together with the file again.
    flags: Flags,
    config: Config,
    /// What is wanted.
    registry: Registry,
    /// Where that survives a restart.
    state: Option<State>,
    bans_file: Option<BansFile>,
    /// What is served of it.
    serving: BTreeMap<Id, Serving>,
    /// What flags and file ask for is served.
    serves: bool,
    /// Publishes of before that cannot be served now.
    waiting: BTreeSet<Id>,
    /// Those that take no new flows, and both ends of whose flows are about to be told.
    closing: BTreeSet<Id>,
    /// By their places in `PUBLISHES`.
    draining: BTreeMap<u32, Draining>,
    slots: Slots,
    /// Whose turn it is to look through all flows for those that are to end.
    walks: Arc<tokio::sync::Mutex<()>>,
    /// Where an earlier instance had publishes, until this one serves.
    places: HashMap<Id, u32>,
    view: Arc<View>,
    /// Held ports that nobody has come to by the slow path.
    idle: Idle,
    datapath: Option<Datapath>,
    /// Why there is no datapath.
    without: Unserved,
    network: Network,
    timeouts: Arc<Timeouts>,
    tracing: Tracing,
    leases: u64,
    /// Sockets of an earlier instance, until this one serves.
    left: Sockets,
    /// Leases that have ended.
    released: mpsc::UnboundedSender<Owner>,
}

/// Serves an instance until a signal; prints a line for each publish and then `ready`.
///
/// # Errors
/// What could not be begun; everything begun before is undone.
pub async fn run(instance: Instance, flags: Flags) -> Result<()> {
    let config = Config::read(flags.clone())?;
    config.check()?;
    // Before anything is made that a signal would have to undo, and long before anybody reads `ready`.
    let mut signals = Signals::new()?;
    let _lock = instance.lock_soon().await?;
    let (store, mut left) = Store::open().context("descriptors of an earlier start")?;
    let mut socket = Socket::bind(instance.make_socket_path()?, left.control.take())?;
    let status = config.metrics;
    let status = status.map(|address| Status::bind(address, &config.metrics_allow));
    let status = status.transpose()?;
    raise_descriptor_limit();
    let (released, mut leases) = mpsc::unbounded_channel();
    let idle = Idle::start(store).context("watch held ports")?;
    let mut daemon = Daemon::new(&instance, flags, config, idle, released)?;
    let (sender, mut calls) = mpsc::channel(64);
    let view = Arc::new(daemon.view.clone());
    let served = status.map_or(Ok(()), |status| status.serve(view.clone()));
    let engine = daemon.flags.docker.clone().map(Engine::new);
    let located = engine.clone().map(|it| Arc::new(it) as Arc<dyn Locate>);
    let begun = match served.and_then(|()| socket.serve(sender.clone(), view, located)) {
        Ok(()) => daemon.begin(&instance, left, &mut calls).await,
        Err(error) => Err(error),
    };
    let mut datagrams = match begun {
        Ok(datagrams) => datagrams,
        Err(error) => {
            daemon.abandon(&mut socket).await;
            return Err(error);
        }
    };
    socket.keep();
    if let Some(engine) = engine {
        let observed = Arc::new(daemon.view.clone());
        let labels = daemon.flags.docker_labels;
        tokio::spawn(docker::follow(engine, labels, sender.clone(), observed));
    }
    privilege::confine();
    say("ready");
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        warn!("NOTIFY_SOCKET: {error}");
    }
    memory::trim();
    daemon
        .serve(
            &mut socket,
            &mut signals,
            &mut calls,
            &mut leases,
            &mut datagrams,
        )
        .await;
    let keep = daemon.config.keep;
    daemon.stop(keep).await;
    Ok(())
}

/// Writes a line to standard output, whose reader may have gone.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

impl Daemon {
    fn new(
        instance: &Instance,
        flags: Flags,
        config: Config,
        idle: Idle,
        released: mpsc::UnboundedSender<Owner>,
    ) -> Result<Self> {
        let (datapath, without) = match config.datapath {
            DatapathChoice::Userland => (None, Unserved::Userland),
            choice => match load(instance, &config) {
                Ok(datapath) => (Some(datapath), Unserved::Userland),
                Err(error) if choice == DatapathChoice::Ebpf => return Err(error),
                Err(error) => {
                    warn!("serving in user space: {error:#}");
                    (None, Unserved::NoDatapath(format!("{error:#}")))
                }
            },
        };
        let opened = || -> Result<(Option<Kernel>, Network)> {
            let seen = datapath
                .as_ref()
                .map(|datapath| Kernel::new(&datapath.maps));
            let seen = seen.transpose().context("open the tables of flows")?;
            Ok((seen, Network::open(datapath.is_some())?))
        };
        let (seen, network) = match opened() {
            Ok(opened) => opened,
            Err(error) => {
                datapath.into_iter().for_each(Datapath::abandon);
                return Err(error);
            }
        };
        Ok(Self {
            registry: Registry::new(limits::PUBLISHES as usize - 1, 0),
            state: None,
            bans_file: None,
            serving: BTreeMap::new(),
            serves: false,
            waiting: BTreeSet::new(),
            closing: BTreeSet::new(),
            draining: BTreeMap::new(),
            slots: Slots::new(limits::PUBLISHES),
            walks: Arc::default(),
            places: HashMap::new(),
            view: Arc::new(View::new(seen, idle.clone(), config.respect_firewall)),
            idle,
            network,
            datapath,
            without,
            timeouts: Arc::new(config.timeouts),
            tracing: Tracing::new(),
            leases: 0,
            left: Sockets::default(),
            released,
            flags,
            config,
        })
    }

    /// Datagrams whose parts came out of order.
    fn listen(&mut self) -> Result<mpsc::Receiver<Datagram>> {
        let (whole, datagrams) = mpsc::channel(64);
        if let Some(datapath) = &mut self.datapath {
            let mut fragments = Fragments::default();
            let handover = datapath.handover(move |frame, segment| {
                if let Some(datagram) = fragments.add(frame) {
                    let _ = whole.try_send(datagram.of_segments(segment)); // lost, as any datagram may be
                }
            })?;
            tokio::spawn(async move {
                if let Err(error) = handover.await {
                    warn!("fragments that come out of order are lost: {error:#}");
                }
            });
        }
        Ok(datagrams)
    }

    async fn serve(
        &mut self,
        socket: &mut Socket,
        signals: &mut Signals,
        calls: &mut mpsc::Receiver<Call>,
        leases: &mut mpsc::UnboundedReceiver<Owner>,
        datagrams: &mut mpsc::Receiver<Datagram>,
    ) {
        // What has changed since the first reading has been told by now.
        let follows = self.datapath.is_some();
        let mut settled = follows.then(Instant::now);
        let sooner = |settled: &mut Option<Instant>, at: Instant| {
            *settled = Some(settled.map_or(at, |settled| settled.min(at)));
        };
        // Until then nothing is heard of containers, whatever they do.
        let mut deaf_until = Instant::now();
        let mut busy_until = Instant::now();
        let mut sweep = tokio::time::interval(SWEEP);
        let mut sweeping: Option<sweep::Sweep> = None;
        let mut slices = Slices::default();
        let durations = self.view.durations.clone();
        let mut retry = tokio::time::interval(RETRY);
        let mut expire = tokio::time::interval(EXPIRE);
        let mut heal = tokio::time::interval(HEAL);
        loop {
            tokio::select! {
                heard = signals.heard() => match heard {
                    Heard::End => break,
                    Heard::PassOn if !self.idle.has_store() => break,
                    Heard::PassOn => match self.pass_on(socket).await {
                        Ok(()) => {
                            self.answer_rest(calls).await;
                            self.config.keep = true;
                            break;
                        }
                        Err(error) => warn!("SIGQUIT: {error:#}"),
                    },
                    Heard::Reload => {
                        let reloaded = self.reload().await;
                        audit::line(None, &Owner::config(), "reload by SIGHUP", &reloaded);
                        match reloaded {
                            Ok((_, loose)) => drop(tokio::spawn(self.end_flows_of(loose))),
                            Err(error) => warn!("SIGHUP: nothing is changed: {error:#}"),
                        }
                    }
                },
                call = calls.recv() => match call {
                    Some(call) => self.answer(call).await,
                    None => break,
                },
                Some(owner) = leases.recv() => {
                    self.end_lease(&owner).await;
                }
                event = self.network.events.next() => {
                    if self.network.hear(event) {
                        sooner(&mut settled, busy_until.max(Instant::now() + SETTLE));
                    }
                }
                () = self.network.watch.changed(), if settled.is_none() && follows => {
                    settled = Some(deaf_until.max(Instant::now() + SETTLE));
                }
                () = sleep_until(settled.unwrap_or_else(Instant::now)), if settled.is_some() => {
                    let begun = Instant::now();
                    self.network.hear_all();
                    settled = match self.refresh().await {
                        Ok(()) => self.network.asks_again(),
                        Err(error) => {
                            warn!("{error:#}");
                            Some(Instant::now() + RETRY)
                        }
                    };
                    deaf_until = Instant::now() + CONTAINERS.max(begun.elapsed() * SHARE);
                    busy_until = Instant::now() + begun.elapsed() * OWN_SHARE;
                }
                freed = self.slots.freed() => self.freed(freed),
                _ = expire.tick() => self.expire_bans(),
                _ = heal.tick() => if self.heal().await.is_err() {
                    sooner(&mut settled, Instant::now() + RETRY);
                },
                _ = retry.tick(), if !self.waiting.is_empty() => self.retry().await,
                _ = sweep.tick() => {
                    sweeping.get_or_insert_with(|| self.begin_sweep());
                    self.ask_for_neighbours().await;
                }
                // A slice at a time, and whatever else is due in between.
                sweep = async { sweeping.as_mut() }, if sweeping.is_some() => {
                    let slice = || sweep.is_some_and(|sweep| self.sweep(sweep));
                    if !slices.of(&durations.sweep, slice) {
                        sweeping = None;
                    }
                    tokio::task::yield_now().await;
                }
                () = Self::trace_ended(&mut self.tracing) => self.end_trace(),
                Some(datagram) = datagrams.recv() => self.answer_client(&datagram),
            }
        }
    }

    /// Leaves everything to the next process: what forwards, the sockets that hold ports, conversations, and who asks from now on.
    async fn pass_on(&mut self, socket: &mut Socket) -> Result<()> {
        let count = self.idle.pass_on(socket.as_fd()).await?;
        socket.leave();
        info!("{count} conversations in user space are passed on");
        Ok(())
    }

    /// Answers those who have asked before.
    async fn answer_rest(&mut self, calls: &mut mpsc::Receiver<Call>) {
        let deadline = Instant::now() + LAST_CALLS;
        while let Ok(Some(call)) = timeout_at(deadline, calls.recv()).await {
            self.answer(call).await;
        }
    }

    /// Undoes what a start has made that fails. What it was handed is for the next one.
    async fn abandon(mut self, socket: &mut Socket) {
        if self.idle.has_store()
            && let Err(error) = self.pass_on(socket).await
        {
            warn!("conversations end: {error:#}");
        }
        let keep = self.datapath.as_ref().is_some_and(Datapath::inherits);
        self.stop(keep).await;
    }

    /// Undoes everything, or with `keep` leaves the pinned programs forwarding.
    async fn stop(mut self, keep: bool) {
        self.cut_all_draining();
        if keep {
            for serving in std::mem::take(&mut self.serving).into_values() {
                serving.end(Ending::Cut).await;
            }
        } else {
            let loose = self.end_all().await;
            let is_cut = !loose.cut.is_empty();
            self.end_flows_of(loose).await;
            if is_cut {
                sleep(resets::PATIENCE).await;
            }
        }
        self.idle.finish().await;
        match self.datapath.take() {
            Some(datapath) if !keep => datapath.remove(),
            _ => {}
        }
    }

    /// Frees places whose flows have ended.
    fn give_back(&mut self, places: &[u32]) {
        for place in places {
            self.view.free(*place);
            if let Some(datapath) = &mut self.datapath
                && let Err(error) = datapath.maps.clear_usage(*place)
            {
                warn!("{error:#}");
            }
        }
        self.slots.give_back(places);
    }

    /// Reads the file again and puts the difference in force, or changes nothing.
    async fn reload(&mut self) -> Result<(Reloaded, Loose)> {
        if self.config.file.is_none() {
            bail!("there is no configuration file; start the instance with --config");
        }
        let new = Config::read(self.flags.clone())?;
        new.check()?;
        if let Some(key) = self.config.needs_restart(&new) {
            bail!("{key} cannot change while the instance runs; restart it");
        }
        let mut difference = self
            .registry
            .want(&Owner::config(), new.configured.clone())?;
        let reloaded = Reloaded {
            added: difference.add.len(),
            changed: difference.change.len(),
            removed: difference.remove.len(),
        };
        let before = std::mem::replace(&mut self.config, new);
        let has_other_allow = before.allow != self.config.allow;
        if has_other_allow {
            difference.change.extend(self.following_allow(&difference));
        }
        let loose = match self.reconcile(&difference, Ending::Cut, Vec::new()).await {
            Ok(loose) => loose,
            Err(error) => {
                self.config = before;
                if has_other_allow {
                    self.follow_allow();
                }
                return Err(error);
            }
        };
        info!("configuration: {reloaded}");
        Ok((reloaded, loose))
    }
}

/// What a publish's sockets are called where they outlive this process.
fn store_name(id: Id) -> String {
    format!("p{id}")
}

fn load(instance: &Instance, config: &Config) -> Result<Datapath> {
    let can_pin = kernel().refusal().is_none() && kernel::has_bpffs();
    let pins = can_pin.then(|| instance.make_pins()).transpose()?;
    let snat = kernel::snat_ports();
    if snat.1 == 0 {
        warn!(
            "no source ports are left: clients on this host, and all clients of a backend on another machine, are \
             served in user space; {} would change that",
            kernel::SNAT_REMEDY
        );
    }
    let mut datapath = Datapath::load(&datapath::Options {
        instance: instance.name.clone(),
        pins,
        snat,
        flows: limits::FLOWS,
        timeouts: config.timeouts,
        respects_firewall: config.respect_firewall,
    })?;
    if let Err(error) = datapath.rehearse() {
        datapath.abandon();
        return Err(error);
    }
    Ok(datapath)
}

/// Removes the programs of an earlier instance, where none take over from them: they would go on with what it had published,
/// whatever is published, taken back or banned now.
fn remove_left(instance: &Instance) {
    let pins = instance.find_pins();
    let removed = pins.and_then(|pins| datapath::remove_left(&instance.name, pins.as_deref()));
    match removed {
        Ok(true) => info!("the programs of the earlier instance are removed"),
        Ok(false) => {}
        Err(error) => warn!("the programs of an earlier instance go on: {error:#}"),
    }
}

/// Removes what an instance left behind. Returns whether there was anything.
///
/// # Errors
/// The instance is running, or a pin cannot be removed.
pub fn down(instance: &Instance) -> Result<bool> {
    if instance.is_running() {
        bail!(
            "instance {} is running: stop it by SIGINT or SIGTERM first",
            instance.name
        );
    }
    let pins = instance.find_pins()?;
    let mut found = datapath::remove_left(&instance.name, pins.as_deref())?;
    found |= instance.remove_files();
    let state = instance.state();
    for file in [state.with_extension("bans"), state] {
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            removed => {
                removed.with_context(|| format!("remove {}", file.display()))?;
                found = true;
            }
        }
    }
    if !found {
        // Who may not look there cannot say that there is nothing.
        instance::left()?;
    }
    Ok(found)
}
