//! Wide ranges, held by one socket for each family: attaches the programs that give it what comes for any of the
//! ports (sk_lookup) and refuse them to other processes (cgroup bind), once there is such a range. They go with
//! the process, as the sockets do.

use std::{
    fs::File,
    hash::{BuildHasher as _, RandomState},
    os::fd::{AsFd as _, AsRawFd},
};

use anyhow::{Context as _, Result};
use aya::programs::{CgroupSockAddr, SkLookup};
use forwarder_common::publish::socket_index;
use tracing::warn;

use super::{
    Datapath, explain,
    kernel::cgroup,
    link::{As, Link},
    number, program,
};

/// The links of the programs: those of the second kind where the kernel and cgroups allow them.
#[derive(Debug)]
pub(super) struct Steering {
    steer: Link,
    guards: Vec<(&'static str, Link)>,
    /// They could not be attached again, which was said.
    failing: bool,
}

/// The programs that refuse ports to other processes.
const GUARDS: [(&str, As); 2] = [("bind4", As::CgroupBind4), ("bind6", As::CgroupBind6)];

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
        if self.steering.is_some() {
            return Ok(());
        }
        let steer: &mut SkLookup = program(&mut self.ebpf, "steer")?;
        steer
            .load()
            .map_err(explain)
            .context("load the program steer")?;
        let steer = self.attach_steer()?;
        let mut guards = Vec::new();
        for (name, kind) in GUARDS {
            match self
                .load_guard(name)
                .and_then(|()| self.attach_guard(name, kind))
            {
                Ok(link) => guards.push((name, link)),
                Err(error) => {
                    warn!("other processes are not kept from binding ports of ranges: {error:#}");
                    break;
                }
            }
        }
        self.steering = Some(Steering {
            steer,
            guards,
            failing: false,
        });
        Ok(())
    }

    fn attach_steer(&mut self) -> Result<Link> {
        let steer: &mut SkLookup = program(&mut self.ebpf, "steer")?;
        let netns = File::open("/proc/thread-self/ns/net").context("open the own namespace")?;
        let netns = netns.as_raw_fd().cast_unsigned();
        Link::create(steer.fd()?.as_fd(), netns, As::SkLookup, 0)
            .context("attach steer to the network namespace")
    }

    fn load_guard(&mut self, name: &str) -> Result<()> {
        let guard: &mut CgroupSockAddr = program(&mut self.ebpf, name)?;
        let loaded = guard.load().map_err(explain);
        loaded.with_context(|| format!("load the program {name}"))
    }

    fn attach_guard(&mut self, name: &str, kind: As) -> Result<Link> {
        let root = cgroup().context("no cgroup v2 is mounted")?;
        let guard: &mut CgroupSockAddr = program(&mut self.ebpf, name)?;
        let cgroup = File::open(&root).with_context(|| root.clone())?;
        let cgroup = cgroup.as_raw_fd().cast_unsigned();
        Link::create(guard.fd()?.as_fd(), cgroup, kind, 0)
            .with_context(|| format!("attach {name} to {root}"))
    }

    /// Attaches those again that somebody has detached, or has had run another program. Returns their names.
    pub fn heal_steering(&mut self) -> Vec<&'static str> {
        let Some(mut steering) = self.steering.take() else {
            return Vec::new();
        };
        let healed = self.heal_links(&mut steering);
        let failed_before = std::mem::replace(&mut steering.failing, healed.is_err());
        self.steering = Some(steering);
        healed.unwrap_or_else(|error| {
            if !failed_before {
                warn!("somebody detached a program of wide ranges: {error:#}");
            }
            Vec::new()
        })
    }

    fn heal_links(&mut self, steering: &mut Steering) -> Result<Vec<&'static str>> {
        let mut again = Vec::new();
        let steer: &mut SkLookup = program(&mut self.ebpf, "steer")?;
        if !steering.steer.runs(number(steer.info())) {
            steering.steer = self.attach_steer()?;
            again.push("steer");
        }
        for (name, kind) in GUARDS {
            let guard: &mut CgroupSockAddr = program(&mut self.ebpf, name)?;
            let number = number(guard.info());
            let mut guards = steering.guards.iter_mut();
            if let Some((_, link)) = guards.find(|it| it.0 == name && !it.1.runs(number)) {
                *link = self.attach_guard(name, kind)?;
                again.push(name);
            }
        }
        Ok(again)
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
