//! Backends' answers that the program cannot send on: in fragments that come out of order, since it can translate a later one
//! only if it knows the first, and those that are longer than the client's way takes. It hands them over here; put
//! together, they are sent on as one datagram, from the frontend, which the kernel cuts up as it has to.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use etherparse::{
    IpNumber, NetSlice, SlicedPacket, TransportSlice, UdpHeader, UdpSlice, defrag::IpDefragPool,
};
use forwarder_common::{
    checksum::{add, fold},
    tuple::{Tuple, UDP},
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::{Duration, Instant};
use tracing::debug;

use super::Daemon;

/// As `PATIENCE` of the program.
const PATIENCE: Duration = Duration::from_secs(30);
/// After so many fragments all that wait are forgotten, whose number nobody counts: they take no more memory than that.
const MOST: usize = 4096;

/// A backend's datagram.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Datagram {
    source: SocketAddr,
    destination: SocketAddr,
    payload: Vec<u8>,
    /// Octets of each datagram but the last, if the kernel has made one of several; else 0.
    segment: usize,
}

impl Datagram {
    /// The same, of several that the kernel has made one of; of 0 for one.
    pub(super) fn of_segments(mut self, segment: usize) -> Self {
        self.segment = segment;
        self
    }

    /// What each datagram carries.
    fn payloads(&self) -> impl Iterator<Item = &[u8]> {
        let whole = self.payload.len().max(1);
        self.payload.chunks(if self.segment == 0 {
            whole
        } else {
            self.segment
        })
    }
}

/// Fragments whose datagrams are not complete.
#[derive(Default)]
pub(super) struct Fragments {
    pool: IpDefragPool<Instant>,
    taken: usize,
}

impl Fragments {
    /// Takes a frame, and returns the datagram that it completes.
    pub(super) fn add(&mut self, frame: &[u8]) -> Option<Datagram> {
        let now = Instant::now();
        if self.taken >= MOST {
            *self = Self::default();
        }
        self.taken += 1;
        self.pool
            .retain(|since| now.duration_since(*since) < PATIENCE);
        let packet = SlicedPacket::from_ethernet(frame).ok()?;
        let (source, destination) = addresses(&packet)?;
        let put_together;
        let udp = if let Some(TransportSlice::Udp(udp)) = packet.transport {
            // Not in parts. Of a container's own, a device would complete the checksum (CHECKSUM_PARTIAL).
            if udp.checksum() == partial(source, destination, udp.slice().len())? {
                return Some(datagram(&udp, source, destination));
            }
            udp
        } else {
            put_together = self.pool.process_sliced_packet(&packet, now, ()).ok()??;
            if put_together.ip_number != IpNumber::UDP {
                return None;
            }
            UdpSlice::from_slice(&put_together.payload).ok()?
        };
        // Whoever gets it sees a new checksum, so this one must have been right.
        let right = checksum(&udp.to_header(), source, destination, udp.payload())?;
        if udp.checksum() != 0 && udp.checksum() != right {
            return None;
        }
        Some(datagram(&udp, source, destination))
    }
}

fn datagram(udp: &UdpSlice<'_>, source: IpAddr, destination: IpAddr) -> Datagram {
    Datagram {
        source: SocketAddr::new(source, udp.source_port()),
        destination: SocketAddr::new(destination, udp.destination_port()),
        payload: udp.payload().to_vec(),
        segment: 0,
    }
}

/// The sum of the pseudo header (RFC 768), which stands in the place of a checksum that is yet to be completed; `None` of
/// what is longer than a datagram.
fn partial(source: IpAddr, destination: IpAddr, length: usize) -> Option<u16> {
    let words = |address: IpAddr| match address {
        IpAddr::V4(v4) => vec![u32::from(v4)],
        IpAddr::V6(v6) => {
            let bits = u128::from(v6);
            [96, 64, 32, 0].map(|shift| (bits >> shift) as u32).to_vec()
        }
    };
    let addresses = words(source).into_iter().chain(words(destination));
    let rest = u32::from(u16::try_from(length).ok()?) + u32::from(UDP);
    Some(fold(addresses.fold(rest, add)))
}

fn addresses(packet: &SlicedPacket<'_>) -> Option<(IpAddr, IpAddr)> {
    match packet.net.as_ref()? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            Some((
                header.source_addr().into(),
                header.destination_addr().into(),
            ))
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            Some((
                header.source_addr().into(),
                header.destination_addr().into(),
            ))
        }
        NetSlice::Arp(_) => None,
    }
}

impl Daemon {
    /// Sends a backend's datagram to the client of its flow, if it is of one.
    pub(super) fn answer_client(&self, datagram: &Datagram) {
        match self.client(datagram) {
            Ok(Some((frontend, client))) => {
                for payload in datagram.payloads() {
                    if let Err(error) = send(frontend, client, payload) {
                        debug!(
                            "send a datagram of {} to {client}: {error:#}",
                            datagram.source
                        );
                    }
                }
            }
            Ok(None) => {}
            Err(error) => debug!("{error:#}"),
        }
    }

