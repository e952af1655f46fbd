//! `flea run` as the tests call it: prompts, budgets, and what two runs must agree in.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::{flea, json, number};

/// The smallest weight budget that plans, as a percentage of the model for --memory.
pub fn smallest_percent(model: &Path, extra: &[&str]) -> String {
    let plan = json(
        flea()
            .arg("plan")
            .arg(model)
            .args(["--memory", "400%", "--json"])
            .args(extra),
    );
    let percent = number(&plan, "smallest_budget_bytes") / number(&plan, "model_bytes") * 100.0;
    format!("{:.3}%", percent + 0.001)
}

/// Two runs of 12 tokens that chose the same and computed the same, bit for bit.
pub fn assert_same(reference: &Value, streamed: &Value, what: &str) {
    assert_eq!(
        reference["logits_hash"], streamed["logits_hash"],
        "{what}: logits differ"
    );
    assert_eq!(reference["token_ids"], streamed["token_ids"], "{what}");
    assert_eq!(
        streamed["token_ids"].as_array().map(Vec::len),
        Some(12),
        "{what}"
    );
}

/// A prompt of one token, and one of 600: two ubatches.
pub fn prompts() -> [String; 2] {
    let ids: Vec<String> = (0..600u32)
        .map(|index| (260 + index * 7 % 500).to_string())
        .collect();
    ["300".to_owned(), ids.join(",")]
}

/// 12 tokens after a prompt.
pub fn after(model: &Path, prompt: &str, extra: &[&str]) -> Command {
    let mut command = flea();
    command
        .arg("run")
        .arg(model)
        .args(["--prompt-tokens", prompt, "-n", "12"]);
    command.args(["--ignore-eos", "--json", "--threads", "2", "--ctx", "1024"]);
    command.args(extra);
    command
}
