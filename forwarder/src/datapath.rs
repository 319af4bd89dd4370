//! Loads the eBPF object, and pins what should outlive the process. What goes into the maps is decided elsewhere.

pub mod clsact;
pub mod devices;
pub mod kernel;
pub mod link;
pub mod maps;
pub mod resets;
mod steering;
pub mod xdp;

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::RingBuf,
    programs::{Program, ProgramError, ProgramInfo, SchedClassifier, TestRun as _, TestRunOptions},
};
use forwarder_common::{flow::Timeouts, handover};
use tokio::io::{Interest, unix::AsyncFd};

use self::{
    devices::{Attachment, Hook, Place},
    steering::Steering,
};
use crate::{
    datapath::kernel::{Attach, NEEDED, kernel},
    datapath::maps::{
        Maps,
        earlier::{self, Earlier},
    },
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/forwarder.o"));

/// Folder of the marks of qdiscs.
const QDISCS: &str = "qdiscs";
/// What the kernel is asked at load.
#[derive(Clone, Debug)]
pub struct Options {
    /// By its name, an instance's filters are found again where there are no links.
    pub instance: String,
    /// This instance's directory under bpffs; `None` where there is no bpffs.
    pub pins: Option<PathBuf>,
    /// First source port for SNAT, and how many there are.
    pub snat: (u16, u32),
    /// Proven flows at once.
    pub flows: u32,
    pub timeouts: Timeouts,
    /// Answers of flows that go through the stack are rewritten where they leave.
    pub respects_firewall: bool,
}

/// The loaded programs and where they are attached. Dropping it detaches everything.
#[derive(Debug)]
pub struct Datapath {
    ebpf: Ebpf,
    pub maps: Maps,
    pins: Option<PathBuf>,
    /// Handle of this instance's filters.
    handle: u32,
    attached: BTreeMap<Place, Attachment>,
    /// Devices with the XDP program.
    xdp: BTreeMap<u32, (xdp::Mode, link::Link)>,
    traced: bool,
    own_mark: u32,
    /// Of wide ranges.
    steering: Option<Steering>,
    /// An earlier instance has left programs that may forward.
    inherits: bool,
    /// These tables were not in use: they have nothing that is newer than what an earlier layout's have.
    is_new: bool,
    /// What versions with another layout left.
    earlier: Vec<Earlier>,
}

/// A program of the object, by its name and of its type.
fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name);
    Ok(program
        .with_context(|| format!("the eBPF object has no program {name}"))?
        .try_into()?)
}

/// A loaded program's number.
fn number(program: Result<ProgramInfo, ProgramError>) -> Option<u32> {
    Some(program.ok()?.id())
}

