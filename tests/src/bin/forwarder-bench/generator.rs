//! Frames as fast as the kernel makes them: BPF_PROG_TEST_RUN with live frames (kernel 5.18) runs
//! `tests/generator/`, whose frames enter the host as if the client's device had sent them.

use std::{
    fs,
    net::Ipv4Addr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf, EbpfLoader,
    programs::{
        LinkOrder, Program, TcAttachType, TestRun as _, TestRunAttrs, TestRunOptions, Xdp, XdpMode,
        tc::TcAttachOptions,
    },
};
use forwarder_tests::netns::Netns;

/// Frames of one system call: many, since making and freeing their pages takes milliseconds.
const CALL: u32 = 1 << 18;
const BATCH: u32 = 64;

/// What is sent.
#[derive(Debug)]
pub(crate) struct Load<'a> {
    /// Where the device is.
    pub(crate) netns: &'a Netns,
    pub(crate) device: &'a str,
    /// The host's MAC and the client's.
    pub(crate) macs: [[u8; 6]; 2],
    /// The first flow's; the low half counts up.
    pub(crate) source: Ipv4Addr,
    pub(crate) destination: Ipv4Addr,
    pub(crate) port: u16,
    pub(crate) frames: Frames,
}

/// Which frames follow one another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frames {
    /// Flows that take turns.
    pub(crate) flows: u32,
    /// Frames of a flow before the next one's turn.
    pub(crate) repeat: u32,
    /// Of so many frames the [`sink`] answers the first; 0 for none.
    pub(crate) answered: u32,
}

impl Frames {
    /// Of which none is answered.
    pub(crate) const ONE_FLOW: Self = Self {
        flows: 1,
        repeat: 1,
        answered: 0,
    };
}

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Until {
    Elapsed(Duration),
    Sent(u32),
}

/// Generates frames that come in by one device, and counts those that get to the other, in the time of [`generate`].
///
/// # Errors
/// As [`generate`].
pub(crate) fn send(
    load: &Load<'_>,
    (receiver, device): (&Netns, &str),
    to: (&Netns, &str),
    until: Until,
) -> Result<(u64, Duration)> {
    // A veth takes whole batches of frames only while NAPI runs at its other end.
    receiver.run(&format!("ethtool -K {device} gro on"))?;
    let before = received(to)?;
    let time = generate(load, until);
    let after = received(to)?;
    receiver.run(&format!("ethtool -K {device} gro off"))?;
    Ok((after - before, time?))
}

/// Packets that a device has received.
fn received((netns, device): (&Netns, &str)) -> Result<u64> {
    netns.enter(|| {
        let text = fs::read_to_string("/proc/thread-self/net/dev")?;
        let line = text
            .lines()
            .find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'))
            .with_context(|| format!("no device {device}"))?;
        let packets = line
            .split_whitespace()
            .nth(1)
            .context("no packet counter")?;
        Ok(packets.parse()?)
    })
}

/// Sends, and returns how long that took, without the kernel's preparation.
///
/// # Errors
/// The object is missing or the kernel has no live frames.
fn generate(load: &Load<'_>, until: Until) -> Result<Duration> {
    let object = object()?;
    let template = template(load);
    load.netns.enter(|| {
        let ifindex = nix::net::if_::if_nametoindex(load.device).context("the client's device")?;
        let mut ebpf = EbpfLoader::new()
            .override_global("TEMPLATE", &template, true)
            .override_global("FLOWS", &load.frames.flows, true)
            .override_global("REPEAT", &load.frames.repeat, true)
            .override_global("ANSWERED", &load.frames.answered, true)
            .override_global("IFINDEX", &ifindex, true)
            .load(&object)
            .context("load the generator")?;
        let program: &mut Xdp = ebpf
            .program_mut("generate")
            .context("the object has no program generate")?
            .try_into()?;
        program.load().context("load the generator")?;
        let frame = [0; 60];
        let begin = Instant::now();
        let (mut sent, mut spent) = (0, Duration::ZERO);
        loop {
            let repeat = match until {
                Until::Elapsed(time) if begin.elapsed() >= time => break,
                Until::Elapsed(_) => CALL,
                Until::Sent(all) if sent >= all => break,
                Until::Sent(all) => CALL.min(all - sent),
            };
            let mut options = TestRunOptions::new();
            options.data_in = Some(&frame);
            options.repeat = repeat;
            options.attrs = TestRunAttrs::new().xdp_live_frames(BATCH);
            let result = program
                .test_run(options)
                .context("BPF_PROG_TEST_RUN with live frames (kernel 5.18 or later)")?;
            // The average of a frame, by the kernel's own clock.
            spent += result.duration * repeat;
            sent += repeat;
        }
        Ok(spent)
    })
}

