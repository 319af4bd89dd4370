//! A stream of datagrams that its receiver acknowledges, as QUIC's is: what is on its way is bounded, so that a sender which is
//! faster than the path does not measure how much it can have dropped.

use std::{
    io::{self, ErrorKind, IoSlice},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::{cpu::pin_this_thread, netns::Netns};
use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg, sendmsg, setsockopt, sockopt,
};

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Octets of a datagram.
    payload: u16,
    /// Datagrams of one system call.
    batch: usize,
    /// The kernel makes them of one buffer (UDP_SEGMENT), as QUIC's implementations have it do.
    is_one_buffer: bool,
    /// So many batches may be on their way: what a socket has room for that takes them one by one (net.core.rmem_default).
    window: u64,
}

/// Small ones, each handed to the kernel by itself.
pub(crate) const SMALL: Shape = Shape {
    payload: 64,
    batch: 32,
    is_one_buffer: false,
    window: 4,
};
/// As long as QUIC's are at least (RFC 9000 section 14).
pub(crate) const LONG: Shape = Shape {
    payload: 1200,
    batch: 40,
    is_one_buffer: true,
    window: 2,
};

/// What is not acknowledged after this is taken to be lost.
const LOST: Duration = Duration::from_millis(20);

impl Shape {
    /// Octets of a batch.
    fn octets(self) -> u64 {
        u64::from(self.payload) * self.batch as u64
    }

    /// Octets of a datagram.
    pub(crate) fn payload(self) -> f64 {
        self.payload.into()
    }
}

/// Streams to a port of an address for a while; returns how many octets arrived, and in which time. The receiver runs on the
/// cores of `others`.
///
/// # Errors
/// Something of the kernel's is missing.
pub(crate) fn stream(
    (client, address): (&Netns, IpAddr),
    server: &Netns,
    port: u16,
    shape: Shape,
    (others, time): (&[usize], Duration),
) -> Result<(u64, Duration)> {
    let sink = server.enter(|| UdpSocket::bind(("0.0.0.0", port)))?;
    sink.set_read_timeout(Some(LOST))?;
    setsockopt(&sink, sockopt::UdpGroSegment, &true).context("UDP_GRO")?;
    let source = client.enter(|| UdpSocket::bind("0.0.0.0:0"))?;
    source.connect(SocketAddr::from((address, port)))?;
    source.set_read_timeout(Some(LOST))?;
    for socket in [&sink, &source] {
        setsockopt(socket, sockopt::RcvBufForce, &(4 << 20)).context("SO_RCVBUFFORCE")?;
    }
    let (received, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            pin_this_thread(others)?;
            receive(&sink, shape, &received, &is_over).context("receive datagrams")
        });
        let begin = Instant::now();
        let sent = send(&source, shape, begin + time).context("send datagrams");
        let (count, elapsed) = (received.load(Relaxed), begin.elapsed());
        is_over.store(true, Relaxed);
        receiver
            .join()
            .map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
        sent?;
        Ok((count, elapsed))
    })
}

/// Says how much has come after every batch.
fn receive(
    sink: &UdpSocket,
    shape: Shape,
    received: &AtomicU64,
    is_over: &AtomicBool,
) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let (mut total, mut said) = (0, 0);
    while !is_over.load(Relaxed) {
        let (length, client) = match sink.recv_from(&mut buffer) {
            Err(error) if is_timeout(&error) => continue,
            received => received?,
        };
        total += length as u64;
        received.store(total, Relaxed);
        if total - said >= shape.octets() {
            said = total;
            sink.send_to(&total.to_be_bytes(), client)?;
        }
    }
    Ok(())
}

fn send(source: &UdpSocket, shape: Shape, end: Instant) -> Result<()> {
    let octets = usize::try_from(shape.octets())?;
    let buffer = vec![0; octets];
    let datagrams: Vec<_> = buffer
        .chunks(shape.payload.into())
        .map(|it| [IoSlice::new(it)])
        .collect();
    let whole = [IoSlice::new(&buffer)];
    let segments = [ControlMessage::UdpGsoSegments(&shape.payload)];
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(shape.batch, None);
    let descriptor = source.as_raw_fd();
    let (mut sent, mut acknowledged) = (0, 0);
    while Instant::now() < end {
        while sent - acknowledged >= shape.window * shape.octets() {
            let mut said = [0; 8];
            match source.recv(&mut said) {
                Ok(8) => {
                    acknowledged = acknowledged.max(u64::from_be_bytes(said));
                    sent = sent.max(acknowledged);
                }
                // What was lost is not counted by the receiver either, whose next word is of a whole batch more.
                Err(error) if is_timeout(&error) => sent = acknowledged,
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                other => drop(other?),
            }
        }
        let none = [None; 64];
        if shape.is_one_buffer {
            sendmsg::<SockaddrStorage>(descriptor, &whole, &segments, MsgFlags::empty(), None)?;
        } else {
            let to = &none[..shape.batch];
            sendmmsg(
                descriptor,
                &mut headers,
                &datagrams,
                to,
                [],
                MsgFlags::empty(),
            )?
            .count();
        }
        sent += shape.octets();
    }
    ensure!(acknowledged > 0, "no acknowledgement came back");
    Ok(())
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
