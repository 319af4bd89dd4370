//! The commands of README.md, CONTRIBUTING.md and docs/, each run as it stands there, as root of a small machine.
//!
//! What counts is every block fenced as `sh`. A command of `forwarder` or `curl`, also behind `sudo`, is run literally by
//! a shell and must succeed. Every other command must stand in [`ELSEWHERE`], which names the test that runs it. A block
//! fenced as `text` or `json` right below shows what its last command prints, and is compared.
//!
//! `forwarder run` stays in the background until the document ends or says `run` or `down` again. The commands see a file
//! system that they cannot write to, with /run and /sys/fs/bpf of their own.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use forwarder_tests::{
    deadline::{patience, wait_for},
    netns::Netns,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

/// Commands that no namespace can hold, and which test runs them instead.
const ELSEWHERE: &[(&str, Runner)] = &[
    ("cargo xtask run", Runner::Fresh),
    ("cargo xtask test", Runner::Fresh),
    ("cargo xtask test --tier 3", Runner::Itself),
    ("cargo xtask fresh", Runner::Person),
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
        "cargo +nightly fuzz run parser -- -max_total_time=300",
        Runner::Person,
    ),
    (
        "cargo +nightly fuzz run program -- -max_total_time=300",
        Runner::Person,
    ),
    ("cargo xtask vm --jobs 2 --write", Runner::Person),
    ("cargo xtask vm 6.1 sid", Runner::Person),
    ("cargo xtask vm 5.10 --filter localhost", Runner::Person),
    ("cargo xtask vm 6.12 -- forwarder doctor", Runner::Person),
    ("cargo xtask vm /tmp/tree", Runner::Person),
    ("cargo xtask verifier --write", Runner::Person),
];

/// Who runs what stands in [`ELSEWHERE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Runner {
    /// `cargo xtask fresh`, on a machine that has nothing.
    Fresh,
    /// What runs this test.
    Itself,
    /// The tests of the packages, in this tier.
    Packages,
    /// Nobody but a person, before a release: it takes other kernels or another toolchain, and up to an hour.
    Person,
}

/// A fenced block: its language, its lines, and where it begins.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    language: String,
    text: String,
    line: usize,
    /// Nothing but blank lines lies between the block before and this one.
    follows: bool,
}

fn blocks(document: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut inside = false;
    let mut follows = false;
    for (number, line) in document.lines().enumerate() {
        match line.strip_prefix("```") {
            Some(language) if !inside => {
                blocks.push(Block {
                    language: language.trim().to_owned(),
                    text: String::new(),
                    line: number + 1,
                    follows,
                });
                inside = true;
            }
            Some(_) => (inside, follows) = (false, true),
            None if inside => {
                let block = blocks.last_mut().expect("inside one");
                block.text += line;
                block.text.push('\n');
            }
            None => follows &= line.trim().is_empty(),
        }
    }
    assert!(!inside, "the last block has no end");
    blocks
}

