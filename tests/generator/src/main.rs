//! The benchmark's packet generator, an XDP program that writes a whole frame over each that the kernel hands it
//! (BPF_PROG_TEST_RUN with live frames), numbers its flow and redirects it out of one device; and the sink, which
//! drops such frames where they arrive, before anybody's stack spends time on them, and answers those that ask for it.
//! `cargo xtask bench` builds it as the eBPF program is built.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![expect(
    unsafe_code,
    reason = "a program of the kernel's: packets and maps are pointers"
)]
#![cfg_attr(
    not(target_arch = "bpf"),
    allow(dead_code, reason = "the hook is called by the kernel")
)]

use core::ptr;

use aya_ebpf::{
    bindings::{
        TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    },
    helpers::{bpf_redirect, bpf_redirect_peer},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use forwarder_common::{checksum, tuple::UDP};

/// Words of a frame of 60 bytes: what a 64-byte Ethernet frame has without its frame check sequence.
const WORDS: usize = 15;

/// Set by the benchmark: Ethernet, IPv4 and UDP without a checksum. The flow's number is added to the low half of
/// the source address and becomes the source port.
#[unsafe(no_mangle)]
static TEMPLATE: [u32; WORDS] = [0; WORDS];
/// Set by the benchmark: flows that take turns.
#[unsafe(no_mangle)]
static FLOWS: u32 = 1;
/// Set by the benchmark: frames of a flow that follow one another, a block of flows later each, so that answers come
/// in between.
#[unsafe(no_mangle)]
static REPEAT: u32 = 1;
/// Set by the benchmark: of so many frames the first is answered; 0 for none.
#[unsafe(no_mangle)]
static ANSWERED: u32 = 0;
/// Set by the benchmark: the device that frames leave by.
#[unsafe(no_mangle)]
static IFINDEX: u32 = 0;

/// Set by the benchmark: the port that the sink takes, in wire order.
#[unsafe(no_mangle)]
static PORT: u16 = 0;

/// Set by the benchmark: destination and source of frames that only hop.
#[unsafe(no_mangle)]
static HOP_MACS: [u16; 6] = [0; 6];
/// Set by the benchmark: not 0 if they go to the other end of the device.
#[unsafe(no_mangle)]
static HOP_TO_PEER: u32 = 0;

/// Number of the next frame. Only one CPU generates.
static mut NEXT: u32 = 0;

const IPV4_CHECKSUM: usize = 14 + 10;
const SOURCE_LOW: usize = 14 + 14;
const PROTOCOL: usize = 14 + 9;
const SOURCE_PORT: usize = 14 + 20;
const DESTINATION_PORT: usize = 14 + 22;
/// The word of the payload that says whether the sink is to answer.
const MARK: usize = WORDS - 1;
/// Flows whose frames are repeated together.
const BLOCK: u32 = 4096;
/// Flows of one source address: the ports from 32768 on.
const PORTS: u32 = 1 << 15;

#[xdp]
fn generate(ctx: XdpContext) -> u32 {
    let start = ctx.data();
    if start + WORDS * 4 > ctx.data_end() {
        return XDP_ABORTED;
    }
    // SAFETY: constants that the loader changed, read as they are now, and a counter that no other CPU has.
    let (flows, repeat, answered, ifindex, number) = unsafe {
        let number = NEXT;
        NEXT = number.wrapping_add(1);
        (
            ptr::read_volatile(&raw const FLOWS).max(1),
            ptr::read_volatile(&raw const REPEAT).max(1),
            ptr::read_volatile(&raw const ANSWERED),
            ptr::read_volatile(&raw const IFINDEX),
            number,
        )
    };
    let round = number / repeat.wrapping_mul(BLOCK).max(1);
    let flow = round.wrapping_mul(BLOCK).wrapping_add(number % BLOCK) % flows;
    let port = ((PORTS + flow % PORTS) as u16).to_be();
    // SAFETY: the bounds were checked above. The kernel's live frames begin behind a headroom that is a
    // multiple of eight (net/bpf/test_run.c), so the words are aligned. What the frame was before does not
    // matter: the kernel uses it again as its last receiver left it.
    unsafe {
        let words = start as *mut u32;
        for at in 0..WORDS {
            *words.add(at) = ptr::read_volatile((&raw const TEMPLATE).cast::<u32>().add(at));
        }
        *words.add(MARK) = (answered != 0 && number % answered == 0) as u32;
        let frame = start as *mut u8;
        let low = frame.add(SOURCE_LOW).cast::<u16>();
        let (first, sum) = (*low, frame.add(IPV4_CHECKSUM).cast::<u16>());
        *low = u16::from_be(first)
            .wrapping_add((flow / PORTS) as u16)
            .to_be();
        *sum = checksum::update(*sum, checksum::difference(first as u32, *low as u32));
        *frame.add(SOURCE_PORT).cast() = port;
    }
    // SAFETY: a helper without pointers.
    if unsafe { bpf_redirect(ifindex, 0) } == XDP_REDIRECT as i64 {
        XDP_REDIRECT
    } else {
        XDP_ABORTED
    }
}

/// tc ingress of the container: the device has counted the frame already.
#[classifier]
fn sink(ctx: TcContext) -> i32 {
    match frame(ctx.data(), ctx.data_end()) {
        Kind::Other => TC_ACT_UNSPEC,
        Kind::Taken => TC_ACT_SHOT,
        // SAFETY: the context that the kernel gave; a helper without pointers.
        Kind::TurnedRound => unsafe { bpf_redirect((*ctx.skb.skb).ifindex, 0) as i32 },
    }
}

/// The same in a driver, for frames that never become an skb.
#[xdp]
fn sink_early(ctx: XdpContext) -> u32 {
    match frame(ctx.data(), ctx.data_end()) {
        Kind::Other => XDP_PASS,
        Kind::Taken => XDP_DROP,
        Kind::TurnedRound => XDP_TX,
    }
}

/// What a frame is to the sink.
enum Kind {
    Other,
    Taken,
    /// The answer to one, which it was.
    TurnedRound,
}

/// Tells the generator's frames for the port, and makes answers of those that ask for one. A checksum does not change
/// when what it covers changes places.
#[inline(always)]
fn frame(start: usize, end: usize) -> Kind {
    if start + WORDS * 4 > end {
        return Kind::Other;
    }
    // SAFETY: the bounds were checked above, and headers and payload are aligned to two bytes as the frame is
    // (NET_IP_ALIGN). The constant is one that the loader changed, read as it is now.
    unsafe {
        let frame = start as *mut u8;
        let port = *frame.add(DESTINATION_PORT).cast::<u16>();
        if *frame.add(PROTOCOL) != UDP || port != ptr::read_volatile(&raw const PORT) {
            return Kind::Other;
        }
        if *frame.add(4 * MARK).cast::<u16>() == 0 {
            return Kind::Taken;
        }
        ptr::swap(frame.cast::<[u16; 3]>(), frame.add(6).cast());
        ptr::swap(frame.add(26).cast::<[u16; 2]>(), frame.add(30).cast());
        ptr::swap(
            frame.add(SOURCE_PORT).cast::<u16>(),
            frame.add(DESTINATION_PORT).cast(),
        );
    }
    Kind::TurnedRound
}

/// tc ingress of the host: what any program there costs at least, whatever it does.
#[classifier]
fn nothing(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// tc ingress of the host: IPv4 gets other MACs and leaves by another device. Nothing is looked up, nothing
/// rewritten: it is what a hop by tc costs at least.
#[classifier]
fn hop(ctx: TcContext) -> i32 {
    if !set_macs(ctx.data(), ctx.data_end()) {
        return TC_ACT_UNSPEC;
    }
    // SAFETY: constants that the loader changed, read as they are now; helpers without pointers.
    unsafe {
        let ifindex = ptr::read_volatile(&raw const IFINDEX);
        if ptr::read_volatile(&raw const HOP_TO_PEER) != 0 {
            bpf_redirect_peer(ifindex, 0) as i32
        } else {
            bpf_redirect(ifindex, 0) as i32
        }
    }
}

/// The same by XDP.
#[xdp]
fn hop_early(ctx: XdpContext) -> u32 {
    if !set_macs(ctx.data(), ctx.data_end()) {
        return XDP_PASS;
    }
    // SAFETY: as above.
    unsafe { bpf_redirect(ptr::read_volatile(&raw const IFINDEX), 0) as u32 }
}

/// Gives an IPv4 frame the MACs of its next hop; whether it is one.
#[inline(always)]
fn set_macs(start: usize, end: usize) -> bool {
    if start + 14 > end {
        return false;
    }
    // SAFETY: the bounds were checked above, and frames are aligned to two bytes (NET_IP_ALIGN). A constant that the
    // loader changed is read as it is now.
    unsafe {
        let words = start as *mut u16;
        if *words.add(6) != 0x0800_u16.to_be() {
            return false;
        }
        for at in 0..6 {
            let word = (&raw const HOP_MACS).cast::<u16>().add(at);
            *words.add(at) = ptr::read_volatile(word);
        }
    }
    true
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
