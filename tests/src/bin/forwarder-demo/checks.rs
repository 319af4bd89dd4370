//! Every kind of client, whom the backend must have seen, and the table of it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::mpsc::Receiver,
};

use anyhow::{Context, Result};
use forwarder_tests::{
    daemon::Daemon,
    netns::Netns,
    topology::{
        Family::{self, V4, V6},
        Topology,
    },
};
use serde_json::Value;

use crate::{http, loopback};

struct Client<'a> {
    what: &'a str,
    netns: &'a Netns,
    connects_to: IpAddr,
    /// What the backend sees as the source when the packets take the fast path.
    seen: IpAddr,
}

fn clients(topology: &Topology, family: Family) -> Vec<Client<'_>> {
    let Topology {
        host,
        client,
        backend,
        peer,
        other,
        ptp,
        ..
    } = topology;
    let lan = topology.host_address(family);
    let row = |what, netns, connects_to, seen| Client {
        what,
        netns,
        connects_to,
        seen,
    };
    let gateway = backend.gateway(family);
    vec![
        row(
            "another machine",
            client,
            lan,
            topology.client_address(family),
        ),
        row(
            "a process here, to loopback",
            host,
            loopback(family),
            gateway,
        ),
        row("a process here, to its own address", host, lan, lan),
        row(
            "a container on the same bridge",
            &peer.netns,
            gateway,
            peer.address(family),
        ),
        row(
            "a container on another bridge",
            &other.netns,
            lan,
            other.address(family),
        ),
        row(
            "a container without a bridge",
            &ptp.netns,
            ptp.gateway(family),
            ptp.address(family),
        ),
        row("the backend itself", &backend.netns, gateway, gateway),
    ]
}

/// Asks from everywhere and prints the table. Returns whether all of it is as it should be.
pub(crate) fn check(
    topology: &Topology,
    daemon: &Daemon,
    port: u16,
    interrupted: &Receiver<()>,
) -> Result<bool> {
    print_row(["client", "connects to", "the backend saw", "path", ""]);
    let mut good = true;
    let mut reasons = Vec::new();
    for family in [V4, V6] {
        for client in clients(topology, family) {
            if interrupted.try_recv().is_ok() {
                anyhow::bail!("interrupted");
            }
            let frontend = SocketAddr::new(client.connects_to, port);
            let before = entry(daemon, frontend)?;
            let seen = http::source_seen(client.netns, frontend);
            let after = entry(daemon, frontend)?;

            let fast = after["datapath"] == "ebpf";
            let carried = after["packets"].as_u64() > before["packets"].as_u64();
            let expected = if fast {
                client.seen
            } else {
                topology.backend.gateway(family)
            };
            let served = matches!(&seen, Ok(address) if address.ip() == expected);
            let row_good = served && (carried || !fast);
            good &= row_good;
            let path = match (fast, carried) {
                (true, true) => "eBPF",
                (true, false) => "eBPF, unused",
                (false, _) => "userland",
            };
            let seen = seen.map_or_else(|error| format!("{error:#}"), |it| it.to_string());
            let verdict = if row_good {
                "ok".to_owned()
            } else {
                format!("not {expected}")
            };
            print_row([client.what, &frontend.to_string(), &seen, path, &verdict]);
            reasons.extend(after["reason"].as_str().map(str::to_owned));
        }
    }
    reasons.sort();
    reasons.dedup();
    for reason in reasons {
        println!("userland: {reason}");
    }
    if !good {
        println!("\n{}", daemon.said());
    }
    Ok(good)
}

fn print_row([client, to, seen, path, verdict]: [&str; 5]) {
    println!("{client:<34}  {to:<29}  {seen:<31}  {path:<8}  {verdict}");
}

/// What the daemon says of the publish with that frontend.
fn entry(daemon: &Daemon, frontend: SocketAddr) -> Result<Value> {
    let address = frontend.ip().to_string();
    let entries = daemon.list()?;
    let found = entries
        .into_iter()
        .find(|entry| entry["frontend"]["address"] == address.as_str());
    found.with_context(|| format!("{frontend} is not in the list"))
}
