//! `forwarder-docker-proxy`: what dockerd starts for each published port, and no more.

use std::process::ExitCode;

fn main() -> ExitCode {
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let arguments: Vec<String> = words.skip(1).collect();
    forwarder::engines::docker_proxy::run_small(&arguments)
}
