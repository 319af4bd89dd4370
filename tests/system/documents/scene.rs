//! The machine that the documents have in mind, and commands that go on in the background of it.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::symlink,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use forwarder_tests::{
    daemon::make_program,
    deadline::{patience, wait_for},
    netns::Netns,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use super::block::program;

/// The machine that the documents have in mind: a container 172.17.0.2 on a bridge, and another machine 192.0.2.7.
pub(super) struct Scene {
    pub(super) host: Netns,
    pub(super) client: Netns,
    container: Netns,
    /// `forwarder` and `sudo`.
    programs: TempDir,
}

pub(super) const CLIENT_ASKS: SocketAddr =
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 8080);

impl Scene {
    pub(super) fn new() -> Self {
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
        make_program(&sudo, b"#!/bin/sh\nexec \"$@\"\n").unwrap();
        Self {
            host,
            client,
            container,
            programs,
        }
    }

    /// Gives the calling thread, and what it starts, mounts of its own: nothing of this machine can be written.
    pub(super) fn isolate(&self) {
        let none = None::<&str>;
        let mounted = |what, on, kind, flags| mount(what, on, kind, flags, none).unwrap();
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mounted(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
        mounted(none, "/run", Some("tmpfs"), MsFlags::empty());
        mounted(none, "/var/lib", Some("tmpfs"), MsFlags::empty());
        mounted(none, "/sys/fs/bpf", Some("bpf"), MsFlags::empty());
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mounted(none, "/", none, read_only);
    }

    /// Has the container ask the host, so that the host knows where it is, as of any container that has started.
    pub(super) fn introduce_the_container(&self) {
        let gateway = SocketAddr::from(([172, 17, 0, 1], 9));
        let asked = self.container.enter(|| TcpStream::connect(gateway));
        asked.expect_err("nobody listens there");
    }

    pub(super) fn shell(&self, command: &str) -> Command {
        // Who runs the tests in the background ignores SIGINT, which what they start would inherit.
        let mut shell = self.host.command("env");
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}:/usr/sbin:/sbin", self.programs.path().display());
        shell
            .args(["--default-signal=INT", "sh", "-c"])
            .arg(format!("exec {command}"))
            .current_dir("/")
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        shell
    }
}

/// Answers HTTP requests until the process ends; each connection has one.
pub(super) fn serve(listener: &TcpListener) {
    for stream in listener.incoming().flatten() {
        thread::spawn(move || answer(stream));
    }
}

pub(super) fn answer(mut stream: TcpStream) -> Option<()> {
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
pub(super) struct Running {
    pub(super) command: String,
    child: Child,
    output: Arc<Mutex<String>>,
}

impl Running {
    pub(super) fn start(scene: &Scene, command: &str) -> Self {
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

    pub(super) fn said(&self) -> String {
        self.output.lock().unwrap().clone()
    }

    /// Waits for a line that `wanted` takes, with `meanwhile` between one look and the next.
    pub(super) fn wait_for_line(
        &mut self,
        wanted: impl Fn(&str) -> bool,
        mut meanwhile: impl FnMut(),
    ) {
        let found = wait_for("its line", || {
            meanwhile();
            let ended = self.child.try_wait().unwrap();
            (self.said().lines().any(&wanted) || ended.is_some()).then_some(ended)
        });
        let goes_on = matches!(found, Ok(None));
        assert!(goes_on, "`{}`: {found:?}\n{}", self.command, self.said());
    }

    /// Ends it as Ctrl-C does.
    pub(super) fn interrupt(mut self) {
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
