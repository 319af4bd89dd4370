//! The server of the control socket. Changes go to the daemon one at a time; what only reads is answered here, beside
//! it, from what the daemon shows by [`Observe`].

mod bans;
mod containers;
#[cfg(test)]
mod description;
mod document;
mod place;
mod request;
mod socket;

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use axum::{
    Extension, Router,
    extract::{self, FromRef, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use futures_util::{StreamExt as _, stream};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Semaphore, broadcast, mpsc, oneshot},
};
use tracing::info;

pub use self::{
    containers::{Locate, Located},
    socket::Socket,
};
use self::{
    document::{lines, received},
    place::{FOLLOWERS, Patient, Place},
    request::{Named as Part, Nothing, Query, Whose},
};
use super::{
    Call, Change, Changed, Lease, Named, Peer, Trace,
    api::{
        Asked, AskedEndpoint, Ban, Counter, Ending, Event, Followed, Listed, ListedFlow,
        NamedPublish, Problem, Reloaded, Running, Traced, Unpublish,
    },
    stream::{Received, Stream},
};
use crate::{
    metrics::{self, Form, Measured},
    publish::{Conflict, ContainerPort, Id, Owner, allow},
};

/// How long a client may take for its request, or read nothing of its answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// Of a client: its stream, and what is watched beside it.
pub(super) const DESCRIPTORS: u64 = 2;
/// A long document, one piece after another.
pub type Rows<T> = Box<dyn Iterator<Item = Result<T>> + Send>;

/// What the daemon shows of itself at any time, also while it is busy.
pub trait Observe: Send + Sync + 'static {
    fn instance(&self) -> Running;
    /// All publishes, or one.
    fn list(&self, id: Option<Id>) -> Rows<Listed>;
    /// Of each publish, who wants it and which container it leads to.
    fn containers(&self) -> Vec<(Owner, Option<String>)>;
    /// Live flows of both paths, of one publish or of clients in a network if so asked.
    fn flows(&self, of: &FlowFilter) -> Rows<ListedFlow>;
    /// Ends such flows; how many there were.
    ///
    /// # Errors
    /// The kernel refuses.
    fn end_flows(&self, of: &FlowFilter) -> Result<u64>;
    /// # Errors
    /// The kernel refuses the read.
    fn stats(&self) -> Result<Vec<Counter>>;
    /// What the metrics say now.
    ///
    /// # Errors
    /// The kernel refuses a read.
    fn measure(&self) -> Result<Measured>;
    fn events(&self) -> broadcast::Receiver<Event>;
    fn bans(&self) -> Rows<Ban>;
}

/// Which flows are meant.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowFilter {
    pub publish: Option<Id>,
    #[serde(default, deserialize_with = "allow::source_of")]
    pub client: Option<IpNet>,
}