impl Datapath {
    /// Loads maps and programs; nothing is attached yet.
    ///
    /// # Errors
    /// Why the fast path is not to be had, and what would change that.
    pub fn load(options: &Options) -> Result<Self> {
        if let Some(refusal) = kernel().refusal() {
            bail!(refusal);
        }
        kernel().raise_memory_limit()?;
        let peer_from_lo = u8::from(kernel().peer_from_lo);
        let (snat_first, snat_ports) = options.snat;
        let own_mark = steering::own_mark();
        let set_retval = u8::from(kernel().bind_error);
        let timeouts = options.timeouts.nanoseconds();
        let respects_firewall = u8::from(options.respects_firewall);
        let mut loader = EbpfLoader::new();
        loader
            .verifier_log_level(VerifierLogLevel::DISABLE)
            .override_global("PEER_FROM_LO", &peer_from_lo, true)
            .override_global("SNAT_FIRST", &snat_first, true)
            .override_global("SNAT_PORTS", &snat_ports, true)
            .override_global("RESPECTS_FIREWALL", &respects_firewall, true)
            .override_global("TIMEOUTS", &timeouts[..], true)
            .override_global("OWN_MARK", &own_mark, true)
            .override_global("SET_RETVAL", &set_retval, true)
            .map_max_entries("FLOWS", options.flows);
        let pins = options
            .pins
            .as_ref()
            .map(|directory| directory.join(earlier::name()));
        // A table that is there stays as large as it is.
        let pinned = pins
            .as_ref()
            .and_then(|pins| maps::room(&pins.join("FLOWS")));
        let most_flows = pinned.unwrap_or(options.flows);
        loader.override_global("MOST_FLOWS", &most_flows, true);
        let (mut inherits, mut is_new) = (false, false);
        if let Some(pins) = &pins {
            inherits = pins
                .parent()
                .is_some_and(|left| entries(left).next().is_some());
            is_new = !earlier::is_described(pins);
            fs::create_dir_all(pins.join("links"))
                .with_context(|| format!("create {}", pins.display()))?;
            // What a later instance takes over, so that established flows survive a restart. The kernel empties `PIPELINE` when
            // neither a process nor a pin has it.
            for map in earlier::names().chain(["PIPELINE"]) {
                loader.map_pin_path(map, pins.join(map));
            }
        }
        let ebpf = loader
            .load(OBJECT)
            .map_err(explain)
            .context("load the eBPF object");
        let mut ebpf = ebpf.inspect_err(|_| {
            if let Some(pins) = &pins {
                remove_unused(pins);
                remove_empty(pins);
            }
        })?;
        let mut earlier: Vec<Earlier> = Vec::new();
        if let Some(pins) = &pins {
            earlier.extend(other_layouts(pins).flat_map(Earlier::open));
            for earlier in earlier.iter().filter(|_| is_new) {
                warn_of(earlier.carry_keys(pins));
            }
        }
        let maps = Maps::take(&mut ebpf)?;
        let mut datapath = Self {
            ebpf,
            maps,
            pins,
            handle: clsact::handle(&options.instance),
            attached: BTreeMap::new(),
            xdp: BTreeMap::new(),
            traced: false,
            own_mark,
            steering: None,
            inherits,
            is_new,
            earlier,
        };
        if let Err(error) = datapath.current(Hook::Ingress) {
            datapath.abandon();
            return Err(error);
        }
        Ok(datapath)
    }

    /// Has `ingress_l3` run the current program.
    fn run_pipeline(&mut self) -> Result<()> {
        let fd = self.current(Hook::Ingress)?.fd()?.try_clone()?;
        self.maps.set_pipeline(&fd)
    }

    fn program(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        program(&mut self.ebpf, name)
    }

