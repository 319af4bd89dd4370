//! The demonstration: containers, another machine and a web server, all made here, published by
//! `forwarder`, and every kind of client checked. Stays up for a browser until Ctrl-C and removes
//! what it made. `http` serves what `site` answers; `page` says it in HTML, with what `watch` reads.
//!
//! As root it surrounds this machine's own namespace, whose real addresses are never published.
//! Without root it does the same in a namespace of the user's own (`sandbox`).

mod checks;
mod http;
mod page;
mod sandbox;
mod site;
mod template;
mod watch;
mod who;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    process::ExitCode,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread,
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use forwarder_tests::{
    daemon::{Daemon, Datapath},
    netns::Netns,
    topology::{Family, Network, Plan, Topology},
};
use nix::sys::signal::{SigSet, Signal};

use crate::{site::Site, who::Addresses};

/// Publishes a built-in web server with forwarder, checks every kind of client, and stays up.
#[derive(Parser)]
#[command(name = "forwarder-demo")]
struct Options {
    /// End after the checks
    #[arg(long)]
    once: bool,
    /// The published port
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// How forwarder is to carry packets: auto, ebpf, userland [default: auto as root, else userland]
    #[arg(long, value_parser = datapath)]
    datapath: Option<Datapath>,
}

fn datapath(name: &str) -> Result<Datapath> {
    let all = [Datapath::Auto, Datapath::Ebpf, Datapath::Userland];
    let named = all.into_iter().find(|datapath| datapath.name() == name);
    named.context("one of auto, ebpf, userland")
}

/// Where the web server listens in its container.
const BACKEND_PORT: u16 = 80;

fn main() -> ExitCode {
    let options = Options::parse();
    match demonstrate(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Devices and addresses that are unlikely to be in use: RFC 2544's and RFC 4193's.
fn plan() -> Plan {
    let network = |number: u8| Network {
        v4: [198, 18, number],
        v6: [0xfd46, 0x7764, 0x656d, u16::from(number)],
    };
    Plan {
        uplink: "fwd-demo-lan",
        bridges: ["fwd-demo0", "fwd-demo1"],
        veth: "fwd-d-",
        lan: network(100),
        bridged: [network(0), network(1)],
        routed: network(44),
    }
}

/// Returns whether every client was served as it should be.
fn demonstrate(options: &Options) -> Result<bool> {
    let port = options.port;
    let listener = free_port(port)?;
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block()?;

    let root = nix::unistd::geteuid().is_root() && Netns::new("probe").is_ok();
    let datapath = options.datapath.unwrap_or(if root {
        Datapath::Auto
    } else {
        Datapath::Userland
    });
    if root {
        drop(listener);
    } else {
        println!("Without root: a namespace of your own, and forwarding in user space.\n");
        sandbox::enter().context(
            "no user namespace for this user either; run the demonstration as root or with sudo",
        )?;
        sandbox::relay(listener, port);
    }
    let interrupted = wait_in_background(signals);

    let topology = Topology::around_here(plan()).context("the demonstration's network")?;
    let site = Arc::new(Site::new(Addresses::of(&topology), !root));
    let answering = Arc::clone(&site);
    http::start(&topology.backend.netns, BACKEND_PORT, move |request| {
        answering.answer(request)
    })?;
    let specs = specs(&topology, port);
    let specs: Vec<_> = specs.iter().map(String::as_str).collect();
    let daemon = Daemon::start(&topology.host, &specs, datapath)?;

    let command = format!(
        "forwarder run --datapath {}{}",
        datapath.name(),
        shown(&specs)
    );
    println!("$ {command}\n");
    // Set once; visitors until then are shown none.
    let _ = site.daemon.set((command, daemon.instance().to_owned()));

    let good = thread::scope(|scope| {
        scope.spawn(|| site.watch.read(|| watch::documents(&daemon)));
        let _ending = site.watch.ending();
        stay_up(options, root, &topology, &daemon, &site, &interrupted)
    })?;
    daemon.stop()?;
    Ok(good)
}

/// Checks every client, then waits for the end unless that is now. Returns whether every client was served as it should be.
fn stay_up(
    options: &Options,
    root: bool,
    topology: &Topology,
    daemon: &Daemon,
    site: &Site,
    interrupted: &Receiver<()>,
) -> Result<bool> {
    let port = options.port;
    let note = |row| site.change_checks(|checks| checks.rows.push(row));
    let good = checks::check(topology, daemon, port, interrupted, note)?;
    site.change_checks(|checks| checks.done = true);
    if !root {
        println!(
            "\nWith root the same ports are forwarded by eBPF in the kernel, several times faster,\n\
             and the backend sees its clients' own addresses: sudo -v && cargo xtask run"
        );
    }
    if !options.once && interrupted.try_recv().is_err() {
        println!("\nOpen http://127.0.0.1:{port}/ to see your own packets' way, live; or curl it.");
        println!("Ctrl-C ends it and removes everything.");
        // An error means that nobody waits any more, which is an end as well.
        let _ = interrupted.recv();
        println!();
    }
    Ok(good)
}

/// Makes sure that nobody has the port on either loopback address; returns the IPv4 listener.
fn free_port(port: u16) -> Result<TcpListener> {
    let bind = |address: IpAddr| match TcpListener::bind((address, port)) {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            bail!("port {port} on {address} is taken: choose another with --port N")
        }
        other => other.with_context(|| format!("listen on {}", SocketAddr::new(address, port))),
    };
    bind(Ipv6Addr::LOCALHOST.into())?;
    bind(Ipv4Addr::LOCALHOST.into())
}

/// The publishes: loopback and the addresses that the demonstration itself added, never all.
fn specs(topology: &Topology, port: u16) -> Vec<String> {
    let Topology {
        backend,
        other,
        ptp,
        ..
    } = topology;
    let mut specs = Vec::new();
    for family in [Family::V4, Family::V6] {
        let to = SocketAddr::new(backend.address(family), BACKEND_PORT);
        let gateways = [backend, other, ptp].map(|container| container.gateway(family));
        for address in [family.localhost(), topology.host_address(family)]
            .into_iter()
            .chain(gateways)
        {
            specs.push(format!("{}:{to}", SocketAddr::new(address, port)));
        }
    }
    specs
}

fn shown(specs: &[&str]) -> String {
    specs
        .iter()
        .map(|spec| format!(" \\\n    -p {spec}"))
        .collect()
}

/// Waits for one of the (blocked) signals in a thread, which says so on the channel.
fn wait_in_background(signals: SigSet) -> Receiver<()> {
    let (sender, receiver) = channel();
    std::thread::spawn(
        move || {
            while signals.wait().is_ok() && sender.send(()).is_ok() {}
        },
    );
    receiver
}
