//! All publishes that are wanted, by owner. Each source states what its owner wants; the registry answers with the
//! difference, or with the conflict. It changes only when [`Registry::apply`] is told that the difference is in force.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use super::{
    ContainerPort, Owner, Publish, container,
    spec::{Ports, Protocol, Spec, Zone},
};
use crate::clock;

/// The number of a publish. It is never given to another one, also not after a restart.
pub type Id = u64;

/// A publish with its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub id: Id,
    pub owner: Owner,
    pub publish: Arc<Publish>,
    /// When it was first wanted, in seconds since the epoch. Other backends and policies do not change it.
    pub since: u64,
}

/// What has to change. The same frontend with another backend or policy is a change in place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    pub remove: Vec<Wanted>,
    /// Each with what it was before.
    pub change: Vec<(Wanted, Wanted)>,
    pub add: Vec<Wanted>,
    /// All that was asked for, in that order, also what is there already.
    pub asked: Vec<Id>,
    /// Those of `remove` that have ports which some of `add` want.
    pub in_the_way: BTreeSet<Id>,
}

impl Difference {
    /// What takes it back.
    pub fn inverse(&self) -> Self {
        let change = self.change.iter();
        Self {
            remove: self.add.clone(),
            change: change
                .map(|(before, after)| (after.clone(), before.clone()))
                .collect(),
            add: self.remove.clone(),
            ..Self::default()
        }
    }

    /// The same without what has stopped: that is to be served no more, though it stays wanted.
    pub fn served(&self) -> Self {
        let (stopped, change): (Vec<_>, Vec<_>) = self
            .change
            .iter()
            .cloned()
            .partition(|(_, after)| after.publish.stopped().is_some());
        let stopped = stopped.into_iter().map(|(before, _)| before);
        Self {
            remove: self.remove.iter().cloned().chain(stopped).collect(),
            change,
            ..self.clone()
        }
    }

    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.change.is_empty() && self.add.is_empty()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    #[error(
        "publish {new}: overlaps with {other} of owner {owner}; unpublish that or choose other ports"
    )]
    Overlap {
        new: Box<Spec>,
        other: Box<Spec>,
        owner: Owner,
    },
    #[error("publish {0}: overlaps with {1}, which is asked for beside it; choose other ports")]
    Beside(Box<Spec>, Box<Spec>),
    #[error("publish {id} ({spec}) belongs to {owner}; `--owner {owner}` would change it")]
    NotYours {
        id: Id,
        spec: Box<Spec>,
        owner: Owner,
    },
    #[error("no publish {0}; `forwarder list` shows them")]
    NoId(Id),
    #[error("no publish {0}; `forwarder list` shows them")]
    NoSpec(Box<Spec>),
    #[error("no publish leads to container {0}; `forwarder list` shows them")]
    NoContainer(String),
    #[error("no publish {0} leads to container {1}; `forwarder list` shows them")]
    NoPort(Box<ContainerPort>, String),
    #[error("{wanted} publishes are more than the {most} that there is room for")]
    TooMany { wanted: usize, most: usize },
}

/// A place that only one publish may have: every address of a family is the unspecified one, and a link-local address may be
/// on several devices.
type Place = (Protocol, IpAddr, Option<Zone>);

fn at(spec: &Spec, address: IpAddr) -> Place {
    let zone = spec.zone.clone().filter(|_| !address.is_unspecified());
    (spec.protocol, address, zone)
}

/// Frontends by place and first port. Those of one place never overlap.
#[derive(Clone, Debug, Default)]
pub struct Frontends(HashMap<Place, BTreeMap<u16, (u16, Id)>>);

impl Frontends {
    pub fn insert(&mut self, spec: &Spec, id: Id) {
        for address in spec.frontends() {
            let place = self.0.entry(at(spec, address)).or_default();
            place.insert(spec.ports.first, (spec.ports.last, id));
        }
    }

    fn remove(&mut self, spec: &Spec) {
        for address in spec.frontends() {
            let key = at(spec, address);
            if let Some(place) = self.0.get_mut(&key) {
                place.remove(&spec.ports.first);
                if place.is_empty() {
                    self.0.remove(&key);
                }
            }
        }
    }

