//! The daemon against clients that behave, that die, and that lie: bytes, counters, memory.

mod common;
#[path = "common/daemon.rs"]
mod support;

use flea::ErrorKind;
use flea::proto::Attached;
use flea::proto::message::Method;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::{Daemon, check_layer, only_model, open_files, random, smallest, walk};

fn model() -> PathBuf {
    common::small_llama("daemon", "12", &[])
}

#[test]
fn every_byte_is_right_at_every_budget() {
    let path = model();
    let daemon = Daemon::start(&[]);
    let least = smallest(&path);
    let all = std::fs::metadata(&path).expect("metadata").len();
    for budget in [least, least + all / 10, (least + all) / 2, all + (8 << 20)] {
        daemon.budget(budget);
        let model = daemon.attach(&path);
        assert_eq!(
            model.budget().weight_budget_bytes.min(budget),
            model.budget().weight_budget_bytes
        );
        walk(&model, &path, 3);
        let stats = model.stats();
        let layers = model.catalog().layers.len() as u64;
        assert_eq!((stats.acquires, stats.releases), (3 * layers, 3 * layers));
        let streamed = model.figures().streamed_bytes_per_pass;
        assert_eq!(streamed == 0, budget > all, "budget {budget}");
        assert!(stats.bytes_read >= 2 * streamed, "{stats:?}");
        let held = only_model(&daemon).pool_bytes;
        assert!(held <= budget, "{held} of {budget}");
    }
}

#[test]
fn a_range_is_enough_where_a_range_is_asked_for() {
    let path = model();
    let daemon = Daemon::start(&[]);
    daemon.budget(smallest(&path));
    let model = daemon.attach(&path);
    for layer in 0..model.catalog().layers.len() as u32 {
        for used in model.catalog().layers[layer as usize].uses.clone() {
            let extent = used.extent;
            let address = model.address(extent.shard_index, extent.offset_bytes) as usize;
            assert_eq!(model.layer_of(address), Some(layer));
            let range = (address, extent.len_bytes as usize);
            model
                .acquire(layer, Some(range), None)
                .expect("acquire a range");
            model.acquire(layer, None, None).expect("the rest of it");
            check_layer(&model, &path, layer);
            model.release(layer).expect("release");
            model.release(layer).expect("release");
        }
    }
    let wrong = model
        .acquire(0, Some((1, 1)), None)
        .expect_err("no such address");
    assert_eq!(wrong.kind(), ErrorKind::Invalid);
    assert_eq!(
        model
            .acquire(999, None, None)
            .expect_err("no such layer")
            .kind(),
        ErrorKind::Invalid
    );
    assert_eq!(
        model.release(0).expect_err("not held").kind(),
        ErrorKind::Invalid
    );
}

#[test]
fn an_acquire_that_does_not_wait_is_answered_at_once_and_served_later() {
    let path = model();
    let daemon = Daemon::start(&[]);
    daemon.budget(smallest(&path));
    let model = daemon.attach(&path);
    let layer = model.catalog().layers.len() as u32 / 2;
    let began = Instant::now();
    while let Err(error) = model.acquire(layer, None, Some(Duration::ZERO)) {
        assert_eq!(error.kind(), ErrorKind::Again);
        assert!(began.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(1));
    }
    check_layer(&model, &path, layer);
    model.release(layer).expect("release");
}

#[test]
fn who_only_tries_is_told_of_a_failure_once_and_may_try_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("m.gguf");
    std::fs::copy(model(), &path).expect("copy");
    let daemon = Daemon::start_in(directory.path(), &[]);
    daemon.budget(smallest(&path));
    let model = daemon.attach(&path);
    walk(&model, &path, 1);
    let file = std::fs::OpenOptions::new().write(true).open(&path);
    file.expect("open").set_len(4096).expect("truncate");
    let layer = model.catalog().layers.len() as u32 / 2;
    let began = Instant::now();
    let mut kinds = Vec::new();
    while kinds
        .iter()
        .filter(|kind| **kind != ErrorKind::Again)
        .count()
        < 2
    {
        match model.acquire(layer, None, Some(Duration::ZERO)) {
            Ok(()) => model.release(layer).expect("release"),
            Err(error) => kinds.push(error.kind()),
        }
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "nothing is said: {kinds:?}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let failures: Vec<_> = kinds.iter().filter(|k| **k != ErrorKind::Again).collect();
    assert!(
        (failures.iter()).all(|kind| matches!(kind, ErrorKind::Truncated | ErrorKind::Changed)),
        "{kinds:?}"
    );
    let again = kinds
        .windows(2)
        .all(|pair| pair.contains(&ErrorKind::Again));
    assert!(again, "each failure answers a try of its own: {kinds:?}");
    assert_eq!(daemon.status().revoked_total, 0);
}

