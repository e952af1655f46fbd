//! `flea analyze` and `flea cost` as a user meets them: verdicts and exit codes, the same figures as `flea plan`, every
//! kind of source, a server that keeps to HTTP ranges and servers that do not, and input that cannot be right.

#![cfg(feature = "cli")]

#[path = "common/analyzing.rs"]
mod analyzing;
mod common;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use analyzing::{analyze, answer};
use common::{flea, json, output, synth};
use flea::engine::read_catalog;
use flea::model::arch::gguf::from_catalog;
use flea::model::arch::{Block, KvKind};
use flea::tools::synth::shape::{Arch, Quant, Shape, Wish};
use flea::tools::synth::{Spec, generate};
use serde_json::Value;

fn small() -> PathBuf {
    synth(
        "analyze",
        &["--size", "24MiB", "--layers", "12", "--type", "q8_0"],
    )
}

#[test]
fn the_exit_code_is_the_verdict() {
    let e2b = [
        "gemma4-e2b",
        "--weight-bits",
        "4",
        "--kv-type",
        "4",
        "--strip",
        "encoders",
        "--device",
    ];
    for (device, verdict, code) in [
        ("laptop-8192", "resident", 0),
        ("ufs3-1536", "rows", 10),
        ("emmc-1024", "streamed", 11),
        ("laptop-8192,ufs3-1536", "rows", 10),
        ("all", "streamed", 11),
    ] {
        let (value, found) = answer(&[&e2b[..], &[device]].concat());
        assert_eq!(
            (value["verdict"].as_str(), found),
            (Some(verdict), code),
            "{device}"
        );
        assert_eq!(value["exit_code"], code);
    }
    let (value, code) = answer(&[
        "llama-3.2-3b",
        "--context",
        "32768",
        "--weight-bits",
        "4",
        "--kv-type",
        "4",
        "--device",
        "low_tier_mobile_emmc",
    ]);
    assert_eq!(code, 12);
    let device = &value["devices"][0];
    // 1128.01 MiB are the least, 1024 there are.
    let missing = device["missing_bytes"].as_f64().unwrap() / 1048576.0;
    assert!((missing - 104.01).abs() < 0.01, "{missing}");
    assert!(device["command"].is_null());
    let largest = device["largest_context_count"].as_u64().unwrap();
    assert!((20_000..32_768).contains(&largest), "{largest}");
    // The context that is named runs, one more token does not.
    for (context, runs) in [(largest, true), (largest + 1, false)] {
        let context = context.to_string();
        let (_, code) = answer(&[
            "llama-3.2-3b",
            "--context",
            &context,
            "--weight-bits",
            "4",
            "--kv-type",
            "4",
            "--device",
            "emmc-1024",
        ]);
        assert_eq!(code == 11, runs, "{context}");
    }
}

#[test]
fn components_sum_up_and_json_is_stable() {
    let arguments = [
        "gemma4-e4b",
        "--context",
        "8192",
        "--kv-type",
        "tq:4",
        "--device",
        "all",
    ];
    let (value, _) = answer(&arguments);
    let sum: u64 = value["components"]
        .as_array()
        .unwrap()
        .iter()
        .map(|part| part["bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(value["total_bytes"].as_u64(), Some(sum));
    assert_eq!(
        answer(&arguments).0,
        value,
        "the same question has the same answer"
    );
    let keys: Vec<&str> = value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        keys,
        [
            "model",
            "name",
            "family",
            "origin",
            "context_count",
            "context_max_count",
            "weight_bits",
            "kv_type",
            "geometry",
            "components",
            "total_bytes",
            "kv_bytes_per_token",
            "devices",
            "verdict",
            "exit_code"
        ]
    );
    let names: Vec<&str> = value["components"]
        .as_array()
        .unwrap()
        .iter()
        .map(|part| part["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "decoder",
            "embedding",
            "per_layer_tables",
            "kv_full",
            "kv_windowed",
            "encoder",
            "encoder",
            "activations",
            "runtime"
        ]
    );
    let keys: Vec<&str> = value["devices"][0]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        keys,
        [
            "name",
            "label",
            "memory_bytes",
            "drive_gb_per_second",
            "verdict",
            "exit_code",
            "need_bytes",
            "headroom_bytes",
            "missing_bytes",
            "smallest_bytes",
            "streamed_bytes_per_token",
            "tokens_per_second",
            "whole_layers_bytes_per_token",
            "whole_layers_tokens_per_second",
            "largest_context_count",
            "largest_resident_context_count",
            "command",
            "plan"
        ]
    );
    assert_eq!(value["devices"].as_array().unwrap().len(), 5);
}

