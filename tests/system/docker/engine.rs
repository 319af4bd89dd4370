//! dockerd by hand in a namespace: its configuration, an image without a registry, and its command line.

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use forwarder_tests::{daemon::program, deadline::wait_at_most, netns::Netns};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::programs::Programs;

/// The host's address on Docker's bridge.
pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(172, 31, 7, 1);
/// What the web server says.
pub(super) const PAGE: &str = "served\n";
/// What a command of Docker may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// A running dockerd; its containers end with it.
pub(super) struct Engine {
    child: Child,
    host: Programs,
    /// Which our program is to ask, if it is Docker's proxy.
    instance: Option<String>,
    folder: tempfile::TempDir,
}

/// Processes and their memory in KB.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub(super) processes: usize,
    pub(super) private: u64,
    pub(super) proportional: u64,
}

impl Engine {
    /// Starts it in a namespace, with our program as its proxy if there is an instance, else with its own.
    pub(super) fn start(
        host: impl Into<Programs>,
        mut config: Value,
        instance: Option<&str>,
    ) -> Result<Self> {
        if instance.is_some() {
            let proxy = program("forwarder-docker-proxy");
            config["userland-proxy-path"] = proxy.display().to_string().into();
        }
        Self::start_with(host, tempfile::tempdir()?, config, instance)
    }

    /// Starts it in a namespace with this configuration, and what it needs besides; it uses a folder that is empty but for
    /// links.
    pub(super) fn start_with(
        host: impl Into<Programs>,
        folder: tempfile::TempDir,
        mut config: Value,
        instance: Option<&str>,
    ) -> Result<Self> {
        let path = |name: &str| folder.path().join(name);
        config["bip"] = format!("{GATEWAY}/24").into();
        config["storage-driver"] = "vfs".into();
        config["exec-opts"] = json!(["native.cgroupdriver=cgroupfs"]);
        fs::write(path("daemon.json"), config.to_string())?;
        let host = host.into();
        let child = spawn(&host, folder.path(), instance)?;
        let mut engine = Self {
            child,
            host,
            instance: instance.map(Into::into),
            folder,
        };
        engine.wait_until_ready()?;
        engine.import_image()?;
        Ok(engine)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        wait_at_most(PATIENCE, "dockerd", || {
            let ended = self.child.try_wait().ok().flatten();
            (ended.is_some() || self.docker(&["version"]).is_ok()).then_some(())
        })?;
        self.docker(&["version"]).with_context(|| self.log())?;
        Ok(())
    }

    /// Kills it. Its containerd ends by that, and nothing else of what it has started.
    pub(super) fn kill(&mut self) -> Result<()> {
        let file = self.folder.path().join("exec/containerd/containerd.pid");
        let containerd = fs::read_to_string(&file)?;
        self.child.kill()?;
        self.child.wait()?;
        wait_at_most(PATIENCE, "the end of containerd", || {
            let words = fs::read(format!("/proc/{containerd}/cmdline"));
            words.map_or(true, |words| words.is_empty()).then_some(())
        })?;
        // The next dockerd would take it for running until somebody has waited for it.
        fs::remove_file(file).context("containerd's pid file")
    }

    /// Starts it again as it was, after [`Engine::kill`].
    pub(super) fn restart(&mut self) -> Result<()> {
        self.child = spawn(&self.host, self.folder.path(), self.instance.as_deref())?;
        self.wait_until_ready()
    }

    fn log(&self) -> String {
        let log = fs::read_to_string(self.folder.path().join("log"));
        format!("dockerd's log:\n{}", log.unwrap_or_default())
    }

    /// An image named `bb` that is busybox and nothing else.
    fn import_image(&self) -> Result<()> {
        root_of_image(self.folder.path())?;
        self.docker(&["import", &self.archive(), "bb"])?;
        Ok(())
    }

    /// An image that serves [`PAGE`] on port 80, under any name.
    pub(super) fn import_web_server(&self, name: &str) -> Result<()> {
        let command = r#"CMD ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/"]"#;
        self.docker(&["import", "--change", command, &self.archive(), name])?;
        Ok(())
    }

    /// What an image is made of.
    pub(super) fn archive(&self) -> String {
        self.folder.path().join("root.tar").display().to_string()
    }

    /// Where it listens.
    pub(super) fn socket(&self) -> String {
        self.folder.path().join("socket").display().to_string()
    }

    /// Runs a command of Docker and returns what it prints.
    pub(super) fn docker(&self, arguments: &[&str]) -> Result<String> {
        self.docker_within(PATIENCE, arguments)
    }

