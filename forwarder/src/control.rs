//! The control socket: one JSON request a line from a client, one JSON answer a line back; a trace
//! goes on until either side closes. The daemon's answers are made in `daemon.rs`.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    mem,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use ipnet::IpNet;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader as AsyncReader},
    net::{UnixListener, unix::OwnedReadHalf},
    sync::mpsc,
};

use crate::{
    accept,
    cli::{Named, socket_path},
    memory,
};

/// Room for some 200,000 SPECs.
const LONGEST_REQUEST: usize = 16 << 20;

/// What a client may ask.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    List,
    Flows,
    Stats,
    Publish {
        specs: Vec<String>,
        allow: Vec<IpNet>,
    },
    Unpublish {
        publishes: Vec<Named>,
        how: Ending,
    },
    Trace,
}

/// What becomes of the flows of a publish that is taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    Cut,
    Drain,
    Reset,
}

/// An answer, or one line of a trace.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    Done(serde_json::Value),
    Failed(String),
}

/// A request with the way back for its answers.
#[derive(Debug)]
pub struct Call {
    pub request: Request,
    pub answer: mpsc::Sender<Response>,
}

/// The listening socket; removed when dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    listener: Option<UnixListener>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        if let Some(directory) = self.path.parent() {
            let _ = fs::remove_dir(directory); // stays while another instance listens
        }
    }
}

impl Socket {
    /// Binds the instance's socket, root and the group `forwarder` alone may connect.
    ///
    /// # Errors
    /// Another process serves this instance already, or the directory cannot be written.
    pub fn bind(instance: &str) -> Result<Self> {
        let root = nix::unistd::Uid::effective().is_root();
        let mut path = socket_path(instance, root);
        if fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).is_err() {
            path = socket_path(instance, false); // root of a user namespace
        }
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        if UnixStream::connect(&path).is_ok() {
            bail!("instance {instance} is already running; choose another name by --instance");
        }
        let _ = fs::remove_file(&path);
        let listener =
            UnixListener::bind(&path).with_context(|| format!("bind {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660))?;
        if let Ok(Some(group)) = nix::unistd::Group::from_name("forwarder") {
            let _ = nix::unistd::chown(&path, None, Some(group.gid));
        }
        Ok(Self {
            path,
            listener: Some(listener),
        })
    }

    /// Accepts clients and hands their requests to `calls`, each client in a task of its own.
    pub fn serve(&mut self, calls: mpsc::Sender<Call>) {
        let Some(listener) = self.listener.take() else {
            return;
        };
        tokio::spawn(async move {
            let mut warned = false;
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        warned = false;
                        tokio::spawn(client(stream, calls.clone()));
                    }
                    Err(error) => accept::failed(&error, &mut warned, "control socket").await,
                }
            }
        });
    }
}

async fn client(stream: tokio::net::UnixStream, calls: mpsc::Sender<Call>) {
    let (reader, mut writer) = stream.into_split();
    let mut lines = Lines {
        reader: AsyncReader::new(reader),
        line: Vec::new(),
    };
    while let Some(line) = lines.next().await.transpose() {
        let request = line.map_err(|error| error.to_string());
        let request = request
            .and_then(|line| serde_json::from_slice(&line).map_err(|error| error.to_string()));
        let request = match request {
            Ok(request) => request,
            Err(error) => {
                let failed = Response::Failed(format!("not a request: {error}"));
                let _ = send(&mut writer, &failed).await;
                return;
            }
        };
        let (answer, mut answers) = mpsc::channel(1024);
        if calls.send(Call { request, answer }).await.is_err() {
            return;
        }
        let is_gone = loop {
            tokio::select! {
                response = answers.recv() => match response {
                    Some(response) => if send(&mut writer, &response).await.is_err() { break true },
                    None => break false,
                },
                // A client that goes ends its trace.
                line = lines.next() => if !matches!(line, Ok(Some(_))) { break true },
            }
        };
        memory::trim();
        if is_gone {
            return;
        }
    }
}

/// What a client says, line by line.
struct Lines {
    reader: AsyncReader<OwnedReadHalf>,
    /// What has come of the next one.
    line: Vec<u8>,
}

impl Lines {
    /// The next line, or what there is of it at the end; `None` after that. May be dropped and asked for again.
    async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let room = LONGEST_REQUEST - self.line.len();
        (&mut self.reader)
            .take(room as u64)
            .read_until(b'\n', &mut self.line)
            .await?;
        if self.line.len() == LONGEST_REQUEST {
            let limit = format!("longer than {} MiB", LONGEST_REQUEST >> 20);
            return Err(io::Error::new(io::ErrorKind::InvalidData, limit));
        }
        Ok(Some(mem::take(&mut self.line)).filter(|line| !line.is_empty()))
    }
}

async fn send(
    writer: &mut tokio::net::unix::OwnedWriteHalf,
    response: &Response,
) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    writer.write_all(&line).await
}

/// Whether somebody serves this instance.
pub fn is_running(instance: &str) -> bool {
    connect(instance).is_ok()
}

/// Removes the socket of an instance that was killed. Returns whether there was one.
pub fn remove_stale(instance: &str) -> bool {
    let mut removed = false;
    for path in [true, false].map(|root| socket_path(instance, root)) {
        if UnixStream::connect(&path).is_err() {
            removed |= fs::remove_file(&path).is_ok();
            let _ = path.parent().map(fs::remove_dir); // stays while another instance listens
        }
    }
    removed
}

fn connect(instance: &str) -> Result<UnixStream> {
    for root in [true, false] {
        match UnixStream::connect(socket_path(instance, root)) {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                bail!(
                    "no permission for instance {instance}: run as root or join the group forwarder"
                );
            }
            Err(_) => {}
        }
    }
    bail!("instance {instance} is not running: start it by `forwarder run`")
}

/// Sends one request and hands each answer to `each`, until it returns false or the daemon ends.
///
/// # Errors
/// The instance isn't running, or says that it failed.
pub fn call(
    instance: &str,
    request: &Request,
    mut each: impl FnMut(serde_json::Value) -> Result<bool>,
) -> Result<()> {
    let mut stream = connect(instance)?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream
        .write_all(&line)
        .context("write to the control socket")?;
    for line in BufReader::new(stream).lines() {
        match serde_json::from_str(&line.context("read from the control socket")?)? {
            Response::Done(value) => {
                if !each(value)? {
                    return Ok(());
                }
            }
            Response::Failed(message) => bail!("{message}"),
        }
    }
    bail!("instance {instance} ended before it answered")
}

/// Sends one request and returns its one answer.
///
/// # Errors
/// As [`call`].
pub fn ask<T: DeserializeOwned>(instance: &str, request: &Request) -> Result<T> {
    let mut answer = None;
    call(instance, request, |value| {
        answer = Some(serde_json::from_value(value)?);
        Ok(false)
    })?;
    answer.context("no answer")
}
