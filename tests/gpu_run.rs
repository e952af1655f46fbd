//! `flea run --gpu`: ggml-cuda's place taken by tests/fake-cuda, the same tokens whatever is streamed, and every bad state a
//! clear error before a weight is read.

#![cfg(all(feature = "run", feature = "cuda"))]

mod common;
#[path = "common/fake_cuda.rs"]
mod fake_cuda;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use common::{compressed, flea, json, number, output, text, tiled_model};
use fake_cuda::with_gpu;
use serde_json::Value;

/// Sixteen layers whose rows are no multiple of 512, so that ggml-cuda wants zeros behind every matrix.
fn model() -> PathBuf {
    let arguments = "--arch llama --layers 16 --embd 768 --ffn 2400 --heads 12 --kv-heads 4 --vocab 3000 --type q8_0 --seed 5";
    common::synth("gpu-run", &arguments.split(' ').collect::<Vec<_>>())
}

/// Layers with experts, which on a GPU come with their layer; rows of 512, and a head of several pieces.
fn mixture() -> PathBuf {
    let arguments = "--arch qwen3moe --layers 8 --embd 512 --ffn 512 --heads 8 --kv-heads 2 --vocab 20000 --type q4_0 --seed 6 \
                     --experts 8 --experts-used 2";
    common::synth(
        "gpu-run-moe",
        &arguments.split_whitespace().collect::<Vec<_>>(),
    )
}

/// Compiles a shared library once.
fn compile(name: &str, compiler: &str, arguments: &[&str]) -> PathBuf {
    let directory =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ggml-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let library = directory.join(name);
    let mut command = Command::new(compiler);
    command
        .args(["-O1", "-fPIC", "-shared", "-o"])
        .arg(&library);
    let made = output(command.args(arguments));
    assert!(made.status.success(), "{command:?}: {}", text(&made));
    library
}

/// The fake libggml-cuda.so, of the ggml that this program is linked with.
fn ggml_cuda() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let (source, libraries) = (env!("TEST_LLAMA_SOURCE"), env!("TEST_LLAMA_LIBS"));
        let own = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake-cuda/ggml-cuda.cpp");
        let mut arguments = vec!["-std=c++17".to_owned(), own.to_owned()];
        for folder in ["ggml/include", "ggml/src"] {
            arguments.extend(["-isystem".to_owned(), format!("{source}/{folder}")]);
        }
        arguments.push(format!("-L{libraries}"));
        arguments.extend(
            ["-lggml-cpu", "-lggml-base", "-fopenmp", "-pthread", "-ldl"].map(str::to_owned),
        );
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        compile("libggml-cuda.so", "c++", &arguments)
    })
}

fn run(model: &Path, prompt: &str, arguments: &str) -> Command {
    let mut command = flea();
    command.arg("run").arg(model);
    command.args([
        "--prompt-tokens",
        prompt,
        "-n",
        "12",
        "--ignore-eos",
        "--json",
    ]);
    command.args(["--threads", "1", "--ubatch", "32"]);
    if !arguments.contains("--ctx") {
        command.args(["--ctx", "256"]);
    }
    command.args(arguments.split_whitespace());
    command
}

fn on_gpu(model: &Path, arguments: &str, state: &[(&str, &str)]) -> Command {
    let mut command = run(model, &prompt(), arguments);
    command.arg("--ggml-cuda").arg(ggml_cuda());
    with_gpu(&mut command, state);
    command
}

/// Three ubatches.
fn prompt() -> String {
    let ids: Vec<String> = (0..70)
        .map(|index| (300 + index * 37 % 400).to_string())
        .collect();
    ids.join(",")
}

fn assert_same(one: &Value, other: &Value, what: &str) {
    assert_eq!(one["logits_hash"], other["logits_hash"], "{what}: {other}");
    assert_eq!(one["token_ids"], other["token_ids"], "{what}");
    assert_eq!(
        other["token_ids"].as_array().map(Vec::len),
        Some(12),
        "{what}"
    );
}

/// Enough for model, KV cache and computing, and late enough that who does not wait is caught.
const GPU: [(&str, &str); 2] = [
    ("FAKE_CUDA_MEMORY", "1073741824"),
    ("FAKE_CUDA_READ_US", "100"),
];

const TWO: [(&str, &str); 3] = [GPU[0], GPU[1], ("FAKE_CUDA_DEVICES", "2")];

