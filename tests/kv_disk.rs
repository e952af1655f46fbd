//! `flea run --kv-disk`: keys and values that are moved out of memory and back change no bit, and the counters prove that
//! they were moved; with a codec the answer changes, always in the same way; and what goes wrong is said.
#![cfg(feature = "run")]

#[path = "common/analyzing.rs"]
mod analyzing;
mod common;

use analyzing::answer;
use common::{flea, json, number, output, synth};
use flea::host::kv_disk::KvDiskOptions;
use flea::host::{KvType, Session, SessionOptions, StreamOptions};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

/// 8 layers with keys and values of 2 heads of 64: 512 KiB a layer at a context of 1024 tokens.
fn model(arch: &str) -> PathBuf {
    let mut arguments = vec![
        "--arch", arch, "--layers", "8", "--embd", "256", "--ffn", "512",
    ];
    arguments.extend(["--heads", "4", "--kv-heads", "2", "--vocab", "800"]);
    arguments.extend(["--type", "q8_0", "--seed", "7"]);
    if arch == "mixtral" {
        arguments.extend(["--experts", "4", "--experts-used", "2"]);
    }
    synth(&format!("kv-{arch}"), &arguments)
}

/// On a drive, not in a /tmp that may be memory.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

/// 700 tokens of prompt and 20 of answer: what is written one by one matters as much as what comes 128 at a time.
fn run(model: &Path, extra: &[&str]) -> Command {
    run_with(model, "1024", extra)
}

fn run_with(model: &Path, context: &str, extra: &[&str]) -> Command {
    let ids: Vec<String> = (0..700u32)
        .map(|index| (260 + index * 7 % 500).to_string())
        .collect();
    let mut command = flea();
    command.arg("run").arg(model);
    command.args(["--prompt-tokens", &ids.join(","), "-n", "20"]);
    command.args(["--ignore-eos", "--json", "--threads", "2"]);
    command
        .args(["--ctx", context, "--ubatch", "128"])
        .args(extra);
    command
}

fn on_disk(model: &Path, directory: &Path, extra: &[&str]) -> Value {
    let directory = directory.to_str().expect("a path");
    let mut arguments = vec!["--memory", "60%", "--kv-disk", directory];
    arguments.extend(extra);
    json(&mut run(model, &arguments))
}

fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).expect("a directory").count() == 0
}

#[track_caller]
fn assert_same(reference: &Value, result: &Value, what: &str) {
    assert_eq!(reference["token_ids"], result["token_ids"], "{what}");
    assert_eq!(reference["logits_hash"], result["logits_hash"], "{what}");
}

/// What the ring moved, against what the geometry says.
#[track_caller]
fn assert_moved(result: &Value, slots: u64, row_bytes: u64) {
    let kv = &result["kv_disk"];
    assert_eq!(
        (&kv["layers"], &kv["slots"]),
        (&8.into(), &slots.into()),
        "{kv}"
    );
    let layer_bytes = 2 * 1024 * row_bytes;
    assert_eq!(number(kv, "cache_bytes"), (8 * layer_bytes) as f64, "{kv}");
    assert_eq!(
        number(kv, "ring_bytes"),
        (slots * layer_bytes) as f64,
        "{kv}"
    );
    // 6 passes for the prompt, 19 for the tokens after the first; every pass needs every layer's cache once.
    assert_eq!(number(kv, "acquires"), 25.0 * 8.0, "{kv}");
    let loads = number(kv, "loads");
    assert!(loads >= 25.0 * (8.0 - slots as f64), "{kv}");
    // A layer that comes in during the answer is at least the prompt.
    let prompt_bytes = (2 * 700 * row_bytes) as f64;
    assert!(
        number(kv, "bytes_read") > 19.0 * (8.0 - slots as f64) * prompt_bytes,
        "{kv}"
    );
    assert!(number(kv, "bytes_written") > 5.0 * prompt_bytes, "{kv}");
}

