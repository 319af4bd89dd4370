//! Backends that tell what they saw, and clients that ask them.
//!
//! A request is a line of text. The answer is `PEER PAYLOAD`, where PEER is the address and port
//! that the backend saw the request come from.

use std::{
    io::{BufRead, BufReader, ErrorKind, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::{
    socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket,
        sockopt,
    },
    time::{TimeVal, TimeValLike},
};

use crate::{
    deadline::{patience, slack},
    netns::{Netns, has_ipv6},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// How long a datagram may take until it is sent again.
fn retry() -> Duration {
    slack() * 3 / 10
}
/// How often a server looks whether it should end.
const TICK: Duration = Duration::from_millis(20);

/// A backend that answers until it is dropped, for IPv4 and IPv6.
#[derive(Debug)]
pub struct Backend {
    end: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// Starts one that listens on `port` of every address in the namespace.
    ///
    /// # Errors
    /// The port is taken.
    pub fn start(netns: &Netns, protocol: Protocol, port: u16) -> Result<Self> {
        let end = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(AtomicU64::new(0));
        let (ended, counted) = (Arc::clone(&end), Arc::clone(&requests));
        let any = if has_ipv6() {
            SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))
        } else {
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))
        };
        let thread = match protocol {
            Protocol::Tcp => {
                let listener = netns.enter(|| TcpListener::bind(any))?;
                // For a listener this bounds `accept`.
                let tick = TimeVal::milliseconds(TICK.as_millis() as i64);
                setsockopt(&listener, sockopt::ReceiveTimeout, &tick)?;
                std::thread::spawn(move || serve_tcp(&listener, &ended, &counted))
            }
            Protocol::Udp => {
                let socket = netns.enter(|| UdpSocket::bind(any))?;
                socket.set_read_timeout(Some(TICK))?;
                std::thread::spawn(move || serve_udp(&socket, &ended, &counted))
            }
        };
        Ok(Self {
            end,
            requests,
            thread: Some(thread),
        })
    }

    /// How many requests have come.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve_tcp(listener: &TcpListener, end: &AtomicBool, requests: &Arc<AtomicU64>) {
    while !end.load(Ordering::SeqCst) {
        if let Ok((stream, peer)) = listener.accept() {
            let requests = Arc::clone(requests);
            std::thread::spawn(move || converse(stream, peer, &requests));
        }
    }
}

fn converse(mut stream: TcpStream, peer: SocketAddr, requests: &AtomicU64) {
    let Ok(input) = stream.try_clone() else {
        return;
    };
    // A test that fails leaves the connection; the thread must not stay for ever.
    let _ = stream.set_read_timeout(Some(3 * patience()));
    for line in BufReader::new(input).lines() {
        let Ok(line) = line else { return };
        requests.fetch_add(1, Ordering::SeqCst);
        // One write: piece by piece it would be as many segments.
        if stream
            .write_all(format!("{} {line}\n", canonical(peer)).as_bytes())
            .is_err()
        {
            return;
        }
    }
}

fn serve_udp(socket: &UdpSocket, end: &AtomicBool, requests: &AtomicU64) {
    let mut buffer = [0; 65536];
    while !end.load(Ordering::SeqCst) {
        if let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            requests.fetch_add(1, Ordering::SeqCst);
            let mut answer = format!("{} ", canonical(peer)).into_bytes();
            answer.extend_from_slice(&buffer[..length]);
            let _ = socket.send_to(&answer, peer);
        }
    }
}

/// IPv4 as IPv4, which a socket of both families shows as `::ffff:a.b.c.d`.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// What came back for a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The source that the backend saw.
    pub seen: SocketAddr,
    pub payload: String,
    /// The client's own port.
    pub local_port: u16,
}

/// Sends `payload` from `netns` to `frontend` and returns the answer.
///
/// # Errors
/// No answer in time, a refused connection, or a datagram from another address than `frontend`.
pub fn ask(
    netns: &Netns,
    protocol: Protocol,
    frontend: SocketAddr,
    payload: &str,
) -> Result<Answer> {
    netns
        .enter(|| match protocol {
            Protocol::Tcp => Connection::open_here(frontend)?.ask(payload),
            Protocol::Udp => ask_udp(frontend, payload),
        })
        .with_context(|| format!("{protocol:?} from {} to {frontend}", netns.label()))
}

/// Sends one datagram from `netns` and waits for no answer.
///
/// # Errors
/// It cannot be sent, such as for want of a route.
pub fn send_datagram(netns: &Netns, destination: SocketAddr, payload: &str) -> Result<()> {
    netns.enter(|| {
        let socket = UdpSocket::bind((unspecified(destination), 0))?;
        socket.send_to(payload.as_bytes(), destination)?;
        Ok(())
    })
}

