//! The PROXY protocol's header (haproxy, doc/proxy-protocol.txt): version 1, text, and version 2, binary, for TCP; version 2
//! for UDP, in front of each datagram.

use std::net::{Ipv6Addr, SocketAddr};

pub use crate::publish::ProxyProtocol;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Stream = 1,
    Datagram = 2,
}

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
const IPV4: u8 = 0x10;
const IPV6: u8 = 0x20;

impl ProxyProtocol {
    /// What goes in front of a conversation of `client` with `frontend`; empty if nothing does.
    pub(super) fn header(
        self,
        transport: Transport,
        client: SocketAddr,
        frontend: SocketAddr,
    ) -> Vec<u8> {
        match (self, transport) {
            (Self::Off, _) | (Self::V1, Transport::Datagram) => Vec::new(),
            (Self::V1, Transport::Stream) => version1(client, frontend),
            (Self::V2, _) => version2(transport, client, frontend),
        }
    }
}

/// Section 2.1.
fn version1(client: SocketAddr, frontend: SocketAddr) -> Vec<u8> {
    let (from, to) = (client.port(), frontend.port());
    let line = match (client, frontend) {
        (SocketAddr::V4(client), SocketAddr::V4(frontend)) => {
            format!(
                "PROXY TCP4 {} {} {from} {to}\r\n",
                client.ip(),
                frontend.ip()
            )
        }
        (client, frontend) => {
            let (client, frontend) = (in_ipv6(client), in_ipv6(frontend));
            format!("PROXY TCP6 {client} {frontend} {from} {to}\r\n")
        }
    };
    line.into_bytes()
}

/// Section 2.2.
fn version2(transport: Transport, client: SocketAddr, frontend: SocketAddr) -> Vec<u8> {
    let mut header = SIGNATURE.to_vec();
    header.push(PROXY);
    match (client, frontend) {
        (SocketAddr::V4(client), SocketAddr::V4(frontend)) => {
            header.push(IPV4 | transport as u8);
            header.extend(12_u16.to_be_bytes());
            header.extend(client.ip().octets());
            header.extend(frontend.ip().octets());
        }
        (client, frontend) => {
            header.push(IPV6 | transport as u8);
            header.extend(36_u16.to_be_bytes());
            header.extend(in_ipv6(client).octets());
            header.extend(in_ipv6(frontend).octets());
        }
    }
    header.extend(client.port().to_be_bytes());
    header.extend(frontend.port().to_be_bytes());
    header
}

fn in_ipv6(address: SocketAddr) -> Ipv6Addr {
    match address {
        SocketAddr::V4(v4) => v4.ip().to_ipv6_mapped(),
        SocketAddr::V6(v6) => *v6.ip(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: ProxyProtocol, transport: Transport, ends: [&str; 2]) -> Vec<u8> {
        let [client, frontend] = ends.map(|text| text.parse().expect("a literal"));
        version.header(transport, client, frontend)
    }

    const V4: [&str; 2] = ["192.0.2.1:4000", "198.51.100.2:80"];
    const V6: [&str; 2] = ["[2001:db8::1]:4000", "[2001:db8::2]:80"];

    #[test]
    fn version_2_is_as_the_specification_lays_it_out() {
        let stream = header(ProxyProtocol::V2, Transport::Stream, V4);
        assert_eq!(&stream[..12], b"\r\n\r\n\0\r\nQUIT\n");
        assert_eq!(&stream[12..16], [0x21, 0x11, 0, 12]);
        assert_eq!(&stream[16..24], [192, 0, 2, 1, 198, 51, 100, 2]);
        assert_eq!(&stream[24..], [0x0f, 0xa0, 0, 80]);
        let stream = header(ProxyProtocol::V2, Transport::Stream, V6);
        assert_eq!((stream[13], stream.len()), (0x21, 16 + 36));
        let datagram = header(ProxyProtocol::V2, Transport::Datagram, V4);
        assert_eq!((datagram[13], datagram.len()), (0x12, 16 + 12));
        let datagram = header(ProxyProtocol::V2, Transport::Datagram, V6);
        assert_eq!(datagram[13], 0x22);
    }

    #[test]
    fn version_1_is_one_line() {
        let text = |ends| {
            String::from_utf8(header(ProxyProtocol::V1, Transport::Stream, ends)).expect("text")
        };
        assert_eq!(text(V4), "PROXY TCP4 192.0.2.1 198.51.100.2 4000 80\r\n");
        assert_eq!(text(V6), "PROXY TCP6 2001:db8::1 2001:db8::2 4000 80\r\n");
        assert!(header(ProxyProtocol::V1, Transport::Datagram, V4).is_empty());
        assert!(header(ProxyProtocol::Off, Transport::Stream, V4).is_empty());
    }
}
