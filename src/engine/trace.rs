//! The trace: what the drive and the host did when, as a file for Perfetto or chrome://tracing.
//!
//! Kinds of lanes: read (a request from submit to completion, one lane per request in flight), copy (on a GPU: a piece on its
//! way over the link), wait (a host that sleeps for a layer) and compute (a lease, from acquire to release). Invariants: nothing here costs anything unless a
//! trace is asked for (an `Option` that is looked at); events land in memory of a fixed size that is allocated once, the
//! oldest give way and are counted. Place: beside `reader` and `lease` in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};

/// Events kept unless told otherwise: 7 MiB, some 70 tokens of a model of 7 GB.
pub const EVENTS_DEFAULT: usize = 1 << 17;
/// Lanes of one kind: more at once share the last one.
const LANES_MAX: usize = 256;

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Read,
    Copy,
    Wait,
    Compute,
}

impl Kind {
    /// Shown also where nothing of the kind happened.
    const ALWAYS: [Self; 3] = [Self::Read, Self::Wait, Self::Compute];

    const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Copy => "copy",
            Self::Wait => "wait",
            Self::Compute => "compute",
        }
    }

    /// Number of the first lane; they stand in this order.
    const fn first_lane(self) -> usize {
        (self as usize + 1) * 1000
    }
}

/// A part of a shard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Part {
    /// Which file.
    pub shard_index: u32,
    /// Where it begins.
    pub offset_bytes: u64,
    /// Its bytes, as far as the file has them.
    pub len_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Event {
    kind: Kind,
    lane: u16,
    /// `None`: pages that stay.
    layer: Option<u32>,
    part: Part,
    failed: bool,
    begin_ns: u64,
    end_ns: u64,
}

/// Something that has begun.
#[derive(Debug, Clone, Copy)]
struct Open {
    key: u64,
    layer: Option<u32>,
    part: Part,
    begin_ns: u64,
}

/// What is under way of one kind, by lane: two things at once never share a lane, because viewers cannot draw that.
#[derive(Debug)]
struct Lanes(Vec<Option<Open>>);

impl Lanes {
    fn begin(&mut self, open: Open) {
        match self.0.iter().position(Option::is_none) {
            Some(lane) => self.0[lane] = Some(open),
            None if self.0.len() < LANES_MAX => self.0.push(Some(open)),
            // Nobody asks for more in flight; the event is lost, and the counters still have it.
            None => {}
        }
    }

    fn find(&mut self, key: u64) -> Option<&mut Open> {
        self.0.iter_mut().flatten().find(|open| open.key == key)
    }

    fn holds(&self, key: u64) -> bool {
        self.0.iter().flatten().any(|open| open.key == key)
    }

    /// The youngest whose key fits, and its lane.
    fn end(&mut self, fits: impl Fn(u64) -> bool) -> Option<(u16, Open)> {
        let held = self.0.iter_mut().enumerate();
        let same = held.filter(|(_, open)| open.is_some_and(|open| fits(open.key)));
        let (lane, open) = same.max_by_key(|(_, open)| open.map(|open| open.begin_ns))?;
        Some((lane as u16, open.take()?))
    }
}

#[derive(Debug)]
struct Inner {
    /// Full: the oldest stands at `next`.
    events: Vec<Event>,
    capacity: usize,
    next: usize,
    dropped_count: u64,
    reads: Lanes,
    copies: Lanes,
    leases: Lanes,
}

impl Inner {
    fn push(&mut self, event: Event) {
        if self.events.len() < self.capacity {
            self.events.push(event);
            return;
        }
        self.events[self.next] = event;
        self.next = (self.next + 1) % self.capacity;
        self.dropped_count += 1;
    }
}

/// Collects events of one model.
#[derive(Debug)]
pub struct Trace {
    began: Instant,
    inner: Arc<Mutex<Inner>>,
    /// For a model below another one.
    below: Option<Below>,
}

/// What tells the reads of a model below another one from those of its neighbour.
#[derive(Debug, Clone, Copy)]
struct Below {
    key_bits: u64,
    /// Whether its layers are those of the model above.
    has_layers: bool,
}

impl Default for Trace {
    fn default() -> Self {
        Self::new(EVENTS_DEFAULT)
    }
}

