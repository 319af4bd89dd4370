//! `docker run -p PORT:PORT/sctp`, by the process that dockerd starts for the port.

use std::net::SocketAddr;

use forwarder_tests::sctp::{Association, Listener, Message, exists};

use super::{BACKEND_PORT, PORT, Scene};

#[test]
fn an_sctp_port_of_a_container_is_served_where_the_kernel_has_sctp() {
    let scene = Scene::new(false);
    let flags = ["-p", &format!("{PORT}:{BACKEND_PORT}/sctp")];
    let run = scene.engine.run("web", &flags);
    if !exists() {
        let error = run.unwrap_err().to_string();
        assert!(error.contains("this kernel has no SCTP"), "{error}");
        return;
    }
    run.unwrap();
    let container = scene.engine.netns("web").unwrap();
    let address = scene.engine.address("web").unwrap().parse().unwrap();
    let backend = SocketAddr::new(address, BACKEND_PORT);
    let listener = container.enter(|| Listener::bind(backend)).unwrap();
    let list = scene.daemon.list().unwrap();
    assert_eq!(list[0].protocol, "sctp", "{list:?}");
    for (netns, frontend) in [
        (&scene.topology.client, scene.lan()),
        (scene.host(), SocketAddr::from(([127, 0, 0, 1], PORT))),
    ] {
        let client = netns.enter(|| Association::connect(frontend)).unwrap();
        let server = listener.accept().unwrap();
        for stream in [0, 3] {
            let message = Message::new(stream, b"to the container");
            client.send(&message).unwrap();
            assert_eq!(server.receive().unwrap(), Some(message));
            let answer = Message::new(stream, b"and back");
            server.send(&answer).unwrap();
            assert_eq!(client.receive().unwrap(), Some(answer));
        }
    }
    scene.engine.docker(&["rm", "-f", "web"]).unwrap();
    assert!(scene.daemon.list().unwrap().is_empty());
    scene.stop();
}
