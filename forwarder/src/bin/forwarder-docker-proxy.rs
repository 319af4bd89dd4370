//! `forwarder-docker-proxy`: what dockerd starts for each published port, and no more.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    forwarder::engines::docker_proxy::run_small(&arguments)
}
