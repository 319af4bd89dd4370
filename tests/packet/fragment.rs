//! Datagrams in parts: the later ones have no ports, and go where the first went.

use forwarder_tests::frame::{Frame, Protocol};

use crate::bench::{Bench, REDIRECT, at, bench};

/// A datagram's two halves: eight bytes of UDP header and eight of data, and the rest.
fn halves(frame: &Frame) -> [Vec<u8>; 2] {
    const CUT: usize = 16;
    let whole = frame.bytes();
    let v4 = frame.source.is_ipv4();
    let l4 = if v4 { 34 } else { 54 };
    [
        (0..l4 + CUT, 0, true),
        (l4 + CUT..whole.len(), CUT / 8, false),
    ]
    .map(|(range, offset, more)| {
        let data = &whole[range.start.max(l4)..range.end];
        let mut part = whole[..l4].to_vec();
        if v4 {
            part[16..18].copy_from_slice(&(20 + data.len() as u16).to_be_bytes());
            part[18..20].copy_from_slice(&0x1234_u16.to_be_bytes());
            let field = offset as u16 | u16::from(more) << 13;
            part[20..22].copy_from_slice(&field.to_be_bytes());
            part[24..26].fill(0);
            let header = etherparse::Ipv4HeaderSlice::from_slice(&part[14..34]).unwrap();
            let sum = header.to_header().calc_header_checksum();
            part[24..26].copy_from_slice(&sum.to_be_bytes());
        } else {
            part[18..20].copy_from_slice(&(8 + data.len() as u16).to_be_bytes());
            let next = std::mem::replace(&mut part[20], 44);
            let field = (offset as u16) << 3 | u16::from(more);
            part.extend([next, 0]);
            part.extend(field.to_be_bytes());
            part.extend(0x1234_5678_u32.to_be_bytes());
        }
        part.extend(data);
        part
    })
}

/// The datagram that two parts make, as the receiver puts it together.
fn reassemble(frame: &Frame, [first, later]: &[Vec<u8>; 2]) -> Frame {
    let v4 = frame.source.is_ipv4();
    let (l4, headers) = if v4 { (34, 34) } else { (54, 62) };
    let mut whole = first[..l4].to_vec();
    whole.extend(&first[headers..]);
    whole.extend(&later[headers..]);
    let length = whole.len() as u16;
    if v4 {
        whole[16..18].copy_from_slice(&(length - 14).to_be_bytes());
        whole[20..22].fill(0);
        whole[24..26].fill(0);
        let header = etherparse::Ipv4HeaderSlice::from_slice(&whole[14..34]).unwrap();
        let sum = header.to_header().calc_header_checksum();
        whole[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        whole[18..20].copy_from_slice(&(length - 54).to_be_bytes());
        whole[20] = 17;
    }
    Frame::parse(&whole).unwrap()
}

fn carried(bench: &Bench, frame: &Frame, ifindex: u32) -> Frame {
    let parts = halves(frame).map(|part| {
        let outcome = bench.send_bytes(&part, ifindex);
        assert_eq!(outcome.action, REDIRECT, "{outcome:?}");
        outcome.bytes
    });
    reassemble(frame, &parts)
}

fn both_ways(client: &str, host: &str, backend: &str) {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, backend);
        let mut sent = Frame::first(Protocol::Udp, at(client), at(host));
        sent.payload = (0..100).collect();
        let forwarded = carried(bench, &sent, bench.uplink);
        assert_eq!(
            (forwarded.source, forwarded.destination),
            (at(client), at(backend))
        );
        assert_eq!(forwarded.payload, sent.payload);
        let answer = carried(bench, &forwarded.reply(), bench.container);
        assert_eq!((answer.source, answer.destination), (at(host), at(client)));
        assert_eq!(answer.payload, sent.payload);
    });
}

#[test]
fn ipv4_fragments_follow_their_first() {
    both_ways("198.51.100.9:4000", "198.51.100.2:53", "172.31.0.2:5353");
}

#[test]
fn ipv6_fragments_follow_their_first() {
    both_ways(
        "[2001:db8:100::9]:4000",
        "[2001:db8:100::2]:53",
        "[fd00:31::2]:5353",
    );
}

#[test]
fn a_fragment_without_its_first_is_the_stacks() {
    for (client, host, backend) in [
        ("198.51.100.9:4000", "198.51.100.2:53", "172.31.0.2:53"),
        (
            "[2001:db8:100::9]:4000",
            "[2001:db8:100::2]:53",
            "[fd00:31::2]:53",
        ),
    ] {
        bench(|bench| {
            bench.publish(Protocol::Udp, 53, backend);
            let mut frame = Frame::first(Protocol::Udp, at(client), at(host));
            frame.payload = vec![1; 100];
            let [_, later] = halves(&frame);
            bench
                .send_bytes(&later, bench.uplink)
                .passed(&later, "fragment");
        });
    }
}

#[test]
fn the_parts_of_a_datagram_that_is_not_ours_stay_together() {
    bench(|bench| {
        bench.publish(Protocol::Udp, 53, "172.31.0.2:53");
        let elsewhere = at("198.51.100.2:54");
        let mut frame = Frame::first(Protocol::Udp, at("198.51.100.9:4000"), elsewhere);
        frame.payload = vec![1; 100];
        let [first, later] = halves(&frame);
        bench.send_bytes(&first, bench.uplink).passed(&first, "");
        bench
            .send_bytes(&later, bench.uplink)
            .passed(&later, "fragment");
    });
}
