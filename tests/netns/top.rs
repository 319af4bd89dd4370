//! `forwarder top` on a pseudo-terminal: it shows what is published, follows the terminal's size, and leaves the terminal as it
//! was.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use forwarder_tests::{
    daemon::{Daemon, Datapath, binary},
    deadline::wait_for,
    netns::Netns,
};
use nix::{
    pty::{Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios::{LocalFlags, tcgetattr},
    },
    unistd::{Pid, ttyname},
};

const LEAVES_ALTERNATE_SCREEN: &str = "\x1b[?1049l";

struct Terminal {
    child: Child,
    keys: File,
    screen: Arc<Mutex<String>>,
    /// Open for as long as the terminal is looked at.
    slave: OwnedFd,
}

impl Terminal {
    fn start(host: &Netns, daemon: &Daemon) -> Self {
        let size = Winsize {
            ws_row: 24,
            ws_col: 100,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(Some(&size), None).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = host
            .command("setsid")
            .args(["-c", &binary().to_string_lossy()])
            .args(["top", "--instance", daemon.instance()])
            .env("TERM", "xterm")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let keys = File::from(pty.master);
        let screen = Arc::new(Mutex::new(String::new()));
        let (mut reader, into) = (keys.try_clone().unwrap(), screen.clone());
        thread::spawn(move || {
            let mut part = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut part) {
                into.lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&part[..length]));
            }
        });
        Self {
            child,
            keys,
            screen,
            slave: pty.slave,
        }
    }

    fn wait_for(&self, text: &str) {
        let screen = || self.screen.lock().unwrap().clone();
        wait_for(text, || screen().contains(text).then_some(()))
            .unwrap_or_else(|error| panic!("{error}: {:?}", screen()));
    }

    fn is_raw(&self) -> bool {
        let flags = tcgetattr(&self.slave).unwrap().local_flags;
        !flags.contains(LocalFlags::ICANON | LocalFlags::ECHO)
    }

    /// Its status, once it has ended; the terminal is as it was.
    fn end(mut self) -> Option<i32> {
        let child = &mut self.child;
        let status = wait_for("the end of top", || child.try_wait().unwrap()).unwrap();
        self.wait_for(LEAVES_ALTERNATE_SCREEN);
        assert!(!self.is_raw(), "the terminal is not as it was");
        status.code()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn published() -> (Netns, Daemon) {
    let host = Netns::new("host").unwrap();
    host.ip("link set lo up").unwrap();
    let specs = ["8080:172.31.0.2:80", "127.0.0.1:53:172.31.0.2:53/udp"];
    let daemon = Daemon::start(&host, &specs, Datapath::Userland).unwrap();
    (host, daemon)
}

#[test]
fn top_follows_its_terminal_and_leaves_it_as_it_was() {
    let (host, daemon) = published();
    let mut terminal = Terminal::start(&host, &daemon);
    terminal.wait_for("*:8080/tcp");
    terminal.wait_for("127.0.0.1:53/udp");
    assert!(terminal.is_raw());
    // What is drawn after this is drawn for the new size.
    terminal.screen.lock().unwrap().clear();
    let path = ttyname(&terminal.slave).unwrap();
    let resized = Command::new("stty")
        .args(["-F", &path.to_string_lossy(), "cols", "70", "rows", "9"])
        .status();
    assert!(resized.unwrap().success());
    terminal.wait_for("*:8080/tcp");
    terminal.keys.write_all(b"ipfbq").unwrap();
    assert_eq!(terminal.end(), Some(0));
    daemon.stop().unwrap();
}

#[test]
fn a_signal_and_the_instances_end_restore_the_terminal() {
    let (host, daemon) = published();
    let terminal = Terminal::start(&host, &daemon);
    terminal.wait_for("*:8080/tcp");
    let pid = Pid::from_raw(terminal.child.id().cast_signed());
    kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(terminal.end(), Some(128 + Signal::SIGTERM as i32));
    let terminal = Terminal::start(&host, &daemon);
    terminal.wait_for("*:8080/tcp");
    daemon.stop().unwrap();
    terminal.wait_for("error: instance");
    assert_eq!(terminal.end(), Some(1));
}

#[test]
fn without_a_terminal_top_prints_one_table() {
    let (_host, daemon) = published();
    let text = daemon.control(&["top"]).unwrap();
    assert_eq!(text.matches("*:8080/tcp").count(), 1, "{text}");
    assert!(text.contains("BYTES/S") && !text.contains('\x1b'), "{text}");
    daemon.stop().unwrap();
}

#[test]
fn top_has_one_document_too() {
    let (_host, daemon) = published();
    let text = daemon.control(&["top", "--json"]).unwrap();
    let document: serde_json::Value = serde_json::from_str(&text).unwrap();
    let publish = &document["publishes"][0];
    assert_eq!(publish["frontend"]["port"], 8080, "{text}");
    assert!(publish["packets_per_second"].is_number(), "{text}");
    assert!(document["reasons"].is_array(), "{text}");
    daemon.stop().unwrap();
}