/// Serves one client until it has closed both ways: one that says no more may still read.
#[expect(
    unsafe_code,
    reason = "the runtime watches a descriptor beside its stream"
)]
async fn client(stream: tokio::net::UnixStream, router: Router, place: Place) -> Result<()> {
    let credentials = stream.peer_cred()?;
    let peer = Peer {
        uid: credentials.uid(),
        pid: credentials.pid().unwrap_or_default(),
    };
    let watched: OwnedFd = stream.as_fd().try_clone_to_owned()?;
    // SAFETY: the descriptor is open until `watched` is dropped, and always the same.
    let watched = unsafe { AsyncFd::register_with_interest(watched, Interest::PRIORITY)? };
    let stream = Stream::new(stream, Vec::new());
    let router = router
        .layer(Extension(peer))
        .layer(Extension(stream.received.clone()))
        .layer(Extension(place.clone()));
    let stream = Patient::new(stream, place);
    let serving = hyper::server::conn::http1::Builder::new()
        .half_close(true)
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(request::SHORT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::select! {
        served = serving => served?,
        _ = watched.ready(Interest::PRIORITY) => {}
    }
    Ok(())
}

#[derive(Clone)]
struct Shared {
    calls: mpsc::Sender<Call>,
    observed: Arc<dyn Observe>,
    engine: Option<Arc<dyn Locate>>,
    /// Octets of long requests that may be read now.
    room: Arc<Semaphore>,
    followers: Arc<Semaphore>,
}

impl FromRef<Shared> for Arc<dyn Observe> {
    fn from_ref(shared: &Shared) -> Self {
        shared.observed.clone()
    }
}

fn router(
    calls: mpsc::Sender<Call>,
    observed: Arc<dyn Observe>,
    engine: Option<Arc<dyn Locate>>,
) -> Router {
    let shared = Shared {
        calls,
        observed,
        engine,
        room: Arc::new(Semaphore::new(request::ROOM)),
        followers: Arc::new(Semaphore::new(FOLLOWERS)),
    };
    Router::new()
        .route("/v1/instance", get(about))
        .route("/v1/publishes", get(list).post(add))
        .route("/v1/publishes/{id}", get(one).delete(remove))
        .route("/v1/publishes/{id}/backends", put(replace))
        .route("/v1/unpublish", post(unpublish))
        .route("/v1/owners/{*owner}", put(want).delete(remove_all))
        .route("/v1/leases", post(lease))
        .route("/v1/flows", get(flows).delete(end_flows))
        .route(
            "/v1/bans",
            get(bans::bans)
                .post(bans::ban)
                .put(bans::set_bans)
                .delete(bans::unban_all),
        )
        .route(
            "/v1/bans/{*network}",
            get(bans::one).put(bans::ban_one).delete(bans::unban_one),
        )
        .route("/v1/unban", post(bans::unban))
        .route("/v1/stats", get(stats))
        .route("/v1/events", get(events))
        .route("/v1/trace", get(trace))
        .route("/v1/reload", post(reload))
        .route("/v1/openapi.json", get(description))
        .route("/metrics", get(metrics))
        .route_layer(middleware::from_fn_with_state(
            shared.clone(),
            request::bodiless,
        ))
        .fallback(async |request: Request| {
            let path = request.uri().path();
            let message = format!("{path}: no such call; GET /v1/openapi.json has them all");
            problem(404, "Not found", &message)
        })
        .method_not_allowed_fallback(async |request: Request| {
            let (method, path) = (request.method(), request.uri().path());
            let message = format!(
                "{path} takes no {method}; GET /v1/openapi.json has the methods of each call"
            );
            problem(405, "Method not allowed", &message)
        })
        .with_state(shared)
}

pub(super) fn problem(status: u16, title: &str, message: &str) -> Problem {
    Problem::new(status, title, message)
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status);
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let text = serde_json::to_string(&self).unwrap_or_default();
        let kind = HeaderValue::from_static("application/problem+json");
        (status, [(header::CONTENT_TYPE, kind)], text).into_response()
    }
}

impl From<anyhow::Error> for Problem {
    fn from(error: anyhow::Error) -> Self {
        Self::new(500, "Failed", &format!("{error:#}"))
    }
}

/// How publishes are taken back, and in whose name; `cli` if it is left out.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    owner: Option<Owner>,
    ending: Option<Ending>,
}

/// How publishes of an owner are taken back.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct How {
    ending: Option<Ending>,
}

/// The flows of a number that is no publish's are not none, but a mistake.
fn no_publish(id: Id) -> Problem {
    problem(404, "Not found", &Conflict::NoId(id).to_string())
}

impl Shared {
    async fn row(&self, id: Id) -> Result<Listed, Problem> {
        let observed = self.observed.clone();
        let found = tokio::task::spawn_blocking(move || observed.list(Some(id)).next());
        let found = found.await.ok().flatten();
        Ok(found.ok_or_else(|| no_publish(id))??)
    }

    /// Whether there is the publish whose flows are meant.
    async fn knows(&self, of: &FlowFilter) -> Result<(), Problem> {
        match of.publish {
            Some(id) => self.row(id).await.map(|_| ()),
            None => Ok(()),
        }
    }

    async fn change(
        &self,
        owner: Option<Owner>,
        by: Peer,
        change: Change,
    ) -> Result<Changed, Problem> {
        let (answer, answered) = oneshot::channel();
        let call = Call::Change {
            owner,
            change,
            by,
            answer,
        };
        self.call(call, answered).await
    }

