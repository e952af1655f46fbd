//! `flea bench stream --gpu --trace` on the fake GPU: reads of the drive and copies over the link are events whose bytes are those
//! that were counted, however the weights come.
#![cfg(all(feature = "cuda", feature = "cli"))]

mod common;
#[path = "common/fake_cuda.rs"]
mod fake_cuda;

use std::collections::HashMap;
use std::path::Path;

use common::{compressed, json, number, padded_model as model};
use serde_json::Value;

/// What is read once is read through a ring of its own, which goes on at its beginning until all is in VRAM: three slots of a
/// piece, and what is in flight.
const RESIDENT_AHEAD: f64 = (16 << 20) as f64;

/// Walks with a trace; gives what was counted and what was traced.
fn walk(model: &Path, arguments: &str) -> (Value, Value) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("trace.json");
    let mut command = fake_cuda::stream_on_gpu_0(model, arguments, &[]);
    command.arg("--trace").arg(&path);
    command.env("LD_LIBRARY_PATH", fake_cuda::directory_with_cufile());
    let answer = json(&mut command);
    let text = std::fs::read_to_string(&path).expect("a trace");
    (answer, serde_json::from_str(&text).expect("JSON"))
}

fn of_kind<'a>(trace: &'a Value, kind: &'a str) -> Vec<&'a Value> {
    let events = trace["traceEvents"].as_array().expect("events").iter();
    events.filter(|event| event["cat"] == kind).collect()
}

fn bytes(events: &[&Value]) -> f64 {
    events.iter().map(|e| number(&e["args"], "bytes")).sum()
}

/// Two events of one lane never overlap: viewers could not draw them.
fn assert_drawable(trace: &Value) {
    let mut ends = HashMap::new();
    let events = trace["traceEvents"].as_array().expect("events").iter();
    for event in events.filter(|event| event["ph"] == "X") {
        let lane = event["tid"].as_u64().expect("a lane");
        let (begin, len) = (number(event, "ts"), number(event, "dur"));
        let last = ends.insert(lane, begin + len);
        assert!(
            last.is_none_or(|last: f64| last <= begin + 0.002),
            "{event}"
        );
    }
}

fn assert_accounts(answer: &Value, trace: &Value, what: &str) {
    assert_eq!(trace["otherData"]["dropped_events"], 0);
    assert_drawable(trace);
    let ahead = number(&answer["vram"], "ring_bytes");
    let streams =
        number(&answer["tiers"], "memory_bytes") + number(&answer["tiers"], "drive_bytes");
    // The trace is written when the model is closed; what it was ahead by then came after the figures were taken.
    let (copies, reads) = (of_kind(trace, "copy"), of_kind(trace, "read"));
    let (h2d, read) = (number(answer, "h2d_bytes"), number(answer, "bytes_read"));
    match streams > 0.0 {
        true => assert!(
            (h2d..=h2d + ahead).contains(&bytes(&copies)),
            "{what}: {} of {h2d}",
            bytes(&copies)
        ),
        // Nothing is copied ahead: to the byte.
        false => assert_eq!(bytes(&copies), h2d, "{what}"),
    }
    assert!(
        (read..=read + 2.0 * ahead + RESIDENT_AHEAD).contains(&bytes(&reads)),
        "{what}: {} of {read}",
        bytes(&reads)
    );
    assert!(!reads.is_empty() && !copies.is_empty());
    // Closing gives the piece up whose bytes have landed in part.
    let failed = copies
        .iter()
        .filter(|event| event["args"]["failed"] == true);
    assert!(failed.count() <= 1, "{what}");
    assert_eq!(
        of_kind(trace, "compute").len() as f64,
        number(answer, "acquires")
    );
    assert_eq!(
        of_kind(trace, "wait").len() as f64,
        number(answer, "stalls")
    );
}

#[test]
fn reads_and_copies_are_those_that_were_counted() {
    let model = model();
    for arguments in [
        "--vram 48MiB --memory 40% --passes 3",
        "--vram 48MiB --memory 120% --passes 3",
        "--vram 200MiB --memory 60% --passes 2",
        "--vram 80MiB --memory 40% --passes 2 --reader gds",
    ] {
        let (answer, trace) = walk(&model, arguments);
        assert_eq!(
            answer["reader"] == "gds",
            arguments.contains("gds"),
            "{answer}"
        );
        assert_accounts(&answer, &trace, arguments);
    }
}

#[test]
fn coded_weights_are_traced_as_they_travel() {
    let directory = tempfile::tempdir().expect("a directory");
    let packed = compressed(directory.path());
    for arguments in [
        "--vram 64MiB --memory 40% --passes 3",
        "--vram 200MiB --memory 60% --passes 1",
    ] {
        let (answer, trace) = walk(&packed, arguments);
        assert!(number(&answer, "unpacked_bytes") > 0.0, "{answer}");
        assert_accounts(&answer, &trace, arguments);
    }
}
