//! How the page says who a visitor is, how its packets went, and what the daemon counted. Every value is the daemon's,
//! the server's own socket's or the checks'. The page's look is in `page/`.
//!
//! The page is complete as it is sent. Its script asks for the same values as JSON and puts each where the page has it.

use std::net::{IpAddr, SocketAddr};

use forwarder::control::api::{Listed, ListedFlow};
use forwarder_tests::{clients::Place, topology::Family};
use serde_json::json;

use crate::{
    checks::Row,
    http::Request,
    site::Site,
    template::{Value, Values, escaped, fill},
    watch::{Documents, State},
    who,
};

const PAGE: &str = include_str!("page/page.html");
const PICTURE: &str = include_str!("page/picture.svg");
/// What stands where nothing is known.
const NONE: &str = "–";

/// What is known of a visitor's connection.
struct Visit<'a> {
    publish: Option<&'a Listed>,
    /// Its flow, if the eBPF program carries it.
    flow: Option<&'a ListedFlow>,
    place: Option<Place>,
}

impl<'a> Visit<'a> {
    fn of(site: &Site, request: &Request, documents: &'a Documents) -> Self {
        let (peer, local) = (request.peer.to_string(), request.local.to_string());
        let flows = documents.flows.iter();
        let mut flows = flows.filter(|it| it.datapath == "ebpf");
        let flow =
            flows.find(|it| it.protocol == "tcp" && it.source == peer && it.backend == local);
        let publish = match flow {
            Some(flow) => documents.list.iter().find(|it| it.id == flow.publish),
            None => {
                // The proxy's connections are in no list. What the browser asked for tells, if it is published.
                let asked = asked_for(request);
                let is_it = |it: SocketAddr| {
                    // The sandbox's relay comes by loopback, whatever the browser asked for.
                    let relayed = site.sandboxed && it.ip().is_loopback();
                    Some(it) == asked || relayed && it.is_ipv4() == request.local.is_ipv4()
                };
                let mut list = documents.list.iter();
                list.find(|it| frontend(it).is_some_and(is_it))
            }
        };
        let client = flow.and_then(|it| it.client.parse::<SocketAddr>().ok());
        let place = match (client, publish.and_then(frontend)) {
            (Some(client), _) => site.addresses.place(client.ip()),
            // Nobody else can connect to it.
            (None, Some(frontend)) if frontend.ip().is_loopback() => Some(Place::Host),
            _ => None,
        };
        Self {
            publish,
            flow,
            place,
        }
    }

    /// `ebpf`, `userland`, or `unknown` while the daemon says nothing.
    fn path(&self) -> &'static str {
        match (self.flow, self.publish) {
            (Some(_), _) => "ebpf",
            (None, Some(_)) => "userland",
            (None, None) => "unknown",
        }
    }
}

/// The frontend that the browser asked for.
fn asked_for(request: &Request) -> Option<SocketAddr> {
    let host = request.host.as_deref()?;
    if let Ok(address) = host.parse() {
        return Some(address);
    }
    let (name, port) = host.rsplit_once(':')?;
    // Each family's publishes lead to the backend's address of that family.
    let family = if request.local.is_ipv4() {
        Family::V4
    } else {
        Family::V6
    };
    let address = family.localhost();
    (name == "localhost").then_some(SocketAddr::new(address, port.parse().ok()?))
}

fn frontend(publish: &Listed) -> Option<SocketAddr> {
    let address: Option<IpAddr> = publish.frontend.address;
    Some(SocketAddr::new(address?, publish.frontend.port))
}

