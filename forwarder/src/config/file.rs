//! The configuration file: TOML, with other files in `conf.d` beside it. What is wrong in it is named with file, line and
//! column.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs, io,
    net::SocketAddr,
    ops::Range,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use serde::Deserialize;
use toml::Spanned;

use super::{DatapathChoice, Timeout, XdpChoice};
use crate::{
    control::api::Asked,
    publish::{Id, ProxyProtocol, Publish, allow, registry::Frontends},
};

/// What the files say; what they leave out, flags or defaults decide.
#[derive(Clone, Debug, Default)]
pub struct FileConfig {
    pub publishes: Vec<Publish>,
    pub datapath: Option<DatapathChoice>,
    pub xdp: Option<XdpChoice>,
    pub respect_firewall: Option<bool>,
    pub allow: Option<Vec<IpNet>>,
    pub timeouts: Vec<Timeout>,
    pub proxy_protocol: Option<ProxyProtocol>,
    pub keep: Option<bool>,
    pub ephemeral: Option<bool>,
    pub metrics: Option<SocketAddr>,
    pub metrics_allow: Option<Vec<IpNet>>,
}

/// One file as it is written. The keys are the flags of `run` and `publish`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Written {
    publish: Vec<Spanned<Asked>>,
    datapath: Option<Spanned<DatapathChoice>>,
    xdp: Option<Spanned<XdpChoice>>,
    respect_firewall: Option<Spanned<bool>>,
    allow: Option<Spanned<Vec<allow::Network>>>,
    timeout: BTreeMap<String, Spanned<Time>>,
    proxy_protocol: Option<Spanned<ProxyProtocol>>,
    keep: Option<Spanned<bool>>,
    ephemeral: Option<Spanned<bool>>,
    metrics: Option<Spanned<Address>>,
    metrics_allow: Option<Spanned<Vec<allow::Network>>>,
}

/// Where something is served.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Address(SocketAddr);

impl TryFrom<String> for Address {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let address = text.parse().map(Self);
        address.map_err(|_| format!("{text:?} is no address with a port such as 127.0.0.1:9100"))
    }
}

/// Seconds, or a number with its unit.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "this is no time; 90, \"90s\", \"5m\", \"1h\" and \"5d\" are"
)]
enum Time {
    Seconds(u32),
    Text(String),
}

/// What is wrong, and where.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{position}: {problem}", file.display())]
pub struct FileError {
    file: PathBuf,
    position: Position,
    problem: String,
}

/// Line and column, from 1; none where the file could not be read.
#[derive(Debug, PartialEq, Eq)]
struct Position(Option<(usize, usize)>);

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some((line, column)) => write!(f, ":{line}:{column}"),
            None => Ok(()),
        }
    }
}

/// A file that is being read.
struct Source {
    file: PathBuf,
    text: String,
}

impl Source {
    fn error(&self, span: Option<Range<usize>>, problem: String) -> FileError {
        let position = span.map(|span| {
            let before = &self.text[..span.start.min(self.text.len())];
            let line = before.matches('\n').count() + 1;
            let column = before
                .rsplit('\n')
                .next()
                .map_or(0, |line| line.chars().count())
                + 1;
            (line, column)
        });
        FileError {
            file: self.file.clone(),
            position: Position(position),
            problem,
        }
    }
}

/// Reads a file and those in `conf.d` beside it, in the order of their names.
///
/// # Errors
/// The first thing that is wrong.
pub fn read(file: &Path) -> Result<FileConfig, FileError> {
    let mut files = vec![file.to_owned()];
    let beside = file.parent().unwrap_or(Path::new(".")).join("conf.d");
    let mut others = match fs::read_dir(&beside).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
        Ok(entries) => entries.iter().map(fs::DirEntry::path).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        // What stands in there must not be taken for nothing.
        Err(error) => return Err(unreadable(&beside, &error)),
    };
    // As `*.toml` means it: what begins with a dot is an editor's.
    others.retain(|path| {
        let name = path.file_name().map(OsStr::as_encoded_bytes);
        name.is_some_and(|name| name.ends_with(b".toml") && !name.starts_with(b"."))
    });
    others.sort();
    files.extend(others);
    let mut config = FileConfig::default();
    let mut taken = Frontends::default();
    for file in files {
        let octets = fs::read(&file).map_err(|error| unreadable(&file, &error))?;
        let text = String::from_utf8(octets).map_err(|error| {
            let end = error.utf8_error().valid_up_to();
            let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
            let source = Source {
                file: file.clone(),
                text,
            };
            source.error(
                Some(end..end),
                "this is not UTF-8; save the file as UTF-8".into(),
            )
        })?;
        add(&mut config, &mut taken, &Source { file, text })?;
    }
    Ok(config)
}

