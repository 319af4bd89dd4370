//! What the web server answers: the page, its live values, a download, and one line for whoever is no browser.
//! What all answers are made of is collected here; how the page says it is `page.rs`'s.

use std::{
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    checks::Row,
    http::{Answer, Request},
    page,
    watch::Watch,
    who::Addresses,
};

const HTML: &str = "text/html; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";
/// Live values may be this old, so that several visitors share a reading.
const FRESH: Duration = Duration::from_millis(500);
/// What the page's button fetches. Zeros: the port does not care.
const DOWNLOAD: usize = 32_000_000;

/// The demonstration, as far as the page shows it.
#[derive(Debug)]
pub(crate) struct Site {
    pub addresses: Addresses,
    /// Without root: in a namespace, behind a relay.
    pub sandboxed: bool,
    pub watch: Watch,
    /// The daemon's command line and instance, once it runs.
    pub daemon: OnceLock<(String, String)>,
    pub checks: Mutex<Checks>,
    /// What readings are timed from.
    pub began: Instant,
}

/// The rows so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Checks {
    pub rows: Vec<Row>,
    pub done: bool,
}

impl Site {
    pub(crate) fn new(addresses: Addresses, sandboxed: bool) -> Self {
        Self {
            addresses,
            sandboxed,
            watch: Watch::default(),
            daemon: OnceLock::new(),
            checks: Mutex::default(),
            began: Instant::now(),
        }
    }

    pub(crate) fn change_checks(&self, change: impl FnOnce(&mut Checks)) {
        change(&mut self.checks.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn checks(&self) -> Checks {
        let checks = self.checks.lock();
        checks.unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn answer(&self, request: &Request) -> Answer {
        if !matches!(request.method.as_str(), "GET" | "HEAD") {
            return Answer {
                status: "405 Method Not Allowed",
                ..Answer::ok(TEXT, "only GET\n")
            };
        }
        match request.path.as_str() {
            "/" if request.html => {
                // The visitor's own flow is in a state from now on, not in an earlier one.
                let state = self.watch.state(Instant::now());
                Answer::ok(HTML, page::html(self, request, state.as_deref()))
            }
            "/" => Answer::ok(TEXT, format!("the backend saw {}\n", request.peer)),
            "/status.json" => {
                let fresh = Instant::now().checked_sub(FRESH);
                let since = fresh.map_or(request.accepted, |it| it.max(request.accepted));
                let state = self.watch.state(since);
                Answer::ok(
                    "application/json",
                    page::json(self, request, state.as_deref()),
                )
            }
            "/page.css" => Answer::ok("text/css; charset=utf-8", include_str!("page/page.css")),
            "/page.js" => Answer::ok(
                "text/javascript; charset=utf-8",
                include_str!("page/page.js"),
            ),
            "/icon.svg" => Answer::ok("image/svg+xml", include_str!("page/icon.svg")),
            "/download" => Answer {
                zeros: DOWNLOAD,
                ..Answer::ok("application/octet-stream", [])
            },
            _ => Answer {
                status: "404 Not Found",
                ..Answer::ok(TEXT, "nothing here\n")
            },
        }
    }
}
