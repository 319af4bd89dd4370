//! The benchmark: forwarder beside what it replaces, in one run, in network namespaces of its own. Each
//! contender gets its machines once; rounds take turns, so that what disturbs the machine disturbs all alike.
//!
//! Started by `cargo xtask bench`. Exits non-zero only if it could not measure.

mod arena;
mod chart;
mod datagrams;
mod drawing;
mod flood;
mod generator;
mod goals;
mod headline;
mod process;
mod relay;
mod report;
mod rules;
mod scale;
mod soak;
mod tools;
mod workload;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use forwarder_tests::cpu::pin_this_thread;

use crate::{
    arena::{Arena, Client, Contender, Programs},
    process::Placement,
    report::{Case, Record, Report},
    scale::Scale,
    workload::Workload,
};

/// Measures forwarder beside iptables, nftables, docker-proxy, haproxy, pasta, routing and a wire.
#[derive(Parser)]
#[command(name = "forwarder-bench", max_term_width = 100)]
struct Options {
    /// The main contenders and workloads only, in less than three minutes
    #[arg(long)]
    quick: bool,
    /// How often everything is measured [default: 5, or 2 with --quick]
    #[arg(long)]
    rounds: Option<u32>,
    /// Seconds of one measurement
    #[arg(long, default_value_t = 1)]
    seconds: u64,
    /// Only contenders whose name contains this; may be given several times
    #[arg(long, value_name = "NAME")]
    contender: Vec<String>,
    /// Only workloads whose name contains this; may be given several times
    #[arg(long, value_name = "NAME")]
    workload: Vec<String>,
    /// Only clients whose name contains this: external, localhost, hairpin
    #[arg(long, value_name = "NAME")]
    client: Vec<String>,
    /// docker-proxy, if it is not in PATH
    #[arg(long, value_name = "PATH")]
    docker_proxy: Option<PathBuf>,
    /// Without the part about many publishes and many flows
    #[arg(long)]
    no_scale: bool,
    /// Only the part about many publishes and many flows
    #[arg(long, conflicts_with = "no_scale")]
    only_scale: bool,
    /// Where the report goes, with raw numbers and a chart [default: docs/benchmarks/DATE-HOST, or
    /// nowhere with --quick]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Measures something else: what the proxy holds after a million connections, many at once, and publishes that come and
    /// go; all of it in about ten minutes, or these parts
    #[arg(long, exclusive = true, value_name = "PART", num_args = 0..)]
    soak: Option<Vec<soak::Part>>,
    /// Measures nothing: draws the charts of an earlier report again, from its raw numbers
    #[arg(long, value_name = "FOLDER", conflicts_with = "out")]
    redraw: Option<PathBuf>,
    /// Is the contender "relay alone", to this backend
    #[arg(long, hide = true, value_name = "ADDRESS")]
    relay: Option<IpAddr>,
}

fn main() -> ExitCode {
    match bench(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(options: &Options) -> Result<()> {
    if let Some(backend) = options.relay {
        return relay::run(backend);
    }
    if let Some(parts) = &options.soak {
        return soak::run(parts);
    }
    if let Some(folder) = &options.redraw {
        return Report::read(folder)?.draw(folder);
    }
    let programs = Programs {
        docker_proxy: options
            .docker_proxy
            .clone()
            .or_else(|| tools::find("docker-proxy")),
    };
    tools::require()?;
    let mut report = Report::new(tools::environment(&programs)?);
    if !options.only_scale {
        conversations(options, &programs, &mut report)?;
    }
    if !options.no_scale && !options.quick {
        report.scale = Some(Scale::measure(
            &programs,
            options.rounds.unwrap_or(3),
            &mut report.notes,
        )?);
    }
    println!("{}", report.markdown());
    let default = || Some(Path::new("docs/benchmarks").join(tools::date_and_host()));
    let folder = options
        .out
        .clone()
        .or_else(|| default().filter(|_| !options.quick));
    if let Some(folder) = folder {
        report.write(&folder)?;
        println!("written to {}", folder.display());
    }
    if let Some(missing) = report.missing() {
        bail!("could not measure {missing}");
    }
    Ok(())
}

/// Every contender in every case, round by round.
fn conversations(options: &Options, programs: &Programs, report: &mut Report) -> Result<()> {
    let chosen = |wanted: &[String], name: &str| {
        wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()))
    };
    let cases: Vec<Case> = cases(options.quick)
        .into_iter()
        .filter(|case| chosen(&options.workload, case.workload.name()))
        .filter(|case| chosen(&options.client, case.client.name()))
        .collect();
    let mut arenas = Vec::new();
    for contender in Contender::ALL {
        if !chosen(&options.contender, contender.name()) || options.quick && !is_quick(contender) {
            continue;
        }
        eprintln!("setting up {}", contender.name());
        match Arena::new(contender, programs) {
            Ok(arena) => arenas.push(arena),
            Err(error) => report.note(format!("{} is left out: {error:#}", contender.name())),
        }
    }
    if arenas.is_empty() || cases.is_empty() {
        bail!("nothing to measure; without --contender, --workload and --client it is everything");
    }

    let rounds = options.rounds.unwrap_or(if options.quick { 2 } else { 5 });
    let time = Duration::from_secs(options.seconds);
    let total = rounds as usize
        * arenas
            .iter()
            .map(|arena| cases.iter().filter(|case| takes_part(arena, case)).count())
            .sum::<usize>();
    let begin = Instant::now();
    let mut done = 0;
    for round in 0..rounds {
        // Backwards every other time: nobody always comes after the same one, whose traces the kernel still clears away.
        let mut in_turn: Vec<&Arena> = arenas.iter().collect();
        if round % 2 != 0 {
            in_turn.reverse();
        }
        for case in &cases {
            for arena in in_turn.iter().filter(|arena| takes_part(arena, case)) {
                let result = workload::measure(
                    arena,
                    case.workload,
                    case.client,
                    case.placement,
                    time,
                    round,
                );
                done += 1;
                let left = begin.elapsed().as_secs() * (total - done) as u64 / done as u64;
                let outcome = match &result {
                    Ok(sample) => format!("{:.1} {}", sample.value, case.workload.unit()),
                    Err(error) => format!("{error:#}"),
                };
                eprintln!(
                    "{done}/{total}, {}:{:02} left: {case}, {}: {outcome}",
                    left / 60,
                    left % 60,
                    arena.contender.name()
                );
                report.add(Record {
                    contender: arena.contender,
                    case: *case,
                    round,
                    result: result.map_err(|error| format!("{error:#}")),
                });
            }
        }
    }
    pin_this_thread(&[0, 1]).context("end of the measurements")
}

