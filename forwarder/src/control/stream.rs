//! A connection of the control socket that also carries descriptors (SCM_RIGHTS, unix(7)): a client sends them with the
//! first octets of its request, and the server keeps what has come until the request asks for it.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd as _, OwnedFd},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use nix::sys::socket::MsgFlags;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

use crate::rights;

/// Descriptors that one request may bring. More are closed.
pub(super) const MOST: usize = 64;

/// What has come and is not taken yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Received(Arc<Mutex<Vec<OwnedFd>>>);

impl Received {
    pub(super) fn take(&self) -> Vec<OwnedFd> {
        let mut received = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *received)
    }

    fn add(&self, descriptor: OwnedFd) {
        let mut received = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if received.len() < MOST {
            received.push(descriptor);
        }
    }
}

#[derive(Debug)]
pub(super) struct Stream {
    inner: UnixStream,
    /// To go with the next octets.
    sending: Vec<OwnedFd>,
    pub(super) received: Received,
}

impl Stream {
    pub(super) fn new(inner: UnixStream, sending: Vec<OwnedFd>) -> Self {
        Self {
            inner,
            sending,
            received: Received::default(),
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (count, descriptors) =
            rights::receive::<MOST>(&self.inner, buffer, MsgFlags::MSG_DONTWAIT)?;
        descriptors.into_iter().for_each(|it| self.received.add(it));
        Ok(count)
    }

    fn send(&self, octets: &[u8]) -> io::Result<usize> {
        let descriptors: Vec<_> = self.sending.iter().map(|it| it.as_fd()).collect();
        let parts = [IoSlice::new(octets)];
        rights::send(&self.inner, &parts, &descriptors, MsgFlags::MSG_DONTWAIT)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.inner.poll_read_ready(context))?;
            let room = buffer.initialize_unfilled();
            match self.inner.try_io(Interest::READABLE, || self.receive(room)) {
                Ok(count) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        octets: &[u8],
    ) -> Poll<io::Result<usize>> {
        while !self.sending.is_empty() {
            ready!(self.inner.poll_write_ready(context))?;
            match self.inner.try_io(Interest::WRITABLE, || self.send(octets)) {
                Ok(count) => {
                    self.sending.clear();
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Pin::new(&mut self.inner).poll_write(context, octets)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
