//! `vm`: the tests, or any command, under other kernels than the one that runs: Debian's, booted one after
//! the other by QEMU's emulator with this repository's binaries inside. `vm/kernel.rs` has the kernels,
//! `vm/initramfs.rs` what is inside, `vm/machine.rs` one boot.

mod initramfs;
pub(crate) mod kernel;
mod machine;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};

use self::kernel::Kernel;
use crate::{
    exec::{self, step},
    install, test,
};

/// Programs of this machine: the emulator, what fetches and unpacks kernels, what goes into the guest.
pub(crate) const PROGRAMS: [&str; 14] = [
    machine::EMULATOR,
    "apt-get",
    "bash",
    "busybox",
    "depmod",
    "dpkg-deb",
    "ethtool",
    "ip",
    "nft",
    "sctp_test",
    "setpriv",
    "tc",
    "xz",
    "zstd",
];

/// How many times longer the guest may take: the emulator is that much slower at processes and connections.
const SLACK: u32 = 8;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// 5.10, 6.1, 6.12, sid, or a folder that a kernel package was unpacked into; else those four
    #[arg(value_name = "KERNEL")]
    kernels: Vec<String>,
    /// Only tests whose name contains this
    #[arg(long)]
    filter: Option<String>,
    /// Only this tier: 1 packets, 2 network namespaces, 3 Docker (not run unless asked for)
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=3))]
    tier: Option<u8>,
    /// Seconds that one boot may take
    #[arg(long, default_value_t = 3600)]
    timeout: u64,
    /// Parameters for the kernel, such as `lockdown=integrity`
    #[arg(long, default_value = "")]
    append: String,
    /// Kernels that run side by side, on a processor each; a command's run one by one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    jobs: u8,
    /// Write the table to docs/kernels.md too
    #[arg(long, conflicts_with_all = ["filter", "tier", "command"])]
    write: bool,
    /// Fetch Debian's kernels anew
    #[arg(long)]
    refresh: bool,
    /// A command to run instead of the tests, as the guest's root; `forwarder` is in its PATH
    #[arg(last = true)]
    command: Vec<String>,
}

/// What a group of tests came to under a kernel.
struct Outcome {
    kernel: String,
    group: String,
    passed: u32,
    failed: u32,
    /// It said how it ended.
    ended: bool,
    took: Duration,
}

