//! Docker's `userland-proxy-path`: the process that dockerd starts for each published port. It takes the port, hands it to the
//! instance by a lease, and waits for its end; without an instance it forwards by itself until there is one.
//!
//! It is a program of its own as well, `forwarder-docker-proxy`, which has no proxy in it and becomes `forwarder` where it takes
//! one: of the whole program, each process would have the tables for itself that the dynamic linker writes to.
//!
//! The contract is that of cmd/docker-proxy in moby: descriptor 3 is told `0\n`, or `1\n` and why; descriptor 4 is the bound
//! socket where `-use-listen-fd` says so; SIGINT ends it with status 0.

#![expect(
    unsafe_code,
    reason = "descriptors that the engine hands over by their numbers"
)]

use std::{
    cell::RefCell,
    fs::File,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr},
    os::{
        fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    process::{Command, ExitCode},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};
use serde::Deserialize as _;
use socket2::SockRef;

use super::request::{self, Answer};
use crate::{
    instance::Instance,
    proxy::{Held, Idle, Options, Proxy, Sockets, Stop, Store},
    publish::{
        Spec,
        spec::{Ports, Protocol},
    },
    stderr,
};

/// Where dockerd listens for the outcome.
const STATUS: i32 = 3;
/// The socket that dockerd has bound.
const LISTENER: i32 = 4;
/// An instance that is lost is asked for again after this time.
const RETRY: Duration = Duration::from_millis(200);
/// An instance that does not answer at the end: `docker stop` waits for each of its ports, one after another.
const LAST: Duration = Duration::from_millis(500);
/// A port that another lease had is free when its end has been noticed.
const CONFLICTS: u32 = 10;
/// Who may be served by a process that has become `forwarder`: networks with commas in between.
const ALLOW: &str = "FORWARDER_PROXY_ALLOW";
/// So often a port that cannot be bound is tried again.
const BINDS: u32 = 2;

/// What the command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Arguments {
    protocol: String,
    host: (IpAddr, u16),
    container: (IpAddr, u16),
    use_listener: bool,
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Proxy(Arguments),
    Version,
    Help,
}

/// How a port is served without an instance: begun on return, until the sender is dropped. Gets the arguments, the port, and
/// where dockerd waits for the outcome, if it does.
type Alone = fn(&[String], &Port, Option<&Status>) -> Result<mpsc::Sender<()>>;

/// Runs as Docker's proxy, with the arguments after the name.
pub fn run(arguments: &[String]) -> ExitCode {
    run_with(arguments, in_this_process)
}

/// The same, but becomes `forwarder` to serve a port by itself.
pub fn run_small(arguments: &[String]) -> ExitCode {
    run_with(arguments, become_forwarder)
}

fn run_with(arguments: &[String], alone: Alone) -> ExitCode {
    let asked = match parse(arguments) {
        Ok(Asked::Proxy(asked)) => asked,
        Ok(Asked::Version) => {
            let version = env!("CARGO_PKG_VERSION");
            let line = format!("docker-proxy (commit forwarder) version {version}\n");
            let _ = std::io::stdout().write_all(line.as_bytes()); // whoever asked may have gone
            return ExitCode::SUCCESS;
        }
        Ok(Asked::Help) => {
            stderr::line(USAGE);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            stderr::line(format_args!("error: {error}\n{USAGE}"));
            return ExitCode::from(2);
        }
    };
    // Before a number that dockerd has not used becomes one of this process's own descriptors.
    let status = Status::take();
    let listener = asked.use_listener.then(|| passed(LISTENER));
    let begun = signals().and_then(|signals| Ok((signals, Port::take(&asked, listener)?)));
    let (signals, port) = match begun {
        Ok(begun) => begun,
        Err(error) => return status.failed(&error),
    };
    let serve = |status: Option<&Status>| match port.lease()? {
        Some(lease) => Ok(lease),
        None => alone(arguments, &port, status).map(Serving::Own),
    };
    let serving = match serve(Some(&status)) {
        Ok(serving) => serving,
        Err(error) => return status.failed(&error),
    };
    status.done();
    port.wait(&signals, serving, || serve(None));
    ExitCode::SUCCESS
}

const USAGE: &str = "usage: docker-proxy -proto tcp|udp|sctp -host-ip ADDR -host-port PORT -container-ip ADDR \
                     -container-port PORT [-use-listen-fd]";

