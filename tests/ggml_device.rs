//! The ggml device in stock, unmodified llama.cpp: same logits bit for bit, and flea's own counters prove that the weights
//! were streamed. Needs what scripts/test.sh builds: libggml-flea.so, llama.cpp's programs, and the tests' own host
//! llama-logits, which knows nothing of flea.

mod common;
#[path = "common/daemon.rs"]
mod daemon;
#[path = "support/gguf_bytes.rs"]
mod gguf_bytes;
#[path = "common/stock.rs"]
mod stock;

use common::{flea, number, output, skip, synth, tiny};
use gguf_bytes::{GgufBytes, text, typed};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use stock::{Stock, assert_streamed, bare, generate, prompt, stderr, take_stats};

#[test]
fn streamed_logits_are_llama_cpps_bit_for_bit() {
    let Some(stock) = Stock::find() else { return };
    let shapes = [
        ("llama", "q8_0"),
        ("llama", "f16"),
        ("llama", "q4_k_m"),
        ("qwen2", "q4_0"),
        ("qwen3", "bf16"),
        ("gemma3", "q6_k"),
        ("mixtral", "q8_0"),
        ("qwen3moe", "q8_0"),
    ];
    for (arch, dtype) in shapes {
        let model = tiny(arch, dtype);
        let reference = stock.reference(&model, &[]);
        for memory in ["75%", "110%"] {
            let what = format!("{arch} {dtype} {memory}");
            let (rows, stats) = stock.streamed(&model, memory, &[]);
            assert!(rows == reference, "{what}: the logits differ; {stats}");
            if memory == "75%" {
                assert_streamed(&stats, &what);
            } else {
                assert_eq!(
                    number(&stats, "streamed_bytes_per_pass"),
                    0.0,
                    "{what}: {stats}"
                );
            }
        }
    }
}

#[test]
fn through_the_daemon_the_logits_are_the_same() {
    let Some(stock) = Stock::find() else { return };
    let model = tiny("llama", "q8_0");
    let reference = stock.reference(&model, &[]);
    let daemon = daemon::Daemon::start(&[]);
    let mut control = daemon.control();
    let load = serde_json::json!({ "path": model });
    let loaded = control.request("load", load).expect("loaded");
    daemon.budget(loaded["smallest_budget_bytes"].as_u64().expect("a size") + (256 << 10));
    let endpoint = format!("unix:{}", daemon.socket.display());
    let (mut command, stats) = stock.plugged(&stock.logits, "");
    command
        .env("FLEA_ENDPOINT", &endpoint)
        .args(["--device", "FLEA"]);
    let rows = generate(&mut command, &model, &[]);
    let stats = take_stats(&stats);
    assert!(rows == reference, "the logits differ; {stats}");
    assert_eq!(stats["layers_placed"], stats["layers"], "{stats}");
    assert!(
        number(&stats, "loads") > 0.0 && number(&stats, "acquires") > 0.0,
        "{stats}"
    );
    let status = daemon.status();
    assert_eq!(
        status.models[0].acquires_total as f64,
        number(&stats, "acquires")
    );
    // A budget of its own and a daemon's do not go together: that is said, not guessed.
    let (mut both, _) = stock.plugged(&stock.logits, "1GiB");
    both.env("FLEA_ENDPOINT", &endpoint)
        .args([
            "--device",
            "FLEA",
            "--prompt-tokens",
            "300",
            "-n",
            "1",
            "-m",
        ])
        .arg(&model);
    let said = output(&mut both);
    assert!(!said.status.success());
    assert!(stderr(&said).contains("memory is set"), "{}", stderr(&said));
}

#[test]
fn every_way_to_load_and_to_read_gives_the_same() {
    let Some(stock) = Stock::find() else { return };
    let model = tiny("llama", "q8_0");
    let reference = stock.reference(&model, &[]);
    for mode in ["none", "mmap", "dio"] {
        let (rows, stats) = stock.streamed(&model, "75%", &["--load-mode", mode]);
        assert!(rows == reference, "--load-mode {mode}");
        assert_streamed(&stats, mode);
        // A stock loader reads every weight once by itself; all of those bytes are dropped, and said.
        assert_eq!(stats["loader_bytes"], stats["placed_bytes"], "{stats}");
    }
    let (mut command, path) = stock.plugged(&stock.logits, "75%");
    let rows = generate(
        command
            .env("FLEA_READER", "pread")
            .args(["--device", "FLEA"]),
        &model,
        &[],
    );
    let stats = take_stats(&path);
    assert!(rows == reference);
    assert_eq!(stats["reader"], "pread", "{stats}");
    assert_streamed(&stats, "pread");
}

