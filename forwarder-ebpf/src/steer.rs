//! Wide ranges, which one socket holds in each family: it gets what comes for any of their ports and the fast path
//! has not taken, and no other process may bind them. What is a wide range is the loader's decision.
//!
//! The kernel still chooses source ports out of a range for the host's own UDP clients, whose answers are theirs.

use core::ptr;

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_CURRENT_NETNS, bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_tuple,
    },
    helpers::{
        bpf_get_netns_cookie, bpf_set_retval, bpf_sk_assign, bpf_sk_lookup_udp, bpf_sk_release,
        bpf_skc_lookup_tcp, bpf_tcp_check_syncookie,
    },
    programs::{SkLookupContext, SockAddrContext, TcContext},
};
use forwarder_common::{
    publish::{flag, own_priority, socket_index},
    reason::Reason,
    tuple::{Address, TCP, UDP},
};

use crate::{
    maps::{ASKED, LOOKING, NETNS, SOCKETS},
    parse::{self, Packet},
    publish::{self, Published},
    setting,
};

/// Set by the loader: the mark of sockets while this instance binds them, which only CAP_NET_ADMIN can set.
#[unsafe(no_mangle)]
static OWN_MARK: u32 = 0;
/// Set by the loader: the kernel can be told which error bind(2) returns (5.18).
#[unsafe(no_mangle)]
static SET_RETVAL: u8 = 0;

/// include/linux/socket.h
const AF_INET: u32 = 2;
const EADDRINUSE: i32 = 98;

/// The kernel looks for a socket: the range's own, if the port is of one.
#[inline(always)]
pub fn steer(ctx: &SkLookupContext) {
    if LOOKING.get(0).is_none_or(|looking| *looking != 0) {
        return;
    }
    let lookup: *const bpf_sk_lookup = ctx.lookup;
    // SAFETY: the context that the kernel gave; its fields are readable.
    // VERIFIER: both addresses are read, each from its own fixed offset. Chosen first, they would be read through a
    // pointer into the context that is computed, which is refused.
    let (is_v4, v4, v6, port, protocol) = unsafe {
        (
            (*lookup).family == AF_INET,
            ptr::read_volatile(&raw const (*lookup).local_ip4),
            ptr::read_volatile(&raw const (*lookup).local_ip6),
            (*lookup).local_port,
            (*lookup).protocol,
        )
    };
    let address = if is_v4 {
        Address::from_v4(v4)
    } else {
        Address(v6)
    };
    if let Some(published) = publish::at(&address, (port as u16).to_be(), protocol as u8)
        && is_steered(&published)
    {
        // Without a socket, the kernel goes on looking as if this program were not there.
        let _ = SOCKETS.redirect_sk_lookup(ctx, socket_index(published.index, is_v4), 0);
    }
}

#[inline(always)]
fn is_steered(published: &Published) -> bool {
    published.publish.flags & (flag::STEERED | flag::DRAINING) == flag::STEERED
}

/// Whether a process may bind an address.
#[inline(always)]
pub fn may_bind(ctx: &SockAddrContext, is_v4: bool) -> bool {
    // SAFETY: the context that the kernel gave; its fields are readable, the socket behind it as well. The helper
    // takes the context.
    let (address, port, protocol, mark, netns) = unsafe {
        let request: *const bpf_sock_addr = ctx.sock_addr;
        let address = if is_v4 {
            Address::from_v4((*request).user_ip4)
        } else {
            // VERIFIER: as above.
            Address(ptr::read_volatile(&raw const (*request).user_ip6))
        };
        let (port, protocol) = ((*request).user_port as u16, (*request).protocol as u8);
        let mark = (*(*request).__bindgen_anon_1.sk).mark;
        let netns = bpf_get_netns_cookie(ctx.sock_addr.cast());
        (address, port, protocol, mark, netns)
    };
    if mark == setting(&OWN_MARK) {
        let _ = NETNS.set(0, &netns, 0);
        return true;
    }
    let here = NETNS.get(0).is_some_and(|ours| *ours == netns);
    if !here
        || !publish::at(&address, port, protocol).is_some_and(|published| is_steered(&published))
    {
        return true;
    }
    if setting(&SET_RETVAL) != 0 {
        // SAFETY: a helper without pointers.
        unsafe { bpf_set_retval(-EADDRINUSE) };
    }
    false
}

/// A datagram for a port of a range that begins no flow if some socket of this host has the port: it is given to
/// that socket, since the kernel would steer it away from one that is not connected.
///
/// # Errors
/// `OtherSocket` if there is one.
#[inline(always)]
pub fn give_way(ctx: &TcContext, packet: &Packet, published: &Published) -> Result<(), Reason> {
    if packet.protocol != UDP || !is_steered(published) {
        return Ok(());
    }
    // The sockets that hold the range itself are bound to its first port.
    if u16::from_be(packet.tuple.destination_port) == published.publish.first_port {
        return Ok(());
    }
    give(ctx.skb.skb, packet)
}

// VERIFIER: a function of its own, for its share of the stack.
#[inline(never)]
fn give(skb: *mut __sk_buff, packet: &Packet) -> Result<(), Reason> {
    let socket = find_by_tuple(skb, packet, false);
    if socket.is_null() {
        return Ok(());
    }
    // SAFETY: a socket that was found stays until it is released.
    unsafe {
        let others = (*socket).priority != own_priority(setting(&OWN_MARK));
        if others {
            bpf_sk_assign(skb.cast(), socket.cast(), 0);
        }
        bpf_sk_release(socket.cast());
        if others {
            return Err(Reason::OtherSocket);
        }
    }
    Ok(())
}

