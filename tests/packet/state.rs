//! The state of a flow, as it follows the packets of both directions.

use std::time::Duration;

use forwarder_common::flow::{Phase, state};
use forwarder_tests::frame::{ACK, FIN_ACK, Flags, Frame, Protocol, RST, RST_ACK, SYN, SYN_ACK};
use nix::time::{ClockId, clock_gettime};

use crate::bench::{Bench, REDIRECT, at, bench};

fn syn() -> Frame {
    Frame::first(
        Protocol::Tcp,
        at("198.51.100.9:4000"),
        at("198.51.100.2:8080"),
    )
}

/// The backend's answer to it.
fn syn_ack() -> Frame {
    let answer = syn().reply();
    Frame {
        source: at("172.31.0.2:80"),
        ..answer
    }
}

/// A segment from the client (true) or the backend, without payload.
type Step = (bool, Flags);

const HANDSHAKE: [Step; 3] = [(true, SYN), (false, SYN_ACK), (true, ACK)];
const ESTABLISHED: u32 = state::REPLIED | state::ESTABLISHED;

/// A conversation whose numbers are right, at the program.
struct Talk<'a> {
    bench: &'a mut Bench,
    /// The next segments of the client and of the backend, as flags without SYN or FIN.
    sides: [Frame; 2],
}

impl Talk<'_> {
    fn say(&mut self, steps: &[Step]) -> &mut Self {
        for &(from_client, flags) in steps {
            let frame = self.sides[usize::from(!from_client)]
                .clone()
                .with_flags(flags);
            self.send(from_client, frame);
        }
        self
    }

    /// Sends a frame, and both sides go on from what it says.
    fn send(&mut self, from_client: bool, frame: Frame) {
        self.forge(from_client, &frame);
        let follows = frame.reply();
        let [own, other] = if from_client { [0, 1] } else { [1, 0] };
        self.sides[own].sequence = follows.acknowledgement;
        self.sides[other].acknowledgement = follows.acknowledgement;
    }

    /// Sends a frame that neither side knows of.
    fn forge(&mut self, from_client: bool, frame: &Frame) -> &mut Self {
        let ifindex = if from_client {
            self.bench.uplink
        } else {
            self.bench.container
        };
        self.bench.send(frame, ifindex).forwarded();
        self
    }

    /// The same as its side would send next, with the numbers that far off.
    fn forge_at(&mut self, from_client: bool, flags: Flags, off: u32) -> &mut Self {
        let mut frame = self.sides[usize::from(!from_client)]
            .clone()
            .with_flags(flags);
        frame.sequence = frame.sequence.wrapping_add(off);
        frame.acknowledgement = frame.acknowledgement.wrapping_add(off);
        self.forge(from_client, &frame)
    }

    /// The client begins again, from another number.
    fn begin_again(&mut self) -> &mut Self {
        self.sides = sides(77_000_000);
        self
    }

    #[track_caller]
    fn is(&mut self, progress: u32) -> &mut Self {
        let state = self.bench.flow().1.state() & state::PROGRESS;
        assert_eq!(state, progress, "{state:#b} is not {progress:#b}");
        self
    }

    #[track_caller]
    fn is_in(&mut self, phase: Phase) -> &mut Self {
        let (key, flow) = self.bench.flow();
        assert_eq!(Phase::of(key.protocol, flow.state()), phase);
        self
    }
}

/// What both sides send first, as if the SYN had been sent already.
fn sides(further: u32) -> [Frame; 2] {
    [syn(), syn_ack()].map(|frame| {
        let mut frame = frame.with_flags(ACK);
        frame.sequence += further;
        frame.acknowledgement += further;
        frame
    })
}

