//! What is measured, by which tool, and how its output is read.

use std::{net::IpAddr, thread, time::Duration};

use anyhow::{Context, Result, anyhow, bail, ensure};
use forwarder_tests::{cpu::pin_this_thread, netns::Netns};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    arena::{Arena, BULK, Client, DATAGRAM, HTTP, ROUND_TRIP, SINK, STREAM},
    datagrams::{self, Shape},
    generator::{Frames, Until},
    process::{Placement, busy_seconds},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Workload {
    /// 60-byte UDP frames of one flow, as many as the host carries. One of some thousand is answered, which makes it a
    /// conversation.
    Capacity,
    /// The same without any answer.
    OneWay,
    /// The same, and as many from the container at the same time by another core, of one flow.
    BothWays,
    /// The same, where the container's are another flow's.
    TwoFlows,
    /// Of one way, each frame of another flow.
    NewFlows,
    /// One TCP connection, as much as it carries.
    Bulk,
    /// One TCP connection, a message of 14 bytes there and back.
    TcpRoundTrip,
    UdpRoundTrip,
    /// Datagrams of 64 octets, as many as arrive.
    Datagrams,
    /// Datagrams of 1,200 octets, many in one buffer.
    DatagramBulk,
    /// HTTP over 16 connections at a time, each closed after one request.
    Connect,
}

impl Workload {
    pub(crate) const ALL: [Self; 11] = [
        Self::Capacity,
        Self::OneWay,
        Self::BothWays,
        Self::TwoFlows,
        Self::NewFlows,
        Self::Bulk,
        Self::TcpRoundTrip,
        Self::UdpRoundTrip,
        Self::Datagrams,
        Self::DatagramBulk,
        Self::Connect,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Capacity => "capacity",
            Self::OneWay => "capacity, one way",
            Self::BothWays => "both ways of a flow",
            Self::TwoFlows => "a way each of two flows",
            Self::NewFlows => "new flows",
            Self::Bulk => "TCP bulk",
            Self::TcpRoundTrip => "TCP round trips",
            Self::UdpRoundTrip => "UDP round trips",
            Self::Datagrams => "UDP stream",
            Self::DatagramBulk => "UDP bulk",
            Self::Connect => "connect, request, close",
        }
    }

    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Capacity | Self::OneWay | Self::BothWays | Self::TwoFlows | Self::Datagrams => {
                "kpackets/s"
            }
            Self::NewFlows => "kflows/s",
            Self::Bulk | Self::DatagramBulk => "Gbit/s",
            Self::TcpRoundTrip | Self::UdpRoundTrip | Self::Connect => "k/s",
        }
    }

    fn is_generated(self) -> bool {
        matches!(
            self,
            Self::Capacity | Self::OneWay | Self::BothWays | Self::TwoFlows | Self::NewFlows
        )
    }

    pub(crate) fn is_both_ways(self) -> bool {
        matches!(self, Self::BothWays | Self::TwoFlows)
    }

    pub(crate) fn is_udp(self) -> bool {
        self.is_generated()
            || matches!(
                self,
                Self::UdpRoundTrip | Self::Datagrams | Self::DatagramBulk
            )
    }

    /// Whether this arena has such a path at all.
    pub(crate) fn applies(self, arena: &Arena, client: Client) -> bool {
        let udp = self.is_udp();
        let from_outside = client == Client::External || !self.is_generated();
        let is_many = self.is_generated() || self == Self::Connect;
        from_outside
            && (!is_many || arena.is_for_many())
            && arena.path(client).is_some()
            && (!udp || arena.has_udp())
    }
}

/// One measurement. Higher values are better, in [`Workload::unit`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) value: f64,
    /// CPU time of the whole machine, client and server included, for each packet, round trip, request or
    /// kilobyte, in microseconds.
    pub(crate) cpu_us: f64,
    /// Round trip or request, in microseconds.
    pub(crate) p50_us: Option<f64>,
    pub(crate) p99_us: Option<f64>,
}

