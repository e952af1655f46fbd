//! The ggml device in stock, unmodified llama.cpp, with weights streamed into the memory of GPUs (a driver and a ggml-cuda that
//! take theirs in host memory). Needs what scripts/test.sh builds.

mod common;
#[path = "common/fake_cuda.rs"]
mod fake_cuda;
#[path = "common/stock.rs"]
mod stock;

use common::{number, output, tiny};
use std::path::{Path, PathBuf};
use std::process::Command;
use stock::{Stock, generate, stderr, take_stats};

/// What takes ggml-cuda's place, built for the stock llama.cpp: it shares that one's ggml.
fn ggml_cuda(stock: &Stock, folder: &Path) -> PathBuf {
    let library = folder.join("libggml-cuda.so");
    let root = stock.programs.join("../..");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-cuda/ggml-cuda.cpp");
    let mut command = Command::new("c++");
    command.args(["-std=c++17", "-O1", "-fPIC", "-shared", "-o"]);
    command.arg(&library).arg(source);
    for headers in ["src/ggml/include", "src/ggml/src"] {
        command.arg("-isystem").arg(root.join(headers));
    }
    command.arg("-L").arg(&stock.programs);
    let said = output(command.args(["-lggml-cpu", "-lggml-base", "-pthread", "-ldl"]));
    assert!(said.status.success(), "{}", stderr(&said));
    library
}

#[test]
fn weights_streamed_into_vram_give_the_same_logits() {
    let Some(stock) = Stock::find() else { return };
    let folder = tempfile::tempdir().expect("a directory");
    let library = ggml_cuda(&stock, folder.path());
    let on_gpu = |vram: &str| {
        let (mut command, stats) = stock.plugged(&stock.logits, "400%");
        fake_cuda::with_gpu(&mut command, &[("FAKE_CUDA_READ_US", "100")]);
        command
            .env("FLEA_VRAM", vram)
            .env("FLEA_GGML_CUDA", &library);
        command.args(["--device", "FLEA"]);
        (command, stats)
    };
    let one_thread = ["--threads", "1"];
    for (arch, dtype) in [("llama", "f16"), ("gemma3", "q4_0"), ("mixtral", "q8_0")] {
        let model = tiny(arch, dtype);
        let reference = stock.reference(&model, &one_thread);
        for vram in ["8MiB", "128MiB"] {
            let what = format!("{arch} {dtype} {vram}");
            let (mut command, path) = on_gpu(vram);
            let rows = generate(&mut command, &model, &one_thread);
            let stats = take_stats(&path);
            assert!(rows == reference, "{what}: the logits differ; {stats}");
            assert!(stats["error"].is_null(), "{what}: {stats}");
            assert_eq!(stats["layers_placed"], stats["layers"], "{what}: {stats}");
            let leases = number(&stats, "graphs") * number(&stats, "layers");
            assert_eq!(number(&stats, "acquires"), leases, "{what}: {stats}");
            assert_eq!(
                number(&stats, "releases_behind_gpu"),
                leases,
                "{what}: {stats}"
            );
            let link = number(&stats, "link_bytes_per_pass");
            let streamed = number(&stats, "h2d_bytes") - number(&stats, "h2d_resident_bytes");
            assert_eq!(link > 0.0, vram == "8MiB", "{what}: {stats}");
            assert!(
                streamed >= link * number(&stats, "graphs"),
                "{what}: {stats}"
            );
            assert_eq!(number(&stats, "loads") > 0.0, link > 0.0, "{what}: {stats}");
        }
    }
    let (mut command, _) = on_gpu("1MiB");
    command.arg("-m").arg(tiny("llama", "f16"));
    let said = output(command.args(["--prompt-tokens", "300"]));
    assert!(
        !said.status.success() && stderr(&said).contains("VRAM:"),
        "{}",
        stderr(&said)
    );
}

/// llama.cpp divides layers over devices by what is free on them: flea's say what makes that its own division.
#[test]
fn stock_programs_divide_the_layers_as_flea_does() {
    let Some(stock) = Stock::find() else { return };
    let folder = tempfile::tempdir().expect("a directory");
    let library = ggml_cuda(&stock, folder.path());
    let on_gpus = |gpus: &str, vram: &str, devices: &str| {
        let (mut command, stats) = stock.plugged(&stock.logits, "400%");
        let state = [("FAKE_CUDA_READ_US", "100"), ("FAKE_CUDA_DEVICES", "3")];
        fake_cuda::with_gpu(&mut command, &state);
        command
            .envs([("FLEA_GPU", gpus), ("FLEA_VRAM", vram)])
            .env("FLEA_GGML_CUDA", &library);
        command.args(["--device", devices]);
        (command, stats)
    };
    let one_thread = ["--threads", "1"];
    for (arch, dtype) in [("llama", "f16"), ("gemma3", "q4_0"), ("mixtral", "q8_0")] {
        let model = tiny(arch, dtype);
        let reference = stock.reference(&model, &one_thread);
        for (gpus, vram, devices) in [
            ("0,1", "8MiB", "FLEA0,FLEA1"),
            ("1,0", "64MiB,128MiB", "FLEA0,FLEA1"),
            ("2,0,1", "128MiB", "FLEA0,FLEA1,FLEA2"),
        ] {
            let what = format!("{arch} {dtype} {gpus} {vram}");
            let (mut command, path) = on_gpus(gpus, vram, devices);
            let rows = generate(&mut command, &model, &one_thread);
            let stats = take_stats(&path);
            assert!(rows == reference, "{what}: the logits differ; {stats}");
            assert!(stats["error"].is_null(), "{what}: {stats}");
            assert_eq!(stats["layers_placed"], stats["layers"], "{what}: {stats}");
            assert_eq!(
                number(&stats, "gpus") as usize,
                devices.split(',').count(),
                "{what}"
            );
            assert_eq!(
                stats["releases_behind_gpu"], stats["acquires"],
                "{what}: {stats}"
            );
        }
    }
    // Another order, or one device alone, is a division of its own: an error, and no wrong bytes.
    for devices in ["FLEA1,FLEA0", "FLEA0"] {
        let (mut command, _) = on_gpus("0,1", "64MiB", devices);
        command.arg("-m").arg(tiny("llama", "f16"));
        let said = output(command.args(["--prompt-tokens", "300"]));
        let text = stderr(&said);
        assert!(
            !said.status.success() && text.contains("-ts "),
            "{devices}: {text}"
        );
    }
    let (mut command, _) = on_gpus("0,0", "64MiB", "FLEA0");
    command.arg("-m").arg(tiny("llama", "f16"));
    let said = output(command.args(["--prompt-tokens", "300"]));
    assert!(
        !said.status.success() && stderr(&said).contains("FLEA_GPU=0,0"),
        "{}",
        stderr(&said)
    );
}
