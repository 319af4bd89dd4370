//! The chart: a panel for each workload, a bar for each contender.

use std::fmt::Write as _;

use crate::{
    arena::Contender,
    report::{Case, Report, short},
};

const WIDTH: usize = 980;
const COLUMNS: usize = 3;
const PANEL: usize = WIDTH / COLUMNS;
const BAR: usize = 17;
const LABEL: usize = 128;

/// Bars that are ours, and the others'.
const OURS: &str = "#d9480f";
const OTHERS: &str = "#868e96";

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

pub(crate) fn svg(report: &Report, cases: &[Case]) -> String {
    let panels: Vec<Vec<(Contender, f64)>> = cases
        .iter()
        .map(|case| {
            let bars = Contender::ALL
                .into_iter()
                .filter(|contender| is_drawn(*contender));
            bars.filter_map(|contender| Some((contender, report.summary(contender, *case)?.median)))
                .collect()
        })
        .collect();
    let longest = panels.iter().map(Vec::len).max().unwrap_or_default();
    let height = 44 + longest * BAR;
    let total = panels.len().div_ceil(COLUMNS) * height + 8;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {total}\" width=\"{WIDTH}\" height=\"{total}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    for (at, (case, bars)) in cases.iter().zip(&panels).enumerate() {
        let (x, y) = (at % COLUMNS * PANEL, at / COLUMNS * height);
        let most = bars
            .iter()
            .map(|(_, value)| *value)
            .fold(f64::MIN_POSITIVE, f64::max);
        let _ = writeln!(
            text,
            "<text x=\"{}\" y=\"{}\" font-size=\"13\" font-weight=\"bold\" fill=\"#212529\">{}, {}</text>",
            x + 10,
            y + 24,
            case.workload.name(),
            case.workload.unit()
        );
        for (row, (contender, value)) in bars.iter().enumerate() {
            let top = y + 34 + row * BAR;
            let room = (PANEL - LABEL - 56) as f64;
            let colour = match contender {
                Contender::Forwarder | Contender::Userland => OURS,
                _ => OTHERS,
            };
            let _ = writeln!(
                text,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#495057\">{}</text>\
                 <rect x=\"{}\" y=\"{top}\" width=\"{:.1}\" height=\"{}\" rx=\"2\" fill=\"{colour}\"/>\
                 <text x=\"{:.1}\" y=\"{}\" fill=\"#212529\">{}</text>",
                x + LABEL - 6,
                top + 11,
                contender.name(),
                x + LABEL,
                room * value / most,
                BAR - 4,
                (x + LABEL) as f64 + room * value / most + 4.0,
                top + 11,
                short(*value)
            );
        }
    }
    text + "</svg>\n"
}
