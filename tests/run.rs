//! `flea run`, end to end: streamed logits are the resident ones bit for bit, and the counters prove that it streamed.

mod common;
#[path = "common/daemon.rs"]
mod daemon;
#[path = "common/generate.rs"]
mod generate;

use common::{flea, json, number, synth, tiny};
use generate::{after, assert_same, prompts, smallest_percent};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// Ids that every synthetic vocabulary of these tests has.
const PROMPT: &str = "1,300,301,302,303,304,305,306,307,308,309,310";

fn run(model: &Path, arguments: &[&str]) -> Command {
    let mut command = flea();
    command.arg("run").arg(model).args([
        "--prompt-tokens",
        PROMPT,
        "-n",
        "12",
        "--ignore-eos",
        "--json",
        "--threads",
        "2",
        "--ctx",
        "512",
    ]);
    command.args(arguments);
    command
}

/// What must hold for every run that streamed.
fn assert_streamed(result: &Value) {
    let (resident, model) = (
        number(result, "resident_bytes"),
        number(result, "model_bytes"),
    );
    assert!(resident < model, "{result}");
    assert!(
        number(result, "acquires") > 0.0 && number(result, "loads") > 0.0,
        "{result}"
    );
    assert!(
        number(result, "bytes_read") > number(result, "streamed_bytes_per_pass"),
        "{result}"
    );
}

fn check_architecture(arch: &str, dtypes: &[&str]) {
    for dtype in dtypes {
        let model = tiny(arch, dtype);
        let reference = json(&mut run(&model, &["--no-stream"]));
        assert_eq!(number(&reference, "acquires"), 0.0);
        // Experts come with their layer here; by themselves below.
        let least = smallest_percent(&model, &["--whole-experts"]);
        for (index, memory) in [least.as_str(), "60%", "90%", "110%"]
            .into_iter()
            .enumerate()
        {
            // The pairings rotate, so that every backing and reader meets every architecture without a run for each.
            let (backing, reader) = [
                ("private", "io_uring"),
                ("shared", "pread"),
                ("private", "pread"),
                ("shared", "io_uring"),
            ][index];
            let what = format!("{arch} {dtype} {memory} {backing} {reader}");
            let result = json(&mut run(
                &model,
                &[
                    "--memory",
                    memory,
                    "--backing",
                    backing,
                    "--reader",
                    reader,
                    "--whole-experts",
                ],
            ));
            assert_same(&reference, &result, &what);
            assert_eq!(result["reader"], reader, "{what}");
            assert!(number(&result, "acquires") >= 12.0, "{what}");
            if memory != "110%" {
                assert_streamed(&result);
            }
        }
    }
}

/// Three processes at once, streaming one model through one daemon that holds a part of it.
#[test]
fn through_the_daemon_it_is_bit_identical_too() {
    for (arch, dtype) in [("llama", "q4_k_m"), ("gemma3", "q8_0"), ("mixtral", "q8_0")] {
        let model = tiny(arch, dtype);
        let reference = json(&mut run(&model, &["--no-stream"]));
        let daemon = daemon::Daemon::start(&[]);
        let mut control = daemon.control();
        let load = serde_json::json!({ "path": model });
        let loaded = control.request("load", load).expect("loaded");
        daemon.budget(loaded["smallest_budget_bytes"].as_u64().expect("a size") + (256 << 10));
        let socket = daemon.socket.to_str().expect("UTF-8");
        let results = std::thread::scope(|scope| {
            let runs =
                [(); 3].map(|()| scope.spawn(|| json(&mut run(&model, &["--daemon", socket]))));
            runs.map(|run| run.join().expect("a run"))
        });
        for result in &results {
            assert_same(&reference, result, arch);
            assert_streamed(result);
        }
        let status = daemon.status();
        let acquires: f64 = results
            .iter()
            .map(|result| number(result, "acquires"))
            .sum();
        assert_eq!(
            status.models[0].acquires_total as f64, acquires,
            "{status:?}"
        );
        assert_eq!((status.revoked_total, status.clients.len()), (0, 0));
    }
}

#[test]
fn a_daemon_that_is_not_there_is_exit_code_3_and_named() {
    let model = tiny("llama", "q8_0");
    let said = common::output(&mut run(&model, &["--daemon", "/nowhere/flea.sock"]));
    assert_eq!(said.status.code(), Some(3));
    let text = String::from_utf8_lossy(&said.stderr);
    assert!(text.contains("/nowhere/flea.sock"), "{text}");
    let both = common::output(&mut run(
        &model,
        &["--daemon", "/nowhere/flea.sock", "--memory", "1GiB"],
    ));
    assert_eq!(both.status.code(), Some(2), "whose memory?");
}

