//! TCP as a flow follows it: what a segment says of the conversation's state. The states are nf_conntrack's
//! (net/netfilter/nf_conntrack_proto_tcp.c), told from bits of [`state`]; of the numbers, only those that either side
//! has acknowledged are kept, and not its window.

use crate::flow::{Flow, ORIGINAL, REPLY, state};

/// Flags (RFC 9293 section 3.1).
pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// How far a FIN or a reset may be from what the other side has acknowledged: more than is usually on its way.
const WINDOW: u32 = 1 << 23;
/// No window is larger (RFC 7323 section 2.3), so no acknowledgement goes further than this beyond the last.
const LARGEST_WINDOW: u32 = 1 << 30;
/// How much a SYN-ACK, and who answers it, may acknowledge besides the SYN (RFC 7413).
const EARLY_DATA: u32 = 1 << 16;

/// What a segment's header says, in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub flags: u8,
    pub sequence: u32,
    pub acknowledgement: u32,
    /// Octets of payload.
    pub payload: u32,
}

impl Segment {
    #[inline(always)]
    const fn has(self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// The number behind it: SYN and FIN count (RFC 9293 section 3.4).
    #[inline(always)]
    const fn end(self) -> u32 {
        let counted = self.has(SYN) as u32 + self.has(FIN) as u32;
        self.sequence
            .wrapping_add(self.payload)
            .wrapping_add(counted)
    }
}

/// Whether `number` is `start` or at most `length` behind it.
#[inline(always)]
const fn within(number: u32, start: u32, length: u32) -> bool {
    number.wrapping_sub(start) <= length
}

/// Follows one segment; returns whether it is one of this flow. What is not heeded here goes on all the same: to judge
/// it is its receiver's business. `is_direct` tells whether the flow's tuple may also be a direct connection's.
#[inline(always)]
pub fn follow(
    flow: &mut Flow,
    direction: usize,
    segment: Segment,
    is_direct: impl FnOnce() -> bool,
) -> bool {
    let state = flow.side(direction).state;
    if state & state::UNSETTLED == state::ESTABLISHED && !segment.has(SYN | FIN | RST) {
        send(flow, direction, segment);
        acknowledge(flow, direction, segment);
        return true;
    }
    if state & (state::PICKED_UP | state::ESTABLISHED) == state::PICKED_UP
        && !segment.has(SYN | RST)
    {
        if meet(flow, direction, segment)
            || direction == ORIGINAL
            || flow.state() & state::REPLIED != 0
            || !is_direct()
        {
            return true;
        }
        flow.set_state(flow.state() & !state::PROGRESS | state::FOREIGN);
        return false;
    }
    if direction == REPLY && misses(flow, segment) {
        if segment.has(SYN) || is_direct() {
            flow.set_state(flow.state() & !state::PROGRESS | state::FOREIGN);
            return false;
        }
        // Of an older connection with this tuple, whose end the client makes by a reset.
        return true;
    }
    change(flow, direction, segment);
    true
}

/// [`follow`], where the segment may change the state.
// VERIFIER: a function of its own, for its share of the stack, and to keep it out of what most packets run through.
#[inline(never)]
fn change(flow: &mut Flow, direction: usize, segment: Segment) {
    let state = next(flow, direction, segment);
    flow.set_state(state);
    send(flow, direction, segment);
}

/// Whether the backend does not speak of what the flow has begun: it answers a SYN that the flow has not had, or goes on with
/// a connection that is not this one.
#[inline(always)]
fn misses(flow: &Flow, segment: Segment) -> bool {
    let unanswered = flow.state() & state::REPLIED == 0;
    let closed =
        flow.state() & state::RESET != 0 || flow.state() & state::BOTH_FIN == state::BOTH_FIN;
    (unanswered || closed && segment.has(SYN))
        && segment.has(ACK)
        && !segment.has(RST)
        && !within(segment.acknowledgement, flow.reply.acknowledged, EARLY_DATA)
}

/// Begins to follow a connection in the midst of it, by a segment of the client's.
#[inline(always)]
pub fn pick_up(flow: &mut Flow, segment: Segment) {
    let guessed = if segment.has(FIN) {
        state::GUESSED_ORIGINAL
    } else {
        0
    };
    flow.set_state(flow.state() & !state::GUESSED_ORIGINAL | guessed | state::PICKED_UP);
    (flow.original.acknowledged, flow.original.sent) = (segment.acknowledgement, segment.end());
    (flow.reply.acknowledged, flow.reply.sent) = (segment.sequence, segment.acknowledgement);
}

/// Follows such a connection until both sides have spoken of each other's numbers; whether the segment does.
#[inline(never)]
fn meet(flow: &mut Flow, direction: usize, segment: Segment) -> bool {
    if direction == ORIGINAL && flow.state() & state::REPLIED == 0 {
        pick_up(flow, segment); // the first may have been forged
        return true;
    }
    let sent = flow.side(other(direction)).sent;
    let acknowledgement = segment.acknowledgement;
    if !segment.has(ACK) || !within(acknowledgement, sent.wrapping_sub(WINDOW), 2 * WINDOW) {
        return false;
    }
    let mut after = flow.state();
    if direction == REPLY {
        if after & state::REPLIED == 0 {
            flow.reply.sent = segment.sequence;
        }
        after |= state::REPLIED;
    } else {
        after |= state::ESTABLISHED;
    }
    acknowledge(flow, direction, segment);
    after = close(flow, direction, segment, after);
    flow.set_state(after);
    send(flow, direction, segment);
    true
}

/// Notes how far a side has sent.
#[inline(always)]
fn send(flow: &mut Flow, direction: usize, segment: Segment) {
    let side = flow.side_mut(direction);
    let end = segment.end();
    // A SYN within a connection is not believed until the other side has answered it.
    let begins = segment.has(SYN) && side.state & state::ESTABLISHED == 0;
    if begins || !segment.has(SYN | RST) && within(end, side.sent, LARGEST_WINDOW) {
        side.sent = end;
    }
}

/// Notes what a side has acknowledged.
#[inline(always)]
fn acknowledge(flow: &mut Flow, direction: usize, segment: Segment) {
    if segment.has(ACK) {
        flow.side_mut(direction).acknowledged = segment.acknowledgement;
    }
}

/// The number that the other side waits for, by its last word; none if that acknowledges what this side has not sent, and so was
/// not the other side's. This is asked only where it matters, as it is all that one direction reads of the other's numbers.
#[inline(always)]
fn waited_for(flow: &Flow, direction: usize) -> Option<u32> {
    let acknowledged = flow.side(other(direction)).acknowledged;
    within(flow.side(direction).sent, acknowledged, LARGEST_WINDOW).then_some(acknowledged)
}

#[inline(always)]
fn next(flow: &mut Flow, direction: usize, segment: Segment) -> u32 {
    let before = flow.state();
    let spoke = if direction == ORIGINAL {
        state::SPOKE_ORIGINAL
    } else {
        state::SPOKE_REPLY
    };
    if segment.has(RST) {
        if !is_heeded(flow, direction, segment) {
            return before;
        }
        // One that its receiver need not believe (RFC 5961 section 3) is taken back by the receiver's next word: if it was
        // the sender's own, that is answered by one that fits.
        let fits = waited_for(flow, direction) == Some(segment.sequence);
        let has_spoken = if fits || before & state::ESTABLISHED == 0 {
            0
        } else {
            spoke
        };
        return before & !state::BOTH_SPOKE | has_spoken | state::RESET;
    }
    let mut after = before;
    if segment.has(SYN) {
        after = synchronize(flow, direction, segment);
    }
    if after & state::ESTABLISHED == 0
        && after & state::REPLIED != 0
        && direction == ORIGINAL
        && segment.has(ACK)
        && within(
            segment.acknowledgement,
            flow.original.acknowledged,
            EARLY_DATA,
        )
    {
        after |= state::ESTABLISHED;
    }
    if after & state::ESTABLISHED != 0 {
        acknowledge(flow, direction, segment);
    }
    after = close(flow, direction, segment, after);
    // Both sides go on: whoever was sent the reset did not take it, or it was not the other side's.
    if after & state::RESET != 0 {
        after |= spoke;
        if after & state::BOTH_SPOKE == state::BOTH_SPOKE {
            after &= !(state::RESET | state::BOTH_SPOKE);
        }
    }
    after
}

/// The bits of a side's FIN: that it counts, that it was acknowledged, and that it may have been guessed.
#[inline(always)]
const fn bits_of_fin(direction: usize) -> [u32; 3] {
    if direction == ORIGINAL {
        [
            state::FIN_ORIGINAL,
            state::FIN_ORIGINAL_ACKNOWLEDGED,
            state::GUESSED_ORIGINAL,
        ]
    } else {
        [
            state::FIN_REPLY,
            state::FIN_REPLY_ACKNOWLEDGED,
            state::GUESSED_REPLY,
        ]
    }
}

/// What a segment says of its side's FIN, and of the other's. A FIN counts if it has the very number that its receiver waits
/// for. Any other that comes near may have been guessed: it counts once its receiver acknowledges just what ends with it, as it
/// acknowledges a FIN that it has got (RFC 9293 section 3.10.7.4), and not if its sender goes on.
#[inline(always)]
fn close(flow: &mut Flow, direction: usize, segment: Segment, mut after: u32) -> u32 {
    let peer = other(direction);
    let [fin, _, guessed] = bits_of_fin(direction);
    let [peers_fin, acknowledged, peers_guessed] = bits_of_fin(peer);
    if segment.has(ACK) {
        if after & peers_guessed != 0 && segment.acknowledgement == flow.side(peer).sent {
            after = after & !peers_guessed | peers_fin;
        }
        if after & peers_fin != 0 {
            after |= acknowledged;
        }
    }
    let (end, sent) = (segment.end(), flow.side(direction).sent);
    let waited_for = waited_for(flow, direction);
    if segment.has(FIN) && waited_for == Some(segment.sequence) {
        flow.side_mut(direction).sent = end;
        after = after & !guessed | fin;
    } else if end != sent && within(end, sent, LARGEST_WINDOW) {
        let nearest = waited_for.unwrap_or(sent).wrapping_sub(WINDOW);
        if segment.has(FIN) && within(segment.sequence, nearest, 2 * WINDOW) {
            after |= guessed;
        } else {
            after &= !guessed;
        }
    }
    after
}

/// Whether a SYN of the client's begins a new connection with the tuple of one in this state, which has ended.
#[inline(always)]
pub const fn is_used_again(state: u32) -> bool {
    state & state::BOTH_FIN == state::BOTH_FIN || state & state::RESET != 0
}

/// A SYN or a SYN-ACK.
#[inline(always)]
fn synchronize(flow: &mut Flow, direction: usize, segment: Segment) -> u32 {
    let mut after = flow.state();
    let begun = segment.sequence.wrapping_add(1);
    if direction == ORIGINAL {
        if segment.has(ACK) {
            return after; // the answer to a backend that opened at the same time
        }
        if is_used_again(after) {
            after &= !state::PROGRESS;
        }
        if after & state::ESTABLISHED == 0 {
            after &= !(state::BOTH_FIN
                | state::BOTH_GUESSED
                | state::BOTH_ACKNOWLEDGED
                | state::PICKED_UP);
            flow.reply.acknowledged = begun;
        } else {
            // The backend says whether it still has the old connection (RFC 5961 section 4) or takes a new one.
            after |= state::SYN_AGAIN;
        }
        return after;
    }
    if after & state::ESTABLISHED != 0 {
        if after & state::SYN_AGAIN == 0 || begun == flow.original.acknowledged {
            return after; // sent again
        }
        after &= !state::PROGRESS;
        flow.reply.acknowledged = segment.acknowledgement;
        flow.original.sent = segment.acknowledgement;
    }
    if !segment.has(ACK) || within(segment.acknowledgement, flow.reply.acknowledged, EARLY_DATA) {
        flow.original.acknowledged = begun;
        after |= state::REPLIED;
    }
    after
}

/// Whether a reset may be the sender's own: it answers the SYN, or has the number that its receiver waits for or the one
/// behind all that its sender has sent, as nf_conntrack has it. A forger that sees nothing of the conversation has to guess
/// that; who sends one for another number is asked for the right one (RFC 5961 section 3).
#[inline(always)]
fn is_heeded(flow: &Flow, direction: usize, segment: Segment) -> bool {
    if direction == REPLY && flow.state() & (state::REPLIED | state::PICKED_UP) == 0 {
        return segment.has(ACK)
            && within(segment.acknowledgement, flow.reply.acknowledged, EARLY_DATA);
    }
    let (waited_for, sent) = (waited_for(flow, direction), flow.side(direction).sent);
    if flow.state() & state::ESTABLISHED != 0 {
        return waited_for == Some(segment.sequence) || segment.sequence == sent;
    }
    within(segment.sequence, waited_for.unwrap_or(sent), WINDOW)
}

#[inline(always)]
const fn other(direction: usize) -> usize {
    if direction == ORIGINAL {
        REPLY
    } else {
        ORIGINAL
    }
}