fn check(arch: &str) {
    let model = model(arch);
    let directory = directory();
    let reference = json(&mut run(&model, &["--no-stream"]));
    assert!(reference["kv_disk"].is_null());
    for slots in [2, 3, 5] {
        let count = slots.to_string();
        let result = on_disk(&model, directory.path(), &["--kv-slots", &count]);
        assert_same(&reference, &result, &format!("{arch}, {slots} slots"));
        assert_moved(&result, slots, 256);
        assert!(
            number(&result, "loads") > 0.0,
            "weights stream as well: {result}"
        );
    }
    assert!(is_empty(directory.path()), "something stayed behind");
}

#[test]
fn no_bit_changes_in_llama() {
    check("llama");
}

#[test]
fn no_bit_changes_where_experts_are_fetched() {
    check("mixtral");
}

/// `flea plan` and `flea analyze` count what the run holds of keys and values, and what they cost without a drive.
#[test]
fn the_ring_is_planned() {
    let model = model("llama");
    let directory = directory();
    let place = directory.path().to_str().expect("a path");
    let result = on_disk(&model, directory.path(), &["--kv-type", "q8_0"]);
    let plan = |extra: &[&str]| {
        let mut command = flea();
        command.arg("plan").arg(&model).args(["--memory", "60%"]);
        command.args(["--ctx", "1024", "--ubatch", "128", "--kv-type", "q8_0"]);
        json(command.arg("--json").args(extra))
    };
    let (drive, memory) = (plan(&["--kv-disk", place]), plan(&[]));
    assert!(memory["kv"].is_null());
    let (ring, cache) = (
        number(&drive["kv"], "memory_bytes"),
        number(&drive["kv"], "cache_bytes"),
    );
    assert_eq!(ring, number(&result["kv_disk"], "ring_bytes"));
    assert_eq!(cache, number(&result["kv_disk"], "cache_bytes"));
    let saved = number(&memory, "host_bytes") - number(&drive, "host_bytes");
    // An estimate is rounded to 64 KiB.
    assert!((saved - (cache - ring)).abs() <= 65536.0, "{saved}");
    let off = number(&drive, "host_bytes") / number(&result, "host_bytes") - 1.0;
    assert!(off.abs() < 0.05, "{off}");

    let path = model.to_str().expect("a path");
    let ask = |more: &[&str]| {
        let base = [path, "--context", "1024", "--memory"];
        answer(&[&base[..], more].concat())
    };
    let slots = ["--kv-slots", "3"];
    let (value, _) = ask(&[&["1GiB"][..], &slots].concat());
    assert_eq!(number(&value, "kv_bytes_per_token"), 8.0 * 1024.0 * 512.0);
    let least = value["devices"][0]["smallest_bytes"].to_string();
    assert_eq!(ask(&[&[least.as_str()][..], &slots].concat()).1, 11);
    let (value, code) = ask(&[&least]);
    assert_eq!(code, 12);
    let missing = number(&value["devices"][0], "missing_bytes");
    assert!((missing - 5.0 * 1024.0 * 512.0).abs() <= 65536.0, "{value}");
}

/// Sliding windows that are shorter than the prompt, so that rows are written again and again: two caches of different
/// sizes in one ring, with experts (gpt-oss), and layers that read the cache of another layer (Gemma 3n).
#[test]
fn no_bit_changes_with_sliding_windows() {
    let directory = directory();
    for (arch, extra) in [
        (
            "gpt-oss",
            &["--type", "mxfp4", "--experts", "4", "--experts-used", "2"][..],
        ),
        ("gemma3n", &["--type", "q8_0"][..]),
    ] {
        let arguments = [
            "--arch", arch, "--layers", "10", "--embd", "256", "--ffn", "512",
        ];
        let mut arguments = arguments.to_vec();
        arguments.extend(["--heads", "4", "--kv-heads", "2", "--vocab", "800"]);
        arguments.extend(extra);
        let model = synth(&format!("kv-{arch}"), &arguments);
        let reference = json(&mut run(&model, &["--no-stream"]));
        for slots in ["2", "3"] {
            let result = on_disk(&model, directory.path(), &["--kv-slots", slots]);
            assert_same(&reference, &result, &format!("{arch}, {slots} slots"));
            let kv = &result["kv_disk"];
            assert!(number(kv, "layers") > 3.0, "{kv}");
            assert!(number(kv, "loads") > 60.0, "{kv}");
            assert!(number(kv, "bytes_read") > 1e6, "{kv}");
        }
        // A window's rows are written again, coded groups as well: never coded twice, and the same in every run.
        let coded = |slots| {
            let arguments = ["--kv-type", "tq:4", "--kv-slots", slots];
            on_disk(&model, directory.path(), &arguments)
        };
        let (few, all) = (coded("2"), coded("10"));
        assert_ne!(reference["logits_hash"], few["logits_hash"], "{arch}");
        assert_same(&few, &all, &format!("{arch}, coded"));
    }
}

