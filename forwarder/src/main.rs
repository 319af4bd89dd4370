//! `forwarder`: from the command line to what it asks for, and from an error to one line and a status.

use std::{io::Write as _, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser as _};
use forwarder::{
    cli::tables,
    cli::{Cli, Command, Format},
    control::{self, Ending, Request},
    daemon::{self, Counter, Listed, ListedFlow},
    doctor,
};
use serde::{Serialize, de::DeserializeOwned};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let instance = &cli.instance;
    match cli.command {
        Command::Run(options) => {
            let filter = tracing_subscriber::EnvFilter::try_new(&options.log)
                .with_context(|| format!("--log {}", options.log))?;
            tracing_subscriber::fmt()
                .with_env_filter(filter)
                .with_writer(std::io::stderr)
                .with_target(false)
                .init();
            tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()
                .context("start the runtime")?
                .block_on(daemon::run(instance, options))
        }
        Command::Publish { specs, allow } => {
            let specs = specs.iter().map(ToString::to_string).collect();
            let lines: Vec<String> = control::ask(instance, &Request::Publish { specs, allow })?;
            lines.iter().try_for_each(|line| print(line))
        }
        Command::Unpublish {
            publishes,
            drain,
            reset,
        } => {
            let how = match (drain, reset) {
                (true, _) => Ending::Drain,
                (_, true) => Ending::Reset,
                _ => Ending::Cut,
            };
            control::ask(instance, &Request::Unpublish { publishes, how })
        }
        Command::List(format) => {
            show::<Vec<Listed>>(instance, &Request::List, format, |rows| tables::list(rows))
        }
        Command::Flows(format) => {
            show::<Vec<ListedFlow>>(instance, &Request::Flows, format, |rows| {
                tables::flows(rows)
            })
        }
        Command::Stats(format) => show::<Vec<Counter>>(instance, &Request::Stats, format, |rows| {
            tables::stats(rows)
        }),
        Command::Doctor(format) => {
            let findings = doctor::examine();
            emit(&findings, format, || doctor::text(&findings))
        }
        Command::Trace { id, client } => control::call(instance, &Request::Trace, |line| {
            let line = line
                .as_str()
                .and_then(|line| tables::trace(line, id, client));
            line.map_or(Ok(()), |line| print(&line))?;
            Ok(true)
        }),
        Command::Down => {
            let found = daemon::down(instance)?;
            print(if found {
                "removed"
            } else {
                "nothing to remove"
            })
        }
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "forwarder", &mut text);
            Ok(std::io::stdout().write_all(&text)?)
        }
        Command::Man { to: None } => {
            Ok(clap_mangen::Man::new(Cli::command()).render(&mut std::io::stdout())?)
        }
        Command::Man { to: Some(folder) } => clap_mangen::generate_to(Cli::command(), &folder)
            .with_context(|| folder.display().to_string()),
    }
}

/// Asks the instance, and prints the answer.
fn show<T: DeserializeOwned + Serialize>(
    instance: &str,
    request: &Request,
    format: Format,
    text: impl Fn(&T) -> String,
) -> Result<()> {
    let answer: T = control::ask(instance, request)?;
    emit(&answer, format, || text(&answer))
}

fn emit(value: &impl Serialize, format: Format, text: impl Fn() -> String) -> Result<()> {
    if format.json {
        print(&serde_json::to_string_pretty(value)?)
    } else {
        Ok(std::io::stdout().write_all(text().as_bytes())?)
    }
}

fn print(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

/// `forwarder list | head` is no error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
