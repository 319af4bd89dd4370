//! The XDP program on uplinks: attached once there is something for it to do, pinned, taken over by the next instance,
//! and replaced in one step by one that passes everything while somebody traces.

use std::{fs, os::fd::AsFd as _, path::PathBuf};

use anyhow::{Context as _, Result};
use aya::programs::{TestRun as _, TestRunOptions, Xdp};

use super::{
    Datapath, errno, explain,
    link::{self, As, Link},
    number, program,
};

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

    /// include/uapi/linux/if_link.h
    const fn flags(self) -> u32 {
        match self {
            Self::Generic => 1 << 1, // XDP_FLAGS_SKB_MODE
            Self::Native => 1 << 2,  // XDP_FLAGS_DRV_MODE
        }
    }

    fn pin(self, ifindex: u32) -> String {
        format!("{ifindex}-xdp-{}", self.name())
    }
}

/// Whether a device is refused because it has somebody else's program.
pub fn is_others(error: &anyhow::Error) -> bool {
    matches!(errno(error), Some(libc::EBUSY | libc::EEXIST))
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
    fn adopt_xdp(&mut self, ifindex: u32, mode: Mode) -> Option<Link> {
        if let Some(other) = self.xdp_pin(ifindex, mode.other()) {
            link::remove(&other);
        }
        let pin = self.xdp_pin(ifindex, mode)?;
        let pinned = Link::open(&pin).ok()?;
        let program = self.xdp_program(self.traced).ok()?.fd().ok()?;
        if pinned.update(program.as_fd()).is_err() {
            link::remove(&pin); // its device has gone
            return None;
        }
        Some(pinned)
    }

    fn attach_new_xdp(&mut self, ifindex: u32, mode: Mode) -> Result<Link> {
        let pin = self.xdp_pin(ifindex, mode);
        let program = self.xdp_program(self.traced)?.fd()?;
        let link = Link::create(program.as_fd(), ifindex, As::Xdp, mode.flags())?;
        if let Some(pin) = pin {
            let _ = fs::remove_file(&pin);
            link.pin(&pin)
                .with_context(|| format!("pin {}", pin.display()))?;
        }
        Ok(link)
    }

    /// As [`Datapath::take_lost`].
    pub(super) fn take_lost_xdp(&mut self) -> Vec<(u32, Mode, Link)> {
        let mut lost = Vec::new();
        if self.xdp.is_empty() {
            return lost;
        }
        let program = self.xdp_program(self.traced);
        let program = program.ok().and_then(|it| number(it.info()));
        for (ifindex, (mode, link)) in std::mem::take(&mut self.xdp) {
            if let Some(pin) = self.xdp_pin(ifindex, mode) {
                link.pin_again(&pin);
            }
            if link.runs(program) {
                self.xdp.insert(ifindex, (mode, link));
            } else {
                lost.push((ifindex, mode, link));
            }
        }
        lost
    }

    /// Detaches from a device that may have gone.
    pub fn detach_xdp(&mut self, ifindex: u32) {
        if let Some((mode, link)) = self.xdp.remove(&ifindex) {
            self.end_xdp(ifindex, mode, &link);
        }
    }

    pub(super) fn end_xdp(&self, ifindex: u32, mode: Mode, link: &Link) {
        let _ = link.detach();
        if let Some(pin) = self.xdp_pin(ifindex, mode) {
            let _ = fs::remove_file(pin);
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
    pub(super) fn trace_xdp(&mut self) -> Result<()> {
        if self.xdp.is_empty() {
            return Ok(());
        }
        let program = self.xdp_program(self.traced)?.fd()?.try_clone()?;
        let mut links = self.xdp.values();
        Ok(links.try_for_each(|(_, link)| link.update(program.as_fd()))?)
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
