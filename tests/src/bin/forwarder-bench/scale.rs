//! Many publishes, wide ranges, many flows: time, memory, and what they cost each packet and connection.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use forwarder_tests::{
    cpu::pin_this_thread,
    daemon::{Daemon, Datapath},
    topology::Topology,
};
use serde::Serialize;

use crate::{
    arena::{Arena, Client, Contender, Programs, other_ports},
    flood::{self, Flooded},
    generator::{Frames, Until},
    process::{Placement, Process, wait_for_port},
    report::{Summary, short},
    rules::{self, Port},
    workload::{self, Workload},
};

const PUBLISHES: [u16; 3] = [1, 1_000, 10_000];
const RANGE: &str = "10000-59999:172.31.0.2:10000-59999/udp";
const DOCKER_PROXIES: u16 = 100;
/// Flows that take turns in the host.
const FLOWS: [u32; 5] = [1, 1_000, 10_000, 100_000, 1_000_000];
const TIME: Duration = Duration::from_secs(1);

#[derive(Debug, Default, Serialize)]
pub(crate) struct Scale {
    published: Vec<Published>,
    connects: Vec<Connects>,
    flows: Vec<Flows>,
    flooded: Vec<Flooded>,
}

/// What it took to publish.
#[derive(Debug, Serialize)]
struct Published {
    contender: &'static str,
    what: String,
    /// Of each round.
    seconds: Vec<f64>,
    /// Of all of its processes, in bytes: resident for forwarder, which is one; proportional for others, which share.
    memory: Option<u64>,
    /// Bytes of BPF maps.
    maps: Option<u64>,
    /// How many bytes the kernel's slabs grew by: sockets, files, rules.
    slabs: i64,
}

/// Connections among so many publishes, thousands a second.
#[derive(Debug, Serialize)]
struct Connects {
    contender: &'static str,
    publishes: u16,
    rate: Summary,
}

/// Packets of so many flows that take turns.
#[derive(Debug, Serialize)]
struct Flows {
    flows: u32,
    /// How many the daemon knows.
    kept: u64,
    /// Thousands a second.
    rate: Summary,
    /// Bytes of BPF maps.
    maps: u64,
}

impl Scale {
    pub(crate) fn measure(
        programs: &Programs,
        rounds: u32,
        notes: &mut Vec<String>,
    ) -> Result<Self> {
        let mut scale = Self::default();
        for round in 0..rounds {
            eprintln!(
                "time and memory to publish, round {} of {rounds}",
                round + 1
            );
            scale.publish(programs, notes)?;
        }
        scale.connect(programs, rounds)?;
        scale.many_flows(programs, rounds)?;
        scale.flooded = flood::measure(programs, rounds)?;
        pin_this_thread(&[0, 1])?;
        Ok(scale)
    }

    fn add(&mut self, contender: &'static str, what: String, new: Took) {
        let known = self
            .published
            .iter_mut()
            .find(|known| known.contender == contender && known.what == what);
        if let Some(known) = known {
            known.seconds.push(new.seconds);
            return;
        }
        self.published.push(Published {
            contender,
            what,
            seconds: vec![new.seconds],
            memory: new.memory,
            maps: new.maps,
            slabs: new.slabs,
        });
    }

    fn publish(&mut self, programs: &Programs, notes: &mut Vec<String>) -> Result<()> {
        for count in PUBLISHES {
            let ports = other_ports(count);
            let specs: Vec<String> = ports.iter().map(Port::spec).collect();
            let what = format!("{count} ports");
            self.add("forwarder", what.clone(), forwarder(&specs)?);
            self.add(
                "iptables",
                what.clone(),
                rules_of(|host| host.feed("iptables-restore", &rules::docker(&ports)))?,
            );
            self.add(
                "nftables map",
                what,
                rules_of(|host| host.feed("nft -f -", &rules::nftables(&ports, false)))?,
            );
        }
        self.add(
            "forwarder",
            "50000-port range".into(),
            forwarder(&[RANGE.into()])?,
        );
        match docker_proxies(programs) {
            Ok(took) => self.add("docker-proxy", format!("{DOCKER_PROXIES} ports"), took),
            Err(error) => {
                let note = format!("docker-proxy's memory is left out: {error:#}");
                if !notes.contains(&note) {
                    notes.push(note);
                }
            }
        }
        Ok(())
    }

