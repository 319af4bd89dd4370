//! What clients of unix sockets share of HTTP/1.1: one request on a connection, and an answer of lines.

use anyhow::{Result, bail};
use futures_util::StreamExt as _;
use http_body_util::{BodyStream, Full};
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

/// Sends the one request of a connection.
///
/// # Errors
/// The connection ends before there is an answer.
pub(crate) async fn send(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> hyper::Result<Response<Incoming>> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    sender.send_request(request).await
}

/// An answer that is read a line at a time.
#[derive(Debug)]
pub(crate) struct Lines {
    pieces: BodyStream<Incoming>,
    /// What has come behind the last whole line.
    text: Vec<u8>,
    longest: usize,
}

impl Lines {
    /// Of lines up to this length, in octets.
    pub(crate) fn new(answer: Response<Incoming>, longest: usize) -> Self {
        Self {
            pieces: BodyStream::new(answer.into_body()),
            text: Vec::new(),
            longest,
        }
    }

    /// The next line, with its end; `None` after the last. Nothing is lost if this is dropped.
    ///
    /// # Errors
    /// The connection fails, or the line is too long.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        let mut searched = 0;
        loop {
            let end = self.text[searched..]
                .iter()
                .position(|octet| *octet == b'\n');
            if let Some(end) = end {
                return Ok(Some(self.text.drain(..=searched + end).collect()));
            }
            searched = self.text.len();
            if searched > self.longest {
                bail!("a line of the answer has no end");
            }
            let Some(piece) = self.pieces.next().await else {
                return Ok(None);
            };
            if let Some(data) = piece?.data_ref() {
                self.text.extend_from_slice(data);
            }
        }
    }
}
