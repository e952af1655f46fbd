//! `--memory` is for everything the process holds: in a memory cgroup barely above it, a model four times that size runs
//! to the end, is never killed, and says what it says without a limit.

#![cfg(feature = "cli")]

mod common;

use common::{flea, json, number, skip, synth};
use flea::tools::suite::cgroup::Cgroup;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;

/// 740 MiB of f16 in 40 layers.
fn model() -> PathBuf {
    let shape = [
        "--layers",
        "40",
        "--embd",
        "768",
        "--ffn",
        "2304",
        "--heads",
        "12",
        "--kv-heads",
        "4",
    ];
    let mut arguments = vec![
        "--arch", "llama", "--vocab", "2000", "--type", "f16", "--seed", "11",
    ];
    arguments.extend(shape);
    synth("memory", &arguments)
}

fn run(model: &Path, memory: &[&str]) -> Command {
    let mut command = flea();
    command.arg("run").arg(model).args([
        "--prompt-tokens",
        "1,300,301,302,303",
        "-n",
        "4",
        "--ignore-eos",
        "--json",
    ]);
    command
        .args(["--ctx", "256", "--threads", "2"])
        .args(memory);
    command
}

#[test]
fn a_model_four_times_the_memory_runs_in_its_cgroup() {
    let model = model();
    let model_bytes = std::fs::metadata(&model).expect("metadata").len();
    let total_bytes = model_bytes / 4;
    let group = match Cgroup::new("run", total_bytes + 64 * MIB) {
        Ok(group) => group,
        Err(error) => return skip(&error.to_string()),
    };
    let reference = json(&mut run(&model, &["--no-stream"]));
    for backing in ["private", "shared"] {
        let memory = total_bytes.to_string();
        let result =
            json(&mut group.wrap(&run(&model, &["--memory", &memory, "--backing", backing])));
        assert_eq!(reference["logits_hash"], result["logits_hash"], "{backing}");
        assert!(number(&result, "resident_bytes") < number(&result, "model_bytes"));
        assert!(number(&result, "loads") > 0.0 && number(&result, "acquires") > 0.0);
        let peak = number(&result, "peak_memory_bytes");
        assert!(
            peak <= (total_bytes + 32 * MIB) as f64,
            "{backing}: peak {peak} of {total_bytes}"
        );
        assert_eq!(group.oom_kills(), 0, "{backing}");
        let peak_bytes = group.peak_bytes().expect("what the kernel counted");
        assert!(peak_bytes <= total_bytes + 64 * MIB, "{backing}");
    }
}

#[test]
fn the_automatic_budget_stays_inside_the_cgroup() {
    let model = model();
    let group = match Cgroup::new("auto", 700 * MIB) {
        Ok(group) => group,
        Err(error) => return skip(&error.to_string()),
    };
    let result = json(&mut group.wrap(&run(&model, &[])));
    assert_eq!(group.oom_kills(), 0);
    let total = number(&result, "total_bytes");
    assert!(
        total <= (700 * MIB) as f64 && total > (300 * MIB) as f64,
        "{result}"
    );
    assert!(
        number(&result, "loads") > 0.0,
        "the model is larger than its cgroup: {result}"
    );
}

#[test]
fn more_than_there_is_is_refused_and_never_lowered() {
    let model = model();
    let group = match Cgroup::new("refuse", 300 * MIB) {
        Ok(group) => group,
        Err(error) => return skip(&error.to_string()),
    };
    let output = common::output(&mut group.wrap(&run(&model, &["--memory", "600MiB"])));
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(said["error"]["status"], "REFUSED");
    assert_eq!(said["error"]["exit_code"], 4);
}
