//! The part of the daemon that follows the network: one reading after another, and the kernel's maps,
//! attachments and neighbours made to match it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    time::Duration,
};

use anyhow::{Context as _, Result};
use forwarder_common::{
    flow::delivery,
    publish::{Interface, flag},
};
use nix::net::if_::if_nametoindex;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{
    Daemon,
    reconcile::{Loose, Serving},
};
use crate::{
    config::XdpChoice,
    datapath::{
        devices::{Hook, Place},
        errno, xdp,
    },
    network::{Event, Events, Header, Reader, Snapshot, containers::Watch, local::device_name},
    plan::{self, Unattached, locations},
    publish::{Id, Publish, spec::Zone},
};

/// A backend that does not answer is asked for again after this time.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// Answers about routes are asked for again after so many times what asking took.
const ASK_ROUTES_PAUSE: u32 = 10;

/// So many events are taken at once: there may be no end of them.
const EVENTS: usize = 10_000;

/// What is known of the network, and what the kernel was told of it.
pub(super) struct Network {
    /// `None` where nothing is to be followed.
    reader: Option<Reader>,
    /// What the kernel tells of changes.
    pub events: Events,
    pub watch: Watch,
    pub snapshot: Snapshot,
    /// Whether the kernel's answers in the snapshot may be out of date.
    pub routing_changed: bool,
    /// When the kernel may be asked for all of them again.
    ask_routes_after: Instant,
    /// What `INTERFACES` holds.
    interfaces: BTreeMap<u32, Interface>,
    /// Devices that XDP cannot be had on; whether somebody else has it there, and may give it back.
    without_xdp: BTreeMap<u32, bool>,
    /// Places where our programs belong and are not, with what the kernel says.
    missing: BTreeMap<Place, String>,
    /// The devices of these.
    pub unattached: Vec<Unattached>,
    /// Devices whose containers were warned of: they say that they have addresses of others.
    warned: BTreeSet<u32>,
    /// When the kernel was last asked for a backend's MAC, by device and address.
    asked: HashMap<(u32, IpAddr), Instant>,
}

impl Network {
    /// # Errors
    /// The kernel refuses a netlink socket.
    pub(super) fn open(follows: bool) -> Result<Self> {
        Ok(Self {
            // Before anything is read: what changes meanwhile is told.
            events: match follows {
                true => Events::open().context("open a netlink socket for events")?,
                false => Events::silent(),
            },
            reader: follows.then(Reader::open).transpose()?,
            watch: if follows {
                Watch::open()
            } else {
                Watch::deaf()
            },
            snapshot: Snapshot::default(),
            routing_changed: true, // since the first reading, for all that is known
            ask_routes_after: Instant::now(),
            interfaces: BTreeMap::new(),
            without_xdp: BTreeMap::new(),
            missing: BTreeMap::new(),
            unattached: Vec::new(),
            warned: BTreeSet::new(),
            asked: HashMap::new(),
        })
    }

    /// Takes what the kernel tells; whether anything may be different now.
    pub(super) fn hear(&mut self, event: Event) -> bool {
        let Some(reader) = &mut self.reader else {
            return false;
        };
        let is_of_routing = event.is_of_routing();
        let is_changed = reader.hear(event, &mut self.snapshot);
        self.routing_changed |= is_changed && is_of_routing;
        is_changed
    }

    /// Takes all that the kernel has told until now.
    pub(super) fn hear_all(&mut self) {
        for _ in 0..EVENTS {
            match self.events.heard() {
                Some(event) => self.hear(event),
                None => break,
            };
        }
    }

    /// Reads what is not known yet; after a failure what was read last stays.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) async fn read(&mut self) -> Result<()> {
        let Some(reader) = &mut self.reader else {
            return Ok(());
        };
        let (snapshot, asked) = (&mut self.snapshot, locations::asked);
        self.watch.read(reader, snapshot, asked).await?;
        locations::settle(snapshot);
        self.warn_of_disputes();
        Ok(())
    }

    /// When routes have to be asked for again.
    pub(super) fn asks_again(&self) -> Option<Instant> {
        self.routing_changed.then_some(self.ask_routes_after)
    }

    /// Warns of each container once, however often it changes its addresses.
    fn warn_of_disputes(&mut self) {
        let snapshot = &self.snapshot;
        self.warned.retain(|veth| snapshot.links.contains_key(veth));
        for (&veth, &address) in &snapshot.disputed {
            if self.warned.insert(veth) {
                warn!("{}", locations::dispute(snapshot, veth, address));
            }
        }
    }
}

