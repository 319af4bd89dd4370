//! Container engines: each one's words, translated into requests of the control socket, or the daemon's calls, and nothing
//! else.

pub mod cni;
pub mod docker;
pub mod docker_proxy;
mod request;
