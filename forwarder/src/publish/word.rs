//! The words that a flag takes, as files and requests have them.

use std::{fmt, marker::PhantomData};

use clap::ValueEnum;
use serde::{Deserializer, de};

/// Reads one of them.
///
/// # Errors
/// It is something else; all of them are named.
pub fn read<'de, T: ValueEnum, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct Word<T>(PhantomData<T>);
    impl<T: ValueEnum> de::Visitor<'_> for Word<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let values = T::value_variants().iter();
            let values = values.filter_map(ValueEnum::to_possible_value);
            let names: Vec<_> = values.map(|it| format!("`{}`", it.get_name())).collect();
            write!(f, "one of {}", names.join(", "))
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            let known = T::from_str(text, false);
            known.map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
        }
    }
    deserializer.deserialize_str(Word(PhantomData))
}