impl Trace {
    /// A trace that keeps the last `events_count` events (one at least).
    #[must_use]
    pub fn new(events_count: usize) -> Self {
        let capacity = events_count.max(1);
        Self {
            began: Instant::now(),
            below: None,
            inner: Arc::new(Mutex::new(Inner {
                events: Vec::with_capacity(capacity),
                capacity,
                next: 0,
                dropped_count: 0,
                reads: Lanes(Vec::with_capacity(LANES_MAX)),
                copies: Lanes(Vec::with_capacity(LANES_MAX)),
                leases: Lanes(Vec::with_capacity(LANES_MAX)),
            })),
        }
    }

    /// The same trace for a model that reads for this one: its reads are events here, its leases and waits are not, because
    /// no host has them. `number` tells several from each other; `has_layers`: its layers are those of the model above, else
    /// they are pages that stay.
    #[must_use]
    pub fn below(&self, number: u32, has_layers: bool) -> Self {
        Self {
            began: self.began,
            inner: Arc::clone(&self.inner),
            below: Some(Below {
                // Keys have the number of a fetch in their upper half, which is far from using its first bits.
                key_bits: (u64::from(number) + 1) << 60,
                has_layers,
            }),
        }
    }

    fn key(&self, key: u64) -> u64 {
        key ^ self.below.map_or(0, |below| below.key_bits)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn since_begin(&self, when: Instant) -> u64 {
        u64::try_from(when.saturating_duration_since(self.began).as_nanos()).unwrap_or(u64::MAX)
    }

    fn now_ns(&self) -> u64 {
        self.since_begin(Instant::now())
    }

    /// A request for `layer` (`None`: pages that stay) goes to the reader.
    pub fn read_begun(&self, key: u64, layer: Option<u32>, part: Part) {
        let begin_ns = self.now_ns();
        let has_layers = self.below.is_none_or(|below| below.has_layers);
        self.inner().reads.begin(Open {
            key: self.key(key),
            layer: layer.filter(|_| has_layers),
            part,
            begin_ns,
        });
    }

    /// It came back.
    pub fn read_ended(&self, key: u64, failed: bool) {
        let end_ns = self.now_ns();
        let key = self.key(key);
        let mut inner = self.inner();
        if let Some((lane, open)) = inner.reads.end(|open| open == key) {
            inner.push(event(Kind::Read, lane, open, failed, end_ns));
        }
    }

    /// The driver was asked to copy `len_bytes` for a piece of `layer` over the link. What is asked for the same piece later
    /// makes it longer.
    pub fn copying(&self, key: u64, layer: Option<u32>, len_bytes: u64) {
        let begin_ns = self.now_ns();
        let mut inner = self.inner();
        if let Some(open) = inner.copies.find(key) {
            open.part.len_bytes += len_bytes;
            return;
        }
        let part = Part {
            len_bytes,
            ..Part::default()
        };
        inner.copies.begin(Open {
            key,
            layer,
            part,
            begin_ns,
        });
    }

    /// The piece is in VRAM.
    pub fn copied(&self, key: u64, failed: bool) {
        let end_ns = self.now_ns();
        let mut inner = self.inner();
        if let Some((lane, open)) = inner.copies.end(|open| open == key) {
            inner.push(event(Kind::Copy, lane, open, failed, end_ns));
        }
    }

    /// A host has slept for a layer since `begun`.
    pub fn waited(&self, layer: u32, begun: Instant) {
        if self.below.is_some() {
            return;
        }
        let (begin_ns, end_ns) = (self.since_begin(begun), self.now_ns());
        let open = Open {
            key: 0,
            layer: Some(layer),
            part: Part::default(),
            begin_ns,
        };
        self.inner().push(event(Kind::Wait, 0, open, false, end_ns));
    }

    /// A host's thread got a lease: from now on it computes. Another acquire of the same layer extends that lease.
    pub fn leased(&self, layer: u32, thread: u64) {
        if self.below.is_some() {
            return;
        }
        let begin_ns = self.now_ns();
        let key = thread << 32 | u64::from(layer);
        let mut inner = self.inner();
        if inner.leases.holds(key) {
            return;
        }
        inner.leases.begin(Open {
            key,
            layer: Some(layer),
            part: Part::default(),
            begin_ns,
        });
    }

    /// It gave the lease back.
    pub fn released(&self, layer: u32) {
        if self.below.is_some() {
            return;
        }
        let end_ns = self.now_ns();
        let mut inner = self.inner();
        if let Some((lane, open)) = inner.leases.end(|open| open as u32 == layer) {
            inner.push(event(Kind::Compute, lane, open, false, end_ns));
        }
    }

    /// Events that gave way to younger ones.
    #[must_use]
    pub fn dropped_count(&self) -> u64 {
        self.inner().dropped_count
    }

    /// Writes everything in Chrome's trace format, by time. `label` names a layer.
    ///
    /// # Errors
    /// What writing gives.
    pub fn write_json(
        &self,
        out: &mut dyn Write,
        label: &dyn Fn(u32) -> String,
    ) -> std::io::Result<()> {
        let (mut events, dropped_count) = {
            let inner = self.inner();
            (inner.events.clone(), inner.dropped_count)
        };
        events.sort_by_key(|event| (event.begin_ns, event.end_ns));
        write!(
            out,
            "{{\"displayTimeUnit\":\"ms\",\"otherData\":{{\"dropped_events\":{dropped_count}}},\"traceEvents\":[\n{}",
            json!({"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "flea"}})
        )?;
        for line in lane_names(&events) {
            write!(out, ",\n{line}")?;
        }
        for event in &events {
            write!(
                out,
                ",\n{}",
                event_json(
                    event,
                    &event.layer.map_or_else(|| "resident".to_owned(), label)
                )
            )?;
        }
        out.write_all(b"\n]}\n")?;
        out.flush()
    }
}

fn event(kind: Kind, lane: u16, open: Open, failed: bool, end_ns: u64) -> Event {
    Event {
        kind,
        lane,
        layer: open.layer,
        part: open.part,
        failed,
        begin_ns: open.begin_ns,
        end_ns: end_ns.max(open.begin_ns),
    }
}

/// Every kind but copies has a first lane, also when nothing happened there.
fn lane_names(events: &[Event]) -> Vec<Value> {
    let used = events.iter().map(|event| (event.kind, event.lane));
    let all: BTreeSet<(Kind, u16)> = used.chain(Kind::ALWAYS.map(|kind| (kind, 0))).collect();
    let several = |kind: Kind| all.iter().filter(|(other, _)| *other == kind).count() > 1;
    let name = |(kind, lane): (Kind, u16)| {
        if several(kind) {
            format!("{} {}", kind.name(), lane + 1)
        } else {
            kind.name().to_owned()
        }
    };
    let named = |lane: &(Kind, u16)| {
        let tid = lane.0.first_lane() + usize::from(lane.1);
        [
            json!({"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name(*lane)}}),
            json!({"ph": "M", "pid": 1, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}),
        ]
    };
    all.iter().flat_map(named).collect()
}

fn event_json(event: &Event, label: &str) -> Value {
    let arguments = match event.kind {
        Kind::Read => json!({
            "layer": event.layer,
            "shard": event.part.shard_index,
            "offset": event.part.offset_bytes,
            "bytes": event.part.len_bytes,
            "failed": event.failed,
        }),
        Kind::Copy => json!({
            "layer": event.layer,
            "bytes": event.part.len_bytes,
            "failed": event.failed,
        }),
        Kind::Wait | Kind::Compute => json!({ "layer": event.layer }),
    };
    json!({
        "ph": "X",
        "pid": 1,
        "tid": event.kind.first_lane() + usize::from(event.lane),
        "cat": event.kind.name(),
        "name": label,
        "ts": event.begin_ns as f64 / 1e3,
        "dur": (event.end_ns - event.begin_ns) as f64 / 1e3,
        "args": arguments,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(offset_bytes: u64, len_bytes: u64) -> Part {
        Part {
            shard_index: 0,
            offset_bytes,
            len_bytes,
        }
    }

    fn written(trace: &Trace) -> Value {
        let mut out = Vec::new();
        trace
            .write_json(&mut out, &|layer| format!("blk.{layer}"))
            .unwrap();
        serde_json::from_slice(&out).unwrap()
    }

    fn of_kind<'a>(json: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        let events = json["traceEvents"].as_array().unwrap().iter();
        events.filter(move |event| event["cat"] == kind)
    }

    #[test]
    fn what_happens_at_once_has_lanes_of_its_own() {
        let trace = Trace::new(100);
        trace.read_begun(1, None, part(0, 10));
        trace.read_begun(2, Some(1), part(10, 20));
        trace.read_ended(1, false);
        trace.read_begun(3, Some(1), part(30, 30));
        trace.read_ended(3, false);
        trace.read_ended(2, true);
        trace.leased(4, 1);
        trace.leased(4, 2);
        trace.leased(4, 1);
        trace.released(4);
        trace.released(4);
        trace.waited(7, Instant::now());
        let json = written(&trace);
        // By begin: 1 on the first lane, 2 on the second, 3 on the first again.
        let lanes: Vec<u64> = of_kind(&json, "read")
            .map(|e| e["tid"].as_u64().unwrap())
            .collect();
        assert_eq!(lanes, [1000, 1001, 1000]);
        let bytes: u64 = of_kind(&json, "read")
            .map(|e| e["args"]["bytes"].as_u64().unwrap())
            .sum();
        assert_eq!(bytes, 60);
        let failed: Vec<bool> = of_kind(&json, "read")
            .map(|e| e["args"]["failed"] == true)
            .collect();
        assert_eq!(failed, [false, true, false]);
        assert_eq!(of_kind(&json, "compute").count(), 2);
        assert_eq!(of_kind(&json, "wait").next().unwrap()["name"], "blk.7");
        let names: Vec<&str> = json["traceEvents"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|event| event["name"] == "thread_name")
            .map(|event| event["args"]["name"].as_str().unwrap())
            .collect();
        assert_eq!(
            names,
            ["read 1", "read 2", "wait", "compute 1", "compute 2"]
        );
    }

    #[test]
    fn a_model_below_adds_its_reads_alone() {
        let trace = Trace::new(100);
        let (one, other) = (trace.below(0, true), trace.below(1, false));
        // The same keys in both, and the first ends last.
        one.read_begun(7, Some(2), part(0, 10));
        other.read_begun(7, Some(5), part(10, 20));
        other.read_ended(7, false);
        one.read_ended(7, false);
        one.leased(2, 1);
        one.released(2);
        one.waited(2, Instant::now());
        trace.copying(7, Some(2), 4);
        trace.copying(7, Some(2), 5);
        trace.copying(8, None, 3);
        trace.copied(7, false);
        trace.copied(8, true);
        trace.copied(9, false);
        let json = written(&trace);
        let reads: Vec<(&str, u64)> = of_kind(&json, "read")
            .map(|e| {
                (
                    e["name"].as_str().unwrap(),
                    e["args"]["bytes"].as_u64().unwrap(),
                )
            })
            .collect();
        assert_eq!(reads, [("blk.2", 10), ("resident", 20)]);
        let copies: Vec<(&str, u64, bool)> = of_kind(&json, "copy")
            .map(|e| {
                (
                    e["name"].as_str().unwrap(),
                    e["args"]["bytes"].as_u64().unwrap(),
                    e["args"]["failed"] == true,
                )
            })
            .collect();
        assert_eq!(copies, [("blk.2", 9, false), ("resident", 3, true)]);
        assert_eq!(of_kind(&json, "compute").count(), 0);
        assert_eq!(of_kind(&json, "wait").count(), 0);
    }

    #[test]
    fn the_oldest_give_way_and_are_counted() {
        let trace = Trace::new(3);
        for key in 0..5 {
            trace.read_begun(key, Some(key as u32), part(key, 1));
            trace.read_ended(key, false);
        }
        assert_eq!(trace.dropped_count(), 2);
        let json = written(&trace);
        assert_eq!(json["otherData"]["dropped_events"], 2);
        let names: Vec<&str> = of_kind(&json, "read")
            .map(|e| e["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["blk.2", "blk.3", "blk.4"]);
    }

    #[test]
    fn what_never_began_does_not_end_and_an_empty_trace_is_one() {
        let trace = Trace::new(0);
        trace.read_ended(9, false);
        trace.released(9);
        let json = written(&trace);
        assert!(of_kind(&json, "read").next().is_none());
        assert!(json["traceEvents"].as_array().unwrap().len() >= 4);
    }

    #[test]
    fn more_at_once_than_lanes_is_survived() {
        let trace = Trace::new(10_000);
        for key in 0..LANES_MAX as u64 + 5 {
            trace.read_begun(key, None, part(key, 1));
        }
        for key in 0..LANES_MAX as u64 + 5 {
            trace.read_ended(key, false);
        }
        assert_eq!(of_kind(&written(&trace), "read").count(), LANES_MAX);
    }
}
