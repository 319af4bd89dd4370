//! What the verifier says of each program of an eBPF object, as a JSON line for each: instructions, instructions that
//! it walked, stack, time. `cargo xtask verifier` runs it under several kernels and makes the table.
//!
//! Usage: `forwarder-verifier OBJECT`. The programs are loaded here by bpf(2), since aya keeps the verifier's log
//! of a program that is accepted to itself.

#![expect(unsafe_code, reason = "bpf(2) calls that aya does not have")]

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::MapData;
use aya_obj::{
    EbpfSectionKind, Map, Object, ProgramSection,
    generated::{bpf_attach_type, bpf_insn},
};
use bytemuck::NoUninit;
use forwarder::datapath::kernel::kernel;

fn main() -> Result<()> {
    let path = std::env::args().nth(1);
    let path = path.context("usage: forwarder-verifier OBJECT")?;
    let bytes = std::fs::read(&path).with_context(|| path.clone())?;
    if let Some(refusal) = kernel().refusal() {
        bail!(refusal);
    }
    kernel().raise_memory_limit()?;
    let mut object = Object::parse(&bytes)?;
    // As the daemon sets them: the verifier does not walk what a constant excludes.
    let peer_from_lo = [u8::from(kernel().peer_from_lo)];
    let ports = [0x00, 0xf0];
    let count = 4_000_u32.to_ne_bytes();
    object.patch_map_data(
        [
            ("PEER_FROM_LO", (&peer_from_lo[..], true)),
            ("SNAT_FIRST", (&ports[..], true)),
            ("SNAT_PORTS", (&count[..], true)),
        ]
        .into(),
    )?;
    let types = load_types(&mut object).context("load the object's BTF")?;
    let definitions: Vec<(String, Map)> = object.maps.drain().collect();
    let maps = definitions
        .iter()
        .map(|(name, definition)| create(name, definition))
        .collect::<Result<Vec<_>>>()?;
    let text: HashSet<usize> = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    let placed = definitions.iter().zip(&maps);
    object.relocate_maps(
        placed.map(|((name, definition), map)| {
            (name.as_str(), map.fd().as_fd().as_raw_fd(), definition)
        }),
        &text,
    )?;
    object.relocate_calls(&text)?;
    let mut names: Vec<_> = object.programs.keys().cloned().collect();
    names.sort();
    for name in names {
        println!("{}", examine(&object, &types, &name)?);
    }
    Ok(())
}

/// Loads the types, by which the verifier knows functions that it walks by themselves.
fn load_types(object: &mut Object) -> Result<OwnedFd> {
    const BPF_BTF_LOAD: i32 = 18;
    #[derive(Clone, Copy, NoUninit)]
    #[repr(C)]
    struct Types {
        btf: u64,
        log: u64,
        size: u32,
        log_size: u32,
        log_level: u32,
        reserved: u32,
    }
    let features = aya::features().btf().context("the kernel has no BTF")?;
    let types = object.fixup_and_sanitize_btf(features)?;
    let types = types.context("the object has no BTF")?.to_bytes();
    let load = Types {
        btf: types.as_ptr() as u64,
        log: 0,
        size: types.len().try_into()?,
        log_size: 0,
        log_level: 0,
        reserved: 0,
    };
    // SAFETY: the types live until the call returns; their length is as given.
    let fd = unsafe { bpf(BPF_BTF_LOAD, &load) }?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a map, and fills it if it holds constants.
fn create(name: &str, definition: &Map) -> Result<MapData> {
    let definition = definition.clone();
    let data = definition.data().to_vec();
    let kind = definition.section_kind();
    let map = MapData::create(definition, name, None).with_context(|| format!("map {name}"))?;
    if kind == EbpfSectionKind::Rodata {
        let fd = map.fd().as_fd().as_raw_fd();
        fill(fd, &data).with_context(|| format!("map {name}"))?;
    }
    Ok(map)
}

/// Commands of bpf(2), include/uapi/linux/bpf.h.
const BPF_MAP_UPDATE_ELEM: i32 = 2;
const BPF_PROG_LOAD: i32 = 5;
const BPF_MAP_FREEZE: i32 = 22;

/// Writes the only element of a map and makes it constant, which the verifier takes account of.
fn fill(map: RawFd, data: &[u8]) -> Result<()> {
    #[derive(Clone, Copy, NoUninit)]
    #[repr(C)]
    struct Update {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let key = 0_u32;
    let update = Update {
        map: map.cast_unsigned(),
        padding: 0,
        key: &raw const key as u64,
        value: data.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: key and value live until the call returns, and are as long as the map was made for.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &update) }?;
    // SAFETY: the command reads a descriptor.
    unsafe { bpf(BPF_MAP_FREEZE, &map) }?;
    Ok(())
}

/// What the verifier says of a program.
fn examine(object: &Object, types: &OwnedFd, name: &str) -> Result<serde_json::Value> {
    /// Bits of `log_level` (include/linux/bpf_verifier.h): every path, and the figures.
    const PATHS: u32 = 1;
    const FIGURES: u32 = 4;
    let code = instructions(object, name);
    let began = Instant::now();
    let (loaded, log) = load(object, types, name, FIGURES, 1 << 16)?;
    let took = began.elapsed();
    if let Err(error) = loaded {
        let (_, log) = load(object, types, name, PATHS, 1 << 24)?;
        let lines: Vec<&str> = log.lines().filter(|line| !line.is_empty()).collect();
        let end = &lines[lines.len().saturating_sub(8)..];
        return Ok(serde_json::json!({
            "program": name,
            "instructions": code.len(),
            "refused": format!("{error}: {}", end.join(" | ")),
        }));
    }
    let (verified, stack) = (number_after(&log, "processed "), stack(&log, code));
    ensure!(
        verified.is_some() && stack.is_some(),
        "no figures in the verifier's log: {log}"
    );
    Ok(serde_json::json!({
        "program": name,
        "instructions": code.len(),
        "verified": verified,
        "stack": stack,
        "microseconds": took.as_micros() as u64,
    }))
}

fn instructions<'a>(object: &'a Object, name: &str) -> &'a [bpf_insn] {
    &object.functions[&object.programs[name].function_key()].instructions
}

