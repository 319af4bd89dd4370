//! What an instance measures of itself, and its text for Prometheus. [`METRICS`] has every metric once: its name, what it
//! means and where its values are. Labels name publishes and their owners, never clients.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

use forwarder_common::reason::Reason;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder, text},
    metrics::{
        MetricType,
        counter::ConstCounter,
        gauge::ConstGauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::{proxy::Refusal, publish::Id};

/// What the text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// OpenMetrics 1.0, which Prometheus asks for.
    OpenMetrics,
    /// Prometheus's own before that, version 0.0.4.
    Plain,
}

impl Form {
    /// The one for a client with this `Accept`: some know the older one alone, and say so.
    pub fn accepted(accept: &str) -> Self {
        if accept.contains("text/plain") && !accept.contains("application/openmetrics-text") {
            Self::Plain
        } else {
            Self::OpenMetrics
        }
    }

    /// Its content type.
    pub const fn kind(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Plain => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// The page for people; everything that it needs is in it.
pub fn page() -> String {
    let kernel = Reason::ALL.iter().filter(|reason| reason.drops());
    let kernel = kernel.map(|reason| reason.name());
    let names = kernel.chain(Refusal::ALL.iter().map(|why| why.name()));
    let names: Vec<&str> = names.collect();
    include_str!("metrics/page.html").replace("{refusals}", &names.join(" "))
}

/// All that was measured at one moment.
#[derive(Debug, Default)]
pub struct Measured {
    /// `ebpf` or `userland`.
    pub datapath: &'static str,
    pub publishes: Vec<OfPublish>,
    /// Packets of the eBPF program, by reason.
    pub packets: Counts,
    /// Packets and connections that were refused on purpose, by reason.
    pub refused: Counts,
    /// Of the proxy.
    pub proxy: Proxied,
    pub maps: Vec<Fill>,
    pub durations: Durations,
}

/// Counters by reason.
pub type Counts = BTreeMap<&'static str, u64>;

/// What one publish has carried, since it is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OfPublish {
    pub id: Id,
    pub frontend: String,
    pub owner: String,
    /// The name of the container that it leads to; empty if none is known.
    pub container: String,
    pub protocol: String,
    /// Live ones.
    pub flows: u64,
    pub carried: Carried,
    pub refused: Counts,
}

/// Counters that never fall.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    pub begun: u64,
    pub packets: u64,
    pub bytes: u64,
}

