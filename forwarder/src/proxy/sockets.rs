//! The sockets that hold a publish's host ports: others get EADDRINUSE, `ss` shows them, and what
//! the fast path does not take arrives here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use forwarder_common::publish::own_priority;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use super::{
    control, sctp,
    store::{Bound, Sockets},
    tcp,
};
use crate::{
    holder::{self, Taken},
    network::local::is_ours,
    publish::spec::{At, Ports, Protocol, Spec, Zone},
};

/// Listening sockets of one publish, or bound ones for UDP.
#[derive(Debug, Default)]
pub struct Held {
    pub(super) tcp: Vec<(Port, std::net::TcpListener)>,
    pub(super) udp: Vec<(Port, std::net::UdpSocket)>,
    pub(super) sctp: Vec<(Port, Socket)>,
}

/// Which port clients of a socket meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Port {
    One(u16),
    /// Any of a range, whose traffic is steered here; each connection and each datagram says which. Sockets that
    /// answer from another port of it are bound with this mark.
    Steered {
        mark: u32,
    },
}

/// A range of more ports is held by one socket, where the kernel can steer.
const WIDE: u32 = 256;

/// Whether a range is so wide that a socket for each port would be a waste.
pub fn is_wide(spec: &Spec) -> bool {
    spec.ports.count() > WIDE && spec.protocol != Protocol::Sctp
}

/// What the sockets are bound to that hold a publish: one for each port, or, of a range that is `steered`, for all of them.
pub fn bound(spec: &Spec, steered: bool) -> impl Iterator<Item = Bound> + use<> {
    let kind = match spec.protocol {
        Protocol::Udp => Type::DGRAM,
        Protocol::Tcp | Protocol::Sctp => Type::STREAM,
    };
    let Ports { first, last } = spec.ports;
    let last = if steered { first } else { last };
    let zone = spec.zone.clone();
    let each = spec.frontends().into_iter();
    let each = each.flat_map(move |address| (first..=last).map(move |port| (address, port)));
    each.filter_map(move |(address, port)| {
        let bound = scoped(address, zone.as_ref(), port).ok()?;
        Some((bound, kind.into()))
    })
}

/// A port that could not be had, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct BindError {
    message: String,
    /// Somebody has it.
    pub taken: Option<Box<Taken>>,
}

impl BindError {
    fn new(address: IpAddr, port: u16, spec: &Spec, problem: &str) -> Self {
        let frontend = At(address, spec.zone.as_ref(), port);
        Self {
            message: format!("publish {frontend}/{}: {problem}", spec.protocol),
            taken: None,
        }
    }
}

impl From<Taken> for BindError {
    fn from(taken: Taken) -> Self {
        Self {
            message: taken.problem(taken.holder().as_deref()),
            taken: Some(Box::new(taken)),
        }
    }
}

/// Clients that wait to be accepted, where the kernel allows so many (net.core.somaxconn).
const BACKLOG: i32 = 4096;
/// How long copies of a descriptor may outlive it in what is just being started.
const COPIES: Duration = Duration::from_secs(1);
/// Descriptors that are kept for everything else.
const SPARE: u64 = 256;

/// # Errors
/// There is no such device; or the socket was bound to another, and CAP_NET_RAW is missing.
pub(super) fn bind_to(socket: &impl AsFd, device: &str) -> io::Result<()> {
    SockRef::from(socket).bind_device(Some(device.as_bytes()))
}

