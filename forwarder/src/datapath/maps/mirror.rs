//! A table of the kernel and what it is to have. What is wanted is changed here first, which cannot fail, and then written. A write
//! that fails is tried again by the next flush. So a count is never read back from the kernel, and never drifts.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    hash::Hash,
};

use aya::maps::MapError;

/// Where a mirror writes to. The default value stands for no entry.
pub(super) trait Store<K, V> {
    /// # Errors
    /// The table is full, or the kernel refuses the update.
    fn write(&mut self, key: &K, value: &V) -> Result<(), MapError>;
}

/// What a table is to have, beside the table.
pub(super) struct Mirror<S, K, V> {
    pub(super) store: S,
    table: Table,
    wanted: HashMap<K, V>,
    /// What was not written yet, and whether that was changed since the last flush.
    stale: HashMap<K, bool>,
}

impl<S: Store<K, V>, K: Copy + Eq + Hash, V: Copy + Default + PartialEq> Mirror<S, K, V> {
    /// Of an empty table.
    pub(super) fn new(table: Table, store: S) -> Self {
        Self {
            store,
            table,
            wanted: HashMap::new(),
            stale: HashMap::new(),
        }
    }

    /// What is wanted, whether it was written or not.
    pub(super) fn get(&self, key: &K) -> V {
        self.wanted.get(key).copied().unwrap_or_default()
    }

    /// Changes what is wanted. The next flush writes it, and says whether that failed.
    pub(super) fn change(&mut self, key: K, change: impl FnOnce(&mut V)) {
        let before = self.get(&key);
        let mut value = before;
        change(&mut value);
        if value == V::default() {
            self.wanted.remove(&key);
        } else {
            self.wanted.insert(key, value);
        }
        if value != before || self.stale.contains_key(&key) {
            self.stale.insert(key, true);
        }
    }

    /// Changes all that is wanted.
    pub(super) fn change_all(&mut self, all: impl IntoIterator<Item = (K, V)>) {
        let mut gone: HashSet<K> = self.wanted.keys().copied().collect();
        for (key, value) in all {
            gone.remove(&key);
            self.change(key, |it| *it = value);
        }
        for key in gone {
            self.change(key, |it| *it = V::default());
        }
    }

    /// Writes what is stale, and goes on past errors.
    ///
    /// # Errors
    /// The first one of what was changed since the last flush. What failed before is another's.
    pub(super) fn flush(&mut self) -> Result<(), TableError> {
        let mut first = Ok(());
        let (store, wanted, table) = (&mut self.store, &self.wanted, self.table);
        self.stale.retain(|key, fresh| {
            let value = wanted.get(key).copied().unwrap_or_default();
            let Err(error) = store.write(key, &value) else {
                return false;
            };
            if std::mem::take(fresh) && first.is_ok() {
                first = Err(TableError { table, error });
            }
            true
        });
        first
    }
}

/// A table's name, what it holds, and how much of that.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    pub(super) name: &'static str,
    pub(super) holds: &'static str,
    pub(super) size: u32,
}

/// A write that failed.
#[derive(Debug)]
pub(super) struct TableError {
    table: Table,
    error: MapError,
}

impl Table {
    /// The result of a write to it, in words.
    ///
    /// # Errors
    /// The write's.
    pub(super) fn wrote<T>(self, result: Result<T, MapError>) -> Result<T, TableError> {
        result.map_err(|error| TableError { table: self, error })
    }
}

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Table { name, holds, size } = self.table;
        match errno(&self.error) {
            // A hash table says the one, a trie the other.
            Some(libc::E2BIG | libc::ENOSPC) => {
                write!(
                    f,
                    "the kernel's table of {holds} ({name}) is full: it holds {size}"
                )
            }
            Some(libc::ENOMEM) => {
                write!(
                    f,
                    "the kernel has no memory for its table of {holds} ({name})"
                )
            }
            _ => write!(
                f,
                "the kernel refuses to write its table of {holds} ({name})"
            ),
        }
    }
}

impl std::error::Error for TableError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match errno(&self.error) {
            Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM) => None,
            _ => Some(&self.error),
        }
    }
}

/// The kernel's error number.
pub(super) fn errno(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const TABLE: Table = Table {
        name: "TEST",
        holds: "tests",
        size: 2,
    };

    /// A table that refuses some keys.
    #[derive(Default)]
    struct Fake {
        there: BTreeMap<u32, u32>,
        refused: Vec<u32>,
    }

    impl Store<u32, u32> for Fake {
        fn write(&mut self, key: &u32, value: &u32) -> Result<(), MapError> {
            if self.refused.contains(key) {
                return Err(MapError::OutOfBounds {
                    index: 0,
                    max_entries: 0,
                });
            }
            if *value == 0 {
                self.there.remove(key);
            } else {
                self.there.insert(*key, *value);
            }
            Ok(())
        }
    }

    fn mirror() -> Mirror<Fake, u32, u32> {
        Mirror::new(TABLE, Fake::default())
    }

    #[test]
    fn a_count_that_was_never_written_is_not_taken_back_from_the_table() {
        let mut mirror = mirror();
        mirror.change(1, |count| *count += 1);
        mirror.flush().unwrap();
        mirror.store.refused = vec![1];
        mirror.change(1, |count| *count += 1);
        assert!(mirror.flush().is_err());
        mirror.change(1, |count| *count -= 1); // the undo fails as well
        assert!(mirror.flush().is_err());
        mirror.store.refused.clear();
        mirror.flush().unwrap();
        assert_eq!(mirror.store.there, BTreeMap::from([(1, 1)]));
        mirror.change(1, |count| *count -= 1);
        mirror.flush().unwrap();
        assert!(mirror.store.there.is_empty());
    }

    #[test]
    fn what_failed_for_one_is_no_error_of_the_next() {
        let mut mirror = mirror();
        mirror.store.refused = vec![1];
        mirror.change(1, |value| *value = 7);
        assert!(mirror.flush().is_err());
        mirror.change(2, |value| *value = 8);
        mirror.flush().unwrap();
        assert_eq!(mirror.store.there, BTreeMap::from([(2, 8)]));
        // Whoever asks for the same again hears of it again.
        mirror.change(1, |value| *value = 7);
        assert!(mirror.flush().is_err());
        mirror.store.refused.clear();
        mirror.flush().unwrap();
        assert_eq!(mirror.store.there, BTreeMap::from([(1, 7), (2, 8)]));
    }
}
