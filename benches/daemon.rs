//! The daemon under load: `cargo bench --bench daemon -- [throughput] [pair] [hostile [KIND...]] [soak SECONDS]`.
//!
//! * throughput: GB/s through the daemon as a share of the same engine in this process, the two taking turns.
//! * pair: what the drive delivers for two clients that start together, as a multiple of what it delivers for one.
//! * hostile: the speed of an honest client while others send noise, open connections by the thousand, acquire without
//!   end, never release and write nonsense into their control pages, as a share of its speed alone.
//! * soak: eight client processes on two models, every layer's checksum compared every time; afterwards descriptors,
//!   memory and leases of the daemon have to be back where they were. Anything else ends with an error.
//!
//! Prints one JSON object. Nothing in it is a test of time: whoever runs it judges the figures.

#![allow(unsafe_code)]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/common/daemon.rs"]
mod support;

use flea::engine::board::place;
use flea::engine::{BudgetSpec, OpenOptions};
use flea::mem::SharedWords;
use flea::proto::message::{self, Method};
use flea::proto::opened::Endpoint;
use flea::proto::{Attached, Control, Opened, Socket};
use flea::units::Extent;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::{Daemon, random};

const ROUNDS: usize = 7;
const CLIENTS: usize = 8;
const PHASE: Duration = Duration::from_secs(4);
const HOSTILE: [&str; 5] = ["noise", "connections", "acquires", "miser", "page"];
/// Large enough that a pass takes a good part of a second.
const LARGE: [&str; 14] = [
    "--arch", "llama", "--layers", "24", "--embd", "2048", "--ffn", "5632", "--heads", "16",
    "--vocab", "4096", "--type", "q8_0",
];
const OTHER: [&str; 14] = [
    "--arch", "qwen2", "--layers", "24", "--embd", "1536", "--ffn", "4096", "--heads", "12",
    "--vocab", "4096", "--type", "q4_k_m",
];

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["--child", role, socket, model] = words[..] {
        return child(role, socket.as_ref(), model.as_ref());
    }
    let wanted = |case: &str| words.is_empty() || words.contains(&case);
    let mut answer = serde_json::Map::new();
    if wanted("throughput") {
        answer.insert("throughput".into(), throughput());
    }
    if wanted("pair") {
        answer.insert("pair".into(), pair());
    }
    if wanted("hostile") {
        let named = |kind: &&str| words.contains(kind);
        let all = !HOSTILE.iter().any(&named);
        let kinds: Vec<&str> = HOSTILE
            .into_iter()
            .filter(|kind| all || named(kind))
            .collect();
        answer.insert("hostile".into(), hostile(&kinds));
    }
    let seconds = words.iter().position(|word| *word == "soak");
    if let Some(place) = seconds {
        let seconds = words.get(place + 1).and_then(|text| text.parse().ok());
        answer.insert("soak".into(), soak(seconds.unwrap_or(60)));
    }
    println!("{}", Value::Object(answer));
}

/// Bytes of a model that a budget of half of it leaves to be streamed, and that budget.
fn half(path: &Path) -> u64 {
    std::fs::metadata(path).expect("metadata").len() / 2
}

/// The rates of `ROUNDS` walks of four passes, and what the drive delivered in all.
fn rate(model: &Opened) -> f64 {
    let before = model.stats().bytes_read;
    let began = Instant::now();
    pass(model, 4);
    (model.stats().bytes_read - before) as f64 / 1e9 / began.elapsed().as_secs_f64()
}

fn pass(model: &Opened, count: u32) {
    for _ in 0..count {
        for layer in 0..model.catalog().layers.len() as u32 {
            model.acquire(layer, None, None).expect("acquire");
            model.release(layer).expect("release");
        }
    }
}

