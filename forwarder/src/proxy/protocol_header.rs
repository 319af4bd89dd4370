//! The PROXY protocol's header, version 2 (haproxy, doc/proxy-protocol.txt, section 2.2).

use std::net::SocketAddr;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;

/// The header for a TCP connection from `client` to `frontend`, which are of one family.
pub(super) fn tcp(client: SocketAddr, frontend: SocketAddr) -> Vec<u8> {
    let mut header = SIGNATURE.to_vec();
    header.push(PROXY);
    match (client, frontend) {
        (SocketAddr::V4(client), SocketAddr::V4(frontend)) => {
            header.push(TCP_OVER_IPV4);
            header.extend(12_u16.to_be_bytes());
            header.extend(client.ip().octets());
            header.extend(frontend.ip().octets());
        }
        (client, frontend) => {
            let octets = |address: SocketAddr| match address {
                SocketAddr::V4(v4) => v4.ip().to_ipv6_mapped().octets(),
                SocketAddr::V6(v6) => v6.ip().octets(),
            };
            header.push(TCP_OVER_IPV6);
            header.extend(36_u16.to_be_bytes());
            header.extend(octets(client));
            header.extend(octets(frontend));
        }
    }
    header.extend(client.port().to_be_bytes());
    header.extend(frontend.port().to_be_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_as_the_specification_lays_it_out() {
        let client = "192.0.2.1:4000".parse().expect("a literal");
        let header = tcp(client, "198.51.100.2:80".parse().expect("a literal"));
        assert_eq!(&header[12..16], [0x21, 0x11, 0, 12]);
        assert_eq!(&header[16..24], [192, 0, 2, 1, 198, 51, 100, 2]);
        assert_eq!(&header[24..], [0x0f, 0xa0, 0, 80]);
        let client = "[2001:db8::1]:4000".parse().expect("a literal");
        let header = tcp(client, "[2001:db8::2]:80".parse().expect("a literal"));
        assert_eq!((header[13], header.len()), (0x21, 16 + 36));
    }
}
