//! `flea-ctl` against a running flead: each verb, its JSON, its exit code; and a client in another language.

mod common;
#[path = "common/daemon.rs"]
mod support;

use common::{json, number, output, skip};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use support::{Daemon, smallest};

fn model(seed: &str) -> PathBuf {
    common::small_llama("ctl", "10", &["--seed", seed])
}

fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FLEA_") {
            command.env_remove(name);
        }
    }
    command
}

fn flea_ctl() -> Command {
    program(env!("CARGO_BIN_EXE_flea-ctl"))
}

fn ctl(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = flea_ctl();
    command.arg("--socket").arg(&daemon.socket).args(arguments);
    command
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a verb twice: as people see it, and as a program does.
fn both(daemon: &Daemon, arguments: &[&str]) -> (String, Value) {
    let plain = output(&mut ctl(daemon, arguments));
    assert!(plain.status.success(), "{arguments:?}: {}", stderr(&plain));
    let value = json(ctl(daemon, arguments).arg("--json"));
    (stdout(&plain), value)
}

/// A verb that fails: exit code, and the status of its JSON.
fn failure(command: &mut Command, exit_code: i32, status: &str) -> String {
    let output = output(command.arg("--json"));
    assert_eq!(
        output.status.code(),
        Some(exit_code),
        "{command:?}: {}",
        stderr(&output)
    );
    let value: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(value["error"]["status"], status, "{value}");
    assert_eq!(value["error"]["exit_code"], exit_code, "{value}");
    let message = value["error"]["message"].as_str().expect("a message");
    assert!(stderr(&output).contains(message), "the same on stderr");
    message.to_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn every_verb_answers_in_words_and_in_json() {
    let path = model("1");
    let daemon = Daemon::start(&[]);
    let (words, status) = both(&daemon, &["status"]);
    assert!(words.contains("no model is loaded"), "{words}");
    assert_eq!(status["pid"], daemon.pid());
    assert_eq!(status["socket"], text(&daemon.socket));
    assert_eq!(number(&status, "budget_bytes"), (256 << 20) as f64);

    let loaded = json(ctl(&daemon, &["load", text(&path), "--pin"]).arg("--json"));
    assert_eq!(
        (&loaded["state"], &loaded["pinned"]),
        (&"ready".into(), &true.into())
    );
    let id = loaded["id"].to_string();
    let (words, models) = both(&daemon, &["models"]);
    assert!(
        words.contains("ready, pinned") && words.contains(text(&path)),
        "{words}"
    );
    assert_eq!(models["models"].as_array().map(Vec::len), Some(1));
    assert_eq!(models["models"][0]["path"], text(&path));

    assert_eq!(both(&daemon, &["unpin", &id]).1["pinned"], false);
    assert_eq!(both(&daemon, &["pin", text(&path)]).1["pinned"], true);

    let client = daemon.attach(&path);
    client.acquire(3, None, None).expect("acquire");
    let (words, leases) = both(&daemon, &["leases"]);
    assert!(words.lines().count() == 2, "{words}");
    assert_eq!(leases["leases"][0]["layer"], 3);
    assert_eq!(leases["leases"][0]["pid"], std::process::id());
    assert!(both(&daemon, &["status"]).0.contains("attached"));
    let message = failure(&mut ctl(&daemon, &["unload", &id]), 1, "BUSY");
    assert!(message.contains("1 clients are attached"), "{message}");
    client.release(3).expect("release");
    support::walk(&client, &path, 2);
    let (words, stats) = both(&daemon, &["stats"]);
    assert!(words.contains("acquires"), "{words}");
    // The counter is read from the client's page as the daemon gets round to it.
    assert!(
        number(&stats["models"][0], "bytes_read_total") > 0.0,
        "{stats}"
    );
    assert_eq!(stats["clients"][0]["model"].to_string(), id);
    drop(client);
    let none = |snapshot: &flea::proto::snapshot::Snapshot| snapshot.clients.is_empty();
    daemon.until(
        "the client is gone",
        std::time::Duration::from_secs(5),
        none,
    );
    assert_eq!(both(&daemon, &["leases"]).0, "no layer is held\n");

    let gone = output(&mut ctl(&daemon, &["unload", &id]));
    assert_eq!(stdout(&gone), format!("unloaded {id}\n"));
    failure(&mut ctl(&daemon, &["unload", &id]), 1, "NOTFOUND");
    let (words, version) = both(&daemon, &["version"]);
    assert!(
        words.starts_with("flea-ctl ") && words.contains("pid"),
        "{words}"
    );
    assert_eq!(version["daemon"]["protocol"], version["protocol"]);
}

#[test]
fn the_budget_is_shown_changed_and_refused() {
    let path = model("1");
    let least = smallest(&path);
    let daemon = Daemon::start(&[]);
    output(&mut ctl(&daemon, &["load", text(&path), "--pin"]));
    let before = number(&json(ctl(&daemon, &["status"]).arg("--json")), "pool_bytes");
    let smaller = json(ctl(&daemon, &["budget", &least.to_string()]).arg("--json"));
    assert_eq!(number(&smaller, "budget_configured_bytes"), least as f64);
    let status = json(ctl(&daemon, &["status"]).arg("--json"));
    let after = number(&status, "pool_bytes");
    assert!(
        after <= least as f64 && after < before,
        "{after} of {least}, before {before}"
    );
    assert!(
        number(&status["models"][0], "streamed_bytes_per_pass") > 0.0,
        "{status}"
    );
    let message = failure(
        &mut ctl(&daemon, &["budget", &(least / 2).to_string()]),
        4,
        "REFUSED",
    );
    assert!(
        message.contains("the smallest budget that works"),
        "{message}"
    );
    assert_eq!(
        number(
            &json(ctl(&daemon, &["budget"]).arg("--json")),
            "budget_bytes"
        ),
        least as f64
    );
    failure(&mut ctl(&daemon, &["budget", "900TiB"]), 4, "REFUSED");
    let output = output(&mut ctl(&daemon, &["budget", "lots"]));
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[test]
fn an_unreachable_daemon_is_exit_3_with_the_path_and_the_remedy() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("nobody.sock");
    for verb in [
        &["status"][..],
        &["models"],
        &["leases"],
        &["budget"],
        &["stats"],
        &["metrics"],
        &["top", "-n", "1"],
        &["load", "x"],
        &["pin", "1"],
    ] {
        let message = failure(
            flea_ctl().arg("--socket").arg(&socket).args(verb),
            3,
            "CONN",
        );
        assert!(message.contains(text(&socket)), "{verb:?}: {message}");
        assert!(
            message.contains("systemctl start flead.socket"),
            "{verb:?}: {message}"
        );
    }
    // By the variable too, as hosts write it; and a socket that nobody listens on any more.
    let stale = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    drop(stale);
    let endpoint = format!("unix:{}", socket.display());
    failure(
        flea_ctl().arg("status").env("FLEA_ENDPOINT", &endpoint),
        3,
        "CONN",
    );
    // The program's own version needs no daemon.
    let version = json(
        flea_ctl()
            .args(["version", "--json"])
            .env("FLEA_ENDPOINT", &endpoint),
    );
    assert_eq!(version["daemon"], Value::Null);
    assert_eq!(version["flea_ctl"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn what_may_not_be_opened_is_refused() {
    let path = model("1");
    let outside = tempfile::tempdir().expect("a directory");
    let hidden = outside.path().join("m.gguf");
    std::fs::copy(&path, &hidden).expect("copy");
    let allowed = tempfile::tempdir().expect("a directory");
    std::os::unix::fs::symlink(&hidden, allowed.path().join("link.gguf")).expect("link");
    std::fs::write(allowed.path().join("text.gguf"), "no model").expect("write");
    let daemon = Daemon::start_in(allowed.path(), &[]);
    for name in [
        text(&hidden).to_owned(),
        text(&allowed.path().join("link.gguf")).to_owned(),
    ] {
        let message = failure(&mut ctl(&daemon, &["load", &name]), 1, "PERM");
        assert!(message.contains("models = "), "{message}");
    }
    let name = text(&allowed.path().join("text.gguf")).to_owned();
    failure(&mut ctl(&daemon, &["load", &name]), 5, "FORMAT");
    let name = text(&allowed.path().join("missing.gguf")).to_owned();
    failure(&mut ctl(&daemon, &["load", &name]), 1, "NOTFOUND");
}

#[test]
fn metrics_say_the_same_over_socket_file_and_http() {
    let path = model("1");
    // Port 0 is the system's choice; the log tells which.
    let mut daemon = LoggingDaemon::start(&["--metrics-listen", "127.0.0.1:0"]);
    let address = daemon.wait_for("metrics at http://");
    let address = address
        .split("http://")
        .nth(1)
        .and_then(|rest| rest.split('/').next())
        .expect("an address");
    output(&mut daemon.ctl(&["load", text(&path), "--pin"]));
    let over_socket = stdout(&output(&mut daemon.ctl(&["metrics"])));
    let names = |text: &str| -> BTreeSet<String> {
        let names = text.lines().filter(|line| !line.starts_with('#'));
        names
            .map(|line| line.rsplit_once(' ').expect("a value").0.to_owned())
            .collect()
    };
    let sample = format!(
        "flea_read_bytes_total{{model=\"{}\",backend=",
        path.display()
    );
    assert!(
        names(&over_socket)
            .iter()
            .any(|name| name.starts_with(&sample)),
        "{over_socket}"
    );
    let file = daemon.directory.path().join("flea.prom");
    output(&mut daemon.ctl(&["metrics", "--textfile", text(&file)]));
    assert_eq!(
        names(&std::fs::read_to_string(&file).expect("the file")),
        names(&over_socket)
    );
    // Published once a second.
    let mut over_http = String::new();
    for _ in 0..50 {
        over_http = http(address);
        if over_http.contains(&sample) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let body = over_http.split("\r\n\r\n").nth(1).expect("a body");
    assert_eq!(names(body), names(&over_socket));
    failure(
        &mut daemon.ctl(&["metrics", "--textfile", "/nonexistent/x"]),
        1,
        "NOTFOUND",
    );
}

fn http(address: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).expect("connect");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\n\r\n")
        .expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

/// A flead whose log is read.
struct LoggingDaemon {
    child: std::process::Child,
    lines: std::io::Lines<std::io::BufReader<std::process::ChildStderr>>,
    directory: tempfile::TempDir,
    socket: PathBuf,
}

impl LoggingDaemon {
    fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("flea.sock");
        let mut command = program(env!("CARGO_BIN_EXE_flead"));
        command
            .arg("--socket")
            .arg(&socket)
            .arg("--models")
            .arg(common::models());
        command
            .args(["--memory", "256MiB"])
            .args(arguments)
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("flead starts");
        let lines = std::io::BufRead::lines(std::io::BufReader::new(
            child.stderr.take().expect("its log"),
        ));
        let mut daemon = Self {
            child,
            lines,
            directory,
            socket,
        };
        let waits = ["--metrics-listen", "preload"];
        if !arguments
            .iter()
            .any(|given| waits.iter().any(|word| given.starts_with(word)))
        {
            daemon.wait_for("listening at");
        }
        daemon
    }

    /// The next line of the log that says this.
    fn wait_for(&mut self, what: &str) -> String {
        for line in self.lines.by_ref() {
            let line = line.expect("a line");
            if line.contains(what) {
                return line;
            }
        }
        panic!("flead ended without saying '{what}'");
    }

    fn ctl(&self, arguments: &[&str]) -> Command {
        let mut command = flea_ctl();
        command.arg("--socket").arg(&self.socket).args(arguments);
        command
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, signal).expect("kill");
    }
}

impl Drop for LoggingDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_is_preloaded_is_there_first_and_a_signal_ends_that_too() {
    use nix::sys::signal::Signal;
    let path = model("1");
    let preload = format!("preload={}", text(&path));
    let mut daemon = LoggingDaemon::start(&["--set", &preload]);
    daemon.wait_for("for weights, before");
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for("listening at");
    daemon.wait_for("reload: ");
    let models = stdout(&output(&mut daemon.ctl(&["models", "--json"])));
    let pinned = models.replace(' ', "").contains("\"pinned\":true");
    assert!(pinned, "{models}");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.child.wait().expect("wait").code(), Some(0));
    // In the middle of loading, or just behind it.
    let mut daemon = LoggingDaemon::start(&["--set", &preload]);
    daemon.wait_for("for weights, before");
    daemon.signal(Signal::SIGTERM);
    daemon.wait_for("stopping");
    assert_eq!(daemon.child.wait().expect("wait").code(), Some(0));
}

#[test]
fn a_reload_is_applied_and_a_broken_file_is_not() {
    use nix::sys::signal::Signal;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("flead.toml");
    std::fs::write(&file, "[limits]\nclients = 100\n").expect("write");
    let mut daemon = LoggingDaemon::start(&["--config", text(&file)]);
    std::fs::write(&file, "depth = 4\n[limits]\nclients = 1\n").expect("write");
    daemon.signal(Signal::SIGHUP);
    let said = daemon.wait_for("reload: ");
    assert!(said.contains("applied limits.clients: 100 -> 1"), "{said}");
    assert!(
        said.contains("needs a restart depth: \"auto\" -> 4"),
        "{said}"
    );
    // The limit is in force: a second connection is refused while one is open.
    let first = flea::proto::Control::connect(&daemon.socket).expect("the first connection");
    let refused = output(&mut daemon.ctl(&["status"]));
    assert!(!refused.status.success(), "{}", stdout(&refused));
    drop(first);
    std::fs::write(&file, "[limits]\nclientz = 2\n").expect("write");
    daemon.signal(Signal::SIGHUP);
    let said = daemon.wait_for("the configuration stays as it is");
    assert!(
        said.contains("flead.toml:2: clientz: ") && said.contains("did you mean limits.clients?"),
        "{said}"
    );
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.child.wait().expect("wait").code(), Some(0));
    assert!(!daemon.socket.exists(), "its socket is gone with it");
}

#[test]
fn flead_says_what_is_wrong_before_it_starts() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("flead.toml");
    std::fs::write(&file, "memory = \"2GiB\"\nmetrics_listen = \"0.0.0.0:1\"\n").expect("write");
    let output = output(
        program(env!("CARGO_BIN_EXE_flead"))
            .arg("--config")
            .arg(&file),
    );
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output)
            .contains("flead.toml:2: metrics_listen: 0.0.0.0:1 is not a loopback address"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn configurations_are_checked_and_explained() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("flead.toml");
    std::fs::write(
        &file,
        format!(
            "models = [\"{}\"]\n[limits]\nclients = 3\n",
            directory.path().display()
        ),
    )
    .expect("write");
    let checked = json(flea_ctl().args(["config", "check", text(&file), "--json"]));
    assert_eq!(
        (&checked["ok"], &checked["warnings"]),
        (&true.into(), &serde_json::json!([]))
    );
    let mut show = flea_ctl();
    show.args(["config", "show", text(&file), "--json"])
        .env("FLEA_LIMITS_MODELS", "5");
    let shown = json(&mut show);
    assert_eq!(shown["limits.clients"]["value"], 3);
    assert_eq!(
        shown["limits.clients"]["origin"],
        format!("{}:3", file.display())
    );
    assert_eq!(
        shown["limits.models"]["origin"],
        "environment variable FLEA_LIMITS_MODELS"
    );
    assert_eq!(shown["socket"]["origin"], "default");
    assert_eq!(
        (&shown["socket"]["reload"], &shown["memory"]["reload"]),
        (&false.into(), &true.into())
    );
    std::fs::write(
        &file,
        "preload = [\"/nonexistent/m.gguf\"]\nusers = [\"nobody-here\"]\n",
    )
    .expect("write");
    let message = failure(
        flea_ctl().args(["config", "check", text(&file)]),
        2,
        "INVALID",
    );
    assert!(
        message.contains("flead.toml:2: users: there is no user 'nobody-here'"),
        "{message}"
    );
    std::fs::write(&file, "preload = [\"/nonexistent/m.gguf\"]\n").expect("write");
    let plain = output(flea_ctl().args(["config", "check", text(&file)]));
    assert!(
        plain.status.success() && stdout(&plain).contains("warning: "),
        "{}",
        stdout(&plain)
    );
}

#[test]
fn top_is_plain_where_there_is_no_terminal() {
    let path = model("1");
    let daemon = Daemon::start(&[]);
    let client = daemon.attach(&path);
    let mut top = ctl(&daemon, &["top", "-n", "2", "-i", "0.5", "--json"]);
    let child = top.stdout(Stdio::piped()).spawn().expect("top starts");
    // Work for as long as top looks.
    let began = std::time::Instant::now();
    while began.elapsed() < std::time::Duration::from_millis(1600) {
        support::walk(&client, &path, 1);
    }
    let output = child.wait_with_output().expect("top ends");
    assert!(output.status.success());
    let pictures: Vec<Value> = stdout(&output)
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON lines"))
        .collect();
    assert_eq!(pictures.len(), 2);
    assert!(
        number(&pictures[1]["models"][0], "acquires_per_second") > 0.0,
        "{}",
        pictures[1]
    );
    assert_eq!(pictures[1]["clients"][0]["pid"], std::process::id());
    let plain = common::output(&mut ctl(&daemon, &["top", "-n", "1", "-i", "0.1"]));
    let words = stdout(&plain);
    assert!(
        words.contains("GB/s") && words.contains(text(&path)) && !words.contains('\x1b'),
        "{words}"
    );
}

/// CRC-32 as zlib has it, for comparison.
fn crc32(crc: u32, bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!crc, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

/// What docs/protocol.md says is enough to write a client: this one knows nothing else, and its bytes are the file's.
#[test]
fn a_client_in_python_reads_every_layer() {
    if !Command::new("python3")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
    {
        return skip("no python3");
    }
    let path = model("1");
    let bytes = std::fs::read(&path).expect("the model");
    let (catalog, _) = flea::engine::read_catalog(&path).expect("a catalog");
    let expected: Vec<String> = catalog
        .layers
        .iter()
        .enumerate()
        .map(|(index, layer)| {
            let crc = layer.uses.iter().fold(0, |crc, used| {
                let start = used.extent.offset_bytes as usize;
                crc32(crc, &bytes[start..start + used.extent.len_bytes as usize])
            });
            format!("{index} {crc:08x}")
        })
        .collect();
    let daemon = Daemon::start(&[]);
    daemon.budget(smallest(&path));
    let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("ffi-examples/flea_client.py");
    let output = output(
        Command::new("python3")
            .arg(&client)
            .arg(&daemon.socket)
            .arg(&path)
            .arg("3"),
    );
    assert!(output.status.success(), "{}", stderr(&output));
    let words = stdout(&output);
    let said: Vec<&str> = words.lines().collect();
    assert_eq!(said.len(), 3 * expected.len(), "{said:?}");
    for (line, want) in said.iter().zip(expected.iter().cycle()) {
        assert_eq!(line, want);
    }
    let state = &daemon.status().models[0];
    assert!(state.streamed_bytes_per_pass > 0, "it streamed: {state:?}");

    // An order that nobody can foresee: some layers are not there yet when they are asked for.
    let wild = daemon.attach(&path);
    let mut seed = 7;
    for _ in 0..8 * expected.len() {
        let layer = support::random(&mut seed, expected.len() as u64) as u32;
        wild.acquire(layer, None, None).expect("acquire");
        wild.release(layer).expect("release");
    }
    drop(wild);
    let state = &daemon.status().models[0];
    assert!(
        state.stalls_total > 0 && state.stall_ns_total > 0,
        "{state:?}"
    );
    let counted: u64 = state.stall_counts.iter().sum();
    assert!(counted > 0 && counted <= state.stalls_total, "{state:?}");
    assert_eq!(
        state.slots_free + state.slots_used,
        state.slots_count,
        "{state:?}"
    );
    assert!(
        state.bytes_read_total >= 3 * state.streamed_bytes_per_pass,
        "{state:?}"
    );
}