impl Daemon {
    /// Reads the network again and makes the kernel match.
    pub(super) async fn refresh(&mut self) -> Result<()> {
        if self.datapath.is_none() {
            return Ok(());
        }
        self.network.read().await?;
        let network = &mut self.network;
        if network.routing_changed && Instant::now() >= network.ask_routes_after {
            network.routing_changed = false;
            network.snapshot.answers.clear();
        }
        let serving = self.serving.values();
        let backends: BTreeSet<IpAddr> = serving
            .map(|serving| serving.row.wanted.publish.spec.backend)
            .collect();
        self.ask_for_routes(backends).await;
        self.reconcile_devices()?;
        let ids: Vec<Id> = self.serving.keys().copied().collect();
        let before = self.covered();
        for id in ids {
            self.install(id)?;
        }
        for place in self.draining.keys().copied().collect::<Vec<_>>() {
            self.install_draining(place)?;
        }
        let newly: BTreeSet<u32> = &self.covered() - &before;
        if !newly.is_empty() {
            let loose = Loose {
                stays: newly,
                ..Loose::default()
            };
            drop(tokio::spawn(self.end_flows_of(loose)));
        }
        let all: Vec<Id> = self.serving.keys().copied().collect();
        self.follow_xdp(&all)?;
        self.ask_for_neighbours().await;
        Ok(())
    }

    /// Attaches again what somebody else has detached.
    ///
    /// # Errors
    /// The network cannot be read.
    pub(super) async fn heal(&mut self) -> Result<()> {
        self.follow_interfaces()?;
        self.install_refused()?;
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        for name in datapath.heal_steering() {
            warn!("somebody detached our program {name}, of wide ranges; it is attached again");
        }
        let lost = datapath.take_lost();
        if self.network.without_xdp.values().any(|busy| *busy) {
            let all: Vec<Id> = self.serving.keys().copied().collect();
            self.follow_xdp(&all)?;
        }
        if lost.is_empty() {
            return self.attach_missing().await;
        }
        let places = lost.places().map(|place| (place, String::new()));
        self.network.missing.extend(places);
        self.refresh().await?;
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        for ifindex in datapath.forget(lost) {
            let name = &self.network.snapshot.links[&ifindex].name;
            warn!("somebody detached our program from {name}; it is attached again");
        }
        Ok(())
    }

    /// Tries again what could not be attached.
    async fn attach_missing(&mut self) -> Result<()> {
        let before: Vec<Place> = self.network.missing.keys().copied().collect();
        if before.is_empty() {
            return Ok(());
        }
        self.reconcile_hooks();
        let is_back = |place: &&Place| !self.network.missing.contains_key(place);
        let back: BTreeSet<u32> = before.iter().filter(is_back).map(|it| it.0).collect();
        if back.is_empty() {
            return Ok(());
        }
        let links = &self.network.snapshot.links;
        for link in back.iter().filter_map(|ifindex| links.get(ifindex)) {
            info!("our program is attached to {} again", link.name);
        }
        self.refresh().await
    }

    /// What is published by one interface alone, or by a link-local address, goes by the device that has the name now: a tunnel
    /// that was down comes back as another one. Without any, it stays where it was.
    fn follow_interfaces(&mut self) -> Result<()> {
        let mut moved = Vec::new();
        let mut devices: HashMap<String, Option<u32>> = HashMap::new();
        for (id, serving) in &mut self.serving {
            let Publish { spec, policy, .. } = &*serving.row.wanted.publish;
            let on = policy.limits.on.as_deref();
            let zone = spec.zone.as_ref().map(Zone::as_str);
            let Some(name) = on.or(zone.filter(|zone| zone.parse::<u32>().is_err())) else {
                continue;
            };
            let device = devices.get(name).copied();
            let device = device.unwrap_or_else(|| {
                let device = if_nametoindex(name).ok();
                devices.insert(name.to_owned(), device);
                device
            });
            let Some(ifindex) = device else {
                continue;
            };
            let followed = serving
                .proxy
                .as_mut()
                .map_or(Ok(()), |it| it.only_on(name, ifindex));
            if let Err(error) = followed {
                warn!(
                    "{name} is another device now, which the proxy does not serve {spec} on: {error}"
                );
            }
            if on.is_some() && serving.limits.ifindex != ifindex {
                serving.limits.ifindex = ifindex;
                moved.push(*id);
            }
        }
        moved.into_iter().try_for_each(|id| self.install(id))
    }

    /// Publishes that an IPsec policy covers: flows that were begun before would go round it.
    fn covered(&self) -> BTreeSet<u32> {
        let covered = self.serving.values().filter(|serving| serving.covered);
        covered.map(|serving| serving.row.index).collect()
    }