/// Rows of quantised numbers are no multiple of a page.
#[test]
fn no_bit_changes_in_quantised_keys_and_values() {
    let model = model("llama");
    let directory = directory();
    for (kv_type, row_bytes) in [("q8_0", 136), ("f32", 512)] {
        let arguments = ["--kv-type", kv_type];
        let reference = json(run(&model, &["--no-stream"]).args(arguments));
        let result = on_disk(&model, directory.path(), &arguments);
        assert_same(&reference, &result, kv_type);
        assert_moved(&result, 3, row_bytes);
    }
}

/// Everything fits into the slots: nothing is moved, nothing is written.
#[test]
fn what_fits_is_not_moved() {
    let model = model("llama");
    let directory = directory();
    let reference = json(&mut run(&model, &["--no-stream"]));
    let result = on_disk(&model, directory.path(), &["--kv-slots", "8"]);
    assert_same(&reference, &result, "8 slots");
    assert_eq!(number(&result["kv_disk"], "loads"), 8.0, "{result}");
    assert_eq!(number(&result["kv_disk"], "bytes_written"), 0.0, "{result}");
}

/// The memory of a long context is that of the ring, and the plan knows it.
#[test]
fn the_ring_is_all_the_memory_there_is() {
    let model = model("llama");
    let directory = directory();
    let mut arguments = vec!["--kv-type", "f32", "--memory", "60%"];
    let resident = json(&mut run_with(&model, "65536", &arguments));
    arguments.extend(["--kv-disk", directory.path().to_str().expect("a path")]);
    let result = json(&mut run_with(&model, "65536", &arguments));
    assert_same(&resident, &result, "a context of 65536");
    let kv = &result["kv_disk"];
    let saved = number(kv, "cache_bytes") - number(kv, "ring_bytes");
    assert!(saved > 300e6, "{kv}");
    let less = number(&resident, "host_bytes") - number(&result, "host_bytes");
    assert!((less / saved - 1.0).abs() < 0.1, "{less} of {saved} bytes");
}

/// Saving and restoring goes through the device's buffer, which has to bring each layer in; clearing forgets all of it.
#[test]
fn a_state_is_saved_and_restored_through_the_ring() {
    static STOP: AtomicBool = AtomicBool::new(false);
    let (model, directory) = (model("llama"), directory());
    let mut session = Session::open(
        &SessionOptions {
            path: model,
            stream: Some(StreamOptions {
                memory: Some("60%".to_owned()),
                ..StreamOptions::default()
            }),
            context_tokens: Some(1024),
            ubatch_tokens: 128,
            threads_count: Some(2),
            kv_type: KvType::F16,
            kv_disk: Some(KvDiskOptions {
                directory: directory.path().to_path_buf(),
                slots_count: 2,
                codec: None,
            }),
            stop: &STOP,
        },
        &mut |_| true,
    )
    .expect("a session");
    let tokens: Vec<_> = (0..300).map(|index| 260 + index * 7 % 500).collect();
    session.feed(&tokens).expect("300 tokens");
    let state = session.kv_state().expect("a state");
    assert!(state.len() > 8 * 2 * 300 * 256);
    session.feed(&[300]).expect("a token");
    let logits = session.logits().expect("logits").to_vec();
    session.forget().expect("nothing is computed");
    session.feed(&[301]).expect("a token");
    assert_ne!(session.logits().expect("logits"), logits);
    session.restore_kv(&state).expect("a state that fits");
    assert_eq!(session.kv_state().expect("a state"), state);
    session.feed(&[300]).expect("a token");
    assert_eq!(session.logits().expect("logits"), logits);
}

