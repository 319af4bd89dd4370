//! What takes no new flows: publishes that were taken back and drain, those that are cut off, and backends that were replaced. The
//! program finds their flows behind whoever has their port now.

use std::{collections::BTreeSet, sync::Arc};

use anyhow::{Context as _, Result};
use forwarder_common::limits;
use tracing::warn;

use super::{
    Daemon,
    install::write,
    reconcile::{Loose, stop},
    view::Row,
};
use crate::{
    control::{Named, api::Ending},
    plan,
    proxy::Proxy,
    publish::{
        Difference, Id, Wanted,
        state::{Drain, State},
    },
};

/// A publish that begins no flows any more, by its place; its own go on.
pub(super) struct Draining {
    pub row: Arc<Row>,
    pub previous: u32,
    /// It was taken back, and is shown for itself. A backend that was replaced is not.
    pub is_shown: bool,
    /// Of one that was taken back by this process.
    proxy: Option<Proxy>,
    /// Its flows were cut off. It stays until both ends have had time to hear of it.
    pub is_cut: bool,
}

impl Daemon {
    /// The place of what drains, or is cut off, on ports of this publish; 0 for none. Of several, the last has them.
    pub(super) fn drains_on(&self, wanted: &Wanted) -> u32 {
        let spec = &wanted.publish.spec;
        let over = self.draining.values();
        // A backend that was replaced drains for its own publish alone.
        let over = over.filter(|it| it.is_shown || it.is_cut || it.row.wanted.id == wanted.id);
        let closing = self.closing.iter().filter_map(|id| self.serving.get(id));
        let over = over.map(|it| (&it.row, it.previous));
        let over = over.chain(closing.map(|it| (&it.row, it.previous)));
        let over = over.filter(|(row, _)| row.wanted.publish.spec.overlaps(spec));
        let over: Vec<_> = over.collect();
        let is_last = |place: u32| over.iter().all(|(_, previous)| *previous != place);
        let last = over.iter().filter(|(row, _)| is_last(row.index));
        let last = last.max_by_key(|(row, _)| row.wanted.id);
        last.map_or(0, |(row, _)| row.index)
    }

    /// What drains by the fast path, and may go on doing so after a restart.
    pub(super) fn drains(&self) -> Vec<Drain> {
        if self.datapath.is_none() {
            return Vec::new();
        }
        let drains = self.draining.iter().filter(|(_, it)| !it.is_cut);
        let drains = drains.map(|(place, draining)| Drain {
            wanted: draining.row.wanted.clone(),
            place: *place,
            previous: draining.previous,
            is_shown: draining.is_shown,
        });
        drains.collect()
    }

    /// Writes down what drains, if that has changed.
    pub(super) fn record_drains(&mut self) {
        let is_written = |state: &State| state.drains(&self.drains());
        if self.state.as_ref().is_none_or(is_written) {
            return;
        }
        if let Err(error) = self.record(&Difference::default()) {
            warn!("{error:#}");
        }
    }

    /// Has what drained in an earlier instance go on with that, before anything else takes its place.
    pub(super) fn drain_again(&mut self, drains: Vec<Drain>) {
        let Some(datapath) = &self.datapath else {
            return;
        };
        let usage = datapath.maps.mapped_usage();
        // The others have drained, before that was written down.
        for drain in drains.into_iter().filter(|it| usage.flows(it.place) > 0) {
            let Ok(options) = self.options(&drain.wanted) else {
                continue; // what it needs has gone
            };
            if !self.slots.take_this(drain.place) {
                continue;
            }
            self.view.belongs(drain.place, drain.wanted.id);
            let row = Row {
                index: drain.place,
                allow: options.allow.into(),
                draining: true,
                ..Row::new(drain.wanted)
            };
            let draining = Draining {
                row: Arc::new(row),
                previous: drain.previous,
                is_shown: drain.is_shown,
                proxy: None,
                is_cut: false,
            };
            self.draining.insert(drain.place, draining);
        }
        let places: BTreeSet<u32> = self.draining.keys().copied().collect();
        for draining in self.draining.values_mut() {
            if !places.contains(&draining.previous) {
                draining.previous = 0;
            }
        }
        for place in places {
            if let Err(error) = self.install_draining(place) {
                warn!("what drained ends: {error:#}");
                let gone = self.end_draining(place);
                self.give_back(&gone.into_iter().collect::<Vec<_>>());
            }
        }
    }

