//! `flea run` with embeddings read row by row: the same bits as with all of them in memory, less memory held, and counters
//! that prove it.

#![cfg(feature = "run")]

#[path = "common/analyzing.rs"]
mod analyzing;
mod common;
#[path = "common/generate.rs"]
mod generate;

use common::{flea, json, number, synth};
use generate::{after, assert_same, prompts, smallest_percent};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A model whose tables are long enough to be read by rows.
fn model(arch: &str, dtype: &str, vocab: &str, extra: &[&str]) -> PathBuf {
    let mut arguments = vec![
        "--arch", arch, "--type", dtype, "--vocab", vocab, "--seed", "7",
    ];
    arguments.extend(["--layers", "4", "--embd", "256", "--ffn", "512"]);
    arguments.extend(["--heads", "4", "--kv-heads", "2"]);
    arguments.extend(extra);
    synth(&format!("rows-{arch}-{dtype}"), &arguments)
}

/// What a run with rows must show beside one whose host keeps the tables.
fn assert_rows(rows: &Value, kept: &Value, plan: &Value, tokens: f64, what: &str) {
    let report = &plan["rows"];
    let tables = report["tables"].as_array().expect("tables").len() as f64;
    assert_eq!(number(rows, "rows"), tokens * tables, "{what}: {rows}");
    let (reads, bytes) = (number(rows, "row_reads"), number(rows, "row_bytes_read"));
    assert!(reads > 0.0 && bytes >= reads * 4096.0, "{what}: {rows}");
    let table_bytes = number(report, "table_bytes");
    assert!(
        bytes < table_bytes / 4.0,
        "{what}: {bytes} bytes of {table_bytes}"
    );
    // What the row readers took is what the plan said, but for huge pages' rounding.
    let (held, planned) = (number(rows, "rows_bytes"), number(report, "memory_bytes"));
    assert!(held <= planned, "{what}: {held} held, {planned} planned");
    let saved = table_bytes - planned;
    let less = number(kept, "host_bytes") - number(rows, "host_bytes");
    assert!(
        less > saved * 0.9,
        "{what}: the host holds {less} less, its tables are {table_bytes}"
    );
    let peak = number(kept, "peak_memory_bytes") - number(rows, "peak_memory_bytes");
    assert!(peak > saved * 0.8, "{what}: the peak is {peak} lower");
    for name in ["rows", "row_reads", "row_bytes_read", "rows_bytes"] {
        assert_eq!(number(kept, name), 0.0, "{what}: {kept}");
    }
}

fn check_rows(model: &Path, what: &str) {
    let least = smallest_percent(model, &[]);
    for prompt in prompts() {
        let tokens = prompt.split(',').count() as f64 + 11.0;
        let reference = json(&mut after(model, &prompt, &["--no-stream"]));
        for (memory, reader) in [(least.as_str(), "pread"), ("60%", "io_uring")] {
            let what = format!("{what} {memory} {reader}, {tokens} tokens");
            let streaming = ["--memory", memory, "--reader", reader];
            let rows = json(&mut after(model, &prompt, &streaming));
            assert_same(&reference, &rows, &what);
            let whole = [&streaming[..], &["--host-rows"]].concat();
            let kept = json(&mut after(model, &prompt, &whole));
            assert_same(&reference, &kept, &what);
            let plan = json(
                flea()
                    .arg("plan")
                    .arg(model)
                    .args(["--memory", memory, "--json"]),
            );
            assert_rows(&rows, &kept, &plan, tokens, &what);
            assert!(number(&rows, "bytes_read") > number(&rows, "row_bytes_read"));
            assert_eq!(rows["reader"], reader, "{what}");
        }
    }
}

/// Two tables: that of the tokens, which is the output head as well and is streamed as such, and that of the layers.
#[test]
fn per_layer_embeddings_are_read_by_rows_in_gemma3n() {
    let model = model("gemma3n", "q8_0", "70000", &[]);
    check_rows(&model, "gemma3n");
    let said = common::output(flea().arg("plan").arg(&model).args(["--memory", "60%"]));
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let line = text.lines().find(|line| line.starts_with("rows"));
    let line = line.unwrap_or_else(|| panic!("no rows in\n{text}"));
    assert!(
        line.contains("bytes cache") && line.contains("per_layer_token_embd.weight"),
        "{line}"
    );
}

#[test]
fn token_embeddings_are_read_by_rows() {
    check_rows(&model("llama", "f16", "40000", &[]), "llama");
}

/// Experts and rows in one pass.
#[test]
fn token_embeddings_are_read_by_rows_in_gpt_oss() {
    let experts = ["--experts", "16", "--experts-used", "4"];
    check_rows(&model("gpt-oss", "mxfp4", "70000", &experts), "gpt-oss");
}

