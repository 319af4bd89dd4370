//! The rules that others write for a published port: Docker's for iptables, and the leanest that nftables can
//! have. The container is 172.31.0.2 on br0.

use std::fmt::Write as _;

/// A published port, the same on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) protocol: &'static str,
    pub(crate) number: u16,
}

impl Port {
    /// As `forwarder run -p` takes it. On IPv4 addresses alone, as the rules are.
    pub(crate) fn spec(&self) -> String {
        let Self { protocol, number } = self;
        format!("0.0.0.0:{number}:{CONTAINER}:{number}/{protocol}")
    }

    /// The same, to another machine.
    pub(crate) fn spec_to(&self, backend: &str) -> String {
        let Self { protocol, number } = self;
        format!("0.0.0.0:{number}:{backend}:{number}/{protocol}")
    }
}

const CONTAINER: &str = "172.31.0.2";
const NETWORK: &str = "172.31.0.0/24";

/// For iptables-restore: what dockerd 26 writes without a userland proxy (moby
/// libnetwork/drivers/bridge/setup_ip_tables_linux.go and portmapper/mapper.go), so that localhost and the
/// container's own network are served as well, by masquerade.
pub(crate) fn docker(ports: &[Port]) -> String {
    docker_to(ports, CONTAINER, NETWORK, "br0")
}

/// The same rules for a backend on another machine, and masquerade, so that it answers to this one.
pub(crate) fn remote(ports: &[Port], backend: &str, network: &str) -> String {
    let masquerade = format!("-A POSTROUTING -d {backend}/32 -j MASQUERADE\nCOMMIT\n*filter");
    docker_to(ports, backend, network, "eth1").replacen("COMMIT\n*filter", &masquerade, 1)
}

fn docker_to(ports: &[Port], backend: &str, network: &str, device: &str) -> String {
    let mut nat = "*nat\n:DOCKER - [0:0]\n\
        -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
        -A OUTPUT -m addrtype --dst-type LOCAL -j DOCKER\n"
        .to_owned();
    let mut filter = format!(
        "*filter\n:FORWARD DROP [0:0]\n:DOCKER - [0:0]\n:DOCKER-USER - [0:0]\n\
        :DOCKER-ISOLATION-STAGE-1 - [0:0]\n:DOCKER-ISOLATION-STAGE-2 - [0:0]\n\
        -A FORWARD -j DOCKER-USER\n-A FORWARD -j DOCKER-ISOLATION-STAGE-1\n\
        -A FORWARD -o {device} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
        -A FORWARD -o {device} -j DOCKER\n-A FORWARD -i {device} ! -o {device} -j ACCEPT\n\
        -A FORWARD -i {device} -o {device} -j ACCEPT\n\
        -A DOCKER-ISOLATION-STAGE-1 -i {device} ! -o {device} -j DOCKER-ISOLATION-STAGE-2\n\
        -A DOCKER-ISOLATION-STAGE-1 -j RETURN\n\
        -A DOCKER-ISOLATION-STAGE-2 -o {device} -j DROP\n-A DOCKER-ISOLATION-STAGE-2 -j RETURN\n\
        -A DOCKER-USER -j RETURN\n"
    );
    let mut masquerade = format!(
        "-A POSTROUTING -o {device} -m addrtype --src-type LOCAL -j MASQUERADE\n\
         -A POSTROUTING -s {network} ! -o {device} -j MASQUERADE\n"
    );
    for Port { protocol, number } in ports {
        let _ = writeln!(
            nat,
            "-A DOCKER -p {protocol} -m {protocol} --dport {number} -j DNAT --to-destination {backend}:{number}"
        );
        // dockerd masquerades a container that asks for itself; for one that asks for its neighbour, the
        // bridge's own traffic has to pass netfilter or, as here, to be masqueraded as well.
        let _ = writeln!(
            masquerade,
            "-A POSTROUTING -s {network} -d {backend}/32 -p {protocol} -m {protocol} --dport {number} -j MASQUERADE"
        );
        let _ = writeln!(
            filter,
            "-A DOCKER -d {backend}/32 ! -i {device} -o {device} -p {protocol} -m {protocol} --dport {number} -j ACCEPT"
        );
    }
    format!("{nat}{masquerade}COMMIT\n{filter}COMMIT\n")
}

/// For iptables-restore: DNAT and nothing else, where it is at its best.
pub(crate) fn bare(ports: &[Port]) -> String {
    let mut nat = "*nat\n".to_owned();
    for Port { protocol, number } in ports {
        let _ = writeln!(
            nat,
            "-A PREROUTING -p {protocol} -m {protocol} --dport {number} -j DNAT --to-destination {CONTAINER}:{number}"
        );
    }
    nat + "COMMIT\n"
}

/// For nft: one lookup in a map however many ports there are. With `flowtable`, established flows go round
/// the stack.
pub(crate) fn nftables(ports: &[Port], flowtable: bool) -> String {
    let elements: Vec<String> = ports
        .iter()
        .map(|Port { protocol, number }| format!("{protocol} . {number} : {CONTAINER} . {number}"))
        .collect();
    let dnat = "fib daddr type local dnat ip to meta l4proto . th dport map @published";
    let mut text = format!(
        "table ip bench {{\n\
         map published {{ type inet_proto . inet_service : ipv4_addr . inet_service\n\
         elements = {{ {} }}\n}}\n\
         chain prerouting {{ type nat hook prerouting priority dstnat; {dnat}; }}\n\
         chain output {{ type nat hook output priority -100; {dnat}; }}\n\
         chain postrouting {{ type nat hook postrouting priority srcnat;\n\
         ip saddr {NETWORK} ip daddr {CONTAINER} ct status dnat masquerade\n\
         oifname br0 fib saddr type local masquerade\n}}\n",
        elements.join(", ")
    );
    if flowtable {
        text += "flowtable fast { hook ingress priority 0; devices = { eth0, br0 }; }\n\
                 chain forward { type filter hook forward priority 0; ip protocol { tcp, udp } flow add @fast; }\n";
    }
    text + "}\n"
}