#[test]
fn streamed_tokens_are_those_of_all_layers_in_vram() {
    let model = model();
    let whole = json(&mut on_gpu(&model, "--gpu 0 --vram 400%", &GPU));
    let gpu = &whole["gpu"];
    assert_eq!(number(gpu, "link_bytes_per_pass"), 0.0, "{whole}");
    assert_eq!(number(&whole, "loads"), 0.0, "{whole}");
    assert_eq!(
        number(gpu, "h2d_bytes"),
        number(gpu, "h2d_resident_bytes"),
        "{whole}"
    );
    let plain = json(&mut run(&model, &prompt(), "--no-stream"));
    assert_same(&plain, &whole, "a GPU with all layers, and no GPU");
    for (vram, memory, what) in [
        ("25%", "400%", "the rest in host memory"),
        ("25%", "30%", "three tiers"),
        ("60%", "30%", "most of it in VRAM"),
    ] {
        let arguments = format!("--gpu 0 --vram {vram} --memory {memory}");
        let streamed = json(&mut on_gpu(&model, &arguments, &GPU));
        assert_same(&whole, &streamed, what);
        let gpu = &streamed["gpu"];
        let (resident, link) = (
            number(gpu, "vram_resident_bytes"),
            number(gpu, "link_bytes_per_pass"),
        );
        let held = resident + number(gpu, "vram_ring_bytes");
        assert!(
            held <= number(gpu, "vram_budget_bytes"),
            "{what}: {streamed}"
        );
        // 3 ubatches and 11 tokens are 14 passes.
        let over_the_link = number(gpu, "h2d_bytes") - number(gpu, "h2d_resident_bytes");
        assert!(
            link > 0.0 && over_the_link >= 14.0 * link,
            "{what}: {streamed}"
        );
        assert!(over_the_link <= 15.0 * link, "{what}: {streamed}");
        assert!(number(&streamed, "loads") >= 14.0, "{what}: {streamed}");
        assert_eq!(
            number(&streamed, "acquires") % 14.0,
            0.0,
            "{what}: {streamed}"
        );
        assert_eq!(
            gpu["releases_behind_gpu"], streamed["acquires"],
            "{what}: {streamed}"
        );
        assert!(number(gpu, "h2d_pinned_bytes") > 0.0, "{what}: {streamed}");
        // What host memory keeps is read once, the rest in each pass.
        let passes = number(&streamed, "streamed_bytes_per_pass");
        assert_eq!(passes > 0.0, memory == "30%", "{what}: {streamed}");
        assert!(
            number(&streamed, "bytes_read") >= number(gpu, "h2d_resident_bytes") + 13.0 * passes,
            "{what}: {streamed}"
        );
    }
}

/// On several GPUs each computes its layers, in its own memory: the same tokens as on one, and as on none.
#[test]
fn layers_over_two_gpus_give_the_same_tokens() {
    let two = [GPU[0], GPU[1], ("FAKE_CUDA_DEVICES", "3")];
    for (model, what) in [(model(), "dense"), (mixture(), "experts")] {
        let plain = json(&mut run(&model, &prompt(), "--no-stream"));
        for (arguments, count, streams) in [
            ("--gpu 0 --vram 400%", 1, false),
            ("--gpu 0,1 --vram 400%", 2, false),
            ("--gpu 0,1 --vram 25% --memory 400%", 2, true),
            ("--gpu 1,0 --vram 25%,50% --memory 50%", 2, true),
            ("--gpu 0,2,1 --vram 30% --memory 400%", 3, true),
            ("--gpu 0,1 --vram 50% --memory 100%", 2, false),
        ] {
            // A GPU's pages are too long for a few of its layers to be streamed.
            if streams && what == "experts" {
                continue;
            }
            let what = format!("{what}: {arguments}");
            let answer = json(&mut on_gpu(&model, arguments, &two));
            assert_same(&plain, &answer, &what);
            let gpu = &answer["gpu"];
            let each = gpu["each"].as_array().expect("GPUs");
            assert_eq!(each.len(), count, "{what}");
            for field in [
                "vram_resident_bytes",
                "link_bytes_per_pass",
                "h2d_bytes",
                "layer_count",
            ] {
                let sum: f64 = each.iter().map(|gpu| number(gpu, field)).sum();
                assert_eq!(number(gpu, field), sum, "{what}: {answer}");
            }
            let mut layer = 0.0;
            for gpu in each {
                assert_eq!(number(gpu, "first_layer"), layer, "{what}: {answer}");
                layer += number(gpu, "layer_count");
                assert!(
                    number(gpu, "layer_count") > 0.0 && number(gpu, "h2d_bytes") > 0.0,
                    "{what}: {answer}"
                );
                let link = number(gpu, "link_bytes_per_pass");
                let streamed = number(gpu, "h2d_bytes") - number(gpu, "h2d_resident_bytes");
                assert!(!streams || link > 0.0, "{what}: {answer}");
                // 14 passes, and what was read ahead of one more; of few layers one may have a slot to itself.
                assert!(
                    (11.0 * link..=15.0 * link).contains(&streamed),
                    "{what}: {answer}"
                );
            }
            assert_eq!(
                gpu["releases_behind_gpu"], answer["acquires"],
                "{what}: {answer}"
            );
        }
    }
}