/// Of so many frames of a conversation one is answered: few, since only one direction is measured.
const ANSWERED: u32 = 4096;
/// Flows of one new-flows run: many enough to matter, few enough for conntrack's table.
const NEW_FLOWS: u32 = 1 << 17;

/// Measures once. `round` keeps the flows of different rounds apart.
///
/// # Errors
/// The tool fails, or says something that isn't understood.
pub(crate) fn measure(
    arena: &Arena,
    workload: Workload,
    client: Client,
    placement: Placement,
    time: Duration,
    round: u32,
) -> Result<Sample> {
    let (netns, address) = arena.path(client).context("no path")?;
    arena.place(placement)?;
    pin_this_thread(placement.client())?;
    let seconds = time.as_secs().max(1);
    let busy = busy_seconds()?;
    let stream = |shape: Shape| {
        let limits = (placement.others(), time);
        datagrams::stream((netns, address), &arena.backend, STREAM, shape, limits)
    };
    let measured = match workload {
        Workload::Capacity | Workload::OneWay => {
            let conversation = workload == Workload::Capacity;
            let frames = Frames {
                answered: if conversation { ANSWERED } else { 0 },
                ..Frames::ONE_FLOW
            };
            // Not the same flow, which would be a conversation from then on.
            let first = u8::from(!conversation);
            arena
                .flood(frames, first, Until::Elapsed(time))
                .map(|(packets, elapsed)| Measured::of(packets as f64, elapsed))
        }
        Workload::BothWays | Workload::TwoFlows => {
            let cores = [placement.client(), placement.others()];
            both_ways(arena, workload == Workload::BothWays, cores, time)
        }
        Workload::NewFlows => {
            // Four source addresses a run.
            let first = u8::try_from(4 * (round % 60) + 4)?;
            let frames = Frames {
                flows: NEW_FLOWS,
                repeat: 1,
                answered: 0,
            };
            arena
                .flood(frames, first, Until::Sent(NEW_FLOWS))
                .map(|(packets, elapsed)| Measured::of(packets as f64, elapsed))
        }
        Workload::Bulk => {
            let line = format!("iperf3 -c {address} -p {BULK} -t {seconds} -J");
            netns.run(&line).and_then(|text| bulk(&text))
        }
        Workload::TcpRoundTrip => {
            let line =
                format!("sockperf pp --tcp -i {address} -p {ROUND_TRIP} -t {seconds} --full-rtt");
            netns.run(&line).and_then(|text| round_trips(&text))
        }
        Workload::UdpRoundTrip => {
            let line = format!("sockperf pp -i {address} -p {DATAGRAM} -t {seconds} --full-rtt");
            netns.run(&line).and_then(|text| round_trips(&text))
        }
        Workload::Datagrams => {
            let (octets, elapsed) = stream(datagrams::SMALL)?;
            let count = octets as f64 / datagrams::SMALL.payload();
            Ok(Measured::of(count, elapsed))
        }
        Workload::DatagramBulk => {
            let (octets, elapsed) = stream(datagrams::LONG)?;
            Ok(Measured::of(octets as f64 / 1000.0, elapsed))
        }
        Workload::Connect => {
            let (measured, errors) = connections(netns, address, time)?;
            match errors {
                Some(errors) => Err(anyhow!("wrk: socket errors:{errors}")),
                None => Ok(measured),
            }
        }
    };
    let measured = measured?;
    // The generator's cores are never idle, and what made the frames was not part of their time.
    let busy = if workload.is_generated() {
        measured.seconds * f64::from(1 + u8::from(workload.is_both_ways()))
    } else {
        busy_seconds()? - busy
    };
    ensure!(measured.operations > 0.0, "nothing came through");
    Ok(Sample {
        value: measured.operations / measured.seconds / workload.scale(),
        cpu_us: busy * 1e6 / measured.operations,
        p50_us: measured.p50_us,
        p99_us: measured.p99_us,
    })
}