impl Held {
    /// Binds every frontend address and port, or none; but takes the sockets of `given` that are bound to what is wanted already.
    ///
    /// # Errors
    /// The first port that could not be had.
    pub fn bind(spec: &Spec, given: &mut [&mut Sockets]) -> Result<Self, BindError> {
        let frontends = spec.frontends();
        let wanted = u64::from(spec.ports.count()) * frontends.len() as u64;
        // Counting what is open takes long for somebody who has much open; one port says so by itself.
        if spec.ports.count() > 1
            && let Err(limit) = descriptors(wanted)
        {
            let problem = format!(
                "{wanted} ports need {} open files, and the limit is {limit}; raise it by `ulimit -n` \
                 or publish a narrower range",
                wanted + SPARE
            );
            let (address, port) = (frontends[0], spec.ports.first);
            return Err(BindError::new(address, port, spec, &problem));
        }
        let mut held = Self::default();
        for address in frontends {
            for port in spec.ports.first..=spec.ports.last {
                let bound = scoped(address, spec.zone.as_ref(), port).and_then(|bind| {
                    match take(given, bind, spec.protocol) {
                        Some(socket) => held.add_given(socket, Port::One(port), spec.protocol),
                        None => held.add(bind, spec.protocol, None),
                    }
                });
                match bound {
                    Ok(()) => {}
                    Err(error) if spec.address.is_none() && is_without_ipv6(address, &error) => {}
                    Err(error) => {
                        return Err(explain(&error, address, port, spec));
                    }
                }
            }
        }
        Ok(held)
    }

    /// Binds one socket for each family to the first port of a range, or takes those of `given`; those of the others are found
    /// taken if somebody has them now. `mark` keeps our own ports from being refused to us.
    ///
    /// # Errors
    /// The first port that could not be had.
    pub fn bind_steered(
        spec: &Spec,
        mark: u32,
        given: &mut [&mut Sockets],
    ) -> Result<Self, BindError> {
        let taken = ports_in_use(spec);
        let mut held = Self::default();
        for address in spec.frontends() {
            let without =
                |error: &io::Error| spec.address.is_none() && is_without_ipv6(address, error);
            let fail = |port, error: &io::Error| explain(error, address, port, spec);
            let bind = |port| scoped(address, spec.zone.as_ref(), port);
            let first = bind(spec.ports.first);
            let held_first = first.and_then(|first| match take(given, first, spec.protocol) {
                Some(socket) => held.add_given(socket, Port::Steered { mark }, spec.protocol),
                None => held.add(first, spec.protocol, Some(mark)),
            });
            match held_first {
                Err(error) if without(&error) => continue,
                result => result.map_err(|error| fail(spec.ports.first, &error))?,
            }
            for &port in taken.iter().filter(|port| **port != spec.ports.first) {
                // The kernel itself says whether this address conflicts.
                let tried = bind(port)
                    .and_then(|bind| Self::default().add(bind, spec.protocol, Some(mark)));
                tried.map_err(|error| fail(port, &error))?;
            }
        }
        Ok(held)
    }

    /// Serves only what comes by a device.
    ///
    /// # Errors
    /// There is no such device.
    pub fn only_on(&self, device: &str) -> io::Result<()> {
        let mut all = self.sockets();
        all.try_for_each(|socket| bind_to(&socket, device))
    }

