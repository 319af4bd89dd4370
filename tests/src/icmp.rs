//! ICMP errors as tests speak of them: who sent one to whom, what it says, and the packet that it quotes, with
//! checksums that are complete and checked.

use std::net::IpAddr;

use anyhow::{Result, ensure};

use crate::frame::{Frame, Mac};

/// An ICMP or ICMPv6 error in an Ethernet frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IcmpError {
    pub source_mac: Mac,
    pub destination_mac: Mac,
    pub source: IpAddr,
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// ICMP's type.
    pub kind: u8,
    pub code: u8,
    /// What depends on the type: an MTU, a pointer, or zero.
    pub rest: u32,
    /// The packet, from its IP header on.
    pub quoted: Vec<u8>,
}

/// The first octets of a frame's packet: the IP header and so many more.
pub fn quote(frame: &Frame, octets: usize) -> Vec<u8> {
    let mut packet = frame.bytes().split_off(ETHERNET);
    packet.truncate(ip_length(frame.source.is_ipv4()) + octets);
    packet
}

const ETHERNET: usize = 14;
const ICMP: usize = 8;

fn ip_length(v4: bool) -> usize {
    if v4 { 20 } else { 40 }
}

impl IcmpError {
    /// Port unreachable about `frame`, from its destination, quoting everything.
    pub fn port_unreachable(frame: &Frame) -> Self {
        let v4 = frame.source.is_ipv4();
        Self {
            source_mac: frame.destination_mac,
            destination_mac: frame.source_mac,
            source: frame.destination.ip(),
            destination: frame.source.ip(),
            ttl: 64,
            kind: if v4 { 3 } else { 1 },
            code: if v4 { 3 } else { 4 },
            rest: 0,
            quoted: quote(frame, usize::MAX / 2),
        }
    }

    /// The bytes, with all checksums.
    pub fn bytes(&self) -> Vec<u8> {
        let mut message = vec![self.kind, self.code, 0, 0];
        message.extend(self.rest.to_be_bytes());
        message.extend(&self.quoted);
        let checksum = self.checksum(&message);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());

        let mut bytes = [self.destination_mac, self.source_mac].concat();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let length = 20 + message.len() as u16;
                let mut ip = vec![0x45, 0xc0];
                ip.extend(length.to_be_bytes());
                ip.extend([0x12, 0x34, 0, 0, self.ttl, 1, 0, 0]);
                ip.extend([source.octets(), destination.octets()].concat());
                let checksum = !sum(&ip);
                ip[10..12].copy_from_slice(&checksum.to_be_bytes());
                bytes.extend([0x08, 0x00]);
                bytes.extend(ip);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                bytes.extend((message.len() as u16).to_be_bytes());
                bytes.extend([58, self.ttl]);
                bytes.extend([source.octets(), destination.octets()].concat());
            }
            _ => panic!("an error has addresses of one family: {self:?}"),
        }
        bytes.extend(message);
        bytes
    }

    /// Reads one back.
    ///
    /// # Errors
    /// It is no ICMP, or a checksum of its own is wrong. What it quotes is compared by who reads it.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let v4 = bytes[12..14] == [0x08, 0x00];
        let l4 = ETHERNET + ip_length(v4);
        ensure!(bytes.len() >= l4 + ICMP, "too short");
        let ip = &bytes[ETHERNET..l4];
        let (protocol, ttl, source, destination, end) = if v4 {
            ensure!(sum(ip) == 0xffff, "wrong IPv4 header checksum");
            let (source, destination) = (octets(ip, 12), octets(ip, 16));
            let length = usize::from(u16::from_be_bytes(octets(ip, 2)));
            let (source, destination) = (
                IpAddr::from(source as [u8; 4]),
                IpAddr::from(destination as [u8; 4]),
            );
            (ip[9], ip[8], source, destination, ETHERNET + length)
        } else {
            let (source, destination) = (octets(ip, 8), octets(ip, 24));
            let length = usize::from(u16::from_be_bytes(octets(ip, 4)));
            let (source, destination) = (
                IpAddr::from(source as [u8; 16]),
                IpAddr::from(destination as [u8; 16]),
            );
            (ip[6], ip[7], source, destination, l4 + length)
        };
        ensure!(protocol == if v4 { 1 } else { 58 }, "not ICMP");
        ensure!(end <= bytes.len(), "the length is wrong");
        let message = &bytes[l4..end];
        let error = Self {
            source_mac: octets(bytes, 6),
            destination_mac: octets(bytes, 0),
            source,
            destination,
            ttl,
            kind: message[0],
            code: message[1],
            rest: u32::from_be_bytes(octets(message, 4)),
            quoted: message[ICMP..].to_vec(),
        };
        ensure!(error.checksum(message) == 0, "wrong ICMP checksum");
        Ok(error)
    }

    /// Of a message whose checksum is zero: the checksum. Of any other: zero, if it is right.
    fn checksum(&self, message: &[u8]) -> u16 {
        let mut covered = Vec::new();
        if let (IpAddr::V6(source), IpAddr::V6(destination)) = (self.source, self.destination) {
            covered.extend([source.octets(), destination.octets()].concat());
            covered.extend((message.len() as u32).to_be_bytes());
            covered.extend([0, 0, 0, 58]);
        }
        covered.extend(message);
        !sum(&covered)
    }
}

fn octets<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N]
        .try_into()
        .expect("a slice of this length")
}

/// The one's complement sum (RFC 1071).
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or_default()));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::Protocol;

    fn error(source: &str, destination: &str) -> IcmpError {
        let address = |text: &str| text.parse().expect("a literal");
        let frame = Frame::first(Protocol::Udp, address(source), address(destination));
        IcmpError::port_unreachable(&frame)
    }

    #[test]
    fn an_error_survives_the_round_trip() {
        for error in [
            error("192.0.2.1:4000", "198.51.100.2:80"),
            error("[2001:db8::1]:4000", "[2001:db8::2]:80"),
        ] {
            assert_eq!(IcmpError::parse(&error.bytes()).expect("an error"), error);
        }
    }

    #[test]
    fn a_wrong_checksum_is_noticed() {
        let mut bytes = error("192.0.2.1:4000", "198.51.100.2:80").bytes();
        *bytes.last_mut().expect("not empty") ^= 1;
        assert!(IcmpError::parse(&bytes).is_err());
    }
}
