//! Follows Docker, or podman by its compatible socket: what the label `forwarder.publish` of a running container asks for is
//! published in the name of `docker:ID`, wherever the container's address is now.
//!
//! Labels that an image brings are ignored: whoever runs a container decides what it publishes, not who made its image.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use futures_util::StreamExt as _;
use http_body_util::{BodyExt as _, BodyStream, Empty};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header,
};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot},
};
use tracing::{info, warn};

use crate::{
    control::{
        Call, Change, Peer,
        api::{Ending, Problem},
        server::Observe,
    },
    publish::{Owner, Policy, Publish, Spec},
};

/// Where engines listen.
pub const SOCKET: &str = "/var/run/docker.sock";
/// `[HOST_ADDR:]HOST_PORT[-END]:PORT[-END][/PROTOCOL]`, several with commas between.
const LABEL: &str = "forwarder.publish";
/// An engine that has gone is asked for again after this time.
const RETRY: Duration = Duration::from_secs(1);
/// What one event may be, in octets.
const LONGEST_EVENT: usize = 1 << 20;
/// All of containers and networks, as the API wants it: `{"type":["container","network"]}`.
const EVENTS: &str = "/events?filters=%7B%22type%22%3A%5B%22container%22%2C%22network%22%5D%7D";

/// Follows the engine for as long as the daemon takes calls.
pub async fn follow(socket: PathBuf, calls: mpsc::Sender<Call>, observed: Arc<dyn Observe>) {
    let mut watcher = Watcher {
        engine: Engine { socket },
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

/// The engine's API, of which only what is read is asked.
struct Engine {
    socket: PathBuf,
}

impl Engine {
    async fn get(&self, path: &str) -> Result<Response<Incoming>> {
        let shown = self.socket.display();
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.with_context(|| format!("connect to the engine at {shown}"))?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await?;
        tokio::spawn(connection);
        let request = Request::get(path)
            .header(header::HOST, "engine")
            .body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await;
        response.with_context(|| format!("ask the engine at {shown}"))
    }

    /// A document; `None` if there is no such thing.
    async fn document<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        let response = self.get(path).await?;
        match response.status() {
            StatusCode::NOT_FOUND => return Ok(None),
            status if !status.is_success() => bail!("the engine answers {status} to {path}"),
            _ => {}
        }
        let text = response.into_body().collect().await?.to_bytes();
        let value = serde_json::from_slice(&text);
        value.with_context(|| format!("read {path}")).map(Some)
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Running {
    id: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Labelled {
    labels: Option<HashMap<String, String>>,
}

impl Labelled {
    fn label(&self) -> Option<&str> {
        self.labels.as_ref()?.get(LABEL).map(String::as_str)
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    config: Option<Labelled>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Container {
    name: String,
    image: String,
    state: State,
    config: Labelled,
    network_settings: Networks,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct State {
    running: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Networks {
    networks: Option<BTreeMap<String, Network>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Network {
    #[serde(rename = "IPAddress")]
    v4: String,
    #[serde(rename = "GlobalIPv6Address")]
    v6: String,
}

impl Container {
    /// The first of each family, by the networks' names.
    fn addresses(&self) -> Vec<IpAddr> {
        let networks = self.network_settings.networks.iter().flatten();
        let networks: Vec<&Network> = networks.map(|(_, network)| network).collect();
        let first = |text: fn(&Network) -> &str| {
            let mut all = networks.iter().map(|network| text(network));
            all.find_map(|text| text.parse::<IpAddr>().ok())
        };
        let addresses = [first(|network| &network.v4), first(|network| &network.v6)];
        addresses.into_iter().flatten().collect()
    }
}

/// Something that has happened.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Event {
    r#type: String,
    action: String,
    actor: Actor,
}

#[derive(Debug, Deserialize)]
struct Actor {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Attributes", default)]
    attributes: HashMap<String, String>,
}

impl Event {
    /// The container whose address, or whose being there, may be another now.
    fn container(self) -> Option<String> {
        let mut actor = self.actor;
        match (self.r#type.as_str(), self.action.as_str()) {
            ("container", "start" | "die" | "died" | "destroy" | "remove") => Some(actor.id),
            ("network", "connect" | "disconnect") => actor.attributes.remove("container"),
            _ => None,
        }
    }
}

/// What a label asks for, of a container with these addresses: of every address of the host, in each family that the
/// container has, unless one is named.
fn publishes(label: &str, addresses: &[IpAddr]) -> Result<Vec<Spec>> {
    let mut specs = Vec::new();
    for text in label
        .split(',')
        .map(str::trim)
        .filter(|text| !text.is_empty())
    {
        let (host, port) = text.rsplit_once(':').with_context(|| {
            format!("{text:?}: expected [HOST_ADDR:]HOST_PORT[-END]:PORT[-END][/tcp|/udp|/sctp]")
        })?;
        let towards = |address: &IpAddr, host: &str| -> Result<Spec> {
            let address = match address {
                IpAddr::V4(v4) => v4.to_string(),
                IpAddr::V6(v6) => format!("[{v6}]"),
            };
            Ok(format!("{host}:{address}:{port}").parse()?)
        };
        let [first, others @ ..] = addresses else {
            bail!("it has no address of its own");
        };
        let named = towards(first, host)?;
        match (named.address, others) {
            (Some(address), _) => {
                let same = addresses
                    .iter()
                    .find(|it| it.is_ipv4() == address.is_ipv4());
                specs.push(towards(same.unwrap_or(first), host)?);
            }
            (None, []) => specs.push(named),
            (None, _) => {
                for address in addresses {
                    let every = if address.is_ipv4() { "0.0.0.0" } else { "[::]" };
                    specs.push(towards(address, &format!("{every}:{host}"))?);
                }
            }
        }
    }
    Ok(specs)
}

struct Watcher {
    engine: Engine,
    calls: mpsc::Sender<Call>,
    observed: Arc<dyn Observe>,
    /// Containers whose publishes could not be had; tried again when another one ends.
    refused: BTreeSet<String>,
}

impl Watcher {
    /// Brings everything to where the engine is, and follows it until it ends.
    async fn session(&mut self) -> Result<()> {
        // Before the list, so that nothing happens in between unseen.
        let events = self.engine.get(EVENTS).await?;
        let path = "/containers/json";
        let running: Vec<Running> = self.engine.document(path).await?.unwrap_or_default();
        info!("following {} containers", running.len());
        let mut all: BTreeSet<String> = running.into_iter().map(|it| it.id).collect();
        all.extend(self.published()?);
        // What has gone first: another may have its port.
        let mut there = Vec::new();
        for id in all {
            match self.inspect(&id).await? {
                Some(container) => there.push((id, container)),
                None => self.change(&id, Change::RemoveAll(Ending::Cut)).await?,
            }
        }
        for (id, container) in there {
            self.publish(&id, &container).await?;
        }
        let mut pieces = BodyStream::new(events.into_body());
        let mut text = Vec::new();
        while let Some(piece) = pieces.next().await {
            let piece = piece.context("the engine's events")?;
            text.extend_from_slice(piece.data_ref().map_or(&[][..], |data| &data[..]));
            while let Some(end) = text.iter().position(|octet| *octet == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                let event = serde_json::from_slice::<Event>(&line).ok();
                if let Some(id) = event.and_then(Event::container) {
                    self.refresh(&id).await?;
                }
            }
            if text.len() > LONGEST_EVENT {
                bail!("an event of the engine has no end");
            }
        }
        bail!("the engine has ended")
    }

    /// Containers that have publishes now, also from an earlier run.
    fn published(&self) -> Result<BTreeSet<String>> {
        let rows = self.observed.list(None);
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let ids = rows
            .iter()
            .filter_map(|row| row.owner.as_str().strip_prefix("docker:"));
        Ok(ids.map(Into::into).collect())
    }

    /// A container that runs.
    async fn inspect(&self, id: &str) -> Result<Option<Container>> {
        let path = format!("/containers/{id}/json");
        let container: Option<Container> = self.engine.document(&path).await?;
        Ok(container.filter(|it| it.state.running))
    }

    async fn refresh(&mut self, id: &str) -> Result<()> {
        if let Some(container) = self.inspect(id).await? {
            return self.publish(id, &container).await;
        }
        self.refused.remove(id);
        self.change(id, Change::RemoveAll(Ending::Cut)).await?;
        for other in std::mem::take(&mut self.refused) {
            if let Some(container) = self.inspect(&other).await? {
                self.publish(&other, &container).await?;
            }
        }
        Ok(())
    }

    /// Publishes what its label asks for, or says why not.
    async fn publish(&mut self, id: &str, container: &Container) -> Result<()> {
        let name = container.name.trim_start_matches('/');
        let label = self.label(container).await?;
        let wanted = match publishes(label.unwrap_or_default(), &container.addresses()) {
            Ok(wanted) => wanted,
            Err(error) => {
                warn!("container {name}: label {LABEL}: {error:#}");
                Vec::new()
            }
        };
        let wanted = wanted.into_iter().map(|spec| Publish {
            spec,
            policy: Policy::default(),
        });
        let change = Change::Want(wanted.collect());
        if let Err(problem) = self.call(id, change).await? {
            warn!("container {name}: {problem}");
            self.refused.insert(id.into());
        }
        Ok(())
    }

    /// The label, unless the image has brought it.
    async fn label<'a>(&self, container: &'a Container) -> Result<Option<&'a str>> {
        let Some(label) = container.config.label() else {
            return Ok(None);
        };
        let path = format!("/images/{}/json", container.image);
        let image: Option<Image> = self.engine.document(&path).await?;
        let of_image = image.and_then(|image| image.config).unwrap_or_default();
        Ok(Some(label).filter(|label| of_image.label() != Some(label)))
    }

    async fn change(&self, id: &str, change: Change) -> Result<()> {
        if let Err(problem) = self.call(id, change).await? {
            warn!("container {id}: {problem}");
        }
        Ok(())
    }

    /// Has the daemon change what a container's publishes are.
    async fn call(&self, id: &str, change: Change) -> Result<Result<(), Problem>> {
        let owner: Owner = format!("docker:{id}").parse()?;
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
        Ok(answered.await?.map(|_| ()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs(label: &str, addresses: &[&str]) -> Result<Vec<String>, String> {
        let parse = |text: &&str| text.parse().expect("an address");
        let addresses: Vec<IpAddr> = addresses.iter().map(parse).collect();
        let specs = publishes(label, &addresses).map_err(|error| format!("{error:#}"))?;
        Ok(specs.iter().map(Spec::to_string).collect())
    }

    #[test]
    fn a_label_is_published_to_the_containers_addresses() {
        let (v4, v6) = ("172.17.0.2", "fd00::2");
        for (label, addresses, expected) in [
            ("8080:80", &[v4][..], &["8080:172.17.0.2:80/tcp"][..]),
            (
                "8080:80, 53:53/udp",
                &[v4, v6],
                &[
                    "0.0.0.0:8080:172.17.0.2:80/tcp",
                    "[::]:8080:[fd00::2]:80/tcp",
                    "0.0.0.0:53:172.17.0.2:53/udp",
                    "[::]:53:[fd00::2]:53/udp",
                ],
            ),
            (
                "127.0.0.1:1-9:11-19",
                &[v4],
                &["127.0.0.1:1-9:172.17.0.2:11-19/tcp"],
            ),
            ("[::1]:80:80", &[v4, v6], &["[::1]:80:[fd00::2]:80/tcp"]),
            ("[::1]:80:80", &[v4], &["[::1]:80:172.17.0.2:80/tcp"]),
            ("", &[], &[]),
        ] {
            assert_eq!(specs(label, addresses).expect(label), expected, "{label}");
        }
        for (label, addresses, part) in [
            ("80", &[v4][..], "HOST_PORT"),
            ("80:80/icmp", &[v4], "icmp"),
            ("80:80", &[], "no address"),
        ] {
            let error = specs(label, addresses).expect_err(label);
            assert!(error.contains(part), "{error}");
        }
    }
}
