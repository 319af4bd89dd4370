//! Tier 1: frames through the loaded program by BPF_PROG_TEST_RUN, one file per kind of packet. Every field
//! of what comes out is compared, checksums are recomputed, and the counted reason is named.

mod arbitrary;
mod ban;
mod bench;
mod cut;
mod differential;
mod early;
mod flood;
mod forward;
mod fragment;
mod icmp;
mod install;
mod left;
mod limit;
mod local;
mod obstacle;
mod options;
mod pass;
mod pick_up;
mod reason;
mod refuse;
mod route;
mod selftests;
mod share;
mod source_port;
mod state;
mod usage;
