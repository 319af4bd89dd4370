//! What is published: from where to where, under which policy, wanted by whom. Nothing here asks the machine.

pub mod owner;
pub mod registry;
pub mod spec;
pub mod state;

use ipnet::IpNet;

pub use self::{
    owner::Owner,
    registry::{Conflict, Difference, Id, Registry, Wanted},
    spec::Spec,
};

/// A published port or range, as its owner wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    pub spec: Spec,
    pub policy: Policy,
}

/// Who is served by a publish, and how. What is left out, the instance decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Networks that clients may come from; empty for all.
    pub allow: Option<Vec<IpNet>>,
}