fn talk(scenario: impl FnOnce(&mut Talk<'_>) + Send) {
    bench(|bench| {
        bench.publish(Protocol::Tcp, 8080, "172.31.0.2:80");
        let sides = sides(0);
        scenario(&mut Talk { bench, sides });
    });
}

#[test]
fn a_handshake_establishes() {
    talk(|t| {
        t.say(&HANDSHAKE[..1]).is(0).is_in(Phase::TcpSynSent);
        t.say(&HANDSHAKE[1..2]).is(state::REPLIED);
        t.is_in(Phase::TcpSynRecv);
        t.say(&HANDSHAKE[2..]).is(ESTABLISHED);
        t.is_in(Phase::TcpEstablished);
    });
}

#[test]
fn both_sides_may_open_at_once() {
    talk(|t| {
        t.say(&[(true, SYN), (false, SYN)]).is(state::REPLIED);
        t.say(&[(true, SYN_ACK)]).is(ESTABLISHED);
        t.say(&[(false, SYN_ACK), (true, ACK)]).is(ESTABLISHED);
    });
}

#[test]
fn an_answer_that_does_not_acknowledge_the_syn_is_somebody_elses() {
    talk(|t| {
        t.say(&HANDSHAKE[..1]);
        let mut frame = t.sides[1].clone().with_flags(SYN_ACK);
        frame.acknowledgement += 1 << 20;
        let outcome = t.bench.send(&frame, t.bench.container);
        outcome.passed(&frame.bytes(), "");
        t.is(0);
    });
}

/// A client that says it has heard what nobody has said: what the backend really does is heeded all the same.
#[test]
fn what_nobody_has_sent_cannot_be_acknowledged() {
    const CLOSED_BY_CLIENT: u32 = state::FIN_ORIGINAL | state::FIN_ORIGINAL_ACKNOWLEDGED;
    const CLOSED_BY_BACKEND: u32 = state::FIN_REPLY | state::FIN_REPLY_ACKNOWLEDGED;
    for (liar, end, bits) in [
        (true, FIN_ACK, CLOSED_BY_BACKEND),
        (true, RST_ACK, state::RESET | state::SPOKE_REPLY),
        (false, FIN_ACK, CLOSED_BY_CLIENT),
        (false, RST_ACK, state::RESET | state::SPOKE_ORIGINAL),
    ] {
        talk(|t| {
            t.say(&HANDSHAKE);
            let mut lie = t.sides[usize::from(!liar)].clone().with_flags(ACK);
            lie.acknowledgement = lie.acknowledgement.wrapping_add(1 << 29);
            t.forge(liar, &lie);
            t.say(&[(!liar, end)]);
            if end == FIN_ACK {
                t.say(&[(liar, ACK)]); // the truth
            }
            t.is(ESTABLISHED | bits);
        });
    }
}

/// Whoever lies so moves no number that the other's end is judged by.
#[test]
fn a_lie_about_numbers_makes_no_forged_end_count() {
    for forger in [true, false] {
        talk(|t| {
            t.say(&HANDSHAKE);
            let honest = t.sides[usize::from(!forger)].clone();
            // Each may be so far ahead that it is taken for data that was lost on the way.
            for steps in 1..=6_u32 {
                let mut data = honest.clone().with_flags(ACK);
                data.sequence = data
                    .sequence
                    .wrapping_add(steps.wrapping_mul((1 << 30) - 1));
                t.forge(forger, &data);
                let fin = data.with_flags(FIN_ACK);
                t.forge(forger, &fin);
                let state = t.bench.flow().1.state();
                assert_eq!(state & state::BOTH_FIN, 0, "{steps}: {state:b}");
            }
            t.say(&[(!forger, ACK), (forger, ACK)]);
            let state = t.bench.flow().1.state();
            assert_eq!(state & (state::BOTH_FIN | state::RESET), 0);
        });
    }
}

#[test]
fn an_answer_that_is_no_syn_answers_nothing() {
    talk(|t| {
        t.say(&HANDSHAKE[..1]);
        t.forge_at(false, ACK, 0).is(0);
        t.say(&HANDSHAKE[1..]).is(ESTABLISHED);
    });
}

#[test]
fn an_acknowledgement_of_something_else_proves_nothing() {
    talk(|t| {
        t.say(&HANDSHAKE[..2]);
        for off in [1 << 20, 1 << 31, u32::MAX] {
            t.forge_at(true, ACK, off).is(state::REPLIED);
        }
        t.say(&HANDSHAKE[2..]).is(ESTABLISHED);
    });
}

#[test]
fn a_backend_that_answers_with_data_at_once_is_established() {
    talk(|t| {
        t.say(&HANDSHAKE[..2]); // RFC 7413: data before the handshake is complete
        let mut data = t.sides[1].clone();
        data.payload = vec![0; 1000];
        t.send(false, data);
        t.say(&HANDSHAKE[2..]).is(ESTABLISHED);
    });
}

#[test]
fn one_side_closes_then_the_other() {
    talk(|t| {
        t.say(&HANDSHAKE).say(&[(true, FIN_ACK)]);
        t.is_in(Phase::TcpFinWait);
        t.say(&[(false, ACK)]).is_in(Phase::TcpCloseWait);
        let mut data = t.sides[1].clone();
        data.payload = vec![0; 1000];
        t.send(false, data);
        t.say(&[(true, ACK)]).is_in(Phase::TcpCloseWait);
        t.say(&[(false, FIN_ACK)]).is_in(Phase::TcpLastAck);
        t.say(&[(true, ACK)]).is_in(Phase::TcpTimeWait);
    });
}

#[test]
fn the_backend_may_close_first() {
    talk(|t| {
        t.say(&HANDSHAKE).say(&[(false, FIN_ACK)]);
        t.is_in(Phase::TcpFinWait);
        t.say(&[(true, ACK)]).is_in(Phase::TcpCloseWait);
        t.say(&[(true, FIN_ACK)]).is_in(Phase::TcpLastAck);
        t.say(&[(false, ACK)]).is_in(Phase::TcpTimeWait);
    });
}

#[test]
fn both_sides_may_close_at_once() {
    talk(|t| {
        t.say(&HANDSHAKE);
        let [from_client, from_backend] = t.sides.clone().map(|side| side.with_flags(FIN_ACK));
        t.send(true, from_client);
        t.forge(false, &from_backend).is_in(Phase::TcpLastAck);
        t.say(&[(true, ACK), (false, ACK)]);
        t.is_in(Phase::TcpTimeWait);
    });
}

#[test]
fn a_fin_from_far_away_closes_nothing() {
    talk(|t| {
        t.say(&HANDSHAKE).forge_at(true, FIN_ACK, 1 << 30);
        t.forge_at(false, FIN_ACK, 1 << 31).is(ESTABLISHED);
    });
}

/// With the addresses, and numbers that come near.
#[test]
fn a_fin_that_is_guessed_closes_nothing() {
    for from_client in [true, false] {
        talk(|t| {
            t.say(&HANDSHAKE);
            for off in [7, 1 << 20, (1_u32 << 22).wrapping_neg(), u32::MAX] {
                t.forge_at(from_client, FIN_ACK, off);
                t.is_in(Phase::TcpEstablished);
                // Its receiver says what it waits for, and the other side that it is there.
                t.say(&[(!from_client, ACK), (from_client, ACK), (!from_client, ACK)]);
                t.is_in(Phase::TcpEstablished);
            }
            let side = usize::from(!from_client);
            for _ in 0..360 {
                let mut data = t.sides[side].clone();
                data.payload = vec![0; 3000];
                t.send(from_client, data);
            }
            t.say(&[(!from_client, ACK)]).is(ESTABLISHED);
            t.say(&[(from_client, FIN_ACK)]).is_in(Phase::TcpFinWait);
            t.say(&[(!from_client, ACK)]).is_in(Phase::TcpCloseWait);
        });
    }
}

#[test]
fn a_fin_behind_data_counts_when_it_is_acknowledged() {
    for from_client in [true, false] {
        let side = usize::from(!from_client);
        talk(|t| {
            t.say(&HANDSHAKE);
            let before = t.sides[1 - side].clone();
            let mut data = t.sides[side].clone();
            data.payload = vec![0; 1000];
            t.send(from_client, data.clone());
            let data_alone = t.sides[1 - side].clone();
            let end = t.sides[side].clone().with_flags(FIN_ACK);
            t.send(from_client, end.clone());
            t.is_in(Phase::TcpEstablished);
            // Sent again, and what was on its way already, and the acknowledgement of the data alone.
            t.forge(from_client, &end).forge(from_client, &data);
            t.forge(!from_client, &before)
                .forge(!from_client, &data_alone);
            t.is_in(Phase::TcpEstablished);
            t.say(&[(!from_client, ACK)]).is_in(Phase::TcpCloseWait);
            t.say(&[(!from_client, FIN_ACK)]).is_in(Phase::TcpLastAck);
            t.say(&[(from_client, ACK)]).is_in(Phase::TcpTimeWait);
        });
        // With the data, of which a part was lost before.
        talk(|t| {
            t.say(&HANDSHAKE);
            let mut data = t.sides[side].clone();
            (data.payload, data.sequence) = (vec![0; 1000], data.sequence + 1000);
            t.send(from_client, data.with_flags(FIN_ACK));
            t.is_in(Phase::TcpEstablished);
            t.say(&[(!from_client, ACK)]).is_in(Phase::TcpCloseWait);
        });
    }
}

#[test]
fn a_fin_with_data_that_is_waited_for_counts_at_once() {
    for from_client in [true, false] {
        talk(|t| {
            t.say(&HANDSHAKE);
            let mut data = t.sides[usize::from(!from_client)].clone();
            data.payload = vec![0; 1000];
            t.send(from_client, data.with_flags(FIN_ACK));
            t.is_in(Phase::TcpFinWait);
            t.say(&[(!from_client, ACK)]).is_in(Phase::TcpCloseWait);
        });
    }
}

#[test]
fn both_sides_may_close_at_once_behind_data() {
    talk(|t| {
        t.say(&HANDSHAKE);
        let [client, backend] = t.sides.clone().map(|side| Frame {
            payload: vec![0; 1000],
            ..side
        });
        let ends = [&client, &backend].map(|data| {
            let mut end = data.clone().with_flags(FIN_ACK);
            (end.payload, end.sequence) = (vec![], data.sequence + 1000);
            end
        });
        t.forge(true, &client).forge(false, &backend);
        t.forge(true, &ends[0]).forge(false, &ends[1]);
        t.is_in(Phase::TcpEstablished);
        t.sides.iter_mut().for_each(|side| {
            (side.sequence, side.acknowledgement) =
                (side.sequence + 1001, side.acknowledgement + 1001);
        });
        t.say(&[(true, ACK)]).is_in(Phase::TcpCloseWait);
        t.say(&[(false, ACK)]).is_in(Phase::TcpTimeWait);
    });
}

#[test]
fn a_refusal_is_a_reset() {
    talk(|t| {
        t.say(&[(true, SYN), (false, RST_ACK)]).is(state::RESET);
        t.is_in(Phase::TcpClose);
    });
}

#[test]
fn a_reset_that_does_not_answer_the_syn_refuses_nothing() {
    talk(|t| {
        t.say(&[(true, SYN)]);
        t.forge_at(false, RST_ACK, 1 << 20);
        t.forge_at(false, RST, 0).is(0);
    });
}

#[test]
fn either_side_may_reset() {
    for from_client in [true, false] {
        talk(|t| {
            t.say(&HANDSHAKE).say(&[(from_client, RST)]);
            t.is(ESTABLISHED | state::RESET).is_in(Phase::TcpClose);
        });
    }
}

#[test]
fn a_reset_may_follow_data_that_nobody_has_acknowledged() {
    talk(|t| {
        t.say(&HANDSHAKE);
        let mut data = t.sides[1].clone();
        data.payload = vec![0; 1000];
        for _ in 0..10 {
            t.send(false, data.clone());
            data.sequence += 1000;
        }
        t.say(&[(false, RST)]).is_in(Phase::TcpClose);
    });
}

#[test]
fn a_reset_that_is_guessed_ends_nothing() {
    for from_client in [true, false] {
        talk(|t| {
            t.say(&HANDSHAKE);
            // Long after the beginning, of which the numbers could be known.
            for _ in 0..40_u32 {
                t.sides[0].sequence += 1 << 20;
                t.sides[1].acknowledgement += 1 << 20;
                t.sides[1].sequence += 1 << 20;
                t.sides[0].acknowledgement += 1 << 20;
                t.say(&[(true, ACK), (false, ACK), (true, ACK)]);
            }
            for off in [
                7,
                1 << 20,
                1 << 24,
                1 << 31,
                (40_u32 << 20).wrapping_neg(),
                u32::MAX,
            ] {
                t.forge_at(from_client, RST, off).is(ESTABLISHED);
            }
            t.say(&[(from_client, RST)]).is(ESTABLISHED | state::RESET);
        });
    }
}

/// A device fills a short frame up to 60 octets, and may leave something behind a longer one; no payload is either.
#[test]
fn what_stands_behind_a_packet_is_nothing_that_was_sent() {
    for length in [60, 64, 200] {
        talk(|t| {
            t.say(&HANDSHAKE);
            let mut data = t.sides[0].clone();
            data.payload = vec![0; 1000];
            t.send(true, data);
            let mut padded = t.sides[0].bytes();
            padded.resize(length, 0);
            let uplink = t.bench.uplink;
            assert_eq!(t.bench.send_bytes(&padded, uplink).action, REDIRECT);
            // The client knows no better than that nobody has acknowledged its data.
            t.say(&[(true, RST)]).is_in(Phase::TcpClose);
        });
    }
}

#[test]
fn a_conversation_that_goes_on_after_a_reset_is_not_over() {
    for from_client in [true, false] {
        talk(|t| {
            t.say(&HANDSHAKE);
            // It does believe this one; what was on its way already says nothing.
            t.forge_at(from_client, RST, 0);
            t.say(&[(!from_client, ACK), (!from_client, ACK)]);
            t.is_in(Phase::TcpClose);
            t.say(&[(from_client, ACK)]).is(ESTABLISHED);
            t.say(&[(from_client, RST)]).is_in(Phase::TcpClose);
            t.say(&[(from_client, ACK)]).is_in(Phase::TcpClose);
        });
    }
}

#[test]
fn a_tuple_that_is_closed_can_be_used_again_at_once() {
    const FINS: [Step; 3] = [(true, FIN_ACK), (false, FIN_ACK), (true, ACK)];
    for end in [&FINS[..], &FINS[..2], &[(false, RST)], &[(true, RST)]] {
        talk(|t| {
            t.say(&HANDSHAKE).say(end);
            t.begin_again().say(&HANDSHAKE[..1]).is(0);
            t.say(&HANDSHAKE[1..]).is(ESTABLISHED);
            t.say(&[(true, RST)]).is_in(Phase::TcpClose);
        });
    }
}

#[test]
fn a_syn_on_a_live_flow_changes_nothing_until_the_backend_takes_it() {
    talk(|t| {
        t.say(&HANDSHAKE);
        let before = t.sides.clone();
        t.begin_again().say(&HANDSHAKE[..1]);
        t.is(ESTABLISHED | state::SYN_AGAIN);
        // The backend has the old connection, and asks (RFC 5961); so does the client, who resets it.
        t.sides = before;
        t.say(&[(false, ACK)]).is_in(Phase::TcpEstablished);
        t.say(&[(true, RST)]).is_in(Phase::TcpClose);
        t.begin_again().say(&HANDSHAKE).is(ESTABLISHED);
    });
}

#[test]
fn a_backend_that_lost_a_connection_takes_a_new_one_on_its_tuple() {
    talk(|t| {
        t.say(&HANDSHAKE).begin_again();
        t.say(&HANDSHAKE[..2]).is(state::REPLIED);
        t.say(&HANDSHAKE[2..]).is(ESTABLISHED);
        t.say(&[(false, RST)]).is_in(Phase::TcpClose);
    });
}

#[test]
fn a_handshake_that_is_sent_again_begins_nothing() {
    talk(|t| {
        t.say(&HANDSHAKE);
        t.forge(true, &syn()).forge(false, &syn_ack());
        t.is(ESTABLISHED | state::SYN_AGAIN);
    });
    talk(|t| {
        t.say(&HANDSHAKE);
        t.forge_at(false, SYN_ACK, 1 << 20).is(ESTABLISHED);
    });
}

#[test]
fn a_flow_was_last_seen_by_the_monotonic_clock() {
    const TICK: Duration = Duration::from_millis(10);
    let now = || Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap());
    talk(|t| {
        let before = now();
        t.say(&HANDSHAKE);
        let last_seen = Duration::from_nanos(t.bench.flow().1.last_seen());
        assert!(before <= last_seen + 2 * TICK && last_seen <= now());
    });
}

#[test]
fn packets_and_bytes_are_counted_by_direction() {
    talk(|t| {
        t.say(&HANDSHAKE);
        let flow = t.bench.flow().1;
        assert_eq!(flow.packets(), [2, 1]);
        let length = syn().bytes().len() as u64;
        assert_eq!(flow.bytes(), [2 * length, length]);
    });
}
