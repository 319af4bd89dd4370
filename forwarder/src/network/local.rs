//! Whether an address is this host's own, as the kernel routes it: also where there is no reader of the network.

use std::{io, net::IpAddr, ops::ControlFlow};

use netlink_packet_route::{RouteNetlinkMessage, route::RouteType};
use rtnetlink::RouteMessageBuilder;

use super::netlink::Socket;

/// Asks the kernel for the route to an address; local prefixes (`ip route add local`) count, too.
///
/// # Errors
/// The kernel refuses the socket. No route is no error.
pub fn is_local(address: IpAddr) -> io::Result<bool> {
    let socket = Socket::open()?;
    let request = match address {
        IpAddr::V4(v4) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .destination_prefix(v4, 32)
            .build(),
        IpAddr::V6(v6) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
            .destination_prefix(v6, 128)
            .build(),
    };
    let mut local = false;
    let asked = socket.ask(RouteNetlinkMessage::GetRoute(request), 0, |answer| {
        if let Some(RouteNetlinkMessage::NewRoute(route)) = answer {
            local = route.header.kind == RouteType::Local;
        }
        ControlFlow::Break(())
    });
    Ok(asked.is_ok() && local)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_local_and_a_documentation_address_is_not() {
        let is_local =
            |text: &str| is_local(text.parse().expect("a literal")).expect("a netlink socket");
        assert!(is_local("127.0.0.1") && is_local("127.200.0.7"));
        assert!(!is_local("203.0.113.77") && !is_local("2001:db8::77"));
    }
}
