//! Wide ranges, held by one socket for each family: attaches the programs that give it what comes for any of the
//! ports (sk_lookup) and refuse them to other processes (cgroup bind), once there is such a range. They go with
//! the process, as the sockets do.

use std::{
    fs::{self, File},
    hash::{BuildHasher as _, RandomState},
    os::fd::AsRawFd,
};

use anyhow::{Context as _, Result};
use aya::programs::{CgroupAttachMode, CgroupSockAddr, SkLookup};
use forwarder_common::publish::socket_index;
use tracing::warn;

use super::{Datapath, explain, program};

/// A mark for our sockets while they are bound, that no other instance has.
pub(super) fn own_mark() -> u32 {
    (RandomState::new().hash_one(std::process::id()) as u32).max(1)
}

impl Datapath {
    /// What a socket is marked with (SO_MARK) while it is bound to a port of a wide range.
    pub fn own_mark(&self) -> u32 {
        self.own_mark
    }

    /// Makes sure that ranges can be held by one socket.
    ///
    /// # Errors
    /// The kernel refuses sk_lookup programs.
    pub fn enable_steering(&mut self) -> Result<()> {
        if self.steering {
            return Ok(());
        }
        let steer: &mut SkLookup = program(&mut self.ebpf, "steer")?;
        steer
            .load()
            .map_err(explain)
            .context("load the program steer")?;
        let netns = File::open("/proc/thread-self/ns/net").context("open the own namespace")?;
        steer
            .attach(netns)
            .context("attach steer to the network namespace")?;
        self.steering = true;
        if let Err(error) = self.guard() {
            warn!("other processes are not kept from binding ports of ranges: {error:#}");
        }
        Ok(())
    }

    fn guard(&mut self) -> Result<()> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
        let root = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find_map(|words| (words.get(2) == Some(&"cgroup2")).then(|| words[1].to_owned()))
            .context("no cgroup v2 is mounted")?;
        for name in ["bind4", "bind6"] {
            let program: &mut CgroupSockAddr = program(&mut self.ebpf, name)?;
            program
                .load()
                .map_err(explain)
                .with_context(|| format!("load the program {name}"))?;
            let cgroup = File::open(&root).with_context(|| root.clone())?;
            program
                .attach(cgroup, CgroupAttachMode::Single)
                .with_context(|| format!("attach {name} to {root}"))?;
        }
        Ok(())
    }

    /// Gives a socket whatever comes for the ports of a publish in one family, until it is closed.
    ///
    /// # Errors
    /// There are too many ranges, or the kernel refuses the socket.
    pub fn steer(&mut self, publish: u32, is_v4: bool, socket: &impl AsRawFd) -> Result<()> {
        self.maps
            .set_socket(socket_index(publish, is_v4), socket.as_raw_fd())
    }
}