/// llama.cpp keeps embeddings to itself; told to put them on the device (-ot), it need not have them in memory either.
#[test]
fn embeddings_on_the_device_are_read_by_rows() {
    let Some(stock) = Stock::find() else { return };
    for (arch, dtype, vocab, tables) in [
        ("llama", "f16", "40000", 1.0),
        ("gemma3n", "q8_0", "70000", 2.0),
    ] {
        let mut arguments = vec!["--arch", arch, "--type", dtype, "--vocab", vocab];
        arguments.extend([
            "--layers", "4", "--embd", "256", "--ffn", "512", "--seed", "7",
        ]);
        arguments.extend(["--heads", "4", "--kv-heads", "2"]);
        let model = synth(&format!("rows-{arch}-{dtype}"), &arguments);
        let reference = stock.reference(&model, &[]);
        let (logits, kept) = stock.streamed(&model, "20%", &[]);
        assert!(logits == reference, "{arch}: the logits differ; {kept}");
        assert_eq!(number(&kept, "rows"), 0.0, "{kept}");
        // Both names; two contexts on threads of their own share the row readers.
        for contexts in ["1", "2"] {
            let arguments = ["--on-device", "token_embd", "--contexts", contexts];
            let (logits, stats) = stock.streamed(&model, "20%", &arguments);
            assert!(logits == reference, "{arch}: the logits differ; {stats}");
            assert_streamed(&stats, arch);
            // 70 tokens of the prompt and 7 that were chosen.
            let wanted = 77.0 * tables * contexts.parse::<f64>().expect("a number");
            assert_eq!(number(&stats, "rows"), wanted, "{stats}");
            assert!(
                number(&stats, "row_bytes_read") > 0.0 && number(&stats, "rows_bytes") > 0.0,
                "{stats}"
            );
        }
        let table = flea::engine::read_catalog(&model).expect("a catalog").0;
        let kept_bytes = number(&kept, "host_bytes");
        let (_, stats) = stock.streamed(&model, "20%", &["--on-device", "token_embd"]);
        let less = kept_bytes - number(&stats, "host_bytes");
        assert!(
            less > 0.7 * table.host_tensor_bytes as f64,
            "{arch}: the host holds {less} less of {}",
            table.host_tensor_bytes
        );
    }
}

#[test]
fn many_contexts_share_three_slots() {
    let Some(stock) = Stock::find() else { return };
    let model = tiny("llama", "q8_0");
    let reference = stock.reference(&model, &[]);
    let (rows, stats) = stock.streamed(&model, "75%", &["--contexts", "5", "--threads", "1"]);
    assert!(rows == reference);
    assert_streamed(&stats, "five contexts");
}

#[test]
fn a_split_model_is_found_by_its_open_shards() {
    let Some(stock) = Stock::find() else { return };
    let whole = tiny("llama", "q8_0");
    let folder = tempfile::tempdir().expect("a directory");
    let split = bare(&stock.programs.join("llama-gguf-split"))
        .args(["--split", "--split-max-tensors", "20"])
        .arg(&whole)
        .arg(folder.path().join("part"))
        .output()
        .expect("llama-gguf-split");
    assert!(split.status.success(), "{}", stderr(&split));
    let first = fs::read_dir(folder.path())
        .expect("read")
        .map(|entry| entry.expect("entry").path())
        .find(|path| path.to_string_lossy().contains("-00001-of-"))
        .expect("a first shard");
    let (rows, stats) = stock.streamed(&first, "75%", &[]);
    assert!(rows == stock.reference(&whole, &[]));
    assert_streamed(&stats, "split");
}