/// Flags as Go's package flag reads them.
fn parse(arguments: &[String]) -> Result<Asked, String> {
    let mut asked = Arguments {
        protocol: "tcp".into(),
        host: (Ipv4Addr::UNSPECIFIED.into(), 0),
        container: (Ipv4Addr::UNSPECIFIED.into(), 0),
        use_listener: false,
    };
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let Some(flag) = word.strip_prefix('-') else {
            return Err(format!("unexpected {word:?}"));
        };
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let (name, given) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        match name {
            "v" | "version" => return Ok(Asked::Version),
            "h" | "help" => return Ok(Asked::Help),
            "use-listen-fd" => {
                asked.use_listener = match given.as_deref() {
                    None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => true,
                    Some("0" | "f" | "F" | "false" | "FALSE" | "False") => false,
                    Some(other) => return Err(format!("-use-listen-fd: {other:?} is no boolean")),
                };
                continue;
            }
            _ => {}
        }
        let mut value = || {
            let value = given.clone().or_else(|| words.next().cloned());
            value.ok_or_else(|| format!("-{name} needs a value"))
        };
        let address = |text: String| {
            let address = text.parse::<IpAddr>();
            address.map_err(|_| format!("-{name}: {text:?} is no address"))
        };
        let port = |text: String| {
            let port = text.parse::<u16>();
            port.map_err(|_| format!("-{name}: {text:?} is no port"))
        };
        match name {
            "proto" => asked.protocol = value()?,
            "host-ip" => asked.host.0 = address(value()?)?,
            "host-port" => asked.host.1 = port(value()?)?,
            "container-ip" => asked.container.0 = address(value()?)?,
            "container-port" => asked.container.1 = port(value()?)?,
            _ => return Err(format!("unknown flag -{name}")),
        }
    }
    Ok(Asked::Proxy(asked))
}

/// The signals that end it, held back until [`Port::wait`] reads them.
fn signals() -> Result<SignalFd> {
    let mut ends = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        ends.add(signal);
    }
    let mut blocked = ends;
    for signal in [Signal::SIGUSR1, Signal::SIGUSR2] {
        blocked.add(signal);
    }
    blocked.thread_block()?;
    Ok(SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC)?)
}

