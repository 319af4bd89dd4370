//! Frames as tests speak of them: every field that a NAT may change, built and read by `etherparse`, with
//! checksums that are complete, so that wrong arithmetic shows.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};
use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TcpHeader, TransportSlice};

pub use crate::traffic::Protocol;

pub type Mac = [u8; 6];

/// A TCP segment or a UDP datagram in an Ethernet frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub protocol: Protocol,
    pub source_mac: Mac,
    pub destination_mac: Mac,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    pub flags: Flags,
    /// TCP's numbers. The acknowledgement is only in a frame whose flags say so.
    pub sequence: u32,
    pub acknowledgement: u32,
    /// UDP over IPv4 without a checksum (RFC 768).
    pub no_checksum: bool,
    pub payload: Vec<u8>,
}

/// TCP's flags that a NAT looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    pub syn: bool,
    pub ack: bool,
    pub fin: bool,
    pub rst: bool,
}

pub const SYN: Flags = Flags {
    syn: true,
    ack: false,
    fin: false,
    rst: false,
};
pub const SYN_ACK: Flags = Flags {
    syn: true,
    ack: true,
    fin: false,
    rst: false,
};
pub const ACK: Flags = Flags {
    syn: false,
    ack: true,
    fin: false,
    rst: false,
};
pub const FIN_ACK: Flags = Flags {
    syn: false,
    ack: true,
    fin: true,
    rst: false,
};
pub const RST: Flags = Flags {
    syn: false,
    ack: false,
    fin: false,
    rst: true,
};

pub const RST_ACK: Flags = Flags {
    syn: false,
    ack: true,
    fin: false,
    rst: true,
};

/// The first numbers of the two sides of a connection.
const ISN: [u32; 2] = [1_000_000, 2_000_000];

impl Frame {
    /// A SYN, or a datagram that says hello.
    pub fn first(protocol: Protocol, source: SocketAddr, destination: SocketAddr) -> Self {
        let tcp = protocol == Protocol::Tcp;
        Self {
            protocol,
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: [2, 0, 0, 0, 0, 2],
            source,
            destination,
            ttl: 64,
            flags: if tcp { SYN } else { Flags::default() },
            sequence: if tcp { ISN[0] } else { 0 },
            acknowledgement: if tcp { ISN[1] + 1 } else { 0 },
            no_checksum: false,
            payload: if tcp { Vec::new() } else { b"hello".to_vec() },
        }
    }

    /// The other direction, as an answer to this frame.
    pub fn reply(&self) -> Self {
        let opens = self.flags == SYN;
        Self {
            source_mac: self.destination_mac,
            destination_mac: self.source_mac,
            source: self.destination,
            destination: self.source,
            ttl: 64,
            flags: if opens { SYN_ACK } else { self.flags },
            sequence: self.acknowledgement.wrapping_sub(u32::from(opens)),
            acknowledgement: self.following(),
            ..self.clone()
        }
    }

    /// The number that TCP has behind this segment.
    fn following(&self) -> u32 {
        if self.protocol != Protocol::Tcp {
            return 0;
        }
        let flags = u32::from(self.flags.syn) + u32::from(self.flags.fin);
        self.sequence
            .wrapping_add(self.payload.len() as u32 + flags)
    }

    /// The same side's segment with other flags: the SYN comes before all others.
    pub fn with_flags(mut self, flags: Flags) -> Self {
        match (self.flags.syn, flags.syn) {
            (true, false) => self.sequence = self.sequence.wrapping_add(1),
            (false, true) => self.sequence = self.sequence.wrapping_sub(1),
            _ => {}
        }
        self.flags = flags;
        self
    }

    /// The datagram with a payload of which the checksum comes out as zero, so that 0xffff is sent (RFC 768).
    pub fn with_checksum_ffff(mut self) -> Self {
        self.payload = vec![0; 2];
        let checksum = if self.source.is_ipv4() { 40 } else { 60 };
        self.payload = self.bytes()[checksum..][..2].to_vec();
        self
    }

