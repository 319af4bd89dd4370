//! The proxy under lasting load: a million connections, many at once, publishes that come and go, readers that do not read,
//! clients that vanish. What it holds is read from /proc between them: whatever grows is a leak.

#![expect(unsafe_code, reason = "close_range(2)")]

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use forwarder_tests::{
    api,
    daemon::{Daemon, Datapath},
    deadline::wait_at_most,
    netns::Netns,
    topology::{Family, Topology},
};
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
    resource::{Resource, getrlimit, setrlimit},
};
use serde_json::json;
use socket2::{Domain, Socket, Type};

const CONNECTIONS: u64 = 1_000_000;
/// Those that come before anything is read: what is made once is there then.
const WARM_UP: u64 = 20_000;
const AT_ONCE: usize = 50_000;
/// Instances that have these among them: one for so many connections that the limit of open files lets two of its publishes
/// have, a third of all files each, and two for each connection.
fn instances(files: u64) -> usize {
    AT_ONCE.div_ceil(files.saturating_sub(1000) as usize / 3)
}
const PUBLISHES: u64 = 100_000;
/// Of so many publishes that come and go, one is asked for.
const ASKED: u64 = 100;
const PORTS: u16 = 10_000;
const SLOW: usize = 100;
const VANISHED: usize = 500;
/// Open files, which the daemon inherits, where there may be so many.
const FILES: u64 = 1_000_000;

const CLIENTS: usize = 16;
/// Of the host.
const ADDRESSES: u64 = 32;
const SERVERS: usize = 4;
const MESSAGE: usize = 16;
/// What a client begins its message with: the server answers, and closes first or not.
const CLOSE: u8 = b'c';
const STAY: u8 = b's';

/// Published, and the backend's.
const FRONTENDS: [(u16, u16); 2] = [(8080, 9000), (8081, 9001)];
/// Where the backend sends and sends.
const SOURCE: (u16, u16) = (8082, 9002);
/// Where nobody listens.
const CLOSED: (u16, u16) = (8083, 9003);
/// Until what has ended is let go: connections of a machine that is there no more take two minutes and a half.
const GONE: Duration = Duration::from_secs(400);
/// More than all buffers on the way take.
const LONG: usize = 32 << 20;

/// What is tried, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// A million connections.
    Connections,
    /// Many connections at once.
    AtOnce,
    /// Connections whose clients close first, which leaves the proxy's ends towards the backend in TIME_WAIT for a minute: many
    /// at once would lack ports then.
    ClosedByClients,
    /// Clients that do not read.
    SlowReaders,
    /// A backend that refuses.
    Refused,
    /// Publishes that come and go.
    Publishes,
    /// Many ports.
    Ports,
    /// Publishes that come and go by the fast path.
    FastPath,
    /// Clients whose machine is there no more; nobody can be asked after that.
    Vanished,
}

/// What the daemon holds.
#[derive(Clone, Copy)]
struct Held {
    /// Bytes.
    resident: u64,
    descriptors: usize,
    threads: usize,
}

impl Held {
    fn of(daemon: &Daemon) -> Result<Self> {
        Ok(Self {
            resident: crate::scale::resident_bytes(daemon.pid())?,
            descriptors: daemon.held("fd")?,
            threads: daemon.held("task")?,
        })
    }
}

impl Held {
    /// All of them together.
    fn of_all(daemons: &[Daemon]) -> Result<Self> {
        let nothing = Self {
            resident: 0,
            descriptors: 0,
            threads: 0,
        };
        daemons.iter().try_fold(nothing, |sum, daemon| {
            let held = Self::of(daemon)?;
            Ok(Self {
                resident: sum.resident + held.resident,
                descriptors: sum.descriptors + held.descriptors,
                threads: sum.threads + held.threads,
            })
        })
    }
}

/// The table, a line of which is printed as soon as it is known.
fn line(what: &str, rate: Option<f64>, held: Held) {
    let rate = rate.map_or("".into(), |rate| format!("{rate:.0}"));
    println!(
        "| {what} | {rate} | {:.1} | {} | {} |",
        held.resident as f64 / 1e6,
        held.descriptors,
        held.threads
    );
}

