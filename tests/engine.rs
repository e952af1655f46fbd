//! The engine against real files: every planned byte right, on both backings and both readers, over a range of budgets.

mod common;

use flea::engine::{BudgetSpec, Model, OpenOptions};
use flea::io::{ReaderKind, ReaderOptions};
use flea::mem::Backing;
use flea::units::MIB;
use flea::{ErrorKind, plan};
use std::path::{Path, PathBuf};
use std::time::Duration;

fn small_model() -> PathBuf {
    common::small_llama("engine", "12", &[])
}

fn options(pool_bytes: u64) -> OpenOptions {
    OpenOptions {
        budget: BudgetSpec::Pool(pool_bytes),
        ..OpenOptions::default()
    }
}

/// The smallest pool that this model plans with.
fn smallest(path: &Path, page_bytes: u64) -> u64 {
    let (catalog, _) = flea::engine::read_catalog(path).expect("a model");
    let options = plan::PlanOptions {
        slots_count: 3,
        page_bytes,
    };
    plan::smallest_budget_bytes(&catalog, &options).expect("it can be planned")
}

/// Compares every byte of an acquired layer with the file.
fn check_layer(model: &Model, path: &Path, layer: u32) {
    let layer = &model.catalog().layers[layer as usize];
    common::check_layer(layer, path, |shard, offset| model.address(shard, offset));
}

fn walk(model: &Model, path: &Path, passes: u32) {
    for _ in 0..passes {
        for layer in 0..model.catalog().layers.len() as u32 {
            model.acquire(layer, None, None).expect("acquire");
            assert_eq!(
                model.layer_of(
                    model.address(
                        0,
                        model.catalog().layers[layer as usize].uses[0]
                            .extent
                            .offset_bytes
                    ) as usize
                ),
                Some(layer)
            );
            check_layer(model, path, layer);
            model.release(layer).expect("release");
        }
    }
}

#[test]
fn every_byte_is_right_at_every_budget_on_both_backings_and_readers() {
    let path = small_model();
    for (backing, kind, page_bytes) in [
        (Backing::Private, ReaderKind::IoUring, 4096),
        (Backing::Private, ReaderKind::Pread, 2 * MIB),
        (Backing::Shared, ReaderKind::IoUring, 4096),
        (Backing::Shared, ReaderKind::Pread, 4096),
    ] {
        let least = smallest(&path, page_bytes);
        let model_bytes = std::fs::metadata(&path).expect("metadata").len();
        // On 2 MiB pages this small model is all straddling pages: it is resident or refused.
        let budgets = if page_bytes == 4096 {
            vec![
                least,
                least + model_bytes / 10,
                model_bytes / 2 + least / 2,
                model_bytes + 64 * MIB,
            ]
        } else {
            vec![least, model_bytes + 64 * MIB]
        };
        for pool_bytes in budgets {
            let model = Model::open(
                &path,
                OpenOptions {
                    backing,
                    page_bytes: Some(page_bytes),
                    reader: ReaderOptions {
                        kind,
                        ..ReaderOptions::default()
                    },
                    ..options(pool_bytes)
                },
            )
            .unwrap_or_else(|error| {
                panic!("{backing:?} {kind:?} {page_bytes} {pool_bytes}: {error}")
            });
            walk(&model, &path, 3);
            let (plan, stats) = (model.plan().expect("planned"), model.stats());
            assert!(plan.resident_bytes + plan.ring_bytes <= pool_bytes);
            let layers = plan.layers.len() as u64;
            assert_eq!(stats.acquires, 3 * layers);
            assert_eq!(stats.reader, kind);
            assert_eq!(stats.mispredicts, 0);
            let transient = plan
                .layers
                .iter()
                .filter(|layer| layer.transient.is_some())
                .count() as u64;
            if pool_bytes < model_bytes && page_bytes == 4096 {
                assert!(transient > 0 && plan.streamed_bytes_per_pass > 0);
                // Three passes and at most the ring read ahead of a fourth.
                assert!(
                    stats.loads >= 3 * transient - u64::from(plan.slots_count),
                    "{stats:?}"
                );
                assert!(
                    stats.loads <= 3 * transient + u64::from(plan.slots_count),
                    "{stats:?}"
                );
            } else {
                assert_eq!(
                    (stats.loads, transient, plan.streamed_bytes_per_pass),
                    (0, 0, 0)
                );
            }
        }
    }
}

