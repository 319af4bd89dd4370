//! An error as CNI has it: a code, one line, and what would change it.

use std::fmt::Display;

use serde_json::{Value, json};

/// Numbers below 100 are the specification's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    /// The configuration's version is not known.
    Version = 1,
    Environment = 4,
    Io = 5,
    Decode = 6,
    Config = 7,
    /// The same may be done later.
    Again = 11,
    /// No ADD can be served now.
    Unavailable = 50,
    /// A port is not to be had.
    Taken = 100,
    /// CHECK: other things are published than were asked for.
    Changed = 101,
    /// The instance says no.
    Refused = 102,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) code: Code,
    pub(super) message: String,
    pub(super) details: String,
}

impl Failure {
    pub(super) fn new(code: Code, message: &str, details: &dyn Display) -> Self {
        Self {
            code,
            message: message.into(),
            details: details.to_string(),
        }
    }

    pub(super) fn with(self, code: Code) -> Self {
        Self { code, ..self }
    }

    /// In the version of the configuration, as standard output has it.
    pub(super) fn document(&self, version: &str) -> Value {
        json!({
            "cniVersion": version,
            "code": self.code as u32,
            "msg": self.message,
            "details": self.details,
        })
    }
}