    /// Hands each line of the traced program to `line`, until the future is dropped.
    ///
    /// # Errors
    /// The kernel has no ring buffer, or stops serving it.
    #[expect(
        unsafe_code,
        reason = "the runtime watches a descriptor that another crate owns"
    )]
    pub fn log<F: Fn(String) + Send + Sync + 'static>(
        &mut self,
        line: F,
    ) -> Result<impl Future<Output = Result<()>> + use<F>> {
        let logger = aya_log::EbpfLogger::init_with_logger(&mut self.ebpf, Lines::boxed(line))?;
        // SAFETY: the logger owns its ring buffer's descriptor and gives the same one until dropped.
        let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE)? };
        Ok(async move {
            loop {
                let mut guard = logger.readable_mut().await?;
                guard.get_inner_mut().flush();
                guard.clear_ready();
            }
        })
    }

    /// Hands each frame that the program leaves to the daemon to `take`, with its segments' length, until the future is dropped.
    ///
    /// # Errors
    /// The kernel has no ring buffer, or stops serving it.
    #[expect(
        unsafe_code,
        reason = "the runtime watches a descriptor that another crate owns"
    )]
    pub fn handover<F: FnMut(&[u8], usize)>(
        &mut self,
        mut take: F,
    ) -> Result<impl Future<Output = Result<()>> + use<F>> {
        let map = self.ebpf.take_map("HANDOVER");
        let ring = RingBuf::try_from(map.context("the eBPF object has no map HANDOVER")?)?;
        // SAFETY: the ring buffer owns its descriptor and gives the same one until dropped.
        let mut ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE)? };
        Ok(async move {
            loop {
                let mut guard = ring.readable_mut().await?;
                while let Some(entry) = guard.get_inner_mut().next() {
                    if let Some((frame, segment)) = handover::frame(&entry) {
                        take(frame, segment);
                    }
                }
                guard.clear_ready();
            }
        })
    }

    /// Runs the program on a frame as if it came in by a device of this network namespace
    /// with a mark (BPF_PROG_TEST_RUN); returns tc's action and the frame afterwards. Redirects are not carried out.
    ///
    /// # Errors
    /// The kernel refuses the frame.
    pub fn try_frame(&self, frame: &[u8], ifindex: u32, mark: u32) -> Result<(u32, Vec<u8>)> {
        /// Offsets in `struct __sk_buff` (include/uapi/linux/bpf.h).
        const MARK: usize = 8;
        const IFINDEX: usize = 40;
        let mut context = [0; 192];
        context[MARK..MARK + 4].copy_from_slice(&mark.to_ne_bytes());
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        let mut after = vec![0; frame.len() + 256];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut after);
        options.ctx_in = Some(&context);
        let result = self
            .ingress()?
            .test_run(options)
            .context("BPF_PROG_TEST_RUN")?;
        after.truncate(result.data_size_out as usize);
        Ok((result.return_value, after))
    }

    fn ingress(&self) -> Result<&SchedClassifier> {
        let program = self.ebpf.program(Hook::Ingress.programs()[0]);
        let program = program.context("the eBPF object has no program ingress")?;
        Ok(program.try_into()?)
    }

    /// The program that [`Self::try_frame`] runs.
    ///
    /// # Errors
    /// It is not loaded.
    pub fn ingress_fd(&self) -> Result<BorrowedFd<'_>> {
        Ok(self.ingress()?.fd()?.as_fd())
    }

    /// Whether an earlier instance's programs may forward still, or its pins be used by these.
    pub fn inherits(&self) -> bool {
        self.inherits
    }

    /// Removes what a start has made that fails; what an earlier instance left stays.
    pub fn abandon(self) {
        if !self.inherits {
            return self.remove();
        }
        if let Some(pins) = &self.pins {
            remove_unused(pins);
        }
    }

    /// What a version with another layout of its maps left is this instance's from now on: its flows as they are now, its
    /// links, so that each is replaced as one of the same layout is, and its marks of qdiscs.
    pub fn take_over(&self) {
        let Some(pins) = &self.pins else { return };
        for other in other_layouts(pins) {
            match self.earlier.iter().find(|it| it.pins() == other) {
                Some(earlier) if self.is_new => warn_of(earlier.carry(pins)),
                Some(_) => {}
                None => tracing::warn!(
                    "{} is of a version that does not say how its tables are laid out: its flows end, and clients connect anew",
                    other.display()
                ),
            }
            for folder in ["links", QDISCS] {
                let _ = fs::create_dir_all(pins.join(folder));
                for entry in entries(&other.join(folder)) {
                    let _ = fs::rename(entry.path(), pins.join(folder).join(entry.file_name()));
                }
            }
        }
    }

    /// Detaches everything and removes the pins.
    pub fn remove(mut self) {
        for place in self.attached.keys().copied().collect::<Vec<_>>() {
            self.detach(place);
        }
        for ifindex in self.xdp.keys().copied().collect::<Vec<_>>() {
            self.detach_xdp(ifindex);
        }
        if let Some(directory) = self.pins.as_deref().and_then(Path::parent)
            && let Err(error) = remove_pins(directory)
        {
            tracing::warn!("{error:#}; `forwarder down` removes what is left");
        }
    }
}

/// Without pins nothing would find the attachments again. Links go by themselves.
impl Drop for Datapath {
    fn drop(&mut self) {
        if self.pins.is_none() {
            for place in self.attached.keys().copied().collect::<Vec<_>>() {
                self.detach(place);
            }
        }
    }
}

