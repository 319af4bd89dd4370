//! What holds for every source file of the repository, checked by `cargo test`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::exec;

const LONGEST: usize = 700;

fn sources() -> Vec<(String, String)> {
    let mut paths = Vec::new();
    for folder in [
        "forwarder",
        "forwarder-common",
        "forwarder-ebpf",
        "tests",
        "xtask",
    ] {
        collect(&exec::workspace().join(folder), &mut paths);
    }
    assert!(paths.len() > 20, "only {} source files found", paths.len());
    let named = |path: PathBuf| {
        let name = path
            .strip_prefix(exec::workspace())
            .unwrap()
            .display()
            .to_string();
        (name, fs::read_to_string(path).unwrap())
    };
    paths.into_iter().map(named).collect()
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, paths);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

/// The part before the file's own tests.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod ").next().unwrap_or_default()
}

fn is_test(name: &str) -> bool {
    name.starts_with("tests/") || name.ends_with("/tests.rs") || name.ends_with("/tidy.rs")
}

/// Fails naming each file for which `complaint` has something to say.
fn check(complaint: impl Fn(&str, &str) -> Option<String>) {
    let complaints: Vec<_> = sources()
        .iter()
        .filter_map(|(name, text)| Some(format!("{name}: {}", complaint(name, text)?)))
        .collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn every_file_says_what_it_owns() {
    check(|_, text| (!text.starts_with("//! ")).then(|| "does not open with `//!`".into()));
}

#[test]
fn files_are_named_after_what_they_own() {
    check(|name, _| {
        let vague = [
            "utils.rs",
            "util.rs",
            "helpers.rs",
            "types.rs",
            "misc.rs",
            "common.rs",
        ];
        let file = name.rsplit('/').next().unwrap_or_default();
        vague
            .contains(&file)
            .then(|| "a name that says nothing".into())
    });
}

/// Names in backticks that look like `file::test`.
fn tests_named_in(document: &str) -> Vec<(String, String)> {
    let quoted = document.split('`').skip(1).step_by(2);
    let pairs = quoted.filter_map(|text| text.split_once("::"));
    pairs
        .map(|(file, test)| (file.into(), test.into()))
        .collect()
}

#[test]
fn every_test_that_a_document_names_is_there() {
    let sources = sources();
    let path = exec::workspace().join("docs/rfc-compliance.md");
    let named = tests_named_in(&fs::read_to_string(path).unwrap());
    assert!(named.len() > 30, "only {} tests are named", named.len());
    for (file, test) in named {
        let mut files = sources
            .iter()
            .filter(|(name, _)| name.ends_with(&format!("/{file}.rs")));
        // `matrix.rs` makes several of each `name: Client,`.
        let is_there = |text: &str| {
            text.contains(&format!("fn {test}()")) || text.contains(&format!("\n    {test}: "))
        };
        assert!(files.any(|(_, text)| is_there(text)), "no {file}::{test}");
    }
}

#[test]
fn files_stay_readable() {
    check(|_, text| {
        let lines = text.lines().count();
        (lines > LONGEST).then(|| format!("{lines} lines, more than {LONGEST}"))
    });
}

#[test]
fn nothing_unwraps_outside_tests() {
    check(|name, text| {
        let found = !is_test(name) && without_tests(text).contains(concat!(".unwrap", "()"));
        found.then(|| "unwraps".into())
    });
}

#[test]
fn only_datapath_maps_and_kernel_know_aya() {
    check(|name, text| {
        let allowed = [
            "datapath.rs",
            "datapath/devices.rs",
            "datapath/steering.rs",
            "datapath/xdp.rs",
            "maps.rs",
            "maps/flows.rs",
            "kernel.rs",
        ]
        .map(|file| format!("forwarder/src/{file}"));
        let found = name.starts_with("forwarder/src/")
            && !allowed.iter().any(|file| file == name)
            && text.lines().any(|line| {
                let code = line.trim_start();
                !code.starts_with("//") && (code.starts_with("use aya") || code.contains("aya::"))
            });
        found.then(|| "uses aya".into())
    });
}