#[test]
fn threads_in_different_places_all_progress() {
    let path = small_model();
    let model = Model::open(&path, options(smallest(&path, 4096) + MIB)).expect("open");
    let layers = model.catalog().layers.len() as u32;
    std::thread::scope(|scope| {
        for thread in 0..5u32 {
            let (model, path) = (&model, &path);
            scope.spawn(move || {
                for step in 0..2 * layers {
                    let layer = (step * (1 + thread % 3) + thread * 3) % layers;
                    model
                        .acquire(layer, None, Some(Duration::from_secs(30)))
                        .expect("acquire");
                    check_layer(model, path, layer);
                    model.release(layer).expect("release");
                }
            });
        }
    });
    let stats = model.stats();
    assert_eq!(
        (stats.acquires, stats.releases),
        (u64::from(10 * layers), u64::from(10 * layers))
    );
}

#[test]
fn several_models_stream_in_one_process() {
    let path = small_model();
    let pool_bytes = smallest(&path, 4096);
    let models: Vec<Model> = (0..3)
        .map(|_| Model::open(&path, options(pool_bytes)).expect("open"))
        .collect();
    std::thread::scope(|scope| {
        for model in &models {
            let path = &path;
            scope.spawn(move || walk(model, path, 2));
        }
    });
    assert!(models.iter().all(|model| model.stats().loads > 0));
}

#[test]
fn a_range_of_a_layer_can_be_acquired() {
    let path = small_model();
    let model = Model::open(&path, options(smallest(&path, 4096))).expect("open");
    let last = model.catalog().layers.len() as u32 - 1;
    for layer in [last, 3, 0] {
        let extent = model.catalog().layers[layer as usize].uses[0].extent;
        let address = model.address(extent.shard_index, extent.offset_bytes) as usize;
        model
            .acquire(layer, Some((address, extent.len_bytes as usize)), None)
            .expect("its own bytes");
        model.release(layer).expect("release");
        let beyond = model
            .acquire(layer, Some((address, 1 << 40)), None)
            .unwrap_err();
        assert_eq!(beyond.kind(), ErrorKind::Invalid);
    }
    assert_eq!(
        model.acquire(0, Some((4096, 1)), None).unwrap_err().kind(),
        ErrorKind::Invalid
    );
}

