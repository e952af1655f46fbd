//! A packed model in stock, unmodified llama.cpp: the same logits as of the original, bit for bit. Needs what scripts/test.sh
//! builds: llama.cpp and the tests' own host llama-logits.

#![cfg(feature = "cli")]

mod common;
#[path = "common/stock.rs"]
mod stock;

use std::path::{Path, PathBuf};

use common::{flea, json, number, tiny};
use stock::{Stock, assert_streamed};

fn packed(model: &Path, folder: &Path) -> (PathBuf, serde_json::Value) {
    let path = folder.join("packed.gguf");
    let mut command = flea();
    command
        .arg("pack")
        .arg(model)
        .args(["--force", "--json", "-o"]);
    let said = json(command.arg(&path));
    (path, said)
}

/// Every way that tensors and keys are laid out anew: other offsets and alignment, stacked experts, a tied head.
#[test]
fn a_packed_model_has_the_logits_of_the_original() {
    let Some(stock) = Stock::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for (arch, dtype) in [
        ("llama", "q8_0"),
        ("llama", "q4_k_m"),
        ("qwen3", "bf16"),
        ("gemma3", "q6_k"),
        ("qwen3moe", "q8_0"),
    ] {
        let model = tiny(arch, dtype);
        let (path, said) = packed(&model, folder.path());
        assert!(number(&said, "tensors") > 0.0, "{said}");
        assert_ne!(
            std::fs::read(&model).expect("the model"),
            std::fs::read(&path).expect("the packed model"),
            "{arch} {dtype}: packing changed nothing, so this shows nothing"
        );
        let reference = stock.reference(&model, &[]);
        let rows = stock.reference(&path, &[]);
        assert!(
            !rows.is_empty() && rows == reference,
            "{arch} {dtype}: the logits differ"
        );
    }
}

/// On flea's device too, where layers come from the packed file's offsets.
#[test]
fn a_packed_model_streams_with_the_same_logits() {
    let Some(stock) = Stock::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let model = tiny("llama", "q8_0");
    let (path, _) = packed(&model, folder.path());
    let (rows, stats) = stock.streamed(&path, "75%", &[]);
    assert!(
        rows == stock.reference(&model, &[]),
        "the logits differ; {stats}"
    );
    assert_streamed(&stats, "packed");
}

/// The parts of a split model, joined.
#[test]
fn joined_parts_have_the_logits_of_the_whole() {
    let Some(stock) = Stock::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let whole = folder.path().join("whole.gguf");
    let shape = "--arch llama --layers 4 --embd 256 --ffn 512 --heads 4 --kv-heads 2 --vocab 800 --type q8_0 --seed 7";
    let synth = |words: &[&str]| {
        let mut command = flea();
        command.arg("synth").args(shape.split(' ')).args(words);
        json(command.arg("--json").arg("-o").arg(&whole))
    };
    synth(&[]);
    let reference = stock.reference(&whole, &[]);
    synth(&["--split-bytes", "1MiB"]);
    let parts = std::fs::read_dir(folder.path())
        .expect("a folder")
        .flatten();
    let mut parts: Vec<PathBuf> = parts
        .map(|part| part.path())
        .filter(|path| *path != whole)
        .collect();
    parts.sort();
    assert!(parts.len() > 1, "{parts:?}");
    let (path, said) = packed(&parts[0], folder.path());
    assert_eq!(number(&said, "input_files"), parts.len() as f64);
    assert!(
        stock.reference(&path, &[]) == reference,
        "the logits differ"
    );
}
