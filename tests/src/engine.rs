//! A container engine's API, as far as `run --docker` asks it, with containers that a test makes up. Nothing runs in them.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::IpAddr,
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    thread,
};

use anyhow::Result;
use serde_json::{Value, json};

#[derive(Debug, Default)]
struct State {
    /// By their ids.
    containers: BTreeMap<String, Value>,
    /// Labels of the one image.
    image: Value,
    /// One that is gone once it has been asked for.
    leaving: Option<String>,
    /// One that it cannot speak of.
    broken: Option<String>,
    /// Who hears of events.
    listeners: Vec<UnixStream>,
}

/// It listens until it is dropped.
#[derive(Debug)]
pub struct Engine {
    state: Arc<Mutex<State>>,
    folder: tempfile::TempDir,
}

impl Engine {
    /// # Errors
    /// No room for its socket.
    pub fn start() -> Result<Self> {
        let engine = Self {
            state: Arc::default(),
            folder: tempfile::tempdir()?,
        };
        let listener = UnixListener::bind(engine.socket())?;
        let state = engine.state.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = answer(stream, &state); // whoever asked has gone
            }
        });
        Ok(engine)
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("engine.sock")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread has panicked")
    }

    /// Has a container run under a name, with these addresses, without a word about it; `ports` are as in
    /// `NetworkSettings.Ports`.
    pub fn put(&self, id: &str, name: &str, addresses: &[IpAddr], ports: &Value, labels: &Value) {
        let of = |v4: bool| addresses.iter().find(|it| it.is_ipv4() == v4);
        let text = |v4| of(v4).map(ToString::to_string).unwrap_or_default();
        let network =
            json!({"IPAddress": text(true), "GlobalIPv6Address": text(false), "Gateway": "there"});
        let container = json!({
            "Id": id, "Name": format!("/{name}"), "Image": "image", "State": {"Running": true}, "Config": {"Labels": labels},
            "NetworkSettings": {"Networks": {"bridge": network}, "Ports": ports},
        });
        self.state().containers.insert(id.into(), container);
    }

    /// The same, and says so.
    pub fn run(&self, id: &str, name: &str, addresses: &[IpAddr], ports: &Value, labels: &Value) {
        self.put(id, name, addresses, ports, labels);
        self.tell("start", id, name);
    }

    /// Ends a container and says so.
    pub fn end(&self, id: &str, name: &str) {
        self.remove(id);
        self.tell("die", id, name);
    }

    /// Ends a container without a word.
    pub fn remove(&self, id: &str) {
        self.state().containers.remove(id);
    }

    /// Ends a container without a word, when somebody has asked for it by its name, as a command does.
    pub fn remove_after_next_look(&self, id: &str) {
        self.state().leaving = Some(id.into());
    }

    /// Has it answer with an error whenever it is asked for a container or an image.
    pub fn break_one(&self, id: &str) {
        self.state().broken = Some(id.into());
    }

    /// What the image of all containers is labelled with.
    pub fn label_image(&self, labels: Value) {
        self.state().image = labels;
    }

    /// Tells of something that has happened to a container.
    pub fn tell(&self, action: &str, id: &str, name: &str) {
        let actor = json!({"ID": id, "Attributes": {"name": name}});
        let event = json!({"Type": "container", "Action": action, "Actor": actor});
        let mut state = self.state();
        state
            .listeners
            .retain_mut(|listener| writeln!(listener, "{event}").is_ok());
    }

    /// Breaks off with everybody who hears of events, as when the engine is killed and comes back.
    pub fn hang_up(&self) {
        self.state().listeners.clear();
    }

    /// How many hear of events.
    pub fn listeners(&self) -> usize {
        self.state().listeners.len()
    }
}

fn answer(mut stream: UnixStream, state: &Mutex<State>) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    let mut state = state.lock().expect("no thread has panicked");
    let body = match path.split('/').collect::<Vec<_>>()[..] {
        [_, events] if events.starts_with("events") => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
            state.listeners.push(stream);
            return Ok(());
        }
        [_, "containers", "json"] => Some(state.containers.values().cloned().collect()),
        [_, "containers" | "images", named, "json"] if state.broken.as_deref() == Some(named) => {
            stream.write_all(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")?;
            return Ok(());
        }
        [_, "containers", named, "json"] => {
            let name = format!("/{named}");
            let is_meant = |it: &&Value| it["Id"] == named || it["Name"] == name.as_str();
            let found = state.containers.values().find(is_meant).cloned();
            // The watcher, which may still be at its first look, asks by the id.
            if found.as_ref().is_some_and(|it| it["Name"] == name.as_str())
                && let Some(id) = state.leaving.take()
            {
                state.containers.remove(&id);
            }
            found
        }
        [_, "images", _, "json"] => Some(json!({"Config": {"Labels": state.image}})),
        _ => None,
    };
    let status = if body.is_some() {
        "200 OK"
    } else {
        "404 Not Found"
    };
    let body = body.unwrap_or_default().to_string();
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )?;
    Ok(())
}
