//! What the kernel has of publishes: written, left to the proxy where it takes nothing, taken back. What is to be there is
//! decided in `plan.rs`.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use forwarder_common::{
    publish::{Publish as PublishEntry, flag},
    tuple::{Tuple, UDP},
};
use tracing::{debug, info, warn};

use super::{
    Daemon,
    view::{Row, delivery_name},
};
use crate::{
    config::DatapathChoice,
    datapath::Datapath,
    network::Snapshot,
    plan::{self, Planned, Unserved},
    proxy::Meter,
    publish::Id,
};

impl Daemon {
    /// Decides how a publish is served now, writes that to the kernel if it has changed, and shows it. If the kernel takes
    /// nothing of one, the proxy serves it meanwhile.
    pub(super) fn install(&mut self, id: Id) -> Result<()> {
        let Err(error) = self.write_to_kernel(id) else {
            return Ok(());
        };
        let is_left = self.may_be_left_to_the_proxy(id);
        let Some(serving) = self.serving.get_mut(&id) else {
            return Err(error);
        };
        let spec = &serving.row.wanted.publish.spec;
        if !is_left {
            return Err(error.context(format!("publish {spec}")));
        }
        let unserved = Some(Unserved::Refused(format!("{error:#}")));
        if serving.row.unserved != unserved {
            warn!("publish {spec} is served in user space for now: {error:#}");
            let row = Arc::make_mut(&mut serving.row);
            (row.delivery, row.xdp, row.unserved) = (None, None, unserved);
        }
        self.view.show(&serving.row);
        Ok(())
    }

    /// Whether nothing in the kernel leads new clients of a publish anywhere.
    fn may_be_left_to_the_proxy(&self, id: Id) -> bool {
        let (Some(serving), Some(datapath)) = (self.serving.get(&id), &self.datapath) else {
            return false;
        };
        let leads = |place| {
            let flags = datapath.maps.flags(place);
            flags.is_some_and(|flags| flags & flag::DRAINING == 0)
        };
        let is_asked_for = self.config.datapath == DatapathChoice::Ebpf;
        !is_asked_for && ![serving.row.index, serving.previous].into_iter().any(leads)
    }

    /// Tries again what the kernel has refused; what it refuses still keeps the others waiting.
    pub(super) fn install_refused(&mut self) -> Result<()> {
        let refused = self.serving.iter().filter(|(_, it)| it.is_refused());
        let refused: Vec<Id> = refused.map(|(id, _)| *id).collect();
        for id in refused {
            self.install(id)?;
            let Some(serving) = self.serving.get(&id).filter(|it| !it.is_refused()) else {
                break;
            };
            let spec = &serving.row.wanted.publish.spec;
            info!("the kernel takes publish {spec} again");
        }
        Ok(())
    }

    fn write_to_kernel(&mut self, id: Id) -> Result<()> {
        let Some(serving) = self.serving.get_mut(&id) else {
            return Ok(());
        };
        if let Some(datapath) = &mut self.datapath {
            if datapath.maps.limits(serving.row.index) != serving.limits {
                datapath
                    .maps
                    .set_limits(serving.row.index, &serving.limits)?;
            }
            if !datapath.maps.has_bans_of(serving.row.index) {
                let bans = self.idle.bans();
                let bans = bans.in_force(bans.of(id).map(|(banned, _)| banned)).new;
                let bans = bans.into_iter();
                let bans = bans.map(|(it, until)| ((serving.row.index, it.network), until));
                let bans: Vec<_> = bans.collect();
                if !bans.is_empty() {
                    datapath.maps.ban_all(&bans)?;
                }
            }
            let standing = plan::Standing {
                proxy_protocol: serving.proxy_protocol,
                steered: !serving.steered.is_empty(),
                draining: self.closing.contains(&id),
                previous: serving.previous,
                unattached: &self.network.unattached,
                ..plan::Standing::default()
            };
            let network = &self.network.snapshot;
            let firewall = self.config.respect_firewall;
            serving.covered = write(datapath, network, firewall, &mut serving.row, standing)?;
        }
        self.view.show(&serving.row);
        Ok(())
    }

    /// Takes a publish from the kernel; its flows go on. What drains on its ports has them again.
    pub(super) fn uninstall_publish(&mut self, id: Id) -> Result<()> {
        let Some(serving) = self.serving.get(&id) else {
            return Ok(());
        };
        if let Some(datapath) = &mut self.datapath {
            let index = serving.row.index;
            let gone = match serving.previous {
                0 => Ok(()),
                previous => datapath.maps.hand_back(index, previous),
            };
            let gone = gone.and_then(|()| datapath.maps.uninstall(index));
            if serving.is_refused() {
                return Ok(()); // what the kernel may have of it goes before another has its place
            }
            return gone.with_context(|| format!("publish {}", serving.row.wanted.publish.spec));
        }
        Ok(())
    }
}

/// The tuples of a publish's flows of datagrams in user space, as clients send them.
pub(super) fn datagrams(row: &Row) -> impl Iterator<Item = Tuple> + use<> {
    let flows = row.meter.as_ref().map(Meter::datagrams);
    flows.into_iter().flatten().map(|(client, used)| Tuple {
        source: client.ip().into(),
        destination: used.ip().into(),
        source_port: client.port().to_be(),
        destination_port: used.port().to_be(),
        protocol: UDP.into(),
    })
}

/// Writes what is planned of a publish, and notes in its row how it is served; returns whether an IPsec policy covers it.
pub(super) fn write(
    datapath: &mut Datapath,
    network: &Snapshot,
    respects_firewall: bool,
    row: &mut Arc<Row>,
    standing: plan::Standing<'_>,
) -> Result<bool> {
    let present = datapath.maps.installed(row.index);
    let standing = plan::Standing {
        source: present.map(|installed| installed.entry.source),
        respects_firewall,
        ..standing
    };
    let publish = &row.wanted.publish;
    let Planned {
        installed,
        unserved,
        covered,
    } = plan::publish(network, publish, &row.allow, standing);
    // Its first packet tells what a connection is; a datagram does not.
    if unserved.is_none() && row.delivery.is_none() {
        datapath.maps.left.leave(datagrams(row))?;
    }
    datapath.maps.install(row.index, &installed)?;
    let delivery = unserved
        .is_none()
        .then(|| plan::delivery_of(&installed.entry));
    let xdp = xdp_towards(datapath, &installed.entry);
    if (row.delivery, row.xdp, &row.unserved) != (delivery, xdp, &unserved) {
        let name = delivery.and_then(delivery_name);
        debug!("publish {} is delivered by {name:?}", row.wanted.id);
        let row = Arc::make_mut(row);
        (row.delivery, row.xdp, row.unserved) = (delivery, xdp, unserved);
    }
    Ok(covered)
}

/// For a backend on another machine, how XDP takes part.
fn xdp_towards(datapath: &Datapath, entry: &PublishEntry) -> Option<&'static str> {
    let is_remote = entry.flags & flag::REMOTE != 0;
    let mut devices = datapath.xdp();
    let found = devices.find(|(ifindex, _)| is_remote && *ifindex == entry.hop.ifindex);
    found.map(|(_, mode)| mode.name())
}
