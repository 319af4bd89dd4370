//! What a server does when accept(2) fails.

use std::{fmt::Display, io, time::Duration};

use tracing::{debug, warn};

use crate::seldom::Seldom;

/// How long nobody is accepted when descriptors have run out.
pub(crate) const BACK_OFF: Duration = Duration::from_millis(100);

/// If descriptors have run out, waits a moment, and says so once a minute.
pub(crate) async fn failed(error: &io::Error, warned: &Seldom, server: impl Display) {
    let exhausted = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    let code = error.raw_os_error();
    if !code.is_some_and(|code| exhausted.contains(&code)) {
        return debug!("accept for {server}: {error}"); // the client has gone already
    }
    if warned.is_due() {
        warn!("{server} accepts no more for now: {error}");
    }
    tokio::time::sleep(BACK_OFF).await;
}
