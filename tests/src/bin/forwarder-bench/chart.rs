//! The large chart of a report: a panel for each workload, a bar for each contender that was measured in it.
//! `headline.rs` has the small one.

use crate::{
    arena::Contender,
    drawing::{BOUNDS, Drawing, FAINT, OTHERS, OURS, Style, width_of},
    report::{Case, Report, short},
};

const WIDTH: f64 = 980.0;
const MARGIN: f64 = 16.0;
const COLUMNS: usize = 2;
const PANEL: f64 = (WIDTH - 3.0 * MARGIN) / 2.0;
/// Room for value and ratio at the end of the longest bar.
const VALUE: f64 = 104.0;
const SIZE: f64 = 11.0;
const ROW: f64 = 18.0;
const BAR: f64 = 12.0;
const HEAD: f64 = 30.0;

/// Contenders that answer a question of their own are in the tables only.
fn is_drawn(contender: Contender) -> bool {
    !matches!(
        contender,
        Contender::RoutingBesideNothing
            | Contender::RoutingBeside(_)
            | Contender::ForwarderAmongRules
            | Contender::IptablesBare
    )
}

/// Ours, others', or a bound of what is possible.
fn colour(contender: Contender) -> &'static str {
    match contender {
        Contender::Forwarder
        | Contender::ForwarderRespecting
        | Contender::Userland
        | Contender::RemoteForwarder
        | Contender::RemoteForwarderXdp => OURS,
        Contender::Wire
        | Contender::Hop
        | Contender::Routing
        | Contender::Relay
        | Contender::RemoteHop => BOUNDS,
        _ => OTHERS,
    }
}

const LEGEND: [(&str, &str); 3] = [
    (OURS, "forwarder"),
    (OTHERS, "other ways to publish a port"),
    (BOUNDS, "no way to publish a port: what is possible at all"),
];

pub(crate) fn svg(report: &Report, cases: &[Case]) -> String {
    draw(report, cases).svg("Medians of each workload by contender")
}

fn draw(report: &Report, cases: &[Case]) -> Drawing {
    let mut drawing = Drawing::new(WIDTH);
    let mut x = MARGIN;
    for (colour, meaning) in LEGEND {
        drawing.bar(x, 16.0, BAR, BAR, colour);
        x = drawing.text(x + BAR + 6.0, 26.0, Style::plain(12.0), meaning) + 20.0;
    }
    let notes = [
        "A client on another machine; client, proxy and server share one core. A longer bar is faster, and every bar begins at 0.",
        "Bold: how many times the figure of iptables. A contender that is missing from a panel was not measured there.",
    ];
    let faint = Style::plain(12.0).coloured(FAINT);
    for (line, note) in notes.into_iter().enumerate() {
        drawing.text(MARGIN, 46.0 + line as f64 * 17.0, faint, note);
    }

    let mut y = 75.0;
    for row in cases.chunks(COLUMNS) {
        let mut longest = 0;
        for (at, case) in row.iter().enumerate() {
            let x = MARGIN + at as f64 * (PANEL + MARGIN);
            longest = longest.max(panel(&mut drawing, report, *case, x, y));
        }
        y += HEAD + longest as f64 * ROW + 16.0;
    }
    drawing
}

/// Returns how many bars there are.
fn panel(drawing: &mut Drawing, report: &Report, case: Case, x: f64, y: f64) -> usize {
    let bars: Vec<(Contender, f64)> = Contender::ALL
        .into_iter()
        .filter(|contender| is_drawn(*contender))
        .filter_map(|contender| Some((contender, report.summary(contender, case)?.median)))
        .collect();
    let values = bars.iter().map(|(_, value)| *value);
    let most = values.fold(f64::MIN_POSITIVE, f64::max);
    let iptables = report.summary(Contender::Iptables, case);
    let title = format!("{}, {}", case.workload.name(), case.workload.unit());
    drawing.text(x, y + 18.0, Style::plain(13.5).bold(), &title);
    let names = bars.iter().map(|(contender, _)| contender.name());
    let longest = names.map(|name| width_of(name, SIZE, false));
    let label = longest.fold(0.0, f64::max) + 10.0;
    let begin = x + label;
    let end = y + HEAD + bars.len() as f64 * ROW;
    drawing.base_line(begin, y + HEAD - 2.0, end - 4.0);
    for (row, (contender, value)) in bars.iter().enumerate() {
        let top = y + HEAD + row as f64 * ROW;
        let base = top + 10.0;
        let style = Style::plain(SIZE);
        drawing.text(begin - 7.0, base, style.ending(), contender.name());
        let length = (PANEL - label - VALUE) * value / most;
        drawing.bar(begin, top, length, BAR, colour(*contender));
        let text = short(*value);
        let after = drawing.text(begin + length + 5.0, base, style, &text);
        if let Some(iptables) = iptables {
            let ratio = format!("{:.2}×", value / iptables.median);
            drawing.text(after + 7.0, base, style.bold(), &ratio);
        }
    }
    bars.len()
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
            let drawing = draw(&report, &report.outside());
            assert_eq!(drawing.collisions(), Vec::<String>::new());
        }
    }
}