/// Frames from the client by one core, and from the container by another, of the same flow or not.
fn both_ways(
    arena: &Arena,
    is_one: bool,
    [client, container]: [&[usize]; 2],
    time: Duration,
) -> Result<Measured> {
    let block = 2; // which no other workload has
    // Both flows are there before, and have been answered.
    let begin = Frames {
        flows: 2,
        answered: 1,
        ..Frames::ONE_FLOW
    };
    arena.flood(begin, block, Until::Sent(8))?;
    let port = SINK + u16::from(!is_one);
    let (there, back) = thread::scope(|scope| {
        let back = scope.spawn(|| {
            pin_this_thread(container)?;
            arena.answer(block, port, Until::Elapsed(time))
        });
        pin_this_thread(client)?;
        let there = arena.flood(Frames::ONE_FLOW, block, Until::Elapsed(time))?;
        let back = back.join().map_err(|_| anyhow!("the container's thread"))?;
        anyhow::Ok((there, back?))
    })?;
    let rate = |(packets, elapsed): (u64, Duration)| packets as f64 / elapsed.as_secs_f64();
    let packets = (rate(there) + rate(back)) * time.as_secs_f64();
    Ok(Measured::of(packets, time))
}

impl Workload {
    /// Operations per second in one [`Workload::unit`].
    fn scale(self) -> f64 {
        match self {
            Self::Bulk | Self::DatagramBulk => 1e9 / 8000.0,
            _ => 1e3,
        }
    }
}

/// What a tool has counted.
pub(crate) struct Measured {
    /// Packets, flows, round trips, requests, or kilobytes, in `seconds`.
    operations: f64,
    seconds: f64,
    p50_us: Option<f64>,
    p99_us: Option<f64>,
}

impl Measured {
    /// Thousands of operations a second.
    pub(crate) fn rate(&self) -> f64 {
        self.operations / self.seconds / 1e3
    }

    fn of(operations: f64, time: Duration) -> Self {
        Self {
            operations,
            seconds: time.as_secs_f64(),
            p50_us: None,
            p99_us: None,
        }
    }
}

/// iperf3's JSON.
fn bulk(text: &str) -> Result<Measured> {
    let document: Value = serde_json::from_str(text).context("iperf3's JSON")?;
    let received = &document["end"]["sum_received"];
    let field = |name: &str| {
        received[name]
            .as_f64()
            .with_context(|| format!("iperf3 says nothing of {name}: {}", document["error"]))
    };
    let kilobytes = field("bytes")? / 1000.0;
    Ok(Measured {
        operations: kilobytes,
        seconds: field("seconds")?,
        p50_us: None,
        p99_us: None,
    })
}

/// HTTP by connections that each serve one request, and which of them failed, if any did.
///
/// # Errors
/// wrk says nothing, or has not closed its connections.
pub(crate) fn connections(
    netns: &Netns,
    address: IpAddr,
    time: Duration,
) -> Result<(Measured, Option<String>)> {
    let seconds = time.as_secs().max(1);
    let opened = opened_connections(netns)?;
    let mut wrk = netns.command("wrk");
    wrk.args(["-t1", "-c16", &format!("-d{seconds}s"), "--latency"])
        // With its space: without, wrk takes it for no header and keeps its connections.
        .args([
            "-H",
            "Connection: close",
            &format!("http://{address}:{HTTP}/"),
        ]);
    let output = wrk.output().context("start wrk")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let measured = requests(&text)?;
    let opened = opened_connections(netns)? - opened;
    ensure!(
        opened as f64 >= measured.operations,
        "{} requests by only {opened} connections",
        measured.operations
    );
    Ok((measured, socket_errors(&text)))
}

/// TCP connections that were ever begun in a namespace (RFC 4022, tcpActiveOpens).
fn opened_connections(netns: &Netns) -> Result<u64> {
    let text = netns.enter(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next(), lines.next());
    let mut pairs = names
        .unwrap_or_default()
        .split(' ')
        .zip(values.unwrap_or_default().split(' '));
    let (_, opened) = pairs
        .find(|(name, _)| *name == "ActiveOpens")
        .context("no ActiveOpens in /proc/net/snmp")?;
    Ok(opened.parse()?)
}

