//! What this machine can do for the fast path, and what would change it. Only looks, changes nothing.

use std::{fs, path::Path};

use serde::Serialize;

use crate::datapath;

/// One finding.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub ok: bool,
    pub found: String,
    /// What would change it.
    pub remedy: Option<String>,
}

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |check, ok: bool, found: String, remedy: &str| {
        let remedy = (!ok).then(|| remedy.to_owned());
        findings.push(Finding {
            check,
            ok,
            found,
            remedy,
        });
    };
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    add("kernel", true, release.trim().into(), "");
    add(
        "eBPF program",
        datapath::is_built_in(),
        if datapath::is_built_in() {
            "built in"
        } else {
            "missing from this binary"
        }
        .into(),
        "build the binary by `cargo xtask`",
    );
    let load = datapath::Datapath::load(&datapath::Options {
        pins: None,
        snat: (1024, 1),
    });
    add(
        "load",
        load.is_ok(),
        load.as_ref().map_or_else(
            |error| format!("{error:#}"),
            |_| "the verifier accepts it".into(),
        ),
        "see the message; until then --datapath auto serves in user space",
    );
    drop(load);
    add(
        "attach",
        datapath::has_tcx(),
        if datapath::has_tcx() {
            "TCX links"
        } else {
            "clsact filters"
        }
        .into(),
        "a kernel from 6.6 on: links are pinned, so that forwarding survives the daemon",
    );
    add(
        "bpffs",
        datapath::has_bpffs(),
        if datapath::has_bpffs() {
            "/sys/fs/bpf"
        } else {
            "not mounted"
        }
        .into(),
        "mount -t bpf bpf /sys/fs/bpf: pins make flows survive a restart",
    );
    add(
        "BTF",
        Path::new("/sys/kernel/btf/vmlinux").exists(),
        if Path::new("/sys/kernel/btf/vmlinux").exists() {
            "present"
        } else {
            "absent"
        }
        .into(),
        "a kernel with CONFIG_DEBUG_INFO_BTF; not needed by the fast path, helps bpftool",
    );
    add(
        "IPv6",
        Path::new("/proc/net/if_inet6").exists(),
        if Path::new("/proc/net/if_inet6").exists() {
            "enabled"
        } else {
            "disabled"
        }
        .into(),
        "boot without ipv6.disable=1",
    );
    findings
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
    crate::output::table(["", "CHECK", "FOUND", "WHAT WOULD CHANGE IT"], &rows)
}
