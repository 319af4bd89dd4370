//! Arbitrary configuration files: each is taken, or what is wrong with it is named with its place.

#![no_main]

use std::{fs, path::PathBuf, sync::LazyLock};

use forwarder::config::file;
use libfuzzer_sys::fuzz_target;

/// In a folder of its own, without a `conf.d` beside it.
static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("forwarder-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    folder.join("forwarder.toml")
});

fuzz_target!(|text: &[u8]| {
    fs::write(&*FILE, text).expect("written");
    if let Err(error) = file::read(&FILE) {
        let said = error.to_string();
        assert!(said.starts_with(&FILE.display().to_string()), "{said}");
        assert!(!said.contains('\n'), "more than a line: {said}");
    }
});
