//! Who is served at once. A client has one of so many places while it asks and is answered, and must read meanwhile. What has no
//! end needs none: a lease is a publish's, and those that follow events or packets are counted for themselves.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::OwnedSemaphorePermit,
    time::{Sleep, sleep},
};

use super::{PATIENCE, Problem, Shared, problem};

/// Clients at once; more wait to be accepted.
pub(super) const PLACES: usize = 256;
/// Clients at once that follow something; more are refused.
pub(super) const FOLLOWERS: usize = 256;

/// A client's place. Clones stand for the same.
#[derive(Clone, Debug)]
pub(super) struct Place(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl Place {
    pub(super) fn new(permit: OwnedSemaphorePermit) -> Self {
        Self(Arc::new(Mutex::new(Some(permit))))
    }

    fn permit(&self) -> MutexGuard<'_, Option<OwnedSemaphorePermit>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets another client have it.
    pub(super) fn give_back(&self) {
        *self.permit() = None;
    }

    fn is_held(&self) -> bool {
        self.permit().is_some()
    }
}

impl Shared {
    /// Has a client follow something in place of having its place, until what is returned is dropped.
    pub(super) fn follower(&self, place: &Place) -> Result<OwnedSemaphorePermit, Problem> {
        let follower = self.followers.clone().try_acquire_owned();
        let follower = follower.map_err(|_| {
            let message = format!("{FOLLOWERS} clients follow something already; end one of them");
            problem(503, "Too many", &message)
        })?;
        place.give_back();
        Ok(follower)
    }
}

/// A connection whose client has to read for as long as it has its place.
#[derive(Debug)]
pub(super) struct Patient<S> {
    inner: S,
    place: Place,
    /// Since it takes nothing.
    waits: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    pub(super) const fn new(inner: S, place: Place) -> Self {
        Self {
            inner,
            place,
            waits: None,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        octets: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, octets);
        if written.is_ready() || !self.place.is_held() {
            self.waits = None;
            return written;
        }
        let waits = self.waits.get_or_insert_with(|| Box::pin(sleep(PATIENCE)));
        let is_over = waits.as_mut().poll(context);
        is_over.map(|()| Err(io::ErrorKind::TimedOut.into()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