/// The whole page.
pub(crate) fn html(site: &Site, request: &Request, state: Option<&State>) -> String {
    let (mut values, _) = values(site, request, state);
    let checks = site.checks();
    let (command, instance) = site.daemon.get().cloned().unwrap_or_default();
    let asking = match values.get("frontend") {
        Some(Value::Text(frontend)) => format!("curl http://{frontend}/"),
        _ => String::new(),
    };
    let (beside, commands) = if site.sandboxed {
        ("Beside the demonstration:", asking)
    } else {
        let commands = ["list ", "flows", "trace"];
        let commands = commands.map(|it| format!("forwarder {it} --instance {instance}\n"));
        (
            "As root, beside the demonstration:",
            commands.concat() + &asking,
        )
    };
    let mut reasons: Vec<_> = checks
        .rows
        .iter()
        .filter_map(|it| it.reason.clone())
        .collect();
    reasons.sort();
    reasons.dedup();
    let good = checks.rows.iter().filter(|row| row.good).count();
    let summary = match (checks.done, checks.rows.len()) {
        (false, _) => "They are being asked just now.".to_owned(),
        (true, all) if all == good => {
            format!("All {all} were served, and the backend saw each as it should.")
        }
        (true, all) => format!("{} of {all} were not served as they should be.", all - good),
    };
    let reasons: Vec<_> = reasons.iter().map(|it| format!("userland: {it}")).collect();
    let texts = [
        ("command", command),
        ("beside", beside.to_owned()),
        ("commands", commands),
        ("summary", summary),
        ("reasons", reasons.join("; ")),
        ("checked", checks.done.to_string()),
    ];
    values.extend(texts.map(|(name, text)| (name, Value::Text(text))));
    values.insert("rows", Value::Html(checks.rows.iter().map(row).collect()));
    values.insert("picture", Value::Html(fill(PICTURE, &values)));
    fill(PAGE, &values)
}

/// A row of the table of checks.
fn row(row: &Row) -> String {
    let kind = if row.fast { "ebpf" } else { "userland" };
    let good = if row.good { "good" } else { "bad" };
    format!(
        "<tr role=\"row\" data-client=\"{}\" data-path=\"{kind}\">\
         <th role=\"rowheader\" scope=\"row\">{}</th>\
         <td role=\"cell\" class=\"address\">{}</td><td role=\"cell\" class=\"address\">{}</td>\
         <td role=\"cell\"><span class=\"path {kind}\">{}</span></td>\
         <td role=\"cell\" class=\"verdict {good}\">{}</td></tr>\n",
        who::name(row.place),
        escaped(row.client),
        row.connects_to,
        escaped(&row.seen),
        escaped(row.path),
        escaped(&row.verdict),
    )
}

/// What the script asks for: all texts of the page that change, and the numbers behind its curve.
pub(crate) fn json(site: &Site, request: &Request, state: Option<&State>) -> String {
    let (values, numbers) = values(site, request, state);
    let texts = values.iter().filter_map(|(name, value)| match value {
        Value::Text(text) => Some(((*name).to_owned(), json!(text))),
        Value::Html(_) => None,
    });
    let at = state.map(|it| it.asked.saturating_duration_since(site.began).as_millis());
    json!({
        "texts": texts.collect::<serde_json::Map<_, _>>(),
        "milliseconds": at.and_then(|it| u64::try_from(it).ok()),
        "publish": numbers.map(|it| it.id),
        "packets": numbers.map(|it| it.packets),
        "bytes": numbers.map(|it| it.bytes),
        "checked": site.checks().done,
    })
    .to_string()
}

/// All that changes, and the publish that the visitor came by.
fn values<'a>(
    site: &Site,
    request: &Request,
    state: Option<&'a State>,
) -> (Values, Option<&'a Listed>) {
    const NOTHING: &Documents = &Documents {
        list: Vec::new(),
        flows: Vec::new(),
        stats: Vec::new(),
    };
    let (documents, trouble) = match state.map(|state| &state.found) {
        Some(Ok(documents)) => (Some(documents), String::new()),
        Some(Err(error)) => (None, format!("The daemon does not answer: {error:#}")),
        None => (None, "The daemon is not asked yet, or no more.".to_owned()),
    };
    let visit = Visit::of(site, request, documents.unwrap_or(NOTHING));
    let (publish, flow) = (visit.publish, visit.flow);
    let or_none = |text: Option<String>| text.unwrap_or_else(|| NONE.to_owned());
    let frontend_seen = flow
        .map(|flow| flow.frontend.clone())
        .or_else(|| publish.and_then(frontend).map(|it| it.to_string()));
    let client = match (flow, publish) {
        (Some(flow), _) => flow.client.clone(),
        (None, Some(_)) => "known to the proxy alone".to_owned(),
        (None, None) => NONE.to_owned(),
    };
    let pair = |of: fn(&ListedFlow) -> [u64; 2], show: fn(u64) -> String| {
        let [there, back] = flow.map(|flow| of(flow).map(show)).unwrap_or_default();
        if there.is_empty() {
            [NONE.to_owned(), NONE.to_owned()]
        } else {
            [there, back]
        }
    };
    let [packets_there, packets_back] = pair(|flow| flow.packets, grouped);
    let [bytes_there, bytes_back] = pair(|flow| flow.bytes, size);
    let dropped = documents.map(dropped);

    let texts = [
        ("seen", request.peer.to_string()),
        ("frontend", or_none(frontend_seen)),
        ("client", client),
        ("backend", request.local.to_string()),
        ("why", why(site, &visit)),
        (
            "client-kind",
            visit.place.map_or("unknown", who::name).to_owned(),
        ),
        ("path-kind", visit.path().to_owned()),
        ("path", path(&visit).to_owned()),
        ("how", how(&visit)),
        ("packets", or_none(publish.map(|it| grouped(it.packets)))),
        ("bytes", or_none(publish.map(|it| size(it.bytes)))),
        ("flows", or_none(publish.map(|it| grouped(it.flows)))),
        ("state", state_of(&visit)),
        ("packets-there", packets_there),
        ("packets-back", packets_back),
        ("bytes-there", bytes_there),
        ("bytes-back", bytes_back),
        ("dropped", or_none(dropped.map(grouped))),
        ("trouble", trouble),
    ];
    let texts = texts.map(|(name, text)| (name, Value::Text(text)));
    (texts.into(), publish)
}