/// Takes one of the descriptors that dockerd has passed.
fn passed(descriptor: i32) -> Option<OwnedFd> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    // SAFETY: the number is looked at alone; whether it is open, the call below says.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
    // SAFETY: it is open, and nothing else of this process has opened it: nothing has run before.
    Some(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Where the outcome is told; standard error if nobody listens there.
struct Status(Option<File>);

impl Status {
    fn take() -> Self {
        Self(passed(STATUS).map(File::from))
    }

    /// In one write: dockerd reads once.
    fn done(self) {
        if let Some(mut pipe) = self.0 {
            let _ = pipe.write_all(b"0\n"); // dockerd may have gone
        }
    }

    fn failed(self, error: &anyhow::Error) -> ExitCode {
        match self.0 {
            Some(mut pipe) => drop(pipe.write_all(format!("1\n{error:#}").as_bytes())),
            None => stderr::line(format_args!("error: {error:#}")),
        }
        ExitCode::FAILURE
    }
}

/// The published port: it is this process's for as long as that lives.
struct Port {
    spec: Spec,
    socket: OwnedFd,
    instance: Instance,
    /// Whom the instance last served; empty for all, or if there was none yet.
    allow: RefCell<Vec<IpNet>>,
}

/// Who serves it.
enum Serving {
    /// The instance, until the connection ends.
    Lease {
        connection: UnixStream,
        owner: String,
    },
    /// This process. When this is dropped, what it has begun goes on and nothing new begins.
    Own(mpsc::Sender<()>),
}

impl Port {
    /// With the socket that dockerd has bound, if it says so.
    fn take(asked: &Arguments, listener: Option<Option<OwnedFd>>) -> Result<Self> {
        let protocol = match asked.protocol.as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            other => bail!("unsupported protocol {other}"),
        };
        let given = listener.map(|it| it.context("-use-listen-fd, but descriptor 4 is not open"));
        let given = given.transpose()?;
        let (address, port) = match &given {
            Some(given) => {
                let given = SockRef::from(given);
                let kind = given.protocol().context("descriptor 4")?.map(i32::from);
                ensure!(
                    kind == Some(protocol.number().into()),
                    "descriptor 4 is no socket of {protocol}"
                );
                let local = given.local_addr().context("descriptor 4")?;
                let local = local
                    .as_socket()
                    .context("descriptor 4 is no socket of IP")?;
                (local.ip(), local.port())
            }
            None => asked.host,
        };
        let one = |port| Ports {
            first: port,
            last: port,
        };
        let spec = Spec::new(
            (Some(address), None),
            one(port),
            (asked.container.0, None),
            one(asked.container.1),
            protocol,
        );
        let spec = spec.map_err(|problem| anyhow::anyhow!(problem))?;
        let socket = match given {
            Some(given) => given,
            None => Self::bind(&spec)?,
        };
        let name = std::env::var("FORWARDER_INSTANCE").unwrap_or_else(|_| "default".into());
        let allow = std::env::var(ALLOW).unwrap_or_default();
        let allow = allow.split(',').filter(|network| !network.is_empty());
        let allow: Result<Vec<IpNet>, _> = allow.map(str::parse).collect();
        // Without it, it would serve everybody.
        let allow = allow.with_context(|| format!("{ALLOW} is no list of networks"))?;
        Ok(Self {
            spec,
            socket,
            instance: Instance { name, socket: None },
            allow: RefCell::new(allow),
        })
    }

    /// # Errors
    /// Somebody has the port, and not only for a moment: that of a proxy which was killed is free once the instance has
    /// noticed.
    fn bind(spec: &Spec) -> Result<OwnedFd> {
        let mut attempt = 0;
        loop {
            match Held::bind(spec, &mut []) {
                Ok(held) => return held.into_sockets().pop().context("no socket was bound"),
                Err(error) if attempt == BINDS => return Err(error.into()),
                Err(_) => attempt += 1,
            }
            thread::sleep(RETRY);
        }
    }

    /// A lease; `None` if there is no instance.
    ///
    /// # Errors
    /// The instance refuses.
    fn lease(&self) -> Result<Option<Serving>> {
        for attempt in 0.. {
            let Some(stream) = request::connect(&self.instance) else {
                return Ok(None);
            };
            let body = serde_json::to_string(&[self.spec.to_string()])?;
            let asked = request::send(&stream, "POST", "/v1/leases", &body, Some(&self.socket));
            let Ok((status, line)) = asked.and_then(Answer::line) else {
                return Ok(None); // it has just ended
            };
            if status == 201 {
                let owner = line[0]["owner"].as_str().unwrap_or_default().to_owned();
                let allow = Vec::deserialize(&line[0]["allow"]);
                self.allow
                    .replace(allow.context("what the instance allows")?);
                return Ok(Some(Serving::Lease {
                    connection: stream,
                    owner,
                }));
            }
            let detail = line["detail"].as_str().unwrap_or("no reason given");
            let is_ending = status == 409 && detail.contains("of owner lease:");
            if status == 503 {
                return Ok(None);
            }
            if !is_ending || attempt == CONFLICTS {
                bail!("{detail}");
            }
            thread::sleep(RETRY);
        }
        Ok(None)
    }

    /// Waits for the end, and follows the instance as it goes and comes.
    fn wait(&self, signals: &SignalFd, mut serving: Serving, serve: impl Fn() -> Result<Serving>) {
        loop {
            let mut watched = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            let timeout = match &serving {
                Serving::Lease { connection, .. } => {
                    watched.push(PollFd::new(connection.as_fd(), PollFlags::POLLIN));
                    PollTimeout::NONE
                }
                Serving::Own(_) => PollTimeout::try_from(RETRY).unwrap_or(PollTimeout::NONE),
            };
            if poll(&mut watched, timeout).is_err() {
                continue; // EINTR
            }
            let is_ready = |at: usize| watched.get(at).and_then(PollFd::any).unwrap_or(false);
            if is_ready(0) {
                return self.end(serving);
            }
            serving = match serving {
                Serving::Lease {
                    mut connection,
                    owner,
                } if is_ready(1) => {
                    let mut octets = [0; 4096];
                    match connection.read(&mut octets) {
                        Ok(count) if count > 0 => Serving::Lease { connection, owner },
                        _ => match serve() {
                            Ok(serving) => serving,
                            Err(_) => {
                                thread::sleep(RETRY);
                                Serving::Lease { connection, owner } // is read again
                            }
                        },
                    }
                }
                Serving::Own(end) => match self.lease() {
                    Ok(Some(lease)) => lease,
                    _ => Serving::Own(end),
                },
                lease => lease,
            };
        }
    }

    /// Gives the port back: on return another container may have it.
    fn end(&self, serving: Serving) {
        if let Serving::Lease { owner, .. } = &serving
            && let Some(stream) = request::connect(&self.instance)
            && request::set_patience(&stream, LAST).is_ok()
        {
            let path = format!("/v1/owners/{owner}");
            let asked = request::send(&stream, "DELETE", &path, "", None);
            let _ = asked.and_then(Answer::line); // it ends with the connection at the latest
        }
    }
}

