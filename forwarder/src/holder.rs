//! Who has a port that is not to be had: its sockets from /proc/PID/net, and their process from /proc/PID/fd. What is done
//! about it is not decided here.

mod bound;

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::publish::spec::{At, Protocol, Zone};

/// The sockets of this process's own network namespace.
const OWN: &str = "/proc/self/net";

/// A port of an address that somebody has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Taken {
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// The device of a link-local address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub zone: Option<Zone>,
    pub port: u16,
    pub protocol: Protocol,
}

/// A socket that has a port.
#[derive(Debug, PartialEq, Eq)]
struct HeldPort {
    address: IpAddr,
    port: u16,
    uid: u32,
    inode: u64,
    /// It waits for clients, and is no connection of one.
    waits: bool,
}

impl Taken {
    /// What is wrong, with the holder if there is one to name.
    pub fn problem(&self, holder: Option<&str>) -> String {
        let Self { port, protocol, .. } = self;
        let publish = At(self.address, self.zone.as_ref(), *port);
        match holder {
            Some(holder) => {
                format!("publish {publish}/{protocol}: address already in use (held by {holder})")
            }
            None => format!(
                "publish {publish}/{protocol}: address already in use; {} names who holds it",
                self.listing()
            ),
        }
    }

    /// The holder, in words: its process if this one may look into that, or its user.
    pub fn holder(&self) -> Option<String> {
        self.process(OWN.as_ref()).or_else(|| {
            let sockets = self.sockets(OWN.as_ref());
            let user = nix::unistd::Uid::from_raw(sockets.first()?.uid);
            let name = nix::unistd::User::from_uid(user).ok().flatten();
            let name = name.map_or_else(|| user.to_string(), |user| user.name);
            Some(format!(
                "a process of user {name}, which {} names",
                self.listing()
            ))
        })
    }

    /// The process, in words, if this one may look into it. `network` is /proc/PID/net of who could not have the port.
    pub fn process(&self, network: &Path) -> Option<String> {
        let sockets = self.sockets(network);
        sockets.iter().find_map(|held| {
            let link = format!("socket:[{}]", held.inode);
            let mut processes = fs::read_dir("/proc").ok()?.flatten();
            processes.find_map(|process| {
                let pid: u32 = process.file_name().to_str()?.parse().ok()?;
                let mut descriptors = fs::read_dir(process.path().join("fd")).ok()?.flatten();
                let has_it = descriptors
                    .any(|it| fs::read_link(it.path()).is_ok_and(|it| it.as_os_str() == &*link));
                has_it.then(|| format!("pid {pid}, {}", name(&process.path())))
            })
        })
    }

    /// The command that lists such sockets with their processes.
    const fn listing(&self) -> &'static str {
        match self.protocol {
            Protocol::Tcp => "`ss -tanp --bound-inactive` as root",
            Protocol::Udp => "`ss -uanp` as root",
            Protocol::Sctp => "`ss -Sanp` as root",
        }
    }

    /// Those that are in the way, the likeliest first.
    fn sockets(&self, network: &Path) -> Vec<HeldPort> {
        let mut sockets = sockets(self.protocol, network);
        if self.protocol == Protocol::Tcp && is_own(network) {
            let bound = [libc::AF_INET, libc::AF_INET6].map(bound::sockets);
            sockets.extend(bound.into_iter().flatten().flatten());
        }
        sockets.retain(|it| it.port == self.port && it.inode != 0 && self.meets(it.address));
        sockets.sort_by_key(|held| !held.waits);
        sockets
    }

    /// Whether a socket of this address is in the way: one of IPv6 may have the port for IPv4 as well.
    fn meets(&self, held: IpAddr) -> bool {
        if self.address.is_ipv6() && held.is_ipv4() {
            return false;
        }
        let held = held.to_canonical();
        held == self.address || held.is_unspecified() || self.address.is_unspecified()
    }
}

/// The name of a process. Any user's process chooses its own, so nothing in it is left that a terminal would obey.
fn name(process: &Path) -> String {
    let name = fs::read(process.join("comm")).unwrap_or_default();
    let name = String::from_utf8_lossy(&name);
    name.trim_end().escape_debug().to_string()
}

/// Whether this is /proc/PID/net of a process in the own network namespace.
fn is_own(network: &Path) -> bool {
    let namespace = |process: &Path| fs::read_link(process.join("ns/net")).ok();
    let theirs = network.parent().and_then(namespace);
    theirs.is_some() && theirs == namespace("/proc/self".as_ref())
}

/// Ports that sockets of this network namespace wait on.
pub fn ports_in_use(protocol: Protocol) -> BTreeSet<u16> {
    let waiting = sockets(protocol, OWN.as_ref()).into_iter();
    waiting.filter(|it| it.waits).map(|it| it.port).collect()
}

fn sockets(protocol: Protocol, network: &Path) -> Vec<HeldPort> {
    let tables: &[&str] = match protocol {
        Protocol::Tcp => &["tcp", "tcp6"],
        Protocol::Udp => &["udp", "udp6"],
        Protocol::Sctp => &["sctp/eps"],
    };
    let read = match protocol {
        Protocol::Tcp | Protocol::Udp => ip_socket,
        Protocol::Sctp => sctp_socket,
    };
    let mut sockets = Vec::new();
    for table in tables {
        let text = fs::read_to_string(network.join(table)).unwrap_or_default();
        sockets.extend(text.lines().filter_map(read));
    }
    sockets
}

