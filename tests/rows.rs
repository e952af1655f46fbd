//! Rows and experts as a user meets them: `flea probe rows`, `flea bench policies`, and synthetic models that stock
//! llama.cpp loads and routes as asked. Rates are never asserted.

#![cfg(feature = "cli")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{flea, json, number, output, skip, synth};
use serde_json::Value;

#[test]
fn the_probe_answers_for_mmap_and_for_the_row_reader() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let answer = json(flea().current_dir(&directory).args([
        "probe",
        "rows",
        "--synth",
        "32MiB",
        "--seconds",
        "50ms",
        "--budget",
        "16MiB",
        "--target",
        "0.001",
        "--json",
    ]));
    assert_eq!(
        std::fs::read_dir(&directory).expect("a directory").count(),
        0
    );
    assert_eq!(answer["temporary_file"], true);
    assert_eq!(answer["speed_verdict"], "PASS");
    let cases = answer["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), 15);
    for case in cases {
        assert!(
            number(case, "tokens") > 0.0 && number(case, "drive_bytes") > 0.0,
            "{case}"
        );
        assert!(number(case, "p50_ns") <= number(case, "p99_ns"), "{case}");
        if case["way"] == "flea" {
            assert_eq!(number(case, "page_cache_bytes"), 0.0, "{case}");
            assert!(number(case, "reads") > 0.0, "{case}");
        }
    }
}

#[test]
fn a_target_that_cannot_be_reached_fails_and_a_missing_file_is_named() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let failed = output(flea().current_dir(&directory).args([
        "probe",
        "rows",
        "--synth",
        "16MiB",
        "--seconds",
        "20ms",
        "--budget",
        "16MiB",
        "--target",
        "1e9",
    ]));
    assert_eq!(failed.status.code(), Some(1));
    let said = String::from_utf8_lossy(&failed.stdout).into_owned();
    assert!(
        said.contains("FAIL") && said.contains("MADV_RANDOM"),
        "{said}"
    );
    let missing = output(flea().args(["probe", "rows", "/nowhere/table"]));
    assert!(!missing.status.success());
    assert!(String::from_utf8_lossy(&missing.stderr).contains("/nowhere/table"));
    let small = output(
        flea()
            .current_dir(&directory)
            .args(["probe", "rows", "--synth", "16MiB", "--budget", "4MiB"]),
    );
    assert_eq!(
        small.status.code(),
        Some(4),
        "a budget below the reads in flight is refused"
    );
}

#[test]
fn policies_are_measured_beside_the_bound() {
    let answer = json(flea().args([
        "bench", "policies", "--layers", "4", "--tokens", "300", "--json",
    ]));
    let traces = answer["traces"].as_array().expect("traces");
    assert_eq!(traces.len(), 3);
    for trace in traces {
        for point in trace["points"].as_array().expect("points") {
            let rates = point["hit_rate"].as_object().expect("rates");
            assert_eq!(rates.len(), 4);
            let bound = number(point, "belady");
            assert!(
                rates
                    .values()
                    .all(|rate| rate.as_f64().expect("a rate") <= bound),
                "{point}"
            );
        }
    }
    let own = json(flea().args([
        "bench",
        "policies",
        "--layers",
        "2",
        "--tokens",
        "100",
        "--popular-share",
        "1",
        "--skew",
        "3",
        "--json",
    ]));
    assert_eq!(own["traces"][0]["trace"], "own");
    assert!(number(&own["traces"][0], "top_tenth_share") > 0.9);
    let bad = output(flea().args(["bench", "policies", "--experts", "4", "--experts-used", "8"]));
    assert_eq!(
        bad.status.code(),
        Some(2),
        "{}",
        String::from_utf8_lossy(&bad.stderr)
    );
}

