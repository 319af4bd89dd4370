//! Lines on standard error that are not logged.

use std::{
    fmt::Display,
    io::{self, Write as _},
};

/// Writes a line, by one call. Whoever reads it may have gone, or its disk may be full: `eprintln` would panic then.
pub fn line(text: impl Display) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}
