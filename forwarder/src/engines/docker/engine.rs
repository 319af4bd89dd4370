//! The engine's API, Docker's or podman's compatible one, of which only what is read is asked: containers, where they are,
//! what they publish, and what happens to them.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header,
};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{net::UnixStream, time::timeout};

use crate::{
    http::{self, Lines},
    publish::{
        ContainerPort,
        spec::{Ports, Protocol},
    },
};

/// What one event may be, in octets.
const LONGEST_EVENT: usize = 1 << 20;
/// How long it may take for a document.
const PATIENCE: Duration = Duration::from_secs(10);
/// All of containers and networks, as the API wants it: `{"type":["container","network"]}`.
const EVENTS: &str = "/events?filters=%7B%22type%22%3A%5B%22container%22%2C%22network%22%5D%7D";

/// The engine is there, but has no answer to one question.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoAnswer(String);

/// An engine behind its socket.
#[derive(Clone, Debug)]
pub struct Engine {
    socket: PathBuf,
}

impl Engine {
    /// The one that listens there.
    pub const fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    async fn get(&self, path: &str) -> Result<Response<Incoming>> {
        let shown = self.socket.display();
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.with_context(|| format!("connect to the engine at {shown}"))?;
        let request = Request::get(path)
            .header(header::HOST, "engine")
            .body(Full::<Bytes>::default())?;
        let response = http::send(stream, request).await;
        response.with_context(|| format!("ask the engine at {shown}"))
    }

