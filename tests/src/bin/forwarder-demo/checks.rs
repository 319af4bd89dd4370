//! Every kind of client, whom the backend must have seen, and the table of it, in the terminal and for the page.

use std::{
    net::{IpAddr, SocketAddr},
    sync::mpsc::Receiver,
};

use anyhow::{Context, Result};
use forwarder::control::api::Listed;
use forwarder_tests::{
    daemon::Daemon,
    netns::Netns,
    topology::{
        Family::{self, V4, V6},
        Topology,
    },
};

use crate::{
    http, loopback,
    who::Place::{self, Backend, Container, Host, Machine},
};

struct Client<'a> {
    what: &'static str,
    place: Place,
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
    let row = |what, place, netns, connects_to, seen| Client {
        what,
        place,
        netns,
        connects_to,
        seen,
    };
    let gateway = backend.gateway(family);
    vec![
        row(
            "another machine",
            Machine,
            client,
            lan,
            topology.client_address(family),
        ),
        row(
            "a process here, to loopback",
            Host,
            host,
            loopback(family),
            gateway,
        ),
        row("a process here, to its own address", Host, host, lan, lan),
        row(
            "a container on the same bridge",
            Container,
            &peer.netns,
            gateway,
            peer.address(family),
        ),
        row(
            "a container on another bridge",
            Container,
            &other.netns,
            lan,
            other.address(family),
        ),
        row(
            "a container without a bridge",
            Container,
            &ptp.netns,
            ptp.gateway(family),
            ptp.address(family),
        ),
        row(
            "the backend itself",
            Backend,
            &backend.netns,
            gateway,
            gateway,
        ),
    ]
}

/// How one client was served.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub client: &'static str,
    pub place: Place,
    pub connects_to: SocketAddr,
    /// The address that the backend saw, or why there is none.
    pub seen: String,
    pub fast: bool,
    pub path: &'static str,
    /// `ok`, or what should have been.
    pub verdict: String,
    pub good: bool,
    /// Why it was not the fast path.
    pub reason: Option<String>,
}

/// Asks from everywhere, hands each row to `note` and prints the table. Returns whether all of it is as it should be.
pub(crate) fn check(
    topology: &Topology,
    daemon: &Daemon,
    port: u16,
    interrupted: &Receiver<()>,
    note: impl Fn(Row),
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

            let fast = after.datapath == "ebpf";
            let carried = after.packets > before.packets;
            let expected = if fast {
                client.seen
            } else {
                topology.backend.gateway(family)
            };
            let served = matches!(&seen, Ok(address) if address.ip() == expected);
            let row_good = served && (carried || !fast);
            good &= row_good;
            let row = Row {
                client: client.what,
                place: client.place,
                connects_to: frontend,
                seen: seen.map_or_else(|error| format!("{error:#}"), |it| it.to_string()),
                fast,
                path: match (fast, carried) {
                    (true, true) => "eBPF",
                    (true, false) => "eBPF, unused",
                    (false, _) => "userland",
                },
                verdict: if row_good {
                    "ok".to_owned()
                } else {
                    format!("not {expected}")
                },
                good: row_good,
                reason: after.reason,
            };
            let to = frontend.to_string();
            print_row([row.client, &to, &row.seen, row.path, &row.verdict]);
            reasons.extend(row.reason.clone());
            note(row);
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
fn entry(daemon: &Daemon, frontend: SocketAddr) -> Result<Listed> {
    let entries: Vec<Listed> = daemon.document(&["list"])?;
    let mut entries = entries.into_iter();
    entries
        .find(|entry| entry.frontend.address == Some(frontend.ip()))
        .with_context(|| format!("{frontend} is not in the list"))
}
