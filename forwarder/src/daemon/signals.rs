//! Signals: two end an instance, one has it read its configuration again, and two more must not end it.

use anyhow::{Context as _, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that an instance heeds, or survives.
pub(super) struct Signals {
    end: [Signal; 2],
    reload: Signal,
    /// SIGUSR1 and SIGUSR2, which mean nothing.
    _others: [Signal; 2],
}

impl Signals {
    pub(super) fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("listen to signals");
        Ok(Self {
            end: [
                listen(SignalKind::interrupt())?,
                listen(SignalKind::terminate())?,
            ],
            reload: listen(SignalKind::hangup())?,
            _others: [
                listen(SignalKind::user_defined1())?,
                listen(SignalKind::user_defined2())?,
            ],
        })
    }

    pub(super) async fn heard(&mut self) -> Heard {
        let [interrupt, terminate] = &mut self.end;
        tokio::select! {
            _ = interrupt.recv() => Heard::End,
            _ = terminate.recv() => Heard::End,
            _ = self.reload.recv() => Heard::Reload,
        }
    }
}

pub(super) enum Heard {
    End,
    Reload,
}
