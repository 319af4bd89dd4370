//! New connections while another core sends datagrams of ever new flows to another published port, which nobody
//! answers: what a flood from invented addresses leaves of the service.

use std::{collections::BTreeMap, fmt::Write as _, thread, time::Duration};

use anyhow::{Context, Result};
use forwarder_tests::cpu::pin_this_thread;
use serde::Serialize;

use crate::{
    arena::{Arena, Client, Contender, Programs},
    generator::{Frames, Until},
    process::Placement,
    report::{Summary, short},
    workload::{Measured, connections},
};

/// Until tables are full.
const BEFORE: Duration = Duration::from_secs(1);
const TIME: Duration = Duration::from_secs(2);
/// More than are sent, so that none comes twice.
const FRAMES: Frames = Frames {
    flows: 1 << 27,
    repeat: 1,
    answered: 0,
};

#[derive(Debug, Serialize)]
pub(crate) struct Flooded {
    contender: &'static str,
    /// Connections, thousands a second.
    quiet: Summary,
    flooded: Summary,
    /// New flows that reached the container meanwhile, thousands a second.
    flood: Summary,
}

#[derive(Default)]
struct Rates {
    quiet: Vec<f64>,
    flooded: Vec<f64>,
    flood: Vec<f64>,
}

pub(crate) fn measure(programs: &Programs, rounds: u32) -> Result<Vec<Flooded>> {
    let contenders = [
        Contender::Iptables,
        Contender::Nftables,
        Contender::Forwarder,
    ];
    let mut rates: BTreeMap<Contender, Rates> = BTreeMap::new();
    for round in 0..rounds {
        for contender in contenders {
            // With tables of its own: what a flood leaves in them lasts for longer than a round.
            let arena = Arena::new(contender, programs)?;
            arena.place(Placement::Same)?;
            pin_this_thread(Placement::Same.client())?;
            let quiet = connect(&arena)?.rate();
            let (flood, flooded) = thread::scope(|scope| {
                let flood = scope.spawn(|| {
                    pin_this_thread(Placement::Split.client())?;
                    arena.flood(FRAMES, 64, Until::Elapsed(BEFORE + TIME))
                });
                thread::sleep(BEFORE);
                let flooded = connect(&arena);
                let flood = flood.join().map_err(|_| anyhow::anyhow!("the flood"))?;
                anyhow::Ok((flood?, flooded?.rate()))
            })?;
            let (packets, elapsed) = flood;
            let flood = packets as f64 / elapsed.as_secs_f64() / 1e3;
            eprintln!(
                "round {} of {rounds}, {}: {quiet:.1} k/s, {flooded:.1} under a flood of {flood:.0}",
                round + 1,
                contender.name(),
            );
            let rates = rates.entry(contender).or_default();
            rates.quiet.push(quiet);
            rates.flooded.push(flooded);
            rates.flood.push(flood);
        }
    }
    rates
        .into_iter()
        .map(|(contender, rates)| {
            let summary = |values| Summary::of(values).context("no rounds");
            Ok(Flooded {
                contender: contender.name(),
                quiet: summary(rates.quiet)?,
                flooded: summary(rates.flooded)?,
                flood: summary(rates.flood)?,
            })
        })
        .collect()
}

/// What fails is not counted.
fn connect(arena: &Arena) -> Result<Measured> {
    let (netns, address) = arena.path(Client::External).context("no path")?;
    let (measured, _) = connections(netns, address, TIME)?;
    Ok(measured)
}

pub(crate) fn markdown(rows: &[Flooded]) -> String {
    let mut text =
        "## Under a flood\n\nConnect, request, close, external client, one core, k/s, while the other core sends \
        datagrams of ever new flows to another published port:\n\n\
        | | quiet | under the flood | of quiet | new flows that came through, k/s |\n|---|--:|--:|--:|--:|\n"
            .to_owned();
    for row in rows {
        let _ = writeln!(
            text,
            "| {} | {} | {} ({}–{}) | **{:.2}** | {} |",
            row.contender,
            short(row.quiet.median),
            short(row.flooded.median),
            short(row.flooded.least),
            short(row.flooded.most),
            row.flooded.median / row.quiet.median,
            short(row.flood.median)
        );
    }
    text + "\n"
}
