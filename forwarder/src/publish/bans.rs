//! Bans: sources of which nothing gets into any published port, until a time or for ever.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;

use super::state::replace;

/// When a ban ends; `None`: never.
pub type Until = Option<SystemTime>;

/// The time that is so many seconds after the epoch; one that no clock gets to is never.
pub fn until(seconds: u64) -> Until {
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// What was to be taken back is not there.
#[derive(Debug, thiserror::Error)]
#[error("{0} is not banned; `forwarder bans` shows what is")]
pub struct NotBanned(pub IpNet);

/// The sources that are banned. An address is a network of one.
#[derive(Clone, Debug, Default)]
pub struct Bans {
    networks: HashMap<IpNet, Until>,
    /// How many there are of each family and length.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl Bans {
    pub fn insert(&mut self, network: IpNet, until: Until) {
        let network = network.trunc();
        if self.networks.insert(network, until).is_none() {
            *self.lengths.entry(length(network)).or_default() += 1;
        }
    }

    /// Returns whether there was one.
    pub fn remove(&mut self, network: IpNet) -> bool {
        let network = network.trunc();
        if self.networks.remove(&network).is_none() {
            return false;
        }
        if let Some(count) = self.lengths.get_mut(&length(network)) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&length(network));
            }
        }
        true
    }

    /// Whether a source is banned now.
    pub fn has(&self, source: IpAddr) -> bool {
        let source = source.to_canonical();
        self.lengths.keys().any(|&(is_v4, length)| {
            let network = IpNet::new(source, length).map(|network| network.trunc());
            is_v4 == source.is_ipv4()
                && network.is_ok_and(|it| self.networks.get(&it).is_some_and(|it| lasts(*it)))
        })
    }

    pub fn is_empty(&self) -> bool {
        self.networks.is_empty()
    }

    /// Those that last, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, Until)> {
        let all = self
            .networks
            .iter()
            .map(|(network, until)| (*network, *until));
        all.filter(|(_, until)| lasts(*until))
    }

    pub fn any_is_over(&self) -> bool {
        self.networks.values().any(|until| !lasts(*until))
    }

    /// Takes away those that are over, and returns them.
    pub fn expire(&mut self) -> Vec<IpNet> {
        let over = self.networks.iter().filter(|(_, until)| !lasts(**until));
        let over: Vec<IpNet> = over.map(|(network, _)| *network).collect();
        for network in &over {
            self.remove(*network);
        }
        over
    }
}

const fn length(network: IpNet) -> (bool, u8) {
    match network {
        IpNet::V4(v4) => (true, v4.prefix_len()),
        IpNet::V6(v6) => (false, v6.prefix_len()),
    }
}

fn lasts(until: Until) -> bool {
    until.is_none_or(|until| until > SystemTime::now())
}

/// The file with the bans: one a line, with the second since the epoch at which it ends.
#[derive(Debug)]
pub struct BansFile(PathBuf);

impl BansFile {
    pub fn beside(state: &Path) -> Self {
        Self(state.with_extension("bans"))
    }

    /// Those that last.
    ///
    /// # Errors
    /// It cannot be read, or holds something else.
    pub fn read(&self) -> Result<Bans> {
        let shown = self.0.display();
        let text = match fs::read_to_string(&self.0) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Bans::default());
            }
            text => text.with_context(|| format!("read {shown}"))?,
        };
        let mut bans = Bans::default();
        for line in text.lines() {
            let (network, until) = line.split_once(' ').unwrap_or((line, ""));
            let network = network.parse();
            let network = network.with_context(|| format!("{shown}: {line:?} is no ban"))?;
            let until = until.parse().ok().and_then(self::until);
            if lasts(until) {
                bans.insert(network, until);
            }
        }
        Ok(bans)
    }

    /// Writes all of them; on return they are on the disk.
    ///
    /// # Errors
    /// The disk is full, or refuses.
    pub fn write(&self, bans: &Bans) -> Result<()> {
        let mut text = String::new();
        for (network, until) in bans.iter() {
            use std::fmt::Write as _;
            let until = until.and_then(|until| until.duration_since(UNIX_EPOCH).ok());
            let _ = match until {
                Some(until) => writeln!(text, "{network} {}", until.as_secs()),
                None => writeln!(text, "{network}"),
            };
        }
        replace(&self.0, text.as_bytes()).with_context(|| format!("write {}", self.0.display()))
    }
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

    #[test]
    fn a_source_is_banned_by_its_address_or_its_network_until_that_is_over() {
        let mut bans = Bans::default();
        let past = Some(SystemTime::now() - Duration::from_secs(1));
        let future = Some(SystemTime::now() + Duration::from_secs(60));
        bans.insert(net("192.0.2.7/32"), None);
        bans.insert(net("2001:db8::/32"), future);
        bans.insert(net("198.51.100.0/24"), past);
        for (source, banned) in [
            ("192.0.2.7", true),
            ("::ffff:192.0.2.7", true),
            ("192.0.2.8", false),
            ("2001:db8::5", true),
            ("2001:db9::5", false),
            ("198.51.100.9", false),
        ] {
            assert_eq!(bans.has(ip(source)), banned, "{source}");
        }
        assert_eq!(bans.expire(), [net("198.51.100.0/24")]);
        assert!(bans.remove(net("192.0.2.7/32")) && !bans.remove(net("192.0.2.7/32")));
        assert!(!bans.has(ip("192.0.2.7")));
    }

    #[test]
    fn what_is_written_is_read() {
        let state =
            std::env::temp_dir().join(format!("forwarder-bans-{}.json", std::process::id()));
        let file = BansFile::beside(&state);
        let mut bans = Bans::default();
        bans.insert(net("192.0.2.7/32"), None);
        bans.insert(
            net("2001:db8::/64"),
            Some(SystemTime::now() + Duration::from_secs(3600)),
        );
        file.write(&bans).expect("written");
        let read = file.read().expect("read");
        assert!(read.has(ip("192.0.2.7")) && read.has(ip("2001:db8::1")));
        assert_eq!(read.iter().count(), 2);
        fs::remove_file(&file.0).expect("removed");
    }
}
