//! `verifier`: what each program costs to verify under each kernel, as the table in `docs/verifier.md`. The
//! figures are of `forwarder-verifier` (in `tests/src/bin`), which runs on this machine and in the others.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{
    ebpf,
    exec::{self, step},
    vm,
};

/// The verifier's limits for privileged programs: instructions walked (include/linux/bpf.h,
/// BPF_COMPLEXITY_LIMIT_INSNS) and bytes of stack of a chain of calls (include/linux/filter.h, MAX_BPF_STACK).
const LIMITS: [(&str, &str, u64); 2] = [
    ("verified", "instructions verified", 1_000_000),
    ("stack", "bytes of stack", 512),
];

#[derive(clap::Args)]
pub(crate) struct Options {
    /// As for `vm`
    #[arg(value_name = "KERNEL")]
    kernels: Vec<String>,
    /// Write docs/verifier.md instead of printing it
    #[arg(long)]
    write: bool,
}

/// Programs of one kernel.
struct Measured {
    kernel: String,
    programs: Vec<Value>,
}

pub(crate) fn verifier(options: &Options) -> Result<()> {
    let kernels = vm::kernels(&options.kernels, false)?;
    let object = ebpf::object()?;
    step("building forwarder-verifier");
    let built = exec::build_executables(
        &[
            "build",
            "--package",
            "forwarder-tests",
            "--bin",
            "forwarder-verifier",
        ],
        &object,
    )?;
    let program = exec::executable(&built, "forwarder-verifier")?;
    let mut measured = Vec::new();
    for kernel in &kernels {
        step(&format!("{} ({})", kernel.name, kernel.release));
        let mut lines = Vec::new();
        let files = [(object.path.clone(), "object".to_owned())];
        let status = vm::run(kernel, &program, &["/object"], &files, |line| {
            lines.push(line.to_owned());
        })?;
        ensure!(
            status == 0,
            "forwarder-verifier under {}: {}",
            kernel.release,
            lines.join("; ")
        );
        measured.push(Measured {
            kernel: kernel.release.clone(),
            programs: parsed(&lines)?,
        });
    }
    if let Some(here) = here(&program, &object.path)? {
        measured.push(here);
    }
    let text = document(&measured)?;
    if options.write {
        let path = exec::workspace().join("docs/verifier.md");
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        step("wrote docs/verifier.md");
    } else {
        print!("{text}");
    }
    let refused: Vec<_> = measured
        .iter()
        .filter(|on| {
            on.programs
                .iter()
                .any(|program| !program["refused"].is_null())
        })
        .map(|on| on.kernel.as_str())
        .collect();
    if !refused.is_empty() {
        bail!("a program is refused by {}", refused.join(", "));
    }
    Ok(())
}

/// This machine's own kernel, whose times are real ones; `None` where nobody may load programs.
fn here(program: &Path, object: &Path) -> Result<Option<Measured>> {
    let Some(mut command) = exec::as_root(program) else {
        step("not on this machine: loading programs needs root");
        return Ok(None);
    };
    step("this machine");
    let text = exec::output(command.arg(object))?;
    let release = exec::output(Command::new("uname").arg("-r"))?;
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    Ok(Some(Measured {
        kernel: format!("{} (this machine)", release.trim()),
        programs: parsed(&lines)?,
    }))
}

fn parsed(lines: &[String]) -> Result<Vec<Value>> {
    lines
        .iter()
        .map(|line| serde_json::from_str(line).with_context(|| line.clone()))
        .collect()
}

fn document(measured: &[Measured]) -> Result<String> {
    let (date, commit) = exec::today_and_commit()?;
    let mut text = format!(
        "# What the verifier says\n\n\
         Written by `cargo xtask verifier --write` on {} at commit {}. Figures are the verifier's own (`BPF_LOG_STATS`);\n\
         times are of one load. The stack is that of the deepest chain of calls, each function's share rounded up to 32 bytes.\n\
         Kernels run in QEMU's emulator, where computing takes about five times as long, except for this machine's.\n\n\
         | kernel | program | instructions | verified | stack | load |\n\
         |---|---|--:|--:|--:|--:|\n",
        date, commit
    );
    for on in measured {
        for program in &on.programs {
            let name = program["program"].as_str().unwrap_or_default();
            if let Some(why) = program["refused"].as_str() {
                text += &format!("| {} | `{name}` | refused: {why} ||||\n", on.kernel);
                continue;
            }
            text += &format!(
                "| {} | `{name}` | {} | {} | {} | {} ms |\n",
                on.kernel,
                program["instructions"],
                program["verified"],
                program["stack"],
                program["microseconds"].as_u64().unwrap_or(0) / 1000
            );
        }
    }
    text += "\nThe limits are 1,000,000 verified instructions and 512 bytes of stack. Above half of one, at its worst:\n\n";
    let mut none = true;
    for line in warnings(measured) {
        none = false;
        text += &format!("- {line}\n");
    }
    if none {
        text += "- nothing\n";
    }
    Ok(text)
}

/// The worst of each program against each limit, if it is above half.
fn warnings(measured: &[Measured]) -> Vec<String> {
    let mut names: Vec<&str> = measured
        .iter()
        .flat_map(|on| &on.programs)
        .filter_map(|program| program["program"].as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    let mut warnings = Vec::new();
    for name in names {
        for (key, what, limit) in LIMITS {
            let worst = measured
                .iter()
                .flat_map(|on| on.programs.iter().map(move |program| (on, program)))
                .filter(|(_, program)| program["program"] == name)
                .filter_map(|(on, program)| Some((program[key].as_u64()?, &on.kernel)))
                .max();
            if let Some((worst, kernel)) = worst
                && worst > limit / 2
            {
                warnings.push(format!("`{name}`: {worst} of {limit} {what} ({kernel})"));
            }
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_above_half_of_a_limit_is_reported() {
        let on = |kernel: &str, verified: u64, stack: u64| Measured {
            kernel: kernel.into(),
            programs: vec![
                serde_json::json!({"program": "ingress", "verified": verified, "stack": stack}),
            ],
        };
        let warnings = warnings(&[on("a", 400_000, 300), on("b", 499_999, 256)]);
        assert_eq!(warnings, ["`ingress`: 300 of 512 bytes of stack (a)"]);
    }
}
