//! A packet as a hook gives it: its bytes, and what the kernel says beside them.

use aya_ebpf::programs::{TcContext, XdpContext};

/// Whom a frame was sent to, as the kernel tells from its destination MAC.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum SentTo {
    Host,
    /// Several at once.
    Everybody,
    /// Not the device's own MAC. At a bridge's port the bridge's own is one of these.
    Other,
}

/// include/uapi/linux/if_packet.h
const PACKET_HOST: u32 = 0;
const PACKET_OTHERHOST: u32 = 3;
/// include/uapi/linux/if_vlan.h: the VLAN's number in a tag.
const VLAN: u32 = 0x0fff;

/// What the parser needs to know, the same at each hook.
pub trait Frame {
    /// Address of the first byte of the linear part.
    fn data(&self) -> usize;
    /// Address after its last byte.
    fn data_end(&self) -> usize;
    /// The packet's length with the link header, also of what is not in the linear part.
    fn length(&self) -> u32;
    /// The device that it came in by, or is about to leave by.
    fn ifindex(&self) -> u32;
    /// Whether a VLAN's tag was taken off it. Priority alone (VLAN 0, IEEE 802.1Q section 9.6) is no VLAN's.
    fn is_tagged(&self) -> bool;
    /// Whether it is several segments that the kernel has merged (GSO).
    fn is_merged(&self) -> bool;
    /// Whom its link header names.
    fn sent_to(&self) -> SentTo;
    /// Brings so many bytes into the linear part; whether that went well.
    fn pull(&self, bytes: u32) -> bool;
}

impl Frame for TcContext {
    #[inline(always)]
    fn data(&self) -> usize {
        TcContext::data(self)
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        TcContext::data_end(self)
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.len()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: `skb` is the context that the kernel gave; its fields are readable.
        unsafe { (*self.skb.skb).ifindex }
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: as above. Without a tag the second may be anything.
        unsafe { (*self.skb.skb).vlan_present != 0 && (*self.skb.skb).vlan_tci & VLAN != 0 }
    }

    #[inline(always)]
    fn is_merged(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.skb.skb).gso_size != 0 }
    }

    #[inline(always)]
    fn sent_to(&self) -> SentTo {
        // SAFETY: as above.
        match unsafe { (*self.skb.skb).pkt_type } {
            PACKET_HOST => SentTo::Host,
            PACKET_OTHERHOST => SentTo::Other,
            _ => SentTo::Everybody,
        }
    }

    #[inline(always)]
    fn pull(&self, bytes: u32) -> bool {
        self.pull_data(bytes).is_ok()
    }
}

impl Frame for XdpContext {
    #[inline(always)]
    fn data(&self) -> usize {
        XdpContext::data(self)
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        XdpContext::data_end(self)
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        (XdpContext::data_end(self) - XdpContext::data(self)) as u32
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ingress_ifindex() as u32
    }

    /// The tag, if the device took it off, cannot be seen here.
    #[inline(always)]
    fn is_tagged(&self) -> bool {
        false
    }

    /// What it is cannot be seen here.
    #[inline(always)]
    fn is_merged(&self) -> bool {
        false
    }

    /// Nobody has looked yet: [`crate::early`] compares MACs where it matters.
    #[inline(always)]
    fn sent_to(&self) -> SentTo {
        SentTo::Host
    }

    /// All of it is there.
    #[inline(always)]
    fn pull(&self, _: u32) -> bool {
        false
    }
}

/// A pointer to a header, if the frame's linear part holds all of it.
#[inline(always)]
pub fn header<T>(frame: &impl Frame, offset: usize) -> Option<*mut T> {
    let start = frame.data() + offset;
    // VERIFIER: the comparison with data_end, of the very pointer that is used, is what allows access.
    if start + size_of::<T>() > frame.data_end() {
        None
    } else {
        Some(start as *mut T)
    }
}