/// A table that is short stays with the host: reading it would take as much memory.
#[test]
fn short_tables_stay_with_the_host() {
    let model = model("llama", "q8_0", "2000", &[]);
    let result = json(&mut after(&model, "300", &["--memory", "60%"]));
    assert_eq!(number(&result, "rows"), 0.0);
    assert_eq!(number(&result, "rows_bytes"), 0.0);
    let plan = json(
        flea()
            .arg("plan")
            .arg(&model)
            .args(["--memory", "60%", "--json"]),
    );
    assert!(plan["rows"].is_null(), "{plan}");
}

/// With ever less memory: everything resident, the table on the drive, layers streamed. The same figures as `flea plan`.
#[test]
fn the_verdict_knows_rows() {
    let model = model("llama", "f16", "40000", &[]);
    let path = model.to_str().expect("a path");
    let ask = |memory: &str| analyzing::answer(&[path, "--memory", memory]);
    let (whole, code) = ask("4GiB");
    assert_eq!(
        (code, &whole["verdict"]),
        (0, &Value::from("resident")),
        "{whole}"
    );
    let command = |value: &Value| value["devices"][0]["command"].to_string();
    assert!(command(&whole).contains("--host-rows"), "{whole}");

    let plan = &whole["devices"][0]["plan"];
    let need = number(plan, "host_bytes") + number(plan, "resident_bytes");
    assert_eq!(ask(&(need as u64).to_string()).1, 0);
    let (rows, code) = ask(&((need - 1e6) as u64).to_string());
    assert_eq!((code, &rows["verdict"]), (10, &Value::from("rows")));
    assert!(!command(&rows).contains("--host-rows"), "{rows}");
    assert_eq!(number(&rows["devices"][0], "streamed_bytes_per_token"), 0.0);

    let least = smallest_percent(&model, &[]);
    let (streamed, code) = ask(&least);
    assert_eq!((code, &streamed["verdict"]), (11, &Value::from("streamed")));
    let mut plan = flea();
    plan.arg("plan").arg(&model);
    let plan = json(plan.args(["--memory", &least, "--json"]));
    let device = &streamed["devices"][0];
    assert_eq!(plan["total_bytes"], device["memory_bytes"]);
    assert_eq!(plan["peak_memory_bytes"], device["need_bytes"]);
    assert_eq!(
        plan["streamed_bytes_per_pass"],
        device["streamed_bytes_per_token"]
    );
}

#[cfg(feature = "faults")]
mod faults {
    use super::*;

    fn row_byte(model: &Path, row: u64) -> u64 {
        let (catalog, _) = flea::engine::read_catalog(model).expect("a catalog");
        let (_, table) = catalog.tensor("token_embd.weight").expect("embeddings");
        table.extent.offset_bytes + row * table.row_bytes().expect("whole blocks") + 9
    }

    #[test]
    fn a_flipped_byte_in_a_row_changes_the_logits_and_one_beside_it_does_not() {
        let model = model("llama", "f16", "40000", &[]);
        let reference = json(&mut after(&model, "300", &["--memory", "60%"]));
        let with = |row: u64| {
            let fault = format!("flip=0:{}", row_byte(&model, row));
            json(after(&model, "300", &["--memory", "60%"]).env("FLEA_FAULT", fault))
        };
        assert_ne!(reference["logits_hash"], with(300)["logits_hash"]);
        // Read along, in the same page, and nobody's.
        assert_eq!(reference["logits_hash"], with(301)["logits_hash"]);
    }

    #[test]
    fn slow_short_and_failing_reads_of_rows_change_nothing() {
        let model = model("llama", "f16", "40000", &[]);
        let prompt = &prompts()[1];
        let reference = json(&mut after(&model, prompt, &["--no-stream"]));
        for (reader, fault) in [
            ("io_uring", "poison,short_every=3"),
            ("pread", "eio_every=7,poison"),
        ] {
            let arguments = ["--memory", "60%", "--reader", reader];
            let result = json(after(&model, prompt, &arguments).env("FLEA_FAULT", fault));
            assert_same(&reference, &result, fault);
            assert!(number(&result, "rows") > 600.0, "{result}");
        }
    }

    /// The model's own drive fails from the first read on: layers and rows come from the copy.
    #[test]
    fn a_dead_drive_beside_a_copy_changes_no_bit() {
        let model = model("llama", "f16", "40000", &[]);
        let copies = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let copy = copies.path().join(model.file_name().expect("a name"));
        std::fs::copy(&model, copy).expect("a copy");
        let directory = copies.path().to_str().expect("a path");
        let reference = json(&mut after(&model, "300", &["--no-stream"]));
        for reader in ["io_uring", "pread"] {
            let streaming = ["--memory", "60%", "--reader", reader, "--mirror", directory];
            let result = json(after(&model, "300", &streaming).env("FLEA_FAULT", "dead=0"));
            assert_same(&reference, &result, reader);
            assert!(number(&result, "rows") > 0.0, "{result}");
            let mirrors = &result["mirrors"];
            assert_eq!(mirrors[0]["dropped"], true, "{result}");
            assert_eq!(mirrors[1]["dropped"], false, "{result}");
            assert_eq!(number(&mirrors[0], "bytes_read"), 0.0, "{result}");
        }
    }
}