impl std::ops::AddAssign for Carried {
    fn add_assign(&mut self, other: Self) {
        self.begun += other.begun;
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

impl Carried {
    /// The greater one of each.
    pub fn max(self, other: Self) -> Self {
        Self {
            begun: self.begun.max(other.begun),
            packets: self.packets.max(other.packets),
            bytes: self.bytes.max(other.bytes),
        }
    }
}

/// What the proxy has carried for all publishes, also those that are gone.
#[derive(Clone, Debug, Default)]
pub struct Proxied {
    pub flows: u64,
    pub carried: Carried,
    pub refused: Counts,
}

/// How full a map of the kernel is.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    pub map: &'static str,
    pub entries: u64,
    pub most: u64,
}

/// How long the daemon's work takes. Clones are of the same histograms.
#[derive(Clone, Debug)]
pub struct Durations {
    pub sweep: Histogram,
    pub reconcile: Histogram,
}

impl Default for Durations {
    fn default() -> Self {
        // 100 microseconds to 26 seconds.
        let histogram = || Histogram::new(exponential_buckets(0.0001, 4.0, 10));
        Self {
            sweep: histogram(),
            reconcile: histogram(),
        }
    }
}

/// Measures until it is dropped.
#[derive(Debug)]
pub struct Timed(Histogram, Instant);

impl Timed {
    pub fn new(histogram: &Histogram) -> Self {
        Self(histogram.clone(), Instant::now())
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        self.0.observe(self.1.elapsed().as_secs_f64());
    }
}

/// Work that is done in slices, between which other work is done.
#[derive(Debug, Default)]
pub struct Slices(Duration);

impl Slices {
    /// Does a slice, which returns whether there is more to do. After the last one, the sum is observed.
    pub fn of(&mut self, histogram: &Histogram, slice: impl FnOnce() -> bool) -> bool {
        let begun = Instant::now();
        let more = slice();
        self.0 += begun.elapsed();
        if !more {
            histogram.observe(std::mem::take(&mut self.0).as_secs_f64());
        }
        more
    }
}

/// A metric: its name is without what its type appends.
pub struct Metric {
    name: &'static str,
    kind: MetricType,
    help: &'static str,
    of: Of,
}

/// Where the values of a metric are, which also says what labels they have.
enum Of {
    Publish(fn(&OfPublish) -> u64),
    PublishReason(fn(&OfPublish) -> &Counts),
    Reason(fn(&Measured) -> &Counts),
    Map(fn(&Fill) -> u64),
    Whole(fn(&Measured) -> u64),
    Duration(fn(&Durations) -> &Histogram),
    Info(&'static str, fn(&Measured) -> &'static str),
}

/// Every metric.
pub const METRICS: &[Metric] = &[
    Metric::counter(
        "forwarder_publish_packets",
        "Packets of a publish, both directions; reads for TCP in user space",
        Of::Publish(|publish| publish.carried.packets),
    ),
    Metric::counter(
        "forwarder_publish_bytes",
        "Bytes of a publish, both directions",
        Of::Publish(|publish| publish.carried.bytes),
    ),
    Metric::gauge(
        "forwarder_publish_flows",
        "Live flows of a publish",
        Of::Publish(|publish| publish.flows),
    ),
    Metric::counter(
        "forwarder_publish_flows_begun",
        "Flows of a publish that have begun",
        Of::Publish(|publish| publish.carried.begun),
    ),
    Metric::counter(
        "forwarder_publish_refused",
        "Packets and connections to a publish that were refused, by reason",
        Of::PublishReason(|publish| &publish.refused),
    ),
    Metric::counter(
        "forwarder_refused",
        "Packets and connections that were refused, by reason, both paths",
        Of::Reason(|measured| &measured.refused),
    ),
    Metric::counter(
        "forwarder_packets",
        "Packets that the eBPF program has seen, by reason",
        Of::Reason(|measured| &measured.packets),
    ),
    Metric::gauge(
        "forwarder_proxy_flows",
        "Live connections and UDP flows of the proxy",
        Of::Whole(|measured| measured.proxy.flows),
    ),
    Metric::counter(
        "forwarder_proxy_flows_begun",
        "Connections and UDP flows of the proxy that have begun",
        Of::Whole(|measured| measured.proxy.carried.begun),
    ),
    Metric::counter(
        "forwarder_proxy_packets",
        "Datagrams that the proxy has carried, and reads of TCP",
        Of::Whole(|measured| measured.proxy.carried.packets),
    ),
    Metric::counter(
        "forwarder_proxy_bytes",
        "Bytes that the proxy has carried",
        Of::Whole(|measured| measured.proxy.carried.bytes),
    ),
    Metric::counter(
        "forwarder_proxy_refused",
        "Connections and datagrams that the proxy has refused, by reason",
        Of::Reason(|measured| &measured.proxy.refused),
    ),
    Metric::gauge(
        "forwarder_publishes",
        "Publishes, also those that drain",
        Of::Whole(|measured| measured.publishes.len() as u64),
    ),
    Metric::gauge(
        "forwarder_map_entries",
        "Entries of a map of the kernel",
        Of::Map(|fill| fill.entries),
    ),
    Metric::gauge(
        "forwarder_map_max_entries",
        "Entries that a map of the kernel has room for",
        Of::Map(|fill| fill.most),
    ),
    Metric::histogram(
        "forwarder_sweep_duration_seconds",
        "Time spent on one search for flows that have expired",
        Of::Duration(|durations| &durations.sweep),
    ),
    Metric::histogram(
        "forwarder_reconcile_duration_seconds",
        "Time to put one change of what is published in force",
        Of::Duration(|durations| &durations.reconcile),
    ),
    Metric::info(
        "forwarder_datapath",
        "The datapath in use, ebpf or userland; a publish may be served in user space beside eBPF",
        Of::Info("datapath", |measured| measured.datapath),
    ),
    Metric::info(
        "forwarder_build",
        "The version that runs",
        Of::Info("version", |_| env!("CARGO_PKG_VERSION")),
    ),
];

impl Metric {
    const fn new(name: &'static str, kind: MetricType, help: &'static str, of: Of) -> Self {
        Self {
            name,
            kind,
            help,
            of,
        }
    }

