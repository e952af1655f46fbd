//! Metrics in Prometheus' text format, and who may fetch them: this machine, if the settings name an address at all.
//!
//! The text is made from one [`Snapshot`], so that `flea-ctl status` and a dashboard never disagree; `flea-ctl metrics`
//! gets the same over the socket. The responder is one thread that answers one request at a time, each within two
//! seconds: it can be slowed down by whoever is on this machine, the daemon cannot.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::proto::snapshot::{ModelState, Snapshot};

/// How long one request may take, from its first byte to the last one of the answer.
const REQUEST: Duration = Duration::from_secs(2);
/// The longest request that is read.
const REQUEST_BYTES_MAX: usize = 8 << 10;

/// What a metric counts.
#[derive(Clone, Copy)]
enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// The text under construction.
struct Page(String);

impl Page {
    /// Begins a metric: what it is called, what it is, what it says.
    fn metric(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
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

const MODEL_METRICS: [ModelMetric; 15] = [
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
        "flea_mispredicts_total",
        "Acquires that the learned order had not foreseen.",
        |model| model.mispredicts_total as f64,
    ),
];

/// Answers `GET /metrics` on a loopback address until it is dropped.
#[derive(Debug)]
pub struct Responder {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Responder {
    /// Listens on `address`; `metrics` is called for every request.
    ///
    /// # Errors
    /// `Invalid` for an address that other machines can reach; what binding says.
    pub fn start(
        address: SocketAddr,
        metrics: impl Fn() -> String + Send + 'static,
    ) -> Result<Self> {
        if !address.ip().is_loopback() {
            let context = format!(
                "metrics_listen: {address} is not a loopback address; write 127.0.0.1:9464"
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let failed = |error: &std::io::Error| {
            Error::from_io(
                error,
                format_args!("listen for metrics on {address} (another flead, or an exporter?)"),
            )
        };
        let listener = TcpListener::bind(address).map_err(|error| failed(&error))?;
        let address = listener.local_addr().map_err(|error| failed(&error))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("flea-metrics".to_owned())
            .spawn(move || listen(&listener, &stopped, &metrics))
            .map_err(|error| failed(&error))?;
        Ok(Self {
            address,
            stop,
            thread: Some(thread),
        })
    }

    /// Where it listens; the port is the system's choice where 0 was asked for.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the accept; if it cannot be reached it has no more to wait for either.
        let _ = TcpStream::connect_timeout(&self.address, REQUEST);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(listener: &TcpListener, stop: &AtomicBool, metrics: &impl Fn() -> String) {
    for stream in listener.incoming() {
        if stop.load(Ordering::Acquire) {
            return;
        }
        match stream {
            // Who hangs up or is too slow gets no answer; that is all there is to do about it.
            Ok(stream) => drop(answer(stream, metrics)),
            Err(error) => {
                // Out of descriptors, most likely: wait, rather than spin.
                log::warn!("accept a connection for metrics: {error}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn answer(mut stream: TcpStream, metrics: &impl Fn() -> String) -> std::io::Result<()> {
    let request = read_request(&mut stream)?;
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let path = path.split('?').next().unwrap_or(path);
    let (status, body) = match (method, path) {
        ("GET" | "HEAD", "/metrics") => ("200 OK", metrics()),
        ("GET" | "HEAD", _) => ("404 Not Found", "metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "only GET\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let body = if method == "HEAD" { "" } else { body.as_str() };
    stream.set_write_timeout(Some(REQUEST))?;
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

/// The request's first line, once its head is complete.
fn read_request(stream: &mut TcpStream) -> std::io::Result<String> {
    let deadline = Instant::now() + REQUEST;
    let mut bytes = Vec::new();
    let mut part = [0u8; 1024];
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") && bytes.len() < REQUEST_BYTES_MAX {
        let left = deadline.saturating_duration_since(Instant::now());
        // Zero would mean "for ever".
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match stream.read(&mut part)? {
            0 => break,
            count => bytes.extend_from_slice(&part[..count]),
        }
        if Instant::now() >= deadline {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
    }
    let line = bytes.split(|byte| *byte == b'\r').next().unwrap_or(&[]);
    Ok(String::from_utf8_lossy(line).into_owned())
}

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
                assert!(announced.contains(name), "{name} has no type");
            }
        }
    }

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn it_answers_on_loopback_and_only_there() {
        let outside = "0.0.0.0:0".parse().unwrap();
        let error = Responder::start(outside, String::new).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let responder =
            Responder::start("127.0.0.1:0".parse().unwrap(), || "flea_up 1\n".to_owned()).unwrap();
        let address = responder.address();
        let good = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(
            good.starts_with("HTTP/1.1 200 OK\r\n") && good.ends_with("\r\n\r\nflea_up 1\n"),
            "{good}"
        );
        assert!(ask(address, "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
        assert!(ask(address, "HEAD /metrics HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n"));
        // Who connects and says nothing, or hangs up, is no harm to the next.
        let silent = TcpStream::connect(address).unwrap();
        drop(TcpStream::connect(address).unwrap());
        assert!(ask(address, "GET /metrics?x=1 HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200"));
        drop(silent);
        drop(responder);
        assert!(
            TcpStream::connect(address).is_err(),
            "nobody listens any more"
        );
    }
}