    async fn call<T>(
        &self,
        call: Call,
        answered: oneshot::Receiver<Result<T, Problem>>,
    ) -> Result<T, Problem> {
        let ending = || problem(503, "Ending", "the instance is ending");
        self.calls.send(call).await.map_err(|_| ending())?;
        answered.await.map_err(|_| ending())?
    }
}

#[utoipa::path(get, path = "/v1/instance", summary = "The instance itself", responses((status = 200, body = Running)))]
async fn about(
    State(shared): State<Shared>,
    Query(Nothing {}): Query<Nothing>,
) -> extract::Json<Running> {
    extract::Json(shared.observed.instance())
}

#[utoipa::path(get, path = "/v1/publishes", summary = "All publishes, also those that drain", responses((status = 200, body = Vec<Listed>)))]
pub(super) async fn list(
    State(observed): State<Arc<dyn Observe>>,
    Query(Nothing {}): Query<Nothing>,
) -> Response {
    Shared::array(move || observed.list(None))
}

#[utoipa::path(get, path = "/v1/publishes/{id}", summary = "One publish", params(("id" = u64, Path)), responses((status = 200, body = Listed)))]
async fn one(
    State(shared): State<Shared>,
    Part(id): Part<Id>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<extract::Json<Listed>, Problem> {
    Ok(extract::Json(shared.row(id).await?))
}

#[utoipa::path(post, path = "/v1/publishes", summary = "Publishes these beside what the owner has, all or none", params(("owner" = Option<String>, Query, description = "cli if it is left out")), request_body = Vec<Asked>, responses((status = 201, body = Vec<Listed>)))]
async fn add(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Query(options): Query<Whose>,
    request: Request,
) -> Result<(StatusCode, extract::Json<Vec<Listed>>), Problem> {
    let asked = shared.json(request).await?;
    let asked = shared.publishes(asked).await?;
    let owner = options.owner.map(lasting).transpose()?;
    let changed = shared.change(owner, by, Change::Add(asked)).await?;
    Ok((StatusCode::CREATED, extract::Json(changed.publishes)))
}

#[utoipa::path(put, path = "/v1/owners/{owner}", summary = "Makes these all that the owner has: the difference is put in force, or nothing of it", params(("owner" = String, Path)), request_body = Vec<Asked>, responses((status = 200, body = Vec<Listed>)))]
async fn want(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Part(owner): Part<String>,
    Query(Nothing {}): Query<Nothing>,
    request: Request,
) -> Result<extract::Json<Vec<Listed>>, Problem> {
    let owner = lasting(named_owner(&owner)?)?;
    let asked = shared.json(request).await?;
    let asked = shared.publishes(asked).await?;
    let changed = shared.change(Some(owner), by, Change::Want(asked)).await?;
    Ok(extract::Json(changed.publishes))
}

/// An owner whose publishes do not end with another client's connection.
fn lasting(owner: Owner) -> Result<Owner, Problem> {
    if owner.is_lease() {
        let message = format!("owner {owner}: names of leases are the instance's; choose another");
        return Err(problem(403, "Bad owner", &message));
    }
    Ok(owner)
}

fn named_owner(text: &str) -> Result<Owner, Problem> {
    text.parse::<Owner>()
        .map_err(|error| problem(422, "Bad owner", &error.to_string()))
}

#[utoipa::path(delete, path = "/v1/owners/{owner}", summary = "Takes back all that the owner has", params(("owner" = String, Path), ("ending" = Option<Ending>, Query)), responses((status = 204)))]
async fn remove_all(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Part(owner): Part<String>,
    Query(options): Query<How>,
) -> Result<StatusCode, Problem> {
    let change = Change::RemoveAll(options.ending.unwrap_or_default());
    shared
        .change(Some(named_owner(&owner)?), by, change)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(delete, path = "/v1/publishes/{id}", summary = "Takes a publish back", params(("id" = u64, Path), ("owner" = Option<String>, Query), ("ending" = Option<Ending>, Query)), responses((status = 204)))]
async fn remove(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Part(id): Part<Id>,
    Query(options): Query<Options>,
) -> Result<StatusCode, Problem> {
    let change = Change::Remove(vec![Named::Id(id)], options.ending.unwrap_or_default());
    shared.change(options.owner, by, change).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(post, path = "/v1/unpublish", summary = "Takes publishes back by number, SPEC or container, all or none", params(("owner" = Option<String>, Query)), request_body = Unpublish, responses((status = 204)))]
async fn unpublish(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Query(options): Query<Options>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let asked: Unpublish = shared.json(request).await?;
    let ending = options.ending.unwrap_or(asked.ending);
    let publishes = asked.publishes.into_iter();
    let change = match asked.container {
        None => Change::Remove(publishes.map(named).collect::<Result<_, _>>()?, ending),
        Some(container) => Change::RemoveFrom {
            container,
            ports: publishes.map(of_container).collect::<Result<_, _>>()?,
            ending,
        },
    };
    shared.change(options.owner, by, change).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn named(publish: NamedPublish) -> Result<Named, Problem> {
    let named = Named::try_from(publish);
    named.map_err(|error| problem(422, "Bad publish", &error.to_string()))
}

fn of_container(port: NamedPublish) -> Result<ContainerPort, Problem> {
    let port = port.to_string().parse::<ContainerPort>();
    port.map_err(|error| problem(422, "Bad publish", &error))
}

#[utoipa::path(put, path = "/v1/publishes/{id}/backends", summary = "Gives a publish another backend in place: its port is never closed, and live connections stay where they are", params(("id" = u64, Path), ("owner" = Option<String>, Query)), request_body = Vec<AskedEndpoint>, responses((status = 200, body = Vec<Listed>)))]
async fn replace(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Part(id): Part<Id>,
    Query(options): Query<Whose>,
    request: Request,
) -> Result<extract::Json<Vec<Listed>>, Problem> {
    let backends: Vec<AskedEndpoint> = shared.json(request).await?;
    let [backend] = &backends[..] else {
        let message = format!("{} backends; a publish has one", backends.len());
        return Err(problem(422, "Bad backends", &message));
    };
    let change = Change::Replace(id, backend.clone());
    let changed = shared.change(options.owner, by, change).await?;
    Ok(extract::Json(changed.publishes))
}

/// The publishes, and then nothing until either side closes.
#[utoipa::path(post, path = "/v1/leases", summary = "Publishes these for as long as the connection lasts. Sockets that are bound to their ports already may come with the request (SCM_RIGHTS). The answer is a line with the publishes, and ends with the lease", request_body = Vec<Asked>, responses((status = 201, body = Vec<Listed>, content_type = "application/x-ndjson")))]
async fn lease(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Extension(received): Extension<Received>,
    Extension(place): Extension<Place>,
    Query(Nothing {}): Query<Nothing>,
    request: Request,
) -> Result<Response, Problem> {
    let asked = shared.json(request).await?;
    let asked = shared.publishes(asked).await?;
    let change = Change::Lease(asked, received.take());
    let changed = shared.change(None, by, change).await?;
    let lease: Option<Lease> = changed.lease;
    if !changed.publishes.is_empty() {
        place.give_back();
    }
    let held = stream::once(async move { changed.publishes }).chain(stream::once(async move {
        let _lease = lease;
        std::future::pending::<Vec<Listed>>().await
    }));
    let mut response = lines(held);
    *response.status_mut() = StatusCode::CREATED;
    Ok(response)
}

#[utoipa::path(get, path = "/v1/flows", summary = "Live flows, also those of the userland proxy", params(("publish" = Option<u64>, Query), ("client" = Option<String>, Query, description = "a network")), responses((status = 200, body = Vec<ListedFlow>)))]
async fn flows(
    State(shared): State<Shared>,
    Query(of): Query<FlowFilter>,
) -> Result<Response, Problem> {
    shared.knows(&of).await?;
    Ok(Shared::array(move || shared.observed.flows(&of)))
}

/// How many flows were ended.
#[derive(Serialize, utoipa::ToSchema)]
struct Ended {
    ended: u64,
}

#[utoipa::path(delete, path = "/v1/flows", summary = "Ends flows of a publish or of clients", params(("publish" = Option<u64>, Query), ("client" = Option<String>, Query, description = "a network")), responses((status = 200, body = Ended)))]
async fn end_flows(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Query(of): Query<FlowFilter>,
) -> Result<extract::Json<Ended>, Problem> {
    if of.publish.is_none() && of.client.is_none() {
        let message = "all flows of all publishes are meant; name a publish or a client";
        return Err(problem(400, "Bad query", message));
    }
    shared.knows(&of).await?;
    let ended = tokio::task::spawn_blocking(move || shared.observed.end_flows(&of));
    let ended = ended.await.map_err(anyhow::Error::from)??;
    let change = format!("end flows of {of:?}");
    info!(target: "audit", uid = by.uid, pid = by.pid, ?change, result = ?format!("{ended} ended"));
    Ok(extract::Json(Ended { ended }))
}

#[utoipa::path(get, path = "/v1/stats", summary = "Packet counters by reason", responses((status = 200, body = Vec<Counter>)))]
pub(super) async fn stats(
    State(observed): State<Arc<dyn Observe>>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<extract::Json<Vec<Counter>>, Problem> {
    Ok(extract::Json(observed.stats()?))
}

#[utoipa::path(get, path = "/metrics", summary = "Metrics for Prometheus; docs/metrics.md has them all", responses((status = 200, content((String = "application/openmetrics-text"), (String = "text/plain")))))]
pub(super) async fn metrics(
    State(observed): State<Arc<dyn Observe>>,
    Query(Nothing {}): Query<Nothing>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let accept = headers.get(header::ACCEPT);
    let accept = accept.and_then(|accept| accept.to_str().ok());
    let form = Form::accepted(accept.unwrap_or_default());
    // Two measurements at once would only take longer, and each holds a thread.
    static ONE: Semaphore = Semaphore::const_new(1);
    let _turn = ONE.acquire().await.map_err(anyhow::Error::from)?;
    let text = tokio::task::spawn_blocking(move || {
        let measured = observed.measure()?;
        anyhow::Ok(metrics::text(measured, form))
    });
    let text = text.await.map_err(anyhow::Error::from)??;
    Ok(([(header::CONTENT_TYPE, form.kind())], text).into_response())
}

#[utoipa::path(get, path = "/v1/events", summary = "What changes, a line each, until either side closes", responses((status = 200, body = Followed, content_type = "application/x-ndjson")))]
async fn events(
    State(shared): State<Shared>,
    Extension(place): Extension<Place>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<Response, Problem> {
    let follower = shared.follower(&place)?;
    let lost = |lost| Followed::Lost { lost };
    Ok(lines(received(shared.observed.events(), lost, follower)))
}

#[utoipa::path(get, path = "/v1/trace", summary = "What happens to each packet, a line each, until either side closes", responses((status = 200, body = Traced, content_type = "application/x-ndjson")))]
async fn trace(
    State(shared): State<Shared>,
    Extension(place): Extension<Place>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<Response, Problem> {
    let follower = shared.follower(&place)?;
    let (answer, answered) = oneshot::channel();
    let Trace { packets, ended } = shared.call(Call::Trace { answer }, answered).await?;
    Ok(lines(received(packets, Traced::Lost, (ended, follower))))
}

#[utoipa::path(post, path = "/v1/reload", summary = "Reads the configuration file again", responses((status = 200, body = Reloaded)))]
async fn reload(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<extract::Json<Reloaded>, Problem> {
    let (answer, answered) = oneshot::channel();
    let reloaded = shared.call(Call::Reload { by, answer }, answered).await?;
    Ok(extract::Json(reloaded))
}

/// The API's description, which a test makes.
#[utoipa::path(get, path = "/v1/openapi.json", summary = "This description", responses((status = 200, body = serde_json::Value)))]
async fn description(Query(Nothing {}): Query<Nothing>) -> Response {
    let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json"));
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}
