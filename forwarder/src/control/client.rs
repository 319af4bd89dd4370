//! The client of the control socket: what the command line asks, and waits for.

use std::{
    io::ErrorKind,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response,
    body::{Bytes, Incoming},
    header,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::{api::Problem, stream::Stream};
use crate::{
    http::{self, Lines},
    instance::Instance,
};

/// The longest text that is one line of a stream, in octets.
const LONGEST_LINE: usize = 64 << 20;

/// Asks one instance.
#[derive(Clone, Debug)]
pub struct Client {
    instance: Instance,
}

impl Client {
    pub const fn new(instance: Instance) -> Self {
        Self { instance }
    }

    /// Sends a request and returns the document that it is answered with.
    ///
    /// # Errors
    /// The instance isn't running, or says that it failed, by a [`Problem`].
    pub fn ask<T: DeserializeOwned>(
        &self,
        method: &Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T> {
        let body = body.map(serde_json::to_vec).transpose()?;
        block_on(async {
            let response = self.send(method, path, body, Vec::new()).await?;
            let text = response.into_body().collect().await;
            let text = text.with_context(|| self.has_ended())?.to_bytes();
            // A call that has nothing to say answers with nothing.
            let text = if text.is_empty() { b"null" } else { &text[..] };
            serde_json::from_slice(text).context("read the answer")
        })
    }

    /// Sends a request, with descriptors, and hands each line of the answer to `each`, until it returns false or the
    /// instance ends.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn follow<T: DeserializeOwned>(
        &self,
        method: &Method,
        path: &str,
        body: Option<&impl Serialize>,
        descriptors: Vec<OwnedFd>,
        mut each: impl FnMut(T) -> Result<bool>,
    ) -> Result<()> {
        let body = body.map(serde_json::to_vec).transpose()?;
        block_on(async {
            let response = self.send(method, path, body, descriptors).await?;
            let mut lines = Lines::new(response, LONGEST_LINE);
            while let Some(line) = lines.next().await.with_context(|| self.has_ended())? {
                if !each(serde_json::from_slice(&line)?)? {
                    return Ok(());
                }
            }
            bail!("{}", self.has_ended())
        })
    }

    fn has_ended(&self) -> String {
        format!("instance {} ended before it answered", self.instance.name)
    }

    async fn send(
        &self,
        method: &Method,
        path: &str,
        body: Option<Vec<u8>>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Response<Incoming>> {
        let stream = Stream::new(self.connect().await?, descriptors);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "forwarder")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())))?;
        let response = http::send(stream, request).await;
        let response = response.with_context(|| self.has_ended())?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let text = response.into_body().collect().await?.to_bytes();
        match serde_json::from_slice::<Problem>(&text) {
            Ok(problem) => Err(problem.into()),
            Err(_) => bail!("{status}: {}", String::from_utf8_lossy(&text)),
        }
    }

    /// The process of the instance.
    pub fn pid(&self) -> Option<i32> {
        let served = block_on(async { Ok(self.connect().await?.peer_cred()?) });
        served.ok()?.pid()
    }

    async fn connect(&self) -> Result<UnixStream> {
        let name = &self.instance.name;
        let mut denied: Option<PathBuf> = None;
        for path in self.instance.socket_paths() {
            match UnixStream::connect(&path).await {
                Ok(stream) => {
                    is_trusted(&stream, &path)?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == ErrorKind::PermissionDenied => denied = Some(path),
                Err(error) if self.instance.socket.is_some() => {
                    let path = path.display();
                    bail!(
                        "--socket {path}: {error}; name the one that `forwarder run --socket` made"
                    )
                }
                Err(_) => {}
            }
        }
        if let Some(path) = denied {
            bail!(
                "no permission for instance {name} ({}): run as root or join the group forwarder",
                path.display()
            );
        }
        if self.instance.is_running() {
            bail!("instance {name} is starting or stopping; try again in a moment");
        }
        bail!("instance {name} is not running: start it by `forwarder run`")
    }
}

/// Whether whoever listens is root, this user, or the owner of the directory, whom only root lets be that.
fn is_trusted(stream: &UnixStream, path: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let uid = stream.peer_cred()?.uid();
    let directory = path.parent().map(std::fs::symlink_metadata);
    let owner = directory.and_then(Result::ok).map(|about| about.uid());
    let own = nix::unistd::geteuid().as_raw();
    if uid == 0 || uid == own || owner == Some(uid) {
        return Ok(());
    }
    bail!(
        "{} is served by user {uid}, who is not trusted",
        path.display()
    )
}

fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("start the runtime")?
        .block_on(future)
}
