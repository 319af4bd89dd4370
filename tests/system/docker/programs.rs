//! Whose programs an engine is made of: this machine's, or those of another Debian's root on this machine's kernel, devices
//! and network.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::{daemon::binary, netns::Netns};

/// $1 the clean root, $2 an empty folder for what changes, $3 the folder of our own program. Both sides see the same files in
/// `/tmp` and `/run`.
const LAY_OUT: &str = r#"
set -e
mkdir "$2/upper" "$2/work" "$2/root"
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" overlay "$2/root"
cd "$2/root"
mount -t proc proc proc
for folder in dev sys run; do
    mount --rbind "/$folder" "$folder"
done
mount --bind /tmp tmp
mkdir -p ".$3"
mount --bind "$3" ".$3"
"#;

/// Where an engine runs, and what it is made of.
#[derive(Clone)]
pub(super) struct Programs {
    host: Netns,
    root: Option<PathBuf>,
}

impl From<&Netns> for Programs {
    fn from(host: &Netns) -> Self {
        Self {
            host: host.clone(),
            root: None,
        }
    }
}

impl Programs {
    /// Those of the newest Debian. The calling thread has a mount namespace of its own, and `changes` is there for as long as
    /// they run.
    pub(super) fn newest(host: &Netns, changes: &Path) -> Result<Self> {
        let root = std::env::var_os("FORWARDER_ENGINES")
            .context("FORWARDER_ENGINES is not set: run `cargo xtask test --tier 3`")?;
        let binary = binary();
        let mut command = host.command("sh");
        command.args(["-c", LAY_OUT, "sh"]).arg(root).arg(changes);
        command.arg(binary.parent().context("a program has a folder")?);
        let output = command.output()?;
        ensure!(output.status.success(), "lay out a root: {output:?}");
        Ok(Self {
            host: host.clone(),
            root: Some(changes.join("root")),
        })
    }

    /// A command in the host's network.
    pub(super) fn command(&self, program: &str) -> Command {
        match &self.root {
            None => self.host.command(program),
            Some(root) => {
                let mut command = self.host.command("chroot");
                command.arg(root).arg(program);
                command
            }
        }
    }
}
