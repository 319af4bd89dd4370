//! The host's IPsec policies (xfrm), read by netlink, and which publishes one of them can match. The fast path goes
//! round them, so such a publish is served in user space, where the stack asks every policy.

use std::{fmt, net::IpAddr};

use anyhow::{Context as _, Result, bail};
use futures_util::Stream;
use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NlasIterator,
};
use netlink_sys::{
    AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_XFRM,
};

use crate::{
    network::Snapshot,
    publish::spec::{Protocol, Spec},
};

// include/uapi/linux/xfrm.h
const XFRM_MSG_NEWPOLICY: u16 = 0x13;
const XFRM_MSG_GETPOLICY: u16 = 0x15;
const XFRM_MSG_GETDEFAULT: u16 = 0x28;
const XFRMNLGRP_POLICY: u32 = 4;
const XFRMA_TMPL: u16 = 5;
const XFRMA_IF_ID: u16 = 31;
const XFRM_POLICY_BLOCK: u8 = 1;
const XFRM_USERPOLICY_BLOCK: u8 = 1;
/// The length of `struct xfrm_userpolicy_info`, which attributes follow.
const POLICY_LENGTH: usize = 168;
/// The length of `struct xfrm_userpolicy_id`, with which a request for policies begins.
const ID_LENGTH: usize = 64;
const HEADER_LENGTH: usize = 16;

/// Where a policy is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    In,
    Out,
    Forward,
}

impl Direction {
    const ALL: [Self; 3] = [Self::In, Self::Out, Self::Forward];

    const fn name(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
            Self::Forward => "fwd",
        }
    }
}

/// A policy that forbids packets or wants them transformed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    pub direction: Direction,
    /// `None`: every address of both families, as of the default policy.
    pub selector: Option<Selector>,
    pub blocks: bool,
}

/// What a policy is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selector {
    pub source: IpNet,
    pub destination: IpNet,
    /// IANA protocol number; 0 for every one.
    pub protocol: u8,
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let action = if self.blocks { "block" } else { "transform" };
        let direction = self.direction.name();
        match &self.selector {
            Some(Selector {
                source,
                destination,
                ..
            }) => write!(f, "{direction} {source} -> {destination} {action}"),
            None => write!(f, "{direction} default {action}"),
        }
    }
}

/// The IPsec policy that keeps a publish from the fast path, if there is one: one that can match packets of some client and
/// a frontend address or the backend.
pub fn covering_policy<'a>(snapshot: &'a Snapshot, spec: &Spec) -> Option<&'a Policy> {
    let one = spec.address.filter(|address| !address.is_unspecified());
    let addresses = snapshot.addresses.iter();
    let addresses = addresses.map(|local| IpNet::from(local.address));
    let local = addresses.chain(snapshot.local_prefixes());
    let frontends = local.filter(move |_| one.is_none());
    let ours = frontends.chain(one.into_iter().chain([spec.backend]).map(IpNet::from));
    covering(&snapshot.policies, spec.protocol, ours)
}

/// The first policy that can match a publish's traffic. Its clients may have any address, so one of the two addresses of a
/// packet is always unknown; the other is one of `ours`: a frontend address, or the backend.
fn covering(
    policies: &[Policy],
    protocol: Protocol,
    ours: impl Iterator<Item = IpNet> + Clone,
) -> Option<&Policy> {
    let meet = |one: &IpNet, other: &IpNet| one.contains(other) || other.contains(one);
    policies.iter().find(|policy| {
        policy.selector.is_none_or(|selector| {
            let mut ours = ours.clone();
            let protocols = [0, protocol.number()];
            protocols.contains(&selector.protocol)
                && ours.any(|our| meet(&selector.source, &our) || meet(&selector.destination, &our))
        })
    })
}

