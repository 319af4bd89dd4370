//! Arbitrary octets on the control socket: what comes back is an answer of HTTP or nothing, and never that the server failed.

#![no_main]

use std::{
    io::{Read as _, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{Arc, LazyLock},
    time::Duration,
};

use anyhow::{Result, bail};
use forwarder::{
    control::{
        Call,
        api::{Ban, Counter, Event, Listed, ListedFlow, Running},
        server::{FlowFilter, Observe, Rows, Socket},
    },
    metrics::Measured,
    publish::{Id, Owner},
};
use libfuzzer_sys::fuzz_target;
use tokio::sync::{broadcast, mpsc};

/// What a stream that never ends is waited for.
const PATIENCE: Duration = Duration::from_millis(20);

/// An instance that publishes nothing.
struct Nothing(broadcast::Sender<Event>);

impl Observe for Nothing {
    fn instance(&self) -> Running {
        Running {
            version: String::new(),
            respects_firewall: false,
        }
    }
    fn list(&self, _: Option<Id>) -> Rows<Listed> {
        Box::new(std::iter::empty())
    }
    fn containers(&self) -> Vec<(Owner, Option<String>)> {
        Vec::new()
    }
    fn flows(&self, _: &FlowFilter) -> Rows<ListedFlow> {
        Box::new(std::iter::empty())
    }
    fn end_flows(&self, _: &FlowFilter) -> Result<u64> {
        Ok(0)
    }
    fn stats(&self) -> Result<Vec<Counter>> {
        Ok(Vec::new())
    }
    fn measure(&self) -> Result<Measured> {
        bail!("nothing is measured")
    }
    fn events(&self) -> broadcast::Receiver<Event> {
        self.0.subscribe()
    }
    fn bans(&self) -> Rows<Ban> {
        Box::new(std::iter::empty())
    }
}

static SERVER: LazyLock<(tokio::runtime::Runtime, PathBuf, Socket)> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let path = std::env::temp_dir().join(format!("forwarder-fuzz-{}.sock", std::process::id()));
    let mut socket = Socket::bind(path.clone()).expect("a socket");
    let (calls, mut called) = mpsc::channel::<Call>(64);
    runtime.block_on(async {
        let observed = Arc::new(Nothing(broadcast::channel(16).0));
        socket.serve(calls, observed, None).expect("a server");
        // Whoever waits for an answer hears that the instance is ending.
        tokio::spawn(async move { while called.recv().await.is_some() {} });
    });
    (runtime, path, socket)
});

fuzz_target!(|octets: &[u8]| {
    let mut stream = UnixStream::connect(&SERVER.1).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    // The server may close before it has read everything.
    let _ = stream.write_all(octets);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    if !answer.is_empty() {
        let shown = String::from_utf8_lossy(&answer);
        assert!(shown.starts_with("HTTP/1."), "{shown}");
        let is_metrics = shown.contains("nothing is measured");
        assert!(is_metrics || !shown.starts_with("HTTP/1.1 500"), "{shown}");
    }
});
