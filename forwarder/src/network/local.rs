//! Whether an address is this host's own, and which of its own leads there, as the kernel routes it: also where there is no reader of
//! the network.

use std::{
    fs, io,
    net::{IpAddr, Ipv6Addr},
    ops::ControlFlow,
};

use netlink_packet_route::{
    RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use rtnetlink::RouteMessageBuilder;

use super::netlink::Socket;

/// Asks the kernel for the route to an address; local prefixes (`ip route add local`) count, too.
///
/// # Errors
/// The kernel refuses the socket. No route is no error.
pub fn is_local(address: IpAddr) -> io::Result<bool> {
    let route = route_to(address)?;
    Ok(route.is_some_and(|route| route.header.kind == RouteType::Local))
}

/// Whether an IPv6 address is this host's, or will be: while it is tentative (RFC 4862), no route leads to it yet.
pub fn is_ours(address: Ipv6Addr) -> bool {
    let listed = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    let digits = format!("{:032x} ", u128::from(address));
    let mut lines = listed.lines();
    lines.any(|line| line.starts_with(&digits)) || is_local(address.into()).unwrap_or(false)
}

/// The address of this host that connections to an address come from, unless they ask for another.
///
/// # Errors
/// The kernel refuses the socket. No route is no error.
pub fn source_towards(address: IpAddr) -> io::Result<Option<IpAddr>> {
    let attributes = route_to(address)?.into_iter().flat_map(|it| it.attributes);
    let mut sources = attributes.filter_map(|attribute| match attribute {
        RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => Some(v4.into()),
        RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => Some(v6.into()),
        _ => None,
    });
    Ok(sources.next())
}

fn route_to(address: IpAddr) -> io::Result<Option<RouteMessage>> {
    let socket = Socket::open()?;
    let request = match address {
        IpAddr::V4(v4) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .destination_prefix(v4, 32)
            .build(),
        IpAddr::V6(v6) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
            .destination_prefix(v6, 128)
            .build(),
    };
    let mut found = None;
    let asked = socket.ask(RouteNetlinkMessage::GetRoute(request), 0, |answer| {
        if let Some(RouteNetlinkMessage::NewRoute(route)) = answer {
            found = Some(route);
        }
        ControlFlow::Break(())
    });
    Ok(found.filter(|_| asked.is_ok()))
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

    #[test]
    fn loopback_is_reached_from_loopback() {
        let loopback: IpAddr = "127.0.0.1".parse().expect("a literal");
        let source = source_towards(loopback).expect("a netlink socket");
        assert_eq!(source, Some(loopback));
    }
}