/// What a person sees.
#[test]
fn the_text_is_a_table_with_a_command() {
    let output = output(&mut analyze(&[
        "zaya1-8b",
        "--weight-bits",
        "4",
        "--kv-type",
        "4",
        "--device",
        "ufs4-2048",
    ]));
    assert_eq!(output.status.code(), Some(11));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "zaya1-8b (zaya, 40 layers of width 2048)",
        "8.82 B, of which a token uses 734 M of the layers (1 of 16 experts)",
        "4096 of at most 131072 tokens",
        "component",
        "per token",
        "streamed",
        "1.6",
        "only chosen experts are read",
        "computing is left out",
        "flea run zaya1-8b.gguf --memory 2048MiB --ctx 4096",
    ] {
        assert!(text.contains(part), "no '{part}' in\n{text}");
    }
    let width = text.lines().map(|line| line.chars().count()).max().unwrap();
    assert!(width < 160, "{width} columns:\n{text}");
}

/// The plan is `flea plan`'s: the same bytes and the same prediction, field for field.
#[test]
fn a_file_gives_the_figures_of_flea_plan() {
    let model = small();
    let model = model.to_str().unwrap();
    for memory in ["60MiB", "70MiB", "80MiB", "500MiB", "33.3%", "120%"] {
        let more = [
            "--memory",
            memory,
            "--drive-gbps",
            "2.5",
            "--compute-seconds",
            "0.003",
            "--ctx",
            "512",
            "--json",
        ];
        let plan = output(flea().args(["plan", model]).args(more));
        let (value, code) = answer(&[&[model], &more[..8]].concat());
        let device = &value["devices"][0];
        if !plan.status.success() {
            assert_eq!((code, plan.status.code()), (12, Some(4)), "{memory}");
            continue;
        }
        let plan: Value = serde_json::from_slice(&plan.stdout).unwrap();
        assert_eq!(
            code,
            if plan["slots_count"] == 0 { 0 } else { 11 },
            "{memory}"
        );
        assert_eq!(device["need_bytes"], plan["peak_memory_bytes"]);
        assert_eq!(
            device["streamed_bytes_per_token"],
            plan["streamed_bytes_per_pass"]
        );
        assert_eq!(
            device["tokens_per_second"],
            plan["prediction"]["tokens_per_second"]
        );
        assert_eq!(device["smallest_bytes"], plan["smallest_total_bytes"]);
        for (key, expected) in plan.as_object().unwrap() {
            // The profile of this machine's drive is asked for by name only.
            if key != "profile" {
                assert_eq!(&device["plan"][key], expected, "{memory} {key}");
            }
        }
        let total = value["total_bytes"].as_u64().unwrap();
        if code == 0 {
            assert!(total <= plan["total_bytes"].as_u64().unwrap());
        }
    }
}

/// The largest context begins, the next step of llama.cpp's cache does not.
#[test]
fn the_largest_context_of_a_file_is_the_plans() {
    let model = synth(
        "analyze-context",
        &["--size", "24MiB", "--layers", "12", "--ctx", "1000000"],
    );
    let model = model.to_str().unwrap();
    let (value, _) = answer(&[model, "--memory", "128MiB"]);
    let largest = value["devices"][0]["largest_context_count"]
        .as_u64()
        .unwrap();
    assert!((1024..1_000_000).contains(&largest), "{largest}");
    let runs = |context: u64| {
        let context = context.to_string();
        let plan = output(flea().args(["plan", model, "--memory", "128MiB", "--ctx", &context]));
        plan.status.success()
    };
    assert!(runs(largest) && !runs(largest + 1));
    // Keys and values of a quarter of the bits leave room for more.
    let (value, _) = answer(&[model, "--memory", "128MiB", "--kv-type", "q4_0"]);
    assert!(
        value["devices"][0]["largest_context_count"]
            .as_u64()
            .unwrap()
            > 2 * largest
    );
}