    const fn counter(name: &'static str, help: &'static str, of: Of) -> Self {
        Self::new(name, MetricType::Counter, help, of)
    }

    const fn gauge(name: &'static str, help: &'static str, of: Of) -> Self {
        Self::new(name, MetricType::Gauge, help, of)
    }

    const fn histogram(name: &'static str, help: &'static str, of: Of) -> Self {
        Self::new(name, MetricType::Histogram, help, of)
    }

    const fn info(name: &'static str, help: &'static str, of: Of) -> Self {
        Self::new(name, MetricType::Info, help, of)
    }

    /// As a query has it.
    pub fn name(&self) -> String {
        let suffix = match self.kind {
            MetricType::Counter => "_total",
            MetricType::Info => "_info",
            _ => "",
        };
        format!("{}{suffix}", self.name)
    }

    pub fn kind(&self) -> &str {
        self.kind.as_str()
    }

    pub fn labels(&self) -> &'static [&'static str] {
        match &self.of {
            Of::Publish(_) => &["publish", "id", "owner", "container", "protocol"],
            Of::PublishReason(_) => &["publish", "id", "owner", "container", "protocol", "reason"],
            Of::Reason(_) => &["reason"],
            Of::Map(_) => &["map"],
            Of::Whole(_) | Of::Duration(_) => &[],
            Of::Info("datapath", _) => &["datapath"],
            Of::Info(..) => &["version"],
        }
    }

    /// A number, of this type.
    fn number(&self, to: MetricEncoder<'_>, value: u64) -> fmt::Result {
        match self.kind {
            MetricType::Counter => ConstCounter::new(value).encode(to),
            _ => ConstGauge::new(value).encode(to),
        }
    }

    fn encode(&self, measured: &Measured, mut to: MetricEncoder<'_>) -> fmt::Result {
        match &self.of {
            Of::Publish(value) => {
                for publish in &measured.publishes {
                    let labels = labels(publish);
                    self.number(to.encode_family(&labels)?, value(publish))?;
                }
            }
            Of::PublishReason(counts) => {
                for publish in &measured.publishes {
                    for (reason, count) in counts(publish) {
                        let [a, b, c, d, e] = labels(publish);
                        let labels = [a, b, c, d, e, ("reason", (*reason).into())];
                        self.number(to.encode_family(&labels)?, *count)?;
                    }
                }
            }
            Of::Reason(counts) => {
                for (reason, count) in counts(measured) {
                    self.number(to.encode_family(&[("reason", *reason)])?, *count)?;
                }
            }
            Of::Map(value) => {
                for fill in &measured.maps {
                    self.number(to.encode_family(&[("map", fill.map)])?, value(fill))?;
                }
            }
            Of::Whole(value) => self.number(to, value(measured))?,
            Of::Duration(histogram) => histogram(&measured.durations).encode(to)?,
            Of::Info(label, value) => to.encode_info(&[(*label, value(measured))])?,
        }
        Ok(())
    }
}

fn labels(publish: &OfPublish) -> [(&'static str, String); 5] {
    [
        ("publish", publish.frontend.clone()),
        ("id", publish.id.to_string()),
        ("owner", publish.owner.clone()),
        ("container", publish.container.clone()),
        ("protocol", publish.protocol.clone()),
    ]
}

impl Collector for Measured {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        METRICS.iter().try_for_each(|metric| {
            let to = to.encode_descriptor(metric.name, metric.help, None, metric.kind)?;
            metric.encode(self, to)
        })
    }
}