fn ask_udp(frontend: SocketAddr, payload: &str) -> Result<Answer> {
    // Not connected: such a socket would hide an answer from a wrong address.
    let socket = UdpSocket::bind((unspecified(frontend), 0))?;
    ask_by(&socket, frontend, payload)
}

/// Sends `payload` by a socket that is not connected, which may have had other answers before.
///
/// # Errors
/// As [`ask`].
pub fn ask_by(socket: &UdpSocket, frontend: SocketAddr, payload: &str) -> Result<Answer> {
    socket.set_read_timeout(Some(retry()))?;
    let patience = patience();
    let deadline = Instant::now() + patience;
    let mut buffer = vec![0; 65536];
    while Instant::now() < deadline {
        // The error may be a port unreachable for an earlier try.
        let _ = socket.send_to(payload.as_bytes(), frontend);
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => {
                ensure!(from == frontend, "answered by {from} instead of {frontend}");
                let answer = answer(&buffer[..length], socket.local_addr()?.port())?;
                if answer.payload == payload {
                    return Ok(answer);
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error).context("receive"),
        }
    }
    bail!("no answer in {} s", patience.as_secs())
}

/// A TCP connection that stays open between requests.
#[derive(Debug)]
pub struct Connection {
    input: BufReader<TcpStream>,
}

impl Connection {
    /// # Errors
    /// Refused, or no answer in time.
    pub fn open(netns: &Netns, frontend: SocketAddr) -> Result<Self> {
        netns.enter(|| Self::open_here(frontend))
    }

    /// As [`Connection::open`], from a port that another connection of this client may have too.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub fn open_from(netns: &Netns, port: u16, frontend: SocketAddr) -> Result<Self> {
        Self::open_at(
            netns,
            SocketAddr::new(unspecified(frontend), port),
            frontend,
        )
    }

    /// As [`Connection::open_from`], from an address of the client's as well.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub fn open_at(netns: &Netns, own: SocketAddr, frontend: SocketAddr) -> Result<Self> {
        netns.enter(|| {
            let family = match frontend {
                SocketAddr::V4(_) => AddressFamily::Inet,
                SocketAddr::V6(_) => AddressFamily::Inet6,
            };
            let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            let patience = TimeVal::seconds(patience().as_secs() as i64);
            setsockopt(&socket, sockopt::SendTimeout, &patience)?; // connect(2) heeds it
            bind(socket.as_raw_fd(), &SockaddrStorage::from(own)).context("bind")?;
            connect(socket.as_raw_fd(), &SockaddrStorage::from(frontend)).context("connect")?;
            Self::of(TcpStream::from(socket))
        })
    }

    /// Closes it, and waits until the other side has.
    ///
    /// # Errors
    /// It does not in time.
    pub fn close(mut self) -> Result<()> {
        self.input.get_ref().shutdown(Shutdown::Write)?;
        ensure!(self.input.read_line(&mut String::new())? == 0, "it goes on");
        Ok(())
    }

    fn open_here(frontend: SocketAddr) -> Result<Self> {
        Self::of(TcpStream::connect_timeout(&frontend, patience()).context("connect")?)
    }

    fn of(stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(patience()))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            input: BufReader::new(stream),
        })
    }

    /// # Errors
    /// Closed, reset, or no answer in time.
    pub fn ask(&mut self, payload: &str) -> Result<Answer> {
        let request = format!("{payload}\n");
        self.input
            .get_mut()
            .write_all(request.as_bytes())
            .context("send")?;
        self.hear()
    }

    /// The answer to what the backend was sent by others.
    ///
    /// # Errors
    /// As [`Connection::ask`].
    pub fn hear(&mut self) -> Result<Answer> {
        let mut line = String::new();
        self.input.read_line(&mut line).context("receive")?;
        ensure!(line.ends_with('\n'), "closed before the answer");
        answer(
            line.trim_end().as_bytes(),
            self.input.get_ref().local_addr()?.port(),
        )
    }
}

fn answer(bytes: &[u8], local_port: u16) -> Result<Answer> {
    let text = String::from_utf8_lossy(bytes);
    let (seen, payload) = text.split_once(' ').context("an answer without a source")?;
    Ok(Answer {
        seen: seen.parse()?,
        payload: payload.to_owned(),
        local_port,
    })
}

fn unspecified(destination: SocketAddr) -> IpAddr {
    match destination {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}
