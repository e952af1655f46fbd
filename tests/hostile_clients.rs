//! What a client that keeps its layers, or asks for the same one without end, costs the others: counted, not timed.

mod common;
#[path = "common/daemon.rs"]
mod support;

use flea::proto::Attached;
use flea::proto::snapshot::ModelState;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::{Daemon, walk};

/// 16 layers and a head.
fn model() -> PathBuf {
    common::synth(
        "hostile-clients",
        &[
            "--arch",
            "llama",
            "--layers",
            "16",
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
    )
}

/// A daemon with the smallest pool that the model works with, and a client of it.
fn daemon(path: &Path, settings: &[(&'static str, &'static str)]) -> (Daemon, Attached) {
    let daemon = Daemon::start(settings);
    let honest = daemon.attach(path);
    daemon.budget(only_model(&daemon).smallest_budget_bytes);
    (daemon, honest)
}

fn only_model(daemon: &Daemon) -> ModelState {
    let status = daemon.status();
    assert_eq!(status.models.len(), 1, "{status:?}");
    status.models[0].clone()
}

/// A client in a process of its own; what it is asked and what it says go line by line.
struct Hostile {
    child: Child,
    asked: ChildStdin,
    said: BufReader<ChildStdout>,
}

impl Hostile {
    fn start(role: &str, daemon: &Daemon, path: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "child_process", "--nocapture"])
            .env("CHILD_ROLE", role)
            .env("CHILD_SOCKET", &daemon.socket)
            .env("CHILD_MODEL", path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a child");
        let said = BufReader::new(child.stdout.take().expect("stdout"));
        let asked = child.stdin.take().expect("stdin");
        Self { child, asked, said }
    }

    /// Its next word on what it was asked to do; the test harness around it says other things.
    fn says(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(
                self.said.read_line(&mut line).expect("a line") > 0,
                "it has ended"
            );
            if let Some((_, word)) = line.trim_end().split_once("child: ") {
                return word.to_owned();
            }
        }
    }
}

impl Hostile {
    /// How often it had its layer.
    fn count(&mut self) -> u64 {
        self.asked.write_all(b"\n").expect("it listens");
        self.says().parse().expect("a count")
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test by itself: the process that [`Hostile::start`] starts.
#[test]
fn child_process() {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let (Some(role), Some(socket), Some(path)) = (
        variable("CHILD_ROLE"),
        variable("CHILD_SOCKET"),
        variable("CHILD_MODEL"),
    ) else {
        return;
    };
    match role.to_str() {
        Some("miser") => miser(&socket, &path),
        Some("spinner") => spinner(&socket, &path),
        role => panic!("{role:?} is no role"),
    }
}

fn miser(socket: &Path, path: &Path) {
    let model = Attached::open(socket, path).expect("attached");
    for layer in [0, 1] {
        model.acquire(layer, None, None).expect("acquire");
    }
    println!("child: holds");
    let error = loop {
        match model.acquire(0, None, None) {
            Ok(()) => model.release(0).expect("release"),
            Err(error) => break error,
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    println!("child: lost {}", error.kind().name());
    drop(model);
    let refused = Attached::open(socket, path).expect_err("it has to wait");
    println!("child: {} {refused}", refused.kind().name());
    while Attached::open(socket, path).is_err() {
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("child: again");
    std::thread::sleep(Duration::from_secs(60));
}

/// Says how often it had the layer whenever it is asked.
fn spinner(socket: &Path, path: &Path) {
    let model = Attached::open(socket, path).expect("attached");
    let had = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for line in std::io::stdin().lines() {
                line.expect("a line");
                println!("child: {}", had.load(Ordering::Relaxed));
            }
        });
        loop {
            model.acquire(0, None, None).expect("acquire");
            model.release(0).expect("release");
            had.fetch_add(1, Ordering::Relaxed);
        }
    });
}

#[test]
fn who_keeps_his_layers_is_passed_by_given_up_and_waits() {
    let path = model();
    let (daemon, honest) = daemon(&path, &[("FLEA_LIMITS_LEASE_TIMEOUT", "500ms")]);
    walk(&honest, &path, 1);
    let before = only_model(&daemon);
    assert_eq!(before.away_loads_total, 0, "{before:?}");
    let mut miser = Hostile::start("miser", &daemon, &path);
    assert_eq!(miser.says(), "holds");
    // Nobody has been given up yet when the first passes are over: those layers came into other slots.
    let began = Instant::now();
    while daemon.status().revoked_total == 0 {
        walk(&honest, &path, 1);
        assert!(began.elapsed() < Duration::from_secs(20), "it keeps them");
    }
    let passed = only_model(&daemon);
    assert!(
        passed.away_loads_total > u64::from(passed.layers) / 4,
        "{passed:?}"
    );
    assert_eq!(miser.says(), "lost REVOKED");
    let refused = miser.says();
    assert!(
        refused.starts_with("REVOKED") && refused.contains("may attach again in"),
        "{refused}"
    );
    let status = daemon.status();
    assert_eq!((status.revoked_total, status.barred), (1, 1), "{status:?}");
    assert!(status.refused_total > 0, "{status:?}");
    // Others come and go meanwhile, and every layer is at home again.
    walk(&honest, &path, 1);
    let before = only_model(&daemon).away_loads_total;
    walk(&daemon.attach(&path), &path, 1);
    walk(&honest, &path, 1);
    assert_eq!(only_model(&daemon).away_loads_total, before);
    assert_eq!(miser.says(), "again");
    assert_eq!(daemon.status().barred, 0);
}

#[test]
fn who_asks_for_one_layer_without_end_is_not_read_for_without_end() {
    let path = model();
    let (daemon, honest) = daemon(&path, &[]);
    walk(&honest, &path, 2);
    let mut spinner = Hostile::start("spinner", &daemon, &path);
    let began = Instant::now();
    let more_than = |spinner: &mut Hostile, least: u64, walks: bool| {
        while spinner.count() <= least {
            if walks {
                walk(&honest, &path, 1);
            }
            assert!(began.elapsed() < Duration::from_secs(30), "it is forgotten");
        }
    };
    more_than(&mut spinner, 0, true);
    let before = only_model(&daemon);
    let passes = 20;
    walk(&honest, &path, passes as u32);
    let after = only_model(&daemon);
    let read = after.bytes_read_total - before.bytes_read_total;
    let needed = passes * after.streamed_bytes_per_pass;
    assert!(
        needed > 0 && read * 4 <= needed * 5,
        "{read} bytes for {needed}"
    );
    assert!(after.put_off_total > before.put_off_total, "{after:?}");
    let had = spinner.count();
    more_than(&mut spinner, had, true);
    // And alone it has the layer as often as it likes.
    let had = spinner.count();
    more_than(&mut spinner, had + 100_000, false);
    assert_eq!(daemon.status().revoked_total, 0);
}