/// The text that Prometheus reads.
pub fn text(measured: Measured, form: Form) -> String {
    let text = open_metrics(measured);
    match form {
        Form::OpenMetrics => text,
        Form::Plain => plain(&text),
    }
}

/// The same in the older form: what is said of a metric is said of the name that its lines have, and there is no `info`.
fn plain(text: &str) -> String {
    let (mut plain, mut help) = (String::with_capacity(text.len()), "");
    for line in text.lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        match words[..] {
            ["#", "HELP", _, words] => help = words,
            ["#", "TYPE", name, kind] => {
                let (name, kind) = match kind {
                    "counter" => (format!("{name}_total"), kind),
                    "info" => (format!("{name}_info"), "gauge"),
                    _ => (name.to_owned(), kind),
                };
                plain += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
            }
            ["#", ..] => {}
            _ => {
                plain += line;
                plain.push('\n');
            }
        }
    }
    plain
}

fn open_metrics(measured: Measured) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(measured));
    let mut text = String::new();
    // It is written to memory, which does not fail.
    let _ = text::encode(&mut text, &registry);
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn document(name: &str) -> String {
        let path = format!("{}/../docs/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(&path).expect(&path)
    }

    /// Something of everything.
    fn measured() -> Measured {
        let refused = Counts::from([("not_allowed", 3)]);
        Measured {
            datapath: "ebpf",
            publishes: vec![OfPublish {
                id: 7,
                frontend: "[fe80::1]:80".into(),
                owner: "docker:a1".into(),
                container: "web".into(),
                protocol: "tcp".into(),
                flows: 2,
                carried: Carried {
                    begun: 5,
                    packets: 11,
                    bytes: 1300,
                },
                refused: refused.clone(),
            }],
            packets: Counts::from([("forwarded_original", 9)]),
            refused,
            maps: vec![Fill {
                map: "FLOWS",
                entries: 4,
                most: 100,
            }],
            ..Measured::default()
        }
    }

    #[test]
    fn a_publish_has_its_name_and_its_owner() {
        let text = text(measured(), Form::OpenMetrics);
        let labels =
            r#"publish="[fe80::1]:80",id="7",owner="docker:a1",container="web",protocol="tcp""#;
        for line in [
            "# TYPE forwarder_publish_packets counter\n",
            &format!("forwarder_publish_packets_total{{{labels}}} 11\n"),
            &format!("forwarder_publish_flows{{{labels}}} 2\n"),
            &format!("forwarder_publish_refused_total{{{labels},reason=\"not_allowed\"}} 3\n"),
            "forwarder_packets_total{reason=\"forwarded_original\"} 9\n",
            "forwarder_map_max_entries{map=\"FLOWS\"} 100\n",
            "forwarder_datapath_info{datapath=\"ebpf\"} 1\n",
            "forwarder_reconcile_duration_seconds_count 0\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    fn who_knows_no_openmetrics_gets_the_older_form() {
        for (accept, form) in [
            ("text/plain;version=0.0.4;q=1,*/*;q=0.1", Form::Plain),
            ("text/plain", Form::Plain),
            ("", Form::OpenMetrics),
            ("*/*", Form::OpenMetrics),
            (
                "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
                Form::OpenMetrics,
            ),
        ] {
            assert_eq!(Form::accepted(accept), form, "{accept}");
        }
        let whole = text(measured(), Form::OpenMetrics);
        let plain = text(measured(), Form::Plain);
        for line in [
            "# TYPE forwarder_publish_packets_total counter\n",
            "# TYPE forwarder_publish_flows gauge\n",
            "# TYPE forwarder_datapath_info gauge\n",
            "# TYPE forwarder_sweep_duration_seconds histogram\n",
            "# HELP forwarder_publishes Publishes, also those that drain\n",
        ] {
            assert!(plain.contains(line), "{line}\n{plain}");
        }
        let series = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            lines.map(ToOwned::to_owned).collect()
        };
        assert_eq!(series(&plain), series(&whole));
        assert!(!plain.contains("# EOF"), "{plain}");
    }

    #[test]
    fn the_page_knows_what_is_refused() {
        let page = page();
        assert!(page.contains(" not_allowed ") && page.contains(" userland_not_allowed "));
        assert!(!page.contains("{refusals}") && !page.contains(" forwarded_original "));
        assert!(
            !page.contains("http://") || page.matches("http://").count() == 1,
            "no outside resources"
        );
    }

    #[test]
    fn slices_are_one_observation() {
        let measured = Measured::default();
        let sweep = measured.durations.sweep.clone();
        let mut slices = Slices::default();
        for more in [true, true, false] {
            assert_eq!(slices.of(&sweep, || more), more);
        }
        drop(Timed::new(&sweep));
        let text = text(measured, Form::OpenMetrics);
        assert!(
            text.contains("forwarder_sweep_duration_seconds_count 2\n"),
            "{text}"
        );
    }

    #[test]
    fn the_document_has_every_metric() {
        let document = document("metrics.md");
        let rows = document
            .lines()
            .filter(|line| line.starts_with("| `forwarder_"));
        let rows: Vec<Vec<&str>> = rows
            .map(|row| row.split('|').map(str::trim).collect())
            .collect();
        assert_eq!(rows.len(), METRICS.len(), "as many rows as metrics");
        for (metric, row) in METRICS.iter().zip(rows) {
            let labels: Vec<String> = metric.labels().iter().map(|it| format!("`{it}`")).collect();
            let expected = [
                &format!("`{}`", metric.name()),
                metric.kind(),
                &labels.join(", "),
            ];
            assert_eq!(row[1..4], expected);
            assert!(row[4].len() > 10, "{row:?} says what it means");
        }
    }

    #[test]
    fn the_dashboard_asks_for_what_there_is() {
        let document = document("grafana.json");
        let document: serde_json::Value = serde_json::from_str(&document).expect("JSON");
        let names: BTreeSet<String> = METRICS
            .iter()
            .flat_map(|metric| {
                let name = metric.name();
                let parts = ["", "_bucket", "_sum", "_count"].map(|part| format!("{name}{part}"));
                parts
                    .into_iter()
                    .take(if metric.kind() == "histogram" { 4 } else { 1 })
            })
            .collect();
        let labels: BTreeSet<&str> = METRICS.iter().flat_map(Metric::labels).copied().collect();
        let mut asked = BTreeSet::new();
        let mut queries = Vec::new();
        strings(&document, &mut |key, text| {
            // The data source's own variable asks for a kind of source.
            if ["expr", "query", "definition"].contains(&key) && text != "prometheus" {
                queries.push(text.to_owned());
            }
        });
        assert!(queries.len() > 8, "{queries:?}");
        for query in &queries {
            let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let ours: Vec<&str> = words
                .filter(|word| word.starts_with("forwarder_"))
                .collect();
            assert!(!ours.is_empty(), "{query}");
            for name in ours {
                assert!(names.contains(name), "{query}: no {name}");
                asked.insert(name.to_owned());
            }
            for by in query
                .split("by (")
                .skip(1)
                .filter_map(|rest| rest.split(')').next())
            {
                let is_known =
                    |label: &str| labels.contains(label) || ["le", "instance"].contains(&label);
                assert!(by.split(", ").all(is_known), "{query}: by {by}");
            }
        }
        assert!(asked.len() > 8, "{asked:?}");
    }

    /// Every text in a document, with its key.
    fn strings(value: &serde_json::Value, each: &mut impl FnMut(&str, &str)) {
        match value {
            serde_json::Value::Object(fields) => {
                for (key, value) in fields {
                    match value.as_str() {
                        Some(text) => each(key, text),
                        None => strings(value, each),
                    }
                }
            }
            serde_json::Value::Array(values) => values.iter().for_each(|it| strings(it, each)),
            _ => {}
        }
    }
}
