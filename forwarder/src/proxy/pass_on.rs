//! Live conversations, passed on to the process that comes after this one: each is a message on a stream, its sockets and
//! pipes beside it (SCM_RIGHTS, unix(7)). The stream holds them while there is no process.

use std::{
    collections::BTreeSet,
    io::{self, IoSlice},
    net::SocketAddr,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::atomic::Ordering::Relaxed,
    time::Duration,
};

use nix::sys::socket::{MsgFlags, setsockopt, sockopt};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tracing::warn;

use super::{Idle, control::Local};
use crate::rights;

/// What a conversation is passed on as. Descriptors: of TCP the client, then the backend if there is one, then both ends of the
/// pipe of each way that has one; of UDP the backend.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Message {
    /// The name of its publish.
    pub(super) publish: String,
    pub(super) client: SocketAddr,
    pub(super) kind: Kind,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Kind {
    Tcp {
        /// The published port that it came to.
        port: u16,
        /// Publishes that it has passed.
        passed: u8,
        has_backend: bool,
        /// To the backend, and to the client.
        ways: [Way; 2],
    },
    Udp {
        /// The address that its publish's socket is bound to.
        bound: SocketAddr,
        local: Option<Local>,
        has_replied: bool,
    },
}

/// One direction of a TCP conversation.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Way {
    /// What was read and not written yet.
    pub(super) unsent: Vec<u8>,
    /// The same, in its pipe.
    pub(super) in_pipe: usize,
    pub(super) has_pipe: bool,
}

/// A conversation between two processes.
#[derive(Debug)]
pub(super) struct PassedOn {
    pub(super) message: Message,
    /// As the message says.
    pub(super) descriptors: Vec<OwnedFd>,
}

/// Descriptors that one conversation has at most.
const DESCRIPTORS: usize = 6;
/// Messages are not longer: two buffers of what is unsent, as JSON.
const LONGEST: u32 = 1 << 20;
/// For messages that wait to be read; where it takes a privilege that is missing, the kernel's own limit holds
/// (net.core.wmem_max).
const ROOM: usize = 1 << 30;

/// Both ends of a stream.
///
/// # Errors
/// As socketpair(2).
pub(super) fn stream() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let _ = setsockopt(&ours, sockopt::SndBufForce, &ROOM);
    ours.set_nonblocking(true)?;
    Ok((ours, theirs))
}

/// # Errors
/// There is no room.
pub(super) fn send(
    stream: &UnixStream,
    message: &Message,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let length = length.to_ne_bytes();
    let parts = [IoSlice::new(&length), IoSlice::new(&body)];
    let sent = rights::send(stream, &parts, descriptors, MsgFlags::empty())?;
    if sent < length.len() + body.len() {
        return Err(io::ErrorKind::WouldBlock.into()); // the rest would not be found
    }
    Ok(())
}

/// The next message, until there are no more.
///
/// # Errors
/// The stream is none of [`send`].
pub(super) fn receive(stream: &UnixStream) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
    let mut length = [0; 4];
    let (count, descriptors) =
        rights::receive::<DESCRIPTORS>(stream, &mut length, MsgFlags::MSG_WAITALL)?;
    match count {
        0 => return Ok(None),
        4 => {}
        _ => return Err(io::ErrorKind::UnexpectedEof.into()),
    }
    let length = u32::from_ne_bytes(length);
    if length > LONGEST {
        return Err(io::Error::other("a message that is too long"));
    }
    let mut body = vec![0; length as usize];
    io::Read::read_exact(&mut &*stream, &mut body)?;
    Ok(Some((serde_json::from_slice(&body)?, descriptors)))
}

/// How long conversations may take to leave.
const LEAVING: Duration = Duration::from_secs(2);

impl Idle {
    /// Whether a next process could be handed anything.
    pub fn has_store(&self) -> bool {
        self.common().store.is_there()
    }

    /// Waits until ports that were given up are free.
    pub fn settle(&self) {
        self.common().store.settle();
    }

    /// Keeps the sockets of publishes with these names no more for the next process.
    pub fn forget(&self, names: &BTreeSet<String>) {
        let store = &self.common().store;
        names.iter().for_each(|name| store.forget(name));
    }

