//! The status page in a real browser: it says what the instance says, follows it, and looks well on every screen. Pictures go
//! to `target/screenshots/`.

use std::{
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::Result;
use forwarder_tests::{
    browser::{Browser, Scheme},
    daemon::{Daemon, Datapath},
    deadline::wait_for,
    engine::Engine,
    topology::{Family, Topology},
    traffic::{Backend, Protocol, ask},
};
use serde_json::json;

use crate::page::looks_well;

const URL: &str = "http://127.0.0.1:9100/";

#[test]
fn the_status_page_follows_what_is_published() -> Result<()> {
    let topology = Topology::new()?;
    let _backend = Backend::start(&topology.backend.netns, Protocol::Tcp, 80)?;
    let backend = topology.backend.address(Family::V4);
    let spec = format!("8080:{backend}:80");
    let engine = Engine::start()?;
    let socket = engine.socket().display().to_string();
    let flags = ["--metrics", "127.0.0.1:9100", "--docker", &socket];
    let daemon = Daemon::start_with(&topology.host, &[&spec], Datapath::Auto, &flags)?;
    let closed = format!("8099:{backend}:80");
    daemon.control(&["publish", &closed, "--allow", "203.0.113.0/24"])?;
    let told = format!("9000-9010:{backend}:80");
    let owner = "docker:web-with-a-rather-long-name-as-engines-make-them";
    daemon.control(&["publish", &told, "--proxy-protocol", "--owner", owner])?;

    let mut browser = Browser::start(&topology.host)?;
    browser.look(1280, Scheme::Light)?;
    browser.open(URL)?;
    browser.wait_until("document.querySelectorAll('#publishes tbody tr').length === 3")?;
    assert_eq!(browser.text("#state")?, "live");
    let address = topology.host_address(Family::V4);
    wait_for("rates, a line and a refusal on the page", || {
        let frontend = SocketAddr::new(address, 8080);
        ask(&topology.client, Protocol::Tcp, frontend, "hello").ok()?;
        let refused = SocketAddr::new(address, 8099);
        let patience = Duration::from_millis(100);
        let _ = topology
            .client
            .enter(|| TcpStream::connect_timeout(&refused, patience));
        let shown = browser.value(
            "[document.querySelector('#publishes tr[data-id=\"1\"] [data-label=\"bits/s\"]').textContent !== '0',
              document.querySelector('#publishes tr[data-id=\"1\"] path').getAttribute('d')?.includes('L') ?? false,
              document.querySelector('#refused tr[data-reason=not_allowed]') !== null]",
        );
        (shown.ok()? == json!([true, true, true])).then_some(())
    })?;
    let row = browser.text("#publishes tr[data-id=\"3\"]")?;
    for part in ["*:9000-9010/tcp", owner, "user space", "PROXY protocol"] {
        assert!(row.contains(part), "no {part} in {row}");
    }
    looks_well(&mut browser, "status")?;

    browser.value(
        "(() => { const it = document.querySelector('#filter'); it.value = 'web-'; \
         it.dispatchEvent(new Event('input')); })()",
    )?;
    browser.wait_until("document.querySelectorAll('#publishes tbody tr').length === 1")?;
    daemon.control(&["unpublish", "3", "--owner", owner])?;
    let ports = json!({"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8070"}]});
    engine.run("0f3a", "web-shop", &[backend], &ports, &json!(null));
    browser.wait_until(
        "document.querySelector('#publishes tbody tr')?.textContent.includes('container web-shop')",
    )?;
    assert!(browser.text("#publishes tbody tr")?.contains("docker:0f3a"));
    engine.end("0f3a", "web-shop");
    browser.wait_until("document.querySelector('#none').textContent === 'nothing has that'")?;
    assert_eq!(browser.complaints()?, [""; 0]);
    for url in browser.requests()? {
        assert!(url.starts_with(URL) || url.starts_with("data:"), "{url}");
    }
    daemon.stop()?;
    browser.wait_until("document.querySelector('#state').className === 'bad'")?;
    browser.close()
}
