//! What forwarder is meant to reach, beside what this run has measured. Says so, and judges nothing else.

use std::fmt::Write as _;

use crate::{
    arena::{Client, Contender},
    process::Placement,
    report::{Case, Report, short},
    workload::Workload,
};

struct Goal {
    contender: Contender,
    of: Contender,
    client: Client,
    placement: Placement,
    workload: Workload,
    least: f64,
}

const fn goal(
    contender: Contender,
    of: Contender,
    client: Client,
    placement: Placement,
    workload: Workload,
    least: f64,
) -> Goal {
    Goal {
        contender,
        of,
        client,
        placement,
        workload,
        least,
    }
}

const fn goals() -> [Goal; 37] {
    use Client::{External, Hairpin, Localhost};
    use Contender::{
        DockerProxy, Forwarder, ForwarderAmongRules, Haproxy, Iptables, RemoteForwarder,
        RemoteForwarderXdp, RemoteIptables, Routing, RoutingBeside, Userland, Wire,
    };
    use Placement::{Free, Same};
    use Workload::{Bulk, Capacity, Connect, NewFlows, OneWay, TcpRoundTrip, UdpRoundTrip};
    [
        goal(Forwarder, Iptables, External, Same, Capacity, 3.2),
        goal(Forwarder, Routing, External, Same, Capacity, 1.7),
        goal(Forwarder, Iptables, External, Same, OneWay, 3.2),
        goal(Forwarder, Routing, External, Same, OneWay, 1.7),
        goal(
            ForwarderAmongRules,
            Forwarder,
            External,
            Same,
            Capacity,
            0.95,
        ),
        goal(Forwarder, Iptables, External, Same, NewFlows, 3.0),
        goal(Forwarder, Iptables, External, Same, TcpRoundTrip, 1.35),
        goal(Forwarder, Wire, External, Same, TcpRoundTrip, 0.95),
        goal(Forwarder, Iptables, External, Same, UdpRoundTrip, 1.35),
        goal(Forwarder, Wire, External, Same, UdpRoundTrip, 0.95),
        goal(Forwarder, Iptables, External, Same, Connect, 1.4),
        goal(Forwarder, Wire, External, Same, Connect, 0.9),
        goal(Forwarder, Iptables, External, Same, Bulk, 1.25),
        goal(Forwarder, Wire, External, Same, Bulk, 0.95),
        goal(Forwarder, Routing, Localhost, Same, TcpRoundTrip, 1.0),
        goal(Forwarder, DockerProxy, Localhost, Same, TcpRoundTrip, 2.4),
        goal(Forwarder, DockerProxy, Localhost, Free, TcpRoundTrip, 6.0),
        goal(Forwarder, Iptables, Hairpin, Same, TcpRoundTrip, 1.4),
        goal(Userland, DockerProxy, External, Same, Connect, 2.0),
        goal(Userland, DockerProxy, External, Same, Capacity, 2.0),
        goal(Userland, DockerProxy, External, Same, TcpRoundTrip, 1.3),
        goal(Userland, DockerProxy, External, Same, UdpRoundTrip, 1.3),
        goal(Userland, DockerProxy, External, Same, Bulk, 1.3),
        goal(Userland, Haproxy, External, Same, Connect, 1.0),
        goal(Userland, Haproxy, External, Same, TcpRoundTrip, 1.0),
        goal(Userland, Haproxy, External, Same, Bulk, 1.0),
        goal(Userland, Haproxy, External, Free, Connect, 1.0),
        goal(
            RemoteForwarderXdp,
            RemoteIptables,
            External,
            Same,
            Capacity,
            5.0,
        ),
        goal(
            RemoteForwarder,
            RemoteIptables,
            External,
            Same,
            Capacity,
            2.0,
        ),
        goal(
            RemoteForwarderXdp,
            RemoteIptables,
            External,
            Same,
            OneWay,
            5.0,
        ),
        goal(RemoteForwarder, RemoteIptables, External, Same, OneWay, 2.0),
        goal(RoutingBeside(0), Routing, Hairpin, Same, TcpRoundTrip, 0.97),
        goal(
            RoutingBeside(10_000),
            Routing,
            Hairpin,
            Same,
            TcpRoundTrip,
            0.97,
        ),
        goal(RoutingBeside(0), Routing, External, Same, Capacity, 0.97),
        goal(
            RoutingBeside(0),
            Routing,
            External,
            Same,
            TcpRoundTrip,
            0.97,
        ),
        goal(
            RoutingBeside(10_000),
            Routing,
            External,
            Same,
            Capacity,
            0.97,
        ),
        goal(
            RoutingBeside(10_000),
            Routing,
            External,
            Same,
            TcpRoundTrip,
            0.97,
        ),
    ]
}

/// A row for each goal of which both sides were measured.
pub(crate) fn table(report: &Report) -> String {
    let mut rows = String::new();
    for Goal {
        contender,
        of,
        client,
        placement,
        workload,
        least,
    } in goals()
    {
        let case = Case {
            client,
            placement,
            workload,
        };
        let (Some(ours), Some(theirs)) =
            (report.summary(contender, case), report.summary(of, case))
        else {
            continue;
        };
        let ratio = ours.median / theirs.median;
        let met = if ratio >= least { "met" } else { "**not met**" };
        let _ = writeln!(
            rows,
            "| {}, {} client, {} | {} of {} | {least:.2} | {} | {met} |",
            workload.name(),
            client.name(),
            placement.name(),
            contender.name(),
            of.name(),
            short(ratio)
        );
    }
    if rows.is_empty() {
        return rows;
    }
    format!("| workload | ratio | at least | measured | |\n|---|---|--:|--:|---|\n{rows}")
}