    fn connect(&mut self, programs: &Programs, rounds: u32) -> Result<()> {
        let mut arenas = Vec::new();
        for contender in [
            Contender::Forwarder,
            Contender::Iptables,
            Contender::Nftables,
        ] {
            for publishes in PUBLISHES {
                eprintln!(
                    "setting up {} among {publishes} publishes",
                    contender.name()
                );
                arenas.push((publishes, Arena::among(contender, programs, publishes - 1)?));
            }
        }
        let mut rates: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for round in 0..rounds {
            for (at, (publishes, arena)) in arenas.iter().enumerate() {
                let sample = workload::measure(
                    arena,
                    Workload::Connect,
                    Client::External,
                    Placement::Same,
                    TIME,
                    round,
                )?;
                let name = arena.contender.name();
                eprintln!(
                    "{name} among {publishes} publishes: {:.1} k/s",
                    sample.value
                );
                rates.entry(at).or_default().push(sample.value);
            }
        }
        for (at, (publishes, arena)) in arenas.iter().enumerate() {
            self.connects.push(Connects {
                contender: arena.contender.name(),
                publishes: *publishes,
                rate: Summary::of(rates.remove(&at).unwrap_or_default()).context("no rounds")?,
            });
        }
        Ok(())
    }

    fn many_flows(&mut self, programs: &Programs, rounds: u32) -> Result<()> {
        let arena = Arena::new(Contender::Forwarder, programs)?;
        let pid = arena.daemon.as_ref().context("the daemon")?.pid();
        arena.place(Placement::Same)?;
        pin_this_thread(Placement::Same.client())?;
        for flows in FLOWS {
            // A flow is kept when its client has answered the backend's answer.
            let answered = Frames {
                flows,
                repeat: 2,
                answered: 1,
            };
            arena.flood(answered, 64, Until::Sent(2 * flows.max(4096)))?;
            let frames = Frames {
                repeat: 1,
                answered: 0,
                ..answered
            };
            let mut rates = Vec::new();
            for _ in 0..rounds {
                let (packets, elapsed) = arena.flood(frames, 64, Until::Elapsed(TIME))?;
                rates.push(packets as f64 / elapsed.as_secs_f64() / 1e3);
            }
            let rate = Summary::of(rates).context("no rounds")?;
            eprintln!("{flows} flows: {:.0} kpackets/s", rate.median);
            let maps = map_bytes(pid)?;
            let kept = arena.daemon.as_ref().context("the daemon")?.list()?;
            let kept = kept.iter().map(|row| row.flows).sum();
            self.flows.push(Flows {
                flows,
                kept,
                rate,
                maps,
            });
        }
        Ok(())
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = "## Many publishes\n\nTo publish, with a running daemon where there is one:\n\n\
            | | | seconds | memory of processes, MB | BPF maps, MB | kernel slabs grew by, MB |\n|---|---|--:|--:|--:|--:|\n"
            .to_owned();
        let mega = |bytes: f64| short(bytes / 1e6);
        let or_none = |bytes: Option<u64>| bytes.map_or("–".into(), |bytes| mega(bytes as f64));
        for row in &self.published {
            let Some(seconds) = Summary::of(row.seconds.iter().copied()) else {
                continue;
            };
            let _ = writeln!(
                text,
                "| {} | {} | {} ({}–{}) | {} | {} | {} |",
                row.contender,
                row.what,
                short(seconds.median),
                short(seconds.least),
                short(seconds.most),
                or_none(row.memory),
                or_none(row.maps),
                mega(row.slabs.max(0) as f64)
            );
        }
        text += "\nConnect, request, close, external client, one core, k/s, to the last of so many published ports:\n\n\
            | | 1 | 1,000 | 10,000 | 10,000 of 1 |\n|---|--:|--:|--:|--:|\n";
        let mut contenders: Vec<&str> = self.connects.iter().map(|row| row.contender).collect();
        contenders.dedup();
        for contender in contenders {
            let rates: Vec<f64> = self
                .connects
                .iter()
                .filter(|row| row.contender == contender)
                .map(|row| row.rate.median)
                .collect();
            let cells: Vec<String> = rates.iter().map(|rate| short(*rate)).collect();
            let ratio = rates.last().unwrap_or(&0.0) / rates.first().unwrap_or(&1.0);
            let _ = writeln!(
                text,
                "| {contender} | {} | **{ratio:.2}** |",
                cells.join(" | ")
            );
        }
        text += "\n## Many flows\n\nUDP flows that both sides have proven and that take turns, packet by packet, one core:\n\n\
            | flows | kept | kpackets/s | BPF maps, MB |\n|--:|--:|--:|--:|\n";
        for Flows {
            flows,
            kept,
            rate,
            maps,
        } in &self.flows
        {
            let _ = writeln!(
                text,
                "| {flows} | {kept} | {} ({}–{}) | {} |",
                short(rate.median),
                short(rate.least),
                short(rate.most),
                mega(*maps as f64)
            );
        }
        text + "\n" + &flood::markdown(&self.flooded)
    }
}