/// The number after `name` in sockperf's or wrk's report.
fn after(text: &str, name: &str) -> Option<f64> {
    let (_, rest) = text.split_once(name)?;
    let rest = rest.trim_start_matches([' ', '=']);
    let end = rest
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// sockperf's ping-pong report. Its totals include what it calls the warm-up, which is the same traffic; its
/// percentiles don't.
fn round_trips(text: &str) -> Result<Measured> {
    let number = |name| {
        let (_, totals) = text.split_once("[Total Run]")?;
        after(totals, name)
    };
    let (Some(received), Some(seconds)) = (number("ReceivedMessages"), number("RunTime")) else {
        let last = text.lines().rfind(|line| !line.trim().is_empty());
        bail!("{}", last.unwrap_or("sockperf says nothing"));
    };
    Ok(Measured {
        operations: received,
        seconds,
        p50_us: after(text, "percentile 50.000"),
        p99_us: after(text, "percentile 99.000"),
    })
}

/// What wrk says of connections that failed.
fn socket_errors(text: &str) -> Option<String> {
    let (_, errors) = text.split_once("Socket errors:")?;
    Some(errors.lines().next().unwrap_or_default().to_owned())
}

/// wrk's report.
fn requests(text: &str) -> Result<Measured> {
    let rate = after(text, "Requests/sec:").context("wrk says nothing of Requests/sec")?;
    let line = text
        .lines()
        .find(|line| line.contains(" requests in "))
        .context("wrk says nothing of requests")?;
    let requests: f64 = line.split_whitespace().next().unwrap_or_default().parse()?;
    let latency = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.trim().strip_prefix(name))?
            .trim();
        let unit = line.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let number: f64 = line[..line.len() - unit.len()].parse().ok()?;
        match unit {
            "us" => Some(number),
            "ms" => Some(number * 1e3),
            "s" => Some(number * 1e6),
            _ => None,
        }
    };
    Ok(Measured {
        operations: requests,
        seconds: requests / rate,
        p50_us: latency("50%"),
        p99_us: latency("99%"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockperfs_report_is_understood() {
        let text = "sockperf: [Total Run] RunTime=1.001 sec; Warm up time=400 msec; SentMessages=5086; ReceivedMessages=5085\n\
            sockperf: [Valid Duration] RunTime=0.550 sec; SentMessages=1576; ReceivedMessages=1576\n\
            sockperf: ---> percentile 99.000 = 1118.196\nsockperf: ---> percentile 50.000 =  373.323\n";
        let measured = round_trips(text).expect("a report");
        assert_eq!((measured.operations, measured.seconds), (5085.0, 1.001));
        assert_eq!(
            (measured.p50_us, measured.p99_us),
            (Some(373.323), Some(1118.196))
        );
    }

    #[test]
    fn wrks_report_is_understood() {
        let text = "Running 1s test @ http://127.0.0.1/\n  1 threads and 16 connections\n  Latency Distribution\n\
            \x20    50%  410.00us\n     99%    1.20ms\n  10500 requests in 1.05s, 1.1MB read\nRequests/sec:  10000.00\n";
        let measured = requests(text).expect("a report");
        assert_eq!((measured.operations, measured.seconds), (10500.0, 1.05));
        assert_eq!(
            (measured.p50_us, measured.p99_us),
            (Some(410.0), Some(1200.0))
        );
        assert_eq!(socket_errors(text), None);
        let failed = "Socket errors: connect 3, read 0\nRequests/sec: 1";
        assert_eq!(socket_errors(failed).as_deref(), Some(" connect 3, read 0"));
    }

    #[test]
    fn iperf3s_error_is_shown() {
        let error = bulk(r#"{"error": "unable to connect", "end": {}}"#)
            .err()
            .expect("no totals");
        assert!(error.to_string().contains("unable to connect"), "{error}");
    }
}