fn why(site: &Site, visit: &Visit<'_>) -> String {
    let mut why = match (visit.flow, visit.publish) {
        (Some(flow), _) => {
            let frontend = flow.frontend.parse::<SocketAddr>();
            frontend.map_or("", |it| who::why(visit.place, it.ip()))
        }
        (None, Some(_)) => who::WHY_PROXY,
        (None, None) => "",
    }
    .to_owned();
    if site.sandboxed {
        why += " Your browser is outside the sandbox: a relay carries its connections in, and is the client there.";
    }
    why
}

fn path(visit: &Visit<'_>) -> &'static str {
    match visit.path() {
        "ebpf" => "fast path: eBPF",
        "userland" => "userland proxy",
        _ => "not known",
    }
}

/// How the packets went, in sentences.
fn how(visit: &Visit<'_>) -> String {
    let Some(publish) = visit.publish else {
        return "The daemon lists no publish for this connection.".to_owned();
    };
    if visit.flow.is_none() {
        let reason = match (&publish.reason, publish.datapath.as_str()) {
            (Some(reason), _) => reason,
            (None, "ebpf") => "the program passed these packets on",
            (None, _) => "the daemon names none",
        };
        return format!(
            "Your packets go through the kernel’s stack to the userland proxy, which copies between two connections. \
             Reason: {reason}."
        );
    }
    let device = visit.place.map_or("the device", who::device);
    // `bpf_redirect_peer` carries nothing from `lo`.
    let delivery = match (visit.place, publish.delivery.as_deref()) {
        (Some(Place::Host), Some("peer")) => {
            "and put into the queue of the container’s veth (delivery “device”, since “peer” carries nothing from lo)"
        }
        (_, Some("peer")) => {
            "and put straight into the container’s end of its veth, with no queue between (delivery “peer”)"
        }
        (_, Some("device")) => "and sent out by the container’s device (delivery “device”)",
        (_, Some("neighbour")) => {
            "and sent by way of the kernel’s neighbour table (delivery “neighbour”)"
        }
        (_, Some("stack")) => "and left to the host’s stack to deliver (delivery “stack”)",
        _ => "and delivered",
    };
    format!(
        "Your packets are looked up and rewritten by the program at the ingress of {device}, {delivery}. Replies meet \
         the same program at the backend’s veth."
    )
}

fn state_of(visit: &Visit<'_>) -> String {
    match (visit.flow, visit.publish) {
        (Some(flow), _) => flow.state.replace('_', " "),
        (None, Some(_)) => "not listed, the proxy carries it".to_owned(),
        (None, None) => NONE.to_owned(),
    }
}

/// Packets that the program dropped.
fn dropped(documents: &Documents) -> u64 {
    let drops = |name: &str| {
        use forwarder_common::reason::Reason;
        let mut all = Reason::ALL.iter();
        all.any(|reason| reason.drops() && reason.name() == name)
    };
    let counters = documents.stats.iter();
    counters
        .filter(|counter| drops(&counter.reason))
        .map(|counter| counter.packets)
        .sum()
}

/// With a comma between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Bytes, in the unit in which they are easily read.
fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KB", "MB", "GB"] {
        if value < 1000.0 {
            let decimals = usize::from(unit != "B" && value < 100.0);
            return format!("{value:.decimals$} {unit}");
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Instant};

    use super::*;
    use crate::who::Addresses;

    fn request(host: &str) -> Request {
        let mut request = Request::example();
        request.host = Some(host.to_owned());
        request
    }

    fn publish(address: Ipv4Addr) -> Listed {
        let endpoint = json!({"address": address, "port": 8080, "end_port": 8080});
        serde_json::from_value(json!({
            "id": 7, "owner": "cli", "protocol": "tcp", "frontend": endpoint, "backend": endpoint, "datapath": "userland",
            "delivery": null, "reason": "<because>", "allow": [], "flows": 2, "packets": 1234567, "bytes": 1500,
        }))
        .unwrap()
    }

    fn state(list: Vec<Listed>, flows: Vec<ListedFlow>) -> State {
        State {
            asked: Instant::now(),
            found: Ok(Documents {
                list,
                flows,
                stats: Vec::new(),
            }),
        }
    }

    fn text(values: &Values, name: &str) -> String {
        match &values[name] {
            Value::Text(text) | Value::Html(text) => text.clone(),
        }
    }

    #[test]
    fn every_name_of_the_page_has_a_value() {
        let site = Site::new(Addresses::default(), false);
        let state = state(vec![publish(Ipv4Addr::LOCALHOST)], Vec::new());
        let html = html(&site, &request("localhost:8080"), Some(&state));
        assert!(!html.contains("{{"), "{html}");
        assert!(html.contains("&lt;because&gt;") && !html.contains("<because>"));
    }

    #[test]
    fn what_is_live_is_also_in_the_page_as_sent() {
        for part in PAGE.split("data-live=\"").skip(1) {
            let (name, rest) = part.split_once('"').unwrap();
            assert!(
                rest.starts_with(&format!(">{{{{{name}}}}}<")) || name == "how",
                "{name}"
            );
        }
    }

    #[test]
    fn without_a_flow_the_frontend_is_what_was_asked_for_and_published() {
        let state = state(vec![publish(Ipv4Addr::LOCALHOST)], Vec::new());
        let site = Site::new(Addresses::default(), false);
        for host in ["localhost:8080", "127.0.0.1:8080"] {
            let (values, _) = values(&site, &request(host), Some(&state));
            assert_eq!(text(&values, "frontend"), "127.0.0.1:8080", "{host}");
            assert_eq!(text(&values, "path-kind"), "userland");
            assert_eq!(text(&values, "client-kind"), "host");
            assert_eq!(text(&values, "packets"), "1,234,567");
        }
        for host in ["<b>:8080", "127.0.0.1:8081", "198.18.0.9:8080", ""] {
            let (values, _) = values(&site, &request(host), Some(&state));
            assert_eq!(text(&values, "path-kind"), "unknown", "{host}");
            assert_eq!(text(&values, "frontend"), NONE, "{host}");
        }
    }

    #[test]
    fn in_the_sandbox_everybody_comes_by_loopback() {
        let other = publish(Ipv4Addr::new(198, 18, 0, 1));
        let state = state(vec![other, publish(Ipv4Addr::LOCALHOST)], Vec::new());
        let site = Site::new(Addresses::default(), true);
        let (values, _) = values(&site, &request("tunnel.example:1"), Some(&state));
        assert_eq!(text(&values, "frontend"), "127.0.0.1:8080");
    }

    #[test]
    fn a_flow_says_more_than_the_browser() {
        let mut fast = publish(Ipv4Addr::new(198, 18, 100, 2));
        fast.datapath = "ebpf".into();
        let request = request("localhost:8080");
        let flow = serde_json::from_value(json!({
            "publish": 7, "protocol": "tcp", "client": "192.0.2.9:5", "frontend": "198.18.100.2:8080",
            "source": request.peer, "backend": request.local, "state": "time_wait", "idle_seconds": 0,
            "packets": [1, 2], "bytes": [3, 4000], "datapath": "ebpf",
        }));
        let state = state(vec![fast], vec![flow.unwrap()]);
        let site = Site::new(Addresses::default(), false);
        let (values, _) = values(&site, &request, Some(&state));
        assert_eq!(text(&values, "frontend"), "198.18.100.2:8080");
        assert_eq!(text(&values, "path-kind"), "ebpf");
        assert_eq!(text(&values, "state"), "time wait");
        assert_eq!(text(&values, "bytes-back"), "4.0 KB");
    }

    #[test]
    fn numbers_are_easily_read() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(grouped),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(
            [999, 1000, 123_456, 32_000_000].map(size),
            ["999 B", "1.0 KB", "123 KB", "32.0 MB"]
        );
    }
}
