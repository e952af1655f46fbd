//! Stock, unmodified llama.cpp with flea's ggml device plugged in, and the same without it.

// A test file uses what it needs.
#![allow(dead_code)]

use crate::common::{number, output, skip};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

/// 70 ids that every synthetic vocabulary of these tests has: three ubatches of 32.
pub fn prompt() -> String {
    let ids: Vec<String> = (0..70).map(|i| (300 + i * 37 % 400).to_string()).collect();
    ids.join(",")
}

pub struct Stock {
    pub device: PathBuf,
    pub logits: PathBuf,
    pub programs: PathBuf,
}

impl Stock {
    /// `None`, with the reason printed, where scripts/test.sh has not prepared the ground.
    pub fn find() -> Option<Self> {
        let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let found = (|| {
            Some(Self {
                device: path("FLEA_TEST_GGML_FLEA")?,
                logits: path("FLEA_TEST_HOSTS")?.join("llama-logits"),
                programs: path("FLEA_TEST_LLAMA_CPP")?.join("build/bin"),
            })
        })();
        let usable = found.filter(|stock| stock.device.exists() && stock.logits.exists());
        if usable.is_none() {
            skip("no stock llama.cpp with the ggml device: run scripts/test.sh");
        }
        usable
    }

    /// A stock program with the device plugged in; the second value reads what FLEA_STATS wrote.
    pub fn plugged(&self, program: &Path, memory: &str) -> (Command, PathBuf) {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let stats = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("stats-{}-{number}.json", std::process::id()));
        let mut command = bare(program);
        command
            .env("GGML_BACKEND_PATH", &self.device)
            .env("FLEA_STATS", &stats);
        if !memory.is_empty() {
            command.env("FLEA_MEMORY", memory);
        }
        (command, stats)
    }

    /// llama-logits on the device. Panics unless it succeeded.
    pub fn streamed(&self, model: &Path, memory: &str, arguments: &[&str]) -> (Vec<u8>, Value) {
        let (mut command, stats) = self.plugged(&self.logits, memory);
        let rows = generate(command.args(["--device", "FLEA"]), model, arguments);
        (rows, take_stats(&stats))
    }

    pub fn reference(&self, model: &Path, arguments: &[&str]) -> Vec<u8> {
        generate(
            bare(&self.logits).args(["--device", "none"]),
            model,
            arguments,
        )
    }
}

pub fn bare(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FLEA_") {
            command.env_remove(name);
        }
    }
    command.env_remove("GGML_BACKEND_PATH");
    command
}

pub fn generate(command: &mut Command, model: &Path, arguments: &[&str]) -> Vec<u8> {
    let rows = tempfile::NamedTempFile::new().expect("a temporary file");
    command.arg("-m").arg(model).arg("-o").arg(rows.path());
    command
        .args([
            "--prompt-tokens",
            &prompt(),
            "-n",
            "8",
            "--ubatch",
            "32",
            "--ctx",
            "256",
        ])
        .args(arguments);
    let said = output(command);
    assert!(
        said.status.success(),
        "{command:?}: {}\n{}",
        said.status,
        stderr(&said)
    );
    fs::read(rows.path()).expect("logits")
}

pub fn take_stats(path: &Path) -> Value {
    let text = fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("no FLEA_STATS at {}: {error}", path.display()));
    fs::remove_file(path).expect("remove");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

pub fn stderr(said: &Output) -> String {
    String::from_utf8_lossy(&said.stderr).into_owned()
}

/// Everything is on the device, part of it is streamed, and each graph walked all layers once.
pub fn assert_streamed(stats: &Value, what: &str) {
    assert!(stats["error"].is_null(), "{what}: {stats}");
    assert_eq!(stats["layers_placed"], stats["layers"], "{what}: {stats}");
    let resident = number(stats, "resident_bytes");
    assert!(
        resident > 0.0 && resident < number(stats, "model_bytes"),
        "{what}: {stats}"
    );
    assert!(
        number(stats, "streamed_bytes_per_pass") > 0.0 && number(stats, "loads") > 0.0,
        "{what}: {stats}"
    );
    assert_eq!(
        number(stats, "acquires"),
        number(stats, "graphs") * number(stats, "layers"),
        "{what}: {stats}"
    );
    assert!(
        number(stats, "peak_memory_bytes") <= number(stats, "total_bytes") + f64::from(32 << 20),
        "{what}: {stats}"
    );
}