/// Takes the generator's frames at the ingress of these devices, for as long as what it returns lives, and sends
/// answers to those that ask for one.
///
/// # Errors
/// The object is missing or the kernel refuses it.
pub(crate) fn sink(netns: &Netns, devices: &[&str], port: u16) -> Result<Ebpf> {
    let port = port.to_be();
    attach(
        EbpfLoader::new().override_global("PORT", &port, true),
        "sink",
        netns,
        devices,
    )
}

/// The same by XDP in the driver, for frames that come without an skb.
///
/// # Errors
/// As [`sink`].
pub(crate) fn sink_early(netns: &Netns, device: &str, port: u16) -> Result<Ebpf> {
    let port = port.to_be();
    let mut loader = EbpfLoader::new();
    let loader = loader.override_global("PORT", &port, true);
    attach(loader, "sink_early", netns, &[device])
}

/// Has IPv4 that comes in by a device leave by another, or, with `to_peer`, at that one's other end, with other MACs
/// (destination, source) and nothing else; for as long as what it returns lives.
///
/// # Errors
/// As [`sink`].
pub(crate) fn hop(
    netns: &Netns,
    device: &str,
    out: &str,
    macs: [[u8; 6]; 2],
    to_peer: bool,
) -> Result<Ebpf> {
    let ifindex = index(netns, out)?;
    let to_peer = u32::from(to_peer);
    let mut loader = EbpfLoader::new();
    let loader = loader
        .override_global("IFINDEX", &ifindex, true)
        .override_global("HOP_MACS", &macs, true)
        .override_global("HOP_TO_PEER", &to_peer, true);
    attach(loader, "hop", netns, &[device])
}

/// The same by XDP in the driver, out of another device.
///
/// # Errors
/// As [`sink`].
pub(crate) fn hop_early(
    netns: &Netns,
    device: &str,
    out: &str,
    macs: [[u8; 6]; 2],
) -> Result<Ebpf> {
    let ifindex = index(netns, out)?;
    let mut loader = EbpfLoader::new();
    let loader = loader
        .override_global("IFINDEX", &ifindex, true)
        .override_global("HOP_MACS", &macs, true);
    attach(loader, "hop_early", netns, &[device])
}

fn index(netns: &Netns, device: &str) -> Result<u32> {
    netns
        .enter(|| nix::net::if_::if_nametoindex(device))
        .with_context(|| device.to_owned())
}

/// Has an empty program see what comes in by these devices, for as long as what it returns lives.
///
/// # Errors
/// As [`sink`].
pub(crate) fn nothing(netns: &Netns, devices: &[&str]) -> Result<Ebpf> {
    attach(&mut EbpfLoader::new(), "nothing", netns, devices)
}

/// Loads one of the object's programs and attaches it: at tc ingress before what is there, or by XDP in the driver.
fn attach(
    loader: &mut EbpfLoader<'_>,
    name: &str,
    netns: &Netns,
    devices: &[&str],
) -> Result<Ebpf> {
    let mut ebpf = loader
        .load(&object()?)
        .with_context(|| format!("load {name}"))?;
    let program = ebpf
        .program_mut(name)
        .with_context(|| format!("the object has no program {name}"))?;
    netns.enter(|| match program {
        Program::SchedClassifier(program) => {
            program.load().with_context(|| format!("load {name}"))?;
            for device in devices {
                let options = TcAttachOptions::TcxOrder(LinkOrder::first());
                program
                    .attach_with_options(device, TcAttachType::Ingress, options)
                    .with_context(|| format!("attach {name} to {device}"))?;
            }
            Ok(())
        }
        Program::Xdp(program) => {
            program.load().with_context(|| format!("load {name}"))?;
            for device in devices {
                program
                    .attach(device, XdpMode::Driver)
                    .with_context(|| format!("attach {name} to {device}"))?;
            }
            Ok(())
        }
        _ => bail!("{name} is neither tc's nor XDP's"),
    })?;
    Ok(ebpf)
}

fn object() -> Result<Vec<u8>> {
    let path = std::env::var_os("GENERATOR_OBJECT")
        .context("GENERATOR_OBJECT is not set: run `cargo xtask bench`")?;
    fs::read(&path).with_context(|| Path::new(&path).display().to_string())
}

/// Ethernet, IPv4 and UDP without a checksum, which IPv4 allows; words as they stand in memory.
fn template(load: &Load<'_>) -> [u32; 15] {
    let [destination, source] = load.macs;
    let payload = [0; 60 - 14 - 20 - 8];
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2(source, destination)
        .ipv4(load.source.octets(), load.destination.octets(), 64)
        .udp(0, load.port)
        .write(&mut frame, &payload)
        .unwrap_or_else(|error| unreachable!("a short frame: {error}"));
    frame[40..42].fill(0);
    std::array::from_fn(|at| {
        u32::from_ne_bytes([
            frame[4 * at],
            frame[4 * at + 1],
            frame[4 * at + 2],
            frame[4 * at + 3],
        ])
    })
}
