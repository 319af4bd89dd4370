//! The web server that is published, and a client for it. Just enough HTTP/1.1 for a browser, and no knowledge of
//! what it serves (`site.rs`).

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use forwarder_tests::netns::Netns;

/// How long a client or a part of an answer may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a connection may be without a request. The page asks every second.
const IDLE: Duration = Duration::from_secs(15);
/// How long a whole answer may take.
const LONGEST_ANSWER: Duration = Duration::from_secs(60);
/// Connections at once; more are closed.
const MOST: usize = 64;
/// No more than this is read of anybody's request.
const LONGEST: u64 = 16 * 1024;
/// The header in which the server says whom it saw.
const SOURCE: &str = "X-Source-Seen: ";
/// The page is made of what this server sends and of nothing else.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// One request, and the connection that it came by.
#[derive(Debug)]
pub(crate) struct Request {
    pub method: String,
    /// Without a query.
    pub path: String,
    pub host: Option<String>,
    /// The client asks for HTML.
    pub html: bool,
    /// It wants no other answer by this connection.
    last: bool,
    /// The client's address as this server sees it.
    pub peer: SocketAddr,
    /// This server's own.
    pub local: SocketAddr,
    /// When the connection was accepted.
    pub accepted: Instant,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: &'static str,
    pub kind: &'static str,
    pub body: Vec<u8>,
    /// So many zero octets follow the body.
    pub zeros: usize,
}

impl Answer {
    pub(crate) fn ok(kind: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status: "200 OK",
            kind,
            body: body.into(),
            zeros: 0,
        }
    }
}

/// Starts a server that lives as long as the process.
pub(crate) fn start(
    netns: &Netns,
    port: u16,
    answer: impl Fn(&Request) -> Answer + Send + Sync + 'static,
) -> Result<()> {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let listener = netns
        .enter(|| TcpListener::bind(any))
        .context("start the web server")?;
    let answer = Arc::new(answer);
    thread::spawn(move || {
        let open = Arc::new(AtomicUsize::new(0));
        loop {
            let Ok((stream, _)) = listener.accept() else {
                thread::sleep(Duration::from_millis(100)); // no descriptor is free
                continue;
            };
            if open.load(Ordering::Relaxed) >= MOST {
                continue;
            }
            open.fetch_add(1, Ordering::Relaxed);
            let (answer, counted) = (Arc::clone(&answer), Arc::clone(&open));
            let started = thread::Builder::new().spawn(move || {
                // A client that breaks off is its own affair.
                let _ = serve(&stream, &*answer);
                counted.fetch_sub(1, Ordering::Relaxed);
            });
            if started.is_err() {
                open.fetch_sub(1, Ordering::Relaxed);
            }
        }
    });
    Ok(())
}

/// Answers one request after the other, so that a browser that stays is one flow.
fn serve(mut stream: &TcpStream, answer: &dyn Fn(&Request) -> Answer) -> std::io::Result<()> {
    let accepted = Instant::now();
    let canonical = |it: SocketAddr| SocketAddr::new(it.ip().to_canonical(), it.port());
    let (peer, local) = (
        canonical(stream.peer_addr()?),
        canonical(stream.local_addr()?),
    );
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream);
    while let Some(request) = read(&mut reader, peer, local, accepted)? {
        let Answer {
            status,
            kind,
            body,
            zeros,
        } = answer(&request);
        let deadline = Instant::now() + LONGEST_ANSWER;
        let connection = if request.last { "close" } else { "keep-alive" };
        let mut bytes = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{SOURCE}{peer}\r\n\
             Cache-Control: no-store\r\nContent-Security-Policy: {POLICY}\r\nX-Content-Type-Options: nosniff\r\n\
             Connection: {connection}\r\n\r\n",
            body.len() + zeros,
        )
        .into_bytes();
        let has_body = request.method != "HEAD";
        if has_body {
            bytes.extend(body);
        }
        stream.write_all(&bytes)?;
        if has_body {
            write_zeros(stream, zeros, deadline)?;
        }
        if request.last {
            break;
        }
    }
    Ok(())
}

