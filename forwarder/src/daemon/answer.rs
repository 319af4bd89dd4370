//! What clients of the control socket ask for: a difference of the registry, put in force before they are answered.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::{Result, bail};
use tokio::sync::oneshot;
use tracing::warn;

use super::{Daemon, audit, reconcile::Loose};
use crate::{
    control::{
        Call, Change, Changed, Lease, Named,
        api::{AskedEndpoint, Ending, Listed, Problem},
    },
    proxy::BindError,
    publish::{Conflict, Id, Owner, Publish, Registry, bans::NotBanned},
};

impl Daemon {
    pub(super) async fn answer(&mut self, call: Call) {
        match call {
            Call::Change {
                owner,
                change,
                by,
                answer,
            } => {
                let what = audit::describe(&change);
                let name = owner.clone().unwrap_or_else(Owner::cli);
                let outcome = self.change(owner, change).await;
                let lease = outcome.as_ref().ok();
                let lease = lease.and_then(|(changed, _)| changed.lease.as_ref());
                let name = lease.map_or(&name, |lease| &lease.owner);
                audit::line(Some(by), name, &what, &outcome);
                match outcome {
                    Ok((changed, loose)) => self.answer_after(loose, answer, changed),
                    Err(error) => drop(answer.send(Err(explain(error)))),
                }
            }
            Call::Trace { answer } => {
                let trace = self.begin_trace();
                let _ = answer.send(
                    trace.map_err(|error| Problem::new(503, "No trace", &format!("{error:#}"))),
                );
            }
            Call::Reload { by, answer } => {
                let outcome = self.reload().await;
                audit::line(Some(by), &Owner::config(), "reload", &outcome);
                match outcome {
                    Ok((reloaded, loose)) => {
                        drop(tokio::spawn(self.end_flows_of(loose)));
                        let _ = answer.send(Ok(reloaded));
                    }
                    Err(error) => drop(answer.send(Err(explain(error)))),
                }
            }
        }
    }

    /// Answers when all who have to hear of it have heard, and does not wait for that itself.
    fn answer_after(
        &self,
        loose: Loose,
        answer: oneshot::Sender<Result<Changed, Problem>>,
        changed: Changed,
    ) {
        let is_silent = loose.is_silent();
        let ended = self.end_flows_of(loose);
        tokio::spawn(async move {
            // The client may have gone, and its lease with it.
            if is_silent {
                let _ = answer.send(Ok(changed));
                ended.await;
            } else {
                ended.await;
                let _ = answer.send(Ok(changed));
            }
        });
    }

    async fn change(&mut self, owner: Option<Owner>, change: Change) -> Result<(Changed, Loose)> {
        let owner = owner.unwrap_or_else(Owner::cli);
        let mut lease = None;
        let mut descriptors = Vec::new();
        let (difference, ending) = match change {
            Change::Add(publishes) => (self.registry.add(&owner, publishes)?, Ending::Cut),
            Change::Want(publishes) => (self.registry.want(&owner, publishes)?, Ending::Cut),
            Change::Lease(publishes, given) => {
                self.leases += 1;
                let owner = Owner::lease(self.leases);
                descriptors = given;
                lease = Some(Lease {
                    owner: owner.clone(),
                    ended: self.released.clone(),
                    files: self.idle.keep(Lease::DESCRIPTORS),
                });
                (self.registry.want(&owner, publishes)?, Ending::Cut)
            }
            Change::Ban { bans, all } => return Ok((Changed::default(), self.ban(bans, all)?)),
            Change::Unban(networks, publish, owner) => {
                self.unban(&networks, publish, owner.as_ref())?;
                return Ok(Default::default());
            }
            Change::Remove(named, ending) => return self.remove(&owner, &named, ending).await,
            Change::RemoveFrom {
                container,
                ports,
                ending,
            } => {
                let difference = self.registry.remove_from(&owner, &container, &ports)?;
                (difference, ending)
            }
            Change::RemoveAll(ending) => (self.registry.want(&owner, Vec::new())?, ending),
            Change::Follow { name, addresses } => {
                let loose = self.follow_container(&name, &addresses).await?;
                return Ok((Changed::default(), loose));
            }
            Change::Replace(id, backend) => {
                let publish = self.with_backend(id, &backend)?;
                (self.registry.replace(&owner, id, publish)?, Ending::Drain)
            }
        };
        let loose = self.reconcile(&difference, ending, descriptors).await?;
        let rows = difference.asked.iter().filter_map(|id| self.view.row(*id));
        let publishes: Vec<Listed> = rows.collect();
        Ok((Changed { publishes, lease }, loose))
    }