#[test]
fn misuse_is_an_error_and_never_a_hang() {
    let path = small_model();
    let model = Model::open(&path, options(smallest(&path, 4096))).expect("open");
    let layers = model.catalog().layers.len() as u32;
    assert_eq!(
        model.acquire(layers, None, None).unwrap_err().kind(),
        ErrorKind::Invalid
    );
    assert_eq!(model.release(0).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(
        model.hint(&[0, layers]).unwrap_err().kind(),
        ErrorKind::Invalid
    );
    let plan = model.plan().expect("planned");
    let streamed: Vec<u32> = (0..layers)
        .filter(|layer| plan.layers[*layer as usize].transient.is_some())
        .collect();
    for layer in &streamed[..3] {
        model.acquire(*layer, None, None).expect("acquire");
    }
    let busy = model.acquire(streamed[4], None, None).unwrap_err();
    assert_eq!(
        busy.kind(),
        ErrorKind::Busy,
        "three slots are held by this thread: {busy}"
    );
    // Another thread holds nothing, so it may wait; the time it gives is kept.
    std::thread::scope(|scope| {
        let other =
            scope.spawn(|| model.acquire(streamed[4], None, Some(Duration::from_millis(50))));
        assert_eq!(
            other.join().expect("no panic").unwrap_err().kind(),
            ErrorKind::Timeout
        );
    });
    model.release(streamed[1]).expect("release");
    model
        .acquire(streamed[4], None, Some(Duration::from_secs(30)))
        .expect("a slot is free now");
}

#[test]
fn a_try_starts_the_read_and_says_again() {
    let path = small_model();
    let model = Model::open(&path, options(smallest(&path, 4096))).expect("open");
    let last = model.catalog().layers.len() as u32 - 2;
    let mut tries = 0;
    while let Err(error) = model.acquire(last, None, Some(Duration::ZERO)) {
        assert_eq!(error.kind(), ErrorKind::Again);
        tries += 1;
        assert!(tries < 10_000, "the layer never arrives");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(tries > 0, "the last layer cannot have been there at once");
    check_layer(&model, &path, last);
}

#[test]
fn a_budget_too_small_is_refused_with_the_arithmetic() {
    let path = small_model();
    let least = smallest(&path, 4096);
    let error = Model::open(&path, options(least - 4096)).unwrap_err();
    assert_eq!(
        (error.kind(), error.kind().exit_code()),
        (ErrorKind::Refused, 4),
        "{error}"
    );
    assert!(error.to_string().contains("smallest"), "{error}");
    Model::open(&path, options(least)).expect("the smallest budget works");
}

#[test]
fn a_deferred_plan_counts_what_the_host_reserved() {
    let path = small_model();
    let options = OpenOptions {
        defer_plan: true,
        budget: BudgetSpec::Memory("900M".parse().expect("a size")),
        ..OpenOptions::default()
    };
    options
        .host_pending_bytes
        .store(500 * MIB, std::sync::atomic::Ordering::Release);
    let model = Model::open(&path, options).expect("open");
    assert!(model.plan().is_none());
    model.acquire(0, None, None).expect("acquire");
    let budget = model.budget().expect("planned");
    assert_eq!(budget.total_bytes, 900 * MIB);
    assert!(budget.host_bytes >= 532 * MIB, "{budget:?}");
    assert_eq!(
        budget.weight_budget_bytes,
        budget.total_bytes - budget.host_bytes
    );
}

#[test]
fn a_file_cut_while_streaming_is_an_error_with_its_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("cut.gguf");
    std::fs::copy(small_model(), &path).expect("copy");
    let model = Model::open(&path, options(smallest(&path, 4096))).expect("open");
    walk(&model, &path, 1);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open");
    file.set_len(1 << 20).expect("truncate");
    let layers = model.catalog().layers.len() as u32;
    let error = (0..2 * layers)
        .find_map(|step| {
            let layer = step % layers;
            let result = model.acquire(layer, None, Some(Duration::from_secs(30)));
            if result.is_ok() {
                model.release(layer).expect("release");
            }
            result.err()
        })
        .expect("a truncated file must not go unnoticed");
    assert!(
        matches!(error.kind(), ErrorKind::Truncated | ErrorKind::Changed),
        "{error:?}"
    );
    assert_eq!(error.kind().exit_code(), 5);
    assert!(error.to_string().contains("cut.gguf"), "{error}");
}

#[test]
fn who_only_tries_is_told_of_a_failure_too() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("cut.gguf");
    std::fs::copy(small_model(), &path).expect("copy");
    let model = Model::open(&path, options(smallest(&path, 4096))).expect("open");
    walk(&model, &path, 1);
    let file = std::fs::OpenOptions::new().write(true).open(&path);
    file.expect("open").set_len(1 << 20).expect("truncate");
    let last = model.catalog().layers.len() as u32 - 1;
    // What is in memory stays good: first the ring has to go on to other layers.
    let began = std::time::Instant::now();
    let error = (0..=last).cycle().find_map(|layer| {
        assert!(began.elapsed() < Duration::from_secs(30), "nothing is said");
        let result = model.acquire(layer, None, Some(Duration::ZERO));
        match result {
            Ok(()) => model.release(layer).map(|()| None).expect("release"),
            Err(error) if error.kind() == ErrorKind::Again => None,
            Err(error) => Some(error),
        }
    });
    let error = error.expect("an error");
    assert!(
        matches!(error.kind(), ErrorKind::Truncated | ErrorKind::Changed),
        "{error:?}"
    );
}