#[test]
fn two_clients_that_start_together_cost_the_drive_one() {
    let path = model();
    let daemon = Daemon::start(&[]);
    daemon.budget((smallest(&path) + std::fs::metadata(&path).expect("metadata").len()) / 2);
    let one = daemon.attach(&path);
    walk(&one, &path, 1);
    let before = only_model(&daemon).bytes_read_total;
    walk(&one, &path, 20);
    let alone = only_model(&daemon).bytes_read_total - before;
    drop(one);
    let together = Barrier::new(2);
    let before = only_model(&daemon).bytes_read_total;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let model = daemon.attach(&path);
                together.wait();
                walk(&model, &path, 20);
            });
        }
    });
    let state = only_model(&daemon);
    let both = state.bytes_read_total - before;
    assert!(alone > 10 * state.streamed_bytes_per_pass, "it streams");
    assert!(
        both * 10 <= alone * 12,
        "two clients read {both}, one {alone}"
    );
}

/// Not a test by itself: the process that [`a_client_that_is_killed_costs_nobody_anything`] starts and kills.
#[test]
fn child_process() {
    let (Some(socket), Some(path)) = (
        std::env::var_os("CHILD_SOCKET"),
        std::env::var_os("CHILD_MODEL"),
    ) else {
        return;
    };
    let model = Attached::open(socket.as_ref(), path.as_ref()).expect("attached");
    let mut seed = u64::from(std::process::id()) | 1;
    loop {
        for layer in 0..model.catalog().layers.len() as u32 {
            model.acquire(layer, None, None).expect("acquire");
            std::thread::sleep(Duration::from_micros(random(&mut seed, 3000)));
            model.release(layer).expect("release");
        }
    }
}

fn child(daemon: &Daemon, path: &Path) -> std::process::Child {
    Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "child_process", "--nocapture"])
        .env("CHILD_SOCKET", &daemon.socket)
        .env("CHILD_MODEL", path)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("a child")
}

#[test]
fn a_client_that_is_killed_costs_nobody_anything() {
    let path = model();
    let daemon = Daemon::start(&[]);
    daemon.budget(smallest(&path));
    let rounds: u32 =
        std::env::var("FLEA_TEST_KILLS").map_or(50, |text| text.parse().expect("a count"));
    let stop = AtomicBool::new(false);
    let passes = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let model = daemon.attach(&path);
            while !stop.load(Ordering::Relaxed) {
                walk(&model, &path, 1);
                passes.fetch_add(1, Ordering::Relaxed);
            }
        });
        daemon.until("the watcher attaches", Duration::from_secs(20), |s| {
            s.clients.len() == 1
        });
        let files = open_files(daemon.pid());
        let mut seed = 0x5eed;
        for _ in 0..rounds {
            let mut victim = child(&daemon, &path);
            daemon.until("the victim attaches", Duration::from_secs(20), |s| {
                s.clients.len() == 2
            });
            std::thread::sleep(Duration::from_millis(random(&mut seed, 30)));
            victim.kill().expect("kill");
            victim.wait().expect("wait");
            // The kernel closes the connection before wait returns: what is left is the daemon's to do.
            daemon.until("its leases are free", Duration::from_millis(100), |s| {
                s.clients.len() == 1
            });
        }
        stop.store(true, Ordering::Relaxed);
        watcher.join().expect("the watcher never noticed");
        assert!(passes.load(Ordering::Relaxed) > 0);
        daemon.until("the watcher is gone", Duration::from_secs(5), |s| {
            s.clients.is_empty()
        });
        assert!(
            open_files(daemon.pid()) <= files,
            "descriptors are left open"
        );
    });
    assert_eq!(daemon.status().revoked_total, 0);
}

#[test]
fn a_daemon_that_is_killed_is_an_error_within_a_second_and_can_be_reached_again() {
    let path = model();
    for budget in [smallest(&path), 64 << 20] {
        let mut daemon = Daemon::start(&[]);
        daemon.budget(budget);
        let model = daemon.attach(&path);
        walk(&model, &path, 1);
        model.acquire(3, None, None).expect("acquire");
        daemon.kill();
        let killed = Instant::now();
        // What is held stays readable.
        check_layer(&model, &path, 3);
        model.release(3).expect("release");
        let error = 'walk: loop {
            for layer in 0..model.catalog().layers.len() as u32 {
                match model.acquire(layer, None, None) {
                    Ok(()) => model.release(layer).expect("release"),
                    Err(error) => break 'walk error,
                }
                assert!(killed.elapsed() < Duration::from_secs(1), "nobody noticed");
            }
        };
        assert_eq!(error.kind(), ErrorKind::Connection, "{error}");
        assert!(killed.elapsed() < Duration::from_secs(1));
        let again = Attached::open(&daemon.socket, &path).expect_err("nobody is there");
        assert_eq!(again.kind(), ErrorKind::Connection);
        assert!(again.context().contains("flea.sock"), "{again}");
        daemon.restart();
        daemon.budget(budget);
        walk(&daemon.attach(&path), &path, 1);
    }
}

