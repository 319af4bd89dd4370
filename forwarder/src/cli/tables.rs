//! What commands print: tables for people. JSON comes as it is.

use std::{fmt::Write as _, net::SocketAddr};

use ipnet::IpNet;

use crate::{
    clock,
    control::api::{Ban, Counter, Endpoint, Listed, ListedFlow, Traced},
    publish::{Holder, Id},
};

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

/// An address with its ports, as people write them.
pub fn endpoint(endpoint: &Endpoint) -> String {
    let ports = if endpoint.port == endpoint.end_port {
        endpoint.port.to_string()
    } else {
        format!("{}-{}", endpoint.port, endpoint.end_port)
    };
    match endpoint.address {
        None => format!("*:{ports}"),
        Some(address) if address.is_ipv6() => {
            let zone = endpoint.zone.as_ref();
            let zone = zone.map_or_else(String::new, |zone| format!("%{}", zone.as_str()));
            format!("[{address}{zone}]:{ports}")
        }
        Some(address) => format!("{address}:{ports}"),
    }
}

/// `forwarder list`.
pub fn list(publishes: &[Listed]) -> String {
    let now = clock::now();
    let rows: Vec<[String; 12]> = publishes
        .iter()
        .map(|p| {
            [
                p.id.to_string(),
                owner(p),
                format!("{}/{}", endpoint(&p.frontend), p.protocol),
                endpoint(&p.backend),
                datapath(p),
                age(now.saturating_sub(p.since)),
                p.flows.to_string(),
                p.packets.to_string(),
                p.bytes.to_string(),
                short(p.packets_per_second),
                short(p.bytes_per_second),
                p.reason.clone().unwrap_or_default(),
            ]
        })
        .collect();
    table(
        [
            "ID",
            "OWNER",
            "FRONTEND",
            "BACKEND",
            "DATAPATH",
            "AGE",
            "FLOWS",
            "PACKETS",
            "BYTES",
            "PACKETS/S",
            "BYTES/S",
            "REASON",
        ],
        &rows,
    )
}

/// An engine's container by its short id, as engines print it, and any container by its name.
pub fn owner(publish: &Listed) -> String {
    let owner = publish.owner.as_str();
    let owner = match owner.strip_prefix("docker:") {
        Some(id) => format!("docker:{}", &id[..id.len().min(12)]),
        None => owner.to_owned(),
    };
    match &publish.container {
        Some(name) => format!("{owner} ({name})"),
        None => owner,
    }
}

/// What carries a publish; beside the fast path, the engine if that holds the port; and whether it only drains.
fn datapath(publish: &Listed) -> String {
    let datapath = &publish.datapath;
    let path = match (&publish.delivery, publish.holder) {
        (None, _) => datapath.clone(),
        (Some(delivery), Holder::Forwarder) => format!("{datapath} ({delivery})"),
        (Some(delivery), Holder::Engine) => format!("{datapath} ({delivery}), engine"),
    };
    let end = if publish.draining { ", draining" } else { "" };
    path + end
}