/// Reads the policies that forbid or transform; none where the kernel has no xfrm. Those of single sockets are not among
/// them, nor those of xfrm interfaces, which ask them when a packet leaves by the device.
///
/// # Errors
/// The kernel refuses, or answers something else.
pub async fn policies() -> Result<Vec<Policy>> {
    let Ok(mut socket) = TokioSocket::new(NETLINK_XFRM) else {
        return Ok(Vec::new());
    };
    socket
        .socket_mut()
        .bind_auto()
        .context("bind a netlink socket")?;
    let mut policies = Vec::new();
    ask(
        &mut socket,
        XFRM_MSG_GETPOLICY,
        NLM_F_DUMP,
        &[0; ID_LENGTH],
        |kind, payload| {
            if kind == XFRM_MSG_NEWPOLICY {
                policies.extend(policy(payload));
            }
        },
    )
    .await?;
    ask(
        &mut socket,
        XFRM_MSG_GETDEFAULT,
        0,
        &[0; 4],
        |kind, payload| {
            if kind == XFRM_MSG_GETDEFAULT {
                policies.extend(default_policies(payload));
            }
        },
    )
    .await?;
    Ok(policies)
}

/// A stream that yields when policies have changed; never where the kernel has no xfrm.
pub fn changes() -> impl Stream<Item = ()> + Unpin {
    let socket = TokioSocket::new(NETLINK_XFRM).and_then(|mut socket| {
        socket.socket_mut().bind_auto()?;
        socket.socket_mut().add_membership(XFRMNLGRP_POLICY)?;
        Ok(socket)
    });
    follow(socket.ok())
}

/// It does not end: whoever polls it would do so again, and may not.
fn follow(socket: Option<TokioSocket>) -> impl Stream<Item = ()> + Unpin {
    Box::pin(futures_util::stream::unfold(socket, |socket| async {
        let Some(socket) = socket else {
            return std::future::pending().await;
        };
        // With an error, some were lost: there were changes.
        let _ = socket.recv_from_full().await;
        Some(((), Some(socket)))
    }))
}

/// Sends one request and gives each answer to `take`. What the kernel does not know has no answers.
async fn ask(
    socket: &mut TokioSocket,
    kind: u16,
    flags: u16,
    payload: &[u8],
    mut take: impl FnMut(u16, &[u8]),
) -> Result<()> {
    let mut request = Vec::with_capacity(HEADER_LENGTH + payload.len());
    let length = u32::try_from(HEADER_LENGTH + payload.len())?;
    request.extend(length.to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    request.extend([0; 8]);
    request.extend(payload);
    socket
        .send_to(&request, &SocketAddr::new(0, 0))
        .await
        .context("ask for IPsec policies")?;
    loop {
        let (answer, _) = socket
            .recv_from_full()
            .await
            .context("read IPsec policies")?;
        for (kind, payload) in messages(&answer) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => return refused(payload),
                kind => take(kind, payload),
            }
        }
        if flags & NLM_F_DUMP == 0 {
            return Ok(());
        }
    }
}

/// # Errors
/// What the kernel said, but that it does not know such a request, or that this process may not ask: without that privilege
/// there is no fast path either.
fn refused(payload: &[u8]) -> Result<()> {
    let code = payload
        .first_chunk()
        .map_or(0, |code| i32::from_ne_bytes(*code));
    match -code {
        0 | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOENT | libc::EPERM => Ok(()),
        code => bail!(
            "read IPsec policies: {}",
            std::io::Error::from_raw_os_error(code)
        ),
    }
}

/// The types and contents of a datagram's messages.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let message = NetlinkBuffer::new_checked(datagram).ok()?;
        let length = message.length() as usize;
        let payload = datagram.get(HEADER_LENGTH..length)?;
        datagram = datagram
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
        Some((message.message_type(), payload))
    })
}

