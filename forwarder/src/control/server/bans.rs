//! The calls about bans.

use axum::{
    Extension,
    extract::{self, Request, State},
    http::StatusCode,
    response::Response,
};
use ipnet::IpNet;
use serde::Deserialize;

use super::{Change, Peer, Problem, Shared, problem, query};
use crate::{control::api::Ban, publish::allow};

#[utoipa::path(get, path = "/v1/bans", summary = "Sources of which nothing gets into any published port", responses((status = 200, body = Vec<Ban>)))]
pub(super) async fn bans(State(shared): State<Shared>) -> Response {
    Shared::array(move || shared.observed.bans())
}

#[utoipa::path(post, path = "/v1/bans", summary = "Bans these beside those that are banned; their flows end now", request_body = Vec<Ban>, responses((status = 204), (status = "4XX", body = Problem)))]
pub(super) async fn ban(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let bans = shared.json(request).await?;
    change(&shared, by, bans, false).await
}

#[utoipa::path(put, path = "/v1/bans", summary = "Makes these all that are banned", request_body = Vec<Ban>, responses((status = 204), (status = "4XX", body = Problem)))]
pub(super) async fn set_bans(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let bans = shared.json(request).await?;
    change(&shared, by, bans, true).await
}

/// Bans these beside those that are banned, or makes them all that are.
async fn change(
    shared: &Shared,
    by: Peer,
    bans: Vec<Ban>,
    all: bool,
) -> Result<StatusCode, Problem> {
    shared.change(None, by, Change::Ban { bans, all }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// How long a ban lasts.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Lasts {
    /// Seconds since the epoch.
    until: Option<u64>,
}

fn banned(text: &str) -> Result<IpNet, Problem> {
    allow::source(text).map_err(|error| problem(422, "Bad network", &error))
}

#[utoipa::path(put, path = "/v1/bans/{network}", summary = "Bans a source", params(("network" = String, Path), ("until" = Option<u64>, Query, description = "seconds since the epoch")), responses((status = 204), (status = "4XX", body = Problem)))]
pub(super) async fn ban_one(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    extract::Path(network): extract::Path<String>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let Lasts { until } = query(&request)?;
    let network = banned(&network)?;
    let bans = vec![Ban { network, until }];
    change(&shared, by, bans, false).await
}

#[utoipa::path(delete, path = "/v1/bans/{network}", summary = "Takes a ban back", params(("network" = String, Path)), responses((status = 204), (status = "4XX", body = Problem)))]
pub(super) async fn unban(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    extract::Path(network): extract::Path<String>,
) -> Result<StatusCode, Problem> {
    let networks = vec![banned(&network)?];
    shared.change(None, by, Change::Unban(networks)).await?;
    Ok(StatusCode::NO_CONTENT)
}
