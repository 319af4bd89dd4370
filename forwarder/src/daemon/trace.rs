//! Tracing: the traced program runs while somebody watches, and its lines become packets with names in them.

use std::{
    net::{Ipv6Addr, SocketAddr},
    sync::Arc,
};

use anyhow::{Result, bail};
use forwarder_common::reason::Reason;
use tokio::sync::{broadcast, mpsc};
use tracing::warn;

use super::{
    Daemon,
    view::{View, delivery_name},
};
use crate::{
    control::{
        Trace,
        api::{Rewritten, Traced, TracedPacket},
    },
    network::local::device_name,
};

/// Packets that a slow watcher may be behind; it is told how many more were lost.
const BEHIND: usize = 1024;

/// Who watches packets.
#[derive(Debug)]
pub(super) struct Tracing {
    packets: broadcast::Sender<Traced>,
    /// The traced program's lines are being read.
    is_read: bool,
    /// Each watcher tells of its end.
    ends: (mpsc::Sender<()>, mpsc::Receiver<()>),
}

impl Tracing {
    pub(super) fn new() -> Self {
        Self {
            packets: broadcast::channel(BEHIND).0,
            is_read: false,
            ends: mpsc::channel(1),
        }
    }
}

impl Daemon {
    /// Begins a trace. The first one switches the programs.
    pub(super) fn begin_trace(&mut self) -> Result<Trace> {
        let Some(datapath) = &mut self.datapath else {
            bail!("nothing to trace: {}", self.without);
        };
        datapath.trace(true)?;
        let tracing = &mut self.tracing;
        if !tracing.is_read {
            let (packets, view) = (tracing.packets.clone(), self.view.clone());
            let log = datapath.log(move |line| {
                if let Some(packet) = parse(&line, &view) {
                    let _ = packets.send(Traced::Packet(packet.into())); // nobody may watch any more
                }
            })?;
            tokio::spawn(log);
            tracing.is_read = true;
        }
        let (ended, mut end) = mpsc::channel(1);
        let ends = tracing.ends.0.clone();
        let packets = tracing.packets.subscribe();
        tokio::spawn(async move {
            let _ = end.recv().await; // closed with the trace
            let _ = ends.send(()).await;
        });
        Ok(Trace { packets, ended })
    }

    /// Waits until a trace has ended.
    pub(super) async fn trace_ended(tracing: &mut Tracing) {
        let _ = tracing.ends.1.recv().await; // there is always a sender
    }

    pub(super) fn end_trace(&mut self) {
        if self.tracing.packets.receiver_count() > 0 {
            return;
        }
        if let Some(datapath) = &mut self.datapath
            && let Err(error) = datapath.trace(false)
        {
            warn!("{error:#}");
        }
    }
}

/// The program's words: place in `PUBLISHES`, reason, device, protocol, source address and port, destination address and
/// port; and of a forwarded packet the same four after the rewrite, delivery and device.
fn parse(line: &str, view: &Arc<View>) -> Option<TracedPacket> {
    let words: Vec<&str> = line.split(' ').collect();
    let number = |at: usize| words.get(at)?.parse::<u32>().ok();
    let endpoint = |at: usize| {
        let address: Ipv6Addr = words.get(at)?.parse().ok()?;
        let port = words.get(at + 1)?.parse().ok()?;
        Some(SocketAddr::new(address.to_canonical(), port).to_string())
    };
    let rewritten = || {
        Some(Rewritten {
            source: endpoint(8)?,
            destination: endpoint(10)?,
            delivery: delivery_name(number(12)?)?.into(),
            device: device(number(13)?),
        })
    };
    Some(TracedPacket {
        publish: view.id(number(0)?),
        reason: Reason::ALL.get(number(1)? as usize)?.name().into(),
        device: device(number(2)?),
        protocol: if number(3)? == 6 { "tcp" } else { "udp" }.into(),
        source: endpoint(4)?,
        destination: endpoint(6)?,
        rewritten: rewritten(),
    })
}

/// A device's name in the own network namespace, or its number where it has none any more.
fn device(ifindex: u32) -> String {
    device_name(ifindex).unwrap_or_else(|| ifindex.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_line_of_the_program_becomes_a_packet() {
        let idle = crate::proxy::Idle::start(crate::proxy::Store::default()).expect("epoll");
        let view = Arc::new(View::new(None, idle, false));
        let line = "3 0 1 6 ::ffff:192.0.2.1 4000 ::ffff:198.51.100.2 8080 \
                    ::ffff:192.0.2.1 4000 ::ffff:172.31.0.2 80 1 99999";
        let packet = parse(line, &view).expect("a packet");
        assert_eq!((packet.publish, &*packet.device), (None, "lo"));
        assert_eq!(packet.source, "192.0.2.1:4000");
        assert_eq!(packet.reason, Reason::ALL[0].name());
        let new = packet.rewritten.expect("rewritten");
        assert_eq!(
            (&*new.destination, &*new.device),
            ("172.31.0.2:80", "99999")
        );
        let passed = parse("0 5 1 17 ::1 4000 fd00::1 53", &view).expect("a packet");
        assert_eq!(
            (passed.rewritten, &*passed.destination),
            (None, "[fd00::1]:53")
        );
        assert_eq!(parse("lost 5", &view), None);
    }
}
