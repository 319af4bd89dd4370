//! What the program hands to the daemon.

/// Octets of a frame that is handed over, with its link header: one of usual length, and a jumbo frame.
pub const FRAME: usize = 2048 - size_of::<u32>();
pub const JUMBO_FRAME: usize = 9216 - size_of::<u32>();
/// Bytes of the ring buffer: some hundred frames of usual length.
pub const BYTES: u32 = 1 << 18;

/// A fragment of a backend's datagram of which a later one came before the first.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Fragment<const N: usize> {
    /// Octets of the frame.
    pub length: u32,
    pub frame: [u8; N],
}

/// The frame in what the ring buffer gave; `None` if it is no [`Fragment`].
pub fn frame(bytes: &[u8]) -> Option<&[u8]> {
    let (length, frame) = bytes.split_first_chunk::<4>()?;
    frame.get(..u32::from_ne_bytes(*length) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_as_long_as_it_says() {
        assert_eq!(frame(&[2, 0, 0, 0, 7, 8, 9]), Some(&[7, 8][..]));
        assert_eq!(frame(&[2, 0, 0, 0, 7]), None);
        assert_eq!(frame(&[2, 0]), None);
    }
}
