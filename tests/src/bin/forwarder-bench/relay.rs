//! What a relay in user space costs at least: blocking calls, one to read and one to write for each message, and nothing
//! that asks, tells or remembers anything. It has one UDP client at a time.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::Result;
use nix::fcntl::{FcntlArg, SpliceFFlags, fcntl, splice};

use crate::arena::{BULK, DATAGRAM, ROUND_TRIP, STREAM};

const BUFFER: usize = 64 << 10;
const PIPE: usize = 1 << 20;

/// Relays what long conversations are measured by to `backend`, until it is killed.
///
/// # Errors
/// A port is taken.
pub(crate) fn run(backend: IpAddr) -> Result<()> {
    let mut threads = Vec::new();
    for port in [BULK, ROUND_TRIP] {
        let listener = TcpListener::bind(("0.0.0.0", port))?;
        threads.push(thread::spawn(move || {
            streams(&listener, (backend, port).into())
        }));
    }
    for port in [STREAM, DATAGRAM] {
        let socket = UdpSocket::bind(("0.0.0.0", port))?;
        threads.push(thread::spawn(move || {
            datagrams(socket, (backend, port).into())
        }));
    }
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

fn streams(listener: &TcpListener, backend: SocketAddr) -> io::Result<()> {
    for client in listener.incoming() {
        let (client, server) = (Arc::new(client?), Arc::new(TcpStream::connect(backend)?));
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
        }
        for (from, to) in [(client.clone(), server.clone()), (server, client)] {
            thread::spawn(move || {
                let _ = if backend.port() == BULK {
                    by_splice(&from, &to)
                } else {
                    by_copy(&from, &to)
                };
                to.shutdown(Shutdown::Write)
            });
        }
    }
    Ok(())
}

fn by_copy(mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    let mut buffer = [0; BUFFER];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            length => to.write_all(&buffer[..length])?,
        }
    }
}

fn by_splice(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    let (read, write) = nix::unistd::pipe()?;
    let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE as i32));
    let flags = SpliceFFlags::SPLICE_F_MOVE;
    loop {
        let mut rest = splice(from.as_fd(), None, write.as_fd(), None, PIPE, flags)?;
        if rest == 0 {
            return Ok(());
        }
        while rest > 0 {
            rest -= splice(read.as_fd(), None, to.as_fd(), None, rest, flags)?;
        }
    }
}

fn datagrams(socket: UdpSocket, backend: SocketAddr) -> io::Result<()> {
    let socket = Arc::new(socket);
    let server = Arc::new(UdpSocket::bind("0.0.0.0:0")?);
    server.connect(backend)?;
    let client = Arc::new(Mutex::new(None));
    thread::spawn({
        let (socket, server, client) = (socket.clone(), server.clone(), client.clone());
        move || {
            let mut buffer = [0; BUFFER];
            loop {
                let Ok(length) = server.recv(&mut buffer) else {
                    continue; // nobody was there
                };
                let client = *client.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(client) = client {
                    let _ = socket.send_to(&buffer[..length], client);
                }
            }
        }
    });
    let mut buffer = [0; BUFFER];
    loop {
        let (length, address) = socket.recv_from(&mut buffer)?;
        *client.lock().unwrap_or_else(PoisonError::into_inner) = Some(address);
        let _ = server.send(&buffer[..length]); // nobody may be there
    }
}
