//! The chart in README.md: four figures that a user knows, six contenders, nothing else. Each panel has every
//! contender in the same row, also one that has no figure there.

use crate::{
    arena::{Client, Contender},
    drawing::{Drawing, FAINT, OTHERS, OURS, Style, width_of},
    process::Placement,
    report::{Case, Report, short},
    workload::Workload,
};

/// In this order in every panel.
const CONTENDERS: [Contender; 6] = [
    Contender::Forwarder,
    Contender::Nftables,
    Contender::Iptables,
    Contender::DockerProxy,
    Contender::Haproxy,
    Contender::Pasta,
];

/// What a panel shows, in words that need no knowledge of the benchmark.
struct Figure {
    workload: Workload,
    title: &'static str,
    explanation: &'static str,
    /// What a value of the workload's own unit is divided by, and what stands behind it then.
    scale: f64,
    unit: &'static str,
}

const FIGURES: [Figure; 4] = [
    Figure {
        workload: Workload::Capacity,
        title: "Packets per second",
        explanation: "60-byte UDP packets of one conversation",
        scale: 1000.0,
        unit: "million/s",
    },
    Figure {
        workload: Workload::Connect,
        title: "New connections per second",
        explanation: "connect, one HTTP request, close",
        scale: 1.0,
        unit: "thousand/s",
    },
    Figure {
        workload: Workload::TcpRoundTrip,
        title: "TCP round trips per second",
        explanation: "14 bytes there and back, one at a time",
        scale: 1.0,
        unit: "thousand/s",
    },
    Figure {
        workload: Workload::Bulk,
        title: "TCP throughput",
        explanation: "one connection, as much as it carries",
        scale: 1.0,
        unit: "Gbit/s",
    },
];

const WIDTH: f64 = 880.0;
const MARGIN: f64 = 16.0;
const COLUMNS: usize = 2;
const PANEL: f64 = (WIDTH - 3.0 * MARGIN) / 2.0;
/// Room for a contender's name.
const LABEL: f64 = 102.0;
const SIZE: f64 = 12.5;
const ROW: f64 = 24.0;
const BAR: f64 = 15.0;
const HEAD: f64 = 48.0;
/// Between a bar, its value and the ratio.
const GAP: f64 = 7.0;

const HEADING: &str = "One published port, a client on another machine";
const LEGEND: &str = "A longer bar is faster. Every bar begins at 0. \
                      Bold: how many times the figure of iptables.";

pub(crate) fn svg(report: &Report) -> String {
    draw(report).svg("forwarder beside five other ways to publish a port: four figures")
}

fn draw(report: &Report) -> Drawing {
    let mut drawing = Drawing::new(WIDTH);
    drawing.text(MARGIN, 30.0, Style::plain(17.0).bold(), HEADING);
    let legend = Style::plain(12.5).coloured(FAINT);
    drawing.text(MARGIN, 50.0, legend, LEGEND);
    let height = HEAD + CONTENDERS.len() as f64 * ROW + 18.0;
    for (at, figure) in FIGURES.iter().enumerate() {
        let x = MARGIN + (at % COLUMNS) as f64 * (PANEL + MARGIN);
        let y = 66.0 + (at / COLUMNS) as f64 * height;
        panel(&mut drawing, report, figure, x, y);
    }
    let mut y = 66.0 + FIGURES.len().div_ceil(COLUMNS) as f64 * height + 8.0;
    for line in footer(report) {
        drawing.text(MARGIN, y, Style::plain(11.5).coloured(FAINT), &line);
        y += 17.0;
    }
    drawing
}

/// How it was measured, as far as it changes how the bars are read.
fn footer(report: &Report) -> [String; 2] {
    let rounds = match report.rounds() {
        1 => "One round.".into(),
        rounds => format!("Median of {rounds} rounds."),
    };
    [
        format!(
            "Client, proxy and server share one core, so a bar is what all of them cost. {rounds}"
        ),
        format!(
            "iptables: the rules that Docker writes. {}.",
            report.machine().join(", ")
        ),
    ]
}

