//! Follows Docker, or podman by its compatible socket. The ports that the engine holds for a running container get the fast
//! path, and what the container's labels ask for is published, both in the name of `docker:ID`; what others have published to
//! a container follows it by its name.

pub mod engine;
mod labels;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use futures_util::future::BoxFuture;
use tokio::sync::{broadcast::error::RecvError, mpsc, oneshot};
use tracing::{info, warn};

use self::{
    engine::{Container, Engine, NoAnswer, Touched},
    labels::Asked,
};
use crate::{
    control::{
        Call, Change, Changed, Peer,
        api::{Ending, Problem},
        server::{Locate, Located, Observe},
    },
    publish::{self, ContainerPort, Holder, Owner, Publish, Spec},
};

/// Where engines listen.
pub const SOCKET: &str = "/var/run/docker.sock";
/// An engine that has gone is asked for again after this time.
const RETRY: Duration = Duration::from_secs(1);

/// Follows the engine for as long as the daemon takes calls.
pub async fn follow(
    engine: Engine,
    reads_labels: bool,
    calls: mpsc::Sender<Call>,
    observed: Arc<dyn Observe>,
) {
    let mut watcher = Watcher {
        engine,
        reads_labels,
        calls,
        observed,
        refused: BTreeSet::new(),
    };
    let mut was_there = true;
    while !watcher.calls.is_closed() {
        let ended = watcher.session().await;
        if was_there && let Err(error) = &ended {
            warn!("{error:#}; its containers stay as they are until it is there again");
        }
        was_there = ended.is_ok();
        tokio::time::sleep(RETRY).await;
    }
}

impl Locate for Engine {
    fn locate(&self, name: &str) -> BoxFuture<'static, Result<Located, Problem>> {
        let (engine, name) = (self.clone(), name.to_owned());
        Box::pin(async move {
            let found = engine.container(&name).await;
            let found = found.map_err(|error| {
                let message =
                    format!("{error:#}; see that it runs, or name its socket by --docker");
                Problem::new(503, "No engine", &message)
            })?;
            let Some(container) = found else {
                let message = format!("no container {name}; `docker ps` shows those that run");
                return Err(Problem::new(404, "No such container", &message));
            };
            if !container.runs() {
                let message = format!("container {name} is not running; start it first");
                return Err(Problem::new(409, "Not running", &message));
            }
            Ok(Located {
                name: container.name().into(),
                addresses: container.addresses(),
            })
        })
    }
}

/// What is published of a container: the ports that the engine holds, in the families in which it has an address, and what its
/// labels ask for besides.
fn publishes(container: &Container, asked: &Asked) -> Result<Vec<Publish>, String> {
    let addresses = container.addresses();
    let is_reached = |port: &ContainerPort| {
        let address = port.address;
        let mut same = addresses
            .iter()
            .filter(|it| address.is_none_or(|address| address.is_ipv4() == it.is_ipv4()));
        same.next().is_some()
    };
    let towards = |ports: Vec<ContainerPort>| -> Result<Vec<Spec>, String> {
        let specs = ports.iter().map(|port| {
            let specs = port.towards(&addresses);
            specs.map_err(|error| format!("{port}: {error}"))
        });
        Ok(specs.collect::<Result<Vec<_>, _>>()?.concat())
    };
    let mut held = container.ports();
    held.retain(is_reached);
    let held = towards(held)?;
    let mut own = towards(asked.ports.clone())?;
    own.retain(|spec| !held.iter().any(|held| held.overlaps(spec)));
    for spec in held.iter().chain(&own) {
        let suits = asked.policy.suits(spec.protocol);
        suits.map_err(|problem| format!("{spec}: {problem}"))?;
    }
    let publish = |spec, holder| Publish {
        spec,
        policy: asked.policy.clone(),
        holder,
        container: Some(publish::Container {
            name: container.name().into(),
            runs: true,
        }),
    };
    let held = held.into_iter().map(|spec| publish(spec, Holder::Engine));
    let own = own.into_iter().map(|spec| publish(spec, Holder::Forwarder));
    Ok(held.chain(own).collect())
}

