//! `--reader gds` with the fake libcufile: real, in compatibility mode, hanging, wrong, refusing, missing. Only what is real is used,
//! all else is said and counted, and every byte is right all the same.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/fake_cuda.rs"]
mod fake_cuda;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{flea, json, number, output, padded_model as model, text};
use fake_cuda::with_gpu;
use flea::ErrorKind;
use flea::engine::gpu::{GpuModel, GpuOptions};
use flea::engine::{BudgetSpec, OpenOptions, read_catalog};
use flea::io::{ReaderKind, ReaderOptions};

/// Gives a program the fake GPU and libcufile.
fn with_cufile<'a>(command: &'a mut Command, state: &[(&str, &str)]) -> &'a mut Command {
    with_gpu(command, state);
    command.env("LD_LIBRARY_PATH", fake_cuda::directory_with_cufile())
}

fn stream(model: &Path, arguments: &str, state: &[(&str, &str)]) -> Command {
    let arguments = format!("--reader gds {arguments}");
    let mut command = fake_cuda::stream_on_gpu_0(model, &arguments, state);
    command.env("LD_LIBRARY_PATH", fake_cuda::directory_with_cufile());
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

// ---- what a host sees, in a process of its own with the fake libraries -------------------------------------------

/// What happens to the model that the other process has opened: FAULT is where its file is.
const FAULT: &str = "FLEA_TEST_GDS_FAULT";

/// Starts one of the tests below.
fn in_a_process(name: &str, path: &Path, state: &[(&str, &str)]) {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", name, "--ignored", "--nocapture"]);
    with_cufile(&mut command, state).env(FAULT, path);
    // flea, which tries cuFile first, is looked for there.
    let folder = Path::new(env!("CARGO_BIN_EXE_flea")).parent();
    command.env("PATH", folder.expect("a folder"));
    let said = output(&mut command);
    let is_run = text(&said).contains("1 passed");
    assert!(said.status.success() && is_run, "{}", text(&said));
}

/// A model of which nothing has been read yet.
fn opened() -> (GpuModel, PathBuf) {
    let path = PathBuf::from(std::env::var_os(FAULT).expect("a model"));
    let gpu = GpuOptions {
        index: 0,
        vram_bytes: 80 << 20,
        slots_count: 3,
    };
    let options = OpenOptions {
        budget: BudgetSpec::Pool(40 << 20),
        defer_plan: true,
        reader: ReaderOptions {
            kind: ReaderKind::Gds,
            ..ReaderOptions::default()
        },
        ..OpenOptions::default()
    };
    let model = GpuModel::open(&path, &gpu, options).expect("a model on the fake GPU");
    assert!(model.is_direct(), "{:?}", model.stats().host.fallbacks);
    (model, path)
}

const PATIENCE: Option<Duration> = Some(Duration::from_secs(60));

#[test]
fn copies_of_a_read_that_failed_are_not_left_behind() {
    // Copies within VRAM take 0.1 s and more: whoever does not wait for them is far ahead.
    let state = [("FAKE_CUDA_READ_US", "100000")];
    in_a_process("a_failed_read", &model(), &state);
}

#[test]
#[ignore = "the other process of copies_of_a_read_that_failed_are_not_left_behind"]
#[allow(unsafe_code)]
fn a_failed_read() {
    let (model, path) = opened();
    let vram = model.vram();
    let run = vram.plan.layers[4].transient.expect("layer 4 is streamed");
    let start = run.first_page * vram.plan.page_bytes;
    // What is read and copied together: the first is in VRAM when the second cannot be read.
    let together: Vec<_> = vram.image.pieces[4]
        .iter()
        .filter_map(|piece| piece.within(start, start + (4 << 20)))
        .filter(|piece| piece.file.len_bytes > 1 << 16)
        .collect();
    assert!(together.len() >= 2, "{together:?}");
    let (copied, bad) = (&together[0].file, &together[1].file);
    let at = (bad.offset_bytes + bad.len_bytes / 2).to_string();
    // Everything else is read and at rest, so that the failure is told the moment it happens.
    model.acquire(5, None, PATIENCE).expect("layer 5");
    let until = Instant::now() + Duration::from_secs(60);
    while model.stats().loads < 3 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(model.stats().loads, 3, "layers 5, 6 and 7");
    // SAFETY: nothing more is asked for: the other threads of this process sleep, and look at no variable.
    unsafe { std::env::set_var("FAKE_CUFILE_FAIL_AT", at) };
    let error = model.acquire(4, None, PATIENCE).expect_err("it fails");
    let address = model.address(copied.shard_index, copied.offset_bytes);
    let address = address.expect("a place in VRAM") as *const u8;
    // SAFETY: memory of the fake GPU, which is mapped in this process.
    let there = unsafe { std::slice::from_raw_parts(address, copied.len_bytes as usize) };
    let there = there.to_vec();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    let file = std::fs::read(path).expect("the model");
    let expected = &file[copied.offset_bytes as usize..copied.end_bytes() as usize];
    assert!(
        there == expected,
        "the failure was told, and a copy into the slot was still to come"
    );
}

#[test]
fn a_file_that_was_changed_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let own = directory.path().join("model.gguf");
    std::fs::copy(model(), &own).expect("copied");
    in_a_process("a_changed_file", &own, &[]);
}

#[test]
#[ignore = "the other process of a_file_that_was_changed_is_refused"]
fn a_changed_file() {
    use std::os::unix::fs::FileExt;
    let (model, path) = opened();
    let file = std::fs::File::options()
        .write(true)
        .open(&path)
        .expect("the model");
    let len = file.metadata().expect("its length").len();
    file.write_all_at(&[0x5a; 64], len / 2).expect("changed");
    let error = model
        .acquire(4, None, PATIENCE)
        .expect_err("it was changed");
    assert_eq!(error.kind(), ErrorKind::Changed, "{error}");
    assert!(error.to_string().contains("model.gguf"), "{error}");
    assert_eq!(model.stats().direct_bytes, 0, "read all the same");
}