/// Every architecture that synth writes, dense and of experts, tied and not.
#[test]
fn the_geometry_of_a_gguf_is_what_synth_was_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    for (number, arch) in Arch::ALL.into_iter().enumerate() {
        for (tied, layers, kv_heads) in [(false, 7, 2), (true, 12, 4)] {
            let wish = Wish {
                layers: Some(layers),
                embd: Some(256),
                ffn: Some(512),
                heads: Some(4),
                kv_heads: Some(kv_heads),
                vocab: Some(512),
                ctx: Some(2048),
                tied,
                ..Wish::default()
            };
            let shape = Shape::choose(arch, Quant::Q8_0, &wish).unwrap();
            let path = directory.path().join(format!("{number}-{tied}.gguf"));
            let spec = Spec {
                shape,
                seed: 1,
                split_bytes: None,
                force: false,
                router_skew: 0.0,
            };
            generate(&spec, &path, &AtomicBool::new(false), |_, _| {}).unwrap();
            let (catalog, _) = read_catalog(&path).unwrap();
            let model = from_catalog(&catalog).unwrap();
            assert_eq!(
                model.text_parameter_count(),
                u128::from(shape.parameters()),
                "{arch}"
            );
            assert_eq!(
                (model.blocks.len() as u64, model.hidden_count),
                (shape.layers, shape.embd),
                "{arch}"
            );
            assert_eq!(
                (model.vocabulary_count, model.context_max_count),
                (shape.vocab, Some(shape.ctx))
            );
            assert_eq!(model.tied_embeddings, shape.tied, "{arch}");
            for attention in model.blocks.iter().map(|block| block.attention.unwrap()) {
                assert_eq!(
                    (attention.head_count, attention.kv_head_count),
                    (shape.heads, shape.kv_heads),
                    "{arch}"
                );
                assert_eq!(
                    (attention.key_count, attention.value_count),
                    (shape.head_dim, shape.head_dim)
                );
            }
            let experts = model
                .experts()
                .map(|experts| (experts.count, experts.used_count));
            assert_eq!(
                experts,
                (shape.experts > 0).then_some((shape.experts, shape.experts_used)),
                "{arch}"
            );
            if let Some(experts) = model.experts() {
                assert_eq!(experts.each_parameter_count, 3 * shape.embd * shape.ffn);
            }
            // Gemma 3: five layers with a window, then one without; Gemma 3n: four; gpt-oss: every other layer.
            let windowed = |block: &&Block| block.attention.unwrap().kind() == KvKind::Windowed;
            let expected = match arch {
                Arch::Gemma3 => shape.layers - shape.layers / 6,
                Arch::Gemma3n => shape.layers - shape.layers / 5,
                Arch::GptOss => shape.layers.div_ceil(2),
                _ => 0,
            };
            assert_eq!(
                model.blocks.iter().filter(windowed).count() as u64,
                expected,
                "{arch}"
            );
        }
    }
}

const TOML: &str = "name = 'mine'\nlayers = 4\nhidden = 256\nvocabulary = 1000\nheads = 4\nfeed_forward = 512\ncontext_max = 8192\n";
const YAML: &str = "name: mine\nlayers: 4\nhidden: 256\nvocabulary: 1000\nheads: 4\nfeed_forward: 512\ncontext_max: 8192\n";
const CONFIG: &str = r#"{"model_type":"llama","num_hidden_layers":4,"hidden_size":256,"vocab_size":1000,
    "num_attention_heads":4,"intermediate_size":512,"max_position_embeddings":8192}"#;

