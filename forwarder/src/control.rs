//! The control socket: HTTP/1.1 and JSON. Nothing else knows the wire; the daemon sees [`Call`]s, and answers with the
//! API's own types.

pub mod api;
pub mod client;
pub mod server;
pub mod status;
mod stream;

use std::{net::IpAddr, os::fd::OwnedFd};

use ipnet::IpNet;
use tokio::sync::{broadcast, mpsc, oneshot};

use self::api::{Ending, Listed, NamedPublish, Problem, Reloaded, Traced};
use crate::{
    proxy::Reserved,
    publish::{ContainerPort, Id, Owner, Publish, Spec, spec::SpecError},
};

/// Whose request it is, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    pub pid: i32,
}

/// A publish that a client names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    Id(Id),
    Spec(Spec),
}

impl TryFrom<NamedPublish> for Named {
    type Error = SpecError;

    fn try_from(named: NamedPublish) -> Result<Self, SpecError> {
        match named {
            NamedPublish::Id(id) => Ok(Self::Id(id)),
            // In a query a number is a text.
            NamedPublish::Spec(text) => match text.parse() {
                Ok(id) => Ok(Self::Id(id)),
                Err(_) => text.parse().map(Self::Spec),
            },
        }
    }
}

/// What a client wants changed.
#[derive(Debug)]
pub enum Change {
    /// These beside what the owner has.
    Add(Vec<Publish>),
    /// Exactly these.
    Want(Vec<Publish>),
    /// These for as long as the connection lasts, some on sockets that are bound already.
    Lease(Vec<Publish>, Vec<OwnedFd>),
    /// Takes these back.
    Remove(Vec<Named>, Ending),
    /// Takes back these ports of a container, or all that lead to it if none is named.
    RemoveFrom {
        container: String,
        ports: Vec<ContainerPort>,
        ending: Ending,
    },
    /// Takes back all that the owner has.
    RemoveAll(Ending),
    /// Bans these sources, beside those that are, or if so asked in their place.
    Ban { bans: Vec<api::Ban>, all: bool },
    /// Takes bans back, from a publish or from all: those of an owner, or everybody's.
    Unban(Vec<IpNet>, Option<NamedPublish>, Option<Owner>),
    /// A container has these addresses now, and none if it has stopped.
    Follow {
        name: String,
        addresses: Vec<IpAddr>,
    },
    /// Another backend for a publish, in place.
    Replace(Id, api::AskedEndpoint),
}

/// A request, with the way back for its answer.
#[derive(Debug)]
pub enum Call {
    Change {
        owner: Option<Owner>,
        change: Change,
        by: Peer,
        answer: oneshot::Sender<Result<Changed, Problem>>,
    },
    Trace {
        answer: oneshot::Sender<Result<Trace, Problem>>,
    },
    Reload {
        by: Peer,
        answer: oneshot::Sender<Result<Reloaded, Problem>>,
    },
}

/// The publishes that a change was about, as they are now.
#[derive(Debug, Default)]
pub struct Changed {
    pub publishes: Vec<Listed>,
    /// Ends the lease when it is dropped.
    pub lease: Option<Lease>,
}

/// A lease that a connection holds.
#[derive(Debug)]
pub struct Lease {
    pub owner: Owner,
    pub ended: mpsc::UnboundedSender<Owner>,
    /// What its connection has open.
    pub files: Reserved,
}

impl Lease {
    /// Descriptors that the connection of a lease takes.
    pub const DESCRIPTORS: u64 = server::DESCRIPTORS;
}

impl Drop for Lease {
    fn drop(&mut self) {
        let _ = self.ended.send(self.owner.clone());
    }
}

/// Packets of a trace, for as long as it is not dropped.
#[derive(Debug)]
pub struct Trace {
    pub packets: broadcast::Receiver<Traced>,
    /// Told of the end, by being closed.
    pub ended: mpsc::Sender<()>,
}