    /// A document; `None` if there is no such thing.
    async fn document<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        let asked = async {
            let response = self.get(path).await?;
            let status = response.status();
            let text = response.into_body().collect().await?.to_bytes();
            anyhow::Ok((status, text))
        };
        let answer = timeout(PATIENCE, asked).await;
        let (status, text) =
            answer.map_err(|_| NoAnswer(format!("the engine does not answer to {path}")))??;
        if status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if !status.is_success() {
            return Err(NoAnswer(format!("the engine answers {status} to {path}")).into());
        }
        let value = serde_json::from_slice(&text);
        let value = value.map_err(|error| NoAnswer(format!("read {path}: {error}")))?;
        Ok(Some(value))
    }

    /// The ids of all containers that run.
    pub(super) async fn running(&self) -> Result<BTreeSet<String>> {
        let path = "/containers/json";
        let running: Vec<Running> = self.document(path).await?.unwrap_or_default();
        Ok(running.into_iter().map(|it| it.id).collect())
    }

    /// A container, by its id or its name.
    pub(super) async fn container(&self, named: &str) -> Result<Option<Container>> {
        let path = format!("/containers/{named}/json");
        let Some(mut container) = self.document::<Container>(&path).await? else {
            return Ok(None);
        };
        if let Some(networks) = &mut container.network_settings.networks
            && networks.len() > 1
        {
            for network in networks.values_mut() {
                let path = format!("/networks/{}", network.id);
                let about = self.document::<AboutNetwork>(&path).await?;
                network.internal = about.is_some_and(|it| it.internal);
            }
        }
        Ok(Some(container))
    }

    /// What an image is labelled with.
    pub(super) async fn labels_of_image(&self, image: &str) -> Result<Labels> {
        let image: Option<Image> = self.document(&format!("/images/{image}/json")).await?;
        let config = image.and_then(|image| image.config);
        Ok(config.and_then(|it| it.labels).unwrap_or_default())
    }

    /// What happens from now on.
    pub(super) async fn events(&self) -> Result<Events> {
        let answer = self.get(EVENTS).await?;
        Ok(Events(Lines::new(answer, LONGEST_EVENT)))
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Running {
    id: String,
}

pub(super) type Labels = HashMap<String, String>;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Labelled {
    labels: Option<Labels>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    config: Option<Labelled>,
}

/// A container as the engine describes it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Container {
    pub id: String,
    name: String,
    pub image: String,
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
    /// By port and protocol, such as `80/tcp`.
    ports: Option<BTreeMap<String, Option<Vec<Binding>>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AboutNetwork {
    internal: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Network {
    #[serde(rename = "NetworkID")]
    id: String,
    /// Nothing leads out of it.
    #[serde(skip)]
    internal: bool,
    #[serde(rename = "IPAddress")]
    v4: String,
    #[serde(rename = "GlobalIPv6Address")]
    v6: String,
    #[serde(rename = "Gateway")]
    gateway_v4: String,
    #[serde(rename = "IPv6Gateway")]
    gateway_v6: String,
    #[serde(rename = "GwPriority")]
    priority: i64,
}

/// Where on the host a container's port is.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Binding {
    host_ip: Option<String>,
    host_port: Option<String>,
}

impl Container {
    pub(super) fn name(&self) -> &str {
        self.name.trim_start_matches('/')
    }

    pub(super) const fn runs(&self) -> bool {
        self.state.running
    }

    pub(super) fn labels(&self) -> impl Iterator<Item = (&String, &String)> {
        self.config.labels.iter().flatten()
    }

    /// The first of each family, in the order in which the engine itself chooses the network that leads out: one that is not
    /// internal, with a higher priority, of both families, by its name (moby, `daemon/libnetwork/sandbox.go`).
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        let networks = self.network_settings.networks.iter().flatten();
        let mut networks: Vec<(&String, &Network)> = networks.collect();
        networks.sort_by_key(|(name, it)| {
            let gateways = [&it.gateway_v4, &it.gateway_v6];
            let gateways = gateways.iter().filter(|text| !text.is_empty()).count();
            (it.internal, Reverse((it.priority, gateways)), *name)
        });
        let first = |text: fn(&Network) -> &str| {
            let mut all = networks.iter().map(|(_, network)| text(network));
            all.find_map(|text| text.parse::<IpAddr>().ok())
        };
        let addresses = [first(|network| &network.v4), first(|network| &network.v6)];
        addresses.into_iter().flatten().collect()
    }

    /// The ports of the host that the engine holds for it, those in a row as one range.
    pub(super) fn ports(&self) -> Vec<ContainerPort> {
        let mut all = BTreeMap::new();
        let ports = self.network_settings.ports.iter().flatten();
        for (port, bindings) in ports {
            for binding in bindings.iter().flatten() {
                if let Some((protocol, address, from, to)) = binding.read(port) {
                    all.insert((protocol.number(), address, from), (protocol, to));
                }
            }
        }
        let mut ranges: Vec<ContainerPort> = Vec::new();
        for ((_, address, from), (protocol, to)) in all {
            match ranges.last_mut() {
                Some(last)
                    if (last.protocol, last.address) == (protocol, address)
                        && last.ports.last.checked_add(1) == Some(from)
                        && last.container_ports.last.checked_add(1) == Some(to) =>
                {
                    (last.ports.last, last.container_ports.last) = (from, to);
                }
                _ => ranges.push(ContainerPort {
                    address,
                    zone: None,
                    ports: Ports::one(from),
                    container_ports: Ports::one(to),
                    protocol,
                }),
            }
        }
        ranges
    }
}

impl Binding {
    /// With the container's port that it is for.
    fn read(&self, port: &str) -> Option<(Protocol, Option<IpAddr>, u16, u16)> {
        let (port, protocol) = port.split_once('/')?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => return None,
        };
        let address = match self.host_ip.as_deref().unwrap_or_default() {
            "" => None,
            text => Some(text.parse::<IpAddr>().ok()?.to_canonical()),
        };
        let from = self.host_port.as_deref()?.parse().ok()?;
        Some((protocol, address, from, port.parse().ok()?))
    }
}

/// What happens, one after another.
#[derive(Debug)]
pub(super) struct Events(Lines);

impl Events {
    /// Containers that may be somewhere else now, or gone, or may have another name.
    ///
    /// # Errors
    /// The engine has ended.
    pub(super) async fn next(&mut self) -> Result<Touched> {
        loop {
            let line = self.0.next().await.context("the engine's events")?;
            let line = line.context("the engine has ended")?;
            let event = serde_json::from_slice::<Event>(&line).ok();
            if let Some(touched) = event.and_then(Event::touched) {
                return Ok(touched);
            }
        }
    }
}