    /// Takes publishes back, all or none; what drains already is cut off, unless it is to drain.
    async fn remove(
        &mut self,
        owner: &Owner,
        named: &[Named],
        ending: Ending,
    ) -> Result<(Changed, Loose)> {
        let (mut ids, mut draining) = (BTreeSet::new(), BTreeSet::new());
        for named in named {
            match self.that_drains(named) {
                Some(wanted) => {
                    Registry::is_of(wanted, owner)?;
                    draining.insert(wanted.id);
                }
                None => drop(ids.insert(self.find(named)?)),
            }
        }
        let difference = self.registry.remove(owner, &ids)?;
        let mut loose = self.reconcile(&difference, ending, Vec::new()).await?;
        if ending != Ending::Drain {
            loose.add(self.cut_draining(&draining));
        }
        Ok((Changed::default(), loose))
    }

    pub(super) fn find(&self, named: &Named) -> Result<Id, Conflict> {
        match named {
            Named::Id(id) => self
                .registry
                .get(*id)
                .map(|wanted| wanted.id)
                .ok_or(Conflict::NoId(*id)),
            Named::Spec(spec) => self.registry.find(spec),
        }
    }

    /// A publish with another backend.
    fn with_backend(&self, id: Id, backend: &AskedEndpoint) -> Result<Publish> {
        let before = self.registry.get(id).ok_or(Conflict::NoId(id))?;
        let Some(address) = backend.address else {
            bail!("a backend needs an address");
        };
        let address = (address, backend.zone.clone());
        let spec = before
            .publish
            .spec
            .to_backend(address, backend.port, backend.end_port);
        let spec = spec.map_err(|problem| anyhow::anyhow!("publish {id}: {problem}"))?;
        Ok(Publish {
            spec,
            container: None, // whoever names an address has it stay there
            ..Publish::clone(&before.publish)
        })
    }

    /// Has what leads to a container follow it. One whose port somebody else has got meanwhile waits for it.
    async fn follow_container(&mut self, name: &str, addresses: &[IpAddr]) -> Result<Loose> {
        let difference = self.registry.follow(name, addresses);
        let loose = self.reconcile(&difference, Ending::Cut, Vec::new()).await?;
        self.retry().await;
        Ok(loose)
    }

    pub(super) async fn end_lease(&mut self, owner: &Owner) {
        let ended = match self.registry.want(owner, Vec::new()) {
            Ok(difference) => self.reconcile(&difference, Ending::Cut, Vec::new()).await,
            Err(error) => Err(error.into()),
        };
        audit::line(None, owner, "end of the lease", &ended);
        match ended {
            Ok(loose) => drop(tokio::spawn(self.end_flows_of(loose))),
            Err(error) => warn!("{owner}: {error:#}"),
        }
    }
}

/// An error as the API has it.
fn explain(error: anyhow::Error) -> Problem {
    let message = format!("{error:#}");
    if let Some(conflict) = error.downcast_ref::<Conflict>() {
        let (status, title) = match conflict {
            Conflict::Overlap { .. } | Conflict::Beside(..) => (409, "Overlap"),
            Conflict::NotYours { .. } => (403, "Another owner's"),
            Conflict::NoId(_)
            | Conflict::NoSpec(_)
            | Conflict::NoContainer(_)
            | Conflict::NoPort(..) => (404, "Not found"),
            Conflict::TooMany { .. } => (409, "Too many"),
        };
        return Problem::new(status, title, &message);
    }
    if let Some(refused) = error.downcast_ref::<BindError>() {
        return Problem {
            taken: refused.taken.clone(),
            ..Problem::new(409, "Port not to be had", &message)
        };
    }
    if error.downcast_ref::<NotBanned>().is_some() {
        return Problem::new(404, "Not found", &message);
    }
    Problem::new(422, "Not done", &message)
}