/// The commands of a block: lines, joined where one ends in a backslash, without comments.
fn commands(block: &str) -> Vec<String> {
    let joined = block.replace("\\\n", " ");
    let without_comment = |line: &str| {
        let end = if line.starts_with('#') {
            Some(0)
        } else {
            line.find(" #")
        };
        let command = &line[..end.unwrap_or(line.len())];
        command.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let lines = joined.lines().map(without_comment);
    lines.filter(|line| !line.is_empty()).collect()
}

/// What a command starts, behind `sudo`, and its first argument.
fn program(command: &str) -> (&str, &str) {
    let mut words = command.split(' ').skip_while(|word| *word == "sudo");
    (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    )
}

fn repository() -> PathBuf {
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

/// The machine that the documents have in mind: a container 172.17.0.2 on a bridge, and another machine 192.0.2.7.
struct Scene {
    host: Netns,
    client: Netns,
    container: Netns,
    /// `forwarder` and `sudo`.
    programs: TempDir,
}

const CLIENT_ASKS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 8080);

impl Scene {
    fn new() -> Self {
        let host = Netns::new("host").unwrap();
        let client = Netns::new("client").unwrap();
        let container = Netns::new("container").unwrap();
        host.forwards(true).unwrap();
        host.ip(&format!(
            "link set lo up\n\
             link add eth0 type veth peer name eth0 netns {}\n\
             addr add 192.0.2.1/24 dev eth0\nlink set eth0 up\n\
             link add docker0 type bridge\naddr add 172.17.0.1/16 dev docker0\nlink set docker0 up\n\
             link add veth0 type veth peer name eth0 netns {}\nlink set veth0 master docker0 up\n",
            client.path(),
            container.path()
        ))
        .unwrap();
        client
            .ip("link set lo up\naddr add 192.0.2.7/24 dev eth0\nlink set eth0 up\n")
            .unwrap();
        container
            .ip(
                "link set lo up\naddr add 172.17.0.2/16 dev eth0\nlink set eth0 up\n\
                 route add default via 172.17.0.1\n",
            )
            .unwrap();
        for port in [80, 443] {
            let listener = container.enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)));
            let listener = listener.unwrap();
            thread::spawn(move || serve(&listener));
        }

        let programs = TempDir::new().unwrap();
        let binary = std::env::var_os("FORWARDER_BIN")
            .expect("FORWARDER_BIN names the program: `cargo xtask test --tier 3` sets it");
        let binary = fs::canonicalize(binary).unwrap();
        symlink(binary, programs.path().join("forwarder")).unwrap();
        let sudo = programs.path().join("sudo");
        fs::write(&sudo, "#!/bin/sh\nexec \"$@\"\n").unwrap();
        fs::set_permissions(&sudo, fs::Permissions::from_mode(0o755)).unwrap();
        Self {
            host,
            client,
            container,
            programs,
        }
    }

    /// Gives the calling thread, and what it starts, mounts of its own: nothing of this machine can be written.
    fn isolate(&self) {
        let none = None::<&str>;
        let mounted = |what, on, kind, flags| mount(what, on, kind, flags, none).unwrap();
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mounted(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
        mounted(none, "/run", Some("tmpfs"), MsFlags::empty());
        mounted(none, "/sys/fs/bpf", Some("bpf"), MsFlags::empty());
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mounted(none, "/", none, read_only);
    }

    /// Has the container ask the host, so that the host knows where it is, as of any container that has started.
    fn introduce_the_container(&self) {
        let gateway = SocketAddr::from(([172, 17, 0, 1], 9));
        let asked = self.container.enter(|| TcpStream::connect(gateway));
        asked.expect_err("nobody listens there");
    }

    fn shell(&self, command: &str) -> Command {
        let mut shell = self.host.command("sh");
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}:/usr/sbin:/sbin", self.programs.path().display());
        shell
            .args(["-c", &format!("exec {command}")])
            .current_dir("/")
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        shell
    }
}

/// Answers HTTP requests until the process ends; each connection has one.
fn serve(listener: &TcpListener) {
    for stream in listener.incoming().flatten() {
        thread::spawn(move || answer(stream));
    }
}

fn answer(mut stream: TcpStream) -> Option<()> {
    stream.set_read_timeout(Some(patience())).ok()?;
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    while !lines.next()?.ok()?.is_empty() {}
    let body = format!("hello, {}\n", stream.peer_addr().ok()?.ip());
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).ok()
}

/// A command that goes on in the background.
struct Running {
    command: String,
    child: Child,
    output: Arc<Mutex<String>>,
}

impl Running {
    fn start(scene: &Scene, command: &str) -> Self {
        let mut child = scene.shell(command).spawn().unwrap();
        let output = Arc::new(Mutex::new(String::new()));
        let stdout: Box<dyn Read + Send> = Box::new(child.stdout.take().unwrap());
        let stderr: Box<dyn Read + Send> = Box::new(child.stderr.take().unwrap());
        for from in [stdout, stderr] {
            let output = Arc::clone(&output);
            thread::spawn(move || {
                for line in BufReader::new(from).lines().map_while(Result::ok) {
                    *output.lock().unwrap() += &(line + "\n");
                }
            });
        }
        Self {
            command: command.to_owned(),
            child,
            output,
        }
    }

    fn said(&self) -> String {
        self.output.lock().unwrap().clone()
    }

    /// Waits for a line that `wanted` takes, with `meanwhile` between one look and the next.
    fn wait_for_line(&mut self, wanted: impl Fn(&str) -> bool, mut meanwhile: impl FnMut()) {
        let found = wait_for("its line", || {
            meanwhile();
            let ended = self.child.try_wait().unwrap();
            (self.said().lines().any(&wanted) || ended.is_some()).then_some(ended)
        });
        let goes_on = matches!(found, Ok(None));
        assert!(goes_on, "`{}`: {found:?}\n{}", self.command, self.said());
    }

    /// Ends it as Ctrl-C does.
    fn interrupt(mut self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT).unwrap();
        let ended = wait_for("its end", || self.child.try_wait().unwrap()).unwrap();
        // `trace` has no end of its own but the signal.
        let fine = ended.success() || program(&self.command).1 == "trace";
        assert!(fine, "`{}`: {ended}\n{}", self.command, self.said());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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

/// What a block shows, beside what was printed.
fn fits(shown: &Block, printed: &str) -> Result<(), String> {
    if shown.language == "json" {
        let parsed = |what: &str, text: &str| {
            let value = serde_json::from_str::<Value>(text);
            value.map_err(|error| format!("{what}: {error}: {text}"))
        };
        let (shown, real) = (parsed("shown", &shown.text)?, parsed("printed", printed)?);
        return has_shape(&shown, &real).map_err(|why| format!("{why}\n{printed}"));
    }
    match first_unlike(&shown.text, printed) {
        None => Ok(()),
        Some(line) => Err(format!("no line like {line:?} was printed:\n{printed}")),
    }
}

/// The first line that is shown and has none like it in what was printed, in the same order. A number may be another
/// number, and `...` stands for anything.
fn first_unlike<'a>(shown: &'a str, printed: &str) -> Option<&'a str> {
    let mut rest = printed.lines();
    shown
        .lines()
        .filter(|line| !line.trim().is_empty())
        .find(|line| !rest.any(|printed| is_like(line, printed)))
}

