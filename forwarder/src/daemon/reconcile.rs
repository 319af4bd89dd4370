//! The part of the daemon that follows the network: one reading after another, and the kernel's maps,
//! attachments and neighbours made to match it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::Result;
use forwarder_common::{
    flow::{Hop, delivery},
    publish::{Interface, Publish as Entry, flag},
    tuple::Address,
};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{
    ASK_AGAIN, ASK_ROUTES_PAUSE, Daemon,
    report::{delivery_name, delivery_of},
};
use crate::{
    cli::XdpChoice,
    datapath::devices::{Hook, Place},
    network::Header,
    network::xfrm,
    plan::locations,
    plan::{self, Resolved},
    publish::spec::Protocol,
};

impl Daemon {
    /// Reads the network again and makes the kernel match.
    pub(super) async fn refresh(&mut self) -> Result<()> {
        let Some(reader) = &self.reader else {
            return Ok(());
        };
        let before = std::mem::take(&mut self.snapshot);
        let after = self.watch.snapshot(reader, &before).await;
        self.snapshot = match after {
            Ok(after) => after,
            Err(error) => {
                self.snapshot = before;
                return Err(error);
            }
        };
        if self.routing_changed && Instant::now() >= self.ask_routes_after {
            self.routing_changed = false;
            self.snapshot.answers.clear();
        }
        let backends = self.publishes.values();
        let backends: Vec<IpAddr> = backends.map(|published| published.spec.backend).collect();
        self.ask_for_routes(backends).await;
        self.reconcile_devices()?;
        let ids: Vec<u32> = self.publishes.keys().copied().collect();
        let before = self.covered();
        for id in ids {
            self.resolve(id)?;
        }
        let newly: BTreeSet<u32> = &self.covered() - &before;
        if !newly.is_empty() {
            self.remove_flows(&newly)?;
        }
        self.follow_xdp()?;
        self.ask_for_neighbours().await;
        self.warn_of_disputes();
        Ok(())
    }

    /// Warns of each container once, however often it changes its addresses.
    pub(super) fn warn_of_disputes(&mut self) {
        let snapshot = &self.snapshot;
        self.warned.retain(|veth| snapshot.links.contains_key(veth));
        for (&veth, &address) in &snapshot.disputed {
            if self.warned.insert(veth) {
                warn!("{}", locations::dispute(snapshot, veth, address));
            }
        }
    }

    /// Publishes that an IPsec policy covers: flows that were begun before would go round it.
    fn covered(&self) -> BTreeSet<u32> {
        let covered = self.publishes.iter().filter(|(_, p)| p.covered);
        covered.map(|(id, _)| *id).collect()
    }

    /// Asks the kernel for the way to backends that only it knows: once for each, until routing changes.
    pub(super) async fn ask_for_routes(&mut self, backends: impl IntoIterator<Item = IpAddr>) {
        let Some(reader) = &self.reader else {
            return;
        };
        let begun = Instant::now();
        for backend in backends {
            let is_known = self.snapshot.answers.contains_key(&backend);
            if is_known || !plan::takes_an_answer(&self.snapshot, backend) {
                continue;
            }
            match reader.route_to(backend).await {
                Ok(answer) => drop(self.snapshot.answers.insert(backend, answer)),
                Err(error) => warn!("the route to {backend}: {error:#}"),
            }
        }
        // Thousands of backends must not keep the daemon busy when routes change all the time.
        let pause = begun.elapsed() * ASK_ROUTES_PAUSE;
        self.ask_routes_after = self.ask_routes_after.max(Instant::now() + pause);
    }

    /// Backends on this machine whose MAC, or the bridge port behind it, isn't known are asked for by the
    /// kernel's neighbour discovery, so that they get the fastest delivery: before the first packet, and when a
    /// container is back with another MAC, where the kernel would try the old one for seconds. The fast
    /// path goes round the bridge, so nothing else would teach it the port.
    pub(super) async fn ask_for_neighbours(&mut self) {
        let Some(reader) = &self.reader else {
            return;
        };
        let now = Instant::now();
        for published in self.publishes.values() {
            let Some(entry) = &published.entry else {
                continue;
            };
            let key = (entry.hop.ifindex, published.spec.backend);
            let direct = entry.hop.delivery != delivery::NEIGHBOUR;
            if direct || entry.flags & flag::REMOTE != 0 {
                self.asked
                    .retain(|(_, backend), _| *backend != published.spec.backend);
                continue;
            }
            if self
                .asked
                .get(&key)
                .is_some_and(|asked| now < *asked + ASK_AGAIN)
            {
                continue;
            }
            self.asked.insert(key, now);
            match self.snapshot.neighbours.get(&key) {
                Some(neighbour) if neighbour.permanent => {} // somebody set it by hand
                Some(neighbour) => {
                    debug!("the bridge port of {} is not known", published.spec.backend);
                    reader.forget_neighbour(key.0, key.1, neighbour.mac).await;
                    reader.ask_neighbour(key.0, key.1).await;
                }
                None => reader.ask_neighbour(key.0, key.1).await,
            }
        }
    }

