//! `forwarder trace`: what happened to each packet, while somebody looks.

use forwarder::control::api::Traced;

use crate::scene::{Scene, on_the_fast_path};

#[test]
fn a_trace_names_publish_rewrite_and_delivery_again_and_again() {
    let scene = Scene::tcp().start();
    let daemon = &scene.daemon;
    let traffic = || scene.served("hello");
    // The second one finds the traced program loaded, and its buffer being read.
    for _ in 0..2 {
        let to = |line: &str| line.contains("-> 172.31.0.2:9000 by ");
        let line = daemon.trace(&["1"], to, traffic).unwrap();
        assert!(
            line.starts_with("eth0     publish 1    tcp 198.51.100.9:"),
            "{line}"
        );
        assert!(line.contains("forwarded_original"), "{line}");
        let back = |line: &str| line.contains("forwarded_reply");
        let line = daemon
            .trace(&["--client", "198.51.100.9/32"], back, traffic)
            .unwrap();
        assert!(line.contains(" by neighbour eth0"), "{line}");
    }
    let line = daemon.trace(&["1", "--json"], |_| true, traffic).unwrap();
    let traced: Traced = serde_json::from_str(&line).unwrap();
    assert!(
        matches!(&traced, Traced::Packet(packet) if packet.publish == Some(1)),
        "{line}"
    );
    on_the_fast_path(daemon, traffic);
    scene.stop();
}
