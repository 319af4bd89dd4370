//! Container engines, and who else has an instance do things: each one's words, translated into requests of the control socket, or the daemon's calls, and nothing
//! else.

pub mod cni;
pub mod crowdsec;
pub mod docker;
pub mod docker_proxy;
mod request;
