//! Bans: put in force on both paths, kept over restarts, and taken away when their time is over.

use std::{collections::BTreeSet, net::IpAddr, path::Path};

use anyhow::Result;
use forwarder_common::{flow::state, publish::ban};
use ipnet::IpNet;
use tracing::{debug, warn};

use super::{Daemon, reconcile::Loose, view::View};
use crate::{
    control::{
        Named,
        api::{Ban, NamedPublish},
    },
    datapath::{
        maps::FlowTables,
        resets::{self, Resets},
    },
    publish::{
        Bans, Id, Owner, allow,
        bans::{self, Banned, BansFile, NotBanned},
    },
};

impl Daemon {
    /// Bans these sources, or nothing of them: beside those that are, or in their place.
    ///
    /// # Errors
    /// A publish is not there, there is no room for so many, or they cannot be written to disk.
    pub(super) fn ban(&mut self, bans: Vec<Ban>, all: bool) -> Result<Loose> {
        let new = bans.into_iter().map(|ban| {
            let banned = Banned {
                publish: self.banned_from(ban.publish)?,
                network: allow::canonical(ban.network).trunc(),
            };
            Ok((banned, ban.owner, ban.until.and_then(bans::until)))
        });
        let new: Vec<_> = new.collect::<Result<_>>()?;
        let banned: Vec<Banned> = new.iter().map(|(banned, ..)| *banned).collect();
        let change = if all {
            self.idle.bans().replaced_by(new)
        } else {
            let gone = Vec::new();
            bans::Change { new, gone }
        };
        self.change_bans(change)?;
        Ok(Loose {
            banned,
            ..Loose::default()
        })
    }

    /// Takes back what one owner has banned, or what anybody has.
    ///
    /// # Errors
    /// One of them is not banned, or the change cannot be written to disk.
    pub(super) fn unban(
        &mut self,
        networks: &[IpNet],
        publish: Option<NamedPublish>,
        owner: Option<&Owner>,
    ) -> Result<()> {
        let publish = self.banned_from(publish)?;
        let before = self.idle.bans();
        let mut gone = BTreeSet::new();
        for network in networks {
            let network = allow::canonical(*network).trunc();
            let banned = Banned { publish, network };
            let owners = before.owners(banned).map(|(owner, _)| owner);
            let mut owners = owners.filter(|it| owner.is_none_or(|owner| owner == *it));
            let first = owners.next().ok_or_else(|| NotBanned {
                banned,
                owner: owner.cloned(),
            })?;
            gone.extend(
                [first]
                    .into_iter()
                    .chain(owners)
                    .map(|it| (banned, it.clone())),
            );
        }
        drop(before);
        self.change_bans(bans::Change {
            new: Vec::new(),
            gone: gone.into_iter().collect(),
        })
    }

    fn banned_from(&self, publish: Option<NamedPublish>) -> Result<Option<Id>> {
        let publish = publish.map(|publish| Ok(self.find(&Named::try_from(publish)?)?));
        publish.transpose()
    }

    /// Puts what an earlier instance was told in force.
    pub(super) fn begin_bans(&mut self, state: &Path) -> Result<()> {
        let (file, bans) = BansFile::open(state)?;
        self.write_bans(&bans.in_force(bans.iter().map(|(banned, ..)| banned)))?;
        self.idle.ban(|now| *now = bans);
        self.bans_file = Some(file);
        Ok(())
    }

    /// Takes away what is over. The kernel heeds the time itself.
    pub(super) fn expire_bans(&mut self) {
        if let Some(file) = &mut self.bans_file
            && let Err(error) = file.follow_clock(&self.idle.bans())
        {
            warn!("the file of bans has times of the clock before it was set: {error:#}");
        }
        let over = self.idle.bans().over(|id| self.registry.get(id).is_some());
        self.take_away(over);
    }

    /// Takes away what was banned from publishes that are no more.
    pub(super) fn end_bans_of(&mut self, publishes: impl Iterator<Item = Id>) {
        let bans = self.idle.bans();
        let gone = publishes.flat_map(|id| bans.of(id));
        let gone = gone
            .map(|(banned, owner)| (banned, owner.clone()))
            .collect();
        drop(bans);
        self.take_away(gone);
    }

    fn take_away(&mut self, gone: Vec<(Banned, Owner)>) {
        if gone.is_empty() {
            return;
        }
        let change = bans::Change {
            new: Vec::new(),
            gone,
        };
        if let Err(error) = self.change_bans(change) {
            warn!("bans that are over stay for now: {error:#}");
        }
    }

    /// Makes a change in the kernel, on disk and in the proxy; or nowhere.
    fn change_bans(&mut self, change: bans::Change) -> Result<()> {
        tokio::task::block_in_place(|| {
            let before = self.idle.bans();
            let written = self.write_bans(&before.effect(&change)).and_then(|()| {
                let file = self.bans_file.as_mut();
                file.map_or(Ok(()), |file| file.write(&change, &before))
            });
            if written.is_err() {
                let new = change.new.iter().map(|(banned, ..)| *banned);
                let touched = new.chain(change.gone.iter().map(|(banned, _)| *banned));
                if let Err(error) = self.write_bans(&before.in_force(touched)) {
                    warn!("what failed is not all undone: {error:#}");
                }
            }
            drop(before);
            written?;
            self.idle.ban(|bans| bans.apply(&change));
            Ok(())
        })
    }

    /// Makes a change in the kernel. What is banned from a publish is written when that begins, if it has not.
    fn write_bans(&mut self, change: &bans::Effect) -> Result<()> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        let serving = &self.serving;
        let at = |banned: &Banned| {
            let place = match banned.publish {
                None => ban::EVERYWHERE,
                Some(id) => serving.get(&id)?.row.index,
            };
            Some((place, banned.network))
        };
        let new = change.new.iter();
        let new = new.filter_map(|(banned, until)| Some((at(banned)?, *until)));
        datapath.maps.ban_all(&new.collect::<Vec<_>>())?;
        let gone: Vec<_> = change.gone.iter().filter_map(at).collect();
        datapath.maps.unban_all(&gone)
    }
}

/// Ends the flows of sources that are banned now.
///
/// # Errors
/// The kernel refuses.
pub(super) fn end_banned(tables: &mut FlowTables, banned: Vec<Banned>, view: &View) -> Result<()> {
    if banned.is_empty() {
        return Ok(());
    }
    let mut bans = Bans::default();
    bans.apply(&bans::Change {
        new: banned
            .into_iter()
            .map(|banned| (banned, Owner::cli(), None))
            .collect(),
        gone: Vec::new(),
    });
    end_of(tables, |client, place| {
        bans.has(client, view.id(place).unwrap_or_default())
    })
}

/// Ends every flow of sources that are banned from its publish. Both ends of a connection are told, and what goes on of it is dropped with the source.
fn end_of(tables: &mut FlowTables, is_banned: impl Fn(IpAddr, u32) -> bool) -> Result<()> {
    let resets = Resets::open()?;
    tables.change_all(|key, flow, tables| {
        let client: IpAddr = flow.client.into();
        if flow.state() & state::ALIAS != 0 || !is_banned(client, flow.publish()) {
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
