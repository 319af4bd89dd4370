//! Debian's Chromium without a window, driven by its DevTools protocol: a page opened in a namespace, what its script
//! says of it, everything that it complained of and asked for, and pictures of it.
//!
//! The protocol goes by two pipes (`--remote-debugging-pipe`): messages in JSON, each ended by a zero byte. The browser
//! has a process namespace and a profile folder of its own, and both are gone with it.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, ChildStdin, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    deadline::{patience, wait_at_most},
    netns::Netns,
};

const PROGRAM: &str = "/usr/bin/chromium";

/// What Chromium gets: no window, no sandbox of its own (it refuses that to root), and nothing that it does beside the
/// page.
const FLAGS: [&str; 13] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-crash-reporter",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
];

/// Light or dark, as the user prefers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Light,
    Dark,
}

impl Scheme {
    /// As in CSS.
    pub fn name(self) -> &'static str {
        match self {
            Self::Light => "light",
            Self::Dark => "dark",
        }
    }
}

/// A browser with one page.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    /// Where commands go; taken at the end.
    commands: Option<ChildStdin>,
    messages: mpsc::Receiver<Value>,
    errors: Arc<Mutex<String>>,
    session: String,
    sent: u64,
    /// What the page did, oldest first.
    events: Vec<Value>,
    profile: TempDir,
}

impl Browser {
    /// Starts one in `netns`, with an empty page.
    ///
    /// # Errors
    /// There is no Chromium, or it does not start in time; with all that it wrote.
    pub fn start(netns: &Netns) -> Result<Self> {
        ensure!(
            Path::new(PROGRAM).exists(),
            "{PROGRAM} is missing: apt-get install chromium fonts-dejavu-core"
        );
        let profile = tempfile::Builder::new()
            .prefix("forwarder-page-")
            .tempdir()?;
        // The protocol is on descriptors 3 and 4, which are made of ours here.
        let shell = "exec \"$@\" 3<&0 4>&1 </dev/null >&2";
        let mut child = netns
            .command("sh")
            .args(["-c", shell, "sh", "unshare", "--pid", "--fork"])
            .args(["--kill-child", "--mount-proc", PROGRAM])
            .args(FLAGS)
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .env("HOME", profile.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start chromium")?;
        let commands = child.stdin.take();
        let stdout = child.stdout.take().context("piped above")?;
        let stderr = child.stderr.take().context("piped above")?;
        let errors = Arc::new(Mutex::new(String::new()));
        collect(stderr, Arc::clone(&errors));
        let mut browser = Self {
            child,
            commands,
            messages: messages(stdout),
            errors,
            session: String::new(),
            sent: 0,
            events: Vec::new(),
            profile,
        };
        browser.open_page().with_context(|| browser.said())?;
        Ok(browser)
    }

    fn open_page(&mut self) -> Result<()> {
        let target = self.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let parameters = json!({"targetId": target["targetId"], "flatten": true});
        let attached = self.call("Target.attachToTarget", parameters)?;
        let session = attached["sessionId"].as_str().context("no session")?;
        self.session = session.to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            self.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(())
    }

    /// Opens a page and waits until all of it is loaded.
    ///
    /// # Errors
    /// It cannot be loaded.
    pub fn open(&mut self, url: &str) -> Result<()> {
        self.events.clear();
        let answer = self.call("Page.navigate", json!({"url": url}))?;
        if let Some(error) = answer["errorText"].as_str() {
            bail!("open {url}: {error}");
        }
        let deadline = Instant::now() + long();
        while !self
            .events
            .iter()
            .any(|it| it["method"] == "Page.loadEventFired")
        {
            let event = self
                .receive(deadline)
                .with_context(|| format!("load {url}"))?;
            self.events.push(event);
        }
        Ok(())
    }

    /// The value of an expression of JavaScript in the page; a promise is waited for.
    ///
    /// # Errors
    /// It throws.
    pub fn value(&mut self, expression: &str) -> Result<Value> {
        let parameters = json!({
            "expression": expression, "returnByValue": true, "awaitPromise": true, "userGesture": true,
        });
        let mut answer = self.call("Runtime.evaluate", parameters)?;
        if let Some(thrown) = answer.get("exceptionDetails") {
            bail!("{expression}: {thrown}");
        }
        Ok(answer["result"]["value"].take())
    }

    /// The text of the first element that the selector finds.
    ///
    /// # Errors
    /// There is none.
    pub fn text(&mut self, selector: &str) -> Result<String> {
        let found = self.value(&format!(
            "document.querySelector({selector:?}).textContent.trim()"
        ))?;
        let text = found.as_str();
        Ok(text
            .with_context(|| format!("{selector}: {found}"))?
            .to_owned())
    }

    /// Waits until an expression is true.
    ///
    /// # Errors
    /// It is not in time.
    pub fn wait_until(&mut self, expression: &str) -> Result<()> {
        let expression = format!("Boolean({expression})");
        wait_at_most(long(), &expression.clone(), || {
            matches!(self.value(&expression), Ok(Value::Bool(true))).then_some(())
        })
    }

    /// Sets the window's width and the scheme that the user prefers.
    ///
    /// # Errors
    /// The browser refuses it.
    pub fn look(&mut self, width: u32, scheme: Scheme) -> Result<()> {
        let metrics = json!({
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600,
        });
        self.call("Emulation.setDeviceMetricsOverride", metrics)?;
        let feature = json!({"name": "prefers-color-scheme", "value": scheme.name()});
        self.call("Emulation.setEmulatedMedia", json!({"features": [feature]}))?;
        Ok(())
    }

    /// Writes a picture of the whole page, as PNG.
    ///
    /// # Errors
    /// No picture, or it cannot be written.
    pub fn picture(&mut self, file: &Path) -> Result<()> {
        let metrics = self.call("Page.getLayoutMetrics", json!({}))?;
        let size = &metrics["cssContentSize"];
        let parameters = json!({
            "format": "png", "captureBeyondViewport": true,
            "clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1},
        });
        let answer = self.call("Page.captureScreenshot", parameters)?;
        let data = answer["data"].as_str().context("no picture")?;
        fs::write(file, base64(data)?).with_context(|| format!("write {}", file.display()))
    }

    /// Addresses that the page has asked for since it was opened.
    ///
    /// # Errors
    /// The browser has ended.
    pub fn requests(&mut self) -> Result<Vec<String>> {
        self.value("0")?; // what happened before has arrived then
        let sent = self.events.iter();
        let sent = sent.filter(|it| it["method"] == "Network.requestWillBeSent");
        let url = |it: &Value| it["params"]["request"]["url"].as_str().map(Into::into);
        Ok(sent.filter_map(url).collect())
    }

    /// What the browser complained of since the page was opened: errors and warnings of its console, exceptions,
    /// requests that failed.
    ///
    /// # Errors
    /// The browser has ended.
    pub fn complaints(&mut self) -> Result<Vec<String>> {
        self.value("0")?;
        let is_one = |event: &&Value| {
            let parameters = &event["params"];
            let loud = |word: &Value| matches!(word.as_str(), Some("error" | "warning" | "assert"));
            match event["method"].as_str().unwrap_or_default() {
                "Runtime.exceptionThrown" | "Network.loadingFailed" => true,
                "Runtime.consoleAPICalled" => loud(&parameters["type"]),
                "Log.entryAdded" => loud(&parameters["entry"]["level"]),
                _ => false,
            }
        };
        let named = |event: &Value| {
            let same = |it: &&Value| it["params"]["requestId"] == event["params"]["requestId"];
            let mut requests = self.events.iter().filter(same);
            let url = requests.find_map(|it| it["params"]["request"]["url"].as_str());
            format!("{}{event}", url.unwrap_or_default())
        };
        Ok(self.events.iter().filter(is_one).map(named).collect())
    }

    /// Ends it, and waits until its processes are gone.
    ///
    /// # Errors
    /// They do not end in time.
    pub fn close(mut self) -> Result<()> {
        self.call("Browser.close", json!({}))?;
        let child = &mut self.child;
        wait_at_most(long(), "the end of chromium", || {
            child.try_wait().ok().flatten()
        })?;
        self.wait_for_processes()
    }

    /// Waits until nothing writes to the profile any more.
    fn wait_for_processes(&self) -> Result<()> {
        let profile = self.profile.path().display().to_string();
        wait_at_most(long(), "the end of chromium's processes", || {
            processes_with(&profile).is_empty().then_some(())
        })
    }

    /// Sends a command and returns its result.
    fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.sent += 1;
        let mut message = json!({"id": self.sent, "method": method, "params": parameters});
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        let commands = self.commands.as_mut().context("the browser has ended")?;
        commands.write_all(&bytes).context(method.to_owned())?;
        let deadline = Instant::now() + long();
        loop {
            let mut answer = self.receive(deadline).with_context(|| method.to_owned())?;
            if answer["id"] != self.sent {
                self.events.push(answer);
                continue;
            }
            if let Some(error) = answer.get("error") {
                bail!("{method}: {error}");
            }
            return Ok(answer["result"].take());
        }
    }