/// A line of /proc/net/tcp and its like (proc_net_tcp, Documentation/networking).
fn ip_socket(line: &str) -> Option<HeldPort> {
    let mut words = line.split_whitespace();
    let (address, port) = words.nth(1)?.rsplit_once(':')?;
    let state = words.nth(1)?;
    Some(HeldPort {
        address: hexadecimal(address)?,
        port: u16::from_str_radix(port, 16).ok()?,
        uid: words.nth(3)?.parse().ok()?,
        inode: words.nth(1)?.parse().ok()?,
        waits: ["0A", "07"].contains(&state), // TCP_LISTEN and TCP_CLOSE
    })
}

/// An address as words of this machine's byte order.
fn hexadecimal(address: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = address.get(8 * at..8 * (at + 1))?;
        u32::from_str_radix(word, 16).ok().map(u32::to_ne_bytes)
    };
    match address.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let octets: [u8; 16] = words.concat().try_into().ok()?;
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}

/// A line of /proc/net/sctp/eps (net/sctp/proc.c); of several addresses the first.
fn sctp_socket(line: &str) -> Option<HeldPort> {
    let mut words = line.split_whitespace().skip(5);
    Some(HeldPort {
        port: words.next()?.parse().ok()?,
        uid: words.next()?.parse().ok()?,
        inode: words.next()?.parse().ok()?,
        address: words.next()?.parse().ok()?,
        waits: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(address: &str, port: u16, protocol: Protocol) -> Taken {
        Taken {
            address: address.parse().expect(address),
            zone: None,
            port,
            protocol,
        }
    }

    #[test]
    fn who_only_bound_the_port_is_named_too() {
        use socket2::{Domain, Socket, Type};
        for (domain, address) in [(Domain::IPV4, "127.0.0.1"), (Domain::IPV6, "::1")] {
            let socket = Socket::new(domain, Type::STREAM, None).expect("a socket");
            let any: std::net::SocketAddr = (address.parse::<IpAddr>().expect(address), 0).into();
            socket.bind(&any.into()).expect("a free port");
            let bound = socket.local_addr().ok().and_then(|it| it.as_socket());
            let port = bound.expect("an address").port();
            let family = domain.into();
            let known = bound::sockets(family).is_ok_and(|held| !held.is_empty());
            if !known {
                return; // before Linux 6.8 nobody can tell
            }
            let holder = taken(address, port, Protocol::Tcp).holder();
            let own = format!("pid {}, ", std::process::id());
            let holder = holder.expect("a holder");
            assert!(holder.starts_with(&own), "{holder}");
        }
    }

    #[test]
    fn a_line_of_each_table_names_address_port_user_and_socket() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0";
        let held = HeldPort {
            address: Ipv4Addr::LOCALHOST.into(),
            port: 8080,
            uid: 1000,
            inode: 4711,
            waits: true,
        };
        if cfg!(target_endian = "little") {
            assert_eq!(ip_socket(line), Some(held));
        }
        let line = "   1: 00000000000000000000000001000000:0035 00000000000000000000000000000000:0000 01 0:0 0:0 0 0 0 12 1";
        let held = HeldPort {
            address: Ipv6Addr::LOCALHOST.into(),
            port: 53,
            uid: 0,
            inode: 12,
            waits: false,
        };
        if cfg!(target_endian = "little") {
            assert_eq!(ip_socket(line), Some(held));
        }
        let line = " ffff8d0 ffff8d1 2   10  29   9899      0 5150 0.0.0.0 ";
        let held = HeldPort {
            address: Ipv4Addr::UNSPECIFIED.into(),
            port: 9899,
            uid: 0,
            inode: 5150,
            waits: true,
        };
        assert_eq!(sctp_socket(line), Some(held));
        for header in [
            "  sl  local_address rem_address   st tx_queue",
            " ENDPT SOCK",
        ] {
            assert_eq!(ip_socket(header), None);
            assert_eq!(sctp_socket(header), None);
        }
    }

    #[test]
    fn only_who_is_in_the_way_is_named() {
        let other = std::net::TcpListener::bind("127.0.0.2:0").expect("a free port");
        let port = other.local_addr().expect("bound").port();
        let own = format!("pid {}, ", std::process::id());
        for (address, found) in [
            ("127.0.0.2", true),
            ("0.0.0.0", true),
            ("127.0.0.3", false),
            ("::1", false),
        ] {
            let holder = taken(address, port, Protocol::Tcp).holder();
            let is_named = holder.is_some_and(|holder| holder.starts_with(&own));
            assert_eq!(is_named, found, "{address}");
        }
    }

    #[test]
    fn a_terminal_obeys_nothing_in_a_processes_name() {
        let process = std::env::temp_dir().join(format!("forwarder-name-{}", std::process::id()));
        fs::create_dir(&process).expect("made");
        for (comm, shown) in [
            (&b"nginx\n"[..], "nginx"),
            (b"kworker/0:1-ev\n", "kworker/0:1-ev"),
            (b"a\x1b[31m\nb\xff\n", "a\\u{1b}[31m\\nb\u{fffd}"),
        ] {
            fs::write(process.join("comm"), comm).expect("written");
            assert_eq!(name(&process), shown);
        }
        fs::remove_dir_all(process).expect("removed");
    }

    #[test]
    fn a_connection_that_has_the_port_is_named_too() {
        let other = std::net::UdpSocket::bind("127.0.0.1:0").expect("a free port");
        other.connect("127.0.0.1:9").expect("connected");
        let port = other.local_addr().expect("bound").port();
        let holder = taken("127.0.0.1", port, Protocol::Udp).holder();
        let holder = holder.expect("a holder");
        assert!(
            holder.starts_with(&format!("pid {}, ", std::process::id())),
            "{holder}"
        );
    }

    #[test]
    fn without_a_holder_a_command_that_names_it_is_said() {
        let problem = taken("0.0.0.0", 8080, Protocol::Udp).problem(None);
        let text = "publish 0.0.0.0:8080/udp: address already in use; `ss -uanp` as root names who holds it";
        assert_eq!(problem, text);
    }
}
