//! The state of a flow, as it follows the packets of both directions.

use forwarder_common::flow::state;
use forwarder_tests::frame::{ACK, FIN_ACK, Frame, Protocol, RST, SYN, SYN_ACK};

use crate::bench::{Bench, at, bench};

fn syn() -> Frame {
    Frame::first(
        Protocol::Tcp,
        at("198.51.100.9:4000"),
        at("198.51.100.2:8080"),
    )
}

/// Sends flags from the client (true) or the backend, and returns the flow's progress.
fn after(bench: &mut Bench, steps: &[(bool, forwarder_tests::frame::Flags)]) -> u32 {
    bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
    for &(from_client, flags) in steps {
        if from_client {
            bench
                .send(&syn().with_flags(flags), bench.uplink)
                .forwarded();
        } else {
            let answer = Frame {
                destination: at("172.31.0.2:80"),
                ..syn()
            }
            .reply();
            bench
                .send(&answer.with_flags(flags), bench.container)
                .forwarded();
        }
    }
    bench.flow().1.state & state::PROGRESS
}

const HANDSHAKE: [(bool, forwarder_tests::frame::Flags); 3] =
    [(true, SYN), (false, SYN_ACK), (true, ACK)];

#[test]
fn a_syn_alone_is_not_established() {
    bench(|b| assert_eq!(after(b, &HANDSHAKE[..1]), 0));
    bench(|b| assert_eq!(after(b, &HANDSHAKE[..2]), state::REPLIED));
}

#[test]
fn a_handshake_establishes() {
    bench(|b| assert_eq!(after(b, &HANDSHAKE), state::REPLIED | state::ESTABLISHED));
}

#[test]
fn both_sides_close() {
    let established = state::REPLIED | state::ESTABLISHED;
    bench(|b| {
        let half = after(b, &[&HANDSHAKE[..], &[(true, FIN_ACK)]].concat());
        assert_eq!(half, established | state::FIN_ORIGINAL);
        assert_eq!(after(b, &[(false, FIN_ACK)]), established | state::BOTH_FIN);
    });
}

#[test]
fn a_refusal_is_a_reset() {
    bench(|b| assert_eq!(after(b, &[(true, SYN), (false, RST)]), state::RESET));
}

#[test]
fn a_closed_tuple_can_be_used_again() {
    bench(|b| {
        after(
            b,
            &[
                &HANDSHAKE[..],
                &[(true, FIN_ACK), (false, FIN_ACK), (true, ACK)],
            ]
            .concat(),
        );
        assert_eq!(after(b, &[(true, SYN)]), 0);
        assert_eq!(
            after(b, &HANDSHAKE[1..]),
            state::REPLIED | state::ESTABLISHED
        );
    });
}

#[test]
fn a_syn_on_a_live_flow_changes_nothing() {
    bench(|b| {
        let before = after(b, &HANDSHAKE);
        assert_eq!(after(b, &[(true, SYN)]), before);
    });
}

#[test]
fn packets_and_bytes_are_counted_by_direction() {
    bench(|b| {
        after(b, &HANDSHAKE);
        let flow = b.flow().1;
        assert_eq!(flow.packets, [2, 1]);
        let length = syn().bytes().len() as u64;
        assert_eq!(flow.bytes, [2 * length, length]);
    });
}
