//! What holds for every source file and every document of the repository, checked by `cargo test`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use clap::Parser as _;

use crate::{Cli, exec};

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
        collect(&exec::workspace().join(folder), "rs", &mut paths);
    }
    assert!(paths.len() > 20, "only {} source files found", paths.len());
    paths.into_iter().map(named).collect()
}

/// A file's name in the repository, and what it says.
fn named(path: PathBuf) -> (String, String) {
    let name = path.strip_prefix(exec::workspace()).unwrap();
    let name = name.display().to_string();
    (name, fs::read_to_string(path).unwrap())
}

fn collect(folder: &Path, extension: &str, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, extension, paths);
        } else if path.extension().is_some_and(|found| found == extension) {
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

/// README.md, CONTRIBUTING.md, ARCHITECTURE.md, CHANGELOG.md and all of docs/, by their names.
fn documents() -> Vec<(String, String)> {
    let top = exec::workspace();
    let mut paths = Vec::new();
    collect(&top.join("docs"), "md", &mut paths);
    let own = fs::read_dir(top)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    paths.extend(own.filter(|path| path.extension().is_some_and(|found| found == "md")));
    assert!(paths.len() > 5, "only {} documents found", paths.len());
    paths.into_iter().map(named).collect()
}

/// Names in backticks that look like `file::test`.
fn tests_named_in(document: &str) -> Vec<(String, String)> {
    let is_name = |text: &str| {
        !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    let quoted = document.split('`').skip(1).step_by(2);
    let pairs = quoted.filter_map(|text| text.split_once("::"));
    pairs
        .filter(|(file, test)| is_name(file) && is_name(test))
        .map(|(file, test)| (file.into(), test.into()))
        .collect()
}

/// What is quoted in blocks of code is no promise.
fn without_code(document: &str) -> String {
    let parts = document.split("```").step_by(2);
    parts.collect()
}

#[test]
fn every_test_that_a_document_names_is_there() {
    let sources = sources();
    let mut named = 0;
    for (document, text) in documents() {
        // They name functions in the same way.
        if ["ARCHITECTURE.md", "docs/datapath.md"].contains(&document.as_str()) {
            continue;
        }
        for (file, test) in tests_named_in(&without_code(&text)) {
            named += 1;
            let mut files = sources
                .iter()
                .filter(|(name, _)| name.ends_with(&format!("/{file}.rs")));
            // `matrix.rs` makes several of each `name: Client,`.
            let is_there = |text: &str| {
                text.contains(&format!("fn {test}()")) || text.contains(&format!("\n    {test}: "))
            };
            let found = files.any(|(_, text)| is_there(text));
            assert!(found, "{document}: no {file}::{test}");
        }
    }
    assert!(named > 30, "only {named} tests are named");
}

/// The rows of the table below a heading of a document, without its header.
fn rows<'a>(document: &'a str, heading: &str) -> Vec<&'a str> {
    let section = document.split(&format!("\n{heading}\n")).nth(1);
    let section = section.unwrap_or_else(|| panic!("no {heading}"));
    let lines = section.lines().skip_while(|line| !line.starts_with('|'));
    lines
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .collect()
}

#[test]
fn what_the_readme_claims_beside_others_is_shown_by_a_test() {
    let readme = fs::read_to_string(exec::workspace().join("README.md")).unwrap();
    let rows = rows(&readme, "## Compared");
    assert!(rows.len() > 10, "only {} rows", rows.len());
    for row in rows {
        let ours = row.split('|').nth(2).unwrap_or_default().trim();
        if ours == "no" || ours.starts_with("not yet") {
            continue;
        }
        // `yes [3]`, and below the table `[3] `file::test``.
        let number = ours.rsplit_once('[').map(|(_, number)| number);
        let number = number.unwrap_or_else(|| panic!("no test: {row}"));
        let shown = readme.split(&format!("\n[{number} `")).nth(1);
        let shown = shown.and_then(|rest| rest.split('`').next());
        let named = shown.is_some_and(|shown| shown.contains("::"));
        assert!(named, "[{number} is no test: {row}");
    }
}

