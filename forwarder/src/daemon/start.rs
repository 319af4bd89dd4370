//! The start: what an earlier process has left is taken over, and what flags and file ask for takes the place of what they had
//! asked for before.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Duration,
};

use anyhow::Result;
use forwarder_common::limits;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tracing::{info, warn};

use super::{Daemon, fragments::Datagram, reconcile::Loose, remove_left, say, store_name};
use crate::{
    cli::tables,
    control::{Call, api::Ending},
    instance::Instance,
    proxy::{Left, Sockets, await_free, bound, is_wide},
    publish::{
        Difference, Id, Owner, Publish, Spec, Wanted,
        state::{State, Stored},
    },
};

/// Who held leases with an earlier instance asks for them within this time.
const LEASES: Duration = Duration::from_secs(2);

impl Daemon {
    /// Publishes what flags and file ask for and what an earlier instance was asked for, and takes over its flows.
    pub(super) async fn begin(
        &mut self,
        instance: &Instance,
        left: Left,
        calls: &mut mpsc::Receiver<Call>,
    ) -> Result<mpsc::Receiver<Datagram>> {
        self.network.read().await?;
        let datagrams = self.listen()?;
        let (state, stored) = match self.config.ephemeral {
            true => (None, Stored::default()),
            false => {
                let (state, stored) = State::open(instance.state())?;
                (Some(state), stored)
            }
        };
        if state.is_some() {
            self.begin_bans(&instance.state())?;
        }
        self.registry = stored.registry(limits::PUBLISHES as usize - 1)?;
        self.places = stored.places();
        let before = stored.configured();
        let leased = stored.leases();
        let drains = stored.draining();
        drop(stored);
        // What has another number now, or none, is kept by that.
        let known: HashSet<String> = self.registry.iter().map(|it| store_name(it.id)).collect();
        self.idle.retain(|name| known.contains(name));
        self.left = left.sockets;
        if let Some(conversations) = left.conversations {
            match self.idle.expect(conversations) {
                Ok(count) => info!("{count} conversations in user space go on"),
                Err(error) => warn!("conversations of the earlier instance end: {error}"),
            }
        }
        let backends = drains.iter().map(|it| it.wanted.publish.spec.backend);
        self.ask_for_routes(backends).await;
        self.drain_again(drains);
        let (asked, restored) = self.restore(&before)?;
        self.give_up_sockets(&leased);
        // Flows of what is wanted no more are not adopted below.
        let Loose { gone, .. } = self.reconcile(&asked, Ending::Cut, Vec::new()).await?;
        self.serves = true;
        self.give_back(&gone.into_iter().collect::<Vec<_>>());
        self.serve_or_wait(restored).await;
        self.state = state;
        self.record(&Difference::default())?;
        for wanted in self.registry.iter() {
            if let Some(row) = self.view.row(wanted.id) {
                say(&tables::published(&row));
            }
        }
        self.await_leases(&leased, calls).await;
        // An earlier instance's programs know its publishes until these take over.
        match &self.datapath {
            Some(datapath) => datapath.take_over(),
            None => remove_left(instance),
        }
        self.reconcile_devices()?;
        if let Some(datapath) = &mut self.datapath {
            datapath.forget_others();
        }
        self.adopt();
        self.places = HashMap::new();
        self.idle.expect_no_more();
        self.left = Sockets::default();
        let serving: HashSet<String> = self.serving.keys().map(|id| store_name(*id)).collect();
        self.idle.retain(|name| serving.contains(name));
        Ok(datagrams)
    }

    /// Closes what the earlier process held for what is published no more, or is held in another way now: it would be in the way.
    fn give_up_sockets(&mut self, leased: &[Spec]) {
        let publishes = self.registry.iter().map(|it| &it.publish);
        let held = publishes.filter(|it| it.holder.is_forwarder());
        let specs = held.map(|it| &it.spec).chain(leased);
        let is_steered = |spec| self.datapath.is_some() && is_wide(spec);
        let needed: HashSet<_> = specs
            .flat_map(|spec| bound(spec, is_steered(spec)))
            .collect();
        let closed = self.left.bound().filter(|it| !needed.contains(it));
        let closed: Vec<_> = closed.copied().collect();
        let names = self.left.retain(|it| needed.contains(it));
        self.idle.forget(&names);
        tokio::task::block_in_place(|| {
            self.idle.settle();
            await_free(&closed);
        });
    }

    /// Gives those a moment who held leases with an earlier instance: until these programs take over, its own go on with
    /// their flows.
    async fn await_leases(&mut self, leased: &[Spec], calls: &mut mpsc::Receiver<Call>) {
        let deadline = Instant::now() + LEASES;
        while leased.iter().any(|spec| self.registry.find(spec).is_err()) {
            match timeout_at(deadline, calls.recv()).await {
                Ok(Some(call)) => self.answer(call).await,
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// All that is wanted at the start, and not served yet: by flags and file, and by commands of before. Of these, the
    /// registry has those that flags and file asked for `before`.
    fn restore(&mut self, before: &BTreeSet<Id>) -> Result<(Difference, Vec<Wanted>)> {
        let configured = before;
        let flags = self.config.publishes.clone();
        let file = self.config.configured.clone();
        let asked = flags.iter().chain(&file).map(|it| it.spec.frontend());
        let asked: HashSet<_> = asked.collect();
        let is_asked = |wanted: &Wanted| asked.contains(&wanted.publish.spec.frontend());
        let cli = Owner::cli();
        // What another file or flag has asked for before gives way first.
        for owner in [&cli, &Owner::config()] {
            let gone = self
                .registry
                .of(owner)
                .filter(|it| configured.contains(&it.id));
            let gone: BTreeSet<Id> = gone.filter(|it| !is_asked(it)).map(|it| it.id).collect();
            let difference = self.registry.remove(owner, &gone)?;
            self.registry.apply(&difference);
        }
        self.give_way();
        let overlaps = |wanted: &&Wanted| {
            let spec = &wanted.publish.spec;
            flags.iter().any(|publish| publish.spec.overlaps(spec))
        };
        let before = self.registry.of(&cli);
        let before = before.filter(|it| !configured.contains(&it.id) && !overlaps(it));
        let before: Vec<Publish> = before.map(|it| Publish::clone(&it.publish)).collect();
        let all = flags.iter().cloned().chain(before).collect();
        for (owner, all) in [(Owner::config(), file.clone()), (cli, all)] {
            let difference = self.registry.want(&owner, all)?;
            self.registry.apply(&difference);
        }
        let all = self.registry.iter().cloned();
        let (add, restored): (Vec<Wanted>, _) = all.partition(is_asked);
        let asked = Difference {
            asked: add.iter().map(|wanted| wanted.id).collect(),
            add,
            ..Difference::default()
        };
        Ok((asked, restored))
    }

    /// What was published before gives way to what flags and file ask for in another owner's name: nobody could take it back
    /// while nothing runs.
    fn give_way(&mut self) {
        let asked = [
            (Owner::cli(), &self.config.publishes),
            (Owner::config(), &self.config.configured),
        ];
        for (owner, publishes) in asked {
            let gone = self.registry.in_the_way(&owner, publishes);
            for Wanted { publish, owner, .. } in &gone {
                warn!(
                    "publish {} of owner {owner} gives way to flags and file",
                    publish.spec
                );
            }
            self.registry.apply(&Difference {
                remove: gone,
                ..Difference::default()
            });
        }
    }
}
