//! The XDP program on uplinks: attached once there is something for it to do, pinned, taken over by the next instance,
//! and replaced in one step by one that passes everything while somebody traces.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::programs::{
    TestRun as _, TestRunOptions, Xdp, XdpMode,
    links::{FdLink, PinnedLink},
    xdp::{XdpLink, XdpLinkId},
};

use super::{Datapath, explain, link, program};

/// Where the kernel runs the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In the device's driver, before there is an skb.
    Native,
    /// In the stack's receive path, for devices whose drivers cannot.
    Generic,
}

impl Mode {
    /// As on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    const fn other(self) -> Self {
        match self {
            Self::Native => Self::Generic,
            Self::Generic => Self::Native,
        }
    }

    fn pin(self, ifindex: u32) -> String {
        format!("{ifindex}-xdp-{}", self.name())
    }
}

impl Datapath {
    pub(super) fn xdp_program(&mut self, traced: bool) -> Result<&mut Xdp> {
        let name = if traced { "early_traced" } else { "early" };
        let program: &mut Xdp = program(&mut self.ebpf, name)?;
        if program.fd().is_err() {
            program
                .load()
                .map_err(explain)
                .with_context(|| format!("load the program {name}"))?;
        }
        Ok(program)
    }

    /// Where the program is.
    pub fn xdp(&self) -> impl Iterator<Item = (u32, Mode)> + '_ {
        self.xdp
            .iter()
            .map(|(ifindex, (mode, _))| (*ifindex, *mode))
    }

    /// Attaches to a device, in place of what an earlier instance attached.
    ///
    /// # Errors
    /// The device cannot in this mode, has another program, or has gone.
    pub fn attach_xdp(&mut self, ifindex: u32, mode: Mode) -> Result<()> {
        let link = match self.adopt_xdp(ifindex, mode) {
            Some(link) => link,
            None => self.attach_new_xdp(ifindex, mode)?,
        };
        self.xdp.insert(ifindex, (mode, link));
        Ok(())
    }

    /// A device has one program at a time, so an earlier instance's link gets the new program.
    fn adopt_xdp(&mut self, ifindex: u32, mode: Mode) -> Option<XdpLinkId> {
        if let Some(other) = self.xdp_pin(ifindex, mode.other()) {
            link::remove(&other);
        }
        let pin = self.xdp_pin(ifindex, mode)?;
        let pinned: FdLink = PinnedLink::from_pin(&pin).ok()?.into();
        let adopted = XdpLink::try_from(pinned).ok().and_then(|pinned| {
            self.xdp_program(self.traced)
                .ok()?
                .attach_to_link(pinned)
                .ok()
        });
        if adopted.is_none() {
            link::remove(&pin); // its device has gone
        }
        adopted
    }

    fn attach_new_xdp(&mut self, ifindex: u32, mode: Mode) -> Result<XdpLinkId> {
        let pin = self.xdp_pin(ifindex, mode);
        let program = self.xdp_program(self.traced)?;
        let mode = match mode {
            Mode::Native => XdpMode::Driver,
            Mode::Generic => XdpMode::Skb,
        };
        let link = program.attach_to_if_index(ifindex, mode)?;
        let Some(pin) = pin else {
            return Ok(link);
        };
        let _ = fs::remove_file(&pin);
        self.pinned_xdp(link, &pin)
    }

    /// Pins a link.
    fn pinned_xdp(&mut self, link: XdpLinkId, pin: &Path) -> Result<XdpLinkId> {
        let program = self.xdp_program(self.traced)?;
        let link: FdLink = program.take_link(link)?.try_into()?;
        let pinned = link
            .pin(pin)
            .with_context(|| format!("pin {}", pin.display()))?;
        Ok(program.attach_to_link(FdLink::from(pinned).try_into()?)?)
    }

    /// The same if somebody has removed its pin. `None` if that fails, and the link has gone.
    pub(super) fn xdp_pinned_again(
        &mut self,
        ifindex: u32,
        mode: Mode,
        link: XdpLinkId,
    ) -> Option<XdpLinkId> {
        match self.xdp_pin(ifindex, mode) {
            Some(pin) if !pin.exists() => {
                let pinned = self.pinned_xdp(link, &pin);
                let pinned = pinned.inspect_err(|error| tracing::warn!("{error:#}"));
                pinned.ok()
            }
            _ => Some(link),
        }
    }

    /// Whether nobody has detached it.
    pub(super) fn has_xdp(&self, ifindex: u32, mode: Mode) -> bool {
        let pin = self.xdp_pin(ifindex, mode);
        pin.is_none_or(|pin| link::device(&pin) == Some(ifindex))
    }

    /// Detaches from a device that may have gone.
    pub fn detach_xdp(&mut self, ifindex: u32) {
        let Some((mode, link)) = self.xdp.remove(&ifindex) else {
            return;
        };
        if let Some(pin) = self.xdp_pin(ifindex, mode) {
            link::remove(&pin);
        }
        let traced = self.traced;
        if let Ok(program) = self.xdp_program(traced) {
            let _ = program.detach(link);
        }
    }

    /// As [`Datapath::try_frame`], by the XDP program, on a device that it is attached to; returns XDP's action and the
    /// frame afterwards.
    ///
    /// # Errors
    /// The kernel refuses the frame, or cannot run XDP programs for a device (before 5.15).
    pub fn try_early(&self, frame: &[u8], ifindex: u32) -> Result<(u32, Vec<u8>)> {
        let program = self.ebpf.program("early");
        let program: &Xdp = program
            .context("the eBPF object has no program early")?
            .try_into()?;
        // `struct xdp_md`: begin, end, metadata, device (include/uapi/linux/bpf.h).
        let words = [0, u32::try_from(frame.len())?, 0, ifindex, 0, 0];
        let context: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        let mut after = vec![0; frame.len()];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut after);
        options.ctx_in = Some(&context);
        let result = program.test_run(options).context("BPF_PROG_TEST_RUN")?;
        Ok((result.return_value, after))
    }

    /// Puts the other program in place, as [`Datapath::trace`] does.
    pub(super) fn trace_xdp(&mut self, from: bool) -> Result<()> {
        for (ifindex, (mode, link)) in std::mem::take(&mut self.xdp) {
            let link = self.xdp_program(from)?.take_link(link)?;
            let link = self.xdp_program(self.traced)?.attach_to_link(link)?;
            self.xdp.insert(ifindex, (mode, link));
        }
        Ok(())
    }

    /// What the pins of its links are called.
    pub(super) fn xdp_pins(&self) -> impl Iterator<Item = String> + '_ {
        self.xdp().map(|(ifindex, mode)| mode.pin(ifindex))
    }

    fn xdp_pin(&self, ifindex: u32, mode: Mode) -> Option<PathBuf> {
        self.pins
            .as_ref()
            .map(|pins| pins.join("links").join(mode.pin(ifindex)))
    }
}