/// What it took.
struct Took {
    seconds: f64,
    memory: Option<u64>,
    maps: Option<u64>,
    slabs: i64,
}

/// `forwarder publish`, from its start to its end.
fn forwarder(specs: &[String]) -> Result<Took> {
    let topology = Topology::new()?;
    let daemon = Daemon::start(&topology.host, &[], Datapath::Ebpf)?;
    let mut words = vec!["publish"];
    words.extend(specs.iter().map(String::as_str));
    let before = slab_bytes()?;
    let begin = Instant::now();
    daemon.control(&words)?;
    let seconds = begin.elapsed().as_secs_f64();
    Ok(Took {
        seconds,
        memory: Some(resident_bytes(daemon.pid())?),
        maps: Some(map_bytes(daemon.pid())?),
        slabs: slab_bytes()? - before,
    })
}

fn rules_of(load: impl FnOnce(&forwarder_tests::netns::Netns) -> Result<String>) -> Result<Took> {
    let topology = Topology::new()?;
    let before = slab_bytes()?;
    let begin = Instant::now();
    load(&topology.host)?;
    Ok(Took {
        seconds: begin.elapsed().as_secs_f64(),
        memory: None,
        maps: None,
        slabs: slab_bytes()? - before,
    })
}

/// One after another, each waited for, as dockerd does.
fn docker_proxies(programs: &Programs) -> Result<Took> {
    let program = programs.docker_proxy.as_ref().context("no docker-proxy")?;
    let topology = Topology::new()?;
    let before = slab_bytes()?;
    let begin = Instant::now();
    let mut processes = Vec::new();
    for Port { protocol, number } in other_ports(DOCKER_PROXIES) {
        let mut command = topology.host.command("sh");
        command
            .args(["-c", "exec \"$0\" \"$@\" 3>/dev/null"])
            .arg(program)
            .args(["-proto", protocol, "-host-ip", "0.0.0.0", "-host-port"])
            .args([&number.to_string(), "-container-ip", "172.31.0.2"])
            .args(["-container-port", &number.to_string()])
            .stdout(Stdio::null());
        processes.push(Process::start_command(command)?);
        wait_for_port(&topology.host, protocol, number).context("docker-proxy")?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    let shares = processes.iter().map(|process| {
        let path = format!("/proc/{}/smaps_rollup", process.pid());
        kilobytes(&fs::read_to_string(&path).context(path)?, "Pss:")
    });
    Ok(Took {
        seconds,
        memory: Some(shares.sum::<Result<u64>>()?),
        maps: None,
        slabs: slab_bytes()? - before,
    })
}

/// The bytes of a line such as `VmRSS:  1234 kB`.
fn kilobytes(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(number.with_context(|| format!("no {name}"))? * 1024)
}

pub(crate) fn resident_bytes(pid: u32) -> Result<u64> {
    kilobytes(
        &fs::read_to_string(format!("/proc/{pid}/status"))?,
        "VmRSS:",
    )
}

fn slab_bytes() -> Result<i64> {
    Ok(kilobytes(&fs::read_to_string("/proc/meminfo")?, "Slab:")?.cast_signed())
}

/// What the kernel says of the maps that a process holds, each once.
fn map_bytes(pid: u32) -> Result<u64> {
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor that was closed meanwhile is none.
        let Ok(text) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().parse::<u64>().ok()
        };
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    Ok(maps.into_values().sum())
}