fn write(directory: &Path, name: &str, text: &str) -> String {
    let path = directory.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn one_model_from_every_kind_of_description_is_one_model() {
    let directory = tempfile::tempdir().unwrap();
    let toml = write(directory.path(), "m.toml", TOML);
    let yaml = write(directory.path(), "m.yaml", YAML);
    let config = write(directory.path(), "m/config.json", CONFIG);
    let folder = directory.path().join("m");
    let (first, _) = answer(&[&toml]);
    assert_eq!(first["name"], "mine");
    for other in [yaml.as_str(), config.as_str(), folder.to_str().unwrap()] {
        let (value, code) = answer(&[other]);
        assert_eq!(code, 0, "{other}");
        for key in ["geometry", "components", "total_bytes"] {
            assert_eq!(value[key], first[key], "{other} {key}");
        }
    }
}

#[test]
fn devices_come_from_files_and_profiles() {
    let directory = tempfile::tempdir().unwrap();
    let devices = write(
        directory.path(),
        "boxes.toml",
        "[[device]]\nname = 'nas'\nmemory = '1GiB'\ndrive_gb_per_second = 1.0\nprice = 300\nwatts = 20\n",
    );
    let (value, _) = answer(&["llama-3.2-3b", "--device", &devices]);
    assert_eq!(value["devices"][0]["name"], "nas");
    let bytes = value["devices"][0]["streamed_bytes_per_token"]
        .as_f64()
        .unwrap();
    let rate = value["devices"][0]["tokens_per_second"].as_f64().unwrap();
    assert!((rate * bytes / 1e9 - 1.0).abs() < 1e-9);
    let profile = r#"{"version":1,"measured":"2026-11-21","device":{"major":1,"minor":2,"model":null,"serial":null,
        "filesystem":"ext4"},"reader":"io_uring","direct_io":"yes","sequential":[{"page_bytes":4096,
        "request_bytes":1048576,"depth":8,"gb_per_second":2.0,"spread":0.01,"cpu_seconds_per_gb":0.1}],"random":[],
        "sustained":null,"memory":null}"#;
    let profile = write(directory.path(), "drive.json", profile);
    let (value, _) = answer(&["llama-3.2-3b", "--device", &profile, "--memory", "1GiB"]);
    assert_eq!(value["devices"][0]["drive_gb_per_second"], 2.0);
    // Of a file the prediction is made from the profile too.
    let model = small();
    let (value, code) = answer(&[
        model.to_str().unwrap(),
        "--device",
        &profile,
        "--memory",
        "70MiB",
        "--ctx",
        "512",
    ]);
    assert_eq!(code, 11);
    assert_eq!(
        value["devices"][0]["plan"]["prediction"]["drive_gb_per_second"],
        2.0
    );
    let cost = json(flea().args([
        "cost",
        "--tokens-per-second",
        "2",
        "--device",
        &devices,
        "--json",
    ]));
    assert_eq!(cost["price"], 300.0);
    let bound = json(flea().args([
        "cost",
        "--model",
        "llama-3.2-3b",
        "--device",
        &devices,
        "--json",
    ]));
    assert!(bound["tokens_per_second"].as_f64().unwrap() > 0.1);
    let sum = cost["machine_per_million_tokens"].as_f64().unwrap()
        + cost["electricity_per_million_tokens"].as_f64().unwrap();
    let total = cost["cost_per_million_tokens"].as_f64().unwrap();
    assert!((total / sum - 1.0).abs() < 1e-12, "{total} {sum}");
}

#[test]
fn compat_repeats_the_old_answer() {
    let (value, code) = answer(&[
        "gemma4-e2b",
        "--context",
        "4096",
        "--compat",
        "dhurandhar-0.1.3",
        "--strip",
        "audio",
    ]);
    assert_eq!(value["answer"]["resident_total_mb"], 2291.84);
    assert_eq!(
        value["answer"]["devices"][2]["notes"],
        "Insufficient RAM even with mmap. Short by 185 MB."
    );
    assert_eq!(code, 12);
    let list = json(&mut analyze(&["--list", "--json"]));
    assert_eq!(
        (
            list["models"].as_array().unwrap().len(),
            list["devices"].as_array().unwrap().len()
        ),
        (9, 5)
    );
}

