//! CrowdSec's decisions, as crowdsec-custom-bouncer writes them to a program's standard input (`feed_via_stdin`): one a line,
//! as JSON. A block list comes as tens of thousands of them, which become one request.

use std::{
    collections::{HashMap, HashSet},
    io::{self, BufRead as _},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use hyper::Method;
use ipnet::IpNet;
use serde::Deserialize;

use crate::{
    clock,
    control::{api::Ban, client::Client},
    publish::{Owner, allow},
    stderr,
};

/// Lines that come within this time belong together.
const SETTLE: Duration = Duration::from_millis(100);
/// Decisions of one request.
const MOST: usize = 50_000;
/// An instance that does not run is asked again after this time.
const RETRY: Duration = Duration::from_secs(2);

/// So often a list is sent again of which a ban has ended meanwhile.
const ATTEMPTS: u32 = 5;

/// What is read of a decision; it has more.
#[derive(Debug, Deserialize)]
struct Decision {
    action: Action,
    /// An address or a network, if the scope is one of these.
    value: String,
    scope: String,
    /// What is to happen: `ban`, or what only a web server can do, such as `captcha`.
    #[serde(rename = "type")]
    kind: String,
    /// For how long, as Go writes it: `3h59m58.5s`.
    duration: String,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Action {
    Add,
    Del,
}

/// A source, and until when it is banned; without, it is no more.
type Change = (IpNet, Option<u64>);

/// Does what comes by standard input, until that ends.
///
/// # Errors
/// The instance refuses. A bouncer that starts again gets all decisions again.
pub fn run(client: &Client) -> Result<()> {
    let owner: Owner = "crowdsec".parse()?;
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in io::stdin().lock().split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    while let Ok(first) = lines.recv() {
        let changes = together(first, &lines).into_iter().filter_map(|line| {
            let change = change(&line, clock::now());
            change.unwrap_or_else(|error| {
                stderr::line(format_args!("passed over: {error:#}"));
                None
            })
        });
        // Of one source the last word counts.
        let changes: HashMap<IpNet, Option<u64>> = changes.collect();
        wait_for_instance(client);
        let bans = changes.iter().filter(|(_, until)| until.is_some());
        let bans = bans.map(|(&network, &until)| Ban {
            network,
            until,
            publish: None,
            owner: owner.clone(),
        });
        let bans: Vec<Ban> = bans.collect();
        if !bans.is_empty() {
            client.ask::<()>(&Method::POST, "/v1/bans", Some(&bans))?;
        }
        let gone = changes.iter().filter(|(_, until)| until.is_none());
        unban(client, &gone.map(|(&network, _)| network).collect(), &owner)?;
    }
    Ok(())
}

/// Takes back what there is of these bans: one whose time was over has gone by itself.
fn unban(client: &Client, networks: &HashSet<IpNet>, owner: &Owner) -> Result<()> {
    if networks.is_empty() {
        return Ok(());
    }
    let mut attempt = 0;
    loop {
        let there = wait_for_instance(client).into_iter();
        let there = there.filter(|ban| ban.publish.is_none() && ban.owner == *owner);
        let there = there.map(|ban| ban.network);
        let gone: Vec<IpNet> = there.filter(|it| networks.contains(it)).collect();
        let path = format!("/v1/unban?owner={owner}");
        match client.ask::<()>(&Method::POST, &path, Some(&gone)) {
            // The time of one was over just now.
            Err(_) if attempt < ATTEMPTS => attempt += 1,
            result => return result,
        }
    }
}

/// A line and those that come right behind it.
fn together(first: String, lines: &Receiver<String>) -> Vec<String> {
    let mut all = vec![first];
    while all.len() < MOST {
        match lines.recv_timeout(SETTLE) {
            Ok(line) => all.push(line),
            Err(_) => break,
        }
    }
    all
}

/// What is banned now, as soon as the instance runs: the bouncer says each thing only once.
fn wait_for_instance(client: &Client) -> Vec<Ban> {
    let mut said = false;
    loop {
        let none: Option<&()> = None;
        match client.ask(&Method::GET, "/v1/bans", none) {
            Ok(bans) => return bans,
            Err(error) if !said => stderr::line(format_args!("waiting: {error:#}")),
            Err(_) => {}
        }
        said = true;
        thread::sleep(RETRY);
    }
}

/// What a line asks for; nothing, if it is not about addresses that are to be banned.
fn change(line: &str, now: u64) -> Result<Option<Change>> {
    let decision: Decision =
        serde_json::from_str(line).with_context(|| format!("{line:?} is no decision"))?;
    let is_address = ["ip", "range"]
        .iter()
        .any(|scope| decision.scope.eq_ignore_ascii_case(scope));
    if decision.kind != "ban" || !is_address {
        return Ok(None);
    }
    let network = allow::source(&decision.value).map_err(anyhow::Error::msg)?;
    let network = network.trunc();
    if decision.action == Action::Del {
        return Ok(Some((network, None)));
    }
    let lasts = seconds(&decision.duration)
        .with_context(|| format!("{:?} is no duration", decision.duration))?;
    Ok(Some((network, Some(now + lasts))))
}

/// Whole seconds, and one more for what is left.
fn seconds(duration: &str) -> Option<u64> {
    let mut seconds = 0.0;
    let mut rest = duration;
    while !rest.is_empty() {
        let number = rest.find(|c: char| c.is_ascii_alphabetic() || c == 'µ')?;
        let end = rest[number..].find(|c: char| c.is_ascii_digit());
        let end = end.map_or(rest.len(), |end| number + end);
        let unit = match &rest[number..end] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += rest[..number].parse::<f64>().ok()? * unit;
        rest = &rest[end..];
    }
    (0.0..1e12)
        .contains(&seconds)
        .then_some(seconds.ceil() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(action: &str, scope: &str, kind: &str, value: &str, duration: &str) -> String {
        format!(
            r#"{{"duration":"{duration}","origin":"CAPI","scenario":"x","scope":"{scope}","type":"{kind}","value":"{value}","id":7,"action":"{action}"}}"#
        )
    }

    #[test]
    fn a_decision_about_an_address_is_a_ban_until_its_time_is_over() {
        let ban = |value: &str, until| Some((value.parse().expect(value), Some(until)));
        let read = |line: String| change(&line, 1000).expect("a decision");
        assert_eq!(
            read(line("add", "Ip", "ban", "192.0.2.7", "1h2m3.5s")),
            ban("192.0.2.7/32", 1000 + 3724)
        );
        assert_eq!(
            read(line("add", "Range", "ban", "2001:db8::1/64", "500ms")),
            ban("2001:db8::/64", 1001)
        );
        let gone = "192.0.2.0/24".parse().expect("a network");
        assert_eq!(
            read(line("del", "range", "ban", "192.0.2.0/24", "-3.2s")),
            Some((gone, None))
        );
        assert_eq!(read(line("add", "Ip", "captcha", "192.0.2.7", "1h")), None);
        assert_eq!(read(line("add", "Country", "ban", "XX", "1h")), None);
    }

    #[test]
    fn what_is_no_decision_is_named() {
        for bad in [
            "{}".to_owned(),
            line("add", "Ip", "ban", "192.0.2", "1h"),
            line("add", "Ip", "ban", "192.0.2.7", "soon"),
            line("add", "Ip", "ban", "192.0.2.7", "-1h"),
            line("add", "Ip", "ban", "192.0.2.7", "1e300h"),
        ] {
            assert!(change(&bad, 0).is_err(), "{bad}");
        }
    }
}