fn is_quick(contender: Contender) -> bool {
    matches!(
        contender,
        Contender::Wire
            | Contender::Routing
            | Contender::Iptables
            | Contender::DockerProxy
            | Contender::Forwarder
            | Contender::Userland
    )
}

/// What is measured, in this order.
fn cases(quick: bool) -> Vec<Case> {
    use Client::{External, Hairpin, Localhost};
    use Placement::{Free, Same, Split};
    use Workload::{
        BothWays, Bulk, Capacity, Connect, DatagramBulk, Datagrams, NewFlows, OneWay, TcpRoundTrip,
        TwoFlows, UdpRoundTrip,
    };
    let groups: &[(Client, Placement, &[Workload])] = if quick {
        &[
            (
                External,
                Same,
                &[Capacity, NewFlows, Bulk, TcpRoundTrip, Connect],
            ),
            (Localhost, Same, &[TcpRoundTrip]),
            (Hairpin, Same, &[TcpRoundTrip]),
        ]
    } else {
        &[
            (
                External,
                Same,
                &[
                    Capacity,
                    OneWay,
                    NewFlows,
                    Bulk,
                    TcpRoundTrip,
                    UdpRoundTrip,
                    Datagrams,
                    DatagramBulk,
                    Connect,
                ],
            ),
            (
                External,
                Split,
                &[BothWays, TwoFlows, Bulk, TcpRoundTrip, Connect],
            ),
            (
                External,
                Free,
                &[Bulk, TcpRoundTrip, Datagrams, DatagramBulk, Connect],
            ),
            (
                Localhost,
                Same,
                &[Bulk, TcpRoundTrip, UdpRoundTrip, Connect],
            ),
            (Localhost, Free, &[TcpRoundTrip, Connect]),
            (Hairpin, Same, &[Bulk, TcpRoundTrip, UdpRoundTrip, Connect]),
        ]
    };
    let case = |client, placement, workload| Case {
        client,
        placement,
        workload,
    };
    groups
        .iter()
        .flat_map(|(client, placement, workloads)| {
            workloads
                .iter()
                .map(|workload| case(*client, *placement, *workload))
        })
        .collect()
}

/// Contenders that answer one question are measured for that alone.
fn takes_part(arena: &Arena, case: &Case) -> bool {
    let main = (case.client, case.placement) == (Client::External, Placement::Same);
    let special = match arena.contender {
        Contender::RoutingBesideNothing | Contender::RoutingBeside(_)
            if (case.client, case.placement) == (Client::Hairpin, Placement::Same) =>
        {
            case.workload == Workload::TcpRoundTrip
        }
        Contender::RoutingBesideNothing
        | Contender::RoutingBeside(_)
        | Contender::ForwarderAmongRules
        | Contender::IptablesBare => {
            main && matches!(
                case.workload,
                Workload::Capacity | Workload::NewFlows | Workload::TcpRoundTrip
            )
        }
        Contender::ForwarderRespecting => main,
        // What XDP takes part in is existing flows; of new ones, SNAT has no more than source ports.
        contender if contender.is_remote() => {
            main && matches!(case.workload, Workload::Capacity | Workload::OneWay)
        }
        // What the two ways of a flow share, and nothing else, is the question.
        contender if case.workload.is_both_ways() => matches!(
            contender,
            Contender::Hop | Contender::Iptables | Contender::Nftables | Contender::Forwarder
        ),
        _ => true,
    };
    special && case.workload.applies(arena, case.client)
}