    /// A publish, not of `except`, that has a port which the spec wants.
    pub fn overlap(&self, spec: &Spec, except: &BTreeSet<Id>) -> Option<Id> {
        let has = |place: &BTreeMap<u16, (u16, Id)>| {
            let Ports { first, last } = spec.ports;
            let mut below = place.range(..=last).rev();
            below
                .by_ref()
                .take_while(|(_, (end, _))| *end >= first)
                .map(|(_, (_, id))| *id)
                .find(|id| !except.contains(id))
        };
        for address in spec.frontends() {
            let found = if address.is_unspecified() {
                let family = self.0.iter().filter(|((protocol, other, _), _)| {
                    *protocol == spec.protocol && other.is_ipv4() == address.is_ipv4()
                });
                family.filter_map(|(_, place)| has(place)).min()
            } else {
                let every = match address {
                    IpAddr::V4(_) => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
                    IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
                };
                [address, every]
                    .iter()
                    .find_map(|address| self.0.get(&at(spec, *address)).and_then(has))
            };
            if found.is_some() {
                return found;
            }
        }
        None
    }
}

#[derive(Clone, Debug, Default)]
pub struct Registry {
    wanted: BTreeMap<Id, Wanted>,
    frontends: Frontends,
    last_id: Id,
    most: usize,
}

impl Registry {
    /// An empty one for so many publishes, whose numbers begin after `last_id`.
    pub fn new(most: usize, last_id: Id) -> Self {
        Self {
            most,
            last_id,
            ..Self::default()
        }
    }

    pub fn get(&self, id: Id) -> Option<&Wanted> {
        self.wanted.get(&id)
    }

