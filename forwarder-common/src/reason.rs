//! Why a packet was handled as it was. Numbered once, counted in `STATS`, shown by `stats` and
//! `trace`.

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// The number is the index in `STATS`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Reason { $($(#[$doc])* $name,)* }

        impl Reason {
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The name in `stats`, in metrics and in traces.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// Translated and delivered, client to backend.
    ForwardedOriginal = "forwarded_original",
    /// Translated and delivered, backend to client.
    ForwardedReply = "forwarded_reply",
    /// Translated and delivered: an ICMP error about a packet of a flow, in either direction.
    ForwardedError = "forwarded_error",
    /// Translated and sent on to another machine by XDP, in either direction.
    ForwardedEarly = "forwarded_xdp",
    /// A new flow was made.
    NewFlow = "new_flow",
    /// Passed: neither a published port nor a reply of a flow. Not counted, to cost others nothing.
    NotOurs = "not_ours",
    /// Passed: a published port's number, but the destination is no address of this host. Counted only where that took a
    /// look-up; nearly all transit is told apart before.
    NotLocal = "not_local",
    /// Passed: the port is of a range, but a socket of this host has it, such as a client's own.
    OtherSocket = "other_socket",
    /// Passed: it answers what left this host by others, such as a masqueraded container's query, from a published port's
    /// number; or it is a datagram of a conversation that began in user space and stays there.
    OthersAnswer = "others_answer",
    /// Passed: a fragment whose datagram's first was not carried; the slow path reassembles it.
    Fragment = "fragment",
    /// Handed to the daemon: the first fragment of a backend's datagram, after a later one; the daemon puts it together.
    OutOfOrder = "out_of_order",
    /// Handed to the daemon: a backend's datagram that is longer than the client's way takes and may be cut up, or a fragment of
    /// one; the daemon sends it in parts. Its sender is told as well (`too_big`).
    CutUp = "cut_up",
    /// Passed: TCP or UDP behind IPv4 options that say something or IPv6 extension headers, whoever's it is.
    Options = "options",
    /// Passed: a TCP packet without a flow that begins none: it is no SYN, and a socket of this host has the connection or
    /// the backend cannot know it by this packet.
    NotSyn = "not_syn",
    /// Passed: a link-local client, whose address means nothing on the backend's network.
    LinkLocal = "link_local",
    /// Passed: the backend is of the other address family; the userland proxy translates.
    OtherFamily = "other_family",
    /// Passed: no way to the backend is known.
    Unresolved = "unresolved",
    /// Passed: the publish takes no new flows.
    Draining = "draining",
    /// Passed: longer than the way's MTU, and may be cut up, which the slow path does.
    ToFragment = "to_fragment",
    /// Answered: the TTL or hop limit ends here, as the sender is told.
    Expired = "ttl_expired",
    /// Answered: longer than the way's MTU, as the sender is told.
    TooBig = "too_big",
    /// Answered by a reset: a segment of a flow that was cut off. What cannot be answered so is dropped.
    Cut = "cut",
    /// Dropped: the TTL has ended or the packet is too long, but its sender must not be told: it is an ICMP error,
    /// a later fragment or a frame to everybody, or too many were told just now.
    Untold = "untold",
    /// Passed: a client on this host sends more than the container's MTU, and the kernel (before 6.1) cannot deliver
    /// that; the userland proxy can.
    LongerThanMtu = "longer_than_mtu",
    /// Passed: the firewall is respected, and the backend's answers to another container could go past it; the userland
    /// proxy serves it.
    ContainerClient = "container_client",
    /// Passed: the firewall has translated the source of a client on this host, by a rule that masquerades by whatever device a
    /// packet leaves. The kernel takes that back from what its sockets send, so the userland proxy serves the client.
    SourceTranslated = "source_translated",
    /// Passed: the routes back to the client leave by another uplink than it comes by, but rules choose among routes by marks, and
    /// the firewall may mark the connection for its own uplink (CONNMARK). What the userland proxy answers gets that mark.
    MarksDecide = "marks_decide",
    /// Dropped: a source that cannot be: a loopback address from outside, an address that the host routes elsewhere, a reply
    /// of another device than the backend's.
    Martian = "martian_source",
    /// Dropped: the source is not on the allow-list.
    NotAllowed = "not_allowed",
    /// Dropped: the source is banned.
    Banned = "banned",
    /// Dropped: the client does not come by the device that the publish serves.
    OtherInterface = "other_interface",
    /// Dropped: the publish has as many flows as it may have.
    TooManyFlows = "too_many_flows",
    /// Dropped: as many flows have begun just now as may.
    RateLimited = "rate_limited",
    /// Dropped: the same of this source.
    SourceRateLimited = "source_rate_limited",
    /// Dropped: the publish has carried as much in this direction as it may.
    BandwidthExceeded = "bandwidth_exceeded",
    /// Passed: this host has no source ports to give, or a TCP client finds all towards this backend in use; the userland proxy
    /// has ports of its own.
    NoFreePort = "no_free_port",
    /// Dropped: a datagram finds every source port towards this backend in use, or the table full. Of senders that may be
    /// invented the proxy would have to open a socket for each.
    NoSourcePort = "no_source_port",
    /// Forwarded as well: the table of proven flows is full, and this one's stays among the half-open.
    FlowsFull = "flows_full",
    /// Counted beside what becomes of the packet: the table of proven flows is above three quarters full, and its source has a
    /// quarter of what is free, or more. The flow stays among the half-open, or finds no entry.
    SourceShare = "source_share",
    /// Passed: the kernel made no entry for a new flow, as the table is full; the userland proxy needs none.
    NoEntry = "no_entry",
    /// Dropped: the reply of a flow could not be sent back.
    NoWayBack = "no_way_back",
    /// Dropped: the headers could not be written.
    Unwritable = "unwritable",
}

impl Reason {
    /// Elements of `STATS`.
    pub const COUNT: u32 = Self::ALL.len() as u32;

    /// Whether the packet ends here; otherwise the stack has it.
    pub const fn drops(self) -> bool {
        matches!(
            self,
            Self::Martian
                | Self::NotAllowed
                | Self::Banned
                | Self::OtherInterface
                | Self::TooManyFlows
                | Self::RateLimited
                | Self::SourceRateLimited
                | Self::BandwidthExceeded
                | Self::NoSourcePort
                | Self::NoWayBack
                | Self::OutOfOrder
                | Self::Untold
                | Self::Cut
                | Self::Unwritable
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_numbers_are_indices() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert_eq!(
                Reason::ALL
                    .iter()
                    .filter(|r| r.name() == reason.name())
                    .count(),
                1
            );
        }
    }
}
