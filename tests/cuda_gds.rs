//! `--reader gds` with the fake libcufile: real, in compatibility mode, hanging, wrong, refusing, missing. Only what is real is used,
//! all else is said and counted, and every byte is right all the same.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/fake_cuda.rs"]
mod fake_cuda;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{flea, json, number, output};
use fake_cuda::with_gpu;
use flea::engine::read_catalog;

/// Ten layers of 8 MB, padded in VRAM.
fn model() -> PathBuf {
    let arguments = "--arch llama --layers 10 --embd 768 --ffn 2400 --heads 12 --kv-heads 4 --vocab 3000 --type q8_0";
    let arguments: Vec<&str> = arguments.split(' ').collect();
    common::synth("cuda", &arguments)
}

fn text(output: &Output) -> String {
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    format!(
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(stdout),
        String::from_utf8_lossy(stderr)
    )
}

/// Gives a program the fake GPU and libcufile.
fn with_cufile<'a>(command: &'a mut Command, state: &[(&str, &str)]) -> &'a mut Command {
    with_gpu(command, state);
    command.env("LD_LIBRARY_PATH", fake_cuda::directory_with_cufile())
}

fn stream(model: &Path, arguments: &str, state: &[(&str, &str)]) -> Command {
    let mut command = flea();
    command.args(["bench", "stream"]).arg(model);
    command.args(["--gpu", "0", "--json", "--reader", "gds"]);
    command.args(arguments.split_whitespace());
    with_cufile(&mut command, state);
    command
}

#[test]
fn what_is_real_reads_past_host_memory() {
    let model = model();
    let (catalog, _) = read_catalog(&model).expect("a model");
    let whole = catalog.layer_bytes() as f64;
    for (vram, state) in [
        ("80MiB", &[][..]),
        (
            "80MiB",
            &[("FAKE_CUDA_SEED", "7"), ("FAKE_CUDA_READ_US", "3000")],
        ),
        ("200MiB", &[]),
    ] {
        let arguments = format!("--vram {vram} --memory 40% --passes 2 --verify");
        let answer = json(&mut stream(&model, &arguments, state));
        assert_eq!(answer["reader"], "gds", "{answer}");
        assert_eq!(answer["fallbacks"], serde_json::json!([]));
        assert_eq!(number(&answer, "verified_bytes"), whole);
        let tiers = &answer["tiers"];
        let streamed = number(tiers, "drive_bytes");
        assert_eq!(number(tiers, "memory_bytes"), 0.0);
        assert_eq!(number(tiers, "vram_bytes") + streamed, whole);
        assert_eq!(number(&answer, "pinned_bytes"), 0.0);
        // All of it came by cuFile: twice what is streamed, what stays, and what whole pages bring along.
        let read = number(&answer, "direct_bytes");
        assert_eq!(number(&answer, "bytes_read"), read);
        let least = whole + streamed;
        assert!(
            read >= least && read <= 1.1 * least + 3.0 * streamed,
            "{answer}"
        );
        assert_eq!(vram == "200MiB", streamed == 0.0, "{answer}");
    }
}

#[test]
fn what_is_not_real_is_said_and_not_used() {
    let model = model();
    let (catalog, _) = read_catalog(&model).expect("a model");
    for (mode, reason) in [
        (
            "compat",
            "compatibility mode, which copies through host memory",
        ),
        ("may_fall", "allow_compat_mode"),
        ("hang", "cuFile did not answer within 10 s"),
        ("wrong", "cuFile reads other bytes than the host"),
        ("refuse", "open cuFile's driver: cuFile's error 5002"),
        ("missing", "libcufile.so.0 cannot be loaded"),
    ] {
        let arguments = "--vram 48MiB --memory 40% --passes 1 --verify";
        let mut command = stream(&model, arguments, &[("FAKE_CUFILE", mode)]);
        if mode == "missing" {
            command.env("LD_LIBRARY_PATH", fake_cuda::directory());
        }
        let said = output(&mut command);
        assert!(said.status.success(), "{mode}: {}", text(&said));
        let answer: serde_json::Value = serde_json::from_slice(&said.stdout).expect("JSON");
        assert_ne!(answer["reader"], "gds", "{mode}");
        assert_eq!(answer["fallbacks"], serde_json::json!(["gds"]), "{mode}");
        assert_eq!(answer["direct_bytes"], 0);
        assert_eq!(answer["verified_bytes"], catalog.layer_bytes());
        let errors = String::from_utf8_lossy(&said.stderr);
        assert!(
            errors.contains("through host memory instead of GDS"),
            "{errors}"
        );
        assert!(errors.contains(reason), "{mode}: {errors}");
    }
}

#[test]
fn a_drive_that_fails_midway_fails_the_lease() {
    let state = [("FAKE_CUFILE_FAIL_AFTER", "12")];
    let said = output(&mut stream(&model(), "--vram 80MiB --passes 1", &state));
    assert_eq!(said.status.code(), Some(1), "{}", text(&said));
    assert!(text(&said).contains("cuFile at offset"), "{}", text(&said));
    assert!(!text(&said).contains("panicked"), "{}", text(&said));
}

#[test]
fn one_can_ask_whether_it_works() {
    let ask = |mode: &str, arguments: &[&str]| {
        let mut command = flea();
        command.args(["bench", "gds"]).arg(model()).args(arguments);
        with_cufile(&mut command, &[("FAKE_CUFILE", mode)]);
        command
    };
    let real = json(&mut ask("real", &["--json"]));
    assert_eq!(
        (&real["gds"], &real["reason"]),
        (&true.into(), &serde_json::Value::Null)
    );
    let compat = json(&mut ask("compat", &["--json"]));
    assert_eq!(compat["gds"], false);
    let said = output(&mut ask("wrong", &[]));
    assert!(said.status.success(), "{}", text(&said));
    assert!(
        text(&said).contains("no GPUDirect Storage"),
        "{}",
        text(&said)
    );
    // For host memory it is no reader.
    let mut command = flea();
    command.args(["bench", "stream"]).arg(model());
    let said = output(command.args(["--memory", "60%", "--reader", "gds"]));
    assert!(!said.status.success());
    assert!(text(&said).contains("--gpu"), "{}", text(&said));
}
