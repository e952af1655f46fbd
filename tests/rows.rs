//! Rows and experts as a user meets them: `flea probe rows`, `flea bench policies`, and synthetic models that stock
//! llama.cpp loads and routes as asked. Rates are never asserted.

#![cfg(feature = "cli")]

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{flea, json, number, output, skip, synth};
use flea::ErrorKind;
use flea::engine::{BudgetSpec, Model, OpenOptions};
use flea::io::{ReaderKind, ReaderOptions};
use flea::model::Tensor;
use flea::plan::budget::HOST_RESERVE_BYTES;
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

/// A table of 16 MiB and more, and one that is shorter.
fn with_table(vocab: &str) -> PathBuf {
    let arguments = [
        "--arch", "llama", "--type", "f16", "--layers", "2", "--embd", "256", "--ffn", "256",
        "--heads", "4", "--vocab", vocab, "--seed", "5",
    ];
    synth("table", &arguments)
}

fn opened(path: &Path, budget: BudgetSpec, kind: ReaderKind, defer_plan: bool) -> Model {
    let options = OpenOptions {
        budget,
        defer_plan,
        reader: ReaderOptions {
            kind,
            ..ReaderOptions::default()
        },
        ..OpenOptions::default()
    };
    Model::open(path, options).expect("a model")
}

fn table(model: &Model) -> (usize, &Tensor) {
    let (index, tensor) = model
        .catalog()
        .tensor("token_embd.weight")
        .expect("a table");
    let extent = tensor.extent;
    assert_eq!(model.row_bytes(index), tensor.row_bytes());
    (
        model.address(extent.shard_index, extent.offset_bytes) as usize,
        tensor,
    )
}

#[test]
fn rows_of_a_model_are_the_files_bytes() {
    let path = with_table("40000");
    let file = std::fs::File::open(&path).expect("open");
    for kind in [ReaderKind::IoUring, ReaderKind::Pread] {
        let model = opened(&path, BudgetSpec::Pool(64 << 20), kind, false);
        let (address, tensor) = table(&model);
        let row_bytes = tensor.row_bytes().expect("whole blocks") as usize;
        let check = |ids: &[u32]| {
            let mut out = vec![0xee; ids.len() * row_bytes];
            model.read_rows(address, ids, &mut out).expect("rows");
            for (id, row) in ids.iter().zip(out.chunks(row_bytes)) {
                let mut expected = vec![0; row_bytes];
                let offset = tensor.extent.offset_bytes + u64::from(*id) * row_bytes as u64;
                file.read_exact_at(&mut expected, offset).expect("read");
                assert!(row == expected, "row {id}");
            }
        };
        check(&[0, 39_999, 7, 7, 12_345]);
        // Also from threads that come and go: a call is whole in the thread that makes it.
        std::thread::scope(|scope| {
            for thread in 0..4_u32 {
                let check = &check;
                scope.spawn(move || {
                    for step in 0..40 {
                        let ids: Vec<u32> = (0..60)
                            .map(|i| (thread * 977 + step * 61 + i * 613) % 40_000)
                            .collect();
                        check(&ids);
                    }
                });
            }
        });
        check(&[1, 2, 3]);
        let stats = model.stats();
        assert_eq!(stats.rows.rows, 5 + 4 * 40 * 60 + 3);
        assert!(stats.rows.reads > 0 && stats.rows.bytes >= 4096 * stats.rows.reads);
        assert!(stats.bytes_read >= stats.rows.bytes && model.rows_bytes() > 0);
    }
}

#[test]
fn rows_asked_for_wrongly_are_errors() {
    let path = with_table("40000");
    let model = opened(&path, BudgetSpec::Pool(64 << 20), ReaderKind::Auto, false);
    let (address, tensor) = table(&model);
    let row_bytes = tensor.row_bytes().expect("whole blocks") as usize;
    let mut out = vec![0; row_bytes];
    for (what, at, ids, len) in [
        ("past the end", address, [40_000], row_bytes),
        ("far past the end", address, [u32::MAX], row_bytes),
        ("not the table", address + 64, [0], row_bytes),
        ("nowhere", 4096, [0], row_bytes),
        ("too little room", address, [0], row_bytes - 1),
    ] {
        let error = model.read_rows(at, &ids, &mut out[..len]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{what}: {error}");
    }
    model
        .read_rows(address, &[39_999], &mut out)
        .expect("the reader works on");

    // A budget for the whole process counts the row reader: it has to be there before the plan.
    let budget = BudgetSpec::Memory("400%".parse().expect("a size"));
    let late = opened(&path, budget, ReaderKind::Auto, false);
    let (address, _) = table(&late);
    let error = late.read_rows(address, &[0], &mut out).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(
        error.to_string().contains("before the first acquire"),
        "{error}"
    );
    let early = opened(&path, budget, ReaderKind::Auto, true);
    let (address, _) = table(&early);
    early
        .read_rows(address, &[], &mut [])
        .expect("the memory for it");
    early.acquire(0, None, None).expect("the plan");
    early.release(0).expect("release");
    early.read_rows(address, &[0], &mut out).expect("a row");
    let counted = early.budget().expect("a plan").host_bytes;
    assert!(early.rows_bytes() > 0 && counted >= HOST_RESERVE_BYTES + early.rows_bytes());

    let short = opened(
        &with_table("2000"),
        BudgetSpec::Pool(64 << 20),
        ReaderKind::Auto,
        false,
    );
    let (index, _) = short
        .catalog()
        .tensor("token_embd.weight")
        .expect("a table");
    assert_eq!(short.row_bytes(index), None, "the host keeps it");
}
