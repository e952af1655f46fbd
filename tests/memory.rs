//! `--memory` is for everything the process holds: in a memory cgroup barely above it, a model four times that size runs
//! to the end, is never killed, and says what it says without a limit.

mod common;

use common::{flea, json, number, skip, synth};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;

/// A memory cgroup of our own, gone when dropped. Version 1 and 2.
struct Cgroup {
    path: PathBuf,
    peak: &'static str,
    events: &'static str,
}

impl Cgroup {
    fn new(name: &str, limit_bytes: u64) -> Result<Self, String> {
        let (root, limit, peak, events) = if Path::new("/sys/fs/cgroup/memory").is_dir() {
            (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.max_usage_in_bytes",
                "memory.oom_control",
            )
        } else {
            (
                "/sys/fs/cgroup",
                "memory.max",
                "memory.peak",
                "memory.events",
            )
        };
        let path = Path::new(root).join(format!("flea-test-{name}-{}", std::process::id()));
        fs::create_dir(&path)
            .map_err(|error| format!("no memory cgroup of our own can be made: {error}"))?;
        let group = Self { path, peak, events };
        fs::write(group.path.join(limit), limit_bytes.to_string())
            .map_err(|error| format!("no memory cgroup of our own can be limited: {error}"))?;
        Ok(group)
    }

    /// The command, started inside: a shell moves itself in and becomes the program.
    fn wrap(&self, command: &Command) -> Command {
        let mut inside = Command::new("/bin/sh");
        inside
            .arg("-c")
            .arg(r#"echo $$ > "$0/cgroup.procs" && exec "$@""#)
            .arg(&self.path);
        inside.arg(command.get_program()).args(command.get_args());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("FLEA_") {
                inside.env_remove(name);
            }
        }
        inside
    }

    fn number(&self, file: &str, key: &str) -> u64 {
        let text = fs::read_to_string(self.path.join(file)).unwrap_or_default();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .unwrap_or("0");
        value.trim().parse().unwrap_or(0)
    }

    fn oom_kills(&self) -> u64 {
        self.number(self.events, "oom_kill ")
    }

    fn peak_bytes(&self) -> u64 {
        self.number(self.peak, "")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

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
    let model_bytes = fs::metadata(&model).expect("metadata").len();
    let total_bytes = model_bytes / 4;
    let group = match Cgroup::new("run", total_bytes + 64 * MIB) {
        Ok(group) => group,
        Err(reason) => return skip(&reason),
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
        assert!(group.peak_bytes() <= total_bytes + 64 * MIB, "{backing}");
    }
}

#[test]
fn the_automatic_budget_stays_inside_the_cgroup() {
    let model = model();
    let group = match Cgroup::new("auto", 700 * MIB) {
        Ok(group) => group,
        Err(reason) => return skip(&reason),
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
        Err(reason) => return skip(&reason),
    };
    let output = common::output(&mut group.wrap(&run(&model, &["--memory", "600MiB"])));
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(said["error"]["status"], "REFUSED");
    assert_eq!(said["error"]["exit_code"], 4);
}
