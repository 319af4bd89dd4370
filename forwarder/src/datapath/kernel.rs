//! What the running kernel decides, in one place: how programs are attached, which helpers there are, what
//! limits memory, what is mounted. Each is asked for once, by trying where trying is possible; a version is
//! compared where the kernel behaves otherwise without showing it. What follows is decided elsewhere.

use std::{fs, path::Path, sync::OnceLock};

use anyhow::{Context as _, Result};
use aya::{
    programs::{ProgramError, ProgramType, SchedClassifier, TcAttachType},
    sys::{BpfHelper, SyscallError, is_helper_supported},
    util::KernelVersion,
};
use caps::{CapSet, Capability};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use crate::instance::in_user_namespace;

/// How a program gets to a device's tc ingress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// A link (6.6): it can be pinned, and goes with its last reference.
    Tcx,
    /// A filter of the qdisc clsact: it stays until somebody removes it.
    Clsact,
}

/// What maps and programs are charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// RLIMIT_MEMLOCK, before 5.11.
    Memlock,
    ControlGroup,
}

#[derive(Clone, Debug)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// Programs of one CPU may be preempted by one another.
    pub realtime: bool,
    /// What this process may not do, of what eBPF needs.
    pub missing_capabilities: Vec<&'static str>,
    /// What the program needs and the kernel has not.
    pub missing_helpers: Vec<&'static str>,
    pub attach: Attach,
    pub memory: Memory,
    /// `bpf_redirect_peer` carries packets that came from `lo`.
    pub peer_from_lo: bool,
    /// A program that refuses a bind can say which error that is (5.18).
    pub bind_error: bool,
    /// The kernel describes its own types.
    pub btf: bool,
    /// What lockdown restricts: `none`, `integrity`, `confidentiality`; `None` where that cannot be read.
    pub lockdown: Option<String>,
}

/// The capabilities without which there is no fast path.
pub const NEEDED: &str = "CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN";

/// The running kernel, probed when this is first called.
pub fn kernel() -> &'static Kernel {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    KERNEL.get_or_init(probe)
}

/// Whether a file system at /sys/fs/bpf can hold pins. It may be mounted at any time.
pub fn has_bpffs() -> bool {
    nix::sys::statfs::statfs("/sys/fs/bpf")
        .is_ok_and(|status| status.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}

/// Where cgroup v2 is mounted.
pub fn cgroup() -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut mounts = mounts.lines().map(|line| line.split(' '));
    mounts.find_map(|mut words| {
        let at = words.nth(1)?;
        (words.next() == Some("cgroup2")).then(|| at.to_owned())
    })
}

/// The larger part of the unprivileged ports that the kernel gives to no socket by itself, for SNAT: the first, and how many.
/// It may be changed at any time, in each network namespace.
pub fn snat_ports() -> (u16, u32) {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    beside(&range)
}

/// What leaves source ports to SNAT: the kernel's own default.
pub const SNAT_REMEDY: &str = "`sysctl net.ipv4.ip_local_port_range=\"32768 60999\"` and a restart";

fn beside(range: &str) -> (u16, u32) {
    let mut bounds = range
        .split_whitespace()
        .filter_map(|word| word.parse::<u16>().ok());
    let low = bounds.next().unwrap_or(32_768);
    let high = bounds.next().unwrap_or(60_999);
    let below = u32::from(low.saturating_sub(1024));
    let above = u32::from(u16::MAX - high);
    if below >= above {
        (1024, below)
    } else {
        (high + 1, above)
    }
}

impl Kernel {
    /// Lets this process's maps be as large as they are, where a limit counts.
    ///
    /// # Errors
    /// It may not.
    pub fn raise_memory_limit(&self) -> Result<()> {
        if self.memory == Memory::Memlock {
            setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).context(
                "this kernel counts maps as locked memory: run with CAP_SYS_RESOURCE, or after \
                 `ulimit -l unlimited`",
            )?;
        }
        Ok(())
    }

    /// Why there is no fast path with this kernel and these privileges, and what would change that.
    pub fn refusal(&self) -> Option<String> {
        if !self.missing_capabilities.is_empty() {
            return Some(format!(
                "no privilege for eBPF: {} missing; run as root or with {NEEDED}",
                self.missing_capabilities.join(" and ")
            ));
        }
        if !self.missing_helpers.is_empty() {
            return Some(format!(
                "the kernel {} has no {}: it takes 5.10 or later, with CONFIG_BPF_SYSCALL",
                self.release,
                self.missing_helpers.join(", ")
            ));
        }
        if self.realtime {
            return Some(format!(
                "the kernel {} is a real-time one (PREEMPT_RT), where a program can be interrupted by another on its CPU; \
                 one without PREEMPT_RT would change that",
                self.release
            ));
        }
        None
    }
}