/// Runs all of it.
///
/// # Errors
/// A conversation fails.
pub(crate) fn run(parts: &[Part]) -> Result<()> {
    let parts = if parts.is_empty() {
        Part::value_variants()
    } else {
        parts
    };
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let raised = setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES);
    let files = if raised.is_ok() { FILES } else { hard };
    if raised.is_err() {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    let topology = Topology::new()?;
    let end = Arc::new(AtomicBool::new(false));
    let _servers = serve(&topology.backend.netns, &end);
    let host = topology.host_address(Family::V4);
    let further = (0..2 * ADDRESSES).step_by(2).map(|number| {
        let address = of_many(host, number);
        format!("addr add {address}/24 dev eth0\n")
    });
    topology.host.ip(&further.collect::<String>())?;
    let backend = topology.backend.address(Family::V4);
    let specs = [FRONTENDS[0], FRONTENDS[1], SOURCE, CLOSED];
    let specs = specs.map(|(port, to)| format!("{port}:{backend}:{to}"));
    let specs = specs.each_ref().map(String::as_str);
    let daemon = Daemon::start(&topology.host, &specs, Datapath::Userland)?;
    println!("| | a second | resident, MB | descriptors | threads |\n|---|--:|--:|--:|--:|");
    line("started", None, Held::of(&daemon)?);
    let client = &topology.client;
    let load = |ending: u8| -> Result<()> {
        let rate = connections(client, host, WARM_UP, ending)?;
        let what = format!("after {WARM_UP} connections that {}", who(ending));
        line(&what, Some(rate), Held::of(&daemon)?);
        Ok(())
    };
    load(CLOSE)?;
    for part in parts {
        match part {
            Part::Connections => {
                for tenth in 1..=10 {
                    let rate = connections(client, host, CONNECTIONS / 10, CLOSE)?;
                    let what = format!("after {} more", CONNECTIONS / 10 * tenth);
                    line(&what, Some(rate), Held::of(&daemon)?);
                }
            }
            Part::ClosedByClients => {
                for _ in 0..5 {
                    load(STAY)?;
                }
            }
            Part::AtOnce => crowd(&topology, host, instances(files))?,
            Part::SlowReaders => slow_readers(client, host, &daemon)?,
            Part::Refused => {
                closed(client, host, &daemon)?;
                load(CLOSE)?;
            }
            Part::Publishes => {
                publishes(client, host, backend, &daemon, "publishes, in user space")?;
            }
            Part::Ports => many_ports(client, host, backend, &daemon)?,
            Part::FastPath => {
                let daemon = Daemon::start(&topology.host, &[], Datapath::Ebpf)?;
                line("another, by the fast path", None, Held::of(&daemon)?);
                publishes(
                    client,
                    host,
                    backend,
                    &daemon,
                    "publishes, by the fast path",
                )?;
                daemon.stop()?;
            }
            Part::Vanished => vanished(&topology, host, &daemon)?,
        }
    }
    daemon.stop()?;
    end.store(true, Relaxed);
    Ok(())
}

/// An address of the host's: to one alone, a client has ports for no more than 28,232 connections a minute.
fn of_many(host: IpAddr, number: u64) -> IpAddr {
    let IpAddr::V4(host) = host else {
        return host;
    };
    let [a, b, c, _] = host.octets();
    Ipv4Addr::new(a, b, c, 100 + (number / 2 % ADDRESSES) as u8).into()
}

fn connect(frontend: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&frontend, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Says something and hears it.
fn ask(stream: &mut TcpStream, first: u8, number: u64) -> io::Result<()> {
    let mut message = [first; MESSAGE];
    message[8..].copy_from_slice(&number.to_be_bytes());
    stream.write_all(&message)?;
    let mut answer = [0; MESSAGE];
    stream.read_exact(&mut answer)?;
    if answer != message {
        return Err(io::Error::other("another one's answer"));
    }
    Ok(())
}

/// Who closes first.
fn who(ending: u8) -> &'static str {
    match ending {
        CLOSE => "the server closes",
        _ => "the client closes",
    }
}

