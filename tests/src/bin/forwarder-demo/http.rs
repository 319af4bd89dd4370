//! The web server that is published, and a client for it. Just enough HTTP/1.1 for a browser.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use forwarder_tests::netns::Netns;

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// The header in which the server says whom it saw.
const SOURCE: &str = "X-Source-Seen: ";

/// A server that lives as long as the process.
#[derive(Debug)]
pub(crate) struct Server;

impl Server {
    pub(crate) fn start(netns: &Netns, port: u16) -> Result<Self> {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let listener = netns
            .enter(|| TcpListener::bind(any))
            .context("start the web server")?;
        thread::spawn(move || {
            for (stream, peer) in std::iter::repeat_with(|| listener.accept()).flatten() {
                // A client that breaks off is its own affair.
                thread::spawn(move || serve(&stream, peer));
            }
        });
        Ok(Self)
    }
}

fn serve(mut stream: &TcpStream, peer: SocketAddr) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut request, mut html) = (String::new(), false);
    // No more than this is read of anybody's headers.
    for line in BufReader::new(stream.take(16 * 1024)).lines() {
        let line = line?;
        let lower = line.to_ascii_lowercase();
        html |= lower.starts_with("accept:") && lower.contains("text/html");
        if line.is_empty() {
            break;
        }
        if request.is_empty() {
            request = line;
        }
    }
    let mut words = request.split(' ');
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let (status, kind, body) = match (method, path) {
        ("GET" | "HEAD", "/") if html => ("200 OK", "text/html; charset=utf-8", page(peer)),
        ("GET" | "HEAD", "/") => (
            "200 OK",
            "text/plain; charset=utf-8",
            format!("the backend saw {peer}\n"),
        ),
        ("GET" | "HEAD", _) => ("404 Not Found", "text/plain", "nothing here\n".to_owned()),
        _ => (
            "405 Method Not Allowed",
            "text/plain",
            "only GET\n".to_owned(),
        ),
    };
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{SOURCE}{peer}\r\n\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n{}",
        body.len(),
        if method == "HEAD" { "" } else { &body },
    );
    stream.write_all(answer.as_bytes())
}

fn page(peer: SocketAddr) -> String {
    format!(
        r#"<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>forwarder</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 1.1rem/1.6 system-ui, sans-serif; max-width: 36rem; margin: 16vh auto; padding: 0 1.5rem; }}
  h1 {{ font-size: 1rem; font-weight: 600; letter-spacing: .04em; opacity: .65; margin: 0; }}
  output {{ display: block; font: 600 clamp(1.4rem, 6vw, 2.4rem)/1.3 ui-monospace, monospace; margin: .4rem 0 1.6rem; overflow-wrap: anywhere; }}
  p {{ margin: .6rem 0; opacity: .85; }}
  code {{ font-family: ui-monospace, monospace; }}
</style>
<h1>THE BACKEND SAW YOU AS</h1>
<output>{peer}</output>
<p>This page comes from a container. No port of it is open to you: <code>forwarder</code> published
one on this host and brought your packets here.</p>
<p>A client on the host is seen with the host's address on the container's network, since
<code>127.0.0.1</code> would mean the container itself. Clients elsewhere are seen with their own.</p>
</html>
"#
    )
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
