//! The calls about bans.

use axum::{
    Extension,
    extract::{self, Request, State},
    http::StatusCode,
    response::Response,
};
use ipnet::IpNet;
use serde::Deserialize;
use utoipa::ToSchema;

use super::{
    Change, Peer, Problem, Shared, problem,
    request::{LONGEST_BANS, Named as Part, Nothing, Query},
};
use crate::{
    control::api::{Ban, NamedPublish},
    publish::{
        Id, Owner, allow,
        bans::{Banned, NotBanned},
    },
};

#[utoipa::path(get, path = "/v1/bans", summary = "Sources of which nothing gets into any published port", responses((status = 200, body = Vec<Ban>)))]
pub(super) async fn bans(
    State(shared): State<Shared>,
    Query(Nothing {}): Query<Nothing>,
) -> Response {
    Shared::array(move || shared.observed.bans())
}

#[utoipa::path(post, path = "/v1/bans", summary = "Bans these beside those that are banned; their flows end now", request_body = Vec<Ban>, responses((status = 204)))]
pub(super) async fn ban(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Query(Nothing {}): Query<Nothing>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let bans = shared.json_up_to(LONGEST_BANS, request).await?;
    change(&shared, by, bans, false).await
}

#[utoipa::path(put, path = "/v1/bans", summary = "Makes these all that are banned", request_body = Vec<Ban>, responses((status = 204)))]
pub(super) async fn set_bans(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Query(Nothing {}): Query<Nothing>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let bans = shared.json_up_to(LONGEST_BANS, request).await?;
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

/// How long a ban lasts, and from what.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Lasts {
    /// Seconds since the epoch.
    until: Option<u64>,
    /// The number or the SPEC of the only publish that it is banned from.
    publish: Option<NamedPublish>,
    /// Who bans it; without, `cli`.
    #[schema(value_type = Option<String>)]
    owner: Option<Owner>,
}

/// Which ban is meant, of several of a source.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Scope {
    publish: Option<NamedPublish>,
    owner: Option<Owner>,
}

fn banned(text: &str) -> Result<IpNet, Problem> {
    allow::source(text).map_err(|error| problem(422, "Bad network", &error))
}

/// The same by its number.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ScopeById {
    publish: Option<Id>,
    owner: Option<Owner>,
}

#[utoipa::path(get, path = "/v1/bans/{network}", operation_id = "ban_of", summary = "The ban of a source", params(("network" = String, Path), ("publish" = Option<u64>, Query, description = "the ban from this publish alone"), ("owner" = Option<String>, Query, description = "this owner's ban; without, the one that lasts longest")), responses((status = 200, body = Ban)))]
pub(super) async fn one(
    State(shared): State<Shared>,
    Part(network): Part<String>,
    Query(ScopeById { publish, owner }): Query<ScopeById>,
) -> Result<extract::Json<Ban>, Problem> {
    let network = banned(&network)?.trunc();
    let is_meant = publish.map(NamedPublish::Id);
    let mut longest: Option<Ban> = None;
    for ban in shared.observed.bans() {
        let ban = ban?;
        let is_meant = ban.network == network
            && ban.publish == is_meant
            && owner.as_ref().is_none_or(|owner| *owner == ban.owner);
        let end = |ban: &Ban| ban.until.unwrap_or(u64::MAX);
        if is_meant && longest.as_ref().is_none_or(|it| end(it) < end(&ban)) {
            longest = Some(ban);
        }
    }
    let banned = Banned { publish, network };
    let missing = || problem(404, "Not found", &NotBanned { banned, owner }.to_string());
    longest.map(extract::Json).ok_or_else(missing)
}

#[utoipa::path(put, path = "/v1/bans/{network}", summary = "Bans a source", params(("network" = String, Path), ("until" = Option<u64>, Query, description = "seconds since the epoch"), ("publish" = Option<String>, Query, description = "number or SPEC of the only publish that it is banned from"), ("owner" = Option<String>, Query, description = "who bans it; without, `cli`")), request_body(content = Option<Lasts>, description = "in place of the query"), responses((status = 204)))]
pub(super) async fn ban_one(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Part(network): Part<String>,
    Query(in_query): Query<Lasts>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let network = banned(&network)?;
    let in_body: Lasts = shared.json_if_any(request).await?;
    let until = once("until", in_query.until, in_body.until)?;
    let publish = once("publish", in_query.publish, in_body.publish)?;
    let owner = once("owner", in_query.owner, in_body.owner)?;
    let ban = Ban {
        network,
        until,
        publish,
        owner: owner.unwrap_or_else(Owner::cli),
    };
    change(&shared, by, vec![ban], false).await
}

/// What may be in the query or in the body.
fn once<T>(name: &str, in_query: Option<T>, in_body: Option<T>) -> Result<Option<T>, Problem> {
    if in_query.is_some() && in_body.is_some() {
        let message = format!("`{name}` is in the query and in the body; leave one of them out");
        return Err(problem(400, "Bad query", &message));
    }
    Ok(in_query.or(in_body))
}

#[utoipa::path(delete, path = "/v1/bans/{network}", summary = "Takes a ban back", params(("network" = String, Path), ("publish" = Option<String>, Query, description = "the ban from this publish alone, by its number or SPEC"), ("owner" = Option<String>, Query, description = "this owner's alone; without, everybody's")), responses((status = 204)))]
pub(super) async fn unban_one(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Part(network): Part<String>,
    Query(scope): Query<Scope>,
) -> Result<StatusCode, Problem> {
    let networks = vec![banned(&network)?];
    take_back(&shared, by, networks, scope).await
}

#[utoipa::path(post, path = "/v1/unban", summary = "Takes bans back, all or none", params(("publish" = Option<String>, Query, description = "those from this publish alone, by its number or SPEC"), ("owner" = Option<String>, Query, description = "this owner's alone; without, everybody's")), request_body = Vec<String>, responses((status = 204)))]
pub(super) async fn unban(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Query(scope): Query<Scope>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let networks: Vec<String> = shared.json_up_to(LONGEST_BANS, request).await?;
    let networks = networks.iter().map(|text| banned(text));
    take_back(&shared, by, networks.collect::<Result<_, _>>()?, scope).await
}

#[utoipa::path(delete, path = "/v1/bans", summary = "Takes all bans back", responses((status = 204)))]
pub(super) async fn unban_all(
    State(shared): State<Shared>,
    Extension(by): Extension<Peer>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<StatusCode, Problem> {
    change(&shared, by, Vec::new(), true).await
}

async fn take_back(
    shared: &Shared,
    by: Peer,
    networks: Vec<IpNet>,
    Scope { publish, owner }: Scope,
) -> Result<StatusCode, Problem> {
    let change = Change::Unban(networks, publish, owner);
    shared.change(None, by, change).await?;
    Ok(StatusCode::NO_CONTENT)
}
