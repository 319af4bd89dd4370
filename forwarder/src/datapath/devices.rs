//! The tc programs on devices, in either direction: attached, found again after an earlier instance, replaced in one
//! step by the traced ones and back, taken away.

use std::{collections::BTreeSet, fs, os::fd::AsFd as _, path::PathBuf};

use anyhow::{Context as _, Result};
use aya::programs::{
    ProgramInfo, SchedClassifier, TcAttachType,
    tc::{NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcHandle},
};

use super::{
    Datapath, QDISCS, entries, explain,
    link::{self, As, Link},
    number,
    xdp::Mode,
};
use crate::{
    datapath::clsact::{self, Side},
    datapath::kernel::{Attach, kernel},
    datapath::maps::earlier,
    network::local::device_name,
};

/// A side of a device that has one of our programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    Ingress,
    /// The same, of devices without Ethernet headers.
    IngressIp,
    Egress,
}

impl Hook {
    /// What uplinks have, and others whose packets go through the stack.
    pub const BOTH_SIDES: [Self; 2] = [Self::Ingress, Self::Egress];
    pub const ALL: [Self; 3] = [Self::Ingress, Self::IngressIp, Self::Egress];

    /// The programs, plain and traced.
    pub(super) const fn programs(self) -> [&'static str; 2] {
        match self {
            Self::Ingress => ["ingress", "ingress_traced"],
            Self::IngressIp => ["ingress_l3", "ingress_l3"], // hands packets to one of those
            Self::Egress => ["egress", "egress_traced"],
        }
    }

    const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Ingress | Self::IngressIp => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }

    const fn linked_as(self) -> As {
        match self {
            Self::Ingress | Self::IngressIp => As::TcxIngress,
            Self::Egress => As::TcxEgress,
        }
    }

    pub(super) const fn side(self) -> Side {
        match self {
            Self::Ingress | Self::IngressIp => Side::Ingress,
            Self::Egress => Side::Egress,
        }
    }

    /// What a link's pin is called.
    fn pin(self, ifindex: u32) -> String {
        match self {
            Self::Ingress | Self::IngressIp => ifindex.to_string(),
            Self::Egress => format!("{ifindex}-egress"),
        }
    }
}

/// Whether filters or programs of others see what passes one side of a device. What goes straight to its other end
/// (`bpf_redirect_peer`) meets none at egress, and what our program takes none at ingress. The qdisc `ingress`
/// shows the filters of its one side on both: `has_filters` is whether this one has any.
pub fn has_others(side: Side, ifindex: u32, name: &str, has_filters: bool) -> bool {
    let hooks = Hook::ALL.into_iter().filter(|hook| hook.side() == side);
    let ours: Vec<&str> = hooks.flat_map(Hook::programs).collect();
    let attach_type = match side {
        Side::Ingress => TcAttachType::Ingress,
        Side::Egress => TcAttachType::Egress,
    };
    let links = SchedClassifier::query_tcx(name, attach_type);
    has_filters && clsact::has_others(ifindex, side, &ours).unwrap_or(false)
        || links.is_ok_and(|(_, programs)| {
            let name = |program: &ProgramInfo| program.name_as_str().map(str::to_owned);
            let mut names = programs.iter().map(name);
            names.any(|name| !name.is_some_and(|name| ours.contains(&name.as_str())))
        })
}

/// A device, and which side of it.
pub type Place = (u32, Hook);

#[derive(Debug)]
pub(super) enum Attachment {
    Link(Link),
    /// The kernel holds it; `qdisc` is ours to remove.
    Filter {
        filter: clsact::Filter,
        qdisc: bool,
    },
}

/// Attachments that somebody else has taken away, with what is left of them.
#[derive(Debug, Default)]
pub struct Lost {
    tc: Vec<(Place, Attachment)>,
    xdp: Vec<(u32, Mode, Link)>,
}

impl Lost {
    pub fn is_empty(&self) -> bool {
        self.tc.is_empty() && self.xdp.is_empty()
    }

