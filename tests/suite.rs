//! `flea bench suite`, end to end on a small model: what is written is what was measured, what is missing is said, and
//! the machine is left as it was found. Rates are never asserted.

#![cfg(feature = "cli")]

mod common;

use common::{flea, output, skip, synth};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One suite at a time: each sets the number of huge pages and puts it back.
static ALONE: Mutex<()> = Mutex::new(());

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

fn model() -> PathBuf {
    let shape = [
        "--layers",
        "24",
        "--embd",
        "512",
        "--ffn",
        "2048",
        "--heads",
        "8",
        "--kv-heads",
        "4",
    ];
    let mut arguments = vec![
        "--arch", "llama", "--vocab", "1000", "--type", "f16", "--seed", "3",
    ];
    arguments.extend(shape);
    synth("suite", &arguments)
}

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn suite(cases: &str, out: &Path) -> Command {
    rounds(1, cases, out)
}

fn rounds(count: u32, cases: &str, out: &Path) -> Command {
    let mut command = flea();
    command.args([
        "bench",
        "suite",
        "--cases",
        cases,
        "--rounds",
        &count.to_string(),
    ]);
    command.args(["--fio-seconds", "0.1", "--json"]);
    command.arg("--models").arg(model()).arg("--out").arg(out);
    command.arg("--scratch").arg(out.join("scratch"));
    command
}

/// The rows of a case of which some have no figure.
fn incomplete(command: &mut Command) -> Vec<Value> {
    let said = output(command);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    let mut answer: Value = serde_json::from_slice(&said.stdout).expect("one JSON object");
    match answer["cases"][0]["rows"].take() {
        Value::Array(rows) => rows,
        other => panic!("no rows: {other}"),
    }
}

fn has_fio() -> bool {
    let there = Command::new("fio").arg("--version").output().is_ok();
    if !there {
        skip("fio is not installed");
    }
    there
}

/// A directory on the drive of the models: O_DIRECT and mincore mean nothing in memory.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(common::models()).expect("a directory for results")
}

#[test]
fn a_case_is_measured_and_written_down() {
    let _alone = alone();
    if !has_fio() {
        return;
    }
    let out = directory();
    let said = output(&mut suite("engine", out.path()));
    let answer: Value = serde_json::from_slice(&said.stdout).expect("one JSON object");
    let case = &answer["cases"][0];
    let rows = case["rows"].as_array().expect("rows");
    let labels: Vec<&str> = rows
        .iter()
        .filter_map(|row| row["label"].as_str())
        .collect();
    assert_eq!(
        labels,
        [
            "flea, 10 %",
            "flea, 25 %",
            "flea, 50 %",
            "flea, 75 %",
            "flea, 95 %"
        ]
    );
    for row in rows {
        let names: Vec<&str> = measures(row)
            .iter()
            .filter_map(|measure| measure["name"].as_str())
            .collect();
        if names.is_empty() {
            assert!(
                row["missing"]
                    .as_str()
                    .is_some_and(|reason| !reason.is_empty()),
                "{row}"
            );
            continue;
        }
        for name in [
            "GB/s",
            "CPU s per GB",
            "P50",
            "P99",
            "drive busy %",
            "peak over plan",
        ] {
            assert!(names.contains(&name), "{name} is not in {row}");
        }
        for measure in measures(row) {
            let samples = measure["series"]["samples"].as_array().expect("samples");
            assert!(
                samples.len() == 1 && samples[0].as_f64().is_some_and(|value| value > 0.0),
                "{row}"
            );
        }
    }
    // The exit code tells whether anything is missing, and nothing about speed.
    let missing = rows.iter().any(|row| measures(row).is_empty());
    assert_eq!(said.status.code(), Some(i32::from(missing)), "{said:?}");
    assert!(rows.iter().any(|row| !measures(row).is_empty()), "{answer}");
    assert_eq!(
        case["fio_large"]["samples"].as_array().map(Vec::len),
        Some(2),
        "before and after"
    );
    let page = fs::read_to_string(out.path().join("README.md")).expect("the page");
    assert!(
        page.contains("| flea, 50 % |") && page.contains("](engine.svg)"),
        "{page}"
    );
    let written: Value =
        serde_json::from_slice(&fs::read(out.path().join("results.json")).expect("results"))
            .expect("JSON");
    assert_eq!(&written["cases"][0], case);
}

