//! Who wants a publish. An owner changes its own publishes alone.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// A name such as `cli`, `config`, `docker:ID` or `cni:NETWORK/ID/IFNAME`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Owner(Arc<str>);

/// The longest name, in octets: a CNI attachment's has a network, a container's id and a device.
const LONGEST: usize = 512;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("owner {0:?}: a name is 1 to {LONGEST} letters, digits or any of . : / _ - @ +")]
pub struct OwnerError(String);

impl Owner {
    /// Whoever types commands, and the flags of `run`.
    pub fn cli() -> Self {
        Self("cli".into())
    }

    pub fn is_cli(&self) -> bool {
        &*self.0 == "cli"
    }

    /// The configuration file.
    pub fn config() -> Self {
        Self("config".into())
    }

    /// A client that holds a lease, for as long as its connection lasts.
    pub fn lease(number: u64) -> Self {
        Self(format!("lease:{number}").into())
    }

    /// Whether its publishes end with a connection.
    pub fn is_lease(&self) -> bool {
        self.0.starts_with("lease:")
    }

    /// A container of Docker or podman, by its labels and its own ports.
    pub fn container(id: &str) -> Result<Self, OwnerError> {
        format!("docker:{id}").parse()
    }

    /// Whether a container of Docker or podman asks for its publishes itself.
    pub fn is_container(&self) -> bool {
        self.0.starts_with("docker:")
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Owner {
    type Err = OwnerError;

    fn from_str(text: &str) -> Result<Self, OwnerError> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b".:/_-@+".contains(&byte);
        if text.is_empty() || text.len() > LONGEST || !text.bytes().all(is_plain) {
            return Err(OwnerError(text.into()));
        }
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for Owner {
    type Error = OwnerError;

    fn try_from(text: String) -> Result<Self, OwnerError> {
        text.parse()
    }
}

impl From<Owner> for String {
    fn from(owner: Owner) -> Self {
        owner.0.as_ref().into()
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_plain_text() {
        for name in ["cli", "docker:3f2a", "cni:net/0a/eth0", "team-a@host"] {
            assert_eq!(name.parse::<Owner>().expect(name).to_string(), name);
        }
        for name in ["", "a b", "a\n", "é", &"x".repeat(LONGEST + 1)] {
            assert!(name.parse::<Owner>().is_err(), "{name:?}");
        }
    }
}