#[test]
fn input_that_cannot_be_right_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| write(directory.path(), name, text);
    let heads = file("heads.toml", &TOML.replace("heads = 4", "heads = 7"));
    let typo = file("typo.yaml", &YAML.replace("hidden:", "hiden:"));
    let huge = file(
        "huge.toml",
        &TOML.replace("hidden = 256", "hidden = 9223372036854775807"),
    );
    let wide = file(
        "wide.json",
        &CONFIG
            .replace("256", "16777216")
            .replace("\"num_hidden_layers\":4", "\"num_hidden_layers\":4096"),
    );
    let broken = file("broken.json", "{\"hidden_size\": 3,");
    let tabs = file("tabs.yaml", "a:\n\t- b: [");
    let bomb = file(
        "bomb.yaml",
        &format!(
            "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [{0}]\nc: &c [{1}]\nd: [{2}]\n",
            "*a,".repeat(9),
            "*b,".repeat(9),
            "*c,".repeat(9)
        ),
    );
    let long = file("long.toml", &"# x\n".repeat(300_000));
    let empty = file("empty.json", "");
    let no_model = file("no.gguf", "GGUF is what it says");
    let devices = file(
        "devices.toml",
        "[[device]]\nname='a'\nmemory='1GiB'\nspeed=3\n",
    );
    for (arguments, code, part) in [
        (vec!["gemma-e2b"], 2, "did you mean gemma4-e2b"),
        (vec!["nothing/here.gguf"], 1, "no such file"),
        (vec![&*heads], 2, "cannot be divided by 7 heads"),
        (vec![&*typo], 2, "unknown field `hiden`"),
        (vec![&*huge], 2, "hidden is 9223372036854775807"),
        (vec![&*wide, "--weight-bits", "32"], 2, "wide.json"),
        (vec![&*broken], 2, "line 1"),
        (vec![&*tabs], 2, "tabs.yaml"),
        (vec![&*bomb], 2, "bomb.yaml"),
        (vec![&*long], 2, "more than a mebibyte"),
        (vec![&*empty], 2, "empty.json"),
        (vec![&*no_model], 5, "no.gguf"),
        (
            vec!["qwen2.5-3b", "--context", "32769"],
            2,
            "the model takes 1 to 32768",
        ),
        (
            vec!["qwen2.5-3b", "--context", "0"],
            2,
            "must be at least 1",
        ),
        (
            vec!["qwen2.5-3b", "--context", "18446744073709551616"],
            2,
            "not a number of tokens",
        ),
        (vec!["qwen2.5-3b", "--weight-bits", "0"], 2, "out of range"),
        (vec!["qwen2.5-3b", "--weight-bits", "33"], 2, "out of range"),
        (vec!["qwen2.5-3b", "--kv-type", "tq:9"], 2, "from 1 to 8"),
        (vec!["qwen2.5-3b", "--kv-type", "64"], 2, "out of range"),
        (
            vec!["qwen2.5-3b", "--device", "mainframe"],
            2,
            "no device is called 'mainframe'",
        ),
        (vec!["qwen2.5-3b", "--device", &*devices], 2, "speed"),
        (
            vec!["qwen2.5-3b", "--strip", "wings"],
            2,
            "no encoder is called 'wings'",
        ),
        (
            vec!["qwen2.5-3b", "--compat", "dhurandhar-0.1.4"],
            2,
            "dhurandhar-0.1.3",
        ),
        (
            vec![
                "qwen2.5-3b",
                "--compat",
                "dhurandhar-0.1.3",
                "--weight-bits",
                "5",
            ],
            2,
            "2, 3, 4, 6, 8 or 16",
        ),
        (vec![], 2, "MODEL"),
    ] {
        let output = output(&mut analyze(&arguments));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(part), "{arguments:?}: no '{part}' in {text}");
        assert!(!text.contains("panicked"), "{text}");
    }
    for arguments in [
        vec!["--tokens-per-second", "0", "--price", "1", "--watts", "1"],
        vec!["--tokens-per-second", "1"],
        vec![
            "--tokens-per-second",
            "1",
            "--price",
            "1",
            "--watts",
            "1",
            "--use",
            "101",
        ],
        vec!["--tokens-per-second", "1", "--price", "-1", "--watts", "1"],
    ] {
        let output = output(flea().arg("cost").args(&arguments));
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
}
