//! What a lease costs, in this process and through the daemon: `cargo bench --bench lease`.
//!
//! Ready: acquire and release of a layer that is in memory. Miss: acquire of layers in random order on the smallest pool,
//! the same order in both; the difference is what the daemon adds to the drive. Prints one JSON object.

use flea::engine::{BudgetSpec, OpenOptions};
use flea::mem::Backing;
use flea::proto::Opened;
use flea::proto::opened::Endpoint;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ready_ns(model: &Opened) -> f64 {
    const ROUNDS: u32 = 200_000;
    let layers = model.catalog().layers.len() as u32;
    for layer in 0..layers {
        model.acquire(layer, None, None).expect("acquire");
        model.release(layer).expect("release");
    }
    let began = Instant::now();
    for round in 0..ROUNDS {
        model.acquire(round % layers, None, None).expect("acquire");
        model.release(round % layers).expect("release");
    }
    began.elapsed().as_nanos() as f64 / f64::from(ROUNDS)
}

/// Median time of an acquire that had to wait.
fn miss_us(model: &Opened) -> f64 {
    let layers = model.catalog().layers.len() as u64;
    let mut seed = 0x5eed_u64;
    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..400 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let layer = ((seed >> 33) % layers) as u32;
        // The stream gets to the end of what it reads ahead, so that the drive is idle.
        std::thread::sleep(Duration::from_millis(3));
        let stalls = model.stats().stalls;
        let began = Instant::now();
        model.acquire(layer, None, None).expect("acquire");
        let took = began.elapsed();
        model.release(layer).expect("release");
        if model.stats().stalls > stalls {
            times.push(took);
        }
    }
    times.sort_unstable();
    times[times.len() / 2].as_nanos() as f64 / 1e3
}

fn options(pool_bytes: u64) -> OpenOptions {
    OpenOptions {
        budget: BudgetSpec::Pool(pool_bytes),
        backing: Backing::Shared,
        slots_count: 4,
        ..OpenOptions::default()
    }
}

fn main() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("m.gguf");
    let synth = Command::new(env!("CARGO_BIN_EXE_flea"))
        .args([
            "synth", "--arch", "llama", "--layers", "24", "--embd", "256", "--ffn", "704",
        ])
        .args([
            "--heads",
            "4",
            "--kv-heads",
            "2",
            "--vocab",
            "512",
            "--type",
            "q8_0",
            "-o",
        ])
        .arg(&path)
        .output()
        .expect("flea synth");
    assert!(synth.status.success());
    let (catalog, _) = flea::engine::read_catalog(&path).expect("a model");
    let plan = flea::plan::PlanOptions {
        slots_count: 4,
        page_bytes: 4096,
    };
    let least = flea::plan::smallest_budget_bytes(&catalog, &plan).expect("a plan");
    let socket = directory.path().join("s");
    let child = Command::new(env!("CARGO_BIN_EXE_flead"))
        .arg("--socket")
        .arg(&socket)
        .arg("--models")
        .arg(directory.path())
        .args(["--memory", "256MiB"])
        .spawn()
        .expect("flead");
    let _daemon = Daemon(child);
    std::thread::sleep(Duration::from_millis(500));
    let local = |bytes| Opened::open(&path, &Endpoint::Local, options(bytes)).expect("open");
    let remote = |bytes: u64| {
        set_budget(&socket, bytes);
        let endpoint = Endpoint::Daemon(&socket);
        Opened::open(&path, &endpoint, OpenOptions::default()).expect("attach")
    };
    let all = 128 << 20;
    let (ready_local, ready_daemon) = (ready_ns(&local(all)), ready_ns(&remote(all)));
    let (miss_local, miss_daemon) = (miss_us(&local(least)), miss_us(&remote(least)));
    println!(
        "{}",
        serde_json::json!({
            "ready_acquire_release_ns": { "process": ready_local, "daemon": ready_daemon },
            "miss_us": { "process": miss_local, "daemon": miss_daemon, "added": miss_daemon - miss_local },
        })
    );
}

fn set_budget(socket: &Path, bytes: u64) {
    let mut control = flea::proto::Control::connect(socket).expect("flead answers");
    let answer = control.request("budget", serde_json::json!({ "bytes": bytes }));
    answer.expect("a budget");
}
