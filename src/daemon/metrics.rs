//! Metrics in Prometheus' text format, and who may fetch them: this machine, if the settings name an address at all.
//!
//! The text is made from one [`Snapshot`], so that `flea-ctl status` and a dashboard never disagree; `flea-ctl metrics`
//! gets the same over the socket.

use std::fmt::Write as _;

use crate::engine::STALL_BOUNDS_NS;
use crate::proto::snapshot::{ModelState, Snapshot};

mod responder;

pub use responder::Responder;

/// What a metric counts.
#[derive(Clone, Copy)]
enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by upper bound.
    Histogram,
}

/// The text under construction.
struct Page(String);

impl Page {
    /// Begins a metric: what it is called, what it is, what it says.
    fn metric(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            let _ = write!(
                self.0,
                "{}{label}=\"{}\"",
                if index == 0 { '{' } else { ',' },
                escaped(text)
            );
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    /// A metric without labels.
    fn single(&mut self, name: &str, kind: Kind, help: &str, value: f64) {
        self.metric(name, kind, help);
        self.value(name, &[], value);
    }
}

/// A label's value: quotes, backslashes and line ends have escapes.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// The daemon's state as Prometheus text.
#[must_use]
pub fn text(snapshot: &Snapshot) -> String {
    let mut page = Page(String::with_capacity(4096));
    page.metric("flea_build_info", Kind::Gauge, "Version of flead.");
    page.value("flea_build_info", &[("version", &snapshot.version)], 1.0);
    page.single(
        "flea_uptime_seconds",
        Kind::Gauge,
        "Time since flead was ready.",
        snapshot.uptime_seconds,
    );
    memory(&mut page, snapshot);
    connections(&mut page, snapshot);
    for metric in MODEL_METRICS {
        page.metric(metric.name, metric.kind, metric.help);
        for model in &snapshot.models {
            let labels = [
                ("model", model.path.as_str()),
                ("backend", model.reader.as_str()),
            ];
            let count = if metric.by_backend { 2 } else { 1 };
            page.value(metric.name, &labels[..count], (metric.value)(model));
        }
    }
    slots(&mut page, &snapshot.models);
    acquires(&mut page, &snapshot.models);
    page.metric(
        "flea_model_fallback",
        Kind::Gauge,
        "1 for each thing that did not come out as wished.",
    );
    for model in &snapshot.models {
        for fallback in &model.fallbacks {
            page.value(
                "flea_model_fallback",
                &[("model", &model.path), ("kind", fallback)],
                1.0,
            );
        }
    }
    page.0
}

fn slots(page: &mut Page, models: &[ModelState]) {
    page.metric(
        "flea_slot_state",
        Kind::Gauge,
        "Slots of the ring by state.",
    );
    for model in models {
        for (state, count) in [
            ("free", model.slots_free),
            ("used", model.slots_used),
            ("quarantined", model.slots_quarantined),
        ] {
            let labels = [("model", model.path.as_str()), ("state", state)];
            page.value("flea_slot_state", &labels, f64::from(count));
        }
    }
}

/// How long acquires waited. Those of a layer that is there never reach flead: they took no time that it could measure.
fn acquires(page: &mut Page, models: &[ModelState]) {
    let help = "Time from the wish for a layer to its being there; at once in the first bucket.";
    page.metric("flea_acquire_seconds", Kind::Histogram, help);
    for model in models {
        let at_once = model.acquires_total.saturating_sub(model.stalls_total);
        let waited: u64 = model.stall_counts.iter().sum();
        let mut sum = at_once;
        for (bound_ns, count) in STALL_BOUNDS_NS.iter().zip(&model.stall_counts) {
            sum += count;
            let bound = (*bound_ns as f64 / 1e9).to_string();
            let labels = [("model", model.path.as_str()), ("le", bound.as_str())];
            page.value("flea_acquire_seconds_bucket", &labels, sum as f64);
        }
        let all = (at_once + waited) as f64;
        let labels = [("model", model.path.as_str()), ("le", "+Inf")];
        page.value("flea_acquire_seconds_bucket", &labels, all);
        let seconds = model.stall_ns_total as f64 / 1e9;
        page.value("flea_acquire_seconds_sum", &labels[..1], seconds);
        page.value("flea_acquire_seconds_count", &labels[..1], all);
    }
}

fn memory(page: &mut Page, snapshot: &Snapshot) {
    let gauges = [
        (
            "flea_budget_bytes",
            "What all pools together may take now.",
            snapshot.budget_bytes,
        ),
        (
            "flea_budget_configured_bytes",
            "What was configured; more than the budget under memory pressure.",
            snapshot.budget_configured_bytes,
        ),
        (
            "flea_planned_bytes",
            "What all pools together were planned to take.",
            snapshot.planned_bytes,
        ),
        (
            "flea_pool_bytes",
            "What the pools hold, as the kernel counts.",
            snapshot.pool_bytes,
        ),
    ];
    for (name, help, bytes) in gauges {
        page.single(name, Kind::Gauge, help, bytes as f64);
    }
    if let Some(pressure) = &snapshot.pressure {
        let help = "Share of the last 10 s in which some task waited for memory, 0 to 1.";
        page.single(
            "flea_memory_pressure_ratio",
            Kind::Gauge,
            help,
            pressure.some_avg10 / 100.0,
        );
        let help = "Times memory pressure changed the budget.";
        page.metric("flea_pressure_changes_total", Kind::Counter, help);
        for (direction, count) in [
            ("shrink", pressure.shrinks_total),
            ("grow", pressure.grows_total),
        ] {
            page.value(
                "flea_pressure_changes_total",
                &[("direction", direction)],
                count as f64,
            );
        }
    }
}

fn connections(page: &mut Page, snapshot: &Snapshot) {
    let leases: u64 = snapshot
        .clients
        .iter()
        .map(|client| u64::from(client.leases))
        .sum();
    for (name, help, count) in [
        (
            "flea_connections",
            "Open connections.",
            u64::from(snapshot.connections),
        ),
        (
            "flea_clients",
            "Clients attached to a model.",
            snapshot.clients.len() as u64,
        ),
        ("flea_leases", "Layers held by clients.", leases),
        (
            "flea_barred_processes",
            "Processes that may not attach for now, because a lease of theirs had to be taken back.",
            u64::from(snapshot.barred),
        ),
    ] {
        page.single(name, Kind::Gauge, help, count as f64);
    }
    let help = "Connections closed because a lease was held too long or a control page lied.";
    page.single(
        "flea_revoked_total",
        Kind::Counter,
        help,
        snapshot.revoked_total as f64,
    );
    let help = "Connections refused or closed for breaking a limit.";
    page.single(
        "flea_refused_total",
        Kind::Counter,
        help,
        snapshot.refused_total as f64,
    );
}

/// One metric that every model has.
struct ModelMetric {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    by_backend: bool,
    value: fn(&ModelState) -> f64,
}

const fn gauge(
    name: &'static str,
    help: &'static str,
    value: fn(&ModelState) -> f64,
) -> ModelMetric {
    ModelMetric {
        name,
        kind: Kind::Gauge,
        help,
        by_backend: false,
        value,
    }
}

const fn counter(
    name: &'static str,
    help: &'static str,
    value: fn(&ModelState) -> f64,
) -> ModelMetric {
    ModelMetric {
        name,
        kind: Kind::Counter,
        help,
        by_backend: false,
        value,
    }
}

/// A counter of the reader, which says which one it is.
const fn of_reader(
    name: &'static str,
    help: &'static str,
    value: fn(&ModelState) -> f64,
) -> ModelMetric {
    ModelMetric {
        by_backend: true,
        ..counter(name, help, value)
    }
}

const MODEL_METRICS: [ModelMetric; 18] = [
    gauge("flea_model_bytes", "All tensors of the model.", |model| {
        model.model_bytes as f64
    }),
    gauge(
        "flea_model_resident_bytes",
        "Weights that stay in memory.",
        |model| model.resident_bytes as f64,
    ),
    gauge("flea_model_ring_bytes", "All slots of the ring.", |model| {
        model.ring_bytes as f64
    }),
    gauge(
        "flea_model_pool_bytes",
        "What the model's pool holds, as the kernel counts.",
        |model| model.pool_bytes as f64,
    ),
    gauge(
        "flea_model_streamed_bytes_per_pass",
        "Bytes read for one pass over the layers.",
        |model| model.streamed_bytes_per_pass as f64,
    ),
    gauge("flea_model_clients", "Clients attached.", |model| {
        f64::from(model.clients)
    }),
    gauge(
        "flea_model_generation",
        "Number of the plan in force.",
        |model| f64::from(model.generation),
    ),
    gauge(
        "flea_model_huge_page_ratio",
        "Share of the pool on huge pages, 0 to 1.",
        |model| model.huge_page_share,
    ),
    of_reader(
        "flea_read_bytes_total",
        "Bytes the drive delivered.",
        |model| model.bytes_read_total as f64,
    ),
    of_reader("flea_reads_total", "Reads.", |model| {
        model.reads_total as f64
    }),
    of_reader("flea_read_retries_total", "Reads tried again.", |model| {
        model.retries_total as f64
    }),
    of_reader(
        "flea_read_seconds_total",
        "Time with at least one read in flight.",
        |model| model.read_ns_total as f64 / 1e9,
    ),
    counter("flea_acquires_total", "Leases given.", |model| {
        model.acquires_total as f64
    }),
    counter(
        "flea_stalls_total",
        "Acquires that waited for the drive.",
        |model| model.stalls_total as f64,
    ),
    counter(
        "flea_stall_seconds_total",
        "Time for which somebody waited for a layer.",
        |model| model.stall_ns_total as f64 / 1e9,
    ),
    counter(
        "flea_mispredicts_total",
        "Acquires that the learned order had not foreseen.",
        |model| model.mispredicts_total as f64,
    ),
    counter(
        "flea_put_off_total",
        "Waits for layers that their client had less than a pass ago, put off while others got on.",
        |model| model.put_off_total as f64,
    ),
    counter(
        "flea_away_loads_total",
        "Loads into another slot than the plan's, because that one was held.",
        |model| model.away_loads_total as f64,
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::snapshot::{ClientState, Pressure};

    fn snapshot() -> Snapshot {
        Snapshot {
            version: "0.1.0".to_owned(),
            pressure: Some(Pressure {
                some_avg10: 12.5,
                shrinks_total: 3,
                ..Pressure::default()
            }),
            models: vec![ModelState {
                path: "/m/\"odd\\\n.gguf".to_owned(),
                reader: "io_uring".to_owned(),
                bytes_read_total: 1 << 40,
                read_ns_total: 1_500_000_000,
                acquires_total: 10,
                stalls_total: 3,
                stall_ns_total: 4_002_000_000,
                stall_counts: vec![0, 1, 0, 0, 0, 0, 0, 0, 1],
                slots_used: 2,
                fallbacks: vec!["small_pages".to_owned()],
                ..ModelState::default()
            }],
            clients: vec![ClientState {
                leases: 2,
                ..ClientState::default()
            }],
            ..Snapshot::default()
        }
    }

    /// A sample's name and labels, and its value, by the rules of the text format.
    fn samples(text: &str) -> Vec<(String, f64)> {
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| {
                let (name, value) = line.rsplit_once(' ').expect("a name and a value");
                (name.to_owned(), value.parse().expect("a number"))
            })
            .collect()
    }

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let text = text(&snapshot());
        let samples = samples(&text);
        let value = |name: &str| {
            samples
                .iter()
                .find(|sample| sample.0 == name)
                .map(|sample| sample.1)
        };
        let labels = r#"{model="/m/\"odd\\\n.gguf",backend="io_uring"}"#;
        assert_eq!(
            value(&format!("flea_read_bytes_total{labels}")),
            Some((1u64 << 40) as f64)
        );
        assert_eq!(
            value(&format!("flea_read_seconds_total{labels}")),
            Some(1.5)
        );
        assert_eq!(value("flea_memory_pressure_ratio"), Some(0.125));
        assert_eq!(
            value(r#"flea_pressure_changes_total{direction="shrink"}"#),
            Some(3.0)
        );
        assert_eq!(value("flea_leases"), Some(2.0));
        let model = r#"model="/m/\"odd\\\n.gguf""#;
        let bucket = |le: &str| {
            value(&format!(
                "flea_acquire_seconds_bucket{{{model},le=\"{le}\"}}"
            ))
        };
        assert_eq!(
            (bucket("0.001"), bucket("0.003"), bucket("3")),
            (Some(7.0), Some(8.0), Some(8.0))
        );
        assert_eq!(bucket("+Inf"), Some(9.0));
        assert_eq!(
            value(&format!("flea_acquire_seconds_sum{{{model}}}")),
            Some(4.002)
        );
        assert_eq!(
            value(&format!("flea_slot_state{{{model},state=\"used\"}}")),
            Some(2.0)
        );
        assert_eq!(value(r#"flea_build_info{version="0.1.0"}"#), Some(1.0));
        assert!(text.ends_with('\n'));
        let mut announced = std::collections::BTreeSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let name = rest.split(' ').next().unwrap().to_owned();
                assert!(announced.insert(name.clone()), "{name} is announced twice");
                assert_eq!(
                    rest.ends_with("counter"),
                    name.ends_with("_total"),
                    "{name}"
                );
            } else if !line.starts_with('#') {
                let name = line.split(['{', ' ']).next().unwrap();
                let family = ["_bucket", "_sum", "_count"]
                    .iter()
                    .find_map(|end| name.strip_suffix(end))
                    .filter(|family| announced.contains(*family));
                assert!(
                    family.is_some() || announced.contains(name),
                    "{name} has no type"
                );
            }
        }
    }
}
