//! What a client that keeps its layers, or asks for the same one without end, or lies, costs the others: counted, not timed.

mod common;
#[path = "common/daemon.rs"]
mod support;

use flea::ErrorKind;
use flea::engine::board::place;
use flea::mem::SharedWords;
use flea::proto::message::{self, Method};
use flea::proto::{Attached, Control, Socket};
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::{Daemon, only_model, open_files, random, smallest, walk};

fn model() -> PathBuf {
    common::small_llama("hostile-clients", "16", &[])
}

/// A daemon with the smallest pool that the model works with, and a client of it.
fn daemon(path: &Path, settings: &[(&'static str, &'static str)]) -> (Daemon, Attached) {
    let daemon = Daemon::start(settings);
    let honest = daemon.attach(path);
    daemon.budget(only_model(&daemon).smallest_budget_bytes);
    (daemon, honest)
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

/// A connection that has said hello, or has not.
fn raw(daemon: &Daemon) -> Socket {
    Socket::connect(&daemon.socket, Duration::from_secs(5)).expect("a connection")
}

#[test]
fn hostile_clients_hurt_nobody_but_themselves() {
    let path = model();
    let mut daemon = Daemon::start(&[]);
    daemon.budget(smallest(&path));
    let stop = Arc::new(AtomicBool::new(false));
    let honest = {
        let (stop, path, socket) = (Arc::clone(&stop), path.clone(), daemon.socket.clone());
        std::thread::spawn(move || {
            let model = Attached::open(&socket, &path).expect("attached");
            let mut passes = 0;
            while !stop.load(Ordering::Relaxed) || passes == 0 {
                walk(&model, &path, 1);
                passes += 1;
            }
            passes
        })
    };
    let mut seed = 0xbad_5eed;
    // Noise instead of packets, of every length, before and after hello.
    for round in 0..200 {
        let socket = raw(&daemon);
        if round % 2 == 0 {
            let hello =
                message::encode_request(Method::Hello, &json!({ "protocol": 1 })).expect("hello");
            let _ = socket.send(&hello, &[], false);
        }
        for _ in 0..4 {
            let len = random(&mut seed, 70_000) as usize + 1;
            let noise: Vec<u8> = (0..len).map(|_| random(&mut seed, 256) as u8).collect();
            let _ = socket.send(&noise, &[], true);
        }
    }
    // Well-formed nonsense.
    for method in Method::ALL {
        for parameters in [
            json!(null),
            json!([]),
            json!({"path": 7}),
            json!({"path": "/etc", "x": 1}),
            json!({"from": u64::MAX}),
            json!({"layer": 4_000_000_000u32}),
            json!({"layers": [4_000_000_000u32]}),
            json!({"model": "\u{0}"}),
            json!({"bytes": 0}),
        ] {
            let mut control = daemon.control();
            let _ = control.call(method, &parameters);
        }
    }
    let mut old = raw(&daemon);
    let hello = message::encode_request(Method::Hello, &json!({ "protocol": 999 })).expect("hello");
    old.send(&hello, &[], false).expect("send");
    let answer = old
        .receive(false, false)
        .expect("an answer")
        .expect("a packet");
    let error = message::parse_reply(&answer.bytes).expect_err("another version");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    old = raw(&daemon);
    old.send(b"{\"method\":\"status\"}", &[], false)
        .expect("send");
    let answer = old
        .receive(false, false)
        .expect("an answer")
        .expect("a packet");
    assert_eq!(
        message::parse_reply(&answer.bytes)
            .expect_err("no hello")
            .kind(),
        ErrorKind::Invalid
    );
    // Descriptors that nobody asked for.
    let null = std::fs::File::open("/dev/null").expect("null");
    let files = open_files(daemon.pid());
    for _ in 0..50 {
        let socket = raw(&daemon);
        use std::os::fd::AsRawFd;
        let _ = socket.send(b"{}", &[null.as_raw_fd(); 3], false);
        let _ = socket.receive(false, false);
    }
    // Connections that only stand there, and ones that leave in the middle.
    let crowd: Vec<Option<Socket>> = (0..400)
        .map(|_| Socket::connect(&daemon.socket, Duration::from_millis(200)).ok())
        .collect();
    daemon_is_well(&daemon, &path);
    drop(crowd);
    for _ in 0..50 {
        let mut control = daemon.control();
        let packet =
            message::encode_request(Method::Attach, &json!({ "path": path })).expect("attach");
        control.socket().send(&packet, &[], false).expect("send");
        if random(&mut seed, 2) == 0 {
            let _ = control.call(Method::Catalog, &json!({}));
        }
    }
    daemon.until("all are gone", Duration::from_secs(10), |s| {
        s.clients.len() <= 1 && s.connections <= 2
    });
    assert!(
        open_files(daemon.pid()) <= files + 2,
        "descriptors are left open"
    );
    assert!(daemon.alive());
    assert!(daemon.status().refused_total > 0);
    stop.store(true, Ordering::Relaxed);
    assert!(honest.join().expect("the honest client never noticed") > 0);
}

/// One more client can still do its work. The crowd may have all places of one user: then it is told so.
fn daemon_is_well(daemon: &Daemon, path: &Path) {
    let began = Instant::now();
    loop {
        match Attached::open(&daemon.socket, path) {
            Ok(model) => return walk(&model, path, 1),
            Err(error) => assert!(
                matches!(error.kind(), ErrorKind::Busy | ErrorKind::Connection),
                "{error}"
            ),
        }
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "those who never said hello stay"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_lying_control_page_is_given_up() {
    let path = model();
    let daemon = Daemon::start(&[]);
    daemon.budget(smallest(&path));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let honest = scope.spawn(|| {
            let model = daemon.attach(&path);
            let mut passes = 0;
            while !stop.load(Ordering::Relaxed) {
                walk(&model, &path, 1);
                passes += 1;
            }
            passes
        });
        let mut seed = 0x11a5;
        for round in 0..4 {
            let mut liar = Control::connect(&daemon.socket).expect("a connection");
            let packet = liar
                .exchange(Method::Attach, &json!({ "path": path }))
                .expect("attach");
            let layers = message::parse_reply(&packet.bytes).expect("attached")["layers"]
                .as_u64()
                .expect("layers") as u32;
            let mut descriptors = packet.descriptors.into_iter();
            let area = SharedWords::map(
                descriptors.next().expect("area"),
                place::area_count(layers),
                false,
            )
            .expect("area");
            let page_fd = descriptors.next().expect("page");
            let page = SharedWords::map(page_fd, place::page_count(layers), true).expect("page");
            let kick = descriptors.next().expect("eventfd");
            area.store(place::state(0), 77);
            let began = Instant::now();
            while page.load(place::REVOKED)
                != u32::try_from(-ErrorKind::Revoked.status()).expect("positive")
                && began.elapsed() < Duration::from_secs(5)
            {
                for index in (0..page.count()).filter(|index| *index != place::REVOKED) {
                    let value = match round {
                        0 => u32::MAX,
                        1 => random(&mut seed, 1 << 32) as u32 | 1,
                        _ => random(&mut seed, 3) as u32 + 1,
                    };
                    page.store(index, value);
                }
                let _ = nix::unistd::write(&kick, &1u64.to_ne_bytes());
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(
                began.elapsed() < Duration::from_secs(5),
                "round {round}: nobody stopped it"
            );
        }
        stop.store(true, Ordering::Relaxed);
        assert!(honest.join().expect("the honest client got right bytes") > 0);
    });
    assert_eq!(daemon.status().revoked_total, 4);
}
