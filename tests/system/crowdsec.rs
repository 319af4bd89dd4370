//! crowdsec-custom-bouncer itself: what CrowdSec decides about addresses gets into no published port, or does again.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, TcpListener},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use forwarder_tests::{
    daemon::{Daemon, Datapath, binary, make_program},
    deadline::wait_for,
    document::Ban,
    topology::Topology,
};
use serde_json::{Value, json};

/// As many as a block list has.
const LISTED: u32 = 20_000;
const CONFIGURATION: &str = "bin_path: FOLDER/bouncer\nfeed_via_stdin: true\ntotal_retries: 0\npiddir: FOLDER\n\
                             update_frequency: 1s\ncache_retention_duration: 1s\ndaemonize: false\nlog_mode: stdout\n\
                             log_level: info\napi_url: http://127.0.0.1:PORT/\napi_key: secret\n\
                             prometheus:\n  enabled: false\n";

fn decision(scope: &str, value: &str, kind: &str, duration: &str) -> Value {
    json!({"id": 1, "origin": "cscli", "scenario": "probe", "scope": scope, "value": value, "type": kind, "duration": duration})
}

/// What CrowdSec's API says to a bouncer that asks for decisions: each of these once, then nothing new.
fn answers() -> Vec<Value> {
    let mut all: Vec<Value> = (0..LISTED)
        .map(|number| {
            let address = Ipv4Addr::from(0x0a00_0000 + number).to_string();
            decision("Ip", &address, "ban", "167h59m59.5s")
        })
        .collect();
    all.push(decision("Range", "2001:db8:7::/64", "ban", "4h"));
    all.push(decision("Ip", "198.51.100.77", "ban", "3h59m58.123456s"));
    all.push(decision("Ip", "198.51.100.78", "captcha", "4h"));
    vec![
        json!({"new": all, "deleted": []}),
        json!({"new": [], "deleted": [decision("Ip", "198.51.100.77", "ban", "-1.5s")]}),
    ]
}

/// Serves `said` answers, one after the other, as fast as `allowed` says.
fn api(listener: TcpListener, allowed: Arc<AtomicUsize>) {
    let answers = answers();
    let mut said = 0;
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let Some(Ok(first)) = lines.next() else {
            continue;
        };
        while lines
            .next()
            .is_some_and(|line| line.is_ok_and(|line| !line.is_empty()))
        {}
        let mut body = json!({"new": null, "deleted": null});
        if first.contains("/v1/decisions/stream") && said < allowed.load(Ordering::SeqCst) {
            body.clone_from(&answers[said]);
            said += 1;
        }
        let body = body.to_string();
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n";
        let _ = write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len());
    }
}

fn bans(daemon: &Daemon) -> Vec<Ban> {
    daemon.document(&["bans"]).unwrap()
}

fn has(bans: &[Ban], network: &str) -> bool {
    bans.iter().any(|ban| ban.network == network)
}

#[test]
fn what_crowdsec_decides_is_done_to_published_ports() {
    let topology = Topology::new().unwrap();
    let daemon = Daemon::start(&topology.host, &["8080:172.31.0.2:80"], Datapath::Auto).unwrap();
    let listener = topology
        .host
        .enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let allowed = Arc::new(AtomicUsize::new(1));
    let shared = allowed.clone();
    thread::spawn(move || api(listener, shared));

    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let configuration = CONFIGURATION.replace("FOLDER", folder.path().to_str().unwrap());
    fs::write(at("bouncer.yaml"), configuration.replace("PORT", &port)).unwrap();
    // As the page has it, for another instance.
    let script = format!(
        "#!/bin/sh\nexec {} crowdsec --instance {}\n",
        binary().display(),
        daemon.instance()
    );
    make_program(at("bouncer").as_ref(), script.as_bytes()).unwrap();
    let log = fs::File::create(at("log")).unwrap();
    let mut bouncer = topology
        .host
        .command("crowdsec-custom-bouncer")
        .args(["-c", &at("bouncer.yaml")])
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let outcome = wait_for("CrowdSec's bans", || {
        let bans = bans(&daemon);
        (bans.len() == LISTED as usize + 2).then_some(bans)
    })
    .and_then(|bans| {
        assert!(has(&bans, "198.51.100.77/32") && has(&bans, "2001:db8:7::/64"));
        assert!(bans.iter().all(|ban| ban.until.is_some()));
        allowed.store(2, Ordering::SeqCst);
        wait_for("the end of a ban", || {
            (!has(&self::bans(&daemon), "198.51.100.77/32")).then_some(())
        })
    });
    bouncer.kill().unwrap();
    bouncer.wait().unwrap();
    let said = fs::read_to_string(at("log")).unwrap_or_default();
    outcome.unwrap_or_else(|error| panic!("{error:#}\n{said}"));
    assert_eq!(bans(&daemon).len(), LISTED as usize + 1, "the others stay");
    daemon.stop().unwrap();
}
