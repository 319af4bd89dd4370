//! The control socket as any HTTP client sees it: requests written by hand, and what comes back.

use std::{
    io::{BufRead, BufReader, IoSlice, Read as _, Write as _},
    net::Shutdown,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result};
use forwarder::rights;
use nix::sys::socket::MsgFlags;
use serde_json::Value;

use crate::daemon::Daemon;

/// What a request was answered with.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub kind: String,
    pub body: Value,
}

/// A connection with a request that was sent.
#[derive(Debug)]
pub struct Open {
    reader: BufReader<UnixStream>,
}

/// A request's text. In HTTP/1.0 an answer ends with its connection, and has no chunks.
pub fn text(method: &str, path: &str, body: &str) -> String {
    let length = body.len();
    format!("{method} {path} HTTP/1.0\r\nHost: forwarder\r\nContent-Length: {length}\r\n\r\n{body}")
}

/// Connects, with a limit to how long it waits for what comes.
///
/// # Errors
/// Nobody listens.
pub fn connect(socket: &Path) -> Result<UnixStream> {
    let stream = UnixStream::connect(socket).context("connect to the control socket")?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}

/// Sends octets and reads one answer; the writing side is closed before that.
///
/// # Errors
/// No answer that is HTTP.
pub fn send(socket: &Path, octets: &[u8]) -> Result<Answer> {
    let mut stream = connect(socket)?;
    let _ = stream.write_all(octets); // the daemon may have had enough before the end
    let _ = stream.shutdown(Shutdown::Write);
    let mut open = Open {
        reader: BufReader::new(stream),
    };
    let (status, kind) = open.head()?;
    let mut body = String::new();
    open.reader.read_to_string(&mut body)?;
    Ok(Answer {
        status,
        kind,
        body: serde_json::from_str(&body).unwrap_or(Value::String(body)),
    })
}

/// A request and its answer.
///
/// # Errors
/// As [`send`].
pub fn ask(daemon: &Daemon, method: &str, path: &str, body: &str) -> Result<Answer> {
    send(&daemon.socket(), text(method, path, body).as_bytes())
}

/// Sends a request with descriptors and leaves its connection open.
///
/// # Errors
/// Nobody listens, or the kernel refuses the descriptors.
pub fn open(
    daemon: &Daemon,
    method: &str,
    path: &str,
    body: &str,
    descriptors: &[BorrowedFd<'_>],
) -> Result<Open> {
    let stream = connect(&daemon.socket())?;
    let text = text(method, path, body);
    let parts = [IoSlice::new(text.as_bytes())];
    rights::send(&stream, &parts, descriptors, MsgFlags::empty())?;
    Ok(Open {
        reader: BufReader::new(stream),
    })
}

impl Open {
    /// Status and content type; what follows is the body.
    ///
    /// # Errors
    /// It is no answer.
    pub fn head(&mut self) -> Result<(u16, String)> {
        let mut line = String::new();
        self.reader.read_line(&mut line).context("read an answer")?;
        let status = line.split(' ').nth(1).and_then(|word| word.parse().ok());
        let status = status.with_context(|| format!("no status line: {line:?}"))?;
        let mut kind = String::new();
        loop {
            let mut line = String::new();
            self.reader.read_line(&mut line)?;
            if line.trim_end().is_empty() {
                return Ok((status, kind));
            }
            if let Some(value) = line.to_lowercase().strip_prefix("content-type:") {
                kind = value.trim().into();
            }
        }
    }

    /// The next line of a body, as JSON.
    ///
    /// # Errors
    /// There is none in time.
    pub fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.reader.read_line(&mut line).context("read a line")?;
        serde_json::from_str(&line).with_context(|| format!("no JSON: {line:?}"))
    }
}
