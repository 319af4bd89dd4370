//! `forwarder`: from the command line to what it asks for, and from an error to one line and a status.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser as _};
use forwarder::{
    cli::{Cli, Command, Format, tables, top, usage},
    config::{self, Config, Flags},
    control::{
        api::{Asked, Ban, Ending, Listed, ListedFlow, Problem, Reloaded, Running, Unpublish},
        client::Client,
    },
    daemon, doctor,
    engines::{cni, crowdsec, docker_proxy},
    instance::Instance,
    memory,
    network::local::is_local,
    privilege,
    publish::{Policy, Spec, allow, loops},
    stderr,
};
use hyper::Method;
use ipnet::IpNet;
use serde::{Serialize, de::DeserializeOwned};

fn main() -> ExitCode {
    // Engines start many of these: before anything else is begun.
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let words: Vec<String> = words.collect();
    let name = words.first().map(Path::new).and_then(Path::file_name);
    match &words[..] {
        [_, arguments @ ..] if name.is_some_and(|name| name == "docker-proxy") => {
            return docker_proxy::run(arguments);
        }
        [_, command, arguments @ ..] if command == "docker-proxy" => {
            return docker_proxy::run(arguments);
        }
        [_] if name.is_some_and(|name| name == "portmap" || name == "forwarder-portmap") => {
            return cni::run();
        }
        [_, command] if command == "cni" => return cni::run(),
        _ => {}
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refused(&error),
    };
    let instance = Instance {
        name: cli.instance,
        socket: cli.socket,
    };
    let client = Client::new(instance.clone());
    match run(cli.command, instance, &client) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => match error.downcast_ref() {
            Some(usage) => refused(usage),
            None if error.is::<config::Contradiction>() => {
                refused(&Cli::command().error(clap::error::ErrorKind::ArgumentConflict, error))
            }
            None => {
                stderr::line(format_args!("error: {:#}", with_holder(error, &client)));
                ExitCode::FAILURE
            }
        },
    }
}

/// A command line that asks for help, or is wrong: that is said in one line.
fn refused(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    let is_help = !error.use_stderr();
    if is_help || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return match error.print() {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                stderr::line(format_args!("error: standard output: {error}"));
                ExitCode::FAILURE
            }
            _ => ExitCode::from(if is_help { 0 } else { 2 }),
        };
    }
    stderr::line(usage::line(&error.to_string()));
    ExitCode::from(2)
}

/// A command line that is wrong in a way that the definition does not say.
fn usage_error(problem: impl std::fmt::Display) -> anyhow::Error {
    let kind = clap::error::ErrorKind::ValueValidation;
    Cli::command().error(kind, problem).into()
}

/// Names the process that has a port: the instance may not look into those of others, but root may who types the command.
fn with_holder(error: anyhow::Error, client: &Client) -> anyhow::Error {
    let taken = error
        .downcast_ref::<Problem>()
        .and_then(|problem| problem.taken.clone());
    let named = taken.and_then(|taken| {
        let network = format!("/proc/{}/net", client.pid()?);
        let holder = taken.process(network.as_ref())?;
        Some(taken.problem(Some(&holder)))
    });
    named.map_or(error, anyhow::Error::msg)
}