fn throughput() -> Value {
    let path = common::synth("bench-large", &LARGE);
    let budget = half(&path);
    let daemon = Daemon::start(&[]);
    daemon.budget(budget);
    let endpoint = Endpoint::Daemon(&daemon.socket);
    let remote = Opened::open(&path, &endpoint, OpenOptions::default()).expect("attach");
    let options = OpenOptions {
        budget: BudgetSpec::Pool(budget),
        ..OpenOptions::default()
    };
    let local = Opened::open(&path, &Endpoint::Local, options).expect("open");
    pass(&local, 2);
    pass(&remote, 2);
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let before = rate(&local);
        let through = rate(&remote);
        let after = rate(&local);
        rounds.push(
            json!({ "process_gb_per_second": [before, after], "daemon_gb_per_second": through,
            "ratio": through / ((before + after) / 2.0) }),
        );
    }
    let ratios = rounds.iter().filter_map(|round| round["ratio"].as_f64());
    json!({ "median_ratio": median(ratios.collect()), "rounds": rounds })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn delivered(daemon: &Daemon) -> u64 {
    let models = daemon.status().models;
    models.iter().map(|model| model.bytes_read_total).sum()
}

fn pair() -> Value {
    let path = common::synth("bench-large", &LARGE);
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let daemon = Daemon::start(&[]);
        daemon.budget(half(&path));
        let attach = || {
            let endpoint = Endpoint::Daemon(&daemon.socket);
            Opened::open(&path, &endpoint, OpenOptions::default()).expect("attach")
        };
        let (first, second) = (attach(), attach());
        pass(&first, 1);
        let before = delivered(&daemon);
        pass(&first, 6);
        let alone = delivered(&daemon) - before;
        let before = delivered(&daemon);
        std::thread::scope(|scope| {
            for model in [&first, &second] {
                scope.spawn(|| pass(model, 6));
            }
        });
        let both = delivered(&daemon) - before;
        assert!(alone > 0, "it streams");
        ratios.push(both as f64 / alone as f64);
    }
    json!({ "median_ratio": median(ratios.clone()), "ratios": ratios })
}

/// A process of this program in another role. It ends when its standard input does.
fn start(role: &str, socket: &Path, model: &Path) -> Child {
    Command::new(std::env::current_exe().expect("this program"))
        .args(["--child", role])
        .arg(socket)
        .arg(model)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a client")
}

fn child(role: &str, socket: &Path, model: &Path) {
    // The parent's end closes also when the parent is killed.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    match role {
        "count" => count_layers(socket, model),
        "check" => check_layers(socket, model),
        "noise" => noise(socket),
        "connections" => connections(socket),
        "acquires" => acquires(socket, model),
        "miser" => miser(socket, model),
        "page" => page(socket, model),
        role => panic!("{role} is no role"),
    }
}

/// One byte on stdout for each layer.
fn count_layers(socket: &Path, path: &Path) {
    let model = Attached::open(socket, path).expect("attached");
    let mut stdout = std::io::stdout();
    loop {
        for layer in 0..model.catalog().layers.len() as u32 {
            model.acquire(layer, None, None).expect("acquire");
            model.release(layer).expect("release");
            stdout
                .write_all(b".")
                .and_then(|()| stdout.flush())
                .expect("stdout");
        }
    }
}

/// Mixes 64 bits at a time, so that a word that is wrong, missing or elsewhere changes the sum.
fn checksum(sum: u64, bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(8);
    let mut sum = sum;
    for word in &mut words {
        let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
        sum = (sum ^ word)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29);
    }
    let mix = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    words.remainder().iter().fold(sum, mix)
}

/// The checksum of a layer: of the bytes that `part` gives for each of its extents.
fn layer_sum(model: &Attached, layer: u32, part: &mut dyn FnMut(Extent) -> u64) -> u64 {
    let parts = &model.catalog().layers[layer as usize].uses;
    parts.iter().fold(layer.into(), |sum: u64, one| {
        sum.rotate_left(7) ^ part(one.extent)
    })
}

