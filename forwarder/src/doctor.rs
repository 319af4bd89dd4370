//! What this machine can do for the fast path, and what would change it. What is loaded, and on kernels
//! without TCX attached to `lo` for a moment, goes again; nothing is changed.

use std::{collections::BTreeSet, path::Path};

use forwarder_common::{
    flow::{Timeouts, delivery},
    limits,
    publish::Interface,
};
use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;

use crate::{
    datapath::clsact::Side,
    datapath::kernel::{
        Attach, Kernel, Memory, NEEDED, SNAT_REMEDY, cgroup, has_bpffs, kernel, snat_ports,
    },
    datapath::{self, Datapath, devices::has_others},
    instance,
    network::containers::Watch,
    network::firewall,
    network::xfrm::Policy,
    network::{Link, Reader, Snapshot},
    plan,
    plan::locations::{asked, dispute, settle},
};

/// Open files for some 8,000 connections of the proxy.
const FILES: u64 = 16_384;

/// One finding.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub ok: bool,
    pub found: String,
    /// What would change it.
    pub remedy: Option<String>,
}

/// Looks at everything. What the firewall bans is a matter of whether the running instance respects it.
pub fn examine(respects_firewall: bool) -> Vec<Finding> {
    let kernel = kernel();
    let is_privileged = kernel.missing_capabilities.is_empty();
    let mut findings = Vec::new();
    let mut add = |check, ok: bool, found: &str, remedy: &str| {
        findings.push(Finding {
            check,
            ok,
            found: found.to_owned(),
            remedy: (!ok).then(|| remedy.to_owned()),
        });
    };
    add("kernel", true, &kernel.release, "");
    add(
        "privilege",
        is_privileged,
        &listed(&kernel.missing_capabilities, NEEDED),
        &format!("run as root or with {NEEDED}"),
    );
    let load = Datapath::load(&datapath::Options {
        instance: "doctor".into(),
        pins: None,
        snat: (1024, 1),
        flows: limits::FLOWS,
        timeouts: Timeouts::default(),
        respects_firewall: false,
    })
    .and_then(|mut datapath| datapath.rehearse());
    add(
        "load",
        load.is_ok(),
        &load
            .as_ref()
            .err()
            .map_or("the kernel takes it".into(), |error| format!("{error:#}")),
        "see the message; until then --datapath auto serves in user space",
    );
    if is_privileged {
        add_features(kernel, &mut add);
    }
    add(
        "bpffs",
        has_bpffs(),
        if has_bpffs() {
            "/sys/fs/bpf"
        } else {
            "not mounted"
        },
        "mount -t bpf bpf /sys/fs/bpf: pins make flows survive a restart",
    );
    add(
        "BTF",
        kernel.btf,
        if kernel.btf { "present" } else { "absent" },
        "a kernel with CONFIG_DEBUG_INFO_BTF; not needed by the fast path, helps bpftool",
    );
    let (_, ports) = snat_ports();
    add(
        "source ports",
        ports > 0,
        &format!("{ports} beside ip_local_port_range"),
        &format!("{SNAT_REMEDY}: clients on this host, and backends on other machines, need SNAT"),
    );
    if let Some(lockdown) = &kernel.lockdown {
        add("lockdown", true, lockdown, "");
    }
    if let Ok(snapshot) = snapshot() {
        add_network(&snapshot, &mut add);
        // The kernel shows these to a privileged process alone; to others there would seem to be none.
        if is_privileged {
            add_guarded(&snapshot, &mut add);
        }
    }
    if let Ok(banning) = firewall::banning() {
        let mut text = banning.iter().copied().collect::<Vec<_>>().join(", ");
        if banning.is_empty() {
            text = "nobody bans by the firewall".into();
        } else if respects_firewall {
            text += ", whose rules of FORWARD published ports meet, not those of INPUT";
        }
        add(
            "bans",
            banning.is_empty() || respects_firewall,
            &text,
            "`forwarder ban` for published ports: they pass by rules of INPUT, and without --respect-firewall by those of \
             FORWARD; docs/with-bans.md",
        );
    }
    add_machine(&mut add);
    let ipv6 = Path::new("/proc/net/if_inet6").exists();
    add(
        "IPv6",
        ipv6,
        if ipv6 { "enabled" } else { "disabled" },
        "boot without ipv6.disable=1",
    );
    findings
}

/// What is neither the kernel's nor the network's.
fn add_machine(add: &mut impl FnMut(&'static str, bool, &str, &str)) {
    let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    add(
        "open files",
        files >= FILES,
        &format!("{files} at most"),
        "LimitNOFILE= in the unit, or `ulimit -Hn`: the userland proxy needs two for a connection",
    );
    let cgroup = cgroup();
    add(
        "cgroup v2",
        cgroup.is_some(),
        cgroup.as_deref().unwrap_or("not mounted"),
        "mount -t cgroup2 none /sys/fs/cgroup: without it other processes can bind ports of a wide range",
    );
    let left = instance::left().map(|left| left.join(", "));
    let (is_empty, found) = match left {
        Ok(left) if left.is_empty() => (true, "nothing".into()),
        Ok(left) => (false, left),
        Err(error) => (false, format!("{error:#}")),
    };
    add(
        "left behind",
        is_empty,
        &found,
        "`forwarder down --instance NAME`, or a new start of it: what a killed instance, or one with --keep, had published is \
         forwarded until then",
    );
}

fn snapshot() -> anyhow::Result<Snapshot> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (mut reader, mut watch) = (Reader::open()?, Watch::deaf());
        let mut snapshot = Snapshot::default();
        watch.read(&mut reader, &mut snapshot, asked).await?;
        settle(&mut snapshot);
        Ok(snapshot)
    })
}

