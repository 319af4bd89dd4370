//! What the program hands to the daemon.

/// Octets of a frame that is handed over, with its link header: one of usual length, a jumbo frame, and the longest that there is,
/// which the kernel may have made of many datagrams.
pub const FRAME: usize = 2048 - HEADER;
pub const JUMBO_FRAME: usize = 9216 - HEADER;
pub const LONGEST_FRAME: usize = (1 << 16) + 64 - HEADER;
/// Bytes of the ring buffer: some hundred frames of usual length, or seven of the longest.
pub const BYTES: u32 = 1 << 19;
/// Octets in front of a frame.
const HEADER: usize = 2 * size_of::<u32>();

/// A fragment of a backend's datagram of which a later one came before the first, or a datagram that has to be cut up.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Fragment<const N: usize> {
    /// Octets of the frame.
    pub length: u32,
    /// Octets of payload of each datagram but the last, if the kernel has made one of several (GSO); else 0.
    pub segment: u32,
    pub frame: [u8; N],
}

const _: () = assert!(size_of::<Fragment<FRAME>>() == HEADER + FRAME);

/// The frame in what the ring buffer gave, and its segments' length; `None` if it is no [`Fragment`].
pub fn frame(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (segment, frame) = rest.split_first_chunk::<4>()?;
    let [length, segment] = [length, segment].map(|it| u32::from_ne_bytes(*it) as usize);
    Some((frame.get(..length)?, segment))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_as_long_as_it_says() {
        let [length, segment] = [2_u32, 1].map(u32::to_ne_bytes);
        let entry = |frame: &[u8]| {
            let mut entry = [0; 12];
            entry[..4].copy_from_slice(&length);
            entry[4..8].copy_from_slice(&segment);
            entry[8..8 + frame.len()].copy_from_slice(frame);
            entry
        };
        assert_eq!(frame(&entry(&[7, 8, 9])), Some((&[7, 8][..], 1)));
        assert_eq!(frame(&entry(&[7])[..9]), None);
        assert_eq!(frame(&length), None);
    }
}