/// Seconds as one number and its unit, rounded down.
fn age(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Three digits or so and a unit.
pub fn short(value: f64) -> String {
    let mut value = value;
    for unit in ["", "k", "M", "G"] {
        if value < 999.5 {
            let digits = usize::from(value < 99.5 && value.fract() > 0.0);
            return format!("{value:.digits$}{unit}");
        }
        value /= 1000.0;
    }
    format!("{value:.1}T")
}

/// `forwarder bans`: what is left of each.
pub fn bans(bans: &[Ban]) -> String {
    let now = clock::now();
    let left = |ban: &Ban| match ban.until {
        Some(until) => format!("{} s", until.saturating_sub(now)),
        None => "for ever".into(),
    };
    let from = |ban: &Ban| {
        let publish = ban.publish.as_ref();
        publish.map_or("all".into(), ToString::to_string)
    };
    let rows = bans.iter().map(|ban| {
        let owner = ban.owner.to_string();
        [ban.network.to_string(), from(ban), owner, left(ban)]
    });
    table(
        ["SOURCE", "PUBLISH", "OWNER", "LEFT"],
        &rows.collect::<Vec<_>>(),
    )
}

/// `forwarder flows`.
pub fn flows(flows: &[ListedFlow]) -> String {
    let rows: Vec<[String; 10]> = flows
        .iter()
        .map(|f| {
            [
                f.publish.to_string(),
                f.protocol.clone(),
                f.client.clone(),
                f.frontend.clone(),
                f.source.clone(),
                f.backend.clone(),
                f.datapath.clone(),
                f.state.clone(),
                format!("{} s", f.idle_seconds),
                format!("{}/{}", f.packets[0], f.packets[1]),
            ]
        })
        .collect();
    table(
        [
            "ID", "PROTO", "CLIENT", "FRONTEND", "SOURCE", "BACKEND", "DATAPATH", "STATE", "IDLE",
            "PACKETS",
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

/// The line that says how a publish is served.
pub fn published(row: &Listed) -> String {
    let frontend = match row.frontend.address {
        None => endpoint(&row.frontend).replacen("*:", "", 1),
        Some(_) => endpoint(&row.frontend),
    };
    let spec = format!("{frontend}:{}/{}", endpoint(&row.backend), row.protocol);
    let how = match (&row.reason, &row.delivery) {
        (Some(reason), _) => format!("{}: {reason}", row.datapath),
        (None, Some(delivery)) => match &row.xdp {
            Some(mode) => format!("ebpf, {delivery}, {mode} XDP"),
            None => format!("ebpf, {delivery}"),
        },
        (None, None) => row.datapath.clone(),
    };
    let ports = row.frontend.end_port - row.frontend.port;
    let all_to_one = if ports > 0 && row.backend.port == row.backend.end_port {
        format!(
            ", all {} ports to port {}",
            u32::from(ports) + 1,
            row.backend.port
        )
    } else {
        String::new()
    };
    format!("{}: {spec} ({how}{all_to_one})", row.id)
}

/// Whether a packet of a trace is of the publish, and from or to the network. What was lost may have been.
pub fn is_asked_for(traced: &Traced, id: Option<Id>, client: Option<IpNet>) -> bool {
    let Traced::Packet(packet) = traced else {
        return true;
    };
    let rewritten = packet.rewritten.as_ref();
    let ends = [Some(&packet.source), Some(&packet.destination)];
    let ends = ends.into_iter().chain([
        rewritten.map(|new| &new.source),
        rewritten.map(|new| &new.destination),
    ]);
    let mut ends = ends.flatten().filter_map(|end| end.parse().ok());
    id.is_none_or(|id| packet.publish == Some(id))
        && client.is_none_or(|network| ends.any(|end: SocketAddr| network.contains(&end.ip())))
}

/// One packet of a trace.
pub fn trace(traced: &Traced) -> String {
    let packet = match traced {
        Traced::Packet(packet) => packet,
        Traced::Lost(lines) => return format!("lost {lines}"),
    };
    let publish = packet.publish.map_or("-".into(), |id| id.to_string());
    let mut text = format!(
        "{:<8} publish {publish:<4} {} {} -> {}  {}",
        packet.device, packet.protocol, packet.source, packet.destination, packet.reason
    );
    if let Some(new) = &packet.rewritten {
        let _ = write!(
            text,
            ": {} -> {} by {} {}",
            new.source, new.destination, new.delivery, new.device
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::{Rewritten, TracedPacket};

    #[test]
    fn columns_line_up() {
        let text = table(["A", "LONG"], &[["aaa".into(), "b".into()]]);
        assert_eq!(text, "A    LONG\naaa  b\n");
    }

    #[test]
    fn ages_and_rates_are_short() {
        let ages = [0, 119, 120, 7199, 7200, 172_799, 172_800].map(age);
        assert_eq!(ages, ["0s", "119s", "2m", "119m", "2h", "47h", "2d"]);
        for (value, text) in [
            (0.0, "0"),
            (7.25, "7.2"),
            (999.0, "999"),
            (1234.0, "1.2k"),
            (45_600_000.0, "45.6M"),
            (3e13, "30.0T"),
        ] {
            assert_eq!(short(value), text);
        }
    }

    fn forwarded() -> Traced {
        Traced::Packet(Box::new(TracedPacket {
            publish: Some(3),
            reason: "forwarded_original".into(),
            device: "eth0".into(),
            protocol: "tcp".into(),
            source: "192.0.2.1:4000".into(),
            destination: "198.51.100.2:8080".into(),
            rewritten: Some(Rewritten {
                source: "192.0.2.1:4000".into(),
                destination: "172.31.0.2:80".into(),
                delivery: "peer".into(),
                device: "veth0".into(),
            }),
        }))
    }

    #[test]
    fn a_trace_says_what_was_done() {
        let text = "eth0     publish 3    tcp 192.0.2.1:4000 -> 198.51.100.2:8080  forwarded_original: \
                    192.0.2.1:4000 -> 172.31.0.2:80 by peer veth0";
        assert_eq!(trace(&forwarded()), text);
        let passed = Traced::Packet(Box::new(TracedPacket {
            publish: None,
            reason: "not_ours".into(),
            device: "lo".into(),
            protocol: "udp".into(),
            source: "[::1]:4000".into(),
            destination: "[fd00::1]:53".into(),
            rewritten: None,
        }));
        let text = "lo       publish -    udp [::1]:4000 -> [fd00::1]:53  not_ours";
        assert_eq!(trace(&passed), text);
        assert_eq!(trace(&Traced::Lost(5)), "lost 5");
    }

    #[test]
    fn a_trace_is_of_one_publish_or_network() {
        let packet = forwarded();
        let is_in = |network: &str| is_asked_for(&packet, None, network.parse().ok());
        assert!(is_in("192.0.2.0/24") && is_in("172.31.0.0/24") && !is_in("203.0.113.0/24"));
        assert!(is_asked_for(&packet, Some(3), None) && !is_asked_for(&packet, Some(4), None));
        assert!(is_asked_for(&Traced::Lost(5), Some(4), None));
    }
}
