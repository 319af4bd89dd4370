//! The state file: what was published at run time, and the numbers of all publishes, so that both outlive the process. Each line
//! is a JSON text: the first has everything, each other one what has changed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{
    Container, Difference, Holder, Id, Owner, Policy, Publish, Registry, Spec, Wanted,
    journal::Journal,
};
use crate::{clock, instance::make_private};

const VERSION: u32 = 1;

#[derive(Debug)]
pub struct State {
    journal: Journal,
    /// What was last written of it.
    draining: Vec<Drain>,
    /// The last number and the publishes that the file has from an earlier instance, until this one has written it.
    before: Option<(Id, BTreeMap<Id, StoredPublish>)>,
}

/// What takes no new flows, and has some that may end in peace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drain {
    pub wanted: Wanted,
    /// Its place in the kernel's tables.
    pub place: u32,
    /// The place of what drains behind it; 0 for none.
    pub previous: u32,
    /// It was taken back, and is shown for itself. Else the publish has another backend now.
    pub is_shown: bool,
}

/// What an earlier instance wrote.
#[derive(Debug, Default)]
pub struct Stored {
    path: PathBuf,
    last_id: Id,
    publishes: BTreeMap<Id, StoredPublish>,
    leases: Vec<String>,
    draining: Vec<StoredDrain>,
}

/// What a line of any version has.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Line {
    version: u32,
    last_id: Id,
    /// New ones, and those that have changed.
    publishes: Vec<StoredPublish>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    gone: Vec<Id>,
    /// SPECs of all leases, whose holders come back, where they have changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    leases: Option<Vec<String>>,
    /// All that drains, where that has changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    draining: Option<Vec<StoredDrain>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    #[serde(default = "clock::now")]
    since: u64,
    /// Its place in the kernel's tables, where its counters and flows are.
    #[serde(default)]
    place: u32,
    /// A flag or the configuration asks for it: only its number is kept.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    configured: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoredDrain {
    publish: StoredPublish,
    previous: u32,
    is_shown: bool,
}

impl StoredPublish {
    fn new(wanted: &Wanted, place: u32, configured: bool) -> Self {
        let publish = &wanted.publish;
        Self {
            id: wanted.id,
            owner: wanted.owner.clone(),
            spec: publish.spec.to_string(),
            policy: publish.policy.clone(),
            holder: publish.holder,
            container: publish.container.clone(),
            since: wanted.since,
            place,
            configured,
        }
    }

    /// # Errors
    /// Its SPEC is none.
    fn wanted(&self) -> Result<Wanted> {
        let publish = Publish {
            spec: self.spec.parse()?,
            policy: self.policy.clone(),
            holder: self.holder,
            container: self.container.clone(),
        };
        Ok(Wanted {
            id: self.id,
            owner: self.owner.clone(),
            publish: Arc::new(publish),
            since: self.since,
        })
    }
}

impl StoredDrain {
    fn new(drain: &Drain) -> Self {
        Self {
            publish: StoredPublish::new(&drain.wanted, drain.place, false),
            previous: drain.previous,
            is_shown: drain.is_shown,
        }
    }
}