    /// Asks the kernel for the way to backends that only it knows: once for each, until routing changes.
    pub(super) async fn ask_for_routes(&mut self, backends: impl IntoIterator<Item = IpAddr>) {
        let Some(reader) = &self.network.reader else {
            return;
        };
        let begun = Instant::now();
        for backend in backends {
            let is_known = self.network.snapshot.answers.contains_key(&backend);
            if is_known || !plan::takes_an_answer(&self.network.snapshot, backend) {
                continue;
            }
            match reader.route_to(backend).await {
                Ok(answer) => drop(self.network.snapshot.answers.insert(backend, answer)),
                Err(error) => warn!("the route to {backend}: {error:#}"),
            }
        }
        // Thousands of backends must not keep the daemon busy when routes change all the time.
        let pause = begun.elapsed() * ASK_ROUTES_PAUSE;
        self.network.ask_routes_after = self.network.ask_routes_after.max(Instant::now() + pause);
    }

    /// Backends on this machine whose MAC, or the bridge port behind it, isn't known are asked for by the
    /// kernel's neighbour discovery, so that they get the fastest delivery: before the first packet, and when a
    /// container is back with another MAC, where the kernel would try the old one for seconds. The fast
    /// path goes round the bridge, so nothing else would teach it the port.
    pub(super) async fn ask_for_neighbours(&mut self) {
        let all: Vec<Id> = self.serving.keys().copied().collect();
        let waiting = self.ask_for_neighbours_of(&all).await;
        self.network.asked.retain(|key, _| waiting.contains(key));
    }

    /// The same for some publishes; returns the backends that are not known.
    pub(super) async fn ask_for_neighbours_of(&mut self, ids: &[Id]) -> HashSet<(u32, IpAddr)> {
        let (Some(reader), Some(datapath)) = (&self.network.reader, &self.datapath) else {
            return HashSet::new();
        };
        let now = Instant::now();
        // Backends that are reached by the kernel's own resolution for now.
        let unresolved = ids.iter().filter_map(|id| {
            let serving = self.serving.get(id)?;
            let entry = &datapath.maps.installed(serving.row.index)?.entry;
            let is_local = entry.flags & flag::REMOTE == 0;
            let waits = entry.hop.delivery == delivery::NEIGHBOUR && is_local;
            let backend = serving.row.wanted.publish.spec.backend;
            waits.then_some((entry.hop.ifindex, backend))
        });
        let unresolved: HashSet<(u32, IpAddr)> = unresolved.collect();
        for &key in &unresolved {
            let before = self.network.asked.get(&key);
            if before.is_some_and(|asked| now < *asked + ASK_AGAIN) {
                continue;
            }
            self.network.asked.insert(key, now);
            match self.network.snapshot.neighbours.get(&key) {
                Some(neighbour) if neighbour.permanent => {} // somebody set it by hand
                Some(neighbour) => {
                    debug!("the bridge port of {} is not known", key.1);
                    reader.forget_neighbour(key.0, key.1, neighbour.mac).await;
                    reader.ask_neighbour(key.0, key.1).await;
                }
                None => reader.ask_neighbour(key.0, key.1).await,
            }
        }
        unresolved
    }