struct Watcher {
    engine: Engine,
    reads_labels: bool,
    calls: mpsc::Sender<Call>,
    observed: Arc<dyn Observe>,
    /// Containers some of whose publishes could not be had; tried again when another one ends.
    refused: BTreeSet<String>,
}

/// Says of which container the engine has no answer.
fn unknown(container: &str, error: &anyhow::Error) {
    warn!("container {container}: {error}; it stays as it is until the engine tells of it again");
}

/// What the engine says of a container.
enum Found {
    Running(Container),
    Gone,
    Unknown,
}

impl Watcher {
    /// Brings everything to where the engine is, and follows it until it ends.
    async fn session(&mut self) -> Result<()> {
        // Before the lists, so that nothing happens in between unseen.
        let mut events = self.engine.events().await?;
        let mut changes = self.observed.events();
        let mut all = self.engine.running().await?;
        info!("following {} containers", all.len());
        all.extend(self.published());
        // What has gone first: another may have its port.
        let mut there = Vec::new();
        for id in all {
            match self.inspect(&id).await? {
                Found::Running(container) => there.push(container),
                Found::Gone => self.forget(&id).await?,
                Found::Unknown => {}
            }
        }
        for container in there {
            self.publish(&container).await?;
        }
        self.move_all().await?;
        loop {
            tokio::select! {
                touched = events.next() => self.refresh(touched?).await?,
                change = changes.recv() => match change {
                    // It may have moved since the address was asked for.
                    Ok(change) if change.event == "published" && !change.publish.owner.is_container() => {
                        self.move_publishes(change.publish.container.into_iter().collect()).await?;
                    }
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => self.move_all().await?,
                    Err(RecvError::Closed) => bail!("the instance is ending"),
                },
            }
        }
    }

    /// Containers that have publishes of their own now, also from an earlier run.
    fn published(&self) -> BTreeSet<String> {
        let all = self.observed.containers();
        let ids = all
            .iter()
            .filter_map(|(owner, _)| owner.as_str().strip_prefix("docker:"));
        ids.map(Into::into).collect()
    }

    /// A container of this id or name. One of which the engine has no answer keeps no other from being followed.
    async fn inspect(&self, named: &str) -> Result<Found> {
        match self.engine.container(named).await {
            Ok(Some(container)) if container.runs() => Ok(Found::Running(container)),
            Ok(_) => Ok(Found::Gone),
            Err(error) if error.is::<NoAnswer>() => {
                unknown(named, &error);
                Ok(Found::Unknown)
            }
            Err(error) => Err(error),
        }
    }

    async fn refresh(&mut self, touched: Touched) -> Result<()> {
        let Touched { id, mut names } = touched;
        match self.inspect(&id).await? {
            Found::Running(container) => {
                names.push(container.name().into());
                self.publish(&container).await?;
            }
            Found::Gone => {
                self.forget(&id).await?;
                for other in self.refused.clone() {
                    match self.inspect(&other).await? {
                        Found::Running(container) => self.publish(&container).await?,
                        Found::Gone => drop(self.refused.remove(&other)),
                        Found::Unknown => {} // to be tried again
                    }
                }
            }
            Found::Unknown => {}
        }
        self.move_publishes(names).await
    }

    /// Takes back what a container has published that is no more, or does not run.
    async fn forget(&mut self, id: &str) -> Result<()> {
        self.refused.remove(id);
        let owner = Owner::container(id)?;
        let change = Change::RemoveAll(Ending::Cut);
        if let Err(problem) = self.call(owner, change).await? {
            warn!("container {id}: {problem}");
        }
        Ok(())
    }

