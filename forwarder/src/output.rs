//! What commands print: tables for people. JSON comes as it is.

use std::{
    fmt::Write as _,
    net::{Ipv6Addr, SocketAddr},
};

use forwarder_common::reason::Reason;
use ipnet::IpNet;

use crate::daemon::{Counter, Endpoint, Listed, ListedFlow};

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

/// A line of the traced program with the device's name for its number, in the daemon's own network namespace.
pub fn name_device(line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let name = words
        .get(2)
        .and_then(|word| word.parse().ok())
        .and_then(|ifindex: u32| {
            let name = nix::net::if_::if_indextoname(ifindex)
                .ok()?
                .into_string()
                .ok()?;
            (!name.is_empty()).then_some(name)
        });
    match (words.as_slice(), name) {
        ([publish, reason, _, rest @ ..], Some(name)) => {
            format!("{publish} {reason} {name} {}", rest.join(" "))
        }
        _ => line.to_owned(),
    }
}

/// One packet of a trace. The program logs publish, reason, device, protocol, source address and port,
/// destination address and port.
pub fn trace(line: &str, id: Option<u32>, client: Option<IpNet>) -> Option<String> {
    let Some(packet) = Traced::parse(line) else {
        return Some(line.to_owned());
    };
    let seen = |network: IpNet| {
        network.contains(&packet.source.ip()) || network.contains(&packet.destination.ip())
    };
    if id.is_some_and(|id| id != packet.publish) || client.is_some_and(|network| !seen(network)) {
        return None;
    }
    let Traced {
        publish,
        reason,
        device,
        protocol,
        source,
        destination,
    } = packet;
    let publish = if publish == 0 {
        "-".into()
    } else {
        publish.to_string()
    };
    Some(format!(
        "{device:<8} publish {publish:<4} {protocol} {source} -> {destination}  {reason}"
    ))
}

struct Traced<'a> {
    publish: u32,
    reason: &'static str,
    device: &'a str,
    protocol: &'static str,
    source: SocketAddr,
    destination: SocketAddr,
}

impl<'a> Traced<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        let [
            publish,
            reason,
            device,
            protocol,
            source,
            source_port,
            destination,
            destination_port,
        ] = words.as_slice()
        else {
            return None;
        };
        let endpoint = |address: &str, port: &str| {
            let address: Ipv6Addr = address.parse().ok()?;
            Some(SocketAddr::new(address.to_canonical(), port.parse().ok()?))
        };
        Some(Self {
            publish: publish.parse().ok()?,
            reason: Reason::ALL.get(reason.parse::<usize>().ok()?)?.name(),
            device,
            protocol: if *protocol == "6" { "tcp" } else { "udp" },
            source: endpoint(source, source_port)?,
            destination: endpoint(destination, destination_port)?,
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

    #[test]
    fn a_trace_line_is_made_readable_and_filtered() {
        let line = "3 0 eth0 6 ::ffff:192.0.2.1 4000 ::ffff:198.51.100.2 80";
        let text = trace(line, None, None).expect("not filtered");
        assert_eq!(
            text,
            "eth0     publish 3    tcp 192.0.2.1:4000 -> 198.51.100.2:80  forwarded_original"
        );
        assert_eq!(trace(line, Some(4), None), None);
        assert!(trace(line, Some(3), "192.0.2.0/24".parse().ok()).is_some());
        assert_eq!(trace(line, None, "203.0.113.0/24".parse().ok()), None);
    }

    #[test]
    fn a_device_gets_its_name() {
        assert_eq!(name_device("3 0 1 6 x"), "3 0 lo 6 x");
        assert_eq!(name_device("3 0 99999 6 x"), "3 0 99999 6 x");
    }

    #[test]
    fn a_line_that_is_no_packet_is_shown_as_it_is() {
        assert_eq!(trace("lost 5", None, None).as_deref(), Some("lost 5"));
    }
}
