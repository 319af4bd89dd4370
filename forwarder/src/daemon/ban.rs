//! Bans: put in force on both paths, kept over restarts, and taken away when their time is over.

use std::{
    collections::{BTreeSet, HashSet},
    net::IpAddr,
    time::SystemTime,
};

use anyhow::Result;
use forwarder_common::flow::state;
use ipnet::IpNet;
use tracing::{debug, warn};

use super::Daemon;
use crate::{
    control::api::Ban,
    datapath::{
        maps::{FlowTables, boot_time},
        resets::{self, Resets},
    },
    publish::{
        Bans, allow,
        bans::{self, BansFile, NotBanned, Until},
    },
};

impl Daemon {
    /// Bans these sources, or nothing of them: beside those that are, or in their place.
    ///
    /// # Errors
    /// There is no room for so many, or they cannot be written to disk.
    pub(super) fn ban(&mut self, bans: Vec<Ban>, all: bool) -> Result<()> {
        let before = self.idle.bans();
        let mut after = if all {
            Bans::default()
        } else {
            Bans::clone(&before)
        };
        let mut new = Vec::with_capacity(bans.len());
        for ban in bans {
            let until = ban.until.and_then(bans::until);
            let network = allow::canonical(ban.network).trunc();
            after.insert(network, until);
            new.push((network, until));
        }
        let kept: HashSet<IpNet> = after.iter().map(|(network, _)| network).collect();
        let gone = before.iter().map(|(network, _)| network);
        let gone: Vec<IpNet> = gone.filter(|network| !kept.contains(network)).collect();
        self.change_bans(after, &new, &gone)?;
        self.end_banned(new.into_iter().map(|(network, _)| network).collect());
        Ok(())
    }

    /// # Errors
    /// One of them is not banned, or the change cannot be written to disk.
    pub(super) fn unban(&mut self, networks: &[IpNet]) -> Result<()> {
        let mut after = Bans::clone(&self.idle.bans());
        let networks: BTreeSet<IpNet> = networks
            .iter()
            .map(|network| allow::canonical(*network).trunc())
            .collect();
        for network in &networks {
            if !after.remove(*network) {
                return Err(NotBanned(*network).into());
            }
        }
        let gone: Vec<IpNet> = networks.into_iter().collect();
        self.change_bans(after, &[], &gone)
    }

    /// Puts what an earlier instance was told in force.
    pub(super) fn begin_bans(&mut self, file: BansFile) -> Result<()> {
        let bans = file.read()?;
        if let Some(datapath) = &mut self.datapath {
            datapath.maps.ban_all(&timed(bans.iter()))?;
        }
        self.idle.ban(bans);
        self.bans_file = Some(file);
        Ok(())
    }

    /// Takes away what is over. The kernel heeds the time itself.
    pub(super) fn expire_bans(&mut self) {
        let before = self.idle.bans();
        if !before.any_is_over() {
            return;
        }
        let mut after = Bans::clone(&before);
        let over = after.expire();
        if let Err(error) = self.change_bans(after, &[], &over) {
            warn!("bans that are over stay for now: {error:#}");
        }
    }

    /// Makes these all the bans there are: in the kernel, of which they differ by what is `new` there and what is
    /// `gone`, on disk and in the proxy; or nowhere.
    fn change_bans(&mut self, after: Bans, new: &[(IpNet, Until)], gone: &[IpNet]) -> Result<()> {
        tokio::task::block_in_place(|| {
            let written = self.datapath.as_mut().map_or(Ok(()), |datapath| {
                datapath.maps.ban_all(&timed(new.iter().copied()))?;
                datapath.maps.unban_all(gone)
            });
            let stored = written.and_then(|()| match &self.bans_file {
                Some(file) => file.write(&after),
                None => Ok(()),
            });
            if stored.is_err() {
                self.restore_bans(new);
            }
            stored
        })?;
        self.idle.ban(after);
        Ok(())
    }

    /// After a failure: what the kernel had before.
    fn restore_bans(&mut self, new: &[(IpNet, Until)]) {
        let Some(datapath) = &mut self.datapath else {
            return;
        };
        let new: Vec<IpNet> = new.iter().map(|(network, _)| *network).collect();
        let before = timed(self.idle.bans().iter());
        let undone = datapath
            .maps
            .unban_all(&new)
            .and(datapath.maps.ban_all(&before));
        if let Err(error) = undone {
            warn!("what failed is not all undone: {error:#}");
        }
    }

    /// Ends the flows of sources that are banned now, beside the daemon's other work.
    fn end_banned(&self, networks: Vec<IpNet>) {
        let Some(datapath) = &self.datapath else {
            return;
        };
        let mut bans = Bans::default();
        for network in networks {
            bans.insert(network, None);
        }
        match datapath.maps.flows.try_clone() {
            Ok(mut tables) => {
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = end_of(&mut tables, &bans) {
                        warn!("flows of banned sources are left: {error:#}");
                    }
                });
            }
            Err(error) => warn!("flows of banned sources are left: {error:#}"),
        }
    }
}

/// As the kernel's tables have them.
fn timed(bans: impl Iterator<Item = (IpNet, Until)>) -> Vec<(IpNet, Option<u64>)> {
    bans.map(|(network, until)| (network, boot(until)))
        .collect()
}

/// When a ban ends by CLOCK_BOOTTIME.
fn boot(until: Until) -> Option<u64> {
    let left = until?.duration_since(SystemTime::now()).unwrap_or_default();
    let left = u64::try_from(left.as_nanos()).unwrap_or(u64::MAX);
    Some(boot_time().saturating_add(left))
}

/// Ends every flow of these sources. Both ends of a connection are told, and what goes on of it is dropped with the source.
fn end_of(tables: &mut FlowTables, bans: &Bans) -> Result<()> {
    let resets = Resets::open()?;
    tables.change_all(|key, flow, tables| {
        let client: IpAddr = flow.client.into();
        if flow.state & state::ALIAS != 0 || !bans.has(client) {
            return Ok(());
        }
        let ended = tables.end(key, |there| there.client == flow.client)?;
        if let Some(flow) = ended
            && resets::is_open(key, &flow)
            && let Err(error) = resets.send(key, &flow)
        {
            debug!("{error:#}");
        }
        Ok(())
    })
}