    /// Has what was served at a place drain, with what drains on its port already; returns the place.
    pub(super) fn drain(&mut self, mut row: Arc<Row>, previous: u32, proxy: Option<Proxy>) -> u32 {
        let (is_shown, is_cut) = (proxy.is_some(), false);
        Arc::make_mut(&mut row).draining = true;
        let place = row.index;
        self.draining.insert(
            place,
            Draining {
                row,
                previous,
                is_shown,
                proxy,
                is_cut,
            },
        );
        place
    }

    /// A publish that was taken back and drains, and is not wanted again.
    pub(super) fn that_drains(&self, named: &Named) -> Option<&Wanted> {
        if self.find(named).is_ok() {
            return None;
        }
        let shown = self.draining.values().filter(|it| it.is_shown);
        let mut shown = shown.map(|it| &it.row.wanted);
        shown.find(|it| match named {
            Named::Id(id) => it.id == *id,
            Named::Spec(spec) => it.publish.spec == *spec,
        })
    }

    /// Cuts off what drains of these, also by backends that they had before.
    pub(super) fn cut_draining(&mut self, ids: &BTreeSet<Id>) -> Loose {
        let mut loose = Loose::default();
        for (place, draining) in &mut self.draining {
            let id = draining.row.wanted.id;
            if draining.is_cut || !ids.contains(&id) {
                continue;
            }
            draining.is_cut = true;
            if let Some(proxy) = &draining.proxy {
                proxy.cut();
            }
            if std::mem::take(&mut draining.is_shown) {
                if let Some(row) = self.view.row(id) {
                    self.view.tell("drained", row);
                }
                self.view.hide(id);
            }
            loose.cut.insert(*place);
        }
        self.record_drains();
        loose
    }

    /// The program follows so many that drain on one port: what is behind them has had its time.
    pub(super) fn bound_chain(&mut self, first: u32) -> Option<u32> {
        let mut place = first;
        for _ in 1..limits::DRAINING {
            place = self.draining.get(&place)?.previous;
        }
        let last = self.draining.get(&place)?.previous;
        self.draining
            .contains_key(&last)
            .then(|| self.end_draining(last))?
    }

    /// The same of one that drains.
    pub(super) fn install_draining(&mut self, place: u32) -> Result<()> {
        let Some(draining) = self.draining.get_mut(&place) else {
            return Ok(());
        };
        if let Some(datapath) = &mut self.datapath {
            let standing = plan::Standing {
                draining: true,
                previous: draining.previous,
                ..plan::Standing::default()
            };
            let network = &self.network.snapshot;
            let firewall = self.config.respect_firewall;
            let written = write(datapath, network, firewall, &mut draining.row, standing);
            let spec = &draining.row.wanted.publish.spec;
            written.with_context(|| format!("publish {spec}"))?;
        }
        if draining.is_shown {
            self.view.show(&draining.row);
        }
        Ok(())
    }

    /// Has a publish take no new flows. One that has none is taken from the kernel at once.
    pub(super) fn close(&mut self, id: Id) -> Result<()> {
        let Some(serving) = self.serving.get_mut(&id) else {
            return Ok(());
        };
        let usage = self.datapath.as_ref().map(|it| it.maps.mapped_usage());
        if usage.is_some_and(|usage| usage.flows(serving.row.index) > 0) {
            self.closing.insert(id);
            return self.install(id);
        }
        self.uninstall_publish(id)
    }

