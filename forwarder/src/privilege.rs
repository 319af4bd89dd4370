//! What the daemon may do once it has started: which capabilities it keeps, and which system calls it may make. What
//! takes more (raising limits, giving the control socket to its group) happens before.

mod calls;

use std::sync::OnceLock;

use caps::{CapSet, Capability, CapsHashSet};
use nix::unistd::{User, geteuid};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use tracing::warn;

use crate::instance::USER;

/// What the daemon keeps, and what for. The unit has the same list.
pub const CAPABILITIES: [Capability; 6] = [
    Capability::CAP_BPF, // maps and programs
    // The verifier follows branches that are not taken from whoever lacks it, and refuses the programs.
    Capability::CAP_PERFMON,
    Capability::CAP_NET_ADMIN, // attaching programs, neighbours, marks
    Capability::CAP_NET_BIND_SERVICE, // ports below 1024
    Capability::CAP_NET_RAW,   // resets, and answers whose fragments come out of order
    Capability::CAP_NET_BROADCAST, // hears of changes inside of containers at once
];

/// What this process keeps: root needs one more where the service's user owns the directories for sockets, state and pins, or will
/// own them when the service starts.
pub fn kept() -> &'static [Capability] {
    static KEPT: OnceLock<Vec<Capability>> = OnceLock::new();
    KEPT.get_or_init(|| {
        let is_beside = geteuid().is_root() && matches!(User::from_name(USER), Ok(Some(_)));
        let more = is_beside.then_some(Capability::CAP_DAC_OVERRIDE);
        CAPABILITIES.into_iter().chain(more).collect()
    })
}

/// Reduces the calling thread to what is [`kept`], of which it keeps what it has.
pub fn reduce() {
    if let Err(error) = keep(kept()) {
        warn!("capabilities are kept that the instance does not need: {error}");
    }
}

fn keep(kept: &[Capability]) -> Result<(), Box<dyn std::error::Error>> {
    nix::sys::prctl::set_no_new_privs()?;
    let kept: CapsHashSet = kept.iter().copied().collect();
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in &caps::read(None, CapSet::Bounding)? - &kept {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    let permitted = &caps::read(None, CapSet::Permitted)? & &kept;
    for set in [CapSet::Effective, CapSet::Inheritable, CapSet::Permitted] {
        let now = &caps::read(None, set)? & &permitted;
        caps::set(None, set, &now)?;
    }
    Ok(())
}

/// Reduces this thread too, and restricts all threads to the system calls that a running instance makes.
pub fn confine() {
    reduce();
    let Some(filter) = filter() else {
        return; // a processor that the filter's maker does not know
    };
    if let Err(error) = seccompiler::apply_filter_all_threads(&filter) {
        warn!("system calls are not restricted: {error}");
    }
}

fn filter() -> Option<BpfProgram> {
    // A build for tests dies of a call that is not in the list, so that no test passes without it. What runs elsewhere
    // goes on: whatever asked for the call is told that it may not.
    let otherwise = if cfg!(debug_assertions) {
        SeccompAction::KillProcess
    } else {
        SeccompAction::Errno(libc::EPERM.cast_unsigned())
    };
    let allowed = calls::ALLOWED.iter().map(|call| (*call, Vec::new()));
    let architecture = std::env::consts::ARCH.try_into().ok()?;
    let filter = SeccompFilter::new(
        allowed.collect(),
        otherwise,
        SeccompAction::Allow,
        architecture,
    );
    filter.ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{
        sys::{
            signal::Signal,
            wait::{WaitStatus, waitpid},
        },
        unistd::{ForkResult, fork},
    };

    /// How a process ends that makes a call after it was confined.
    #[expect(unsafe_code, reason = "a child that tries a forbidden call")]
    fn ends(call: libc::c_long) -> WaitStatus {
        // SAFETY: the child allocates, which the C library allows after a fork, takes no other lock, and ends.
        match unsafe { fork() }.expect("fork") {
            ForkResult::Child => {
                confine();
                // SAFETY: neither call has an effect with these arguments.
                unsafe {
                    libc::syscall(call, 0, 0, 0, 0, 0);
                    libc::_exit(0)
                }
            }
            ForkResult::Parent { child } => waitpid(child, None).expect("its child"),
        }
    }

    #[test]
    fn a_call_that_is_not_listed_is_refused() {
        for call in [libc::SYS_execve, libc::SYS_ptrace, libc::SYS_mount] {
            let ended = ends(call);
            assert!(
                matches!(ended, WaitStatus::Signaled(_, Signal::SIGSYS, _)),
                "{call}: {ended:?}"
            );
        }
        assert!(matches!(ends(libc::SYS_getpid), WaitStatus::Exited(_, 0)));
    }

    #[test]
    fn the_unit_has_the_same_capabilities() {
        let unit = include_str!("../packaging/forwarder.service");
        let names = CAPABILITIES.map(|capability| capability.to_string());
        for set in ["AmbientCapabilities", "CapabilityBoundingSet"] {
            let line = format!("{set}={}", names.join(" "));
            assert!(unit.lines().any(|it| it == line), "no {line}");
        }
    }
}
