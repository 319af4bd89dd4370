//! Publishes that lead back to themselves: what the proxy sends to such a backend comes back to the proxy, and would take
//! a descriptor each time round. Which addresses are this host's, the caller knows.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::IpAddr,
};

use super::spec::{Protocol, Spec};

/// Publishes each of which leads to the next, and the last to the first.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Loop(Vec<String>);

impl fmt::Display for Loop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, others @ ..] = self.0.as_slice() else {
            return Ok(());
        };
        write!(f, "publish {first}: it leads back to itself")?;
        for (at, other) in others.iter().enumerate() {
            write!(f, "{} {other}", if at == 0 { " by" } else { " and" })?;
        }
        write!(
            f,
            "; name the backend's own address, or a port that is not published"
        )
    }
}

/// The publishes by what they claim.
struct Claims<'a> {
    single: HashMap<(Protocol, u16), Vec<&'a Spec>>,
    ranges: Vec<&'a Spec>,
}

impl<'a> Claims<'a> {
    fn of(specs: impl Iterator<Item = &'a Spec>) -> Self {
        let mut claims = Self {
            single: HashMap::new(),
            ranges: Vec::new(),
        };
        for spec in specs {
            if spec.ports.count() == 1 {
                let key = (spec.protocol, spec.ports.first);
                claims.single.entry(key).or_default().push(spec);
            } else {
                claims.ranges.push(spec);
            }
        }
        claims
    }

    /// The publish that serves what is sent to this address and port.
    fn find(&self, protocol: Protocol, address: IpAddr, port: u16) -> Option<&'a Spec> {
        let single = self.single.get(&(protocol, port)).into_iter().flatten();
        let mut all = single.chain(&self.ranges);
        all.find(|spec| spec.protocol == protocol && spec.claims(address, port))
            .copied()
    }
}

/// The first of the new publishes that leads back to itself, directly or by others. A backend that is this host's address
/// with a port that is not published is none, and neither is a publish that leads to another one which leads elsewhere.
///
/// # Errors
/// The publishes of the loop.
pub fn refuse_loops<'a>(
    present: impl Iterator<Item = &'a Spec>,
    new: &'a [Spec],
    is_local: impl Fn(IpAddr) -> bool,
) -> Result<(), Loop> {
    let claims = Claims::of(present.chain(new));
    let mut known: HashMap<IpAddr, bool> = HashMap::new();
    let mut next = |spec: &Spec, port: u16| {
        let (address, port) = (spec.backend, spec.backend_port(port));
        let next = claims.find(spec.protocol, address, port)?;
        let local = *known.entry(address).or_insert_with(|| is_local(address));
        local.then_some((next, port))
    };
    // Each port of a publish leads to one other, so a walk ends, or comes to a publish for a second time: also by another
    // port, as a range does that leads into itself. What an earlier walk has seen is no loop.
    let mut seen: HashSet<(&Spec, u16)> = HashSet::new();
    for spec in new {
        for port in spec.ports.first..=spec.ports.last {
            let mut walk: Vec<(&Spec, u16)> = Vec::new();
            let mut here = Some((spec, port));
            while let Some(step @ (at, port)) = here {
                if let Some(start) = walk.iter().position(|(earlier, _)| *earlier == at) {
                    return Err(Loop(
                        walk[start..].iter().map(|(at, _)| at.to_string()).collect(),
                    ));
                }
                if seen.contains(&step) {
                    break;
                }
                walk.push(step);
                here = next(at, port);
            }
            if walk.len() > 1 {
                seen.extend(walk);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: [&str; 5] = [
        "127.0.0.1",
        "::1",
        "198.51.100.2",
        "2001:db8::2",
        "127.0.0.5",
    ];

    fn refused(present: &[&str], new: &[&str]) -> Option<String> {
        let specs = |texts: &[&str]| -> Vec<Spec> {
            let parse = |text: &&str| text.parse().unwrap_or_else(|error| panic!("{error}"));
            texts.iter().map(parse).collect()
        };
        let (present, new) = (specs(present), specs(new));
        let is_local = |address: IpAddr| HOST.contains(&address.to_string().as_str());
        let error = refuse_loops(present.iter(), &new, is_local).err();
        error.map(|error| error.to_string())
    }

    #[test]
    fn what_leads_to_itself_is_named() {
        for spec in [
            "8080:127.0.0.1:8080",
            "8080:198.51.100.2:8080/udp",
            "8080:[::1]:8080",
            "[::]:8080:[2001:db8::2]:8080",
            "127.0.0.5:8080:127.0.0.5:8080",
            "8000-8100:127.0.0.1:8000-8100",
            "8000-8100:127.0.0.1:8050",
            "8000-8100:127.0.0.1:8001-8101",
        ] {
            let said = refused(&[], &[spec]).unwrap_or_else(|| panic!("{spec} is accepted"));
            let start = format!("publish {}", spec.split('/').next().unwrap_or(spec));
            assert!(said.starts_with(&start), "{said}");
            assert!(said.contains("leads back to itself;"), "{said}");
        }
    }

    #[test]
    fn a_loop_of_several_names_them_all() {
        let (a, b, c) = (
            "81:127.0.0.1:82/tcp",
            "82:[::1]:83/tcp",
            "83:198.51.100.2:81/tcp",
        );
        let said = refused(&[a, b], &[c]).expect("a loop");
        let all = format!("publish {c}: it leads back to itself by {a} and {b};");
        assert!(said.starts_with(&all), "{said}");
        assert_eq!(refused(&[a], &[b]), None, "an open chain");
        assert!(refused(&[], &[a, b, c]).is_some());
    }

    #[test]
    fn a_service_of_this_host_may_be_published() {
        for spec in [
            "8080:127.0.0.1:8081",
            "127.0.0.1:8080:198.51.100.2:8080",
            "[::]:8080:127.0.0.1:8080",
            "8080:172.17.0.2:8080",
            "8000-8009:127.0.0.1:8010-8019",
        ] {
            assert_eq!(refused(&[], &[spec]), None, "{spec}");
        }
        let other_protocol = ["81:127.0.0.1:82/tcp", "82:127.0.0.1:81/udp"];
        assert_eq!(refused(&[], &other_protocol), None);
    }

    #[test]
    fn a_loop_that_was_there_is_no_reason_to_refuse_another() {
        // An address may have become this host's after both were published.
        let present = ["81:127.0.0.1:82", "82:127.0.0.1:81"];
        assert_eq!(refused(&present, &["90:172.17.0.2:80"]), None);
        assert!(refused(&present, &["90:127.0.0.1:81"]).is_some());
    }
}