#[test]
fn a_client_that_never_releases_is_given_up_and_the_others_go_on() {
    let path = model();
    let daemon = Daemon::start(&[("FLEA_LIMITS_LEASE_TIMEOUT", "1s")]);
    daemon.budget(smallest(&path));
    let miser = daemon.attach(&path);
    let streamed = |layer: &u32| miser.acquire(*layer, None, None).is_ok();
    let held: Vec<u32> = (0..12).filter(streamed).collect();
    assert_eq!(
        held.len(),
        2,
        "a client holds no more than slots - 2: {held:?}"
    );
    let honest = daemon.attach(&path);
    let began = Instant::now();
    while daemon.status().revoked_total == 0 {
        walk(&honest, &path, 1);
        assert!(began.elapsed() < Duration::from_secs(20), "it keeps them");
    }
    assert_eq!(daemon.status().clients.len(), 1);
    let error = miser.acquire(11, None, None).expect_err("revoked");
    assert_eq!(error.kind(), ErrorKind::Revoked);
    assert_eq!(
        miser.hint(&[0]).expect_err("revoked").kind(),
        ErrorKind::Revoked
    );
    drop(miser);
    walk(&honest, &path, 1);
    let refused = Attached::open(&daemon.socket, &path).expect_err("its process has to wait");
    assert_eq!(refused.kind(), ErrorKind::Revoked, "{refused}");
    assert_eq!(daemon.status().barred, 1);
}

