//! The demonstration's page in a real browser: what it says of its visitor is true, live and the same for every kind of
//! client, and it looks well on every screen. Pictures of it go to `target/screenshots/`, for people to look at.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use forwarder_tests::{
    browser::{Browser, Scheme},
    daemon::binary,
    deadline::{patience, wait_at_most},
    document::Row,
    netns::{Netns, has_ipv6},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const URL: &str = "http://127.0.0.1:8080/";

/// A demonstration in a namespace of its own.
struct Demonstration {
    child: Child,
    host: Netns,
    said: Arc<Mutex<String>>,
}

impl Demonstration {
    fn start(arguments: &[&str]) -> Result<Self> {
        let host = Netns::new("host")?;
        host.ip("link set lo up")?;
        let mut child = host
            .command(env!("CARGO_BIN_EXE_forwarder-demo"))
            .args(arguments)
            .env("FORWARDER_BIN", binary())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start the demonstration")?;
        let said = Arc::default();
        collect(child.stdout.take().unwrap(), &said);
        collect(child.stderr.take().unwrap(), &said);
        let mut demonstration = Self { child, host, said };
        let ready = wait_at_most(patience() * 6, "the demonstration's checks", || {
            let ended = demonstration.child.try_wait().unwrap().is_some();
            let text = demonstration.said.lock().unwrap();
            (ended || text.contains("Ctrl-C ends it")).then_some(!ended)
        });
        let ready = ready.with_context(|| demonstration.said())?;
        ensure!(ready, "it ended: {}", demonstration.said());
        Ok(demonstration)
    }

    fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// Ends it as Ctrl-C does. Nothing that it made may be left.
    fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT)?;
        let child = &mut self.child;
        let status = wait_at_most(patience() * 3, "the demonstration's end", || {
            child.try_wait().unwrap()
        })?;
        ensure!(status.success(), "{status}: {}", self.said());
        let links = self.host.run("ip -oneline link")?;
        ensure!(links.lines().count() == 1, "left behind:\n{links}");
        Ok(())
    }

    /// What the daemon itself says of the publish with that frontend.
    fn listed(&self, instance: &str, address: &str) -> Result<Row> {
        let arguments = ["list", "--json", "--instance", instance];
        let mut command: Command = self.host.command(&binary().to_string_lossy());
        let output = command.args(arguments).output()?;
        let list: Vec<Row> = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        let mut list = list.into_iter();
        let address: IpAddr = address.parse()?;
        let found = list.find(|row| row.frontend.address == Some(address));
        found.with_context(|| format!("{address} is not published"))
    }

    /// The namespace of the client with that address.
    fn client(&self, address: &str) -> Netns {
        let held = Netns::held_by(self.child.id()).unwrap();
        let has = |netns: &Netns| {
            let addresses = netns.run("ip -oneline -4 addr").unwrap_or_default();
            addresses.contains(&format!(" {address}/"))
        };
        let found = held.into_iter().find(has);
        found.unwrap_or_else(|| panic!("nobody has {address}"))
    }
}

impl Drop for Demonstration {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("{}", self.said());
        }
    }
}

fn collect(mut from: impl Read + Send + 'static, into: &Arc<Mutex<String>>) {
    let into = Arc::clone(into);
    thread::spawn(move || {
        let mut part = [0; 4096];
        while let Ok(length @ 1..) = from.read(&mut part) {
            let text = String::from_utf8_lossy(&part[..length]).into_owned();
            into.lock().unwrap().push_str(&text);
        }
    });
}

