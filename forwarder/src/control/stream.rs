//! A connection of the control socket that also carries descriptors (SCM_RIGHTS, unix(7)): a client sends them with the
//! first octets of its request, and the server keeps what has come until the request asks for it.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

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
        let mut room = nix::cmsg_space!([RawFd; MOST]);
        let mut slices = [IoSliceMut::new(buffer)];
        let message = recvmsg::<()>(
            self.inner.as_raw_fd(),
            &mut slices,
            Some(&mut room),
            MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
        )?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = control {
                for descriptor in descriptors {
                    // SAFETY: the kernel has just made this descriptor, for this process alone.
                    self.received
                        .add(unsafe { OwnedFd::from_raw_fd(descriptor) });
                }
            }
        }
        Ok(message.bytes)
    }

    fn send(&self, octets: &[u8]) -> io::Result<usize> {
        let descriptors: Vec<RawFd> = self.sending.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let slices = [IoSlice::new(octets)];
        Ok(sendmsg::<()>(
            self.inner.as_raw_fd(),
            &slices,
            &rights,
            flags,
            None,
        )?)
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
