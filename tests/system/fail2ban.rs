//! fail2ban itself, with the action that is installed: what it bans gets into no published port.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use forwarder_tests::{
    daemon::{Daemon, Datapath, binary, doctor},
    deadline::wait_for,
    topology::Topology,
};
use serde_json::Value;

/// The server with two jails, each for a log file, in a folder of its own. One bans for ever.
const JAIL: &str = "[DEFAULT]\nbackend = polling\n[probe]\nenabled = true\nfilter = probe\nlogpath = FOLDER/log\n\
                    maxretry = 2\nbantime = 600\nusedns = no\naction = forwarder[instance=INSTANCE]\n\
                    [lasting]\nenabled = true\nfilter = probe\nlogpath = FOLDER/lasting\n\
                    maxretry = 2\nbantime = -1\nusedns = no\naction = forwarder[instance=INSTANCE]\n";
const FILTER: &str =
    "[Definition]\nfailregex = ^.* refused <HOST>$\ndatepattern = ^%%Y-%%m-%%d %%H:%%M:%%S\n";

fn run(program: &str, arguments: &[&str]) -> bool {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[test]
fn what_fail2ban_bans_gets_into_no_published_port() {
    let topology = Topology::new().unwrap();
    let daemon = Daemon::start(&topology.host, &["8080:172.31.0.2:80"], Datapath::Auto).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    assert!(run("cp", &["-r", "/etc/fail2ban", &at("etc")]));
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../forwarder/packaging");
    fs::copy(
        packaging.join("fail2ban/forwarder.conf"),
        at("etc/action.d/forwarder.conf"),
    )
    .unwrap();
    // Whatever this machine's own jails are.
    fs::remove_dir_all(at("etc/jail.d")).unwrap();
    fs::write(at("etc/jail.conf"), "").unwrap();
    let jail = JAIL.replace("FOLDER", folder.path().to_str().unwrap());
    fs::write(
        at("etc/jail.local"),
        jail.replace("INSTANCE", daemon.instance()),
    )
    .unwrap();
    fs::write(at("etc/filter.d/probe.conf"), FILTER).unwrap();
    fs::write(at("etc/fail2ban.local"), "[DEFAULT]\ndbfile = None\n").unwrap();
    fs::write(at("log"), "").unwrap();
    fs::write(at("lasting"), "").unwrap();

    let (socket, configuration) = (at("sock"), at("etc"));
    let programs = binary().parent().unwrap().to_string_lossy().into_owned();
    let path = format!("{programs}:{}", std::env::var("PATH").unwrap_or_default());
    let mut server = topology.host.command("fail2ban-server");
    server.args(["-f", "-c", &configuration, "-s", &socket, "-p", &at("pid")]);
    server
        .args(["--logtarget", &at("server")])
        .env("PATH", path);
    let mut server = server
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let client = |words: &[&str]| {
        run(
            "fail2ban-client",
            &[&["-c", &configuration, "-s", &socket], words].concat(),
        )
    };
    let bans = || daemon.control(&["bans", "--json"]).unwrap();
    let outcome =
        wait_for("fail2ban", || client(&["status", "probe"]).then_some(())).and_then(|()| {
            let now = Command::new("date").arg("+%Y-%m-%d %H:%M:%S").output()?;
            let now = String::from_utf8_lossy(&now.stdout).trim().to_owned();
            let both = "198.51.100.78";
            for (log, source) in [("log", "198.51.100.77"), ("lasting", "2001:db8::77")] {
                let lines = [source, both].map(|it| format!("{now} refused {it}\n").repeat(3));
                fs::write(at(log), lines.concat())?;
            }
            wait_for("the ban for ever", || {
                let bans: Vec<Value> = serde_json::from_str(&bans()).ok()?;
                let mut bans = bans.iter();
                let ban = bans.find(|ban| ban["network"] == "2001:db8::77/128")?;
                ban["until"].is_null().then_some(())
            })?;
            wait_for("the ban", || {
                bans().contains("198.51.100.77/32").then_some(())
            })?;
            anyhow::ensure!(client(&["set", "probe", "unbanip", "198.51.100.77"]));
            wait_for("the end of the ban", || {
                (!bans().contains("198.51.100.77")).then_some(())
            })?;
            // A jail ends its own bans alone.
            let by = |jail: &str| bans().contains(&format!("fail2ban:{jail}"));
            wait_for("the bans of both jails", || {
                let both = bans().matches(both).count();
                (both == 2 && by("probe") && by("lasting")).then_some(())
            })?;
            anyhow::ensure!(client(&["set", "probe", "unbanip", both]));
            wait_for("the end of one of the two", || (!by("probe")).then_some(()))?;
            anyhow::ensure!(bans().contains(both));
            Ok(())
        });
    let said = fs::read_to_string(at("server")).unwrap_or_default();
    server.kill().unwrap();
    server.wait().unwrap();
    outcome.unwrap_or_else(|error| panic!("{error:#}\n{said}"));
    daemon.stop().unwrap();
}

/// The older tables of iptables, which nftables does not show.
#[test]
fn doctor_finds_chains_of_older_iptables() {
    let topology = Topology::new().unwrap();
    let bans = || doctor(&topology.host, &[]).unwrap()["bans"].clone();
    topology.host.run("iptables-legacy -N other").unwrap();
    assert!(bans().ok);
    topology.host.run("iptables-legacy -N f2b-sshd").unwrap();
    assert_eq!(bans().found, "fail2ban");
}