    pub(super) fn reconcile_devices(&mut self) -> Result<()> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        let uplinks = plan::uplinks_bits(&self.network.snapshot);
        datapath.maps.set_uplinks(uplinks)?;
        let forbidding = plan::may_forbid(&self.network.snapshot);
        datapath.maps.set_forbidding(forbidding)?;
        let mtus = plan::mtus(&self.network.snapshot);
        datapath.maps.set_route_mtus(mtus)?;
        datapath
            .maps
            .set_locations(&locations::locations(&self.network.snapshot))?;
        self.forget_xdp();
        self.attach_xdp(None);
        self.write_interfaces()?;
        self.reconcile_hooks();
        Ok(())
    }

    /// The tc programs. Last: what comes in must find what it is asked for.
    fn reconcile_hooks(&mut self) {
        let Some(datapath) = &mut self.datapath else {
            return;
        };
        let respects_firewall = self.config.respect_firewall;
        let uplinks = plan::uplinks(&self.network.snapshot);
        let wanted: BTreeMap<Place, String> = plan::attached(&self.network.snapshot)
            .flat_map(|(ifindex, link)| {
                let hooks: &[Hook] = match link.header {
                    Header::Ip => &[Hook::IngressIp],
                    _ if respects_firewall || uplinks.contains(&ifindex) => &Hook::BOTH_SIDES,
                    _ => &[Hook::Ingress],
                };
                hooks
                    .iter()
                    .map(move |hook| ((ifindex, *hook), link.name.clone()))
            })
            .collect();
        let have: Vec<Place> = datapath.attached().collect();
        for place in have.iter().filter(|place| !wanted.contains_key(place)) {
            datapath.detach(*place);
        }
        let missing = &mut self.network.missing;
        missing.retain(|place, _| wanted.contains_key(place));
        for (place, name) in wanted.iter().filter(|(place, _)| !have.contains(place)) {
            match datapath.attach(*place, name) {
                Ok(()) => match missing.remove(place) {
                    Some(_) => {}
                    None => debug!("attached to {name}"),
                },
                // What has gone since the network was read, or is just going, takes no packets.
                Err(error)
                    if errno(&error) == Some(libc::ENODEV) || device_name(place.0).is_none() =>
                {
                    missing.remove(place);
                }
                Err(error) => {
                    let said = format!("{error:#}");
                    // It is tried often.
                    if missing.get(place) != Some(&said) {
                        warn!("{name} is without our program for now: {said}");
                        missing.insert(*place, said);
                    }
                }
            }
        }
        let links = &self.network.snapshot.links;
        let devices = missing.keys().map(|place| place.0);
        let devices = devices.filter(|ifindex| links.get(ifindex).is_some_and(|it| it.up));
        let devices = devices.collect();
        self.network.unattached = plan::unattached(&self.network.snapshot, devices);
    }

    /// After publishes have changed: some may be the first that XDP has to do with.
    pub(super) fn follow_xdp(&mut self, changed: &[Id]) -> Result<()> {
        if self.attach_xdp(Some(changed)) {
            self.write_interfaces()?;
            // They say how XDP takes part.
            for id in self.serving.keys().copied().collect::<Vec<_>>() {
                self.install(id)?;
            }
        }
        Ok(())
    }

    /// The XDP program on the devices that it belongs on; whether it is on more than before.
    fn attach_xdp(&mut self, changed: Option<&[Id]>) -> bool {
        let Some(datapath) = &mut self.datapath else {
            return false;
        };
        // Attaching it stops some devices for a moment: an allow-list alone is no reason that nobody has given.
        let works_on = match self.config.xdp {
            XdpChoice::Auto => flag::REMOTE,
            _ => flag::REMOTE | flag::ALLOW_LIST,
        };
        let work = |it: &Serving| {
            let installed = datapath.maps.installed(it.row.index);
            installed.is_some_and(|it| it.entry.flags & works_on != 0)
        };
        let has_work = match changed {
            Some(ids) => ids.iter().filter_map(|id| self.serving.get(id)).any(work),
            None => self.serving.values().any(work),
        };
        if !has_work {
            return false;
        }
        let (links, mode) = (&self.network.snapshot.links, self.config.xdp);
        let mut more = false;
        for (ifindex, mode) in plan::with_xdp(&self.network.snapshot, mode) {
            let there = datapath.xdp().any(|(there, _)| there == ifindex);
            let refused = self.network.without_xdp.get(&ifindex).copied();
            if there || refused == Some(false) {
                continue;
            }
            let name = &links[&ifindex].name;
            match datapath.attach_xdp(ifindex, mode) {
                Ok(()) => {
                    more = true;
                    self.network.without_xdp.remove(&ifindex);
                    info!("{name} has XDP, {}", mode.name());
                }
                Err(error) => {
                    let is_busy = xdp::is_others(&error);
                    self.network.without_xdp.insert(ifindex, is_busy);
                    if refused.is_some() {
                        continue;
                    }
                    let why = format!("{name} has no {} XDP, tc does it: {error:#}", mode.name());
                    if self.config.xdp == XdpChoice::Auto {
                        debug!("{why}");
                    } else {
                        warn!("{why}");
                    }
                }
            }
        }
        more
    }

    /// The XDP programs of devices that have gone, or allow none any more.
    fn forget_xdp(&mut self) {
        let links = &self.network.snapshot.links;
        self.network
            .without_xdp
            .retain(|i, _| links.contains_key(i));
        let Some(datapath) = &mut self.datapath else {
            return;
        };
        let gone = datapath.xdp().map(|(ifindex, _)| ifindex);
        let allows = |i: &u32| links.get(i).is_some_and(plan::allows_xdp);
        let gone: Vec<u32> = gone.filter(|i| !allows(i)).collect();
        gone.into_iter().for_each(|i| datapath.detach_xdp(i));
    }

    /// `INTERFACES`.
    fn write_interfaces(&mut self) -> Result<()> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        let mut new: BTreeMap<u32, Interface> = plan::interfaces(&self.network.snapshot).collect();
        for (ifindex, mode) in datapath.xdp() {
            let by = plan::xdp_by(&self.network.snapshot, ifindex, mode);
            new.entry(ifindex)
                .and_modify(|interface| interface.xdp = by);
        }
        let old = &self.network.interfaces;
        for ifindex in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
            if old.get(ifindex) != new.get(ifindex) {
                let interface = new.get(ifindex).copied();
                datapath.maps.set_interface(*ifindex, interface)?;
            }
        }
        self.network.interfaces = new;
        Ok(())
    }
}
