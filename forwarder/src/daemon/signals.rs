//! Signals: two end an instance, one has it read its configuration again, one leaves everything to the next process, and two
//! more must not end it.

use anyhow::{Context as _, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that an instance heeds, or survives.
pub(super) struct Signals {
    end: [Signal; 2],
    reload: Signal,
    pass_on: Signal,
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
            pass_on: listen(SignalKind::quit())?,
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
            _ = self.pass_on.recv() => Heard::PassOn,
        }
    }
}

pub(super) enum Heard {
    End,
    Reload,
    /// As [`Heard::End`] where there is nobody to pass anything on to.
    PassOn,
}