/// What the server answers to one request from `netns`, with its head.
fn get(netns: &Netns, server: &str, path: &str, headers: &str) -> Result<String> {
    netns.enter(|| {
        let mut stream = TcpStream::connect(server.parse::<SocketAddr>()?)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let head = format!("GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n");
        write!(stream, "{head}{headers}\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

/// The page as it is sent, without its script.
fn page(netns: &Netns, server: &str) -> Result<String> {
    get(netns, server, "/", "Accept: text/html\r\n")
}

fn number(text: &str) -> u64 {
    text.replace(',', "")
        .parse()
        .unwrap_or_else(|_| panic!("{text} is no number"))
}

fn packets(browser: &mut Browser) -> Result<u64> {
    Ok(number(&browser.text("[data-live=packets]")?))
}

pub(crate) fn screenshots() -> PathBuf {
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let folder = target.parent().unwrap().join("screenshots");
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Every client of the table was served well and by `path`.
fn all_rows_are_good(browser: &mut Browser, path: &str) -> Result<()> {
    let rows = browser.value(
        "[...document.querySelectorAll('.checks tbody tr')].map(row => [...row.cells].slice(3).map(it => it.textContent))",
    )?;
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), if has_ipv6() { 14 } else { 7 }, "{rows:?}");
    for row in rows {
        assert_eq!(row[0], path, "{rows:?}");
        assert_eq!(row[1], "ok", "{rows:?}");
    }
    Ok(())
}

/// Counters rise while the page is open, and are those that the daemon lists.
fn counters_are_the_daemons(demonstration: &Demonstration, browser: &mut Browser) -> Result<()> {
    let instance = browser.text(".try code")?;
    let instance = instance
        .lines()
        .next()
        .unwrap()
        .rsplit(' ')
        .next()
        .unwrap()
        .to_owned();
    let first = packets(browser)?;
    let raw = "document.querySelector('[data-live=packets]').textContent.replaceAll(',', '')";
    browser.wait_until(&format!("{raw} > {first}"))?;
    browser.wait_until("document.querySelector('#rate').textContent > 0")?;
    browser.wait_until("document.querySelector('#curve').points.length > 1")?;

    // What is shown next was read between these two.
    let before = demonstration.listed(&instance, "127.0.0.1")?.packets;
    browser.wait_until(&format!("{raw} >= {before}"))?;
    let shown = packets(browser)?;
    let after = demonstration.listed(&instance, "127.0.0.1")?.packets;
    assert!(
        (before..=after).contains(&shown),
        "{shown} is not in {before}..={after}"
    );
    Ok(())
}

/// The way that is drawn strongly leads from that client by that path, and no other does.
fn picture_shows(browser: &mut Browser, client: &str, path: &str) -> Result<()> {
    let strong = "[...document.querySelectorAll('.picture .in path')].filter(it => {
        const style = getComputedStyle(it);
        return it.getClientRects().length && style.visibility == 'visible' && parseFloat(style.strokeWidth) > 3;
    }).map(it => it.parentNode.classList[2] + ' ' + it.classList[0])";
    let strong = browser.value(strong)?;
    assert_eq!(strong, serde_json::json!([format!("{path} from-{client}")]));
    Ok(())
}

/// Nothing sticks out, all text is drawn and readable; and takes pictures.
pub(crate) fn looks_well(browser: &mut Browser, name: &str) -> Result<()> {
    for scheme in [Scheme::Light, Scheme::Dark] {
        for width in [390, 1280] {
            browser.look(width, scheme)?;
            let what = format!("{name}-{}-{width}", scheme.name());
            browser.picture(&screenshots().join(format!("{what}.png")))?;
            let wide = browser.value("document.documentElement.scrollWidth")?;
            assert!(wide.as_u64() <= Some(width.into()), "{what}: {wide} wide");
            assert_eq!(
                browser.value(STICKS_OUT)?,
                serde_json::json!([]),
                "{what}: sticks out"
            );
            assert_eq!(
                browser.value(UNREADABLE)?,
                serde_json::json!([]),
                "{what}: contrast"
            );
        }
    }
    Ok(())
}

/// Elements that are wider than the window or than what is around them. What may be scrolled is let off.
const STICKS_OUT: &str = r"[...document.querySelectorAll('body *')].filter(it => {
    if (it.closest('pre, thead, defs') || !it.getClientRects().length) return false;
    const box = it.getBoundingClientRect();
    // In the picture, a label belongs into the box that it is drawn on.
    const around = it.matches('svg g text') && it.parentElement.querySelector('rect')?.getBoundingClientRect();
    if (around && (box.left < around.left || box.right > around.right)) return true;
    const clipped = !it.closest('svg') && it.scrollWidth > it.clientWidth + 1 && it.clientWidth > 0;
    return box.left < -1 || box.right > innerWidth + 1 || clipped;
}).map(it => it.outerHTML.slice(0, 200))";

