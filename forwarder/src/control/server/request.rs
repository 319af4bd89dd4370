//! What a request says beside its method: its path, its query and its body. What is not known is refused by name, and nothing
//! is passed over.

use axum::{
    body::{self, Body, Bytes},
    extract::{self, FromRequestParts, Query as Parsed, Request, State, rejection::JsonRejection},
    http::{Method, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::time::timeout;

use super::{PATIENCE, Problem, Shared, problem};
use crate::publish::Owner;

/// The longest request in octets: room for some 150,000 publishes.
const LONGEST: usize = 16 << 20;
/// The longest list of bans: room for a million addresses with their times.
pub(super) const LONGEST_BANS: usize = 96 << 20;
/// A request up to this length is always read.
pub(super) const SHORT: usize = 64 << 10;
/// All longer ones that are read at one time, in octets; a longer one is read alone.
pub(super) const ROOM: usize = 2 * LONGEST;

/// What is wrong with the request's form, and where its form is described.
fn malformed(status: u16, title: &str, detail: &str) -> Problem {
    let mut problem = Problem::new(status, title, detail);
    problem
        .remedy
        .get_or_insert("GET /v1/openapi.json describes each call".into());
    problem
}

/// The part of the path that is a name or number.
#[derive(Debug)]
pub(super) struct Named<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Named<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let named = extract::Path::from_request_parts(parts, state).await;
        let extract::Path(name) =
            named.map_err(|error| malformed(400, "Bad path", &error.body_text()))?;
        Ok(Self(name))
    }
}

/// The query.
#[derive(Debug)]
pub(in crate::control) struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let Parsed(options) = Parsed::try_from_uri(&parts.uri).map_err(|error| {
            let text = error.body_text();
            malformed(400, "Bad query", without_introduction(&text))
        })?;
        Ok(Self(options))
    }
}

/// The library's own, before what is wrong.
const INTRODUCTIONS: [&str; 3] = [
    "Failed to deserialize query string: ",
    "Failed to deserialize the JSON body into the target type: ",
    "Failed to parse the request body as JSON: ",
];

/// A query of calls that have no options.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::control) struct Nothing {}

/// In whose name; `cli` if it is left out.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Whose {
    pub owner: Option<Owner>,
}

impl Shared {
    /// Reads a request's JSON, of which all that are read at one time have bounds.
    pub(super) async fn json<T: DeserializeOwned>(&self, request: Request) -> Result<T, Problem> {
        self.json_up_to(LONGEST, request).await
    }

    /// The same of a document up to this length.
    pub(super) async fn json_up_to<T: DeserializeOwned>(
        &self,
        longest: usize,
        request: Request,
    ) -> Result<T, Problem> {
        decoded(&self.octets(longest, request).await?)
    }

    /// The same of a document that may be left out.
    pub(super) async fn json_if_any<T: DeserializeOwned + Default>(
        &self,
        request: Request,
    ) -> Result<T, Problem> {
        let octets = self.octets(SHORT, request).await?;
        if octets.is_empty() {
            return Ok(T::default());
        }
        decoded(&octets)
    }

    async fn octets(&self, longest: usize, request: Request) -> Result<Bytes, Problem> {
        let too_long = || {
            let message = format!(
                "the request is longer than {} MiB; divide it into several",
                longest >> 20
            );
            problem(413, "Too long", &message)
        };
        let slow = || problem(408, "Too slow", "the request took too long; send it again");
        let length = request.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        let length = length.unwrap_or(longest);
        if length > longest {
            return Err(too_long());
        }
        let _room = if length > SHORT {
            let room = length.min(ROOM) as u32;
            let room = self.room.clone().acquire_many_owned(room);
            Some(timeout(PATIENCE, room).await.map_err(|_| slow())?)
        } else {
            None
        };
        let read = body::to_bytes(request.into_body(), longest);
        let octets = timeout(PATIENCE, read).await.map_err(|_| slow())?;
        octets.map_err(|error| {
            use std::error::Error as _;
            let source = error.source();
            if source.is_some_and(|it| it.is::<http_body_util::LengthLimitError>()) {
                return too_long();
            }
            malformed(400, "Bad body", "the request ends in the midst of its body")
        })
    }
}

/// Refuses a body with anything in it, of calls that take none.
pub(super) async fn bodiless(
    State(shared): State<Shared>,
    request: Request,
    next: Next,
) -> Response {
    let (method, path) = (request.method(), request.uri().path());
    let reads_or_removes = [Method::GET, Method::HEAD, Method::DELETE].contains(method);
    if !reads_or_removes && path != "/v1/reload" {
        return next.run(request).await;
    }
    let call = format!("{method} {path}");
    let (parts, body) = request.into_parts();
    let request = Request::from_parts(parts.clone(), body);
    match shared.json_if_any::<Option<Nothing>>(request).await {
        Ok(_) => next.run(Request::from_parts(parts, Body::empty())).await,
        Err(mut problem) => {
            problem.detail = format!("{call} takes no body: {}", problem.detail);
            problem.into_response()
        }
    }
}

fn decoded<T: DeserializeOwned>(octets: &[u8]) -> Result<T, Problem> {
    extract::Json::from_bytes(octets)
        .map(|extract::Json(value)| value)
        .map_err(|error: JsonRejection| malformed(422, "Bad body", &placed(&error.body_text())))
}

/// What is wrong with a document: where it is, and then the library's words without their introduction.
fn placed(text: &str) -> String {
    let text = without_introduction(text);
    match text.rsplit_once(" at line ") {
        Some((what, place)) => format!("line {place}: {what}"),
        None => text.into(),
    }
}

fn without_introduction(text: &str) -> &str {
    let known = INTRODUCTIONS.iter();
    known.fold(text, |text, begin| text.strip_prefix(begin).unwrap_or(text))
}