/// `TCP_LISTEN` (include/net/tcp_states.h): such a socket hears no answers.
const LISTENS: u32 = 10;

/// Whether a socket of this host hears what the backend would answer to the packet with its new tuple.
// VERIFIER: as above.
#[inline(never)]
pub fn has_socket(skb: *mut __sk_buff, packet: &Packet) -> bool {
    let (new, is_tcp) = (&packet.new, packet.protocol == TCP);
    let (from, to) = (&new.destination, &new.source);
    let ports = (new.destination_port, new.source_port);
    let socket = find(skb, [from, to], ports, packet.is_v4, is_tcp);
    if socket.is_null() {
        return false;
    }
    // SAFETY: as above.
    unsafe {
        let hears = !is_tcp || (*socket).state != LISTENS;
        bpf_sk_release(socket.cast());
        hears
    }
}

/// `TCP_CLOSE`: a UDP socket that is not connected is in that state.
const NOT_CONNECTED: u32 = 7;

/// Whether a client on this host sends from the address that its socket has, and not from one that the firewall has put in
/// its place.
#[inline(always)]
pub fn has_own_source(skb: *mut __sk_buff, packet: &Packet) -> bool {
    let (from, to) = (&packet.tuple.source, &packet.tuple.destination);
    // What the kernel chooses if a client does not. Others have to be connected, or it cannot be told.
    if from == to || from.is_loopback() && to.is_loopback() {
        true
    } else if packet.protocol == TCP {
        is_of_socket::<true>(skb, packet)
    } else {
        is_of_socket::<false>(skb, packet)
    }
}

// VERIFIER: as above; and one for each protocol, since the sockets that the helpers find are of two types.
#[inline(never)]
fn is_of_socket<const IS_TCP: bool>(skb: *mut __sk_buff, packet: &Packet) -> bool {
    let tuple = &packet.tuple;
    let addresses = [&tuple.destination, &tuple.source];
    let ports = (tuple.destination_port, tuple.source_port);
    let socket = find(skb, addresses, ports, packet.is_v4, IS_TCP);
    if socket.is_null() {
        return false;
    }
    // SAFETY: as above.
    unsafe {
        let other = if IS_TCP { LISTENS } else { NOT_CONNECTED };
        let connected = (*socket).state != other;
        bpf_sk_release(socket.cast());
        connected
    }
}

/// Whether a socket of this host has the TCP packet's connection: it is connected, or a listening one that has answered the
/// SYN and kept nothing of it (a SYN cookie).
// VERIFIER: as above.
#[inline(never)]
pub fn is_connected(skb: *mut __sk_buff, packet: &Packet) -> bool {
    let socket = find_by_tuple(skb, packet, true);
    if socket.is_null() {
        return false;
    }
    // SAFETY: as above. The headers' bounds were checked, and their lengths are those of the structures.
    unsafe {
        let mut connected = (*socket).state != LISTENS;
        if !connected && let Some((ip, length, tcp)) = parse::headers(&TcContext::new(skb), packet)
        {
            let tcp_length = size_of::<parse::Tcp>() as u32;
            let cookie = bpf_tcp_check_syncookie(socket.cast(), ip, length, tcp.cast(), tcp_length);
            connected = cookie == 0;
        }
        bpf_sk_release(socket.cast());
        connected
    }
}

#[inline(always)]
fn find_by_tuple(skb: *mut __sk_buff, packet: &Packet, is_tcp: bool) -> *mut bpf_sock {
    let tuple = &packet.tuple;
    let ports = (tuple.source_port, tuple.destination_port);
    let addresses = [&tuple.source, &tuple.destination];
    find(skb, addresses, ports, packet.is_v4, is_tcp)
}

/// The socket of this host that hears what comes from one address and port to another, as if no program steered any away
/// from it. The caller releases it.
#[inline(always)]
fn find(
    skb: *mut __sk_buff,
    [from, to]: [&Address; 2],
    ports: (u16, u16),
    is_v4: bool,
    is_tcp: bool,
) -> *mut bpf_sock {
    let Some(looking) = LOOKING.get_ptr_mut(0) else {
        return ptr::null_mut(); // there is an element 0
    };
    let Some(asked) = ASKED.get_ptr_mut(0) else {
        return ptr::null_mut();
    };
    let asked: *mut bpf_sock_tuple = asked.cast();
    // SAFETY: the helper reads as many bytes of the tuple as it is told; both shapes fit into it, and all of either is
    // written. The elements belong to this CPU, and tc programs are not preempted by one another on a CPU; the program
    // that reads the first runs inside of the helper.
    unsafe {
        let names = &mut (*asked).__bindgen_anon_1;
        let size = if is_v4 {
            names.ipv4.saddr = from.v4();
            names.ipv4.daddr = to.v4();
            names.ipv4.sport = ports.0;
            names.ipv4.dport = ports.1;
            size_of_val(&names.ipv4)
        } else {
            names.ipv6.saddr = from.0;
            names.ipv6.daddr = to.0;
            names.ipv6.sport = ports.0;
            names.ipv6.dport = ports.1;
            size_of_val(&names.ipv6)
        } as u32;
        let netns = BPF_F_CURRENT_NETNS as i64 as u64;
        ptr::write_volatile(looking, 1);
        let socket = if is_tcp {
            bpf_skc_lookup_tcp(skb.cast(), asked, size, netns, 0)
        } else {
            bpf_sk_lookup_udp(skb.cast(), asked, size, netns, 0)
        };
        ptr::write_volatile(looking, 0);
        socket
    }
}
