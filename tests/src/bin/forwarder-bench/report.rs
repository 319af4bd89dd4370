//! What was measured, as tables, raw numbers and charts; and read again from the raw numbers.

use std::{collections::BTreeMap, fmt, fmt::Write as _, fs, path::Path};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    arena::{Client, Contender},
    chart, goals, headline,
    process::Placement,
    scale::Scale,
    workload::{Sample, Workload},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Case {
    pub(crate) client: Client,
    pub(crate) placement: Placement,
    pub(crate) workload: Workload,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            client,
            placement,
            workload,
        } = self;
        write!(
            f,
            "{}, {}, {}",
            client.name(),
            placement.name(),
            workload.name()
        )
    }
}

#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) contender: Contender,
    pub(crate) case: Case,
    pub(crate) round: u32,
    pub(crate) result: Result<Sample, String>,
}

/// The middle of several measurements, and how far they lie apart.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Summary {
    /// `None` of nothing.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            (values.get(middle.checked_sub(1)?)? + values[middle]) / 2.0
        };
        Some(Self {
            median,
            least: *values.first()?,
            most: *values.last()?,
        })
    }
}

#[derive(Debug)]
pub(crate) struct Report {
    environment: Vec<String>,
    pub(crate) notes: Vec<String>,
    records: Vec<Record>,
    pub(crate) scale: Option<Scale>,
}

impl Report {
    pub(crate) fn new(environment: Vec<String>) -> Self {
        Self {
            environment,
            notes: Vec::new(),
            records: Vec::new(),
            scale: None,
        }
    }

    pub(crate) fn note(&mut self, note: String) {
        eprintln!("note: {note}");
        self.notes.push(note);
    }

    pub(crate) fn add(&mut self, record: Record) {
        self.records.push(record);
    }