/// Loads a program; the verifier's log comes with it or without.
fn load(
    object: &Object,
    types: &OwnedFd,
    name: &str,
    log_level: u32,
    log_size: u32,
) -> Result<(io::Result<OwnedFd>, String)> {
    #[derive(Clone, Copy, NoUninit)]
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        code: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        ifindex: u32,
        attach_type: u32,
        types: u32,
        function_record: u32,
        functions: u64,
        function_count: u32,
        line_record: u32,
    }
    let program = &object.programs[name];
    // Type and attach type, include/uapi/linux/bpf.h.
    let (kind, attach_type) = match program.section {
        ProgramSection::SchedClassifier => (3, 0),
        ProgramSection::Xdp { .. } => (6, 0),
        ProgramSection::SkLookup => (30, 36),
        ProgramSection::CgroupSockAddr { attach_type } => {
            (18, bpf_attach_type::from(attach_type) as u32)
        }
        ref other => bail!("program {name}: forwarder-verifier cannot load a {other:?} yet"),
    };
    let code = instructions(object, name);
    let function = &object.functions[&program.function_key()];
    let functions = function.func_info.func_info_bytes();
    let mut log = vec![0_u8; log_size as usize];
    let mut load = Load {
        kind,
        count: code.len().try_into()?,
        code: code.as_ptr() as u64,
        license: program.license.as_ptr() as u64,
        log_level,
        log_size,
        log: log.as_mut_ptr() as u64,
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        ifindex: 0,
        attach_type,
        types: types.as_raw_fd().cast_unsigned(),
        function_record: function.func_info_rec_size.try_into()?,
        functions: functions.as_ptr() as u64,
        function_count: function.func_info.len().try_into()?,
        line_record: 0,
    };
    for (to, from) in load.name[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: code, license, functions and log live until the call returns; their lengths are as given.
    let loaded = unsafe { bpf(BPF_PROG_LOAD, &load) };
    // SAFETY: the kernel has just given this descriptor to us alone.
    let loaded = loaded.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
    Ok((loaded, String::from_utf8_lossy(&log[..end]).into_owned()))
}

/// bpf(2). Attributes have no padding: the kernel refuses what it does not know, unless it is zero.
///
/// # Safety
/// Pointers in `attributes` must be valid for what the command does with them.
unsafe fn bpf<T: NoUninit>(command: i32, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: as many bytes are read as there are; the rest is the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw const *attributes,
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as RawFd)
}

fn number_after(text: &str, words: &str) -> Option<u64> {
    let rest = text.split_once(words)?.1;
    let end = rest.find(|c: char| !c.is_ascii_digit());
    rest[..end.unwrap_or(rest.len())].parse().ok()
}

/// The deepest chain of calls: `stack depth 312+0+16` has a number for each function in the order of the code, and
/// kernels before 6.8 round each up to 32 bytes. What follows on newer kernels is left.
fn stack(log: &str, code: &[bpf_insn]) -> Option<u64> {
    let depths = log.split_once("stack depth ")?.1;
    let depths = depths.split_whitespace().next()?;
    let frames = depths.split('+').map(|depth| depth.parse::<u64>().ok());
    let frames: Vec<u64> = frames.collect::<Option<_>>()?;
    let mut starts: Vec<usize> = calls(code).map(|(_, callee)| callee).chain([0]).collect();
    starts.sort_unstable();
    starts.dedup();
    (starts.len() == frames.len()).then(|| chain(code, &starts, &frames, 0))
}

/// Where a function of the program is called, and which: by the instruction that it begins with.
fn calls(code: &[bpf_insn]) -> impl Iterator<Item = (usize, usize)> {
    /// include/uapi/linux/bpf.h
    const BPF_JMP_CALL: u8 = 0x85;
    const BPF_PSEUDO_CALL: u8 = 1;
    code.iter().enumerate().filter_map(|(at, instruction)| {
        let calls = instruction.code == BPF_JMP_CALL && instruction.src_reg() == BPF_PSEUDO_CALL;
        let callee = (at + 1).checked_add_signed(instruction.imm as isize)?;
        calls.then_some((at, callee))
    })
}

/// What a function and the deepest of those that it calls take. The verifier excludes recursion.
fn chain(code: &[bpf_insn], starts: &[usize], frames: &[u64], function: usize) -> u64 {
    let end = starts.get(function + 1).copied().unwrap_or(code.len());
    let below = calls(code)
        .filter(|(at, _)| (starts[function]..end).contains(at))
        .filter_map(|(_, callee)| starts.binary_search(&callee).ok())
        .map(|callee| chain(code, starts, frames, callee));
    frames[function].max(1).next_multiple_of(32) + below.max().unwrap_or(0)
}