    /// The opposite.
    pub(super) fn open(&mut self, id: Id) -> Result<()> {
        self.closing.remove(&id);
        self.install(id)
    }

    /// Ends a publish that is closed, or has it drain; returns whose flows are to end.
    pub(super) async fn end(&mut self, id: Id, ending: Ending) -> Loose {
        let mut loose = Loose::default();
        let Some(mut serving) = self.serving.remove(&id) else {
            self.waiting.remove(&id);
            self.view.hide(id);
            return loose;
        };
        let mut proxy = serving.proxy.take();
        if let Some(proxy) = &mut proxy {
            proxy.stop(stop(ending)).await;
        }
        if ending == Ending::Drain {
            let place = self.drain(serving.row, serving.previous, proxy);
            if let Err(error) = self.install_draining(place) {
                warn!("{error:#}");
            }
            loose.gone.extend(self.bound_chain(place));
            return loose;
        }
        self.view.hide(id);
        // Backends that it had before go with it.
        let mut former = serving.previous;
        while let Some(draining) = self.draining.get(&former).filter(|it| !it.is_shown) {
            let previous = draining.previous;
            if !draining.is_cut {
                loose.gone.extend(self.end_draining(former));
            }
            former = previous;
        }
        if self.closing.remove(&id) {
            let place = self.drain(serving.row, serving.previous, None);
            if let Some(draining) = self.draining.get_mut(&place) {
                draining.is_cut = true;
            }
            loose.cut.insert(place);
        } else {
            loose.gone.insert(serving.row.index);
        }
        loose
    }

    /// Cuts off everything, before the instance stops. Returns whose flows are to end.
    pub(super) async fn end_all(&mut self) -> Loose {
        let mut loose = Loose::default();
        for place in self.draining.keys().copied().collect::<Vec<_>>() {
            loose.cut.insert(place);
        }
        for id in self.serving.keys().copied().collect::<Vec<_>>() {
            if let Err(error) = self.close(id) {
                warn!("{error:#}");
            }
            loose.add(self.end(id, Ending::Cut).await);
        }
        loose
    }

    /// Cuts off what drains in user space, before the instance stops.
    pub(super) fn cut_all_draining(&self) {
        let proxies = self.draining.values().filter_map(|it| it.proxy.as_ref());
        proxies.for_each(Proxy::cut);
    }

    /// Ends what drains at a place, which is returned if the kernel has it no more.
    pub(super) fn end_draining(&mut self, place: u32) -> Option<u32> {
        let gone = self.draining.remove(&place)?;
        if let Some(proxy) = &gone.proxy {
            proxy.cut();
        }
        if gone.is_shown {
            let id = gone.row.wanted.id;
            if let Some(row) = self.view.row(id) {
                self.view.tell("drained", row);
            }
            self.view.hide(id);
        }
        // Whoever led here leads to what is behind.
        let live = self
            .serving
            .iter_mut()
            .filter(|(_, it)| it.previous == place);
        let live: Vec<Id> = live
            .map(|(id, it)| {
                it.previous = gone.previous;
                *id
            })
            .collect();
        let others = self
            .draining
            .iter_mut()
            .filter(|(_, it)| it.previous == place);
        let others: Vec<u32> = others
            .map(|(other, it)| {
                it.previous = gone.previous;
                *other
            })
            .collect();
        let live = live.into_iter().try_for_each(|id| self.install(id));
        let others = others
            .into_iter()
            .try_for_each(|place| self.install_draining(place));
        let written = live.and(others);
        let gone = match &mut self.datapath {
            Some(datapath) => datapath.maps.uninstall(place),
            None => Ok(()),
        };
        match written.and(gone) {
            Ok(()) => Some(place),
            Err(error) => {
                warn!("{error:#}");
                None // its place is lost until the next start
            }
        }
    }
}