/// So many connections, a few at a time, each with a message there and back before one side closes; how many a second.
fn connections(netns: &Netns, host: IpAddr, count: u64, ending: u8) -> Result<f64> {
    let done = AtomicU64::new(0);
    let begun = Instant::now();
    let one = &|number: u64| -> io::Result<()> {
        let (port, _) = FRONTENDS[number as usize % FRONTENDS.len()];
        let mut stream = connect((of_many(host, number), port).into())?;
        ask(&mut stream, ending, number)?;
        if ending == STAY {
            stream.shutdown(Shutdown::Write)?;
        }
        match stream.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(io::Error::other("more than was said")),
        }
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let done = &done;
                let client = move || {
                    loop {
                        let number = done.fetch_add(1, Relaxed);
                        if number >= count {
                            return Ok(());
                        }
                        one(number).with_context(|| format!("connection {number}"))?;
                    }
                };
                scope.spawn(move || netns.enter(client))
            })
            .collect();
        let mut all = clients.into_iter().map(|it| it.join().unwrap_or(Ok(())));
        all.try_for_each(|result: Result<()>| result)
    })?;
    Ok(count as f64 / begun.elapsed().as_secs_f64())
}

/// Many at once, each asked twice, by instances of their own.
fn crowd(topology: &Topology, host: IpAddr, instances: usize) -> Result<()> {
    const FIRST: u16 = 20_000;
    let backend = topology.backend.address(Family::V4);
    let frontends = instances * FRONTENDS.len();
    let daemons = (0..instances).map(|instance| {
        let first = FIRST + (instance * FRONTENDS.len()) as u16;
        let specs = FRONTENDS.map(|(_, to)| (first + (to - FRONTENDS[0].1), to));
        let specs = specs.map(|(port, to)| format!("{port}:{backend}:{to}"));
        let specs = specs.each_ref().map(String::as_str);
        Daemon::start(&topology.host, &specs, Datapath::Userland)
    });
    let daemons = daemons.collect::<Result<Vec<Daemon>>>()?;
    let before = Held::of_all(&daemons)?;
    line(&format!("{instances} other instances"), None, before);
    let step = Barrier::new(CLIENTS + 1);
    let client = |client: usize| -> Result<()> {
        own_descriptors()?;
        let numbers = (client..AT_ONCE).step_by(CLIENTS);
        let mut all = numbers.map(|number| {
            let port = FIRST + (number / CLIENTS % frontends) as u16;
            let mut stream = connect((host, port).into())
                .with_context(|| format!("connection {number} at once"))?;
            ask(&mut stream, STAY, number as u64)?;
            Ok(stream)
        });
        let opened = all.by_ref().collect::<Result<Vec<TcpStream>>>();
        for _ in 0..2 {
            step.wait();
        }
        let asked = opened.and_then(|mut opened| {
            let mut all = opened.iter_mut();
            all.try_for_each(|stream| ask(stream, STAY, client as u64))?;
            Ok(opened)
        });
        for _ in 0..2 {
            step.wait();
        }
        asked.map(drop)
    };
    let measured = |what: &str| {
        let begun = Instant::now();
        step.wait();
        let rate = AT_ONCE as f64 / begun.elapsed().as_secs_f64();
        line(what, Some(rate), Held::of_all(&daemons)?);
        step.wait();
        Ok(())
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let client = &client;
                scope.spawn(move || topology.client.enter(|| client(number)))
            })
            .collect();
        let opened = measured(&format!("{AT_ONCE} connections at once"));
        let asked = measured("the same, each asked again");
        let mut all = clients.into_iter().map(|it| it.join().unwrap_or(Ok(())));
        all.try_for_each(|result| result).and(opened).and(asked)
    })?;
    wait_at_most(GONE, "descriptors as before", || {
        let now = Held::of_all(&daemons).ok()?;
        (now.descriptors <= before.descriptors + frontends).then_some(())
    })?;
    line("after these", None, Held::of_all(&daemons)?);
    daemons.into_iter().try_for_each(Daemon::stop)
}

/// Gives this thread a table of descriptors of its own, without what others have open: the limit is that of a table.
fn own_descriptors() -> io::Result<()> {
    // SAFETY: it closes copies that nobody in this thread uses.
    match unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_UNSHARE as i32) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits until descriptors are as before.
fn gone(daemon: &Daemon, before: Held) -> Result<Duration> {
    let begun = Instant::now();
    let waited = wait_at_most(GONE, "descriptors as before", || {
        (Held::of(daemon).ok()?.descriptors <= before.descriptors).then_some(())
    });
    waited.with_context(|| daemon.said())?;
    Ok(begun.elapsed())
}

