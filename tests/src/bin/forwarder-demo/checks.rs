//! Every kind of client, whom the backend must have seen, and the table of it, in the terminal and for the page.

use std::{net::SocketAddr, sync::mpsc::Receiver};

use anyhow::{Context, Result};
use forwarder::control::api::Listed;
use forwarder_tests::{
    clients::{Kind, Place},
    daemon::Daemon,
    topology::{
        Family::{V4, V6},
        Topology,
    },
};

use crate::http;

/// The kinds of client that the table shows.
const KINDS: [Kind; 7] = [
    Kind::External,
    Kind::Localhost,
    Kind::HostLocal,
    Kind::HairpinGateway,
    Kind::HairpinOtherBridge,
    Kind::HairpinFromRoutedGateway,
    Kind::SelfHairpinGateway,
];

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
        for client in KINDS.map(|kind| kind.client(topology, family)) {
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
