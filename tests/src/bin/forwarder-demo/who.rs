//! What the page says of clients: where the one with an address is, and whom the backend sees for each.

use std::net::IpAddr;

use forwarder_tests::{
    clients::Place,
    topology::{
        Family::{V4, V6},
        Topology,
    },
};

/// What the page calls a place.
pub(crate) fn name(place: Place) -> &'static str {
    match place {
        Place::Machine => "machine",
        Place::Host => "host",
        Place::Container => "container",
        Place::Backend => "backend",
    }
}

/// The device by which packets of a place's clients come to the program.
pub(crate) fn device(place: Place) -> &'static str {
    match place {
        Place::Machine => "the uplink",
        Place::Host => "lo",
        Place::Container => "the client's veth",
        Place::Backend => "the backend's veth",
    }
}

/// Which client has which address.
#[derive(Debug, Default)]
pub(crate) struct Addresses(Vec<(IpAddr, Place)>);

impl Addresses {
    pub(crate) fn of(topology: &Topology) -> Self {
        let Topology {
            backend,
            peer,
            other,
            ptp,
            ..
        } = topology;
        let of_family = |family| {
            let containers = [peer, other, ptp];
            let gateways = [backend, other, ptp].map(|container| container.gateway(family));
            let mut addresses = vec![
                (topology.client_address(family), Place::Machine),
                (topology.host_address(family), Place::Host),
                (backend.address(family), Place::Backend),
            ];
            addresses.extend(gateways.map(|address| (address, Place::Host)));
            addresses.extend(containers.map(|it| (it.address(family), Place::Container)));
            addresses
        };
        Self([V4, V6].into_iter().flat_map(of_family).collect())
    }

    pub(crate) fn place(&self, address: IpAddr) -> Option<Place> {
        if address.is_loopback() {
            return Some(Place::Host);
        }
        let mut all = self.0.iter();
        all.find(|(known, _)| *known == address)
            .map(|&(_, place)| place)
    }
}

/// Why the backend sees a client of the fast path as it does.
pub(crate) fn why(place: Option<Place>, frontend: IpAddr) -> &'static str {
    match place {
        Some(Place::Machine) => "Another machine is seen with its own address.",
        Some(Place::Container) => "A container is seen with its own address.",
        Some(Place::Host) if frontend.is_loopback() => {
            "To the container, a loopback address means the container itself. So a client on the host is seen with the \
             host’s address on the container’s network."
        }
        Some(Place::Host) => {
            "A client on the host is seen with the address of the host that it connected to."
        }
        Some(Place::Backend) => {
            "The backend came to its own published port. Its answer to its own address would never pass the host, so it \
             is seen with the host’s address on its network."
        }
        None => "A client is seen with its own address wherever an answer to it can come back.",
    }
}

/// Why the backend sees a client of the userland proxy as it does.
pub(crate) const WHY_PROXY: &str = "The userland proxy accepts your connection and makes one of its own to the backend, \
     which sees the host’s address on its network.";
