//! Every kind of client: who connects to which address of the host, and whom the backend sees. The matrix and the
//! demonstration go through them.

use std::net::IpAddr;

use crate::{
    netns::Netns,
    topology::{Container, Family, Topology},
};

/// Who connects, to which address, and where that leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    External,
    Localhost,
    HostLocal,
    HostGateway,
    HairpinSameBridge,
    HairpinGateway,
    HairpinOtherBridge,
    HairpinFromRouted,
    HairpinFromRoutedGateway,
    SelfHairpin,
    SelfHairpinGateway,
    // To a backend that has a routed veth and no bridge.
    ExternalToRouted,
    LocalhostToRouted,
    HostLocalToRouted,
    HairpinToRouted,
    SelfHairpinRouted,
}

/// Where a client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Machine,
    Host,
    Container,
    Backend,
}

/// A client as it is in one topology and family.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    /// In words.
    pub what: &'static str,
    pub place: Place,
    pub netns: &'a Netns,
    pub connects_to: IpAddr,
    pub backend: &'a Container,
    /// What the backend sees as the source when the packets take the fast path.
    pub seen: IpAddr,
}

impl Kind {
    pub fn client(self, topology: &Topology, family: Family) -> Client<'_> {
        let Topology {
            host,
            client,
            backend,
            peer,
            other,
            ptp,
            ..
        } = topology;
        let (own, lan) = (
            topology.client_address(family),
            topology.host_address(family),
        );
        let localhost = family.localhost();
        let (gateway, routed) = (backend.gateway(family), ptp.gateway(family));
        let address = |container: &Container| container.address(family);
        #[rustfmt::skip] // a table
        let (what, place, netns, connects_to, backend, seen) = match self {
            Self::External => ("another machine", Place::Machine, client, lan, backend, own),
            Self::Localhost => ("a process here, to loopback", Place::Host, host, localhost, backend, gateway),
            Self::HostLocal => ("a process here, to its own address", Place::Host, host, lan, backend, lan),
            Self::HostGateway => ("a process here, to the bridge", Place::Host, host, gateway, backend, gateway),
            Self::HairpinSameBridge => ("a container on the same bridge", Place::Container, &peer.netns, lan, backend, address(peer)),
            Self::HairpinGateway => ("a container on the same bridge", Place::Container, &peer.netns, gateway, backend, address(peer)),
            Self::HairpinOtherBridge => ("a container on another bridge", Place::Container, &other.netns, lan, backend, address(other)),
            Self::HairpinFromRouted => ("a container without a bridge", Place::Container, &ptp.netns, lan, backend, address(ptp)),
            Self::HairpinFromRoutedGateway => ("a container without a bridge", Place::Container, &ptp.netns, routed, backend, address(ptp)),
            Self::SelfHairpin => ("the backend itself", Place::Backend, &backend.netns, lan, backend, gateway),
            Self::SelfHairpinGateway => ("the backend itself", Place::Backend, &backend.netns, gateway, backend, gateway),
            Self::ExternalToRouted => ("another machine", Place::Machine, client, lan, ptp, own),
            Self::LocalhostToRouted => ("a process here, to loopback", Place::Host, host, localhost, ptp, routed),
            Self::HostLocalToRouted => ("a process here, to its own address", Place::Host, host, lan, ptp, lan),
            Self::HairpinToRouted => ("a container on a bridge", Place::Container, &backend.netns, lan, ptp, address(backend)),
            Self::SelfHairpinRouted => ("the backend itself", Place::Backend, &ptp.netns, lan, ptp, routed),
        };
        Client {
            what,
            place,
            netns,
            connects_to,
            backend,
            seen,
        }
    }
}

impl Client<'_> {
    /// Whether the backend sees its own port as well.
    pub fn keeps_its_port(&self) -> bool {
        matches!(self.place, Place::Machine | Place::Container)
    }
}