    fn receive(&self, deadline: Instant) -> Result<Value> {
        let left = deadline.saturating_duration_since(Instant::now());
        let message = self.messages.recv_timeout(left);
        message.context("no answer from chromium")
    }

    fn said(&self) -> String {
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        format!("chromium's errors:\n{errors}")
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its process namespace, and so everything in it, ends with it, but a little later.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.wait_for_processes();
        if thread::panicking() {
            eprintln!("{}", self.said());
        }
    }
}

/// A whole browser takes longer than anything else here.
fn long() -> Duration {
    patience() * 4
}

fn messages(from: impl Read + Send + 'static) -> mpsc::Receiver<Value> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for message in BufReader::new(from).split(0).map_while(Result::ok) {
            let value = serde_json::from_slice(&message).unwrap_or_default();
            if sender.send(value).is_err() {
                return;
            }
        }
    });
    receiver
}

fn collect(from: impl Read + Send + 'static, into: Arc<Mutex<String>>) {
    thread::spawn(move || {
        let lines = BufReader::new(from).lines().map_while(Result::ok);
        // It misses a desktop's bus at every turn.
        for line in lines.filter(|line| !line.contains("ERROR:dbus/")) {
            let mut text = into.lock().unwrap_or_else(PoisonError::into_inner);
            text.push_str(&line);
            text.push('\n');
        }
    });
}

/// Processes whose command line has that text.
fn processes_with(text: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let lines = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(text))
        .collect()
}

/// Decodes RFC 4648's base64.
fn base64(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for character in text.bytes().filter(|it| *it != b'=') {
        let value = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            other => bail!("{other} in base64"),
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Ok(bytes)
}
