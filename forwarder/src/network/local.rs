//! Whether an address is this host's own, which of its own leads there as the kernel routes it, and whether a device is there: also
//! where there is no reader of the network.

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

/// The name of a device of the own network namespace; `None` once it has gone, for which nix has an empty name.
pub fn device_name(ifindex: u32) -> Option<String> {
    let name = nix::net::if_::if_indextoname(ifindex).ok()?;
    let name = name.into_string().ok()?;
    (!name.is_empty()).then_some(name)
}

/// Of a route in /proc/net/ipv6_route (include/uapi/linux/ipv6_route.h).
const RTF_LOCAL: u32 = 0x8000_0000;

/// Whether an IPv6 address is this host's, or will be: while it is tentative (RFC 4862), no route leads to it yet. Asked of /proc,
/// as a docker-proxy is to be small, and asks for one address.
pub fn is_ours(address: Ipv6Addr) -> bool {
    let any = |file: &str, is_it: &dyn Fn(&str) -> bool| {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{file}"));
        text.is_ok_and(|text| text.lines().any(is_it))
    };
    let digits = format!("{:032x} ", u128::from(address));
    any("if_inet6", &|line| line.starts_with(&digits))
        || any("ipv6_route", &|line| {
            leads_here(line, address).unwrap_or(false)
        })
}

/// Whether a line of /proc/net/ipv6_route is of a local route to an address.
fn leads_here(line: &str, address: Ipv6Addr) -> Option<bool> {
    let mut words = line.split_whitespace();
    let destination = u128::from_str_radix(words.next()?, 16).ok()?;
    let length = u32::from_str_radix(words.next()?, 16).ok()?;
    let flags = u32::from_str_radix(words.nth(6)?, 16).ok()?;
    let differs = (u128::from(address) ^ destination).leading_zeros() < length;
    Some(flags & RTF_LOCAL != 0 && !differs)
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
    fn a_local_prefix_is_told_from_other_routes() {
        let line = |flags: &str| {
            let zeros = "0".repeat(32);
            format!(
                "20010db8000500000000000000000000 40 {zeros} 00 {zeros} 00000400 00000001 00000000 {flags}       lo"
            )
        };
        let leads = |text: &str, flags| leads_here(&line(flags), text.parse().expect("a literal"));
        assert_eq!(leads("2001:db8:5::7", "80000001"), Some(true));
        assert_eq!(leads("2001:db8:6::7", "80000001"), Some(false));
        assert_eq!(leads("2001:db8:5::7", "00000001"), Some(false));
        assert_eq!(leads_here("", Ipv6Addr::LOCALHOST), None);
    }

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
