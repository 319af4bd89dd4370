//! From which address and port of this host a connection to a backend comes. The kernel chooses, until few ports are left towards
//! that backend: its search then takes milliseconds for each connection, and it takes none that is in TIME_WAIT, where each
//! connection stays for a minute that its client has closed. From then on ports are chosen here, at random, also of further
//! addresses of this host.

use std::{
    collections::hash_map::RandomState,
    fs,
    hash::BuildHasher as _,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    os::fd::AsFd as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use nix::ifaddrs::getifaddrs;
use socket2::{Protocol, Socket, Type};

use super::control;
use crate::network::local::source_towards;

/// For so long it is not looked at again whether the kernel still finds ports easily.
const PAUSE: Duration = Duration::from_secs(1);
/// Ports of each address that are tried. Of ten that are in use, nine are found so in four of five cases.
const TRIES: usize = 16;
/// So many addresses of 127/8 beside the kernel's choice.
const LOOPBACK: u8 = 16;

/// For the connections of one publish.
#[derive(Debug, Default)]
pub(super) struct Sources {
    verdict: Mutex<Option<Verdict>>,
    random: RandomState,
    count: AtomicU64,
}

/// Who chooses.
#[derive(Clone, Debug)]
struct Verdict {
    until: Instant,
    backend: IpAddr,
    /// What there is to choose from here; nothing if the kernel chooses.
    choice: Option<Arc<Choice>>,
}

/// What there is to choose from.
#[derive(Debug)]
struct Choice {
    /// The kernel's choice is the first.
    sources: Vec<SocketAddr>,
    ports: RangeInclusive<u16>,
    reserved: Vec<RangeInclusive<u16>>,
}

impl Sources {
    /// Begins to connect a socket that `make` has made, without waiting.
    ///
    /// # Errors
    /// As connect(2) and `make`; for want of ports as [`is_used_up`].
    pub(super) fn connect(
        &self,
        backend: SocketAddr,
        make: impl Fn() -> io::Result<Socket>,
    ) -> io::Result<Socket> {
        let verdict = self.verdict().clone();
        let verdict = verdict.filter(|it| Instant::now() < it.until && it.backend == backend.ip());
        let chosen = verdict.as_ref().and_then(|it| it.choice.as_ref());
        if let Some(choice) = chosen
            && let Some(socket) = self.choose(choice, backend, &make)?
        {
            return Ok(socket);
        }
        let socket = make()?;
        let connected = connect(&socket, backend);
        let is_used_up = matches!(&connected, Err(error) if is_used_up(error));
        let are_few =
            is_used_up || connected.is_ok() && verdict.is_none() && was_long_sought(&socket);
        let choice = are_few.then(|| Arc::new(Choice::of(backend)));
        if verdict.is_none() || choice.is_some() {
            *self.verdict() = Some(Verdict {
                until: Instant::now() + PAUSE,
                backend: backend.ip(),
                choice: choice.clone(),
            });
        }
        match (connected, choice) {
            (Err(error), Some(choice)) if is_used_up && chosen.is_none() => {
                self.choose(&choice, backend, &make)?.ok_or(error)
            }
            (connected, _) => connected.map(|()| socket),
        }
    }

    fn verdict(&self) -> MutexGuard<'_, Option<Verdict>> {
        self.verdict.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects from an address and a port that are free towards the backend, if one is found.
    fn choose(
        &self,
        choice: &Choice,
        backend: SocketAddr,
        make: impl Fn() -> io::Result<Socket>,
    ) -> io::Result<Option<Socket>> {
        let (low, count) = (*choice.ports.start(), choice.ports.len() as u64);
        for mut source in choice.sources.iter().copied() {
            for _ in 0..TRIES {
                let number = self.count.fetch_add(1, Relaxed);
                let port = low + (self.random.hash_one(number) % count) as u16;
                if choice.reserved.iter().any(|ports| ports.contains(&port)) {
                    continue;
                }
                source.set_port(port);
                let may_be_bound = !is_taken_first(port, &choice.ports);
                match from(make()?, source, backend, may_be_bound) {
                    Ok(socket) => return Ok(Some(socket)),
                    Err(error) if is_used_up(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(None)
    }
}

/// Whether the kernel went through half of all ports for a TCP connection. The time that it takes says less: other threads may
/// have their turn, and packets be received, before it returns.
fn was_long_sought(socket: &Socket) -> bool {
    let is_tcp = socket.protocol().is_ok_and(|it| it == Some(Protocol::TCP));
    let own = || socket.local_addr().ok()?.as_socket();
    is_tcp && own().is_some_and(|own| !is_taken_first(own.port(), &ports()))
}

/// Whether it is of the half that the kernel tries first, and each of them before any other: the ports with the parity of the
/// range's first one (`__inet_hash_connect`, net/ipv4/inet_hashtables.c, since Linux 4.2).
const fn is_taken_first(port: u16, ports: &RangeInclusive<u16>) -> bool {
    port % 2 == *ports.start() % 2
}

/// Connects from an address and a port.
fn from(
    socket: Socket,
    source: SocketAddr,
    backend: SocketAddr,
    may_be_bound: bool,
) -> io::Result<Socket> {
    // A port that is bound is kept from all other connections of this host, wherever they lead. So the kernel is to choose among
    // this one alone. One in TIME_WAIT it finds taken: that has to be bound, but for those that others are given first.
    if socket.r#type()? == Type::STREAM && is_alone(&socket, source).is_ok() {
        match connect(&socket, backend) {
            Err(error) if is_used_up(&error) && may_be_bound => {}
            connected => return connected.map(|()| socket),
        }
    }
    if socket.protocol()? == Some(Protocol::TCP) {
        socket.set_reuse_address(true)?; // as the one in TIME_WAIT has it
    }
    let bound = socket.bind(&source.into());
    bound.map_err(|_| io::Error::from_raw_os_error(libc::EADDRNOTAVAIL))?;
    connect(&socket, backend).map(|()| socket)
}

/// Has the kernel choose this address and port, when it connects.
///
/// # Errors
/// Before Linux 6.3 it cannot be told.
fn is_alone(socket: &Socket, source: SocketAddr) -> io::Result<()> {
    let range = i32::from(source.port()) << 16 | i32::from(source.port());
    for (option, value) in [
        (LOCAL_PORT_RANGE, range),
        (libc::IP_BIND_ADDRESS_NO_PORT, 1),
    ] {
        control::set(socket.as_fd(), libc::IPPROTO_IP, option, value)?;
    }
    socket.bind(&SocketAddr::new(source.ip(), 0).into())
}

/// IP_LOCAL_PORT_RANGE: the last port above the first (include/uapi/linux/in.h).
const LOCAL_PORT_RANGE: libc::c_int = 51;

/// Whether a connection could not begin for want of a source port.
pub(super) fn is_used_up(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EADDRNOTAVAIL | libc::EAGAIN)
    )
}

fn connect(socket: &Socket, backend: SocketAddr) -> io::Result<()> {
    match socket.connect(&backend.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(()),
    }
}

impl Choice {
    fn of(backend: SocketAddr) -> Self {
        let first = source_towards(backend.ip()).unwrap_or(None);
        let others = first.map_or_else(Vec::new, others);
        let sources = first.into_iter().chain(others);
        Self {
            sources: sources.map(|address| SocketAddr::new(address, 0)).collect(),
            ports: ports(),
            reserved: ranges(&setting("ip_local_reserved_ports")),
        }
    }
}

fn setting(name: &str) -> String {
    fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default()
}

/// What the kernel chooses from.
fn ports() -> RangeInclusive<u16> {
    let range = setting("ip_local_port_range");
    let mut bounds = range.split_whitespace().map(str::parse);
    match (bounds.next(), bounds.next()) {
        (Some(Ok(low)), Some(Ok(high))) if low <= high => low..=high,
        _ => 32_768..=60_999, // as Linux has it
    }
}

/// Further addresses of this host that connections may come from instead.
fn others(first: IpAddr) -> Vec<IpAddr> {
    if first.is_loopback() {
        let number = |last| IpAddr::from(Ipv4Addr::new(127, 0, 0, last));
        let all = (1..=LOOPBACK + 1).map(number);
        return all.filter(|it| first.is_ipv4() && *it != first).collect();
    }
    let all = getifaddrs().into_iter().flatten();
    let all = all.filter_map(|it| {
        let address = it.address?;
        let v4 = address.as_sockaddr_in().map(|it| IpAddr::from(it.ip()));
        let v6 = || address.as_sockaddr_in6().map(|it| IpAddr::from(it.ip()));
        Some((it.interface_name, v4.or_else(v6)?))
    });
    let all: Vec<(String, IpAddr)> = all.collect();
    let Some((device, _)) = all.iter().find(|(_, address)| *address == first) else {
        return Vec::new();
    };
    let is_link_local = |address: &IpAddr| match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    let others = all.iter().filter(|(its, _)| its == device);
    let others = others.map(|(_, address)| *address);
    others
        .filter(|it| it.is_ipv4() == first.is_ipv4() && *it != first && !is_link_local(it))
        .collect()
}

/// Ports as the kernel lists them: `8080,9148-9150`.
fn ranges(list: &str) -> Vec<RangeInclusive<u16>> {
    let ranges = list.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse().ok()?..=last.parse().ok()?)
    });
    ranges.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_ports_are_read_as_the_kernel_lists_them() {
        assert_eq!(ranges("8080,9148-9150\n"), [8080..=8080, 9148..=9150]);
        assert!(ranges("\n").is_empty());
    }

    #[test]
    fn loopback_has_further_addresses_and_its_one_of_ipv6_has_none() {
        let others = |text: &str| others(text.parse().expect("a literal"));
        assert_eq!(others("127.0.0.1").len(), usize::from(LOOPBACK));
        assert!(!others("127.0.0.2").contains(&"127.0.0.2".parse().expect("a literal")));
        assert!(others("::1").is_empty());
    }
}
