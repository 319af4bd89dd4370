//! Policy routing: whether rules lead elsewhere than the kernel's own do, and the kernel's answer where only it can say
//! by which route one address is reached. Which addresses are asked for is decided in `plan.rs`.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAttribute, RouteFlags, RouteMessage},
    rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
};
use rtnetlink::RouteMessageBuilder;

use super::{
    Answer, Reader, list,
    routes::{RT_TABLE_LOCAL, ip, route_and_table},
};

/// The priorities and tables of the rules that a network namespace begins with: local, main and, for IPv4, default
/// (`fib_default_rules_init` in net/ipv4/fib_rules.c).
const LOCAL: (u32, u32) = (0, RT_TABLE_LOCAL);
const MAIN: (u32, u32) = (32_766, 254);
const DEFAULT: (u32, u32) = (32_767, 253);

/// Whether other rules than the kernel's own choose routes, for IPv4 and IPv6.
pub(super) fn has_rules() -> Result<(bool, bool)> {
    let of = |family| -> Result<bool> {
        let mut all = RuleMessage::default();
        all.header.family = family;
        let mut rules = Vec::new();
        list(RouteNetlinkMessage::GetRule(all), "rules", |it| {
            if let RouteNetlinkMessage::NewRule(rule) = it {
                rules.push(rule);
            }
        })?;
        Ok(are_custom(&rules))
    };
    Ok((of(AddressFamily::Inet)?, of(AddressFamily::Inet6)?))
}

impl Reader {
    /// How the kernel reaches an address. `None`: it has no route, or a rule or a route forbids it.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub async fn route_to(&self, destination: IpAddr) -> Result<Option<Answer>> {
        // As `connect` does it: the source follows from the route, and then a rule may choose another route by the source.
        let Some(chosen) = self.ask_route(question(destination, None)).await? else {
            return Ok(None);
        };
        let source = chosen
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                RouteAttribute::PrefSource(address) => ip(address),
                _ => None,
            });
        let mut question = question(destination, source);
        // With the length of its prefix, as the tables have it.
        question.header.flags = RouteFlags::FibMatch;
        let route = self.ask_route(question).await?;
        let route = route.as_ref().and_then(route_and_table);
        let route = route.filter(|(route, _)| route.ifindex != 0);
        Ok(route.map(|(route, _)| Answer { route, source }))
    }

    async fn ask_route(&self, question: RouteMessage) -> Result<Option<RouteMessage>> {
        let mut answers = std::pin::pin!(self.handle.route().get(question).execute());
        match answers.next().await {
            None | Some(Err(rtnetlink::Error::NetlinkError(_))) => Ok(None),
            Some(answer) => answer.map(Some).context("ask for a route"),
        }
    }
}

fn question(destination: IpAddr, source: Option<IpAddr>) -> RouteMessage {
    match destination {
        IpAddr::V4(to) => {
            let question = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, 32);
            match source {
                Some(IpAddr::V4(from)) => question.source_prefix(from, 32),
                _ => question,
            }
            .build()
        }
        IpAddr::V6(to) => {
            let question = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to, 128);
            match source {
                Some(IpAddr::V6(from)) => question.source_prefix(from, 128),
                _ => question,
            }
            .build()
        }
    }
}

/// Whether one of the rules is not the kernel's own, or table local or main is not asked. A kernel without rules asks both.
fn are_custom(rules: &[RuleMessage]) -> bool {
    let own: Option<BTreeSet<(u32, u32)>> = rules.iter().map(for_all).collect();
    let is_own = own.is_some_and(|own| {
        let known = [LOCAL, MAIN, DEFAULT];
        own.contains(&LOCAL) && own.contains(&MAIN) && own.iter().all(|rule| known.contains(rule))
    });
    !rules.is_empty() && !is_own
}

/// Priority and table of a rule that holds for every packet; `None` for one that selects some, or does something else.
fn for_all(rule: &RuleMessage) -> Option<(u32, u32)> {
    let header = &rule.header;
    let (mut priority, mut table) = (0, u32::from(header.table));
    let selects = header.src_len != 0 || header.dst_len != 0 || header.tos != 0;
    if selects || header.action != RuleAction::ToTable || header.flags.contains(RuleFlags::Invert) {
        return None;
    }
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Table(value) => table = *value,
            RuleAttribute::Protocol(_)
            | RuleAttribute::SuppressPrefixLen(u32::MAX)
            | RuleAttribute::SuppressIfGroup(u32::MAX) => {}
            _ => return None,
        }
    }
    Some((priority, table))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule((priority, table): (u32, u32)) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.action = RuleAction::ToTable;
        rule.header.table = u8::try_from(table).unwrap_or(0);
        rule.attributes = vec![
            RuleAttribute::Table(table),
            RuleAttribute::SuppressPrefixLen(u32::MAX),
            RuleAttribute::Priority(priority),
        ];
        rule
    }

    #[test]
    fn the_kernels_own_rules_choose_no_other_table() {
        assert!(!are_custom(&[]), "a kernel without rules");
        assert!(!are_custom(&[LOCAL, MAIN, DEFAULT].map(rule)));
        assert!(!are_custom(&[LOCAL, MAIN].map(rule)));
    }

    #[test]
    fn every_other_rule_counts() {
        let own = [LOCAL, MAIN].map(rule);
        let with = |other: RuleMessage| are_custom(&[own.as_slice(), &[other]].concat());
        assert!(with(rule((5270, 52))), "another table");
        assert!(with(rule((5270, 254))), "table main before others");
        let mut marked = rule(MAIN);
        marked.attributes.push(RuleAttribute::FwMark(1));
        assert!(with(marked));
        let mut forbids = rule((1, 0));
        forbids.header.action = RuleAction::Prohibit;
        assert!(with(forbids));
        assert!(are_custom(&[LOCAL, DEFAULT].map(rule)), "main is not asked");
    }
}