#[test]
fn a_file_deleted_while_streaming_goes_on() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("gone.gguf");
    let original = small_model();
    std::fs::copy(&original, &path).expect("copy");
    let model = Model::open(&path, options(smallest(&path, 4096))).expect("open");
    std::fs::remove_file(&path).expect("delete");
    walk(&model, &original, 2);
    assert!(model.stats().loads > 0);
}

#[test]
fn closing_gives_everything_back() {
    let path = small_model();
    let count = |what: &str| {
        std::fs::read_to_string(what)
            .map(|text| text.lines().count())
            .unwrap_or(0)
    };
    let fds = || {
        std::fs::read_dir("/proc/self/fd")
            .map(Iterator::count)
            .unwrap_or(0)
    };
    let once = || assert!(walk_and_drop(&path) > 0, "it streamed");
    once();
    let (maps, open) = (count("/proc/self/maps"), fds());
    for _ in 0..5 {
        once();
    }
    // Other tests of this process open and close things meanwhile; a leak of five models would be far more.
    assert!(count("/proc/self/maps") < maps + 400, "mappings leak");
    assert!(fds() < open + 40, "file descriptors leak");
}

fn walk_and_drop(path: &Path) -> u64 {
    let model = Model::open(path, options(smallest(path, 4096))).expect("open");
    walk(&model, path, 1);
    model.stats().loads
}

/// A walk leaves a trace whose reads are exactly the bytes that the drive delivered.
#[test]
fn a_trace_accounts_for_every_byte_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("trace.json");
    let model = common::synth(
        "trace",
        &[
            "--layers", "6", "--embd", "256", "--ffn", "512", "--heads", "4", "--vocab", "800",
        ],
    );
    let walk = |arguments: &[&str]| {
        let mut command = common::flea();
        command.args(["bench", "stream"]).arg(&model);
        command.args(["--passes", "3", "--json", "--trace"]);
        command.arg(&path).args(arguments);
        common::json(&mut command)
    };
    for (reader, memory) in [("io_uring", "60%"), ("pread", "60%"), ("auto", "400%")] {
        let outcome = walk(&["--reader", reader, "--memory", memory]);
        let text = std::fs::read_to_string(&path).expect("the trace");
        let trace: serde_json::Value = serde_json::from_str(&text).expect("valid JSON");
        assert_eq!(trace["otherData"]["dropped_events"], 0);
        let events = trace["traceEvents"].as_array().expect("events");
        let of = |kind: &'static str| events.iter().filter(move |event| event["cat"] == kind);
        let bytes: u64 = of("read")
            .map(|event| event["args"]["bytes"].as_u64().expect("bytes"))
            .sum();
        // What was read ahead when the walk ended may have come back after it was counted; and threads that read count
        // before the stream books what they did: at most what the ring has room for.
        let number = |name: &str| outcome[name].as_u64().expect("a number");
        let counted = number("bytes_read");
        assert!(
            bytes + number("ring_bytes") >= counted && counted > number("ring_bytes"),
            "{bytes} in the trace, {counted} read"
        );
        let acquires = outcome["acquires"].as_u64().expect("acquires");
        assert_eq!(of("compute").count() as u64, acquires);
        assert_eq!(
            of("wait").count() as u64,
            outcome["stalls"].as_u64().expect("stalls")
        );
        assert_monotonic_and_drawable(events);
        for kind in ["read", "wait", "compute"] {
            let named = events.iter().any(|event| {
                event["name"] == "thread_name"
                    && event["args"]["name"]
                        .as_str()
                        .is_some_and(|name| name.starts_with(kind))
            });
            assert!(named, "no lane named {kind}");
        }
    }
    let refused = common::flea()
        .args(["bench", "stream"])
        .arg(&model)
        .args(["--trace", "/no/such/place/t.json"])
        .output()
        .expect("flea runs");
    assert!(!refused.status.success());
}

/// Times never go back, and two events of one lane never overlap.
fn assert_monotonic_and_drawable(events: &[serde_json::Value]) {
    let mut last = 0.0;
    let mut ends = std::collections::HashMap::new();
    for event in events.iter().filter(|event| event["ph"] == "X") {
        let begin = event["ts"].as_f64().expect("ts");
        let end = begin + event["dur"].as_f64().expect("dur");
        assert!(begin >= last && end >= begin, "{event}");
        last = begin;
        let lane = event["tid"].as_u64().expect("tid");
        let before = ends.insert(lane, end).unwrap_or(0.0);
        // A nanosecond is a thousandth here; floats round.
        assert!(
            begin >= before - 0.002,
            "{event} overlaps what ended at {before}"
        );
    }
}

