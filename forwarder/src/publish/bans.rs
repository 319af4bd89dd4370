//! Bans: sources of which nothing gets into any published port, or into one, until a time or for ever.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt::{self, Write as _},
    net::IpAddr,
    path::Path,
    str::FromStr,
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;

use super::{Id, journal::Journal};
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
#[error("{0} is not banned; `forwarder bans` shows what is")]
pub struct NotBanned(pub Banned);

/// A change of bans.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// What is banned now, or until another time.
    pub new: Vec<(Banned, Until)>,
    pub gone: Vec<Banned>,
}

/// All bans.
#[derive(Clone, Debug, Default)]
pub struct Bans {
    everywhere: Sources,
    of: BTreeMap<Id, Sources>,
}

impl Bans {
    /// Whether a source is banned now from a publish.
    pub fn has(&self, source: IpAddr, publish: Id) -> bool {
        let source = source.to_canonical();
        let of = || self.of.get(&publish).is_some_and(|of| of.has(source));
        self.everywhere.has(source) || of()
    }

    pub fn until(&self, banned: &Banned) -> Option<Until> {
        let sources = match banned.publish {
            None => Some(&self.everywhere),
            Some(id) => self.of.get(&id),
        };
        sources?.networks.get(&banned.network).copied()
    }

    /// Those that last, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (Banned, Until)> {
        self.all().filter(|(_, until)| lasts(*until))
    }

    /// Those of one publish that last.
    pub fn of(&self, publish: Id) -> impl Iterator<Item = (IpNet, Until)> {
        let sources = self.of.get(&publish).into_iter();
        let bans = sources.flat_map(|sources| &sources.networks);
        bans.map(|(network, until)| (*network, *until))
            .filter(|(_, until)| lasts(*until))
    }

    fn all(&self) -> impl Iterator<Item = (Banned, Until)> {
        let of = self.of.iter().map(|(id, sources)| (Some(*id), sources));
        let all = [(None, &self.everywhere)].into_iter().chain(of);
        all.flat_map(|(publish, sources)| {
            let networks = sources.networks.iter();
            networks.map(move |(&network, &until)| (Banned { publish, network }, until))
        })
    }

    /// What ends by itself: those whose time is over, and of publishes that are no more.
    pub fn over(&self, is_published: impl Fn(Id) -> bool) -> Vec<Banned> {
        let is_left = |banned: &Banned| banned.publish.is_none_or(&is_published);
        let over = self
            .all()
            .filter(|(it, until)| !lasts(*until) || !is_left(it));
        over.map(|(banned, _)| banned).collect()
    }

    /// What makes these all that there are.
    pub fn replaced_by(&self, new: Vec<(Banned, Until)>) -> Change {
        let kept: HashSet<Banned> = new.iter().map(|(banned, _)| *banned).collect();
        let gone = self.all().map(|(banned, _)| banned);
        Change {
            gone: gone.filter(|banned| !kept.contains(banned)).collect(),
            new,
        }
    }

    /// What takes a change back.
    pub fn inverse(&self, change: &Change) -> Change {
        let touched = change
            .new
            .iter()
            .map(|(banned, _)| banned)
            .chain(&change.gone);
        let mut inverse = Change::default();
        for banned in touched.copied().collect::<BTreeSet<_>>() {
            match self.until(&banned) {
                Some(until) => inverse.new.push((banned, until)),
                None => inverse.gone.push(banned),
            }
        }
        inverse
    }

    pub fn apply(&mut self, change: &Change) {
        for (Banned { publish, network }, until) in &change.new {
            let sources = match publish {
                None => &mut self.everywhere,
                Some(id) => self.of.entry(*id).or_default(),
            };
            sources.insert(*network, *until);
        }
        for Banned { publish, network } in &change.gone {
            match publish {
                None => self.everywhere.remove(*network),
                Some(id) => {
                    let Some(sources) = self.of.get_mut(id) else {
                        continue;
                    };
                    sources.remove(*network);
                    if sources.networks.is_empty() {
                        self.of.remove(id);
                    }
                }
            }
        }
    }
}

