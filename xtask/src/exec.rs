//! Starting other programs, and where things are in the repository.

#![expect(unsafe_code, reason = "a call that std does not have")]

use std::{
    ffi::OsStr,
    io::IsTerminal,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, anyhow, bail};

use crate::ebpf::Object;

/// The repository's top folder.
pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask is a folder of the workspace")
}

/// Says what comes next.
pub(crate) fn step(what: &str) {
    eprintln!("==> {what}");
}

/// The cargo that started this task, for everything that builds on stable.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    without_package_variables(&mut command);
    command
}

/// A program of another toolchain. What cargo and rustup set for the present one is cleared, since
/// it would win over `toolchain`.
pub(crate) fn rustup_run(toolchain: &str, program: &str) -> Command {
    let mut command = Command::new("rustup");
    command
        .args(["run", toolchain, program])
        .current_dir(workspace());
    for name in [
        "CARGO",
        "CARGO_BUILD_TARGET",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "LD_LIBRARY_PATH",
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
    ] {
        command.env_remove(name);
    }
    // What is missing is installed by `setup` alone, where it is said.
    command.env("RUSTUP_AUTO_INSTALL", "0");
    without_package_variables(&mut command);
    command
}

/// `CARGO_PKG_NAME` and its kin describe xtask; inherited, they make build scripts run again.
fn without_package_variables(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
}

/// Runs to the end with our output; an exit status other than 0 is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    if !status.success() {
        bail!("{} failed ({status})", shown(command));
    }
    Ok(())
}

/// Runs to the end and returns standard output; standard error stays ours.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    if !output.status.success() {
        bail!("{} failed ({})", shown(command), output.status);
    }
    String::from_utf8(output.stdout).context("output that is not UTF-8")
}

/// Whether it runs and succeeds; nothing is shown.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    let quiet = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// Becomes the program: signals and the exit status are then its own.
pub(crate) fn become_program(mut command: Command) -> Result<()> {
    let error = command.exec();
    Err(anyhow!(error).context(format!("cannot start {}", shown(&command))))
}

/// Whether a program of that name is in PATH.
pub(crate) fn in_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Where a program is; a user's PATH often lacks the folders where `ip` and `nft` live.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

pub(crate) fn is_root() -> bool {
    // SAFETY: takes nothing, cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// `program` with root's rights: as it is for root, through sudo for others, `None` where neither
/// can be. `sudo` may ask for a password only where somebody can type it.
pub(crate) fn as_root(program: impl AsRef<OsStr>) -> Option<Command> {
    // Root's own PATH may lack the folders that `find` looks in.
    let found = program.as_ref().to_str().and_then(find);
    let program = found.as_deref().map_or(program.as_ref(), Path::as_os_str);
    if is_root() {
        return Some(Command::new(program));
    }
    let sudo = in_path("sudo")
        && (std::io::stdin().is_terminal() || succeeds(Command::new("sudo").args(["-n", "true"])));
    sudo.then(|| {
        let mut command = Command::new("sudo");
        command.arg("env");
        // sudo clears the environment; these are ours and say what to run and how to report.
        for name in ["FORWARDER_BIN", "RUST_BACKTRACE", "RUST_LOG"] {
            if let Some(value) = std::env::var_os(name) {
                command.arg([OsStr::new(name), OsStr::new("="), &value].join_os());
            }
        }
        command.arg(program);
        command
    })
}

trait JoinOs {
    fn join_os(&self) -> std::ffi::OsString;
}

impl JoinOs for [&OsStr] {
    fn join_os(&self) -> std::ffi::OsString {
        self.iter()
            .fold(std::ffi::OsString::new(), |mut whole, part| {
                whole.push(part);
                whole
            })
    }
}

/// Builds with stable cargo and returns the executables that came out, by target name. `forwarder` embeds `object`.
pub(crate) fn build_executables(args: &[&str], object: &Object) -> Result<Vec<(String, PathBuf)>> {
    let mut build = cargo();
    object.embed(&mut build);
    executables(build.args(args))
}

/// Runs a build and returns the executables that came out.
pub(crate) fn executables(build: &mut Command) -> Result<Vec<(String, PathBuf)>> {
    let text = output(build.arg("--message-format=json-render-diagnostics"))?;
    let mut executables = Vec::new();
    for line in text.lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("cargo's message")?;
        if let (Some(path), Some(name)) = (
            message["executable"].as_str(),
            message["target"]["name"].as_str(),
        ) {
            executables.push((name.to_owned(), PathBuf::from(path)));
        }
    }
    Ok(executables)
}

/// The one named `name` among what `build_executables` returned.
pub(crate) fn executable(built: &[(String, PathBuf)], name: &str) -> Result<PathBuf> {
    let found = built.iter().find(|(target, _)| target == name);
    found
        .map(|(_, path)| path.clone())
        .with_context(|| format!("cargo built no {name}"))
}

fn shown(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect();
    format!("`{}`", words.join(" "))
}

/// What a document that is written says of itself.
pub(crate) fn today_and_commit() -> Result<(String, String)> {
    let commit = output(
        Command::new("git")
            .current_dir(workspace())
            .args(["describe", "--always", "--dirty"]),
    )?;
    let date = output(Command::new("date").args(["-u", "+%Y-%m-%d"]))?;
    Ok((date.trim().to_owned(), commit.trim().to_owned()))
}