fn unreadable(path: &Path, error: &io::Error) -> FileError {
    FileError {
        file: path.to_owned(),
        position: Position(None),
        problem: error.to_string(),
    }
}

/// Adds what one file says. `taken` has the places in `config` of all publishes.
fn add(config: &mut FileConfig, taken: &mut Frontends, source: &Source) -> Result<(), FileError> {
    let written: Written =
        toml::from_str(&source.text).map_err(|error| source.error(error.span(), said(error)))?;
    for asked in written.publish {
        let span = asked.span();
        let publish = Publish::try_from(asked.into_inner());
        let publish = publish.map_err(|problem| source.error(Some(span.clone()), problem))?;
        let other = taken.overlap(&publish.spec, &BTreeSet::new());
        if let Some(other) = other.and_then(|at| config.publishes.get(at as usize)) {
            let problem = format!(
                "publish {}: overlaps with {}; choose other ports",
                publish.spec, other.spec
            );
            return Err(source.error(Some(span), problem));
        }
        taken.insert(&publish.spec, config.publishes.len() as Id);
        config.publishes.push(publish);
    }
    for (name, time) in written.timeout {
        let span = time.span();
        let timeout = match time.into_inner() {
            Time::Seconds(seconds) => format!("{name}={seconds}"),
            Time::Text(text) => format!("{name}={text}"),
        };
        let timeout: Result<Timeout, String> = timeout.parse();
        let timeout = timeout.map_err(|problem| source.error(Some(span.clone()), problem))?;
        if config.timeouts.iter().any(|it| it.phase == timeout.phase) {
            let problem = format!(
                "timeout {} stands twice; take one of the two away",
                timeout.phase.name()
            );
            return Err(source.error(Some(span), problem));
        }
        config.timeouts.push(timeout);
    }
    once(source, "datapath", written.datapath, &mut config.datapath)?;
    once(source, "xdp", written.xdp, &mut config.xdp)?;
    once(
        source,
        "respect-firewall",
        written.respect_firewall,
        &mut config.respect_firewall,
    )?;
    once(
        source,
        "allow",
        written.allow.map(networks),
        &mut config.allow,
    )?;
    once(
        source,
        "proxy-protocol",
        written.proxy_protocol,
        &mut config.proxy_protocol,
    )?;
    once(source, "keep", written.keep, &mut config.keep)?;
    once(
        source,
        "ephemeral",
        written.ephemeral,
        &mut config.ephemeral,
    )?;
    let metrics = written
        .metrics
        .map(|it| Spanned::new(it.span(), it.into_inner().0));
    once(source, "metrics", metrics, &mut config.metrics)?;
    once(
        source,
        "metrics-allow",
        written.metrics_allow.map(networks),
        &mut config.metrics_allow,
    )?;
    Ok(())
}

/// What is wrong with a key's value, with the key before it.
fn said(mut error: toml::de::Error) -> String {
    let message = error.message().replace('\n', " ");
    error.set_input(None);
    // Without its input, an error ends with the key alone.
    let text = error.to_string();
    let key = text.trim_end().rsplit_once("\nin `");
    match key.and_then(|(_, key)| key.strip_suffix('`')) {
        Some(key) => format!("{key}: {message}"),
        None => message,
    }
}

fn networks(written: Spanned<Vec<allow::Network>>) -> Spanned<Vec<IpNet>> {
    let span = written.span();
    let networks = written.into_inner().into_iter();
    Spanned::new(span, networks.map(|network| network.0).collect())
}