pub(crate) fn vm(options: &Options) -> Result<()> {
    let kernels = kernels(&options.kernels, options.refresh)?;
    let programs = programs(options.tier == Some(3))?;
    let limit = Duration::from_secs(options.timeout);
    if !options.command.is_empty() {
        let root = root(programs, &options.command)?;
        let mut status = 0;
        for kernel in &kernels {
            step(&format!("{} ({})", kernel.name, kernel.release));
            let ended = machine::boot(kernel, &root, &options.append, limit, |line| {
                println!("{line}");
            })?;
            status = if status == 0 { ended } else { status };
        }
        std::process::exit(status);
    }

    // All at once: a build while the machines run must not change what the later ones test.
    let boots = boots(options)
        .into_iter()
        .map(|boot| Ok((initramfs::root(&programs, &script(&boot.groups))?, boot)))
        .collect::<Result<Vec<_>>>()?;
    let next = AtomicUsize::new(0);
    let tested: Vec<OnceLock<Tested>> = kernels.iter().map(|_| OnceLock::new()).collect();
    thread::scope(|scope| {
        for _ in 0..options.jobs {
            scope.spawn(|| {
                while let at = next.fetch_add(1, Ordering::Relaxed)
                    && let Some(kernel) = kernels.get(at)
                {
                    let _ = tested[at].set(test(kernel, &boots, &options.append, limit));
                }
            });
        }
    });
    let tested = tested.into_iter().filter_map(OnceLock::into_inner);
    let (outcomes, broken): (Vec<_>, Vec<_>) = tested.unzip();
    let outcomes: Vec<Outcome> = outcomes.into_iter().flatten().collect();
    print!("\n{}", table(&outcomes));
    if options.write {
        let path = exec::workspace().join("docs/kernels.md");
        fs::write(&path, document(&outcomes)?).with_context(|| path.display().to_string())?;
        step("wrote docs/kernels.md");
    }
    let failed = outcomes
        .iter()
        .filter(|outcome| outcome.failed > 0 || !outcome.ended)
        .map(|outcome| format!("{} on {}", outcome.group, outcome.kernel));
    let failed: Vec<_> = failed.chain(broken.into_iter().flatten()).collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

/// What became of a kernel's groups, and the runs that broke off.
type Tested = (Vec<Outcome>, Vec<String>);

/// All boots of a kernel.
fn test(kernel: &Kernel, boots: &[(Vec<u8>, Boot)], append: &str, limit: Duration) -> Tested {
    let (mut outcomes, mut broken) = (Vec::new(), Vec::new());
    for (root, boot) in boots {
        step(&format!("{} ({})", kernel.name, kernel.release));
        let parameters = format!("{append} {}", boot.parameters);
        let before = outcomes.len();
        let booted = machine::boot(kernel, root, &parameters, limit, |line| {
            println!("[{}] {line}", kernel.name);
            follow(&mut outcomes, kernel, line);
        });
        if let Err(error) = &booted {
            eprintln!("error: {error:#}");
        }
        if booted.is_err() || outcomes.len() - before < boot.groups.len() {
            broken.push(format!("the run on {}", kernel.name));
        }
    }
    (outcomes, broken)
}

/// The kernels of these names; Debian's four for none. What booting takes is looked for first.
pub(crate) fn kernels(names: &[String], refresh: bool) -> Result<Vec<Kernel>> {
    let names = if names.is_empty() {
        kernel::names()
    } else {
        names.to_vec()
    };
    names
        .iter()
        .map(|name| kernel::kernel(name, refresh))
        .collect()
}

/// Runs a program with arguments under a kernel and hands over each line that it prints.
pub(crate) fn run(
    kernel: &Kernel,
    program: &Path,
    arguments: &[&str],
    files: &[(PathBuf, String)],
    line: impl FnMut(&str),
) -> Result<i32> {
    let mut programs = vec![(program.to_owned(), "usr/bin/program".to_owned())];
    programs.extend_from_slice(files);
    let words = [&["program"], arguments].concat();
    let root = initramfs::root(&programs, &quoted(words.iter()))?;
    machine::boot(kernel, &root, "", Duration::from_secs(600), line)
}

/// What Docker consists of.
const ENGINE: [&str; 8] = [
    "containerd",
    "containerd-shim-runc-v2",
    "docker",
    "docker-proxy",
    "dockerd",
    "iptables",
    "runc",
    "tar",
];

/// Builds what is tested, and names where it goes in the guest.
fn programs(has_engine: bool) -> Result<Vec<(PathBuf, String)>> {
    let (binary, tests) = test::build(&[])?;
    let mut programs: Vec<_> = install::PROGRAMS
        .iter()
        .map(|name| (binary.with_file_name(name), format!("usr/bin/{name}")))
        .collect();
    for group in ["packet", "netns", "system"] {
        let program = exec::executable(&tests, group)?;
        programs.push((program, format!("tests/{group}")));
    }
    for name in ENGINE.iter().filter(|_| has_engine) {
        let program = exec::find(name).with_context(|| format!("{name} is missing"))?;
        programs.push((program, format!("usr/bin/{name}")));
    }
    Ok(programs)
}

/// A command's root; its program is taken from this machine if the guest has none of that name.
fn root(mut programs: Vec<(PathBuf, String)>, command: &[String]) -> Result<Vec<u8>> {
    if let Some(name) = command.first()
        && let Some(path) = exec::find(name)
    {
        let to = if name.contains('/') {
            name.trim_start_matches('/').to_owned()
        } else {
            format!("usr/bin/{name}")
        };
        programs.push((path, to));
    }
    initramfs::root(&programs, &(variables() + &quoted(command.iter())))
}

/// Words as a shell reads them back.
fn quoted(words: impl Iterator<Item = impl AsRef<str>>) -> String {
    let quoted: Vec<_> = words
        .map(|word| format!("'{}'", word.as_ref().replace('\'', r"'\''")))
        .collect();
    quoted.join(" ")
}

/// A kernel that lacks something: lockdown, and no qdisc to attach filters to. `tests/netns/restricted.rs`
/// says what is expected of it.
const RESTRICTED: &str = "lockdown=confidentiality module_blacklist=sch_ingress";
/// A kernel that knows one family, for that module of `tests/netns/worlds.rs`.
const WITHOUT_IPV6: &str = "ipv6.disable=1";

/// One start of the machine.
struct Boot {
    parameters: &'static str,
    groups: Vec<Group>,
}

/// A line of the table.
struct Group {
    name: &'static str,
    program: &'static str,
    filter: String,
}

fn boots(options: &Options) -> Vec<Boot> {
    let group = |name, program, filter: Option<&str>| Group {
        name,
        program,
        filter: filter.unwrap_or_default().to_owned(),
    };
    let asked = options.filter.as_deref();
    let mut groups = vec![
        group("packet", "packet", asked),
        group("netns", "netns", asked),
        // Of what needs other programs, only that for which a kernel is the question.
        group("system", "system", asked.or(Some("docker::sctp"))),
    ];
    if options.tier.is_none() {
        groups.pop();
    }
    if let Some(tier) = options.tier {
        groups = groups
            .into_iter()
            .skip(usize::from(tier) - 1)
            .take(1)
            .collect();
    }
    // The guest has nothing that loads Docker's profile.
    let parameters = match options.tier {
        Some(3) => "apparmor=0",
        _ => "",
    };
    let mut boots = vec![Boot { parameters, groups }];
    if asked.is_none() && options.tier.is_none_or(|tier| tier == 2) {
        for (parameters, name) in [(RESTRICTED, "restricted"), (WITHOUT_IPV6, "without_ipv6")] {
            let groups = vec![group(name, "netns", Some(name))];
            boots.push(Boot { parameters, groups });
        }
    }
    boots
}

const GROUP: &str = "==> group ";

/// What runs in the guest: each group under a line that names it.
fn script(groups: &[Group]) -> String {
    let mut script = format!("{}status=0\n", variables());
    for Group {
        name,
        program,
        filter,
    } in groups
    {
        let filter = Some(filter).filter(|filter| !filter.is_empty());
        script += &format!(
            "echo '{GROUP}{name}'\n/tests/{program} {} || status=1\n",
            quoted(filter.iter())
        );
    }
    script + "exit $status\n"
}

/// What the harness reads, and as many open files as systemd allows a service.
fn variables() -> String {
    format!(
        "ulimit -Hn 524288\nexport FORWARDER_BIN=/usr/bin/forwarder FORWARDER_TEST_SLACK={SLACK} FORWARDER_TEST_DEVICES=all \
         DOCKER_RAMDISK=yes RUST_BACKTRACE=0\n"
    )
}

/// Takes notice of a line of the test programs' output.
fn follow(outcomes: &mut Vec<Outcome>, kernel: &Kernel, line: &str) {
    if let Some(group) = line.strip_prefix(GROUP) {
        outcomes.push(Outcome {
            kernel: kernel.release.clone(),
            group: group.to_owned(),
            passed: 0,
            failed: 0,
            ended: false,
            took: Duration::ZERO,
        });
        return;
    }
    let Some(outcome) = outcomes.last_mut() else {
        return;
    };
    let Some(result) = line.strip_prefix("test result: ") else {
        return;
    };
    // ok. 41 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.23s
    let words: Vec<_> = result.split_whitespace().collect();
    for pair in words.windows(2) {
        match pair[1] {
            "passed;" => outcome.passed = pair[0].parse().unwrap_or(0),
            "failed;" => outcome.failed = pair[0].parse().unwrap_or(0),
            _ => {}
        }
    }
    let seconds = words.last().and_then(|word| word.strip_suffix('s'));
    let seconds = seconds.and_then(|word| word.parse().ok()).unwrap_or(0.0);
    outcome.took = Duration::from_secs_f64(seconds);
    outcome.ended = true;
}

/// The table as it is committed.
fn document(outcomes: &[Outcome]) -> Result<String> {
    let (date, commit) = exec::today_and_commit()?;
    Ok(format!(
        "# The tests on other kernels\n\n\
         Written by `cargo xtask vm --write` on {date} at commit {commit}: Debian's kernels in QEMU's emulator, where\n\
         seconds say nothing of speed. `packet` and `netns` are tiers 1 and 2. `restricted` is a boot under lockdown\n\
         (confidentiality) without the qdisc that clsact filters need, `without_ipv6` one with `ipv6.disable=1`.\n\n{}",
        table(outcomes)
    ))
}

/// Markdown, so that it can be shown as it is.
fn table(outcomes: &[Outcome]) -> String {
    let mut text = format!(
        "| {:<28} | {:<12} | passed | failed | seconds |\n|{}|{}|-------:|-------:|--------:|\n",
        "kernel",
        "tests",
        "-".repeat(30),
        "-".repeat(14)
    );
    for outcome in outcomes {
        let failed = if outcome.ended {
            outcome.failed.to_string()
        } else {
            "no end".to_owned()
        };
        text += &format!(
            "| {:<28} | {:<12} | {:>6} | {failed:>6} | {:>7.0} |\n",
            outcome.kernel,
            outcome.group,
            outcome.passed,
            outcome.took.as_secs_f64()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_by_group() {
        let kernel = Kernel {
            name: "6.1".into(),
            release: "6.1.0-1-cloud-amd64".into(),
            image: PathBuf::new(),
            modules: PathBuf::new(),
        };
        let mut outcomes = Vec::new();
        for line in [
            "==> group packet",
            "test forward::tcp ... ok",
            "test result: FAILED. 41 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 12.50s",
            "==> group netns",
            "Segmentation fault",
        ] {
            follow(&mut outcomes, &kernel, line);
        }
        assert_eq!((outcomes[0].passed, outcomes[0].failed), (41, 2));
        assert_eq!(outcomes[0].took, Duration::from_millis(12_500));
        assert!(outcomes[0].ended && !outcomes[1].ended);
        assert!(table(&outcomes).contains("| no end |"));
    }

    #[test]
    fn a_command_survives_the_shell() {
        let words = ["echo", "it's", "a $HOME"];
        assert_eq!(quoted(words.iter()), r"'echo' 'it'\''s' 'a $HOME'");
    }
}