fn probe() -> Kernel {
    let missing_capabilities = missing_capabilities();
    let helpers = [
        ("bpf_redirect_peer", BpfHelper::BPF_FUNC_redirect_peer),
        ("bpf_redirect_neigh", BpfHelper::BPF_FUNC_redirect_neigh),
    ];
    // Without privilege the kernel answers nothing.
    let missing_helpers = helpers
        .into_iter()
        .filter(|(_, helper)| missing_capabilities.is_empty() && !has_helper(*helper))
        .map(|(name, _)| name)
        .collect();
    // There is no asking for this one, and libbpf does the same: the helper came in the same version.
    let memory = if has_helper(BpfHelper::BPF_FUNC_ktime_get_coarse_ns) {
        Memory::ControlGroup
    } else {
        Memory::Memlock
    };
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let realtime = fs::read_to_string("/sys/kernel/realtime").is_ok_and(|it| it.trim() == "1");
    let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").ok();
    Kernel {
        release: release.trim().to_owned(),
        realtime,
        missing_capabilities,
        missing_helpers,
        attach: attach(),
        memory,
        // Before, such a packet keeps its route through lo, and the container answers with a reset. Redirects
        // are not carried out by BPF_PROG_TEST_RUN, so this shows only with a container.
        peer_from_lo: KernelVersion::current()
            .is_ok_and(|version| version >= KernelVersion::new(6, 1, 0)),
        bind_error: is_helper_supported(
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_set_retval,
        )
        .unwrap_or(false),
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        lockdown: lockdown.as_deref().and_then(chosen).map(str::to_owned),
    }
}

fn has_helper(helper: BpfHelper) -> bool {
    is_helper_supported(ProgramType::SchedClassifier, helper).unwrap_or(false)
}

/// A kernel without TCX does not know the attach type that it is asked about.
fn attach() -> Attach {
    match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
        Err(ProgramError::SyscallError(SyscallError { io_error, .. }))
            if io_error.raw_os_error() == Some(libc::EINVAL) =>
        {
            Attach::Clsact
        }
        _ => Attach::Tcx,
    }
}

/// The word in brackets of `none [integrity] confidentiality`.
fn chosen(lockdown: &str) -> Option<&str> {
    Some(lockdown.split_once('[')?.1.split_once(']')?.0)
}

/// Of those that eBPF needs. CAP_SYS_ADMIN includes two of them. The kernel asks for those two in the first user namespace.
fn missing_capabilities() -> Vec<&'static str> {
    if in_user_namespace() {
        return vec!["CAP_BPF and CAP_PERFMON outside of this user namespace"];
    }
    let effective = caps::read(None, CapSet::Effective).unwrap_or_default();
    let has = |capability| effective.contains(&capability);
    let mut missing = Vec::new();
    for (capability, name) in [
        (Capability::CAP_BPF, "CAP_BPF"),
        (Capability::CAP_PERFMON, "CAP_PERFMON"),
    ] {
        if !has(capability) && !has(Capability::CAP_SYS_ADMIN) {
            missing.push(name);
        }
    }
    if !has(Capability::CAP_NET_ADMIN) {
        missing.push("CAP_NET_ADMIN");
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_ports_are_the_larger_part_beside_the_kernels_own() {
        assert_eq!(beside("32768\t60999\n"), (1024, 31_744));
        assert_eq!(beside("1024\t60999\n"), (61_000, 4536));
        assert_eq!(beside("1024\t65535\n").1, 0);
        assert_eq!(beside(""), (1024, 31_744), "an unreadable setting");
    }

    #[test]
    fn lockdowns_choice_is_the_word_in_brackets() {
        assert_eq!(
            chosen("none integrity [confidentiality]\n"),
            Some("confidentiality")
        );
        assert_eq!(chosen(""), None);
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut kernel = Kernel {
            release: "5.4.0".into(),
            realtime: false,
            missing_capabilities: vec![],
            missing_helpers: vec!["bpf_redirect_peer"],
            attach: Attach::Clsact,
            memory: Memory::Memlock,
            peer_from_lo: false,
            bind_error: false,
            btf: false,
            lockdown: None,
        };
        let refusal = kernel.refusal().unwrap();
        assert!(
            refusal.contains("5.4.0 has no bpf_redirect_peer"),
            "{refusal}"
        );
        kernel.missing_capabilities.push("CAP_BPF");
        assert!(kernel.refusal().unwrap().contains("CAP_BPF missing"));
        kernel.missing_capabilities.clear();
        kernel.missing_helpers.clear();
        assert_eq!(kernel.refusal(), None);
        kernel.realtime = true;
        assert!(kernel.refusal().unwrap().contains("PREEMPT_RT"));
    }
}
