//! `forwarder top`: a live table of publishes with their rates, and of the reasons that packets met. Where standard output is
//! no terminal, or for `--json`, that of one second and the end.

use std::{
    collections::HashMap,
    io::{IsTerminal as _, Write as _},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use hyper::Method;
use nix::sys::signal::{SigSet, Signal};
use ratatui::{
    DefaultTerminal, Frame,
    crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout},
    style::Stylize as _,
    text::Line,
    widgets::{Row, Table},
};
use serde::Serialize;

use super::tables;
use crate::{
    control::{
        api::{Counter, Listed},
        client::Client,
    },
    publish::Id,
};

const EVERY: Duration = Duration::from_secs(1);
/// Lines for reasons, of which those that rise most are shown.
const REASONS: u16 = 7;
const HEADER: [&str; 8] = [
    "ID",
    "OWNER",
    "FRONTEND",
    "PATH",
    "FLOWS",
    "PACKETS/S",
    "BYTES/S",
    "REASON",
];

/// By what publishes are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sort {
    #[default]
    Bytes,
    Packets,
    Flows,
    Id,
}

/// What the instance said at one moment.
#[derive(Debug)]
struct Reading {
    at: Instant,
    publishes: Vec<Listed>,
    reasons: Vec<Counter>,
}

impl Reading {
    fn take(client: &Client) -> Result<Self> {
        let none: Option<&()> = None;
        Ok(Self {
            publishes: client.ask(&Method::GET, "/v1/publishes", none)?,
            reasons: client.ask(&Method::GET, "/v1/stats", none)?,
            at: Instant::now(),
        })
    }
}

/// A publish with its rates.
#[derive(Debug)]
struct Rated<'a> {
    publish: &'a Listed,
    packets: f64,
    bytes: f64,
}

/// A reason with its rate.
#[derive(Debug, Serialize)]
struct Reason<'a> {
    #[serde(flatten)]
    counter: &'a Counter,
    packets_per_second: f64,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Document<'a> {
    /// With the rates of this second.
    publishes: Vec<Listed>,
    reasons: Vec<Reason<'a>>,
}

/// Two readings, and how they are shown.
#[derive(Debug)]
struct View {
    before: Reading,
    now: Reading,
    sort: Sort,
    /// Rows that are scrolled past.
    skip: usize,
}

impl View {
    /// A counter's rate; it may begin anew with the instance.
    fn rate(&self, before: Option<u64>, now: u64) -> f64 {
        let seconds = (self.now.at - self.before.at).as_secs_f64();
        match before {
            Some(before) if seconds > 0.0 => now.saturating_sub(before) as f64 / seconds,
            _ => 0.0,
        }
    }