#[test]
fn llama_is_bit_identical() {
    check_architecture("llama", &["f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q6_k"]);
}

#[test]
fn qwen2_is_bit_identical() {
    check_architecture("qwen2", &["q8_0", "q4_k_m"]);
}

#[test]
fn qwen3_is_bit_identical() {
    check_architecture("qwen3", &["bf16", "q4_0"]);
}

#[test]
fn gemma3_is_bit_identical() {
    check_architecture("gemma3", &["f16", "q6_k"]);
}

#[test]
fn mixtral_is_bit_identical() {
    check_architecture("mixtral", &["q8_0", "q4_k_m"]);
}

#[test]
fn qwen3moe_is_bit_identical() {
    check_architecture("qwen3moe", &["f16", "q4_0"]);
}

/// A second table of embeddings, with a row for each token and layer; its layers are streamed as any others.
#[test]
fn gemma3n_is_bit_identical() {
    let model = tiny("gemma3n", "q8_0");
    let least = smallest_percent(&model, &[]);
    for prompt in prompts() {
        let reference = json(&mut after(&model, &prompt, &["--no-stream"]));
        for (memory, reader) in [(least.as_str(), "io_uring"), ("50%", "pread")] {
            let arguments = ["--memory", memory, "--reader", reader];
            let result = json(&mut after(&model, &prompt, &arguments));
            let what = format!("gemma3n {memory} {reader}, prompt of {}", prompt.len());
            assert_same(&reference, &result, &what);
            assert_streamed(&result);
        }
    }
}

#[test]
fn tied_and_untied_heads_are_bit_identical() {
    for tied in [&["--tied"][..], &[]] {
        let mut arguments = vec![
            "--arch",
            "llama",
            "--layers",
            "5",
            "--embd",
            "256",
            "--ffn",
            "512",
            "--heads",
            "4",
            "--kv-heads",
            "4",
        ];
        // A head several times larger than a layer is cut by rows; 4003 rows cannot be cut evenly.
        arguments.extend(["--vocab", "4003", "--type", "f16", "--seed", "3"]);
        arguments.extend(tied);
        let model = synth("head", &arguments);
        let catalog = json(flea().arg("inspect").arg(&model).arg("--json"));
        let reference = json(&mut run(&model, &["--no-stream"]));
        let result = json(&mut run(
            &model,
            &["--memory", &smallest_percent(&model, &[])],
        ));
        assert_same(&reference, &result, &format!("tied={tied:?} {catalog}"));
        assert_streamed(&result);
    }
}

#[test]
fn a_prompt_longer_than_a_ubatch_is_bit_identical() {
    let model = tiny("llama", "q4_k_m");
    let ids: Vec<String> = (0..150u32)
        .map(|index| (260 + index * 7 % 500).to_string())
        .collect();
    let prompt = ids.join(",");
    let command = |extra: &[&str]| {
        let mut command = flea();
        command.arg("run").arg(&model).args([
            "--prompt-tokens",
            &prompt,
            "-n",
            "12",
            "--ignore-eos",
            "--json",
            "--threads",
            "2",
        ]);
        command.args(["--ctx", "512", "--ubatch", "32"]).args(extra);
        command
    };
    let reference = json(&mut command(&["--no-stream"]));
    let result = json(&mut command(&["--memory", "70%"]));
    assert_same(&reference, &result, "5 ubatches");
    assert_streamed(&result);
    // 5 passes for the prompt and 11 for the tokens after the first.
    let plan_layers = number(&result, "acquires") / 16.0;
    assert_eq!(
        plan_layers.fract(),
        0.0,
        "every pass acquires every layer once: {result}"
    );
}

#[test]
fn the_counters_agree_with_the_plan_and_with_the_kernel() {
    let model = tiny("llama", "f16");
    let result = json(&mut run(&model, &["--memory", "60%"]));
    let plan = json(
        flea()
            .arg("plan")
            .arg(&model)
            .args(["--memory", "60%", "--json"]),
    );
    assert_eq!(
        number(&plan, "resident_bytes"),
        number(&result, "resident_bytes")
    );
    assert_eq!(
        number(&plan, "streamed_bytes_per_pass"),
        number(&result, "streamed_bytes_per_pass")
    );
    let transient = number(&plan, "transient_layers_count");
    let (loads, passes) = (number(&result, "loads"), 12.0);
    assert!(
        (loads - transient * passes).abs() <= number(&plan, "slots_count"),
        "{loads} loads, {transient} layers: {result}"
    );
    let expected = number(&plan, "resident_bytes")
        + loads * number(&plan, "streamed_bytes_per_pass") / transient;
    let read = number(&result, "bytes_read");
    assert!(
        (read / expected - 1.0).abs() < 0.05,
        "{read} bytes read, the plan says {expected}"
    );
}