    /// In the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = &Wanted> {
        self.wanted.values()
    }

    pub fn of<'a>(&'a self, owner: &'a Owner) -> impl Iterator<Item = &'a Wanted> {
        self.iter().filter(move |wanted| wanted.owner == *owner)
    }

    /// The last number that was given.
    pub const fn last_id(&self) -> Id {
        self.last_id
    }

    /// The difference that makes these *all* that the owner has. Those whose ports an engine holds come second: they are left
    /// out where another owner has the port, and give way to a lease, whose holder has it from the engine.
    ///
    /// # Errors
    /// One overlaps with another of them or of another owner, or there is no room.
    pub fn want(&self, owner: &Owner, mut publishes: Vec<Publish>) -> Result<Difference, Conflict> {
        let mut present: BTreeSet<Id> = self.of(owner).map(|wanted| wanted.id).collect();
        publishes.retain(|it| {
            it.holder.is_forwarder() || self.frontends.overlap(&it.spec, &present).is_none()
        });
        if owner.is_lease() {
            let held = self.in_the_way(owner, &publishes).into_iter();
            let held = held.filter(|it| !it.publish.holder.is_forwarder());
            present.extend(held.map(|it| it.id));
        }
        let difference = self.compare(owner, publishes, &present)?;
        let kept: BTreeSet<Id> = difference.asked.iter().copied().collect();
        let remove = present.difference(&kept).filter_map(|id| self.get(*id));
        let remove: Vec<Wanted> = remove.cloned().collect();
        let mut new = Frontends::default();
        for wanted in &difference.add {
            new.insert(&wanted.publish.spec, wanted.id);
        }
        let none = BTreeSet::new();
        let in_the_way = remove.iter();
        let in_the_way = in_the_way.filter(|it| new.overlap(&it.publish.spec, &none).is_some());
        Ok(Difference {
            in_the_way: in_the_way.map(|it| it.id).collect(),
            remove,
            ..difference
        })
    }

    /// The difference that gives the owner these beside what it has.
    ///
    /// # Errors
    /// As [`Registry::want`]; also if one overlaps with what the owner has.
    pub fn add(&self, owner: &Owner, publishes: Vec<Publish>) -> Result<Difference, Conflict> {
        self.compare(owner, publishes, &BTreeSet::new())
    }

    /// The difference that takes these from the owner. What is named twice is taken once.
    ///
    /// # Errors
    /// There is no such publish, or it is another owner's.
    pub fn remove(&self, owner: &Owner, ids: &BTreeSet<Id>) -> Result<Difference, Conflict> {
        let remove = ids.iter().map(|id| {
            let wanted = self.get(*id).ok_or(Conflict::NoId(*id))?;
            Self::is_of(wanted, owner)?;
            Ok(wanted.clone())
        });
        Ok(Difference {
            remove: remove.collect::<Result<_, _>>()?,
            ..Difference::default()
        })
    }

    /// The difference that takes from the owner these ports of a container, or all that it has there if none is named.
    ///
    /// # Errors
    /// No publish leads to the container so, or only another owner's.
    pub fn remove_from(
        &self,
        owner: &Owner,
        container: &str,
        ports: &[ContainerPort],
    ) -> Result<Difference, Conflict> {
        let meant = |port: Option<&ContainerPort>| {
            let is_meant = |it: &&Wanted| {
                let is_of_port = port.is_none_or(|port| port.is_published_as(&it.publish.spec));
                it.publish.leads_to(container) && is_of_port
            };
            let all = self.iter().filter(is_meant);
            let (own, of_others): (Vec<_>, Vec<_>) = all.partition(|it| it.owner == *owner);
            let found = if own.is_empty() { of_others } else { own };
            found.into_iter().map(|it| it.id).collect::<Vec<_>>()
        };
        let mut ids = BTreeSet::new();
        for port in ports {
            let found = meant(Some(port));
            if found.is_empty() {
                return Err(Conflict::NoPort(port.clone().into(), container.into()));
            }
            ids.extend(found);
        }
        if ports.is_empty() {
            ids.extend(meant(None));
        }
        if ids.is_empty() {
            return Err(Conflict::NoContainer(container.into()));
        }
        self.remove(owner, &ids)
    }

    /// The difference that gives a publish another backend or policy, in place.
    ///
    /// # Errors
    /// There is no such publish, it is another owner's, or the frontend is not the same.
    pub fn replace(&self, owner: &Owner, id: Id, publish: Publish) -> Result<Difference, Conflict> {
        let before = self.get(id).ok_or(Conflict::NoId(id))?;
        Self::is_of(before, owner)?;
        if !before.publish.spec.has_same_frontend(&publish.spec) {
            return Err(Conflict::NoSpec(publish.spec.into()));
        }
        self.compare(owner, vec![publish], &BTreeSet::from([id]))
    }

    /// The number of a publish.
    ///
    /// # Errors
    /// There is no such publish.
    pub fn find(&self, spec: &Spec) -> Result<Id, Conflict> {
        let found = self.frontends.overlap(spec, &BTreeSet::new());
        let found = found.and_then(|id| self.get(id));
        match found {
            Some(wanted) if wanted.publish.spec == *spec => Ok(wanted.id),
            _ => Err(Conflict::NoSpec(spec.clone().into())),
        }
    }

    /// Publishes of others that have ports which these want for an owner.
    pub fn in_the_way(&self, owner: &Owner, publishes: &[Publish]) -> Vec<Wanted> {
        let mut passed: BTreeSet<Id> = self.of(owner).map(|wanted| wanted.id).collect();
        let mut found = Vec::new();
        for publish in publishes {
            while let Some(id) = self.frontends.overlap(&publish.spec, &passed) {
                passed.insert(id);
                found.extend(self.get(id).cloned());
            }
        }
        found
    }

    /// The difference after which what leads to a container follows it to these addresses, or stops if there are none. What
    /// an engine's containers ask for themselves is the engine's to say.
    pub fn follow(&self, name: &str, addresses: &[IpAddr]) -> Difference {
        let follows = |it: &&Wanted| it.publish.leads_to(name) && !it.owner.is_container();
        let change = self.iter().filter(follows).filter_map(|before| {
            let mut publish = Publish::clone(&before.publish);
            let moved = container::moved(&publish.spec, addresses);
            publish.container.as_mut()?.runs = moved.is_some();
            publish.spec = moved.unwrap_or(publish.spec);
            let after = Wanted {
                publish: Arc::new(publish),
                ..before.clone()
            };
            (*before != after).then(|| (before.clone(), after))
        });
        Difference {
            change: change.collect(),
            ..Difference::default()
        }
    }

    /// # Errors
    /// The publish is another owner's.
    pub fn is_of(wanted: &Wanted, owner: &Owner) -> Result<(), Conflict> {
        if wanted.owner == *owner {
            return Ok(());
        }
        Err(Conflict::NotYours {
            id: wanted.id,
            spec: wanted.publish.spec.clone().into(),
            owner: wanted.owner.clone(),
        })
    }

    /// What makes the publishes stand in place of `present`, which may be given up.
    fn compare(
        &self,
        owner: &Owner,
        publishes: Vec<Publish>,
        present: &BTreeSet<Id>,
    ) -> Result<Difference, Conflict> {
        let wanted = self.wanted.len() - present.len() + publishes.len();
        if wanted > self.most {
            return Err(Conflict::TooMany {
                wanted,
                most: self.most,
            });
        }
        let mut difference = Difference::default();
        let mut new = Frontends::default();
        let mut specs: HashMap<Id, Spec> = HashMap::new();
        let mut last_id = self.last_id;
        let now = clock::now();
        for publish in publishes {
            let spec = &publish.spec;
            let beside = new.overlap(spec, &BTreeSet::new());
            if let Some(other) = beside.and_then(|id| specs.get(&id)) {
                return Err(Conflict::Beside(spec.clone().into(), other.clone().into()));
            }
            let other = self.frontends.overlap(spec, present);
            if let Some(other) = other.and_then(|id| self.get(id)) {
                return Err(Conflict::Overlap {
                    new: spec.clone().into(),
                    other: other.publish.spec.clone().into(),
                    owner: other.owner.clone(),
                });
            }
            let before = self
                .frontends
                .overlap(spec, &BTreeSet::new())
                .and_then(|id| self.get(id))
                .filter(|before| before.owner == *owner)
                .filter(|before| before.publish.spec.has_same_frontend(spec));
            let id = before.map_or(last_id + 1, |before| before.id);
            last_id = last_id.max(id);
            new.insert(spec, id);
            specs.insert(id, spec.clone());
            difference.asked.push(id);
            let after = Wanted {
                id,
                owner: owner.clone(),
                publish: Arc::new(publish),
                since: before.map_or(now, |before| before.since),
            };
            match before {
                None => difference.add.push(after),
                Some(before) if *before == after => {}
                Some(before) => difference.change.push((before.clone(), after)),
            }
        }
        Ok(difference)
    }

    /// Records a difference that is in force now.
    pub fn apply(&mut self, difference: &Difference) {
        let before = difference.change.iter().map(|(before, _)| before);
        for gone in difference.remove.iter().chain(before) {
            self.wanted.remove(&gone.id);
            self.frontends.remove(&gone.publish.spec);
        }
        let after = difference.change.iter().map(|(_, after)| after);
        for new in difference.add.iter().chain(after) {
            self.frontends.insert(&new.publish.spec, new.id);
            self.last_id = self.last_id.max(new.id);
            self.wanted.insert(new.id, new.clone());
        }
    }

    /// Restores a publish of an earlier instance under its number. It must not overlap with any.
    ///
    /// # Errors
    /// It does.
    pub fn restore(&mut self, wanted: Wanted) -> Result<(), Conflict> {
        let spec = &wanted.publish.spec;
        let other = self.frontends.overlap(spec, &BTreeSet::new());
        if let Some(other) = other.and_then(|id| self.get(id)) {
            return Err(Conflict::Overlap {
                new: spec.clone().into(),
                other: other.publish.spec.clone().into(),
                owner: other.owner.clone(),
            });
        }
        self.apply(&Difference {
            add: vec![wanted],
            ..Difference::default()
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::publish::{Container, Holder, Policy};

    fn publish(spec: &str) -> Publish {
        let spec = spec.parse().unwrap_or_else(|error| panic!("{error}"));
        Publish::new(spec, Policy::default())
    }

    fn publishes(specs: &[&str]) -> Vec<Publish> {
        specs.iter().map(|spec| publish(spec)).collect()
    }

    fn owner(name: &str) -> Owner {
        name.parse().expect(name)
    }

    /// A registry in which these owners have these.
    fn registry(of: &[(&str, &[&str])]) -> Registry {
        let mut registry = Registry::new(100, 0);
        for (name, specs) in of {
            let difference = registry.add(&owner(name), publishes(specs)).expect("room");
            registry.apply(&difference);
        }
        registry
    }

    fn ids(wanted: &[Wanted]) -> Vec<Id> {
        wanted.iter().map(|wanted| wanted.id).collect()
    }

    #[test]
    fn what_an_owner_wants_is_a_difference() {
        let mut registry = registry(&[
            ("a", &["80:10.0.0.2:80", "81:10.0.0.2:81", "82:10.0.0.2:82"]),
            ("b", &["90:10.0.0.2:90"]),
        ]);
        let wanted = publishes(&["82:10.0.0.2:82", "81:10.0.0.9:81", "83:10.0.0.2:83"]);
        let difference = registry
            .want(&owner("a"), wanted.clone())
            .expect("no conflict");
        assert_eq!(ids(&difference.remove), [1]);
        assert_eq!(ids(&difference.add), [5]);
        assert_eq!(difference.asked, [3, 2, 5]);
        let [(before, after)] = &difference.change[..] else {
            panic!("{difference:?}");
        };
        assert_eq!((before.id, after.id), (2, 2));
        registry.apply(&difference);
        assert!(
            registry
                .want(&owner("a"), wanted)
                .expect("the same")
                .is_empty()
        );
    }

    #[test]
    fn a_conflict_names_the_other_and_its_owner() {
        let registry = registry(&[("docker:web", &["80-90:10.0.0.2:80-90"])]);
        let error = registry.add(&owner("cli"), publishes(&["85:10.0.0.3:80"]));
        let error = error.expect_err("an overlap").to_string();
        let words = "publish 85:10.0.0.3:80/tcp: overlaps with 80-90:10.0.0.2:80-90/tcp of owner docker:web";
        assert!(error.starts_with(words), "{error}");
        let two = registry.add(
            &owner("cli"),
            publishes(&["70-75:10.0.0.3:1", "75:10.0.0.3:1"]),
        );
        let error = two.expect_err("of each other").to_string();
        let words = "overlaps with 70-75:10.0.0.3:1/tcp, which is asked for beside it";
        assert!(
            error.contains("publish 75:") && error.contains(words),
            "{error}"
        );
    }

    fn held_by_the_engine(specs: &[&str]) -> Vec<Publish> {
        let held = publishes(specs).into_iter().map(|publish| Publish {
            holder: Holder::Engine,
            ..publish
        });
        held.collect()
    }

    #[test]
    fn what_an_engine_holds_is_left_out_where_another_has_the_port() {
        let registry = registry(&[("cli", &["80-90:10.0.0.2:80-90"])]);
        let wanted = held_by_the_engine(&["85:10.0.0.3:80", "8080:10.0.0.3:80"]);
        let difference = registry.want(&owner("docker:web"), wanted);
        let add = difference.expect("no conflict").add;
        let specs: Vec<String> = add.iter().map(|it| it.publish.spec.to_string()).collect();
        assert_eq!(specs, ["8080:10.0.0.3:80/tcp"]);
    }

    #[test]
    fn what_an_engine_holds_gives_way_to_a_lease_alone() {
        let mut registry = registry(&[]);
        let wanted = held_by_the_engine(&["80-89:10.0.0.2:80-89", "99:10.0.0.2:99"]);
        let wanted = registry.want(&owner("docker:web"), wanted).expect("room");
        registry.apply(&wanted);
        let cli = registry.want(&owner("cli"), publishes(&["80:10.0.0.3:80"]));
        assert!(matches!(cli, Err(Conflict::Overlap { .. })), "{cli:?}");
        let lease = registry.want(&owner("lease:1"), publishes(&["80:10.0.0.2:80"]));
        let lease = lease.expect("its holder has the port");
        assert_eq!((ids(&lease.remove), ids(&lease.add)), (vec![1], vec![3]));
        assert_eq!(lease.in_the_way, BTreeSet::from([1]));
    }

    #[test]
    fn what_leads_to_a_container_follows_it_and_stops_with_it() {
        let mut registry = registry(&[("a", &["81:10.0.0.2:81"])]);
        let to_web = |spec: &str| Publish {
            container: Some(Container {
                name: "web".into(),
                runs: true,
            }),
            ..publish(spec)
        };
        for (name, spec) in [("cli", "80:10.0.0.2:80"), ("docker:web", "82:10.0.0.2:82")] {
            let wanted = registry.add(&owner(name), vec![to_web(spec)]);
            registry.apply(&wanted.expect("room"));
        }
        let address = "10.0.0.2".parse().expect("an address");
        assert!(registry.follow("web", &[address]).is_empty(), "it is there");
        let stopped = registry.follow("web", &[]);
        let [(before, after)] = &stopped.change[..] else {
            panic!("what others than the engine have published: {stopped:?}");
        };
        assert_eq!((before.id, after.id), (2, 2));
        let words = "container web is not running";
        assert_eq!(after.publish.stopped().as_deref(), Some(words));
        assert_eq!(stopped.served().remove, std::slice::from_ref(before));
        assert!(stopped.served().change.is_empty());
        registry.apply(&stopped);
        let address = "10.0.0.9".parse().expect("an address");
        let back = registry.follow("web", &[address]);
        let spec = |it: &Wanted| it.publish.spec.to_string();
        assert_eq!(spec(&back.change[0].1), "80:10.0.0.9:80/tcp");
        assert!(registry.follow("db", &[address]).is_empty());
    }

    #[test]
    fn an_owner_takes_back_its_own_alone() {
        let registry = registry(&[("a", &["80:10.0.0.2:80"]), ("b", &["81:10.0.0.2:81"])]);
        let remove = |name, id| registry.remove(&owner(name), &BTreeSet::from([id]));
        assert_eq!(ids(&remove("a", 1).expect("its own").remove), [1]);
        let error = remove("a", 2).expect_err("another's").to_string();
        assert!(error.contains("belongs to b"), "{error}");
        assert_eq!(remove("a", 7), Err(Conflict::NoId(7)));
    }

    #[test]
    fn a_number_is_not_given_twice() {
        let mut registry = registry(&[("a", &["80:10.0.0.2:80"])]);
        let gone = registry.want(&owner("a"), Vec::new()).expect("nothing");
        registry.apply(&gone);
        let again = registry.add(&owner("a"), publishes(&["80:10.0.0.2:80"]));
        assert_eq!(ids(&again.expect("free again").add), [2]);
    }

    #[test]
    fn every_address_and_one_of_them_overlap() {
        let overlaps = |a: &str, b: &str| {
            let registry = registry(&[("a", &[a])]);
            registry.add(&owner("b"), publishes(&[b])).is_err()
        };
        for (a, b, expected) in [
            ("80:10.0.0.2:80", "127.0.0.1:80:10.0.0.3:80", true),
            ("127.0.0.1:80:10.0.0.3:80", "80:10.0.0.2:80", true),
            ("80-90:10.0.0.2:80-90", "85:10.0.0.3:80", true),
            ("80:10.0.0.2:80", "80:10.0.0.2:80/udp", false),
            (
                "127.0.1.2:80:10.0.0.2:80",
                "127.0.1.3:80:10.0.0.3:80",
                false,
            ),
            ("0.0.0.0:80:10.0.0.2:80", "[::]:80:[fd00::2]:80", false),
        ] {
            assert_eq!(overlaps(a, b), expected, "{a} {b}");
        }
    }

    proptest! {
        #[test]
        fn nothing_in_a_registry_overlaps(
            steps in proptest::collection::vec((0_u8..3, proptest::collection::vec((1_u16..30, 0_u16..4, 0_u8..3, 1_u8..4), 0..5)), 1..12),
        ) {
            let mut registry = Registry::new(20, 0);
            let mut last = 0;
            for (name, specs) in steps {
                let owner = owner(["a", "b", "c"][usize::from(name)]);
                let wanted: Vec<Publish> = specs
                    .iter()
                    .map(|(first, more, address, backend)| {
                        let host = ["", "127.0.0.1:", "0.0.0.0:"][usize::from(*address)];
                        publish(&format!("{host}{first}-{}:192.0.2.{backend}:1", first + more))
                    })
                    .collect();
                let before = registry.clone();
                if let Ok(difference) = registry.want(&owner, wanted.clone()) {
                    registry.apply(&difference);
                    let has: Vec<_> = registry.of(&owner).map(|it| it.publish.spec.clone()).collect();
                    prop_assert_eq!(has.len(), wanted.len());
                    prop_assert!(wanted.iter().all(|publish| has.contains(&publish.spec)));
                    for other in before.iter().filter(|it| it.owner != owner) {
                        prop_assert_eq!(registry.get(other.id), Some(other));
                    }
                    for new in &difference.add {
                        prop_assert!(new.id > last, "numbers go up");
                    }
                    last = registry.last_id();
                }
                let all: Vec<_> = registry.iter().collect();
                for (at, a) in all.iter().enumerate() {
                    for b in &all[at + 1..] {
                        prop_assert!(!a.publish.spec.overlaps(&b.publish.spec));
                    }
                    prop_assert_eq!(registry.find(&a.publish.spec), Ok(a.id));
                }
            }
        }
    }
}