/// Clients that are sent much and read nothing.
fn slow_readers(netns: &Netns, host: IpAddr, daemon: &Daemon) -> Result<()> {
    let before = Held::of(daemon)?;
    let all = netns.enter(|| {
        let all = (0..SLOW).map(|_| connect((host, SOURCE.0).into()));
        all.collect::<io::Result<Vec<_>>>()
    })?;
    // Until nothing moves any more.
    let mut packets = 0;
    wait_at_most(Duration::from_secs(60), "all buffers are full", || {
        thread::sleep(Duration::from_secs(1));
        let now = daemon.list().ok()?.iter().map(|row| row.bytes).sum();
        (std::mem::replace(&mut packets, now) == now).then_some(())
    })?;
    let rate = connections(netns, host, WARM_UP, CLOSE)?;
    let what = format!("{SLOW} clients that do not read; others' connections");
    line(&what, Some(rate), Held::of(daemon)?);
    drop(all);
    gone(daemon, before)?;
    line("after these", None, Held::of(daemon)?);
    Ok(())
}

/// A backend that refuses.
fn closed(netns: &Netns, host: IpAddr, daemon: &Daemon) -> Result<()> {
    let begun = Instant::now();
    netns.enter(|| {
        for _ in 0..WARM_UP {
            // The reset may be there before anything can be asked.
            if let Ok(mut stream) = connect((host, CLOSED.0).into()) {
                let ended = stream.read(&mut [0]);
                ensure!(!matches!(ended, Ok(1)), "somebody answered: {ended:?}");
            }
        }
        Ok(())
    })?;
    let rate = WARM_UP as f64 / begun.elapsed().as_secs_f64();
    line(
        &format!("{WARM_UP} refused by the backend"),
        Some(rate),
        Held::of(daemon)?,
    );
    Ok(())
}

fn publish(daemon: &Daemon, specs: &[String]) -> Result<()> {
    let answer = api::ask(daemon, "POST", "/v1/publishes", &json!(specs).to_string())?;
    ensure!(answer.status < 300, "publish: {answer:?}");
    Ok(())
}

fn unpublish(daemon: &Daemon, specs: &[String]) -> Result<()> {
    let body = json!({ "publishes": specs }).to_string();
    let answer = api::ask(daemon, "POST", "/v1/unpublish", &body)?;
    ensure!(answer.status < 300, "unpublish: {answer:?}");
    Ok(())
}

/// Publishes one port and takes it back, again and again.
fn publishes(
    netns: &Netns,
    host: IpAddr,
    backend: IpAddr,
    daemon: &Daemon,
    what: &str,
) -> Result<()> {
    const PORT: u16 = 7000;
    let spec = format!("{PORT}:{backend}:{}", FRONTENDS[0].1);
    let specs = [spec];
    let begun = Instant::now();
    for number in 1..=PUBLISHES {
        publish(daemon, &specs)?;
        if number % ASKED == 0 {
            netns.enter(|| ask(&mut connect((host, PORT).into())?, STAY, number))?;
        }
        unpublish(daemon, &specs)?;
        if number % (PUBLISHES / 4) == 0 || number == PUBLISHES / 100 {
            let rate = number as f64 / begun.elapsed().as_secs_f64();
            line(&format!("{number} {what}"), Some(rate), Held::of(daemon)?);
        }
    }
    Ok(())
}

/// Many ports, a few of which are asked for, and none again.
fn many_ports(netns: &Netns, host: IpAddr, backend: IpAddr, daemon: &Daemon) -> Result<()> {
    const FIRST: u16 = 10_000;
    let spec = |port| format!("{host}:{port}:{backend}:{}", FRONTENDS[0].1); // one socket each
    let specs: Vec<String> = (FIRST..FIRST + PORTS).map(spec).collect();
    for round in 1..=3 {
        let begun = Instant::now();
        publish(daemon, &specs)?;
        let rate = f64::from(PORTS) / begun.elapsed().as_secs_f64();
        netns.enter(|| {
            for port in (FIRST..FIRST + PORTS).step_by(10) {
                ask(&mut connect((host, port).into())?, STAY, 0)?;
            }
            io::Result::Ok(())
        })?;
        line(
            &format!("{PORTS} ports, time {round}"),
            Some(rate),
            Held::of(daemon)?,
        );
        unpublish(daemon, &specs)?;
        line("without these", None, Held::of(daemon)?);
    }
    Ok(())
}

