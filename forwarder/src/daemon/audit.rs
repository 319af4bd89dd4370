//! The audit log: one line for every change, under the target `audit`. It says who asked, in whose name, what for, and what came
//! of it.

use anyhow::Result;
use tracing::info;

use crate::{
    control::{Change, Named, Peer},
    publish::{Owner, Publish, bans},
};

/// Publishes that a line names; the others are counted.
const NAMED: usize = 20;

/// Writes a line. `by` is nobody for what the instance does on its own account.
pub(super) fn line<T>(by: Option<Peer>, owner: &Owner, change: &str, outcome: &Result<T>) {
    let (uid, pid) = (by.map(|by| by.uid), by.map(|by| by.pid));
    // As texts with quotes: what a client has sent cannot look like a line or a field of its own.
    let result = match outcome {
        Ok(_) => "done".to_owned(),
        Err(error) => format!("{error:#}"),
    };
    info!(target: "audit", uid, pid, %owner, ?change, ?result);
}

/// Whose ban it is, in words, if not a person's who types commands.
fn by(owner: Option<&Owner>) -> String {
    let owner = owner.filter(|owner| !owner.is_cli());
    owner.map_or_else(String::new, |owner| format!(" by {owner}"))
}

/// A change in words.
pub(super) fn describe(change: &Change) -> String {
    let specs = |publishes: &[Publish]| some(publishes.iter().map(|it| it.spec.to_string()));
    match change {
        Change::Add(publishes) => format!("publish {}", specs(publishes)),
        Change::Want(publishes) => format!("want {}", specs(publishes)),
        Change::Lease(publishes, sockets) if sockets.is_empty() => {
            format!("lease {}", specs(publishes))
        }
        Change::Lease(publishes, sockets) => {
            format!("lease {} on {} sockets", specs(publishes), sockets.len())
        }
        Change::Remove(named, ending) => {
            let names = named.iter().map(|named| match named {
                Named::Id(id) => id.to_string(),
                Named::Spec(spec) => spec.to_string(),
            });
            format!("unpublish {} ({ending:?})", some(names)).to_lowercase()
        }
        Change::RemoveFrom {
            container,
            ports,
            ending,
        } => {
            let ports = match &ports[..] {
                [] => "all".into(),
                ports => some(ports.iter().map(ToString::to_string)),
            };
            let ending = format!("{ending:?}").to_lowercase();
            format!("unpublish {ports} of container {container} ({ending})")
        }
        Change::RemoveAll(ending) => format!("unpublish all ({ending:?})").to_lowercase(),
        Change::Ban { bans, all } => {
            let banned = bans.iter();
            let banned = banned.map(|ban| {
                let banned = bans::described(ban.network, ban.publish.as_ref());
                banned + &by(Some(&ban.owner))
            });
            let networks = some(banned);
            let only = if *all { " alone" } else { "" };
            format!("ban {networks}{only}")
        }
        Change::Unban(networks, publish, owner) => {
            let networks = networks.iter();
            let networks = networks.map(|it| bans::described(*it, publish.as_ref()));
            format!("unban {}{}", some(networks), by(owner.as_ref()))
        }
        Change::Follow { name, addresses } => {
            let addresses = addresses.iter().map(ToString::to_string);
            format!("container {name} has {}", some(addresses))
        }
        Change::Replace(id, backend) => {
            let address = backend.address.map(|it| it.to_string()).unwrap_or_default();
            format!("backend of {id} to {address} port {}", backend.port)
        }
    }
}

fn some(names: impl ExactSizeIterator<Item = String>) -> String {
    let more = names.len().saturating_sub(NAMED);
    let named: Vec<String> = names.take(NAMED).collect();
    match (named.is_empty(), more) {
        (true, _) => "nothing".into(),
        (_, 0) => named.join(", "),
        _ => format!("{} and {more} more", named.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::Ending;

    #[test]
    fn a_long_list_is_cut_and_counted() {
        let named = (1..=25).map(Named::Id).collect();
        let text = describe(&Change::Remove(named, Ending::Drain));
        assert!(text.starts_with("unpublish 1, 2, "), "{text}");
        assert!(text.ends_with(", 20 and 5 more (drain)"), "{text}");
        assert_eq!(describe(&Change::Want(Vec::new())), "want nothing");
    }
}
