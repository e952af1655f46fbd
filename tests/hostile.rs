//! What people really point a program at: broken files, wrong files, no files. Every command answers with a clear error
//! and the right exit code, at once; nothing panics, nothing hangs.

mod common;

use common::{flea, json, number, synth};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Runs to the end or fails the test: a hang is a failure, not a timeout of the whole suite.
fn bounded(command: &mut Command) -> Output {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let begun = Instant::now();
    while child.try_wait().expect("wait").is_none() {
        if begun.elapsed() > Duration::from_secs(60) {
            let _ = child.kill();
            panic!("{command:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().expect("output")
}

/// Every command that opens a model says the same about a bad one.
fn refused_by_all(path: &Path, exit_codes: &[i32], words: &[&str]) {
    let commands: [&[&str]; 4] = [
        &["inspect"],
        &["plan", "--memory", "50%"],
        &["bench", "stream", "--memory", "50%"],
        &["run", "-p", "x", "-n", "1", "--memory", "50%"],
    ];
    for arguments in commands {
        if arguments[0] == "run" && !cfg!(feature = "run") {
            continue;
        }
        let output = bounded(flea().args(arguments).arg(path));
        let said = String::from_utf8_lossy(&output.stderr).to_string();
        let code = output.status.code();
        assert!(
            code.is_some_and(|code| exit_codes.contains(&code)),
            "{arguments:?} {path:?}: {code:?}: {said}"
        );
        assert!(!said.contains("panicked"), "{arguments:?}: {said}");
        assert!(said.contains("error:"), "{arguments:?}: {said}");
        for word in words {
            assert!(
                said.contains(word),
                "{arguments:?} {path:?}: '{word}' is not in: {said}"
            );
        }
    }
}

struct Corpus {
    directory: tempfile::TempDir,
    model: Vec<u8>,
}

impl Corpus {
    fn new() -> Self {
        let arguments = [
            "--arch",
            "llama",
            "--layers",
            "2",
            "--embd",
            "64",
            "--ffn",
            "128",
            "--heads",
            "2",
            "--kv-heads",
            "2",
        ];
        let mut all = vec!["--vocab", "512", "--type", "f16"];
        all.extend(arguments);
        let model = fs::read(synth("hostile", &all)).expect("the model");
        Self {
            directory: tempfile::tempdir().expect("a directory"),
            model,
        }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, bytes).expect("write");
        path
    }
}

#[test]
fn wrong_files_are_told_apart() {
    let corpus = Corpus::new();
    refused_by_all(
        &corpus.directory.path().join("absent.gguf"),
        &[1],
        &["absent.gguf", "No such file"],
    );
    refused_by_all(&corpus.file("empty.gguf", b""), &[5], &["empty.gguf"]);
    refused_by_all(
        &corpus.file("magic.gguf", b"PK\x03\x04 this is a zip archive"),
        &[5],
        &["magic.gguf"],
    );
    refused_by_all(&corpus.file("short.gguf", b"GGU"), &[5], &["short.gguf"]);
    refused_by_all(corpus.directory.path(), &[1, 2, 5], &[]);
    refused_by_all(Path::new("/dev/zero"), &[5], &["/dev/zero"]);
    refused_by_all(Path::new("/proc/self/status"), &[5], &["/proc/self/status"]);
    let pipe = corpus.directory.path().join("pipe.gguf");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
    refused_by_all(&pipe, &[5], &["pipe.gguf"]);
}

#[test]
fn truncated_models_say_where() {
    let corpus = Corpus::new();
    // Every byte of the header is cut in tests/model_hostile.rs; here a sample of them goes through the programs.
    let lens = [
        8usize,
        100,
        1000,
        corpus.model.len() / 2,
        corpus.model.len() - 1,
    ];
    for len in lens {
        let path = corpus.file(&format!("cut-{len}.gguf"), &corpus.model[..len]);
        refused_by_all(&path, &[5], &["cut-"]);
    }
}

#[test]
fn absurd_counts_cost_nothing() {
    let corpus = Corpus::new();
    for (at, what) in [(8usize, "tensors"), (16, "keys")] {
        let mut bytes = corpus.model.clone();
        bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        let path = corpus.file(&format!("absurd-{what}.gguf"), &bytes);
        refused_by_all(&path, &[5], &["absurd-"]);
    }
}

#[test]
fn json_failures_are_one_object() {
    let corpus = Corpus::new();
    let path = corpus.file("broken.gguf", b"GGUF\x03\0\0\0");
    for arguments in [
        &["inspect", "--json"][..],
        &["plan", "--json", "--memory", "50%"],
    ] {
        let output = bounded(flea().args(arguments).arg(&path));
        let said: serde_json::Value =
            serde_json::from_slice(&output.stdout).expect("one JSON object");
        assert_eq!(said["error"]["exit_code"], 5, "{said}");
        assert!(
            said["error"]["message"]
                .as_str()
                .is_some_and(|text| text.contains("broken.gguf")),
            "{said}"
        );
    }
}

#[test]
fn usage_errors_are_two() {
    for arguments in [
        &["plan"][..],
        &["plan", "x.gguf", "--memory", "lots"],
        &["nonsense"],
        &["bench", "stream", "--passes", "no", "x"],
    ] {
        let output = bounded(flea().args(arguments));
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
}

#[cfg(feature = "run")]
#[test]
fn a_file_cut_while_it_runs_ends_the_run_with_its_name() {
    let arguments = [
        "--arch",
        "llama",
        "--layers",
        "12",
        "--embd",
        "512",
        "--ffn",
        "1536",
        "--heads",
        "8",
        "--kv-heads",
        "4",
    ];
    let mut all = vec!["--vocab", "1000", "--type", "f16"];
    all.extend(arguments);
    let original = synth("cut-while-running", &all);
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("cut.gguf");
    fs::copy(&original, &path).expect("copy");
    let mut command = flea();
    command.arg("run").arg(&path).args([
        "--prompt-tokens",
        "1,300",
        "-n",
        "100000",
        "--ignore-eos",
        "--memory",
        "60%",
        "--ctx",
        "4096",
    ]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    // The first text proves that it streams.
    let mut first = [0u8; 1];
    std::io::Read::read_exact(child.stdout.as_mut().expect("stdout"), &mut first).expect("text");
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open")
        .set_len(1 << 16)
        .expect("truncate");
    let begun = Instant::now();
    while child.try_wait().expect("wait").is_none() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it hangs");
        // Its output must not fill the pipe.
        let mut rest = [0u8; 4096];
        let _ = std::io::Read::read(child.stdout.as_mut().expect("stdout"), &mut rest);
    }
    let output = child.wait_with_output().expect("output");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(
        said.contains("cut.gguf") && !said.contains("panicked"),
        "{said}"
    );
}

#[test]
fn a_budget_too_small_names_one_that_works() {
    let model = synth(
        "refused",
        &[
            "--arch",
            "llama",
            "--layers",
            "8",
            "--embd",
            "256",
            "--ffn",
            "512",
            "--heads",
            "4",
            "--kv-heads",
            "2",
            "--vocab",
            "600",
            "--type",
            "f16",
        ],
    );
    let output = bounded(
        flea()
            .arg("bench")
            .arg("stream")
            .arg(&model)
            .args(["--memory", "2%", "--passes", "1"]),
    );
    assert_eq!(output.status.code(), Some(4));
    let said = String::from_utf8_lossy(&output.stderr).to_string();
    let percent = said
        .split("as a percentage ")
        .nth(1)
        .and_then(|rest| rest.split('%').next())
        .unwrap_or_else(|| panic!("no percentage in: {said}"));
    let result = json(flea().arg("bench").arg("stream").arg(&model).args([
        "--memory",
        &format!("{percent}%"),
        "--passes",
        "1",
        "--json",
    ]));
    assert!(number(&result, "bytes_read") > 0.0);
}