fn panel(drawing: &mut Drawing, report: &Report, figure: &Figure, x: f64, y: f64) {
    let case = Case {
        client: Client::External,
        placement: Placement::Same,
        workload: figure.workload,
    };
    let median = |contender| {
        report
            .summary(contender, case)
            .map(|summary| summary.median)
    };
    let most = CONTENDERS.into_iter().filter_map(median);
    let most = most.fold(f64::MIN_POSITIVE, f64::max);
    let iptables = median(Contender::Iptables);
    // Value and ratio to iptables, for the end of the bar.
    let words = |value: f64| {
        let ratio = iptables.map(|iptables| format!("{:.2}×", value / iptables));
        let value = format!("{} {}", short(value / figure.scale), figure.unit);
        (value, ratio.unwrap_or_default())
    };
    let widths = CONTENDERS.into_iter().filter_map(median).map(|value| {
        let (value, ratio) = words(value);
        width_of(&value, SIZE, true) + width_of(&ratio, SIZE, true) + 2.0 * GAP
    });
    let room = PANEL - LABEL - widths.fold(0.0, f64::max);
    drawing.text(x, y + 16.0, Style::plain(14.5).bold(), figure.title);
    let explanation = Style::plain(12.0).coloured(FAINT);
    drawing.text(x, y + 34.0, explanation, figure.explanation);

    let begin = x + LABEL;
    let rows = CONTENDERS.len() as f64 * ROW;
    drawing.base_line(begin, y + HEAD - 3.0, y + HEAD + rows - 4.0);
    for (row, contender) in CONTENDERS.into_iter().enumerate() {
        let top = y + HEAD + row as f64 * ROW;
        let base = top + 12.5;
        let ours = contender == Contender::Forwarder;
        let emphasis = |style: Style| {
            if ours {
                style.bold().coloured(OURS)
            } else {
                style
            }
        };
        let label = emphasis(Style::plain(SIZE)).ending();
        drawing.text(begin - 8.0, base, label, contender.name());
        let Some(value) = median(contender) else {
            let why = if figure.workload.is_udp() && !contender.has_udp() {
                "carries no UDP"
            } else {
                "not measured"
            };
            drawing.text(begin + 7.0, base, Style::plain(12.0).coloured(FAINT), why);
            continue;
        };
        let length = room * value / most;
        let colour = if ours { OURS } else { OTHERS };
        drawing.bar(begin, top + 1.0, length, BAR, colour);
        let (value, ratio) = words(value);
        let style = emphasis(Style::plain(SIZE));
        let end = drawing.text(begin + length + GAP, base, style, &value);
        if !ratio.is_empty() {
            drawing.text(end + GAP, base, style.bold(), &ratio);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{committed, invented};

    #[test]
    fn no_text_covers_another_or_is_cut_off() {
        for report in committed()
            .into_iter()
            .map(|(_, report)| report)
            .chain(invented())
        {
            assert_eq!(draw(&report).collisions(), Vec::<String>::new());
        }
    }

    #[test]
    fn a_contender_without_a_figure_is_named_with_the_reason() {
        let empty = svg(&Report::new(vec!["forwarder".into()]));
        for contender in CONTENDERS {
            let name = format!(">{}</text>", contender.name());
            assert_eq!(empty.matches(&name).count(), FIGURES.len(), "{name}");
        }
        assert_eq!(empty.matches("carries no UDP").count(), 1);
        assert_eq!(empty.matches("not measured").count(), 23);
        assert!(!empty.contains("million/s"));
    }

    #[test]
    fn the_committed_charts_are_drawn_from_the_committed_numbers() {
        for (folder, report) in committed() {
            let chart = std::fs::read_to_string(folder.join("headline.svg")).unwrap();
            let again = "draw it again: cargo xtask bench --redraw FOLDER";
            assert!(chart == svg(&report), "{}: {again}", folder.display());
            let chart = std::fs::read_to_string(folder.join("chart.svg")).unwrap();
            assert!(chart == report.chart(), "{}: {again}", folder.display());
        }
    }
}
