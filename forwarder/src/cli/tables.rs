//! What commands print: tables for people. JSON comes as it is.

use std::{
    fmt::Write as _,
    net::{Ipv6Addr, SocketAddr},
};

use forwarder_common::reason::Reason;
use ipnet::IpNet;

use crate::daemon::{Counter, Endpoint, Listed, ListedFlow, delivery_name};

/// Rows under a header, columns as wide as they must be.
pub fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .chain([header[column].len()])
            .max()
    };
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut text = String::new();
    for row in std::iter::once(header.map(String::from)).chain(rows.iter().cloned()) {
        let line: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        let _ = writeln!(text, "{}", line.join("  ").trim_end());
    }
    text
}

fn endpoint(endpoint: &Endpoint) -> String {
    let ports = if endpoint.port == endpoint.end_port {
        endpoint.port.to_string()
    } else {
        format!("{}-{}", endpoint.port, endpoint.end_port)
    };
    match endpoint.address {
        None => format!("*:{ports}"),
        Some(address) if address.is_ipv6() => format!("[{address}]:{ports}"),
        Some(address) => format!("{address}:{ports}"),
    }
}

/// `forwarder list`.
pub fn list(publishes: &[Listed]) -> String {
    let rows: Vec<[String; 8]> = publishes
        .iter()
        .map(|p| {
            [
                p.id.to_string(),
                format!("{}/{}", endpoint(&p.frontend), p.protocol),
                endpoint(&p.backend),
                match &p.delivery {
                    Some(delivery) => format!("{} ({delivery})", p.datapath),
                    None => p.datapath.clone(),
                },
                p.flows.to_string(),
                p.packets.to_string(),
                p.bytes.to_string(),
                p.reason.clone().unwrap_or_default(),
            ]
        })
        .collect();
    table(
        [
            "ID", "FRONTEND", "BACKEND", "DATAPATH", "FLOWS", "PACKETS", "BYTES", "REASON",
        ],
        &rows,
    )
}

/// `forwarder flows`.
pub fn flows(flows: &[ListedFlow]) -> String {
    let rows: Vec<[String; 9]> = flows
        .iter()
        .map(|f| {
            [
                f.publish.to_string(),
                f.protocol.clone(),
                f.client.clone(),
                f.frontend.clone(),
                f.source.clone(),
                f.backend.clone(),
                f.state.clone(),
                format!("{} s", f.idle_seconds),
                format!("{}/{}", f.packets[0], f.packets[1]),
            ]
        })
        .collect();
    table(
        [
            "ID", "PROTO", "CLIENT", "FRONTEND", "SOURCE", "BACKEND", "STATE", "IDLE", "PACKETS",
        ],
        &rows,
    )
}

/// `forwarder stats`: the counters that are not zero.
pub fn stats(counters: &[Counter]) -> String {
    let rows: Vec<[String; 2]> = counters
        .iter()
        .filter(|counter| counter.packets > 0)
        .map(|counter| [counter.reason.clone(), counter.packets.to_string()])
        .collect();
    table(["REASON", "PACKETS"], &rows)
}

/// A line of the traced program with devices' names for their numbers, as they are in the daemon's own
/// network namespace.
pub fn name_devices(line: &str) -> String {
    let name = |word: &str| {
        let ifindex: u32 = word.parse().ok()?;
        let name = nix::net::if_::if_indextoname(ifindex)
            .ok()?
            .into_string()
            .ok()?;
        (!name.is_empty()).then_some(name)
    };
    let mut words: Vec<String> = line.split(' ').map(Into::into).collect();
    for at in [Traced::DEVICE, Traced::TO_DEVICE] {
        if let Some(word) = words.get_mut(at) {
            *word = name(word).unwrap_or_else(|| word.clone());
        }
    }
    words.join(" ")
}

