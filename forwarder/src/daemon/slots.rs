//! Places in `PUBLISHES`. One is given to another publish only when no flow can be of the one before.

use tokio::sync::mpsc;

#[derive(Debug)]
pub(super) struct Slots {
    taken: Vec<bool>,
    /// The last that was given, so that the next one is another.
    last: usize,
    freeing: mpsc::UnboundedSender<Vec<u32>>,
    freed: mpsc::UnboundedReceiver<Vec<u32>>,
}

impl Slots {
    /// So many, of which the first stays empty.
    pub(super) fn new(count: u32) -> Self {
        let (freeing, freed) = mpsc::unbounded_channel();
        Self {
            taken: vec![false; count as usize],
            last: 0,
            freeing,
            freed,
        }
    }

    /// A free place.
    pub(super) fn take(&mut self) -> Option<u32> {
        let count = self.taken.len();
        let after = (1..count).map(|step| (self.last + step) % count);
        let free = after
            .filter(|index| *index != 0)
            .find(|index| !self.taken[*index])?;
        self.last = free;
        self.taken[free] = true;
        u32::try_from(free).ok()
    }

    pub(super) fn give_back(&mut self, indices: &[u32]) {
        for index in indices {
            self.taken[*index as usize] = false;
        }
    }

    /// Where places are sent whose flows have ended.
    pub(super) fn freeing(&self) -> mpsc::UnboundedSender<Vec<u32>> {
        self.freeing.clone()
    }

    /// The next ones that came.
    pub(super) async fn freed(&mut self) -> Vec<u32> {
        self.freed.recv().await.unwrap_or_default() // there is always a sender
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_not_given_again_soon() {
        let mut slots = Slots::new(4);
        assert_eq!([slots.take(), slots.take()], [Some(1), Some(2)]);
        slots.give_back(&[1]);
        assert_eq!(
            [slots.take(), slots.take(), slots.take()],
            [Some(3), Some(1), None]
        );
    }
}
