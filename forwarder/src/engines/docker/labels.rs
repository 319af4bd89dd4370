//! The labels of a container that are meant for this program: what it wants published, and under which policy. Labels that
//! its image brings are ignored: whoever runs a container decides what it publishes, not who made its image.

use std::str::FromStr;

use super::engine::Labels;
use crate::publish::{ContainerPort, Policy, ProxyProtocol, allow, limits::interface};

/// What all of them begin with.
pub(super) const PREFIX: &str = "forwarder.";

/// What labels ask for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Asked {
    pub ports: Vec<ContainerPort>,
    /// Of these ports, and of those that the engine holds for the container.
    pub policy: Policy,
}

/// Reads a container's labels, without those of its image.
///
/// # Errors
/// One is not known or has no meaning: nothing is to be published then, as it may have been a restriction.
pub(super) fn read<'a>(
    labels: impl Iterator<Item = (&'a String, &'a String)>,
    of_image: &Labels,
) -> Result<Asked, String> {
    let mut asked = Asked::default();
    for (name, value) in labels {
        let Some(name) = name.strip_prefix(PREFIX) else {
            continue;
        };
        if of_image.get(&format!("{PREFIX}{name}")) != Some(value) {
            let set = asked.set(name, value);
            set.map_err(|error| format!("label {PREFIX}{name}: {error}"))?;
        }
    }
    Ok(asked)
}

impl Asked {
    /// The names are those of the flags of `forwarder publish`.
    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let Policy {
            allow,
            proxy_protocol,
            limits,
        } = &mut self.policy;
        match name {
            "publish" => self.ports = list(value, str::parse)?,
            "allow" => *allow = Some(list(value, allow::network)?),
            "proxy-protocol" => *proxy_protocol = Some(version(value)?),
            "max-flows" => limits.max_flows = Some(number(value)?),
            "rate" => limits.rate = Some(value.parse()?),
            "rate-per-source" => limits.rate_per_source = Some(value.parse()?),
            "bandwidth" => limits.bandwidth = Some(value.parse()?),
            "on" => limits.on = Some(interface(value)?),
            _ => {
                return Err(
                    "there is no such label; there are publish, allow, proxy-protocol, max-flows, rate, \
                     rate-per-source, bandwidth and on"
                        .into(),
                );
            }
        }
        Ok(())
    }
}

/// With commas between.
fn list<T>(text: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    let each = text.split(',').map(str::trim);
    let each = each.filter(|it| !it.is_empty());
    let all: Vec<T> = each.map(read).collect::<Result<_, _>>()?;
    // To allow nobody would be to allow everybody.
    (!all.is_empty())
        .then_some(all)
        .ok_or_else(|| "it names nothing".into())
}

fn number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text:?} is no number"))
}

fn version(text: &str) -> Result<ProxyProtocol, String> {
    match text {
        "v1" => Ok(ProxyProtocol::V1),
        "v2" | "" => Ok(ProxyProtocol::V2),
        "off" => Ok(ProxyProtocol::Off),
        _ => Err(format!("{text:?} is none of v1, v2 and off")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(all: &[(&str, &str)]) -> Labels {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        all.iter().map(own).collect()
    }

    fn asked(all: &[(&str, &str)], of_image: &[(&str, &str)]) -> Result<Asked, String> {
        read(labels(all).iter(), &labels(of_image))
    }

    #[test]
    fn labels_have_the_words_of_the_flags() {
        let asked = asked(
            &[
                ("maintainer", "somebody"),
                ("forwarder.publish", "8080:80, [::1]:53:53/udp"),
                ("forwarder.allow", "198.51.100.0/24,fd00::/8"),
                ("forwarder.proxy-protocol", "v1"),
                ("forwarder.max-flows", "100"),
                ("forwarder.rate", "50/s"),
                ("forwarder.rate-per-source", "5/s"),
                ("forwarder.bandwidth", "100Mbit"),
                ("forwarder.on", "eth0"),
            ],
            &[],
        );
        let Asked { ports, policy } = asked.expect("labels");
        let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
        assert_eq!(ports, ["8080:80/tcp", "[::1]:53:53/udp"]);
        let text = serde_json::to_value(&policy).expect("JSON");
        let expected = serde_json::json!({
            "allow": ["198.51.100.0/24", "fd00::/8"], "proxy_protocol": "v1", "max_flows": 100, "rate": 50,
            "rate_per_source": 5, "bandwidth": 100_000_000, "on": "eth0"
        });
        assert_eq!(text, expected);
    }

    #[test]
    fn an_images_own_labels_are_ignored() {
        let both = [("forwarder.publish", "8080:80"), ("forwarder.alow", "x")];
        assert_eq!(asked(&both, &both), Ok(Asked::default()));
        let other = asked(&[("forwarder.publish", "8081:80")], &both[..1]);
        assert_eq!(other.expect("its own").ports.len(), 1);
    }

    #[test]
    fn what_has_no_meaning_is_named() {
        for (name, value, part) in [
            (
                "forwarder.alow",
                "10.0.0.0/8",
                "forwarder.alow: there is no",
            ),
            ("forwarder.allow", "10.0.0.0/8,here", "\"here\""),
            ("forwarder.allow", "", "names nothing"),
            ("forwarder.publish", "80", "HOST_PORT"),
            ("forwarder.max-flows", "many", "\"many\""),
            ("forwarder.proxy-protocol", "v3", "\"v3\""),
        ] {
            let error = asked(&[(name, value)], &[]).expect_err(value);
            assert!(error.contains(part), "{error}");
        }
    }
}