/// Two copies of a model serve one walk: both are read from, every byte is right, and one that is cut is dropped.
#[test]
fn mirrors_share_the_reading() {
    let model = small_model();
    let name = model.file_name().expect("a name");
    let copies = tempfile::tempdir().expect("a directory");
    std::fs::copy(&model, copies.path().join(name)).expect("a copy");
    for (reader, backing) in [("io_uring", "private"), ("pread", "shared")] {
        let mut command = common::flea();
        command.args(["bench", "stream"]).arg(&model);
        command.args(["--memory", "50%", "--passes", "4", "--verify", "--json"]);
        command.args([
            "--request-bytes",
            "64KiB",
            "--depth",
            "4",
            "--reader",
            reader,
        ]);
        command
            .args(["--backing", backing, "--mirror"])
            .arg(copies.path());
        let outcome = common::json(&mut command);
        let mirrors = outcome["mirrors"].as_array().expect("mirrors");
        assert_eq!(mirrors.len(), 2);
        for copy in mirrors {
            assert!(common::number(copy, "bytes_read") > 0.0, "{outcome}");
            assert_eq!(copy["dropped"], false);
        }
        let sum: f64 = mirrors
            .iter()
            .map(|copy| common::number(copy, "bytes_read"))
            .sum();
        assert!(sum >= common::number(&outcome, "bytes_read"), "{outcome}");
        assert!(common::number(&outcome, "verified_bytes") > 0.0);
        assert_eq!(
            outcome["fallbacks"]
                .as_array()
                .expect("fallbacks")
                .iter()
                .filter(|f| *f == "mirror")
                .count(),
            0
        );
    }
    // Another file of that name is no copy.
    std::fs::write(copies.path().join(name), "something else").expect("written");
    let mut command = common::flea();
    command
        .args(["bench", "stream"])
        .arg(&model)
        .arg("--mirror")
        .arg(copies.path());
    let refused = common::output(&mut command);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
}

/// A copy that is written to while it is in use is used no more; the walk goes on, and nothing of the newer file is seen.
#[test]
fn a_mirror_that_is_rewritten_under_a_walk_costs_no_byte() {
    let path = small_model();
    let name = path.file_name().expect("a name");
    for (backing, kind) in [
        (Backing::Private, ReaderKind::IoUring),
        (Backing::Shared, ReaderKind::Pread),
    ] {
        let copies = tempfile::tempdir().expect("a directory");
        let copy = copies.path().join(name);
        std::fs::copy(&path, &copy).expect("a copy");
        let asked = OpenOptions {
            backing,
            page_bytes: Some(4096),
            mirrors: vec![copies.path().to_path_buf()],
            reader: ReaderOptions {
                kind,
                request_bytes: 64 << 10,
                depth: 4,
                ..ReaderOptions::default()
            },
            ..options(smallest(&path, 4096))
        };
        let model = Model::open(&path, asked).expect("open");
        walk(&model, &path, 1);
        // In the middle of a pass, with layers ahead on their way.
        model.acquire(0, None, None).expect("acquire");
        let newer: Vec<u8> = std::fs::read(&copy)
            .expect("read")
            .iter()
            .map(|b| !b)
            .collect();
        std::fs::write(&copy, newer).expect("a newer model");
        model.release(0).expect("release");
        walk(&model, &path, 3);
        let stats = model.stats();
        assert!(stats.mirrors[1].is_dropped, "{:?}", stats.mirrors);
        assert!(stats.mirrors.iter().all(|copy| copy.bytes_read > 0));
        let told = |f: &flea::engine::Fallback| f.kind == flea::engine::FallbackKind::Mirror;
        assert_eq!(stats.fallbacks.iter().filter(|f| told(f)).count(), 1);
    }
}