#[test]
fn the_budget_changes_while_clients_run() {
    let path = model();
    let daemon = Daemon::start(&[]);
    let all = std::fs::metadata(&path).expect("metadata").len();
    let least = smallest(&path);
    daemon.budget(all + (8 << 20));
    let stop = AtomicBool::new(false);
    let passes = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let model = daemon.attach(&path);
                while !stop.load(Ordering::Relaxed) {
                    walk(&model, &path, 1);
                    passes.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        daemon.until("all attach", Duration::from_secs(20), |s| {
            s.clients.len() == 3
        });
        for round in 0..6 {
            let budget = [least, all + (8 << 20), (least + all) / 2][round % 3];
            daemon.budget(budget);
            let state = only_model(&daemon);
            assert!(
                state.pool_bytes <= budget,
                "{} held of {budget}",
                state.pool_bytes
            );
            assert!(
                shared_bytes(daemon.pid()) <= budget + (4 << 20),
                "memory did not go back"
            );
            let before = passes.load(Ordering::Relaxed);
            let began = Instant::now();
            while passes.load(Ordering::Relaxed) < before + 3 {
                assert!(began.elapsed() < Duration::from_secs(60), "nobody goes on");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let generation = only_model(&daemon).generation;
    assert!(generation >= 6, "{generation} plans");
    let model = daemon.attach(&path);
    let mut control = daemon.control();
    let refused = control.request("budget", json!({ "bytes": 4096 }));
    let refused = refused.expect_err("less than works");
    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert!(refused.context().contains(&least.to_string()), "{refused}");
    walk(&model, &path, 1);
}

/// Shared memory that a process has mapped and filled.
fn shared_bytes(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = text.lines().find_map(|line| line.strip_prefix("RssShmem:"));
    let kib: u64 = line
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .expect("RssShmem")
        .trim()
        .parse()
        .expect("a number");
    kib * 1024
}

#[test]
fn two_models_share_the_memory_and_both_go_on() {
    let one = model();
    let two = common::synth(
        "daemon-two",
        &[
            "--arch",
            "qwen2",
            "--layers",
            "10",
            "--embd",
            "256",
            "--ffn",
            "704",
            "--heads",
            "4",
            "--kv-heads",
            "2",
            "--vocab",
            "2048",
            "--type",
            "q8_0",
        ],
    );
    let daemon = Daemon::start(&[]);
    let budget = smallest(&one) + smallest(&two) + (1 << 20);
    daemon.budget(budget);
    // Only when both are loaded are the plans what they stay.
    let clients = [&one, &two, &one, &two].map(|path| (daemon.attach(path), path));
    std::thread::scope(|scope| {
        for (model, path) in &clients {
            scope.spawn(|| walk(model, path, 5));
        }
    });
    drop(clients);
    let status = daemon.status();
    assert_eq!(status.models.len(), 2);
    assert!(
        status.pool_bytes <= budget && status.planned_bytes <= budget,
        "{status:?}"
    );
    for model in &status.models {
        assert!(
            model.streamed_bytes_per_pass > 0
                && model.bytes_read_total >= 4 * model.streamed_bytes_per_pass,
            "{model:?}"
        );
    }
    // Nobody uses the first any more: it goes when the second wants its memory.
    let mut control = daemon.control();
    control
        .request("unload", json!({ "model": status.models[0].path }))
        .expect("unload");
    let after = daemon.status();
    assert_eq!(after.models.len(), 1);
    assert!(after.models[0].weight_budget_bytes > status.models[1].weight_budget_bytes);
    let error = control
        .request("unload", json!({ "model": "77" }))
        .expect_err("no such model");
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn only_models_in_allowed_directories_are_opened() {
    let path = model();
    let directory = tempfile::tempdir().expect("a directory");
    let inside = directory.path().join("m.gguf");
    std::fs::copy(&path, &inside).expect("copy");
    std::os::unix::fs::symlink(&path, directory.path().join("out.gguf")).expect("link");
    std::os::unix::fs::symlink(&inside, directory.path().join("in.gguf")).expect("link");
    let daemon = Daemon::start_in(directory.path(), &[]);
    walk(&daemon.attach(&inside), &inside, 1);
    walk(
        &daemon.attach(&directory.path().join("in.gguf")),
        &inside,
        1,
    );
    assert_eq!(
        daemon.status().models.len(),
        1,
        "a link is the model it points to"
    );
    let dots = format!(
        "{}/../../../../../../../../../../etc/passwd",
        directory.path().display()
    );
    for (path, kind) in [
        (path.as_path(), ErrorKind::Permission),
        (&directory.path().join("out.gguf"), ErrorKind::Permission),
        (Path::new(&dots), ErrorKind::Permission),
        (Path::new("/etc/passwd"), ErrorKind::Permission),
        (Path::new("/nowhere/at/all"), ErrorKind::Permission),
        (&directory.path().join("missing.gguf"), ErrorKind::NotFound),
    ] {
        let error = Attached::open(&daemon.socket, path).expect_err("refused");
        assert_eq!(error.kind(), kind, "{}: {error}", path.display());
    }
    let relative = daemon
        .control()
        .request("load", json!({ "path": "m.gguf" }));
    assert_eq!(relative.expect_err("relative").kind(), ErrorKind::Invalid);
}

#[test]
fn a_model_that_is_replaced_is_opened_anew_once_nobody_uses_the_old_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("m.gguf");
    std::fs::copy(model(), &path).expect("copy");
    let daemon = Daemon::start_in(directory.path(), &[]);
    let before = daemon.attach(&path);
    walk(&before, &path, 1);
    let mut bytes = std::fs::read(&path).expect("read");
    let half = bytes.len() / 2;
    bytes[half..].iter_mut().for_each(|byte| *byte ^= 0x55);
    let other = directory.path().join("other");
    std::fs::write(&other, bytes).expect("write");
    std::fs::rename(&other, &path).expect("rename");
    let error = Attached::open(&daemon.socket, &path).expect_err("two models of one name");
    assert_eq!(error.kind(), ErrorKind::Changed, "{error}");
    drop(before);
    daemon.until("it left", Duration::from_secs(10), |s| s.clients.is_empty());
    walk(&daemon.attach(&path), &path, 1);
    assert_eq!(daemon.status().models.len(), 1);
}

/// A kick that is left behind wakes nobody; a user's many requests keep nobody's lease waiting.
#[test]
fn a_kick_left_behind_does_not_keep_the_daemon_awake() {
    let path = model();
    let daemon = Daemon::start(&[]);
    let mut control = daemon.control();
    let attach = json!({ "path": path });
    let packet = control.exchange(Method::Attach, &attach).expect("attach");
    let kick = &packet.descriptors[2];
    control.call(Method::Detach, &json!({})).expect("detach");
    nix::unistd::write(kick, &1u64.to_ne_bytes()).expect("kick");
    drop(control);
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).expect("stat");
        let after = stat.rsplit(')').next().expect("fields");
        // utime and stime: fields 14 and 15 of proc(5), of which two and a blank are cut off.
        let field = |index: usize| after.split(' ').nth(index).and_then(|f| f.parse().ok());
        let ticks: [Option<u64>; 2] = [field(12), field(13)];
        ticks[0].expect("utime") + ticks[1].expect("stime")
    };
    let before = ticks();
    std::thread::sleep(Duration::from_secs(2));
    let spent = ticks() - before;
    assert!(
        spent < 60,
        "{spent} of 200 ticks while nobody wants anything"
    );
}