impl State {
    /// Reads the file, or begins without one.
    ///
    /// # Errors
    /// It is of a later version, damaged, or in a directory that others may write to.
    pub fn open(path: PathBuf) -> Result<(Self, Stored)> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        make_private(directory).map_err(|error| {
            anyhow!("a place for the state file: {error:#}; --ephemeral does without")
        })?;
        let (journal, text) = Journal::open(path)?;
        let shown = journal.path().display();
        ensure!(
            text.as_deref() != Some(""),
            "read {shown}: it is empty, and what was published is lost; move it away to begin without it"
        );
        let stored = Stored::read(journal.path(), text.as_deref().unwrap_or_default())?;
        let state = Self {
            journal,
            draining: Vec::new(),
            before: text.map(|_| (stored.last_id, stored.publishes.clone())),
        };
        Ok((state, stored))
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
        let (mut state, mut stored) = Self::open(path)?;
        let before = stored.publishes.len();
        stored.publishes.retain(|_, it| !is_meant(&it.owner));
        if stored.publishes.len() == before {
            return Ok(());
        }
        let publishes = stored.publishes.into_values();
        state.journal.replace(&text(&Line {
            version: VERSION,
            last_id: stored.last_id,
            publishes: publishes.collect(),
            gone: Vec::new(),
            leases: Some(stored.leases),
            draining: Some(stored.draining),
        })?)
    }

    /// Whether this is what was last written.
    pub fn drains(&self, draining: &[Drain]) -> bool {
        self.draining == draining
    }

    /// Writes a change of what is wanted, by which the registry is what it is now, and all that drains; on return it is on the
    /// disk. A start that changes nothing takes no room there.
    ///
    /// # Errors
    /// The disk is full, or refuses.
    pub fn write(
        &mut self,
        difference: &Difference,
        registry: &Registry,
        draining: Vec<Drain>,
        is_configured: impl Fn(&Wanted) -> bool,
        place: impl Fn(&Wanted) -> u32,
    ) -> Result<()> {
        let stored =
            |wanted: &Wanted| StoredPublish::new(wanted, place(wanted), is_configured(wanted));
        let drains = || draining.iter().map(StoredDrain::new).collect();
        let leases = || {
            let leases = registry.iter().filter(|wanted| wanted.owner.is_lease());
            leases.map(|it| it.publish.spec.to_string()).collect()
        };
        let Difference {
            remove,
            change,
            add,
            ..
        } = difference;
        let new = add.iter().chain(change.iter().map(|(_, after)| after));
        let (leased, lasting): (Vec<_>, Vec<_>) = new.partition(|it| it.owner.is_lease());
        let (released, gone): (Vec<_>, Vec<_>) = remove.iter().partition(|it| it.owner.is_lease());
        let has_leases = !leased.is_empty() || !released.is_empty();
        let change = Line {
            version: VERSION,
            last_id: registry.last_id(),
            publishes: lasting.into_iter().map(stored).collect(),
            gone: gone.iter().map(|it| it.id).collect(),
            leases: has_leases.then(leases),
            draining: (self.draining != draining).then(drains),
        };
        let lasting = || {
            let lasting = registry.iter().filter(|wanted| !wanted.owner.is_lease());
            lasting.map(stored)
        };
        let written = self.journal.add(&text(&change)?, || {
            text(&Line {
                publishes: lasting().collect(),
                gone: Vec::new(),
                leases: Some(leases()),
                draining: Some(drains()),
                ..change
            })
        });
        if let Err(error) = written {
            let is_there = self.before.as_ref().is_some_and(|(last_id, publishes)| {
                *last_id == registry.last_id() && lasting().eq(publishes.values().cloned())
            });
            ensure!(is_there, error);
            warn!("changes will be refused: {error:#}");
            return Ok(());
        }
        (self.draining, self.before) = (draining, None);
        Ok(())
    }
}

fn text(line: &Line) -> Result<String> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    Ok(text)
}

impl Stored {
    fn read(path: &Path, text: &str) -> Result<Self> {
        let shown = path.display();
        let mut stored = Self {
            path: path.to_owned(),
            ..Self::default()
        };
        for text in text.lines() {
            // Its version alone first: a later one may have none of the rest.
            if let Ok(Version { version }) = serde_json::from_str(text)
                && version > VERSION
            {
                bail!(
                    "{shown} has version {version}, and this program knows {VERSION}; use the later one, or move the file away"
                );
            }
            let line: Line = serde_json::from_str(text).map_err(|error| {
                anyhow!("read {shown}: {error}; move it away to begin without it")
            })?;
            stored.last_id = line.last_id;
            for id in line.gone {
                stored.publishes.remove(&id);
            }
            let publishes = line.publishes.into_iter().map(|it| (it.id, it));
            stored.publishes.extend(publishes);
            if let Some(leases) = line.leases {
                stored.leases = leases;
            }
            if let Some(draining) = line.draining {
                stored.draining = draining;
            }
        }
        Ok(stored)
    }

    /// Those that a flag or the configuration asked for.
    pub fn configured(&self) -> BTreeSet<Id> {
        let configured = self.publishes.values().filter(|it| it.configured);
        configured.map(|it| it.id).collect()
    }

    /// Where publishes were in the kernel's tables.
    pub fn places(&self) -> HashMap<Id, u32> {
        let publishes = self.publishes.values();
        publishes.map(|it| (it.id, it.place)).collect()
    }

    /// What was leased. Whoever held the leases asks for them again.
    pub fn leases(&self) -> Vec<Spec> {
        let leases = self.leases.iter();
        leases.filter_map(|spec| spec.parse().ok()).collect()
    }