    fn publishes(&self) -> Vec<Rated<'_>> {
        let before = self.before.publishes.iter();
        let before: HashMap<Id, &Listed> = before.map(|it| (it.id, it)).collect();
        let rated = self.now.publishes.iter().map(|publish| {
            let before = before.get(&publish.id);
            Rated {
                publish,
                packets: self.rate(before.map(|it| it.packets), publish.packets),
                bytes: self.rate(before.map(|it| it.bytes), publish.bytes),
            }
        });
        let mut rated: Vec<_> = rated.collect();
        rated.sort_by(|a, b| {
            let order = match self.sort {
                Sort::Bytes => b.bytes.total_cmp(&a.bytes),
                Sort::Packets => b.packets.total_cmp(&a.packets),
                Sort::Flows => b.publish.flows.cmp(&a.publish.flows),
                Sort::Id => std::cmp::Ordering::Equal,
            };
            order.then(a.publish.id.cmp(&b.publish.id))
        });
        rated
    }

    fn rows(&self) -> Vec<[String; 8]> {
        let row = |rated: Rated<'_>| {
            let publish = rated.publish;
            [
                publish.id.to_string(),
                tables::owner(publish),
                format!(
                    "{}/{}",
                    tables::endpoint(&publish.frontend),
                    publish.protocol
                ),
                publish
                    .delivery
                    .as_ref()
                    .unwrap_or(&publish.datapath)
                    .clone(),
                publish.flows.to_string(),
                tables::short(rated.packets),
                tables::short(rated.bytes),
                publish.reason.clone().unwrap_or_default(),
            ]
        };
        self.publishes().into_iter().map(row).collect()
    }

    /// Those that are counted, with their rates; the fastest first.
    fn reasons(&self) -> Vec<Reason<'_>> {
        let before = self.before.reasons.iter();
        let before: HashMap<&str, u64> = before.map(|it| (&*it.reason, it.packets)).collect();
        let counted = self.now.reasons.iter().filter(|it| it.packets > 0);
        let rated = counted.map(|counter| Reason {
            counter,
            packets_per_second: self.rate(before.get(&*counter.reason).copied(), counter.packets),
        });
        let mut rated: Vec<_> = rated.collect();
        rated.sort_by(|a, b| b.packets_per_second.total_cmp(&a.packets_per_second));
        rated
    }

    fn reason_rows(&self) -> Vec<[String; 3]> {
        let row = |it: Reason<'_>| {
            [
                it.counter.reason.clone(),
                it.counter.packets.to_string(),
                tables::short(it.packets_per_second),
            ]
        };
        self.reasons().into_iter().map(row).collect()
    }

    fn document(&self) -> Document<'_> {
        let publishes = self.publishes().into_iter().map(|rated| Listed {
            packets_per_second: rated.packets,
            bytes_per_second: rated.bytes,
            ..rated.publish.clone()
        });
        Document {
            publishes: publishes.collect(),
            reasons: self.reasons(),
        }
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let reasons = self.reason_rows();
        let lines = REASONS.min(reasons.len() as u16 + 1);
        let [title, publishes, below, keys] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Min(2),
            Constraint::Length(lines),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        let rows = self.rows();
        let title_text = format!("forwarder: {} publishes", rows.len());
        frame.render_widget(Line::from(title_text).bold(), title);
        let widths = [
            Constraint::Length(6),
            Constraint::Max(20),
            Constraint::Min(16),
            Constraint::Length(10),
            Constraint::Length(8),
            Constraint::Length(9),
            Constraint::Length(9),
            Constraint::Fill(1),
        ];
        let last = rows.len().saturating_sub(1);
        let shown = rows.into_iter().skip(self.skip.min(last)).map(Row::new);
        let header = Row::new(HEADER).bold();
        frame.render_widget(Table::new(shown, widths).header(header), publishes);
        let widths = [
            Constraint::Length(26),
            Constraint::Length(14),
            Constraint::Length(9),
        ];
        let header = Row::new(["REASON", "PACKETS", "A SECOND"]).bold();
        let reasons = Table::new(reasons.into_iter().map(Row::new), widths).header(header);
        frame.render_widget(reasons, below);
        let text = "sort: b bytes, p packets, f flows, i id   arrows scroll   q ends";
        frame.render_widget(Line::from(text).dim(), keys);
    }

    /// Whether a key ends the program.
    fn press(&mut self, key: KeyEvent) -> bool {
        let most = self.now.publishes.len().saturating_sub(1);
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('b') => self.sort = Sort::Bytes,
            KeyCode::Char('p') => self.sort = Sort::Packets,
            KeyCode::Char('f') => self.sort = Sort::Flows,
            KeyCode::Char('i') => self.sort = Sort::Id,
            KeyCode::Down => self.skip = (self.skip + 1).min(most),
            KeyCode::Up => self.skip = self.skip.saturating_sub(1),
            KeyCode::PageDown => self.skip = (self.skip + 10).min(most),
            KeyCode::PageUp => self.skip = self.skip.saturating_sub(10),
            _ => {}
        }
        false
    }
}

/// Shows an instance until a key ends it, or one second of it.
///
/// # Errors
/// The instance is not running or ends, or the terminal has gone.
pub fn run(client: &Client, json: bool) -> Result<()> {
    let before = Reading::take(client)?;
    if json || !std::io::stdout().is_terminal() {
        thread::sleep(EVERY);
        let view = View {
            before,
            now: Reading::take(client)?,
            sort: Sort::default(),
            skip: 0,
        };
        if json {
            let text = serde_json::to_string_pretty(&view.document())?;
            return Ok(writeln!(std::io::stdout(), "{text}")?);
        }
        let text = tables::table(HEADER, &view.rows())
            + "\n"
            + &tables::table(["REASON", "PACKETS", "A SECOND"], &view.reason_rows());
        return Ok(std::io::stdout().write_all(text.as_bytes())?);
    }
    let view = View {
        now: Reading::take(client)?,
        before,
        sort: Sort::default(),
        skip: 0,
    };
    restore_at_signals()?;
    // Also puts the terminal back in order when somebody panics.
    let mut terminal = ratatui::try_init().context("prepare the terminal")?;
    let shown = show(client, &mut terminal, view);
    ratatui::restore();
    shown
}

/// A signal ends this process at once, whatever it waits for, and not before the terminal is as it was.
fn restore_at_signals() -> Result<()> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT]
        .into_iter()
        .collect();
    signals.thread_block()?; // and that of threads that begin later
    thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            ratatui::restore();
            std::process::exit(128 + signal as i32);
        }
    });
    Ok(())
}

fn show(client: &Client, terminal: &mut DefaultTerminal, mut view: View) -> Result<()> {
    loop {
        terminal.draw(|frame| view.draw(frame))?;
        let left = EVERY.saturating_sub(view.now.at.elapsed());
        if event::poll(left)? {
            // A new size is drawn as everything else is.
            if let Event::Key(key) = event::read()?
                && key.kind != KeyEventKind::Release
                && view.press(key)
            {
                return Ok(());
            }
            continue;
        }
        let now = Reading::take(client)?;
        view.before = std::mem::replace(&mut view.now, now);
    }
}
