//! What a request asks to be published, of which an engine says where the containers are.

use std::net::IpAddr;

use futures_util::future::BoxFuture;
use tokio::time::timeout;

use super::{PATIENCE, Shared, problem};
use crate::{
    control::api::{Asked, Problem},
    publish::{Container, Publish},
};

/// A container that runs.
#[derive(Clone, Debug)]
pub struct Located {
    pub name: String,
    pub addresses: Vec<IpAddr>,
}

/// Who knows where containers are.
pub trait Locate: Send + Sync + 'static {
    /// Finds one by its name or id, or says why not.
    fn locate(&self, name: &str) -> BoxFuture<'static, Result<Located, Problem>>;
}

impl Shared {
    /// Publishes that a request asks for.
    pub(super) async fn publishes(&self, asked: Vec<Asked>) -> Result<Vec<Publish>, Problem> {
        let bad = |error: String| problem(422, "Bad publish", &error);
        let mut publishes = Vec::new();
        let mut found: Option<(String, Located)> = None;
        for asked in asked {
            let Some(name) = &asked.container else {
                publishes.push(Publish::try_from(asked).map_err(bad)?);
                continue;
            };
            let port = asked.container_port().map_err(bad)?;
            let suits = asked.policy.suits(port.protocol);
            suits.map_err(|problem| bad(format!("{port}: {problem}")))?;
            let located = match found {
                Some((of, located)) if of == *name => located,
                _ => self.locate(name).await?,
            };
            let specs = port.towards(&located.addresses);
            let specs = specs.map_err(|error| bad(format!("container {name}: {error}")))?;
            publishes.extend(specs.into_iter().map(|spec| Publish {
                container: Some(Container {
                    name: located.name.clone(),
                    runs: true,
                }),
                ..Publish::new(spec, asked.policy.clone())
            }));
            found = Some((name.clone(), located));
        }
        Ok(publishes)
    }

    async fn locate(&self, name: &str) -> Result<Located, Problem> {
        // It becomes a part of a path.
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        if name.is_empty() || !name.bytes().all(is_plain) {
            let message = format!("{name:?} is no container's name");
            return Err(problem(422, "Bad publish", &message));
        }
        let Some(engine) = &self.engine else {
            let message = format!(
                "container {name}: the instance follows no engine; start it by `forwarder run --docker`"
            );
            return Err(problem(409, "No engine", &message));
        };
        let slow = || {
            problem(
                504,
                "No engine",
                "the engine does not answer; see that it runs",
            )
        };
        let located = timeout(PATIENCE, engine.locate(name)).await;
        located.map_err(|_| slow())?
    }
}
