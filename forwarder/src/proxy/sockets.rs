//! The sockets that hold a publish's host ports: others get EADDRINUSE, `ss` shows them, and what
//! the fast path does not take arrives here.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use super::tcp;
use crate::spec::{Protocol, Spec};

/// Listening sockets of one publish, or bound ones for UDP, with the port of each.
#[derive(Debug, Default)]
pub struct Held {
    pub(super) tcp: Vec<(u16, std::net::TcpListener)>,
    pub(super) udp: Vec<(u16, std::net::UdpSocket)>,
}

/// A port that could not be had, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("publish {frontend}/{protocol}: {problem}")]
pub struct BindError {
    frontend: SocketAddr,
    protocol: Protocol,
    problem: String,
}

/// Descriptors that are kept for everything else.
const SPARE: u64 = 256;

impl Held {
    /// Binds every frontend address and port, or none.
    ///
    /// # Errors
    /// The first port that could not be had.
    pub fn bind(spec: &Spec) -> Result<Self, BindError> {
        let fail = |address: IpAddr, port: u16, problem: String| BindError {
            frontend: SocketAddr::new(address, port),
            protocol: spec.protocol,
            problem,
        };
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
            return Err(fail(frontends[0], spec.ports.first, problem));
        }
        let mut held = Self::default();
        for address in frontends {
            for port in spec.ports.first..=spec.ports.last {
                match held.add(address, port, spec.protocol) {
                    Ok(()) => {}
                    Err(error) if spec.address.is_none() && is_without_ipv6(address, &error) => {}
                    Err(error) => {
                        return Err(fail(address, port, explain(&error, address, port, spec)));
                    }
                }
            }
        }
        Ok(held)
    }

    fn add(&mut self, address: IpAddr, port: u16, protocol: Protocol) -> io::Result<()> {
        let domain = if address.is_ipv4() {
            Domain::IPV4
        } else {
            Domain::IPV6
        };
        let kind = match protocol {
            Protocol::Tcp => Type::STREAM,
            Protocol::Udp => Type::DGRAM,
            Protocol::Sctp => return Err(io::ErrorKind::Unsupported.into()),
        };
        let socket = Socket::new(domain, kind.nonblocking().cloexec(), None)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        let bind = SockAddr::from(SocketAddr::new(address, port));
        if protocol == Protocol::Tcp {
            socket.set_reuse_address(true)?; // restart while old connections are in TIME_WAIT
            tcp::tune(SockRef::from(&socket))?;
            socket.bind(&bind)?;
            socket.listen(4096)?;
            self.tcp.push((port, socket.into()));
        } else {
            // The address that a datagram was sent to is the one that the reply must come from.
            let fd = &socket;
            if address.is_ipv4() {
                nix::sys::socket::setsockopt(fd, nix::sys::socket::sockopt::Ipv4PacketInfo, &true)?;
            } else {
                let option = nix::sys::socket::sockopt::Ipv6RecvPacketInfo;
                nix::sys::socket::setsockopt(fd, option, &true)?;
            }
            let _ = socket.set_recv_buffer_size(4 << 20);
            socket.bind(&bind)?;
            self.udp.push((port, socket.into()));
        }
        Ok(())
    }
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

fn explain(error: &io::Error, address: IpAddr, port: u16, spec: &Spec) -> String {
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => match holder(address, port, spec.protocol) {
            Some((pid, name)) => format!("address already in use (held by pid {pid}, {name})"),
            None => "address already in use (held by a process that only root can name, or by one \
                     in another container)"
                .into(),
        },
        Some(libc::EACCES) => {
            "permission denied: ports below 1024 need root or CAP_NET_BIND_SERVICE".into()
        }
        Some(libc::EADDRNOTAVAIL) => format!("{address} is not an address of this host"),
        Some(libc::EMFILE | libc::ENFILE) => {
            "too many open files; raise the limit by `ulimit -n` or publish a narrower range".into()
        }
        _ if error.kind() == io::ErrorKind::Unsupported => {
            "SCTP is not served yet; publish /tcp or /udp".into()
        }
        _ => error.to_string(),
    }
}

/// Who holds a port: the socket's inode from /proc/net, its owner from /proc/PID/fd.
fn holder(address: IpAddr, port: u16, protocol: Protocol) -> Option<(u32, String)> {
    let tables = match protocol {
        Protocol::Tcp => ["/proc/net/tcp", "/proc/net/tcp6"],
        Protocol::Udp => ["/proc/net/udp", "/proc/net/udp6"],
        Protocol::Sctp => return None,
    };
    // A dual-stack socket on [::] holds the port for IPv4 as well.
    let inodes: Vec<String> = tables
        .iter()
        .skip(usize::from(address.is_ipv6()))
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|text| {
            let inodes = text.lines().filter_map(|line| inode(line, port));
            inodes
                .map(|inode| format!("socket:[{inode}]"))
                .collect::<Vec<_>>()
        })
        .collect();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        for descriptor in fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let link = fs::read_link(descriptor.path()).unwrap_or_default();
            if inodes
                .iter()
                .any(|inode| link.as_os_str() == inode.as_str())
            {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Some((pid, name.trim().into()));
            }
        }
    }
    None
}

/// The inode of a line of /proc/net/tcp and its like (proc_net_tcp, Documentation/networking), if it
/// is a listener or a bound socket on the port.
fn inode(line: &str, port: u16) -> Option<&str> {
    let mut words = line.split_whitespace();
    let local = words.nth(1)?;
    let state = words.nth(1)?;
    let same = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()? == port;
    let inode = words.nth(5)?;
    (same && ["0A", "07"].contains(&state)).then_some(inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_held_by_another_names_the_holder() {
        let other = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = other.local_addr().expect("bound").port();
        let spec: Spec = format!("127.0.0.1:{port}:192.0.2.1:80")
            .parse()
            .expect("a spec");
        let error = Held::bind(&spec)
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
        let error = Held::bind(&spec).expect_err("not our address").to_string();
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
