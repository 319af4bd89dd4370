//! `fresh`: the README's two commands as a new user types them, in a clean Debian with nothing but rustup's stable Rust, on a
//! clone of what is committed. Says how long each took. Run before a release.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    exec::{self, step},
    root,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Write the times to docs/fresh.md
    #[arg(long)]
    write: bool,
    /// Commands to try instead, each as one argument
    #[arg(value_name = "COMMAND")]
    commands: Vec<String>,
}

/// What README.md begins with.
const COMMANDS: [&str; 2] = ["cargo xtask run --once", "cargo xtask test"];

pub(crate) const PROGRAMS: [&str; 5] = ["apt-get", "debootstrap", "git", "setpriv", "unshare"];

/// Runs as root in mount and process namespaces of its own: $1 the clean root, $2 a folder for what changes, $3 the
/// checkout, $4 rustup's home, $5 the folder of its programs, $6 the toolchain's name, $7 the command.
const SCRIPT: &str = r#"
set -e
mkdir -p "$2/upper" "$2/work" "$2/root"
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" overlay "$2/root"
cd "$2/root"
mount -t proc proc proc
mount -t sysfs sys sys
mount --rbind /dev dev
mount -t tmpfs run run
cp --remove-destination /etc/resolv.conf etc/resolv.conf
mkdir -p "root/.rustup/toolchains/$6" root/.cargo/bin
if [ ! -e root/forwarder ]; then git clone --quiet "$3" root/forwarder; fi
cp -P "$5"/* root/.cargo/bin/
cp "$4/settings.toml" root/.rustup/
mount --bind "$4/toolchains/$6" "root/.rustup/toolchains/$6"
exec chroot . env -i HOME=/root TERM=dumb PATH=/root/.cargo/bin:/usr/sbin:/usr/bin:/sbin:/bin RUSTUP_TOOLCHAIN="$6" \
    sh -c "cd /root/forwarder && $7" </dev/null
"#;

pub(crate) fn fresh(options: &Options) -> Result<()> {
    let root = root::debian()?;
    // What is tried is a clone of what is committed now.
    let commit = exec::output(Command::new("git").current_dir(exec::workspace()).args([
        "rev-parse",
        "--short",
        "HEAD",
    ]))?;
    let commit = commit.trim();
    let changes = exec::workspace().join("target/fresh");
    let remove = || {
        exec::run(
            exec::as_root("rm")
                .context("needs root")?
                .args(["-r", "-f"])
                .arg(&changes),
        )
    };
    remove()?;
    fs::create_dir_all(&changes)?;
    let home = exec::output(Command::new("rustup").args(["show", "home"]))?;
    let toolchain = exec::output(Command::new("rustup").args(["show", "active-toolchain"]))?;
    let toolchain = toolchain
        .split_whitespace()
        .next()
        .context("rustup has a toolchain")?;
    let programs = exec::find("rustup").context("rustup is not in PATH")?;
    let programs = programs.parent().context("a program is in a folder")?;

    let commands: Vec<&str> = if options.commands.is_empty() {
        COMMANDS.to_vec()
    } else {
        options.commands.iter().map(String::as_str).collect()
    };
    let mut took = Vec::new();
    for command in commands {
        step(&format!("in a clean root: {command}"));
        let begun = Instant::now();
        let mut inside = exec::as_root("setpriv").context("needs root")?;
        inside
            .args([
                "--pdeathsig",
                "KILL",
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
            ])
            .args(["sh", "-c", SCRIPT, "sh"])
            .args([&root, &changes])
            .arg(exec::workspace())
            .arg(home.trim())
            .arg(programs)
            .args([toolchain, command]);
        ensure!(
            inside.status()?.success(),
            "`{command}` failed in a clean root, which is left in {}",
            changes.display()
        );
        took.push((command, begun.elapsed()));
    }
    remove()?;
    let table = table(&took);
    print!("\n{table}");
    if options.write {
        let (date, _) = exec::today_and_commit()?;
        let text = format!(
            "# From nothing to served\n\n\
             The README's commands in a Debian root that debootstrap made, with rustup's stable Rust and nothing else: no C\n\
             compiler, no nightly Rust, no package that tests need. Written by `cargo xtask fresh --write` on {date} at commit\n\
             {commit}, {}. Times are wall time of one run, downloads included.\n\n{table}",
            machine()
        );
        fs::write(exec::workspace().join("docs/fresh.md"), text)?;
        step("wrote docs/fresh.md");
    }
    Ok(())
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = fs::read_to_string(Path::new("/proc/sys/kernel/osrelease")).unwrap_or_default();
    format!("{cores} processors, Linux {}", kernel.trim())
}

fn table(took: &[(&str, Duration)]) -> String {
    let rows = took.iter().map(|(command, time)| {
        let seconds = time.as_secs();
        format!(
            "| `{command}` | {} min {:02} s |\n",
            seconds / 60,
            seconds % 60
        )
    });
    format!(
        "| command | time |\n|---|--:|\n{}",
        rows.collect::<String>()
    )
}