/// Removes what an instance left: filters and qdiscs of this network namespace, links, pins. Returns whether
/// there was anything.
///
/// # Errors
/// Something cannot be removed.
pub fn remove_left(instance: &str, directory: Option<&Path>) -> Result<bool> {
    let mut found = false;
    if kernel().attach == Attach::Clsact {
        for hook in Hook::ALL {
            for filter in clsact::find_all(hook.side(), clsact::handle(instance), &hook.programs())?
            {
                clsact::remove(&filter).context("remove a filter")?;
                found = true;
            }
        }
        let layouts = directory.into_iter().flat_map(entries);
        for mark in layouts.flat_map(|layout| entries(&layout.path().join(QDISCS))) {
            if let Some(ifindex) = mark.file_name().to_str().and_then(|name| name.parse().ok()) {
                let _ = clsact::remove_idle_qdisc(ifindex);
            }
        }
    }
    match directory {
        Some(directory) => Ok(remove_pins(directory)? || found),
        None => Ok(found),
    }
}

/// What is in a directory; nothing if there is none.
fn entries(directory: &Path) -> impl Iterator<Item = fs::DirEntry> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten()
}

/// The pins of versions with another layout, beside these.
fn other_layouts(pins: &Path) -> impl Iterator<Item = PathBuf> {
    let layouts = pins.parent().into_iter().flat_map(entries);
    layouts.map(|it| it.path()).filter(move |it| it != pins)
}

/// What fails while flows are carried over costs flows, and nothing else.
fn warn_of(carried: Result<()>) {
    if let Err(error) = carried {
        tracing::warn!("flows of the earlier version end: {error:#}");
    }
}

/// Removes an instance's pins, and with them the links and maps that nobody else holds. Returns
/// whether there were any.
fn remove_pins(directory: &Path) -> Result<bool> {
    let shown = directory.display();
    let is_there = directory.try_exists();
    if !is_there.with_context(|| format!("look at {shown}"))? {
        return Ok(false);
    }
    for layout in entries(directory) {
        for entry in entries(&layout.path().join("links")) {
            link::remove(&entry.path());
        }
    }
    fs::remove_dir_all(directory).with_context(|| format!("remove {shown}"))?;
    if let Some(parent) = directory.parent() {
        let _ = fs::remove_dir(parent); // stays while another instance has pins
    }
    Ok(true)
}

/// Removes tables that no program has used.
fn remove_unused(pins: &Path) {
    let mut attached = ["links", QDISCS]
        .map(|folder| pins.join(folder))
        .into_iter();
    if !earlier::is_described(pins) && attached.all(|folder| entries(&folder).next().is_none()) {
        let _ = fs::remove_dir_all(pins);
    }
}

/// Removes the directories of an instance that has nothing pinned.
fn remove_empty(pins: &Path) {
    let _ = fs::remove_dir(pins.join("links"));
    let _ = fs::remove_dir(pins.join(QDISCS));
    for directory in pins.ancestors().take(3) {
        let _ = fs::remove_dir(directory);
    }
}

/// The number of what the kernel has refused something by, if that is the cause.
pub fn errno(error: &anyhow::Error) -> Option<i32> {
    let cause = error.root_cause().downcast_ref::<std::io::Error>();
    cause.and_then(std::io::Error::raw_os_error)
}

/// One line with the remedy, in place of the chain of the loader's errors, for what users meet.
fn explain(error: impl std::error::Error + Send + Sync + 'static) -> anyhow::Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(io) = current.downcast_ref::<std::io::Error>() {
            match io.raw_os_error() {
                Some(libc::EPERM) => {
                    return anyhow::anyhow!(
                        "the kernel refuses eBPF (EPERM): run as root or with {NEEDED}, outside of sandboxes that \
                         filter bpf(2)"
                    );
                }
                Some(libc::ENOSYS) => {
                    return anyhow::anyhow!("the kernel has no eBPF (CONFIG_BPF_SYSCALL)");
                }
                _ => {}
            }
        }
        cause = current.source();
    }
    anyhow::Error::new(error)
}

/// `aya_log`'s sink: the text alone.
struct Lines<F>(F);

impl<F: Fn(String) + Send + Sync + 'static> Lines<F> {
    fn boxed(line: F) -> Box<dyn log::Log> {
        Box::new(Self(line))
    }
}

impl<F: Fn(String) + Send + Sync> log::Log for Lines<F> {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0(record.args().to_string());
    }

    fn flush(&self) {}
}