fn is_like(shown: &str, printed: &str) -> bool {
    fn words_are_like(shown: &[&str], printed: &[&str]) -> bool {
        match (shown, printed) {
            ([], []) => true,
            (["...", rest @ ..], _) => {
                (0..=printed.len()).any(|skipped| words_are_like(rest, &printed[skipped..]))
            }
            ([one, rest @ ..], [other, others @ ..]) => {
                let is_number = |word: &str| word.parse::<u64>().is_ok();
                (one == other || is_number(one) && is_number(other)) && words_are_like(rest, others)
            }
            _ => false,
        }
    }
    let shown: Vec<&str> = shown.split_whitespace().collect();
    let printed: Vec<&str> = printed.split_whitespace().collect();
    words_are_like(&shown, &printed)
}

/// Whether a JSON document has the fields that are shown, no more and no less, with values of the same types. `null`
/// may stand for anything on either side; each element that is shown has one like it.
fn has_shape(shown: &Value, real: &Value) -> Result<(), String> {
    match (shown, real) {
        (Value::Null, _) | (_, Value::Null) => Ok(()),
        (Value::Object(shown), Value::Object(real)) => {
            let names = |object: &serde_json::Map<String, Value>| {
                let mut names: Vec<String> = object.keys().cloned().collect();
                names.sort();
                names
            };
            if names(shown) != names(real) {
                return Err(format!("fields {:?}, not {:?}", names(real), names(shown)));
            }
            shown
                .iter()
                .try_for_each(|(name, value)| has_shape(value, &real[name]))
        }
        (Value::Array(shown), Value::Array(real)) => shown.iter().try_for_each(|one| {
            let mut why = "an empty array".to_owned();
            let found = real.iter().any(|other| match has_shape(one, other) {
                Ok(()) => true,
                Err(error) => {
                    why = error;
                    false
                }
            });
            if found { Ok(()) } else { Err(why) }
        }),
        (Value::String(_), Value::String(_))
        | (Value::Number(_), Value::Number(_))
        | (Value::Bool(_), Value::Bool(_)) => Ok(()),
        _ => Err(format!("{real} has another type than {shown}")),
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
        let chosen: forwarder::cli::Timeout = format!("{}={shown}", phase.name()).parse().unwrap();
        assert_eq!(chosen.seconds, defaults.of(*phase), "{shown}");
    }
}

#[test]
fn blocks_and_commands_are_found() {
    let text = "text\n```sh\nsudo forwarder run \\\n    -p 1:2   # comment\n# all of it\n```\n\n```text\nready\n```\nword\n```text\n```\n";
    let found = blocks(text);
    let languages: Vec<(&str, bool)> = found
        .iter()
        .map(|block| (block.language.as_str(), block.follows))
        .collect();
    assert_eq!(languages, [("sh", false), ("text", true), ("text", false)]);
    assert_eq!(commands(&found[0].text), ["sudo forwarder run -p 1:2"]);
    assert_eq!(program("sudo forwarder run -p 1:2"), ("forwarder", "run"));
    assert_eq!(
        program("curl http://[::1]:80/"),
        ("curl", "http://[::1]:80/")
    );
}

#[test]
fn what_is_shown_is_compared() {
    let printed = "ID  FRONTEND\n7   *:8080/tcp  ebpf (peer)\n";
    assert_eq!(
        first_unlike("ID FRONTEND\n1 *:8080/tcp ...\n", printed),
        None
    );
    let wrong = "1 *:8081/tcp ...";
    assert_eq!(first_unlike(wrong, printed), Some(wrong));
    assert_eq!(first_unlike("1 *:8080/tcp", printed), Some("1 *:8080/tcp"));
    let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    let real = json(r#"[{"id": 1, "reason": null}, {"id": 2, "reason": "x"}]"#);
    assert_eq!(
        has_shape(&json(r#"[{"id": 9, "reason": "y"}]"#), &real),
        Ok(())
    );
    for other in [
        r#"[{"id": 9}]"#,
        r#"[{"id": 9, "reason": "y", "more": 1}]"#,
        r#"[{"id": "9", "reason": "y"}]"#,
        "{}",
    ] {
        has_shape(&json(other), &real).unwrap_err();
    }
}
