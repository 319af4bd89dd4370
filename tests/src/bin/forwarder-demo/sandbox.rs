//! The demonstration without root: a user namespace in which the user is root, with a network of
//! its own, and a way in for the browser.

use std::{
    fs, io,
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    thread,
};

use anyhow::{Context, Result};
use forwarder_tests::netns::Netns;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::{getegid, geteuid},
};

/// Moves this process, which must have one thread, into namespaces of its own.
pub(crate) fn enter() -> Result<()> {
    let (user, group) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .context("make a user namespace")?;
    fs::write("/proc/self/setgroups", "deny").context("deny setgroups")?;
    fs::write("/proc/self/uid_map", format!("0 {user} 1")).context("map the user")?;
    fs::write("/proc/self/gid_map", format!("0 {group} 1")).context("map the group")?;

    // The daemon's control socket is below /run, where only the real root may write.
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("own mounts")?;
    mount(none, "/run", Some("tmpfs"), MsFlags::empty(), none).context("an own /run")?;
    Netns::current()?.ip("link set lo up")
}

/// Passes connections that arrive on `listener`, which was made outside, on to the published port
/// inside.
pub(crate) fn relay(listener: TcpListener, port: u16) {
    thread::spawn(move || {
        for outer in listener.incoming().flatten() {
            // A published port that is not up yet, or no more, closes the connection.
            let Ok(inner) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
                continue;
            };
            let (Ok(outer_too), Ok(inner_too)) = (outer.try_clone(), inner.try_clone()) else {
                continue;
            };
            thread::spawn(move || pass(outer, inner));
            thread::spawn(move || pass(inner_too, outer_too));
        }
    });
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    // However it ended, the other side learns that no more comes.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}