#[test]
fn bytes_read_is_what_the_kernel_counts() {
    let model = synth(
        "proc-io",
        &[
            "--arch", "llama", "--size", "300MiB", "--type", "q8_0", "--vocab", "1000",
        ],
    );
    let mut command = flea();
    command
        .args(["bench", "stream"])
        .arg(&model)
        .args(["--memory", "40%", "--passes", "6", "--json"]);
    let result = json(&mut command);
    if result["direct_io"] != true {
        common::skip("the kernel counts O_DIRECT reads only, and this filesystem has no O_DIRECT");
        return;
    }
    let (ours, kernel) = (
        number(&result, "bytes_read"),
        number(&result, "kernel_read_bytes"),
    );
    assert!(
        (ours / kernel - 1.0).abs() < 0.02,
        "flea counts {ours}, /proc/self/io {kernel}"
    );
}

#[test]
fn two_prompts_give_different_logits() {
    let model = tiny("llama", "q8_0");
    let one = json(&mut run(&model, &["--memory", "60%"]));
    let mut command = flea();
    command.arg("run").arg(&model).args([
        "--prompt-tokens",
        "1,400,401",
        "-n",
        "12",
        "--ignore-eos",
        "--json",
        "--memory",
        "60%",
        "--ctx",
        "512",
    ]);
    let other = json(&mut command);
    assert_ne!(one["logits_hash"], other["logits_hash"]);
}

#[test]
fn the_logits_file_holds_one_row_per_token() {
    let model = tiny("llama", "q8_0");
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("logits");
    json(run(&model, &["--memory", "60%"]).arg("--logits").arg(&file));
    let bytes = std::fs::read(&file).expect("the logits");
    assert_eq!(bytes.len(), 12 * 800 * 4);
    let values: Vec<f32> = bytes
        .chunks_exact(4)
        .map(|raw| f32::from_le_bytes(raw.try_into().unwrap()))
        .collect();
    assert!(values.iter().all(|value| value.is_finite()));
    assert!(values.iter().any(|value| *value != values[0]));
}

#[cfg(feature = "faults")]
mod faults {
    use super::*;
    use crate::common::output;

    #[test]
    fn a_flipped_byte_in_a_transient_page_changes_the_logits() {
        let model = tiny("llama", "f16");
        let memory = smallest_percent(&model, &[]);
        let reference = json(&mut run(&model, &["--memory", &memory]));
        let plan = json(
            flea()
                .arg("plan")
                .arg(&model)
                .args(["--memory", &memory, "--json", "--layers"]),
        );
        let layers = plan["layers"].as_array().expect("layers");
        let layer = layers
            .iter()
            .find(|layer| number(layer, "transient_bytes") > 0.0)
            .expect("a streamed layer");
        let middle = (number(layer, "transient_bytes") / 2.0).floor();
        let offset = number(layer, "transient_offset_bytes") + middle + 1.0;
        let flipped =
            json(run(&model, &["--memory", &memory]).env("FLEA_FAULT", format!("flip=0:{offset}")));
        assert_ne!(
            reference["logits_hash"], flipped["logits_hash"],
            "a byte at {offset} was flipped"
        );
    }

    #[test]
    fn delay_poison_short_reads_and_retries_change_nothing() {
        let model = tiny("llama", "f16");
        let reference = json(&mut run(&model, &["--no-stream"]));
        for (reader, backing) in [("io_uring", "private"), ("pread", "shared")] {
            for fault in [
                "delay_ms=3,poison",
                "poison,short_every=3",
                "eio_every=5,poison",
            ] {
                let arguments = ["--memory", "60%", "--reader", reader, "--backing", backing];
                let result = json(run(&model, &arguments).env("FLEA_FAULT", fault));
                assert_same(&reference, &result, &format!("{fault} {reader} {backing}"));
                assert_streamed(&result);
            }
        }
    }

    /// With a slow drive compute starts on the part of a layer that is there; the lease is still one per layer.
    #[test]
    fn compute_starts_on_what_has_arrived() {
        let model = tiny("llama", "f16");
        let reference = json(&mut run(&model, &["--no-stream"]));
        for slots in ["2", "3"] {
            let arguments = ["--memory", "60%", "--slots", slots, "--whole-layers"];
            let slow = "delay_ms=5,poison";
            let early = json(run(&model, &arguments[..4]).env("FLEA_FAULT", slow));
            let whole = json(run(&model, &arguments).env("FLEA_FAULT", slow));
            assert_same(&reference, &early, &format!("early, {slots} slots"));
            assert_same(&reference, &whole, &format!("whole, {slots} slots"));
            assert_streamed(&early);
            assert!(number(&early, "early_pieces") > 0.0, "{early}");
            assert_eq!(whole["early_pieces"], 0, "{whole}");
            assert_eq!(early["acquires"], whole["acquires"], "{early} {whole}");
        }
    }