/// With a codec the answer is another one, the same in every run however many layers stay, and fewer bytes are moved.
#[test]
fn a_codec_changes_the_answer_once_and_for_all() {
    let model = model("llama");
    let directory = directory();
    let exact = on_disk(&model, directory.path(), &[]);
    for codec in ["tq-ec", "tq:3"] {
        let coded = |slots| {
            let arguments = ["--kv-type", codec, "--kv-slots", slots];
            on_disk(&model, directory.path(), &arguments)
        };
        let (few, again, all) = (coded("3"), coded("2"), coded("8"));
        assert_ne!(exact["logits_hash"], few["logits_hash"], "{codec}");
        assert_same(&few, &again, codec);
        assert_same(&few, &all, codec);
        let kv = &few["kv_disk"];
        let least = if codec == "tq:3" { 4.0 } else { 3.0 };
        assert!(number(kv, "coded_ratio") > least, "{kv}");
        // Groups 1 to 3 of 128 rows are older than the last 128 rows of 719.
        let raw = number(kv, "coded_ratio") * number(kv, "coded_bytes");
        assert_eq!(raw.round(), (8 * 2 * 3 * 128 * 256) as f64, "{kv}");
        let moved = number(kv, "bytes_read");
        assert!(
            moved < 0.75 * number(&exact["kv_disk"], "bytes_read"),
            "{kv}"
        );
    }
    assert!(is_empty(directory.path()), "something stayed behind");
}

/// What cannot be meant is refused, with the word that would be right.
#[test]
fn what_cannot_be_is_said() {
    let model = model("llama");
    let directory = directory();
    let refused = |arguments: &[&str], code: i32, words: &[&str]| {
        let ended = output(&mut run(&model, arguments));
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&ended.stdout),
            String::from_utf8_lossy(&ended.stderr)
        );
        assert_eq!(ended.status.code(), Some(code), "{arguments:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{arguments:?}: no {word} in {said}");
        }
    };
    let missing = directory.path().join("missing");
    let missing = missing.to_str().expect("a path");
    refused(
        &["--kv-disk", missing],
        1,
        &[missing, "No such file", "name a directory"],
    );
    let file = directory.path().join("file");
    std::fs::write(&file, b"x").expect("a file");
    let file = file.to_str().expect("a path");
    refused(&["--kv-disk", file], 2, &[file, "not a directory"]);
    refused(&["--kv-disk", "/proc"], 1, &["/proc", "name a directory"]);
    refused(&["--kv-type", "tq-ec"], 2, &["--kv-disk"]);
    refused(&["--kv-type", "tq9"], 2, &["tq9", "tq-ec", "q8_0"]);
    refused(&["--kv-type", "tq:9"], 2, &["1 to 8"]);
    refused(&["--kv-slots", "3"], 2, &["--kv-disk"]);
    refused(&["--kv-disk", missing, "--no-stream"], 2, &["--no-stream"]);
}

/// A drive without room: refused before anything is computed, with what is missing and what to do.
#[test]
fn a_full_drive_is_said_before_the_first_token() {
    let model = model("llama");
    let directory = directory();
    let mut command = run(&model, &["--memory", "60%"]);
    command.arg("--kv-disk").arg(directory.path());
    // Files of this process may not grow beyond 1 MiB: the kernel answers as it does where no room is left.
    limit_files(&mut command, 1 << 20);
    let ended = output(&mut command);
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(!ended.status.success(), "{said}");
    assert!(
        said.contains("File too large") && said.contains("--ctx"),
        "{said}"
    );
}

#[allow(unsafe_code)]
fn limit_files(command: &mut Command, bytes: libc::rlim_t) {
    use std::os::unix::process::CommandExt;
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: two system calls between fork and exec, which allocate nothing.
    unsafe {
        command.pre_exec(move || {
            // A limit on files is an error, not a signal, for who ignores the signal.
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            if libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}