/// A `struct xfrm_userpolicy_info` and its attributes; `None` for a policy that lets everything pass as it is, or does not
/// concern us.
fn policy(payload: &[u8]) -> Option<Policy> {
    let (info, attributes) = payload.split_at_checked(POLICY_LENGTH)?;
    let direction = *Direction::ALL.get(usize::from(info[160]))?; // a socket's own have others
    let blocks = info[161] == XFRM_POLICY_BLOCK;
    let mut transforms = false;
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute.ok()?;
        match attribute.kind() {
            XFRMA_TMPL => transforms = !attribute.value().is_empty(),
            XFRMA_IF_ID if attribute.value().iter().any(|byte| *byte != 0) => return None,
            _ => {}
        }
    }
    let network = |address: &[u8], length: u8| {
        let address: IpAddr = match u16::from_ne_bytes([info[40], info[41]]) {
            family if i32::from(family) == libc::AF_INET => {
                <[u8; 4]>::try_from(address.get(..4)?).ok()?.into()
            }
            _ => <[u8; 16]>::try_from(address).ok()?.into(),
        };
        IpNet::new(address, length).ok()
    };
    let selector = Selector {
        destination: network(&info[..16], info[42])?,
        source: network(&info[16..32], info[43])?,
        protocol: info[44],
    };
    (blocks || transforms).then_some(Policy {
        direction,
        selector: Some(selector),
        blocks,
    })
}

