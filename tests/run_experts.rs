//! `flea run` with experts that are fetched one by one: the same bits as with all of them in memory, and what was read is what was
//! missing.

#![cfg(feature = "run")]

mod common;
#[path = "common/generate.rs"]
mod generate;

use common::{flea, json, number, synth};
use generate::{after, assert_same, prompts, smallest_percent};

/// Experts that are fetched one by one: the same bits, for prompts of one token and of several ubatches, down to the smallest
/// cache, and what was read is what was missing.
fn check_experts(arch: &str, dtype: &str) {
    let mut arguments = vec![
        "--arch", arch, "--layers", "6", "--embd", "256", "--ffn", "512",
    ];
    arguments.extend([
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--vocab",
        "800",
        "--seed",
        "7",
    ]);
    arguments.extend(["--experts", "16", "--experts-used", "4", "--type", dtype]);
    let model = synth(&format!("experts-{arch}-{dtype}"), &arguments);
    let least = smallest_percent(&model, &[]);
    for prompt in prompts() {
        let command = |extra: &[&str]| after(&model, &prompt, extra);
        let reference = json(&mut command(&["--no-stream"]));
        for (memory, reader) in [
            (least.as_str(), "io_uring"),
            ("45%", "pread"),
            ("70%", "io_uring"),
        ] {
            let what = format!(
                "{arch} {dtype} {memory} {reader}, prompt of {}",
                prompt.len()
            );
            let result = json(&mut command(&["--memory", memory, "--reader", reader]));
            assert_same(&reference, &result, &what);
            let plan = json(
                flea()
                    .arg("plan")
                    .arg(&model)
                    .args(["--memory", memory, "--json"]),
            );
            let experts = &plan["experts"];
            assert_eq!(
                number(&result, "resident_bytes"),
                number(&plan, "resident_bytes"),
                "{what}"
            );
            assert_eq!(
                number(&result, "expert_cache_bytes"),
                number(experts, "cache_bytes"),
                "{what}"
            );
            let (hits, misses) = (
                number(&result, "expert_hits"),
                number(&result, "expert_misses"),
            );
            // The smallest cache holds one layer: what it held is gone when its turn comes again.
            assert!(
                (hits > 0.0 || memory == least) && misses > 0.0,
                "{what}: {result}"
            );
            // Tokens one by one are not foreseen; a batch that needs every expert is, where one layer's fit.
            let ahead = number(&result, "expert_reads_ahead");
            let is_batch = number(&result, "prompt_tokens") > 100.0;
            assert!(
                if is_batch {
                    ahead > 0.0 || memory == least
                } else {
                    ahead == 0.0
                },
                "{what}: {result}"
            );
            assert!(
                number(&result, "expert_cuts") >= 12.0 * 6.0,
                "{what}: {result}"
            );
            // Pages that two experts share are read once and stay.
            let own = number(experts, "experts_bytes") - number(experts, "shared_bytes");
            let each = own / number(experts, "units_count");
            let read = number(&result, "expert_bytes_read");
            assert!(
                (read / (misses * each) - 1.0).abs() < 0.05,
                "{what}: {read} bytes read for {misses} parts of {each}"
            );
            let (decoded, missed) = (
                number(&result, "decode_expert_bytes_read"),
                number(&result, "decode_expert_misses"),
            );
            assert!(
                missed > 0.0 && missed <= misses && (decoded / (missed * each) - 1.0).abs() < 0.05,
                "{what}: {decoded} bytes read while decoding for {missed} parts of {each}"
            );
            let read_ahead = number(&result, "expert_bytes_read_ahead");
            let all = number(&result, "bytes_read");
            let known = read + read_ahead + number(&result, "resident_bytes");
            assert!(
                (all / known - 1.0).abs() < 0.02,
                "{what}: {all} bytes read, {known} known"
            );
        }
    }
}

/// What the next router may choose is read ahead, right or wrong, and changes no bit.
#[test]
fn guessed_experts_change_nothing() {
    let arguments = "--arch qwen3moe --layers 6 --embd 256 --ffn 512 --heads 4 --kv-heads 2 --vocab 800 --seed 7 --experts 16 \
                     --experts-used 4 --type q4_k_m";
    let model = synth(
        "experts-guessed",
        &arguments.split_whitespace().collect::<Vec<_>>(),
    );
    let least = smallest_percent(&model, &[]);
    for prompt in prompts() {
        let command = |extra: &[&str]| after(&model, &prompt, extra);
        let reference = json(&mut command(&["--no-stream"]));
        for memory in [least.as_str(), "45%"] {
            let result = json(&mut command(&["--memory", memory, "--expert-prefetch"]));
            assert_same(&reference, &result, memory);
            let (guesses, right) = (
                number(&result, "expert_guesses"),
                number(&result, "expert_guesses_right"),
            );
            assert!(right > 0.0 && right <= guesses, "{memory}: {result}");
            let plain = json(&mut command(&["--memory", memory]));
            assert_eq!(number(&plain, "expert_guesses"), 0.0, "off by default");
        }
    }
}

#[test]
fn experts_one_by_one_are_bit_identical_in_mixtral() {
    check_experts("mixtral", "q8_0");
}

#[test]
fn experts_one_by_one_are_bit_identical_in_qwen3moe() {
    check_experts("qwen3moe", "q4_k_m");
}

/// MXFP4 experts with biases, attention sinks, every other layer with a sliding window.
#[test]
fn experts_one_by_one_are_bit_identical_in_gpt_oss() {
    check_experts("gpt-oss", "mxfp4");
}