/// Takes a key that only one of the files may have.
fn once<T>(
    source: &Source,
    name: &str,
    written: Option<Spanned<T>>,
    value: &mut Option<T>,
) -> Result<(), FileError> {
    let Some(written) = written else {
        return Ok(());
    };
    if value.is_some() {
        let problem = format!("{name} stands in an earlier file; take one of the two away");
        return Err(source.error(Some(written.span()), problem));
    }
    *value = Some(written.into_inner());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<FileConfig, String> {
        let mut config = FileConfig::default();
        let source = Source {
            file: "forwarder.toml".into(),
            text: text.into(),
        };
        add(&mut config, &mut Frontends::default(), &source).map_err(|error| error.to_string())?;
        Ok(config)
    }

    #[test]
    fn every_key_is_understood() {
        let config = parse(
            r#"
            datapath = "auto"
            xdp = "off"
            respect-firewall = true
            allow = ["10.0.0.0/8", "fd00::/8"]
            proxy-protocol = "v1"
            keep = true
            ephemeral = false
            metrics = "[::1]:9100"
            metrics-allow = ["10.0.0.0/8"]
            [timeout]
            tcp-established = "1h"
            udp = 45
            [[publish]]
            spec = "8080:172.17.0.2:80"
            allow = []
            [[publish]]
            protocol = "udp"
            frontend = { port = 5353 }
            backend = { address = "172.17.0.2", port = 53 }
            "#,
        )
        .expect("a good file");
        assert_eq!(config.publishes[0].policy.allow, Some(Vec::new()));
        assert_eq!(
            config.publishes[1].spec.to_string(),
            "5353:172.17.0.2:53/udp"
        );
        assert_eq!(
            (config.xdp, config.keep),
            (Some(XdpChoice::Off), Some(true))
        );
        assert_eq!(config.timeouts[1].seconds, 45);
        let short = parse(r#"publish = ["8080:172.17.0.2:80", "8081:172.17.0.2:81"]"#);
        assert_eq!(short.expect("a list").publishes.len(), 2);
    }

    #[test]
    fn what_is_wrong_has_its_line_and_its_column() {
        for (text, start, part) in [
            (
                "xdp = 7",
                "forwarder.toml:1:7: xdp: ",
                "expected one of `auto`, `native`, `generic`, `off`",
            ),
            (
                "datapath = true",
                "forwarder.toml:1:12: datapath: ",
                "expected one of `auto`, `ebpf`, `userland`",
            ),
            (
                "keep = 1",
                "forwarder.toml:1:8: keep: ",
                "expected a boolean",
            ),
            (
                "[[publish]]\nspec = \"80:10.0.0.2:80\"\nmax-flows = 0",
                "forwarder.toml:3:13: publish.max-flows: ",
                "nonzero",
            ),
            (
                "[[publish]]\nspec = \"80:10.0.0.2:80\"\nproxy-protocol = \"v3\"",
                "forwarder.toml:3:18: publish.proxy-protocol: ",
                "expected one of `off`, `v1`, `v2`",
            ),
            (
                "[[publish]]\nspec = \"80:10.0.0.2:80\"\non = \"\"",
                "forwarder.toml:3:6: publish.on: ",
                "no name of an interface; `ip link` shows",
            ),
            (
                "[[publish]]\nfrontend = {port = 80, zone = \"eth0\"}\nbackend = {address = \"10.0.0.2\", port = 80}",
                "forwarder.toml:1:1: ",
                "zone eth0 without an address",
            ),
            (
                "\nxpd = \"off\"",
                "forwarder.toml:2:1: ",
                "unknown field `xpd`",
            ),
            (
                "keep = true\nkeep = true",
                "forwarder.toml:2:1: ",
                "duplicate key",
            ),
            ("publish = [\"80\"]", "forwarder.toml:1:12: ", "HOST_PORT"),
            (
                "[[publish]]\nspec = \"80:10.0.0.2:80\"\nalow = []",
                "forwarder.toml:",
                "`alow`",
            ),
            (
                "publish = [\"80:10.0.0.2:80\",\n\"80:10.0.0.3:80\"]",
                "forwarder.toml:2:1: ",
                "choose other ports",
            ),
            (
                "[timeout]\ntcp = 5",
                "forwarder.toml:",
                "there are tcp-syn-sent",
            ),
            ("[timeout]\ntcp-close = -5", "forwarder.toml:2:", "no time"),
            (
                "[timeout]\ntcp-established = 5\ntcp_established = 6",
                "forwarder.toml:3:19: ",
                "timeout tcp-established stands twice",
            ),
            (
                "allow = [\"10.0.0.0/33\"]",
                "forwarder.toml:1:",
                "\"10.0.0.0/33\" is not a network such as",
            ),
            (
                "allow = [\"192.0.2.7\"]",
                "forwarder.toml:1:",
                "\"192.0.2.7\" is not a network such as 198.51.100.0/24; write 192.0.2.7/32 for this address",
            ),
            (
                "publish = [{spec = \"80:10.0.0.2:80\", allow = [\"2001:db8::7\"]}]",
                "forwarder.toml:1:",
                "write 2001:db8::7/128 for this address",
            ),
            (
                "metrics = \"127.0.0.1:9100\"\nmetrics-allow = [\"192.0.2.7\"]",
                "forwarder.toml:2:",
                "write 192.0.2.7/32 for this address",
            ),
            (
                "metrics = \"9100\"",
                "forwarder.toml:1:11: metrics: \"9100\"",
                "such as 127.0.0.1:9100",
            ),
        ] {
            let error = parse(text).expect_err(text);
            assert!(
                error.starts_with(start) && error.contains(part),
                "{text}: {error}"
            );
        }
    }

    /// To compare each with all others took minutes.
    #[test]
    fn as_many_publishes_as_there_are_ports_are_read() {
        let all = (1..=u16::MAX).map(|port| format!("\"{port}:10.0.0.2:{port}\",\n"));
        let all: String = all.collect();
        let config = parse(&format!("publish = [\n{all}]")).expect("no mistake");
        assert_eq!(config.publishes.len(), 65_535);
        let error = parse(&format!("publish = [\n{all}\"127.0.0.1:700:10.0.0.3:80\"]"));
        let error = error.expect_err("an overlap");
        let words = "publish 127.0.0.1:700:10.0.0.3:80/tcp: overlaps with 700:10.0.0.2:700/tcp; choose other ports";
        assert_eq!(error, format!("forwarder.toml:65537:1: {words}"));
    }

    #[test]
    fn the_documents_examples_are_good() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");
        let installed = include_str!("../../packaging/forwarder.toml").to_owned();
        let mut examples = vec![installed];
        for entry in fs::read_dir(folder).expect("docs").flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let text = fs::read_to_string(&path).expect("readable");
                let blocks = text.split("```toml\n").skip(1);
                let blocks = blocks.filter_map(|block| block.split("```").next());
                examples.extend(blocks.map(Into::into));
            }
        }
        assert!(examples.len() > 2, "{} examples", examples.len());
        for example in examples {
            parse(&example).unwrap_or_else(|error| panic!("{error}\n{example}"));
        }
    }

    #[test]
    fn a_file_that_is_not_utf_8_is_named_with_its_line_and_a_remedy() {
        let file = std::env::temp_dir().join(format!("forwarder-utf8-{}.toml", std::process::id()));
        fs::write(&file, b"keep = true\n# \xfcber\n").expect("written");
        let error = read(&file).expect_err("Latin-1").to_string();
        let place = format!("{}:2:3: ", file.display());
        assert!(
            error.starts_with(&place) && error.contains("save the file as UTF-8"),
            "{error}"
        );
        fs::remove_file(file).expect("removed");
    }

    #[test]
    fn a_key_stands_in_one_file() {
        let directory =
            std::env::temp_dir().join(format!("forwarder-config-{}", std::process::id()));
        fs::create_dir_all(directory.join("conf.d")).expect("a directory");
        let main = directory.join("forwarder.toml");
        fs::write(&main, "keep = true\npublish = [\"80:10.0.0.2:80\"]").expect("written");
        fs::write(
            directory.join("conf.d/a.toml"),
            "publish = [\"81:10.0.0.2:81\"]",
        )
        .expect("written");
        let config = read(&main).expect("good files");
        assert_eq!(config.publishes.len(), 2);
        // Emacs has such a link, which leads nowhere, beside a file that it edits.
        std::os::unix::fs::symlink("user@host.1", directory.join("conf.d/.#a.toml")).expect("made");
        assert_eq!(read(&main).expect("good files").publishes.len(), 2);
        fs::write(directory.join("conf.d/b.toml"), "keep = false").expect("written");
        let error = read(&main).expect_err("twice").to_string();
        assert!(
            error.contains("b.toml:1:8: keep stands in an earlier file"),
            "{error}"
        );
        fs::remove_dir_all(directory.join("conf.d")).expect("removed");
        assert_eq!(read(&main).expect("a good file").publishes.len(), 1);
        fs::write(directory.join("conf.d"), "").expect("written");
        let error = read(&main).expect_err("no folder").to_string();
        assert!(error.contains("conf.d: Not a directory"), "{error}");
        fs::remove_dir_all(directory).expect("removed");
    }
}