fn measures(row: &Value) -> Vec<&Value> {
    row["measures"]
        .as_array()
        .map(|list| list.iter().collect())
        .unwrap_or_default()
}

#[test]
fn without_fio_nothing_is_compared_with_nothing() {
    let _alone = alone();
    let out = directory();
    let said = output(suite("engine", out.path()).env("PATH", out.path()));
    let answer: Value = serde_json::from_slice(&said.stdout).expect("one JSON object");
    assert_eq!(answer["error"]["status"], "NOTFOUND", "{answer}");
    assert!(
        answer["error"]["message"]
            .as_str()
            .is_some_and(|text| text.contains("fio is not installed"))
    );
    assert!(!out.path().join("results.json").exists());
}

#[test]
fn peers_that_are_not_there_are_rows_that_say_so() {
    let _alone = alone();
    if !has_fio() {
        return;
    }
    let out = directory();
    let missing = out.path().join("no-such-directory");
    let mut command = suite("load", out.path());
    command
        .arg("--llama-cpp")
        .arg(&missing)
        .arg("--python")
        .arg(missing.join("python"));
    let rows = incomplete(&mut command);
    for row in &rows {
        let label = row["label"].as_str().expect("a label");
        let reason = row["missing"].as_str().unwrap_or_default();
        if label.starts_with("flea") {
            assert!(!measures(row).is_empty(), "{row}");
        } else {
            assert!(
                measures(row).is_empty() && reason.contains("scripts/peers.sh"),
                "{row}"
            );
        }
    }
    assert_eq!(rows.len(), 6);
}

#[test]
fn a_host_without_the_device_is_a_row_that_says_so() {
    let _alone = alone();
    if !has_fio() {
        return;
    }
    let out = directory();
    let programs = out.path().join("programs");
    fs::create_dir_all(&programs).expect("a directory");
    fs::write(programs.join("llama-completion"), "").expect("a file");
    let mut command = suite("stock", out.path());
    command.arg("--llama-cpp").arg(&programs);
    command.arg("--ggml-flea").arg(out.path().join("no.so"));
    let rows = incomplete(&mut command);
    assert_eq!(rows.len(), 4);
    for row in &rows {
        let reason = row["missing"].as_str().unwrap_or_default();
        let is_ours = row["label"]
            .as_str()
            .is_some_and(|label| label.starts_with("FLEA"));
        let cause = if is_ours {
            "make ggml-flea"
        } else {
            "llama-completion"
        };
        assert!(measures(row).is_empty() && reason.contains(cause), "{row}");
    }
}

#[test]
fn an_interruption_puts_settings_back() {
    let _alone = alone();
    if !has_fio() {
        return;
    }
    let out = directory();
    let before = fs::read_to_string(HUGE_PAGES).expect("the setting");
    let mut command = rounds(1000, "engine", out.path());
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("flea starts");
    let mut said = BufReader::new(child.stderr.take().expect("stderr")).lines();
    let begun = said
        .by_ref()
        .map_while(Result::ok)
        .any(|line| line.contains("round 2 of 1000"));
    assert!(begun, "it never came to its second round");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("kill");
    let rest: Vec<String> = said.map_while(Result::ok).collect();
    let status = child.wait().expect("wait");
    assert_eq!(status.code(), Some(130), "{rest:?}");
    assert_eq!(fs::read_to_string(HUGE_PAGES).expect("the setting"), before);
    let written: Value =
        serde_json::from_slice(&fs::read(out.path().join("results.json")).expect("results"))
            .expect("JSON");
    assert_eq!(
        written["cases"][0]["interrupted"], true,
        "what was measured is kept"
    );
    assert!(
        written["cases"][0]["ended_by"]
            .as_str()
            .is_some_and(|cause| cause.contains("interrupted")),
        "{written}"
    );
    assert!(
        written["cases"][0]["rounds"]
            .as_u64()
            .is_some_and(|rounds| (1..1000).contains(&rounds))
    );
}