    /// What drained.
    pub fn draining(&self) -> Vec<Drain> {
        let drains = self.draining.iter().filter_map(|stored| {
            Some(Drain {
                wanted: stored.publish.wanted().ok()?,
                place: stored.publish.place,
                previous: stored.previous,
                is_shown: stored.is_shown,
            })
        });
        drains.collect()
    }

    /// A registry of what is stored. Leases have ended with the connections that held them.
    ///
    /// # Errors
    /// The file holds what no registry accepts.
    pub fn registry(&self, most: usize) -> Result<Registry> {
        let mut registry = Registry::new(most, self.last_id);
        for stored in self.publishes.values() {
            let restored = stored
                .wanted()
                .and_then(|wanted| Ok(registry.restore(wanted)?));
            restored.with_context(|| format!("in {}", self.path.display()))?;
        }
        Ok(registry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(spec: &str) -> Publish {
        Publish::new(spec.parse().expect(spec), Policy::default())
    }

    /// What the next instance makes of the file.
    fn read(path: &Path) -> (Vec<(Id, String, String)>, Id, Vec<Spec>) {
        let (_, stored) = State::open(path.to_owned()).expect("opened");
        let registry = stored.registry(60_000).expect("a registry");
        let rows = registry.iter().map(|it| {
            let (owner, spec) = (it.owner.as_str(), &it.publish.spec);
            (it.id, owner.to_owned(), spec.to_string())
        });
        (rows.collect(), registry.last_id(), stored.leases())
    }

    #[test]
    fn a_file_of_a_later_version_is_named_so_whatever_is_in_it() {
        for text in [
            r#"{"version": 2, "last_id": 7, "publishes": []}"#,
            r#"{"version": 2}"#,
            r#"{"version": 3, "last_id": {}, "publishes": "elsewhere"}"#,
        ] {
            let error = Stored::read(Path::new("/var/lib/forwarder/default.json"), text);
            let error = error.expect_err(text).to_string();
            assert!(error.contains("has version"), "{error}");
            assert!(error.contains("knows 1; use the later one"), "{error}");
        }
        let error = Stored::read(Path::new("a.json"), r#"{"version": 1}"#).expect_err("damaged");
        // The cause comes before the remedy, which the API tells for itself.
        let error = format!("{error:#}");
        assert!(error.starts_with("read a.json: missing field"), "{error}");
        assert!(
            error.ends_with("; move it away to begin without it"),
            "{error}"
        );
    }

    #[test]
    fn a_disk_that_takes_nothing_is_the_cause_and_not_the_remedy() {
        let folder = std::env::temp_dir().join(format!("forwarder-full-{}", std::process::id()));
        let path = folder.join("test.json");
        let (mut state, _) = State::open(path.clone()).expect("opened");
        // Where the new file would be written.
        std::fs::create_dir(folder.join("test.json.new")).expect("made");
        let registry = Registry::new(60_000, 0);
        let none = Difference::default();
        let written = state.write(&none, &registry, Vec::new(), |_| false, |_| 1);
        let error = format!("{:#}", written.expect_err("a folder"));
        assert!(error.contains("test.json: Is a directory"), "{error}");
        assert!(error.ends_with("; --ephemeral does without"), "{error}");
        std::fs::remove_dir_all(folder).expect("removed");
    }

    #[test]
    fn a_start_that_changes_nothing_needs_no_room_on_the_disk() {
        let folder = std::env::temp_dir().join(format!("forwarder-start-{}", std::process::id()));
        let path = folder.join("test.json");
        let (mut state, _) = State::open(path.clone()).expect("opened");
        let mut registry = Registry::new(60_000, 0);
        let one = registry.add(&Owner::cli(), vec![publish("80:172.17.0.2:80")]);
        let one = one.expect("added");
        registry.apply(&one);
        let write = |state: &mut State, registry: &Registry, change: &Difference| {
            state.write(change, registry, Vec::new(), |_| false, |_| 1)
        };
        write(&mut state, &registry, &one).expect("written");
        // Where the new file would be written.
        std::fs::create_dir(folder.join("test.json.new")).expect("made");
        let (mut state, stored) = State::open(path.clone()).expect("opened");
        let mut registry = stored.registry(60_000).expect("a registry");
        let none = Difference::default();
        write(&mut state, &registry, &none).expect("it is there");
        let gone = registry.want(&Owner::cli(), Vec::new()).expect("a change");
        registry.apply(&gone);
        write(&mut state, &registry, &gone).expect_err("a folder");
        registry.apply(&gone.inverse());
        assert_eq!(read(&path).0.len(), 1);
        std::fs::write(&path, "").expect("written");
        let error = State::open(path).expect_err("lost").to_string();
        assert!(error.contains("test.json: it is empty"), "{error}");
        std::fs::remove_dir_all(folder).expect("removed");
    }

    #[test]
    fn what_drains_is_read_as_it_was_last_written() {
        let folder = std::env::temp_dir().join(format!("forwarder-drains-{}", std::process::id()));
        let path = folder.join("test.json");
        let (mut state, _) = State::open(path.clone()).expect("opened");
        let registry = Registry::new(60_000, 0);
        let drain = |place, previous, is_shown| Drain {
            wanted: Wanted {
                id: 1,
                owner: Owner::cli(),
                publish: Arc::new(publish("80:172.17.0.2:80")),
                since: 7,
            },
            place,
            previous,
            is_shown,
        };
        let both = vec![drain(3, 0, true), drain(4, 3, false)];
        for draining in [both, vec![drain(4, 0, false)], Vec::new()] {
            assert_eq!(
                state.drains(&draining),
                draining.is_empty() && state.draining.is_empty()
            );
            let written = state.write(
                &Difference::default(),
                &registry,
                draining.clone(),
                |_| false,
                |_| 1,
            );
            written.expect("written");
            assert!(state.drains(&draining));
            let (_, stored) = State::open(path.clone()).expect("opened");
            assert_eq!(stored.draining(), draining);
        }
        std::fs::remove_dir_all(folder).expect("removed");
    }

    #[test]
    fn changes_of_many_publishes_are_read_as_they_were_written() {
        let folder = std::env::temp_dir().join(format!("forwarder-state-{}", std::process::id()));
        let path = folder.join("test.json");
        let (mut state, _) = State::open(path.clone()).expect("opened");
        let mut registry = Registry::new(60_000, 0);
        let many = 1..=2000;
        let many = many.map(|port| publish(&format!("{port}:172.17.0.2:80")));
        let mut write = |registry: &Registry, change: &Difference| {
            state
                .write(change, registry, Vec::new(), |_| false, |_| 1)
                .expect("written");
            let now = registry.iter().filter(|it| !it.owner.is_lease());
            let now: Vec<_> = now
                .map(|it| {
                    let (owner, spec) = (it.owner.as_str(), &it.publish.spec);
                    (it.id, owner.to_owned(), spec.to_string())
                })
                .collect();
            let (rows, last, leases) = read(&path);
            assert_eq!(rows, now);
            assert_eq!(last, registry.last_id());
            let leased = registry.iter().filter(|it| it.owner.is_lease());
            assert!(leases.iter().eq(leased.map(|it| &it.publish.spec)));
            std::fs::metadata(&path).expect("a file").len()
        };
        let cli = Owner::cli();
        let all = registry.add(&cli, many.collect()).expect("added");
        registry.apply(&all);
        let whole = write(&registry, &all);
        // Another backend, one less, one more, and a lease that comes and goes.
        let mut wanted: Vec<Publish> = registry
            .of(&cli)
            .map(|it| Publish::clone(&it.publish))
            .collect();
        wanted[7] = publish("8:172.17.0.3:80");
        wanted.remove(500);
        wanted.push(publish("3000:172.17.0.2:80"));
        let change = registry.want(&cli, wanted).expect("a change");
        registry.apply(&change);
        let changed = write(&registry, &change);
        assert!(
            changed > whole && changed < whole + 1000,
            "{whole} {changed}"
        );
        let lease = Owner::lease(1);
        for leased in [vec![publish("4000:172.17.0.2:80")], Vec::new()] {
            let change = registry.want(&lease, leased).expect("a lease");
            registry.apply(&change);
            write(&registry, &change);
        }
        // The changes become as long as what they change, and it is written as a whole.
        let none = registry.want(&cli, Vec::new()).expect("a change");
        let mut longest = 0;
        for _ in 0..3 {
            for change in [&none, &none.inverse()] {
                registry.apply(change);
                longest = longest.max(write(&registry, change));
            }
        }
        assert!(longest < whole * 21 / 10, "{longest}");
        std::fs::remove_dir_all(folder).expect("removed");
    }
}
