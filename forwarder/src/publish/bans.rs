//! Bans: sources of which nothing gets into any published port, or into one, until a time or for ever. Each has an owner, and a
//! source is banned until the last of its owners lets it in.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::{self, Write as _},
    net::IpAddr,
    path::Path,
    str::FromStr,
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;

use super::{Id, Owner, journal::Journal};
use crate::clock;

const SECOND: i128 = 1_000_000_000;

/// When a ban ends, in nanoseconds of [`clock::boot`]; `None`: never. So it lasts as long as it was meant to when somebody sets
/// the clock, in user space as in the kernel.
pub type Until = Option<u64>;

/// The time that is so many seconds after the epoch, as the clock is now; one that no clock gets to is never.
pub fn until(seconds: u64) -> Until {
    until_by(seconds, clock::booted())
}

fn until_by(seconds: u64, booted: i128) -> Until {
    let until = i128::from(seconds) * SECOND - booted;
    u64::try_from(until.max(0)).ok()
}

/// The seconds since the epoch at which a ban ends, as the clock is now.
pub fn seconds(until: u64) -> u64 {
    seconds_by(until, clock::booted())
}

/// Rounded: the two clocks are read one after the other.
fn seconds_by(until: u64, booted: i128) -> u64 {
    let seconds = (i128::from(until) + booted + SECOND / 2) / SECOND;
    u64::try_from(seconds).unwrap_or_default()
}

/// What is banned: a source, from a publish or from all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Banned {
    pub publish: Option<Id>,
    /// An address is a network of one.
    pub network: IpNet,
}

impl fmt::Display for Banned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&described(self.network, self.publish.as_ref()))
    }
}

/// A source and what it is banned from, in words.
pub fn described(network: IpNet, publish: Option<&impl fmt::Display>) -> String {
    match publish {
        None => network.to_string(),
        Some(publish) => format!("{network} from publish {publish}"),
    }
}

/// What was to be taken back is not there.
#[derive(Debug, thiserror::Error)]
pub struct NotBanned {
    pub banned: Banned,
    /// Whose ban was meant; without, anybody's.
    pub owner: Option<Owner>,
}

impl fmt::Display for NotBanned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is not banned", self.banned)?;
        if let Some(owner) = &self.owner {
            write!(f, " by {owner}")?;
        }
        f.write_str("; `forwarder bans` shows what is")
    }
}

/// A change of bans.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// What is banned now, or until another time.
    pub new: Vec<(Banned, Owner, Until)>,
    pub gone: Vec<(Banned, Owner)>,
}

/// A change as a packet meets it, whoever has banned its source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effect {
    pub new: Vec<(Banned, Until)>,
    pub gone: Vec<Banned>,
}

/// All bans.
#[derive(Clone, Debug, Default)]
pub struct Bans {
    everywhere: Scope,
    of: BTreeMap<Id, Scope>,
}

/// What each owner has banned from the same.
type Scope = BTreeMap<Owner, Sources>;

impl Bans {
    /// Whether a source is banned now from a publish.
    pub fn has(&self, source: IpAddr, publish: Id) -> bool {
        let source = source.to_canonical();
        let by_any = |scope: &Scope| scope.values().any(|sources| sources.has(source));
        by_any(&self.everywhere) || self.of.get(&publish).is_some_and(by_any)
    }

    fn scope(&self, publish: Option<Id>) -> Option<&Scope> {
        match publish {
            None => Some(&self.everywhere),
            Some(id) => self.of.get(&id),
        }
    }

    /// Until when each owner has banned this.
    pub fn owners(&self, banned: Banned) -> impl Iterator<Item = (&Owner, Until)> {
        let owners = self.scope(banned.publish).into_iter().flatten();
        owners.filter_map(move |(owner, sources)| {
            Some((owner, *sources.networks.get(&banned.network)?))
        })
    }

