//! What others have set up that a redirect or XDP would go round: which devices have no XDP for its sake, and what is only
//! named.

use crate::{
    network::{Kind, Link, Snapshot},
    plan::locations::container_networks,
};

/// Whether XDP may send and take packets of a device: what it sends meets no queue, and what it takes may be of a VLAN.
pub fn allows_xdp(link: &Link) -> bool {
    link.queueing.shaper.is_none() && !link.hides_tags
}

/// What is set up on the bridges of container networks, and on their ports, that the fast path goes round; in words.
pub fn bypassed_bridging(snapshot: &Snapshot) -> Vec<String> {
    let (mut found, networks) = (Vec::new(), container_networks(snapshot));
    for (&index, bridge) in &snapshot.links {
        if bridge.kind != Kind::Bridge || !networks.contains_key(&index) {
            continue;
        }
        let name = &bridge.name;
        if bridge.bridging.vlan_filtering {
            found.push(format!("{name} has VLAN filtering"));
        }
        if bridge.bridging.stp {
            found.push(format!("{name} has STP"));
        }
        let ports = snapshot.links.values();
        let ports = ports.filter(|port| port.controller == Some(index) && port.bridging.isolated);
        found.extend(ports.map(|port| format!("{} is isolated", port.name)));
    }
    found
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use forwarder_common::flow::delivery;

    use super::*;
    use crate::{
        config::XdpChoice,
        network::Bridging,
        plan::locations::tests::{MAC_A, NEIGHBOUR, host, ip, link},
        plan::{resolve, with_xdp},
    };

    #[test]
    fn where_a_limit_is_packets_pass_the_queue() {
        let mut host = host();
        host.neighbours.insert((3, ip("172.31.0.2")), NEIGHBOUR);
        host.forwarding.insert((3, MAC_A), 4);
        let xdp = |host: &Snapshot| with_xdp(host, XdpChoice::Native).count();
        assert_eq!(xdp(&host), 1, "the uplink");
        for ifindex in [2, 4] {
            let link = host.links.get_mut(&ifindex).expect("there");
            link.queueing.shaper = Some("tbf".into());
        }
        let hop = resolve(&host, ip("172.31.0.2")).expect("a route").hop;
        assert_eq!((hop.delivery, hop.ifindex), (delivery::DEVICE, 4));
        assert_eq!(xdp(&host), 0);
    }

    #[test]
    fn an_uplink_that_hides_vlans_has_no_xdp() {
        let mut host = host();
        let mut vlan = link("eth0.5", Kind::Other, None);
        vlan.vlan_of = Some(2);
        host.links.insert(6, vlan);
        assert_eq!(host.carrying_vlans(), BTreeSet::from([2]));
        let xdp = |host: &Snapshot| -> Vec<u32> {
            let devices = with_xdp(host, XdpChoice::Native);
            devices.map(|(index, _)| index).collect()
        };
        assert_eq!(xdp(&host), [2, 6], "where tags are seen");
        host.links
            .entry(2)
            .and_modify(|link| link.hides_tags = true);
        assert_eq!(xdp(&host), [6]);
        let filters = |link: &mut Link| link.bridging.vlan_filtering = true;
        host.links.entry(3).and_modify(filters);
        assert_eq!(host.carrying_vlans(), BTreeSet::from([2, 4]));
    }

    #[test]
    fn what_bridges_of_containers_forbid_is_named() {
        let mut host = host();
        assert!(bypassed_bridging(&host).is_empty());
        let all = Bridging {
            vlan_filtering: true,
            stp: true,
            isolated: true,
        };
        for link in host.links.values_mut() {
            link.bridging = all;
        }
        let found = bypassed_bridging(&host).join(", ");
        assert_eq!(
            found,
            "br0 has VLAN filtering, br0 has STP, veth0 is isolated"
        );
        host.links.insert(6, link("eth1", Kind::Other, Some(3)));
        assert!(bypassed_bridging(&host).is_empty(), "an uplink's bridge");
    }
}
