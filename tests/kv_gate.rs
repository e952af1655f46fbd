//! `flea kv gate` on the model in assets/: codecs on keys and values that a real model computed, held to what its answers
//! become. Passages and seeds are fixed, so the figures are.
#![cfg(feature = "run")]

mod common;

use common::{flea, json, number};
use std::path::Path;

fn gate(arguments: &[&str]) -> Vec<serde_json::Value> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/fable.gguf");
    let answer = json(
        flea()
            .args(["kv", "gate"])
            .arg(model)
            .args([
                "--json",
                "--passages",
                "1",
                "--question",
                "64",
                "--threads",
                "1",
            ])
            .args(arguments),
    );
    answer["codecs"].as_array().expect("codecs").clone()
}

/// G5: eight bits change next to nothing, and every bit less changes more; figures with margins of about two.
#[test]
fn answers_follow_the_bits() {
    let rows = gate(&["--no-guard", "q8_0", "tq:6", "tq:4", "tq:2"]);
    let divergence: Vec<f64> = rows
        .iter()
        .map(|row| number(row, "divergence_nats"))
        .collect();
    assert!(
        divergence.windows(2).all(|pair| pair[0] < pair[1]),
        "{divergence:?}"
    );
    assert!(
        divergence[0] < 0.001 && divergence[1] < 0.01 && divergence[2] < 0.1,
        "{divergence:?}"
    );
    assert!(number(&rows[0], "top1_agreement") > 0.96 && number(&rows[2], "top1_agreement") > 0.85);
    for (row, bits, nmse) in [
        (&rows[0], 8.5, 1e-4),
        (&rows[1], 6.5, 1e-3),
        (&rows[2], 4.5, 1e-2),
    ] {
        assert!((number(row, "stored_bits") - bits).abs() < 0.05, "{row}");
        assert!(
            number(row, "key_nmse") < nmse && number(row, "value_nmse") < nmse,
            "{row}"
        );
        assert_eq!(number(row, "rows"), 64.0);
    }
}

/// The guard costs bits and saves answers; keys and values may have codecs of their own.
#[test]
fn the_guard_saves_answers_for_bits() {
    let [bare, pair] = &gate(&["--no-guard", "tq:2", "q8_0/tq:2"])[..] else {
        panic!("two codecs")
    };
    let [guarded] = &gate(&["tq:2"])[..] else {
        panic!("one codec")
    };
    assert!(number(guarded, "stored_bits") > number(bare, "stored_bits") + 1.0);
    assert!(number(guarded, "divergence_nats") < 0.5 * number(bare, "divergence_nats"));
    assert!(number(pair, "key_nmse") < 1e-4 && number(pair, "value_nmse") > 0.05);
    assert!(number(pair, "divergence_nats") < number(bare, "divergence_nats"));
}
