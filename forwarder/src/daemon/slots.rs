//! Places in `PUBLISHES`. One is given to another publish only when no flow can be of the one before.

use tokio::sync::mpsc;

/// What has come to its end meanwhile.
#[derive(Debug)]
pub(super) enum Freed {
    /// Places without flows, to be given again.
    Places(Vec<u32>),
    /// Places whose flows were cut off, and which have had their time.
    Cut(Vec<u32>),
}

#[derive(Debug)]
pub(super) struct Slots {
    taken: Vec<bool>,
    /// The last that was given, so that the next one is another.
    last: usize,
    freeing: mpsc::UnboundedSender<Freed>,
    freed: mpsc::UnboundedReceiver<Freed>,
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

    /// Takes this place, if it is free.
    pub(super) fn take_this(&mut self, index: u32) -> bool {
        match self.taken.get_mut(index as usize) {
            Some(taken) if index != 0 && !*taken => {
                *taken = true;
                true
            }
            _ => false,
        }
    }

    /// Where places are sent whose flows have ended.
    pub(super) fn freeing(&self) -> mpsc::UnboundedSender<Freed> {
        self.freeing.clone()
    }

    /// The next that came.
    pub(super) async fn freed(&mut self) -> Freed {
        let freed = self.freed.recv().await;
        freed.unwrap_or(Freed::Places(Vec::new())) // there is always a sender
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