/// Writes zeros of no memory of their own until `deadline`.
fn write_zeros(mut stream: &TcpStream, mut count: usize, deadline: Instant) -> std::io::Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    while count > 0 {
        if Instant::now() > deadline {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        let part = count.min(ZEROS.len());
        stream.write_all(&ZEROS[..part])?;
        count -= part;
    }
    Ok(())
}

/// Reads a request's head. `None`: the client has ended the connection, or says too much.
fn read(
    reader: &mut impl BufRead,
    peer: SocketAddr,
    local: SocketAddr,
    accepted: Instant,
) -> std::io::Result<Option<Request>> {
    let mut head = reader.take(LONGEST).lines();
    let Some(first) = head.next().transpose()? else {
        return Ok(None);
    };
    let mut words = first.split(' ').map(str::to_owned);
    let (method, target) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let path = target.split('?').next().unwrap_or_default().to_owned();
    let mut request = Request {
        method,
        path,
        host: None,
        html: false,
        last: words.next().as_deref() != Some("HTTP/1.1"),
        peer,
        local,
        accepted,
    };
    for line in head {
        let line = line?;
        if line.is_empty() {
            return Ok(Some(request));
        }
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "accept" => request.html |= value.to_ascii_lowercase().contains("text/html"),
            "host" => request.host = Some(value.to_owned()),
            "connection" => request.last |= value.eq_ignore_ascii_case("close"),
            // A body would be taken for the next request.
            "content-length" | "transfer-encoding" => request.last = true,
            _ => (),
        }
    }
    Ok(None)
}

/// Gets `/` from `netns` and returns the source that the server saw.
pub(crate) fn source_seen(netns: &Netns, server: SocketAddr) -> Result<SocketAddr> {
    netns.enter(|| {
        let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "GET / HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let seen = answer.lines().find_map(|line| line.strip_prefix(SOURCE));
        Ok(seen
            .context("no answer of the web server")?
            .trim()
            .parse()?)
    })
}

#[cfg(test)]
impl Request {
    /// `GET /` of a browser.
    pub(crate) fn example() -> Self {
        Self {
            method: "GET".into(),
            path: "/".into(),
            host: None,
            html: true,
            last: false,
            peer: SocketAddr::from(([198, 18, 0, 1], 40_000)),
            local: SocketAddr::from(([198, 18, 0, 2], 80)),
            accepted: Instant::now(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Vec<Request> {
        let address = SocketAddr::from(([192, 0, 2, 1], 1));
        let mut bytes = text.as_bytes();
        let request = || read(&mut bytes, address, address, Instant::now()).unwrap();
        std::iter::from_fn(request).collect()
    }

    #[test]
    fn requests_come_one_after_the_other() {
        let text =
            "GET /a?b HTTP/1.1\r\nHost: x:1\r\nACCEPT: text/html\r\n\r\nHEAD /c HTTP/1.1\r\n\r\n";
        let [first, second] = parsed(text).try_into().unwrap();
        assert_eq!((first.path.as_str(), first.html), ("/a", true));
        assert_eq!(first.host.as_deref(), Some("x:1"));
        assert_eq!((second.method.as_str(), second.html), ("HEAD", false));
        assert!(!first.last && !second.last);
    }

    #[test]
    fn close_and_old_versions_end_the_connection() {
        assert!(parsed("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n")[0].last);
        assert!(parsed("GET / HTTP/1.0\r\n\r\n")[0].last);
        assert!(parsed("POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\n")[0].last);
    }

    #[test]
    fn a_request_without_end_is_none() {
        assert!(parsed("GET / HTTP/1.1\r\n").is_empty());
        assert!(
            parsed(&format!(
                "GET / HTTP/1.1\r\nA: {}\r\n\r\n",
                "a".repeat(20_000)
            ))
            .is_empty()
        );
    }
}