    /// Those that last, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (Banned, &Owner, Until)> {
        self.all().filter(|(_, _, until)| lasts(*until))
    }

    /// All those of one publish.
    pub fn of(&self, publish: Id) -> impl Iterator<Item = (Banned, &Owner)> {
        let scope = self.of.get(&publish).into_iter();
        scope
            .flat_map(move |scope| of_scope(Some(publish), scope).map(|(it, owner, _)| (it, owner)))
    }

    fn all(&self) -> impl Iterator<Item = (Banned, &Owner, Until)> {
        let of = self.of.iter().map(|(id, scope)| (Some(*id), scope));
        let all = [(None, &self.everywhere)].into_iter().chain(of);
        all.flat_map(|(publish, scope)| of_scope(publish, scope))
    }

    /// What ends by itself: those whose time is over, and of publishes that are no more.
    pub fn over(&self, is_published: impl Fn(Id) -> bool) -> Vec<(Banned, Owner)> {
        let is_left = |banned: &Banned| banned.publish.is_none_or(&is_published);
        let over = self
            .all()
            .filter(|(it, _, until)| !lasts(*until) || !is_left(it));
        over.map(|(banned, owner, _)| (banned, owner.clone()))
            .collect()
    }

    /// What makes these all that there are.
    pub fn replaced_by(&self, new: Vec<(Banned, Owner, Until)>) -> Change {
        let kept: HashSet<(Banned, &Owner)> =
            new.iter().map(|(it, owner, _)| (*it, owner)).collect();
        let gone = self.all().map(|(banned, owner, _)| (banned, owner));
        let gone = gone.filter(|banned| !kept.contains(banned));
        Change {
            gone: gone.map(|(it, owner)| (it, owner.clone())).collect(),
            new,
        }
    }

    /// What a packet is to meet of these now.
    pub fn in_force(&self, banned: impl Iterator<Item = Banned>) -> Effect {
        let banned: HashSet<Banned> = banned.collect();
        Effect::of(banned.into_iter().map(|banned| {
            let untils = self.owners(banned).map(|(_, until)| until);
            (banned, untils.reduce(later))
        }))
    }

    /// What a packet is to meet of a change that is not applied yet.
    pub fn effect(&self, change: &Change) -> Effect {
        let new = change.new.iter();
        let new = new.map(|(banned, owner, until)| ((*banned, owner), Some(*until)));
        let gone = change.gone.iter();
        let gone = gone.map(|(banned, owner)| ((*banned, owner), None));
        // Of two words about the same the last one counts.
        let changed: HashMap<(Banned, &Owner), Option<Until>> = new.chain(gone).collect();
        let mut after: HashMap<Banned, Option<Until>> = HashMap::new();
        for (&(banned, _), &until) in &changed {
            let longest = after.entry(banned).or_default();
            *longest = (*longest).into_iter().chain(until).reduce(later);
        }
        for (&banned, longest) in &mut after {
            let others = self.owners(banned);
            let others = others.filter(|(owner, _)| !changed.contains_key(&(banned, *owner)));
            let all = (*longest).into_iter().chain(others.map(|(_, until)| until));
            *longest = all.reduce(later);
        }
        Effect::of(after.into_iter())
    }

    pub fn apply(&mut self, change: &Change) {
        for (Banned { publish, network }, owner, until) in &change.new {
            let scope = match publish {
                None => &mut self.everywhere,
                Some(id) => self.of.entry(*id).or_default(),
            };
            match scope.get_mut(owner) {
                Some(sources) => sources.insert(*network, *until),
                None => scope
                    .entry(owner.clone())
                    .or_default()
                    .insert(*network, *until),
            }
        }
        for (Banned { publish, network }, owner) in &change.gone {
            let scope = match publish {
                None => Some(&mut self.everywhere),
                Some(id) => self.of.get_mut(id),
            };
            let Some(scope) = scope else { continue };
            if let Some(sources) = scope.get_mut(owner) {
                sources.remove(*network);
                if sources.networks.is_empty() {
                    scope.remove(owner);
                }
            }
            if let Some(id) = publish
                && scope.is_empty()
            {
                self.of.remove(id);
            }
        }
    }
}

impl Effect {
    fn of(all: impl Iterator<Item = (Banned, Option<Until>)>) -> Self {
        let mut effect = Self::default();
        for (banned, until) in all {
            match until {
                Some(until) => effect.new.push((banned, until)),
                None => effect.gone.push(banned),
            }
        }
        effect
    }
}

/// The later end of two bans.
fn later(one: Until, other: Until) -> Until {
    Some(one?.max(other?))
}

fn of_scope(publish: Option<Id>, scope: &Scope) -> impl Iterator<Item = (Banned, &Owner, Until)> {
    scope.iter().flat_map(move |(owner, sources)| {
        let networks = sources.networks.iter();
        networks.map(move |(&network, &until)| (Banned { publish, network }, owner, until))
    })
}

/// Sources that one owner has banned from the same.
#[derive(Clone, Debug, Default)]
struct Sources {
    networks: HashMap<IpNet, Until>,
    /// How many there are of each family and length.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl Sources {
    fn insert(&mut self, network: IpNet, until: Until) {
        if self.networks.insert(network, until).is_none() {
            *self.lengths.entry(length(network)).or_default() += 1;
        }
    }