    /// Keeps only the sockets of publishes with these names for the next process.
    pub fn retain(&self, is_known: impl Fn(&str) -> bool) {
        self.common().store.retain(is_known);
    }

    /// Passes all conversations on to the next process, with the control socket, and begins no more. Returns how many.
    ///
    /// # Errors
    /// As socketpair(2).
    pub async fn pass_on(&self, control: BorrowedFd<'_>) -> io::Result<usize> {
        let (ours, theirs) = stream()?;
        self.common().store.leave(theirs.as_fd(), control);
        Ok(self.pass_on_by(&ours).await)
    }

    pub(super) async fn pass_on_by(&self, stream: &UnixStream) -> usize {
        let common = self.common();
        let (sender, mut leaving) = mpsc::unbounded_channel();
        for conversation in std::mem::take(&mut *common.arrived())
            .into_values()
            .flatten()
        {
            let _ = sender.send(conversation);
        }
        common.passing_on.send_replace(Some(sender));
        common.changed();
        let deadline = tokio::time::Instant::now() + LEAVING;
        let mut count = 0;
        loop {
            let are_all = common.live.load(Relaxed) == 0;
            while let Ok(PassedOn {
                message,
                descriptors,
            }) = leaving.try_recv()
            {
                let descriptors: Vec<BorrowedFd<'_>> =
                    descriptors.iter().map(|it| it.as_fd()).collect();
                if let Err(error) = send(stream, &message, &descriptors) {
                    warn!("conversations end, as there is no room to pass them on: {error}");
                    return count;
                }
                count += 1;
            }
            if are_all || tokio::time::Instant::now() > deadline {
                return count;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Takes the conversations that come by a stream: each goes on once its publish is served. Returns how many.
    ///
    /// # Errors
    /// The stream is none of [`Idle::pass_on`].
    pub fn expect(&self, stream: OwnedFd) -> io::Result<usize> {
        let stream = UnixStream::from(stream);
        stream.set_nonblocking(false)?;
        let mut arrived = self.common().arrived();
        let mut count = 0;
        while let Some((message, descriptors)) = receive(&stream)? {
            let of_publish = arrived.entry(message.publish.clone()).or_default();
            of_publish.push(PassedOn {
                message,
                descriptors,
            });
            count += 1;
        }
        self.common().store.forget_conversations();
        Ok(count)
    }

    /// Ends those whose publish is served no more.
    pub fn expect_no_more(&self) {
        self.common().arrived().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_waits_for_whoever_reads_it_later() {
        let (ours, theirs) = stream().expect("a stream");
        let pipes: Vec<_> = (0..3).map(|_| io::pipe().expect("a pipe")).collect();
        for (number, (read, write)) in (0_u16..).zip(&pipes) {
            let way = |in_pipe| Way {
                unsent: vec![7; 16 << 10],
                in_pipe,
                ..Way::default()
            };
            let message = Message {
                publish: format!("p{number}"),
                client: ([192, 0, 2, 1], 1000 + number).into(),
                kind: Kind::Tcp {
                    port: 80,
                    passed: 1,
                    has_backend: true,
                    ways: [way(1), way(2)],
                },
            };
            send(
                &ours,
                &message,
                &[read.as_fd(), write.as_fd()][..usize::from(number)],
            )
            .expect("room");
        }
        drop((ours, pipes));
        for number in 0_u16..3 {
            let (message, descriptors) = receive(&theirs).expect("a message").expect("one more");
            assert_eq!(message.publish, format!("p{number}"));
            assert_eq!(message.client.port(), 1000 + number);
            assert_eq!(descriptors.len(), usize::from(number));
            let Kind::Tcp { ways, .. } = message.kind else {
                panic!("{:?}", message.kind);
            };
            assert_eq!((ways[0].in_pipe, ways[1].in_pipe), (1, 2));
            assert_eq!(ways[1].unsent, [7; 16 << 10]);
        }
        assert!(receive(&theirs).expect("the end").is_none());
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let (mut ours, theirs) = UnixStream::pair().expect("a stream");
        io::Write::write_all(&mut ours, &[255; 64]).expect("room");
        assert!(receive(&theirs).is_err());
    }
}