    /// Where the programs of tc were.
    pub fn places(&self) -> impl Iterator<Item = Place> + '_ {
        self.tc.iter().map(|(place, _)| *place)
    }
}

impl Datapath {
    /// Where the programs are.
    pub fn attached(&self) -> impl Iterator<Item = Place> + '_ {
        self.attached.keys().copied()
    }

    /// The program of a hook that is in use.
    pub(super) fn current(&mut self, hook: Hook) -> Result<&mut SchedClassifier> {
        let [plain, traced] = hook.programs();
        let name = if self.traced { traced } else { plain };
        let program = self.program(name)?;
        if program.fd().is_err() {
            program
                .load()
                .map_err(explain)
                .with_context(|| format!("load the program {name}"))?;
        }
        Ok(program)
    }

    /// Attaches to a device, in place of what an earlier instance attached.
    ///
    /// # Errors
    /// The device has gone, or the kernel refuses.
    pub fn attach(&mut self, place: Place, name: &str) -> Result<()> {
        if place.1 == Hook::IngressIp {
            // Not before: an earlier instance's packets take the same way until this one knows its publishes.
            self.run_pipeline()?;
        }
        let attachment = match kernel().attach {
            Attach::Tcx => self.attach_link(place),
            Attach::Clsact => self.attach_filter(place, name),
        };
        let [program, _] = place.1.programs();
        let attachment = attachment.with_context(|| format!("attach {program} to {name}"))?;
        self.attached.insert(place, attachment);
        Ok(())
    }

    fn attach_link(&mut self, place: Place) -> Result<Attachment> {
        let (ifindex, hook) = place;
        let pin = self.link_pin(place);
        let program = self.current(hook)?.fd()?;
        let link = Link::create(program.as_fd(), ifindex, hook.linked_as(), link::AFTER)?;
        if let Some(pin) = pin {
            // The new link works before an earlier instance's goes.
            link::remove(&pin);
            link.pin(&pin)
                .with_context(|| format!("pin {}", pin.display()))?;
        }
        Ok(Attachment::Link(link))
    }

    /// Whether nobody has detached it, or has it run another program.
    fn is_attached(
        &self,
        (ifindex, hook): Place,
        attachment: &Attachment,
        program: Option<u32>,
    ) -> bool {
        match attachment {
            Attachment::Link(link) => link.runs(program),
            Attachment::Filter { .. } => {
                let found = clsact::find(ifindex, hook.side(), self.handle, &hook.programs());
                !matches!(found, Ok(None))
            }
        }
    }

    fn attach_filter(&mut self, (ifindex, hook): Place, name: &str) -> Result<Attachment> {
        let made = aya::programs::tc::qdisc_add_clsact(name).is_ok();
        let mark = self.qdisc_mark(ifindex);
        if let (true, Some(mark)) = (made, &mark) {
            fs::create_dir_all(mark).with_context(|| format!("create {}", mark.display()))?;
        }
        // Where nothing is pinned, the other side's filter knows.
        let other = Hook::ALL.map(|other| self.attached.get(&(ifindex, other)));
        let known = other
            .into_iter()
            .any(|there| matches!(there, Some(Attachment::Filter { qdisc: true, .. })));
        let qdisc = made || known || mark.is_some_and(|mark| mark.exists());
        let (side, handle) = (hook.side(), self.handle);
        let find = || clsact::find(ifindex, side, handle, &hook.programs());
        let attached = match find()? {
            Some(filter) => self.replace_filter(hook, name, &filter),
            None => {
                let options = TcAttachOptions::Netlink(NlOptions {
                    priority: clsact::priority(ifindex, side)?,
                    handle: TcHandle::from(handle),
                    classid: None,
                });
                let program = self.current(hook)?;
                program
                    .attach_with_options(name, hook.attach_type(), options)
                    .map_err(Into::into)
                    .and_then(|link| leave_filter(program, link))
            }
        };
        let found = attached.and_then(|()| find()?.context("the filter has gone"));
        if found.is_err() && made {
            self.remove_qdisc(ifindex);
        }
        Ok(Attachment::Filter {
            filter: found?,
            qdisc,
        })
    }

    /// Puts the current program into a filter of ours, in one step.
    fn replace_filter(&mut self, hook: Hook, name: &str, filter: &clsact::Filter) -> Result<()> {
        let handle = TcHandle::from(self.handle);
        let link =
            SchedClassifierLink::attached(name, hook.attach_type(), filter.priority, handle, None)?;
        let program = self.current(hook)?;
        let link = program.attach_to_link(link)?;
        leave_filter(program, link)
    }

    /// Attaches to `lo` and detaches again, unless an earlier instance's program is there: some kernels
    /// load the program and have nothing to attach it to.
    ///
    /// # Errors
    /// What is missing.
    pub fn rehearse(&mut self) -> Result<()> {
        const LOOPBACK: u32 = 1;
        let (ifindex, hook) = (LOOPBACK, Hook::Ingress);
        if kernel().attach == Attach::Tcx
            || clsact::find(ifindex, hook.side(), self.handle, &hook.programs())?.is_some()
        {
            return Ok(());
        }
        self.attach((ifindex, hook), "lo").map_err(|error| {
            anyhow::anyhow!(
                "no way to attach eBPF to devices: it takes a kernel from 6.6 on, or the modules \
                 sch_ingress and cls_bpf ({})",
                error.root_cause()
            )
        })?;
        self.detach((ifindex, hook));
        Ok(())
    }

    /// Detaches from a device that may have gone.
    pub fn detach(&mut self, place: Place) {
        if let Some(attachment) = self.attached.remove(&place) {
            self.end(place, &attachment);
        }
    }

    fn end(&self, place: Place, attachment: &Attachment) {
        match attachment {
            Attachment::Link(link) => {
                let _ = link.detach();
                if let Some(pin) = self.link_pin(place) {
                    let _ = fs::remove_file(pin);
                }
            }
            Attachment::Filter { filter, qdisc } => {
                let _ = clsact::remove(filter);
                if *qdisc {
                    self.remove_qdisc(place.0);
                }
            }
        }
    }

    /// Takes those out that somebody else has detached: of this the kernel tells nobody. Those whose pins somebody has removed
    /// are attached still, and pinned again.
    pub fn take_lost(&mut self) -> Lost {
        let mut lost = Lost::default();
        for (place, attachment) in std::mem::take(&mut self.attached) {
            if let (Some(pin), Attachment::Link(link)) = (self.link_pin(place), &attachment) {
                link.pin_again(&pin);
            }
            let program = self.current(place.1).ok().and_then(|it| number(it.info()));
            if self.is_attached(place, &attachment, program) {
                self.attached.insert(place, attachment);
            } else {
                lost.tc.push((place, attachment));
            }
        }
        lost.xdp = self.take_lost_xdp();
        lost
    }

    /// What is left of them goes, once others are in their places or the device has gone. Returns the devices that have all of
    /// theirs again.
    pub fn forget(&mut self, lost: Lost) -> BTreeSet<u32> {
        let Lost { tc, xdp } = lost;
        let has_gone = |ifindex| device_name(ifindex).is_none();
        for (place, attachment) in tc.iter().filter(|(place, _)| has_gone(place.0)) {
            self.end(*place, attachment);
        }
        for (ifindex, mode, link) in xdp.iter().filter(|it| has_gone(it.0)) {
            self.end_xdp(*ifindex, *mode, link);
        }
        let has = |place: &Place| self.attached.contains_key(place);
        let lost_tc = tc.iter().map(|(place, _)| (place.0, has(place)));
        let lost_xdp = xdp.iter().map(|(it, ..)| (*it, self.xdp.contains_key(it)));
        let all: Vec<(u32, bool)> = lost_tc.chain(lost_xdp).collect();
        let missing: BTreeSet<u32> = all.iter().filter(|it| !it.1).map(|it| it.0).collect();
        let devices: BTreeSet<u32> = all.iter().map(|it| it.0).collect();
        &devices - &missing
    }

    /// Makes every attachment log its packets, or stop it: links are replaced atomically.
    ///
    /// # Errors
    /// The kernel refuses the traced program.
    pub fn trace(&mut self, on: bool) -> Result<()> {
        if on == self.traced {
            return Ok(());
        }
        self.traced = on;
        self.run_pipeline()?;
        for hook in Hook::BOTH_SIDES {
            let all = self.attached.keys();
            let places: Vec<_> = all.filter(|place| place.1 == hook).copied().collect();
            for place in places {
                self.replace(place)?;
            }
        }
        self.trace_xdp()
    }

    /// Puts the current program in place of another one.
    fn replace(&mut self, place: Place) -> Result<()> {
        let program = self.current(place.1)?.fd()?.try_clone()?;
        match self.attached.get(&place) {
            Some(Attachment::Link(link)) => Ok(link.update(program.as_fd())?),
            Some(Attachment::Filter { filter, .. }) => {
                let filter = filter.clone();
                let name = device_name(place.0).context("the device has gone")?;
                self.replace_filter(place.1, &name, &filter)
            }
            None => Ok(()),
        }
    }

    /// Removes the attachments that an earlier instance left on devices this one has not, and what it had pinned in another
    /// layout, when what became of its flows meanwhile is known.
    pub fn forget_others(&mut self) {
        if kernel().attach == Attach::Clsact {
            for hook in Hook::ALL {
                let left = clsact::find_all(hook.side(), self.handle, &hook.programs());
                let left = left.unwrap_or_default().into_iter();
                for filter in left.filter(|f| !self.attached.contains_key(&(f.ifindex, hook))) {
                    let _ = clsact::remove(&filter);
                    if self
                        .qdisc_mark(filter.ifindex)
                        .is_some_and(|mark| mark.exists())
                    {
                        self.remove_qdisc(filter.ifindex);
                    }
                }
            }
        }
        let Some(links) = self.pins.as_ref().map(|pins| pins.join("links")) else {
            return;
        };
        let pins = self.attached().map(|(ifindex, hook)| hook.pin(ifindex));
        let ours: BTreeSet<_> = pins.chain(self.xdp_pins()).collect();
        for entry in entries(&links) {
            let name = entry.file_name();
            if !name.to_str().is_some_and(|name| ours.contains(name)) {
                link::remove(&entry.path());
            }
        }
        for earlier in std::mem::take(&mut self.earlier) {
            super::warn_of(earlier.catch_up(&mut self.maps.flows));
        }
        let Some(pins) = &self.pins else { return };
        if let Err(error) = earlier::describe(pins) {
            tracing::warn!("a version with another layout could not carry flows over: {error:#}");
        }
        for other in super::other_layouts(pins) {
            if let Err(error) = fs::remove_dir_all(&other) {
                tracing::warn!("remove {}: {error}", other.display());
            }
        }
    }

    fn link_pin(&self, (ifindex, hook): Place) -> Option<PathBuf> {
        self.pins
            .as_ref()
            .map(|pins| pins.join("links").join(hook.pin(ifindex)))
    }

    /// A folder that says that a device's clsact qdisc is ours; bpffs holds nothing else.
    fn qdisc_mark(&self, ifindex: u32) -> Option<PathBuf> {
        self.pins
            .as_ref()
            .map(|pins| pins.join(QDISCS).join(ifindex.to_string()))
    }

    fn remove_qdisc(&self, ifindex: u32) {
        let _ = clsact::remove_idle_qdisc(ifindex);
        if let Some(mark) = self.qdisc_mark(ifindex) {
            let _ = fs::remove_dir(mark);
        }
    }
}

/// Takes a filter out of aya's hands, which would remove it at the end of this process.
fn leave_filter(program: &mut SchedClassifier, link: SchedClassifierLinkId) -> Result<()> {
    std::mem::forget(program.take_link(link)?);
    Ok(())
}
