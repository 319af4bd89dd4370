//! The commands of README.md, CONTRIBUTING.md and docs/, each run as it stands there, as root of a small machine.
//!
//! What counts is every block fenced as `sh`. A command of `forwarder` or `curl`, also behind `sudo`, is run literally by
//! a shell and must succeed. Every other command must stand in [`ELSEWHERE`], which says who runs it. A block
//! fenced as `text` or `json` right below shows what its last command prints, and is compared.
//!
//! `forwarder run` stays in the background until the document ends or says `run` or `down` again. The commands see a file
//! system that they cannot write to, with /run, /var/lib and /sys/fs/bpf of their own.

pub(crate) mod block;
mod scene;
mod shown;

use std::{
    fs,
    io::Read as _,
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use forwarder_tests::deadline::wait_for;

use self::{
    block::{Block, blocks, commands, program},
    scene::{CLIENT_ASKS, Running, Scene},
    shown::fits,
};

/// Commands that no namespace can hold, and who runs them instead.
const ELSEWHERE: &[(&str, Runner)] = &[
    ("cargo xtask run", Runner::Fresh),
    ("cargo xtask test", Runner::Fresh),
    ("cargo xtask test --tier 3", Runner::Itself),
    ("cargo xtask fresh", Runner::Person),
    ("cargo xtask ebpf", Runner::Ci),
    ("cargo xtask ebpf --check", Runner::Ci),
    ("cargo install --path forwarder", Runner::Packages),
    ("cargo xtask install", Runner::Packages),
    ("cargo xtask dist", Runner::Packages),
    (
        "sudo apt install ./target/dist/forwarder_0.1.0-1_amd64.deb",
        Runner::Packages,
    ),
    ("sudo systemctl enable --now forwarder", Runner::Packages),
    ("sudo apt purge forwarder", Runner::Packages),
    (
        "sudo mkdir -p /usr/local/libexec/forwarder",
        Runner::Engines,
    ),
    (
        "sudo ln -sf \"$(command -v forwarder-docker-proxy)\" /usr/local/libexec/forwarder/docker-proxy",
        Runner::Engines,
    ),
    (
        "sudo ln -sf \"$(command -v forwarder)\" /opt/cni/bin/forwarder-portmap",
        Runner::Engines,
    ),
    ("sudo systemctl restart docker", Runner::Engines),
    ("sudo systemctl restart docker forwarder", Runner::Engines),
    ("docker run -d --name api -p 8081:80 nginx", Runner::Engines),
    (
        "sudo podman run -d --name web -p 8080:80 docker.io/library/nginx",
        Runner::Engines,
    ),
    (
        "sudo podman run -d --name api --label forwarder.publish=8081:80 docker.io/library/nginx",
        Runner::Engines,
    ),
    (
        "sudo podman run -d --name shop -p 8082:80 docker.io/library/nginx",
        Runner::Engines,
    ),
    (
        "sudo podman run -d --name cart --label forwarder.publish=8083:80 docker.io/library/nginx",
        Runner::Engines,
    ),
    ("docker run -d --name web -p 8080:80 nginx", Runner::Engines),
    (
        "cargo +nightly fuzz run parser -- -max_total_time=300",
        Runner::Person,
    ),
    (
        "cargo +nightly fuzz run program -- -max_total_time=300",
        Runner::Person,
    ),
    (
        "cargo +nightly fuzz run control -- -max_total_time=300",
        Runner::Person,
    ),
    (
        "cargo +nightly fuzz run configuration -- -max_total_time=300",
        Runner::Person,
    ),
    ("cargo xtask vm --jobs 2 --write", Runner::Person),
    ("cargo xtask vm 6.1 sid", Runner::Person),
    ("cargo xtask vm 5.10 --filter localhost", Runner::Person),
    ("cargo xtask vm 6.12 --tier 3", Runner::Person),
    ("cargo xtask vm 6.12 -- forwarder doctor", Runner::Person),
    ("cargo xtask vm /tmp/tree", Runner::Person),
    ("cargo xtask verifier --write", Runner::Person),
];

/// Who runs what stands in [`ELSEWHERE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Runner {
    /// `cargo xtask fresh`, on a machine that has nothing.
    Fresh,
    /// `cargo xtask ci`, which does either.
    Ci,
    /// What runs this test.
    Itself,
    /// The tests of container engines, in this tier.
    Engines,
    /// The tests of the packages, in this tier.
    Packages,
    /// A person, before a release: it takes other kernels or another toolchain, and up to an hour. Of `cargo xtask`,
    /// xtask's own tests assert that the command line is understood.
    Person,
}

