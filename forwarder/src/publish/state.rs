//! The state file: what was published at run time, and the numbers of all publishes, so that both outlive the process. It is
//! written as a whole beside the old one, synced, and put in its place.

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Container, Holder, Id, Owner, Policy, Publish, Registry, Spec, Wanted};
use crate::instance::make_private;

const VERSION: u32 = 1;

#[derive(Debug)]
pub struct State {
    path: PathBuf,
    stored: Stored,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Stored {
    version: u32,
    last_id: Id,
    publishes: Vec<StoredPublish>,
    /// SPECs of leases, whose holders come back.
    #[serde(default)]
    leases: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoredPublish {
    id: Id,
    owner: Owner,
    spec: String,
    #[serde(flatten)]
    policy: Policy,
    #[serde(default, skip_serializing_if = "Holder::is_forwarder")]
    holder: Holder,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    container: Option<Container>,
    /// Its place in the kernel's tables, where its counters and flows are.
    #[serde(default)]
    place: u32,
    /// A flag or the configuration asks for it: only its number is kept.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    configured: bool,
}

impl State {
    /// Reads the file, or begins without one.
    ///
    /// # Errors
    /// It is of a later version, damaged, or in a directory that others may write to.
    pub fn open(path: PathBuf) -> Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        make_private(directory).context("a place for the state file; --ephemeral does without")?;
        let stored = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| {
                format!("read {}; move it away to begin without it", path.display())
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Stored::default(),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        if stored.version > VERSION {
            bail!(
                "{} has version {}, and this program knows {VERSION}; use the later one, or move the file away",
                path.display(),
                stored.version
            );
        }
        Ok(Self { path, stored })
    }

    /// Those that a flag or the configuration asked for.
    pub fn configured(&self) -> BTreeSet<Id> {
        let configured = self.stored.publishes.iter().filter(|it| it.configured);
        configured.map(|it| it.id).collect()
    }

    /// Where publishes were in the kernel's tables.
    pub fn places(&self) -> HashMap<Id, u32> {
        let publishes = self.stored.publishes.iter();
        publishes.map(|it| (it.id, it.place)).collect()
    }

    /// What was leased. Whoever held the leases asks for them again.
    pub fn leases(&self) -> Vec<Spec> {
        let leases = self.stored.leases.iter();
        leases.filter_map(|spec| spec.parse().ok()).collect()
    }

    /// A registry of what is stored. Leases have ended with the connections that held them.
    ///
    /// # Errors
    /// The file holds what no registry accepts.
    pub fn registry(&self, most: usize) -> Result<Registry> {
        let mut registry = Registry::new(most, self.stored.last_id);
        for stored in &self.stored.publishes {
            let spec = stored.spec.parse();
            let publish = Publish {
                spec: spec.with_context(|| format!("in {}", self.path.display()))?,
                policy: stored.policy.clone(),
                holder: stored.holder,
                container: stored.container.clone(),
            };
            let restored = registry.restore(Wanted {
                id: stored.id,
                owner: stored.owner.clone(),
                publish: Arc::new(publish),
            });
            restored.with_context(|| format!("in {}", self.path.display()))?;
        }
        Ok(registry)
    }

    /// Takes out what these owners have, while no instance runs: whoever calls holds its lock. Where there is no file,
    /// there is nothing to do.
    ///
    /// # Errors
    /// As [`State::open`], and those of writing.
    pub fn forget(path: PathBuf, is_meant: &dyn Fn(&Owner) -> bool) -> Result<()> {
        if !path.exists() {
            return Ok(());
        }
        let mut state = Self::open(path)?;
        let before = state.stored.publishes.len();
        state.stored.publishes.retain(|it| !is_meant(&it.owner));
        if state.stored.publishes.len() == before {
            return Ok(());
        }
        replace(&state.path, &serde_json::to_vec(&state.stored)?)
            .with_context(|| format!("write {}", state.path.display()))
    }

    /// Writes what is wanted now; on return it is on the disk.
    ///
    /// # Errors
    /// The disk is full, or refuses.
    pub fn write(
        &mut self,
        registry: &Registry,
        is_configured: impl Fn(&Wanted) -> bool,
        place: impl Fn(&Wanted) -> u32,
    ) -> Result<()> {
        let publishes = registry.iter().filter(|wanted| !wanted.owner.is_lease());
        let publishes = publishes.map(|wanted| StoredPublish {
            id: wanted.id,
            owner: wanted.owner.clone(),
            spec: wanted.publish.spec.to_string(),
            policy: wanted.publish.policy.clone(),
            holder: wanted.publish.holder,
            container: wanted.publish.container.clone(),
            configured: is_configured(wanted),
            place: place(wanted),
        });
        let leases = registry.iter().filter(|wanted| wanted.owner.is_lease());
        let stored = Stored {
            leases: leases.map(|it| it.publish.spec.to_string()).collect(),
            version: VERSION,
            last_id: registry.last_id(),
            publishes: publishes.collect(),
        };
        let shown = self.path.display();
        replace(&self.path, &serde_json::to_vec(&stored)?)
            .with_context(|| format!("write {shown}; --ephemeral does without"))?;
        self.stored = stored;
        Ok(())
    }
}

/// Puts a text in place of a file's, as a whole and on the disk; or leaves everything as it was.
pub(super) fn replace(path: &Path, text: &[u8]) -> Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let mut options = OpenOptions::new();
    options.create(true).truncate(true).write(true);
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let mut file = options.open(&beside)?;
    let written = file.write_all(text).and_then(|()| file.sync_data());
    let replaced = written.and_then(|()| fs::rename(&beside, path));
    if replaced.is_err() {
        // On a full disk it would take the room that is left.
        let _ = fs::remove_file(&beside);
    }
    replaced?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
    Ok(())
}
