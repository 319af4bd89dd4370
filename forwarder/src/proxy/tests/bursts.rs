//! Datagrams that come faster than the proxy reads them, so that it has several at a time.

use std::{
    collections::HashMap,
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd as _,
};

use proptest::{
    prelude::{Strategy, any, prop},
    test_runner::{Config, TestRunner},
};
use socket2::SockRef;

use super::{DEADLINE, serve};
use crate::proxy::{Options, batch::receive};

fn socket(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).expect("bound");
    socket.set_read_timeout(Some(*DEADLINE)).expect("a timeout");
    let room = SockRef::from(&socket).set_recv_buffer_size(4 << 20);
    room.expect("a buffer");
    socket
}

/// Datagrams of some clients in turn, as pairs of client and length; runs of one length, each with one that may be shorter, are
/// frequent. A socket has room for all of them (net.core.rmem_default).
fn bursts() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let length = prop::sample::select(vec![0, 1, 2, 100, 1200]);
    let run = (0..3_usize, length, 1..12_usize, any::<bool>());
    let run = run.prop_map(|(client, length, count, is_shorter)| {
        let last = length - usize::from(is_shorter && length > 0);
        let whole = std::iter::repeat_n((client, length), count - 1);
        whole.chain([(client, last)]).collect::<Vec<_>>()
    });
    prop::collection::vec(run, 1..5).prop_map(|runs| runs.concat())
}

/// Its number in the beginning, as far as there is room, and then that again and again.
fn datagram(number: usize, length: usize) -> Vec<u8> {
    let octets = (number as u32).to_be_bytes();
    octets.into_iter().cycle().take(length).collect()
}

fn run(check: impl Fn(Vec<(usize, usize)>)) {
    let mut runner = TestRunner::new(Config {
        cases: 48,
        failure_persistence: None,
        ..Config::default()
    });
    let checked = runner.run(&bursts(), |burst| {
        check(burst);
        Ok(())
    });
    checked.expect("every burst");
}

/// What each client's datagrams were, in their order.
fn by_client(burst: &[(usize, usize)]) -> HashMap<usize, Vec<Vec<u8>>> {
    let mut all = HashMap::<_, Vec<_>>::new();
    for (number, &(client, length)) in burst.iter().enumerate() {
        all.entry(client)
            .or_default()
            .push(datagram(number, length));
    }
    all
}

#[test]
fn what_goes_on_together_is_divided_where_it_was() {
    let reader = socket("127.0.0.1:0");
    let to = reader.local_addr().expect("bound");
    let clients = [(); 3].map(|()| socket("127.0.0.1:0"));
    let own = |client: usize| clients[client].local_addr().expect("bound");
    let check = |burst: Vec<(usize, usize)>| {
        for (number, &(client, length)) in burst.iter().enumerate() {
            let sent = clients[client].send_to(&datagram(number, length), to);
            sent.expect("sent");
        }
        let (mut got, mut calls) = (Vec::new(), 0);
        while got.len() < burst.len() {
            let received = receive(reader.as_fd(), |data, source, about| {
                calls += 1;
                let whole: Vec<u8> = data.iter().flat_map(|it| it.iter().copied()).collect();
                let size = match about.segment {
                    0 => whole.len().max(1),
                    size => size.into(),
                };
                let mut parts: Vec<Vec<u8>> = whole.chunks(size).map(Into::into).collect();
                parts.resize(parts.len().max(1), Vec::new()); // an empty one
                got.extend(parts.into_iter().map(|it| (source, it)));
            });
            received.expect("all are there");
        }
        let sent = burst.iter().enumerate();
        let sent =
            sent.map(|(number, &(client, length))| (Some(own(client)), datagram(number, length)));
        assert_eq!(got, sent.collect::<Vec<_>>());
        let pairs = burst.windows(2).filter(|pair| pair[0] == pair[1]);
        let saved = pairs.filter(|pair| pair[0].1 > 0).count();
        // A batch may end between two, and a packet be full.
        let octets: usize = burst.iter().map(|(_, length)| length).sum();
        let apart = burst.len() / 32 + octets / 60_000;
        assert!(calls + saved <= burst.len() + apart, "{calls} calls");
    };
    check(vec![(0, 9000); 8]);
    run(check);
}

#[test]
fn bursts_pass_in_order_and_undivided_both_ways() {
    let backend = socket("127.0.0.1:0");
    let to = backend.local_addr().expect("bound");
    let served = serve("127.0.0.1", to, "udp", Options::default());
    let clients = [(); 3].map(|()| socket("127.0.0.1:0"));
    run(|burst| {
        for (number, &(client, length)) in burst.iter().enumerate() {
            let sent = clients[client].send_to(&datagram(number, length), served.frontend);
            sent.expect("sent");
        }
        let mut arrived = HashMap::<SocketAddr, Vec<Vec<u8>>>::new();
        let mut buffer = vec![0; 1 << 16];
        for _ in &burst {
            let (length, proxy) = backend.recv_from(&mut buffer).expect("carried");
            arrived
                .entry(proxy)
                .or_default()
                .push(buffer[..length].into());
        }
        for (proxy, datagrams) in &arrived {
            for it in datagrams {
                backend.send_to(it, proxy).expect("sent back");
            }
        }
        let sent = by_client(&burst);
        for (client, datagrams) in &sent {
            for expected in datagrams {
                let (length, from) = clients[*client].recv_from(&mut buffer).expect("answered");
                assert_eq!((&buffer[..length], from), (&expected[..], served.frontend));
            }
        }
        assert_eq!(arrived.len(), sent.len());
    });
}