    pub(super) fn docker_within(&self, patience: Duration, arguments: &[&str]) -> Result<String> {
        let socket = format!("unix://{}", self.socket());
        let what = format!("docker {}", arguments.join(" "));
        let mut command = self.host.command("docker");
        let mut child = command
            .args(["-H", &socket])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let ended = wait_at_most(patience, &what, || child.try_wait().ok().flatten());
        let _ = child.kill(); // it has ended, or hangs
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !ended.with_context(|| self.log())?.success() {
            bail!("{what}: {said}");
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Starts a container that does nothing.
    pub(super) fn run(&self, name: &str, flags: &[&str]) -> Result<String> {
        let before = ["run", "-d", "--name", name];
        let behind = ["bb", "/bin/busybox", "sleep", "100000"];
        self.docker(&[&before, flags, &behind].concat())
    }

    /// What a program of the engine's own machine prints.
    pub(super) fn output_of(&self, line: &str) -> Result<String> {
        let words: Vec<&str> = line.split(' ').collect();
        let output = self.host.command(words[0]).args(&words[1..]).output()?;
        ensure!(output.status.success(), "{line}: {output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn inspect(&self, name: &str, format: &str) -> Result<String> {
        self.docker(&["inspect", "-f", format, name])
    }

    pub(super) fn address(&self, name: &str) -> Result<String> {
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        self.inspect(name, format)
    }

    /// A container's network namespace.
    pub(super) fn netns(&self, name: &str) -> Result<Netns> {
        let process = self.inspect(name, "{{.State.Pid}}")?.parse()?;
        Netns::of(name, process)
    }

    /// The processes that it has started for ports, with their command lines.
    pub(super) fn proxy_processes(&self) -> Result<Vec<(u32, String)>> {
        let mut all = Vec::new();
        for process in children(self.child.id())? {
            let words = fs::read(format!("/proc/{process}/cmdline"))?;
            let words = String::from_utf8_lossy(&words).replace('\0', " ");
            if words.contains("-host-port") {
                all.push((process, words));
            }
        }
        Ok(all)
    }

    /// What these processes take.
    pub(super) fn proxies(&self) -> Result<Memory> {
        let mut all = Memory::default();
        for (process, _) in self.proxy_processes()? {
            let one = memory(process)?;
            all.processes += 1;
            all.private += one.private;
            all.proportional += one.proportional;
        }
        Ok(all)
    }

    /// Removes its containers and ends it.
    pub(super) fn stop(mut self) -> Result<()> {
        self.end().with_context(|| self.log())
    }

    fn end(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        let containers = self.docker(&["ps", "-aq"])?;
        for container in containers.lines() {
            self.docker(&["rm", "-f", container])?;
        }
        kill(
            Pid::from_raw(self.child.id().cast_signed()),
            Signal::SIGTERM,
        )?;
        wait_at_most(PATIENCE, "the end of dockerd", || {
            self.child.try_wait().ok().flatten()
        })?;
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.end().is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

/// Starts dockerd with what is in its folder.
fn spawn(host: &Programs, folder: &Path, instance: Option<&str>) -> Result<Child> {
    let path = |name: &str| folder.join(name);
    let mut command = host.command("dockerd");
    match instance {
        Some(instance) => command.env("FORWARDER_INSTANCE", instance),
        None => command.env_remove("FORWARDER_INSTANCE"),
    };
    for (flag, name) in [
        ("--config-file", "daemon.json"),
        ("--data-root", "data"),
        ("--exec-root", "exec"),
        ("--pidfile", "pid"),
    ] {
        command.arg(flag).arg(path(name));
    }
    let socket = format!("unix://{}", path("socket").display());
    let log = File::options()
        .create(true)
        .append(true)
        .open(path("log"))?;
    command
        .args(["-H", &socket])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("start dockerd")
}

/// Makes the archive of an image in a folder: busybox, and the page that its web server shows.
pub(super) fn root_of_image(folder: &Path) -> Result<PathBuf> {
    let bin = folder.join("root/bin");
    fs::create_dir_all(&bin)?;
    let busybox = ["/usr/bin/busybox", "/bin/busybox", "/sbin/busybox"].map(Path::new);
    let busybox = busybox.into_iter().find(|path| path.is_file());
    fs::copy(busybox.context("no busybox")?, bin.join("busybox"))?;
    fs::write(folder.join("root/index.html"), PAGE)?;
    let archive = folder.join("root.tar");
    let mut tar = Command::new("tar");
    tar.arg("-C")
        .arg(folder.join("root"))
        .arg("-cf")
        .arg(&archive)
        .arg(".");
    ensure!(tar.status()?.success(), "tar");
    Ok(archive)
}

/// Children of a process, of all its threads.
fn children(process: u32) -> Result<Vec<u32>> {
    let mut children = Vec::new();
    for thread in fs::read_dir(format!("/proc/{process}/task"))? {
        let path: PathBuf = thread?.path().join("children");
        let text = fs::read_to_string(path)?;
        children.extend(
            text.split_whitespace()
                .filter_map(|word| word.parse::<u32>().ok()),
        );
    }
    Ok(children)
}

/// What one process takes.
pub(super) fn memory(process: u32) -> Result<Memory> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let of = |name: &str| -> u64 {
        let lines = text.lines().filter(|line| line.starts_with(name));
        let numbers = lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        numbers.sum()
    };
    Ok(Memory {
        processes: 1,
        private: of("Private_Clean:") + of("Private_Dirty:"),
        proportional: of("Pss:"),
    })
}
