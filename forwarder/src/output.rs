//! What commands print: tables for people. JSON comes as it is.

use std::{fmt::Write as _, net::Ipv6Addr};

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

/// One packet of a trace. The program logs numbers: publish, reason, ifindex, protocol, source address
/// and port, destination address and port.
pub fn trace(line: &str, id: Option<u32>, client: Option<IpNet>) -> Option<String> {
    let mut words = line.split(' ');
    let mut number = || words.next()?.parse::<u32>().ok();
    let Some(((publish, reason), (ifindex, protocol))) =
        number().zip(number()).zip(number().zip(number()))
    else {
        return Some(line.to_owned());
    };
    let mut address = || {
        let v6: Ipv6Addr = words.next()?.parse().ok()?;
        let port = words.next()?;
        Some((v6.to_canonical(), port))
    };
    let ((source, source_port), (destination, destination_port)) = address().zip(address())?;
    if id.is_some_and(|id| id != publish)
        || client.is_some_and(|net| !net.contains(&source) && !net.contains(&destination))
    {
        return None;
    }
    let reason = Reason::ALL
        .get(reason as usize)
        .map_or("?", |reason| reason.name());
    let protocol = if protocol == u32::from(forwarder_common::tuple::TCP) {
        "tcp"
    } else {
        "udp"
    };
    let device = nix::net::if_::if_indextoname(ifindex).map_or_else(
        |_| ifindex.to_string(),
        |name| name.to_string_lossy().into_owned(),
    );
    let show = |address: std::net::IpAddr, port: &str| match address {
        std::net::IpAddr::V4(v4) => format!("{v4}:{port}"),
        std::net::IpAddr::V6(v6) => format!("[{v6}]:{port}"),
    };
    let publish = if publish == 0 {
        "-".into()
    } else {
        publish.to_string()
    };
    Some(format!(
        "{device:<8} publish {publish:<4} {protocol} {} -> {}  {reason}",
        show(source, source_port),
        show(destination, destination_port),
    ))
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
        let line = "3 0 99999 6 ::ffff:192.0.2.1 4000 ::ffff:198.51.100.2 80";
        let text = trace(line, None, None).expect("not filtered");
        assert_eq!(
            text,
            "99999    publish 3    tcp 192.0.2.1:4000 -> 198.51.100.2:80  forwarded_original"
        );
        assert_eq!(trace(line, Some(4), None), None);
        assert!(trace(line, Some(3), "192.0.2.0/24".parse().ok()).is_some());
        assert_eq!(trace(line, None, "203.0.113.0/24".parse().ok()), None);
    }

    #[test]
    fn a_line_that_is_no_packet_is_shown_as_it_is() {
        assert_eq!(trace("lost 5", None, None).as_deref(), Some("lost 5"));
    }
}