    /// Publishes what it asks for, or says why not.
    async fn publish(&mut self, container: &Container) -> Result<()> {
        let name = container.name();
        let asked = match self.asked(container).await {
            Err(error) if error.is::<NoAnswer>() => {
                unknown(name, &error);
                return Ok(());
            }
            asked => asked?,
        };
        let wanted = asked.and_then(|asked| publishes(container, &asked));
        let wanted = wanted.unwrap_or_else(|error| {
            warn!("container {name}: {error}; nothing of it is published");
            Vec::new()
        });
        let owner = Owner::container(&container.id)?;
        let count = wanted.len();
        match self.call(owner, Change::Want(wanted)).await? {
            Ok(changed) if changed.publishes.len() == count => {
                self.refused.remove(&container.id);
                return Ok(());
            }
            // Others have some of the ports, as Docker's proxy has for the same container.
            Ok(_) => {}
            Err(problem) => warn!("container {name}: {problem}"),
        }
        self.refused.insert(container.id.clone());
        Ok(())
    }

    async fn asked(&self, container: &Container) -> Result<Result<Asked, String>> {
        let mut labels = container.labels();
        let is_asked = labels.any(|(name, _)| name.starts_with(labels::PREFIX));
        if !self.reads_labels || !is_asked {
            return Ok(Ok(Asked::default()));
        }
        let of_image = self.engine.labels_of_image(&container.image).await?;
        Ok(labels::read(container.labels(), &of_image))
    }

    /// Has what others have published to any container follow it.
    async fn move_all(&self) -> Result<()> {
        let all = self.observed.containers().into_iter();
        let names = all.filter(|(owner, _)| !owner.is_container());
        let names: BTreeSet<String> = names.filter_map(|(_, name)| name).collect();
        self.move_publishes(names.into_iter().collect()).await
    }

    /// The same of containers of these names. One by that name that has gone may have a successor.
    async fn move_publishes(&self, names: Vec<String>) -> Result<()> {
        let followed = self.observed.containers();
        for name in names {
            let follows = |(owner, to): &(Owner, Option<String>)| {
                !owner.is_container() && to.as_ref() == Some(&name)
            };
            if !followed.iter().any(follows) {
                continue;
            }
            let addresses = match self.inspect(&name).await? {
                // An id may begin with what is a name.
                Found::Running(container) if container.name() == name => container.addresses(),
                Found::Unknown => continue,
                _ => Vec::new(),
            };
            let change = Change::Follow {
                name: name.clone(),
                addresses,
            };
            if let Err(problem) = self.call(Owner::cli(), change).await? {
                warn!("container {name}: {problem}");
            }
        }
        Ok(())
    }

    /// Has the daemon change what an owner's publishes are.
    async fn call(&self, owner: Owner, change: Change) -> Result<Result<Changed, Problem>> {
        let (answer, answered) = oneshot::channel();
        let by = Peer {
            uid: nix::unistd::geteuid().as_raw(),
            pid: nix::unistd::getpid().as_raw(),
        };
        let call = Call::Change {
            owner: Some(owner),
            change,
            by,
            answer,
        };
        let sent = self.calls.send(call).await;
        sent.ok().context("the instance is ending")?;
        Ok(answered.await?)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::publish::{Policy, ProxyProtocol};

    #[test]
    fn labels_that_a_port_cannot_have_are_said() {
        let of = |ports: &str, proxy_protocol| {
            let whole = json!({"Id": "1", "Name": "/web", "Image": "i", "State": {"Running": true}, "Config": {},
                               "NetworkSettings": {"Networks": {"a": {"IPAddress": "10.1.0.2"}}}});
            let container: Container = serde_json::from_value(whole).expect("a container");
            let asked = Asked {
                ports: ports.split(',').map(|it| it.parse().expect(it)).collect(),
                policy: Policy {
                    proxy_protocol: Some(proxy_protocol),
                    ..Policy::default()
                },
            };
            publishes(&container, &asked).map(|all| all.len())
        };
        assert_eq!(of("8080:80,53:53/udp", ProxyProtocol::V2), Ok(2));
        assert_eq!(of("8080:80", ProxyProtocol::V1), Ok(1));
        for (ports, version) in [
            ("8080:80,53:53/udp", ProxyProtocol::V1),
            ("53:53/sctp", ProxyProtocol::V2),
        ] {
            let error = of(ports, version).expect_err(ports);
            assert!(error.starts_with("53:10.1.0.2:53/"), "{error}");
            assert!(error.contains("PROXY protocol"), "{error}");
        }
    }
}
