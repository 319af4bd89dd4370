//! Requests to an instance by processes that must stay small: blocking, without a runtime, which would take more memory
//! than all the rest.

use std::{
    io::{self, BufRead as _, BufReader, IoSlice, Read as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use nix::sys::socket::MsgFlags;
use serde_json::Value;

use crate::{instance::Instance, rights};

/// What an instance may take for an answer. dockerd waits for 16 s.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection to the instance; `None` while it is not running.
pub(super) fn connect(instance: &Instance) -> Option<UnixStream> {
    let paths = instance.socket_paths();
    let stream = paths
        .iter()
        .find_map(|path| UnixStream::connect(path).ok())?;
    set_patience(&stream, PATIENCE).ok()?;
    Some(stream)
}

/// Bounds what an answer may take.
///
/// # Errors
/// The socket is gone.
pub(super) fn set_patience(stream: &UnixStream, patience: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))
}

/// An answer whose head has come.
pub(super) struct Answer<'a> {
    status: u16,
    body: BufReader<&'a UnixStream>,
}

impl Answer<'_> {
    /// The status and the first line of the body; `Null` if that is no JSON.
    ///
    /// # Errors
    /// The instance has ended.
    pub(super) fn line(mut self) -> io::Result<(u16, Value)> {
        let mut line = String::new();
        self.body.read_line(&mut line)?;
        let value = serde_json::from_str(&line).unwrap_or(Value::Null);
        Ok((self.status, value))
    }

    /// The status and the whole body, which ends with the connection; `Null` if that is no JSON.
    ///
    /// # Errors
    /// The instance has ended.
    pub(super) fn document(mut self) -> io::Result<(u16, Value)> {
        let mut text = Vec::new();
        self.body.read_to_end(&mut text)?;
        let value = serde_json::from_slice(&text).unwrap_or(Value::Null);
        Ok((self.status, value))
    }
}

/// Sends one request, with a descriptor if there is one, and reads the head of its answer.
///
/// # Errors
/// The instance has ended, or does not answer in time.
pub(super) fn send<'a>(
    stream: &'a UnixStream,
    method: &str,
    path: &str,
    body: &str,
    descriptor: Option<&OwnedFd>,
) -> io::Result<Answer<'a>> {
    let length = body.len();
    // In HTTP/1.0 a body has no chunks.
    let text = format!(
        "{method} {path} HTTP/1.0\r\nHost: forwarder\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    let descriptors: Vec<_> = descriptor.iter().map(|it| it.as_fd()).collect();
    let parts = [IoSlice::new(text.as_bytes())];
    let sent = rights::send(stream, &parts, &descriptors, MsgFlags::empty())?;
    let mut writer = stream;
    writer.write_all(&text.as_bytes()[sent..])?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|word| word.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(format!("no status in {line:?}")))?;
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 || line.trim_end().is_empty() {
            break;
        }
    }
    Ok(Answer {
        status,
        body: reader,
    })
}