    /// What an earlier run left in `raw.json`, but for what it says of many publishes, which no chart shows.
    ///
    /// # Errors
    /// It is not there, or names something that this benchmark does not know.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("raw.json");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let raw: Raw = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let records: Result<_> = raw.records.into_iter().map(RawRecord::known).collect();
        Ok(Self {
            environment: raw.environment,
            notes: raw.notes,
            records: records.with_context(|| path.display().to_string())?,
            scale: None,
        })
    }

    /// How often everything was measured.
    pub(crate) fn rounds(&self) -> u32 {
        let rounds = self.records.iter().map(|record| record.round + 1);
        rounds.max().unwrap_or_default()
    }

    /// What was measured, and on what: the first lines of the environment.
    pub(crate) fn machine(&self) -> &[String] {
        &self.environment[..self.environment.len().min(3)]
    }

    fn samples(&self, contender: Contender, case: Case) -> impl Iterator<Item = &Sample> {
        self.records
            .iter()
            .filter(move |record| record.contender == contender && record.case == case)
            .filter_map(|record| record.result.as_ref().ok())
    }

    pub(crate) fn summary(&self, contender: Contender, case: Case) -> Option<Summary> {
        Summary::of(self.samples(contender, case).map(|sample| sample.value))
    }

    /// The first case in which one of the contenders that matter has no number at all.
    pub(crate) fn missing(&self) -> Option<String> {
        let needed = [
            Contender::Wire,
            Contender::Routing,
            Contender::Iptables,
            Contender::Forwarder,
            Contender::Userland,
        ];
        let failed = self.records.iter().find(|record| {
            needed.contains(&record.contender)
                && self.summary(record.contender, record.case).is_none()
        })?;
        Some(format!("{} of {}", failed.case, failed.contender.name()))
    }

    /// Contenders with numbers in any of these cases, in their own order.
    fn contenders(&self, cases: &[Case]) -> Vec<Contender> {
        let has = |contender: &Contender| {
            cases
                .iter()
                .any(|case| self.summary(*contender, *case).is_some())
        };
        Contender::ALL.into_iter().filter(has).collect()
    }

    /// The cases that were measured, by client and placement.
    fn groups(&self) -> BTreeMap<(Client, Placement), Vec<Case>> {
        let mut groups: BTreeMap<_, Vec<Case>> = BTreeMap::new();
        for Record { case, .. } in &self.records {
            let group = groups.entry((case.client, case.placement)).or_default();
            if !group.contains(case) {
                group.push(*case);
            }
        }
        groups
    }

    /// A row for each contender, a column for each workload: the median, and what it is of iptables' median.
    pub(crate) fn table(
        &self,
        cases: &[Case],
        cell: impl Fn(Contender, Case) -> Option<String>,
    ) -> String {
        let mut text = "| |".to_owned();
        for case in cases {
            let _ = write!(
                text,
                " {}, {} |",
                case.workload.name(),
                case.workload.unit()
            );
        }
        let _ = write!(text, "\n|---|{}\n", "--:|".repeat(cases.len()));
        for contender in self.contenders(cases) {
            let _ = write!(text, "| {} |", contender.name());
            for case in cases {
                let cell = cell(contender, *case).unwrap_or_else(|| "–".into());
                let _ = write!(text, " {cell} |");
            }
            text.push('\n');
        }
        text
    }

    fn values(&self, cases: &[Case]) -> String {
        self.table(cases, |contender, case| {
            let Summary {
                median,
                least,
                most,
            } = self.summary(contender, case)?;
            let ratio = self
                .summary(Contender::Iptables, case)
                .map_or(String::new(), |base| {
                    format!(" **{:.2}×**", median / base.median)
                });
            Some(format!(
                "{}{ratio} ({}–{})",
                short(median),
                short(least),
                short(most)
            ))
        })
    }

    /// Medians of a further figure of the samples; `None` where no sample has it.
    fn further(&self, cases: &[Case], figure: impl Fn(&Sample) -> Option<f64>) -> Option<String> {
        let cell = |contender, case| {
            let summary = Summary::of(self.samples(contender, case).filter_map(&figure))?;
            Some(short(summary.median))
        };
        let cases: Vec<Case> = cases
            .iter()
            .copied()
            .filter(|case| {
                Contender::ALL
                    .iter()
                    .any(|contender| cell(*contender, *case).is_some())
            })
            .collect();
        (!cases.is_empty()).then(|| self.table(&cases, cell))
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        let goals = goals::table(self);
        if !goals.is_empty() {
            let _ = write!(
                text,
                "## Goals\n\nRatios of medians of this run.\n\n{goals}\n"
            );
        }
        for ((client, placement), cases) in self.groups() {
            let _ = write!(
                text,
                "## {} client, {}\n\n{}\n",
                capital(client.name()),
                placement.name(),
                self.values(&cases)
            );
            if let Some(table) = self.further(&cases, |sample| Some(sample.cpu_us)) {
                let _ = write!(
                    text,
                    "CPU time of the whole machine, µs for each packet, round trip, request or kilobyte:\n\n{table}\n"
                );
            }
            for (name, figure) in [
                (
                    "median",
                    (|sample: &Sample| sample.p50_us) as fn(&Sample) -> Option<f64>,
                ),
                ("99th percentile", |sample| sample.p99_us),
            ] {
                if let Some(table) = self.further(&cases, figure) {
                    let _ = write!(text, "Latency, {name}, µs:\n\n{}\n", without_units(&table));
                }
            }
        }
        if let Some(scale) = &self.scale {
            text += &scale.markdown();
        }
        text += "## How it was measured\n\n";
        text += METHOD;
        for line in &self.environment {
            let _ = writeln!(text, "- {line}");
        }
        if !self.notes.is_empty() {
            text += "\nNotes:\n\n";
            for note in &self.notes {
                let _ = writeln!(text, "- {}", note.replace('\n', " "));
            }
        }
        text
    }

    /// The cases of the charts.
    pub(crate) fn outside(&self) -> Vec<Case> {
        let mut groups = self.groups();
        let outside = groups.remove(&(Client::External, Placement::Same));
        outside.unwrap_or_default()
    }

    pub(crate) fn chart(&self) -> String {
        chart::svg(self, &self.outside())
    }

    /// headline.svg and chart.svg.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub(crate) fn draw(&self, folder: &Path) -> Result<()> {
        fs::write(folder.join("headline.svg"), headline::svg(self)).context("headline.svg")?;
        fs::write(folder.join("chart.svg"), self.chart()).context("chart.svg")
    }

    /// README.md, raw.json and the charts.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let mut heading = "# Benchmark\n\n".to_owned();
        if !self.outside().is_empty() {
            heading += CHARTS;
            self.draw(folder)?;
        }
        fs::write(folder.join("README.md"), heading + &self.markdown()).context("README.md")?;
        fs::write(folder.join("raw.json"), self.raw()?).context("raw.json")
    }

    fn raw(&self) -> Result<String> {
        let records: Vec<_> = self
            .records
            .iter()
            .map(
                |Record {
                     contender,
                     case,
                     round,
                     result,
                 }| {
                    json!({
                        "contender": contender.name(),
                        "client": case.client.name(),
                        "placement": case.placement.name(),
                        "workload": case.workload.name(),
                        "unit": case.workload.unit(),
                        "round": round,
                        "sample": result.as_ref().ok(),
                        "error": result.as_ref().err(),
                    })
                },
            )
            .collect();
        let document = json!({
            "environment": self.environment,
            "notes": self.notes,
            "records": records,
            "scale": self.scale,
        });
        Ok(serde_json::to_string_pretty(&document)? + "\n")
    }
}

