//! The port for Prometheus and for people: metrics, the page, and the documents that the page reads. It gets nothing but an
//! [`Observe`], so that no request that changes anything can be served by it.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use anyhow::{Result, anyhow};
use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderValue, header, uri::Authority},
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use ipnet::IpNet;
use tokio::{
    net::TcpStream,
    sync::Semaphore,
    time::{sleep, timeout},
};

use super::server::{self, Observe, PATIENCE, problem};
use crate::{
    accept, holder::Taken, memory, metrics::page, publish::spec::Protocol, seldom::Seldom,
};

/// Clients at once; more wait to be accepted.
const CLIENTS: usize = 16;
/// A client connects anew after this time, so that nobody holds a place for ever.
const LIFE: Duration = Duration::from_secs(60);
const HEADER: usize = 16 << 10;
/// The page's own script and style, and nothing of anybody else.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The bound port.
#[derive(Debug)]
pub struct Status {
    listener: TcpListener,
    allow: Arc<[IpNet]>,
}

impl Status {
    /// Binds an address for clients of these networks; for all that reach it if there are none.
    ///
    /// # Errors
    /// It cannot be bound.
    pub fn bind(address: SocketAddr, allow: &[IpNet]) -> Result<Self> {
        let listener = TcpListener::bind(address).map_err(|error| {
            let taken = Taken {
                address: address.ip().to_canonical(),
                zone: None,
                port: address.port(),
                protocol: Protocol::Tcp,
            };
            let is_taken = error.kind() == io::ErrorKind::AddrInUse;
            match taken.holder().filter(|_| is_taken) {
                Some(holder) => {
                    anyhow!("--metrics {address}: address already in use (held by {holder})")
                }
                None => anyhow::Error::from(error).context(format!("--metrics {address}")),
            }
        })?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            allow: allow.into(),
        })
    }

    /// Serves clients for as long as the runtime lives.
    ///
    /// # Errors
    /// The runtime refuses the socket.
    pub fn serve(self, observed: Arc<dyn Observe>) -> Result<()> {
        let listener = tokio::net::TcpListener::from_std(self.listener)?;
        let allow = self.allow;
        let clients = Arc::new(Semaphore::new(CLIENTS));
        tokio::spawn(async move {
            let warned = Seldom::default();
            loop {
                let (stream, peer) = match listener.accept().await {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        accept::failed(&error, &warned, "metrics").await;
                        continue;
                    }
                };
                let peer = peer.ip().to_canonical();
                if !allow.is_empty() && !allow.iter().any(|network| network.contains(&peer)) {
                    continue; // it gets nothing
                }
                let Ok(place) = clients.clone().acquire_owned().await else {
                    return;
                };
                let router = router(observed.clone(), peer);
                tokio::spawn(async move {
                    let _ = client(stream, router).await; // it has gone
                    drop(place);
                    memory::trim();
                });
            }
        });
        Ok(())
    }
}

async fn client(stream: TcpStream, router: Router) -> io::Result<()> {
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(HEADER)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut serving = std::pin::pin!(serving);
    tokio::select! {
        served = serving.as_mut() => return served.map_err(io::Error::other),
        () = sleep(LIFE) => serving.as_mut().graceful_shutdown(),
    }
    let served = timeout(PATIENCE, serving).await?;
    served.map_err(io::Error::other)
}

fn router(observed: Arc<dyn Observe>, peer: IpAddr) -> Router {
    Router::new()
        .route("/", get(async || Html(page())))
        .route("/metrics", get(server::metrics))
        .route("/v1/publishes", get(server::list))
        .route("/v1/stats", get(server::stats))
        .fallback(async || {
            problem(
                404,
                "Not found",
                "there are /, /metrics, /v1/publishes and /v1/stats",
            )
        })
        .method_not_allowed_fallback(async || {
            problem(
                405,
                "Method not allowed",
                "this port is for reading; the control socket takes changes",
            )
        })
        .layer(middleware::from_fn_with_state(peer, guard))
        .with_state(observed)
}

async fn guard(State(peer): State<IpAddr>, request: Request, next: Next) -> Response {
    if !is_for_us(&request, peer) {
        let message = "the Host is no address of this host; take the address itself";
        return problem(421, "Misdirected", message).into_response();
    }
    with_headers(next.run(request).await)
}

/// Whether a request of this host's own browser is meant for this port. A page of somebody else, whose name leads here, may
/// not read it (DNS rebinding).
fn is_for_us(request: &Request, peer: IpAddr) -> bool {
    if !peer.is_loopback() {
        return true;
    }
    let Some(host) = request.headers().get(header::HOST) else {
        return true; // no browser
    };
    let authority = host
        .to_str()
        .ok()
        .and_then(|host| host.parse::<Authority>().ok());
    authority.is_some_and(|authority| {
        let host = authority.host().trim_matches(['[', ']']);
        host == "localhost" || host.parse::<IpAddr>().is_ok()
    })
}

fn with_headers(mut response: Response) -> Response {
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        response
            .headers_mut()
            .insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_browser_of_this_host_names_an_address() {
        let is_for_us = |host: &str, peer: &str| {
            let request = Request::builder().header(header::HOST, host);
            let request = request.body(axum::body::Body::empty()).expect("a request");
            is_for_us(&request, peer.parse().expect("an address"))
        };
        for host in [
            "127.0.0.1:9100",
            "localhost:9100",
            "[::1]:9100",
            "localhost",
        ] {
            assert!(is_for_us(host, "127.0.0.1"), "{host}");
        }
        assert!(!is_for_us("evil.example:9100", "127.0.0.1"));
        assert!(is_for_us("node1.example:9100", "192.0.2.1"));
    }
}