/// The tests' own stock llama.cpp host; `None`, with the reason printed, where scripts/test.sh has not built it.
fn stock() -> Option<PathBuf> {
    let host =
        std::env::var_os("FLEA_TEST_HOSTS").map(|path| PathBuf::from(path).join("llama-logits"));
    let usable = host.filter(|host| host.exists());
    if usable.is_none() {
        skip("no stock llama.cpp host: run scripts/test.sh");
    }
    usable
}

/// What stock llama.cpp makes of a model: the tokens it chooses, and the experts, where `experts` is to be written.
fn generate(host: &Path, model: &Path, tokens: &str, experts: Option<&Path>) -> Value {
    let mut command = Command::new(host);
    command
        .arg("-m")
        .arg(model)
        .args(["--prompt-tokens", tokens, "-n", "32", "--threads", "1"]);
    if let Some(path) = experts {
        command.arg("--experts").arg(path);
    }
    json(&mut command)
}

#[test]
fn stock_llama_cpp_runs_gpt_oss_and_gemma3n() {
    let Some(host) = stock() else { return };
    for (arch, dtype) in [
        ("gpt-oss", "mxfp4"),
        ("gpt-oss", "q8_0"),
        ("gemma3n", "q8_0"),
        ("gemma3n", "q4_0"),
    ] {
        let arguments = [
            "--arch", arch, "--type", dtype, "--layers", "6", "--embd", "256", "--ffn", "512",
            "--vocab", "2000",
        ];
        let model = synth(&format!("{arch}-{dtype}"), &arguments);
        let first = generate(&host, &model, "300,700,1100,1500", None);
        let second = generate(&host, &model, "301,700,1100,1500", None);
        let tokens = first["token_ids"].as_array().expect("tokens");
        let distinct: std::collections::BTreeSet<String> =
            tokens.iter().map(Value::to_string).collect();
        assert!(
            distinct.len() >= 12,
            "{arch} {dtype} says the same again and again: {tokens:?}"
        );
        assert_ne!(
            first["logits_hash"], second["logits_hash"],
            "{arch} {dtype}: the prompt has to matter"
        );
    }
}

/// Share of the uses that the most used tenth of the experts of each layer gets, from what `--experts` wrote.
fn top_tenth(path: &Path, experts: usize) -> f64 {
    let text = std::fs::read_to_string(path).expect("the experts");
    let mut uses: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    for line in text.lines() {
        let (layer, chosen) = line.split_once(' ').expect("a layer and experts");
        let counts = uses.entry(layer).or_insert_with(|| vec![0; experts]);
        for expert in chosen.split(' ') {
            counts[expert.parse::<usize>().expect("an expert")] += 1;
        }
    }
    let top = (experts as f64 * 0.1).round() as usize;
    let share = |counts: &mut Vec<u32>| {
        counts.sort_unstable_by(|a, b| b.cmp(a));
        f64::from(counts[..top].iter().sum::<u32>()) / f64::from(counts.iter().sum::<u32>())
    };
    let layers = uses.len() as f64;
    uses.values_mut().map(share).sum::<f64>() / layers
}

#[test]
fn stock_llama_cpp_routes_as_the_skew_says() {
    let Some(host) = stock() else { return };
    let tokens: Vec<String> = (0..160)
        .map(|i| (300 + i * 37 % 1500).to_string())
        .collect();
    let share = |skew: &str| {
        let arguments = [
            "--arch",
            "qwen3moe",
            "--type",
            "q8_0",
            "--layers",
            "4",
            "--embd",
            "256",
            "--ffn",
            "256",
            "--experts",
            "128",
            "--experts-used",
            "8",
            "--vocab",
            "2000",
            "--router-skew",
            skew,
        ];
        let model = synth(&format!("routed-{skew}"), &arguments);
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("experts");
        generate(&host, &model, &tokens.join(","), Some(&path));
        top_tenth(&path, 128)
    };
    let (even, half, hot) = (share("even"), share("0.5"), share("hot"));
    assert!(even < 0.25, "{even}");
    assert!((0.35..0.55).contains(&half), "{half}");
    assert!((0.72..0.85).contains(&hot), "{hot}");
}