/// `raw.json`, as [`Report::raw`] writes it.
#[derive(Deserialize)]
struct Raw {
    environment: Vec<String>,
    notes: Vec<String>,
    records: Vec<RawRecord>,
    /// Read by nobody.
    #[serde(rename = "scale")]
    _scale: Value,
}

#[derive(Deserialize)]
struct RawRecord {
    contender: String,
    client: String,
    placement: String,
    workload: String,
    round: u32,
    sample: Option<Sample>,
    error: Option<String>,
}

impl RawRecord {
    fn known(self) -> Result<Record> {
        let contender = named(Contender::ALL, Contender::name, &self.contender)?;
        let case = Case {
            client: named(Client::ALL, Client::name, &self.client)?,
            placement: named(Placement::ALL, Placement::name, &self.placement)?,
            workload: named(Workload::ALL, Workload::name, &self.workload)?,
        };
        let result = match (self.sample, self.error) {
            (Some(sample), None) => Ok(sample),
            (_, error) => Err(error.unwrap_or_default()),
        };
        Ok(Record {
            contender,
            case,
            round: self.round,
            result,
        })
    }
}

fn named<T: Copy, const N: usize>(
    all: [T; N],
    name: impl Fn(T) -> &'static str,
    wanted: &str,
) -> Result<T> {
    let found = all.into_iter().find(|one| name(*one) == wanted);
    found.with_context(|| format!("{wanted:?} is unknown to this benchmark"))
}

const CHARTS: &str = "\
![Packets, connections, round trips and throughput of forwarder and five others](headline.svg)

![Medians of each workload by contender](chart.svg)

";

const METHOD: &str = "\
By `cargo xtask bench`: each contender has its own client, host and container, network namespaces joined by \
veths, the container on a bridge. TCP uses reno, which does not pace. Rounds take turns; a figure is the median, with the least and the most in \
parentheses, and bold is what it is of iptables' median. \"one core\": client, server and proxy are pinned to \
one core, so that a figure is the cost of all of it; \"two cores\": the client has one, server and proxy the \
other; \"unpinned\": as the scheduler likes. Wire is a veth between client and container without a host; \
routing is the client asking the container's own address (for a client on the host: a direct connection; for a \
container: plain bridging). Redirect alone and relay alone do what a hop by tc and a proxy in user space cannot do \
without, and nothing else. Every host forwards.

