//! Container engines: each one's words, translated into requests of the control socket and nothing else.

pub mod docker_proxy;