/// What others have set up in the network that forwarded packets would not meet.
fn add_network(snapshot: &Snapshot, add: &mut impl FnMut(&'static str, bool, &str, &str)) {
    let bridging = plan::bypassed_bridging(snapshot);
    let none = "nothing that is gone past";
    add(
        "bridges",
        bridging.is_empty(),
        &named(none, &bridging, ", "),
        "what is forwarded into a container and out of it goes past the bridge",
    );
    let shaped = snapshot.links.values().filter_map(|link| {
        let shaper = link.queueing.shaper.as_ref()?;
        Some(format!("{} ({shaper})", link.name))
    });
    let shaped: Vec<String> = shaped.collect();
    // Packets pass these queues, so there is nothing to change.
    let shaped = if shaped.is_empty() {
        "no limits by qdiscs".into()
    } else {
        format!("limits are met on {}", shaped.join(", "))
    };
    add("shaping", true, &shaped, "");
}

/// The same of what only a privileged process may see.
fn add_guarded(snapshot: &Snapshot, add: &mut impl FnMut(&'static str, bool, &str, &str)) {
    let by_neighbour = |(_, device): &(u32, Interface)| device.delivery == delivery::NEIGHBOUR;
    let uplinks = plan::interfaces(snapshot).filter(by_neighbour);
    let uplinks: BTreeSet<u32> = uplinks.map(|(ifindex, _)| ifindex).collect();
    let (uplinks, containers): (Vec<_>, Vec<_>) =
        plan::entered(snapshot).partition(|(ifindex, _)| uplinks.contains(ifindex));
    let sides = [Side::Egress, Side::Ingress];
    let mut add = |check, none, found: &[String], between, remedy| {
        add(
            check,
            found.is_empty(),
            &named(none, found, between),
            remedy,
        );
    };
    add(
        "containers' links",
        "nobody else's tc programs",
        &bypassed(&containers, &sides),
        ", ",
        "what is forwarded into a container, and its answers, go past them; with --respect-firewall those at egress see it",
    );
    add(
        "uplinks",
        "nobody else's tc programs on the way in",
        &bypassed(&uplinks, &[Side::Ingress]),
        ", ",
        "packets of published ports go past them",
    );
    let policies: Vec<String> = snapshot.policies.iter().map(Policy::to_string).collect();
    add(
        "IPsec",
        "no policies",
        &policies,
        ", ",
        "nothing is forwarded past a policy: publishes that one of them can match are served in user space",
    );
    let disputed = snapshot.disputed.iter();
    let disputed = disputed.map(|(&veth, &it)| dispute(snapshot, veth, it));
    let disputed: Vec<String> = disputed.collect();
    add(
        "containers' addresses",
        "each has one container",
        &disputed,
        "; ",
        "take the address from the container that should not have it",
    );
}

/// All that was found, or that there is none.
fn named(none: &str, found: &[String], between: &str) -> String {
    if found.is_empty() {
        none.into()
    } else {
        found.join(between)
    }
}

/// Sides of links that others have programs on, which forwarded packets do not meet.
fn bypassed(links: &[(u32, &Link)], sides: &[Side]) -> Vec<String> {
    let mut found = Vec::new();
    for (ifindex, link) in links {
        for &side in sides {
            let has_filters = side == Side::Ingress || !link.queueing.ingress_only;
            if has_others(side, *ifindex, &link.name, has_filters) {
                let side = side.name();
                found.push(format!("tc {side} of {} has others' programs", link.name));
            }
        }
    }
    found
}

/// What only a privileged process can ask for.
fn add_features(kernel: &Kernel, add: &mut impl FnMut(&'static str, bool, &str, &str)) {
    add(
        "redirects",
        kernel.missing_helpers.is_empty(),
        &listed(
            &kernel.missing_helpers,
            "bpf_redirect_peer and bpf_redirect_neigh",
        ),
        "a kernel from 5.10 on",
    );
    let tcx = kernel.attach == Attach::Tcx;
    add(
        "attach",
        tcx,
        if tcx { "TCX links" } else { "clsact filters" },
        "a kernel from 6.6 on; until then run `down` in the network namespace that `run` was in",
    );
    add(
        "peer from lo",
        kernel.peer_from_lo,
        if kernel.peer_from_lo {
            "bpf_redirect_peer"
        } else {
            "through the veth's queue"
        },
        "a kernel from 6.1 on: datagrams from this host that exceed the container's MTU go through user space",
    );
    add(
        "memory",
        true,
        match kernel.memory {
            Memory::ControlGroup => "charged to the control group",
            Memory::Memlock => "charged to RLIMIT_MEMLOCK, which is raised",
        },
        "",
    );
}

/// What is missing, or all that was looked for.
fn listed(missing: &[&str], all: &str) -> String {
    if missing.is_empty() {
        all.to_owned()
    } else {
        format!("no {}", missing.join(", no "))
    }
}

/// Findings as a person reads them.
pub fn text(findings: &[Finding]) -> String {
    let rows: Vec<[String; 4]> = findings
        .iter()
        .map(|finding| {
            [
                if finding.ok { "ok" } else { "--" }.into(),
                finding.check.into(),
                finding.found.clone(),
                finding.remedy.clone().unwrap_or_default(),
            ]
        })
        .collect();
    crate::cli::tables::table(["", "CHECK", "FOUND", "WHAT WOULD CHANGE IT"], &rows)
}
