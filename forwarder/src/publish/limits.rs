//! A publish's limits as people write them: `1000/s`, `100Mbit`.

use std::{fmt, num::NonZeroU64, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, de};
use utoipa::ToSchema;

/// What a publish may be used for at most. What is left out has no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Limits {
    /// Flows at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 1)]
    pub max_flows: Option<NonZeroU64>,
    /// New flows a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
    /// New flows a second of one source: an IPv4 address, or an IPv6 network of 64 bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_per_source: Option<Rate>,
    /// Bits a second, in each direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,
    /// Only clients that come by this interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on: Option<String>,
}

/// The name of an interface as the kernel takes it (`dev_valid_name`), also of one that is not there yet.
///
/// # Errors
/// No interface can have it, in words.
pub fn interface(text: &str) -> Result<String, String> {
    let possible = |c: char| !c.is_whitespace() && !c.is_control() && !"/:".contains(c);
    let length = 1..=15;
    if !length.contains(&text.len()) || [".", ".."].contains(&text) || !text.chars().all(possible) {
        return Err(format!(
            "{text:?} is no name of an interface; `ip link` shows those there are"
        ));
    }
    Ok(text.into())
}

/// So many a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, ToSchema)]
pub struct Rate(pub u32);

/// Bits a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, ToSchema)]
pub struct Bandwidth(pub u64);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix("/s").unwrap_or(text);
        match number.parse() {
            Ok(0) | Err(_) => Err(format!("{text:?} is no rate; 1000/s is one")),
            Ok(number) => Ok(Self(number)),
        }
    }
}

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no bandwidth; 100Mbit and 2.5Gbit are");
        let plain = text
            .trim_end_matches("/s")
            .trim_end_matches("it")
            .trim_end_matches('b');
        let (number, unit) = match plain.char_indices().last() {
            Some((at, 'k' | 'K')) => (&plain[..at], 1e3),
            Some((at, 'm' | 'M')) => (&plain[..at], 1e6),
            Some((at, 'g' | 'G')) => (&plain[..at], 1e9),
            _ => (plain, 1.0),
        };
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let bits = number * unit;
        if !(8000.0..=1e12).contains(&bits) {
            return Err(format!(
                "{text:?} is not between 8kbit and 1000Gbit a second"
            ));
        }
        Ok(Self(bits as u64))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", self.0)
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A number, or text.
struct Either<T>(std::marker::PhantomData<T>);

impl<T: FromStr<Err = String>> de::Visitor<'_> for Either<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, or text with a unit")
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        number.to_string().parse().map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        number.to_string().parse().map_err(E::custom)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Either(std::marker::PhantomData))
    }
}

impl<'de> Deserialize<'de> for Bandwidth {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Either(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_has_a_name_that_the_kernel_takes() {
        for name in ["eth0", "br-0a1b2c3d4e5f", "wlan0.5", "ü"] {
            assert_eq!(interface(name).as_deref(), Ok(name));
        }
        for name in ["", ".", "..", "a/b", "a:b", "a b", "\0", "abcdefghijklmnop"] {
            assert!(interface(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn rates_and_bandwidths_have_units() {
        assert_eq!("1000/s".parse(), Ok(Rate(1000)));
        assert_eq!("7".parse(), Ok(Rate(7)));
        for (text, bits) in [
            ("100Mbit", 100_000_000),
            ("2.5Gbit/s", 2_500_000_000),
            ("64k", 64_000),
            ("8000", 8000),
        ] {
            assert_eq!(text.parse(), Ok(Bandwidth(bits)), "{text}");
        }
        for text in ["", "0/s", "x", "-1/s", "5/m"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
        for text in ["", "1kbit", "Mbit", "1e99", "-5M", "NaN"] {
            assert!(text.parse::<Bandwidth>().is_err(), "{text}");
        }
    }
}