/// Clients whose machine is there no more: nothing closes their connections.
fn vanished(topology: &Topology, host: IpAddr, daemon: &Daemon) -> Result<()> {
    let before = Held::of(daemon)?;
    let client = &topology.client;
    let all = client.enter(|| {
        let all = (0..VANISHED as u64).map(|number| {
            let mut stream = connect((host, FRONTENDS[0].0).into())?;
            ask(&mut stream, STAY, number)?;
            Ok(stream)
        });
        all.collect::<io::Result<Vec<_>>>()
    })?;
    line(&format!("{VANISHED} clients"), None, Held::of(daemon)?);
    client.ip("link set eth0 down")?;
    let took = gone(daemon, before)?;
    let what = format!("{:.0} s after they vanished", took.as_secs_f64());
    line(&what, None, Held::of(daemon)?);
    drop(all);
    Ok(())
}

/// Answers, until it is told to end.
fn serve(netns: &Netns, end: &Arc<AtomicBool>) -> Vec<thread::JoinHandle<()>> {
    let ready = Arc::new(Barrier::new(SERVERS + 2));
    let mut threads = Vec::new();
    for _ in 0..SERVERS {
        let (end, ready) = (end.clone(), ready.clone());
        threads.push(netns.spawn(move || {
            if let Err(error) = answer(&end, &ready) {
                eprintln!("a server ends: {error:#}");
            }
        }));
    }
    let barrier = ready.clone();
    threads.push(netns.spawn(move || {
        if let Err(error) = send(&barrier) {
            eprintln!("a server ends: {error:#}");
        }
    }));
    ready.wait();
    threads
}

fn listen(port: u16) -> io::Result<Socket> {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    listener.set_reuse_port(true)?;
    listener.set_reuse_address(true)?;
    listener.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
    listener.listen(4096)?;
    Ok(listener)
}

fn answer(end: &AtomicBool, ready: &Barrier) -> Result<()> {
    own_descriptors()?;
    const LISTENERS: u64 = FRONTENDS.len() as u64;
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    let listeners = FRONTENDS.map(|(_, port)| listen(port));
    let listeners = listeners.into_iter().collect::<io::Result<Vec<_>>>()?;
    for (number, listener) in listeners.iter().enumerate() {
        listener.set_nonblocking(true)?;
        epoll.add(
            listener,
            EpollEvent::new(EpollFlags::EPOLLIN, number as u64),
        )?;
    }
    ready.wait();
    let mut streams: Vec<Option<TcpStream>> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    let mut events = [EpollEvent::empty(); 256];
    while !end.load(Relaxed) {
        let count = epoll.wait(&mut events, 100_u16).unwrap_or(0);
        for event in &events[..count] {
            if event.data() < LISTENERS {
                while let Ok((stream, _)) = listeners[event.data() as usize].accept() {
                    let place = free.pop().unwrap_or_else(|| {
                        streams.push(None);
                        streams.len() - 1
                    });
                    stream.set_tcp_nodelay(true)?;
                    let number = place as u64 + LISTENERS;
                    epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
                    streams[place] = Some(stream.into());
                }
                continue;
            }
            let place = (event.data() - LISTENERS) as usize;
            let Some(stream) = &mut streams[place] else {
                continue;
            };
            let mut message = [0; MESSAGE];
            let goes_on = stream.read_exact(&mut message).is_ok()
                && stream.write_all(&message).is_ok()
                && message[0] == STAY;
            if !goes_on {
                streams[place] = None;
                free.push(place);
            }
        }
    }
    Ok(())
}

/// Sends each client more than it reads.
fn send(ready: &Barrier) -> Result<()> {
    let listener = listen(SOURCE.1)?;
    ready.wait();
    loop {
        let (mut stream, _) = listener.accept()?;
        let sends = move || {
            let block = vec![0; 64 << 10];
            for _ in 0..LONG / block.len() {
                if io::Write::write_all(&mut stream, &block).is_err() {
                    break;
                }
            }
        };
        thread::Builder::new().stack_size(256 << 10).spawn(sends)?;
    }
}