    /// The frontend and the client of the flow that this answers.
    fn client(&self, datagram: &Datagram) -> Result<Option<(SocketAddr, SocketAddr)>> {
        let Some(datapath) = &self.datapath else {
            return Ok(None);
        };
        let key = Tuple {
            source: datagram.destination.ip().into(),
            destination: datagram.source.ip().into(),
            source_port: datagram.destination.port().to_be(),
            destination_port: datagram.source.port().to_be(),
            protocol: UDP.into(),
        };
        let flow = datapath.maps.flows.get(&key)?;
        Ok(flow.map(|flow| {
            let (client_port, frontend_port) = flow.ports();
            let frontend = (flow.frontend, frontend_port);
            let [frontend, client] = [frontend, (flow.client, client_port)]
                .map(|(address, port)| SocketAddr::new(address.into(), u16::from_be(port)));
            (frontend, client)
        }))
    }
}

/// The checksum (RFC 768, RFC 8200 section 8.1); `None` if the addresses are of two families, or the payload is too long.
fn checksum(
    header: &UdpHeader,
    source: IpAddr,
    destination: IpAddr,
    payload: &[u8],
) -> Option<u16> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => header
            .calc_checksum_ipv4_raw(source.octets(), destination.octets(), payload)
            .ok(),
        (IpAddr::V6(source), IpAddr::V6(destination)) => header
            .calc_checksum_ipv6_raw(source.octets(), destination.octets(), payload)
            .ok(),
        _ => None,
    }
}

/// Sends one datagram from a port that a socket of ours has already: by a raw socket (raw(7)), which takes the UDP header
/// as it is. The kernel routes it and cuts it up.
fn send(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Result<()> {
    let mut header = UdpHeader::without_ipv4_checksum(from.port(), to.port(), payload.len())?;
    header.checksum = checksum(&header, from.ip(), to.ip(), payload).context("no checksum")?;
    let socket = Socket::new(Domain::for_address(from), Type::RAW, Some(Protocol::UDP))
        .context("open a raw socket")?;
    socket.bind(&SocketAddr::new(from.ip(), 0).into())?;
    let datagram = [&header.to_bytes()[..], payload].concat();
    socket.send_to(&datagram, &SocketAddr::new(to.ip(), 0).into())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use etherparse::{IpFragOffset, Ipv4Header, PacketBuilder};

    use super::*;

    /// A datagram's two fragments; the second begins behind the UDP header.
    fn fragments(spoil: bool) -> [Vec<u8>; 2] {
        let mut whole = Vec::new();
        PacketBuilder::ipv4([172, 31, 0, 2], [198, 51, 100, 9], 64)
            .udp(53, 4000)
            .write(&mut whole, b"answer")
            .expect("a short datagram");
        whole[26] ^= u8::from(spoil);
        [(20..28, true), (28..34, false)].map(|(part, more)| {
            let mut ip = Ipv4Header {
                source: [172, 31, 0, 2],
                destination: [198, 51, 100, 9],
                protocol: IpNumber::UDP,
                identification: 7,
                dont_fragment: false,
                more_fragments: more,
                fragment_offset: IpFragOffset::try_new(u16::from(!more)).expect("small"),
                time_to_live: 64,
                total_len: 20 + part.len() as u16,
                ..Ipv4Header::default()
            };
            ip.header_checksum = ip.calc_header_checksum();
            let ethernet = [&[0; 12][..], &[8, 0]].concat();
            [&ethernet[..], &ip.to_bytes(), &whole[part]].concat()
        })
    }

    #[test]
    fn two_parts_in_any_order_are_a_datagram() {
        for order in [[0, 1], [1, 0]] {
            let mut waiting = Fragments::default();
            let [first, second] = order.map(|at| waiting.add(&fragments(false)[at]));
            assert_eq!(first, None);
            let datagram = second.expect("complete");
            assert_eq!(datagram.source.to_string(), "172.31.0.2:53");
            assert_eq!(datagram.destination.to_string(), "198.51.100.9:4000");
            assert_eq!(datagram.payload, b"answer");
        }
    }

    #[test]
    fn a_whole_datagram_needs_no_others_and_its_checksum_may_be_incomplete() {
        let (source, destination) = ([172, 31, 0, 2], [198, 51, 100, 9]);
        let mut whole = Vec::new();
        PacketBuilder::ethernet2([0; 6], [0; 6])
            .ipv4(source, destination, 64)
            .udp(53, 4000)
            .write(&mut whole, b"answer")
            .expect("a short datagram");
        let add = |frame: &[u8]| Fragments::default().add(frame).map(|it| it.payload);
        assert_eq!(add(&whole).expect("complete"), b"answer");
        let sum = partial(source.into(), destination.into(), 8 + 6).expect("short");
        whole[40..42].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(add(&whole).expect("incomplete"), b"answer");
        whole[40] ^= 1;
        assert_eq!(add(&whole), None);
    }

    #[test]
    fn one_with_a_wrong_checksum_is_dropped() {
        let mut waiting = Fragments::default();
        for part in fragments(true) {
            assert_eq!(waiting.add(&part), None);
        }
    }
}
