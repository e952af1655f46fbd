//! scripts/gpu-check.sh on the fake GPU of tests/fake-cuda: it goes through every step that needs no compiler for GPUs, goes on where
//! its time was up, and its report says what was not run, and why.
#![cfg(all(feature = "cuda", feature = "cli"))]

mod common;
#[path = "common/fake_cuda.rs"]
mod fake_cuda;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The newest integration test of this name, compiled beside this one: what the script calls, where all tests are compiled.
fn test_program(name: &str) -> Option<PathBuf> {
    let own = std::env::current_exe().expect("this program");
    let beside = std::fs::read_dir(own.parent()?).expect("its folder");
    let programs = beside.flatten().filter(|entry| {
        let file = entry.file_name();
        let file = file.to_string_lossy();
        let hash = file
            .strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('-'));
        hash.is_some_and(|hash| hash.bytes().all(|byte| byte.is_ascii_hexdigit()))
    });
    let newest = programs.max_by_key(|entry| entry.metadata().and_then(|it| it.modified()).ok())?;
    Some(newest.path())
}

/// What `gpu-check.sh bundle` makes, out of what this build has: without the sources of llama.cpp, for which there is no compiler.
fn bundle(folder: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let copy = |from: &Path, name: &str| {
        std::fs::copy(from, folder.join(name)).expect("copied");
    };
    copy(&root.join("scripts/gpu-check.sh"), "gpu-check.sh");
    copy(&root.join("kernels/flea.fatbin"), "flea.fatbin");
    copy(Path::new(env!("CARGO_BIN_EXE_flea")), "flea");
    for (test, name) in [
        ("kernels", "kernels-test"),
        ("gpu_kernels", "gpu-kernels-test"),
    ] {
        if let Some(program) = test_program(test) {
            copy(&program, name);
        }
    }
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    let made = Command::new(compiler)
        .args(["-std=c++17", "-O2"])
        .arg(root.join("kernels/check/device.cpp"))
        .arg("-o")
        .arg(folder.join("device"))
        .arg("-ldl")
        .output()
        .expect("a compiler for C++");
    assert!(made.status.success(), "{}", said(&made));
}

/// Calls the script as on a machine with nothing but the system's own programs.
fn check(folder: &Path, seconds: &str) -> Output {
    let with_cufile = fake_cuda::directory_with_cufile().display();
    let libraries = format!("{with_cufile}:{}", fake_cuda::directory().display());
    let mut command = Command::new("bash");
    command.arg("bundle/gpu-check.sh").current_dir(folder);
    command.env_clear().env("PATH", "/usr/bin:/bin");
    command.env("LD_LIBRARY_PATH", libraries);
    command.envs([
        ("FAKE_CUDA_MEMORY", "1073741824"),
        ("FAKE_CUDA_DELAY_US", "0"),
        ("FAKE_CUDA_READ_US", "0"),
        ("GPU_CHECK_MODEL", "192MiB"),
        ("GPU_CHECK_HALVES", "144MiB"),
        ("GPU_CHECK_KERNELS", "4MiB"),
        (
            "GPU_CHECK_PROBE",
            "--size 64MiB --sustain 20ms --seconds 2ms --max-spread 1000 --target 1MB/s",
        ),
        ("GPU_CHECK_SECONDS", seconds),
    ]);
    command.output().expect("bash")
}

fn said(output: &Output) -> String {
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}\n{}", output.status, text(stdout), text(stderr))
}

fn is_there(program: &str) -> bool {
    let toolkits = std::fs::read_dir("/usr/local").into_iter().flatten();
    let folders = toolkits.flatten().map(|entry| entry.path().join("bin"));
    let system = ["/usr/bin", "/bin"].map(PathBuf::from);
    let mut all = folders.chain(system);
    all.any(|folder| folder.join(program).exists())
}