- capacity, new flows: 60-byte UDP frames from BPF_PROG_TEST_RUN with live frames, counted at the container's \
device and dropped there; generator and host share one core, so the generator's cost (see wire) is in every figure. Of \
capacity's frames one in 4,096 is answered, of the others none
- both ways of a flow, a way each of two flows: such frames from the client by one core and from the container by the other, which are \
or are not of one flow; both rates together
- TCP bulk: `iperf3 -c ADDRESS -t 1`; round trips: `sockperf pp [--tcp] --full-rtt -t 1`, 14 bytes
- UDP stream: datagrams of 64 octets, 32 a system call; UDP bulk: of 1,200 octets, 40 of one buffer (UDP_SEGMENT). Counted by the \
receiver, who takes coalesced ones (UDP_GRO) and acknowledges each such batch; at most 128 or 80 datagrams are on their way
- connect, request, close: `wrk -t1 -c16 -d1s -H 'Connection: close'`, answered by haproxy's own HTTP
";

/// Three digits that matter.
pub(crate) fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or(String::new(), |first| {
        first.to_uppercase().chain(letters).collect()
    })
}

/// The header without the units of throughput.
fn without_units(table: &str) -> String {
    let (header, rest) = table.split_once('\n').unwrap_or((table, ""));
    let mut header = header.to_owned();
    for workload in [
        Workload::TcpRoundTrip,
        Workload::UdpRoundTrip,
        Workload::Connect,
    ] {
        let name = workload.name();
        header = header.replace(&format!("{name}, {}", workload.unit()), name);
    }
    format!("{header}\n{rest}")
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_summary_is_the_middle_and_the_ends() {
        let odd = Summary::of([3.0, 1.0, 2.0]).expect("three");
        assert_eq!((odd.median, odd.least, odd.most), (2.0, 1.0, 3.0));
        let even = Summary::of([4.0, 1.0, 2.0, 3.0]).expect("four");
        assert_eq!(even.median, 2.5);
        assert!(Summary::of([]).is_none());
    }

    /// The committed runs and their folders.
    pub(crate) fn committed() -> Vec<(PathBuf, Report)> {
        let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks");
        let folders = fs::read_dir(runs).unwrap();
        let folders = folders.map(|entry| entry.unwrap().path());
        let runs: Vec<_> = folders
            .filter(|folder| folder.is_dir())
            .map(|folder| (folder.clone(), Report::read(&folder).unwrap()))
            .collect();
        assert!(!runs.is_empty());
        runs
    }

    /// Everything measured, with the widest numbers: a contender far ahead, one far behind, and all at one height.
    pub(crate) fn invented() -> Vec<Report> {
        let report = |value: fn(usize) -> f64| {
            let machine = [
                "forwarder 10.20.30",
                "Linux 6.18.44-amd64-unsigned",
                "128 cores",
            ];
            let mut report = Report::new(machine.map(Into::into).into());
            for (number, contender) in Contender::ALL.into_iter().enumerate() {
                for workload in Workload::ALL {
                    report.add(Record {
                        contender,
                        case: Case {
                            client: Client::External,
                            placement: Placement::Same,
                            workload,
                        },
                        round: 0,
                        result: Ok(Sample {
                            value: value(number),
                            cpu_us: 1.0,
                            p50_us: None,
                            p99_us: None,
                        }),
                    });
                }
            }
            report
        };
        vec![
            report(|_| 8888.8),
            report(|number| if number == 14 { 88_888.8 } else { 888.8 }),
            report(|number| 0.01 + number as f64),
        ]
    }

    #[test]
    fn raw_numbers_are_read_as_they_were_written() {
        for report in invented() {
            let folder = tempfile::TempDir::new().unwrap();
            report.write(folder.path()).unwrap();
            let again = Report::read(folder.path()).unwrap();
            assert_eq!(again.raw().unwrap(), report.raw().unwrap());
            assert_eq!(again.markdown(), report.markdown());
        }
    }

    #[test]
    fn a_contender_that_is_unknown_is_named() {
        let error = named(Client::ALL, Client::name, "martian").unwrap_err();
        assert!(error.to_string().contains("martian"), "{error}");
    }
}