    fn remove(&mut self, network: IpNet) {
        if self.networks.remove(&network).is_none() {
            return;
        }
        if let Some(count) = self.lengths.get_mut(&length(network)) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&length(network));
            }
        }
    }

    fn has(&self, source: IpAddr) -> bool {
        self.lengths.keys().any(|&(is_v4, length)| {
            let network = IpNet::new(source, length).map(|network| network.trunc());
            is_v4 == source.is_ipv4()
                && network.is_ok_and(|it| self.networks.get(&it).is_some_and(|it| lasts(*it)))
        })
    }
}

const fn length(network: IpNet) -> (bool, u8) {
    match network {
        IpNet::V4(v4) => (true, v4.prefix_len()),
        IpNet::V6(v6) => (false, v6.prefix_len()),
    }
}

fn lasts(until: Until) -> bool {
    until.is_none_or(|until| until > clock::boot())
}

/// The file with the bans. A line is a change, of bans with commas in between: the network, the second since the epoch at which its
/// ban ends (`-`: never), the publish, if it is of one, and the owner behind `@`, if that is not `cli`. With `!` in front it is a
/// ban that was taken back.
#[derive(Debug)]
pub struct BansFile {
    journal: Journal,
    /// [`clock::booted`] when its times were written.
    booted: i128,
}

/// What a line says of one ban.
struct Entry(Banned, Owner, Option<Until>);

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(Banned { publish, network }, owner, until) = self;
        if until.is_none() {
            f.write_str("!")?;
        }
        write!(f, "{network}")?;
        match until.flatten() {
            Some(until) => write!(f, " {}", seconds(until))?,
            None => f.write_str(" -")?,
        }
        if let Some(id) = publish {
            write!(f, " {id}")?;
        }
        if owner.is_cli() {
            return Ok(());
        }
        write!(f, " @{owner}")
    }
}

impl FromStr for Entry {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (text, is_gone) = match text.strip_prefix('!') {
            Some(text) => (text, true),
            None => (text, false),
        };
        let mut words = text.split(' ');
        let network = words.next().and_then(|network| network.parse().ok());
        let until = match words.next() {
            Some("-") => None,
            seconds => until(seconds.ok_or(())?.parse().map_err(drop)?),
        };
        let (mut publish, mut owner) = (None, Owner::cli());
        for word in words {
            match word.strip_prefix('@') {
                Some(name) => owner = name.parse().map_err(drop)?,
                None => publish = Some(word.parse().map_err(drop)?),
            }
        }
        let network = network.ok_or(())?;
        Ok(Self(
            Banned { publish, network },
            owner,
            (!is_gone).then_some(until),
        ))
    }
}

impl BansFile {
    /// The file beside a state file, with those of its bans that last.
    ///
    /// # Errors
    /// It cannot be read, or holds something else.
    pub fn open(state: &Path) -> Result<(Self, Bans)> {
        let (journal, text) = Journal::open(state.with_extension("bans"))?;
        let mut bans = Bans::default();
        for line in text.as_deref().unwrap_or_default().lines() {
            let mut change = Change::default();
            for text in line.split(',') {
                let entry = text.parse::<Entry>();
                let shown = journal.path().display();
                let Ok(Entry(banned, owner, until)) = entry else {
                    anyhow::bail!(
                        "{shown}: {text:?} is no ban; move the file away to begin without it"
                    );
                };
                match until {
                    Some(until) => change.new.push((banned, owner, until)),
                    None => change.gone.push((banned, owner)),
                }
            }
            bans.apply(&change);
        }
        let over = bans.over(|_| true);
        bans.apply(&Change {
            gone: over,
            ..Change::default()
        });
        let booted = clock::booted();
        Ok((Self { journal, booted }, bans))
    }

    /// Writes a change of these; on return it is on the disk.
    ///
    /// # Errors
    /// The disk is full, or refuses.
    pub fn write(&mut self, change: &Change, before: &Bans) -> Result<()> {
        let mut line = String::new();
        let new = change
            .new
            .iter()
            .map(|(it, owner, until)| Entry(*it, owner.clone(), Some(*until)));
        let gone = change.gone.iter();
        let gone = gone.map(|(it, owner)| Entry(*it, owner.clone(), None));
        for entry in new.chain(gone) {
            let comma = if line.is_empty() { "" } else { "," };
            write!(line, "{comma}{entry}").context("no memory")?;
        }
        if line.is_empty() {
            return Ok(());
        }
        line.push('\n');
        self.journal.add(&line, || {
            let mut after = before.clone();
            after.apply(change);
            whole(&after)
        })
    }