/// Sources that are banned from the same.
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
/// ban ends (`-`: never), and the publish, if it is of one. With `!` in front it is a ban that was taken back.
#[derive(Debug)]
pub struct BansFile {
    journal: Journal,
    /// [`clock::booted`] when its times were written.
    booted: i128,
}

/// What a line says of one ban.
struct Entry(Banned, Option<Until>);

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(Banned { publish, network }, until) = self;
        if until.is_none() {
            f.write_str("!")?;
        }
        write!(f, "{network}")?;
        match until.flatten() {
            Some(until) => write!(f, " {}", seconds(until))?,
            None => f.write_str(" -")?,
        }
        publish.map_or(Ok(()), |id| write!(f, " {id}"))
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
            None | Some("-") => None,
            Some(seconds) => until(seconds.parse().map_err(drop)?),
        };
        let publish = words.next().map(str::parse).transpose().map_err(drop)?;
        let network = network.ok_or(())?;
        Ok(Self(
            Banned { publish, network },
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
                let Ok(Entry(banned, until)) = entry else {
                    anyhow::bail!(
                        "{shown}: {text:?} is no ban; move the file away to begin without it"
                    );
                };
                match until {
                    Some(until) => change.new.push((banned, until)),
                    None => change.gone.push(banned),
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
            .map(|(it, until)| Entry(*it, Some(*until)));
        let gone = change.gone.iter().map(|it| Entry(*it, None));
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
        if bans.iter().any(|(_, until)| until.is_some()) {
            self.journal.replace(&whole(bans)?)?;
        }
        self.booted = booted;
        Ok(())
    }
}

fn whole(bans: &Bans) -> Result<String> {
    let mut whole = String::new();
    for (banned, until) in bans.iter() {
        writeln!(whole, "{}", Entry(banned, Some(until)))?;
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

    fn banned(new: Vec<(Banned, Until)>) -> Bans {
        let mut bans = Bans::default();
        bans.apply(&Change {
            new,
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
        assert_eq!(bans.over(|_| true), [from_all("198.51.100.0/24")]);
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
        let change = before.replaced_by(vec![
            (from_all("192.0.2.7/32"), future),
            (from_all("198.51.100.1/32"), None),
        ]);
        let inverse = before.inverse(&change);
        let mut bans = before.clone();
        bans.apply(&change);
        let now: BTreeMap<_, _> = bans.iter().collect();
        assert_eq!(now.len(), 2);
        assert_eq!(now[&from_all("192.0.2.7/32")], future);
        bans.apply(&inverse);
        let all = |bans: &Bans| bans.iter().collect::<BTreeMap<_, _>>();
        assert_eq!(all(&bans), all(&before));
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
                new: many.chain([(from_one("2001:db8::/64", 7), None)]).collect(),
                gone: Vec::new(),
            },
            Change {
                new: vec![
                    (from_all("192.0.2.7/32"), None),
                    (from_one("10.0.0.7/32", 9), end),
                ],
                gone: vec![from_all("10.0.0.7/32")],
            },
            Change {
                new: vec![(from_all("10.0.0.8/32"), None)],
                gone: vec![from_one("2001:db8::/64", 7)],
            },
        ];
        for change in changes {
            file.write(&change, &bans).expect("written");
            bans.apply(&change);
            let (_, read) = BansFile::open(&state).expect("read");
            let in_seconds = |(it, until): (Banned, Until)| (it, until.map(seconds));
            let all = |bans: &Bans| bans.iter().map(in_seconds).collect::<BTreeMap<_, _>>();
            assert_eq!(all(&read), all(&bans));
        }
        let text = std::fs::read_to_string(file.journal.path()).expect("read");
        assert!(text.contains("\n192.0.2.7/32 -,10.0.0.7/32 15000000000 9,!10.0.0.7/32 -\n"));
        std::fs::remove_file(file.journal.path()).expect("removed");
    }
}
