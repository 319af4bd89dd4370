//! Bans: put in force on both paths, kept over restarts, and taken away when their time is over.

use std::{
    net::IpAddr,
    sync::PoisonError,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
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
        bans::{BansFile, Until},
    },
};

impl Daemon {
    /// Bans these sources, or nothing of them: beside those that are, or in their place.
    ///
    /// # Errors
    /// There is no room for so many, or they cannot be written to disk.
    pub(super) fn ban(&mut self, bans: Vec<Ban>, all: bool) -> Result<()> {
        let before = self.bans.clone();
        let mut after = if all { Bans::default() } else { before.clone() };
        let mut new = Vec::with_capacity(bans.len());
        for ban in bans {
            let until = ban
                .until
                .map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
            let network = allow::canonical(ban.network).trunc();
            after.insert(network, until);
            new.push((network, until));
        }
        let gone = before.iter().map(|(network, _)| network);
        let kept: std::collections::HashSet<IpNet> =
            after.iter().map(|(network, _)| network).collect();
        let gone: Vec<IpNet> = gone.filter(|network| !kept.contains(network)).collect();
        tokio::task::block_in_place(|| {
            if let Some(datapath) = &mut self.datapath {
                let timed: Vec<(IpNet, Option<u64>)> = new
                    .iter()
                    .map(|(network, until)| (*network, boot(*until)))
                    .collect();
                let written = datapath.maps.ban_all(&timed);
                let written = written.and_then(|()| datapath.maps.unban_all(&gone));
                if let Err(error) = written.and_then(|()| self.store_bans(&after)) {
                    self.restore_bans(&before, &new);
                    return Err(error);
                }
                Ok(())
            } else {
                self.store_bans(&after)
            }
        })?;
        self.show_bans(after);
        self.end_banned(new.into_iter().map(|(network, _)| network).collect());
        Ok(())
    }

    /// # Errors
    /// One of them is not banned, or the change cannot be written to disk.
    pub(super) fn unban(&mut self, networks: &[IpNet]) -> Result<()> {
        let mut after = self.bans.clone();
        for network in networks {
            let network = allow::canonical(*network);
            let there = after.remove(network);
            there.then_some(()).with_context(|| {
                format!("{network} is not banned; `forwarder bans` shows what is")
            })?;
        }
        self.store_bans(&after)?;
        if let Some(datapath) = &mut self.datapath {
            datapath.maps.unban_all(networks)?;
        }
        self.show_bans(after);
        Ok(())
    }

    /// Puts what an earlier instance was told in force.
    pub(super) fn begin_bans(&mut self, file: BansFile) -> Result<()> {
        let bans = file.read()?;
        if let Some(datapath) = &mut self.datapath {
            let timed = bans.iter().map(|(network, until)| (network, boot(until)));
            datapath.maps.ban_all(&timed.collect::<Vec<_>>())?;
        }
        self.show_bans(bans);
        self.bans_file = Some(file);
        Ok(())
    }

    /// Takes away what is over. The kernel heeds the time itself.
    pub(super) fn expire_bans(&mut self) {
        let mut after = self.bans.clone();
        let over = after.expire();
        if over.is_empty() {
            return;
        }
        let stored = self.store_bans(&after);
        let taken = self
            .datapath
            .as_mut()
            .map_or(Ok(()), |it| it.maps.unban_all(&over));
        if let Err(error) = stored.and(taken) {
            warn!("{error:#}");
        }
        self.show_bans(after);
    }

    fn store_bans(&self, bans: &Bans) -> Result<()> {
        self.bans_file
            .as_ref()
            .map_or(Ok(()), |file| file.write(bans))
    }

    /// After a failure: what the kernel had before.
    fn restore_bans(&mut self, before: &Bans, new: &[(IpNet, Until)]) {
        let Some(datapath) = &mut self.datapath else {
            return;
        };
        let new: Vec<IpNet> = new.iter().map(|(network, _)| *network).collect();
        let timed = before.iter().map(|(network, until)| (network, boot(until)));
        let timed: Vec<_> = timed.collect();
        let undone = datapath
            .maps
            .unban_all(&new)
            .and(datapath.maps.ban_all(&timed));
        if let Err(error) = undone {
            warn!("what failed is not all undone: {error:#}");
        }
    }

    fn show_bans(&mut self, bans: Bans) {
        self.idle.ban(bans.clone());
        *self
            .view
            .bans
            .write()
            .unwrap_or_else(PoisonError::into_inner) = bans.clone();
        self.bans = bans;
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
