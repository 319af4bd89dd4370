//! Tells both ends of a TCP flow that was cut off: a reset to the client in the frontend's name, and one to the backend in the
//! client's. Their numbers are those that the flow knows. Where they lag behind, the receiver answers (RFC 5961 section 3), and so does
//! the program, by the right one.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail};
use etherparse::PacketBuilder;
use forwarder_common::{
    flow::{Flow, Phase},
    tuple::{Address, TCP, Tuple},
};
use socket2::{Domain, Protocol, Socket, Type};

/// How long a flow stays to be answered: a sender whose segments were lost repeats them within a second, by default.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_millis(1500);

/// The protocol of raw(7) sockets that take the IP header as it is, whoever's address it has.
const RAW: i32 = 255;
const TTL: u8 = 64;

/// Raw sockets, which the kernel's routes and neighbours are found by.
#[derive(Debug)]
pub struct Resets {
    v4: Socket,
    /// `None` if this machine has no IPv6.
    v6: Option<Socket>,
}

/// A reset.
struct Reset {
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    acknowledgement: u32,
}

impl Resets {
    /// # Errors
    /// This process may have no raw sockets (CAP_NET_RAW).
    pub fn open() -> Result<Self> {
        let open = |domain| {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(RAW)))?;
            socket.set_nonblocking(true)?;
            socket.set_send_buffer_size(1 << 20)?;
            std::io::Result::Ok(socket)
        };
        Ok(Self {
            v4: open(Domain::IPV4).context("open a raw socket")?,
            v6: open(Domain::IPV6).ok(),
        })
    }

    /// Sends both. Of another protocol than TCP there are none.
    ///
    /// # Errors
    /// The first one; the other is sent all the same.
    pub fn send(&self, key: &Tuple, flow: &Flow) -> Result<()> {
        if key.protocol != u32::from(TCP) {
            return Ok(());
        }
        let [client, backend] = resets(key, flow).map(|reset| self.send_one(&reset));
        client.and(backend)
    }

    fn send_one(&self, reset: &Reset) -> Result<()> {
        let Reset { from, to, .. } = reset;
        let (socket, builder) = match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => (
                &self.v4,
                PacketBuilder::ipv4(from.octets(), to.octets(), TTL),
            ),
            (IpAddr::V6(from), IpAddr::V6(to)) => (
                self.v6.as_ref().context("no IPv6")?,
                PacketBuilder::ipv6(from.octets(), to.octets(), TTL),
            ),
            _ => bail!("{from} and {to} are of two families"),
        };
        let tcp = builder
            .tcp(from.port(), to.port(), reset.sequence, 0)
            .rst()
            .ack(reset.acknowledgement);
        let mut packet = Vec::with_capacity(tcp.size(0));
        tcp.write(&mut packet, &[])?;
        socket
            .send_to(&packet, &SocketAddr::new(to.ip(), 0).into())
            .with_context(|| format!("send a reset to {to}"))?;
        Ok(())
    }
}

/// Whether either end still believes in a flow.
pub fn is_open(key: &Tuple, flow: &Flow) -> bool {
    let phase = Phase::of(key.protocol, flow.state());
    key.protocol == u32::from(TCP) && !matches!(phase, Phase::TcpTimeWait | Phase::TcpClose)
}

/// The client's, and the backend's. They acknowledge, too: a client whose SYN was not answered yet believes no other.
fn resets(key: &Tuple, flow: &Flow) -> [Reset; 2] {
    let socket = |address: Address, port| SocketAddr::new(address.into(), u16::from_be(port));
    let [client, backend] = [flow.original.sent, flow.reply.sent];
    let (client_port, frontend_port) = flow.ports();
    [
        Reset {
            from: socket(flow.frontend, frontend_port),
            to: socket(flow.client, client_port),
            sequence: backend,
            acknowledgement: client,
        },
        Reset {
            from: socket(key.source, key.source_port),
            to: socket(key.destination, key.destination_port),
            sequence: client,
            acknowledgement: backend,
        },
    ]
}