fn run(command: Command, instance: Instance, client: &Client) -> Result<()> {
    match command {
        Command::Run(options) => {
            // First, so that what was asked for comes before it: the library tells of each message that it does not know.
            let filter = tracing_subscriber::EnvFilter::try_new(format!(
                "netlink_proto=off,{}",
                options.log
            ))?;
            tracing_subscriber::fmt()
                .with_env_filter(filter)
                .with_writer(std::io::stderr)
                .with_ansi(std::io::stderr().is_terminal())
                .with_target(false)
                .log_internal_errors(false) // by `eprintln`, which panics where they cannot be written either
                .init();
            memory::share();
            tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .on_thread_start(privilege::reduce)
                .build()
                .context("start the runtime")?
                .block_on(daemon::run(instance, options.flags()))
        }
        Command::Publish {
            specs,
            container,
            allow,
            proxy_protocol,
            limits,
            owner,
        } => {
            let policy = Policy {
                allow: (!allow.is_empty()).then_some(allow),
                proxy_protocol,
                limits: limits.into(),
            };
            let specs = specs.iter();
            let specs = specs.map(|spec| spec.with_container(container.is_some()));
            let specs = specs.collect::<Result<Vec<String>, String>>();
            let specs = specs.map_err(usage_error)?;
            let asked = specs.into_iter().map(|spec| Asked {
                spec: Some(spec),
                container: container.clone(),
                policy: policy.clone(),
                ..Asked::default()
            });
            let asked: Vec<Asked> = asked.collect();
            let path = format!("/v1/publishes?{}", query([("owner", owner.as_str())])?);
            let rows: Vec<Listed> = client.ask(&Method::POST, &path, Some(&asked))?;
            rows.iter()
                .try_for_each(|row| print(&tables::published(row)))
        }
        Command::Unpublish {
            publishes,
            container,
            drain,
            reset,
            owner,
        } => {
            let ending = match (drain, reset) {
                (true, _) => Ending::Drain,
                (_, true) => Ending::Reset,
                _ => Ending::Cut,
            };
            let publishes = publishes.iter();
            let publishes = publishes.map(|it| it.with_container(container.is_some()));
            let publishes = publishes.collect::<Result<_, String>>();
            let asked = Unpublish {
                publishes: publishes.map_err(usage_error)?,
                container,
                ending,
            };
            let path = format!("/v1/unpublish?{}", query([("owner", owner.as_str())])?);
            client.ask(&Method::POST, &path, Some(&asked))
        }
        Command::Ban {
            sources,
            lasts,
            file,
            publish,
            owner,
        } => {
            let until = lasts.map(|lasts| SystemTime::now() + lasts);
            let until = until.and_then(|until| until.duration_since(UNIX_EPOCH).ok());
            let until = until.map(|until| until.as_secs());
            let listed = file.as_deref().map(listed_sources).transpose()?;
            let all = sources.into_iter().chain(listed.into_iter().flatten());
            let bans = all.map(|network| Ban {
                network,
                until,
                publish: publish.clone(),
                owner: owner.clone(),
            });
            let bans: Vec<Ban> = bans.collect();
            client.ask(&Method::POST, "/v1/bans", Some(&bans))
        }
        Command::Unban {
            sources,
            publish,
            owner,
        } => {
            let publish = publish.map(|publish| ("publish", publish.to_string()));
            let owner = owner.map(|owner| ("owner", owner.to_string()));
            let of: Vec<_> = publish.into_iter().chain(owner).collect();
            let path = format!("/v1/unban?{}", query(&of)?);
            client.ask(&Method::POST, &path, Some(&sources))
        }
        Command::Bans(format) => show(client, "/v1/bans", format, |rows: &Vec<_>| {
            tables::bans(rows)
        }),
        Command::List(format) => show(client, "/v1/publishes", format, |rows: &Vec<_>| {
            tables::list(rows)
        }),
        Command::Flows {
            publish,
            client: from,
            format,
        } => {
            let publish = publish.map(|id| format!("publish={id}"));
            let from = from.map(|network| format!("client={network}"));
            let of: Vec<String> = publish.into_iter().chain(from).collect();
            let path = format!("/v1/flows?{}", of.join("&"));
            let mut flows: Vec<ListedFlow> = get(client, &path)?;
            flows.sort_by(|a, b| (a.publish, &a.client).cmp(&(b.publish, &b.client)));
            emit(&flows, format, || tables::flows(&flows))
        }
        Command::Stats(format) => show(client, "/v1/stats", format, |rows: &Vec<_>| {
            tables::stats(rows)
        }),
        Command::Top { json } => top::run(client, json),
        Command::Doctor(format) => {
            let running: Option<Running> = get(client, "/v1/instance").ok();
            let respects_firewall = running.is_some_and(|it| it.respects_firewall);
            let findings = doctor::examine(respects_firewall);
            emit(&findings, format, || doctor::text(&findings))
        }
        Command::Trace {
            id,
            client: from,
            json,
        } => {
            // Of a number that is no publish's nothing would ever be seen.
            if let Some(id) = id {
                get::<Listed>(client, &format!("/v1/publishes/{id}"))?;
            }
            let none: Option<&()> = None;
            client.follow(&Method::GET, "/v1/trace", none, Vec::new(), |traced| {
                if tables::is_asked_for(&traced, id, from) {
                    print(&match json {
                        true => serde_json::to_string(&traced)?,
                        false => tables::trace(&traced),
                    })?;
                }
                Ok(true)
            })
        }
        Command::Check { file } => {
            let config = Config::read(Flags {
                file: Some(file.clone()),
                ..Flags::default()
            })?;
            let checked = config.check(); // of a file it is no wrong usage
            checked.map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;
            let specs = config.configured.iter().map(|it| it.spec.clone());
            let specs: Vec<Spec> = specs.collect();
            // By the addresses of the host that it is checked on.
            let is_local = |address| is_local(address).unwrap_or(false);
            loops::refuse_loops(std::iter::empty(), &specs, is_local)
                .with_context(|| file.display().to_string())?;
            let publishes = match config.configured.len() {
                1 => "1 publish".into(),
                many => format!("{many} publishes"),
            };
            print(&format!("{}: {publishes}, no mistake", file.display()))
        }
        Command::Reload => {
            let none: Option<&()> = None;
            let reloaded: Reloaded = client.ask(&Method::POST, "/v1/reload", none)?;
            print(&reloaded.to_string())
        }
        Command::DockerProxy { arguments } => {
            // `main` has taken it, unless options came before it.
            Err(usage_error(format!(
                "docker-proxy comes first: forwarder docker-proxy {}",
                arguments.join(" ")
            )))
        }
        Command::Cni => Err(usage_error("cni comes first, and alone: forwarder cni")),
        Command::Crowdsec => crowdsec::run(client),
        Command::Down => {
            let found = daemon::down(&instance)?;
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

/// Sources, one a line, of a file or of standard input. Empty lines and what follows a `#` are passed over.
fn listed_sources(file: &Path) -> Result<Vec<IpNet>> {
    let text = if file == Path::new("-") {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(file)
    };
    let text = text.with_context(|| file.display().to_string())?;
    let lines = text.lines().zip(1..).map(|(line, number)| {
        let plain = line.split('#').next().unwrap_or_default().trim();
        (plain, number)
    });
    let sources = lines
        .filter(|(line, _)| !line.is_empty())
        .map(|(line, number)| {
            let source = allow::source(line);
            source.map_err(|error| anyhow::anyhow!("{}:{number}: {error}", file.display()))
        });
    sources.collect()
}

/// Options as a query has them.
fn query(options: impl Serialize) -> Result<String> {
    Ok(serde_urlencoded::to_string(options)?)
}

fn get<T: DeserializeOwned>(client: &Client, path: &str) -> Result<T> {
    let none: Option<&()> = None;
    client.ask(&Method::GET, path, none)
}

/// Asks the instance, and prints the answer.
fn show<T: DeserializeOwned + Serialize>(
    client: &Client,
    path: &str,
    format: Format,
    text: impl Fn(&T) -> String,
) -> Result<()> {
    let answer: T = get(client, path)?;
    emit(&answer, format, || text(&answer))
}

fn emit(value: &impl Serialize, format: Format, text: impl Fn() -> String) -> Result<()> {
    if format.json {
        print(&serde_json::to_string_pretty(value)?)
    } else {
        let written = std::io::stdout().write_all(text().as_bytes());
        written.context("standard output")
    }
}

fn print(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").context("standard output")
}

/// `forwarder list | head` is no error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
