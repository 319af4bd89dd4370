//! A kernel that lacks something, as `cargo xtask vm` boots it (`vm.rs`, RESTRICTED): under lockdown, and without
//! the qdisc that clsact filters are attached to. The same test passes where nothing is missing.

use forwarder::datapath::kernel::{Attach, kernel};
use forwarder_tests::{daemon::doctor, netns::Netns, topology::Family};

use crate::scene::Scene;

/// A TCX link takes nothing but the kernel itself.
fn can_attach() -> bool {
    let elsewhere = Netns::new("elsewhere").unwrap();
    kernel().attach == Attach::Tcx || elsewhere.run("tc qdisc add dev lo clsact").is_ok()
}

#[test]
fn auto_serves_by_what_the_kernel_has_and_says_why() {
    let scene = Scene::tcp().auto().start();
    if can_attach() {
        scene.served_on_the_fast_path();
    } else {
        let entry = scene.daemon.entry().unwrap();
        assert_eq!(entry.datapath, "userland", "{entry:?}");
        let reason = entry.reason();
        assert!(
            reason.contains("from 6.6 on, or the modules sch_ingress"),
            "{reason}"
        );
        let answer = scene.ask("hello").unwrap();
        assert_eq!(answer.seen.ip(), scene.topology.backend.gateway(Family::V4));
    }
    scene.stop();
}

#[test]
fn doctor_shows_what_is_missing_and_the_lockdown() {
    let netns = Netns::new("host").unwrap();
    netns.ip("link set lo up").unwrap();
    let findings = doctor(&netns, &[]).unwrap();
    assert_eq!(findings["load"].ok, can_attach());
    if !can_attach() {
        let found = &findings["load"].found;
        assert!(found.contains("the modules sch_ingress"), "{found}");
    }
    let asked = std::fs::read_to_string("/proc/cmdline").unwrap();
    if asked.contains("lockdown=confidentiality") {
        assert_eq!(findings["lockdown"].found, "confidentiality");
    }
}