/// Texts that are not drawn, or with less contrast than WCAG 2.2 asks for (4.5 to 1).
const UNREADABLE: &str = r"(() => {
    const channels = (colour) => colour.match(/[\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(it => it / 255)
        .map(it => it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4)
        .reduce((sum, it, index) => sum + it * [0.2126, 0.7152, 0.0722][index], 0);
    const ground = (element) => {
        for (let it = element; it; it = it.parentElement) {
            const colour = channels(getComputedStyle(it).backgroundColor);
            if (colour.length === 3 || colour[3] > 0) return colour;
        }
        return [255, 255, 255];
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const bad = [];
    while (texts.nextNode()) {
        const [node, element] = [texts.currentNode, texts.currentNode.parentElement];
        if (!node.textContent.trim() || element.closest('thead, title, details:not([open])')) continue;
        if (!element.getClientRects().length) continue;
        const range = document.createRange();
        range.selectNodeContents(node);
        let [text, back] = [getComputedStyle(element).color, ground(element)];
        if (element.closest('svg')) {
            text = getComputedStyle(element).fill;
            back = channels(getComputedStyle(element.parentElement.querySelector('rect') ?? document.querySelector('.host')).fill);
        }
        const [low, high] = [light(channels(text)), light(back)].sort((a, b) => a - b);
        const contrast = (high + 0.05) / (low + 0.05);
        if (contrast < 4.5 || range.getBoundingClientRect().width < 1) bad.push([node.textContent, contrast]);
    }
    return bad;
})()";

/// Nothing was complained of, and no other host was asked for anything.
fn keeps_to_itself(browser: &mut Browser, origin: &str) -> Result<()> {
    assert_eq!(browser.complaints()?, [""; 0]);
    let requests = browser.requests()?;
    assert!(requests.iter().any(|url| url.ends_with("/status.json")));
    for url in requests {
        assert!(url.starts_with(origin), "{url}");
    }
    Ok(())
}

#[test]
fn a_browser_on_the_host_sees_the_fast_path_live() -> Result<()> {
    let demonstration = Demonstration::start(&[])?;
    let mut browser = Browser::start(&demonstration.host)?;
    browser.look(1280, Scheme::Light)?;
    browser.open(URL)?;

    let seen = browser.text(".seen")?;
    assert!(seen.starts_with("198.18.0.1:"), "{seen}");
    assert_eq!(browser.text("[data-live=frontend]")?, "127.0.0.1:8080");
    let client = browser.text("[data-live=client]")?;
    assert!(client.starts_with("127.0.0.1:"), "{client}");
    assert_eq!(browser.text(".who .path")?, "fast path: eBPF");
    picture_shows(&mut browser, "host", "ebpf")?;
    all_rows_are_good(&mut browser, "eBPF")?;
    counters_are_the_daemons(&demonstration, &mut browser)?;
    assert_eq!(browser.text("[data-live=state]")?, "established");
    looks_well(&mut browser, "ebpf")?;

    browser.value("document.querySelector('#download').click()")?;
    browser.wait_until(
        "document.querySelector('#downloaded').textContent.startsWith('32.0 MB in ')",
    )?;
    browser
        .wait_until("parseFloat(document.querySelector('[data-live=bytes]').textContent) >= 32")?;

    // Another client's way is shown when it is asked for, and one's own again after that.
    for client in ["machine", "container", "backend"] {
        let button = format!("document.querySelector('.checks tr[data-client={client}] button')");
        browser.value(&format!("{button}.click()"))?;
        picture_shows(&mut browser, client, "ebpf")?;
        browser.picture(&screenshots().join(format!("ebpf-way-{client}.png")))?;
    }
    browser.value("document.querySelector('#mine').click()")?;
    picture_shows(&mut browser, "host", "ebpf")?;

    keeps_to_itself(&mut browser, URL)?;

    demonstration.stop()?;
    browser.wait_until("document.querySelector('#trouble').textContent.includes('ended')")?;
    assert_eq!(browser.text("#pulse")?, "gone");
    browser.picture(&screenshots().join("ebpf-ended.png"))?;
    browser.close()
}

#[test]
fn without_the_fast_path_the_page_says_userland_and_why() -> Result<()> {
    let demonstration = Demonstration::start(&["--datapath", "userland"])?;
    let mut browser = Browser::start(&demonstration.host)?;
    browser.look(1280, Scheme::Light)?;
    browser.open(URL)?;

    assert!(browser.text(".seen")?.starts_with("198.18.0.1:"));
    assert_eq!(browser.text("[data-live=frontend]")?, "127.0.0.1:8080");
    assert_eq!(browser.text(".who .path")?, "userland proxy");
    let how = browser.text("#how")?;
    assert!(how.contains("Reason: --datapath userland"), "{how}");
    picture_shows(&mut browser, "host", "userland")?;
    all_rows_are_good(&mut browser, "userland")?;
    counters_are_the_daemons(&demonstration, &mut browser)?;
    looks_well(&mut browser, "userland")?;
    keeps_to_itself(&mut browser, URL)?;
    browser.close()?;
    demonstration.stop()
}

#[test]
fn every_kind_of_client_is_told_its_own_way() -> Result<()> {
    let demonstration = Demonstration::start(&[])?;
    // The address by which a client is found, what it connects to, whom the backend sees, and where it is.
    let clients = [
        (
            "198.18.100.9",
            "198.18.100.2:8080",
            "198.18.100.9:",
            "machine",
        ),
        ("198.18.100.2", "198.18.100.2:8080", "198.18.100.2:", "host"),
        ("198.18.0.3", "198.18.0.1:8080", "198.18.0.3:", "container"),
        (
            "198.18.1.2",
            "198.18.100.2:8080",
            "198.18.1.2:",
            "container",
        ),
        (
            "198.18.44.2",
            "198.18.44.1:8080",
            "198.18.44.2:",
            "container",
        ),
        ("198.18.0.2", "198.18.0.1:8080", "198.18.0.1:", "backend"),
    ];
    for (address, frontend, seen, place) in clients {
        let netns = if place == "host" {
            demonstration.host.clone()
        } else {
            demonstration.client(address)
        };
        let page = page(&netns, frontend)?;
        let expected = [
            format!("data-live=\"seen\">{seen}"),
            format!("data-live=\"frontend\">{frontend}<"),
            format!("data-live=\"client\">{address}:"),
            format!("id=\"picture\" data-client=\"{place}\" data-path=\"ebpf\""),
        ];
        for part in expected {
            assert!(page.contains(&part), "{address}: no {part} in {page}");
        }
    }
    let mut browser = Browser::start(&demonstration.client("198.18.100.9"))?;
    browser.look(1280, Scheme::Light)?;
    browser.open("http://198.18.100.2:8080/")?;
    assert!(browser.text(".seen")?.starts_with("198.18.100.9:"));
    picture_shows(&mut browser, "machine", "ebpf")?;
    keeps_to_itself(&mut browser, "http://198.18.100.2:8080/")?;
    browser.close()?;
    demonstration.stop()
}

#[test]
fn the_page_is_whole_without_script_and_repeats_no_request() -> Result<()> {
    let demonstration = Demonstration::start(&[])?;
    let host = &demonstration.host;
    let page = page(host, "127.0.0.1:8080")?;
    assert!(
        page.contains("fast path: eBPF") && !page.contains("{{"),
        "{page}"
    );
    assert_eq!(
        page.matches("verdict good").count(),
        if has_ipv6() { 14 } else { 7 }
    );

    let plain = get(host, "127.0.0.1:8080", "/", "")?;
    let source = plain
        .lines()
        .find_map(|line| line.strip_prefix("X-Source-Seen: "))
        .unwrap();
    assert!(
        plain.ends_with(&format!("\r\n\r\nthe backend saw {source}\n")),
        "{plain}"
    );

    let odd = get(
        host,
        "127.0.0.1:8080",
        "/?<i>",
        "Accept: text/html\r\nHost: <i>x:8080\r\n",
    )?;
    assert!(
        odd.starts_with("HTTP/1.1 200") && !odd.contains("<i>"),
        "{odd}"
    );
    demonstration.stop()
}
