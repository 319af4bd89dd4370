//! A file of lines on the disk, to which each change is added as one more. It is written as a whole, beside the old one, and put in
//! its place, where it is short or its changes have become longer than what they change. A crash leaves it with a change or
//! without, never with a part of one.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, ensure};

/// Octets up to which a file is always written as a whole.
const SHORT: u64 = 64 << 10;

#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    /// Octets that were last written as a whole.
    whole: u64,
    /// The file as this process left it.
    left: Option<Left>,
}

/// A file, and its length in octets.
type Left = (u64, u64);

impl Journal {
    /// With what the file has; nothing where there is none. A last line without an end was never acknowledged. The first is
    /// written as a whole, so without its end the file is damaged.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub(super) fn open(path: PathBuf) -> Result<(Self, Option<String>)> {
        let octets = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            octets => Some(octets.with_context(|| format!("read {}", path.display()))?),
        };
        let damaged = |how: &str| {
            let shown = path.display();
            anyhow!("read {shown}: {how}; move it away to begin without it")
        };
        let text = octets.map(|mut octets| {
            match octets.iter().rposition(|&octet| octet == b'\n') {
                Some(end) => octets.truncate(end + 1),
                None if octets.is_empty() => {}
                None => return Err(damaged("it ends within its first line")),
            }
            String::from_utf8(octets).map_err(|_| damaged("it is no text in UTF-8"))
        });
        let text = text.transpose()?;
        let journal = Self {
            path,
            whole: 0,
            left: None,
        };
        Ok((journal, text))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a line, or writes the whole; on return it is on the disk. After a failure the file is as it was.
    ///
    /// # Errors
    /// The disk is full, or refuses.
    pub(super) fn add(&mut self, line: &str, whole: impl FnOnce() -> Result<String>) -> Result<()> {
        debug_assert!(line.ends_with('\n'));
        if let Some((_, length)) = self.left
            && self.whole > SHORT
            && length + line.len() as u64 <= 2 * self.whole
            && self.append(line).is_ok()
        {
            return Ok(());
        }
        self.replace(&whole()?)
    }

    /// Adds to the file that this process has left there, if it is still that.
    fn append(&mut self, line: &str) -> Result<()> {
        let left = self.left.take();
        let mut options = OpenOptions::new();
        options.append(true).custom_flags(libc::O_NOFOLLOW);
        let mut file = options.open(&self.path)?;
        let there = file.metadata()?;
        ensure!(left == Some((there.ino(), there.len())), "another file");
        let added = file
            .write_all(line.as_bytes())
            .and_then(|()| file.sync_data());
        if let Err(error) = added {
            let _ = file.set_len(there.len());
            return Err(error.into());
        }
        self.left = Some((there.ino(), there.len() + line.len() as u64));
        Ok(())
    }

    /// Puts a text in place of the file's, or leaves everything as it was.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub(super) fn replace(&mut self, text: &str) -> Result<()> {
        let left = replace(&self.path, text).map_err(|error| {
            let shown = self.path.display();
            anyhow!("write {shown}: {error:#}; --ephemeral does without")
        })?;
        self.left = Some(left);
        self.whole = text.len() as u64;
        Ok(())
    }
}

fn replace(path: &Path, text: &str) -> Result<Left> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let mut options = OpenOptions::new();
    options.create(true).truncate(true).write(true);
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let mut file = options.open(&beside)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_data());
    let replaced = written.and_then(|()| fs::rename(&beside, path));
    if replaced.is_err() {
        // On a full disk it would take the room that is left.
        let _ = fs::remove_file(&beside);
    }
    replaced?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
    Ok((file.metadata()?.ino(), text.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path of a test's own.
    fn path(name: &str) -> PathBuf {
        let path = format!("forwarder-journal-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(path);
        let _ = fs::remove_file(&path);
        path
    }

    fn long() -> String {
        format!("{}\n", "a".repeat(SHORT as usize))
    }

    fn never() -> Result<String> {
        panic!("written as a whole")
    }

    fn opened(path: &Path) -> Option<String> {
        Journal::open(path.to_owned()).expect("opened").1
    }

    #[test]
    fn a_long_file_gets_what_changes_and_a_short_one_is_written_as_a_whole() {
        let path = path("length");
        assert_eq!(opened(&path), None);
        let (mut journal, _) = Journal::open(path.clone()).expect("opened");
        journal
            .add("b\n", || Ok("whole\n".into()))
            .expect("written");
        journal
            .add("c\n", || Ok("short\n".into()))
            .expect("written");
        assert_eq!(opened(&path).as_deref(), Some("short\n"));
        journal.replace(&long()).expect("written");
        journal.add("d\n", never).expect("added");
        journal.add("e\n", never).expect("added");
        assert_eq!(opened(&path), Some(long() + "d\ne\n"));
        journal
            .add(&long(), || Ok("in place\n".into()))
            .expect("written");
        assert_eq!(opened(&path).as_deref(), Some("in place\n"));
        fs::remove_file(path).expect("removed");
    }

    #[test]
    fn a_line_that_was_not_finished_is_no_line() {
        let path = path("part");
        let (mut journal, _) = Journal::open(path.clone()).expect("opened");
        journal.replace(&long()).expect("written");
        journal.add("b\n", never).expect("added");
        let mut file = OpenOptions::new().append(true).open(&path).expect("opened");
        file.write_all(b"half of it").expect("written");
        let (mut journal, text) = Journal::open(path.clone()).expect("opened");
        assert_eq!(text, Some(long() + "b\n"));
        journal
            .add("c\n", || Ok(long() + "b\nc\n"))
            .expect("written");
        assert_eq!(opened(&path), Some(long() + "b\nc\n"));
        fs::remove_file(path).expect("removed");
    }

    #[test]
    fn what_is_no_text_is_refused_with_a_remedy_and_what_was_not_finished_is_not_read() {
        let path = path("octets");
        fs::write(&path, b"a\nb\xc3").expect("written");
        assert_eq!(opened(&path).as_deref(), Some("a\n"));
        fs::write(&path, b"a\xc3\nb\n").expect("written");
        let error = Journal::open(path.clone()).expect_err("no text");
        let error = format!("{error:#}");
        let shown = path.display().to_string();
        assert!(
            error.contains(&shown) && error.ends_with("move it away to begin without it"),
            "{error}"
        );
        fs::remove_file(path).expect("removed");
    }

    #[test]
    fn a_file_that_is_cut_off_in_its_first_line_is_damaged() {
        let path = path("cut");
        fs::write(&path, "192.0.2.66/3").expect("written");
        let error = Journal::open(path.clone()).expect_err("damaged");
        assert!(format!("{error:#}").contains("it ends within its first line; move"));
        fs::write(&path, "").expect("written");
        assert_eq!(opened(&path).as_deref(), Some(""));
        fs::remove_file(path).expect("removed");
    }

    #[test]
    fn what_somebody_else_has_put_there_is_written_over_as_a_whole() {
        let path = path("other");
        let (mut journal, _) = Journal::open(path.clone()).expect("opened");
        for spoil in [
            |path: &Path| fs::remove_file(path),
            |path: &Path| fs::write(path, "a backup of last week\n"),
            |path: &Path| fs::write(path, ""),
        ] {
            journal.replace(&long()).expect("written");
            spoil(&path).expect("spoiled");
            let whole = long() + "b\n";
            journal.add("b\n", || Ok(whole.clone())).expect("written");
            assert_eq!(opened(&path), Some(whole));
        }
        fs::remove_file(path).expect("removed");
    }
}