#[test]
fn experts_come_with_their_layer() {
    let model = mixture();
    let whole = json(&mut on_gpu(&model, "--gpu 0 --vram 400%", &GPU));
    let streamed = json(&mut on_gpu(&model, "--gpu 0 --vram 60% --memory 60%", &GPU));
    assert_same(&whole, &streamed, "a mixture of experts");
    assert!(
        number(&streamed, "loads") > 0.0 && number(&streamed, "expert_cuts") == 0.0,
        "{streamed}"
    );
    let plain = json(&mut run(&model, &prompt(), "--no-stream"));
    assert_same(&plain, &whole, "a mixture, and no GPU");
}

#[test]
fn a_compressed_model_gives_the_tokens_of_its_original() {
    let directory = tempfile::tempdir().expect("a directory");
    let (original, packed) = (tiled_model(), compressed(directory.path()));
    let plain = json(&mut run(&original, &prompt(), "--no-stream"));
    for (arguments, what) in [
        ("--gpu 0 --vram 64MiB --memory 40%", "three tiers"),
        (
            "--gpu 0 --vram 64MiB --memory 400%",
            "the rest in host memory",
        ),
        ("--gpu 0 --vram 400%", "all in VRAM"),
    ] {
        let whole = json(&mut on_gpu(&original, arguments, &GPU));
        assert_same(&plain, &whole, what);
        assert_eq!(number(&whole["gpu"], "unpacked_bytes"), 0.0, "{whole}");
        let coded = json(&mut on_gpu(&packed, arguments, &GPU));
        assert_same(&plain, &coded, what);
        let gpu = &coded["gpu"];
        let (link, weights) = (
            number(gpu, "link_bytes_per_pass"),
            number(gpu, "link_weights_bytes_per_pass"),
        );
        let (resident, unpacked) = (
            number(gpu, "vram_resident_bytes"),
            number(gpu, "unpacked_bytes"),
        );
        // 3 ubatches and 11 tokens are 14 passes, and nearly all of a model of halves is coded.
        let arrived = resident.min(number(&coded, "model_bytes")) + 14.0 * weights;
        assert!(unpacked >= 0.8 * arrived, "{what}: {coded}");
        let h2d = number(gpu, "h2d_bytes");
        assert!(h2d < 0.75 * (resident + 15.0 * weights), "{what}: {coded}");
        match what {
            "all in VRAM" => assert!(link == 0.0 && weights == 0.0, "{coded}"),
            _ => assert!(link > 0.0 && link < 0.75 * weights, "{what}: {coded}"),
        }
    }
}

/// Events of one kind, and the bytes they tell of.
fn traced(trace: &Value, kind: &str) -> (usize, f64) {
    let events = trace["traceEvents"].as_array().expect("events");
    let of_kind: Vec<&Value> = events.iter().filter(|event| event["cat"] == kind).collect();
    let bytes = of_kind
        .iter()
        .filter_map(|event| event["args"]["bytes"].as_f64());
    (of_kind.len(), bytes.sum())
}

#[test]
fn a_trace_shows_drive_link_waits_and_computing() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("trace.json");
    let streaming = format!(
        "--gpu 0 --vram 25% --memory 30% --trace {}",
        file.to_str().expect("a path")
    );
    let answer = json(&mut on_gpu(&model(), &streaming, &GPU));
    let text = std::fs::read_to_string(&file).expect("a trace");
    let trace: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(trace["otherData"]["dropped_events"], 0);
    let gpu = &answer["gpu"];
    let ahead = number(gpu, "vram_ring_bytes");
    // What was ahead of the last token was on its way when the figures were taken, or when the trace was written.
    let (copies, copied) = traced(&trace, "copy");
    let h2d = number(gpu, "h2d_bytes");
    assert!(
        copies > 14 && (h2d - ahead..=h2d + ahead).contains(&copied) && h2d > 2.0 * ahead,
        "{copied} of {h2d}: {answer}"
    );
    let (reads, read) = traced(&trace, "read");
    let counted = number(&answer, "bytes_read");
    assert!(
        reads > 14 && (counted - ahead..=counted + ahead).contains(&read),
        "{read} of {counted}: {answer}"
    );
    let (leases, _) = traced(&trace, "compute");
    assert_eq!(leases as f64, number(&answer, "acquires"), "{answer}");
    assert!(traced(&trace, "wait").0 > 0, "{text}");
    let events = trace["traceEvents"].as_array().expect("events");
    for named in ["resident", "blk.3"] {
        let has = |event: &&Value| event["cat"] == "copy" && event["name"] == named;
        assert!(events.iter().any(|event| has(&event)), "no copy of {named}");
    }
}