/// A container to be looked at.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Touched {
    pub id: String,
    /// Names that it has or had, as far as is said.
    pub names: Vec<String>,
}

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
    fn touched(self) -> Option<Touched> {
        let mut actor = self.actor;
        let names = ["name", "oldName"].map(|key| actor.attributes.remove(key));
        let id = match (self.r#type.as_str(), self.action.as_str()) {
            ("container", "start" | "die" | "died" | "destroy" | "remove" | "rename") => actor.id,
            ("network", "connect" | "disconnect") => {
                return Some(Touched {
                    id: actor.attributes.remove("container")?,
                    names: Vec::new(), // the network's
                });
            }
            _ => return None,
        };
        let names = names.into_iter().flatten();
        let names = names.map(|name| name.trim_start_matches('/').to_owned());
        Some(Touched {
            id,
            names: names.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn container(settings: Value) -> Container {
        let whole = json!({"Id": "1", "Name": "/web", "Image": "i", "State": {"Running": true}, "Config": {},
                           "NetworkSettings": settings});
        serde_json::from_value(whole).expect("a container")
    }

    #[test]
    fn ports_in_a_row_are_a_range() {
        let at = |host: &str, port: &str| json!([{"HostIp": host, "HostPort": port}]);
        let both =
            json!([{"HostIp": "0.0.0.0", "HostPort": "53"}, {"HostIp": "::", "HostPort": "53"}]);
        let container = container(json!({"Ports": {
            "80/tcp": at("0.0.0.0", "9999"), "81/tcp": at("0.0.0.0", "10000"), "82/tcp": at("0.0.0.0", "10001"),
            "84/tcp": at("0.0.0.0", "10002"), "85/udp": at("0.0.0.0", "10003"), "86/udp": at("127.0.0.1", "10004"),
            "65535/tcp": at("", "65535"), "90/tcp": Value::Null, "53/sctp": both,
        }}));
        let ports: Vec<String> = container.ports().iter().map(ToString::to_string).collect();
        let expected = [
            "65535:65535/tcp",
            "0.0.0.0:9999-10001:80-82/tcp",
            "0.0.0.0:10002:84/tcp",
            "0.0.0.0:10003:85/udp",
            "127.0.0.1:10004:86/udp",
            "0.0.0.0:53:53/sctp",
            "[::]:53:53/sctp",
        ];
        assert_eq!(ports, expected);
    }

    #[test]
    fn of_several_networks_the_one_that_leads_out_is_the_containers() {
        let network =
            |address: &str, gateway: &str| json!({"IPAddress": address, "Gateway": gateway});
        let mut dual = network("10.3.0.2", "10.3.0.1");
        dual["GlobalIPv6Address"] = "fd00::2".into();
        dual["IPv6Gateway"] = "fd00::1".into();
        let mut first = network("10.4.0.2", "10.4.0.1");
        first["GwPriority"] = 1.into();
        let mut networks =
            json!({"a": network("10.1.0.2", ""), "b": network("10.2.0.2", "10.2.0.1")});
        let addresses = |networks: &Value| {
            let addresses = container(json!({"Networks": networks})).addresses();
            let addresses = addresses.iter().map(ToString::to_string);
            addresses.collect::<Vec<_>>()
        };
        assert_eq!(addresses(&networks), ["10.2.0.2"]);
        networks["c"] = dual;
        assert_eq!(addresses(&networks), ["10.3.0.2", "fd00::2"]);
        networks["d"] = first;
        assert_eq!(addresses(&networks), ["10.4.0.2", "fd00::2"]);
    }

    #[test]
    fn events_that_change_nothing_are_passed_over() {
        let touched = |kind: &str, action: &str, attributes: Value| {
            let event = json!({"Type": kind, "Action": action, "Actor": {"ID": "1", "Attributes": attributes}});
            let event: Event = serde_json::from_value(event).expect("an event");
            event.touched().map(|it| (it.id, it.names.join(" ")))
        };
        let some = |id: &str, names: &str| Some((id.to_owned(), names.to_owned()));
        let named = json!({"name": "web"});
        assert_eq!(touched("container", "die", named.clone()), some("1", "web"));
        assert_eq!(touched("container", "pause", named.clone()), None);
        let renamed = json!({"name": "web", "oldName": "/old"});
        assert_eq!(
            touched("container", "rename", renamed),
            some("1", "web old")
        );
        let of = json!({"name": "bridge", "container": "2"});
        assert_eq!(touched("network", "connect", of), some("2", ""));
        assert_eq!(touched("network", "create", named), None);
    }
}
