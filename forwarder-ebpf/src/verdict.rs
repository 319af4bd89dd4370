//! What becomes of a packet: the one place where a verdict or a reason turns into tc's action.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use forwarder_common::reason::Reason;

use crate::maps;

/// The packet is ours, rewritten, and on its way.
#[derive(Clone, Copy)]
pub struct Forwarded {
    /// What `bpf_redirect*` returned: tc's action.
    pub action: i32,
    pub reason: Reason,
}

/// The pipeline's result: a packet on its way, or why not.
pub type Verdict = Result<Forwarded, Reason>;

/// Counts the reason and gives the action. `TC_ACT_UNSPEC` lets the next program go on, and the stack
/// after the last; `TC_ACT_OK` would end the chain here (TCX_NEXT and TCX_PASS, include/uapi/linux/bpf.h).
#[inline(always)]
pub fn action(verdict: Verdict) -> i32 {
    let (reason, action) = match verdict {
        Ok(forwarded) => (forwarded.reason, forwarded.action),
        Err(Reason::NotOurs) => return TC_ACT_UNSPEC,
        Err(reason) if reason.drops() => (reason, TC_ACT_SHOT),
        Err(reason) => (reason, TC_ACT_UNSPEC),
    };
    maps::count(reason);
    action
}
