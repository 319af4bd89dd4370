//! What a publish is used for: an element of `USAGE`, and the key of `REFUSED`.

use bytemuck::{Pod, Zeroable};

use crate::layout::layout;

/// An element of `USAGE`, by the publish's index. Each field only grows, by atomic additions of the program and of user space.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Usage {
    /// Flows that have begun.
    pub begun: u64,
    /// Of these, those that were put into `FLOWS`: proven, or from the beginning because the backend sees an address of this host.
    pub kept: u64,
    /// Of these, those that are over, or not there any more. One whose tuple is used again is counted as put there once more.
    pub ended: u64,
    /// Packets and bytes of flows that have ended, in the original direction and the reply direction.
    pub packets: [u64; 2],
    pub bytes: [u64; 2],
    pub reserved: u64,
}

const _: () = assert!(size_of::<Usage>() == 64);

layout!(Usage: begun, kept, ended, packets, bytes, reserved);

/// The key of `REFUSED`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Refused {
    /// Index in `PUBLISHES`.
    pub publish: u32,
    /// A [`crate::reason::Reason`].
    pub reason: u32,
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "the marker that aya asks for")]
mod user {
    // SAFETY: `#[repr(C)]` and `bytemuck::Pod`: any bytes are a valid value, and there is no padding.
    unsafe impl aya::Pod for super::Usage {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Refused {}
}
