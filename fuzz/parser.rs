//! The parser of the eBPF program, compiled for this machine, on arbitrary frames: it reads no octet behind the frame's last.
//! Behind that is a page that cannot be read.

#![no_main]

use std::{ptr, sync::OnceLock};

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use libfuzzer_sys::fuzz_target;

#[path = "../forwarder-ebpf/src/frame.rs"]
#[allow(dead_code, unreachable_pub, reason = "the program uses all of it")]
mod frame;
#[path = "../forwarder-ebpf/src/words.rs"]
#[allow(dead_code, unreachable_pub, reason = "the program uses all of it")]
mod words;
/// The place of the packet, which a program has in a map.
mod maps {
    use std::cell::UnsafeCell;

    use crate::parse::Packet;

    pub(crate) struct Place(UnsafeCell<Option<Packet>>);

    // SAFETY: the fuzzer has one thread.
    unsafe impl Sync for Place {}

    impl Place {
        pub(crate) fn get_ptr_mut(&self, _: u32) -> Option<*mut Packet> {
            // SAFETY: nobody else has it, as there is one thread. Plain integers, of which zero is valid for all.
            let place = unsafe { &mut *self.0.get() };
            Some(place.get_or_insert_with(|| unsafe { std::mem::zeroed() }))
        }
    }

    pub(crate) static PACKET: Place = Place(UnsafeCell::new(None));
}
#[path = "../forwarder-ebpf/src/parse.rs"]
#[allow(dead_code, unreachable_pub, reason = "the program uses all of it")]
mod parse;

const PAGE: usize = 4096;

/// A page that can be read and written, before one that cannot. `struct __sk_buff` has 32 bits for addresses.
fn page() -> usize {
    static START: OnceLock<usize> = OnceLock::new();
    *START.get_or_init(|| {
        // SAFETY: new mappings that nobody else knows.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            let start = libc::mmap(ptr::null_mut(), 2 * PAGE, rights, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            let guard = start.byte_add(PAGE);
            assert_eq!(libc::mprotect(guard, PAGE, libc::PROT_NONE), 0);
            start as usize
        }
    })
}

fuzz_target!(|input: (u16, &[u8])| {
    let (segment, frame) = input;
    let frame = &frame[..frame.len().min(PAGE)];
    // At an even address, as the kernel's frames: the headers' structs rely on it.
    let start = (page() + PAGE - frame.len()) & !1;
    // SAFETY: so many octets are left in the page.
    unsafe { ptr::copy_nonoverlapping(frame.as_ptr(), start as *mut u8, frame.len()) };
    // SAFETY: plain integers and pointers that nobody follows.
    let mut skb: __sk_buff = unsafe { std::mem::zeroed() };
    skb.len = frame.len() as u32;
    skb.data = start as u32;
    skb.data_end = (start + frame.len()) as u32;
    skb.gso_size = segment.into();
    skb.ifindex = 2;
    let ctx = TcContext::new(&raw mut skb);
    let Ok(packet) = parse::packet(&ctx) else {
        return;
    };
    if packet.part != parse::Part::Later {
        assert!(packet.l4() + 8 <= frame.len());
        assert!(parse::length_on_the_wire(&ctx, packet) as usize <= frame.len());
        let _ = parse::segment(&ctx, packet);
    }
});