/// The library of another ggml: known by its version, before anything of it is called.
fn another_ggml() -> PathBuf {
    let source =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("another-{}.c", std::process::id()));
    let text = "const char *ggml_version(void) { return \"0.0.1\"; }\nvoid *ggml_backend_init(void) { __builtin_trap(); }\n";
    std::fs::write(&source, text).expect("a source");
    compile("libanother.so", "cc", &[source.to_str().expect("a path")])
}

#[test]
fn what_cannot_work_says_so_before_a_weight_is_read() {
    let model = model();
    let another = another_ggml();
    let library = |path: &Path| {
        let mut command = run(&model, "300", "--gpu 0 --vram 25%");
        command.arg("--ggml-cuda").arg(path);
        with_gpu(&mut command, &GPU);
        command
    };
    let has_driver = Path::new("/proc/driver/nvidia/version").exists();
    let mut no_driver = run(&model, "300", "--gpu 0 --vram 25%");
    let no_library = with_gpu(&mut run(&model, "300", "--gpu 0 --vram 25%"), &GPU).output();
    let taken = [
        ("FAKE_CUDA_MEMORY", "67108864"),
        ("FAKE_CUDA_TAKEN", "60000000"),
    ];
    let tight = [("FAKE_CUDA_MEMORY", "41943040")];
    for (what, answer, exit, words) in [
        ("no driver", output(&mut no_driver), 1, "no CUDA driver"),
        (
            "no library",
            no_library.expect("flea runs"),
            1,
            "--ggml-cuda",
        ),
        (
            "no such library",
            output(&mut library(Path::new("/nonexistent.so"))),
            1,
            "/nonexistent.so",
        ),
        (
            "some library",
            output(&mut library(Path::new("libc.so.6"))),
            2,
            "no library of ggml-cuda",
        ),
        (
            "another ggml",
            output(&mut library(&another)),
            1,
            "is of ggml 0.0.1, this program has ggml",
        ),
        (
            "no second GPU",
            output(&mut on_gpu(&model, "--gpu 1 --vram 25%", &GPU)),
            1,
            "GPU 1 does not exist",
        ),
        (
            "the second of two GPUs is not there",
            output(&mut on_gpu(&model, "--gpu 0,1 --vram 25%", &GPU)),
            1,
            "GPU 1 does not exist",
        ),
        (
            "a GPU twice",
            output(&mut on_gpu(&model, "--gpu 0,0 --vram 25%", &GPU)),
            2,
            "GPU 0 is named twice",
        ),
        (
            "more sizes than GPUs",
            output(&mut on_gpu(&model, "--gpu 0,1 --vram 25%,25%,25%", &TWO)),
            2,
            "3 sizes of VRAM for 2 GPUs",
        ),
        (
            "too little on the second GPU",
            output(&mut on_gpu(&model, "--gpu 0,1 --vram 50%,1MiB", &TWO)),
            4,
            "GPU 1: VRAM:",
        ),
        (
            "little memory below two GPUs",
            output(&mut on_gpu(
                &model,
                "--gpu 0,1 --vram 25% --memory 0.1%",
                &TWO,
            )),
            4,
            "the smallest total that works",
        ),
        (
            "too little asked for",
            output(&mut on_gpu(&model, "--gpu 0 --vram 4MiB", &GPU)),
            4,
            "VRAM:",
        ),
        (
            "VRAM taken by others",
            output(&mut on_gpu(&model, "--gpu 0 --vram 25%", &taken)),
            4,
            "nvidia-smi",
        ),
        (
            "no room for the context",
            output(&mut on_gpu(
                &model,
                "--gpu 0 --vram 38MiB --ctx 100000",
                &tight,
            )),
            4,
            "--vram",
        ),
        (
            "little memory below",
            output(&mut on_gpu(
                &model,
                "--gpu 0 --vram 25% --memory 1MiB",
                &GPU,
            )),
            4,
            "the smallest total that works",
        ),
    ] {
        if what == "no driver" && has_driver {
            common::skip("this machine has an NVIDIA driver");
            continue;
        }
        let text = text(&answer);
        assert_eq!(answer.status.code(), Some(exit), "{what}: {text}");
        assert!(text.contains(words), "{what}: {text}");
        let error: Value = serde_json::from_slice(&answer.stdout).expect("an object");
        assert!(error["error"]["message"].is_string(), "{what}: {text}");
    }
}

#[test]
fn a_gpu_that_is_lost_ends_the_run_with_its_reason() {
    let state = [GPU[0], ("FAKE_CUDA_LOST_AFTER", "60")];
    let answer = output(&mut on_gpu(
        &model(),
        "--gpu 0 --vram 25% --memory 400%",
        &state,
    ));
    let text = text(&answer);
    assert!(
        !answer.status.success() && text.contains("the GPU is lost to this process"),
        "{text}"
    );
}