    /// Writes the times anew, which are those of the clock, if somebody has set that.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn follow_clock(&mut self, bans: &Bans) -> Result<()> {
        let booted = clock::booted();
        if (booted - self.booted).abs() < SECOND {
            return Ok(());
        }
        if bans.iter().any(|(_, _, until)| until.is_some()) {
            self.journal.replace(&whole(bans)?)?;
        }
        self.booted = booted;
        Ok(())
    }
}

fn whole(bans: &Bans) -> Result<String> {
    let mut whole = String::new();
    for (banned, owner, until) in bans.iter() {
        writeln!(whole, "{}", Entry(banned, owner.clone(), Some(until)))?;
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().expect(text)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    fn from_all(network: &str) -> Banned {
        let network = net(network);
        Banned {
            publish: None,
            network,
        }
    }

    fn from_one(network: &str, id: Id) -> Banned {
        let publish = Some(id);
        Banned {
            publish,
            ..from_all(network)
        }
    }

    fn jail() -> Owner {
        "fail2ban:sshd".parse().expect("a name")
    }

    fn by_cli(new: Vec<(Banned, Until)>) -> Vec<(Banned, Owner, Until)> {
        let new = new.into_iter();
        new.map(|(banned, until)| (banned, Owner::cli(), until))
            .collect()
    }

    fn banned(new: Vec<(Banned, Until)>) -> Bans {
        let mut bans = Bans::default();
        bans.apply(&Change {
            new: by_cli(new),
            gone: Vec::new(),
        });
        bans
    }

    #[test]
    fn a_source_is_banned_by_its_address_or_its_network_until_that_is_over() {
        let past = Some(clock::boot() - 1_000_000_000);
        let future = Some(clock::boot() + 60_000_000_000);
        let bans = banned(vec![
            (from_all("192.0.2.7/32"), None),
            (from_all("2001:db8::/32"), future),
            (from_all("198.51.100.0/24"), past),
            (from_one("203.0.113.0/24", 5), None),
        ]);
        for (source, is_banned) in [
            ("192.0.2.7", true),
            ("::ffff:192.0.2.7", true),
            ("192.0.2.8", false),
            ("2001:db8::5", true),
            ("2001:db9::5", false),
            ("198.51.100.9", false),
        ] {
            assert_eq!(bans.has(ip(source), 4), is_banned, "{source}");
        }
        assert!(bans.has(ip("203.0.113.9"), 5) && !bans.has(ip("203.0.113.9"), 4));
        assert_eq!(
            bans.over(|_| true),
            [(from_all("198.51.100.0/24"), Owner::cli())]
        );
        assert_eq!(bans.over(|id| id != 5).len(), 2);
    }

    #[test]
    fn a_ban_lasts_as_long_as_it_was_meant_to_when_somebody_sets_the_clock() {
        let (booted, year) = (50 * SECOND, 31_536_000);
        let until = until_by(3600, booted).unwrap();
        assert_eq!(
            until, 3_550_000_000_000,
            "an hour after the epoch, 50 s before it the machine began"
        );
        assert_eq!(seconds_by(until, booted), 3600);
        let set = booted + i128::from(year) * SECOND;
        assert_eq!(seconds_by(until, set), 3600 + year);
        assert_eq!(
            seconds_by(until, set + 900),
            3600 + year,
            "the clocks are read one after the other"
        );
        assert_eq!(until_by(1, booted), Some(0), "before it began");
        assert_eq!(until_by(u64::MAX, booted), None);
    }

    #[test]
    fn a_change_can_be_taken_back() {
        let future = Some(clock::boot() + 60_000_000_000);
        let before = banned(vec![
            (from_all("192.0.2.7/32"), None),
            (from_one("192.0.2.7/32", 3), future),
            (from_all("2001:db8::/64"), future),
        ]);
        let change = before.replaced_by(by_cli(vec![
            (from_all("192.0.2.7/32"), future),
            (from_all("198.51.100.1/32"), None),
        ]));
        let mut bans = before.clone();
        bans.apply(&change);
        let all = |bans: &Bans| {
            let all = bans.iter();
            let all = all.map(|(it, owner, until)| ((it, owner.clone()), until));
            all.collect::<BTreeMap<_, _>>()
        };
        let now = all(&bans);
        assert_eq!(now.len(), 2);
        assert_eq!(now[&(from_all("192.0.2.7/32"), Owner::cli())], future);
        let sorted = |mut effect: Effect| {
            effect.new.sort_unstable();
            effect.gone.sort_unstable();
            effect
        };
        let (there, gone) = (from_one("192.0.2.7/32", 3), from_all("2001:db8::/64"));
        let effect = Effect {
            new: vec![
                (from_all("192.0.2.7/32"), future),
                (from_all("198.51.100.1/32"), None),
            ],
            gone: vec![gone, there],
        };
        assert_eq!(sorted(before.effect(&change)), effect);
        let effect = Effect {
            new: vec![
                (from_all("192.0.2.7/32"), None),
                (gone, future),
                (there, future),
            ],
            gone: vec![from_all("198.51.100.1/32")],
        };
        let new = change.new.iter().map(|(banned, ..)| *banned);
        let touched = new.chain(change.gone.iter().map(|(banned, _)| *banned));
        assert_eq!(sorted(before.in_force(touched)), effect);
    }

    #[test]
    fn a_source_is_banned_until_the_last_of_its_owners_lets_it_in() {
        let source = from_all("192.0.2.7/32");
        let at = |seconds: u64| Some(clock::boot() + seconds * 1_000_000_000);
        let (soon, late) = (at(60), at(3600));
        let mut bans = banned(vec![(source, late)]);
        let shorter = Change {
            new: vec![(source, jail(), soon)],
            gone: Vec::new(),
        };
        let effect = |until| Effect {
            new: vec![(source, until)],
            gone: Vec::new(),
        };
        assert_eq!(bans.effect(&shorter), effect(late));
        bans.apply(&shorter);
        assert!(bans.has(ip("192.0.2.7"), 1));
        let end = |owner: Owner| Change {
            new: Vec::new(),
            gone: vec![(source, owner)],
        };
        assert_eq!(bans.effect(&end(Owner::cli())), effect(soon));
        assert_eq!(bans.effect(&end(jail())), effect(late));
        bans.apply(&end(jail()));
        assert!(bans.has(ip("192.0.2.7"), 1));
        let gone = Effect {
            new: Vec::new(),
            gone: vec![source],
        };
        assert_eq!(bans.effect(&end(Owner::cli())), gone);
        let both = Change {
            new: vec![(source, jail(), None)],
            gone: vec![(source, jail()), (source, Owner::cli())],
        };
        assert_eq!(bans.effect(&both), gone, "the last word counts");
        bans.apply(&end(Owner::cli()));
        assert!(!bans.has(ip("192.0.2.7"), 1));
    }

    #[test]
    fn what_is_written_is_read() {
        let state =
            std::env::temp_dir().join(format!("forwarder-bans-{}.json", std::process::id()));
        let (mut file, mut bans) = BansFile::open(&state).expect("opened");
        let end = until(15_000_000_000);
        let many =
            (0..4000).map(|at| (from_all(&format!("10.0.{}.{}/32", at / 250, at % 250)), end));
        let changes = [
            Change {
                new: by_cli(many.chain([(from_one("2001:db8::/64", 7), None)]).collect()),
                gone: Vec::new(),
            },
            Change {
                new: by_cli(vec![
                    (from_all("192.0.2.7/32"), None),
                    (from_one("10.0.0.7/32", 9), end),
                ]),
                gone: vec![(from_all("10.0.0.7/32"), Owner::cli())],
            },
            Change {
                new: vec![
                    (from_all("10.0.0.8/32"), jail(), end),
                    (from_one("10.0.0.8/32", 9), jail(), None),
                ],
                gone: vec![(from_one("2001:db8::/64", 7), Owner::cli())],
            },
            Change {
                new: Vec::new(),
                gone: vec![(from_one("10.0.0.8/32", 9), jail())],
            },
        ];
        for change in changes {
            file.write(&change, &bans).expect("written");
            bans.apply(&change);
            let (_, read) = BansFile::open(&state).expect("read");
            let all = |bans: &Bans| {
                let all = bans.iter();
                let all = all.map(|(it, owner, until)| ((it, owner.clone()), until.map(seconds)));
                all.collect::<BTreeMap<_, _>>()
            };
            assert_eq!(all(&read), all(&bans));
        }
        let text = std::fs::read_to_string(file.journal.path()).expect("read");
        assert!(text.contains("\n192.0.2.7/32 -,10.0.0.7/32 15000000000 9,!10.0.0.7/32 -\n"));
        assert!(text.contains("\n10.0.0.8/32 15000000000 @fail2ban:sshd,"));
        assert!(text.ends_with("\n!10.0.0.8/32 - 9 @fail2ban:sshd\n"));
        std::fs::remove_file(file.journal.path()).expect("removed");
    }
}