/// A low-rank adapter for two matrices of every layer, with values that change the logits.
fn adapter(path: &Path) {
    let f32s = flea::model::DType::from_ggml(0).expect("F32");
    let mut file = GgufBytes::new("llama")
        .text("general.type", "adapter")
        .text("adapter.type", "lora")
        .raw("adapter.lora.alpha", typed(6, &16.0f32.to_le_bytes()));
    for layer in 0..6 {
        let name = |part: &str, side: &str| format!("blk.{layer}.{part}.weight.lora_{side}");
        file = file
            .tensor(&name("attn_q", "a"), &[256, 8], f32s)
            .tensor(&name("attn_q", "b"), &[8, 256], f32s)
            .tensor(&name("ffn_down", "a"), &[512, 8], f32s)
            .tensor(&name("ffn_down", "b"), &[8, 256], f32s);
    }
    let (mut bytes, len_bytes) = file.build();
    let data_start = bytes.len().next_multiple_of(32);
    bytes.resize(data_start, 0);
    let mut state = 1u32;
    while (bytes.len() as u64) < len_bytes {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let value = (state >> 8) as f32 / (1u32 << 24) as f32 * 0.1 - 0.05;
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    assert_eq!(text("x").len(), 9, "GGUF strings carry a 64-bit length");
    fs::write(path, bytes).expect("write");
}

#[test]
fn a_lora_adapter_works_on_streamed_weights() {
    let Some(stock) = Stock::find() else { return };
    let model = tiny("llama", "q8_0");
    let folder = tempfile::tempdir().expect("a directory");
    let lora = folder.path().join("adapter.gguf");
    adapter(&lora);
    let with = ["--lora", lora.to_str().expect("utf-8")];
    let reference = stock.reference(&model, &with);
    assert!(
        reference != stock.reference(&model, &[]),
        "the adapter does something"
    );
    let (rows, stats) = stock.streamed(&model, "75%", &with);
    assert!(rows == reference);
    assert_streamed(&stats, "adapter");
}

/// Runs llama-logits with another file open on descriptor 9, as a host with several models has.
fn beside(stock: &Stock, model: &Path, other: &Path, wanted: Option<&Path>) -> (Output, Value) {
    let (mut command, stats) = stock.plugged(Path::new("/bin/sh"), "75%");
    if let Some(wanted) = wanted {
        command.env("FLEA_MODEL", wanted);
    }
    command
        .args(["-c", "other=$1; shift; exec \"$@\" 9<\"$other\"", "sh"])
        .arg(other)
        .arg(&stock.logits);
    command.arg("-m").arg(model).args([
        "--device",
        "FLEA",
        "-n",
        "2",
        "--ctx",
        "256",
        "--prompt-tokens",
        "300,301",
    ]);
    let said = output(&mut command);
    (said, take_stats(&stats))
}

#[test]
fn the_model_is_told_apart_from_other_open_files_or_refused() {
    let Some(stock) = Stock::find() else { return };
    let model = tiny("llama", "q8_0");
    let other = tiny("qwen2", "q4_0");
    let (said, stats) = beside(&stock, &model, &other, None);
    assert!(said.status.success(), "{}", stderr(&said));
    assert_streamed(&stats, "another model is open");

    let folder = tempfile::tempdir().expect("a directory");
    let copy = folder.path().join("copy.gguf");
    fs::copy(&model, &copy).expect("copy");
    let (said, stats) = beside(&stock, &model, &copy, None);
    assert!(
        !said.status.success(),
        "two files fit and one was guessed: {stats}"
    );
    assert!(stderr(&said).contains("FLEA_MODEL"), "{}", stderr(&said));

    let (said, stats) = beside(&stock, &model, &copy, Some(&model));
    assert!(said.status.success(), "{}", stderr(&said));
    assert_streamed(&stats, "FLEA_MODEL decides");

    let (said, _) = beside(&stock, &model, &copy, Some(Path::new("/nonexistent.gguf")));
    assert!(
        !said.status.success() && stderr(&said).contains("/nonexistent.gguf"),
        "{}",
        stderr(&said)
    );
}

#[test]
fn a_budget_that_is_too_small_is_refused_with_the_arithmetic() {
    let Some(stock) = Stock::find() else { return };
    let (mut command, path) = stock.plugged(&stock.logits, "8MiB");
    command.arg("-m").arg(tiny("llama", "q8_0")).args([
        "--device",
        "FLEA",
        "-n",
        "2",
        "--ctx",
        "256",
        "--prompt-tokens",
        "300",
    ]);
    let said = output(&mut command);
    let stats = take_stats(&path);
    assert!(!said.status.success());
    assert!(
        stderr(&said).contains("the smallest total that works"),
        "{}",
        stderr(&said)
    );
    assert_eq!(stats["error"]["status"], "FLEA_E_REFUSED", "{stats}");
    assert_eq!(number(&stats, "bytes_read"), 0.0, "{stats}");
}

#[test]
fn unknown_variables_and_values_are_heard() {
    let Some(stock) = Stock::find() else { return };
    let (mut command, _) = stock.plugged(&stock.logits, "75%");
    command
        .env("FLEA_MEMROY", "1GiB")
        .env("FLEA_READER", "mmap");
    command.arg("-m").arg(tiny("llama", "q8_0")).args([
        "--device",
        "FLEA",
        "-n",
        "1",
        "--prompt-tokens",
        "300",
    ]);
    let said = output(&mut command);
    assert!(!said.status.success());
    assert!(stderr(&said).contains("FLEA_MEMROY"), "{}", stderr(&said));
    assert!(
        stderr(&said).contains("FLEA_READER=mmap"),
        "{}",
        stderr(&said)
    );
}

/// The perplexity that llama-perplexity prints, with five digits.
fn perplexity(command: &mut Command, model: &Path, words: &Path) -> String {
    command.arg("-m").arg(model).arg("-f").arg(words).args([
        "-c",
        "128",
        "-b",
        "128",
        "-t",
        "2",
        "--chunks",
        "2",
        "--no-repack",
    ]);
    // llama.cpp logs from a thread of its own, and at its exit the last lines are lost now and then, without flea too.
    for _ in 0..40 {
        let said = output(command);
        let all = format!("{}{}", String::from_utf8_lossy(&said.stdout), stderr(&said));
        assert!(said.status.success(), "{all}");
        if let Some((_, estimate)) = all.split_once("Final estimate: PPL") {
            return estimate.lines().next().unwrap_or_default().to_owned();
        }
    }
    panic!("llama-perplexity never says its final estimate");
}

#[test]
fn stock_programs_run_and_keep_all_layers_on_the_device() {
    let Some(stock) = Stock::find() else { return };
    let model = tiny("llama", "q8_0");
    let folder = tempfile::tempdir().expect("a directory");
    let words = folder.path().join("words.txt");
    fs::write(
        &words,
        "a small model does not know what this says, but it has an opinion. ".repeat(60),
    )
    .expect("write");

    // Neither -ngl nor -c: llama.cpp's own fit pass decides, and the model is larger than the weights' budget.
    let (mut command, path) = stock.plugged(&stock.programs.join("llama-completion"), "75%");
    command.arg("-m").arg(&model).args([
        "--device", "FLEA", "-p", "hello", "-n", "6", "--temp", "0", "-t", "2", "-no-cnv",
    ]);
    let said = output(&mut command);
    assert!(said.status.success(), "{}", stderr(&said));
    assert_streamed(&take_stats(&path), "llama-completion");

    let (mut command, path) = stock.plugged(&stock.programs.join("llama-bench"), "75%");
    command
        .arg("-m")
        .arg(&model)
        .args(["-dev", "FLEA", "-p", "32", "-n", "4", "-r", "1", "-t", "2"]);
    let said = output(&mut command);
    assert!(said.status.success(), "{}", stderr(&said));
    assert_streamed(&take_stats(&path), "llama-bench");

    let (mut command, path) = stock.plugged(&stock.programs.join("llama-perplexity"), "75%");
    let streamed = perplexity(command.args(["--device", "FLEA"]), &model, &words);
    assert_streamed(&take_stats(&path), "llama-perplexity");
    let plain = perplexity(
        bare(&stock.programs.join("llama-perplexity")).args(["--device", "none"]),
        &model,
        &words,
    );
    assert_eq!(streamed, plain);
}

#[test]
fn flea_run_gives_what_stock_llama_cpp_gives() {
    let Some(stock) = Stock::find() else { return };
    let model = tiny("llama", "q4_k_m");
    let help = output(flea().args(["run", "--help"]));
    if !help.status.success() {
        skip("flea was built without llama.cpp (feature run)");
        return;
    }
    let rows = tempfile::NamedTempFile::new().expect("a temporary file");
    let mut command = flea();
    command.arg("run").arg(&model).args([
        "--prompt-tokens",
        &prompt(),
        "-n",
        "8",
        "--ignore-eos",
        "--threads",
        "2",
    ]);
    command
        .args([
            "--ubatch", "32", "--ctx", "256", "--memory", "75%", "--logits",
        ])
        .arg(rows.path());
    let said = output(&mut command);
    assert!(said.status.success(), "{}", stderr(&said));
    let own = fs::read(rows.path()).expect("logits");
    assert!(
        own == stock.reference(&model, &[]),
        "flea run and stock llama.cpp differ"
    );
}
