//! The program's hooks. `bpftool prog` shows these names; each is one call into the pipeline.
//!
//! Built for the host, this is an empty `main`, so that its lints and types are checked there too.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![expect(
    unsafe_code,
    reason = "a program of the kernel's: packets and maps are pointers"
)]
// Of the pinned toolchain: an atomic addition, which the target's types do not offer.
#![cfg_attr(
    target_arch = "bpf",
    feature(core_intrinsics),
    allow(
        internal_features,
        reason = "there is no other door to the instruction"
    )
)]
#![cfg_attr(
    not(target_arch = "bpf"),
    allow(dead_code, reason = "hooks are called by the kernel")
)]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "a key by value is one more copy on a stack of 512 bytes"
)]
#![allow(unreachable_pub, reason = "a binary crate: modules compose each other")]

mod admit;
mod clock;
mod deliver;
mod early;
mod egress;
mod flow;
mod fragment;
mod frame;
mod icmp;
mod ingress;
mod l3;
mod left;
mod limit;
mod maps;
mod parse;
mod publish;
mod rewrite;
mod route;
mod share;
mod source_port;
mod steer;
mod trace;
mod usage;
mod verdict;
mod words;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_UNSPEC, sk_action::SK_PASS, xdp_action},
    macros::{cgroup_sock_addr, classifier, sk_lookup, xdp},
    programs::{SkLookupContext, SockAddrContext, TcContext, XdpContext},
};

use crate::trace::Trail;

/// tc ingress of every device where packets enter.
#[classifier]
#[inline(always)]
pub fn ingress(ctx: TcContext) -> i32 {
    verdict::action(ingress::ingress(&ctx, &mut Trail::default()))
}

/// tc ingress of devices without Ethernet headers.
#[classifier]
#[inline(always)]
pub fn ingress_l3(ctx: TcContext) -> i32 {
    let _ = l3::enter(&ctx);
    TC_ACT_UNSPEC
}

/// As `ingress`, and a line for each packet.
#[classifier]
#[inline(always)]
pub fn ingress_traced(ctx: TcContext) -> i32 {
    traced(&ctx, followed_in)
}

/// tc egress of the same devices, where the host's firewall is respected.
#[classifier]
#[inline(always)]
pub fn egress(ctx: TcContext) -> i32 {
    verdict::action(egress::egress(&ctx, &mut Trail::default()))
}

/// The same, and a line for each packet.
#[classifier]
#[inline(always)]
pub fn egress_traced(ctx: TcContext) -> i32 {
    traced(&ctx, followed_out)
}

/// Runs a pipeline and writes what became of the packet.
#[inline(always)]
fn traced(ctx: &TcContext, pipeline: fn(*mut __sk_buff, &mut Trail) -> i32) -> i32 {
    let Some(trail) = Trail::of_this_cpu() else {
        return TC_ACT_UNSPEC; // there is an element 0
    };
    let action = pipeline(ctx.skb.skb, trail);
    trace::packet(ctx.skb.skb, trail);
    action
}

// VERIFIER (both): a function of its own, so that the line is written when the pipeline's stack is free again.
#[inline(never)]
fn followed_in(skb: *mut __sk_buff, trail: &mut Trail) -> i32 {
    let verdict = ingress::ingress(&TcContext::new(skb), trail);
    trail.ended(&verdict);
    verdict::action(verdict)
}

#[inline(never)]
fn followed_out(skb: *mut __sk_buff, trail: &mut Trail) -> i32 {
    let verdict = egress::egress(&TcContext::new(skb), trail);
    trail.ended(&verdict);
    verdict::action(verdict)
}

/// XDP of uplinks.
#[xdp]
#[inline(always)]
pub fn early(ctx: XdpContext) -> u32 {
    early::early(&ctx)
}

/// In its place while somebody looks on: tc carries everything, and shows it.
#[xdp]
pub fn early_traced(_: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// The kernel looks for the socket of a new connection or a datagram, in the instance's network namespace.
#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    steer::steer(&ctx);
    SK_PASS
}

/// Any process binds an IPv4 address; 0 refuses it.
#[cgroup_sock_addr(bind4)]
pub fn bind4(ctx: SockAddrContext) -> i32 {
    steer::may_bind(&ctx, true) as i32
}

/// Any process binds an IPv6 address; 0 refuses it.
#[cgroup_sock_addr(bind6)]
pub fn bind6(ctx: SockAddrContext) -> i32 {
    steer::may_bind(&ctx, false) as i32
}

/// A constant that the loader may have changed.
#[inline(always)]
fn setting<T: Copy>(constant: &T) -> T {
    // SAFETY: a valid reference. Volatile, since the loader changes what the compiler would fold in.
    unsafe { core::ptr::read_volatile(constant) }
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers that the program calls are for GPL-compatible programs; this crate is dual-licensed
/// MIT OR Apache-2.0, and MIT is compatible.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