    /// All of them.
    pub(super) fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let tcp = self.tcp.iter().map(|(_, socket)| socket.as_fd());
        let udp = self.udp.iter().map(|(_, socket)| socket.as_fd());
        let sctp = self.sctp.iter().map(|(_, socket)| socket.as_fd());
        tcp.chain(udp).chain(sctp)
    }

    /// The sockets alone, for another process to serve.
    pub fn into_sockets(self) -> Vec<OwnedFd> {
        let tcp = self.tcp.into_iter().map(|(_, socket)| socket.into());
        let udp = self.udp.into_iter().map(|(_, socket)| socket.into());
        let sctp = self.sctp.into_iter().map(|(_, socket)| socket.into());
        tcp.chain(udp).chain(sctp).collect()
    }

    /// Hands each socket to `each`, with whether it is for IPv4.
    ///
    /// # Errors
    /// The first of `each`.
    pub fn try_for_each<E>(
        &self,
        mut each: impl FnMut(bool, BorrowedFd<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        for socket in self.sockets() {
            let v4 = SockRef::from(&socket)
                .domain()
                .is_ok_and(|domain| domain == Domain::IPV4);
            each(v4, socket)?;
        }
        Ok(())
    }

    /// Takes a socket that somebody else has bound, and has it as our own ones are.
    fn add_given(&mut self, socket: Socket, held: Port, protocol: Protocol) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        match protocol {
            Protocol::Tcp => {
                tcp::prepare(SockRef::from(&socket))?;
                socket.listen(BACKLOG)?;
                self.tcp.push((held, socket.into()));
            }
            Protocol::Udp => {
                tell_address(&socket)?;
                if let Port::Steered { .. } = held {
                    let is_v4 = socket.domain()? == Domain::IPV4;
                    control::tell_destination(socket.as_fd(), is_v4)?;
                }
                self.udp.push((held, socket.into()));
            }
            Protocol::Sctp => {
                socket.listen(BACKLOG)?;
                self.sctp.push((held, socket));
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        bind: SocketAddr,
        protocol: Protocol,
        steered: Option<u32>,
    ) -> io::Result<()> {
        let (address, port) = (bind.ip(), bind.port());
        let held = steered.map_or(Port::One(port), |mark| Port::Steered { mark });
        match protocol {
            Protocol::Tcp => {
                let socket = socket(address, Type::STREAM, None)?;
                socket.set_reuse_address(true)?; // restart while old connections are in TIME_WAIT
                tcp::prepare(SockRef::from(&socket))?;
                bind_as(&socket, bind, steered)?;
                socket.listen(BACKLOG)?;
                self.tcp.push((held, socket.into()));
            }
            Protocol::Udp => {
                let socket = socket(address, Type::DGRAM, None)?;
                tell_address(&socket)?;
                if steered.is_some() {
                    control::tell_destination(socket.as_fd(), address.is_ipv4())?;
                }
                control::tell_more(socket.as_fd(), address.is_ipv4());
                let _ = socket.set_recv_buffer_size(4 << 20);
                bind_datagrams(&socket, bind, steered)?;
                if address.is_ipv6() && address.is_unspecified() {
                    // Or it could not answer from an address of a local prefix.
                    socket.set_freebind_v6(true)?;
                }
                self.udp.push((held, socket.into()));
            }
            Protocol::Sctp => {
                let socket = socket(address, Type::STREAM, Some(sctp::protocol()))?;
                bind_as(&socket, bind, None)?;
                socket.listen(BACKLOG)?;
                self.sctp.push((held, socket));
            }
        }
        Ok(())
    }
}

/// Has each datagram say which address it was sent to: the reply must come from there.
fn tell_address(socket: &Socket) -> io::Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    if socket.domain()? == Domain::IPV4 {
        setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?;
    } else {
        setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    }
    Ok(())
}

/// Takes the socket that is bound to an address out of those that were given.
fn take(given: &mut [&mut Sockets], wanted: SocketAddr, protocol: Protocol) -> Option<Socket> {
    let kind = match protocol {
        Protocol::Tcp | Protocol::Sctp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    let found = given.iter_mut().find_map(|it| it.take(wanted, kind));
    found.map(Into::into)
}

/// A socket's address, with the scope of a link-local one.
///
/// # Errors
/// There is no such device.
pub(super) fn scoped(address: IpAddr, zone: Option<&Zone>, port: u16) -> io::Result<SocketAddr> {
    let (IpAddr::V6(v6), Some(zone)) = (address, zone) else {
        return Ok(SocketAddr::new(address, port));
    };
    let scope = scope(zone)?;
    Ok(SocketAddrV6::new(v6, port, 0, scope).into())
}

/// # Errors
/// There is no such device.
pub(super) fn scope(zone: &Zone) -> io::Result<u32> {
    match zone.as_str().parse() {
        Ok(index) => Ok(index),
        Err(_) => Ok(nix::net::if_::if_nametoindex(zone.as_str())?),
    }
}

/// A socket of an address's family alone, that does not block.
pub(super) fn socket(
    address: IpAddr,
    kind: Type,
    protocol: Option<socket2::Protocol>,
) -> io::Result<Socket> {
    let domain = Domain::for_address(SocketAddr::new(address, 0));
    let socket = Socket::new(domain, kind.nonblocking().cloexec(), protocol)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// Binds, with a mark that is gone afterwards: routing would heed it. IPv6 takes no address of a local prefix, nor one that is
/// tentative, as at boot, unless it is asked to.
fn bind_as(socket: &Socket, address: SocketAddr, mark: Option<u32>) -> io::Result<()> {
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    match (socket.bind(&SockAddr::from(address)), address.ip()) {
        (Err(error), IpAddr::V6(v6))
            if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) && is_ours(v6) =>
        {
            socket.set_freebind_v6(true)?;
            socket.bind(&SockAddr::from(address))?;
        }
        (bound, _) => bound?,
    }
    if mark.is_some() {
        socket.set_mark(0)?;
    }
    Ok(())
}

/// A socket that answers from one port of a range whose datagrams are steered to another socket.
///
/// # Errors
/// Somebody had the port before the range was published.
pub(super) fn answering(address: SocketAddr, mark: u32) -> io::Result<std::net::UdpSocket> {
    let socket = socket(address.ip(), Type::DGRAM, None)?;
    // Above 6, this takes CAP_NET_ADMIN.
    let priority = own_priority(mark).cast_signed();
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Priority, &priority)?;
    bind_datagrams(&socket, address, Some(mark))?;
    Ok(socket.into())
}