    pub(super) fn reconcile_devices(&mut self) -> Result<()> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        let several = plan::has_several_uplinks(&self.snapshot);
        datapath.maps.set_several_uplinks(several)?;
        datapath
            .maps
            .set_locations(&locations::locations(&self.snapshot))?;
        self.forget_xdp();
        self.attach_xdp();
        self.write_interfaces()?;
        self.reconcile_hooks();
        Ok(())
    }

    /// The tc programs. Last: what comes in must find what it is asked for.
    fn reconcile_hooks(&mut self) {
        let Some(datapath) = &mut self.datapath else {
            return;
        };
        let respects_firewall = self.options.respect_firewall;
        let uplinks = plan::uplinks(&self.snapshot);
        let wanted: BTreeMap<Place, String> = plan::attached(&self.snapshot)
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
        for (place, name) in wanted.iter().filter(|(place, _)| !have.contains(place)) {
            match datapath.attach(*place, name) {
                Ok(()) => debug!("attached to {name}"),
                Err(error) => warn!("{error:#}"),
            }
        }
    }

    /// After publishes have changed: some may be the first that XDP has to do with.
    pub(super) fn follow_xdp(&mut self) -> Result<()> {
        if self.attach_xdp() {
            self.write_interfaces()?;
        }
        Ok(())
    }

    /// The XDP program on the devices that it belongs on; whether it is on more than before.
    fn attach_xdp(&mut self) -> bool {
        let Some(datapath) = &mut self.datapath else {
            return false;
        };
        let mut entries = self.publishes.values().filter_map(|p| p.entry);
        // Attaching it stops some devices for a moment: an allow-list alone is no reason that nobody has given.
        let works_on = match self.options.xdp {
            XdpChoice::Auto => flag::REMOTE,
            _ => flag::REMOTE | flag::ALLOW_LIST,
        };
        let has_work = entries.any(|entry| entry.flags & works_on != 0);
        if !has_work {
            return false;
        }
        let (links, mode) = (&self.snapshot.links, self.options.xdp);
        let mut more = false;
        for (ifindex, mode) in plan::with_xdp(&self.snapshot, mode) {
            let there = datapath.xdp().any(|(there, _)| there == ifindex);
            if there || self.without_xdp.contains(&ifindex) {
                continue;
            }
            let name = &links[&ifindex].name;
            match datapath.attach_xdp(ifindex, mode) {
                Ok(()) => {
                    more = true;
                    info!("{name} has XDP, {}", mode.name());
                }
                Err(error) => {
                    self.without_xdp.insert(ifindex);
                    let why = format!("{name} has no {} XDP, tc does it: {error:#}", mode.name());
                    if self.options.xdp == XdpChoice::Auto {
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
        let links = &self.snapshot.links;
        self.without_xdp.retain(|i| links.contains_key(i));
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
        let mut new: BTreeMap<u32, Interface> = plan::interfaces(&self.snapshot).collect();
        for (ifindex, _) in datapath.xdp() {
            new.entry(ifindex).and_modify(|interface| interface.xdp = 1);
        }
        let old = &self.interfaces;
        for ifindex in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
            if old.get(ifindex) != new.get(ifindex) {
                let interface = new.get(ifindex).copied();
                datapath.maps.set_interface(*ifindex, interface)?;
            }
        }
        self.interfaces = new;
        Ok(())
    }

    /// Decides how a publish is served now, and writes that to the kernel if it changed.
    pub(super) fn resolve(&mut self, id: u32) -> Result<()> {
        let (Some(datapath), Some(published)) = (&mut self.datapath, self.publishes.get_mut(&id))
        else {
            return Ok(());
        };
        let spec = &published.spec;
        let resolved = match spec.protocol {
            Protocol::Sctp => Err("SCTP is served in user space".to_owned()),
            Protocol::Tcp | Protocol::Udp => plan::resolve(&self.snapshot, spec.backend),
        };
        let policy = xfrm::covering_policy(&self.snapshot, spec);
        published.covered = policy.is_some();
        let stack = self.options.respect_firewall;
        let resolved = resolved.and_then(|resolved| {
            if let Some(policy) = policy {
                return Err(format!("an IPsec policy covers it: {policy}"));
            }
            if stack {
                plan::through_the_stack(&self.snapshot, spec.backend, &resolved)?;
            }
            let present = published.entry.map(|entry| entry.source);
            let keeps =
                |source: &Address| plan::keeps_source(&self.snapshot, spec.backend, *source);
            let source = present.filter(keeps).unwrap_or(resolved.source);
            Ok(Resolved { source, ..resolved })
        });
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
        let flags = [
            (flag::SINGLE_PORT, spec.backend_is_single()),
            (flag::REMOTE, resolved.remote),
            (flag::ALLOW_LIST, !published.allow.is_empty()),
            (flag::STEERED, published.steered),
            (flag::DRAINING, published.draining()),
            (flag::STACK, stack),
        ]
        .into_iter()
        .filter(|(_, set)| *set)
        .fold(0, |flags, (flag, _)| flags | flag);
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
                delivery_name(delivery_of(&entry))
            );
        }
        Ok(())
    }
}
