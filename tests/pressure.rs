//! Memory pressure for real: in a memory cgroup that another program fills up, flead makes room before the kernel kills
//! anyone, its client reads right bytes all the time, and the pool grows back when the other program is gone.

#![cfg(feature = "cli")]

mod common;
#[path = "common/daemon.rs"]
mod support;

use common::skip;
use flea::proto::snapshot::{Pressure, Snapshot};
use flea::proto::{Attached, Control, message};
use flea::tools::suite::cgroup::Cgroup;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// What flead and the other program may hold together.
const LIMIT_BYTES: u64 = 512 * MIB;
/// What the other program takes, 4 MiB every 20 ms: with half of the reserve more than the limit has left beside the
/// model, so that flead must make room; without it less, so that nobody is killed while it does.
const HOG_MIB: u64 = 240;

/// 16 layers of 18 MiB.
fn model() -> PathBuf {
    let arguments = [
        "--arch",
        "llama",
        "--layers",
        "16",
        "--embd",
        "768",
        "--ffn",
        "2304",
        "--heads",
        "12",
        "--kv-heads",
        "4",
        "--vocab",
        "2000",
        "--type",
        "f16",
        "--seed",
        "5",
    ];
    common::synth("pressure", &arguments)
}

/// A program that is ended with the test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn flead(cgroup: &Cgroup, socket: &Path) -> Program {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flead"));
    command
        .arg("--socket")
        .arg(socket)
        .arg("--models")
        .arg(common::models());
    command.args([
        "--memory",
        "280MiB",
        "--set",
        "pressure.reserve=96MiB",
        "--set",
        "pressure.hold=1s",
    ]);
    Program(cgroup.wrap(&command).spawn().expect("flead starts"))
}

/// Takes memory slowly, says "full", and holds it until its stdin closes.
fn hog(cgroup: &Cgroup) -> Program {
    let script = format!(
        "import sys, time\nheld = []\nfor _ in range({}):\n    held.append(bytearray(b'x') * (4 << 20)); time.sleep(0.02)\n\
         print('full', flush=True); sys.stdin.read()",
        HOG_MIB / 4
    );
    let mut command = Command::new("python3");
    command.arg("-c").arg(script);
    let mut inside = cgroup.wrap(&command);
    inside.stdin(Stdio::piped()).stdout(Stdio::piped());
    Program(inside.spawn().expect("the other program starts"))
}

fn status(socket: &Path) -> Snapshot {
    let mut control = Control::connect(socket).expect("flead answers");
    let answer = control.request("status", serde_json::json!({}));
    message::from_value(answer.expect("status")).expect("a snapshot")
}

/// Waits for a state of the daemon.
fn until(socket: &Path, what: &str, seconds: u64, is: impl Fn(&Snapshot) -> bool) -> Snapshot {
    let began = Instant::now();
    loop {
        let now = status(socket);
        if is(&now) {
            return now;
        }
        assert!(
            began.elapsed() < Duration::from_secs(seconds),
            "{what}: {now:?}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn the_pool_makes_room_and_grows_back() {
    if !Command::new("python3")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
    {
        return skip("no python3");
    }
    let path = model();
    let cgroup = match Cgroup::new("pressure", LIMIT_BYTES) {
        Ok(cgroup) => cgroup,
        Err(error) => return skip(&error.to_string()),
    };
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("flea.sock");
    let mut flead = flead(&cgroup, &socket);
    let began = Instant::now();
    while Control::connect(&socket).is_err() {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "flead does not answer"
        );
        std::thread::sleep(Duration::from_millis(20));
    }

    let client = Arc::new(Attached::open(&socket, &path).expect("attached"));
    support::walk(&client, &path, 1);
    let calm = status(&socket);
    assert_eq!(calm.budget_bytes, calm.budget_configured_bytes);
    assert_eq!(
        calm.models[0].streamed_bytes_per_pass, 0,
        "all of it is resident: {calm:?}"
    );
    let pressure = calm.pressure.expect("it is watched");
    assert_eq!(
        (pressure.state.as_str(), pressure.shrinks_total),
        ("calm", 0)
    );

    let stop = Arc::new(AtomicBool::new(false));
    let passes = Arc::new(AtomicU64::new(0));
    let reader = std::thread::spawn({
        let (client, stop, passes, path) = (
            Arc::clone(&client),
            Arc::clone(&stop),
            Arc::clone(&passes),
            path.clone(),
        );
        move || {
            while !stop.load(Ordering::Relaxed) {
                support::walk(&client, &path, 1);
                passes.fetch_add(1, Ordering::Relaxed);
            }
        }
    });

    let mut hog = hog(&cgroup);
    let mut said = [0u8; 4];
    let out = hog.0.stdout.as_mut().expect("its stdout");
    std::io::Read::read_exact(out, &mut said).expect("the other program was killed");
    assert_eq!(&said, b"full");
    // The smaller budget is seen a moment before the count and the reason.
    let shrunk = until(&socket, "it makes room", 20, |now| {
        let told = |pressure: &Pressure| pressure.shrinks_total >= 1 && !pressure.reason.is_empty();
        now.budget_bytes < now.budget_configured_bytes && now.pressure.as_ref().is_some_and(told)
    });
    assert!(
        shrunk.budget_configured_bytes == calm.budget_configured_bytes,
        "{shrunk:?}"
    );
    let streams = |now: &Snapshot| {
        now.models[0].streamed_bytes_per_pass > 0 && now.models[0].state == "ready"
    };
    let shrunk = until(&socket, "it streams more", 20, streams);
    assert!(
        shrunk.pool_bytes < calm.pool_bytes,
        "memory went back: {shrunk:?}"
    );
    let so_far = passes.load(Ordering::Relaxed);
    let later = Instant::now() + Duration::from_secs(20);
    while passes.load(Ordering::Relaxed) < so_far + 2 {
        assert!(
            Instant::now() < later,
            "the client gets on while the pool is small"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(
        hog.0.try_wait().expect("wait").is_none(),
        "the other program still has its memory"
    );

    drop(hog);
    let back = until(&socket, "it grows back", 60, |now| {
        let calm = now
            .pressure
            .as_ref()
            .is_some_and(|pressure| pressure.state == "calm");
        calm && now.budget_bytes == now.budget_configured_bytes && !streams(now)
    });
    assert!(
        back.pressure
            .is_some_and(|pressure| pressure.grows_total >= 1)
    );
    stop.store(true, Ordering::Relaxed);
    reader.join().expect("every byte was right all the time");
    assert_eq!(cgroup.oom_kills(), 0, "nobody was killed");
    assert!(
        flead.0.try_wait().expect("wait").is_none(),
        "flead is alive"
    );
}