/// Compares every layer with the file until it is ended; one byte on stdout for each that was right.
fn check_layers(socket: &Path, path: &Path) {
    let model = Attached::open(socket, path).expect("attached");
    let file = std::fs::File::open(path).expect("the model");
    let layers = model.catalog().layers.len() as u32;
    let mut bytes = Vec::new();
    let mut from_file = |extent: Extent| {
        bytes.resize(extent.len_bytes as usize, 0);
        file.read_exact_at(&mut bytes, extent.offset_bytes)
            .expect("read");
        checksum(0, &bytes)
    };
    let expected: Vec<u64> = (0..layers)
        .map(|layer| layer_sum(&model, layer, &mut from_file))
        .collect();
    let mut streamed = |extent: Extent| {
        let address = model.address(extent.shard_index, extent.offset_bytes);
        // SAFETY: called for layers that are held, whose bytes are mapped and stay.
        let bytes = unsafe { std::slice::from_raw_parts(address, extent.len_bytes as usize) };
        checksum(0, bytes)
    };
    let mut stdout = std::io::stdout();
    loop {
        for layer in 0..layers {
            model.acquire(layer, None, None).expect("acquire");
            let sum = layer_sum(&model, layer, &mut streamed);
            model.release(layer).expect("release");
            let right = if sum == expected[layer as usize] {
                b"."
            } else {
                b"X"
            };
            stdout
                .write_all(right)
                .and_then(|()| stdout.flush())
                .expect("stdout");
        }
    }
}

fn noise(socket: &Path) {
    let mut seed = 0xbad_5eed;
    loop {
        let Ok(connection) = Socket::connect(socket, Duration::from_secs(1)) else {
            continue;
        };
        for _ in 0..8 {
            let len = random(&mut seed, 60_000) as usize + 1;
            let noise: Vec<u8> = (0..len).map(|_| random(&mut seed, 256) as u8).collect();
            let _ = connection.send(&noise, &[], true);
        }
    }
}

fn connections(socket: &Path) {
    loop {
        let crowd: Vec<_> = (0..1000)
            .map(|_| Socket::connect(socket, Duration::from_millis(20)).ok())
            .collect();
        drop(crowd);
    }
}

fn acquires(socket: &Path, path: &Path) {
    loop {
        let Ok(model) = Attached::open(socket, path) else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        while model.acquire(0, None, Some(Duration::from_secs(1))).is_ok()
            && model.release(0).is_ok()
        {}
    }
}

fn miser(socket: &Path, path: &Path) {
    loop {
        let Ok(model) = Attached::open(socket, path) else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        for layer in 0..model.catalog().layers.len() as u32 {
            let _ = model.acquire(layer, None, Some(Duration::from_millis(1)));
        }
        std::thread::sleep(Duration::from_secs(2));
    }
}

