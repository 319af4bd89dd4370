//! Policy routing: whether rules lead elsewhere than the kernel's own do, and the kernel's answer where only it can say
//! by which route one address is reached. Which addresses are asked for is decided in `plan.rs`.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use ipnet::IpNet;
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

/// A rule that chooses by protocol or ports, which no question for a route names and the fast path's own do not all have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selective {
    pub is_v4: bool,
    pub priority: u32,
    /// What a packet has to have: its protocol, the ports that it goes to, and where those are; all, if it is not said.
    pub protocol: Option<u8>,
    pub ports: Option<(u16, u16)>,
    pub destination: Option<IpNet>,
}

/// Of IPv4, and of IPv6.
type ByFamily = (bool, bool);

/// Whether the kernel alone tells the way, for IPv4 and IPv6: other rules than its own choose routes, or it lists routes without
/// the devices of their nexthop objects. Whether rules choose by marks, and those that choose by protocol or ports.
pub(super) fn rules() -> Result<(ByFamily, ByFamily, Vec<Selective>)> {
    // Documentation/networking/ip-sysctl.rst; kernels before 5.8 have no such setting, and list them all.
    let mode = std::fs::read_to_string("/proc/sys/net/ipv4/nexthop_compat_mode");
    let hides_devices = mode.is_ok_and(|mode| mode.trim() == "0");
    let mut selective = Vec::new();
    let mut of = |family| -> Result<(bool, bool)> {
        let mut all = RuleMessage::default();
        all.header.family = family;
        let mut rules = Vec::new();
        list(RouteNetlinkMessage::GetRule(all), "rules", |it| {
            if let RouteNetlinkMessage::NewRule(rule) = it {
                rules.push(rule);
            }
        })?;
        selective.extend(rules.iter().filter_map(by_protocol_or_ports));
        let marks = rules.iter().flat_map(|rule| &rule.attributes);
        let marks = { marks }.any(|it| matches!(it, RuleAttribute::FwMark(_)));
        Ok((hides_devices || are_custom(&rules), marks))
    };
    let (v4, v6) = (of(AddressFamily::Inet)?, of(AddressFamily::Inet6)?);
    Ok(((v4.0, v6.0), (v4.1, v6.1), selective))
}

fn by_protocol_or_ports(rule: &RuleMessage) -> Option<Selective> {
    let mut found = Selective {
        is_v4: rule.header.family == AddressFamily::Inet,
        priority: 0,
        protocol: None,
        ports: None,
        destination: None,
    };
    let mut selects = false;
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => found.priority = *priority,
            RuleAttribute::Destination(address) => {
                found.destination = IpNet::new(*address, rule.header.dst_len).ok();
            }
            RuleAttribute::IpProtocol(protocol) => {
                (found.protocol, selects) = (Some((*protocol).into()), true);
            }
            RuleAttribute::DestinationPortRange(ports) => {
                (found.ports, selects) = (Some((ports.start, ports.end)), true);
            }
            RuleAttribute::SourcePortRange(_) => selects = true,
            _ => {}
        }
    }
    if rule.header.flags.contains(RuleFlags::Invert) {
        (found.protocol, found.ports, found.destination) = (None, None, None);
    }
    selects.then_some(found)
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
        let mut route = self.ask_route(question.clone()).await?;
        if let Some(route) = &mut route
            && !route.attributes.iter().any(is_hop)
        {
            // That is a nexthop object's. Of the way of a packet, the kernel tells it.
            question.header.flags = RouteFlags::empty();
            let way = self.ask_route(question).await?;
            let hops = way.into_iter().flat_map(|way| way.attributes);
            route.attributes.extend(hops.filter(is_hop));
        }
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

fn is_hop(attribute: &RouteAttribute) -> bool {
    use RouteAttribute::{Gateway, MultiPath, Oif, Via};
    matches!(attribute, Oif(_) | Gateway(_) | Via(_) | MultiPath(_))
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