/// A `struct xfrm_userpolicy_default`: what becomes of packets that no policy matches, by direction.
fn default_policies(payload: &[u8]) -> impl Iterator<Item = Policy> {
    let order = [Direction::In, Direction::Forward, Direction::Out];
    payload
        .iter()
        .zip(order)
        .filter(|(action, _)| **action == XFRM_USERPOLICY_BLOCK)
        .map(|(_, direction)| Policy {
            direction,
            selector: None,
            blocks: true,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        network::Route,
        plan::locations::tests::{host, route},
    };

    #[tokio::test]
    async fn where_the_kernel_has_no_policies_one_may_ask_again_and_again() {
        let mut changes = follow(None);
        for _ in 0..2 {
            let next = futures_util::StreamExt::next(&mut changes);
            let heard = tokio::time::timeout(std::time::Duration::from_millis(10), next).await;
            assert!(heard.is_err(), "{heard:?}");
        }
    }

    /// As the kernel writes one.
    fn info(source: &str, destination: &str, direction: u8, action: u8) -> Vec<u8> {
        let mut info = vec![0; POLICY_LENGTH];
        for (at, length_at, network) in [(0, 42, destination), (16, 43, source)] {
            let network: IpNet = network.parse().expect("a literal");
            let (family, octets) = match network.addr() {
                IpAddr::V4(v4) => (libc::AF_INET, v4.octets().to_vec()),
                IpAddr::V6(v6) => (libc::AF_INET6, v6.octets().to_vec()),
            };
            info[at..at + octets.len()].copy_from_slice(&octets);
            info[length_at] = network.prefix_len();
            info[40] = u8::try_from(family).expect("small");
        }
        (info[160], info[161]) = (direction, action);
        info
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).expect("short");
        let mut attribute = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        attribute.extend(value);
        attribute.resize(attribute.len().next_multiple_of(4), 0);
        attribute
    }

    fn with(mut info: Vec<u8>, kind: u16, value: &[u8]) -> Vec<u8> {
        info.extend(attribute(kind, value));
        info
    }

    #[test]
    fn a_policy_is_read_as_the_kernel_writes_it() {
        let out = policy(&info(
            "172.31.0.0/24",
            "198.51.100.9/32",
            1,
            XFRM_POLICY_BLOCK,
        ));
        let shown = out.expect("it blocks").to_string();
        assert_eq!(shown, "out 172.31.0.0/24 -> 198.51.100.9/32 block");
        let tunnel = with(info("fd00::/64", "::/0", 2, 0), XFRMA_TMPL, &[1; 64]);
        let shown = policy(&tunnel).expect("it transforms").to_string();
        assert_eq!(shown, "fwd fd00::/64 -> ::/0 transform");
    }

    #[test]
    fn what_lets_pass_or_is_a_sockets_or_an_xfrm_interfaces_does_not_count() {
        let all = |direction, action| info("0.0.0.0/0", "0.0.0.0/0", direction, action);
        assert_eq!(policy(&all(0, 0)), None, "it lets everything pass");
        assert_eq!(policy(&all(3, XFRM_POLICY_BLOCK)), None, "a socket's");
        let of_interface = with(all(1, XFRM_POLICY_BLOCK), XFRMA_IF_ID, &[7, 0, 0, 0]);
        assert_eq!(policy(&of_interface), None, "an xfrm interface's");
        let of_none = with(all(1, XFRM_POLICY_BLOCK), XFRMA_IF_ID, &[0; 4]);
        assert!(policy(&of_none).is_some());
    }

    #[test]
    fn no_answer_of_the_kernel_is_read_past_its_end() {
        let whole = with(info("fd00::/64", "::/0", 2, 0), XFRMA_TMPL, &[1; 64]);
        for length in 0..whole.len() {
            let _ = policy(&whole[..length]);
            assert_eq!(messages(&whole[..length.min(HEADER_LENGTH)]).count(), 0);
        }
    }

    #[test]
    fn a_default_that_blocks_is_about_everything() {
        let blocks: Vec<_> = default_policies(&[2, 1, 0]).collect();
        assert_eq!(blocks.len(), 1);
        assert_eq!(blocks[0].to_string(), "fwd default block");
        let nothing = std::iter::empty();
        assert!(covering(&blocks, Protocol::Udp, nothing).is_some());
    }

    #[test]
    fn a_policy_covers_what_it_can_match_with_some_client() {
        let covers = |source, destination, protocol: u8| {
            let mut info = info(source, destination, 1, XFRM_POLICY_BLOCK);
            info[44] = protocol;
            let policies: Vec<_> = policy(&info).into_iter().collect();
            let ours = ["198.51.100.2/32", "172.31.0.2/32"];
            let ours = ours.map(|text| text.parse().expect("a literal"));
            covering(&policies, Protocol::Tcp, ours.into_iter()).is_some()
        };
        for (source, destination) in [
            ("0.0.0.0/0", "203.0.113.0/24"), // clients there
            ("203.0.113.0/24", "0.0.0.0/0"),
            ("203.0.113.0/24", "198.51.100.2/32"), // clients of the frontend
            ("172.31.0.0/16", "203.0.113.0/24"),   // the backend's answers
        ] {
            assert!(covers(source, destination, 0), "{source} {destination}");
            assert!(
                covers(source, destination, 6),
                "{source} {destination}, TCP"
            );
            assert!(
                !covers(source, destination, 17),
                "{source} {destination}, UDP"
            );
        }
        assert!(!covers("10.1.0.0/16", "10.2.0.0/16", 0), "other networks");
        assert!(!covers("::/0", "::/0", 0), "the other family");
    }

    #[test]
    fn a_publish_on_one_address_is_not_covered_by_policies_of_the_others() {
        let mut host = host();
        host.policies.push(Policy {
            direction: Direction::Out,
            selector: Some(Selector {
                source: "198.51.100.2/32".parse().expect("a literal"),
                destination: "203.0.113.0/24".parse().expect("a literal"),
                protocol: 0,
            }),
            blocks: false,
        });
        let covered = |spec: &str| {
            let spec = spec.parse().expect("a literal");
            covering_policy(&host, &spec).is_some()
        };
        assert!(covered("8080:172.31.0.2:80"));
        assert!(covered("0.0.0.0:8080:172.31.0.2:80"));
        assert!(covered("198.51.100.2:8080:172.31.0.2:80/udp"));
        assert!(!covered("172.31.0.1:8080:172.31.0.2:80"));
        assert!(covered("172.31.0.1:8080:203.0.113.7:80"), "the backend's");
    }

    #[test]
    fn a_publish_on_every_address_is_covered_by_policies_of_a_local_prefix() {
        let mut host = host();
        host.policies.push(Policy {
            direction: Direction::In,
            selector: Some(Selector {
                source: "198.51.100.9/32".parse().expect("a literal"),
                destination: "203.0.113.5/32".parse().expect("a literal"),
                protocol: 0,
            }),
            blocks: true,
        });
        let spec = "8080:172.31.0.2:80".parse().expect("a literal");
        assert!(covering_policy(&host, &spec).is_none());
        host.routes.insert(Route {
            local: true,
            ..route("203.0.113.0", 28, 1, false)
        });
        assert!(covering_policy(&host, &spec).is_some());
    }
}