/// Pages that the tests of container engines follow, which have an engine.
const FOLLOWED: [&str; 3] = [
    "docs/with-containerd.md",
    "docs/with-docker.md",
    "docs/with-podman.md",
];

pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// README.md, CONTRIBUTING.md and all of docs/ that people wrote: name and text.
fn documents() -> Vec<(String, String)> {
    fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("benchmarks") {
                collect(&path, paths);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                paths.push(path);
            }
        }
    }
    let top = repository();
    let mut paths = vec![top.join("README.md"), top.join("CONTRIBUTING.md")];
    collect(&top.join("docs"), &mut paths);
    paths.sort();
    let named = |path: PathBuf| {
        let name = path.strip_prefix(&top).unwrap().display().to_string();
        (name, fs::read_to_string(path).unwrap())
    };
    paths.into_iter().map(named).collect()
}

#[test]
fn every_command_in_the_documents_works() {
    let scene = Scene::new();
    let mut ran = 0;
    for (name, text) in documents() {
        if FOLLOWED.contains(&name.as_str()) {
            continue;
        }
        ran += scene.host.enter(|| {
            scene.isolate();
            scene.introduce_the_container();
            Session::new(&scene).run(&name, &text)
        });
    }
    assert!(ran > 10, "only {ran} commands were found and run");
}

#[test]
fn every_other_command_has_its_test() {
    let documents = documents();
    let all: Vec<(&str, String)> = documents
        .iter()
        .flat_map(|(name, text)| {
            let blocks = blocks(text).into_iter();
            let shell = blocks.filter(|block| block.language == "sh");
            shell.flat_map(move |block| {
                let commands = commands(&block.text).into_iter();
                commands.map(move |command| (name.as_str(), command))
            })
        })
        .filter(|(_, command)| !is_run_here(command))
        .collect();
    for (document, command) in &all {
        let known = ELSEWHERE.iter().any(|(known, _)| known == command);
        assert!(known, "{document}: no test runs `{command}`");
    }
    for (known, runner) in ELSEWHERE {
        let named = all.iter().any(|(_, command)| command == known);
        assert!(named, "no document says `{known}` ({runner:?}) any more");
    }
}

fn is_run_here(command: &str) -> bool {
    matches!(program(command).0, "forwarder" | "curl")
}

/// A document that is followed from top to bottom.
struct Session<'a> {
    scene: &'a Scene,
    daemon: Option<Running>,
    ran: usize,
}

impl<'a> Session<'a> {
    fn new(scene: &'a Scene) -> Self {
        Self {
            scene,
            daemon: None,
            ran: 0,
        }
    }

    /// Returns how many commands were run.
    fn run(mut self, document: &str, text: &str) -> usize {
        let mut last = (String::new(), String::new());
        for block in blocks(text) {
            let place = format!("{document}:{}", block.line);
            match block.language.as_str() {
                "sh" => {
                    for command in commands(&block.text) {
                        if is_run_here(&command) {
                            let printed = self.command(&place, &command);
                            last = (command, printed);
                        }
                    }
                }
                "text" | "json" if block.follows => self.compare(&place, &block, &last),
                _ => {}
            }
        }
        self.interrupt_daemon();
        self.ran
    }

    /// Compares what is shown with what the last command printed. A command that reads is asked again until the daemon
    /// has seen what happened.
    fn compare(&mut self, place: &str, shown: &Block, (command, printed): &(String, String)) {
        let Err(first) = fits(shown, printed) else {
            return;
        };
        let reads = matches!(program(command).1, "list" | "flows" | "stats");
        let again = wait_for("what is shown", || {
            let printed = reads.then(|| self.command(place, command));
            match printed.map(|printed| fits(shown, &printed)) {
                None => Some(Err(first.clone())),
                Some(result) => result.ok().map(Ok),
            }
        });
        match again {
            Ok(Ok(())) => {}
            Ok(Err(why)) => panic!("{place}: `{command}`: {why}"),
            Err(_) => panic!("{place}: `{command}`, again and again: {first}"),
        }
    }