fn page(socket: &Path, path: &Path) {
    let mut seed = 0x11a5;
    loop {
        let attach = |liar: &mut Control| liar.exchange(Method::Attach, &json!({ "path": path }));
        let Some(packet) = Control::connect(socket)
            .ok()
            .and_then(|mut liar| attach(&mut liar).ok())
        else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        let Ok(attached) = message::parse_reply(&packet.bytes) else {
            continue;
        };
        let layers = attached["layers"].as_u64().expect("layers") as u32;
        let mut descriptors = packet.descriptors.into_iter().skip(1);
        let page_fd = descriptors.next().expect("a page");
        let page = SharedWords::map(page_fd, place::page_count(layers), true).expect("the page");
        let kick = descriptors.next().expect("an eventfd");
        for _ in 0..1000 {
            for index in 0..page.count() {
                page.store(index, random(&mut seed, 1 << 32) as u32);
            }
            let _ = nix::unistd::write(&kick, &1u64.to_ne_bytes());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Counts what a child writes: dots, and anything else.
struct Counted {
    child: Child,
    dots: Arc<AtomicU64>,
    others: Arc<AtomicU64>,
}

fn counted(role: &str, socket: &Path, model: &Path) -> Counted {
    let mut child = start(role, socket, model);
    let mut stdout = child.stdout.take().expect("stdout");
    let (dots, others) = (Arc::default(), Arc::default());
    let (dot, other): (Arc<AtomicU64>, Arc<AtomicU64>) = (Arc::clone(&dots), Arc::clone(&others));
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(len @ 1..) = stdout.read(&mut buffer) {
            let right = buffer[..len].iter().filter(|byte| **byte == b'.').count();
            dot.fetch_add(right as u64, Ordering::Relaxed);
            other.fetch_add((len - right) as u64, Ordering::Relaxed);
        }
    });
    Counted {
        child,
        dots,
        others,
    }
}

fn end(mut child: Child) {
    drop(child.stdin.take());
    child.wait().expect("wait");
}

fn hostile(kinds: &[&str]) -> Value {
    let path = common::synth("bench-large", &LARGE);
    let mut daemon = Daemon::start(&[("FLEA_LIMITS_LEASE_TIMEOUT", "1s")]);
    daemon.budget(half(&path));
    let honest = counted("count", &daemon.socket, &path);
    while honest.dots.load(Ordering::Relaxed) < 48 {
        std::thread::sleep(Duration::from_millis(50));
    }
    let speed = || {
        let (before, began) = (honest.dots.load(Ordering::Relaxed), Instant::now());
        std::thread::sleep(PHASE);
        (honest.dots.load(Ordering::Relaxed) - before) as f64 / began.elapsed().as_secs_f64()
    };
    let mut answer = serde_json::Map::new();
    for kind in kinds {
        let mut ratios = Vec::new();
        let mut before = speed();
        for _ in 0..3 {
            let others = start(kind, &daemon.socket, &path);
            let during = speed();
            end(others);
            let after = speed();
            ratios.push(during / ((before + after) / 2.0));
            before = after;
        }
        answer.insert(
            (*kind).into(),
            json!({ "median_ratio": median(ratios.clone()), "ratios": ratios }),
        );
    }
    end(honest.child);
    assert!(daemon.alive(), "the daemon has ended");
    Value::Object(answer)
}

/// What the daemon holds: descriptors, and KiB of its own memory beside the pool.
fn holds(daemon: &Daemon) -> (usize, u64) {
    let directory = PathBuf::from(format!("/proc/{}", daemon.pid()));
    let status = std::fs::read_to_string(directory.join("status")).expect("status");
    let anonymous = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = anonymous.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok());
    let files = std::fs::read_dir(directory.join("fd")).expect("fd").count();
    (files, kib.expect("RssAnon"))
}

fn soak(seconds: u64) -> Value {
    let models = [
        common::synth("bench-large", &LARGE),
        common::synth("bench-other", &OTHER),
    ];
    let mut daemon = Daemon::start(&[]);
    daemon.budget(models.iter().map(|path| half(path)).sum());
    let gone = |daemon: &Daemon| {
        daemon.until("all clients are gone", Duration::from_secs(10), |status| {
            status.clients.is_empty() && status.connections <= 1
        });
    };
    // Once round first: what the daemon allocates for its first clients it may keep.
    for path in &models {
        let first = counted("check", &daemon.socket, path);
        while first.dots.load(Ordering::Relaxed) < 48 {
            std::thread::sleep(Duration::from_millis(50));
        }
        end(first.child);
    }
    gone(&daemon);
    let before = holds(&daemon);
    let clients: Vec<Counted> = (0..CLIENTS)
        .map(|index| counted("check", &daemon.socket, &models[index % models.len()]))
        .collect();
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(seconds) {
        std::thread::sleep(Duration::from_secs(1));
        assert!(daemon.alive(), "the daemon has ended");
    }
    let mut checked = Vec::new();
    for mut client in clients {
        assert!(
            client.child.try_wait().expect("wait").is_none(),
            "a client has ended"
        );
        end(client.child);
        assert_eq!(
            client.others.load(Ordering::Relaxed),
            0,
            "a checksum was wrong"
        );
        checked.push(client.dots.load(Ordering::Relaxed));
    }
    gone(&daemon);
    let after = holds(&daemon);
    assert!(
        checked.iter().all(|count| *count > 0),
        "a client starved: {checked:?}"
    );
    assert!(after.0 <= before.0, "descriptors: {before:?}, {after:?}");
    assert!(
        after.1 <= before.1 + 4096,
        "KiB of memory: {before:?}, {after:?}"
    );
    json!({ "seconds": seconds, "layers_checked": checked, "wrong": 0, "descriptors": [before.0, after.0],
        "memory_kib": [before.1, after.1], "leases_left": 0, "bytes_read": delivered(&daemon) })
}