/// Ports that flows of this process go on with after they were given up, with how many do.
static GIVEN_UP: Mutex<BTreeMap<u16, usize>> = Mutex::new(BTreeMap::new());

fn given_up() -> MutexGuard<'static, BTreeMap<u16, usize>> {
    GIVEN_UP.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One flow that goes on, until this is dropped.
#[derive(Debug)]
pub(super) struct GivenUp(u16);

impl Drop for GivenUp {
    fn drop(&mut self) {
        let mut ports = given_up();
        match ports.get_mut(&self.0) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(ports.remove(&self.0)),
        }
    }
}

/// A socket on a port that is given up, for one client alone.
///
/// # Errors
/// Somebody has the port who does not share it.
pub(super) fn draining(
    address: SocketAddr,
    client: SocketAddr,
    mark: Option<u32>,
) -> io::Result<(std::net::UdpSocket, GivenUp)> {
    let socket = socket(address.ip(), Type::DGRAM, None)?;
    socket.set_reuse_address(true)?;
    bind_as(&socket, address, mark)?;
    socket.connect(&client.into())?;
    control::tell_more(socket.as_fd(), address.is_ipv4());
    *given_up().entry(address.port()).or_default() += 1;
    Ok((socket.into(), GivenUp(address.port())))
}

/// Binds a socket that holds a UDP port, or answers from it, beside flows of our own that go on with it: those are connected, and get their
/// clients' datagrams alone. Others cannot have the port either way, unless they shared it with such a flow before.
fn bind_datagrams(socket: &Socket, address: SocketAddr, mark: Option<u32>) -> io::Result<()> {
    match bind_as(socket, address, mark) {
        Err(error)
            if error.raw_os_error() == Some(libc::EADDRINUSE)
                && given_up().contains_key(&address.port()) => {}
        result => return result,
    }
    socket.set_reuse_address(true)?;
    bind_as(socket, address, mark)?;
    socket.set_reuse_address(false)
}

/// Waits until what was closed can be bound again, for as long as it may take: other services that systemd before 255 has just
/// forked for have copies of all its descriptors until they have closed them.
pub fn await_free(closed: &[Bound]) {
    let deadline = Instant::now() + COPIES;
    let is_taken = |&(bound, kind): &Bound| {
        let kind = Type::from(kind);
        let tried = socket(bound.ip(), kind, None).and_then(|socket| {
            socket.set_reuse_address(kind == Type::STREAM)?;
            bind_as(&socket, bound, None)
        });
        tried.is_err_and(|error| error.raw_os_error() == Some(libc::EADDRINUSE))
    };
    while closed.iter().any(is_taken) && Instant::now() < deadline {
        thread::sleep(COPIES / 100);
    }
}

