//! The harness of the tests that need root: namespaces, a machine with containers built of them,
//! the daemon under test, and traffic. The scenarios are in `packet/` and `netns/`; the
//! demonstration (`forwarder-demo`) stands on the same harness.

pub mod api;
pub mod browser;
pub mod clients;
pub mod cpu;
pub mod daemon;
pub mod deadline;
pub mod document;
pub mod engine;
pub mod fragment;
pub mod frame;
pub mod hearsay;
pub mod icmp;
pub mod layout;
pub mod link;
pub mod machine;
pub mod netns;
pub mod options;
pub mod sctp;
pub mod service;
pub mod summed;
pub mod table;
pub mod topology;
pub mod traffic;
pub mod tun;
pub mod wire;