/// Commands of `cargo xtask` in blocks fenced as `sh`, and in backticks if they are whole.
fn tasks_named_in(document: &str) -> Vec<String> {
    let mut tasks = Vec::new();
    for (at, part) in document.split("```").enumerate() {
        let candidates: Vec<&str> = match (at % 2, part.strip_prefix("sh\n")) {
            (1, Some(shell)) => shell.lines().collect(),
            (1, None) => continue,
            _ => part.split('`').skip(1).step_by(2).collect(),
        };
        let commands = candidates.iter().filter_map(|text| {
            let command = text.split(" #").next()?;
            command.strip_prefix("cargo xtask ")
        });
        // `[FILTER]` and `...` stand for something else.
        let whole = commands.filter(|task| !task.contains('[') && !task.contains("..."));
        tasks.extend(whole.map(|command| command.trim().to_owned()));
    }
    tasks
}

#[test]
fn every_task_that_a_document_names_is_understood() {
    let mut named = 0;
    for (document, text) in documents() {
        for task in tasks_named_in(&text) {
            named += 1;
            let words = ["xtask"].into_iter().chain(task.split_whitespace());
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{document}: `cargo xtask {task}`: {error}");
            }
        }
    }
    assert!(named > 10, "only {named} tasks are named");
}

/// The name that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let kept = |c: char| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c.to_ascii_lowercase()),
        _ => None,
    };
    let text = heading.trim_start_matches('#').trim();
    text.chars().filter_map(kept).collect()
}

#[test]
fn every_link_of_a_document_leads_somewhere() {
    let documents = documents();
    for (document, text) in &documents {
        let folder = exec::workspace().join(document);
        let folder = folder.parent().unwrap();
        let text = without_code(text);
        let links = text.split("](").skip(1);
        for link in links.filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() {
                exec::workspace().join(document)
            } else {
                folder.join(path)
            };
            assert!(target.exists(), "{document}: {link} leads nowhere");
            if !heading.is_empty() {
                let text = fs::read_to_string(target).unwrap();
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                let found = headings.any(|line| anchor(line) == heading);
                assert!(found, "{document}: {link} names no heading");
            }
        }
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
            "datapath/maps.rs",
            "datapath/kernel.rs",
        ]
        .map(|file| format!("forwarder/src/{file}"));
        let found = name.starts_with("forwarder/src/")
            && !allowed.iter().any(|file| file == name)
            && !name.starts_with("forwarder/src/datapath/maps/")
            && text.lines().any(|line| {
                let code = line.trim_start();
                !code.starts_with("//") && (code.starts_with("use aya") || code.contains("aya::"))
            });
        found.then(|| "uses aya".into())
    });
}

/// The modules of `forwarder/src` that a source names in its `use`s, tests apart.
fn modules_named_in(text: &str) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    let code = without_tests(text);
    let name = |text: &str| -> String {
        let plain = text.trim_start().chars();
        plain
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
            .collect()
    };
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let Some(list) = rest.strip_prefix('{') else {
            named.insert(name(rest));
            continue;
        };
        let mut depth = 0;
        let mut item = String::new();
        for c in list.chars() {
            match c {
                '}' if depth == 0 => break,
                ',' if depth == 0 => {
                    named.insert(name(&item));
                    item.clear();
                    continue;
                }
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            item.push(c);
        }
        named.insert(name(&item));
    }
    named.remove("");
    named
}

#[test]
fn modules_depend_one_way() {
    let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, text) in sources() {
        let Some(file) = name.strip_prefix("forwarder/src/") else {
            continue;
        };
        let module = file.split('/').next().unwrap_or_default();
        let module = module.trim_end_matches(".rs").to_owned();
        if is_test(&name) || ["main", "lib"].contains(&module.as_str()) {
            continue;
        }
        graph
            .entry(module)
            .or_default()
            .extend(modules_named_in(&text));
    }
    assert!(graph.len() > 10, "only {} modules found", graph.len());
    // What depends on nothing that is left is taken away; a circle stays.
    loop {
        let known: BTreeSet<String> = graph.keys().cloned().collect();
        let free = graph
            .iter()
            .find(|(module, named)| named.iter().all(|it| it == *module || !known.contains(it)));
        let Some((module, _)) = free.map(|(module, _)| (module.clone(), ())) else {
            break;
        };
        graph.remove(&module);
    }
    assert!(graph.is_empty(), "in a circle: {graph:#?}");
}
