//! VLANs: of an uplink, of a port of a bridge, of a bridge itself, and of one that filters them.

use forwarder_tests::{daemon::Datapath, topology::Topology};

use crate::{
    scene::backends,
    worlds::{
        BRIDGED, FAMILIES, PROTOCOLS, WORD, carried, client_is, has, publish,
        reaches_another_machine, served, uplink_is,
    },
};

const VLAN: &str = "link add link eth0 name eth0.5 type vlan id 5";

/// Whether the kernel has VLANs.
fn has_vlans() -> bool {
    has("vlan id 5", "link eth0")
}

#[test]
fn an_uplink_that_is_a_vlan_is_served() {
    if !has_vlans() {
        return;
    }
    let topology = Topology::new().unwrap();
    uplink_is(&topology, "eth0.5", VLAN);
    client_is(&topology, "eth0.5", VLAN);
    served(&topology, &WORD);
    reaches_another_machine(&topology);
}

/// A port that is no veth, so that it looks like a network card.
#[test]
fn a_bridge_whose_port_is_a_vlan_is_served() {
    if !has_vlans() {
        return;
    }
    let topology = Topology::new().unwrap();
    let commands =
        format!("{VLAN}\nlink add lan type bridge\nlink set eth0.5 up\nlink set eth0.5 master lan");
    uplink_is(&topology, "lan", &commands);
    client_is(&topology, "eth0.5", VLAN);
    served(&topology, &WORD);
    reaches_another_machine(&topology);
}

/// The host's address is in a VLAN of the bridge that its network card is a port of.
#[test]
fn a_vlan_of_an_uplinks_bridge_is_served() {
    if !has_vlans() {
        return;
    }
    for filtering in [false, true] {
        let topology = Topology::new().unwrap();
        let commands = format!(
            "{BRIDGED}\nlink set lan type bridge vlan_filtering {}\nlink set lan up\n\
             link add link lan name lan.5 type vlan id 5",
            u8::from(filtering)
        );
        uplink_is(&topology, "lan.5", &commands);
        if filtering {
            for port in ["lan self", "eth0"] {
                let member = format!("bridge vlan add vid 5 dev {port}");
                topology.host.run(&member).unwrap();
            }
        }
        client_is(&topology, "eth0.5", VLAN);
        served(&topology, &WORD);
        reaches_another_machine(&topology);
    }
}

/// The containers are in one VLAN of a bridge, and so is the host, by a device of its own. They count as other machines.
#[test]
fn a_backend_in_a_vlan_of_a_bridge_is_reached_as_another_machine() {
    if !has_vlans() {
        return;
    }
    let topology = Topology::new().unwrap();
    let Topology {
        host,
        client,
        backend,
        peer,
        ..
    } = &topology;
    let [v4, v6] = FAMILIES.map(|family| backend.gateway(family));
    host.ip(&format!(
        "addr flush dev br0\nlink set br0 type bridge vlan_filtering 1\n\
         link add link br0 name br0.5 type vlan id 5\n\
         addr add {v4}/24 dev br0.5\naddr add {v6}/64 dev br0.5 nodad\nlink set br0.5 up"
    ))
    .unwrap();
    host.run("bridge vlan add vid 5 dev br0 self").unwrap();
    for container in [backend, peer] {
        let member = format!("bridge vlan add vid 5 dev {} pvid untagged", container.veth);
        host.run(&member).unwrap();
    }
    let _backends = backends(&backend.netns);
    let lan = FAMILIES.map(|family| topology.host_address(family));
    let daemon = publish(host, lan, |family| backend.address(family), Datapath::Ebpf);
    for (family, frontend) in FAMILIES.into_iter().zip(lan) {
        for protocol in PROTOCOLS {
            for from in [client, &peer.netns, host] {
                let seen = backend.gateway(family);
                carried(&daemon, from, protocol, frontend, &WORD, seen);
            }
        }
    }
    daemon.stop().unwrap();
}