    /// The bytes, with all checksums.
    pub fn bytes(&self) -> Vec<u8> {
        let link = PacketBuilder::ethernet2(self.source_mac, self.destination_mac);
        let network = match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                link.ipv4(source.octets(), destination.octets(), self.ttl)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                link.ipv6(source.octets(), destination.octets(), self.ttl)
            }
            _ => panic!("a frame has addresses of one family: {self:?}"),
        };
        let (from, to) = (self.source.port(), self.destination.port());
        let mut bytes = Vec::new();
        match self.protocol {
            Protocol::Udp => network.udp(from, to).write(&mut bytes, &self.payload),
            Protocol::Tcp => {
                let mut tcp = TcpHeader::new(from, to, self.sequence, 65_000);
                tcp.acknowledgment_number = self.acknowledgement;
                (tcp.syn, tcp.ack) = (self.flags.syn, self.flags.ack);
                (tcp.fin, tcp.rst) = (self.flags.fin, self.flags.rst);
                let tcp = network.tcp_header(tcp);
                tcp.write(&mut bytes, &self.payload)
            }
        }
        .expect("a vector takes everything");
        if self.no_checksum {
            bytes[14 + 20 + 6..][..2].fill(0);
        }
        bytes
    }

    /// Reads a frame back.
    ///
    /// # Errors
    /// It is not TCP or UDP over IP over Ethernet, or a checksum in it is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let packet = SlicedPacket::from_ethernet(bytes).context("not a frame")?;
        let Some(etherparse::LinkSlice::Ethernet2(ethernet)) = &packet.link else {
            bail!("no Ethernet header");
        };
        let (source, destination, ttl) = match &packet.net {
            Some(NetSlice::Ipv4(ip)) => {
                let header = ip.header().to_header();
                let sum = header.calc_header_checksum();
                ensure!(header.header_checksum == sum, "wrong IPv4 header checksum");
                (
                    header.source.into(),
                    header.destination.into(),
                    header.time_to_live,
                )
            }
            Some(NetSlice::Ipv6(ip)) => {
                let header = ip.header().to_header();
                (
                    header.source.into(),
                    header.destination.into(),
                    header.hop_limit,
                )
            }
            _ => bail!("no IP header"),
        };
        let (source, destination): (IpAddr, IpAddr) = (source, destination);
        let mut frame = Self {
            protocol: Protocol::Udp,
            source_mac: ethernet.source(),
            destination_mac: ethernet.destination(),
            source: SocketAddr::new(source, 0),
            destination: SocketAddr::new(destination, 0),
            ttl,
            flags: Flags::default(),
            sequence: 0,
            acknowledgement: 0,
            no_checksum: false,
            payload: Vec::new(),
        };
        let (sum, right) = match &packet.transport {
            Some(TransportSlice::Tcp(tcp)) => {
                let header = tcp.to_header();
                frame.protocol = Protocol::Tcp;
                frame.source.set_port(header.source_port);
                frame.destination.set_port(header.destination_port);
                frame.flags = Flags {
                    syn: header.syn,
                    ack: header.ack,
                    fin: header.fin,
                    rst: header.rst,
                };
                frame.sequence = header.sequence_number;
                frame.acknowledgement = header.acknowledgment_number;
                frame.payload = tcp.payload().to_vec();
                let right = match (source, destination) {
                    (IpAddr::V4(s), IpAddr::V4(d)) => {
                        header.calc_checksum_ipv4_raw(s.octets(), d.octets(), &frame.payload)
                    }
                    (IpAddr::V6(s), IpAddr::V6(d)) => {
                        header.calc_checksum_ipv6_raw(s.octets(), d.octets(), &frame.payload)
                    }
                    _ => unreachable!("one header has both"),
                };
                (header.checksum, right?)
            }
            Some(TransportSlice::Udp(udp)) => {
                let header = udp.to_header();
                frame.source.set_port(header.source_port);
                frame.destination.set_port(header.destination_port);
                frame.payload = udp.payload().to_vec();
                frame.no_checksum = header.checksum == 0;
                let right = match (source, destination) {
                    (IpAddr::V4(s), IpAddr::V4(d)) => {
                        header.calc_checksum_ipv4_raw(s.octets(), d.octets(), &frame.payload)
                    }
                    (IpAddr::V6(s), IpAddr::V6(d)) => {
                        header.calc_checksum_ipv6_raw(s.octets(), d.octets(), &frame.payload)
                    }
                    _ => unreachable!("one header has both"),
                };
                (header.checksum, if frame.no_checksum { 0 } else { right? })
            }
            _ => bail!("neither TCP nor UDP"),
        };
        ensure!(
            sum == right,
            "transport checksum is {sum:#06x} and should be {right:#06x}"
        );
        Ok(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Frame {
        let address = |text: &str| text.parse().expect("a literal");
        Frame::first(
            Protocol::Udp,
            address("192.0.2.1:4000"),
            address("198.51.100.2:80"),
        )
    }

    #[test]
    fn a_frame_survives_the_round_trip() {
        assert_eq!(Frame::parse(&frame().bytes()).expect("a frame"), frame());
    }

    #[test]
    fn a_wrong_checksum_is_noticed() {
        let mut bytes = frame().bytes();
        *bytes.last_mut().expect("not empty") ^= 1;
        assert!(Frame::parse(&bytes).is_err());
    }
}
