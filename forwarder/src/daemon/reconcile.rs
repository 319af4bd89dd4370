//! Makes kernel and proxy match what is wanted: everything is validated, then changed; a failure undoes in reverse, goes on
//! past errors of the undoing, and the first error is returned.

use std::{
    collections::{BTreeSet, HashSet},
    net::IpAddr,
    num::NonZeroU64,
    os::fd::OwnedFd,
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use forwarder_common::policy;
use ipnet::IpNet;
use tracing::{info, warn};

use super::{Daemon, store_name, view::Row};
use crate::{
    config::{Config, DatapathChoice},
    control::api::Ending,
    metrics::Timed,
    network::local::is_local,
    plan::Unserved,
    proxy::{Held, Options as ProxyOptions, Proxy, Sockets, Stop, is_wide},
    publish::{
        Difference, Holder, Id, Limits, ProxyProtocol, Publish, Spec, Wanted, bans::Banned, loops,
        spec::Protocol,
    },
};

/// What serves one publish.
pub(super) struct Serving {
    pub row: Arc<Row>,
    /// `None` while its ports are given to another.
    pub proxy: Option<Proxy>,
    /// The sockets that hold a wide range, one in each family, with whether that is IPv4; empty if each port has its own.
    pub steered: Vec<(bool, OwnedFd)>,
    /// An IPsec policy keeps it from the fast path.
    pub covered: bool,
    /// The place of the one that had its port before and drains; 0 for none.
    pub previous: u32,
    /// The backend is told of each client.
    pub proxy_protocol: bool,
    pub limits: policy::Limits,
}

impl Serving {
    /// The kernel has nothing of it.
    pub(super) fn is_refused(&self) -> bool {
        matches!(self.row.unserved, Some(Unserved::Refused(_)))
    }

    /// Ends what the proxy has of it; on return its ports are free.
    pub(super) async fn end(self, ending: Ending) {
        if let Some(mut proxy) = self.proxy {
            proxy.stop(stop(ending)).await;
        }
    }
}

pub(super) const fn stop(ending: Ending) -> Stop {
    match ending {
        Ending::Cut | Ending::Reset => Stop::Reset,
        Ending::Drain => Stop::Drain,
    }
}

/// Whose flows have to be ended: places in `PUBLISHES`, and sources.
#[derive(Debug, Default)]
#[must_use]
pub(super) struct Loose {
    /// The kernel has the publish no more, and its place is free then.
    pub gone: BTreeSet<u32>,
    /// Both ends are told, for which the kernel keeps the publish for a moment.
    pub cut: BTreeSet<u32>,
    /// The publish stays.
    pub stays: BTreeSet<u32>,
    pub banned: Vec<Banned>,
}

impl Loose {
    pub(super) fn add(&mut self, other: Self) {
        self.gone.extend(other.gone);
        self.cut.extend(other.cut);
        self.stays.extend(other.stays);
        self.banned.extend(other.banned);
    }

    /// Nobody has to hear of it.
    pub(super) fn is_silent(&self) -> bool {
        self.cut.is_empty() && self.stays.is_empty() && self.banned.is_empty()
    }
}

/// A step that was done, and how it is undone.
enum Done {
    Begun(Id),
    /// With what was wanted before.
    Changed(Wanted),
    /// It takes no new flows any more.
    Closed(Id),
}

impl Daemon {
    /// Puts a difference in force, or nothing of it.
    ///
    /// # Errors
    /// The first thing that could not be had.
    pub(super) async fn reconcile(
        &mut self,
        difference: &Difference,
        ending: Ending,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Loose> {
        if difference.is_empty() {
            return Ok(Loose::default());
        }
        let _timed = Timed::new(&self.view.durations.reconcile);
        let (asked, difference) = (difference, &difference.served());
        let new = difference.add.iter();
        let new = new.chain(difference.change.iter().map(|(_, after)| after));
        self.refuse_loops(difference)?;
        let backends: Vec<_> = new.map(|wanted| wanted.publish.spec.backend).collect();
        self.ask_for_routes(backends).await;
        let mut loose = Loose::default();
        let mut done = Vec::new();
        let in_the_way = difference.in_the_way.clone();
        let mut given = Sockets::from(descriptors);
        let tried = self.try_all(
            difference,
            &in_the_way,
            ending,
            &mut given,
            (&mut done, &mut loose),
        );
        let result = match tried.await {
            Ok(()) => self.record(asked),
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            // A start is abandoned as a whole: flows and conversations that it took over are the next one's.
            if self.serves {
                self.undo(done, &in_the_way).await;
                drop(tokio::spawn(self.end_flows_of(loose)));
            }
            return Err(error);
        }
        for (_, after) in &difference.change {
            self.tell("changed", after.id);
        }
        for wanted in &difference.add {
            self.tell("published", wanted.id);
        }
        for wanted in &difference.remove {
            self.tell("unpublished", wanted.id);
            let ending = if in_the_way.contains(&wanted.id) {
                Ending::Cut
            } else {
                ending
            };
            loose.add(self.end(wanted.id, ending).await);
        }
        if !difference.remove.is_empty() {
            tokio::task::block_in_place(|| self.idle.settle());
        }
        self.record_drains();
        self.wait_for_stopped(asked);
        if let Err(error) = self.follow_xdp(&difference.asked) {
            warn!("{error:#}");
        }
        self.ask_for_neighbours_of(&difference.asked).await;
        Ok(loose)
    }

    /// # Errors
    /// What is new leads back to itself.
    fn refuse_loops(&self, difference: &Difference) -> Result<()> {
        let changed = difference.change.iter().map(|(before, _)| before.id);
        let gone = difference.remove.iter().map(|it| it.id).chain(changed);
        let gone: BTreeSet<Id> = gone.collect();
        let added = difference.add.iter();
        let new = added.chain(difference.change.iter().map(|(_, after)| after));
        let new: Vec<Spec> = new.map(|it| it.publish.spec.clone()).collect();
        // What leads back to itself has a backend on this host.
        let backends: HashSet<IpAddr> = new.iter().map(|spec| spec.backend).collect();
        let local = backends
            .into_iter()
            .filter(|it| is_local(*it).unwrap_or(false));
        let local: HashSet<IpAddr> = local.collect();
        if local.is_empty() {
            return Ok(());
        }
        let stay = self.registry.iter().filter(|it| !gone.contains(&it.id));
        let stay = stay.map(|it| &it.publish.spec);
        Ok(loops::refuse_loops(stay, &new, |address| {
            is_local(address).unwrap_or(false)
        })?)
    }

    /// Serves what was published before. What somebody else has the ports of keeps nothing else from being served: it waits.
    pub(super) async fn serve_or_wait(&mut self, restored: Vec<Wanted>) {
        let backends: Vec<_> = restored.iter().map(|it| it.publish.spec.backend).collect();
        self.ask_for_routes(backends).await;
        let mut served = Difference::default();
        for wanted in restored {
            if let Some(why) = wanted.publish.stopped() {
                self.wait(wanted, why);
                continue;
            }
            let begun = tokio::task::block_in_place(|| {
                self.begin_publish(&wanted, &mut Sockets::default())
            });
            let Err(error) = begun else {
                if self.waiting.remove(&wanted.id) {
                    served.change.push((wanted.clone(), wanted.clone()));
                    info!("publish {} is served again", wanted.publish.spec);
                    self.tell("published", wanted.id);
                }
                continue;
            };
            if !self.waiting.contains(&wanted.id) {
                warn!("{error:#}; it is tried again");
            }
            self.wait(wanted, format!("{error:#}"));
        }
        // Their places are known now.
        if !served.change.is_empty()
            && let Err(error) = self.record(&served)
        {
            warn!("{error:#}");
        }
    }

    /// What has stopped of a difference waits.
    fn wait_for_stopped(&mut self, difference: &Difference) {
        for (_, after) in &difference.change {
            if let Some(why) = after.publish.stopped() {
                self.wait(after.clone(), why);
            }
        }
    }

    /// Shows that a publish is not served, and why.
    fn wait(&mut self, wanted: Wanted, why: String) {
        self.waiting.insert(wanted.id);
        self.view.show(&Arc::new(Row {
            unserved: Some(Unserved::Waiting(why)),
            ..Row::new(wanted)
        }));
    }

    /// Tries again what waits.
    pub(super) async fn retry(&mut self) {
        let waiting = self.waiting.iter().filter_map(|id| self.registry.get(*id));
        let waiting: Vec<Wanted> = waiting.cloned().collect();
        self.waiting.retain(|id| self.registry.get(*id).is_some());
        self.serve_or_wait(waiting).await;
    }

    fn tell(&self, event: &str, id: Id) {
        if self.view.has_listeners()
            && let Some(row) = self.view.row(id)
        {
            self.view.tell(event, row);
        }
    }

    async fn try_all(
        &mut self,
        difference: &Difference,
        in_the_way: &BTreeSet<Id>,
        ending: Ending,
        given: &mut Sockets,
        (done, loose): (&mut Vec<Done>, &mut Loose),
    ) -> Result<()> {
        for wanted in &difference.remove {
            // One that drains keeps its ports.
            if ending != Ending::Drain || in_the_way.contains(&wanted.id) {
                self.close(wanted.id)?;
                done.push(Done::Closed(wanted.id));
            }
        }
        for id in in_the_way {
            if let Some(serving) = self.serving.get_mut(id)
                && let Some(mut proxy) = serving.proxy.take()
            {
                serving.steered.clear(); // which have the ports, too
                proxy.stop(Stop::Reset).await;
            }
        }
        tokio::task::block_in_place(|| {
            if !in_the_way.is_empty() {
                self.idle.settle();
            }
            for wanted in &difference.add {
                self.begin_publish(wanted, given)?;
                done.push(Done::Begun(wanted.id));
            }
            for (before, after) in &difference.change {
                done.push(Done::Changed(before.clone()));
                loose.gone.extend(self.change_publish(after)?);
            }
            Ok(())
        })
    }

    /// Takes back what was done, the last first.
    async fn undo(&mut self, done: Vec<Done>, in_the_way: &BTreeSet<Id>) {
        let mut loose = Loose::default();
        for step in done.into_iter().rev() {
            let undone = match step {
                Done::Begun(id) => {
                    let undone = self.uninstall_publish(id);
                    loose.add(self.end(id, Ending::Cut).await);
                    undone
                }
                Done::Changed(before) => {
                    let former = self.change_publish(&before);
                    former.map(|former| loose.gone.extend(former))
                }
                Done::Closed(id) if in_the_way.contains(&id) => self.hold_again(id),
                Done::Closed(id) => self.open(id),
            };
            if let Err(error) = undone {
                warn!("what failed is not all undone: {error:#}");
            }
        }
        drop(tokio::spawn(self.end_flows_of(loose)));
    }

    /// Records a difference that is in force, also on disk.
    pub(super) fn record(&mut self, difference: &Difference) -> Result<()> {
        self.registry.apply(difference);
        let draining = self.drains();
        let Some(state) = &mut self.state else {
            return Ok(());
        };
        let Config {
            publishes,
            configured,
            ..
        } = &self.config;
        let asked: HashSet<&Publish> = publishes.iter().chain(configured).collect();
        let is_configured = |it: &Wanted| asked.contains(&*it.publish);
        let serving = &self.serving;
        let place = |it: &Wanted| serving.get(&it.id).map_or(0, |it| it.row.index);
        let written = tokio::task::block_in_place(|| {
            state.write(difference, &self.registry, draining, is_configured, place)
        });
        if let Err(error) = written {
            self.registry.apply(&difference.inverse());
            return Err(error);
        }
        self.end_bans_of(difference.remove.iter().map(|it| it.id));
        Ok(())
    }

    /// Holds a publish's ports, and has kernel and proxy serve it.
    fn begin_publish(&mut self, wanted: &Wanted, given: &mut Sockets) -> Result<()> {
        let spec = &wanted.publish.spec;
        let before = self.places.get(&wanted.id).copied();
        let before = before.filter(|place| self.slots.take_this(*place));
        let index = before.or_else(|| self.slots.take());
        let index = index.context(NO_PLACE)?;
        let begun = self.hold(index, wanted, given).and_then(|serving| {
            let id = wanted.id;
            self.serving.insert(id, serving);
            self.install(id)?;
            let unserved = self
                .serving
                .get(&id)
                .and_then(|serving| serving.row.unserved.clone());
            match unserved {
                Some(why)
                    if self.config.datapath == DatapathChoice::Ebpf
                        && wanted.publish.holder.is_forwarder() =>
                {
                    bail!("publish {spec}: {why}; --datapath auto would serve it in user space")
                }
                _ => Ok(()),
            }
        });
        if begun.is_err() {
            let _ = self.uninstall_publish(wanted.id);
            self.serving.remove(&wanted.id);
            self.view.hide(wanted.id);
            self.give_back(&[index]);
        }
        begun
    }

    /// Holds a publish's ports: by a socket each, or a wide range by one socket if the kernel can steer; and starts its
    /// proxy.
    fn hold(&mut self, index: u32, wanted: &Wanted, given: &mut Sockets) -> Result<Serving> {
        let publish = &wanted.publish;
        let spec = &publish.spec;
        let (held, steered) = match publish.holder {
            Holder::Engine => (Held::default(), Vec::new()),
            Holder::Forwarder => self.bind(index, wanted, given)?,
        };
        let options = self.options(wanted)?;
        let limits = options.limits;
        let allow: Arc<[IpNet]> = options.allow.clone().into();
        if let Some(device) = &publish.policy.limits.on {
            let only = held.only_on(device);
            only.with_context(|| format!("publish {spec}: only by {device}"))?;
        }
        let proxy_protocol = options.proxy_protocol != ProxyProtocol::Off;
        let proxy = Proxy::start(held, Arc::new(spec.clone()), options, &self.idle)?;
        let row = Row {
            index,
            unserved: self.datapath.is_none().then(|| self.without.clone()),
            allow,
            meter: Some(proxy.meter()),
            ..Row::new(wanted.clone())
        };
        Ok(Serving {
            row: Arc::new(row),
            proxy: Some(proxy),
            steered,
            covered: false,
            previous: self.drains_on(wanted),
            proxy_protocol,
            limits,
        })
    }

    fn bind(
        &mut self,
        index: u32,
        wanted: &Wanted,
        given: &mut Sockets,
    ) -> Result<(Held, Vec<(bool, OwnedFd)>)> {
        let spec = &wanted.publish.spec;
        let given = &mut [given, &mut self.left];
        let Some(datapath) = self.datapath.as_mut().filter(|_| is_wide(spec)) else {
            return Ok((Held::bind(spec, given)?, Vec::new()));
        };
        if let Err(error) = datapath.enable_steering() {
            warn!("{spec} is held by a socket for each port: {error:#}");
            return Ok((Held::bind(spec, given)?, Vec::new()));
        }
        let held = Held::bind_steered(spec, datapath.own_mark(), given)?;
        let mut steered = Vec::new();
        held.try_for_each(|is_v4, socket| {
            steered.push((is_v4, socket.try_clone_to_owned()?));
            datapath.steer(index, is_v4, &socket)
        })
        .with_context(|| format!("publish {spec}"))?;
        Ok((held, steered))
    }

    /// After a failed change: has the ports again that were given back for it.
    fn hold_again(&mut self, id: Id) -> Result<()> {
        let Some(serving) = self.serving.get(&id) else {
            return Ok(());
        };
        let (index, wanted) = (serving.row.index, serving.row.wanted.clone());
        let serving = self.hold(index, &wanted, &mut Sockets::default())?;
        self.serving.insert(id, serving);
        self.install(id)
    }

    /// Publishes that have the instance's allow-list, as changes by which they have another one, beside a difference.
    pub(super) fn following_allow(&self, beside: &Difference) -> Vec<(Wanted, Wanted)> {
        let changed = beside.change.iter().map(|(before, _)| before);
        let others = beside.remove.iter().chain(changed).map(|it| it.id);
        let others: BTreeSet<Id> = others.collect();
        let wanted = self.serving.values().map(|it| &it.row.wanted);
        wanted
            .filter(|it| it.publish.policy.allow.is_none() && !others.contains(&it.id))
            .map(|it| (it.clone(), it.clone()))
            .collect()
    }

    /// Gives them the instance's allow-list again, after a failed change of it.
    pub(super) fn follow_allow(&mut self) {
        for (wanted, _) in self.following_allow(&Difference::default()) {
            if let Err(error) = self.change_publish(&wanted) {
                warn!("what failed is not all undone: {error:#}");
            }
        }
    }

    /// What a publish says, and where it says nothing, the instance.
    ///
    /// # Errors
    /// There is no such device.
    pub(super) fn options(&self, wanted: &Wanted) -> Result<ProxyOptions> {
        let Publish { spec, policy, .. } = &*wanted.publish;
        let protocol = match spec.protocol {
            Protocol::Tcp => self.config.proxy_protocol,
            Protocol::Udp | Protocol::Sctp => ProxyProtocol::Off,
        };
        let Limits {
            max_flows,
            rate,
            rate_per_source,
            bandwidth,
            on,
        } = &policy.limits;
        let ifindex = match on.as_deref() {
            Some(name) => nix::net::if_::if_nametoindex(name)
                .map_err(|_| {
                    anyhow::anyhow!(
                        "publish {spec}: there is no interface {name:?}; `ip link` shows those there are"
                    )
                })?,
            None => 0,
        };
        Ok(ProxyOptions {
            publish: wanted.id,
            name: store_name(wanted.id),
            proxy_protocol: policy.proxy_protocol.unwrap_or(protocol),
            allow: policy.allow.as_ref().unwrap_or(&self.config.allow).clone(),
            timeouts: self.timeouts.clone(),
            limits: policy::Limits {
                flows: max_flows.map_or(0, NonZeroU64::get),
                new_flows: rate.map_or(0, |rate| rate.0),
                new_flows_by_source: rate_per_source.map_or(0, |rate| rate.0),
                bits: [bandwidth.map_or(0, |bits| bits.0); 2],
                ifindex,
            },
        })
    }

    /// Gives a publish another backend or policy, in place. TCP connections to another backend go on; the place is returned
    /// whose flows are not to.
    fn change_publish(&mut self, after: &Wanted) -> Result<Option<u32>> {
        let options = self.options(after)?;
        let Some(serving) = self.serving.get_mut(&after.id) else {
            return Ok(None);
        };
        let before = serving.row.clone();
        if before.wanted.publish.holder != after.publish.holder {
            bail!(
                "publish {}: who holds its ports cannot change in place; unpublish it first",
                after.publish.spec
            );
        }
        if before.wanted.publish.policy.limits.on != after.publish.policy.limits.on {
            bail!(
                "publish {}: its interface cannot change in place; unpublish it first",
                after.publish.spec
            );
        }
        let is_refused = serving.is_refused(); // the kernel has nothing that could drain there
        let row = Arc::make_mut(&mut serving.row);
        serving.proxy_protocol = options.proxy_protocol != ProxyProtocol::Off;
        serving.limits = options.limits;
        row.wanted = after.clone();
        row.allow = options.allow.clone().into();
        if let Some(proxy) = &serving.proxy {
            proxy.change(Arc::new(after.publish.spec.clone()), options);
        }
        let moves = before.wanted.publish.spec != after.publish.spec;
        let former = match &mut self.datapath {
            Some(datapath) if moves && !is_refused => {
                row.index = self.slots.take().context(NO_PLACE)?;
                for (is_v4, socket) in &serving.steered {
                    datapath.steer(row.index, *is_v4, socket)?;
                }
                let previous = std::mem::replace(&mut serving.previous, before.index);
                Some(self.drain(before, previous, None))
            }
            _ => None,
        };
        self.install(after.id)?;
        let Some(former) = former else {
            return Ok(None);
        };
        if after.publish.spec.protocol == Protocol::Udp {
            return Ok(self.end_draining(former)); // a client that goes on sending would never leave the old backend
        }
        self.install_draining(former)?;
        Ok(self.bound_chain(former))
    }
}

const NO_PLACE: &str =
    "all places for publishes are taken by flows that end; try again in a moment";
