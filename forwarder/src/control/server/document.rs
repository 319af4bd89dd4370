//! Documents that are made piece by piece: arrays of many rows, and lines without an end.

use std::io;

use axum::{
    body::Body,
    http::header,
    response::{IntoResponse as _, Response},
};
use futures_util::{StreamExt as _, stream};
use serde::Serialize;
use tokio::sync::broadcast;

use super::{Rows, Shared};

/// Octets of a long document that are made at a time, when the client has read what was before.
const CHUNK: usize = 32 << 10;

impl Shared {
    /// A document that is made piece by piece, as fast as the client reads.
    pub(super) fn array<T: Serialize + 'static>(
        rows: impl FnOnce() -> Rows<T> + Send + 'static,
    ) -> Response {
        enum Left<F, T> {
            Unopened(F),
            Open(Rows<T>, bool),
            Over,
        }
        let chunks = stream::unfold(Left::Unopened(rows), async |left| {
            // Reading the kernel's tables takes a while, and so may a hundred thousand rows.
            let made = tokio::task::spawn_blocking(move || {
                let mut text = Vec::with_capacity(CHUNK + 1024);
                let (mut rows, mut first) = match left {
                    Left::Over => return None,
                    Left::Unopened(open) => {
                        text.push(b'[');
                        (open(), true)
                    }
                    Left::Open(rows, first) => (rows, first),
                };
                while text.len() < CHUNK {
                    let Some(row) = rows.next() else {
                        text.extend_from_slice(b"]\n");
                        return Some((Ok(text), Left::Over));
                    };
                    if !std::mem::replace(&mut first, false) {
                        text.push(b',');
                    }
                    let written = row.and_then(|row| Ok(serde_json::to_writer(&mut text, &row)?));
                    if let Err(error) = written {
                        return Some((Err(io::Error::other(format!("{error:#}"))), Left::Over));
                    }
                }
                Some((Ok(text), Left::Open(rows, first)))
            });
            made.await.ok().flatten()
        });
        let body = Body::from_stream(chunks);
        ([(header::CONTENT_TYPE, "application/json")], body).into_response()
    }
}

/// Lines of JSON, until either side closes.
pub(super) fn lines<T: Serialize>(
    rows: impl futures_util::Stream<Item = T> + Send + 'static,
) -> Response {
    let lines = rows.map(|row| {
        let mut line = serde_json::to_vec(&row)?;
        line.push(b'\n');
        Ok::<_, serde_json::Error>(line)
    });
    let body = Body::from_stream(lines);
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// What a broadcast says; of what was too fast, how much it was. `held` is dropped when nobody reads it any more.
pub(super) fn received<T: Clone + Send + 'static, Line: From<T>>(
    from: broadcast::Receiver<T>,
    lost: fn(u64) -> Line,
    held: impl Send + 'static,
) -> impl futures_util::Stream<Item = Line> + Send {
    stream::unfold((from, held), move |(mut from, held)| async move {
        let said = match from.recv().await {
            Ok(said) => said.into(),
            Err(broadcast::error::RecvError::Lagged(many)) => lost(many),
            Err(broadcast::error::RecvError::Closed) => return None,
        };
        Some((said, (from, held)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::Traced;

    #[tokio::test]
    async fn whoever_is_too_slow_is_told_how_much_was_lost() {
        let (sender, receiver) = broadcast::channel(2);
        for _ in 0..5 {
            sender.send(Traced::Lost(0)).expect("heard");
        }
        drop(sender);
        let said: Vec<_> = received(receiver, Traced::Lost, ()).collect().await;
        assert_eq!(said, [3, 0, 0].map(Traced::Lost));
    }
}