/// Forwards in user space, by threads that begin only now.
fn in_this_process(_: &[String], port: &Port, _: Option<&Status>) -> Result<mpsc::Sender<()>> {
    let mut given = Sockets::from(vec![port.socket.try_clone()?]);
    let held = Held::bind(&port.spec, &mut [&mut given])?;
    let spec = Arc::new(port.spec.clone());
    let options = Options {
        allow: port.allow.borrow().clone(),
        ..Options::default()
    };
    let (end, ended) = mpsc::channel();
    let (begun, result) = mpsc::channel();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let served = runtime.map(|runtime| {
            runtime.block_on(async {
                let started = Idle::start(Store::default())
                    .and_then(|idle| Proxy::start(held, spec, options, &idle));
                let mut proxy = match started {
                    Ok(proxy) => proxy,
                    Err(error) => return drop(begun.send(Err(error))),
                };
                let _ = begun.send(Ok(()));
                let waits = tokio::task::spawn_blocking(move || ended.recv());
                let _ = waits.await; // closed is what it waits for
                proxy.stop(Stop::Drain).await;
                while proxy.counters().flows > 0 {
                    tokio::time::sleep(RETRY).await;
                }
            });
        });
        drop(served);
    });
    result.recv().context("forward in user space")??;
    Ok(end)
}

/// Does not return unless that fails before anything has changed, or dockerd waits for the outcome. The port goes with it, as if
/// dockerd had bound it, and signals that are held back.
fn become_forwarder(
    arguments: &[String],
    port: &Port,
    status: Option<&Status>,
) -> Result<mpsc::Sender<()>> {
    use nix::{
        fcntl::{FcntlArg, fcntl},
        unistd::{AccessFlags, access, dup2_raw},
    };
    let program = std::env::current_exe()?.with_file_name("forwarder");
    let named = || format!("no instance is running, and {}", program.display());
    access(&program, AccessFlags::X_OK).with_context(named)?;
    let mut passed = vec![(port.socket.as_fd(), LISTENER)];
    let pipe = status.and_then(|status| status.0.as_ref());
    passed.extend(pipe.map(|pipe| (pipe.as_fd(), STATUS)));
    // Above both numbers first: one may have the other's.
    let copy = |(descriptor, number)| {
        let copied = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(LISTENER + 1))?;
        // SAFETY: `fcntl` has made it.
        Ok((unsafe { OwnedFd::from_raw_fd(copied) }, number))
    };
    let copies: Result<Vec<(OwnedFd, i32)>> = passed.into_iter().map(copy).collect();
    for (copied, number) in copies? {
        // SAFETY: what has the number is this process's, which ends here, whatever comes of it.
        std::mem::forget(unsafe { dup2_raw(&copied, number) }?);
    }
    let allow = port.allow.borrow();
    let allow: Vec<String> = allow.iter().map(ToString::to_string).collect();
    let error = Command::new(&program)
        .env(ALLOW, allow.join(","))
        .arg("docker-proxy")
        .args(arguments)
        .arg("-use-listen-fd")
        .exec();
    if status.is_none() {
        // What it waits for may have been overwritten: it would not hear of its end.
        stderr::line(format_args!("error: {}: {error}", named()));
        std::process::exit(1);
    }
    Err(error).with_context(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Result<Asked, String> {
        let words: Vec<String> = text.split_whitespace().map(Into::into).collect();
        parse(&words)
    }

    #[test]
    fn dockerds_arguments_are_understood() {
        let text = "-proto udp -host-ip :: -host-port 5353 -container-ip 172.17.0.2 -container-port 53 -use-listen-fd";
        let expected = Arguments {
            protocol: "udp".into(),
            host: ("::".parse().expect("an address"), 5353),
            container: ("172.17.0.2".parse().expect("an address"), 53),
            use_listener: true,
        };
        assert_eq!(words(text), Ok(Asked::Proxy(expected)));
        let Ok(Asked::Proxy(asked)) = words("--host-port=80 -use-listen-fd=false") else {
            panic!("Go's other forms");
        };
        assert_eq!((asked.host.1, asked.use_listener), (80, false));
        assert_eq!(words("-v"), Ok(Asked::Version));
        assert_eq!(words("--version"), Ok(Asked::Version));
        assert_eq!(words("-h"), Ok(Asked::Help));
    }

    #[test]
    fn what_it_does_not_know_is_wrong_usage() {
        for text in [
            "-frontend 1",
            "-host-ip nonsense",
            "-host-port 70000",
            "-proto",
            "80",
            "-use-listen-fd=x",
        ] {
            assert!(words(text).is_err(), "{text}");
        }
    }
}