/// Ports of a range that some socket of this network namespace has.
fn ports_in_use(spec: &Spec) -> BTreeSet<u16> {
    let mut ports = holder::ports_in_use(spec.protocol);
    ports.retain(|port| (spec.ports.first..=spec.ports.last).contains(port));
    ports
}

fn is_without_ipv6(address: IpAddr, error: &io::Error) -> bool {
    let absent = [libc::EAFNOSUPPORT, libc::EADDRNOTAVAIL];
    address.is_ipv6()
        && error
            .raw_os_error()
            .is_some_and(|code| absent.contains(&code))
}

/// Raises the soft limit of open files to the hard one: each port and each connection takes some.
pub fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Whether so many descriptors can still be opened.
///
/// # Errors
/// The limit, if it is too low.
fn descriptors(wanted: u64) -> Result<(), u64> {
    let open = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as u64;
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((limit, _)) if open + wanted + SPARE > limit => Err(limit),
        _ => Ok(()),
    }
}

fn explain(error: &io::Error, address: IpAddr, port: u16, spec: &Spec) -> BindError {
    let problem = match error.raw_os_error() {
        Some(libc::EADDRINUSE) => {
            return BindError::from(Taken {
                address,
                zone: spec.zone.clone(),
                port,
                protocol: spec.protocol,
            });
        }
        Some(libc::EACCES) => {
            "permission denied: ports below 1024 need root or CAP_NET_BIND_SERVICE".into()
        }
        Some(libc::EADDRNOTAVAIL) => {
            format!("{address} is not an address of this host; `ip address` shows those")
        }
        Some(libc::EMFILE | libc::ENFILE) => {
            "too many open files; raise the limit by `ulimit -n` or publish a narrower range".into()
        }
        Some(libc::ENODEV) => match &spec.zone {
            Some(zone) => format!("there is no device {}", zone.as_str()),
            None => error.to_string(),
        },
        Some(libc::EPROTONOSUPPORT | libc::ESOCKTNOSUPPORT) => {
            "this kernel has no SCTP (CONFIG_IP_SCTP); `modprobe sctp` may load it".into()
        }
        _ => error.to_string(),
    };
    BindError::new(address, port, spec, &problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_a_link_local_address_names_the_device() {
        let spec: Spec = "[fe80::1%lo]:8080:192.0.2.1:80".parse().expect("a spec");
        for number in [libc::EADDRINUSE, libc::EACCES, libc::ENODEV] {
            let error = io::Error::from_raw_os_error(number);
            let address = spec.address.expect("an address");
            let said = explain(&error, address, 8080, &spec).to_string();
            assert!(
                said.starts_with("publish [fe80::1%lo]:8080/tcp: "),
                "{said}"
            );
        }
    }

    #[test]
    fn a_port_held_by_another_names_the_holder() {
        let other = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = other.local_addr().expect("bound").port();
        let spec: Spec = format!("127.0.0.1:{port}:192.0.2.1:80")
            .parse()
            .expect("a spec");
        let error = Held::bind(&spec, &mut [])
            .expect_err("the port is taken")
            .to_string();
        let start = format!("publish 127.0.0.1:{port}/tcp: address already in use (held by pid ");
        assert!(error.starts_with(&start), "{error}");
        assert!(error.contains(&std::process::id().to_string()), "{error}");
    }

    #[test]
    fn an_address_of_another_host_is_refused() {
        let spec: Spec = "203.0.113.77:8080:192.0.2.1:80/udp"
            .parse()
            .expect("a spec");
        let error = Held::bind(&spec, &mut [])
            .expect_err("not our address")
            .to_string();
        assert!(
            error.contains("203.0.113.77 is not an address of this host"),
            "{error}"
        );
    }

    #[test]
    fn a_range_past_the_limit_is_refused_before_anything_is_bound() {
        assert!(descriptors(1 << 40).is_err());
        assert!(descriptors(1).is_ok());
    }
}