    /// Whatever ends the thread that reads, the host is told and does not wait for ever.
    #[test]
    fn a_reader_that_panics_ends_the_run() {
        let model = tiny("llama", "q8_0");
        let mut streamed = run(&model, &["--memory", "60%", "--reader", "io_uring"]);
        let output = output(streamed.env("FLEA_FAULT", "panic=5"));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success(), "{text}");
        assert!(text.contains("has panicked"), "{text}");
    }

    /// The proof that the comparisons above can fail: without the wait in acquire they do.
    #[test]
    fn without_the_wait_the_output_is_wrong_or_the_mmu_stops_it() {
        let model = tiny("llama", "f16");
        let reference = json(&mut run(&model, &["--no-stream"]));
        let ended = output(
            run(&model, &["--memory", "60%"]).env("FLEA_FAULT", "nowait,poison,delay_ms=20"),
        );
        if ended.status.success() {
            let result: Value = serde_json::from_slice(&ended.stdout).expect("JSON");
            assert_ne!(
                reference["logits_hash"], result["logits_hash"],
                "the wait does nothing"
            );
        }
    }
}

/// Two copies of the model serve one run: the same logits bit for bit, both were read from, and the trace shows it all.
#[test]
fn mirrors_and_a_trace_change_no_bit() {
    let model = tiny("llama", "q8_0");
    let copies = tempfile::tempdir().expect("a directory");
    std::fs::copy(
        &model,
        copies.path().join(model.file_name().expect("a name")),
    )
    .expect("a copy");
    let trace = copies.path().join("trace.json");
    let smallest = smallest_percent(&model, &[]);
    let plain = json(&mut run(&model, &["--memory", &smallest]));
    let arguments = [
        "--memory",
        smallest.as_str(),
        "--request-bytes",
        "64KiB",
        "--depth",
        "4",
        "--mirror",
        copies.path().to_str().expect("a path"),
        "--trace",
        trace.to_str().expect("a path"),
    ];
    let mirrored = json(&mut run(&model, &arguments));
    assert_streamed(&mirrored);
    assert_eq!(mirrored["logits_hash"], plain["logits_hash"]);
    let copies = mirrored["mirrors"].as_array().expect("mirrors");
    assert_eq!(copies.len(), 2);
    let read: f64 = copies.iter().map(|copy| number(copy, "bytes_read")).sum();
    assert!(
        copies.iter().all(|copy| number(copy, "bytes_read") > 0.0),
        "{mirrored}"
    );
    assert!(read >= number(&mirrored, "bytes_read"), "{mirrored}");
    let trace: Value = serde_json::from_str(&std::fs::read_to_string(trace).expect("the trace"))
        .expect("valid JSON");
    let events = trace["traceEvents"].as_array().expect("events");
    for kind in ["read", "compute"] {
        assert!(events.iter().any(|event| event["cat"] == kind), "no {kind}");
    }
}

/// What a plan predicts without any measurement is nothing, and with one it is a number.
#[test]
fn a_plan_names_its_profile() {
    let model = tiny("llama", "q8_0");
    let plan = |profiles: &str| {
        json(
            flea()
                .env("FLEA_PROFILE", profiles)
                .arg("plan")
                .arg(&model)
                .args(["--memory", "60%", "--json"]),
        )
    };
    let none = plan("none");
    assert!(
        none["prediction"].is_null()
            && none["profile"]
                .as_str()
                .is_some_and(|p| p.starts_with("none"))
    );
    let directory = tempfile::tempdir().expect("a directory");
    let probed = json(
        flea()
            .env("FLEA_PROFILE", directory.path())
            .arg("probe")
            .arg(model.parent().expect("a directory"))
            .args(["--size", "64MiB", "--seconds", "2ms", "--sustain", "20ms"])
            .args(["--max-spread", "1000", "--target", "1MB/s", "--json"]),
    );
    assert_eq!(probed["verdict"], "PASS");
    let measured = plan(directory.path().to_str().expect("a path"));
    assert!(
        number(&measured["prediction"], "tokens_per_second") > 0.0,
        "{measured}"
    );
    assert!(
        number(&measured["prediction"], "compute_seconds") > 0.0,
        "{measured}"
    );
    assert!(
        measured["profile"]
            .as_str()
            .is_some_and(|p| p.starts_with("measured 20")),
        "{measured}"
    );
}
