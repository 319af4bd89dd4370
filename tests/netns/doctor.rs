//! What the kernel is found to have: `doctor` shows it, newer kernels have no less, and whoever lacks something is
//! served all the same. What follows from a finding is tested where it applies; that too much is found would fail there.

use std::collections::BTreeMap;

use aya::util::KernelVersion;
use forwarder::datapath::kernel::{Attach, Memory, kernel};
use forwarder_tests::{
    daemon::{Daemon, Datapath, WITHOUT_BPFFS, WITHOUT_BTF, WITHOUT_CAPABILITIES, doctor},
    document::Finding,
    netns::Netns,
    topology::Topology,
};

use crate::{filters::somebodys_filter, scene::Scene};

fn findings(wrapper: &[&str]) -> BTreeMap<String, Finding> {
    let netns = Netns::new("host").unwrap();
    netns.ip("link set lo up").unwrap();
    doctor(&netns, wrapper).unwrap()
}

#[test]
fn a_newer_kernel_is_found_to_have_no_less() {
    let kernel = kernel();
    let version = KernelVersion::current().unwrap();
    let from = |major, minor| version >= KernelVersion::new(major, minor, 0);
    assert_eq!(kernel.refusal(), None);
    for (what, since, found) in [
        ("TCX", from(6, 6), kernel.attach == Attach::Tcx),
        (
            "cgroups",
            from(5, 11),
            kernel.memory == Memory::ControlGroup,
        ),
        ("peer from lo", from(6, 1), kernel.peer_from_lo),
        ("bpf_set_retval", from(5, 18), kernel.bind_error),
        (
            "BTF",
            std::fs::exists("/sys/kernel/btf/vmlinux").unwrap(),
            kernel.btf,
        ),
    ] {
        assert!(found || !since, "{}: no {what}", kernel.release);
    }
}

#[test]
fn doctor_shows_what_is_found() {
    let kernel = kernel();
    let findings = findings(&[]);
    let attach = match kernel.attach {
        Attach::Tcx => "TCX links",
        Attach::Clsact => "clsact filters",
    };
    let memory = match kernel.memory {
        Memory::Memlock => "charged to RLIMIT_MEMLOCK, which is raised",
        Memory::ControlGroup => "charged to the control group",
    };
    for (check, found) in [
        ("kernel", kernel.release.as_str()),
        ("redirects", "bpf_redirect_peer and bpf_redirect_neigh"),
        ("attach", attach),
        ("memory", memory),
        ("BTF", if kernel.btf { "present" } else { "absent" }),
    ] {
        assert_eq!(findings[check].found, found, "{check}");
    }
    assert_eq!(findings["attach"].ok, kernel.attach == Attach::Tcx);
    assert_eq!(findings["peer from lo"].ok, kernel.peer_from_lo);
    let lockdown = findings.get("lockdown").map(|finding| &*finding.found);
    assert_eq!(lockdown, kernel.lockdown.as_deref());
}

#[test]
fn doctor_names_what_a_process_may_not_do_and_the_remedy() {
    let privilege = &findings(&WITHOUT_CAPABILITIES)["privilege"];
    assert!(!privilege.ok);
    let found = &privilege.found;
    assert_eq!(found, "no CAP_BPF, no CAP_PERFMON, no CAP_NET_ADMIN");
    let remedy = "run as root or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN";
    assert_eq!(privilege.remedy.as_deref(), Some(remedy));
}

/// The kernel keeps these from others, who would be told that there are none.
#[test]
fn doctor_is_silent_about_what_it_may_not_see() {
    let netns = Netns::new("host").unwrap();
    netns.ip("link set lo up").unwrap();
    netns
        .ip("xfrm policy add src 10.9.0.0/16 dst 10.8.0.0/16 dir out action block")
        .unwrap();
    let all = doctor(&netns, &[]).unwrap();
    assert!(!all["IPsec"].ok, "{all:?}");
    let seen = doctor(&netns, &WITHOUT_CAPABILITIES).unwrap();
    for check in [
        "IPsec",
        "uplinks",
        "containers' links",
        "containers' addresses",
    ] {
        assert!(!seen.contains_key(check), "{seen:?}");
    }
    assert!(seen["shaping"].ok, "{seen:?}");
}

#[test]
fn doctor_names_containers_links_whose_filters_are_gone_past() {
    let scene = Scene::tcp().silent().auto();
    let scene = scene.flags(&["--respect-firewall"]).start();
    let Topology { host, backend, .. } = &scene.topology;
    let links = || doctor(host, &[]).unwrap()["containers' links"].clone();
    assert!(links().ok, "our own program is nobody else's");
    let clsact = format!("tc qdisc add dev {} clsact", backend.veth);
    let there = host.run(&clsact);
    assert!(
        there.is_ok() || kernel().attach == Attach::Clsact,
        "{there:?}"
    );
    somebodys_filter(host, &backend.veth, "egress");
    let (found, veth) = (links(), &backend.veth);
    assert!(!found.ok);
    assert_eq!(
        found.found,
        format!("tc egress of {veth} has others' programs")
    );
    scene.stop();
}

#[test]
fn doctor_tells_the_two_sides_of_a_link_apart() {
    let topology = Topology::new().unwrap();
    let Topology { host, backend, .. } = &topology;
    for device in ["eth0", backend.veth.as_str()] {
        host.run(&format!("tc qdisc add dev {device} ingress"))
            .unwrap();
        somebodys_filter(host, device, "ingress");
    }
    let findings = doctor(host, &[]).unwrap();
    let found = |device| format!("tc ingress of {device} has others' programs");
    let veth = &findings["containers' links"].found;
    assert_eq!(*veth, found(backend.veth.as_str()));
    assert_eq!(findings["uplinks"].found, found("eth0"));
}