    fn interrupt_daemon(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            daemon.interrupt();
        }
    }

    /// Runs one command, and returns what it printed.
    fn command(&mut self, place: &str, command: &str) -> String {
        eprintln!("{place}: {command}");
        self.ran += 1;
        match program(command) {
            ("forwarder", "run") => {
                self.interrupt_daemon();
                let mut daemon = Running::start(self.scene, command);
                daemon.wait_for_line(|line| line == "ready", || ());
                let said = daemon.said();
                self.daemon = Some(daemon);
                return said;
            }
            ("forwarder", "trace") => {
                let mut trace = Running::start(self.scene, command);
                let client = &self.scene.client;
                trace.wait_for_line(
                    |line| line.contains("192.0.2.7"),
                    || {
                        let asked = client.enter(|| TcpStream::connect(CLIENT_ASKS));
                        drop(asked); // the trace has come up or has not
                    },
                );
                let said = trace.said();
                trace.interrupt();
                return said;
            }
            ("forwarder", "down") => self.interrupt_daemon(),
            _ => {}
        }
        let mut child = self.scene.shell(command).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut stderr = child.stderr.take().unwrap();
        let printed = thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).map(|_| text)
        });
        let ended = wait_for("its end", || child.try_wait().unwrap());
        let _ = child.kill();
        let mut errors = String::new();
        stderr.read_to_string(&mut errors).unwrap();
        let printed = printed.join().unwrap().unwrap();
        let daemon = self.daemon.as_ref().map(Running::said).unwrap_or_default();
        let context = || format!("{place}: `{command}`\n{printed}{errors}\n{daemon}");
        let ended = ended.unwrap_or_else(|error| panic!("{}: {error:#}", context()));
        assert!(ended.success(), "{}: {ended}", context());
        printed
    }
}

/// The reference, which every command and flag must stand in.
fn reference() -> String {
    fs::read_to_string(repository().join("docs/reference.md")).unwrap()
}

/// What `forwarder` prints for these arguments.
fn printed_by(arguments: &[&str]) -> String {
    let binary = std::env::var_os("FORWARDER_BIN").expect("FORWARDER_BIN names the program");
    let output = Command::new(binary).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_command_and_flag_is_in_the_reference() {
    let reference = reference();
    let help = printed_by(&["help"]);
    let listed = help.split("Commands:\n").nth(1).unwrap().lines();
    let commands = listed.map_while(|line| line.strip_prefix("  ")?.split(' ').next());
    let commands: Vec<&str> = commands.filter(|command| *command != "help").collect();
    assert!(commands.len() > 8, "{help}");
    let mut all = help.clone();
    for command in commands {
        let rows = [format!("`{command}"), format!("`{command}`")];
        let found = rows.iter().any(|row| reference.contains(row));
        assert!(found, "docs/reference.md has no command `{command}`");
        let help = printed_by(&[command, "--help"]);
        let words = help.split_whitespace();
        for flag in words.filter(|word| word.starts_with("--") && word.len() > 3) {
            let flag = flag.trim_end_matches(|c: char| !c.is_ascii_lowercase());
            let found = flag == "--help" || reference.contains(flag);
            assert!(found, "docs/reference.md has no `{flag}` of `{command}`");
        }
        all += &help;
    }
    let flags = reference.split("--").skip(1);
    for flag in flags.filter(|text| text.starts_with(|c: char| c.is_ascii_lowercase())) {
        let end = flag.find(|c: char| !c.is_ascii_lowercase() && c != '-');
        let flag = format!("--{}", &flag[..end.unwrap_or(flag.len())]);
        assert!(
            all.contains(&flag),
            "docs/reference.md has `{flag}`, forwarder has not"
        );
    }
}

#[test]
fn every_timeout_is_in_the_reference() {
    let reference = reference();
    let defaults = forwarder_common::flow::Timeouts::default();
    for phase in forwarder_common::flow::Phase::ALL {
        let row = format!("\n| `{}` | ", phase.name());
        let shown = reference.split(&row).nth(1);
        let shown = shown.unwrap_or_else(|| panic!("docs/reference.md has no {}", phase.name()));
        let shown = shown.split(' ').next().unwrap_or_default();
        let chosen: forwarder::config::Timeout =
            format!("{}={shown}", phase.name()).parse().unwrap();
        assert_eq!(chosen.seconds, defaults.of(*phase), "{shown}");
    }
}
