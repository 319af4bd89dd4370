//! Arbitrary frames through the loaded program (BPF_PROG_TEST_RUN), as root: what `tests/packet/arbitrary.rs` asserts of every
//! frame, for as long as one likes.

#![no_main]

use std::fs::File;

use forwarder_tests::netns::Netns;
use libfuzzer_sys::fuzz_target;
use nix::sched::{CloneFlags, setns};

#[path = "../tests/packet/arbitrary.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod arbitrary;
#[path = "../tests/packet/bench.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod bench;

thread_local! {
    static BENCH: bench::Bench = {
        let netns = Netns::new("fuzz").expect("root");
        netns.ip(bench::LINKS).expect("iproute2");
        let file = File::open(netns.path()).expect("a namespace of ours");
        setns(file, CloneFlags::CLONE_NEWNET).expect("root");
        let mut bench = bench::Bench::here(&bench::options());
        arbitrary::prepare(&mut bench);
        bench
    };
}

fuzz_target!(|input: (u8, u16, Vec<(u16, u8)>)| {
    let (which, length, changes) = input;
    let frame = arbitrary::changed(which.into(), length.into(), &changes);
    BENCH.with(|bench| arbitrary::check(bench, &frame));
});