#[test]
fn doctor_says_whether_source_ports_are_left() {
    let netns = Netns::new("host").unwrap();
    netns.ip("link set lo up").unwrap();
    let ports = || doctor(&netns, &[]).unwrap()["source ports"].clone();
    assert_eq!(ports().found, "31744 beside ip_local_port_range");
    netns
        .enter(|| std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535"))
        .unwrap();
    let found = ports();
    assert!(!found.ok, "{found:?}");
    let daemon = Daemon::start(&netns, &["8080:10.0.0.2:80"], Datapath::Auto).unwrap();
    let warned = daemon.said().contains("ip_local_port_range");
    assert!(warned, "{}", daemon.said());
    daemon.stop().unwrap();
}

#[test]
fn doctor_names_what_a_bridge_would_forbid() {
    let topology = Topology::new().unwrap();
    let Topology { host, backend, .. } = &topology;
    let bridges = || doctor(host, &[]).unwrap()["bridges"].clone();
    assert!(bridges().ok);
    host.run(&format!(
        "ip link set {} type bridge_slave isolated on",
        backend.veth
    ))
    .unwrap();
    host.run("ip link set br0 type bridge stp_state 1").unwrap();
    let mut expected = format!("br0 has STP, {} is isolated", backend.veth);
    // Not every kernel has it.
    if host
        .run("ip link set br1 type bridge vlan_filtering 1")
        .is_ok()
    {
        expected += ", br1 has VLAN filtering";
    }
    let found = bridges();
    assert_eq!(found.found, expected);
    assert!(!found.ok);
}

/// Whose programs go on forwarding.
#[test]
fn doctor_names_instances_that_were_killed() {
    let mut scene = Scene::tcp().silent().start();
    let left = |scene: &Scene| doctor(&scene.topology.host, &[]).unwrap()["left behind"].clone();
    let name = scene.daemon.instance().to_owned();
    assert!(!left(&scene).found.contains(&name));
    scene.daemon.kill().unwrap();
    let found = left(&scene);
    assert!(!found.ok && found.found.contains(&name), "{found:?}");
    assert!(found.remedy.unwrap().contains("forwarder down"));
    scene.daemon.restart().unwrap();
    assert!(!left(&scene).found.contains(&name));
    scene.stop();
}

#[test]
fn doctor_says_how_many_files_may_be_open() {
    let limited = "ulimit -n 1000 && exec \"$@\"";
    let found = findings(&["sh", "-c", limited, "sh"]);
    let files = &found["open files"];
    assert_eq!((files.ok, &*files.found), (false, "1000 at most"));
    assert!(files.remedy.as_ref().unwrap().contains("LimitNOFILE="));
}

/// Without it, ports of wide ranges are not kept from others.
#[test]
fn doctor_misses_cgroup_v2() {
    let unmounted = "umount -a -t cgroup2 && exec \"$@\"";
    let found = &findings(&["unshare", "--mount", "sh", "-c", unmounted, "sh"])["cgroup v2"];
    assert!(!found.ok && found.found == "not mounted", "{found:?}");
}

/// The fast path does without something that `doctor` misses.
fn served_without(wrapper: &[&str], check: &str) {
    let found = &findings(wrapper)[check];
    assert!(!found.ok, "{found:?}");
    let scene = Scene::tcp().wrapped(wrapper).start();
    scene.served_on_the_fast_path();
    scene.stop();
}

#[test]
fn a_kernel_without_btf_serves() {
    served_without(&WITHOUT_BTF, "BTF");
}

#[test]
fn a_machine_without_bpffs_serves() {
    served_without(&WITHOUT_BPFFS, "bpffs");
}

#[test]
fn doctor_names_who_bans_by_the_firewall_and_the_remedy() {
    let netns = Netns::new("host").unwrap();
    netns.ip("link set lo up").unwrap();
    let bans = || doctor(&netns, &[]).unwrap()["bans"].clone();
    let nft = |rules: &str| netns.run(&format!("nft {rules}")).unwrap();
    nft("add table inet filter");
    nft("add chain inet filter somebody");
    assert!(bans().ok, "chains of others are no bans");
    for (rules, found) in [
        ("inet f2b-table f2b-chain", "fail2ban"),
        ("ip crowdsec crowdsec-chain-input", "CrowdSec, fail2ban"),
        ("ip filter ufw-before-input", "CrowdSec, fail2ban, ufw"),
    ] {
        let [family, table, chain] = rules.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{rules}");
        };
        nft(&format!("add table {family} {table}"));
        nft(&format!("add chain {family} {table} {chain}"));
        assert_eq!(bans().found, found);
    }
    let bans = bans();
    assert!(!bans.ok);
    assert!(bans.remedy.unwrap().contains("forwarder ban"));
}

/// Of the instance that is named, since another one may not.
#[test]
fn doctor_does_not_warn_of_bans_that_the_instance_respects() {
    let netns = Netns::new("host").unwrap();
    netns.ip("link set lo up").unwrap();
    netns.run("nft add table inet f2b-table").unwrap();
    netns.run("nft add chain inet f2b-table f2b-chain").unwrap();
    for (flags, ok) in [(&["--respect-firewall"][..], true), (&[], false)] {
        let daemon = Daemon::start_with(&netns, &[], Datapath::Auto, flags).unwrap();
        let findings: Vec<Finding> = daemon.document(&["doctor"]).unwrap();
        let bans = findings.iter().find(|it| it.check == "bans").unwrap();
        assert_eq!(bans.ok, ok, "{bans:?}");
        assert!(bans.found.starts_with("fail2ban"));
        daemon.stop().unwrap();
    }
}