#[test]
fn it_goes_on_where_it_was_and_says_what_was_not_run() {
    let directory = tempfile::tempdir().expect("a directory");
    let folder = directory.path().join("bundle");
    std::fs::create_dir(&folder).expect("a folder");
    bundle(&folder);

    // Not enough for a model, but for the kernels.
    let first = check(directory.path(), "205");
    assert_eq!(first.status.code(), Some(75), "{}", said(&first));
    assert!(said(&first).contains("call again"), "{}", said(&first));
    let report = directory.path().join("gpu-report");
    assert!(!report.join("report.json").exists());
    let done = report.join("steps/bench-kernels.status");
    let when = |path: &Path| {
        let there = path.metadata().and_then(|it| it.modified());
        there.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let before = when(&done);

    let second = check(directory.path(), "540");
    let text = std::fs::read_to_string(report.join("report.json")).expect("a report");
    assert_eq!(second.status.code(), Some(0), "{}", said(&second));
    assert_eq!(before, when(&done), "done twice");
    let answer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(answer["info"]["gpu"], "Fake GPU 0");
    let steps = answer["steps"].as_object().expect("steps");
    for name in [
        "bench-kernels",
        "model",
        "probe",
        "drive-to-memory",
        "memory-to-vram",
        "drive-to-vram",
        "mixed",
        "mixed-planned",
        "every-byte",
        "gds",
        "gds-stream",
        "halves",
        "pack",
        "packed",
        "not-packed",
    ] {
        assert!(steps.contains_key(name), "{name} is missing: {text}");
    }
    for (name, step) in steps {
        assert_eq!(step["verdict"], "passed", "{name}: {}", said(&second));
    }
    let result = |name: &str, key: &str| steps[name]["result"][key].as_f64().unwrap_or(0.0);
    assert!(result("every-byte", "verified_bytes") > 100e6, "{text}");
    assert!(result("packed", "unpacked_bytes") > 100e6, "{text}");
    assert!(result("gds-stream", "direct_bytes") > 100e6, "{text}");
    let figures = answer["figures"].as_array().expect("figures");
    assert_eq!(figures.len(), 6, "{text}");

    let not_run = answer["not_run"].as_object().expect("an object");
    let markdown = std::fs::read_to_string(report.join("report.md")).expect("a report");
    let mut expected = Vec::new();
    for (program, name) in [
        ("nvidia-smi", "nvidia-smi"),
        ("compute-sanitizer", "sanitizer"),
        ("nvcc", "tokens"),
        ("nvcc", "ngl"),
    ] {
        if !is_there(program) {
            expected.push(name);
        }
    }
    if test_program("kernels").is_none() {
        expected.retain(|name| *name != "sanitizer");
        expected.push("kernels");
    }
    for name in expected {
        let why = not_run[name].as_str().expect("a reason");
        assert!(
            why.contains("not installed") || why.contains("no ") || why.contains("without"),
            "{name}: {why}"
        );
        assert!(markdown.contains(&format!("* {name}: {why}")), "{markdown}");
    }
    assert!(markdown.contains("against all of them: not run") || is_there("nvcc"));
}

#[test]
fn a_machine_without_a_gpu_or_a_bundle_is_told() {
    if Path::new("/proc/driver/nvidia/version").exists() {
        common::skip("this machine has an NVIDIA driver");
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let folder = directory.path().join("bundle");
    std::fs::create_dir(&folder).expect("a folder");
    bundle(&folder);
    let call = || {
        let mut command = Command::new("bash");
        command.arg("bundle/gpu-check.sh");
        command
            .current_dir(directory.path())
            .output()
            .expect("bash")
    };
    let none = call();
    assert_eq!(none.status.code(), Some(3), "{}", said(&none));
    assert!(said(&none).contains("no GPU that can be used"));
    std::fs::remove_file(folder.join("device")).expect("removed");
    let part = call();
    assert_eq!(part.status.code(), Some(2), "{}", said(&part));
    assert!(said(&part).contains("has no device"), "{}", said(&part));
}