/// One packet of a trace, if it is of the publish and from or to the network.
pub fn trace(line: &str, id: Option<u32>, client: Option<IpNet>) -> Option<String> {
    let Some(packet) = Traced::parse(line) else {
        return Some(line.to_owned());
    };
    let ends = [
        Some(packet.tuple),
        packet.rewritten.as_ref().map(|(tuple, ..)| *tuple),
    ];
    let seen = |network: IpNet| {
        let mut addresses = ends.iter().flatten().flatten();
        addresses.any(|end| network.contains(&end.ip()))
    };
    if id.is_some_and(|id| id != packet.publish) || client.is_some_and(|network| !seen(network)) {
        return None;
    }
    let Traced {
        publish,
        reason,
        device,
        protocol,
        tuple,
        rewritten,
    } = packet;
    let publish = if publish == 0 {
        "-".into()
    } else {
        publish.to_string()
    };
    let mut text = format!(
        "{device:<8} publish {publish:<4} {protocol} {} -> {}  {reason}",
        tuple[0], tuple[1]
    );
    if let Some((tuple, delivery, device)) = rewritten {
        let _ = write!(
            text,
            ": {} -> {} by {delivery} {device}",
            tuple[0], tuple[1]
        );
    }
    Some(text)
}

/// The program's words: publish, reason, device, protocol, source address and port, destination address and
/// port; and of a forwarded packet the same four after the rewrite, delivery and device.
struct Traced<'a> {
    publish: u32,
    reason: &'static str,
    device: &'a str,
    protocol: &'static str,
    tuple: [SocketAddr; 2],
    rewritten: Option<([SocketAddr; 2], &'static str, &'a str)>,
}

impl<'a> Traced<'a> {
    const DEVICE: usize = 2;
    const TO_DEVICE: usize = 13;

    fn parse(line: &'a str) -> Option<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        let endpoint = |at: usize| {
            let address: Ipv6Addr = words.get(at)?.parse().ok()?;
            Some(SocketAddr::new(
                address.to_canonical(),
                words.get(at + 1)?.parse().ok()?,
            ))
        };
        let tuple = |at: usize| Some([endpoint(at)?, endpoint(at + 2)?]);
        let rewritten = tuple(8).and_then(|tuple| {
            let delivery = delivery_name(words.get(12)?.parse().ok()?)?;
            Some((tuple, delivery, *words.get(Self::TO_DEVICE)?))
        });
        Some(Self {
            publish: words.first()?.parse().ok()?,
            reason: Reason::ALL
                .get(words.get(1)?.parse::<usize>().ok()?)?
                .name(),
            device: words.get(Self::DEVICE)?,
            protocol: if *words.get(3)? == "6" { "tcp" } else { "udp" },
            tuple: tuple(4)?,
            rewritten,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let text = table(["A", "LONG"], &[["aaa".into(), "b".into()]]);
        assert_eq!(text, "A    LONG\naaa  b\n");
    }

    const FORWARDED: &str = "3 0 eth0 6 ::ffff:192.0.2.1 4000 ::ffff:198.51.100.2 8080 \
                             ::ffff:192.0.2.1 4000 ::ffff:172.31.0.2 80 1 veth0";

    #[test]
    fn a_trace_says_what_was_done() {
        let text = "eth0     publish 3    tcp 192.0.2.1:4000 -> 198.51.100.2:8080  forwarded_original: \
                    192.0.2.1:4000 -> 172.31.0.2:80 by peer veth0";
        assert_eq!(trace(FORWARDED, None, None).as_deref(), Some(text));
        let passed = "0 5 lo 17 ::1 4000 fd00::1 53";
        let text = format!(
            "lo       publish -    udp [::1]:4000 -> [fd00::1]:53  {}",
            Reason::ALL[5].name()
        );
        assert_eq!(trace(passed, None, None), Some(text));
    }

    #[test]
    fn a_trace_is_of_one_publish_or_network() {
        assert!(trace(FORWARDED, Some(3), "192.0.2.0/24".parse().ok()).is_some());
        assert_eq!(trace(FORWARDED, Some(4), None), None);
        assert!(trace(FORWARDED, None, "172.31.0.0/24".parse().ok()).is_some());
        assert_eq!(trace(FORWARDED, None, "203.0.113.0/24".parse().ok()), None);
    }

    #[test]
    fn devices_get_their_names() {
        assert_eq!(name_devices("3 0 1 6"), "3 0 lo 6");
        assert_eq!(name_devices("3 0 99999 6"), "3 0 99999 6");
        assert_eq!(
            name_devices("0 0 1 0 a 0 a 0 a 0 a 0 1 1"),
            "0 0 lo 0 a 0 a 0 a 0 a 0 1 lo"
        );
    }

    #[test]
    fn a_line_that_is_no_packet_is_shown_as_it_is() {
        assert_eq!(trace("lost 5", None, None).as_deref(), Some("lost 5"));
    }
}
